"""`python -m dagger_operator.cluster`: the operator."""

import signal
import sys

if __name__ == "__main__":  # before the other imports: the first process of a container ignores a SIGTERM that it does not handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

import asyncio
import logging
import os

import structlog

from dagger_operator.cluster.app import NoCrd, operate
from dagger_operator.cluster.leader import LeadershipLost
from dagger_operator.cluster.settings import InvalidSettings, Settings
from dagger_operator.cluster.watches import NewKind
from dagger_operator.kube.connection import NoCluster
from dagger_operator.kube.errors import ApiError
from dagger_operator.store.credentials import own_identity
from dagger_operator.store.stage import configure_logging


def main() -> int:
    """Return the exit code: 0 asked to stop, 1 unable to continue (to be restarted), 2 invalid settings."""
    own_identity()  # before any thread starts
    configure_logging()
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)  # kopf's
    log = structlog.get_logger()
    try:
        settings = Settings.read(os.environ)
    except InvalidSettings as error:
        log.error("settings", problem=str(error))
        return 2
    try:
        asyncio.run(operate(settings))
    except (ApiError, NoCluster, NoCrd, NewKind, LeadershipLost) as error:
        log.error("ends", reason=type(error).__name__, problem=str(error))
        return 1
    except asyncio.CancelledError:
        log.info("asked to stop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
