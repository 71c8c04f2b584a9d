"""Extension of vLLM's worker on the CPU (`--worker-extension-cls`): fixes what an in-place reload leaves stale.

On the CPU vLLM packs linear layers for oneDNN. A head that is tied to the embedding has no weights of its own in a checkpoint, so a
reload (0.32) replaces the embedding and leaves the packed head unchanged: greedy answers look sane, but probabilities are those of a
mixture of two policies. Imported by vLLM's process; imports only the standard library.
"""

from typing import Any


class TiedHead:
    """Mixed into the worker class by vLLM."""

    model_runner: Any

    def repack_tied_head(self) -> bool:
        """Repack a tied head from the embedding's weights; return whether there was one."""
        model = self.model_runner.get_model()
        head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
        if head is None or embedding is None or not model.config.tie_word_embeddings:
            return False
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
        return True
