"""Which labels make which step, and which rank computes what."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import BatchUnit, Schedule, ScheduleType, Training
from dagger_operator.training.batches import Curriculum, Limits, padding, spread
from dagger_operator.training.packing import Pack
from dagger_operator.training.samples import Sample
from dagger_operator.training.schedule import learning_rate
from dagger_operator.training.strand import Strand
from dagger_operator.training.tree import Chain

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def samples_of(labels_by_trajectory: list[int]) -> list[Sample]:
    return [
        Sample(f"0001/{number:05d}", turn, Strand(np.array([1, 2], dtype=np.int32)), 1)
        for number, labels in enumerate(labels_by_trajectory)
        for turn in range(labels)
    ]


def curriculum(samples: list[Sample], unit: BatchUnit, size: int, epochs: int, seed: int = 1, steps: Schedule | None = None) -> Curriculum:
    training = Training(batch_unit=unit, batch_size=size, epochs=epochs, steps=steps)
    return Curriculum(samples, training, seed=seed, round_number=2)


@given(lengths, st.integers(1, 20), st.integers(1, 4))
def test_batches_in_labels_hold_exactly_that_many_and_every_epoch_shows_every_label_once(labels: list[int], size: int, epochs: int) -> None:
    samples = samples_of(labels)
    course = curriculum(samples, BatchUnit.LABELS, size, epochs)
    batches = [course.batch(step) for step in range(course.steps)]
    assert [len(batch) for batch in batches[:-1]] == [size] * (course.steps - 1)
    assert 0 < len(batches[-1]) <= size
    stream = [index for batch in batches for index in batch]
    for epoch in range(epochs):
        assert sorted(stream[epoch * len(samples) : (epoch + 1) * len(samples)]) == list(range(len(samples)))


@given(lengths, st.integers(1, 20), st.integers(1, 4))
def test_batches_in_trajectories_hold_whole_ones(labels: list[int], size: int, epochs: int) -> None:
    samples = samples_of(labels)
    course = curriculum(samples, BatchUnit.TRAJECTORIES, size, epochs)
    seen: Counter[str] = Counter()
    for step in range(course.steps):
        batch = course.batch(step)
        labels_of = Counter(samples[index].trajectory for index in batch)
        for name, count in labels_of.items():
            assert count % labels[int(name[-5:])] == 0
            seen[name] += count // labels[int(name[-5:])]
        if step < course.steps - 1:
            assert sum(count // labels[int(name[-5:])] for name, count in labels_of.items()) == size
    assert set(seen.values()) == {epochs}


@given(lengths, st.integers(1, 20), st.integers(0, 3))
def test_a_trajectorys_labels_stay_together_and_in_order(labels: list[int], size: int, seed: int) -> None:
    samples = samples_of(labels)
    course = curriculum(samples, BatchUnit.LABELS, size, 1, seed)
    stream = [samples[index] for step in range(course.steps) for index in course.batch(step)]
    changes = sum(a.trajectory != b.trajectory for a, b in pairwise(stream))
    assert changes == len(labels) - 1
    assert all(b.turn == a.turn + 1 for a, b in pairwise(stream) if a.trajectory == b.trajectory)


def test_order_follows_from_seed_round_and_epoch_alone() -> None:
    samples = samples_of([3] * 40)
    one, same, other = (curriculum(samples, BatchUnit.LABELS, 12, 2, seed) for seed in (1, 1, 2))
    assert [one.batch(step) for step in (7, 3, 0)] == [same.batch(step) for step in (7, 3, 0)]
    assert one.batch(0) != other.batch(0)
    assert one.batch(0) != one.batch(10), "every epoch has an order of its own"


def test_steps_of_a_schedule_replace_epochs_and_repeat_the_data() -> None:
    steps = Schedule(type=ScheduleType.LIST, values=[5, 30])
    course = curriculum(samples_of([4, 4]), BatchUnit.LABELS, 3, 1, steps=steps)
    assert course.steps == 30
    assert [len(course.batch(step)) for step in range(30)] == [3] * 30


def pack_of(length: int, targets: int) -> Pack:
    ids, few = np.zeros(length, dtype=np.int64), np.zeros(targets, dtype=np.int64)
    return Pack(ids, np.arange(length), (Chain(0, length),), few, few, np.ones(targets, dtype=np.float32), 1)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 90)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(64, 1000),
    st.sampled_from([1, 2, 16]),
    st.booleans(),
)
def test_groups_share_every_pack_once_in_the_same_number_of_passes(
    sizes: list[tuple[int, int]], groups: int, bound: int, multiple: int, few_lengths: bool
) -> None:
    packs = [pack_of(length, targets) for length, targets in sizes]
    limits = Limits(bound - bound % multiple, 50, multiple, few_lengths)
    passes = spread(packs, groups, limits)
    assert all(len(one.packs) == groups for one in passes)
    assert sorted(index for one in passes for indices in one.packs for index in indices) == list(range(len(packs)))
    loads, area = [0] * groups, 0
    for one in passes:
        for group, indices in enumerate(one.packs):
            tokens = sum(len(packs[index]) for index in indices)
            padded = tokens + limits.padding(tokens)
            assert padded % multiple == 0
            assert padded <= bound or len(indices) == 1
            assert sum(len(packs[index].targets) for index in indices) <= 50 * one.pieces
            area += padded
            loads[group] += tokens
    assert max(loads) - min(loads) <= max(length for length, _ in sizes)
    assert padding(passes, packs, limits) == area - sum(map(len, packs))


def test_rows_for_compiled_kernels_have_few_lengths_and_stay_within_the_bound() -> None:
    limits = Limits(72 * 1024, 50, 1024, few_lengths=True)
    lengths = {tokens: tokens + limits.padding(tokens) for tokens in range(1, limits.tokens + 1)}
    assert len(set(lengths.values())) <= 24
    assert all(tokens <= length <= max(1024 * -(-tokens // 1024), 1.25 * tokens, 1024) for tokens, length in lengths.items())
    assert all(length <= limits.tokens and length % 1024 == 0 for length in lengths.values())
    alone = 100 * 1024  # a sequence beyond the bound
    assert [replace(limits, longest=longest * 1024).padding(alone) for longest in (100, 104, 200)] == [0, 4 * 1024, 12 * 1024]


@pytest.mark.parametrize("name", ["Constant", "Linear", "Cosine"])
def test_learning_rate_warms_up_to_its_peak_and_ends_at_its_floor(name: str) -> None:
    training = Training(learning_rate=1e-2, learning_rate_schedule=name, warmup_steps=4, min_learning_rate_fraction=0.1)
    rates = [learning_rate(training, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert rates[4] == pytest.approx(1e-2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(1e-2 if name == "Constant" else 1e-3)
