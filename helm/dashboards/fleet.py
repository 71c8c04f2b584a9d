"""All runs of a cluster, what their GPUs are used for, and how the operator is."""

from dashboards.parts import Board, Choice, Graph, Number, Row, Table, quantiles, share

_RUN = 'run_namespace=~"$namespace"'

FLEET = Board(
    uid="dagger-fleet",
    title="DAgger / Fleet",
    about="All runs, what GPUs are used for, and how the operator is",
    choices=(Choice("namespace", "namespace", "label_values(dagger_run_info, run_namespace)"),),
    rows=(
        Row(
            "Runs",
            (
                Number(
                    title="Operators that lead",
                    queries={"{{namespace}}": "sum by (namespace) (dagger_operator_leading)"},
                    help="By the release's namespace. Each must be 1.",
                ),
                Number(title="Runs that go on", queries={"": 'sum(dagger_runs{phase!~"Succeeded|Failed|Suspended"})'}),
                Number(
                    title="Runs that wait",
                    queries={"": f'count(dagger_run_info{{{_RUN}, reason!="", phase!~"Succeeded|Failed|Suspended"}}) or vector(0)'},
                    help="Their reason stands in the table.",
                ),
                Number(title="Runs that failed", queries={"": 'sum(dagger_runs{phase="Failed"})'}),
                Number(title="GPUs held", queries={"": "sum(dagger_gpus)"}),
                Number(
                    title="GPUs idle",
                    queries={"": share('sum(dagger_gpus{use=~"idle|starting"})', "sum(dagger_gpus)")},
                    unit="percentunit",
                    help="Held by policies that nobody asks, or that are starting.",
                ),
                Table(
                    title="Runs now",
                    queries={"": f"max by (run_namespace, run, phase, reason) (dagger_run_info{{{_RUN}}})"},
                    columns=("run_namespace", "run", "phase", "reason"),
                ),
                Graph(title="Runs by phase", queries={"{{phase}}": "sum by (phase) (dagger_runs)"}, stacked=True, width=12),
                Graph(
                    title="Stages: from a Job's creation to its end",
                    queries=quantiles("dagger_stage_seconds", "stage", 'outcome="Succeeded"', of=(0.5,)),
                    unit="s",
                    width=12,
                ),
            ),
        ),
        Row(
            "GPUs",
            (
                Graph(title="GPUs by use", queries={"{{use}}": "sum by (use) (dagger_gpus)"}, stacked=True, width=12),
                Graph(
                    title="GPU-hours by use",
                    queries={"{{use}}": "sum by (use) (increase(dagger_gpu_seconds_total[$__range])) / 3600"},
                    unit="h",
                    help="Over the time that the dashboard shows. The sum is what a cluster charges for.",
                    width=12,
                ),
            ),
        ),
        Row(
            "Operator",
            (
                Graph(title="A reconcile", queries=quantiles("dagger_operator_reconcile_seconds"), unit="s"),
                Graph(
                    title="Reconciles",
                    queries={"{{outcome}}": "sum by (outcome) (rate(dagger_operator_reconcile_seconds_count[$__rate_interval]))"},
                    unit="ops",
                ),
                Graph(title="From due to started", queries=quantiles("workqueue_queue_duration_seconds"), unit="s"),
                Graph(
                    title="Queue",
                    queries={
                        "due": "sum(workqueue_depth)",
                        "asked for, per second": "sum(rate(workqueue_adds_total[$__rate_interval]))",
                        "tried again, per second": "sum(rate(workqueue_retries_total[$__rate_interval]))",
                    },
                ),
                Graph(
                    title="Requests to the API server",
                    queries={"{{method}} {{code}}": "sum by (method, code) (rate(rest_client_requests_total[$__rate_interval]))"},
                    unit="reqps",
                ),
                Graph(
                    title="Its answers",
                    queries=quantiles("rest_client_request_duration_seconds", "verb", of=(0.95,)),
                    unit="s",
                ),
                Graph(
                    title="Watches",
                    queries={"{{kind}}": "sum by (kind) (rate(dagger_operator_watch_events_total[$__rate_interval]))"},
                    unit="ops",
                ),
                Graph(title="Age of the quietest watch", queries={"": "max(dagger_operator_watch_age_seconds)"}, unit="s"),
                Graph(title="Event loop lag", queries={"": "max(dagger_operator_event_loop_lag_seconds)"}, unit="s"),
            ),
        ),
    ),
)
