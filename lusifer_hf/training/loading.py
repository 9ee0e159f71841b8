"""
From a folder to a model of which the right part is trained, and back: the hand-over between the steps of a recipe.

What is trained, in float32 whatever the rest is in:

| | with LoRA | without |
|---|---|---|
| alignment | LoRA of the encoder, connector | encoder (unless `train_encoder` is false), connector |
| representation | LoRA of both towers, connector, projection | everything |
"""

import copy
import difflib
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, logging

from ..configuration_lusifer import LusiferConfig
from ..converting import _merge, _save_adapter
from ..data.mixture import Stage
from ..modeling_alignment import LusiferForAlignment
from ..modeling_lusifer import LusiferModel
from ..prompts import INSTRUCTIONS
from ..publishing import new_folder, save_repository
from .arguments import FINAL, ModelArguments, RepresentationConfig, TrainingConfig


logger = logging.get_logger(__name__)

ADAPTER = "adapter"  # the folder of adapters that were not merged, as in `lusifer-hf convert --keep-adapters`
# From a PEFT wrapper's names to the plain model's; LoRA matrices become `module.lora_A`.
_RENAMES = {
    r"^base_model\.model\.": "",
    r"\.modules_to_save\.default\.": ".",
    r"\.base_layer\.": ".",
    r"\.lora_([AB])\.default\.weight$": r".lora_\1",
}


def load_for_stage(stage: Stage, args: ModelArguments) -> LusiferModel | LusiferForAlignment | PeftModel:
    """
    The model of a stage, with gradients switched on for what the stage trains; writes nothing.

    Raises:
        `OSError`, `ValueError`: if there is no LUSIFER model, or it does not fit the arguments.
    """
    if args.model_name_or_path is None:
        model = LusiferModel.from_backbones(
            args.encoder,
            args.llm,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            seed=args.composition_seed,
            instructions=INSTRUCTIONS,
            **args.config_fields,
        )
        if stage == "alignment":
            model = LusiferForAlignment.from_embedding_model(model)
    else:
        model = _load(LusiferForAlignment if stage == "alignment" else LusiferModel, args)
    # What FSDP shards one by one. The backbones' own lists hold embeddings too, which accelerate shards by itself.
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    model._no_split_modules = layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.composition_seed)
        _grow_added_tokens(model.base_model, args.num_added_tokens)
        model = _with_lora(model, stage, args) if args.lora_r else _without_lora(model, stage, args)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            # AdamW's steps are smaller than half precision's.
            parameter.data = parameter.data.float()
    if args.compile_layers:
        embedding_model(model).compile_layers()
    return model


def embedding_model(model: LusiferModel | LusiferForAlignment | PeftModel) -> LusiferModel:
    """The [`LusiferModel`] inside a model of either stage."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


def check_fits(training: TrainingConfig, model: LusiferModel | LusiferForAlignment | PeftModel):
    """Raise a `ValueError` if the trainer's arguments ask for what the model cannot do."""
    embedder = embedding_model(model)
    positions, size = embedder.max_positions, embedder.config.hidden_size
    if positions is not None and training.max_length > positions:
        raise ValueError(f"max_length={training.max_length} is more than the {positions} positions of the model.")
    if isinstance(training, RepresentationConfig) and max(training.matryoshka_dims or [0]) > size:
        raise ValueError(f"matryoshka_dims={training.matryoshka_dims}: an embedding has {size} numbers.")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes & {torch.bfloat16, torch.float16} and not (training.bf16 or training.fp16):
        raise ValueError(
            "The model is stored in half precision, but bf16 is false: set bf16 to true, or dtype to float32."
        )


def _load(model_class: type, args: ModelArguments) -> LusiferModel | LusiferForAlignment:
    name, source = args.model_name_or_path, {"revision": args.model_revision} if args.model_revision else {}
    config = _load_config(name, source)
    if args.num_added_tokens is not None and args.num_added_tokens < config.num_added_tokens:
        raise ValueError(
            f"num_added_tokens={args.num_added_tokens}: {name} has {config.num_added_tokens}, which can only grow."
        )
    if args.alignment_attention is not None:
        config.alignment_attention = args.alignment_attention
    known = config.encoder_config.to_dict()
    for field, value in (args.encoder_overrides or {}).items():
        if field not in known:
            nearest = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"encoder_overrides: the encoder's config has no {field!r}. Did you mean {nearest!r}?")
        setattr(config.encoder_config, field, value)
    model = model_class.from_pretrained(
        name, config=config, dtype=args.dtype, attn_implementation=args.attn_implementation, **source
    )
    adapter = cached_file(
        name, f"{ADAPTER}/adapter_config.json", _raise_exceptions_for_missing_entries=False, **source
    )
    if adapter is not None and model.base_model.is_loaded:
        logger.info(f"Merging the adapters that {name} keeps in {ADAPTER}/.")
        PeftModel.from_pretrained(model.base_model, name, subfolder=ADAPTER, **source).merge_and_unload()
    return model


def _load_config(name: str, source: dict) -> LusiferConfig:
    advice = "model_name_or_path must be what `compose`, `convert` or a training run wrote"
    if (Path(name) / FINAL).is_dir():
        raise ValueError(f"{name} is a run's output folder: set model_name_or_path to {Path(name) / FINAL}.")
    if (Path(name) / "trainer_state.json").exists():
        raise ValueError(f"{name} is a checkpoint for resuming its own run: {advice}, in its folder {FINAL}.")
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, **source)
    except OSError as error:
        raise OSError(f"No model can be loaded from {name}: {advice}. {error}") from None
    if (model_type := fields.get("model_type")) != LusiferConfig.model_type:
        raise ValueError(f"{name} is a model of type {model_type!r}, not LUSIFER: {advice}, or set encoder and llm.")
    return LusiferConfig.from_pretrained(name, **source)


def _grow_added_tokens(model: LusiferModel, count: int | None):
    """Append freshly initialised added tokens; the old ones stay as they are."""
    before = model.config.num_added_tokens
    if count is None or count == before:
        return
    connector, table = model.connector, model.llm.get_input_embeddings().weight
    old = [connector.added_tokens.data] if before else []
    connector.added_tokens = nn.Parameter(torch.empty(count, model.config.hidden_size).to(table))
    connector.config.num_added_tokens = model.config.num_added_tokens = count
    model._init_weights(connector)
    for tokens in old:
        connector.added_tokens.data[:before] = tokens
    logger.info(
        f"num_added_tokens: {before} -> {count}. The {count - before} new ones have random values"
        f"{f', the first {before} keep theirs' if before else ''}."
    )


def _without_lora(model: LusiferModel | LusiferForAlignment, stage: Stage, args: ModelArguments):
    embedder = model.base_model
    model.requires_grad_(stage == "representation")
    embedder.connector.requires_grad_(True)
    if stage == "alignment":
        embedder.encoder.requires_grad_(args.train_encoder)
    elif embedder.config.connector == "ff":
        # No text is read by it, so it has no gradient, for which distributed training would wait.
        embedder.llm.get_input_embeddings().requires_grad_(False)
    return model


def _with_lora(model: LusiferModel | LusiferForAlignment, stage: Stage, args: ModelArguments) -> PeftModel:
    embedder = model.base_model
    towers = ("encoder.",) if stage == "alignment" else ("encoder.", "llm.")
    linears = [
        name for name, module in embedder.named_modules() if isinstance(module, nn.Linear) and name.startswith(towers)
    ]
    targets = [name for name in linears if re.fullmatch(args.lora_target_modules or ".*", name)]
    if not targets:
        raise ValueError(
            f"lora_target_modules={args.lora_target_modules!r} matches none of the {len(linears)} linear layers that "
            f"this stage trains, such as {linears[0]} and {linears[-1]}."
        )
    prefix = "model." if stage == "alignment" else ""
    to_save = ["connector"]
    if stage == "representation" and embedder.config.projection:
        to_save.append("projection")
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=2 * args.lora_r if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=prefix.replace(".", r"\.") + f"({module_pattern(targets, embedder)})",
        modules_to_save=to_save,
    )
    return get_peft_model(model, config)


def module_pattern(names: list[str], model: nn.Module) -> str:
    """A regex of exactly these modules: one alternative per kind of layer, unless that would match others as well."""
    exact = [re.escape(name) for name in names]
    pattern = "|".join(sorted({re.sub(r"\d+(?=\\\.)", r"\\d+", name) for name in exact}))
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    return pattern if matched == set(names) else "|".join(exact)


@torch.no_grad()
def save_final(
    model: LusiferModel | LusiferForAlignment | PeftModel,
    folder: str | Path,
    merge_adapters: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
):
    """
    Write a trained model as a complete repository, whole or not at all; the model itself stays as it is.

    After alignment the LM head is written beside it, for another run of that stage.

    Args:
        model: of either stage, not wrapped for several processes.
        folder (`str` or `Path`): the folder to write; it must not hold anything yet.
        merge_adapters (`bool`, *optional*, defaults to `True`):
            `False` leaves the backbones as they were and writes LoRA into `folder/adapter`.
        state_dict (*optional*):
            The model's state, where its own parameters hold only a part of it (FSDP).
    """
    embedder = embedding_model(model)
    dtype = embedder.config.dtype or embedder.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a config that was read holds its name
    tensors = _plain_tensors(model, model.state_dict() if state_dict is None else state_dict)
    loras = sorted(name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A"))
    with new_folder(folder) as partial:
        if loras and merge_adapters:
            _merge(tensors, loras, model.peft_config["default"].lora_alpha, {})
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        adapter = {name: tensors.pop(name) for name in list(tensors) if name.endswith((".lora_A", ".lora_B"))}
        lm_head = {name: tensors.pop(name).to(dtype) for name in list(tensors) if name.startswith("lm_head.")}
        config = copy.deepcopy(embedder.config)
        config._attn_implementation = None  # the training's may not run on a CPU
        final = LusiferModel.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        final.lm_head_to_save = lm_head or None
        final.tokenizer_source, final.llm_tokenizer_source = embedder.tokenizer_source, embedder.llm_tokenizer_source
        final.tokenizer = embedder.tokenizer
        save_repository(final, partial)
        if adapter:
            lora = model.peft_config["default"]
            _save_adapter(adapter, loras, lora.lora_alpha, lora.lora_dropout, final, partial / ADAPTER)


def _plain_tensors(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as [`LusiferModel`] names it, `lm_head.*` beside it and LoRA's matrices as `module.lora_A`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    renames = dict(_RENAMES)
    if isinstance(base, LusiferForAlignment):
        renames[r"^model\."] = ""
    tensors = {}
    for name, tensor in state_dict.items():
        if ".original_module." in name:  # the connector and the projection as they were before training
            continue
        for old, new in renames.items():
            name = re.sub(old, new, name)
        tensors[name] = tensor
    return tensors
