"""How a stage says why it ended, from the first moment of its process on: imports nothing that takes long."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

TERMINATED = 75
"""Exit code of a stage that was asked to end: `ExitCode.UNAVAILABLE`, a retry that counts as infrastructure's."""


def end_on_sigterm() -> None:
    """End this process on SIGTERM, until its stage handles it. Modules that are run call it before their imports, which may take many
    seconds: the first process of a container ignores a SIGTERM that it does not handle, and would work on until it is killed."""
    signal.signal(signal.SIGTERM, lambda *_: _end())


def say(reason: str, message: str) -> None:
    """Write why the stage ended to standard output and to the pod's termination message."""
    print(json.dumps({"event": "stage failed", "level": "error", "reason": reason, "message": message}), flush=True)
    path = Path(os.environ.get("DAGGER_TERMINATION_LOG", "/dev/termination-log"))
    with contextlib.suppress(OSError):  # outside a pod there may be no such file; the log line above has the same content
        path.write_text(json.dumps({"reason": reason, "message": message[:3000]}))


def say_terminated() -> None:
    say("Terminated", "the stage was asked to end; started again, it continues where it stopped")


def _end() -> None:
    say_terminated()
    sys.exit(TERMINATED)
