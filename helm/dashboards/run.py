"""One run, or several: what its workers, gateways, trainers and policy servers do now."""

from dashboards.parts import Board, Choice, Graph, Number, Row, Table, quantiles, share

_RUN = 'namespace=~"$namespace", dagger_operator_dev_run=~"$run"'
"""The pods of the run: labels that the chart's PodMonitor gives their samples."""
_INFO = 'run_namespace=~"$namespace", run=~"$run"'


def _rate(counter: str, by: str = "", where: str = "") -> str:
    selected = f"rate({counter}{{{', '.join(filter(None, (_RUN, where)))}}}[$__rate_interval])"
    return f"sum by ({by}) ({selected})" if by else f"sum({selected})"


def _now(gauge: str, by: str = "", how: str = "sum") -> str:
    return f"{how} by ({by}) ({gauge}{{{_RUN}}})" if by else f"{how}({gauge}{{{_RUN}}})"


RUN = Board(
    uid="dagger-run",
    title="DAgger / Run",
    about="Who acts, what is labelled, how sandboxes and policies answer, and how training goes",
    choices=(
        Choice("namespace", "namespace", "label_values(dagger_run_info, run_namespace)"),
        Choice("run", "run", 'label_values(dagger_run_info{run_namespace=~"$namespace"}, run)'),
    ),
    rows=(
        Row(
            "Now",
            (
                Table(
                    title="Phase, and why it waits",
                    queries={"": f"max by (run_namespace, run, phase, reason) (dagger_run_info{{{_INFO}}})"},
                    columns=("run_namespace", "run", "phase", "reason"),
                    width=12,
                ),
                Number(title="Rollouts under way", queries={"": _now("dagger_rollouts_under_way")}),
                Number(
                    title="Teacher's share of turns",
                    queries={"": share(_rate("dagger_gateway_turns_total", where='actor="teacher"'), _rate("dagger_gateway_turns_total"))},
                    unit="percentunit",
                    help="As delivered; the nominal one is the run's beta.",
                ),
                Number(
                    title="Label coverage",
                    queries={"": share(_rate("dagger_gateway_labels_total", where='flaw="None"'), _rate("dagger_gateway_labels_total"))},
                    unit="percentunit",
                    help="Labels that can be trained on.",
                ),
            ),
        ),
        Row(
            "Rollouts and evaluation",
            (
                Graph(
                    title="Rollouts by outcome",
                    queries={"{{kind}} {{outcome}}": _rate("dagger_rollouts_total", "kind, outcome")},
                    unit="ops",
                    stacked=True,
                ),
                Graph(title="Rollouts under way", queries={"{{kind}}": _now("dagger_rollouts_under_way", "kind")}),
                Graph(
                    title="A rollout, from claim to record",
                    queries=quantiles("dagger_rollout_seconds", "kind", f'{_RUN}, outcome="Done"'),
                    unit="s",
                ),
                Graph(title="Until a sandbox answers", queries=quantiles("dagger_sandbox_create_seconds", "", _RUN), unit="s"),
                Graph(title="Then until the agent begins", queries=quantiles("dagger_sandbox_start_seconds", "", _RUN), unit="s"),
                Graph(title="A command of an agent", queries=quantiles("dagger_sandbox_command_seconds", "", _RUN), unit="s"),
                Graph(title="A grade", queries=quantiles("dagger_grade_seconds", "", _RUN), unit="s"),
                Graph(
                    title="Broken by infrastructure, by reason",
                    queries={"{{kind}} {{reason}}": _rate("dagger_infrastructure_failures_total", "kind, reason")},
                    unit="ops",
                    width=16,
                ),
            ),
        ),
        Row(
            "Gateway",
            (
                Graph(
                    title="Turns by actor", queries={"{{actor}}": _rate("dagger_gateway_turns_total", "actor")}, unit="ops", stacked=True
                ),
                Graph(title="A request to a policy", queries=quantiles("dagger_gateway_request_seconds", "role, purpose", _RUN), unit="s"),
                Graph(
                    title="Tokens",
                    queries={"{{role}} {{kind}}": _rate("dagger_gateway_tokens_total", "role, kind")},
                    unit="ops",
                    stacked=True,
                ),
                Graph(
                    title="Prompt tokens from the prefix cache",
                    queries={
                        "{{role}}": share(
                            _rate("dagger_gateway_tokens_total", "role", 'kind="cached"'),
                            _rate("dagger_gateway_tokens_total", "role", 'kind=~"cached|uncached"'),
                        )
                    },
                    unit="percentunit",
                ),
                Graph(title="Labels by flaw", queries={"{{flaw}}": _rate("dagger_gateway_labels_total", "flaw")}, unit="ops", stacked=True),
                Graph(
                    title="Labels without the log-probabilities asked for",
                    queries={"": _rate("dagger_gateway_hard_labels_total")},
                    unit="ops",
                ),
                Graph(title="A label", queries=quantiles("dagger_gateway_label_seconds", "", _RUN), unit="s"),
                Graph(title="Labels under way", queries={"": _now("dagger_gateway_labels_under_way")}),
                Graph(title="Open rollouts", queries={"": _now("dagger_gateway_sessions")}),
                Graph(
                    title="Requests tried again, and failed for good",
                    queries={
                        "again: {{role}} {{reason}}": _rate("dagger_gateway_retries_total", "role, reason"),
                        "failed: {{role}} {{reason}}": _rate("dagger_gateway_failures_total", "role, reason"),
                    },
                    unit="ops",
                ),
            ),
        ),
        Row(
            "Training",
            (
                Graph(title="Loss, nats", queries={"": _now("dagger_training_loss", how="max")}, unit="none"),
                Graph(title="Progress of the round", queries={"": _now("dagger_training_progress_ratio", how="max")}, unit="percentunit"),
                Graph(title="A step", queries=quantiles("dagger_training_step_seconds", "", _RUN), unit="s"),
                Graph(
                    title="Tokens",
                    queries={"trained": _rate("dagger_training_tokens_total"), "padding": _rate("dagger_training_padding_tokens_total")},
                    unit="ops",
                ),
                Graph(
                    title="Labels and steps",
                    queries={"labels": _rate("dagger_training_labels_total"), "steps": _rate("dagger_training_steps_total")},
                    unit="ops",
                ),
                Graph(
                    title="What packing saves",
                    queries={"": share(_rate("dagger_training_unpacked_tokens_total"), _rate("dagger_training_tokens_total"))},
                    unit="none",
                    help="Tokens that one sequence for each label would have cost, by those that were computed.",
                ),
                Graph(title="Gradient norm", queries={"": _now("dagger_training_gradient_norm", how="max")}, unit="none"),
                Graph(title="Learning rate", queries={"": _now("dagger_training_learning_rate", how="max")}, unit="none"),
                Graph(title="A checkpoint", queries=quantiles("dagger_training_checkpoint_seconds", "", _RUN), unit="s"),
            ),
        ),
        Row(
            "Policy servers",
            (
                Table(
                    title="Policies that are served",
                    queries={"": f"max by (pod, version) (dagger_agent_policy_info{{{_RUN}}})"},
                    columns=("pod", "version"),
                ),
                Graph(title="Requests under way", queries={"{{pod}}": _now("dagger_agent_requests_in_flight", "pod")}),
                Graph(
                    title="Requests by code", queries={"{{code}}": _rate("dagger_agent_requests_total", "code")}, unit="reqps", stacked=True
                ),
                Graph(title="Nobody served while weights changed", queries=quantiles("dagger_agent_swap_seconds", "how", _RUN), unit="s"),
            ),
        ),
    ),
)
