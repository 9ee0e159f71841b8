"""
A small English data set from text that every Python installation has: the docstrings of its standard library.

`write_docstring_data` in three steps: (1) read the docstrings from the source files, importing nothing, and keep their
prose, (2) make at most one pair of each object: its summary and the details below it, or where there are none, its
name in words and the summary, (3) hold some objects out, but none whose document resembles a training text.
"""

import ast
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


# Tests, tools with their own names for things, and what some distributions install apart or no more.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "ensurepip"}
SKIPPED |= {"idlelib", "lib2to3", "turtledemo", "distutils", "tkinter"}
FEWEST_OBJECTS = 1000  # of a whole standard library there are about 4,000
HELD_OUT_PERCENT = 12
NEGATIVES = 2
SENTENCE_WORDS = range(5, 41)
DETAILS_WORDS = range(8, 81)
# A held-out document half of whose runs of four words stand in one training text is too much like it.
SHINGLE, RESEMBLANCE = 4, 0.5


class _Object(NamedTuple):
    """A module, class or function whose docstring begins with a sentence of prose."""

    name: str  # dotted, module first
    summary: str
    details: list[str]  # the sentences after the summary


class _Pair(NamedTuple):
    name: str
    query: str
    document: str


def write_docstring_data(folder: str | Path, library: str | Path | None = None) -> dict[str, int]:
    """
    Write training data for both stages and a held-out retrieval set: the same for the same Python.

    `train.jsonl` holds rows of `query`, `positive` and `negative` (the documents of the next objects, mostly of the
    same module), `texts.jsonl` rows of one sentence, `query`, and the folder `held_out` is in BEIR's layout. No
    held-out text is in the other files.

    Args:
        folder (`str` or `Path`):
            Where to write; what has the same name there is replaced.
        library (`str` or `Path`, *optional*):
            The folder of a standard library; by default the running Python's.

    Returns:
        `dict[str, int]`: the number of `train` rows, `texts`, and held-out `queries`.

    Raises:
        `FileNotFoundError`: if `library` does not hold the source of a standard library.
    """
    folder = Path(folder)
    library = Path(sysconfig.get_path("stdlib") if library is None else library)
    objects = list(_read_objects(library))
    if len(objects) < FEWEST_OBJECTS:
        raise FileNotFoundError(
            f"{library} holds the source of {len(objects)} objects with a docstring, so it is not a whole standard "
            "library; perhaps this Python has it zipped or compiled. Run with another Python, or give its Lib folder."
        )
    pairs = list(_make_pairs(objects))
    train = [pair for pair in pairs if not _is_held_out(pair.name)]
    texts = _sentences(item for item in objects if not _is_held_out(item.name))
    known = _Shingles([*texts, *(text for pair in train for text in (pair.query, pair.document))])
    held_out = [
        pair
        for pair in pairs
        if _is_held_out(pair.name) and pair.query not in known.texts and not known.resemble(pair.document)
    ]

    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "train.jsonl", _training_rows(train))
    _write_jsonl(folder / "texts.jsonl", ({"query": text} for text in texts))
    _write_jsonl(folder / "held_out" / "queries.jsonl", ({"_id": p.name, "text": p.query} for p in held_out))
    _write_jsonl(folder / "held_out" / "corpus.jsonl", ({"_id": p.name, "text": p.document} for p in held_out))
    lines = ["query-id\tcorpus-id\tscore", *(f"{pair.name}\t{pair.name}\t1" for pair in held_out)]
    (folder / "held_out" / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train": len(train), "texts": len(texts), "queries": len(held_out)}


def _read_objects(library: Path) -> Iterator[_Object]:
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - SKIPPED)
        for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            try:
                tree = ast.parse(path.read_bytes(), str(path))
            except SyntaxError:  # a template of some tool
                continue
            name = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            yield from _objects_below(tree, name)


def _objects_below(node: ast.AST, name: str) -> Iterator[_Object]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        name = f"{name}.{node.name}"
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        paragraphs = [_prose(paragraph) for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or "")]
        sentences = [sentence for paragraph in paragraphs for sentence in paragraph]
        if paragraphs[0] and len(sentences[0].split()) in SENTENCE_WORDS:
            yield _Object(name, sentences[0], sentences[1:])
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):  # expressions hold no docstring
            yield from _objects_below(child, name)


def _prose(paragraph: str) -> list[str]:
    """The sentences of a paragraph; none of a list, an example or a signature."""
    if re.search(r"^\s*[-*>|]|--|::|:$", paragraph, re.MULTILINE):
        return []
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"\1", paragraph).replace("`", "")
    text = " ".join(text.split())
    words = re.findall(r"[A-Za-z][a-z]+\b", text)
    letters = sum(character.isalpha() or character == " " for character in text)
    if not text.isascii() or not text[:1].isupper() or letters < 0.9 * len(text) or len(words) < 0.7 * text.count(" "):
        return []
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)


def _sentences(objects: Iterable[_Object]) -> list[str]:
    """Each once, none very short."""
    sentences = dict.fromkeys(sentence for item in objects for sentence in (item.summary, *item.details))
    return [sentence for sentence in sentences if len(sentence.split()) >= SENTENCE_WORDS.start]


def _make_pairs(objects: Iterable[_Object]) -> Iterator[_Pair]:
    """In which no name and no text stands twice."""
    seen = set()
    for item in objects:
        details = ""
        for sentence in item.details:
            longer = f"{details} {sentence}".strip()
            if len(longer.split()) >= DETAILS_WORDS.stop:
                break
            details = longer
        if len(details.split()) in DETAILS_WORDS:
            pair = _Pair(item.name, item.summary, details)
        else:
            pair = _Pair(item.name, _in_words(item.name), item.summary)
        own = {text.casefold() for text in pair}
        if not own & seen:
            seen |= own
            yield pair


def _in_words(name: str) -> str:
    """`mailbox.MH.removeFolder` as "mailbox mh remove folder"."""
    return " ".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[._]+", " ", name).lower().split())


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


class _Shingles:
    """Finds texts that have much wording in common with one of many others."""

    def __init__(self, texts: Iterable[str]):
        self.texts = set(texts)
        self.texts_with = defaultdict(set)
        for number, text in enumerate(self.texts):
            for shingle in self._of(text):
                self.texts_with[shingle].add(number)

    @staticmethod
    def _of(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.casefold())
        return {tuple(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}

    def resemble(self, text: str) -> bool:
        shingles = self._of(text)
        shared = Counter(number for shingle in shingles for number in self.texts_with.get(shingle, ()))
        return max(shared.values(), default=0) >= RESEMBLANCE * len(shingles)


def _training_rows(pairs: list[_Pair]) -> Iterator[dict]:
    documents = [pair.document for pair in pairs]
    following = documents + documents[:NEGATIVES]
    for index, pair in enumerate(pairs, 1):
        yield {"query": pair.query, "positive": [pair.document], "negative": following[index : index + NEGATIVES]}


def _write_jsonl(path: Path, rows: Iterable[dict]):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
