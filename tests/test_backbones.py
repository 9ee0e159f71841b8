"""
Contract: any encoder and any LLM by config. `from_backbones` takes the towers' weights as they are, runs them as stock
transformers does (so position ids and masks are right), and what is saved loads as the same model.
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    EAGER_ONLY,
    ENCODERS,
    LLMS,
    VOCABULARY,
    assert_distinct,
    assert_same,
    backbone_config,
    pad,
    random_texts,
    save_backbone,
    tiny_model,
    widen,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding

from lusifer_hf import LusiferConfig, LusiferModel
from lusifer_hf.modeling_lusifer import _Layout


LENGTHS = [9, 4, 17, 1, 4]
PAIRS = [(encoder, "mistral") for encoder in ENCODERS] + [("xlm-roberta", llm) for llm in LLMS if llm != "mistral"]


@pytest.fixture(params=PAIRS, ids="+".join, scope="module")
def backbones(request, tmp_path_factory, tiny_backbones):
    """A pair of saved backbones: (encoder's folder, LLM's folder, LLM's model type)."""
    encoder, llm = request.param
    folder = tmp_path_factory.mktemp(f"{encoder}-{llm}")
    folders = save_backbone(folder / "encoder", encoder), save_backbone(folder / "llm", llm)
    for target, source in zip(folders, tiny_backbones, strict=True):
        copy_tokenizer(source, target)
    return *map(str, folders), llm


def copy_tokenizer(source: Path, target: Path):
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)


def compose(backbones, **options) -> LusiferModel:
    encoder, llm, _ = backbones
    model = LusiferModel.from_backbones(encoder, llm, seed=0, **options)
    widen(model.connector)
    if model.config.projection:
        widen(model.projection)
    return model


def stock_encoder(folder):
    is_t5 = AutoConfig.from_pretrained(folder).model_type == "mt5"
    return (AutoModelForTextEncoding if is_t5 else AutoModel).from_pretrained(folder).eval()


@torch.no_grad()
def embed(model):
    return model(**pad(random_texts(LENGTHS))).pooler_output


@torch.no_grad()
def test_encoder_states_are_the_stock_ones(backbones):
    model = compose(backbones)
    stock = stock_encoder(backbones[0])
    padding = stock.config.pad_token_id
    inputs = pad(random_texts(LENGTHS), padding=0 if padding is None else padding)
    expected = stock(**inputs).last_hidden_state
    left = pad(random_texts(LENGTHS), side="left")
    for given in (inputs, left):
        states, layout = model._run_encoder(given["input_ids"], given["attention_mask"].bool())
        kept = layout.mask
        assert kept.sum(dim=1).tolist() == LENGTHS
        assert_same(states[kept], expected[inputs["attention_mask"].bool()])


@torch.no_grad()
def test_llm_states_are_the_stock_ones(backbones):
    """Of the same LLM run bidirectionally, one text at a time, by transformers alone."""
    _, llm, llm_type = backbones
    model = compose(backbones)
    config = backbone_config(llm_type, is_causal=False)
    stock = AutoModel.from_pretrained(llm, config=config, attn_implementation="eager").eval()
    for length in LENGTHS:
        states = torch.randn(1, length, 48, generator=torch.Generator().manual_seed(length))
        expected = stock(inputs_embeds=states, use_cache=False, is_causal=False).last_hidden_state
        mask = torch.ones(1, length, dtype=torch.bool)
        output = model._run_llm(states, _Layout(mask, torch.arange(length)[None]))
        assert_same(output.last_hidden_state, expected)


def test_saved_and_loaded(backbones, tmp_path):
    model = compose(backbones)
    expected = embed(model)
    assert_distinct(expected)
    model.save_pretrained(tmp_path / "first")
    loaded = LusiferModel.from_pretrained(tmp_path / "first")
    assert not loaded.training
    assert_same(embed(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModel.from_pretrained(tmp_path / "second")
    assert type(again) is LusiferModel
    assert_same(embed(again), expected)
    fields, expected_fields = again.config.to_dict(), loaded.config.to_dict()
    assert fields.pop("_name_or_path") != expected_fields.pop("_name_or_path")
    assert fields == expected_fields


def test_seed(backbones):
    encoder, llm, _ = backbones
    first, same, other = (LusiferModel.from_backbones(encoder, llm, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert_same(tensor, same[name], tolerance=0)
    changed = {name.split(".")[0] for name, tensor in first.items() if not torch.equal(tensor, other[name])}
    assert changed == {"connector", "projection"}


@pytest.mark.parametrize("connector", ["ff", "embedding_table"])
@pytest.mark.parametrize("attn_implementation", [None, "eager"])
def test_implementation_and_connector(backbones, connector, attn_implementation):
    model = compose(backbones, connector=connector, attn_implementation=attn_implementation)
    expected = "eager" if attn_implementation or backbones[2] in EAGER_ONLY else "packed"
    assert model.llm.config._attn_implementation == expected
    reference = compose(backbones, connector=connector)
    assert_distinct(embed(reference))
    assert_same(embed(model), embed(reference))


@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
def test_embedding_table_gives_the_llms_own_embeddings(llm):
    """A connector sure of a token gives what the LLM's embedding layer gives for it, Gemma's scale included."""
    model = tiny_model(llm=llm, connector="embedding_table")
    token = 7
    model.connector.vocabulary.weight.zero_()
    model.connector.vocabulary.bias.fill_(-100.0)[token] = 100.0
    embed_tokens = model.llm.get_input_embeddings()
    seen = []
    model.llm.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["inputs_embeds"]), with_kwargs=True)
    model.set_attn_implementation("eager")
    model(torch.randint(5, VOCABULARY, (1, 3)))
    assert_same(seen[0][:, :3], embed_tokens(torch.full((1, 3), token)))  # then the added token


@pytest.mark.parametrize("llm", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lm_head(tmp_path, tiny_backbones, llm, tied):
    """The first saved folder holds the LLM's LM head, tied or not; a loaded model and its folder are without."""
    encoder = save_backbone(tmp_path / "encoder", "xlm-roberta")
    decoder = save_backbone(tmp_path / "llm", llm, tie_word_embeddings=tied)
    copy_tokenizer(tiny_backbones[1], decoder)
    head = AutoModelForCausalLM.from_pretrained(decoder).get_output_embeddings().weight
    model = LusiferModel.from_backbones(str(encoder), str(decoder))
    assert (head == model.llm.get_input_embeddings().weight).all().item() == tied
    model.save_pretrained(tmp_path / "composed")
    assert_same(load_file(tmp_path / "composed" / "model.safetensors")["lm_head.weight"], head.detach(), tolerance=0)
    loaded = LusiferModel.from_pretrained(tmp_path / "composed")
    assert_same(embed(loaded), embed(model))
    loaded.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(weights) == set(model.state_dict())
    assert "llm.embed_tokens.weight" in weights


def test_no_weight_is_lost(backbones):
    """Every weight of the backbones is in the model, except poolers, the LM head and T5's decoder."""
    encoder, llm, _ = backbones
    weights = compose(backbones).state_dict()
    for prefix, tower in (("encoder", stock_encoder(encoder)), ("llm", AutoModel.from_pretrained(llm))):
        for name, tensor in tower.state_dict().items():
            if not name.startswith("pooler."):
                assert_same(weights[f"{prefix}.{name}"], tensor, tolerance=0)


def test_dtype(backbones):
    model = compose(backbones, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    half, full = embed(model).float(), embed(compose(backbones, dtype=torch.float32))
    assert torch.nn.functional.cosine_similarity(half, full).min() > 0.98


def test_config_alone_builds_the_same_architecture(backbones):
    model = compose(backbones)
    rebuilt = LusiferModel(LusiferConfig(**model.config.to_dict()))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


@pytest.mark.parametrize(("padding_id", "first"), [(1, 2), (0, 1), (5, 6)])
def test_roberta_positions_start_after_the_padding_id(padding_id, first):
    encoder = backbone_config("xlm-roberta", pad_token_id=padding_id)
    model = LusiferModel(LusiferConfig(encoder_config=encoder, llm_config=backbone_config("mistral")))
    assert model._first_position == first
    assert model.max_positions == 66 - first


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoder_without_tokenizer(tmp_path, encoder):
    """transformers makes an empty tokenizer of a folder without one, to which every text is the unknown token."""
    folders = save_backbone(tmp_path / "encoder", encoder), save_backbone(tmp_path / "llm", "mistral")
    model = LusiferModel.from_backbones(*map(str, folders))
    with pytest.raises(ValueError, match=r"Set one: model\.tokenizer = "):
        model.encode("some text")


@pytest.mark.parametrize("llm", LLMS)
def test_llm_without_tokenizer(tmp_path, tiny_backbones, llm):
    """Embedding does not need it: the model is saved without, rather than with an empty one."""
    model = LusiferModel.from_backbones(str(tiny_backbones[0]), str(save_backbone(tmp_path / "llm", llm)))
    widen(model.connector)
    widen(model.projection)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "llm_tokenizer").exists()
    loaded = LusiferModel.from_pretrained(tmp_path / "model")
    texts = ["some text", "other"]
    assert_distinct(model.encode(texts))
    assert_same(loaded.encode(texts), model.encode(texts))
