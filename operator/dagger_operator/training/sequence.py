"""Sequence parallelism: several ranks share one row of tokens, by DeepSpeed-Ulysses (arXiv 2309.14509).

Each rank holds a part of the row; only for attention do ranks exchange tokens for heads, so that each attends over the whole row with
some of the heads. DeepSpeed's integration with transformers drops masks and builds causal ones of its own; only its exchange is used
here, around an attention that needs no mask.
"""

from functools import cache
from typing import Any

from dagger_operator.store.stage import StageFailure
from dagger_operator.training import attention


def share_rows(config: Any, ranks: int) -> Any:
    """Wrap the exchange around tree attention for a model of this config; return DeepSpeed's `mpu`, or None if rows are not shared.

    Collective. Raises `StageFailure` if the heads cannot be divided among the ranks.
    """
    attention.register()
    if ranks == 1:
        return None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise StageFailure(
            "HeadsDoNotDivide",
            f"training.sequenceParallel {ranks} does not divide the student's {heads} heads ({kv_heads} for keys): write a divisor of both",
        )
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AttentionInterface

    groups = _groups(ranks)
    exchange = UlyssesSPAttentionHF(
        attn=attention.tree_attention,
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        kv_head_count=kv_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=groups.get_sequence_parallel_group(),
        seq_length_is_variable=True,
    )
    AttentionInterface.register(attention.NAME, exchange.forward)
    return groups


@cache
def _groups(ranks: int) -> Any:
    """Return DeepSpeed's process groups, which can be initialised only once per process."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as groups

    groups.initialize_sequence_parallel(ranks)
    return groups
