"""The stage answers for its ranks: real processes in place of trainers."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from dagger_operator.store.stage import ExitCode, StageFailure
from dagger_operator.training.__main__ import RankProcess, _watch
from dagger_operator.training.peers import PEER_LOST
from dagger_operator.training.rank import asked_to_end

LOST = f"raise SystemExit({ExitCode.UNAVAILABLE:d})"


async def rank(index: int, folder: Path, code: str, words: dict[str, str] | None = None) -> RankProcess:
    last_words = folder / f"{index}.json"
    if words:
        last_words.write_text(json.dumps(words))
    return RankProcess(index, await asyncio.create_subprocess_exec(sys.executable, "-c", code), last_words)


async def test_ends_well_when_every_rank_does(tmp_path: Path) -> None:
    await _watch([await rank(index, tmp_path, "pass") for index in range(2)])


async def test_the_rank_that_knows_the_cause_is_heard_although_another_ended_first(tmp_path: Path) -> None:
    lost = await rank(0, tmp_path, LOST, {"reason": PEER_LOST, "message": "connection closed by peer"})
    cause = await rank(
        1,
        tmp_path,
        f"import time; time.sleep(1); raise SystemExit({ExitCode.PERMANENT:d})",
        {"reason": "LossNotFinite", "message": "lower it"},
    )
    with pytest.raises(StageFailure, match="LossNotFinite: lower it") as caught:
        await _watch([lost, cause])
    assert caught.value.permanent


@pytest.mark.parametrize(("cause", "said"), [("import os; os.kill(os.getpid(), 9)", "SIGKILL"), ("raise SystemExit(1)", "code 1")])
async def test_a_rank_that_lost_a_peer_is_heard_only_where_no_other_knows_more(tmp_path: Path, cause: str, said: str) -> None:
    lost = await rank(0, tmp_path, LOST, {"reason": PEER_LOST, "message": "connection closed by peer"})
    with pytest.raises((StageFailure, RuntimeError), match=said):
        await _watch([lost, await rank(1, tmp_path, cause)])
    with pytest.raises(StageFailure, match=PEER_LOST) as caught:
        await _watch([lost])
    assert not caught.value.permanent


async def test_a_killed_rank_is_named_and_tried_again(tmp_path: Path) -> None:
    ranks = [await rank(0, tmp_path, "pass"), await rank(1, tmp_path, "import os; os.kill(os.getpid(), 9)")]
    with pytest.raises(StageFailure, match="rank 1 was killed by SIGKILL; training resumes from its last checkpoint") as caught:
        await _watch(ranks)
    stays, restarts = str(caught.value).split("(training still resumes)")
    assert all(name in stays for name in ("microBatchTokens", "activationCheckpointing", "sequenceParallel"))
    assert restarts == ", or raise training.deepspeed.zeroStage (the round restarts)"
    assert not caught.value.permanent


async def test_an_unexpected_end_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 ended with code 7"):
        await _watch([await rank(0, tmp_path, "raise SystemExit(7)")])


async def test_a_rank_hears_of_sigterm_while_a_step_awaits_nothing() -> None:
    asked = asked_to_end()
    try:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
