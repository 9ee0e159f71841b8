"""Stage 2, representation fine-tuning: contrastive, in batches larger than memory (paper section 3.3)."""

from functools import partial

import torch

from .distributed import gather_rows, same_number_of_chunks
from .gradcache import gradcache_step, split_by_rows, split_by_tokens
from .losses import LossOutput, contrastive_loss
from .trainer import LusiferTrainer


class RepresentationTrainer(LusiferTrainer):
    """
    Trains an embedding model so that queries lie near their positives and far from everything else in the batch.

    The loss and the gradients do not depend on how the global batch is spread over processes, nor on the size of
    GradCache's chunks. Takes what [`LusiferTrainer`] takes, with [`RepresentationConfig`].

    Example:

    ```python
    >>> trainer = RepresentationTrainer(model, args, mixture, RepresentationCollator(...))  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    ```
    """

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        model.train()
        dataset, ids, in_batch_negatives = (inputs.pop(name) for name in ("dataset", "ids", "in_batch_negatives"))
        lengths = inputs["attention_mask"].sum(dim=1)  # (M,), still on the CPU
        chunks = self._split(inputs["rows"], lengths)
        longest = [int(lengths[chunk].max()) for chunk in chunks]
        self.count_tokens(lengths)

        inputs = self._prepare_inputs(inputs)
        rows = inputs["rows"] + self.args.process_index * len(ids)
        labels = torch.stack([rows, inputs["kinds"], inputs["text_ids"]], dim=1)  # (M, 3)
        # Of a repeated chunk, which comes last, nothing enters the loss.
        labels = labels[torch.cat(chunks)[: len(labels)].to(labels.device)]
        gather = gather_rows if self.args.gather_across_devices else lambda tensor: tensor
        rows, kinds, text_ids = gather(labels).unbind(dim=1)

        def loss_of(embeddings: torch.Tensor) -> LossOutput:
            return contrastive_loss(
                gather(embeddings[: len(labels)]),
                rows,
                kinds,
                text_ids=text_ids,
                in_batch_negatives=in_batch_negatives,
                loss=self.args.loss,
                temperature=self.args.temperature,
                similarity=self.args.similarity,
                miner_epsilon=self.args.miner_epsilon,
                false_negative_threshold=self.args.false_negative_threshold,
                matryoshka_dims=self.args.matryoshka_dims,
            )

        output = gradcache_step(
            [
                {name: inputs[name][chunk, :length] for name in ("input_ids", "attention_mask")}
                for chunk, length in zip(chunks, longest, strict=True)
            ],
            embed=lambda chunk: model(**chunk).pooler_output,
            loss=loss_of,
            backward=self.accelerator.backward,
            no_sync=partial(self.accelerator.no_sync, model),
        )
        self.check_finite(output.loss, ids)
        self.record(self.train_dataset.sources[dataset].name, loss=output.loss, **output.metrics)
        return output.loss

    def _split(self, rows: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        """Indices of the texts of each chunk, as many chunks on every process."""
        if self.args.gradcache_rows is not None:
            chunks = split_by_rows(rows, self.args.gradcache_rows)
        elif self.args.gradcache_tokens is not None:
            chunks = split_by_tokens(lengths, self.args.gradcache_tokens)
        else:
            chunks = [torch.arange(len(rows))]
        return same_number_of_chunks(chunks)
