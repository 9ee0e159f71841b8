"""
What a run is: one flat YAML, every key of which is also a command-line flag, checked before anything is loaded.

The model's fields are those of [`ModelArguments`], everything else is `transformers.TrainingArguments` with what the
stage adds. Of the file system, `parse_run` looks at the YAML alone, and [`Run.check_files`] at the rest.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..configuration_lusifer import PROMPT_TEMPLATES, AddedTokenPositions, AlignmentAttention, Connector, Pooling
from ..data.mixture import FORMATS, DataSource, Stage, check_sources
from .evaluation import EvalSource
from .parsing import Parser, parse, parse_list, read_flags, read_yaml, refuse_unknown
from .schedules import SCHEDULES


logger = logging.get_logger(__name__)

RECORD = "run.yaml"  # in the output folder: what decides what the run learns
FINAL = "final"  # in the output folder: the finished model
DEFAULT_SCHEDULE = "cosine_annealing_with_floor"
# Options of transformers that would be ignored, or break what the trainers promise.
_UNSUPPORTED = {
    "auto_find_batch_size": "it would change the global batch",
    "label_smoothing_factor": "neither stage's loss has it",
    "remove_unused_columns": "the collators need every column",
    "torch_compile": "it would compile a graph for every length; set compile_layers instead",
    "train_sampling_strategy": "batches are made by our own sampler",
    "use_liger_kernel": "alignment takes Liger's loss by itself where it is installed",
}
# The fields of transformers that must be the same when a run goes on, beside our own. All others may change.
_DECIDING = {
    *("seed", "data_seed", "num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "bf16", "fp16"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
}
# Of our own, those that change speed, memory or the form of the result alone.
_UNDECIDING = {"attn_implementation", "compile_layers", "merge_adapters", "gradcache_rows", "gradcache_tokens"}
_COMPOSITION = (
    "connector",
    "pooling",
    "projection",
    "added_token_positions",
    "prompt_template",
    "default_instruction",
)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _check_choice(value: str | None, choices: Sequence[str], name: str):
    if value is not None and value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")


def _other_than_default(arguments: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The fields of a dataclass (of `names`, if given) that do not have their default."""
    defaults = {entry.name: entry.default for entry in fields(arguments) if names is None or entry.name in names}
    return {name: value for name, default in defaults.items() if (value := getattr(arguments, name)) != default}


@dataclass
class ModelArguments:
    """The model that a run starts from, a LUSIFER repository or two backbones, and what of it is trained."""

    model_name_or_path: str | None = _option(None, "Hub id or folder: composed, converted, or a step's final.")
    model_revision: str | None = _option(None, "Its revision on the Hub.")
    encoder: str | None = _option(None, "Instead of a model: Hub id or folder of the multilingual encoder.")
    llm: str | None = _option(None, "With encoder: Hub id or folder of the decoder LLM.")
    connector: str | None = _option(None, "With backbones: ff (the default) or embedding_table.")
    pooling: str | None = _option(None, "With backbones: mean (the default), weightedmean, cls or lasttoken.")
    projection: bool | None = _option(None, "With backbones: whether to project the embeddings (the default).")
    added_token_positions: str | None = _option(None, "With backbones: contiguous (the default) or after_padding.")
    prompt_template: str | None = _option(None, "With backbones: default or research.")
    default_instruction: str | None = _option(None, "With backbones: the instruction of encode_query.")
    num_added_tokens: int | None = _option(None, "Trained tokens after every text; a model's may grow in number.")
    composition_seed: int = _option(0, "Seed of all fresh weights, LoRA and added tokens included.")
    encoder_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of the encoder's config to change, such as {attention_probs_dropout_prob: 0}."},
    )
    alignment_attention: AlignmentAttention | None = field(
        default=None, metadata={"help": "Alignment: what a token of the LLM's text sees. Default: as in the model."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Of frozen weights and of the result; auto: as stored. What is trained is kept in float32."
    )
    attn_implementation: str | None = _option(None, "As in from_pretrained. Default: packed where possible.")
    compile_layers: bool = _option(False, "Compile the layers: a minute or two, then faster steps on a GPU.")
    train_encoder: bool = _option(True, "Alignment without LoRA: train the encoder, or the connector alone.")
    lora_r: int | None = _option(None, "Rank of LoRA. Without it there is no LoRA.")
    lora_alpha: float | None = _option(None, "Default: twice the rank.")
    lora_dropout: float = _option(0.0, "Dropout before LoRA's matrices.")
    lora_target_modules: str | None = _option(
        None, r"Regex of whole names, such as llm\.layers\.\d+\.mlp\..*; default: all linear layers of the towers."
    )
    merge_adapters: bool = _option(True, "Merge LoRA into the finished model, or keep it beside it in adapter/.")

    def __post_init__(self):
        backbones = [name for name in (self.encoder, self.llm) if name is not None]
        if len(backbones) != (2 if self.model_name_or_path is None else 0):
            raise ValueError("Say in one way what to start from: model_name_or_path, or both encoder and llm.")
        if backbones and self.model_revision is not None:
            raise ValueError("model_revision belongs to model_name_or_path.")
        if (given := _other_than_default(self, _COMPOSITION)) and not backbones:
            raise ValueError(
                f"{', '.join(given)} cannot be changed in {self.model_name_or_path}: leave it out, or compose another "
                "model from encoder and llm."
            )
        _check_choice(self.connector, get_args(Connector), "connector")
        _check_choice(self.pooling, get_args(Pooling), "pooling")
        _check_choice(self.added_token_positions, get_args(AddedTokenPositions), "added_token_positions")
        _check_choice(self.prompt_template, tuple(PROMPT_TEMPLATES), "prompt_template")
        if self.num_added_tokens is not None and self.num_added_tokens < 0:
            raise ValueError(f"num_added_tokens={self.num_added_tokens} must be 0 or more.")
        if isinstance(self.encoder_overrides, str):
            self.encoder_overrides = json.loads(self.encoder_overrides)
        if self.encoder_overrides and backbones:
            raise ValueError("encoder_overrides needs model_name_or_path: compose the model first.")
        self._check_lora()

    def _check_lora(self):
        if self.lora_r is None:
            names = ("lora_alpha", "lora_dropout", "lora_target_modules", "merge_adapters")
            if given := _other_than_default(self, names):
                raise ValueError(f"{', '.join(given)} has no effect without lora_r: set it, or leave this out.")
            return
        if self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r} must be 1 or more; leave it out to train without LoRA.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be from 0 to less than 1.")
        if not self.train_encoder:
            raise ValueError("train_encoder=false contradicts lora_r, which trains the encoder: leave one out.")

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of [`LusiferConfig`] that were given for two backbones."""
        return _other_than_default(self, (*_COMPOSITION, "num_added_tokens", "alignment_attention"))


@dataclass
class TrainingConfig(TrainingArguments):
    """
    What both stages add to `transformers.TrainingArguments`, and where our defaults differ.

    With `global_batch_size`, the rows of a step over all processes, the batch size of a process follows. Where batches
    are accumulated, `per_device_train_batch_size` is then the most rows that a forward pass takes.
    """

    accumulates: ClassVar[bool] = True

    max_length: int = _option(512, "Longer texts are cut to so many tokens, prompt and special tokens included.")
    global_batch_size: int | None = _option(None, "Rows of a step, over all processes.")
    schedule: str | None = _option(
        None, f"{' or '.join(SCHEDULES)}, the default unless lr_scheduler_type names one of transformers' own."
    )
    min_learning_rate: float | None = _option(None, "The learning rate where schedule begins and ends; default: 0.")
    num_cycles: int = _option(1, "Cycles of cosine_annealing_with_floor, each with its warm-up.")

    lr_scheduler_type: str | None = _option(None, "One of transformers' schedules, instead of schedule.")
    logging_steps: float = _option(10, "As in transformers.")
    save_total_limit: int | None = _option(2, "As in transformers.")
    logging_nan_inf_filter: bool = _option(False, "As in transformers; a loss that is no number stops the run.")
    remove_unused_columns: bool = _option(False, "Not supported.")
    ddp_find_unused_parameters: bool | None = _option(False, "As in transformers; all that is trained is used.")
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "As in transformers."})

    def __post_init__(self):
        self._check()
        self._derive_batch_size()
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.resume_from_checkpoint == "true":  # which is so anyway
            self.resume_from_checkpoint = None
        if (self.load_best_model_at_end or self.save_strategy == "best") and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "mean", True  # over the evaluation sets
        if self.lr_scheduler_type is None:
            self.schedule = self.schedule or DEFAULT_SCHEDULE
            self.lr_scheduler_type = "linear"  # transformers wants one
        super().__post_init__()
        if self.schedule is not None:
            self.lr_scheduler_type = None
        if self.gradient_checkpointing and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
            raise ValueError(
                "gradient_checkpointing=true, and so is fsdp_activation_checkpointing of accelerate's config, which "
                "does the same for FSDP: set --gradient_checkpointing false."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.n_gpu} GPUs: start one each with `accelerate launch --num_processes "
                f"{self.n_gpu} train.py ...`, or show it one with CUDA_VISIBLE_DEVICES=0."
            )

    def _check(self):
        """Before transformers' own checks, which set up the process group."""
        if not self.output_dir:
            raise ValueError("output_dir is missing: name the folder for checkpoints and the finished model.")
        for name, value in _other_than_default(self, tuple(_UNSUPPORTED)).items():
            raise ValueError(f"{name}={value} is not supported: {_UNSUPPORTED[name]}.")
        if (self.bf16 or self.bf16_full_eval) and not self.use_cpu and not is_torch_bf16_gpu_available():
            raise ValueError(
                "bf16=true, but no accelerator here computes in bfloat16: set bf16 to false, or use_cpu to true to "
                "train on the CPU in bfloat16."
            )
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be 1 or more.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be greater than 0.")

        _check_choice(self.schedule, tuple(SCHEDULES), "schedule")
        if self.lr_scheduler_type is not None:
            if given := _other_than_default(self, ("schedule", "min_learning_rate", "num_cycles")):
                raise ValueError(
                    f"{', '.join(given)} and lr_scheduler_type={self.lr_scheduler_type} exclude each other: "
                    "transformers' schedules take lr_scheduler_kwargs."
                )
        elif self.lr_scheduler_kwargs:
            raise ValueError("lr_scheduler_kwargs needs lr_scheduler_type; schedule takes min_learning_rate.")
        if not 0 <= (self.min_learning_rate or 0) <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} must be from 0 to learning_rate={self.learning_rate}."
            )
        if self.num_cycles < 1 or (self.num_cycles > 1 and self.schedule == "cosine_with_floor"):
            raise ValueError(f"num_cycles={self.num_cycles} must be 1 or more, and 1 with cosine_with_floor.")

    def _derive_batch_size(self):
        processes = int(os.environ.get("WORLD_SIZE", 1))
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.global_batch_size is None:
            self.global_batch_size = rows * processes
            return
        share, rest = divmod(self.global_batch_size, processes)
        if rest or share < 1:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be divided among {processes} processes: "
                "change one of the two."
            )
        if self.gradient_accumulation_steps > 1 and rows != share:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not {rows * processes}, as "
                f"per_device_train_batch_size={self.per_device_train_batch_size} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} say with {processes} processes: leave the latter out."
            )
        most = min(share, self.per_device_train_batch_size) if self.accumulates else share
        self.per_device_train_batch_size = next(size for size in range(most, 0, -1) if share % size == 0)
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size


@dataclass
class AlignmentConfig(TrainingConfig):
    """Arguments of [`AlignmentTrainer`]."""

    mask_probability: float = _option(0.5, "Of hiding a token of the LLM's text from attention, and of masking it.")
    streaming: bool = _option(False, "Read the data sets as streams. Needs max_steps.")

    def _check(self):
        super()._check()
        if not 0 <= self.mask_probability < 1:
            raise ValueError(f"mask_probability={self.mask_probability} must be from 0 to less than 1.")
        if self.streaming and self.max_steps < 1:
            raise ValueError("streaming=true needs max_steps: nobody knows how many rows a stream has.")
        if self.streaming and self.dataloader_num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers={self.dataloader_num_workers} with streaming=true: every worker would read "
                "the whole stream. Set it to 0 or 1."
            )


@dataclass
class RepresentationConfig(TrainingConfig):
    """
    Arguments of [`RepresentationTrainer`].

    The loss is over all texts of a global batch at once. `gradcache_rows` or `gradcache_tokens` say how much of it is
    embedded at a time, which changes memory and speed but no gradient.
    """

    accumulates: ClassVar[bool] = False

    loss: Literal["ntxent", "infonce", "supcon"] = _option("ntxent", "The contrastive loss.")
    temperature: float = _option(0.05, "What similarities are divided by.")
    similarity: Literal["l2", "cosine"] = _option("l2", "l2: minus the distance between normalised embeddings.")
    miner_epsilon: float | None = _option(0.25, "Margin of the MultiSimilarity miner; null: all pairs count.")
    max_positives: int = _option(3, "The most positives of a row in a batch.")
    max_negatives: int = _option(32, "The most negatives of a row in a batch.")
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Sizes that embeddings can be cut to: the loss is over all."}
    )
    false_negative_threshold: float | None = _option(
        None, "Negatives more similar than the nearest positive by more than this do not count."
    )
    gather_across_devices: bool = _option(True, "Whether texts of other processes are negatives too.")
    gradcache_rows: int | None = _option(None, "The most rows in a forward pass. Default: all at once.")
    gradcache_tokens: int | None = _option(None, "The most tokens in a forward pass, instead of rows.")

    def _check(self):
        super()._check()
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: texts of one accumulated batch "
                "would be no negatives in another. Raise global_batch_size and set gradcache_rows or gradcache_tokens "
                "to what fits into memory."
            )
        if _zero_stage(self.deepspeed) == 3:
            raise ValueError(
                "DeepSpeed ZeRO-3 is not supported in this stage: GradCache embeds a batch twice before one backward "
                "pass. configs/accelerate/fsdp2.yaml shards the weights as well."
            )
        if self.gradcache_rows is not None and self.gradcache_tokens is not None:
            raise ValueError("gradcache_rows and gradcache_tokens are two units of the same thing: set one.")
        for name in ("gradcache_rows", "gradcache_tokens", "max_positives"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if self.max_negatives < 0:
            raise ValueError(f"max_negatives={self.max_negatives} must be 0 or more.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be greater than 0.")
        if self.miner_epsilon is not None and self.miner_epsilon < 0:
            raise ValueError(f"miner_epsilon={self.miner_epsilon} must be 0 or more, or null for no miner.")
        if self.false_negative_threshold is not None and not -1 <= self.false_negative_threshold <= 1:
            raise ValueError(
                f"false_negative_threshold={self.false_negative_threshold} must be a difference of cosines, -1 to 1."
            )
        if self.matryoshka_dims is not None and min(self.matryoshka_dims) < 1:
            raise ValueError(f"matryoshka_dims={self.matryoshka_dims} must be 1 or more.")


CONFIGS = {"alignment": AlignmentConfig, "representation": RepresentationConfig}


def _zero_stage(deepspeed: dict | str | None) -> int:
    """The ZeRO stage of transformers' argument or of `accelerate launch`; 0 without DeepSpeed."""
    if deepspeed is None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
            return 0
        deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if deepspeed == "none":
            return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    if isinstance(deepspeed, str):
        deepspeed = json.loads(deepspeed if deepspeed.startswith("{") else Path(deepspeed).read_text(encoding="utf-8"))
    return deepspeed.get("zero_optimization", {}).get("stage", 0)


@dataclass
class Run:
    """A run as `parse_run` returns it: every field is checked, alone and with the others."""

    stage: Stage
    model: ModelArguments
    training: AlignmentConfig | RepresentationConfig
    data: list[DataSource]
    eval_data: list[EvalSource]

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def final(self) -> Path:
        """The folder of the finished model."""
        return self.output_dir / FINAL

    @property
    def begins_anew(self) -> bool:
        """Whether an older run in the output folder is to be removed."""
        return self.training.resume_from_checkpoint == "false"

    def deciding(self) -> dict[str, Any]:
        """Everything that decides what the run learns, as plain values."""
        own = {entry.name for entry in fields(self.training)} - {entry.name for entry in fields(TrainingArguments)}
        values = {"stage": self.stage, **_other_than_default(self.model)}
        values |= {name: getattr(self.training, name) for name in sorted(own | _DECIDING)}
        values["data"] = [_other_than_default(source) for source in self.data]
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in values.items()
            if name not in _UNDECIDING
        }

    def check_files(self):
        """Raise an `OSError` if a file is missing, or the output folder belongs to another run; no Hub look-ups."""
        for index, source in enumerate(self.data):
            _check_path(source.path, f"data[{index}]", is_local=source.path.endswith(FORMATS))
        for index, source in enumerate(self.eval_data):
            _check_path(source.path, f"eval_data[{index}]", is_local=True)
        for name in ("model_name_or_path", "encoder", "llm"):
            if (path := getattr(self.model, name)) is not None:
                _check_path(path, name)
        checkpoint = self.training.resume_from_checkpoint
        if checkpoint is not None and not self.begins_anew:
            _check_path(f"{checkpoint}/trainer_state.json", "resume_from_checkpoint", is_local=True)
        self._check_output_dir()

    def _check_output_dir(self):
        if self.output_dir.is_file():
            raise FileExistsError(f"output_dir={self.output_dir} is a file.")
        if self.begins_anew:
            return
        advice = "Take another output_dir, or set --resume_from_checkpoint false to remove it and begin anew."
        if self.final.exists():
            raise FileExistsError(f"{self.final} exists: this run is finished. {advice}")
        folder = self.output_dir
        if (checkpoint := self.training.resume_from_checkpoint) is not None:
            folder = Path(checkpoint).parent
        if any(folder.glob("checkpoint-*")):
            self._check_same_run(folder, advice)

    def _check_same_run(self, folder: Path, advice: str):
        record = folder / RECORD
        if not record.exists():
            raise FileExistsError(f"{folder} holds checkpoints but no {RECORD} to know the run by. {advice}")
        before, now = yaml.safe_load(record.read_text(encoding="utf-8")), self.deciding()
        different = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if different:
            what = ", ".join(
                name if name == "data" else f"{name} ({before.get(name)!r}, now {now.get(name)!r})"
                for name in different
            )
            raise FileExistsError(f"{folder} holds checkpoints of a run with another {what}. {advice}")

    def begin(self):
        """Write the record into the output folder, on one process; to begin anew, remove the older run before."""
        if self.begins_anew:
            for path in [*self.output_dir.glob("checkpoint-*"), *self.output_dir.glob(FINAL)]:
                logger.warning(f"Removing {path}, because the run begins anew.")
                shutil.rmtree(path)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.deciding(), sort_keys=False, allow_unicode=True, width=119)
        partial = self.output_dir / f".{RECORD}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.output_dir / RECORD)


def _check_path(path: str, what: str, is_local: bool = False):
    if not os.path.exists(os.path.expanduser(path)) and (is_local or not _HUB_ID.fullmatch(path)):
        raise FileNotFoundError(f"{what}: {path} does not exist.")


def parse_run(argv: Sequence[str]) -> Run:
    """
    Read and check `CONFIG.yaml [--key value ...]`; a flag wins over the YAML, `null` is None.

    Raises:
        `OSError`, `ValueError`: naming the key, its value and what to do.

    Example:

    ```python
    >>> from lusifer_hf.training.arguments import parse_run

    >>> run = parse_run(["configs/quickstart/1_reconstruction.yaml", "--learning_rate", "1e-4"])  # doctest: +SKIP
    ```
    """
    paths, flags = read_flags(argv, nested=("data", "eval_data"))
    if {"-h", "--help"} & set(argv):
        _print_help(flags.get("stage"))
    if len(paths) != 1:
        raise ValueError(f"Give one YAML file, then flags; the files given are: {', '.join(paths) or 'none'}.")
    given = read_yaml(Path(paths[0]).read_text(encoding="utf-8"), paths[0])
    if not isinstance(given, dict):
        raise ValueError(f"{paths[0]} has no keys.")
    given |= flags

    stage = given.pop("stage", None)
    if stage not in CONFIGS:
        raise ValueError(f"stage={stage!r} is not one of {', '.join(map(repr, CONFIGS))}.")
    valid = {entry.name: set(CONFIGS) for entry in fields(ModelArguments)}
    for name, config_class in CONFIGS.items():
        for entry in fields(config_class):
            valid.setdefault(entry.name, set()).add(name)
    valid |= {name: set(CONFIGS) for name in ("data", "eval_data")}
    valid["alignment_attention"] = valid["train_encoder"] = {"alignment"}
    refuse_unknown(given, valid)
    for name in given:
        if stage not in valid[name]:
            raise ValueError(f"{name} belongs to stage: {', '.join(valid[name])}. This is stage: {stage}.")

    data = parse_list(DataSource, given.pop("data", None) or [], "data")
    eval_data = parse_list(EvalSource, given.pop("eval_data", None) or [], "eval_data")
    check_sources(data, stage)
    if eval_data and "eval_strategy" not in given:
        raise ValueError("eval_data is given, but not when to evaluate: set eval_strategy to steps, epoch or no.")
    model, training = parse([ModelArguments, CONFIGS[stage]], given)
    if training.eval_strategy != IntervalStrategy.NO and not eval_data:
        raise ValueError(f"eval_strategy={training.eval_strategy.value} needs eval_data: the sets to evaluate on.")
    return Run(stage, model, training, data, eval_data)


def _print_help(stage: str | None):
    usage = "train.py CONFIG.yaml [--key value ...]\n\nEvery key of the YAML is a flag."
    config_class = CONFIGS.get(stage, RepresentationConfig)
    Parser([ModelArguments, config_class], usage=usage, add_help=False).print_help()
    raise SystemExit
