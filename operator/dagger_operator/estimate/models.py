"""The shape of a model: its parameters, and the cost of one token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagger_operator.api.context import longest_context


class UnknownShape(ValueError):
    """A model whose shape cannot be read: `problem` states what is wrong with its config, `remedy` what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}: {remedy}")


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention, SwiGLU and RMSNorm: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE.

    Names are those of Hugging Face's `config.json`. Biases are ignored: only Qwen2 has some, under 0.1 % of its parameters.
    """

    layers: int
    hidden: int
    intermediate: int
    """Width of a dense MLP, or of one expert."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    """Whether embedding and head share one matrix."""
    qk_norm: bool = True
    """RMSNorm over each head's queries and keys (Qwen3)."""
    experts: int = 0
    """Experts per layer; 0 for a dense model."""
    active_experts: int = 0
    """Experts that a token is routed to."""
    positions: int | None = None
    """The longest context that vLLM serves."""
    hybrid: bool = False
    """Whether it thinks unless its chat template is told not to. Such a template writes an empty thought before the turn to be generated
    and omits it once the turn is history: no label has the same tokens as the turn that was taken."""

    @property
    def q_width(self) -> int:
        """Width of all queries of a token; `heads * head_dim`, which need not be `hidden`."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys of a token; values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention: q, k, v, o."""
        return 2 * self.hidden * (self.q_width + self.kv_width)

    @property
    def mlp(self) -> int:
        """Parameters of one dense MLP, or of one expert: gate, up, down."""
        return 3 * self.hidden * self.intermediate

    @property
    def matrix(self) -> int:
        """Parameters of a layer's largest matrix; gate and up of all experts count as one."""
        return self.hidden * max(self.q_width, self.intermediate * max(1, 2 * self.experts))

    @property
    def head(self) -> int:
        """Parameters of the head, `vocabulary * hidden`; the embedding is as large."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Number of all parameters; equals that of the published checkpoints."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        layer = self.attention + self.mlp * max(1, self.experts) + self.hidden * self.experts + norms
        return self.layers * layer + self.hidden + self.head * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """Return the parameters of adapters on all linear layers of the decoder; experts, stored as one tensor per kind, get none."""
        attention = 2 * (self.hidden + self.q_width) + 2 * (self.hidden + self.kv_width)
        return self.layers * rank * (attention + (0 if self.experts else 3 * (self.hidden + self.intermediate)))

    @property
    def body(self) -> int:
        """Parameters outside the head that multiply each token: of experts only the active ones, and the router."""
        return self.layers * (self.attention + self.mlp * (self.active_experts or 1) + self.hidden * self.experts)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache per token over all layers: key and value, two bytes each (BF16)."""
        return self.layers * 2 * self.kv_width * 2


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> Shape:
    return Shape(layers, hidden, intermediate, heads, kv_heads, 128, 151936, **more)


KNOWN: Mapping[str, Shape] = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, 8, tied=True, positions=40960, hybrid=True),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(36, 2560, 9728, 32, 8, tied=True, positions=262144),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 12288, 32, 8, positions=40960, hybrid=True),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _qwen3(48, 2048, 768, 32, 4, experts=128, active_experts=8, positions=262144),
}
"""The paper's models, from their `config.json`, and a small one of the same family."""


def shape_of(config: Mapping[str, Any], chat_template: str = "") -> Shape:
    """Return the shape that a Hugging Face `config.json` describes; the chat template shows whether it is a hybrid thinking model.

    Raises `UnknownShape` if a number is missing, or if any layer is not of the kind that `Shape` describes.
    """
    kinds = {str(kind) for kind in config.get("layer_types") or []} - {"full_attention", "sliding_attention"}
    if kinds:
        problem = f"has layers of kind {', '.join(sorted(kinds))}"
        raise UnknownShape(problem, "the formulas know plain attention only: take a student such as Qwen3")
    heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    return Shape(
        layers=_number(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_number(config, "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocabulary=_number(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=str(config.get("model_type", "")).startswith("qwen3"),
        experts=experts,
        active_experts=_number(config, "num_experts_per_tok") if experts else 0,
        positions=longest_context(config),
        hybrid="enable_thinking" in chat_template,
    )


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnknownShape(f"has {key} = {value!r}", "give the config.json of a decoder such as Qwen3, as Hugging Face stores it")
    return value
