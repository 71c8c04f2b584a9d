"""vLLM's command line and environment, as documented in `docs/architecture.md` (Serving)."""

from typing import Any

from dagger_operator.api import Serving
from dagger_operator.api.ports import VLLM_MASTER_PORT
from dagger_operator.control.pods import SCRATCH, value

CPU_BATCHED_TOKENS = 8192
"""Maximum tokens of one engine step on the CPU, where prompts are not split."""


MODEL = "$(DAGGER_SHARED)/current"
DRAIN_SECONDS = 5
"""Seconds that a terminating server continues with the turns in progress: as long as its agent does, and well within a pod's grace
period."""


def vllm_command(serving: Serving, *, follower: bool = False) -> list[str]:
    """Return the command of vLLM's server; the user's own arguments come last and win. `follower`: of a further node of a replica, whose
    processes are workers of the first one's engine."""
    if serving.gpus == 0:
        command = ["python3", "-m", "dagger_operator.serving.cpu_server", "--model", MODEL]
    else:  # vLLM's own image has a `python3`; not every version has a `python`
        command = ["python3", "-m", "vllm.entrypoints.cli.main", "serve", MODEL, *(["--headless"] if follower else [])]
    return [*command, *_arguments(serving)]


def _arguments(serving: Serving) -> list[str]:
    arguments = ["--served-model-name", "policy", "--uds", "$(DAGGER_SHARED)/vllm.sock"]
    arguments += ["--max-model-len", str(serving.max_model_len), "--scheduling-policy", "priority", "--enable-prompt-tokens-details"]
    # A model's own generation config would add sampling settings that the spec does not name.
    arguments += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    # With 0, vLLM's default, a terminating server returns turns as they are, and one in which its parser finds a call looks complete. Turns
    # that outlast this end with the engine and return no answer.
    arguments += ["--shutdown-timeout", str(DRAIN_SECONDS)]
    if serving.gpus > 1:
        arguments += ["--tensor-parallel-size", str(serving.gpus)]
    if serving.nodes > 1:
        # LeaderWorkerSet sets in a pod's environment where the first node is, and which node this is.
        arguments += [
            "--pipeline-parallel-size",
            str(serving.nodes),
            "--distributed-executor-backend",
            "mp",
            "--nnodes",
            str(serving.nodes),
        ]
        arguments += ["--node-rank", "$(LWS_WORKER_INDEX)"]
        arguments += ["--master-addr", "$(LWS_LEADER_ADDRESS)", "--master-port", str(VLLM_MASTER_PORT)]
    if serving.gpus == 0:
        arguments += ["--enforce-eager", "--distributed-executor-backend", "uni"]
        # A tied head stays packed from the old weights when new ones are loaded in place; the agent has it repacked.
        arguments += ["--worker-extension-cls", "dagger_operator.serving.tied_head.TiedHead"]
        # A prompt in chunks rewinds the generator of a seeded request, which torch's CPU generator cannot do: the engine crashes.
        arguments += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(serving.max_model_len, CPU_BATCHED_TOKENS))]
    if serving.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", serving.tool_call_parser]
    return [*arguments, *serving.extra_args]


def vllm_environment(serving: Serving) -> list[dict[str, Any]]:
    """Return the environment of the server; the user's own comes last and wins."""
    fixed = {
        # Weights are reloaded and servers paused through the development endpoints, which are not reachable over the network.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # The pod's user has no entry in the image's passwd, and no home.
        "HOME": SCRATCH,
        "USER": "dagger",
    }
    if serving.gpus == 0:
        # One process for engine and worker, one thread: it starts sooner and answers faster.
        fixed |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        fixed["VLLM_CPU_KVCACHE_SPACE"] = "1"
    given = {variable.name: variable.value for variable in serving.env}
    return [value(name, text) for name, text in {**fixed, **given}.items()]
