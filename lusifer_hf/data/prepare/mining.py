"""
Mine hard negatives: documents that a model ranks high for a query and that do not answer it.

`mine` in four steps: (1) gather the corpus, each text once, (2) embed it and the queries shard by shard, on all
processes, (3) search the nearest documents of each query, and have a cross-encoder score them if asked, (4) take
negatives from a window of ranks after the positives and what may be one are removed. sentence-transformers'
`mine_hard_negatives`, whose options have the same names, holds all texts and embeddings in memory and begins again
after a kill.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, concatenate_datasets
from tqdm.auto import tqdm

from .deduplication import words, words_hash
from .embedding import SHARD_TEXTS, Encode, embed_shards, load_encoders, take_rows
from .importing import read_texts
from .steps import ROW_FEATURES, Step, check_ids, column_values, step, write_arrow


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
        model, instruction, trust_remote_code: As in [`~data.prepare.embedding.load_encoders`].
        corpus (sequence of `str`, *optional*):
            `.jsonl` files with `_id`, `text` and optionally `title`, as BEIR's. By default each data set's own
            positives.
        range_min, range_max (`int`, *optional*, default to 30 and 128):
            Ranks among the documents that are no positives, from 0: the window from which negatives are taken.
        num_negatives (`int`, *optional*, defaults to 32): Of a row, at most.
        sampling_strategy (`str`, *optional*, defaults to `"random"`): `"top"` takes the first of the window.
        absolute_margin, relative_margin (`float`, *optional*):
            A negative's score is at most the least similar positive's score less the absolute margin, and less this
            share of it (0.05: the TopK-PercPos of NV-Retriever, arXiv 2407.15831).
        cross_encoder (`str`, *optional*):
            Hub id or folder of a cross-encoder, whose scores replace the cosine for the margins and the order in the
            window.
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
    parameters = {"model": model, "instruction": instruction, "cross_encoder": cross_encoder, "range_max": range_max}
    models = [path for path in (model, cross_encoder) if path is not None and Path(path).exists()]
    with step("mine", inputs, output, parameters | rules, others=[*corpus, *models], distributed=True) as running:
        encode_query, encode_document = load_encoders(model, instruction, trust_remote_code)
        shared = None
        if corpus:
            shared = _Corpus(running, lambda path: _read_corpora(corpus, path), "corpus")
            shared.embed(running, encode_document)
        for name in running.inputs:
            rows = running.read(name)
            documents = shared or _Corpus(running, partial(_own_corpus, rows), f"{name} corpus")
            most = pc.max(pc.list_value_length(rows.data.column("positive"))).as_py()
            if len(documents) <= range_min + most:
                raise ValueError(
                    f"The corpus of {name} has {len(documents):,} documents, and negatives are taken from rank "
                    f"{range_min} on: lower range_min, or give a larger corpus."
                )
            if documents is not shared:
                documents.embed(running, encode_document)
            queries = rows.select_columns("query").rename_column("query", "text")
            query_paths = embed_shards(running, queries, encode_query, f"{name} queries")
            found = _search(running, rows, documents, query_paths, range_max + most, name)
            if cross_encoder is not None:
                found = _rescore(running, rows, documents, found, cross_encoder, trust_remote_code, name)
            if running.is_main:
                chosen = _mined_rows(rows, documents, found, range_max, **rules)
                mined = write_arrow(running.folder / "shards" / f"{name} mined.arrow", ROW_FEATURES, chosen)
                lengths = pc.list_value_length(mined.data.column("negative")).to_numpy()
                running.keep(name, mined, np.where(lengths > 0, None, "no negative"))
    return Path(output)


class _Corpus:
    """Documents with ids, hashes of their words and, once embedded, the files of their embeddings."""

    def __init__(self, running: Step, read: Callable[[Path], Iterable[dict]], name: str):
        self.name = name
        with running.main_first():
            path = running.folder / "shards" / f"{name}.arrow"
            if running.is_main and not path.exists():
                hashed = ({**row, "hash": _hash(row["text"])} for row in read(path))
                write_arrow(path, CORPUS_FEATURES, hashed)
            self.texts = Dataset.from_file(str(path))
        self.hashes = column_values(self.texts, "hash")
        self._order = np.argsort(self.hashes, kind="stable")

    def __len__(self) -> int:
        return len(self.texts)

    def embed(self, running: Step, encode: Encode):
        self.paths = embed_shards(running, self.texts, encode, self.name)

    def find(self, texts: list[str], ids: list[str], place: str) -> np.ndarray:
        """The rows (n,) of documents by their ids or, without ids, by their texts."""
        if ids:
            rows = pc.index_in(pa.array(ids, pa.string()), self.texts.data.column("id"))
            rows, missing = rows.fill_null(0).to_numpy(), rows.is_null().to_numpy(zero_copy_only=False)
        else:
            hashes = np.array([_hash(text) for text in texts], dtype=np.int64)
            rows = np.searchsorted(self.hashes, hashes, sorter=self._order)
            rows = self._order[np.minimum(rows, len(self) - 1)]
            missing = self.hashes[rows] != hashes
        if missing.any():
            wanted = (ids or texts)[int(np.argmax(missing))]
            raise ValueError(f"{place}: the positive {wanted[:80]!r} is not in the corpus.")
        return rows


def _read_corpora(paths: Sequence[str | Path], scratch: Path) -> Dataset:
    texts = concatenate_datasets(
        [read_texts(Path(path), scratch.with_suffix(f".{i}")) for i, path in enumerate(paths)]
    )
    check_ids(texts, "The corpus")
    return texts


def _own_corpus(rows: Dataset, scratch: Path) -> Iterator[dict]:
    """All positives of the rows, each text once."""
    seen = set()
    for batch in rows.iter(1000):
        ids = batch["positive_id"]
        for texts, text_ids in zip(batch["positive"], ids, strict=True):
            for text, text_id in zip(texts, text_ids or [None] * len(texts), strict=True):
                if (key := _hash(text)) not in seen:
                    seen.add(key)
                    yield {"id": text_id, "text": text}


def _search(
    running: Step, rows: Dataset, documents: _Corpus, query_paths: Sequence[Path], count: int, name: str
) -> list[Path]:
    """For each shard of queries the nearest documents and the positives, with their cosines, as `_Found`."""
    folder = running.folder / "shards" / f"{name} found"
    paths = [folder / path.with_suffix(".npz").name for path in query_paths]
    todo = [index for index, path in enumerate(paths) if not path.exists()]
    if running.is_main and todo:
        folder.mkdir(exist_ok=True)
        index = build_index(documents.paths, len(documents))
        for shard in tqdm(todo, desc=f"Searching {name}", unit="shard"):
            queries = np.load(query_paths[shard])
            scores, nearest = index.search(queries, min(count, len(documents)))
            start = shard * SHARD_TEXTS
            part = rows[start : start + SHARD_TEXTS]
            columns = zip(part["positive"], part["positive_id"], strict=True)
            positives = [
                documents.find(texts, ids, f"{name}, row {start + number} (from 0)")
                for number, (texts, ids) in enumerate(columns)
            ]
            owners = np.repeat(np.arange(len(positives)), [len(found) for found in positives])
            positives = np.concatenate(positives)
            cosines = np.einsum("nd,nd->n", queries[owners], take_rows(documents.paths, positives))
            _save(paths[shard], documents=nearest, scores=scores, owners=owners, positives=positives, cosines=cosines)
    running.wait()
    return paths


def build_index(paths: Sequence[Path], count: int):
    """A faiss index of embeddings (N, D) by inner product: exact for a small corpus, else by nearest lists."""
    import faiss

    size = np.load(paths[0], mmap_mode="r").shape[1]
    if count <= EXACT_DOCUMENTS:
        index = faiss.IndexFlatIP(size)
    else:
        # float16, as the vectors of large corpora take the most memory here.
        lists = count // LIST_DOCUMENTS
        index = faiss.index_factory(size, f"IVF{lists}_HNSW32,SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = 10
        index.nprobe = PROBED_LISTS
        learned = np.sort(np.random.default_rng(0).permutation(count)[: 40 * lists])
        index.train(take_rows(paths, learned))
    for path in tqdm(paths, desc="Indexing", unit="shard", disable=len(paths) < 2):
        index.add(np.load(path))
    return index


def _rescore(
    running: Step, rows: Dataset, documents: _Corpus, found: Sequence[Path], model: str, trust: bool, name: str
) -> list[Path]:
    """The same files with the cross-encoder's scores."""
    from sentence_transformers import CrossEncoder

    folder = running.folder / "shards" / f"{name} rescored"
    paths = [folder / path.name for path in found]
    todo = [index for index, path in enumerate(paths) if not path.exists()]
    running.wait()
    encoder = CrossEncoder(model, device=str(running.state.device), trust_remote_code=trust)
    folder.mkdir(exist_ok=True)
    state = running.state
    mine = todo[state.process_index :: state.num_processes]
    for shard in tqdm(mine, desc=f"Rescoring {name}", unit="shard", disable=not running.is_main):
        part = dict(np.load(found[shard]))
        start = shard * SHARD_TEXTS
        queries = rows[start : start + SHARD_TEXTS]["query"]
        owners = [*np.repeat(np.arange(len(queries)), part["documents"].shape[1]), *part["owners"]]
        texts = documents.texts[np.concatenate([part["documents"].ravel(), part["positives"]]).clip(0)]["text"]
        scores = encoder.predict(
            [(queries[owner], text) for owner, text in zip(owners, texts, strict=True)], show_progress_bar=False
        )
        split = part["documents"].size
        part |= {"scores": scores[:split].reshape(part["documents"].shape), "cosines": scores[split:]}
        _save(paths[shard], **part)
    running.wait()
    return paths


def _mined_rows(rows: Dataset, documents: _Corpus, found: Sequence[Path], range_max: int, **rules) -> Iterator[dict]:
    for shard, path in enumerate(tqdm(found, desc="Choosing", unit="shard")):
        start = shard * SHARD_TEXTS
        part = dict(np.load(path))
        bounds = np.searchsorted(part["owners"], np.arange(len(part["documents"]) + 1))
        for number in range(len(part["documents"])):
            row = rows[start + number]
            own = slice(bounds[number], bounds[number + 1])
            excluded = {_hash(text) for text in (row["query"], *row["positive"], *row["negative"])}
            excluded.update(documents.hashes[part["positives"][own]].tolist())
            candidates = part["documents"][number]
            chosen = choose(
                candidates,
                part["scores"][number],
                [document >= 0 and documents.hashes[document] not in excluded for document in candidates.tolist()],
                part["cosines"][own],
                range_max=range_max,
                draw=start + number,
                **rules | {"num_negatives": max(rules["num_negatives"] - len(row["negative"]), 0)},
            )
            taken = documents.texts[chosen] if len(chosen) else {"text": [], "id": []}
            row["negative"] += taken["text"]
            if len(row["negative_id"]) + len(taken["text"]) == len(row["negative"]) and None not in taken["id"]:
                row["negative_id"] += taken["id"]
            yield row


def choose(
    documents: np.ndarray,
    scores: np.ndarray,
    allowed: Sequence[bool],
    positive_scores: np.ndarray,
    *,
    range_min: int,
    range_max: int,
    num_negatives: int,
    sampling_strategy: Strategy,
    absolute_margin: float | None,
    relative_margin: float | None,
    seed: int,
    draw: int,
) -> list[int]:
    """The negatives of one query among its ranked `documents` (k,); see [`mine`]."""
    window = np.flatnonzero(allowed)[range_min:range_max]
    limit, lowest = np.inf, positive_scores.min()
    if absolute_margin is not None:
        limit = min(limit, lowest - absolute_margin)
    if relative_margin is not None:
        limit = min(limit, lowest - abs(lowest) * relative_margin)
    window = window[scores[window] <= limit]
    if sampling_strategy == "random":
        order = np.random.default_rng([seed, draw]).permutation(len(window))
        window = np.sort(window[order[:num_negatives]])
    else:
        window = window[np.argsort(-scores[window], kind="stable")[:num_negatives]]
    return documents[window].tolist()


def _save(path: Path, **arrays: np.ndarray):
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def _hash(text: str) -> int:
    return words_hash(words(text)) - 2**63  # signed, as Arrow takes Python's numbers
