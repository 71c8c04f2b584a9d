"""The file system of a sandbox: read-only system folders, and three folders of its own (working directory, /tmp, $HOME)."""

import os
import posixpath
import signal
import subprocess
from contextlib import suppress
from pathlib import Path, PurePosixPath

from dagger_operator.sandbox.interface import SandboxError

HOME = "/home/agent"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = ("alternatives", "ld.so.cache", "localtime", "mime.types")
"""Needed by programs in /usr, and the same on every machine that has them. Nothing else of /etc is visible."""
_TAKEN = ("/usr", "/etc", "/proc", "/dev", "/tmp", "/var", HOME, *(f"/{name}" for name in _SYSTEM))  # noqa: S108 - a path inside the sandbox
_SHM_BYTES = 64 << 20


def prepare(folder: Path, owner: int | None) -> None:
    """Create a sandbox's folders; `owner` is the user id that commands run under, if it is not ours.

    `folder` itself stays ours: what is bound into the sandbox cannot be replaced from inside.
    """
    folder.mkdir()
    uid = os.geteuid() if owner is None else owner
    gid = os.getegid() if owner is None else owner
    for name in ("work", "tmp", "home"):
        (folder / name).mkdir()
        if owner is not None:
            os.chown(folder / name, uid, gid)
    (folder / "passwd").write_text(f"agent:x:{uid}:{gid}::{HOME}:/bin/bash\n")
    (folder / "group").write_text(f"agent:x:{gid}:\n")
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    for name in ("passwd", "group", "hosts"):
        (folder / name).chmod(0o644)


def check_workdir(workdir: str) -> None:
    """Raise `SandboxError` for a working directory that would hide the system or lie in a folder that the agent can replace."""
    if not workdir.startswith("/") or posixpath.normpath(workdir) != workdir or workdir == "/":
        raise SandboxError("InvalidWorkdir", f"workdir {workdir!r}: write an absolute path other than / without . and .., such as /testbed")
    if taken := next((path for path in _TAKEN if workdir == path or workdir.startswith(f"{path}/")), None):
        raise SandboxError(
            "InvalidWorkdir", f"workdir {workdir!r} lies in {taken}, which the sandbox needs itself: use one such as /testbed"
        )


def mounts(folder: Path, workdir: str) -> list[str]:
    """Return bubblewrap's file system arguments; the root itself and /dev end up read-only, so that nothing there fills memory."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in _SYSTEM:
        host = Path("/") / name
        if host.is_symlink():
            arguments += ["--symlink", str(host.readlink()), str(host)]
        elif host.is_dir():
            arguments += ["--ro-bind", str(host), str(host)]
    # Parents of mount points, readable for whichever user the command runs as.
    for parent in ("/etc", "/var", *(str(path) for inside in (HOME, workdir) for path in reversed(PurePosixPath(inside).parents[:-1]))):
        arguments += ["--perms", "0755", "--dir", parent]
    for name in _ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name in ("passwd", "group", "hosts"):
        arguments += ["--ro-bind", str(folder / name), f"/etc/{name}"]
    for name, inside in (("tmp", "/tmp"), ("home", HOME), ("work", workdir)):  # noqa: S108 - a path inside the sandbox
        arguments += ["--bind", str(folder / name), inside]
    arguments += ["--symlink", "/tmp", "/var/tmp"]  # noqa: S108 - the same
    arguments += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(_SHM_BYTES), "--tmpfs", "/dev/shm"]  # noqa: S108 - the same
    return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", workdir]


def remove(folder: Path) -> None:
    """Remove a sandbox's folder, whatever its contents, depth and modes. Blocks; raises `SandboxError` if something remains."""
    for attempt in range(3):
        if attempt:
            # Without root's rights a folder without write permission for its owner cannot be emptied.
            subprocess.run(["chmod", "-R", "u+rwX", "--", str(folder)], check=False, capture_output=True)
        done = subprocess.run(["rm", "-rf", "--one-file-system", "--", str(folder)], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise SandboxError("NotRemoved", f"{folder} cannot be removed: {done.stderr.strip()[:300]}")


def end_processes_in(folder: Path) -> None:
    """Kill every process whose working directory lies in a folder: without namespaces, those that escaped their process group."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it ended meanwhile, or is another user's
                if (process / "cwd").readlink().is_relative_to(folder):
                    os.kill(int(process.name), signal.SIGKILL)
