"""A stage ends right after its last call to the store; its exit code is what the runtime goes by."""

import subprocess
import sys

import pytest

from dagger_operator.api import Storage

# Forks after the imports, which take most of a process's start. obstore's own coroutines failed 10 of 100 such ends.
_SCRIPT = """
import asyncio, os, sys
from dagger_operator.api import Storage
from dagger_operator.store.objects import Store
async def work():
    store = Store.open(Storage.model_validate_json(sys.argv[1]))
    await store.put("x", b"1")
    await asyncio.gather(*(store.get("x") for _ in range(4)))
ends = []
for _ in range(30):
    child = os.fork()
    if child == 0:
        asyncio.run(work())
        sys.exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(sorted(set(ends)))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("settings", ["folder"], indirect=True)
def test_a_process_that_ends_right_after_its_last_call_ends_with_0(settings: tuple[Storage, dict[str, str]]) -> None:
    storage, environ = settings
    command = [sys.executable, "-c", _SCRIPT, storage.model_dump_json()]
    assert subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout == "[0]\n"
