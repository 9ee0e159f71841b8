"""
Mine hard negatives: documents that a model ranks high for a query and that do not answer it.

`mine` in four steps: (1) gather the corpus, each text once, (2) embed it and the queries shard by shard, on all
processes, (3) search the nearest documents of each query, and have a cross-encoder score them if asked, (4) take
negatives from a window of ranks after the positives and what may be one are removed. sentence-transformers'
`mine_hard_negatives`, whose options have the same names, holds all texts and embeddings in memory and begins again
after a kill.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import faiss
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, concatenate_datasets
from tqdm.auto import tqdm

from .deduplication import words, words_hash
from .embedding import SHARD_TEXTS, embed_shards, load_encoders, take_rows
from .importing import read_texts
from .steps import SHARD_ROWS, Step, check_complete, check_ids, column_values, step, used_fields, write_arrow


Strategy = Literal["top", "random"]

# Up to so many documents all are compared with a query; beyond, those of the nearest lists of about 256 documents, so
# that the time for a query does not grow with the corpus.
EXACT_DOCUMENTS = 200_000
LIST_DOCUMENTS = 256
PROBED_LISTS = 32
CORPUS_FEATURES = Features({"id": Value("string"), "text": Value("string"), "hash": Value("int64")})


def mine(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    model: str,
    corpus: Sequence[str | Path] = (),
    instruction: str | None = None,
    document_prompt: str | None = None,
    range_min: int = 30,
    range_max: int = 128,
    num_negatives: int = 32,
    sampling_strategy: Strategy = "random",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    cross_encoder: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Path:
    """
    Add hard negatives to the rows of data sets.

    Runs on all processes of `accelerate launch`. The ranks are those of the research code, which used e5-large. A
    document is no negative if it has the words or the id of the query or of a positive. Negatives that a row already
    has stay, and count; a row that ends without any goes.

    Args:
        inputs (sequence of `str`): Data sets, see [`~data.prepare.steps.step`].
        output (`str`): The folder to write.
        model, instruction, document_prompt, trust_remote_code: As in [`~data.prepare.embedding.load_encoders`].
        corpus (sequence of `str`, *optional*):
            `.jsonl` files with `_id`, `text` and optionally `title`, as BEIR's. By default each data set's own
            positives.
        range_min, range_max (`int`, *optional*, default to 30 and 128):
            Ranks, from 0, among the documents that are no positives and keep the margins: the window from which
            negatives are taken.
        num_negatives (`int`, *optional*, defaults to 32): Of a row, at most.
        sampling_strategy (`str`, *optional*, defaults to `"random"`): `"top"` takes the first of the window.
        absolute_margin, relative_margin (`float`, *optional*):
            A negative's score is at most the least similar positive's score less the absolute margin, and less this
            share of it (0.05: the TopK-PercPos of NV-Retriever, arXiv 2407.15831).
        cross_encoder (`str`, *optional*):
            Hub id or folder of a cross-encoder. Its scores replace the cosines of the documents that were found, for
            the margins and the ranks.
        seed (`int`, *optional*, defaults to 0): Draws the negatives.

    Returns:
        `Path`: `output`.

    Raises:
        `ValueError`: also for a positive that is not in the corpus.
    """
    if not 0 <= range_min < range_max:
        raise ValueError(f"range_min={range_min} and range_max={range_max} are no window of ranks.")
    if num_negatives < 1:
        raise ValueError(f"num_negatives={num_negatives} must be 1 or more.")
    if sampling_strategy not in get_args(Strategy):
        raise ValueError(f"sampling_strategy={sampling_strategy!r} is not one of 'top', 'random'.")
    rules = {"absolute_margin": absolute_margin, "relative_margin": relative_margin, "num_negatives": num_negatives}
    rules |= {"range_min": range_min, "sampling_strategy": sampling_strategy, "seed": seed}
    parameters = {"model": model, "instruction": instruction, "document_prompt": document_prompt}
    parameters |= {"cross_encoder": cross_encoder, "range_max": range_max}
    models = [path for path in (model, cross_encoder) if path is not None and Path(path).exists()]
    with step("mine", inputs, output, parameters | rules, others=[*corpus, *models], distributed=True) as running:
        encode_query, encode_document = load_encoders(model, instruction, document_prompt, trust_remote_code)
        shared = _Corpus(running, lambda path: _read_corpora(corpus, path), "corpus") if corpus else None
        work = {}
        for name in running.inputs:  # all of them first: what is wrong shows before the long work
            rows = running.read(name)
            check_complete(rows, name)
            documents = shared or _Corpus(running, partial(_own_corpus, rows), f"{name} corpus")
            positives = _Positives(rows, documents, name)
            if len(documents) <= range_min + positives.most:
                raise ValueError(
                    f"The corpus of {name} has {len(documents):,} documents, and negatives are taken from rank "
                    f"{range_min} on: lower range_min, or give a larger corpus."
                )
            work[name] = rows, documents, positives
        for name, (rows, documents, positives) in work.items():
            document_paths = embed_shards(running, documents.texts, encode_document, documents.name)
            queries = rows.select_columns("query").rename_column("query", "text")
            query_paths = embed_shards(running, queries, encode_query, f"{name} queries")
            found = _search(running, positives, document_paths, query_paths, range_max + positives.most, name)
            if cross_encoder is not None:
                found = _rescore(running, rows, documents, positives, found, cross_encoder, trust_remote_code, name)
            if running.is_main:
                taken, counts = _take_negatives(rows, documents, positives, found, range_max, **rules)
                has_any = (counts > 0) | (pc.list_value_length(rows.data.column("negative")).to_numpy() > 0)
                kept = int(has_any.sum())
                dropped = Counter({"no negative": len(rows) - kept} if kept < len(rows) else {})
                running.write_batches(name, _mined_rows(rows, documents, taken, counts), kept, len(rows), dropped)
    return Path(output)


class _Corpus:
    """Documents with ids and hashes of their words."""

    def __init__(self, running: Step, read: Callable[[Path], Iterable[dict]], name: str):
        self.name = name
        with running.main_first():
            path = running.folder / "shards" / f"{name}.arrow"
            if running.is_main and not path.exists():
                hashed = ({**row, "hash": _hash(row["text"])} for row in read(path))
                write_arrow(path, CORPUS_FEATURES, hashed)
            self.texts = Dataset.from_file(str(path))
        self.hashes = column_values(self.texts, "hash")

    def __len__(self) -> int:
        return len(self.texts)


def _read_corpora(paths: Sequence[str | Path], scratch: Path) -> Dataset:
    texts = concatenate_datasets(
        [read_texts(Path(path), scratch.with_suffix(f".{i}")) for i, path in enumerate(paths)]
    )
    check_ids(texts, "The corpus")
    return texts


def _own_corpus(rows: Dataset, scratch: Path) -> Iterator[dict]:
    """All positives of the rows, each text once."""
    seen = set()
    for batch in rows.select_columns(["positive", "positive_id"]).iter(1000):
        for texts, ids in zip(batch["positive"], batch["positive_id"], strict=True):
            for text, text_id in zip(texts, ids or [None] * len(texts), strict=True):
                if (key := _hash(text)) not in seen:
                    seen.add(key)
                    yield {"id": text_id, "text": text}


class _Positives:
    """Which documents of a corpus the positives of rows are, by their ids or, without one of it, by their texts."""

    def __init__(self, rows: Dataset, documents: _Corpus, name: str):
        counts, id_counts = (
            pc.list_value_length(rows.data.column(field)).to_numpy() for field in ("positive", "positive_id")
        )
        self.most = int(counts.max())
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        batches = rows.select_columns("positive").iter(1000)
        hashes = np.array([_hash(text) for batch in batches for texts in batch["positive"] for text in texts])
        order = np.argsort(documents.hashes, kind="stable")
        places = np.searchsorted(documents.hashes, hashes, sorter=order).clip(max=len(documents) - 1)
        self._documents = np.where(documents.hashes[order[places]] == hashes, order[places], -1)
        ids = pc.list_flatten(rows.data.column("positive_id"))
        by_id = pc.index_in(ids, documents.texts.data.column("id")).fill_null(-1).to_numpy()
        has_id = np.repeat(id_counts > 0, counts)
        self._documents[has_id] = np.where(by_id >= 0, by_id, self._documents[has_id])
        if (self._documents < 0).any():
            row = int(np.searchsorted(self._starts, np.argmin(self._documents), side="right")) - 1
            text = rows[row]["positive"][int(np.argmin(self._documents)) - self._starts[row]]
            raise ValueError(f"{name}, row {row} (from 0): the positive {text[:80]!r} is not in the corpus.")

    def of(self, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """The documents (n,) of rows, and for each whose positive it is, counted from the first row."""
        counts = np.diff(self._starts[rows.start : rows.stop + 1])
        return self._documents[self._starts[rows.start] : self._starts[rows.stop]], np.repeat(range(len(rows)), counts)


def _search(
    running: Step,
    positives: _Positives,
    document_paths: Sequence[Path],
    query_paths: Sequence[Path],
    count: int,
    name: str,
) -> list[Path]:
    """For each shard of queries the nearest `documents`, their `scores`, and those of the positives: cosines."""
    folder = running.folder / "shards" / f"{name} found"
    paths = [folder / path.with_suffix(".npz").name for path in query_paths]
    todo = [shard for shard, path in enumerate(paths) if not path.exists()]
    if running.is_main and todo:
        folder.mkdir(exist_ok=True)
        index = build_index(document_paths)
        for shard in tqdm(todo, desc=f"Searching {name}", unit="shard"):
            queries = np.load(query_paths[shard])
            scores, nearest = index.search(queries, min(count, index.ntotal))
            own, owners = positives.of(_rows_of(shard, len(queries)))
            cosines = np.einsum("nd,nd->n", queries[owners], take_rows(document_paths, own))
            _save(paths[shard], documents=nearest, scores=scores, positive_scores=cosines)
    running.wait()
    return paths


def build_index(paths: Sequence[Path]):
    """A faiss index of embeddings (N, D) by inner product: exact for a small corpus, else by nearest lists."""
    shapes = [np.load(path, mmap_mode="r").shape for path in paths]
    count, size = sum(rows for rows, _ in shapes), shapes[0][1]
    if count <= EXACT_DOCUMENTS:
        index = faiss.IndexFlatIP(size)
    else:
        # float16, as the vectors of large corpora take the most memory here.
        lists = count // LIST_DOCUMENTS
        index = faiss.index_factory(size, f"IVF{lists}_HNSW32,SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = 10
        index.nprobe = PROBED_LISTS
        # k-means that compares every vector with every centroid would grow with the square of the corpus.
        nearest_centroids = faiss.IndexHNSWFlat(size, 32, faiss.METRIC_INNER_PRODUCT)
        index.clustering_index = nearest_centroids
        learned = np.sort(np.random.default_rng(0).permutation(count)[: 40 * lists])
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # a graph that several threads build is another one every time
        index.train(take_rows(paths, learned))
        faiss.omp_set_num_threads(threads)
    for path in tqdm(paths, desc="Indexing", unit="shard", disable=len(paths) < 2):
        index.add(np.load(path))
    return index


def _rescore(
    running: Step,
    rows: Dataset,
    documents: _Corpus,
    positives: _Positives,
    found: Sequence[Path],
    model: str,
    trust_remote_code: bool,
    name: str,
) -> list[Path]:
    """The same files with the cross-encoder's scores."""
    from sentence_transformers import CrossEncoder

    folder = running.folder / "shards" / f"{name} rescored"
    paths = [folder / path.name for path in found]
    todo = [shard for shard, path in enumerate(paths) if not path.exists()]
    running.wait()
    state = running.state
    encoder = CrossEncoder(model, device=str(state.device), trust_remote_code=trust_remote_code)
    folder.mkdir(exist_ok=True)
    share = todo[state.process_index :: state.num_processes]
    for shard in tqdm(share, desc=f"Rescoring {name}", unit="shard", disable=not running.is_main):
        part = dict(np.load(found[shard]))
        numbers = _rows_of(shard, len(part["documents"]))
        queries = rows[numbers.start : numbers.stop]["query"]
        own, owners = positives.of(numbers)
        nearest = part["documents"].clip(0)
        for number, query in enumerate(queries):
            texts = documents.texts[np.concatenate([nearest[number], own[owners == number]])]["text"]
            scores = encoder.predict([(query, text) for text in texts], show_progress_bar=False)
            part["scores"][number] = scores[: nearest.shape[1]]
            part["positive_scores"][owners == number] = scores[nearest.shape[1] :]
        _save(paths[shard], **part)
    running.wait()
    return paths


def _take_negatives(
    rows: Dataset, documents: _Corpus, positives: _Positives, found: Sequence[Path], range_max: int, **rules
) -> tuple[np.ndarray, np.ndarray]:
    """The documents taken for the rows, one row after the other, and how many each row (N,) has of them."""
    taken = []
    for shard, path in enumerate(tqdm(found, desc="Choosing", unit="shard")):
        part = dict(np.load(path))
        numbers = _rows_of(shard, len(part["documents"]))
        own, owners = positives.of(numbers)
        bounds = np.searchsorted(owners, range(len(numbers) + 1))
        columns = rows[numbers.start : numbers.stop]
        texts = zip(columns["query"], columns["positive"], columns["negative"], strict=True)
        for number, (query, positive, negative) in enumerate(texts):
            of_row = slice(bounds[number], bounds[number + 1])
            nearest = part["documents"][number]
            hashes = documents.hashes[nearest]
            excluded = [_hash(text) for text in (query, *positive, *negative)]
            allowed = (nearest >= 0) & ~np.isin(hashes, [*excluded, *documents.hashes[own[of_row]]])
            allowed &= np.isin(np.arange(len(nearest)), np.unique(hashes, return_index=True)[1])  # each text once
            options = rules | {"num_negatives": max(rules["num_negatives"] - len(negative), 0)}
            chosen = choose(
                part["scores"][number],
                allowed,
                part["positive_scores"][of_row].min(),
                range_max=range_max,
                row=numbers[number],
                **options,
            )
            taken.append(nearest[chosen])
    return np.concatenate(taken), np.array([len(chosen) for chosen in taken])


def _mined_rows(rows: Dataset, documents: _Corpus, taken: np.ndarray, counts: np.ndarray) -> Iterator[dict[str, list]]:
    """The rows that have negatives, in batches: a file of them all would be several times the size of the input."""
    has_ids = documents.texts.data.column("id").null_count < len(documents)
    rows = rows.select_columns(used_fields(rows, always=["negative", "negative_id"] if has_ids else ["negative"]))
    end = 0
    for start in range(0, len(rows), SHARD_ROWS):
        batch = rows[start : start + SHARD_ROWS]
        bounds = end + np.cumsum([0, *counts[start : start + SHARD_ROWS]])
        begin, end = bounds[[0, -1]]
        texts = documents.texts[taken[begin:end]]  # at once, since each look-up has its cost
        for row, negative in enumerate(batch["negative"]):
            chosen = slice(*bounds[row : row + 2] - begin)
            negative += texts["text"][chosen]
            if "negative_id" in batch:
                ids = batch["negative_id"][row] + texts["id"][chosen]
                batch["negative_id"][row] = ids if len(ids) == len(negative) and None not in ids else []
        kept = [row for row, negative in enumerate(batch["negative"]) if negative]
        yield {field: [values[row] for row in kept] for field, values in batch.items()}


def choose(
    scores: np.ndarray,
    allowed: np.ndarray,
    positive_score: float,
    *,
    range_min: int,
    range_max: int,
    num_negatives: int,
    sampling_strategy: Strategy,
    absolute_margin: float | None,
    relative_margin: float | None,
    seed: int,
    row: int,
) -> np.ndarray:
    """The places of a row's negatives among its candidates (k,), the most similar first; see [`mine`]."""
    limit = np.inf
    if absolute_margin is not None:
        limit = positive_score - absolute_margin
    if relative_margin is not None:
        limit = min(limit, positive_score - abs(positive_score) * relative_margin)
    window = np.flatnonzero(allowed & (scores <= limit))
    window = window[np.argsort(-scores[window], kind="stable")][range_min:range_max]
    if sampling_strategy == "random":
        window = window[np.sort(np.random.default_rng([seed, row]).permutation(len(window))[:num_negatives])]
    return window[:num_negatives]


def _rows_of(shard: int, count: int) -> range:
    return range(shard * SHARD_TEXTS, shard * SHARD_TEXTS + count)


def _save(path: Path, **arrays: np.ndarray):
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def _hash(text: str) -> int:
    return words_hash(words(text)) - 2**63  # signed, as Arrow takes Python's numbers
