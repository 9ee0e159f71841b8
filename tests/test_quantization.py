"""
Contract: transformers' loading options reach both towers. Int8 weights (torchao) embed nearly as float32 does,
bfloat16 and device_map load the same model, and `encode` returns float32 whatever the weights are.
"""

import numpy as np
import pytest
import torch
from conftest import assert_distinct, assert_same

from lusifer_hf import LusiferModel


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


@pytest.fixture(scope="module")
def expected(tiny_repository, sentences):
    embeddings = LusiferModel.from_pretrained(tiny_repository).encode(sentences)
    assert_distinct(embeddings)
    return embeddings


@pytest.fixture(params=[None, "sdpa", "eager"], ids=str)
def attn_implementation(request):
    return request.param


def test_int8_weights(tiny_repository, sentences, expected, attn_implementation):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = LusiferModel.from_pretrained(
        tiny_repository,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        attn_implementation=attn_implementation,
    )
    for linear in (model.encoder.encoder.layer[0].output.dense, model.llm.layers[-1].mlp.down_proj):
        assert type(linear.weight) not in (torch.nn.Parameter, torch.Tensor)
    embeddings = model.encode(sentences)
    assert embeddings.dtype == np.float32
    assert cosine(embeddings, expected).min() > 0.99
    assert np.abs(embeddings - expected).max() > 1e-4  # quantized indeed


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, torch.float16], ids=str)
def test_dtype(tiny_repository, sentences, expected, attn_implementation, dtype):
    model = LusiferModel.from_pretrained(tiny_repository, dtype=dtype, attn_implementation=attn_implementation)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    embeddings = model.encode(sentences)
    assert embeddings.dtype == np.float32
    assert cosine(embeddings, expected).min() > 0.98


def test_half_precision_batches(tiny_repository, sentences):
    """A vector depends on its batch by rounding only."""
    model = LusiferModel.from_pretrained(tiny_repository, dtype="bfloat16")
    assert cosine(model.encode(sentences, batch_size=1), model.encode(sentences)).min() > 0.995


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_device_map(tiny_repository, sentences, expected, device_map):
    model = LusiferModel.from_pretrained(tiny_repository, device_map=device_map)
    assert model.device.type == "cpu"
    assert_same(model.encode(sentences), expected)


def test_saved_in_half_precision(tiny_repository, sentences, tmp_path):
    model = LusiferModel.from_pretrained(tiny_repository, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    loaded = LusiferModel.from_pretrained(tmp_path)  # "auto" is transformers' default
    assert loaded.dtype == torch.bfloat16
    assert_same(loaded.encode(sentences), model.encode(sentences))


def test_autocast(tiny_repository, sentences, expected):
    model = LusiferModel.from_pretrained(tiny_repository)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = model.encode(sentences)
    assert embeddings.dtype == np.float32
    assert cosine(embeddings, expected).min() > 0.98


def test_parts_on_disk(tiny_repository, sentences, tmp_path):
    """The connector's raw parameter too is there when it is needed, whoever holds the weights."""
    places = {"encoder": "cpu", "connector": "disk", "llm": "disk", "projection": "cpu"}
    model = LusiferModel.from_pretrained(tiny_repository, device_map=places, offload_folder=tmp_path)
    assert model.connector.added_tokens.is_meta
    assert_same(model.encode(sentences), LusiferModel.from_pretrained(tiny_repository).encode(sentences))
