"""Labels drawn at random."""

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st

from dagger_operator.training.packing import pack
from dagger_operator.training.samples import Sample
from dagger_operator.training.strand import Strand

VOCABULARY = 40


def sample(tokens: Sequence[int], prompt: int, weight: float = 1.0, trajectory: int = 0) -> Sample:
    return Sample(f"0001/{trajectory:05d}", 0, Strand(np.array(tokens, dtype=np.int32)), prompt, weight)


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """Labels that branch off a conversation, off each other, or not at all; some equal, some empty, some with states of one token."""
    token = st.integers(0, 3) if draw(st.booleans()) else st.integers(0, VOCABULARY - 1)
    made = []
    for trajectory in range(draw(st.integers(1, 3))):
        trunk = draw(st.lists(token, min_size=2, max_size=60))
        for _ in range(draw(st.integers(1, 7))):
            cut = draw(st.integers(1, len(trunk) - 1))
            label = draw(st.one_of(st.just(trunk[cut : cut + 9]), st.lists(token, max_size=9)))
            if made and draw(st.booleans()):
                stem = made[-1].tokens.tolist()  # off the label before: another level
                cut, label = len(stem), draw(st.lists(token, max_size=5))
                made.append(sample([*stem, *label], cut, trajectory=trajectory))
            else:
                made.append(sample([*trunk[:cut], *label], cut, draw(st.sampled_from([1.0, 0.25, 3.0])), trajectory))
    return made if any(len(one.targets) for one in made) else [*made, sample([1, 2], 1)]


def fixed() -> list[Sample]:
    """One draw of all kinds at once, always the same: branches of branches, every weight, an empty label, two alike."""
    quietly = settings(max_examples=10_000, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    return find(batches(), _of_all_kinds, settings=quietly, random=random.Random(4))


def _of_all_kinds(batch: Sequence[Sample]) -> bool:
    levels = any(chain.parent > 0 for tree in pack(batch, 4096) for chain in tree.chains)
    alike = len({(one.trajectory, one.tokens.tobytes()) for one in batch}) < len(batch)
    empty = any(not len(one.targets) for one in batch)
    return levels and alike and empty and len({one.weight for one in batch}) == 3 and len(batch) >= 12
