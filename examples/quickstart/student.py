"""Makes the student: a Qwen3 of half a million random weights, with a tokenizer of its own, as a Hugging Face folder.

    python examples/quickstart/student.py --seed 1 --out /tmp/student

It is untrained: everything that it will be able to do comes from the teacher's labels.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import CONSTANTS, FUNCTIONS, HELPERS, MODULES, STATEMENT, TEST
from teacher import RESTORE, SUBMIT

SYSTEM = "You repair code."

END_OF_TURN, START_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|im_start|>", "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# Names, digits and the glue between them are separate tokens, so that a name is the same token in `tax.py`, ` tax` and `def tax`, and
# copying it is copying one token. Glue that occurs in every file or command is one token, which halves the length of a dialogue.
_GLUE = r"(?:system|user|assistant)\n|python3 test\.py|\.py:|\(a, b\)(?:: return )?|def |sed -i '|/' |grep -n \"|\" \*\.py"
_SPLIT = _GLUE + r"|[A-Za-z]+|[0-9]|[^A-Za-z0-9]+"


def make(folder: Path, seed: int) -> int:
    """Write the folder, identical for the same seed; return the number of parameters."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # heavy, and only needed here
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    fast: Any = PreTrainedTokenizerFast  # transformers does not type its constructors
    causal: Any = Qwen3ForCausalLM
    tokenizer = fast(
        tokenizer_object=_tokenizer(),
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = causal(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            dtype=torch.float32,
        )
    )
    _let_heads_copy(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return int(model.num_parameters())


def _let_heads_copy(model: Any) -> None:
    """Initialise every attention head to pass on what it looks at; where to look stays random.

    Repairing code means copying names from what was seen. From plain random weights this model needs thousands of steps before
    it copies at all; with value and output projections initialised as each other's transpose it needs hundreds (similar to
    mimetic initialisation, arXiv 2305.09828).
    """
    import torch

    config = model.config
    width = config.num_key_value_heads * config.head_dim
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        basis, _ = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size))
        values = basis[:width]
        by_head = values.view(config.num_key_value_heads, config.head_dim, -1).repeat_interleave(shared, dim=0)
        with torch.no_grad():
            layer.self_attn.v_proj.weight.copy_(values)
            layer.self_attn.o_proj.weight.copy_(0.05 * by_head.reshape(-1, config.hidden_size).T)


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def corpus() -> Iterator[str]:
    """Yield texts like commands and their outputs, with every name in every place where it can occur."""
    for text in [SYSTEM, STATEMENT, TEST, RESTORE, SUBMIT, "system\n", "user\n", "assistant\n"]:
        yield from [text, text]
    for helper, (formula, _) in HELPERS.items():
        yield f"from lib import {', '.join(HELPERS)}\ndef {helper}(a, b): return ({formula}) % 97\n"
        for function in FUNCTIONS:
            yield f'grep -n "def {function}" *.py'
            yield f"tax.py:3:def {function}(a, b): return {helper}(a, b)\nsed -i '3s/mix/{helper}/' tax.py"
            yield f"FAIL {function}(19, 72) got 26 want 13\n"
    for constant in CONSTANTS:
        yield f"grep -n \"{constant} =\" *.py\ntax.py:3:{constant} = 37\nsed -i '3s/37/73/' tax.py\nFAIL {constant} got 37 want 73\n"
    for module in MODULES:
        yield f"sed -i '3s/mix/dot/' {module}.py\nERROR {module}.py SyntaxError\n"
        yield f"ERROR {module}.py NameError\nERROR {module}.py ImportError\n"
        yield f"sed: can't read {module}.py: No such file or directory\nPASS 12 checks\nexit 0\nexit 1\n"
        yield f"bash: line 1: {module}: command not found\nbash: -c: line 1: unexpected EOF while looking for matching `\"'\n"
        yield "sed: -e expression #1, char 12: unterminated `s' command\nERROR tax.py AttributeError\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # libraries print on it, and the caller reads JSON
        parameters = make(options.out, options.seed)
    print(json.dumps({"folder": str(options.out), "parameters": parameters}))


if __name__ == "__main__":
    main()
