"""What a shell command is in every kind of sandbox, and how its end is reported to the agent."""

import signal

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import CommandResult

_MAX_ARGUMENT = 128 << 10
"""The kernel's limit on one argument."""
_SIGXFSZ = 128 + signal.SIGXFSZ


def refused(command: bytes) -> CommandResult | None:
    """Return the answer to a command that cannot be passed to a shell; None if it can be."""
    if b"\0" not in command and len(command) < _MAX_ARGUMENT:
        return None
    what = "holds a NUL byte" if b"\0" in command else f"is longer than {_MAX_ARGUMENT} bytes"
    return CommandResult(f"bash: the command {what}: write long text to a file in parts\n", 126)


def joined(head: bytes, tail: bytes, dropped: int) -> str:
    """Return output as text, with a marker in place of what was dropped."""
    first, last = (part.decode("utf-8", "replace") for part in (head, tail))
    return f"{first}\n[{dropped} bytes left out]\n{last}" if dropped else first + last


def ended(
    output: tuple[bytes, bytes, int],
    returncode: int,
    *,
    timed_out: bool,
    stopped: str | None,
    seconds: float,
    timeout: float,
    limits: SandboxLimits,
) -> CommandResult:
    """Return what the agent sees. `output`: head, tail, and bytes dropped between them; a limit that was hit is named at its end."""
    note = ""
    if timed_out:
        returncode, note = 124, f"it did not end within {timeout:g} s"
    elif stopped:
        returncode, note = 137, f"it used {stopped}"
    elif returncode == _SIGXFSZ:
        returncode, note = 137, f"a file would have grown over {limits.disk_mib} MiB"
    text = joined(*output) + (f"\n[stopped: {note}]\n" if note else "")
    return CommandResult(text, returncode, timed_out, output[2] > 0, seconds)
