"""
The contract of local tasks: a folder of files becomes mteb tasks, one for each set, with its languages as subsets;
what is embedded and scored is what stands in the files; bad files are errors that name the file, the line and the
field.
"""

from pathlib import Path

import mteb
import pytest
from conftest import assert_distinct
from local_files import ENGLISH, SWAHILI, TEXTS, write, write_local_files

from lusifer_hf import LusiferModel
from lusifer_hf.evaluation.local import KINDS, local_tasks
from lusifer_hf.evaluation.model import LusiferEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_local_files(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def encoder(tiny_repository) -> LusiferEncoder:
    model = LusiferModel.from_pretrained(tiny_repository)
    assert_distinct(model.encode(TEXTS))
    return LusiferEncoder(model)


def load(folder: Path, name: str):
    [task] = [task for task in local_tasks(folder) if task.metadata.name == name]
    task.load_data()
    return task


def evaluate(encoder, task) -> dict[str, dict]:
    [result] = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False, co2_tracker=False).task_results
    return {score["hf_subset"]: score for score in result.scores["test"]}


def test_a_set_is_a_task_and_its_languages_are_subsets(folder):
    tasks = {task.metadata.name: task.metadata for task in local_tasks(folder)}
    assert {name: metadata.hf_subsets_to_langscripts for name, metadata in tasks.items()} == {
        "find-retrieval": {"en": ["eng-Latn"], "sw": ["swa-Latn"]},
        "find-reranking": {"spa-Latn": ["spa-Latn"]},
        "news-classification": {"en": ["eng-Latn"]},
        "news-clustering": {"en": ["eng-Latn"]},
        "trivia-clustering": {"en": ["eng-Latn"]},
        "pairs-sts": {"ru": ["rus-Cyrl"]},
        "said-bitext": {"spa-fra": ["spa-Latn", "fra-Latn"], "swh-eng": ["swh-Latn", "eng-Latn"]},
    }
    assert {metadata.type for metadata in tasks.values()} == {kind.task_type for kind in KINDS.values()}


def test_every_kind_is_scored_in_every_language(folder, encoder):
    for task in local_tasks(folder):
        scores = evaluate(encoder, task)
        assert list(scores) == task.hf_subsets
        for score in scores.values():
            assert -1 <= score["main_score"] <= 1


def test_the_languages_can_be_chosen(folder, encoder):
    [task] = [task for task in local_tasks(folder) if task.metadata.name == "find-retrieval"]
    assert list(evaluate(encoder, task.filter_languages(["swa"]))) == ["sw"]


def test_retrieval(folder):
    task = load(folder, "find-retrieval")
    split = task.dataset["en"]["test"]
    assert split["corpus"]["text"] == [f"Title {i} {text}" for i, text in enumerate(TEXTS[:8])]
    assert split["queries"]["id"] == [f"q{i}" for i in range(8)]  # the one without a judgement is no query
    assert split["relevant_docs"]["q3"] == {"d3": 1}


def test_reranking_embeds_a_text_once(folder):
    split = load(folder, "find-reranking").dataset["spa-Latn"]["test"]
    assert sorted(split["corpus"]["text"]) == sorted(set(TEXTS[1:10]))
    texts = dict(zip(split["corpus"]["id"], split["corpus"]["text"], strict=True))
    first = split["queries"]["id"][0]
    assert {texts[document]: gain for document, gain in split["relevant_docs"][first].items()} == {
        TEXTS[1]: 1,
        TEXTS[2]: 0,
        TEXTS[3]: 0,
        TEXTS[4]: 0,
    }
    assert split["top_ranked"][first] == list(split["relevant_docs"][first])


def test_classification_and_clustering(folder):
    splits = load(folder, "news-classification").dataset["en"]
    assert splits["train"]["text"] == TEXTS[::3]
    assert splits["train"]["label"] == [i % 2 for i in range(0, len(TEXTS), 3)]
    assert load(folder, "news-clustering").dataset["en"]["test"]["sentences"] == TEXTS
    assert load(folder, "trivia-clustering").dataset["en"]["test"]["labels"][:4] == ["0", "1", "2", "0"]


def test_sts_and_bitext(folder):
    assert load(folder, "pairs-sts").dataset["ru"]["test"]["score"] == [0, 0.5, 1, 1.5, 2, 2.5]
    rows = load(folder, "said-bitext").dataset["swh-eng"]["test"]
    assert (rows["sentence1"], rows["sentence2"]) == (SWAHILI, ENGLISH)


def test_a_clustering_score_does_not_depend_on_what_ran_before(folder, encoder):
    [task] = [task for task in local_tasks(folder) if task.metadata.name == "trivia-clustering"]
    assert evaluate(encoder, task)["en"]["v_measures"] == evaluate(encoder, task)["en"]["v_measures"]


def test_the_revision_is_that_of_the_files(folder, tmp_path):
    def revision(*lines: str) -> str:
        write(tmp_path / "sts/pairs/en.tsv", ["sentence1\tsentence2\tscore", *lines])
        return local_tasks(tmp_path)[0].metadata.revision

    assert revision("a\tb\t1", "c\td\t2") == revision("a\tb\t1", "c\td\t2") != revision("a\tb\t1", "c\td\t3")


def test_the_shared_data(shared_folder):
    tasks = {task.metadata.name: task for task in local_tasks(shared_folder / "data/eval")}
    assert len(tasks) == 12
    assert tasks["tatoeba-bitext"].metadata.hf_subsets_to_langscripts["swh-eng"] == ["swh-Latn", "eng-Latn"]
    assert tasks["xquad-retrieval"].hf_subsets == ["ar", "en", "es", "hi", "ru", "vi"]
    for task in tasks.values():
        task.filter_languages(None, hf_subsets=task.hf_subsets[:1]).load_data()
        assert list(task.dataset) == task.hf_subsets


# Bad input


STS, NEWS = "sentence1\tsentence2\tscore", "split\tlabel\ttext"


@pytest.mark.parametrize(
    "path, lines, message",
    [
        ("sts/pairs/xx.tsv", [STS], "xx.tsv: 'xx' is no language"),
        ("sts/pairs/en.csv", [STS], r"pairs holds no language: expected sts/SET/LANG.tsv"),
        ("text/pairs/en.tsv", [STS], "holds no retrieval/, reranking/"),
        ("sts/pairs/en.tsv", ["sentence1\tsentence2"], "no column 'score' in the header"),
        ("sts/pairs/en.tsv", [STS, "a\tb\t1", "c\td\tmuch"], "en.tsv: a \"score\" is no number .*'much'"),
        ("sts/pairs/en.tsv", [STS, "a\tb\t1", "c\td\t1"], "one score, 1.0"),
        ("sts/pairs/en.tsv", [STS], "en.tsv has 0 rows"),
        ("sts/pairs/en.tsv", [STS, "a\tb"], "line 2: 2 cells, but the header has 3"),
        ("bitext/pairs/en.tsv", ["eng", "a"], "has the columns eng, not two of sentences"),
        ("classification/news/en.tsv", [NEWS, "train\ta\tx"], 'no row whose split is "test"'),
        ("classification/news/en.tsv", [NEWS, "train\ta\tx", "test\tb\ty"], 'one label in its "train" split'),
        ("clustering/news/en.tsv", [NEWS, "test\ta\tx", "test\ta\ty"], "one label, 'a'"),
        ("reranking/find/en.jsonl", [], "en.jsonl is empty"),
        ("reranking/find/en.jsonl", ["{"], "line 1 is no object"),
        ("reranking/find/en.jsonl", ['{"query": "a", "positive": ["b"]}'], "line 1 is no object .*'negative'"),
        ("reranking/find/en.jsonl", ['{"query": "a", "positive": [1], "negative": []}'], "line 1 .*not a string"),
        ("reranking/find/en.jsonl", ['{"query": "a", "positive": [], "negative": []}'], '"positive" is empty'),
        ("retrieval/find/en/corpus.jsonl", ['{"_id": "a", "text": "b"}'], "queries.jsonl does not exist"),
    ],
)
def test_bad_files(tmp_path, path, lines, message):
    write(tmp_path / path, lines)
    with pytest.raises((OSError, ValueError), match=message):
        local_tasks(tmp_path)[0].load_data()


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        local_tasks(tmp_path / "nowhere")
