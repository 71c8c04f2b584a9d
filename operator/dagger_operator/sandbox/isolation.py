"""Which isolation this machine offers for commands, found out by trying, and its description."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dagger_operator.sandbox import seccomp
from dagger_operator.sandbox.cgroup import Cgroups
from dagger_operator.sandbox.handed import descriptor_of

_CAP_SYS_PTRACE = 19


@dataclass(frozen=True)
class Isolation:
    """How process sandboxes are confined on this machine."""

    bubblewrap: str | None
    """Path of bwrap, or None if namespaces cannot be used: then commands are plain processes."""
    reason: str
    """Why there are no namespaces; empty if there are."""
    cgroups: Cgroups | None
    """Kernel-enforced limits; if None, this process samples memory and processes instead."""
    root: bool
    """Whether this process is root; if so, each namespaced sandbox runs under its own unprivileged user id."""
    sees_files: bool = True
    """Whether the open files of commands can be inspected: for another user id's processes that takes CAP_SYS_PTRACE."""

    @property
    def counts_processes(self) -> bool:
        """Whether RLIMIT_NPROC counts a sandbox's processes alone: root's sandboxes have their own user ids, and since Linux 5.14
        it is counted per user namespace. Otherwise it would count everything that this user runs."""
        release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
        return self.bubblewrap is not None and (self.root or release >= (5, 14))

    def describe(self) -> str:
        """Return one line for people, such as `daggerctl run` prints."""
        memory = f"memory and CPU limited by {self.cgroups.describe()}" if self.cgroups else "memory limited by sampling, CPU not limited"
        if not self.sees_files:
            memory += "; files in memory and files without a name do not count, for which root needs CAP_SYS_PTRACE"
        if self.bubblewrap:
            user = "a user id of its own" if self.root else "this user in a namespace of its own"
            return f"Process sandboxes: bubblewrap namespaces, no network, no host files but read-only /usr, {user}; {memory}."
        return (
            f"Process sandboxes WITHOUT namespaces ({self.reason}), for which a run has to set spec.sandbox.allowUnconfined: commands run "
            "as this user, reach the network and this user's files and processes, and what leaves its process group outlives its command; "
            f"{memory}."
        )

    def refusal(self) -> str:
        """Return why a run that does not allow unconfined commands gets no sandboxes here, and what to do."""
        return (
            f"commands of models would reach the network and this user's files and processes, credentials among them: {self.reason}. "
            "Install bubblewrap, and allow user namespaces or run as root; on a cluster set spec.sandbox.namespace, for sandboxes that are "
            "pods; or, for tasks and models that you trust, write spec.sandbox.allowUnconfined: true"
        )


def probe(*, cgroups: bool = True) -> Isolation:
    """Try namespaces and control groups once each (takes about 20 ms)."""
    root = os.geteuid() == 0
    found = Cgroups.find() if cgroups else None
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return Isolation(None, "bwrap is not installed", found, root)
    if not seccomp.known(machine := os.uname().machine):
        return Isolation(None, f"no filter of system calls is known for {machine}", found, root)
    with descriptor_of(seccomp.program(machine)) as handed:
        options = ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--cap-drop", "ALL", "--seccomp", str(handed)]
        tried = subprocess.run(
            [bwrap, *namespaces(root), *options, "true"],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.defpath},
            cwd=Path("/"),
            pass_fds=(handed,),
        )
    if tried.returncode != 0:
        return Isolation(None, f"bwrap is not permitted here: {tried.stderr.strip() or f'exit code {tried.returncode}'}", found, root)
    return Isolation(bwrap, "", found, root, not root or _may_trace())


def _may_trace() -> bool:
    held = re.search(r"^CapEff:\s+(\w+)", Path("/proc/self/status").read_text(), re.M)
    return held is not None and bool(int(held[1], 16) >> _CAP_SYS_PTRACE & 1)


def namespaces(root: bool) -> tuple[str, ...]:
    """Return bwrap's options to unshare everything. Root needs no user namespace: it drops to an unprivileged id inside, to which
    RLIMIT_NPROC applies."""
    unshared = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    return unshared if root else ("--unshare-user", *unshared)
