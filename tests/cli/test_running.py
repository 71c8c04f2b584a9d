"""What `daggerctl run` says before it begins."""

from typing import Any

from dagger_operator.sandbox.isolation import probe


def test_how_commands_of_models_are_held_here_is_said_in_one_line(ctl: Any, document: dict[str, Any]) -> None:
    document["spec"]["suspend"] = True
    answer = ctl("run", "run.yaml", documents=[document])
    assert answer.returncode == 0, answer.stderr
    assert probe().describe() in answer.stdout.splitlines()


def test_nothing_is_said_of_this_machine_where_sandboxes_are_pods(ctl: Any, document: dict[str, Any]) -> None:
    document["spec"] |= {"suspend": True, "sandbox": {"backend": "Pod"}}
    answer = ctl("run", "run.yaml", documents=[document])
    assert answer.returncode == 0 and "Process sandboxes" not in answer.stdout
