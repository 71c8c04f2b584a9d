# Two commands suffice on a fresh machine: `make quickstart` runs the example, `make test` runs all tests.
SHELL := bash
# Compiled once for a checkout, not in each of some hundred processes. Python takes empty for unset.
export PYTHONDONTWRITEBYTECODE :=
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
STREAMS := -n 2 --dist loadscope --no-loadscope-reorder
CACHE := $(or $(DAGGER_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dagger-operator)
# A label of the images: the commit, and whether the checkout differs from it.
REVISION = $(or $(shell git describe --always --exclude='*' --abbrev=40 --dirty=-modified 2>/dev/null),unknown)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check fast heavy tools experiment generate lock clean images cluster-up cluster-down

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: ## Install everything into .venv, from the locks
	@scripts/setup

quickstart: setup ## The whole loop on this machine: from a DAggerRun in YAML to a better student
	@$(BIN)/python examples/quickstart/run.py

test: setup check fast heavy ## All tests, including the quickstart's end-to-end test

check: setup ## Lint, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --cache-dir "$(CACHE)/mypy"
	$(BIN)/lint-imports

fast: setup ## Tests that need no torch, no vLLM and no built tool
	$(PYTEST) $(STREAMS) -m "not heavy and not cuda"

heavy: setup tools $(if $(DAGGER_TEST_KUBECONFIG),,images) ## Tests with real vLLM, DeepSpeed, S3 and Kubernetes
	$(PYTEST) $(STREAMS) -m "heavy and not cuda"

tools: setup ## Go programs that tests need, built once per machine
	@for module in tests/tools/*/; do scripts/build-tool $$(basename $$module) >/dev/null || exit; done

experiment: setup ## DAgger against behaviour cloning, five seeds; takes an hour or more
	$(BIN)/python examples/quickstart/experiment.py

images: setup ## All container images from images/Dockerfile: an OCI layout, or, with DOCKER=docker, in Docker (images/README.md)
ifdef DOCKER
	for target in operator worker sandbox-helper trainer quickstart vllm-cpu; do \
	  $(DOCKER) build -f images/Dockerfile --target $$target -t dagger-operator/$$target:$(VERSION) \
	    --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) . || exit; done
else
	@scripts/images build
endif

cluster-up: ## Start a real single-node Kubernetes on this machine, for tests (tests/cluster/README.md)
	@tests/cluster/up

cluster-down: ## Stop it, and remove everything except its images
	@tests/cluster/down

generate: setup ## The CRD and its reference from the models; the plain manifests from the chart
	$(BIN)/python -m dagger_operator.api.crd
	@scripts/manifests

lock: ## Resolve the dependencies again, deliberately
	@scripts/lock

clean: ## Remove what was installed and built here
	rm -rf .venv .dagger .pytest_cache .mypy_cache .ruff_cache .hypothesis
