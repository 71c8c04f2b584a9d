"""Where ranks meet: a store of rank 0's, which listens on the address of its pod alone and says whose training it is.

torch's own listens on all addresses of a machine, on which several pods may train, and asks nobody who they are: the second training's
rank 0 finds the port taken, and its other ranks join the first training's, which then averages gradients of two runs.
"""

import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported, which torch does not declare

from dagger_operator.store.stage import StageFailure

PATIENCE = timedelta(hours=1)
"""How long a rank waits for others, which may download or upload many gigabytes meanwhile."""


def meet(rank: int, ranks: int, training: str) -> TCPStore:
    """Return the store that rank 0 opens at `MASTER_ADDR` and `MASTER_PORT`. `training`: the same on all ranks that belong together.

    Raises `StageFailure`, not permanent: "PortTaken" if rank 0 cannot listen there, "StrangePeers" if rank 0 is another training's.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = _listening(_own_address(host), port) if rank == 0 else None
    store = TCPStore(
        host,
        port,
        ranks,
        is_master=rank == 0,
        timeout=PATIENCE,
        wait_for_workers=False,
        master_listen_fd=listening.detach() if listening is not None else None,
    )
    if rank == 0:
        store.set("training", training)
    if (found := store.get("training").decode()) != training:
        raise StageFailure(
            "StrangePeers",
            f"rank 0 at {host}:{port} is of training {found}, and this is rank {rank} of {training}: it is tried again, as its own "
            "rank 0 may not be there yet. If it stays: let no two trainings share a host network",
            permanent=False,
        )
    return store


def _own_address(host: str) -> str:
    """Return this pod's address, to which `host` resolves, or `host` itself if it means this machine."""
    return host if host == "127.0.0.1" else os.environ.get("POD_IP") or host


def _listening(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except OSError as error:
        message = f"rank 0 cannot listen on {address}, port {port}: {error}; it is tried again. If it stays: free that port there"
        raise StageFailure("PortTaken", message, permanent=False) from error
