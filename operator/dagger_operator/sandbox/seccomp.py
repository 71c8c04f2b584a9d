"""The system call filter for commands of process sandboxes, for what no namespace prevents.

Keys: a process inherits the kernel's session keyring, and reaches its user's keys by number, whatever namespaces it is in. User namespaces:
in one of its own a command could mount in-memory file systems, which count for no process. To a command the kernel looks like one without
key support (ENOSYS), whose administrator allows no user namespaces (EPERM), as with Kubernetes' default filter.

Hiding: a process that is not dumpable shows its descriptors to root alone, so that an unprivileged worker could not measure what is behind
them. The call to become so returns success (0) without effect: ssh-agent and similar programs make it, and some exit if it fails; in its
sandbox there is nobody to hide from.
"""

import errno
import struct
from dataclasses import dataclass
from functools import cache

_NEW_USER = 0x10000000
"""A flag of `clone` and `unshare`, in the first argument of either; `clone3` passes flags in memory, which no filter can read."""
_X32 = 0x40000000
_SET_DUMPABLE = 4
"""First argument of `prctl`; a second argument of 0 hides the process."""
_NUMBER, _MARK, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24
"""Offsets in the filter's input; of arguments the lower half, which is all that matters for these."""
_LOAD, _AND, _RETURN, _EQUAL, _ANY_OF = 0x20, 0x54, 0x06, 0x15, 0x45
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


@dataclass(frozen=True)
class _Abi:
    """A system call interface: its architecture mark and its call numbers."""

    mark: int
    absent: tuple[int, ...]
    """add_key, request_key, keyctl, clone3."""
    namespaces: tuple[int, ...]
    """clone, unshare."""
    prctl: int


_ABIS = {
    "x86_64": (_Abi(0xC000003E, (248, 249, 250, 435), (56, 272), 157), _Abi(0x40000003, (286, 287, 288, 435), (120, 310), 172)),
    "aarch64": (_Abi(0xC00000B7, (217, 218, 219, 435), (220, 97), 167), _Abi(0x40000028, (309, 310, 311, 435), (120, 337), 172)),
}
"""By machine: the native interface (on x86_64 with a second set of numbers that differ in one bit), and that of 32-bit programs."""


def known(machine: str) -> bool:
    """Whether there is a filter for a machine, as named by `uname`."""
    return machine in _ABIS


@cache
def program(machine: str) -> bytes:
    """Return the filter for a known machine, in the format that bubblewrap reads."""
    steps = [_step(_LOAD, _MARK)]
    for abi in _ABIS[machine]:
        block = [_step(_LOAD, _NUMBER), _step(_AND, ~_X32 & 0xFFFFFFFF)]
        for number in abi.absent:
            block += [_step(_EQUAL, number, no=1), _step(_RETURN, _REFUSE | errno.ENOSYS)]
        for number in abi.namespaces:
            asks = [_step(_LOAD, _FIRST_ARGUMENT), _step(_ANY_OF, _NEW_USER, no=1), _step(_RETURN, _REFUSE | errno.EPERM)]
            block += [_step(_EQUAL, number, no=4), *asks, _step(_RETURN, _ALLOW)]
        hides = [_step(_LOAD, _FIRST_ARGUMENT), _step(_EQUAL, _SET_DUMPABLE, no=3)]
        hides += [_step(_LOAD, _SECOND_ARGUMENT), _step(_EQUAL, 0, no=1), _step(_RETURN, _REFUSE)]
        block += [_step(_EQUAL, abi.prctl, no=len(hides)), *hides, _step(_RETURN, _ALLOW)]
        steps += [_step(_EQUAL, abi.mark, no=len(block)), *block]
    return b"".join([*steps, _step(_RETURN, _REFUSE | errno.ENOSYS)])


def _step(code: int, value: int, *, no: int = 0) -> bytes:
    """Return one instruction; a test that fails skips the next `no` instructions."""
    return struct.pack("=HBBI", code, 0, no, value)
