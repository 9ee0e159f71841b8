"""
Contract: `convert` makes a complete repository of a checkpoint of the research code, or says why not, leaving nothing.

Every tensor has its place or is an error; LoRA merged and LoRA kept give the same vectors; a published model needs no
backbone weights; nothing in a checkpoint is executed. That the vectors are the research code's is in test_parity.py.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_distinct, assert_same, save_backbone
from golden import backbones, constructor_arguments, expected_values, golden_case, needs_golden
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTextEncoding

from lusifer_hf import LusiferModel
from lusifer_hf.converting import convert


ADAPTERS = {"encoder": "encoder_lora", "universal_learner": "universal_lora"}
LORA_TARGETS = ("query", "key", "value", "dense", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj")
# Configs and tokenizers: all that `convert` may read of the backbones of a published model.
WITHOUT_WEIGHTS = shutil.ignore_patterns("*.safetensors")


def research_tensors(encoder: str, llm: str, num_added_tokens: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """A model's state dict as the research code names it, without LoRA."""
    encoder, llm = AutoModelForTextEncoding.from_pretrained(encoder), AutoModelForCausalLM.from_pretrained(llm)
    tensors = {f"universal_learner.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {f"encoder.{name}": tensor for name, tensor in llm.state_dict().items()}
    size, hidden_size = encoder.config.hidden_size, llm.config.hidden_size
    torch.manual_seed(seed)
    layers = {
        "connection_module.ff.0": (size, size),
        "connection_module.ff.2": (hidden_size, size),
        "output_projection.0": (hidden_size, hidden_size),
        "output_projection.2": (hidden_size, hidden_size),
    }
    for name, shape in layers.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 0.2 * torch.randn(shape), 0.2 * torch.randn(shape[0])
    if num_added_tokens:
        tensors["connection_module.added_tokens"] = torch.randn(num_added_tokens, hidden_size)
    return tensors


def add_lora(tensors: dict[str, torch.Tensor], ranks: dict[str, int]) -> dict[str, torch.Tensor]:
    """Wrap both towers as PEFT does, with a rank for each."""
    result = {}
    for name, tensor in tensors.items():
        tower, _, rest = name.partition(".")
        if tower not in ADAPTERS:
            result[name] = tensor
            continue
        prefix = f"{tower}.base_model.model."
        module, _, kind = rest.rpartition(".")
        if not module.endswith(LORA_TARGETS):
            result[prefix + rest] = tensor
            continue
        result[f"{prefix}{module}.base_layer.{kind}"] = tensor
        if kind == "weight":
            for matrix, shape in {"A": (ranks[tower], tensor.shape[1]), "B": (tensor.shape[0], ranks[tower])}.items():
                result[f"{prefix}{module}.lora_{matrix}.{ADAPTERS[tower]}.weight"] = 0.2 * torch.randn(shape)
    return result


def write(folder: Path, tensors: dict, metadata: dict | None = None, **arguments) -> Path:
    folder.mkdir(exist_ok=True)
    defaults = {"connection_type": "ff", "num_added_tokens": 1, "pooling_method": "mean", "lora_alpha": 8, "loar_r": 4}
    (folder / "config.json").write_text(json.dumps(defaults | arguments))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_backbones) -> dict[str, str]:
    """The quickstart's backbones, as `convert`'s options."""
    return dict(zip(("encoder", "llm"), map(str, tiny_backbones), strict=True))


@pytest.fixture(scope="module")
def research(folders) -> dict[str, torch.Tensor]:
    return research_tensors(*folders.values())


def embed(folder: Path, texts) -> torch.Tensor:
    return LusiferModel.from_pretrained(folder).encode(texts, convert_to="torch")


def assert_nothing_left(folder: Path, *expected: str):
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


FAMILIES = [("xlm-roberta", llm) for llm in ("mistral", "llama", "qwen2", "gemma2", "phi", "phi3")] + [
    ("mt5", "mistral")
]


@pytest.mark.parametrize("encoder, llm", FAMILIES)
def test_names_of_every_family(tmp_path, tiny_backbones, encoder, llm):
    folders = {"encoder": save_backbone(tmp_path / "encoder", encoder), "llm": save_backbone(tmp_path / "llm", llm)}
    for source, folder in zip(tiny_backbones, folders.values(), strict=True):
        for file in source.glob("tokenizer*"):
            shutil.copy(file, folder)
    options = {option: str(folder) for option, folder in folders.items()}
    tensors = research_tensors(*options.values())
    tensors.pop("encoder.lm_head.bias", None)  # phi's, which the research code drops
    report = convert(write(tmp_path / "published", tensors), tmp_path / "model", **options)

    assert sorted(report.used + report.dropped) == sorted(tensors)
    assert all("pooler" in name for name in report.dropped) and not report.from_backbones
    composed, model = LusiferModel.from_backbones(**options), LusiferModel.from_pretrained(tmp_path / "model")
    expected, scale = composed.state_dict(), 48**0.5 if llm == "gemma2" else 1
    connector = {
        "connector.added_tokens": tensors["connection_module.added_tokens"] * scale,
        "connector.mlp.linear_1.weight": tensors["connection_module.ff.0.weight"],
        "connector.mlp.linear_2.bias": tensors["connection_module.ff.2.bias"] * scale,
        "connector.mlp.linear_2.weight": tensors["connection_module.ff.2.weight"] * scale,
        "projection.linear_1.weight": tensors["output_projection.0.weight"],
        "projection.linear_2.weight": tensors["output_projection.2.weight"],
    }
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in ({k: v for k, v in expected.items() if k.startswith(("encoder", "llm"))} | connector).items():
        assert_same(actual[name], tensor, 1e-6)
    assert_same(
        load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"], tensors["encoder.lm_head.weight"]
    )


def test_complete_repository_without_backbone_weights(tmp_path, folders, research, sentences):
    options = {}
    for option, folder in folders.items():
        options[option] = str(tmp_path / Path(folder).name)
        shutil.copytree(folder, options[option], ignore=WITHOUT_WEIGHTS)
    arguments = {
        "universal_learner_name_or_path": options["encoder"],
        "encoder_name_or_path": options["llm"],
        "pooling_method": "weightedmean",
    }
    published = write(tmp_path / "published", research, **arguments)
    convert(published, tmp_path / "model")
    model = LusiferModel.from_pretrained(tmp_path / "model")
    assert model.config.prompt_template == "research" and model.config.pooling == "weightedmean"
    assert model.config.added_token_positions == "contiguous" and model.config.num_added_tokens == 1
    assert model.tokenizer.model_max_length == 512
    assert (tmp_path / "model" / "llm_tokenizer" / "tokenizer.json").exists()
    assert_distinct(model.encode(sentences))

    # The options win over the names in config.json.
    gone = {"universal_learner_name_or_path": "/gone", "encoder_name_or_path": "/gone"}
    write(published, research, **arguments | gone)
    with pytest.raises(ValueError, match="/gone: set encoder"):
        convert(published, tmp_path / "other")
    convert(published, tmp_path / "other", **options)
    assert_same(embed(tmp_path / "other", sentences), model.encode(sentences))


def test_hub_id(tmp_path, monkeypatch, folders, research):
    published, asked = write(tmp_path / "published", research), []
    monkeypatch.setattr(
        "lusifer_hf.converting.snapshot_download", lambda name, **options: asked.append(name) or str(published)
    )
    convert("someone/published", tmp_path / "model", **folders)
    assert asked == ["someone/published"]


def test_bfloat16_is_kept(tmp_path, folders, research):
    tensors = {name: t.bfloat16() if name.startswith("encoder.") else t for name, t in research.items()}
    published = write(tmp_path / "published", tensors)
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)):
        folder = tmp_path / f"model-{expected}"
        convert(published, folder, dtype=dtype, **folders)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {expected}
        assert LusiferModel.from_pretrained(folder).dtype == expected


def test_shards(tmp_path, folders, research, sentences):
    whole = write(tmp_path / "whole", research)
    sharded = write(tmp_path / "sharded", {})
    (sharded / "model.safetensors").unlink()
    names = sorted(research)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: research[name].clone() for name in part}, sharded / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (whole, sharded):
        convert(source, tmp_path / f"from-{source.name}", **folders)
    assert_same(embed(tmp_path / "from-whole", sentences), embed(tmp_path / "from-sharded", sentences), 0)


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2)])
def test_adapters_kept_equal_merged(tmp_path, folders, research, sentences, ranks):
    tensors = add_lora(research, dict(zip(ADAPTERS, ranks, strict=True)))
    published = write(tmp_path / "published", tensors)
    convert(published, tmp_path / "merged", **folders)
    convert(published, tmp_path / "kept", keep_adapters=True, **folders)

    merged, base = (embed(tmp_path / name, sentences) for name in ("merged", "kept"))
    model = PeftModel.from_pretrained(LusiferModel.from_pretrained(tmp_path / "kept"), tmp_path / "kept" / "adapter")
    with_lora = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(with_lora) == sum("lora_A" in name and "pooler" not in name for name in tensors)
    assert_same(model.base_model.model.encode(sentences, convert_to="torch"), merged, 1e-4)
    assert (merged - base).abs().max() > 0.1, "without an effect of LoRA this proves nothing"
    assert_distinct(merged)
    assert_same(merged, LusiferModel.from_pretrained(tmp_path / "merged").encode(sentences))

    with pytest.raises(ValueError, match="keep_adapters"):
        convert(write(tmp_path / "plain", research), tmp_path / "none", keep_adapters=True, **folders)


def test_adapter_that_covers_some_layers(tmp_path, folders, research, sentences):
    tensors = add_lora(research, {"encoder": 4, "universal_learner": 4})
    name = "encoder.base_model.model.model.layers.1.self_attn.q_proj"
    tensors[f"{name}.weight"] = tensors.pop(f"{name}.base_layer.weight")
    for matrix in "AB":
        del tensors[f"{name}.lora_{matrix}.encoder_lora.weight"]
    published = write(tmp_path / "published", tensors)
    convert(published, tmp_path / "merged", **folders)
    convert(published, tmp_path / "kept", keep_adapters=True, **folders)
    model = PeftModel.from_pretrained(LusiferModel.from_pretrained(tmp_path / "kept"), tmp_path / "kept" / "adapter")
    assert not hasattr(model.base_model.model.llm.layers[1].self_attn.q_proj, "lora_A")
    assert_same(model.base_model.model.encode(sentences), embed(tmp_path / "merged", sentences), 1e-4)


@pytest.mark.parametrize(
    "name, message",
    [
        ("encoder.model.norm.weight", "missing.*llm.norm.weight"),
        ("universal_learner.embeddings.word_embeddings.weight", "missing.*encoder.embeddings.word_embeddings.weight"),
        ("connection_module.added_tokens", "missing.*connector.added_tokens"),
        ("output_projection.2.bias", "missing.*projection.linear_2.bias"),
        ("encoder.lm_head.weight", "missing.*lm_head.weight"),
    ],
)
def test_missing_tensor(tmp_path, folders, research, name, message):
    published = write(tmp_path / "published", {key: tensor for key, tensor in research.items() if key != name})
    with pytest.raises(ValueError, match=message):
        convert(published, tmp_path / "model", **folders)
    assert_nothing_left(tmp_path, "published")


@pytest.mark.parametrize(
    "extra, message",
    [
        (
            {"encoder.model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)},
            "unused: encoder.model.layers.9.mlp.up_proj",
        ),
        ({"something_new": torch.ones(2)}, "unused: something_new"),
        ({"encoder.model.norm.weight": torch.ones(3)}, r"another shape.*model.norm.weight \(3,\) instead of \(64,\)"),
        (
            {"encoder.base_model.model.model.norm.weight": torch.ones(64)},
            "encoder.base_model.model.model.norm.weight and encoder.model.norm.weight have the same place",
        ),
        (
            {"encoder.model.layers.0.mlp.up_proj.lora_A.encoder_lora.weight": torch.ones(4, 64)},
            "missing.*llm.layers.0.mlp.up_proj.lora_B",
        ),
        (
            {"encoder.model.layers.9.mlp.up_proj.lora_A.encoder_lora.weight": torch.ones(4, 64)},
            "unused: encoder.model.layers.9.mlp.up_proj.lora_A.encoder_lora.weight",
        ),
    ],
)
def test_tensor_that_does_not_fit(tmp_path, folders, research, extra, message):
    published = write(tmp_path / "published", research | extra)
    with pytest.raises(ValueError, match=message):
        convert(published, tmp_path / "model", **folders)
    assert_nothing_left(tmp_path, "published")


def test_buffers_are_dropped(tmp_path, folders, research):
    buffers = {
        "universal_learner.embeddings.position_ids": torch.arange(514)[None],
        "encoder.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "encoder.model.rotary_emb.inv_freq": torch.ones(8),
    }
    report = convert(write(tmp_path / "published", research | buffers), tmp_path / "model", **folders)
    assert buffers.keys() <= set(report.dropped)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"connection_type": "attention"}, "connection_type='attention' is not one of 'ff', 'embedding_table'"),
        ({"encoder_backbone_type": "nvidia/NV-Embed-v2"}, "NV-Embed"),
        ({"pooling_method": "max"}, "pooling='max'"),
    ],
)
def test_unsupported_model(tmp_path, folders, research, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(write(tmp_path / "published", research, **arguments), tmp_path / "model", **folders)
    assert_nothing_left(tmp_path, "published")


def test_output_that_exists_is_untouched(tmp_path, folders, research):
    output = tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="model exists already"):
        convert(write(tmp_path / "published", research), output, **folders)
    assert_nothing_left(output, "mine.txt")
    assert_nothing_left(tmp_path, "model", "published")


class _RunsCode:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickle_is_refused_and_not_executed(tmp_path, folders, save):
    source = tmp_path / "lastest.ckpt"
    save({"model": _RunsCode(tmp_path / "executed")}, source)
    with pytest.raises(ValueError, match="is refused"):
        convert(source, tmp_path / "model", **folders)
    assert_nothing_left(tmp_path, "lastest.ckpt")


def trained_part(tensors: dict) -> dict:
    names = ("lora_", "connection_module", "output_projection")
    return {name: tensor for name, tensor in tensors.items() if any(part in name for part in names)}


def test_training_checkpoint(tmp_path, folders, research, sentences):
    tensors = add_lora(research, {"encoder": 4, "universal_learner": 4})
    convert(write(tmp_path / "published", tensors), tmp_path / "expected", **folders)
    source = tmp_path / "training"
    source.mkdir()
    torch.save({"model": trained_part(tensors), "optimizer": {}, "current_step": 3}, source / "lastest.ckpt")

    with pytest.raises(ValueError, match="set encoder"):
        convert(source, tmp_path / "model")
    with pytest.raises(ValueError, match="set lora_alpha"):
        convert(source, tmp_path / "model", **folders)
    report = convert(source, tmp_path / "model", lora_alpha=8, **folders)
    assert "llm.norm.weight" in report.from_backbones and "connector.added_tokens" not in report.from_backbones
    assert_same(embed(tmp_path / "model", sentences), embed(tmp_path / "expected", sentences), 1e-6)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("model", "expected")]
    assert weights[0].keys() == weights[1].keys()

    # With config.json beside it nothing has to be said; the adapters may stay apart.
    arguments = {
        "universal_learner_name_or_path": folders["encoder"],
        "encoder_name_or_path": folders["llm"],
        "lora_alpha": 8,
        "pooling_method": "cls",
    }
    (source / "config.json").write_text(json.dumps(arguments))
    convert(source / "lastest.ckpt", tmp_path / "kept", keep_adapters=True, pooling="mean")
    model = PeftModel.from_pretrained(LusiferModel.from_pretrained(tmp_path / "kept"), tmp_path / "kept" / "adapter")
    assert_same(model.base_model.model.encode(sentences), embed(tmp_path / "expected", sentences), 1e-4)
    convert(source, tmp_path / "cls")
    assert LusiferModel.from_pretrained(tmp_path / "cls").config.pooling == "cls"

    del (partial := trained_part(tensors))["output_projection.0.bias"]
    torch.save({"model": partial}, source / "lastest.ckpt")
    with pytest.raises(ValueError, match=r"missing.*projection\.linear_1\.bias"):
        convert(source, tmp_path / "other")
    torch.save({"state": partial}, source / "lastest.ckpt")
    with pytest.raises(ValueError, match='no tensors under "model"'):
        convert(source, tmp_path / "other")
    (source / "lastest.ckpt").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors and not exactly one \.ckpt"):
        convert(source, tmp_path / "other")
    assert_nothing_left(tmp_path, "cls", "expected", "kept", "model", "published", "training")


@needs_golden
@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize(
    "name, dropped, kept",
    [
        ("encode_qwen2_add0", "encoder.model.embed_tokens.weight", "encoder.lm_head.weight"),
        ("encode_embedding_table", "encoder.model.embed_tokens.weight", "connection_module.embedding.weight"),
    ],
)
@torch.no_grad()
def test_tied_tensors_that_are_written_once(tmp_path, name, dropped, kept, with_metadata):
    case = golden_case(name)
    tensors = load_file(case / "reference.safetensors")
    assert torch.equal(tensors.pop(dropped), tensors[kept])
    metadata = {"format": "pt", **({dropped: kept} if with_metadata else {})}
    published = write(tmp_path / "published", tensors, metadata, **constructor_arguments(case))
    convert(published, tmp_path / "model", **backbones(case))
    golden = expected_values(case)
    model = LusiferModel.from_pretrained(tmp_path / "model")
    embeddings = model(input_ids=golden["input_ids"], attention_mask=golden["attention_mask"]).pooler_output
    assert_same(embeddings, golden["reps__mean"])
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()


@needs_golden
def test_connector_table_that_was_trained_apart(tmp_path, caplog):
    case = golden_case("encode_embedding_table")
    tensors = load_file(case / "reference.safetensors")
    tensors["encoder.model.embed_tokens.weight"] += 1
    published = write(tmp_path / "published", tensors, **constructor_arguments(case))
    report = convert(published, tmp_path / "model", **backbones(case))
    assert "encoder.model.embed_tokens.weight" in report.dropped
    table = LusiferModel.from_pretrained(tmp_path / "model").llm.embed_tokens.weight
    assert_same(table, tensors["connection_module.embedding.weight"], 0)
