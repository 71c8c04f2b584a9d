"""One try at one rollout: a sandbox, a gateway session and the scaffold between them; then labels, grade and record."""

import asyncio
import time
from dataclasses import dataclass

import structlog

from dagger_operator.api import DAggerRun, Mixing, ScaffoldType
from dagger_operator.policy.gateway import Gateway
from dagger_operator.policy.session import Recording, Session, SessionRequest
from dagger_operator.rollout.actions import ActionReader
from dagger_operator.rollout.metered_sandbox import MeteredSandbox
from dagger_operator.rollout.metrics import WorkerMetrics
from dagger_operator.rollout.outcome import InfrastructureFailed, patch_of, verdict
from dagger_operator.rollout.scaffold import DEADLINE, LIMIT_REACHED, ScaffoldEnd, ScaffoldProgram
from dagger_operator.sandbox.interface import LimitExceeded, SandboxError, SandboxProvider
from dagger_operator.store.objects import StoreUnavailable
from dagger_operator.store.records import Failure, Outcome, Timings, Trajectory
from dagger_operator.store.stage import StageFailure
from dagger_operator.tasks.deal import Assignment
from dagger_operator.tasks.grading import grade
from dagger_operator.tasks.workspace import collect_patch, start

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Attempts:
    """What all tries of a worker share; calling it runs one try."""

    run: DAggerRun
    round: int
    worker: str
    mixing: Mixing | None
    """None in evaluation: the student alone, greedy, no labels."""
    max_turns: int
    student: str
    """Policy version, as is `teacher`."""
    teacher: str
    provider: SandboxProvider
    gateway: Gateway
    program: ScaffoldProgram
    reader: ActionReader
    metrics: WorkerMetrics

    async def __call__(self, assignment: Assignment, tries: int) -> Trajectory:
        """Run the rollout and return its record. Raises `InfrastructureFailed`; whatever is raised, nothing is left running."""
        try:
            return await self._run(assignment, tries)
        except (InfrastructureFailed, StageFailure):
            raise
        except SandboxError as error:
            raise InfrastructureFailed(Failure(reason=error.reason, message=error.message)) from error
        except StoreUnavailable as error:
            raise InfrastructureFailed(Failure(reason="StorageUnavailable", message=str(error))) from error
        except Exception as error:
            # A fault of ours or of the machine: it may cost this rollout a try, but must not end the worker's other rollouts.
            log.exception("unexpected error in a rollout")
            raise InfrastructureFailed(Failure(reason="Unexpected", message=f"{type(error).__name__}: {error}")) from error

    def excluded(self, assignment: Assignment, tries: int, failure: Failure) -> Trajectory:
        """Return the record of a rollout that infrastructure broke on its last try: counted, but without anything to train on."""
        now = Timings(started_at=time.time())
        return self._record(assignment, tries, Outcome.INFRASTRUCTURE_FAILURE, failure=failure, timings=now)

    async def _run(self, assignment: Assignment, tries: int) -> Trajectory:
        started_at, started = time.time(), time.monotonic()
        session = self.gateway.open(self._session_request(assignment))
        try:
            end, patch, spent = await self._act(assignment, tries, session)
            recording = await session.finish()
        except BaseException:
            await session.abort()
            raise
        spec = self.run.spec
        judged = verdict(end, recording, min_coverage=spec.labels.min_coverage, timeout=spec.rollouts.timeout_seconds)
        outcome, submitted, grading = judged.outcome, judged.outcome is None, time.monotonic()
        if outcome is None:
            patch = patch_of(end, patch)
            with self.metrics.grade_seconds.time():
                outcome = await self._grade(assignment, tries, patch)
        timings = Timings(
            started_at=started_at,
            total=time.monotonic() - started,
            sandbox=spent.sandbox,
            acting=recording.acting_seconds,
            commands=spent.commands,
            labels=recording.label_seconds,
            grading=time.monotonic() - grading if submitted else 0.0,
        )
        return self._record(
            assignment,
            tries,
            outcome,
            recording=recording,
            exit_status=judged.exit_status,
            submitted=submitted,
            patch=patch,
            failure=recording.policy_error,
            timings=timings,
        )

    async def _act(self, assignment: Assignment, tries: int, session: Session) -> tuple[ScaffoldEnd, str, "_Spent"]:
        """Run the agent; return how it ended, its patch, and the seconds spent on the sandbox and on its commands."""
        spec, task = self.run.spec, assignment.task
        workspace = await start(
            task,
            self.provider,
            name=self._name(assignment, tries),
            timeout=spec.sandbox.create_timeout_seconds,
            network_to=self.gateway.address if spec.scaffold.type is ScaffoldType.COMMAND else None,
        )
        sandbox = MeteredSandbox(workspace.sandbox, self.metrics.command_seconds)
        try:
            self.metrics.create_seconds.observe(workspace.create_seconds)
            self.metrics.start_seconds.observe(workspace.start_seconds)
            try:
                async with asyncio.timeout(spec.rollouts.timeout_seconds):
                    end = await self.program(task, sandbox, session)
            except TimeoutError:
                end = ScaffoldEnd(DEADLINE)
            patch = await collect_patch(workspace)
        except LimitExceeded as error:
            # All changes were lost with the sandbox.
            end, patch = ScaffoldEnd(LIMIT_REACHED, str(error)), ""
            log.info("the agent exceeded its sandbox's limits", reason=error.reason, problem=error.message)
        finally:
            await sandbox.close()
        return end, patch, _Spent(sandbox=workspace.create_seconds + workspace.start_seconds, commands=sandbox.command_seconds)

    async def _grade(self, assignment: Assignment, tries: int, patch: str) -> Outcome:
        limits = self.run.spec.sandbox
        found = await grade(
            assignment.task,
            patch,
            self.provider,
            name=f"{self._name(assignment, tries)}-grade",
            create_timeout=limits.create_timeout_seconds,
            timeout=limits.grade_timeout_seconds,
        )
        return Outcome.RESOLVED if found.resolved else Outcome.UNRESOLVED

    def _name(self, assignment: Assignment, tries: int) -> str:
        return f"{self.run.metadata.name}-r{self.round:03d}-{assignment.rollout_id}-{tries}"

    def _session_request(self, assignment: Assignment) -> SessionRequest:
        spec = self.run.spec
        return SessionRequest(
            seed=spec.seed,
            round=self.round,
            rollout_id=assignment.rollout_id,
            task_id=assignment.task.id,
            student=self.student,
            max_turns=self.max_turns,
            label_check=self.reader.flaw,
            mixing=self.mixing,
            labels=spec.labels.mode,
        )

    def _record(
        self,
        assignment: Assignment,
        tries: int,
        outcome: Outcome,
        *,
        timings: Timings,
        recording: Recording | None = None,
        exit_status: str = "",
        submitted: bool = False,
        patch: str = "",
        failure: Failure | None = None,
    ) -> Trajectory:
        return Trajectory(
            run=self.run.metadata.name,
            round=self.round,
            rollout_id=assignment.rollout_id,
            task_id=assignment.task.id,
            attempt=assignment.attempt,
            student=self.student,
            teacher=self.teacher,
            kappa=recording.kappa if recording else None,
            turns=recording.turns if recording else (),
            outcome=outcome,
            exit_status=exit_status,
            submitted=submitted,
            patch=patch,
            failure=failure,
            tries=tries,
            worker=self.worker,
            timings=timings,
        )


@dataclass(frozen=True)
class _Spent:
    """Seconds."""

    sandbox: float
    commands: float
