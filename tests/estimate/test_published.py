"""The formulas say what others measured, within a stated tolerance."""

import subprocess
import sys
from pathlib import Path

import pytest

from dagger_operator.estimate import GIB, GPUS, KNOWN
from dagger_operator.estimate.memory import activations, in_a_layer, logits
from dagger_operator.estimate.published import PRIME_RL, Benchmark

ROOT = Path(__file__).resolve().parents[2]
HEADLINE = PRIME_RL[0]


def _named(one: Benchmark) -> str:
    return str(one)


@pytest.mark.parametrize("one", [one for one in PRIME_RL if one.gpu != "A6000"], ids=_named)
def test_throughput_at_the_published_mfu_within_a_hundredth(one: Benchmark) -> None:
    assert one.throughput_at_its_mfu == pytest.approx(one.throughput, rel=0.01)


@pytest.mark.parametrize("one", PRIME_RL, ids=_named)
def test_peak_memory_within_an_eighth(one: Benchmark) -> None:
    assert one.peak_by_formula == pytest.approx(one.peak, rel=0.125)


def test_peak_memory_of_the_4b_at_16k_on_eight_h100() -> None:
    assert HEADLINE.peak == 54.63
    assert HEADLINE.peak_by_formula == pytest.approx(HEADLINE.peak, rel=0.05)


def test_bytes_of_a_token_under_recomputation_are_the_slope_between_two_lengths() -> None:
    """RL with a chunked head at 16K and 65K: what differs is layers' inputs and one layer at work."""
    for model, low, high in (("Qwen/Qwen3-4B-Instruct-2507", 17.10, 36.10), ("Qwen/Qwen3-0.6B", 12.53, 19.56)):
        shape = KNOWN[model]
        ours = activations(shape, 2, checkpointing=True) + in_a_layer(shape, 2)
        assert ours == pytest.approx((high - low) * GIB / (65536 - 16384), rel=0.03)


def test_what_ran_out_of_memory_does_not_fit() -> None:
    """Prime-rl's Qwen3-0.6B SFT at 65K on an H100 asked for 37.09 GiB at once, a copy of the logits in FP32, and failed."""
    shape = KNOWN["Qwen/Qwen3-0.6B"]
    assert logits(shape, 65536, copies=1) / GIB == pytest.approx(37.09, abs=0.01)
    assert Benchmark(1, "H100-80GB", "Qwen3-0.6B", "SFT", 65536, 0, 0, 0).peak_by_formula > GPUS["H100-80GB"].memory / GIB


def test_the_default_utilisation_says_what_sft_at_16k_reached_on_h100_and_h200() -> None:
    alike = [one for one in PRIME_RL if one.kind == "SFT" and one.tokens == 16384 and one.gpu in ("H100-80GB", "H200")]
    assert len(alike) == 3
    for one in alike:
        assert one.throughput_by_default == pytest.approx(one.throughput, rel=0.1)


def test_the_page_shows_the_table_that_its_command_prints() -> None:
    printed = subprocess.run([sys.executable, "-m", "dagger_operator.estimate"], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip() in (ROOT / "docs/estimate.md").read_text()
