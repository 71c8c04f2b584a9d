"""The estimate of a run follows its resource: every sample, every setting that changes what is paid."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from dagger_operator.api import InvalidRun, RunSpec, load
from dagger_operator.api.context import longest_context
from dagger_operator.control.progress import gpu_hours
from dagger_operator.control.results import Results
from dagger_operator.control.rounds import StageName, Step
from dagger_operator.estimate import GIB, GPUS, KNOWN, Assumptions, Estimate, Shape, as_data, estimate
from dagger_operator.estimate.time import Pace, side_by_side
from dagger_operator.store.results import StageProgress

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = sorted((ROOT / "manifests/samples").rglob("*.yaml"))
H100 = GPUS["H100-80GB"]
TINY = Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocabulary=512)


def _runs(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one and one["kind"] == "DAggerRun"]


PAPER = _runs(ROOT / "manifests/samples/paper-qwen3-4b-dagger.yaml")[0]


def _spec(changes: dict[str, Any] | None = None, document: dict[str, Any] = PAPER) -> RunSpec:
    """The paper's run, with fields by their path changed."""
    changed = json.loads(json.dumps(document))
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = changed["spec"]
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return load(changed).spec


def _estimate(spec: RunSpec, gpu: str = "H100-80GB", **assumed: Any) -> Estimate:
    student, teacher = KNOWN.get(spec.student.model, TINY), KNOWN.get(spec.teacher.model)
    return estimate(spec, GPUS[gpu], student, teacher, Assumptions.of(spec, **assumed))


@pytest.mark.parametrize("document", [run for path in SAMPLES for run in _runs(path)], ids=lambda run: run["metadata"]["name"])
def test_every_sample_can_be_estimated_and_fits_80_gb(document: dict[str, Any]) -> None:
    spec = _spec(document=document)
    found = _estimate(spec)
    assert found.fits, [str(finding) for finding in found.findings]
    assert len(found.rounds) == spec.rounds
    assert (found.hours is None) == (spec.training.gpus_per_node == 0)
    json.dumps(as_data(found))


def test_the_papers_run_counts_as_the_paper_does() -> None:
    """512 tasks in a round, 16 trajectories in a step, three epochs; with 100 turns 51,200 teacher calls in a round."""
    found = _estimate(_spec(), turns=100, turn_tokens=200)
    assert [(one.rollouts, one.labels, one.steps) for one in found.rounds] == [(512, 51_200, 96)] * 5
    assert [one.teacher_share for one in found.rounds] == [1.0, 0.8, 0.6, 0.6, 0.6]
    assert [round(one.student_calls) for one in found.rounds] == [0, 10_240, 20_480, 20_480, 20_480]


def test_aggregation_trains_on_all_rounds_so_far() -> None:
    current, every = (_estimate(_spec({"training.aggregation": how})) for how in ("CurrentRoundOnly", "AllRoundsFromBase"))
    assert [one.steps for one in current.rounds] == [96] * 5
    assert [one.steps for one in every.rounds] == [96, 192, 288, 384, 480]
    assert every.rounds[4].trees.tokens == pytest.approx(sum(one.trees.tokens for one in current.rounds))


def test_steps_take_the_place_of_epochs() -> None:
    found = _estimate(_spec({"training.steps": {"type": "List", "values": [32, 64]}}))
    assert [one.steps for one in found.rounds] == [32, 64, 64, 64, 64]
    assert found.rounds[0].trees.tokens == pytest.approx(_estimate(_spec()).rounds[0].trees.tokens / 3)


def test_nothing_is_trained_where_training_is_disabled() -> None:
    found = _estimate(_spec({"training.mode": "Disabled"}))
    assert found.training is None and found.rounds[0].steps == 0
    assert found.rounds[0].training_seconds == found.rounds[0].evaluation_seconds == 0
    assert (found.initial_evaluation_seconds or 0) > 0, "there is a student to measure all the same"


def test_the_initial_students_evaluation_costs_what_another_does_unless_it_goes_beside_rollouts_of_the_teacher_alone() -> None:
    def both(overlap: str) -> tuple[Estimate, Estimate]:
        without, with_it = (_estimate(_spec({"evaluation.overlap": overlap, "evaluation.initial": initial})) for initial in (False, True))
        assert without.initial_evaluation_seconds == 0
        return without, with_it

    without, apart = both("None")
    seconds = apart.initial_evaluation_seconds or 0
    assert seconds == apart.rounds[0].evaluation_seconds
    assert (apart.hours or 0) - (without.hours or 0) == pytest.approx(seconds / 3600)
    assert (apart.gpu_hours or 0) - (without.gpu_hours or 0) == pytest.approx(8 * seconds / 3600)
    without, beside = both("NextRound")
    assert beside.initial_evaluation_seconds == seconds < (beside.rounds[0].rollout_seconds or 0)
    assert (beside.hours, beside.gpu_hours) == (without.hours, without.gpu_hours)


def test_time_shared_gpus_are_fewer_and_cost_less() -> None:
    shared, dedicated = (_estimate(_spec({"gpuSharing": how})) for how in ("TimeShared", "Dedicated"))
    assert (shared.gpus, dedicated.gpus) == (8, 16)
    assert shared.gpu_hours is not None and dedicated.gpu_hours is not None and shared.gpu_hours < dedicated.gpu_hours


@pytest.mark.parametrize("overlap", ["NextRound", "None"])
@pytest.mark.parametrize("sharing", ["TimeShared", "Dedicated"])
def test_gpu_hours_are_counted_as_the_status_counts_them(sharing: str, overlap: str) -> None:
    spec = _spec({"gpuSharing": sharing, "evaluation.overlap": overlap})
    found = _estimate(spec, change_seconds=0)
    first = StageProgress(done=1, total=1, unit="", seconds=found.initial_evaluation_seconds or 0.0)
    worked: dict[Step, dict[int, StageProgress]] = {Step(0, StageName.EVALUATION): {0: first}}
    for one in found.rounds:
        stages = {
            StageName.ROLLOUT: one.rollout_seconds,
            StageName.TRAINING: one.training_seconds,
            StageName.EVALUATION: one.evaluation_seconds,
        }
        for stage, seconds in stages.items():
            worked[Step(one.round, stage)] = {0: StageProgress(done=1, total=1, unit="", seconds=seconds or 0.0)}
    assert found.gpu_hours == pytest.approx(gpu_hours(load({**PAPER, "spec": spec.wire()}), worked, Results()))


@pytest.mark.parametrize("overlap", ["NextRound", "None"])
@pytest.mark.parametrize("sharing", ["TimeShared", "Dedicated"])
def test_gpu_hours_of_stages_add_up_to_those_of_the_run(sharing: str, overlap: str) -> None:
    found = _estimate(_spec({"gpuSharing": sharing, "evaluation.overlap": overlap}), change_seconds=0)
    stages = [(one.rollout_gpu_hours, one.training_gpu_hours, one.evaluation_gpu_hours) for one in found.rounds]
    of_rounds = sum(hours or 0 for of_a_round in stages for hours in of_a_round)
    assert of_rounds + (found.initial_evaluation_gpu_hours or 0) == pytest.approx(found.gpu_hours)
    first = found.rounds[0]
    assert first.rollout_seconds and first.rollout_gpu_hours == pytest.approx(8 * first.rollout_seconds / 3600)
    assert first.training_seconds and first.training_gpu_hours == pytest.approx(
        (8 if sharing == "TimeShared" else 16) * first.training_seconds / 3600
    )


def test_gpu_hours_are_of_no_stage_where_one_works_on_the_cpu() -> None:
    on_the_cpu = {"training.gpusPerNode": 0, "gpuSharing": "Dedicated"}
    assert {one.rollout_gpu_hours for one in _estimate(_spec(on_the_cpu)).rounds} == {None}


def test_an_evaluation_beside_rollouts_slows_both_and_is_not_free() -> None:
    apart, beside = (_estimate(_spec({"evaluation.overlap": overlap})) for overlap in ("None", "NextRound"))
    for number in range(4):
        assert (beside.rounds[number].evaluation_seconds or 0) > 1.3 * (apart.rounds[number].evaluation_seconds or 0)
        assert (beside.rounds[number + 1].rollout_seconds or 0) > 1.2 * (apart.rounds[number + 1].rollout_seconds or 0)
    for stage in ("rollout_seconds", "evaluation_seconds"):
        alone = 0 if stage == "rollout_seconds" else 4
        assert getattr(beside.rounds[alone], stage) == getattr(apart.rounds[alone], stage), "nothing goes beside it"


def test_what_goes_side_by_side_takes_no_longer_than_one_after_the_other_where_every_prefix_is_held() -> None:
    apart, beside = (_estimate(_spec({"evaluation.overlap": overlap, "rollouts.concurrency": 3})) for overlap in ("None", "NextRound"))
    assert (beside.hours or 0) < (apart.hours or 0)


def test_a_rollout_that_asks_no_student_is_not_slowed_by_an_evaluation() -> None:
    teachers = {"mixing.beta": {"type": "Constant", "value": 1.0}}
    apart, beside = (_estimate(_spec({**teachers, "evaluation.overlap": overlap})) for overlap in ("None", "NextRound"))
    assert [one.rollout_seconds for one in beside.rounds] == [one.rollout_seconds for one in apart.rounds]
    assert [one.evaluation_seconds for one in beside.rounds] == [one.evaluation_seconds for one in apart.rounds]


@given(st.floats(1, 1e5), st.floats(1, 1e5), st.floats(1, 10), st.floats(1, 10))
def test_two_stages_that_slow_each_other_end_between_alone_and_all_slowed(one: float, other: float, slower: float, also: float) -> None:
    took = side_by_side(Pace(one, one * slower), Pace(other, other * also))
    for seconds, pace in zip(took, (Pace(one, one * slower), Pace(other, other * also)), strict=True):
        assert pace.alone * (1 - 1e-9) <= seconds <= pace.beside * (1 + 1e-9)
    assert took == side_by_side(Pace(other, other * also), Pace(one, one * slower))[::-1]


@pytest.mark.parametrize(
    ("changes", "in_flight"),
    [
        ({}, 96),
        ({"evaluation.overlap": "None"}, None),
        ({"rounds": 1}, None),
        ({"evaluation.mode": "LastRound"}, None),
        ({"training.mode": "Disabled"}, None),
        ({"mixing.beta": {"type": "Constant", "value": 1.0}}, None),
        ({"tasks.heldOut.count": 20}, 68),
    ],
)
def test_conversations_of_an_evaluation_beside_rollouts_count_among_those_in_flight(changes: dict[str, Any], in_flight: int | None) -> None:
    """The student's servers hold 48 prefixes, and 48 rollouts are in flight in each stage."""
    spec = {"evaluation.overlap": "NextRound", **changes}
    told = [finding for finding in _estimate(_spec(spec)).findings if finding.field == "rollouts.concurrency"]
    assert [finding.why.split()[0] for finding in told] == ([] if in_flight is None else [str(in_flight)])
    if told:
        assert "evaluation.overlap: None" in told[0].remedy
        value = int(told[0].remedy.split()[1].rstrip(","))
        for remedy in ({"rollouts.concurrency": value}, {"evaluation.overlap": "None"}):
            mended = _estimate(_spec({**spec, **remedy}))
            assert not any(finding.field == "rollouts.concurrency" for finding in mended.findings)


def test_the_page_says_what_the_estimate_says_of_an_evaluation_beside_rollouts() -> None:
    page = (ROOT / "docs/estimate.md").read_text()
    sample = (ROOT / "manifests/samples/paper-qwen3-4b-dagger.yaml").read_text()
    rows = re.findall(r"^\|(?: (`'s/.*'`))? \| .+? \| ([\d.]+) \| (\d+) \| ([\d.]+) h \|$", page, re.M)
    assert len(rows) == 3
    for edits, *told in rows:
        text = sample
        for old, new in re.findall(r"'s/(.+?)/(.+?)/'", edits):
            assert text.count(old) == 1
            text = text.replace(old, new)
        found = _estimate(_spec(document=yaml.safe_load(text)))
        assert [f"{found.hours:.1f}", f"{found.gpu_hours:.0f}", f"{(found.rounds[1].evaluation_seconds or 0) / 3600:.2f}"] == told


def test_rollouts_that_the_kv_cache_holds_are_quicker_than_eight_times_as_many() -> None:
    crowded = _estimate(_spec({"rollouts.concurrency": 64}))
    advice = next(finding for finding in crowded.findings if finding.field == "rollouts.concurrency")
    held = _estimate(_spec({"rollouts.concurrency": int(advice.remedy.split()[1].rstrip(","))}))
    assert not advice.fatal and not any(finding.field == "rollouts.concurrency" for finding in held.findings)
    assert (held.rounds[2].rollout_seconds or 0) < (crowded.rounds[2].rollout_seconds or 0)


def test_waiting_for_each_label_is_never_quicker() -> None:
    seconds = {mode: _estimate(_spec({"labels.mode": mode})).rounds[2].rollout_seconds or 0 for mode in ("Inline", "Async")}
    assert seconds["Async"] <= seconds["Inline"]


def test_what_does_not_fit_names_the_field_and_the_value_and_then_fits() -> None:
    big = {"training.deepspeed.zeroStage": 1, "training.activationCheckpointing": False}
    found = _estimate(_spec(big))
    assert not found.fits
    remedy = found.findings[0].remedy
    assert "training.activationCheckpointing: true" in remedy
    written = dict(part.split(": ") for part in remedy.removeprefix("write ").split(", "))
    mended = {field: yaml.safe_load(value) for field, value in written.items()}
    assert _estimate(_spec({**big, **mended})).fits


def test_weights_have_to_fit_one_gpu_for_once_on_however_many() -> None:
    """DeepSpeed shards them there."""
    large = {"student.model": "Qwen/Qwen3-Coder-30B-A3B-Instruct", "training.deepspeed.zeroStage": 3, "training.nodes": 32}
    small, enough = (_estimate(_spec(large), gpu).findings for gpu in ("A100-40GB", "H200"))
    (finding,) = (one for one in small if one.field == "training")
    assert finding.fatal and "58.1 GiB of a GPU's" in finding.value and "before the first step" in finding.value
    assert not [one for one in enough if one.field == "training" and "before the first step" in one.value]
    (in_fp32,) = (one for one in _estimate(_spec({**large, "training.precision": "FP32"})).findings if one.field == "training")
    assert in_fp32.remedy == "write training.precision: BF16"
    (without_zero,) = (one for one in _estimate(_spec({**large, "training.deepspeed.zeroStage": 0})).findings if one.field == "training")
    assert "training.deepspeed.zeroStage" in without_zero.remedy


def test_a_teacher_that_does_not_fit_one_gpu_is_given_two() -> None:
    found = _estimate(_spec({"teacher.serving.gpus": 1}), gpu="L40S")
    assert any("teacher.serving.gpus: 2" in finding.remedy for finding in found.findings if finding.fatal)


def test_the_share_of_memory_that_vllm_is_given_sets_the_room_for_kv_cache() -> None:
    default, more = (_estimate(_spec({"student.serving.extraArgs": args})).student for args in ([], ["--gpu-memory-utilization=0.95"]))
    assert default is not None and more is not None
    assert more.kv_memory - default.kv_memory == pytest.approx(0.05 * H100.memory)
    for wrong in ("most", "nan", "90"):
        with pytest.raises(InvalidRun, match=rf"serving.extraArgs: got '{wrong}'"):
            _estimate(_spec({"student.serving.extraArgs": ["--gpu-memory-utilization", wrong]}))


def test_a_context_beyond_the_models_own_is_refused_as_vllm_does() -> None:
    found = _estimate(_spec({"student.model": "Qwen/Qwen3-8B"}))
    finding = next(finding for finding in found.findings if finding.field == "student.serving.maxModelLen")
    assert finding.fatal and "40960" in finding.remedy


OVERRIDDEN = ["--hf-overrides", json.dumps({"max_position_embeddings": 131072})]


def test_overrides_lengthen_a_teacher_and_no_student_as_prepare_has_it() -> None:
    eight = {f"{role}.model": "Qwen/Qwen3-8B" for role in ("student", "teacher")}
    overridden = {f"{role}.serving.extraArgs": OVERRIDDEN for role in ("student", "teacher")}
    found = {finding.field: finding for finding in _estimate(_spec({**eight, **overridden})).findings if finding.fatal}
    assert "--hf-overrides reach servers and not training" in found["student.serving.maxModelLen"].remedy
    assert "teacher.serving.maxModelLen" not in found


@pytest.mark.parametrize("name", ["paper-qwen3-8b-dagger", "paper-qwen3-8b-aggrevate", "sft-baseline-8b"])
def test_an_8b_sample_names_what_goes_with_the_longer_context_that_the_page_shows(name: str) -> None:
    path, page = ROOT / f"manifests/samples/{name}.yaml", (ROOT / "docs/training.md").read_text()
    (longer,) = re.findall(r'^    ("max_position_embeddings": .*\n    "rope_scaling": .*)$', page, re.M)
    comment = re.sub(r"\n *# ", " ", path.read_text())
    length, sequence, tree, at_once = re.findall(
        r"The paper's (\d+) takes .* maxSequenceTokens (\d+), microBatchTokens (\d+) and rollouts.concurrency (\d+):", comment
    )[0]
    changes = {"training.maxSequenceTokens": sequence, "training.microBatchTokens": tree, "rollouts.concurrency": at_once}
    changes = {field: int(value) for field, value in {**changes, "student.serving.maxModelLen": length}.items()}
    spec = _spec(changes, _runs(path)[0])
    eight = replace(KNOWN["Qwen/Qwen3-8B"], positions=longest_context(json.loads(f"{{{longer}}}")))
    found = estimate(spec, H100, eight, KNOWN[spec.teacher.model], Assumptions.of(spec))
    assert found.assumed.end_tokens == 65536 and not found.findings, [str(finding) for finding in found.findings]


def test_a_tree_that_is_parted_is_pointed_out_with_the_value_that_keeps_it_whole() -> None:
    parted = _estimate(_spec({"training.microBatchTokens": 49152}))
    finding = next(finding for finding in parted.findings if finding.field == "training.microBatchTokens")
    assert not finding.fatal
    whole = int(finding.remedy.split()[1].rstrip(","))
    kept = _estimate(_spec({"training.microBatchTokens": whole}))
    assert kept.training is not None and f"takes {kept.training.total / GIB:.1f} GiB" in finding.remedy
    assert kept.rounds[4].trees.tokens < parted.rounds[4].trees.tokens / 1.25


@pytest.mark.parametrize("document", [run for path in SAMPLES for run in _runs(path)], ids=lambda run: run["metadata"]["name"])
def test_no_sample_parts_a_tree_or_crowds_the_kv_cache(document: dict[str, Any]) -> None:
    told = {finding.field for finding in _estimate(_spec(document=document)).findings}
    assert not told & {"training.microBatchTokens", "rollouts.concurrency"}


@pytest.mark.parametrize(
    ("assumed", "option"),
    [({"turns": 0}, "--turns"), ({"utilisation": 1.5}, "--utilisation"), ({"command_seconds": -1}, "--command-seconds")],
)
def test_assumptions_that_make_no_sense_are_refused_by_name(assumed: dict[str, float], option: str) -> None:
    with pytest.raises(InvalidRun, match=option):
        Assumptions.of(_spec(), **assumed)


@pytest.mark.parametrize(
    ("changes", "assumed", "said"),
    [
        ({"scaffold.maxTurns": 20}, {"turns": 21}, "--turns: got 21: scaffold.maxTurns is 20: write at most that, or raise it in the run"),
        ({"teacher.serving.maxModelLen": 30_000}, {"end_tokens": 30_001}, "--end-tokens: got 30001: teacher.serving.maxModelLen is 30000"),
        ({"teacher.sampling.maxTokens": 5000}, {"turn_tokens": 5001}, "--turn-tokens: got 5001: teacher.sampling.maxTokens is 5000"),
        ({"tasks.heldOut.count": 30}, {"held_out": 31}, "--held-out: got 31: tasks.heldOut.count is 30"),
    ],
)
def test_an_assumption_that_the_run_forbids_is_refused_and_the_most_that_it_allows_is_taken(
    changes: dict[str, Any], assumed: dict[str, int], said: str
) -> None:
    spec = _spec({"student.sampling.maxTokens": 400, **changes})
    with pytest.raises(InvalidRun) as refused:
        Assumptions.of(spec, **assumed)
    assert str(refused.value.problems[0]).startswith(said)
    ((name, value),) = assumed.items()
    fewer_turns = {"turns": 2} if name == "turn_tokens" else {}
    assert getattr(Assumptions.of(spec, **{name: value - 1}, **fewer_turns), name) == value - 1


def test_turns_that_do_not_fit_into_a_rollout_are_refused() -> None:
    with pytest.raises(InvalidRun, match="--end-tokens: got 8000: 100 turns of 300 tokens after 500 end at 30500"):
        Assumptions.of(_spec(), turns=100, first_tokens=500, end_tokens=8000, turn_tokens=300)


FOR_BOTH = {"student.serving.maxModelLen": 40960, "training.maxSequenceTokens": 40960}


def test_a_hybrid_student_trains_as_many_tokens_where_the_teacher_acts() -> None:
    plain, hybrid = (_estimate(_spec({"student.model": model, **FOR_BOTH})) for model in ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-8B"))
    assert plain.rounds[0].trees.tokens < plain.rounds[4].trees.tokens
    assert hybrid.rounds[0].trees.tokens == hybrid.rounds[4].trees.tokens > plain.rounds[4].trees.tokens


def test_ranks_without_a_tree_are_pointed_out() -> None:
    """16 labels are a part of one trajectory: one tree, and seven of eight ranks have nothing to do."""
    few = _estimate(_spec({"training.batchUnit": "Labels"}))
    finding = next(finding for finding in few.findings if finding.field == "training.batchSize")
    assert not finding.fatal and "1 trees for 8 ranks" in finding.why
    assert (few.rounds[0].training_seconds or 0) > 4 * (_estimate(_spec()).rounds[0].training_seconds or 0)
    assert not any(finding.field == "training.batchSize" for finding in _estimate(_spec()).findings)


@example_settings(max_examples=15)
@given(st.sampled_from([1, 2, 4]), st.integers(2, 100), st.sampled_from(["Trajectories", "Labels"]))
def test_more_nodes_never_train_slower(nodes: int, turns: int, unit: str) -> None:
    few, many = (_estimate(_spec({"training.nodes": n, "training.batchUnit": unit}), turns=turns) for n in (nodes, 2 * nodes))
    for one, other in zip(few.rounds, many.rounds, strict=True):
        assert (other.training_seconds or 0) <= (one.training_seconds or 0) * (1 + 1e-9)


@example_settings(max_examples=15)
@given(st.integers(5, 100), st.floats(0, 1))
def test_trees_never_train_longer_than_one_sequence_for_each_label(turns: int, beta: float) -> None:
    found = _estimate(_spec({"mixing.beta": {"type": "Constant", "value": beta}}), turns=turns)
    assert (found.rounds[0].training_seconds or 0) <= (found.rounds[0].training_seconds_per_label or 0)
