"""`daggerctl status`."""

import json
import sys

from rich.console import Console
from rich.table import Table

from dagger_operator.cli.documents import known, written
from dagger_operator.cli.exits import Exit
from dagger_operator.cli.report import NOTHING, report
from dagger_operator.local.folder import RunFolder, home


def show(which: str, output: str) -> int:
    """Show one run, as a table or as the resource itself."""
    run = known(which).run
    match output:
        case "table":
            Console().print(report(run))
        case "json":
            print(json.dumps(run.wire(), indent=2))
        case "yaml":
            print(written(run), end="")
        case _:
            print(f"error: --output: {output!r}: write table, json or yaml", file=sys.stderr)
            return Exit.BAD_INPUT
    return Exit.OK


def show_all() -> int:
    """Show a line for each run of this machine, as `kubectl get daggerruns` does."""
    table = Table()
    for title in ("name", "phase", "round", "resolved", "teacher", "reason"):
        table.add_column(title)
    for folder in RunFolder.all(home()):
        run = folder.require()
        status = run.status
        cells = (status.phase, f"{status.round}/{run.spec.rounds}", status.resolved, status.teacher_share, status.reason) if status else ()
        table.add_row(folder.name, *(str(cell or NOTHING) for cell in cells))
    Console().print(table)
    return Exit.OK
