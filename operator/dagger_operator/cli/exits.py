"""The exit codes of `daggerctl`."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `daggerctl`."""

    OK = 0
    FAILED = 1
    """The run, or what was checked, failed."""
    BAD_INPUT = 2
    """The command or a file is wrong: nothing was done."""
    UNAVAILABLE = 75
    """Storage or another service is unavailable: the same command can succeed later."""
    INTERRUPTED = 130
