"""
The contract of the evaluation while training:

- nDCG@10, bitext F1 and accuracy, and classification accuracy are what mteb computes from the same embeddings;
- the embeddings are those of `model.encode` with the same prompts, whatever the batches, with adapters, in training
  mode and under DDP and FSDP2 in two processes, where every process runs equally many forward passes and returns the
  same scores as one process;
- training modes, gradients and random numbers are left as they were;
- `max_samples` keeps the same rows every time, and of a retrieval set every judged document of a kept query;
- bad files are errors before training, which name the file, the line and the field.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import assert_distinct, assert_same
from peft import LoraConfig, get_peft_model

from lusifer_hf import LusiferModel
from lusifer_hf.quickstart import SENTENCES
from lusifer_hf.training import evaluation
from lusifer_hf.training.evaluation import EvalSource, evaluate_sources, load_eval_sources


DOCUMENTS = [sentence for sentences in SENTENCES.values() for sentence in sentences]
MAX_TOKENS = 200  # some batches of each group


def write_retrieval(folder: Path, queries: list[str], documents: list[str], qrels: list[tuple[int, int, int]]) -> Path:
    folder.mkdir(parents=True)
    for name, letter, texts in (("corpus", "d", documents), ("queries", "q", queries)):
        rows = [{"_id": f"{letter}{index}", "title": "", "text": text} for index, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{query}\td{document}\t{score}" for query, document, score in qrels]
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def write_tsv(path: Path, header: str, rows: list[tuple[str, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return path


def write_sources(folder: Path) -> list[EvalSource]:
    """One set of each kind from the quickstart's sentences in 14 languages."""
    queries = [sentence.split()[-1] + " " + sentence.split()[0] for sentence in DOCUMENTS]
    qrels = [(index, index, 2) for index in range(len(queries))] + [(index, index - 1, 1) for index in range(1, 9)]
    pairs = [("7", *pair) for pair in zip(DOCUMENTS[3:], DOCUMENTS[:-3], strict=True)]
    rows = [("train" if i % 2 else "test", f"label {i % 3}", text) for i, text in enumerate(DOCUMENTS)]
    return [
        EvalSource(str(write_retrieval(folder / "find", queries, DOCUMENTS, qrels)), "retrieval", "find"),
        EvalSource(str(write_tsv(folder / "pairs.tsv", "id\tsrc\teng", pairs)), "bitext", "pairs"),
        EvalSource(
            str(write_tsv(folder / "sort.tsv", "split\tlabel\ttext", rows)),
            "classification",
            "sort",
            "Find the topic:",
        ),
    ]


@pytest.fixture
def model(tiny_repository):
    return LusiferModel.from_pretrained(tiny_repository)


@pytest.fixture
def loaded(tmp_path):
    return load_eval_sources(write_sources(tmp_path))


def capture(loaded) -> list[torch.Tensor]:
    """Where the embeddings of every group of texts will be collected when they are scored."""
    captured = []
    for item in loaded:
        item.score = lambda *groups, score=item.score: captured.extend(groups) or score(*groups)
    return captured


def expected_embeddings(model, loaded) -> list[np.ndarray]:
    return [
        model.encode(texts, prompt_name=prompt_name, instruction=item.source.instruction, max_length=64)
        for item in loaded
        for prompt_name, texts in item.texts
    ]


# Scores


@pytest.mark.parametrize("documents", [40, 6])
def test_ndcg_is_that_of_trec_eval(tmp_path, documents):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    generator = random.Random(0)
    queries = 300
    qrels = [
        (query, document, generator.choice([0, 1, 1, 2, 5]))
        for query in range(queries)
        for document in generator.sample(range(documents), generator.choice([1, 2, 5, min(documents, 13)]))
    ]
    texts = [f"text {index}" for index in range(queries)]
    folder = write_retrieval(tmp_path / "set", texts, texts[:documents], qrels)
    (item,) = load_eval_sources([EvalSource(str(folder), "retrieval")])
    judged = {query for query, _, score in qrels if score > 0}
    assert 200 < len(judged) < queries, "no query without a relevant document: the test lost its point"

    torch.manual_seed(0)
    # Few values, so that documents tie: also those around rank 10.
    query_vectors = torch.randint(0, 2, (len(item.texts[0][1]), 4)).float() + torch.tensor([1.0, 0, 0, 0])
    document_vectors = torch.randint(0, 2, (documents, 4)).float() + torch.tensor([0, 0, 0, 1.0])
    similarity = torch.nn.functional.normalize(query_vectors) @ torch.nn.functional.normalize(document_vectors).T
    run = {
        "q" + query.split()[1]: {
            "d" + document.split()[1]: float(value) for document, value in zip(item.texts[1][1], row, strict=True)
        }
        for query, row in zip(item.texts[0][1], similarity, strict=True)
    }
    relevance = {}
    for query, document, score in qrels:
        if query in judged:
            relevance.setdefault(f"q{query}", {})[f"d{document}"] = score
    expected = pytrec_eval.RelevanceEvaluator(relevance, {"ndcg_cut.10"}).evaluate(run)
    assert len(expected) == len(judged)
    score = item.score(query_vectors, document_vectors)
    assert score == pytest.approx(
        {"ndcg@10": np.mean([query["ndcg_cut_10"] for query in expected.values()])}, abs=1e-9
    )
    assert 0.05 < score["ndcg@10"] < 0.95


def test_bitext_scores_are_mtebs():
    from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining

    torch.manual_seed(0)
    english = torch.randn(500, 6)
    source = english + 0.7 * torch.randn(500, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0])  # some texts are hubs
    scores = evaluation._bitext_scores(source, english)
    for direction, queries, texts in (("src_eng", source, english), ("eng_src", english, source)):
        nearest = torch.nn.functional.cosine_similarity(queries[:, None], texts[None], dim=2).argmax(dim=1)
        neighbours = [{"corpus_id": int(row)} for row in nearest]
        expected = AbsTaskBitextMining._compute_metrics(None, neighbours, [(i, i) for i in range(500)])
        assert scores[f"f1_{direction}"] == pytest.approx(expected["f1"], abs=1e-9)
        assert scores[f"accuracy_{direction}"] == pytest.approx(expected["accuracy"], abs=1e-9)
    assert next(iter(scores)) == "f1"
    assert scores["f1"] == pytest.approx((scores["f1_src_eng"] + scores["f1_eng_src"]) / 2)
    assert 0.1 < scores["f1_src_eng"] < scores["accuracy_src_eng"] < 0.9
    assert scores["f1_src_eng"] != scores["f1_eng_src"]


def test_classification_accuracy_is_mtebs(tmp_path):
    from datasets import Dataset, DatasetDict
    from mteb.mocks.mock_tasks.classification import MockClassificationTask

    generator = np.random.RandomState(1)
    labels = generator.randint(0, 5, 260)
    vectors = {f"text {i}": generator.randn(16) + 2 * np.eye(16)[label] for i, label in enumerate(labels)}
    vectors = {text: vector.astype(np.float32) for text, vector in vectors.items()}
    names = ["train" if i < 160 else "test" if i < 250 else "validation" for i in range(260)]
    rows = [(name, f"label {label}", f"text {i}") for i, (name, label) in enumerate(zip(names, labels, strict=True))]
    path = write_tsv(tmp_path / "set.tsv", "split\tlabel\ttext", rows)
    (item,) = load_eval_sources([EvalSource(str(path), "classification")])
    own = item.score(*(torch.tensor(np.stack([vectors[text] for text in texts])) for _, texts in item.texts))

    class Lookup:
        mteb_model_meta = None
        similarity = similarity_pairwise = len  # asked for, not used

        def encode(self, inputs, **kwargs):
            return np.stack([vectors[text] for batch in inputs for text in batch["text"]])

    task = MockClassificationTask()
    task.evaluator_model.set_params(max_iter=100)
    splits = {
        name: {"text": [row[2] for row in rows if row[0] == name], "label": labels[np.array(names) == name].tolist()}
        for name in ("train", "test")
    }
    task.dataset = DatasetDict({name: Dataset.from_dict(split) for name, split in splits.items()})
    task.data_loaded = True
    expected = task.evaluate(Lookup(), "test", encode_kwargs={"batch_size": 32})["default"]
    assert own == pytest.approx({"accuracy": expected["accuracy"]}, abs=1e-12)
    assert 0.4 < own["accuracy"] < 0.95
    assert len(item.texts[0][1]) < 160, "rows that no classifier is trained on were embedded"


def test_names_of_the_scores(model, loaded):
    scores = evaluate_sources(model, model.tokenizer, loaded, max_length=64)
    bitext = [f"pairs_{metric}_{way}" for way in ("src_eng", "eng_src") for metric in ("f1", "accuracy")]
    assert list(scores) == ["find_ndcg@10", "pairs_f1", *bitext, "sort_accuracy", "mean"]
    main = [scores[name] for name in ("find_ndcg@10", "pairs_f1", "sort_accuracy")]
    assert scores["mean"] == pytest.approx(np.mean(main))
    assert all(type(score) is float and 0 <= score <= 1 for score in scores.values())
    assert evaluate_sources(model, model.tokenizer, [], max_length=64) == {}


# Embeddings


@pytest.mark.parametrize("max_tokens", [None, 40, 1])
def test_embeddings_are_those_of_encode(model, loaded, max_tokens):
    expected = expected_embeddings(model, loaded)
    captured = capture(loaded)
    evaluate_sources(model, model.tokenizer, loaded, max_length=64, max_tokens_per_batch=max_tokens)
    assert_distinct(expected[0])
    assert len(captured) == len(expected) == 6
    assert [name for item in loaded for name, _ in item.texts] == ["query", "document", None, None, None, None]
    for actual, wanted in zip(captured, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_same(actual, wanted)


def test_texts_are_cut_to_max_length(model, loaded):
    captured = capture(loaded)
    evaluate_sources(model, model.tokenizer, loaded[1:2], max_length=8)
    assert_same(captured[0], model.encode(loaded[1].texts[0][1], max_length=8))
    with pytest.raises(ValueError, match="max_length=8 leaves no room for text"):
        evaluate_sources(model, model.tokenizer, loaded[:1], max_length=8)


def test_with_adapters_and_with_an_embed_of_ones_own(model, loaded):
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=r"llm\..*_proj", init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    )
    with adapted.disable_adapter():
        untouched = expected_embeddings(model, loaded)
    expected = expected_embeddings(model, loaded)
    assert np.abs(expected[0] - untouched[0]).max() > 0.01, "the adapter has no effect"
    captured = capture(loaded)
    evaluate_sources(adapted, model.tokenizer, loaded, max_length=64)
    assert_same(captured[2], expected[2])


def test_embeddings_that_are_no_numbers_are_an_error(model, loaded):
    with torch.no_grad():
        next(model.projection.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="find"):
        evaluate_sources(model, model.tokenizer, loaded, max_length=64)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_leaves_modes_gradients_and_random_numbers_as_they_were(tiny_repository, loaded, attention):
    model = LusiferModel.from_pretrained(tiny_repository, attn_implementation=attention)
    assert model.config.encoder_config.hidden_dropout_prob > 0
    expected = expected_embeddings(model, loaded)
    model.train()
    model.encoder.eval()  # a frozen tower
    modes = {name: module.training for name, module in model.named_modules()}
    scores = evaluate_sources(model, model.tokenizer, loaded, max_length=64)
    captured = capture(loaded)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    evaluate_sources(model, model.tokenizer, loaded, max_length=64)
    assert_same(captured[1], expected[1], 1e-4)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == str(states[1])
    assert random.getstate() == states[2]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert scores["mean"] > 0


def test_random_numbers_are_kept_while_scoring(model, loaded):
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    first = evaluate_sources(model.train(), model.tokenizer, loaded, max_length=64)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert evaluate_sources(model, model.tokenizer, loaded, max_length=64) == first
    random.setstate(states[2]), torch.set_rng_state(states[0])


# Two processes


def worker(folder: Path, repository: str):
    """What each process runs: the scores, and on the first the embeddings, under DDP and under FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    state = PartialState(cpu=True)
    loaded = load_eval_sources(write_sources(folder / f"files-{state.process_index}"))
    captured = capture(loaded)
    results = {}
    for way in ("ddp", "fsdp2"):
        model = LusiferModel.from_pretrained(repository).train()
        tokenizer = model.tokenizer
        passes = []
        model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        if way == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in [*model.encoder.encoder.layer, *model.llm.layers]:
                fully_shard(layer)
            fully_shard(model)
        scores = evaluate_sources(model, tokenizer, loaded, max_length=64, max_tokens_per_batch=MAX_TOKENS)
        assert model.training
        embeddings = [group.tolist() for group in captured]
        results[way] = {"scores": scores, "passes": len(passes), "embeddings": embeddings}
        captured.clear()
    (folder / f"{state.process_index}.json").write_text(json.dumps(results))
    state.destroy_process_group()


def test_two_processes_are_one_process(tmp_path, tiny_repository, model, loaded):
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    scores = evaluate_sources(model, model.tokenizer, loaded, max_length=64, max_tokens_per_batch=MAX_TOKENS)
    alone = len(passes)
    assert alone % 2 == 1, "no round in which a process has no batch of its own: the test lost its point"
    expected = expected_embeddings(model, loaded)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launch, "--rdzv-endpoint=localhost:0", __file__, str(tmp_path), str(tiny_repository)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1))
    for way in ("ddp", "fsdp2"):
        assert first[way]["scores"] == second[way]["scores"] == pytest.approx(scores, abs=1e-6)
        assert first[way]["passes"] == second[way]["passes"]
        assert alone / 2 < first[way]["passes"] <= alone / 2 + 3  # half a pass more for each odd group
        assert len(first[way]["embeddings"]) == len(expected)
        for group, wanted in zip(first[way]["embeddings"], expected, strict=True):
            assert_same(np.array(group, dtype=np.float32), wanted)


# max_samples


def test_max_samples_of_retrieval(tmp_path):
    texts = [f"text {index}" for index in range(400)]
    qrels = [(query, document, 1) for query in range(50) for document in (query, query + 50, query + 100)]
    folder = str(write_retrieval(tmp_path / "set", texts[:50], texts, qrels))

    def load(max_samples):
        return load_eval_sources([EvalSource(folder, "retrieval", max_samples=max_samples)])[0]

    few = load(5)
    (_, queries), (_, documents) = few.texts
    assert few.texts == load(5).texts
    assert len(queries) == len(set(queries)) == 5
    assert len(documents) == len(set(documents)) == 50
    numbers = [int(text.split()[1]) for text in queries]
    assert numbers != sorted(numbers) or numbers[-1] > 10, "the first queries rather than random ones"
    judged = {f"text {number + offset}" for number in numbers for offset in (0, 50, 100)}
    assert judged < set(documents)
    # All three documents of each query are first: the gains still belong to the right rows.
    vectors = {text: torch.eye(400)[int(text.split()[1])] for text in documents}
    wanted = [
        vectors[f"text {number}"] + vectors[f"text {number + 50}"] + vectors[f"text {number + 100}"]
        for number in numbers
    ]
    assert few.score(torch.stack(wanted), torch.stack([vectors[text] for text in documents])) == {"ndcg@10": 1.0}
    assert len(load(1000).texts[1][1]) == 400
    assert sorted(load(None).texts[0][1]) == sorted(texts[:50])


def test_max_samples_of_the_others(tmp_path):
    texts = [f"text {index}" for index in range(100)]
    path = write_tsv(tmp_path / "pairs.tsv", "src\teng", [(text, text.upper()) for text in texts])
    (item,) = load_eval_sources([EvalSource(str(path), "bitext", max_samples=20)])
    (_, source), (_, english) = item.texts
    assert [text.upper() for text in source] == english
    assert len(set(source)) == 20

    rows = [
        (split, f"label {index // 30}", f"{split} {text}")
        for split in ("train", "test")
        for index, text in enumerate(texts)
    ]
    path = write_tsv(tmp_path / "topics.tsv", "split\tlabel\ttext", rows)
    (item,) = load_eval_sources([EvalSource(str(path), "classification", max_samples=20)])
    (_, train), (_, test) = item.texts
    assert len(set(train)) == len(set(test)) == 20
    labels = [int(text.split()[2]) // 30 for text in train]
    assert [labels.count(label) for label in range(4)] == [5, 5, 5, 5]


# Sources


def test_names_of_sources():
    assert EvalSource("../data/xquad/en", "retrieval").name == "xquad-en"
    assert EvalSource("data/tatoeba/ara-eng.tsv", "bitext").name == "tatoeba-ara-eng"
    assert EvalSource("topics.tsv", "classification").name == "topics"
    assert EvalSource("/topics.tsv", "classification").name == "topics"
    assert EvalSource("a/b", "retrieval", name="c").name == "c"


def test_bad_sources(tmp_path):
    with pytest.raises(
        ValueError, match=r"kind='rerank' .* x/y is not one of 'retrieval', 'bitext', 'classification'"
    ):
        EvalSource("x/y", "rerank")
    with pytest.raises(ValueError, match="max_samples=0"):
        EvalSource("x/y", "bitext", max_samples=0)
    with pytest.raises(ValueError, match="Two evaluation sets have the name 'a-en'"):
        load_eval_sources([EvalSource("a/en", "bitext"), EvalSource("b/a/en", "retrieval")])


CORPUS, QUERIES = '{"_id": "d", "text": "x"}', '{"_id": "q", "text": "x"}'
QRELS = "query-id\tcorpus-id\tscore\nq\td\t1"


@pytest.mark.parametrize(
    "files, message",
    [
        ({"corpus.jsonl": None}, r"corpus\.jsonl does not exist"),
        ({"corpus.jsonl": CORPUS + "\n{"}, r"corpus\.jsonl, line 2 is no JSON"),
        ({"corpus.jsonl": "[1]"}, r"corpus\.jsonl, line 1 is no object"),
        (
            {"queries.jsonl": '\n{"id": "q", "text": "x"}'},
            r'queries\.jsonl, line 2 is no object with the fields "_id"',
        ),
        ({"queries.jsonl": '{"_id": "q", "text": null}'}, r'queries\.jsonl, line 1: "text" is None'),
        ({"corpus.jsonl": '{"_id": "d", "text": "x", "title": 3}'}, r'line 1: "title" is 3'),
        ({"corpus.jsonl": '{"_id": "d", "text": "\\ud800"}'}, r'line 1: "text" holds a lone surrogate'),
        ({"corpus.jsonl": CORPUS + "\n" + CORPUS}, r"corpus\.jsonl, line 2: the _id 'd' stands in an earlier line"),
        ({"corpus.jsonl": b"\xff"}, r"corpus\.jsonl is not UTF-8"),
        (
            {"qrels.tsv": "q\td\t1"},
            r"qrels\.tsv, line 1: no column 'query-id', 'corpus-id', 'score' in the header \('q'",
        ),
        ({"qrels.tsv": ""}, r"qrels\.tsv, line 1: no column"),
        ({"qrels.tsv": QRELS + "\nq\td"}, r"qrels\.tsv, line 3: 2 cells, but the header has 3"),
        ({"qrels.tsv": QRELS + "\nq\te\t1"}, r"qrels\.tsv, line 3: corpus\.jsonl has no row with the _id 'e'"),
        ({"qrels.tsv": QRELS + "\nr\td\t1"}, r"qrels\.tsv, line 3: queries\.jsonl has no row with the _id 'r'"),
        ({"qrels.tsv": QRELS + "\nq\td\t0.5"}, r"qrels\.tsv, line 3: the score '0\.5' is not a whole number"),
        ({"qrels.tsv": QRELS.replace("\t1", "\t0")}, r"qrels\.tsv has no row with a score above 0"),
    ],
)
def test_bad_retrieval_files(tmp_path, files, message):
    for name, content in {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels.tsv": QRELS, **files}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((FileNotFoundError, TypeError, ValueError), match=message):
        load_eval_sources([EvalSource(str(tmp_path), "retrieval")])


@pytest.mark.parametrize(
    "kind, content, message",
    [
        ("retrieval", "", r"set\.tsv is no folder with corpus\.jsonl"),
        ("bitext", "id\tsrc\n1\tx", r"set\.tsv, line 1: no column 'eng' in the header \('id', 'src'\)"),
        ("bitext", "src\teng\nx\ty\tz", r"set\.tsv, line 2: 3 cells, but the header has 2"),
        ("bitext", "src\teng\nx\ty", r"set\.tsv has 1 row"),
        ("classification", "split\tlabel\ttext\ntrain\ta\tx", r'set\.tsv has no row whose split is "test"'),
        ("classification", "split\tlabel\ttext\ntest\ta\tx", r'set\.tsv has no row whose split is "train"'),
        ("classification", "split\tlabel\ttext\ntrain\ta\tx\ntest\ta\tx", r"one label in its \"train\" split, 'a'"),
    ],
)
def test_bad_tsv_files(tmp_path, kind, content, message):
    path = tmp_path / "set.tsv"
    path.write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_eval_sources([EvalSource(str(path), kind)])


def test_missing_paths(tmp_path):
    for kind in ("retrieval", "bitext", "classification"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_eval_sources([EvalSource(str(tmp_path / "nowhere"), kind)])


def test_real_files_load(shared_folder):
    folder = shared_folder / "data" / "eval"
    sources = [
        *(
            EvalSource(str(path.parent), "retrieval", max_samples=50)
            for path in folder.glob("retrieval/*/*/corpus.jsonl")
        ),
        *(EvalSource(str(path), "bitext", max_samples=50) for path in folder.glob("bitext/*/*.tsv")),
        *(EvalSource(str(path), "classification", max_samples=50) for path in folder.glob("classification/*/*.tsv")),
    ]
    loaded = load_eval_sources(sources)
    assert len(loaded) >= 30
    for item in loaded:
        for _, texts in item.texts:
            assert 8 <= len(texts) <= 500
            assert all(text.strip() for text in texts)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
