"""What vLLM's worker on the CPU gets beside its own methods (`--worker-extension-cls`): mending what an in-place reload leaves behind.

On the CPU vLLM packs linear layers for oneDNN. A head that is tied to the embedding has no weights of its own in a checkpoint, so a
reload (0.32) exchanges the embedding and leaves the packed head as it was: greedy answers look sane, probabilities are those of a
mixture of two policies. Imported by vLLM's process; imports nothing itself.
"""

from typing import Any


class TiedHead:
    """Mixed into the worker by vLLM."""

    model_runner: Any

    def repack_tied_head(self) -> bool:
        """Packs a tied head anew from the embedding's weights; whether there was one."""
        model = self.model_runner.get_model()
        head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
        if head is None or embedding is None or not model.config.tie_word_embeddings:
            return False
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
        return True
