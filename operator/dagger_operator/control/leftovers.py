"""What should be removed: servers that nothing queries, Jobs of other attempts, and Jobs of stages that were done long ago."""

from collections.abc import Sequence
from typing import Any

from dagger_operator.api import DAggerRun, GpuSharing, Keep
from dagger_operator.control.child import Child
from dagger_operator.control.gates import Failure
from dagger_operator.control.names import Ref
from dagger_operator.control.observe import Observed
from dagger_operator.control.rounds import StageName, Step, Work, before

Manifest = dict[str, Any]


def kept(run: DAggerRun, failed: Failure | None) -> Keep:
    """Return what is kept of a stopped run."""
    keep = run.spec.failure_policy.keep if failed is not None else Keep.LOGS
    if keep is Keep.EVERYTHING and run.spec.suspend:
        return Keep.LOGS  # whoever suspends wants the GPUs back, and has looked at what was kept
    if keep is Keep.NOTHING and failed is not None and failed.refused:
        return Keep.LOGS  # it counts in the full quota: without it everything would seem to fit, and the run would continue
    return keep


def leftovers(
    run: DAggerRun,
    observed: Observed,
    work: Work | None,
    objects: Sequence[Manifest],
    keep: Sequence[Child] = (),
    *,
    failed: Failure | None = None,
) -> tuple[Ref, ...]:
    """Return every child that is neither wanted nor kept."""
    wanted = {(one["kind"], one["metadata"]["name"]) for one in objects}
    nothing_stays = kept(run, failed) is Keep.NOTHING
    # A worker's pod that has yet to start cannot do so without its token, and one that ends uses it to release its sandboxes.
    workers_there = any(child.holds for child in observed.children if child.component in (StageName.ROLLOUT, StageName.EVALUATION))
    found = [
        child.ref
        for child in observed.children
        if not child.deleting
        and not any(child is one for one in keep)
        and (child.kind, child.name) not in wanted
        and child.kind != "Pod"  # its owner is gone, or not seen yet; the cluster collects it
        and not (child.kind == "ServiceAccount" and workers_there)
        and not (child.kind == "Job" and not nothing_stays and _may_stay(run, observed, work, child))
    ]
    return tuple(sorted(found))


def _may_stay(run: DAggerRun, observed: Observed, work: Work | None, job: Child) -> bool:
    """Whether the Job of a finished stage is left alone: while it winds up, and then, for its logs, until two rounds later.

    Once all rounds are done, results are not looked up for what has ended: they may be gone.
    """
    if (work is not None or job.holds) and not observed.results.has(job.round, job.component):
        return False
    if not job.holds:
        return job.round >= (work.step.round if work else run.spec.rounds) - 1
    holds_gpus_back = run.spec.gpu_sharing is GpuSharing.TIME_SHARED and job.component == StageName.TRAINING
    return Step(job.round, StageName(job.component)) in before(run.spec, work) and not holds_gpus_back
