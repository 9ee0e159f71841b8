"""
Files as tasks of mteb, for data that is on no Hub: `KIND/SET/...` in a folder, one file or folder for each language.

| kind | path | content |
|---|---|---|
| retrieval | `retrieval/SET/LANG/` | `corpus.jsonl`, `queries.jsonl`, `qrels.tsv` (BEIR's layout) |
| reranking | `reranking/SET/LANG.jsonl` | objects with `query`, `positive` and `negative` (lists of texts) |
| classification | `classification/SET/LANG.tsv` | columns `split` (`train` or `test`), `label`, `text` |
| clustering | `clustering/SET/LANG.tsv` | columns `label` (or `topic`), `text` |
| sts | `sts/SET/LANG.tsv` | columns `sentence1`, `sentence2`, `score` |
| bitext | `bitext/SET/LANG-LANG.tsv` | two columns of sentences, beside an `id` where there is one |

LANG is a code of ISO 639 (`sw`, `swh`) or mteb's form (`swh-Latn`). TSV files have a header and no quoting; other
columns are not read. A set is one task, named `SET-KIND`, and its languages are the task's subsets.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.languages.iso_mappings import _hf_lang_to_iso_lang_script

from ..encoding_lusifer import check_texts
from ..training.evaluation import read_classification, read_lines, read_retrieval, read_tsv


class _LocalTask(AbsTask):
    """A task whose subsets are files; the subclasses say how to read one."""

    task_type: str
    main_score: str
    suffix = ".tsv"
    files: dict[str, Path]

    @classmethod
    def from_files(cls, name: str, files: dict[str, Path], languages: dict[str, list[str]]) -> "_LocalTask":
        metadata = TaskMetadata(
            name=name,
            type=cls.task_type,
            main_score=cls.main_score,
            eval_langs=languages,
            eval_splits=["test"],
            # mteb runs a task again when the revision of its data is another one.
            dataset={"path": str(next(iter(files.values())).parent), "revision": _fingerprint(files.values())},
            description=f"The local files of {name}.",
            category="t2c" if cls.task_type in ("Classification", "Clustering") else "t2t",
            modalities=["text"],
        )
        # A class for each set: an instance's own metadata is dropped when mteb unloads the data.
        return type(cls.__name__, (cls,), {"files": files, "metadata": metadata})()

    def load_data(self, num_proc: int | None = None, **kwargs):
        if not self.data_loaded:
            self.dataset = {subset: self.read(self.files[subset]) for subset in self.hf_subsets}
            self.data_loaded = True


class LocalRetrieval(_LocalTask, AbsTaskRetrieval):
    task_type, main_score, suffix = "Retrieval", "ndcg_at_10", ""

    def read(self, path: Path) -> dict[str, RetrievalSplitData]:
        documents, queries, relevance = read_retrieval(path)
        return _retrieval_data(documents, {query: queries[query] for query in relevance}, relevance, None)


class LocalReranking(_LocalTask, AbsTaskRetrieval):
    task_type, main_score, suffix = "Reranking", "map_at_1000", ".jsonl"

    def read(self, path: Path) -> dict[str, RetrievalSplitData]:
        queries, relevance, candidates = {}, {}, {}
        documents: dict[str, str] = {}  # text to id, since a text is often a candidate of many queries
        for line, content in read_lines(path):
            place = f"{path}, line {line}"
            try:
                row = json.loads(content)
                texts = [*row["positive"], *row["negative"]]
                check_texts([row["query"], *texts], what=f"{place}: a text")
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{place} is no object with a "query" and lists of texts "positive" and "negative" ({error}).'
                ) from None
            if not row["positive"]:
                raise ValueError(f'{place}: "positive" is empty, so there is nothing to find.')
            query, positive = f"q{line}", set(row["positive"])
            for text in texts:
                documents.setdefault(text, f"d{len(documents)}")
            queries[query] = row["query"]
            candidates[query] = list(dict.fromkeys(documents[text] for text in texts))
            relevance[query] = {documents[text]: int(text in positive) for text in texts}
        if not queries:
            raise ValueError(f"{path} is empty.")
        by_id = {identifier: text for text, identifier in documents.items()}
        return _retrieval_data(by_id, queries, relevance, candidates)


class LocalClassification(_LocalTask, AbsTaskClassification):
    task_type, main_score = "Classification", "accuracy"

    def read(self, path: Path) -> DatasetDict:
        rows = read_classification(path)
        names = sorted({label for found in rows.values() for label, _ in found})
        if len({label for label, _ in rows["train"]}) < 2:
            raise ValueError(f'{path} has one label in its "train" split: a classifier needs two.')
        numbers = {label: number for number, label in enumerate(names)}
        return DatasetDict(
            {
                split: Dataset.from_dict(
                    {"label": [numbers[label] for label, _ in found], "text": [text for _, text in found]}
                )
                for split, found in rows.items()
            }
        )


class LocalClustering(_LocalTask, AbsTaskClustering):
    task_type, main_score = "Clustering", "v_measure"
    # All texts are embedded; each of the ten clusterings is of so many.
    max_fraction_of_documents_to_embed = None
    max_documents_per_cluster = 2048

    def read(self, path: Path) -> DatasetDict:
        label = "topic" if "topic" in _header(path) else "label"
        labels, texts = _columns(path, label, "text")
        if len(set(labels)) < 2:
            raise ValueError(f"{path} has one {label}, {labels[0]!r}: there is nothing to tell apart.")
        return DatasetDict(test=Dataset.from_dict({"labels": labels, "sentences": texts}))

    def _evaluate_subset(self, *args, **kwargs):
        self.rng_state = random.Random(self.seed)  # a subset's sample must not depend on those that ran before
        return super()._evaluate_subset(*args, **kwargs)


class LocalSTS(_LocalTask, AbsTaskSTS):
    task_type, main_score = "STS", "cosine_spearman"

    def read(self, path: Path) -> DatasetDict:
        first, second, scores = _columns(path, "sentence1", "sentence2", "score")
        try:
            scores = [float(score) for score in scores]
        except ValueError as error:
            raise ValueError(f'{path}: a "score" is no number ({error}).') from None
        if len(set(scores)) < 2:
            raise ValueError(f"{path} has one score, {scores[0]}, so that no correlation is defined.")
        return DatasetDict(test=Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores}))


class LocalBitextMining(_LocalTask, AbsTaskBitextMining):
    task_type, main_score = "BitextMining", "f1"

    def read(self, path: Path) -> DatasetDict:
        names = [name for name in _header(path) if name != "id"]
        if len(names) != 2:
            raise ValueError(f"{path} has the columns {', '.join(names)}, not two of sentences.")
        first, second = _columns(path, *names)
        return DatasetDict(test=Dataset.from_dict({"sentence1": first, "sentence2": second}))


KINDS: dict[str, type[_LocalTask]] = {
    "retrieval": LocalRetrieval,
    "reranking": LocalReranking,
    "classification": LocalClassification,
    "clustering": LocalClustering,
    "sts": LocalSTS,
    "bitext": LocalBitextMining,
}


def local_tasks(folder: str | Path) -> list[AbsTask]:
    """
    All tasks of a folder, for `mteb.evaluate`; what is wrong inside a file is said when the task loads it.

    Raises:
        `OSError`, `ValueError`: if there is no such folder, nothing in it, or a name that is no language.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    tasks = []
    for kind, task_class in KINDS.items():
        for place in sorted(path for path in folder.glob(f"{kind}/*") if path.is_dir()):
            files = {
                path.name.removesuffix(task_class.suffix): path
                for path in sorted(place.iterdir())
                if path.suffix == task_class.suffix and path.is_dir() == (task_class is LocalRetrieval)
            }
            if not files:
                raise ValueError(f"{place} holds no language: expected {kind}/SET/LANG{task_class.suffix}.")
            languages = {subset: _languages(subset, path) for subset, path in files.items()}
            tasks.append(task_class.from_files(f"{place.name}-{kind}", files, languages))
    if not tasks:
        raise ValueError(f"{folder} holds no {'/, '.join(KINDS)}/ with a set in it.")
    return tasks


def _languages(subset: str, path: Path) -> list[str]:
    """`sw` to `["swa-Latn"]`, `swh-eng` to `["swh-Latn", "eng-Latn"]`; mteb's form stays."""
    if (known := _hf_lang_to_iso_lang_script(subset)) is not None:
        return [known]
    found = [_hf_lang_to_iso_lang_script(part) for part in subset.split("-")]
    if None in found:
        raise ValueError(
            f"{path}: {subset!r} is no language, such as sw, swh or swh-Latn, nor two joined by a hyphen."
        )
    return found


def _retrieval_data(documents, queries, relevance, candidates) -> dict[str, RetrievalSplitData]:
    corpus, questions = (
        Dataset.from_dict({"id": list(texts), "text": list(texts.values())}) for texts in (documents, queries)
    )
    return {
        "test": RetrievalSplitData(corpus=corpus, queries=questions, relevant_docs=relevance, top_ranked=candidates)
    }


def _header(path: Path) -> list[str]:
    return next(read_lines(path), (1, ""))[1].split("\t")


def _columns(path: Path, *names: str) -> list[list[str]]:
    rows = [cells for _, cells in read_tsv(path, *names)]
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} rows: at least 2 are needed.")
    return [list(column) for column in zip(*rows, strict=True)]


def _fingerprint(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]
