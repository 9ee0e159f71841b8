"""
The contract of `mine`:

- the negatives are those of sentence-transformers' `mine_hard_negatives` with the same options;
- none has the words or the id of its query or of a positive; what a row had stays;
- a run that is interrupted goes on without embedding finished shards again, to the same bytes;
- two processes write what one does (and so for `cluster`);
- past a certain size an approximate search finds nearly the same documents;
- what cannot be mined is an error that names the place, and leaves nothing at the output.
"""

import inspect
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import read_json_lines, widen, write_json_lines
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

from lusifer_hf import LusiferModel
from lusifer_hf.data.prepare import embedding, mining
from lusifer_hf.data.prepare.clustering import cluster
from lusifer_hf.data.prepare.mining import mine


pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).parents[1]
WINDOW = {"range_min": 2, "range_max": 9, "num_negatives": 4}


@pytest.fixture(scope="module")
def rows(sentences) -> list[dict]:
    """Half of the sentences are queries, the other half their positives, and so all documents."""
    half = len(sentences) // 2
    return [{"query": sentences[index], "positive": [sentences[half + index]]} for index in range(half)]


@pytest.fixture
def data(tmp_path, rows) -> Path:
    return write_json_lines(tmp_path / "data" / "x.jsonl", rows)


@pytest.fixture(scope="module")
def sentence_transformer(tmp_path_factory, tiny_backbones) -> str:
    """A model that is not ours, with prompts of its own."""
    encoder = Transformer(str(tiny_backbones[0]))
    prompts = {"query": "question: ", "document": "passage: "}
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], prompts=prompts)
    folder = tmp_path_factory.mktemp("models") / "sentence-transformer"
    model.save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory, tiny_backbones) -> str:
    config = XLMRobertaConfig.from_pretrained(tiny_backbones[0], num_labels=1)
    folder = tmp_path_factory.mktemp("models") / "cross-encoder"
    widen(XLMRobertaForSequenceClassification(config)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_backbones[0]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small_shards(monkeypatch):
    for module in (embedding, mining):
        monkeypatch.setattr(module, "SHARD_TEXTS", 8)


def negatives(path: Path) -> dict[str, list[str]]:
    return {row["query"]: row["negative"] for row in read_json_lines(path / "x.jsonl")}


def test_defaults_are_the_research_settings(shared_folder):
    recipe = json.loads((shared_folder / "facts" / "recipe.json").read_text())["hard_negatives"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(mine).parameters.items()}
    assert (defaults["range_min"], defaults["range_max"]) == (recipe["skip_first"], recipe["top_k"])


@pytest.mark.parametrize("options", [{}, {"relative_margin": 0.01}, {"absolute_margin": 0.002}], ids=str)
@pytest.mark.parametrize("rescored", [False, True], ids=["cosine", "cross-encoder"])
def test_as_sentence_transformers(tmp_path, data, rows, sentence_transformer, cross_encoder, rescored, options):
    if rescored and not options:
        options = {"absolute_margin": -100.0}  # there it scores again for margins only
    options = {"sampling_strategy": "top", **WINDOW, **options}
    extra = {"cross_encoder": cross_encoder} if rescored else {}
    mine([data], tmp_path / "out", model=sentence_transformer, **options, **extra)

    columns = {"query": [row["query"] for row in rows], "positive": [row["positive"][0] for row in rows]}
    extra = {"cross_encoder": CrossEncoder(cross_encoder, device="cpu")} if rescored else {}
    expected = mine_hard_negatives(
        Dataset.from_dict(columns),
        SentenceTransformer(sentence_transformer, device="cpu"),
        output_format="labeled-list",
        verbose=False,
        **options,
        **extra,
    )
    expected = {row["query"]: row["positive"][1:] for row in expected}
    assert len(expected) > 4 and len({tuple(texts) for texts in expected.values()}) > 4
    assert negatives(tmp_path / "out") == expected


def test_prompts(sentence_transformer, tiny_repository):
    model = SentenceTransformer(sentence_transformer, device="cpu")
    given = embedding.load_encoders(sentence_transformer, "Which? ", "Text: ")
    for encode, prompt in zip(
        [*embedding.load_encoders(sentence_transformer), *given],
        ["question: ", "passage: ", "Which? ", "Text: "],
        strict=True,
    ):
        np.testing.assert_allclose(
            encode(["bread"])[0], model.encode(prompt + "bread", normalize_embeddings=True), atol=1e-5
        )
    with pytest.raises(ValueError, match=r"document_prompt='Text: '.*its own template"):
        embedding.load_encoders(str(tiny_repository), "Find:", "Text: ")


def test_negatives_are_drawn_from_the_window(tmp_path, data, rows, tiny_repository):
    model = LusiferModel.from_pretrained(tiny_repository)
    options = {"instruction": "Find:", "normalize": True, "show_progress_bar": False}
    documents = [row["positive"][0] for row in rows]
    queries = model.encode_query([row["query"] for row in rows], **options)
    ranks = np.argsort(-queries @ model.encode_document(documents, **options).T, axis=1)

    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        output = tmp_path / str(number)
        mine([data], output, model=str(tiny_repository), instruction="Find:", seed=seed, **WINDOW)
        drawn.append(negatives(output))
        for index, texts in enumerate(drawn[-1].values()):
            window = [documents[rank] for rank in ranks[index] if rank != index][2:9]
            assert texts == [text for text in window if text in texts] and len(texts) == 4
    assert drawn[0] == drawn[1] != drawn[2]
    everything = {text for texts in drawn[0].values() for text in texts}
    assert len(everything) > len(documents) // 2
    (entry,) = json.loads((tmp_path / "0" / "manifest.json").read_text())
    assert entry["parameters"]["range_max"] == 9 and entry["parameters"]["seed"] == 0
    assert entry["data"]["x"] == {"rows_in": len(rows), "rows_out": len(rows), "dropped": {}}
    assert {str(data), str(tiny_repository)} == set(entry["inputs"])


def test_no_false_negatives(tmp_path, tiny_repository):
    corpus = [
        {"_id": "bread", "text": "Bake the bread for an hour."},
        {"_id": "copy", "title": "Bake", "text": "the BREAD for an hour"},  # the same words
        {"_id": "query", "text": "How long does bread bake?"},
        {"_id": "old", "text": "A loaf weighs a kilogram."},
        *({"_id": f"other{index}", "text": f"Text number {index}."} for index in range(3)),
    ]
    documents = write_json_lines(tmp_path / "corpus.jsonl", corpus)
    texts = {record["_id"]: f"{record.get('title', '')} {record['text']}".strip() for record in corpus}
    rows = [
        {"id": "by text", "query": "How long does bread bake?", "positive": ["Bake the bread for an hour."]},
        # Only the id says that this is the corpus' document.
        {"id": "by id", "query": "Bread?", "positive": ["Bake it."], "positive_id": ["bread"]},
        {"id": "had", "query": "Weight?", "positive": [texts["bread"]], "negative": [texts["old"], "My own one."]},
        {"id": "full", "query": "Full?", "positive": [texts["bread"]], "negative": [str(index) for index in range(6)]},
    ]
    data = write_json_lines(tmp_path / "x.jsonl", rows)
    options = {"corpus": [documents], "range_min": 0, "num_negatives": 6}
    mine([data], tmp_path / "out", model=str(tiny_repository), **options)
    mined = {row["id"]: row for row in read_json_lines(tmp_path / "out" / "x.jsonl")}
    others = [f"other{index}" for index in range(3)]
    assert sorted(mined["by text"]["negative_id"]) == ["old", *others]
    assert sorted(mined["by id"]["negative_id"]) == ["old", *others, "query"]
    assert [texts[name] for name in mined["by id"]["negative_id"]] == mined["by id"]["negative"]
    had = mined["had"]
    assert had["negative"][:2] == rows[2]["negative"] and not had["negative_id"]  # nobody knows the ids of these
    assert sorted(had["negative"][2:]) == sorted(texts[name] for name in ("query", *others))
    assert mined["full"]["negative"] == rows[3]["negative"]


def test_rows_without_negatives_go(tmp_path, data, rows, tiny_repository):
    own = write_json_lines(tmp_path / "own.jsonl", [rows[0] | {"negative": ["Its own one."]}, *rows[1:]])
    mine([data, own], tmp_path / "out", model=str(tiny_repository), absolute_margin=3.0, **WINDOW)
    assert not negatives(tmp_path / "out")
    (left,) = read_json_lines(tmp_path / "out" / "own.jsonl")
    assert left == rows[0] | {"negative": ["Its own one."]}
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())[-1]["data"]
    assert counts["x"] == {"rows_in": 21, "rows_out": 0, "dropped": {"no negative": 21}}
    assert counts["own"] == {"rows_in": 21, "rows_out": 1, "dropped": {"no negative": 20}}


class Killed(BaseException):
    """Nothing catches it."""


def test_interrupted_run_goes_on(tmp_path, data, tiny_repository, small_shards, monkeypatch):
    mine([data], tmp_path / "expected", model=str(tiny_repository), **WINDOW)
    calls, left, load = [], [4], mining.load_encoders

    def load_counted(*args):
        def count(encode, texts):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            calls.append(texts[0])
            return encode(texts)

        return [lambda texts, encode=encode: count(encode, texts) for encode in load(*args)]

    monkeypatch.setattr(mining, "load_encoders", load_counted)
    with pytest.raises(Killed):
        mine([data], tmp_path / "out", model=str(tiny_repository), **WINDOW)
    assert len(calls) == 4 and not (tmp_path / "out").exists()
    left[0] = 100
    mine([data], tmp_path / "out", model=str(tiny_repository), **WINDOW)
    assert len(calls) == len(set(calls)) == 6  # 21 documents and 21 queries by 8, none twice
    name = "x.jsonl"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()

    # A model on the Hub can change between the two runs; a folder's files are compared.
    left[0] = 2
    with pytest.raises(Killed):
        mine([data], tmp_path / "other", model=str(tiny_repository), **WINDOW)
    encoders = load(str(tiny_repository))
    shorter = [lambda texts, encode=encode: encode(texts)[:, :7] for encode in encoders]
    monkeypatch.setattr(mining, "load_encoders", lambda *args: shorter)
    with pytest.raises(ValueError, match=r"differ in their number of dimensions.*has 64, .*has 7.*Remove"):
        mine([data], tmp_path / "other", model=str(tiny_repository), **WINDOW)
    assert not (tmp_path / "other").exists()


# Mines and clusters with shards of few texts, and notes how many this process has embedded.
WORKER = """
import os
import sys
from lusifer_hf.data.prepare import clustering, embedding, mining

data, output, model = sys.argv[1:]
embedding.SHARD_TEXTS = mining.SHARD_TEXTS = 8
embedded = []

def load(*args, **kwargs):
    encoders = embedding.load_encoders(*args, **kwargs)
    return [lambda texts, encode=encode: (embedded.append(len(texts)), encode(texts))[1] for encode in encoders]

mining.load_encoders = clustering.load_encoders = load
mining.mine([data], f"{output}/mined", model=model, range_min=2, range_max=9, num_negatives=4)
clustering.cluster([f"{output}/mined/x.jsonl"], f"{output}/clustered", model=model, clusters=3, min_cluster_size=2)
# Not printed: the lines of two processes can run into each other.
with open(f"{output}/embedded{os.environ['RANK']}", "w") as file:
    file.write(str(sum(embedded)))
"""


def test_two_processes_are_one(tmp_path, data, tiny_repository, small_shards):
    alone, together = tmp_path / "alone", tmp_path / "together"
    mine([data], alone / "mined", model=str(tiny_repository), **WINDOW)
    cluster(
        [alone / "mined" / "x.jsonl"], alone / "clustered", model=str(tiny_repository), clusters=3, min_cluster_size=2
    )
    together.mkdir()
    script = together / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={ROOT}/configs/accelerate/ddp.yaml"]
    launch += ["--num_processes=2", f"--main_process_port={random.randint(20_000, 60_000)}"]
    finished = subprocess.run(
        [*launch, str(script), str(data), str(together), str(tiny_repository)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    shares = [int((together / f"embedded{rank}").read_text()) for rank in range(2)]
    # 21 documents, 21 queries, and the queries again for the clusters.
    assert sum(shares) == 63 and min(shares) > 10
    for step in ("mined", "clustered"):
        assert (together / step / "x.jsonl").read_bytes() == (alone / step / "x.jsonl").read_bytes()


def test_approximate_search_finds_most(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, 24))
    vectors = (centres[rng.integers(300, size=30_000)] + 0.5 * rng.normal(size=(30_000, 24))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    paths = [tmp_path / f"{start}.npy" for start in range(0, len(vectors), embedding.SHARD_TEXTS)]
    for index, path in enumerate(paths):
        np.save(path, vectors[index * embedding.SHARD_TEXTS : (index + 1) * embedding.SHARD_TEXTS])
    queries = vectors[:200]
    scores, exact = mining.build_index(paths).search(queries, 20)
    np.testing.assert_array_equal(exact[:, 0], np.arange(200))
    monkeypatch.setattr(mining, "EXACT_DOCUMENTS", 10_000)
    found_scores, found = mining.build_index(paths).search(queries, 20)
    shared = [len(set(row) & set(other)) for row, other in zip(exact, found, strict=True)]
    assert np.mean(shared) / 20 > 0.95
    np.testing.assert_allclose(found_scores[:, 0], scores[:, 0], atol=2e-3)  # float16


def test_what_cannot_be_mined(tmp_path, data, rows, tiny_repository):
    corpus = write_json_lines(
        tmp_path / "corpus.jsonl", [{"_id": str(i), "text": row["positive"][0]} for i, row in enumerate(rows[1:])]
    )
    twice = write_json_lines(tmp_path / "twice.jsonl", [{"_id": "7", "text": text} for text in ("a", "b")])
    by_id = write_json_lines(tmp_path / "by_id.jsonl", [{"query": "a", "positive": ["b"], "positive_id": ["z"]}])
    empty = write_json_lines(tmp_path / "empty.jsonl", [*rows, {"query": "a", "positive": []}])
    for inputs, options, error, message in [
        ([data], {"range_min": 9, "range_max": 9}, ValueError, "range_min=9 and range_max=9 are no window"),
        ([data], {"range_min": -1}, ValueError, "range_min=-1"),
        ([data], {"num_negatives": 0}, ValueError, "num_negatives=0 must be 1 or more"),
        ([data], {"sampling_strategy": "best"}, ValueError, "'best' is not one of"),
        ([data], {"range_min": 30, "range_max": 128}, ValueError, "x has 21 documents.*lower range_min"),
        ([data], {"corpus": [corpus]}, ValueError, r"x, row 0 \(from 0\): the positive 'يغادر.* is not in the corpus"),
        ([by_id], {"corpus": [corpus]}, ValueError, r"by_id, row 0 \(from 0\): the positive 'b' is not in the corpus"),
        ([data], {"corpus": [twice]}, ValueError, "has the id '7' 2 times"),
        ([data], {"corpus": [tmp_path / "none.jsonl"]}, FileNotFoundError, "none.jsonl does not exist"),
        ([data], {"model": str(tmp_path / "none")}, OSError, "none"),
        ([empty], {}, ValueError, r"empty, row 21 \(from 0\) lacks a query or a positive"),
        ([tmp_path / "none.jsonl"], {}, FileNotFoundError, "none.jsonl does not exist"),
    ]:
        with pytest.raises(error, match=message):
            mine(inputs, tmp_path / "out", **{"model": str(tiny_repository), **WINDOW, **options})
        assert not (tmp_path / "out").exists()
