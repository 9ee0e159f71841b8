"""
P1: a saved folder embeds the same in a fresh process, offline, moved, with and without lusifer_hf installed.
P11: model.encode, sentence-transformers and mteb feed the model the same ids.

Also: what is uploaded is what is saved, and a folder whose files do not belong together is an error.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mteb
import numpy as np
import pytest
from mteb.mocks.mock_tasks import MockRetrievalTask
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

import lusifer_hf.encoding_lusifer
from lusifer_hf import LusiferModel
from lusifer_hf.composing import compose
from lusifer_hf.prompts import INSTRUCTIONS
from lusifer_hf.quickstart import SENTENCES, make_tiny_backbones


TEXTS = [text for texts in SENTENCES.values() for text in texts] + ["", " ", "</s> <pad> <s>", "a b " * 400]
FILES = {
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "configuration_lusifer.py",
    "encoding_lusifer.py",
    "llm_tokenizer",
    "model.safetensors",
    "modeling_lusifer.py",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A composed folder that was moved after it was written."""
    root = tmp_path_factory.mktemp("hub_layout")
    compose(*map(str, make_tiny_backbones(root / "backbones")), root / "composed", seed=0)
    shutil.rmtree(root / "backbones")
    return (root / "composed").rename(root / "moved")


@pytest.fixture(scope="module")
def model(folder) -> LusiferModel:
    return AutoModel.from_pretrained(folder)


def run_without_package(code: str, *arguments, cwd: Path) -> None:
    """Run code in a fresh, offline process in which lusifer_hf cannot be imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "modules")}
    command = [sys.executable, "-c", f"import sys; sys.modules['lusifer_hf'] = None\n{code}", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr[-3000:]


REMOTE_CODE = """
import builtins
import json
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

def no_question(prompt):
    raise AssertionError(f"asked: {prompt}")


builtins.input = no_question
folder, resaved, output = sys.argv[1:]
texts = json.load(open("texts.json", encoding="utf-8"))
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
stock = SentenceTransformer(folder, trust_remote_code=True)
AutoTokenizer.from_pretrained(folder)
np.savez(
    output,
    plain=model.encode(texts),
    query=model.encode_query(texts),
    document=model.encode_document(texts),
    st_plain=stock.encode(texts),
    st_query=stock.encode_query(texts),
    st_document=stock.encode_document(texts),
)
model.save_pretrained(resaved)
"""


def test_loads_as_remote_code_and_saves_itself_again(folder, model, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    run_without_package(REMOTE_CODE, folder, tmp_path / "resaved", first, cwd=tmp_path)
    (tmp_path / "resaved").rename(tmp_path / "resaved-and-moved")
    assert {path.name for path in (tmp_path / "resaved-and-moved").iterdir()} == FILES
    run_without_package(REMOTE_CODE, tmp_path / "resaved-and-moved", tmp_path / "third", second, cwd=tmp_path)

    expected = {
        "plain": model.encode(TEXTS),
        "query": model.encode_query(TEXTS),
        "document": model.encode_document(TEXTS),
    }
    assert np.abs(expected["query"] - expected["document"]).max() > 1e-3
    for path in (first, second):
        vectors = np.load(path)
        for name, reference in expected.items():
            np.testing.assert_allclose(vectors[name], reference, atol=1e-6)
            np.testing.assert_allclose(vectors[f"st_{name}"], reference, atol=1e-6)


def test_loads_after_import(folder, model):
    assert isinstance(model, LusiferModel)
    stock = SentenceTransformer(str(folder))
    np.testing.assert_allclose(stock.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(stock.encode_query(TEXTS), model.encode_query(TEXTS), atol=1e-6)
    np.testing.assert_allclose(stock.encode_document(TEXTS), model.encode_document(TEXTS), atol=1e-6)
    assert stock.get_embedding_dimension() == model.config.hidden_size
    assert stock.max_seq_length == 512
    assert AutoTokenizer.from_pretrained(folder)("</s>")["input_ids"] == model.tokenizer("</s>")["input_ids"]


def test_files(folder, tmp_path, model):
    assert {path.name for path in folder.iterdir()} == FILES
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" in weights.keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_lusifer.LusiferModel"
    assert str(folder.parent) not in (folder / "config.json").read_text() + (folder / "README.md").read_text()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    sharded = LusiferModel.from_pretrained(tmp_path / "sharded")
    np.testing.assert_array_equal(sharded.encode(TEXTS), model.encode(TEXTS))
    with safe_open(next((tmp_path / "sharded").glob("model-*-of-*")), "pt") as weights:
        assert "lm_head.weight" not in weights.keys()


def test_an_edited_card_is_kept(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "lusifer" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_push_uploads_the_saved_folder(model, tmp_path, monkeypatch, through):
    uploads = []

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr(lusifer_hf.encoding_lusifer, "HfApi", Api)
    if through == "push_to_hub":
        model.push_to_hub("me/model", token="secret", private=True)
    else:
        model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model", token="secret", private=True)
    assert uploads == [("me/model", FILES)]


def ids_seen(model, embed, monkeypatch) -> set[tuple[int, ...]]:
    """The rows of ids, without padding, that reach a model's forward."""
    seen, forward = set(), model.forward

    def record(**inputs):
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.add(tuple(row[mask.bool()].tolist()))
        return forward(**inputs)

    with monkeypatch.context() as patch:  # sentence-transformers calls `forward` itself, past any hook
        patch.setattr(model, "forward", record)
        embed()
    return seen


def test_same_ids_everywhere(folder, model, monkeypatch):
    stock = SentenceTransformer(str(folder))
    for own, theirs in (
        (model.encode, stock.encode),
        (model.encode_query, stock.encode_query),
        (model.encode_document, stock.encode_document),
    ):
        ours = ids_seen(model, lambda own=own: own(TEXTS), monkeypatch)
        assert ours == ids_seen(stock[0].model, lambda theirs=theirs: theirs(TEXTS), monkeypatch)
        assert len(ours) > 40

    task = MockRetrievalTask()
    in_mteb = ids_seen(
        stock[0].model, lambda: mteb.evaluate(stock, task, cache=None, show_progress_bar=False), monkeypatch
    )
    task.load_data()
    split = task.dataset["default"]["test"]
    queries = [row["text"] for row in split["queries"]]
    documents = [f"{row.get('title') or ''} {row['text']}".strip() for row in split["corpus"]]
    ours = ids_seen(
        model,
        lambda: (
            model.encode_query(queries, instruction=INSTRUCTIONS["Retrieval-query"]),
            model.encode_document(documents, instruction=INSTRUCTIONS["Retrieval-document"]),
        ),
        monkeypatch,
    )
    assert ours == in_mteb


def broken(folder: Path, tmp_path: Path, **fields) -> Path:
    """A copy of the folder with other values in config.json; `llm_config__x` is field x of the LLM's."""
    copy = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((copy / "config.json").read_text())
    for name, value in fields.items():
        *tower, field = name.split("__")
        (config[tower[0]] if tower else config)[field] = value
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llm_config__num_hidden_layers": 3}, r"do not fit its config.json \(missing_keys: llm.layers.2"),
        ({"llm_config__num_hidden_layers": 1}, r"do not fit its config.json \(unexpected_keys: llm.layers.1"),
        ({"projection": False}, "unexpected_keys: projection"),
        ({"encoder_config__hidden_size": 24}, "ignore_mismatched_sizes"),
        ({"num_added_tokens": 2}, "ignore_mismatched_sizes"),
        ({"num_added_tokens": -1}, "num_added_tokens=-1"),
        ({"pooling": "max"}, "pooling='max' is not one of 'mean'"),
        ({"prompt_template": "e5"}, "prompt_template='e5' is not one of 'default', 'research'"),
    ],
)
def test_config_that_does_not_fit(folder, tmp_path, fields, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        LusiferModel.from_pretrained(broken(folder, tmp_path, **fields))


def test_override_is_checked(folder):
    assert LusiferModel.from_pretrained(folder, pooling="cls").config.pooling == "cls"
    with pytest.raises(ValueError, match="pooling='max'"):
        LusiferModel.from_pretrained(folder, pooling="max")


def test_missing_or_damaged_weights(folder, tmp_path):
    copy = broken(folder, tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="broken is damaged"):
        LusiferModel.from_pretrained(copy)
    weights.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LusiferModel.from_pretrained(copy)


def test_missing_tokenizer(folder, tmp_path):
    copy = broken(folder, tmp_path)
    for path in copy.glob("tokenizer*"):
        path.unlink()
    model = LusiferModel.from_pretrained(copy)
    with pytest.raises(ValueError, match=r"No tokenizer could be loaded from .*broken.*model\.tokenizer = "):
        model.encode("text")
    model.save_pretrained(tmp_path / "saved")  # still works
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.encode("text").shape == (64,)


def test_compose_writes_all_or_nothing(folder, tmp_path):
    encoder, llm = map(str, make_tiny_backbones(tmp_path / "backbones"))
    with pytest.raises(FileExistsError, match="moved exists already"):
        compose(encoder, llm, folder)
    with pytest.raises(ValueError, match="no field poling"):
        compose(encoder, llm, tmp_path / "new", poling="cls")
    for path in Path(encoder).glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        compose(encoder, llm, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"backbones"}


def test_compose_is_reproducible(tmp_path):
    encoder, llm = map(str, make_tiny_backbones(tmp_path / "backbones"))
    first, second, other = (LusiferModel.from_backbones(encoder, llm, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.encode(TEXTS), second.encode(TEXTS))
    assert np.abs(first.encode(TEXTS) - other.encode(TEXTS)).max() > 1e-3
