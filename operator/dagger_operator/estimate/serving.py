"""A pool of servers: what fits beside the weights, and how long prompts and turns take."""

import math
from dataclasses import dataclass

from dagger_operator.api import InvalidRun, Problem, Serving
from dagger_operator.estimate.assumptions import Assumptions
from dagger_operator.estimate.flops import forward
from dagger_operator.estimate.hardware import GIB, Gpu
from dagger_operator.estimate.models import Shape

WORKSPACE = 3 * GIB
"""Bytes per GPU that vLLM keeps for the activations of a step of 8,192 tokens, logits of its sampler and CUDA graphs. No source: an
assumption; a server's own log states its KV cache."""
UTILISATION = 0.9
"""vLLM's default `--gpu-memory-utilization`."""


@dataclass(frozen=True)
class Pool:
    """The replicas of one policy."""

    serving: Serving
    shape: Shape
    gpu: Gpu
    assumed: Assumptions

    @property
    def gpus_of_a_replica(self) -> int:
        return self.serving.gpus * self.serving.nodes

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.gpus_of_a_replica * self.serving.replicas

    @property
    def weights(self) -> float:
        """Bytes of BF16 weights per GPU: sharded by tensor and pipeline parallelism."""
        return 2 * self.shape.parameters / self.gpus_of_a_replica

    @property
    def kv_memory(self) -> float:
        """Bytes per GPU left for KV cache; below 0 if the weights do not fit."""
        return self.gpu.memory * self.utilisation - self.weights - WORKSPACE

    @property
    def kv_of_a_token(self) -> float:
        """Bytes per GPU; a key head is not split, so tensor parallelism beyond `kv_heads` copies it (PagedAttention, arXiv
        2309.06180, section 3)."""
        return self.shape.kv_bytes / (min(self.serving.gpus, self.shape.kv_heads) * self.serving.nodes)

    @property
    def kv_tokens(self) -> float:
        """Tokens that the KV cache of one replica holds."""
        return max(0.0, self.kv_memory) / self.kv_of_a_token

    @property
    def whole_contexts(self) -> int:
        """Sequences of `maxModelLen` that one replica holds at once."""
        return int(self.kv_tokens / self.serving.max_model_len)

    @property
    def utilisation(self) -> float:
        """Share of memory that vLLM uses: its default, or the value in `extraArgs`."""
        given = self.serving.argument("--gpu-memory-utilization")
        if given is None:
            return UTILISATION
        try:
            share = float(given)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            remedy = "--gpu-memory-utilization is a share: write a number such as 0.9"
            raise InvalidRun([Problem("serving.extraArgs", f"got {given!r}", remedy)])
        return share

    def call_seconds(self, calls: float, new_tokens: float, context: float) -> float:
        """Return how long one replica takes for `calls` concurrent turns after `context` tokens, of which `new_tokens` per call are not
        cached: prompts first, then all generate together."""
        if calls <= 0:
            return 0.0
        prompts = forward(self.shape, calls * new_tokens, calls * new_tokens * context, calls)
        prefill = prompts / (self.gpu.flops * self.gpus_of_a_replica * self.assumed.prefill_utilisation)
        together = max(1.0, min(calls, self.kv_tokens / max(1.0, context)))
        return prefill + calls / together * self.assumed.turn_tokens * self.token_seconds(min(calls, together), context)

    def token_seconds(self, batch: float, context: float) -> float:
        """Return the time of one token for each of `batch` sequences: weights and KV cache are read once (memory-bound decoding; Pope et
        al. 2022, arXiv 2211.05102, section 2), or computing if that takes longer."""
        gpus = self.gpus_of_a_replica
        read = 2 * self._weights_touched(batch) + batch * context * self.kv_of_a_token * gpus
        computed = forward(self.shape, batch, batch * context, batch)
        return max(
            read / (self.gpu.bandwidth * gpus * self.assumed.decode_efficiency),
            computed / (self.gpu.flops * gpus * self.assumed.prefill_utilisation),
        )

    def _weights_touched(self, batch: float) -> float:
        """Return the parameters that a step reads: few rows of the embedding, and only the experts that some token is routed to."""
        shape = self.shape
        touched = 1 - (1 - shape.active_experts / shape.experts) ** max(1.0, batch) if shape.experts else 1.0
        return shape.layers * (shape.attention + shape.mlp * max(1, shape.experts) * touched) + shape.head

    def cached(self, in_flight: float, context: float) -> float:
        """Return the share of a known prefix that is still cached, with `in_flight` rollouts over all replicas."""
        needed = in_flight / self.serving.replicas * context
        return self.assumed.cached * min(1.0, self.kv_tokens / max(1.0, needed))

    def holds(self, context: float) -> int:
        """Return how many rollouts of `context` tokens all replicas hold at once."""
        return math.floor(self.kv_tokens / context) * self.serving.replicas
