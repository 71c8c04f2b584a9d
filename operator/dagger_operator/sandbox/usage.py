"""What a sandbox uses of memory, processes and disk, measured from outside."""

import asyncio
import os
import stat
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ENTRY_BYTES = 4096
"""What a file, folder or link counts at least: empty ones use up inodes."""

_DISK_MARGIN = 64 << 20
"""How far beyond a limit usage is told apart."""


@dataclass(frozen=True)
class ProcessUse:
    processes: int
    """Processes and threads."""
    memory: int
    """Bytes of memory that is not file cache; pages shared after a fork count in each process."""


class ProcessTable:
    """All processes of the machine by their parents, read once for all sandboxes and kept for `max_age` seconds."""

    def __init__(self, max_age: float = 0.1) -> None:
        self._max_age = max_age
        self._read_at = float("-inf")
        self._children: dict[int, list[int]] = {}
        self._use: dict[int, tuple[int, int]] = {}

    def below(self, pid: int) -> ProcessUse:
        """What a process and everything that descends from it, or shares its session, uses."""
        if time.monotonic() - self._read_at > self._max_age:
            self._read()
        seen, waiting = set[int](), [pid]
        while waiting:
            current = waiting.pop()
            if current not in seen and current in self._use:
                seen.add(current)
                waiting += self._children.get(current, ())
        return ProcessUse(sum(self._use[p][0] for p in seen), sum(self._use[p][1] for p in seen))

    def _read(self) -> None:
        children: dict[int, list[int]] = defaultdict(list)
        use: dict[int, tuple[int, int]] = {}
        page = os.sysconf("SC_PAGE_SIZE")
        for name in os.listdir("/proc"):  # noqa: PTH208 - twice as fast as iterdir, ten times a second
            if name.isdigit():
                with suppress(OSError):  # it ended meanwhile
                    # After the name, which may hold anything: state, parent, group, session; threads is the 18th, RSS the 22nd.
                    fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
                    shared = int(Path(f"/proc/{name}/statm").read_bytes().split()[2])
                    pid, parent, session = int(name), int(fields[1]), int(fields[3])
                    children[parent].append(pid)
                    if session != pid:
                        children[session].append(pid)
                    use[pid] = int(fields[17]), max(0, int(fields[21]) - shared) * page
        self._children, self._use, self._read_at = children, use, time.monotonic()


def disk_use(folder: Path, enough: int) -> int:
    """Bytes that a tree takes up on disk; counting stops above `enough`.

    A path longer than the system allows, or a folder that its owner closed against us, counts as `enough` and more: nothing hides there.
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


class DiskMeter:
    """What one folder takes up on disk, measured no more often than worth it."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._at, self._cost = time.monotonic(), 0.0
        self.used = 0
        """Bytes at the last measurement; counted no further than a little above the limit."""

    @property
    def full(self) -> bool:
        return self.used > self._limit

    async def measure(self, *, anew: bool = False) -> int:
        """Measures, unless it was just done: at most every half second, and at most a tenth of the time; `anew`: in any case."""
        now = time.monotonic()
        if anew or now - self._at >= max(0.5, 10 * self._cost):
            self.used = await asyncio.to_thread(disk_use, self._folder, self._limit + _DISK_MARGIN)
            self._at = time.monotonic()
            self._cost = self._at - now
        return self.used
