"""The student: made from a seed, small, and rendered so that one turn's tokens are a prefix of the next turn's."""

from pathlib import Path

import pytest

import student
from tasks import FUNCTIONS, MODULES, STATEMENT, TEST

pytestmark = pytest.mark.heavy

DIALOGUE = [
    {"role": "system", "content": student.SYSTEM},
    {"role": "user", "content": STATEMENT},
    {"role": "assistant", "content": TEST},
    {"role": "user", "content": "FAIL scale(19, 72) got 26 want 13"},
    {"role": "assistant", "content": 'grep -n "def scale" *.py'},
    {"role": "user", "content": "tax.py:5:def scale(a, b): return mix(a, b)"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    assert student.make(folder, seed=7) < 2_000_000
    return folder


def test_the_same_seed_makes_the_same_files_and_another_seed_other_weights(folder: Path, tmp_path: Path) -> None:
    student.make(tmp_path / "again", seed=7)
    student.make(tmp_path / "other", seed=8)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (folder / weights).read_bytes()


def test_a_turn_with_its_label_is_a_prefix_of_the_next_state(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(messages: list[dict[str, str]], *, ask: bool) -> list[int]:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
        assert isinstance(found, list)
        return found

    for turn in (2, 4):
        state, labelled, after = (
            tokens(DIALOGUE[:turn], ask=True),
            tokens(DIALOGUE[: turn + 1], ask=False),
            tokens(DIALOGUE[: turn + 2], ask=True),
        )
        end = len(labelled) - labelled[::-1].index(tokenizer.eos_token_id)
        assert labelled[: len(state)] == state and after[:end] == labelled[:end]
        assert tokenizer.decode(labelled[len(state) : end]) == DIALOGUE[turn]["content"] + student.END_OF_TURN


def test_a_name_is_one_token_the_same_wherever_it_stands_and_any_text_survives(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in (*MODULES, *FUNCTIONS):
        (token,) = tokenizer.encode(name, add_special_tokens=False)
        for place in (f"{name}.py:3:", f"def {name}(a, b)", f"FAIL {name}(1, 2)", f"sed -i '3s/mul/{name}/' {name}.py"):
            assert token in tokenizer.encode(place, add_special_tokens=False)
    text = "Überraschung: 你好 \t\n\n `x` <b> 12345 " + STATEMENT
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_untrained_heads_pass_on_what_they_look_at(folder: Path) -> None:
    """Before any training a name of the prompt is likelier to come next than a name that is not in it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    names = torch.tensor(tokenizer.encode("".join(f"{name}_" for name in FUNCTIONS), add_special_tokens=False)[::2])
    assert len(set(names.tolist())) == len(FUNCTIONS)
    draws = torch.Generator().manual_seed(0)
    gains = []
    for _ in range(50):
        order = names[torch.randperm(len(names), generator=draws)]
        with torch.no_grad():
            logits = model(order[None, :12]).logits[0, -1]
        gains.append(float(logits[order[:11]].mean() - logits[order[12:]].mean()))
    assert sum(gains) / len(gains) > 0.05
