"""The folder shared by the containers of a serving pod: versions, which of them is current, and vLLM's socket."""

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from dagger_operator.store.stage import Stage, StageFailure

_LONGEST_SOCKET_PATH = 107
"""Maximum bytes in the path of a Unix socket on Linux, without the terminating zero."""


class Shared:
    """The folder `$DAGGER_SHARED`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "vllm.sock"
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET_PATH:
            message = f"{self.socket} exceeds {_LONGEST_SOCKET_PATH} bytes, too many for a Unix socket: use a folder with a shorter path"
            raise StageFailure("SocketPathTooLong", message)

    @classmethod
    def of(cls, stage: Stage) -> "Shared":
        folder = stage.environ.get("DAGGER_SHARED", "")
        if not folder:
            raise StageFailure("IncompleteEnvironment", "DAGGER_SHARED is not set: servers are started by `daggerctl run` or the operator")
        return cls(Path(folder))

    def folder(self, version: str) -> Path:
        return self.root / "versions" / version

    @property
    def current(self) -> str | None:
        """The version that vLLM loads at start."""
        try:
            return (self.root / "current").readlink().name
        except OSError:
            return None

    def point(self, version: str) -> None:
        """Make a version the current one, atomically."""
        beside = self.root / f".current.{os.getpid()}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(Path("versions") / version)
        beside.replace(self.root / "current")

    def prune(self, keep: Collection[str]) -> None:
        """Remove other versions: an emptyDir has room for two, not for all rounds."""
        for folder in (self.root / "versions").iterdir():
            if folder.name.removesuffix(".partial") not in keep:
                if folder.is_symlink():
                    folder.unlink()
                else:
                    shutil.rmtree(folder, ignore_errors=True)

    def remove_stale_socket(self) -> None:
        """Remove the socket of a server that is gone: vLLM binds without removing it, and would fail to start.

        A starting server binds long before it listens, so a refused connection proves nothing; the kernel's list of bound sockets does.
        """
        with contextlib.suppress(OSError):
            bound = {line.rsplit(" ", 1)[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
            if str(self.socket) not in bound:
                self.socket.unlink()
