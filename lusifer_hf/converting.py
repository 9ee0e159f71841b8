"""
Published research checkpoints to our layout.

In three steps: (1) read the checkpoint's tensors and rename them, (2) hold names and shapes against the model's and
refuse anything left over on either side, (3) merge LoRA (or set it aside as a PEFT adapter), load and save.
"""

import json
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .configuration_lusifer import LusiferConfig
from .modeling_lusifer import LusiferModel
from .prompts import INSTRUCTIONS
from .publishing import new_folder, save_repository


logger = logging.get_logger(__name__)

_PEFT_PREFIX = r"(?:base_model\.model\.)?"
# In this order: the research code calls the multilingual encoder "universal learner" and the LLM "encoder".
_RENAMES = {
    rf"^encoder\.{_PEFT_PREFIX}model\.": "llm.",
    rf"^encoder\.{_PEFT_PREFIX}lm_head\.": "lm_head.",
    rf"^universal_learner\.{_PEFT_PREFIX}": "encoder.",
    r"^connection_module\.added_tokens$": "connector.added_tokens",
    r"^output_projection\.0\.": "projection.linear_1.",
    r"^output_projection\.2\.": "projection.linear_2.",
    r"\.base_layer\.": ".",
    r"\.lora_([AB])\.[^.]+\.weight$": r".lora_\1",
}
_CONNECTOR_RENAMES = {
    "ff": {
        r"^connection_module\.ff\.0\.": "connector.mlp.linear_1.",
        r"^connection_module\.ff\.2\.": "connector.mlp.linear_2.",
    },
    "embedding_table": {
        r"^connection_module\.ff\.0\.": "connector.vocabulary.",
        # Our connector reads the LLM's own table.
        r"^connection_module\.embedding\.": "llm.embed_tokens.",
    },
}
# What may be left unused: the pooler (with its LoRA) never reaches an embedding, the buffers are computed anew.
_DROPPED = re.compile(r"^encoder\.pooler\.|\.rotary_emb\.inv_freq$|\.position_ids$")
_EMBEDDING_TABLE = "llm.embed_tokens.weight"


@dataclass
class ConversionReport:
    """
    What became of every tensor. Nothing is missing and nothing unused: [`convert`] raises an error about those.

    Args:
        used (`list[str]`):
            Names in the checkpoint of the tensors that the converted model holds.
        dropped (`list[str]`):
            Names in the checkpoint of the tensors that no embedding depends on.
        from_backbones (`list[str]`):
            Names in the converted model of the tensors that a training checkpoint lacks.
    """

    used: list[str]
    dropped: list[str]
    from_backbones: list[str]

    def __str__(self) -> str:
        dropped = "".join(f"\n  {name}" for name in self.dropped)
        return (
            f"{len(self.used)} tensors used, {len(self.from_backbones)} taken from the backbones, "
            f"none missing, none unused, {len(self.dropped)} dropped{':' if dropped else ''}{dropped}"
        )


@torch.no_grad()
def convert(
    source: str | Path,
    output: str | Path,
    *,
    encoder: str | None = None,
    llm: str | None = None,
    pooling: str | None = None,
    added_token_positions: str = "contiguous",
    keep_adapters: bool = False,
    lora_alpha: float | None = None,
    dtype: str | torch.dtype = "auto",
) -> ConversionReport:
    """
    Convert a checkpoint of the research code and write it as a complete repository.

    Args:
        source (`str` or `Path`):
            Hub id or folder of a published model (config.json with the constructor's arguments, model.safetensors), or
            a training checkpoint (`lastest.ckpt`, or the folder that holds it), which has the trained tensors alone.
        output (`str` or `Path`):
            The folder to write; it must not hold anything yet.
        encoder, llm (`str`, *optional*):
            Hub ids or folders of the backbones, instead of those that the checkpoint's config.json names. A published
            model takes their configs and tokenizers, a training checkpoint their weights as well.
        pooling (`str`, *optional*):
            Instead of config.json's; without a config.json `"mean"`, the research code's default.
        added_token_positions (`str`, *optional*, defaults to `"contiguous"`):
            The published weights were trained with `"after_padding"`, which gives the research code's vectors, batch
            by batch. `"contiguous"` makes vectors independent of the batch; what that does to the quality of weights
            that were trained the other way is unmeasured.
        keep_adapters (`bool`, *optional*, defaults to `False`):
            Write the backbones' weights unmerged, and the LoRA of both towers as one PEFT adapter in `output/adapter`.
        lora_alpha (`float`, *optional*):
            Instead of config.json's; needed for a training checkpoint with LoRA and no config.json beside it.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the whole model; `"auto"` is the dtype that the LLM's weights are stored in.

    Returns:
        [`ConversionReport`]

    Raises:
        `FileExistsError`: if `output` holds something already.
        `ValueError`: naming every tensor that is missing, unused or of another shape, or the option to set.

    Example:

    ```python
    >>> from lusifer_hf.converting import convert

    >>> report = convert("path/to/published", "path/to/converted")  # doctest: +SKIP
    ```
    """
    with new_folder(output) as folder:
        arguments, stored, is_complete = _read(source)
        _refuse_nv_embed(arguments, stored)
        encoder, encoder_config = _backbone("encoder", encoder or arguments.get("universal_learner_name_or_path"))
        llm, llm_config = _backbone("llm", llm or arguments.get("encoder_name_or_path"))
        fields = {
            **_connector_fields(arguments, stored),
            "pooling": pooling or arguments.get("pooling_method", "mean"),
            "added_token_positions": added_token_positions,
            "prompt_template": "research",
            "instructions": INSTRUCTIONS,
        }
        tensors, names, dropped = _rename(stored, fields["connector"])
        del stored
        if is_complete:
            config = LusiferConfig(encoder_config=encoder_config, llm_config=llm_config, **fields)
            if config.llm_config.tie_word_embeddings and "lm_head.weight" in tensors:
                tensors.setdefault(_EMBEDDING_TABLE, tensors["lm_head.weight"])
            if dtype == "auto" and _EMBEDDING_TABLE in tensors:
                dtype = tensors[_EMBEDDING_TABLE].dtype
            with torch.device("meta"):
                model = LusiferModel._from_config(config, dtype=None if dtype == "auto" else dtype)
        else:
            model = LusiferModel.from_backbones(encoder, llm, dtype=dtype, **fields)
        weights = model.state_dict()
        loras = sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".lora_A", ".lora_B"))})
        _check(tensors, loras, names, weights, is_complete)
        report = ConversionReport(sorted(names.values()), dropped, sorted(weights.keys() - tensors.keys()))

        lora_alpha = arguments.get("lora_alpha") if lora_alpha is None else lora_alpha
        if loras and lora_alpha is None:
            raise ValueError(
                f"{source} holds LoRA tensors but does not tell their alpha: set lora_alpha (--lora-alpha)."
            )
        if keep_adapters:
            _save_adapter(tensors, loras, lora_alpha, arguments.get("dropout", 0.0), model, folder / "adapter")
        else:
            _merge(tensors, loras, lora_alpha, weights)
        _scale_as_gemma_did(tensors, model)

        # Copies: an LM head that is tied to the input embeddings is saved beside them.
        heads = [name for name in tensors if name.startswith("lm_head.")]
        lm_head = {name: tensors.pop(name).to(model.dtype, copy=True) for name in heads}
        if is_complete:
            # Not `load_state_dict`, which leaves buffers that no checkpoint holds on the meta device.
            model = LusiferModel.from_pretrained(None, config=config, state_dict=tensors, dtype=model.dtype)
            model.use_backbones_tokenizers(encoder, llm)
        else:
            model.load_state_dict(tensors, strict=False)
            model.check_bidirectional()
        model.lm_head_to_save = lm_head or model.lm_head_to_save
        save_repository(model, folder)
    return report


def _read(source: str | Path) -> tuple[dict, dict[str, torch.Tensor], bool]:
    """The constructor's arguments, the tensors, and whether they are the whole model."""
    path = Path(source)
    if not path.exists():
        path = Path(snapshot_download(str(source), allow_patterns=["config.json", "*.safetensors*", "*.ckpt"]))
    config = (path if path.is_dir() else path.parent) / "config.json"
    arguments = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    if path.is_file():
        return arguments, _read_training_checkpoint(path), False

    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return arguments, _read_safetensors([path / shard for shard in sorted(shards)]), True
    if (path / "model.safetensors").exists():
        return arguments, _read_safetensors([path / "model.safetensors"]), True
    found = sorted(path.glob("*.ckpt"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{source} holds no model.safetensors and not exactly one .ckpt file (found: {names}).")
    return arguments, _read_training_checkpoint(found[0]), False


def _read_safetensors(files: list[Path]) -> dict[str, torch.Tensor]:
    tensors, aliases = {}, {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            aliases.update(file.metadata() or {})
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    # Tied tensors are written once; the metadata says which name stands for which.
    tensors.update(
        {alias: tensors[name] for alias, name in aliases.items() if name in tensors and alias not in tensors}
    )
    return tensors


def _read_training_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError):
        # Not chained: torch's message recommends to switch the protection off.
        raise ValueError(f"{path} is refused: it is not a file of tensors, and reading it could run code.") from None
    tensors = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f'{path} is not a training checkpoint of the research code: it has no tensors under "model".')
    return tensors


def _refuse_nv_embed(arguments: dict, stored: dict[str, torch.Tensor]):
    llm = f"{arguments.get('encoder_backbone_type')} {arguments.get('encoder_name_or_path')}"
    if "nv-embed" in llm.lower() or any("latent_attention" in name for name in stored):
        raise ValueError("The checkpoint's LLM is NV-Embed, whose latent attention pooling is not supported.")


def _backbone(option: str, name: str | None) -> tuple[str, PreTrainedConfig]:
    if name is None:
        raise ValueError(f"No config.json with the checkpoint names its backbones: set {option} (--{option}).")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"No config could be loaded from {name}: set {option} (--{option}).") from error
    config.name_or_path = Path(name).name if Path(name).exists() else name
    return str(name), config


def _connector_fields(arguments: dict, stored: dict[str, torch.Tensor]) -> dict:
    guess = "ff" if "connection_module.ff.2.weight" in stored else "embedding_table"
    connector = arguments.get("connection_type", guess)
    if connector not in _CONNECTOR_RENAMES:
        raise ValueError(f"connection_type={connector!r} is not one of {', '.join(map(repr, _CONNECTOR_RENAMES))}.")
    num_added_tokens = len(stored.get("connection_module.added_tokens", ()))
    if connector == "ff":  # with an embedding table the research code ignores the argument
        num_added_tokens = arguments.get("num_added_tokens", num_added_tokens)
    return {"connector": connector, "num_added_tokens": num_added_tokens}


def _rename(stored: dict, connector: str) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    """Tensors by their name in our model (LoRA: `module.lora_A`), their names in the checkpoint, names left out."""
    tensors, names, dropped = {}, {}, []
    # The connector's copy of the embedding table comes first: where the two differ, it is the one that embeds.
    for name in sorted(stored, key=lambda name: (not name.startswith("connection_module."), name)):
        new = name
        for old, replacement in (_CONNECTOR_RENAMES[connector] | _RENAMES).items():
            new = re.sub(old, replacement, new)
        if _DROPPED.search(new):
            dropped.append(name)
        elif new not in tensors:
            tensors[new], names[new] = stored[name], name
        elif new == _EMBEDDING_TABLE:
            dropped.append(name)
            if not torch.equal(tensors[new], stored[name]):
                logger.warning(f"{name} differs from {names[new]}, which is kept: vectors depend on it alone.")
        else:
            raise ValueError(f"{names[new]} and {name} have the same place in the model.")
    return tensors, names, dropped


def _check(tensors: dict, loras: list[str], names: dict, weights: dict[str, torch.Tensor], is_complete: bool):
    """Raise a `ValueError` unless every tensor has its place and every place its tensor."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    shapes["lm_head.weight"] = shapes[_EMBEDDING_TABLE]
    # What was trained is part of a training checkpoint, and these always were.
    expected = {name for name in shapes if is_complete or name.startswith(("connector.", "projection."))}
    for module in loras:
        if f"{module}.weight" in shapes:
            a, b = (f"{module}.lora_{matrix}" for matrix in "AB")
            rank = tensors[a].shape[0] if a in tensors else tensors[b].shape[1]
            shapes[a], shapes[b] = (rank, shapes[f"{module}.weight"][1]), (shapes[f"{module}.weight"][0], rank)
            expected |= {a, b}
    problems = {
        "missing (named as in the converted model)": expected - tensors.keys(),
        "unused": {names[name] for name in tensors.keys() - shapes.keys()},
        "of another shape than the backbones' configs say": {
            f"{names.get(name, name)} {tuple(tensor.shape)} instead of {shapes[name]}"
            for name, tensor in tensors.items()
            if name in shapes and tuple(tensor.shape) != shapes[name]
        },
    }
    if any(problems.values()):
        lists = "; ".join(f"{what}: {', '.join(sorted(found))}" for what, found in problems.items() if found)
        raise ValueError(f"The checkpoint does not fit the model. Tensors {lists}.")


def _merge(tensors: dict, loras: list[str], alpha: float | None, weights: dict[str, torch.Tensor]):
    """Add every LoRA product to its base weight, in float32."""
    for module in loras:
        name = f"{module}.weight"
        base = tensors[name] if name in tensors else weights[name]
        a, b = (tensors.pop(f"{module}.lora_{matrix}").float() for matrix in "AB")
        tensors[name] = (base.float() + alpha / len(a) * (b @ a)).to(base.dtype)


def _save_adapter(tensors: dict, loras: list[str], alpha, dropout: float, model: LusiferModel, folder: Path):
    if not loras:
        raise ValueError("The checkpoint holds no LoRA: leave `keep_adapters` out.")
    matrices = {
        f"base_model.model.{module}.lora_{matrix}.weight": tensors.pop(f"{module}.lora_{matrix}").contiguous()
        for module in loras
        for matrix in "AB"
    }
    ranks = {module: len(matrices[f"base_model.model.{module}.lora_A.weight"]) for module in loras}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # One alternative per kind of layer, unless that would reach layers without LoRA.
    exact = [re.escape(module) for module in loras]
    pattern = "|".join(sorted({re.sub(r"\d+(?=\\\.)", r"\\d+", module) for module in exact}))
    if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} != set(loras):
        pattern = "|".join(exact)
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        rank_pattern={re.escape(module): own for module, own in ranks.items() if own != rank},
        inference_mode=True,
    ).save_pretrained(folder)
    save_file(matrices, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _scale_as_gemma_did(tensors: dict, model: LusiferModel):
    """
    Fold sqrt(hidden size) into the connector: the research code's Gemma multiplied all input embeddings by it, today's
    scales its own table alone (which is what an embedding table connector weighs, so that one needs nothing).
    """
    if not model.config.llm_config.model_type.startswith("gemma"):
        return
    # Gemma rounds it to the dtype it runs in.
    scale = torch.tensor(model.config.llm_config.hidden_size**0.5, dtype=model.dtype).float()
    for name in ("connector.mlp.linear_2.weight", "connector.mlp.linear_2.bias", "connector.added_tokens"):
        if name in tensors:
            tensors[name] = tensors[name].float() * scale
