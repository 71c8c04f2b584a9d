"""`daggerctl store`: whether storage is fit for a run, and whether what it holds is complete."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from dagger_operator.api import DAggerRun
from dagger_operator.cli.documents import known, read
from dagger_operator.cli.exits import Exit
from dagger_operator.local.acceptance import accept
from dagger_operator.local.environment import storage_credentials
from dagger_operator.store.credentials import own_identity
from dagger_operator.store.objects import Store


def open_store(run: DAggerRun, secrets: Mapping[str, Mapping[str, str]]) -> Store:
    """Open the run's storage, with the credentials in its Secret, or this user's environment if that is not available."""
    return Store.open(run.spec.storage, storage_credentials(run, secrets, own_identity()))


def stored_run(run: str) -> tuple[DAggerRun, Store]:
    """Return a run, by name or from a file, and its storage."""
    documents = known(run)
    return documents.run, open_store(documents.run, documents.secrets)


def check_store(file: Path) -> int:
    from dagger_operator.store.check import check

    documents = read(file)
    run = accept(documents.run, None, Path.cwd())
    outcome = asyncio.run(check(open_store(run, documents.secrets)))
    Console().print(str(outcome), highlight=False, soft_wrap=True)
    return Exit.OK if outcome.honest else Exit.FAILED


def check_run(run: str, deep: bool) -> int:
    from dagger_operator.store.fsck import fsck

    _, store = stored_run(run)
    outcome = asyncio.run(fsck(store, deep=deep))
    Console().print(str(outcome), highlight=False, soft_wrap=True)
    return Exit.OK if outcome.sound else Exit.FAILED
