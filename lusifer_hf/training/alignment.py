"""Stage 1, alignment: the frozen LLM reads the encoder's states and writes the text, or what follows (section 3.2)."""

from .trainer import LusiferTrainer


class AlignmentTrainer(LusiferTrainer):
    """
    Trains a [`LusiferForAlignment`], whose LLM is frozen, so that the LLM understands the encoder's states.

    The loss is the mean over all label tokens of the global batch, however it is spread over processes and gradient
    accumulation. Takes what [`LusiferTrainer`] takes, with [`AlignmentConfig`].

    Example:

    ```python
    >>> trainer = AlignmentTrainer(model, args, mixture, AlignmentCollator(...))  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    ```
    """

    homogeneous_batches = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs.pop("ids")
        self.count_tokens(inputs["attention_mask"], inputs["llm_attention_mask"])
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.check_finite(loss, ids)
        return (loss, outputs) if return_outputs else loss
