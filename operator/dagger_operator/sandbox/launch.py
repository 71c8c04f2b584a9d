"""The argument vector with which a sandbox starts a command: join the control group, enter namespaces, drop rights, set limits."""

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox import filesystem, seccomp
from dagger_operator.sandbox.cgroup import Cgroup
from dagger_operator.sandbox.command import Argv, Start
from dagger_operator.sandbox.handed import descriptor_of
from dagger_operator.sandbox.isolation import Isolation, namespaces

_MIB = 1 << 20
_OPEN_FILES = 4096
_MARK = "DAGGER_CONTAINER"
"""Identifies what this process belongs to on one machine (`local.processes`). If bwrap is killed before its child is set up, the child
waits forever; it is found by this mark, which commands do not get."""


@dataclass(frozen=True)
class Launcher:
    """What all commands of a sandbox share."""

    isolation: Isolation
    limits: SandboxLimits
    folder: Path
    workdir: str
    uid: int | None
    """The user id to drop to; None: keep ours."""
    cgroup: Cgroup | None

    @contextmanager
    def start(
        self, argv: Sequence[str | bytes], env: Mapping[str, str], *, writable: bool, inherit: tuple[int, ...] = ()
    ) -> Iterator[Start]:
        """Yield how to start `argv`. `env` is the whole environment; without `writable` no file can grow."""
        inner = [*self._prlimit(writable), *argv]
        home = filesystem.HOME if self.isolation.bubblewrap else str(self.folder / "home")
        env = {"PATH": filesystem.PATH, "HOME": home, "LANG": "C.UTF-8", **env}
        if not self.isolation.bubblewrap:
            env = {"TMPDIR": str(self.folder / "tmp"), **env}
            yield Start(self._join(inner), env, self.folder / "work", inherit, None)
            return
        options = [*namespaces(self.isolation.root), "--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        if self.uid is not None:
            options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            drop = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
            inner = [*drop, *inner]
        options += [*filesystem.mounts(self.folder, self.workdir), "--clearenv"]
        for name, value in env.items():
            options += ["--setenv", name, value]
        status, write_status = os.pipe()
        try:
            os.set_blocking(status, False)
            # Options are passed through a descriptor: every user of the machine can read an argument vector, and env may hold a token.
            described = b"".join(option.encode("utf-8", "surrogateescape") + b"\0" for option in options)
            with descriptor_of(described) as arguments, descriptor_of(seccomp.program(os.uname().machine)) as confined:
                handed = {"--args": arguments, "--seccomp": confined, "--json-status-fd": write_status}
                outer = [self.isolation.bubblewrap, *(word for option, fd in handed.items() for word in (option, str(fd))), "--", *inner]
                mark = {_MARK: os.environ[_MARK]} if _MARK in os.environ else {}
                yield Start(self._join(outer), {"PATH": filesystem.PATH, **mark}, Path("/"), (*handed.values(), *inherit), status)
        finally:
            os.close(status)
            os.close(write_status)

    def _prlimit(self, writable: bool) -> list[str]:
        size = self.limits.disk_mib * _MIB if writable else 0
        arguments = ["prlimit", "--core=0", f"--nofile={_OPEN_FILES}", f"--fsize={size}"]
        if self.cgroup is None:
            arguments.append(f"--data={self.limits.memory_mib * _MIB}")
        if self.isolation.counts_processes:
            arguments.append(f"--nproc={self.limits.processes}")
        return [*arguments, "--"]

    def _join(self, argv: Argv) -> Argv:
        """Wrap `argv` so that it is in the control group from its first instruction; dash starts in 1 ms."""
        if self.cgroup is None:
            return argv
        joins = " && ".join(f"echo 0 > {shlex.quote(entrance)}" for entrance in self.cgroup.entrances)
        return ["/bin/sh", "-c", f'{joins} && exec "$@"', "sh", *argv]


@contextmanager
def stdin_of(data: bytes | None) -> Iterator[int]:
    """Yield a descriptor to read `data` from, or subprocess.DEVNULL for None."""
    if data is None:
        yield subprocess.DEVNULL
        return
    with descriptor_of(data) as descriptor:
        yield descriptor
