"""Runs inside vLLM's worker processes: takes a published version's weights into the live model."""

from typing import Any


class PolicyWeights:
    """vLLM mixes this class into its worker (`worker_extension_cls`)."""

    model_runner: Any

    def load_policy(self, folder: str) -> None:
        """Replace the weights in place by those of a Hugging Face folder; the engine must be paused."""
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        model = self.model_runner.model
        lm_head = getattr(model, "lm_head", None)
        if lm_head is not None and model.config.tie_word_embeddings:
            # CPU engines keep a packed copy of a tied head, which a reload leaves at the old weights.
            lm_head.quant_method.process_weights_after_loading(lm_head)
