"""
Contract P8: one PEFT wrapper adapts both towers. A step trains LoRA, connector and projection and nothing else; the
adapter saved, loaded on a fresh base, merged, and the merged model saved and loaded all give the same vectors;
gradient checkpointing does not change a gradient.
"""

from collections import Counter

import pytest
import torch
import transformers
from conftest import assert_distinct, assert_same, pad, random_texts, tiny_model
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from lusifer_hf import LusiferModel


ENCODER_LINEARS = r"encoder\..*\.(query|key|value|dense)"
LLM_LINEARS = r"llm\..*_proj"
LENGTHS = [9, 4, 17, 4]


def with_lora(model, seed: int = 0, **options):
    """With an adapter that has an effect: PEFT's own initialisation has none before the first step."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=f"({ENCODER_LINEARS})|({LLM_LINEARS})",
        modules_to_save=["connector", "projection"],
        init_lora_weights=False,
        **options,
    )
    return get_peft_model(model, config)


def loss_of(model) -> torch.Tensor:
    """Weighs every dimension differently, so that no gradient is zero by symmetry."""
    embeddings = model(**pad(random_texts(LENGTHS), side="left")).pooler_output
    return (embeddings * torch.linspace(-1, 2, embeddings.shape[1])).square().mean()


def train_step(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.fixture
def base(tiny_repository):
    return LusiferModel.from_pretrained(tiny_repository)


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("connector", ["ff", "embedding_table"])
def test_one_step_trains_exactly_what_is_adapted(task_type, connector):
    model = with_lora(tiny_model(connector=connector), task_type=task_type)
    expected = {name for name, _ in model.named_parameters() if "lora_" in name or ".modules_to_save.default." in name}
    linears = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(linears) == 2 * (3 + 1 + 2) + 2 * 7  # per layer: XLM-R's attention and feed-forward, Mistral's
    assert any("added_tokens" in name for name in expected)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_step(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == expected


def test_adapter_has_an_effect_and_can_be_switched_off(base, sentences):
    expected = base.encode(sentences)
    assert_distinct(expected)
    model = with_lora(base)
    train_step(model)
    assert abs(model.encode(sentences) - expected).max() > 0.01
    with model.disable_adapter():
        assert_same(model.encode(sentences), expected)


def test_every_way_to_load_gives_the_same_vectors(base, tiny_repository, tmp_path, sentences):
    model = with_lora(base)
    train_step(model)
    expected = model.encode(sentences)
    assert_distinct(expected)
    model.save_pretrained(tmp_path / "adapter")

    fresh = PeftModel.from_pretrained(LusiferModel.from_pretrained(tiny_repository), tmp_path / "adapter")
    assert_same(fresh.encode(sentences), expected)
    assert abs(LusiferModel.from_pretrained(tiny_repository).encode(sentences) - expected).max() > 0.01

    if Version(transformers.__version__) >= Version("5.23"):
        by_transformers = AutoModel.from_pretrained(tmp_path / "adapter")
        assert isinstance(by_transformers, LusiferModel)
        assert_same(by_transformers.encode(sentences), expected)
    else:  # it leaves the modules_to_save out
        with pytest.raises(ValueError, match="do not fit"):
            AutoModel.from_pretrained(tmp_path / "adapter")

    merged = fresh.merge_and_unload()
    assert type(merged) is LusiferModel
    assert not [name for name in merged.state_dict() if "lora_" in name or "modules_to_save" in name]
    assert_same(merged.encode(sentences), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(LusiferModel.from_pretrained(tmp_path / "merged").encode(sentences), expected)


def test_adapter_file_holds_no_frozen_weight(base, tmp_path):
    model = with_lora(base)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {name: "lora_" in name or ".connector." in name or ".projection." in name for name in weights}
    assert all(kinds.values()), [name for name, is_trained in kinds.items() if not is_trained]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(tensor.numel() for tensor in weights.values()) == trained
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_encode_on_the_wrapper(base, sentences):
    model = with_lora(base)
    expected = model.base_model.model.encode(sentences)
    assert_same(model.encode(sentences), expected)
    assert_same(model.encode_query(sentences[:2], "Find it:"), base.encode_query(sentences[:2], "Find it:"))
    inputs = base.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert_same(model.eval()(**inputs).pooler_output, expected)
        assert_same(model(**inputs, return_dict=False)[1], expected)


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)  # dropout
    loss_of(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-4, f"{name}: {difference}"


@pytest.mark.parametrize("attn_implementation", [None, "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(attn_implementation, dropout):
    model = with_lora(
        tiny_model(
            attn_implementation=attn_implementation,
            encoder_fields={"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout},
            llm_fields={"attention_dropout": dropout},
        ),
        lora_dropout=dropout,
    ).train()
    expected = gradients(model)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())

    calls = []
    for attention in (model.encoder.encoder.layer[0].attention, model.llm.layers[0].self_attn):
        attention.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = gradients(model)
    # Once forward and once again for the backward pass.
    assert Counter(calls) == {"XLMRobertaAttention": 2, "MistralAttention": 2}
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_packed_gradients_are_the_padded_ones(attn_implementation):
    packed, padded = (
        gradients(with_lora(tiny_model(attn_implementation=name)).eval()) for name in (None, attn_implementation)
    )
    assert_same_gradients(packed, padded)
