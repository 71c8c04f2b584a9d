"""Control groups, version 1 or 2, if this process may create them: memory and CPU limits enforced by the kernel.

The pids controller is not used: Linux 6.18 leaked one charge for every pid namespace that ended (measured, version 1), so that a sandbox
ran out of processes after that many commands. RLIMIT_NPROC counts correctly wherever there are namespaces.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dagger_operator.api import SandboxLimits

_PREFIX = "dagger-"
_PERIOD = 100_000
"""Microseconds over which CPU time is measured."""


@dataclass(frozen=True)
class Cgroups:
    """Folders in which groups can be created: one in version 2, one for each controller in version 1."""

    version: int
    parents: tuple[Path, ...]

    @classmethod
    def find(cls) -> Self | None:
        """Return where groups with a memory limit can be created, tested by creating one, or None."""
        for version, parents in (_version_2(), _version_1()):
            if parents:
                found = cls(version, parents)
                try:
                    found.make(f"probe-{os.getpid()}-{time.monotonic_ns()}", SandboxLimits()).remove()
                    return found
                except OSError:
                    continue
        return None

    def describe(self) -> str:
        return f"cgroup v{self.version}"

    def make(self, name: str, limits: SandboxLimits) -> "Cgroup":
        """Create a group with limits; if that fails, raise OSError and leave nothing behind."""
        group = Cgroup(self.version, tuple(parent / f"{_PREFIX}{name}" for parent in self.parents))
        try:
            for folder in group.folders:
                folder.mkdir()
            group.limit(limits)
        except OSError:
            group.remove()
            raise
        return group

    def sweep(self, prefix: str) -> None:
        """Remove the groups, empty by now, of an owner that died."""
        for parent in self.parents:
            for folder in parent.glob(f"{_PREFIX}{prefix}*"):
                Cgroup(self.version, (folder,)).remove()


@dataclass(frozen=True)
class Cgroup:
    """One sandbox's control group."""

    version: int
    folders: tuple[Path, ...]

    def limit(self, limits: SandboxLimits) -> None:
        memory, quota = limits.memory_mib << 20, max(1000, int(limits.cpus * _PERIOD))
        if self.version == 2:
            self._set("memory.max", memory)
            self._set("memory.swap.max", 0, needed=False)
            self._set("memory.oom.group", 1, needed=False)
            self._set("cpu.max", f"{quota} {_PERIOD}", needed=False)
        else:
            self._set("memory.limit_in_bytes", memory)
            self._set("memory.memsw.limit_in_bytes", memory, needed=False)
            self._set("cpu.cfs_period_us", _PERIOD, needed=False)
            self._set("cpu.cfs_quota_us", quota, needed=False)

    def _set(self, name: str, value: int | str, *, needed: bool = True) -> None:
        found = [folder / name for folder in self.folders if (folder / name).exists()]
        if needed and not found:
            raise FileNotFoundError(f"no {name} in {', '.join(map(str, self.folders))}")
        for file in found:
            file.write_text(str(value))

    @property
    def entrances(self) -> tuple[str, ...]:
        """Files to which a process writes 0 to join the group."""
        return tuple(str(folder / "cgroup.procs") for folder in self.folders)

    def oom_kills(self) -> int:
        """Return the number of processes killed so far for memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        for folder in self.folders:
            with suppress(OSError, ValueError):
                lines = dict(line.split() for line in (folder / name).read_text().splitlines())
                return int(lines["oom_kill"])
        return 0

    def remove(self) -> None:
        """Remove the group; its processes are dead by now, though the kernel may need a moment to notice."""
        for folder in self.folders:
            for _ in range(50):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    time.sleep(0.02)
                    continue
                break


def _mounts() -> list[tuple[Path, str, set[str]]]:
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [(Path(fields[1]), fields[2], set(fields[3].split(","))) for fields in lines if fields[2] in ("cgroup", "cgroup2")]


def _own(controller: str) -> str:
    """Return this process's group in a controller's hierarchy; for version 2 the controller name is empty."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path.lstrip("/")
    return ""


def _version_1() -> tuple[int, tuple[Path, ...]]:
    parents: dict[str, Path] = {}
    for mount, kind, options in _mounts():
        for controller in ("memory", "cpu"):
            if kind == "cgroup" and controller in options:
                own = mount / _own(controller)
                # In a container this path may be the host's and not exist here.
                parents[controller] = own if own.exists() else mount
    return 1, tuple(dict.fromkeys(parents.values())) if "memory" in parents else ()


def _version_2() -> tuple[int, tuple[Path, ...]]:
    for mount, kind, _ in _mounts():
        if kind == "cgroup2":
            # Beside our own group, not in it: a group that holds processes may not delegate controllers to children.
            own = mount / _own("")
            parent = own.parent if own != mount and own.exists() else mount
            with suppress(OSError):
                if "memory" in (parent / "cgroup.subtree_control").read_text().split():
                    return 2, (parent,)
    return 2, ()
