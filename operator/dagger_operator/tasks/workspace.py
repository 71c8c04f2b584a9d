"""A task's sandbox, from its start to the resulting patch.

The initial files are recorded in a separate git repository outside the working directory. So it does not matter whether the task has a
repository, what the agent commits there, or whether it breaks or removes it; and nothing is added to what the agent sees.
"""

import time
from dataclasses import dataclass

from dagger_operator.sandbox.interface import CommandResult, Sandbox, SandboxError, SandboxProvider, SandboxRequest
from dagger_operator.tasks.task import Task

PATCH_FILE = ".dagger-patch"
"""File in the working directory by which patches are exchanged with a sandbox; never part of a patch."""
NO_PATCH = "# no patch: "
"""Prefix of the text for a patch that could not be collected; the reason follows. It never applies."""
_MAX_PATCH_BYTES = 8 << 20
PATCH_SECONDS = 300
"""Deadline of each command that writes or applies a patch."""
START_STEPS = 3
"""Steps of `start` with a deadline of their own: the sandbox, the task's setup, and the record of its files."""
COLLECT_STEPS = 2
"""Commands of `collect_patch`: the second one where the first one's patch is not UTF-8."""
_GIT = (
    "export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_LITERAL_PATHSPECS=1\n"
    "export GIT_DIR=${HOME:-/tmp}/.dagger-start GIT_WORK_TREE=$PWD\n"
    "unset GIT_INDEX_FILE GIT_OBJECT_DIRECTORY\n"
)
_SNAPSHOT = (
    _GIT
    + f"""
tracked=$(mktemp); [ -e .git ] && env -u GIT_DIR -u GIT_WORK_TREE git -c safe.directory='*' ls-files -z > "$tracked" 2>/dev/null
set -e
git init -q --template= "$GIT_DIR" && mkdir -p "$GIT_DIR/info"
git config core.compression 0; git config core.autocrlf false; git config core.excludesFile /dev/null; git config gc.auto 0
printf '%s\\n' __pycache__/ '*.pyc' .pytest_cache/ /{PATCH_FILE} > "$GIT_DIR/info/exclude"
# Bytes as they are, whatever .gitattributes says.
echo '* -text !filter !ident !diff !merge !working-tree-encoding' > "$GIT_DIR/info/attributes"
git add -A
# What the task's repository tracks although it ignores it.
[ -s "$tracked" ] && git add -f --ignore-errors --pathspec-from-file="$tracked" --pathspec-file-nul || true
rm -f "$tracked"; git write-tree > "$GIT_DIR/start"
"""
)
_DIFF = (
    _GIT
    + f"""
start=$(cat "$GIT_DIR/start") && git cat-file -e "$start" || exit 1
git add -A --ignore-errors
[ -n "$AS_BINARY" ] && echo '* -diff' >> "$GIT_DIR/info/attributes"
git diff --cached --binary --no-color --no-ext-diff --no-textconv --no-renames "$start" > {PATCH_FILE}
"""
)


@dataclass(frozen=True)
class Workspace:
    """A sandbox with a task ready to be worked on."""

    sandbox: Sandbox
    task: Task
    create_seconds: float
    """Time until the sandbox answered."""
    start_seconds: float
    """Time from then until the task was ready in it."""


async def start(task: Task, provider: SandboxProvider, *, name: str, timeout: float, network_to: str | None = None) -> Workspace:
    """Create a sandbox with the task's files, run its setup and record the files. `timeout` applies to each of these `START_STEPS`.

    Raises `SandboxError`; then no sandbox is left behind.
    """
    began = time.monotonic()
    request = SandboxRequest(name=name, image=task.image, workdir=task.workdir, files=task.files, network_to=network_to)
    sandbox = await provider.create(request, timeout=timeout)
    created = time.monotonic()
    try:
        if task.setup is not None:
            _check(await sandbox.execute(task.setup, timeout=timeout), "SetupFailed", f"setup of task {task.id}")
        _check(await sandbox.execute(_SNAPSHOT, timeout=timeout), "SnapshotFailed", f"noting the files of task {task.id}; it needs git")
    except BaseException:
        await sandbox.close()
        raise
    return Workspace(sandbox, task, created - began, time.monotonic() - created)


async def collect_patch(workspace: Workspace) -> str:
    """Return the changes since the start, of all files that are tracked or new and not ignored, in the format of `git apply`.

    Text that is not UTF-8 is written as git's binary patches. If the agent made a patch impossible, the reason follows `NO_PATCH`
    instead. Raises `SandboxError` if the sandbox is gone.
    """
    for environment in ({}, {"AS_BINARY": "1"}):
        done = await workspace.sandbox.execute(_DIFF, timeout=PATCH_SECONDS, env=environment)
        data = await workspace.sandbox.read(PATCH_FILE, limit=_MAX_PATCH_BYTES + 1) if done.returncode == 0 else None
        if data is None:
            return f"{NO_PATCH}the record of the start or the disk is broken: {done.output[-300:].strip()}\n"
        if len(data) > _MAX_PATCH_BYTES:
            return f"{NO_PATCH}it is larger than {_MAX_PATCH_BYTES >> 20} MiB\n"
        try:
            return data.decode()
        except UnicodeDecodeError:
            continue
    return f"{NO_PATCH}a file name is not UTF-8\n"


async def apply_patch(
    workspace: Workspace, patch: str, commands: tuple[str, ...] = ("git apply --binary --whitespace=nowarn",)
) -> CommandResult:
    """Apply a collected patch to a fresh workspace; `commands` are tried in turn, each on the unchanged files. An empty patch is valid.

    Raises `SandboxError`, also on a timeout: nothing of the agent's runs here, so it is not the agent's fault.
    """
    if not patch.strip():
        return CommandResult("", 0)
    await workspace.sandbox.write({PATCH_FILE: patch})
    # A failed attempt, in particular with `--reject`, leaves parts behind.
    again = 'git read-tree "$(cat "$GIT_DIR/start")" && git checkout-index -f -a && git clean -fdq'
    tries = [f"{command} {PATCH_FILE}" for command in commands]
    chain = " || ".join([tries[0], *(f"{{ {again} && {command}; }}" for command in tries[1:])])
    # The last one may have applied everything and still report an error.
    script = f"{_GIT}{chain} || git apply --check --reverse {PATCH_FILE}\ncode=$?; rm -f {PATCH_FILE}; exit $code"
    done = await workspace.sandbox.execute(script, timeout=PATCH_SECONDS)
    if done.timed_out:
        raise SandboxError("ApplyTimeout", f"applying a patch to a fresh copy of task {workspace.task.id} took over {PATCH_SECONDS} s")
    return done


def _check(result: CommandResult, reason: str, what: str) -> None:
    if result.returncode != 0:
        raise SandboxError(reason, f"{what}: exit code {result.returncode}: {result.output[-1000:].strip()}")
