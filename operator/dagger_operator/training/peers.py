"""Detects that a rank lost its peers, whatever call it was in: the cause lies with one of them, and a retry resumes from the
checkpoint."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dagger_operator.store.stage import StageFailure

PEER_LOST = "PeerLost"

_GONE = re.compile(
    r"\[\S*gloo/transport/|ncclRemoteError|ncclSystemError|NCCL communicator was aborted|Watchdog caught collective operation timeout"
)
"""Parts of the messages of gloo and NCCL, which raise no type of their own. Gloo's assertions start with `[enforce fail at`: a bug."""


@contextmanager
def losing_peers() -> Iterator[None]:
    """Turn the loss of another rank into a `StageFailure` attributed to infrastructure."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        message = f"another rank is gone, and its own pod says why; training continues from its last checkpoint: {error}"
        raise StageFailure(PEER_LOST, message, permanent=False) from error


def is_loss(error: RuntimeError) -> bool:
    from torch.distributed import DistNetworkError, DistStoreError

    return isinstance(error, DistNetworkError | DistStoreError) or _GONE.search(str(error)) is not None
