"""kill -9 at any moment, then `daggerctl resume`: the same data as if nothing had happened."""

import random
import signal
import time
from typing import Any

import pytest

pytestmark = pytest.mark.heavy

KILLS = 3


def _labelling_only(runs: Any, name: str, **more: Any) -> str:
    """Two rounds of labelling with a deterministic student behind an endpoint: no vLLM, no training."""
    spec = {
        "rounds": 2,
        "student": {"model": "scripted-student", "endpoint": {"url": runs.teacher}, "serving": None},
        "mixing": {"strategy": "PerTurn", "beta": {"type": "Constant", "value": 0.3}},
        "tasks": {"perRound": 10, "firstRound": 10},
        "rollouts": {"workers": 2, "concurrency": 2, "leaseSeconds": 2},
        "training": {"mode": "Disabled"},
        "evaluation": {"initial": True, "overlap": "NextRound"},
    }
    return str(runs.document(name, **(spec | more)))


def _digests(runs: Any, name: str) -> list[str]:
    status = runs.status(name)
    assert status["phase"] == "Succeeded", status
    initial, *rounds = status["rounds"]
    assert (initial["round"], initial["evaluation"]["tasks"]) == (0, 12)
    return [entry["rollout"]["dataDigest"] for entry in rounds]


def _finished(runs: Any, name: str) -> int:
    """Rollouts whose trajectories are in storage."""
    return len(list((runs.folder / "storage" / name).glob("rounds/*/rollout/trajectories/*.parquet")))


@pytest.mark.timeout(600)
def test_a_run_killed_again_and_again_gives_the_data_of_an_undisturbed_one(runs: Any) -> None:
    calm, stormy = runs.inside("calm"), runs.inside("stormy")
    calm.ctl("run", _labelling_only(calm, "one"))

    seed = random.randrange(2**32)
    print(f"moments of seed {seed}")
    rng = random.Random(seed)
    process = stormy.start("run", _labelling_only(stormy, "one"))
    accepted = stormy.folder / ".dagger/runs/one/run.json"
    for kill in range(KILLS):
        # Anywhere from the supervisor's first moments to the middle of a round, and further on each time.
        while not accepted.exists() or _finished(stormy, "one") < 5 * kill:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = stormy.start("resume", "one")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert _digests(stormy, "one") == _digests(calm, "one")
    stormy.ctl("store", "fsck", "one", "--deep")


@pytest.mark.timeout(300)
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(runs: Any) -> None:
    process = runs.start("run", _labelling_only(runs, "paused", rounds=1))
    while not _finished(runs, "paused"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "daggerctl resume paused" in output
    runs.ctl("resume", "paused")
    assert runs.status("paused")["phase"] == "Succeeded"


@pytest.mark.timeout(300)
def test_two_runs_on_one_storage_prefix_are_refused(runs: Any) -> None:
    shared: dict[str, Any] = {"rounds": 1, "storage": {"url": f"file://{runs.folder}/storage/shared"}}
    runs.ctl("run", _labelling_only(runs, "first", **shared))
    process = runs.start("run", _labelling_only(runs, "second", **shared))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "PrefixTaken" in output and "first" in output
