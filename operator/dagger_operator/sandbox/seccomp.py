"""The filter of system calls under which commands of process sandboxes run, for what no namespace keeps from them.

Keys: a process inherits the kernel's session keyring, and reaches keys of its user by their number, whatever namespaces it is in. User
namespaces: in one of its own a command could mount memory as file systems, which counts for no process. To a command the kernel looks like
one without keys (ENOSYS), and one whose administrator allows no user namespaces (EPERM), as Kubernetes' default filter does.

Hiding: a process that is not dumpable shows its descriptors to root alone, so that a worker who is not could not count what is behind them.
It is told that it is hidden (0) and is not: ssh-agent and its like ask for it, and some end where it fails; in its sandbox there is nobody
to hide from.
"""

import errno
import struct
from dataclasses import dataclass
from functools import cache

_NEW_USER = 0x10000000
"""Among the flags of `clone` and `unshare`, the first argument of either; `clone3` has them in memory, where no filter looks."""
_X32 = 0x40000000
_SET_DUMPABLE = 4
"""First argument of `prctl`; the second is 0 where it hides."""
_NUMBER, _MARK, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24
"""Where a filter finds them; of arguments the lower half, which is all that counts of these."""
_LOAD, _AND, _RETURN, _EQUAL, _ANY_OF = 0x20, 0x54, 0x06, 0x15, 0x45
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


@dataclass(frozen=True)
class _Abi:
    """A way into the kernel: its mark, and its numbers of calls."""

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
"""By machine: its own, which on x86_64 has a second set of numbers that differ in one bit, and that of its 32-bit programs."""


def known(machine: str) -> bool:
    """Whether there is a filter for a machine, as `uname` names it."""
    return machine in _ABIS


@cache
def program(machine: str) -> bytes:
    """The filter of a machine that is known, as bubblewrap reads it."""
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
    """One instruction; a test whose answer is no leaves out so many of the next."""
    return struct.pack("=HBBI", code, 0, no, value)
