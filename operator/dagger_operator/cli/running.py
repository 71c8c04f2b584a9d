"""`daggerctl run` and `resume`: accept a run, and supervise it in the foreground."""

import asyncio
import logging
import signal
import sys
from pathlib import Path

import structlog
from rich.console import Console

from dagger_operator.api import DAggerRun, Phase, RunStatus, SandboxBackend
from dagger_operator.cli.documents import read
from dagger_operator.cli.exits import Exit
from dagger_operator.cli.live import Display
from dagger_operator.cli.report import report
from dagger_operator.cli.storing import open_store
from dagger_operator.control.names import RETRY
from dagger_operator.local.acceptance import accept, annotated
from dagger_operator.local.folder import RunFolder, home
from dagger_operator.local.supervisor import Supervisor
from dagger_operator.sandbox.isolation import probe


def start(file: Path) -> int:
    """Store the file's run in this machine's folder, then supervise it."""
    documents = read(file)
    folder = RunFolder(home(), documents.run.metadata.name)
    with folder.locked():
        run = accept(documents.run, folder.load(), Path.cwd())
        folder.save_secrets({**folder.secrets(), **documents.secrets})
        return _supervise(folder, run)


def resume(name: str) -> int:
    """Supervise an existing run; a failed one gets new attempts at what failed, a suspended one continues."""
    folder = RunFolder(home(), name)
    run = folder.require()
    with folder.locked():
        if run.status is not None and run.status.phase is Phase.FAILED:
            tries = run.metadata.annotations.get(RETRY, "0")  # any other value means a new attempt; users may write anything
            run = annotated(run, RETRY, str(int(tries) + 1 if tries.isdecimal() else 1))
        return _supervise(folder, run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": False})}))


def _supervise(folder: RunFolder, run: DAggerRun) -> int:
    folder.save(run)
    folder.logs.mkdir(parents=True, exist_ok=True)
    console = Console()
    if run.spec.sandbox.backend is not SandboxBackend.POD:
        console.print(probe().describe(), markup=False, highlight=False, soft_wrap=True)
    with (folder.logs / "supervisor.log").open("a") as log:
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(default=str),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            logger_factory=structlog.PrintLoggerFactory(log),
        )
        status, interrupted = asyncio.run(_watched(folder, run, console))
    console.print(report(folder.require()))
    if interrupted:
        print(f"interrupted; nothing is lost. Go on with: daggerctl resume {folder.name}", file=sys.stderr)
        return Exit.INTERRUPTED
    if status.phase is Phase.FAILED:
        print(f"logs: {folder.logs}. After mending the cause, go on with: daggerctl resume {folder.name}", file=sys.stderr)
    return Exit.OK if status.phase in (Phase.SUCCEEDED, Phase.SUSPENDED) else Exit.FAILED


async def _watched(folder: RunFolder, run: DAggerRun, console: Console) -> tuple[RunStatus, bool]:
    store = await asyncio.to_thread(open_store, run, folder.secrets())
    interrupted = False
    async with Display(console, run, store) as display:
        supervisor = Supervisor(folder, watch=display.show)

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            supervisor.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        return await supervisor.run(), interrupted
