"""`daggerctl compare`: two students on the same held-out tasks."""

import asyncio
import sys

from dagger_operator.cli.exits import Exit
from dagger_operator.cli.report import level
from dagger_operator.cli.storing import stored_run
from dagger_operator.store.results import EvaluationResult, read_result


def compare_rounds(run: str, first: int, other: str | None, second: int) -> int:
    """Print the difference of the resolved rates, first minus second, and its uncertainty. `other`: run of the second, if another."""
    from dagger_operator.evaluation.statistics import compare

    ours, store = stored_run(run)
    theirs, their_store = stored_run(other) if other else (ours, store)
    results = []
    for one, its_store, number in ((ours, store, first), (theirs, their_store, second)):
        result = asyncio.run(read_result(its_store, number, EvaluationResult))
        if result is None:
            print(f"error: round {number} of run {one.metadata.name!r} has no evaluation; its status shows which have", file=sys.stderr)
            return Exit.BAD_INPUT
        results.append(result)
    confidence = ours.spec.evaluation.confidence
    candidate, reference = results
    try:
        outcome = compare(candidate, reference, confidence=confidence)
    except ValueError:
        both = f"round {first} of run {ours.metadata.name!r} and round {second} of run {theirs.metadata.name!r}"
        print(f"error: {both} have no graded task in common: compare evaluations of the same tasks.heldOut", file=sys.stderr)
        return Exit.BAD_INPUT
    ends = " to ".join(f"{100 * bound:+.1f}" for bound in outcome.interval)
    difference = f"{100 * outcome.difference:+.1f} points, {level(confidence)} interval {ends} (paired bootstrap)"
    print(f"{ours.metadata.name} round {first}: {outcome.candidate_rate:.1%} resolved")
    print(f"{theirs.metadata.name} round {second}: {outcome.reference_rate:.1%} resolved")
    print(f"difference on {outcome.tasks} common tasks: {difference}")
    print(f"resolved by the first alone: {outcome.only_candidate}, by the second alone: {outcome.only_reference}")
    print(f"p = {outcome.p_value:.2g} (McNemar's exact test)")
    return Exit.OK
