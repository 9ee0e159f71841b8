"""
A small evaluation while training, on given files and by all processes: retrieval, bitext mining, classification.

`evaluate_sources` in three steps: (1) sort a group of texts by length and cut it into batches by a token budget,
(2) let process i embed every batch whose number is i modulo the number of processes, one batch each per round, so that
all processes run equally many forward passes, which FSDP needs, (3) score the gathered embeddings as mteb does.
Nothing depends on the run's seed and no global random number is drawn: scores compare between runs, and a run that
evaluates trains as one that does not.
"""

import json
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, gather
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize, pad
from torch.nn.utils.rnn import pad_sequence

from ..encoding_lusifer import _batches, check_texts


Kind = Literal["retrieval", "bitext", "classification"]

# As mteb: its seed, and for classification the rows per label that a classifier is trained on, and the classifiers.
SEED = 42
ROWS_PER_LABEL = 8
CLASSIFIERS = 10
# Of a retrieval set with `max_samples`, the judged documents are kept and random others up to so many per query.
DOCUMENTS_PER_QUERY = 10


@dataclass
class EvalSource:
    """
    One evaluation set of a run, an entry of `eval_data:` in its YAML.

    Args:
        path (`str`):
            `kind="retrieval"`: a folder with `corpus.jsonl`, `queries.jsonl` and `qrels.tsv` (BEIR's layout).
            `"bitext"`: a `.tsv` with the columns `src` and `eng`. `"classification"`: a `.tsv` with the columns
            `split` (`train` or `test`), `label` and `text`.
        kind (`str`):
            `"retrieval"`, `"bitext"` or `"classification"`.
        name (`str`, *optional*):
            Leads the names of its scores; by default the last two parts of `path`: "xquad-en" of `.../xquad/en`.
        instruction (`str`, *optional*):
            What the embeddings are for. Without one, retrieval takes the model's default instruction, and the other
            kinds embed the texts as they are.
        max_samples (`int`, *optional*):
            At most so many queries, pairs, or rows of each split: always the same ones. A retrieval set keeps every
            document that is judged for a kept query, and random others up to 10 times as many documents as queries.
    """

    path: str
    kind: Kind
    name: str | None = None
    instruction: str | None = None
    max_samples: int | None = None

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            choices = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(f"kind={self.kind!r} of the evaluation set {self.path} is not one of {choices}.")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples={self.max_samples} of the evaluation set {self.path} must be 1 or more.")
        if self.name is None:
            path = Path(self.path)
            self.name = "-".join([*path.parts[-2:-1], path.stem]).strip("/.-")


@dataclass
class LoadedEvalSource:
    """An evaluation set in memory: its texts, and what to do with their embeddings."""

    source: EvalSource
    texts: list[tuple[str | None, list[str]]]  # the prompt's name and the texts, for each of two groups
    # The two groups' float32 embeddings (N, D) to scores, the main one first.
    score: Callable[[torch.Tensor, torch.Tensor], dict[str, float]]


def load_eval_sources(sources: Sequence[EvalSource]) -> list[LoadedEvalSource]:
    """Read and check the files; raises `OSError` or `ValueError` that names the file, the line and the field."""
    load = {"retrieval": _load_retrieval, "bitext": _load_bitext, "classification": _load_classification}
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two evaluation sets have the name {name!r}: give each its own `name`.")
    return [LoadedEvalSource(source, *load[source.kind](Path(source.path), source.max_samples)) for source in sources]


def evaluate_sources(
    model: torch.nn.Module,
    tokenizer,
    loaded: Sequence[LoadedEvalSource],
    *,
    max_length: int,
    max_tokens_per_batch: int | None = None,
) -> dict[str, float]:
    """
    The scores of a model in training, the same on every process; every process must call it.

    Args:
        model (`torch.nn.Module`):
            As the trainer has it: plain, with adapters, or wrapped by DDP or FSDP2.
        tokenizer (`PreTrainedTokenizerBase`):
            The encoder's tokenizer.
        loaded (list of `LoadedEvalSource`):
            What [`load_eval_sources`] returned.
        max_length (`int`):
            Longer texts are cut to so many tokens, prompt and special tokens included.
        max_tokens_per_batch (`int`, *optional*):
            At most so many tokens in a batch, unless a single text has more. 4,096 on CPUs, 16,384 elsewhere.

    Returns:
        Scores from 0 to 1: `{name}_ndcg@10`; `{name}_f1`, its two directions `{name}_f1_src_eng` and
        `{name}_f1_eng_src`, and likewise `{name}_accuracy_src_eng` and `{name}_accuracy_eng_src`; `{name}_accuracy`;
        and `mean` over the sets' `ndcg@10`, `f1` or `accuracy`.
    """
    config = extract_model_from_parallel(model).config
    device = next(model.parameters()).device
    if max_tokens_per_batch is None:
        max_tokens_per_batch = 4096 if device.type == "cpu" else 16384

    scores, main_scores = {}, []
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for item in loaded:
            embeddings = []
            for prompt_name, texts in item.texts:
                prefix = config.prompt(prompt_name, item.source.instruction)
                rows = _tokenize(tokenizer, prefix, texts, max_length)
                with torch.no_grad():  # FSDP2 does not know inference mode
                    embeddings.append(_embed(model, rows, tokenizer.pad_token_id or 0, device, max_tokens_per_batch))
            if not all(group.isfinite().all() for group in embeddings):
                raise FloatingPointError(f"The model embeds a text of {item.source.name} as NaN or infinity.")
            if PartialState().is_main_process:
                own = item.score(*embeddings)
                main_scores.append(next(iter(own.values())))
                scores |= {f"{item.source.name}_{metric}": score for metric, score in own.items()}
    finally:
        for module in in_training:
            module.training = True
    if main_scores:
        scores["mean"] = sum(main_scores) / len(main_scores)
    # The last digits may differ between processes, and with them which checkpoint is the best.
    return broadcast_object_list([scores])[0]


def _tokenize(tokenizer, prefix: str, texts: list[str], max_length: int) -> list[list[int]]:
    used = len(tokenizer(prefix)["input_ids"])
    if used >= max_length:
        raise ValueError(f"max_length={max_length} leaves no room for text beside {used} tokens of prompt: raise it.")
    return tokenizer([prefix + text for text in texts], truncation=True, max_length=max_length)["input_ids"]


def _embed(
    model: torch.nn.Module, ids: list[list[int]], padding: int, device: torch.device, max_tokens: int
) -> torch.Tensor:
    """Rows of ids to float32 embeddings (N, D) on the CPU of every process, each of which runs its share."""
    state = PartialState()
    batches = list(_batches([len(row) for row in ids], None, max_tokens))
    embeddings = None
    for start in range(0, len(batches), state.num_processes):
        batches_now = batches[start : start + state.num_processes]
        # In the last round some processes repeat a batch: each must run as many passes as the others.
        rows = [torch.tensor(ids[row]) for row in batches_now[state.process_index % len(batches_now)]]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        vectors = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).pooler_output.float()

        height = max(map(len, batches_now))  # what is gathered must have one shape
        gathered = gather(pad(vectors, (0, 0, 0, height - len(rows)))).cpu()  # (processes * height, D)
        if embeddings is None:
            embeddings = torch.empty(len(ids), gathered.shape[1])
        for process, batch in enumerate(batches_now):
            embeddings[batch] = gathered[process * height : process * height + len(batch)]
    return embeddings


# Retrieval


def read_retrieval(folder: Path) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """
    A folder in BEIR's layout: documents (the title before the text) and queries by id, and for each query that has a
    relevant document its judged ones; raises `OSError` or `ValueError` that names the file, the line and the field.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder with corpus.jsonl, queries.jsonl and qrels.tsv.")
    documents = dict(_read_texts(folder / "corpus.jsonl"))
    queries = dict(_read_texts(folder / "queries.jsonl"))
    relevance: dict[str, dict[str, int]] = defaultdict(dict)
    path = folder / "qrels.tsv"
    for line, (query, document, score) in read_tsv(path, "query-id", "corpus-id", "score"):
        for identifier, texts, file in ((query, queries, "queries.jsonl"), (document, documents, "corpus.jsonl")):
            if identifier not in texts:
                raise ValueError(f"{path}, line {line}: {file} has no row with the _id {identifier!r}.")
        try:
            relevance[query][document] = int(score)
        except ValueError:
            raise ValueError(f"{path}, line {line}: the score {score!r} is not a whole number.") from None
    relevance = {query: judged for query, judged in relevance.items() if max(judged.values()) > 0}
    if not relevance:
        raise ValueError(f"{path} has no row with a score above 0, so there is nothing to find.")
    return documents, queries, relevance


def _load_retrieval(folder: Path, max_samples: int | None):
    documents, queries, relevance = read_retrieval(folder)
    query_ids = _sample(sorted(relevance), max_samples)
    if max_samples is not None:
        kept = {document for query in query_ids for document in relevance[query]}
        others = sorted(documents.keys() - kept)
        kept.update(_sample(others, max(0, DOCUMENTS_PER_QUERY * max_samples - len(kept))))
        documents = {identifier: documents[identifier] for identifier in kept}
    # Of documents with equal similarity trec_eval ranks the greatest id first, and our sort is stable.
    rows = {identifier: row for row, identifier in enumerate(sorted(documents, reverse=True))}
    gains = [{rows[document]: gain for document, gain in relevance[query].items()} for query in query_ids]
    texts = [
        ("query", [queries[identifier] for identifier in query_ids]),
        ("document", [documents[identifier] for identifier in rows]),
    ]
    return texts, partial(_retrieval_scores, gains=gains)


def _read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """The id and the text of each row, the title before it."""
    seen = set()
    for line, content in read_lines(path):
        place = f"{path}, line {line}"
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is no JSON: {error}.") from None
        if not isinstance(row, dict) or "_id" not in row or "text" not in row:
            raise ValueError(f'{place} is no object with the fields "_id" and "text".')
        identifier = str(row["_id"])
        if identifier in seen:
            raise ValueError(f"{place}: the _id {identifier!r} stands in an earlier line too.")
        seen.add(identifier)
        title = row.get("title") or ""
        check_texts([title], what=f'{place}: "title"')
        check_texts([row["text"]], what=f'{place}: "text"')
        yield identifier, f"{title} {row['text']}".strip()


def _retrieval_scores(
    queries: torch.Tensor, documents: torch.Tensor, *, gains: list[dict[int, int]], at: int = 10
) -> dict[str, float]:
    """nDCG of queries (Q, D) over documents (N, D) by cosine; `gains`: for each query, document row to relevance."""
    queries, documents = normalize(queries), normalize(documents)
    discounts = 1 / np.log2(np.arange(at) + 2)
    total = 0.0
    for start in range(0, len(queries), 256):
        ranking = (queries[start : start + 256] @ documents.T).argsort(dim=1, descending=True, stable=True)
        for judged, found in zip(gains[start : start + 256], ranking[:, :at].tolist(), strict=True):
            gained = np.array([max(judged.get(row, 0), 0) for row in found])
            ideal = np.sort([gain for gain in judged.values() if gain > 0])[::-1][:at]
            total += (gained @ discounts[: len(gained)]) / (ideal @ discounts[: len(ideal)])
    return {f"ndcg@{at}": float(total / len(queries))}


# Bitext mining


def _load_bitext(path: Path, max_samples: int | None):
    pairs = _sample([cells for _, cells in read_tsv(path, "src", "eng")], max_samples)
    if len(pairs) < 2:
        raise ValueError(f"{path} has {len(pairs)} row: finding the other half of a pair needs at least 2.")
    source, english = map(list, zip(*pairs, strict=True))
    return [(None, source), (None, english)], _bitext_scores


def _bitext_scores(source: torch.Tensor, english: torch.Tensor) -> dict[str, float]:
    """How often the nearest text (cosine) of (N, D) is the one in the same row of the other (N, D), and back."""
    source, english = normalize(source), normalize(english)
    scores = {}
    for direction, queries, texts in (("src_eng", source, english), ("eng_src", english, source)):
        nearest = torch.cat([(block @ texts.T).argmax(dim=1) for block in queries.split(256)])
        found = (nearest == torch.arange(len(nearest))).double()
        # F1 of each row as a class, weighted by its one true member: a text that is found again and again loses.
        times = torch.bincount(nearest, minlength=len(nearest))
        scores[f"f1_{direction}"] = (2 * found / (1 + times)).mean().item()
        scores[f"accuracy_{direction}"] = found.mean().item()
    return {"f1": (scores["f1_src_eng"] + scores["f1_eng_src"]) / 2, **scores}


# Classification


def read_classification(path: Path) -> dict[str, list[tuple[str, str]]]:
    """The labels and texts of the splits "train" and "test"; a `ValueError` if one is empty."""
    splits: dict[str, list] = {"train": [], "test": []}
    for _, (split, label, text) in read_tsv(path, "split", "label", "text"):
        if split in splits:  # a validation split is not used
            splits[split].append((label, text))
    for split, rows in splits.items():
        if not rows:
            raise ValueError(f'{path} has no row whose split is "{split}".')
    return splits


def _load_classification(path: Path, max_samples: int | None):
    splits = read_classification(path)
    train, test = _balanced_sample(splits["train"], max_samples), _sample(splits["test"], max_samples)
    labels = [label for label, _ in train]
    if len(set(labels)) < 2:
        raise ValueError(f'{path} has one label in its "train" split, {labels[0]!r}: a classifier needs two.')

    experiments = _undersample(labels)
    used = sorted({row for rows in experiments for row in rows})  # only these are embedded
    position = {row: index for index, row in enumerate(used)}
    score = partial(
        _classification_scores,
        train_labels=np.array([labels[row] for row in used]),
        test_labels=np.array([label for label, _ in test]),
        experiments=[[position[row] for row in rows] for rows in experiments],
    )
    return [(None, [train[row][1] for row in used]), (None, [text for _, text in test])], score


def _balanced_sample(rows: list[tuple[str, str]], count: int | None) -> list[tuple[str, str]]:
    """`count` rows, equally many of each label as far as there are; all as they stand for None."""
    if count is None:
        return rows
    seen: dict[str, int] = defaultdict(int)
    rounds = []
    for label, text in _sample(rows, len(rows)):
        rounds.append((seen[label], label, text))
        seen[label] += 1
    return [(label, text) for _, label, text in sorted(rounds)[:count]]


def _undersample(labels: list[str]) -> list[list[int]]:
    """The training rows of each classifier; with mteb's random numbers, so that scores are its scores."""
    order = list(range(len(labels)))
    experiments = []
    for _ in range(CLASSIFIERS):
        np.random.RandomState(SEED).shuffle(order)  # the order of the time before, shuffled again
        taken: dict[str, int] = defaultdict(int)
        rows = []
        for row in order:
            if taken[labels[row]] < ROWS_PER_LABEL:
                taken[labels[row]] += 1
                rows.append(row)
        experiments.append(rows)
    return experiments


def _classification_scores(
    train: torch.Tensor,
    test: torch.Tensor,
    *,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    experiments: list[list[int]],
) -> dict[str, float]:
    """Mean accuracy on `test` (N, D) of logistic regressions on small samples of `train` (M, D)."""
    train, test = train.numpy(), test.numpy()
    accuracies = []
    for rows in experiments:
        classifier = LogisticRegression(max_iter=100, random_state=SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 100 steps are mteb's definition
            classifier.fit(train[rows], train_labels[rows])
        accuracies.append(np.mean(classifier.predict(test) == test_labels))
    return {"accuracy": float(np.mean(accuracies))}


# Files


def _sample(items: list, count: int | None) -> list:
    """`count` of the items in random order, always the same ones; all as they stand for None."""
    return items if count is None else random.Random(SEED).sample(items, min(count, len(items)))


def read_tsv(path: Path, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """The line number and the cells of `columns`, in that order, of every row after the header."""
    lines = read_lines(path)
    number, content = next(lines, (1, ""))
    header = content.split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        names = [", ".join(map(repr, columns)) for columns in (missing, header)]
        raise ValueError(f"{path}, line {number}: no column {names[0]} in the header ({names[1]}).")
    places = [header.index(column) for column in columns]
    for line, content in lines:
        cells = content.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)}.")
        yield line, [cells[place] for place in places]


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from None
