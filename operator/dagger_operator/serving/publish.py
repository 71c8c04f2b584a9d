"""Stage `publish`: moves the pointer to the round's new policy, and waits until every replica serves it."""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import sys
import time

import structlog

from dagger_operator.serving.agents import said, wait_for
from dagger_operator.store.policies import point_to
from dagger_operator.store.progress import Reporter
from dagger_operator.store.results import PublishResult, read_result, save_result
from dagger_operator.store.stage import Stage, StageFailure, main

log = structlog.get_logger()


async def publish(stage: Stage) -> None:
    """Run the stage. Raises `StageFailure` PolicyNotServed if replicas miss the deadline `student.serving.startupDeadlineSeconds`."""
    if await read_result(stage.store, stage.round, PublishResult) is not None:
        return
    started = time.monotonic()
    serving = stage.run.spec.student.served
    if serving is None:
        raise StageFailure("NothingToPublish", "a student behind an endpoint is not changed: publish has no place in such a run")
    urls = stage.environ.get("DAGGER_AGENT_URL", "")
    if not urls or not stage.policy:
        missing = "DAGGER_POLICY" if urls else "DAGGER_AGENT_URL"
        raise StageFailure("IncompleteEnvironment", f"{missing} is not set: stages are started by `daggerctl run` or the operator")
    policy = (await point_to(stage.store, stage.policy, stage.round)).policy
    deadline = serving.startup_deadline_seconds
    tell = Reporter(stage.store, stage.round, "publish", "replicas").tell
    done, found = await wait_for(urls, serving.replicas, seconds=deadline, done=lambda status: status.serves(policy), tell=tell)
    if not done:
        raise StageFailure(
            "PolicyNotServed",
            f"{policy} is not served by every replica after {deadline} s: {said(found, serving.replicas)}. Look at the logs of the "
            "student's vllm and agent containers; raise student.serving.startupDeadlineSeconds where loading only takes longer",
            permanent=False,
        )
    if len({status.weights for status in found}) > 1:
        raise StageFailure(
            "ReplicasDisagree",
            f"all replicas say that they serve {policy}, but hold different weights: {', '.join(f'{s.url} {s.weights}' for s in found)}. "
            "Delete the student's pods, so that they load it again",
            permanent=False,
        )
    result = PublishResult(policy=policy, replicas=len(found), seconds=time.monotonic() - started)
    await save_result(stage.store, stage.round, result)
    log.info("published", policy=policy, replicas=result.replicas, seconds=round(result.seconds, 3))


if __name__ == "__main__":
    sys.exit(main("publish", publish))
