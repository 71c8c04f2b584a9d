"""Who lost another rank is told from who is at fault, by what torch raises."""

import pytest

from dagger_operator.store.stage import StageFailure
from dagger_operator.training.peers import losing_peers

GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:2093, "


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("", f"{GLOO}553] Connection closed by peer [127.0.0.1]:38594. This is typically caused by a remote worker crashing."),
        ("", f"{GLOO}537] Read error [127.0.0.1]:18341: Connection reset by peer."),
        ("", "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3600000ms for recv operation to complete"),
        ("DistBackendError", f"{NCCL}remote process exited or there was a network error\nncclRemoteError: A call failed possibly due to"),
        ("DistBackendError", f"{NCCL}unhandled system error\nncclSystemError: System call (e.g. socket, malloc) failed"),
        ("DistStoreError", "Timed out after 3601 seconds waiting for clients. 1/2 clients joined."),
        ("DistNetworkError", "The client socket has timed out after 3600000ms while trying to connect to (10.0.0.1, 29500)."),
    ],
)
def test_a_rank_that_lost_another_is_tried_again_on_the_account_of_infrastructure(kind: str, message: str) -> None:
    import torch.distributed

    error = getattr(torch.distributed, kind)(message) if kind else RuntimeError(message)
    with pytest.raises(StageFailure, match="PeerLost") as caught, losing_peers():
        raise error
    assert not caught.value.permanent


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4",
        f"{NCCL}invalid usage\nncclInvalidUsage: Duplicate GPU detected",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_a_fault_of_its_own_stays_one(message: str) -> None:
    error = RuntimeError(message)
    with pytest.raises(RuntimeError) as caught, losing_peers():
        raise error
    assert caught.value is error
