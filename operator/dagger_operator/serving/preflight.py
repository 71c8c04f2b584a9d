"""Stage `preflight`: before round 1 both policies are queried as the rollouts will query them. What would spoil labels or turns stops the
run here, with what to change; harmless limitations of a policy are recorded.
"""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import sys

import structlog

from dagger_operator.api import Role
from dagger_operator.serving.examination import Examination
from dagger_operator.store.policies import pointed
from dagger_operator.store.progress import Reporter
from dagger_operator.store.results import PreflightResult, PrepareResult, read_result, save_result
from dagger_operator.store.stage import Stage, StageFailure, main

log = structlog.get_logger()


async def preflight(stage: Stage) -> None:
    """Run the stage. Raises `StageFailure`; its reason starts with the policy at fault."""
    if await read_result(stage.store, 0, PreflightResult) is not None:
        return
    prepared = await read_result(stage.store, 0, PrepareResult)
    if prepared is None:
        raise StageFailure("NotPrepared", "the prepare stage has no result: it comes first", permanent=False)
    pointer = await pointed(stage.store)
    versions: dict[Role, str] = {Role.STUDENT: pointer.policy if pointer else prepared.policy, Role.TEACHER: prepared.teacher}
    checks: dict[str, str] = {}
    contexts: dict[Role, int] = {}
    reporter = Reporter(stage.store, 0, "preflight", "policies")
    for number, (role, version) in enumerate(versions.items()):
        await reporter.tell(number, len(versions))
        examination = Examination(stage, role, version, versions[Role.STUDENT])
        found = await examination.run()
        checks |= {f"{role}.{name}": what for name, what in found.items()}
        contexts[role] = examination.context
        log.info("policy checked", policy=version, role=role, **found)
    await reporter.tell(len(versions), len(versions))
    if 0 < contexts[Role.TEACHER] < contexts[Role.STUDENT]:
        checks["teacher.context"] += f"; warning: states beyond it, up to the student's {contexts[Role.STUDENT]}, get no label"
    await save_result(stage.store, 0, PreflightResult(student=versions[Role.STUDENT], teacher=versions[Role.TEACHER], checks=checks))


if __name__ == "__main__":
    sys.exit(main("preflight", preflight))
