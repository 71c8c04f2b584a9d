"""A tiny Qwen3 with a tokenizer of its own, made on the fly, and trajectories for it to learn from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Role
from dagger_operator.store.records import Completion, LabelFlaw, Message, Outcome, Trajectory, Turn
from dagger_operator.store.stage import ExitCode
from dagger_operator.training.samples import Sample, tokenise
from dagger_operator.training.template import StudentTemplate
from training.drawn import fixed
from training.stage import Setting

TEMPLATES = Path(__file__).parent / "templates"


@cache
def make_tokenizer(template: str = "qwen3_instruct") -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [
        "python test.py",
        "FAIL scale_tax(19, 7) got 26 want 133",
        'grep -n "def scale_tax" *.py',
        "sed -i '3s/+/*/' geo.py",
        "submit",
    ]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(corpus * 4, trainer)
    bpe.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>", "<tool_call>", "</tool_call>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def make_policy(folder: Path) -> Path:
    """A Hugging Face folder of a Qwen3 with two layers and 0.1 million parameters."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy = Qwen3ForCausalLM(config)
    policy.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_with() -> Callable[[str], Any]:
    """The tiny tokenizer with one of the templates beside this file."""
    return make_tokenizer


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy") / "tiny")


def dialogue(rollout: int, turns: int) -> Trajectory:
    """A trajectory in which the teacher acts in two turns of three."""

    def teacher(turn: int) -> bool:
        return turn % 3 != 1

    made: list[Turn] = []
    state: tuple[Message, ...] = ()
    news: tuple[Message, ...] = ({"role": "system", "content": "Repair the bug."}, {"role": "user", "content": f"Bug {rollout}: fix it."})
    for index in range(turns):
        kept, state = len(state), state + news
        label: Message = {"role": "assistant", "content": f"sed -i '{index + rollout}s/+/*/' geo.py"}
        action: Message = label if teacher(index) else {"role": "assistant", "content": f"python test.py {index}"}
        made.append(
            Turn(
                index=index,
                actor=Role.TEACHER if teacher(index) else Role.STUDENT,
                beta=0.5,
                coin=0.1 if teacher(index) else 0.9,
                kept=kept,
                messages=news,
                action=Completion(message=action, policy="p", finish_reason="stop"),
                label=Completion(message=label, policy="t", finish_reason="stop"),
            )
        )
        news = (action, {"role": "user", "content": f"FAIL scale_tax({index}, 7) got {rollout} want 133"})
    return Trajectory(
        run="demo",
        round=1,
        rollout_id=f"{rollout:05d}",
        task_id=f"task-{rollout}",
        student="p",
        teacher="t",
        turns=tuple(made),
        outcome=Outcome.UNRESOLVED,
    )


@pytest.fixture(scope="session")
def trajectories() -> list[Trajectory]:
    """Trajectories of uneven length; one label in them is flawed and must not train."""
    made = [dialogue(rollout, turns) for rollout, turns in enumerate((5, 1, 3, 8, 2, 4))]
    flawed = made[2].turns[1].model_copy(update={"label_flaw": LabelFlaw.TRUNCATED})
    made[2] = made[2].model_copy(update={"turns": (made[2].turns[0], flawed, made[2].turns[2])})
    return made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, trajectories: list[Trajectory]) -> Setting:
    """A training that nothing happened to."""
    setting = Setting(tmp_path_factory.mktemp("undisturbed"), checkpointEverySteps=50)

    async def run() -> None:
        await setting.prepare(policy_folder, trajectories)
        assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]

    asyncio.run(run())
    return setting


@pytest.fixture(scope="session")
def samples(tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]) -> list[Sample]:
    return list(tokenise(trajectories, StudentTemplate(tokenizer_with("qwen3_instruct")), 4096).samples)


@pytest.fixture(scope="session")
def varied(samples: list[Sample]) -> list[Sample]:
    """Labels of dialogues, of which none weighs as the one before, and a draw of labels of any shape."""
    weighed = [replace(one, weight=(1.0, 0.25, 3.0)[number % 3]) for number, one in enumerate(samples)]
    return [*weighed, *(replace(one, trajectory=f"drawn/{one.trajectory}") for one in fixed())]


@pytest.fixture(scope="session")
def parent(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that peft made, with something in both matrices."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32), config)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("adapter") / "parent"
    policy.save_pretrained(folder)
    return folder
