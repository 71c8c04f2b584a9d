"""Common to every stage command: where its run, its round and its storage come from, and how it ends.

A stage gets all its parameters from its environment, which `control` writes and every runtime passes on: docs/architecture.md lists them.
"""

import asyncio
import atexit
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import structlog

from dagger_operator.api import DAggerRun, InvalidRun, Role, load
from dagger_operator.store.credentials import OwnIdentity
from dagger_operator.store.ending import say, say_terminated
from dagger_operator.store.objects import DamagedObject, Store, StoreUnavailable


class ExitCode(IntEnum):
    """How a stage ends; podFailurePolicy and the local runtime distinguish these codes."""

    DONE = 0
    ERROR = 1
    """Unexpected; worth a retry."""
    PERMANENT = 3
    """A retry would fail the same way: the message says what to change."""
    UNAVAILABLE = 75
    """Infrastructure is unavailable (EX_TEMPFAIL); retried on the infrastructure budget."""


class StageFailure(Exception):
    """The stage cannot complete. `reason` is CamelCase from a bounded set, `message` names the remedy."""

    def __init__(self, reason: str, message: str, *, permanent: bool = True) -> None:
        self.reason, self.message, self.permanent = reason, message, permanent
        super().__init__(f"{reason}: {message}")


@dataclass(frozen=True)
class Stage:
    """The parameters of one stage command."""

    run: DAggerRun
    round: int
    index: int
    worker: str
    """Name of this index of this stage; stays the same after a restart."""
    policy: str
    """Version of the student, if the stage works with one; otherwise empty."""
    scratch: Path
    """A private folder that is lost with the pod."""
    store: Store
    environ: Mapping[str, str]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> "Stage":
        environ = os.environ if environ is None else environ
        try:
            run = load(json.loads(environ["DAGGER_RUN"]))
        except KeyError:
            raise StageFailure("NoRun", "DAGGER_RUN is not set: stages are started by `daggerctl run` or the operator") from None
        except json.JSONDecodeError as error:
            raise StageFailure("InvalidRun", f"DAGGER_RUN is not JSON ({error}): it is the resource, as the runtime writes it") from error
        except InvalidRun as error:
            raise StageFailure("InvalidRun", str(error)) from error
        return cls(
            run=run,
            round=_number(environ, "DAGGER_ROUND", 1),
            index=_number(environ, "JOB_COMPLETION_INDEX", 0),
            worker=environ.get("DAGGER_WORKER") or environ.get("DAGGER_POD") or f"local-{os.getpid()}",
            policy=environ.get("DAGGER_POLICY", ""),
            scratch=_scratch(environ),
            store=Store.open(run.spec.storage, OwnIdentity(environ)),
            environ=environ,
        )

    def token(self, role: Role) -> str | None:
        """Return the API key from the Secret of a policy's endpoint, `student`'s or `teacher`'s; None if there is none.

        Raises `StageFailure` if it cannot be sent. Surrounding white space, such as the newline that most tools write, is stripped.
        """
        token = self.environ.get(f"DAGGER_{role.upper()}_TOKEN", "").strip()
        if not token.isprintable():
            raise StageFailure(
                f"{role.capitalize()}Unauthorized",
                f"the {role}'s API key holds a line break or another character that cannot be sent in a header: "
                f"put the key alone into the Secret that {role}.endpoint.secretRef names",
            )
        return token or None


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdecimal():
        raise StageFailure("BadEnvironment", f"{name} is {value!r}: it has to be a number from 0")
    return int(value)


def _scratch(environ: Mapping[str, str]) -> Path:
    if given := environ.get("DAGGER_SCRATCH"):
        Path(given).mkdir(parents=True, exist_ok=True)
        return Path(given)
    own = Path(tempfile.mkdtemp(prefix="dagger-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def configure_logging(**context: object) -> None:
    """Log JSON lines to standard output, each with the given context; nothing is configured at import."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
    )
    structlog.contextvars.bind_contextvars(**context)


def main(stage_name: str, body: Callable[[Stage], Awaitable[None]]) -> int:
    """Run a stage and return its exit code; SIGTERM cancels it, and the cause of a failure is written to the termination message."""
    try:
        stage = Stage.from_environment()
        configure_logging(run=stage.run.metadata.name, round=stage.round, stage=stage_name, worker=stage.worker)
        asyncio.run(_cancellable(body(stage)))
        return ExitCode.DONE
    except StageFailure as error:
        say(error.reason, error.message)
        return ExitCode.PERMANENT if error.permanent else ExitCode.UNAVAILABLE
    except DamagedObject as error:
        say("DamagedObject", str(error))
        return ExitCode.PERMANENT
    except StoreUnavailable as error:
        say("StorageUnavailable", str(error))
        return ExitCode.UNAVAILABLE
    except asyncio.CancelledError:
        say_terminated()
        return ExitCode.UNAVAILABLE
    except Exception as error:
        traceback.print_exc()
        say("Unexpected", f"{type(error).__name__}: {error}")
        return ExitCode.ERROR


async def _cancellable(body: Awaitable[None]) -> None:
    task = asyncio.ensure_future(body)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task
