"""Training that comes apart ends, and says what it was learning."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.store.stage import StageFailure
from dagger_operator.training.guards import refuse_broken, refuse_skipped
from dagger_operator.training.samples import Sample
from dagger_operator.training.strand import Strand

TOKENS = Strand(np.array([1, 2], dtype=np.int32))
BATCH = [Sample(f"0002/{number:05d}", turn, TOKENS, 1, shard=f"shard-{number // 2}") for number in range(3) for turn in range(2)]
SOURCE = "rollouts 0002/00000, 0002/00001, 0002/00002 .*, in shards shard-0, shard-1"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused_at_any_step(loss: float) -> None:
    with pytest.raises(StageFailure, match=f"LossNotFinite: the loss of step 3 .*{SOURCE}"):
        refuse_broken(loss, [1.0, 0.9], BATCH)


def test_a_gradient_that_is_no_number_is_refused_at_any_step() -> None:
    refuse_skipped(True, [1.0, 0.9], BATCH)
    with pytest.raises(StageFailure, match=f"GradientNotFinite: the gradient of step 3 .*{SOURCE}"):
        refuse_skipped(False, [1.0, 0.9], BATCH)


def test_five_steps_in_a_row_far_above_all_before_are_refused_and_fewer_are_not() -> None:
    usual = [1.0] * 32
    for spikes in range(4):
        refuse_broken(11.0, [*usual, *[12.0] * spikes], BATCH)
    refuse_broken(11.0, [*usual, 12.0, 1.0, 12.0, 12.0], BATCH)
    refuse_broken(11.0, [*usual[1:], *[12.0] * 4], BATCH)
    with pytest.raises(StageFailure, match="LossSpike: the loss of steps 33 to 37 is 11 or more, of the 32 steps before them it was 1:"):
        refuse_broken(11.0, [*usual, *[12.0] * 4], BATCH)


@given(st.lists(st.floats(0.01, 5), min_size=40, max_size=60), st.floats(0.01, 5))
def test_no_loss_that_the_round_has_seen_before_is_a_spike(before: list[float], loss: float) -> None:
    refuse_broken(min(loss, max(before[:-4])), before, BATCH)
