"""
What both stages add to `transformers.Trainer`: our batches, checkpoints that are complete or not there, metrics of
each data set, an evaluation on files, and a stop at the first loss that is no number.
"""

import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from ..data.mixture import Mixture
from ..data.samplers import MixtureBatchSampler
from .evaluation import evaluate_sources
from .plots import PlotCallback
from .schedules import make_scheduler


logger = logging.get_logger(__name__)

COMPLETE = "complete"  # the file that is written into a checkpoint last


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; transformers' own search also finds half-written ones."""
    complete = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class LusiferTrainer(Trainer):
    """
    The base of [`AlignmentTrainer`] and [`RepresentationTrainer`].

    Args:
        model: the model of the stage, or a `PeftModel` around it.
        args: [`AlignmentConfig`] or [`RepresentationConfig`].
        train_dataset ([`~data.mixture.Mixture`] or its stream):
            What [`~data.mixture.load_mixture`] returns.
        data_collator: the collator of the stage.
        eval_sources (*optional*): what [`~evaluation.load_eval_sources`] returns.
        callbacks (`list[TrainerCallback]`, *optional*)
    """

    homogeneous_batches = True  # a global batch holds one data set

    def __init__(self, model, args, train_dataset, data_collator, eval_sources=None, callbacks=None, **kwargs):
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_sources,
            callbacks=[_SetEpoch(self), PlotCallback(), *(callbacks or [])],
            **kwargs,
        )
        self.sampler: MixtureBatchSampler | None = None
        self._sums: dict[str, list] = defaultdict(lambda: [0.0, 0])  # name -> sum and number since the last log
        self._tokens, self._last_log = 0, None

    # Batches

    @classmethod
    def make_sampler(cls, mixture: Mixture, args) -> MixtureBatchSampler:
        """This process's batches; a `ValueError` if a data set does not fill a global batch."""
        return MixtureBatchSampler(
            mixture,
            batch_size=args.per_device_train_batch_size,
            num_processes=args.world_size,
            process_index=args.process_index,
            accumulation_steps=args.gradient_accumulation_steps,
            seed=args.data_seed,
            homogeneous=cls.homogeneous_batches,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Each process makes its own slices of the global batches: accelerate, not asked, shards nothing again."""
        options = {
            "collate_fn": self.data_collator,
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }
        if isinstance(self.train_dataset, IterableDataset):
            return DataLoader(self.train_dataset, batch_size=self.args.per_device_train_batch_size, **options)
        self.sampler = self.make_sampler(self.train_dataset, self.args)
        for name, count in self.sampler.left_out.items():
            if count:
                logger.info(f"{name}: every epoch leaves out {count} rows, other ones each time.")
        return DataLoader(self.train_dataset, batch_sampler=self.sampler, **options)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.args.schedule is not None:
            self.lr_scheduler = make_scheduler(optimizer or self.optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs) -> TrainOutput:
        """
        As [`Trainer.train`]; `True` resumes from the newest complete checkpoint, or begins if there is none.

        Raises:
            `OSError`: if the checkpoint is not complete, or a new one cannot be written.
            `FloatingPointError`: at the first loss that is no number.
        """
        output_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(output_dir)
        if resume_from_checkpoint and not (Path(resume_from_checkpoint) / COMPLETE).exists():
            raise FileNotFoundError(
                f"{resume_from_checkpoint} is no complete checkpoint; the newest of {output_dir} is "
                f"{last_complete_checkpoint(output_dir)}."
            )
        if self.args.should_save:
            for path in output_dir.glob("checkpoint-*"):
                if not (path / COMPLETE).exists():
                    logger.warning(f"Removing {path}: the run was stopped while it wrote this checkpoint.")
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint:
            logger.info(f"Resuming from {resume_from_checkpoint}.")
        self._last_log = time.perf_counter()
        output = super().train(resume_from_checkpoint=resume_from_checkpoint and str(resume_from_checkpoint), **kwargs)
        self.save_state()
        return output

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        # The checkpoint before this one is given up only when this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk raises, by file format
            shutil.rmtree(folder, ignore_errors=True)
            last = last_complete_checkpoint(folder.parent)
            raise OSError(
                f"{folder} could not be written ({error}). "
                f"{'No checkpoint is complete yet' if last is None else f'{last} is complete'}: "
                "free some space and start the same command again to continue."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / COMPLETE).touch()
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    # Metrics

    def record(self, dataset: str | None, **values: float | torch.Tensor):
        """Add one value each to the means that are logged next, over all data and over this data set's."""
        for name, value in values.items():
            for key in (name, f"{dataset}/{name}") if dataset is not None else (name,):
                total = self._sums[key]
                total[0] = total[0] + (value.detach() if torch.is_tensor(value) else value)
                total[1] += 1

    def count_tokens(self, *masks: torch.Tensor):
        self._tokens += sum(int(mask.sum()) for mask in masks)

    def check_finite(self, loss: torch.Tensor, ids: list[tuple[str, int]]):
        """Raise a `FloatingPointError` that names the step and the batch, whose rows are (data set, number)."""
        if not torch.isfinite(loss):
            rows = ", ".join(f"{dataset} {row}" for dataset, row in ids)
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}, on the rows {rows}. Look at them, "
                f"or lower the learning rate (now {self._get_learning_rate():.2g}). The last complete checkpoint is "
                f"{last_complete_checkpoint(self.args.output_dir)}."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            now = time.perf_counter()
            own = {name: (float(total), count) for name, (total, count) in self._sums.items()}
            merged: dict[str, list] = defaultdict(lambda: [0.0, 0])
            gathered = gather_object([(own, self._tokens)])
            for sums, _ in gathered:
                for name, (total, count) in sums.items():
                    merged[name][0] += total
                    merged[name][1] += count
            logs |= {name: total / count for name, (total, count) in sorted(merged.items()) if name not in logs}
            logs["tokens_per_second"] = round(sum(tokens for _, tokens in gathered) / (now - self._last_log))
            self._sums.clear()
            self._tokens, self._last_log = 0, now
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score the model on the eval sources; every process takes part."""
        began = time.perf_counter()
        scores = evaluate_sources(
            self.model_wrapped,
            self.data_collator.encoder_tokenizer,
            self.eval_dataset if eval_dataset is None else eval_dataset,
            max_length=self.args.max_length,
        )
        metrics = {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - began, 2)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train:
            self._last_log += time.perf_counter() - began
        return metrics


class _SetEpoch(TrainerCallback):
    """Tells the sampler the epoch: accelerate's `set_epoch` does not reach it in every resumed run."""

    def __init__(self, trainer: LusiferTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch))
