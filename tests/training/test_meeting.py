"""Trainings on one machine, each with addresses of its own and all with the same port."""

import socket
from typing import Any

import pytest

from dagger_operator.store.stage import StageFailure

pytestmark = pytest.mark.heavy


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def at(port: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Meets as a rank of a training whose first pod has this address."""
    from dagger_operator.training import meeting

    monkeypatch.setenv("MASTER_PORT", str(port))

    def meet(address: str, rank: int, training: str) -> Any:
        monkeypatch.setenv("MASTER_ADDR", address)
        return meeting.meet(rank, 2, training)

    return meet


def test_two_trainings_on_one_machine_meet_on_the_same_port(at: Any) -> None:
    first, second = at("127.0.0.2", 0, "one"), at("127.0.0.3", 0, "two")
    at("127.0.0.2", 1, "one").set("rank", "1 of one")
    at("127.0.0.3", 1, "two").set("rank", "1 of two")
    assert (first.get("rank"), second.get("rank")) == (b"1 of one", b"1 of two")


def test_a_rank_does_not_join_another_training(at: Any) -> None:
    there = at("127.0.0.2", 0, "one")
    with pytest.raises(StageFailure, match=r"rank 0 at 127\.0\.0\.2:\d+ is of training one, and this is rank 1 of two") as caught:
        at("127.0.0.2", 1, "two")
    assert (caught.value.reason, caught.value.permanent) == ("StrangePeers", False)
    at("127.0.0.2", 1, "one").set("rank", "1")
    assert there.get("rank") == b"1"


def test_a_port_that_is_taken_is_tried_again_on_the_account_of_infrastructure(at: Any) -> None:
    held = at("127.0.0.2", 0, "one")
    with pytest.raises(StageFailure, match=r"rank 0 cannot listen on 127\.0\.0\.2, port \d+: .*in use") as caught:
        at("127.0.0.2", 0, "two")
    assert (caught.value.reason, caught.value.permanent) == ("PortTaken", False)
    assert held.get("training") == b"one"
