"""Memory of a GPU: by part, and never more of it for more GPUs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api.training import TARGETS_AT_ONCE
from dagger_operator.estimate import GIB, GPUS, KNOWN, Shape
from dagger_operator.estimate.flops import training
from dagger_operator.estimate.memory import Setup, training_memory
from dagger_operator.estimate.workload import Tokens

FOUR = KNOWN["Qwen/Qwen3-4B-Instruct-2507"]
EIGHT_GPUS = Setup(stage=3, ranks=8, offload=False, bf16=True, checkpointing=True, tokens=65536)

setups = st.builds(
    Setup,
    stage=st.integers(0, 3),
    ranks=st.sampled_from([1, 2, 4, 8, 16, 64]),
    offload=st.booleans(),
    bf16=st.booleans(),
    checkpointing=st.booleans(),
    tokens=st.integers(64, 200_000),
).map(lambda setup: replace(setup, offload=setup.offload and setup.stage > 0))
shapes = st.sampled_from(list(KNOWN.values()))


def test_states_are_shared_out_as_zero_says() -> None:
    """Bytes of each parameter on one of 8 ranks: weights 2, gradients 4, optimiser 12, and from which stage on they are shared out."""
    for stage, weights, gradients, optimiser in ((1, 2, 4, 12 / 8), (2, 2, 4 / 8, 12 / 8), (3, 2 / 8, 4 / 8, 12 / 8)):
        memory = training_memory(FOUR, replace(EIGHT_GPUS, stage=stage))
        found = (memory.weights, memory.gradients, memory.optimiser)
        assert found == pytest.approx(tuple(FOUR.parameters * each for each in (weights, gradients, optimiser)))


def test_the_page_says_what_recomputing_saves_of_the_8b_and_costs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/tuning.md").read_text()
    pattern = (
        r"a third more .*; of Qwen3-8B a pass of ([\d,]+) tokens keeps ([\d.]+) GiB of activations instead of ([\d.]+), and has ([\d.]+) of"
    )
    ((tokens, recomputed, kept, layer),) = re.findall(pattern, page)
    eight, setup = KNOWN["Qwen/Qwen3-8B"], replace(EIGHT_GPUS, tokens=int(tokens.replace(",", "")))
    less, all_of_it = (training_memory(eight, replace(setup, checkpointing=checkpointing)) for checkpointing in (True, False))
    told = [less.activations, all_of_it.activations, less.layer]
    assert [f"{size / GIB:.1f}" for size in told] == [recomputed, kept, layer]
    work = Tokens(tokens=1, pairs=1, targets=1)
    assert training(eight, work, checkpointing=True) == pytest.approx(4 / 3 * training(eight, work, checkpointing=False))


def test_without_zero_all_is_in_fp32() -> None:
    memory = training_memory(FOUR, replace(EIGHT_GPUS, stage=0))
    assert (memory.weights + memory.gradients + memory.optimiser) / FOUR.parameters == pytest.approx(16)


def test_of_adapters_alone_there_are_gradients_and_an_optimiser() -> None:
    adapters = FOUR.adapters(16)
    assert adapters == pytest.approx(33.0e6, rel=0.01), "what peft makes of Qwen3-4B with rank 16 on all linear layers"
    for stage in (1, 2, 3):
        setup = replace(EIGHT_GPUS, stage=stage, adapter_rank=16)
        memory, whole = training_memory(FOUR, setup), training_memory(FOUR, replace(setup, adapter_rank=0))
        assert memory.optimiser == pytest.approx(12 * adapters / 8)
        assert memory.gradients == pytest.approx(4 * adapters / (8 if stage > 1 else 1))
        assert memory.weights == pytest.approx(whole.weights, rel=0.01)
        assert (memory.activations, memory.logits) == (whole.activations, whole.logits)


def test_an_offloaded_optimiser_is_in_host_memory_and_gradients_where_deepspeed_moves_them() -> None:
    for stage, bf16, left in [(3, True, 0), (3, False, 0), (2, False, 0), (2, True, 4 / 8), (1, True, 4)]:
        memory = training_memory(FOUR, replace(EIGHT_GPUS, stage=stage, bf16=bf16, offload=True))
        assert (memory.optimiser, memory.gradients) == (0, pytest.approx(left * FOUR.parameters))
        assert memory.host == pytest.approx(16 * FOUR.parameters / 8)


def test_logits_are_bounded_by_the_rows_that_exist_at_once() -> None:
    long = training_memory(KNOWN["Qwen/Qwen3-0.6B"], replace(EIGHT_GPUS, tokens=8192))
    assert long.logits == 12 * TARGETS_AT_ONCE * FOUR.vocabulary


def test_the_papers_4b_fits_eight_h100_as_its_sample_is_written_and_not_without_recomputing() -> None:
    room = GPUS["H100-80GB"].memory / GIB
    assert training_memory(FOUR, EIGHT_GPUS).total / GIB < room
    assert training_memory(FOUR, replace(EIGHT_GPUS, checkpointing=False)).total / GIB > room


@given(shapes, setups, st.sampled_from([2, 4]))
def test_more_gpus_never_need_more_memory_of_each(shape: Shape, setup: Setup, times: int) -> None:
    if setup.offload and setup.ranks == 1:
        return  # one rank alone gathers nothing: the second one adds what ZeRO-3 gathers, and takes nothing off the GPU in return
    more = training_memory(shape, replace(setup, ranks=setup.ranks * times))
    assert more.total <= training_memory(shape, setup).total * (1 + 1e-9)


@given(shapes, setups)
def test_recomputing_and_offloading_never_need_more(shape: Shape, setup: Setup) -> None:
    now = training_memory(shape, setup).total
    assert training_memory(shape, replace(setup, checkpointing=True)).total <= now * (1 + 1e-9)
    if setup.stage > 0:
        assert training_memory(shape, replace(setup, offload=True)).total <= now * (1 + 1e-9)


@given(shapes, setups, st.integers(1, 100_000))
def test_fewer_tokens_of_a_pass_never_need_more(shape: Shape, setup: Setup, tokens: int) -> None:
    fewer = training_memory(shape, replace(setup, tokens=min(setup.tokens, tokens)))
    assert fewer.total <= training_memory(shape, setup).total
