"""
What the tests share: tiny models with wide weights, padded batches, the shared data folder.

Wide weights matter: with the usual initialisation (standard deviation 0.02) embeddings are of size 0.01, every text
has nearly the same one, and a comparison to 1e-5 proves nothing. Here they are of size 1, and texts differ clearly.
"""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding

from lusifer_hf import LusiferConfig, LusiferModel
from lusifer_hf.prompts import INSTRUCTIONS
from lusifer_hf.quickstart import SENTENCES, make_tiny_backbones


SHARED = Path(os.environ.get("LUSIFER_SHARED", Path(__file__).parents[2] / "shared"))
ON_CI = os.environ.get("CI", "").lower() in ("true", "1")
VOCABULARY = 96
# By model type. Grouped key/value heads wherever the family has them.
ENCODERS = {
    "xlm-roberta": {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
    "bert": {"max_position_embeddings": 64},
    "modernbert": {"max_position_embeddings": 64, "global_attn_every_n_layers": 2, "local_attention": 8},
    "eurobert": {"max_position_embeddings": 64, "num_key_value_heads": 2},
    "deberta-v2": {
        "max_position_embeddings": 64,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "type_vocab_size": 0,
    },
    "mt5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    },
}
LLMS = {
    "mistral": {"sliding_window": None},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 8},
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {},
    "phi3": {},
}
# Gemma2 needs a soft cap on its attention scores, which only eager computes on the CPU.
EAGER_ONLY = ("gemma2",)


# Set by transformers' own tests (test_modeling_common.py).
MARKERS_OF_TRANSFORMERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "run_first",
    "slow",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for marker in MARKERS_OF_TRANSFORMERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' own tests")


def backbone_config(model_type: str, **fields):
    """A tiny config of one of `ENCODERS` or `LLMS`."""
    is_encoder = model_type in ENCODERS
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32 if is_encoder else 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    if not is_encoder:
        common["num_key_value_heads"] = 2
    specific = ENCODERS.get(model_type, LLMS.get(model_type, {}))
    if model_type == "mt5":
        common = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **{**common, **specific, **fields})


@torch.no_grad()
def widen(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that shows in the embeddings, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.add_(0.1 * noise)
    return model


def tiny_model(
    encoder: str = "xlm-roberta",
    llm: str = "mistral",
    *,
    attn_implementation: str | dict | None = None,
    encoder_fields: dict | None = None,
    llm_fields: dict | None = None,
    seed: int = 0,
    **config_fields,
) -> LusiferModel:
    """A model with wide random weights, the same ones for the same fields, in eval mode."""
    config = LusiferConfig(
        encoder_config=backbone_config(encoder, **(encoder_fields or {})),
        llm_config=backbone_config(llm, **(llm_fields or {})),
        **config_fields,
    )
    config._attn_implementation = attn_implementation
    return widen(LusiferModel._from_config(config), seed).eval()


def save_backbone(folder: Path, model_type: str, seed: int = 0, **fields) -> Path:
    """A tiny pretrained backbone in a folder, without a tokenizer; LLMs come with their LM head."""
    config = backbone_config(model_type, **fields)
    if model_type in LLMS:
        auto_class = AutoModelForCausalLM
    else:
        auto_class = AutoModelForTextEncoding if model_type == "mt5" else AutoModel
    torch.manual_seed(seed)
    model = widen(auto_class.from_config(config), seed)
    model.save_pretrained(folder)
    return folder


def random_texts(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Rows of ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


def pad(rows: list[torch.Tensor], side: str = "right", extra: int = 0, padding: int = 1) -> dict[str, torch.Tensor]:
    """Rows of ids to the model's inputs, with `extra` columns of padding beyond the longest row."""
    width = max(len(row) for row in rows) + extra
    input_ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        input_ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_same(actual, expected, tolerance: float = 1e-5):
    """Equal to `tolerance` in every number."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_distinct(embeddings):
    """Embeddings of size 1 that differ from text to text: without this, an equality test proves nothing."""
    embeddings = torch.as_tensor(embeddings).float()
    assert embeddings.isfinite().all()
    assert embeddings.pow(2).mean().sqrt() > 0.2, "the embeddings are nearly zero"
    distances = torch.cdist(embeddings, embeddings) / embeddings.norm(dim=1).mean()
    distances.fill_diagonal_(torch.inf)
    assert distances.min() > 0.02, "two texts have nearly the same embedding"


def unavailable(reason: str):
    """Skip, but fail on CI, where everything must be there."""
    if ON_CI:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder with real text and reference values that stands beside the repository."""
    if not (SHARED / "data").is_dir():
        unavailable(f"No data in {SHARED}: set LUSIFER_SHARED to the folder that holds data/raw/LANG.txt.gz.")
    return SHARED


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory) -> tuple[Path, Path]:
    """The quickstart's XLM-R and Mistral with their tokenizers, made once and never written to."""
    return make_tiny_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory, tiny_backbones) -> Path:
    """A complete saved model with tokenizer and wide weights; never written to."""
    folder = tmp_path_factory.mktemp("models") / "tiny-lusifer"
    model = LusiferModel.from_backbones(*map(str, tiny_backbones), seed=0)
    widen(model.connector)
    widen(model.projection)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompted_repository(tmp_path_factory, tiny_repository) -> Path:
    """The same with the instructions of mteb's tasks, as `compose` writes it."""
    folder = tmp_path_factory.mktemp("models") / "prompted-lusifer"
    LusiferModel.from_pretrained(tiny_repository, instructions=INSTRUCTIONS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """42 sentences in 14 languages and 7 scripts."""
    return [sentence for language in SENTENCES.values() for sentence in language]


def read_lines(path: Path, count: int) -> list[str]:
    """The first lines of a gzipped text file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line, _ in zip(file, range(count), strict=False)]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of `datasets` of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_json_lines(path: Path, rows: list[dict]) -> Path:
    """One object a line, also with `.gz`; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def read_json_lines(path: Path) -> list[dict]:
    """What `write_json_lines` wrote."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in content.decode().split("\n") if line]
