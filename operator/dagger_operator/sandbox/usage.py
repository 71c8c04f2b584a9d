"""A sandbox's use of memory, processes and disk, measured from outside.

What no process shows is not measured: the kernel's own buffers (of sockets, pipes, System V queues), System V segments that nobody has
attached, and unnamed files that are only mapped, in transit from one process to another, or open in one thread alone. For in-memory files
only the larger of what is open and what is mapped counts, since most of it is both: a command may hold twice its limit. A memory control
group bounds all of these, too.
"""

import asyncio
import os
import re
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

DISK_SECONDS = 0.5
"""Shortest interval between disk measurements."""
MOST_FILES = 1 << 16
"""Descriptors of one command, all its processes together: this many can be inspected in a tenth of a second."""
_ENTRY_BYTES = 4096
"""Least that a file, folder or link counts: empty ones use up inodes."""

_DISK_MARGIN = 64 << 20
"""How far above a limit usage is still measured exactly."""
_MEMORY = re.compile(rb"^(?:(?:RssAnon|VmSwap|Pss_Anon|SwapPss):\s+(\d+)|(?:RssShmem|Pss_Shmem):\s+(\d+))", re.M)
"""Lines of `status` and of `smaps_rollup`, in KiB: what is private to a process, and what it maps of in-memory files."""
_HIDES_SECONDS = 0.05
"""How long a process must hide its open files to count as hiding: bwrap itself does so for a moment while it starts."""


@dataclass(frozen=True)
class ProcessUse:
    """What a group of processes uses together."""

    processes: int = 0
    """Processes and threads."""
    memory: int = 0
    """Bytes of memory other than file cache, swapped out or not: private, and shared or in memfds and the like, mapped or not."""
    unlinked: int = 0
    """Bytes on disk of files that are open but have no name any more; in-memory file systems excluded."""
    files: int = 0
    """Open descriptors; above `MOST_FILES`, memory and disk cover only some of them."""
    hidden: bool = False
    """Whether a process hides its open files from everybody; then the rest is incomplete."""


class ProcessTable:
    """All processes of the machine by their parents, read once for all sandboxes and kept for `max_age` seconds."""

    def __init__(self, max_age: float = 0.1) -> None:
        self._max_age = max_age
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._children: dict[int, list[int]] = {}
        self._threads: dict[int, int] = {}

    def below(self, pid: int, enough: int) -> ProcessUse:
        """Return what a process uses together with its descendants and its session. May take seconds if they try to hide.

        Memory up to `enough` bytes is counted the quick way, which is too high: what processes share counts in each of them.
        """
        with self._lock:
            if time.monotonic() - self._read_at > self._max_age:
                self._read()
            children, threads = self._children, self._threads
        seen, waiting = set[int](), [pid]
        while waiting:
            current = waiting.pop()
            if current not in seen and current in threads:
                seen.add(current)
                waiting += children.get(current, ())
        places = [_place(each, threads[each]) for each in seen]
        held = _held_by(places)
        memory = _memory(places, "status", held.memory)
        if memory > enough:
            memory = _memory(places, "smaps_rollup", held.memory)
        return replace(held, processes=sum(threads[each] for each in seen), memory=memory)

    def _read(self) -> None:
        children: dict[int, list[int]] = defaultdict(list)
        threads: dict[int, int] = {}
        for name in os.listdir("/proc"):  # noqa: PTH208 - twice as fast as iterdir, ten times a second
            if name.isdigit():
                with suppress(OSError):  # it ended meanwhile
                    # The fields after the name, which may contain anything: state, parent, group, session; threads is the 18th.
                    fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
                    pid, parent, session = int(name), int(fields[1]), int(fields[3])
                    children[parent].append(pid)
                    if session != pid:
                        children[session].append(pid)
                    threads[pid] = int(fields[17])
        self._children, self._threads, self._read_at = children, threads, time.monotonic()


def _place(pid: int, threads: int) -> str:
    """Return the folder that shows a process's resources: of its first thread or, if that has ended, of one that is alive."""
    place = f"/proc/{pid}/"
    if threads > 1 and not _has_memory(place):
        with suppress(OSError):  # it ended meanwhile
            others = (f"{place}task/{thread}/" for thread in os.listdir(f"{place}task"))  # noqa: PTH208 - as above
            return next(filter(_has_memory, others), place)
    return place


def _has_memory(place: str) -> bool:
    """Whether a thread is still alive."""
    return b"\nVmSize:" in _text(place, "status")


def _memory(places: Iterable[str], name: str, held: int) -> int:
    """Return bytes of memory, given that open in-memory files hold `held` bytes.

    `status` has the kernel's own counters, read in 10 us, and counts shared memory in each process. In `smaps_rollup` shared memory is
    divided among them: the kernel walks through all pages, at 15 us per MiB.
    """
    own = mapped = 0
    for place in places:
        for of_its_own, shared in _MEMORY.findall(_text(place, name)):
            own += int(of_its_own or 0)
            mapped += int(shared or 0)
    return (own << 10) + max(held, mapped << 10)


def _text(place: str, name: str) -> bytes:
    try:
        return Path(place, name).read_bytes()
    except PermissionError:
        return _text(place, "status") if name != "status" else b""  # it forbids inspection
    except OSError:
        return b""  # it ended meanwhile


def _held_by(places: Iterable[str]) -> ProcessUse:
    """Return what open unnamed files hold, counting each file once."""
    seen = set[tuple[int, int]]()
    kinds = {_memfds(): True}
    memory = unlinked = files = 0
    for place in places:
        names = _descriptors(place)
        if names is None:
            return ProcessUse(memory=memory, unlinked=unlinked, files=files, hidden=True)
        files += len(names)
        if files > MOST_FILES:
            break
        for name in names:
            with suppress(OSError):  # closed meanwhile
                status = os.stat(f"{place}fd/{name}")  # noqa: PTH116 - as above
                file = status.st_dev, status.st_ino
                if status.st_nlink == 0 and stat.S_ISREG(status.st_mode) and file not in seen:
                    seen.add(file)
                    if status.st_dev not in kinds:
                        kinds[status.st_dev] = status.st_dev in _tmpfs(place)
                    size = max(_ENTRY_BYTES, status.st_blocks * 512)
                    if kinds[status.st_dev]:
                        memory += size
                    else:
                        unlinked += size
    return ProcessUse(memory=memory, unlinked=unlinked, files=files)


def _descriptors(place: str, wait: float = _HIDES_SECONDS) -> list[str] | None:
    """Return the names of open descriptors; None if a process hides them, as one does whose program file is unreadable."""
    try:
        return os.listdir(f"{place}fd")  # noqa: PTH208 - as above
    except OSError as error:
        if not isinstance(error, PermissionError) or not _has_memory(place):
            return []  # it ended meanwhile
    if not wait:
        return None
    time.sleep(wait)
    return _descriptors(place, wait=0.0)


def _tmpfs(place: str) -> set[int]:
    """Return the devices of in-memory file systems that a process sees."""
    lines = (line.partition(b" - ") for line in _text(place, "mountinfo").splitlines())
    numbers = (seen.split()[2].split(b":") for seen, _, kind in lines if kind.startswith(b"tmpfs "))
    return {os.makedev(int(major), int(minor)) for major, minor in numbers}


@cache
def _memfds() -> int:
    """Return the device that memfds are on, which no path leads to."""
    with open(os.memfd_create("device"), "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        return os.fstat(file.fileno()).st_dev


def disk_use(folder: Path, enough: int) -> int:
    """Return the bytes that a tree takes up on disk; counting stops above `enough`.

    A path longer than the system allows, or a folder closed against us by its owner, counts as more than `enough`: nothing hides there.
    """
    total, waiting = 0, [str(folder)]
    while waiting and total <= enough:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    total += max(_ENTRY_BYTES, status.st_blocks * 512)
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # removed or replaced meanwhile
        except OSError:
            return enough + 1
    return total


class Paced(Generic[T]):
    """A measurement taken in a thread, limited in frequency: `least` seconds apart, and taking at most a tenth of the time."""

    def __init__(self, least: float, found: T) -> None:
        """`found` holds until the first measurement, which is due at once."""
        self._least, self._due = least, 0.0
        self.found = found
        """The result of the last measurement."""

    async def look(self, look: Callable[[], T], *, anew: bool = False) -> T:
        """Measure if it is due, or in any case if `anew`; return the latest result."""
        if anew or time.monotonic() >= self._due:
            self.found, took = await asyncio.get_running_loop().run_in_executor(_LOOKERS, _timed, look)
            self._due = time.monotonic() + max(self._least, 10 * took)
        return self.found


_LOOKERS = ThreadPoolExecutor(thread_name_prefix="look")
"""A separate pool: the event loop's own threads also remove folders, and a limit that nobody checks is none."""


def _timed(look: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    return look(), time.monotonic() - began


class DiskMeter:
    """Measures what one folder takes up on disk."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._paced = Paced(DISK_SECONDS, 0)

    @property
    def used(self) -> int:
        """Bytes at the last measurement; counted only a little above the limit."""
        return self._paced.found

    @property
    def full(self) -> bool:
        return self.used > self._limit

    async def measure(self, *, anew: bool = False) -> int:
        """Measure, unless that was just done; `anew`: in any case."""
        return await self._paced.look(partial(disk_use, self._folder, self._limit + _DISK_MARGIN), anew=anew)
