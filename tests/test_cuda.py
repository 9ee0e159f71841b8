"""
P3 on CUDA: packed attention (`varlen_attn` in half precision, SDPA otherwise) equals the padded implementations, also
with the hidden keys and the prefixes of the alignment stage.
"""

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig

from lusifer_hf import LusiferForAlignment, LusiferModel
from lusifer_hf.composing import compose
from lusifer_hf.quickstart import SENTENCES, make_tiny_backbones


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
TEXTS = [text for texts in SENTENCES.values() for text in texts] + ["", "word " * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cuda")
    compose(*map(str, make_tiny_backbones(root / "backbones")), root / "model", seed=0, initializer_range=0.2)
    return root / "model"


def load(folder, dtype, implementation=None, **options) -> LusiferModel:
    return LusiferModel.from_pretrained(
        folder, dtype=dtype, attn_implementation=implementation, device_map="cuda", **options
    )


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(((left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)).min())


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_equals_padded(folder, implementation, window):
    expected = load(folder, torch.float32, implementation)
    packed = load(folder, torch.float32)
    half = load(folder, torch.bfloat16)
    for model in (expected, packed, half):
        model.llm.config.sliding_window = window
    assert packed.llm.config._attn_implementation == half.llm.config._attn_implementation == "packed"
    vectors = expected.encode(TEXTS)
    np.testing.assert_allclose(packed.encode(TEXTS), vectors, atol=1e-4, rtol=1e-4)
    assert cosine(half.encode(TEXTS), vectors) > 0.99


def test_head_size_that_the_kernel_cannot_take(folder):
    config = LusiferModel.from_pretrained(folder).config
    config.encoder_config.num_attention_heads = 4  # of 12
    model = LusiferModel(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(5, 100, (3, 20), device="cuda")
    vectors = model(ids).pooler_output.float().detach()
    model.set_attn_implementation("sdpa")
    assert cosine(model(ids).pooler_output.float().detach().cpu().numpy(), vectors.cpu().numpy()) > 0.99


def test_vectors_do_not_depend_on_the_batch(folder):
    model = load(folder, torch.bfloat16)
    alone = np.stack([model.encode(text) for text in TEXTS])
    assert cosine(alone, model.encode(TEXTS)) > 0.999
    assert cosine(model.encode(TEXTS, compile_layers=True), alone) > 0.999


def test_training_honours_attention_dropout(folder):
    model = load(folder, torch.bfloat16).train()
    batch = model.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt").to("cuda")
    first, second = (model(**batch).pooler_output for _ in range(2))
    assert not torch.equal(first, second)
    first.float().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.connector.parameters())


def test_four_bit_weights(folder):
    bnb = pytest.importorskip("bitsandbytes")
    quantized = load(folder, torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    # Against the rounded weights: four bits change such a small random model a lot.
    rounded = load(folder, torch.bfloat16)
    for name, layer in quantized.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            rounded.get_submodule(name).weight.data = weight.to(torch.bfloat16)
    assert cosine(quantized.encode(TEXTS), rounded.encode(TEXTS)) > 0.99


@pytest.mark.parametrize("attention", ["bidirectional", "prefix_lm"])
def test_alignment_packed_equals_padded(folder, attention):
    tokenizer = LusiferModel.from_pretrained(folder).tokenizer
    batch = dict(tokenizer(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt").to("cuda"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (len(TEXTS), 30), generator=generator)
    ids[::2, 0] = 1  # BOS
    lengths = torch.randint(5, 31, (len(TEXTS), 1), generator=generator)
    mask = torch.arange(30) < lengths
    batch["llm_input_ids"], batch["labels"] = ids.cuda(), ids.masked_fill(~mask, -100).cuda()
    hidden = torch.rand(mask.shape, generator=generator) < 0.5
    batch["llm_attention_mask"] = (mask & ~hidden if attention == "bidirectional" else mask).long().cuda()
    losses, gradients = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        for implementation in ("sdpa", None):
            model = LusiferForAlignment.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=implementation,
                alignment_attention=attention,
                device_map="cuda",
            ).eval()
            loss = model(**batch).loss
            loss.backward()
            losses[dtype, implementation] = loss.item()
            gradients[dtype, implementation] = model.model.connector.mlp.linear_1.weight.grad.float()
    expected = losses[torch.float32, "sdpa"], gradients[torch.float32, "sdpa"]
    for (dtype, _), loss in losses.items():
        assert loss == pytest.approx(expected[0], rel=1e-4 if dtype == torch.float32 else 2e-2)
    for (dtype, _), gradient in gradients.items():
        similarity = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[1].flatten(), dim=0)
        assert similarity > (0.9999 if dtype == torch.float32 else 0.98)
