"""vLLM's own parser reads the command lines of servers on GPUs, which no test can start."""

import json
import subprocess
import sys
from typing import Any

import pytest

from dagger_operator.api import Serving
from dagger_operator.control.vllm import vllm_command

pytestmark = pytest.mark.heavy

PARSE = """
import json, sys
from vllm.entrypoints.cli import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
(command,) = serve.cmd_init()
command.subparser_init(parser.add_subparsers(dest="subparser"))
read = []
for line in json.loads(sys.argv[1]):
    arguments = parser.parse_args(line)
    command.validate(arguments)
    read.append({name: value for name, value in vars(arguments).items() if isinstance(value, (str, int, type(None)))})
print(json.dumps(read))
"""


def test_vllm_takes_the_command_lines_of_servers_on_gpus() -> None:
    one = Serving.model_validate({"toolCallParser": "hermes", "maxModelLen": 40960, "gpus": 4})
    two = Serving.model_validate({"gpus": 8, "nodes": 2, "extraArgs": ["--max-num-seqs", "64"]})
    lines = [_arguments(vllm_command(one)), _arguments(vllm_command(two)), _arguments(vllm_command(two, follower=True))]
    parsed = subprocess.run([sys.executable, "-c", PARSE, json.dumps(lines)], stdout=subprocess.PIPE, check=True).stdout
    alone, first, second = json.loads(parsed)
    assert {each["model_tag"] for each in (alone, first, second)} == {"/shared/current"}
    assert (alone["tensor_parallel_size"], alone["tool_call_parser"], alone["max_model_len"]) == (4, "hermes", 40960)
    assert (first["headless"], second["headless"], second["node_rank"]) == (False, True, 1)
    assert all((each["nnodes"], each["pipeline_parallel_size"], each["max_num_seqs"]) == (2, 2, 64) for each in (first, second))


def _arguments(command: list[str]) -> list[Any]:
    """What follows the program, as the second node's kubelet would give it."""
    program, module, *arguments = command[:2], command[2], *command[3:]
    assert (program, module) == (["python3", "-m"], "vllm.entrypoints.cli.main")
    values = {"$(DAGGER_SHARED)": "/shared", "$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "leader"}
    for name, value in values.items():
        arguments = [word.replace(name, value) for word in arguments]
    return arguments
