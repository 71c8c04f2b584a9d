"""A Job on this machine: Indexed completions, parallelism, back-off, pod failure policy, suspension, deadline."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from dagger_operator.local.containers import now
from dagger_operator.local.pods import Pod

log = structlog.get_logger()
FIRST_BACK_OFF, LONGEST_BACK_OFF = 1.0, 60.0
"""First and longest wait, in seconds, before a failed pod is recreated; doubled each time."""


class JobFailed(Exception):
    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")


class JobRunner:
    """Runs one Job. `make_pod(name, index)` builds a fresh pod from the Job's template."""

    def __init__(self, manifest: dict[str, Any], make_pod: Callable[[str, int], Pod], changed: Callable[[], None]) -> None:
        self._manifest, self._make_pod, self._changed = manifest, make_pod, changed
        self._name: str = manifest["metadata"]["name"]
        self._pods: dict[int, Pod] = {}
        self._lost: list[dict[str, Any]] = []
        """Manifests of failed pods, as they ended: from these the plan counts infrastructure failures."""
        self._active: set[int] = set()
        self._succeeded: set[int] = set()
        self._failed = 0
        self._started_at: str | None = None
        self._ended: dict[str, Any] | None = None
        self._must_stop = asyncio.Event()
        self._may_run = asyncio.Event()
        self.update(manifest)
        self._task = asyncio.create_task(self._run(), name=f"job {self._name}")

    def update(self, manifest: dict[str, Any]) -> None:
        """Apply what may change in a Job: whether it is suspended."""
        self._manifest = manifest
        suspended = bool(manifest["spec"].get("suspend"))
        (self._must_stop.set if suspended else self._must_stop.clear)()
        (self._may_run.clear if suspended else self._may_run.set)()

    def manifest(self) -> dict[str, Any]:
        conditions = []
        if self._ended is not None:
            conditions.append(self._ended)
        elif self._must_stop.is_set():
            conditions.append({"type": "Suspended", "status": "True", "reason": "JobSuspended"})
        status = {
            "active": len(self._active),
            "succeeded": len(self._succeeded),
            "failed": self._failed,
            "startTime": self._started_at,
            "conditions": conditions,
        }
        return {**self._manifest, "status": {key: value for key, value in status.items() if value is not None}}

    def pods(self) -> list[dict[str, Any]]:
        """Return every pod that was created and not replaced, and those that failed before."""
        return [*self._lost, *(pod.manifest() for _, pod in sorted(self._pods.items()))]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while not self._complete():
                await self._may_run.wait()
                self._started_at = self._started_at or now()
                await self._until_stopped()
            self._end("Complete", "CompletionsReached", "")
        except* Exception as errors:
            first = _first(errors.subgroup(JobFailed) or errors)
            if not isinstance(first, JobFailed):
                # A fault of ours. Otherwise the run would wait forever for a Job that nobody works on any more.
                log.error("job broke", job=self._name, exc_info=first)
                first = JobFailed("RuntimeError", f"{type(first).__name__}: {first}")
            self._end("Failed", first.reason, first.message)

    async def _until_stopped(self) -> None:
        """Work until all indexes are done or the Job is suspended; raises `JobFailed`."""
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._must_stop.wait())
        try:
            deadline = self._manifest["spec"].get("activeDeadlineSeconds")
            done, _ = await asyncio.wait({work, stop}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise JobFailed("DeadlineExceeded", f"not done within activeDeadlineSeconds = {deadline}")
        finally:
            for task in (work, stop):
                task.cancel()
            results = await asyncio.gather(work, stop, return_exceptions=True)
            self._changed()
        if isinstance(results[0], Exception):
            raise results[0]

    def _complete(self) -> bool:
        return len(self._succeeded) >= int(self._manifest["spec"].get("completions", 1))

    async def _work(self) -> None:
        spec = self._manifest["spec"]
        slots = asyncio.Semaphore(int(spec.get("parallelism", 1)))
        async with asyncio.TaskGroup() as group:
            for index in range(int(spec.get("completions", 1))):
                if index not in self._succeeded:
                    group.create_task(self._index(index, slots))

    async def _index(self, index: int, slots: asyncio.Semaphore) -> None:
        pause = FIRST_BACK_OFF
        while True:
            async with slots:
                if await self._attempt(index):
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_BACK_OFF)

    async def _attempt(self, index: int) -> bool:
        if index in self._pods and self._pods[index].failed:
            self._lost.append(self._pods[index].manifest())
        pod = self._pods[index] = self._make_pod(f"{self._name}-{index}", index)
        self._active.add(index)
        self._changed()
        try:
            await pod.run()
        finally:
            self._active.discard(index)
        if pod.succeeded:
            self._succeeded.add(index)
            self._changed()
            return True
        self._judge(pod, index)
        return False

    def _judge(self, pod: Pod, index: int) -> None:
        """Count a failed pod; raises `JobFailed` if the policy says so or the retries are used up."""
        spec = self._manifest["spec"]
        action, code = _action(spec.get("podFailurePolicy", {}).get("rules", ()), pod.exit_codes())
        if action == "FailJob":
            raise JobFailed("PodFailurePolicy", f"pod {self._name}-{index} ended with exit code {code}, which no retry mends")
        if action != "Ignore":
            self._failed += 1
        self._changed()
        limit = int(spec.get("backoffLimit", 6))
        if self._failed > limit:
            raise JobFailed(
                "BackoffLimitExceeded",
                f"pods failed {self._failed} times, backoffLimit is {limit}; the last one ended with exit code {code}",
            )

    def _end(self, kind: str, reason: str, message: str) -> None:
        self._ended = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now()}
        self._changed()


def _first(group: ExceptionGroup[Exception]) -> Exception:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def _action(rules: Any, exit_codes: Mapping[str, int]) -> tuple[str, int]:
    """Return the action of the first matching rule of a pod failure policy, and the exit code that it matched."""
    failed = {name: code for name, code in exit_codes.items() if code != 0}
    for rule in rules:
        wanted = rule.get("onExitCodes")
        if wanted is None:
            continue  # pod conditions such as DisruptionTarget do not arise on one machine
        for name, code in failed.items():
            if wanted.get("containerName", name) != name:
                continue
            if (code in wanted["values"]) == (wanted["operator"] == "In"):
                return str(rule["action"]), code
    return "Count", next(iter(failed.values()), 1)
