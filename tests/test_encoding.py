"""
`encode` embeds what it is given, in order and whole, or says which text or argument is wrong before it starts.
"""

import copy

import numpy as np
import pytest
import torch

from lusifer_hf import LusiferModel
from lusifer_hf.quickstart import SENTENCES, make_tiny_backbones


TEXTS = [text for texts in SENTENCES.values() for text in texts]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LusiferModel:
    encoder, llm = make_tiny_backbones(tmp_path_factory.mktemp("backbones"))
    return LusiferModel.from_backbones(str(encoder), str(llm), seed=0)


def test_shapes_and_types(model):
    vectors = model.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 64) and vectors.dtype == np.float32
    assert model.encode([]).shape == (0, 64)
    assert model.encode(TEXTS[0]).shape == (64,)
    np.testing.assert_allclose(model.encode(TEXTS[0]), vectors[0], atol=1e-6)
    tensor = model.encode(TEXTS, convert_to="torch")
    assert tensor.dtype == torch.float32 and torch.equal(tensor, torch.from_numpy(vectors))
    np.testing.assert_array_equal(model.encode(tuple(TEXTS)), vectors)
    np.testing.assert_array_equal(model.encode(np.array(TEXTS)), vectors)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 5}, {"max_tokens_per_batch": 1}])
def test_order_does_not_depend_on_batches(model, monkeypatch, options):
    expected = model.encode(TEXTS)
    assert np.linalg.norm(expected[0] - expected[1]) > 1e-2
    np.testing.assert_allclose(model.encode(TEXTS, **options), expected, atol=1e-6)
    monkeypatch.setattr("lusifer_hf.encoding_lusifer.WINDOW_TEXTS", 4)
    np.testing.assert_allclose(model.encode(TEXTS, **options), expected, atol=1e-6)
    monkeypatch.setattr("lusifer_hf.encoding_lusifer.WINDOW_CHARACTERS", 60)
    np.testing.assert_allclose(model.encode(TEXTS, **options), expected, atol=1e-6)


def test_prompts(model):
    default = "Given a web search query, retrieve relevant passages that answer the query:"
    plain = model.encode([f"{default}\n{text}" for text in TEXTS])
    np.testing.assert_allclose(model.encode_query(TEXTS), plain, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS, prompt_name="query"), plain, atol=1e-6)
    own = model.encode([f"Find it. Candidate:\n{text}" for text in TEXTS])
    np.testing.assert_allclose(model.encode_document(TEXTS, instruction="Find it."), own, atol=1e-6)
    own = model.encode([f"Find it.\n{text}" for text in TEXTS])
    np.testing.assert_allclose(model.encode(TEXTS, instruction="Find it."), own, atol=1e-6)
    np.testing.assert_allclose(model.encode("", instruction="Find it."), model.encode("Find it.\n"), atol=1e-6)


def test_normalize_and_truncate(model):
    vectors = model.encode(TEXTS)
    short = model.encode(TEXTS, truncate_dim=16)
    np.testing.assert_allclose(short, vectors[:, :16], atol=1e-6)
    unit = model.encode(TEXTS, truncate_dim=16, normalize=True)
    np.testing.assert_allclose(unit, short / np.linalg.norm(short, axis=1, keepdims=True), atol=1e-6)


def test_unusual_texts(model):
    long = "na " * 33_333  # 100,000 characters
    ids = model.tokenizer(long, truncation=True, max_length=512)["input_ids"]
    assert len(ids) == 512 and ids[-1] == model.tokenizer.eos_token_id  # cut, but still ended
    vectors = model.encode(["", " ", "\n\t", long, "</s>", "a </s> b"])
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[4] - vectors[0]).max() > 1e-3
    for token in ("<s>", "</s>", "<pad>"):
        text_ids = model.tokenizer(f"a {token} b", add_special_tokens=False)["input_ids"]
        assert model.tokenizer.convert_tokens_to_ids(token) not in text_ids


@pytest.mark.parametrize(
    ("sentences", "error", "message"),
    [
        (["a", None], TypeError, "Text 1 is None of type NoneType"),
        (["a", "b", 3.5], TypeError, "Text 2 is 3.5 of type float"),
        ([b"a"], TypeError, "Text 0 is b'a' of type bytes"),
        (["a", "b\ud800c"], ValueError, r"Text 1 holds a lone surrogate, U\+D800 at character 1"),
    ],
)
def test_bad_texts(model, sentences, error, message, monkeypatch):
    monkeypatch.setattr(model, "forward", None)  # nothing is embedded
    with pytest.raises(error, match=message):
        model.encode(sentences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": "passage"}, "prompt_name='passage' is not one of 'query', 'document'"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"batch_size": -3}, "batch_size=-3 must be 1 or more"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0 must be"),
        ({"max_length": 0}, "max_length=0 must be"),
        ({"max_length": 2}, "max_length=2 leaves no room for text beside 2 tokens"),
        ({"max_length": 8, "prompt_name": "query"}, "max_length=8 leaves no room for text beside"),
        ({"truncate_dim": 65}, r"truncate_dim=65 is larger than the embedding \(64\)"),
        ({"truncate_dim": 0}, "truncate_dim=0 must be"),
        ({"convert_to": "list"}, "convert_to='list' is not one of 'numpy', 'torch'"),
        ({"instruction": "x\udfff"}, "The instruction holds a lone surrogate"),
    ],
)
def test_bad_arguments(model, options, message, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=message):
        model.encode(TEXTS, **options)


def test_forward_refuses_what_it_cannot_embed(model):
    ids = torch.tensor([[0, 5, 6, 2], [0, 5, 6, 2]])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="Row 1 has no token"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="A row of 600 tokens is longer than the 512 positions"):
        model(torch.full((1, 600), 5))
    padded = torch.nn.functional.pad(ids, (0, 600), value=1)  # padding beyond the limit is harmless
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 600))
    torch.testing.assert_close(model(padded, mask).pooler_output, model(ids).pooler_output, atol=1e-6, rtol=0)


def test_training_mode_is_restored_and_dropout_is_off(model):
    model.train()
    model.encoder.eval()  # frozen, say
    try:
        vectors = model.encode(TEXTS, convert_to="torch")
        assert torch.equal(model.encode(TEXTS, convert_to="torch"), vectors)
        assert model.training and model.llm.training and not model.encoder.training
    finally:
        model.eval()
    weight = torch.ones(64, requires_grad=True)
    (vectors * weight).sum().backward()  # no inference tensor
    torch.testing.assert_close(weight.grad, vectors.sum(dim=0))


def test_length_is_capped_once(model, caplog):
    for _ in range(2):
        np.testing.assert_array_equal(model.encode(TEXTS[0], max_length=9999), model.encode(TEXTS[0]))
    message = "max_length=9999 is cut to the 512 tokens that the model has positions for."
    assert [record.getMessage() for record in caplog.records].count(message) == 1


def test_no_instruction_is_no_prompt(model):
    assert model.config.prompt("query", "") == model.config.prompt("document", "") == ""
    assert model.config.prompt("query") == f"{model.config.default_instruction}\n"
    research = copy.deepcopy(model.config)
    research.prompt_template = "research"
    assert research.prompt("query", "") == ".\n"  # as the published code has it
