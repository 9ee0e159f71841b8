"""Finished evaluations on disk: what mteb's `ResultCache` keeps, and the scores in it by task and language."""

import difflib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mteb.results import TaskResult
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

META_NAME = "model_meta.json"  # mteb writes it beside the results of each model and revision

# ISO 639-3, which mteb uses, to the paper's codes. Another language keeps its three letters. Where mteb names the
# standard member of a macro language (Standard Arabic of Arabic), both are one language.
LANGUAGES = {
    "eng": "en",
    "spa": "es",
    "rus": "ru",
    "fra": "fr",
    "vie": "vi",
    "fas": "fa",
    "pes": "fa",
    "ind": "id",
    "ara": "ar",
    "arb": "ar",
    "fin": "fi",
    "kor": "ko",
    "hin": "hi",
    "ben": "bn",
    "tel": "te",
    "swa": "sw",
    "swh": "sw",
    "deu": "de",
    "jpn": "ja",
    "tha": "th",
    "yor": "yo",
    "zho": "zh",
    "cmn": "zh",
    "cmo": "zh",
}


class Entry(NamedTuple):
    """The main score of one model, from 0 to 1, on one subset of one split of a task."""

    task: str
    split: str
    subset: str
    language: str
    score: float


@dataclass(frozen=True)
class Evaluation:
    """The folder with the results of one model and revision; `load` reads them."""

    model: str
    revision: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.model}@{self.revision}"

    def load(self) -> list[TaskResult]:
        """Every task's result, by name; raises `ValueError` that names the file which is none."""
        results = []
        paths = [path for path in sorted(self.folder.glob("*.json")) if path.name != META_NAME]
        for path in tqdm(paths, desc=f"Reading {self.model}", unit="task", delay=2):
            try:
                results.append(TaskResult.from_disk(path, load_historic_data=False))
            except ValueError as error:  # of pydantic too
                reason = str(error.__cause__ or error).partition("\n")[0]
                raise ValueError(
                    f"{path} is no result of an mteb task ({reason}): delete it and run the task again."
                ) from error
        return results


def find_evaluations(folder: str | Path) -> list[Evaluation]:
    """
    The evaluations at any depth of a folder, by name and revision.

    Raises:
        `OSError`, `ValueError`: there is no such folder, or nothing was evaluated in it.
    """
    folder, evaluations = Path(folder), []
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder.")
    for path in sorted(folder.rglob(META_NAME)):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            found = Evaluation(meta["name"], str(meta["revision"] or "no_revision_available"), path.parent)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not name a model and its revision ({error!r}).") from error
        if any(result.name != META_NAME for result in path.parent.glob("*.json")):
            evaluations.append(found)
    if not evaluations:
        raise ValueError(
            f"{folder} holds no results: give a folder that `lusifer-hf evaluate` or mteb's ResultCache wrote to."
        )
    return sorted(evaluations, key=lambda evaluation: evaluation.name)


def find_evaluation(folder: str | Path, model: str | None = None) -> Evaluation:
    """
    The one evaluation in a folder, or that of a model.

    Args:
        folder (`str` or `Path`):
            As for [`find_evaluations`].
        model (`str`, *optional*):
            Its name, or `name@revision`; without one the folder must hold a single evaluation.

    Raises:
        `OSError`, `ValueError`: there is none, or more than one; the message names those there are.
    """
    evaluations = find_evaluations(folder)
    chosen = [found for found in evaluations if model in (None, found.model, found.name)]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        places = ", ".join(f"{found.name} ({found.folder})" for found in chosen)
        raise ValueError(
            f"{folder} holds {len(chosen)} evaluations, {places}: choose one by its folder or as NAME@REVISION."
        )
    names = sorted({found.model for found in evaluations})
    nearest = difflib.get_close_matches(model, names, n=3, cutoff=0.0)
    raise ValueError(f"{folder} holds no evaluation of {model!r}. The nearest names: {', '.join(map(repr, nearest))}.")


def entries(result: TaskResult) -> Iterator[Entry]:
    """The main scores of a task's result, one for each split and subset; of one that is no number a warning."""
    for split, subsets in result.scores.items():
        for scores in subsets:
            score, subset = scores["main_score"], scores["hf_subset"]
            if math.isnan(score):
                logger.warning(f"{result.task_name} {split} {subset} has {score} as its score: it is left out.")
                continue
            yield Entry(result.task_name, split, subset, language_of(scores["languages"]), float(score))


def changed_tasks(results: Iterable[TaskResult]) -> set[str]:
    """The tasks that were evaluated on different versions of their data, of each with a warning."""
    versions: dict[str, set[str]] = {}
    for result in results:
        versions.setdefault(result.task_name, set()).add(result.dataset_revision)
    changed = {task for task, found in versions.items() if len(found) > 1}
    for task in sorted(changed):
        names = ", ".join(sorted(versions[task]))
        logger.warning(f"{task} was evaluated on different versions of its data ({names}): it does not compare.")
    return changed


def language_of(languages: list[str]) -> str:
    """
    The column that a subset counts for, from mteb's `["eng-Latn", "deu-Latn"]`.

    A pair with English counts for the other language. Two others are their own column, "ar-de"; more, "mul".
    """
    codes = {language.split("-")[0] for language in languages}
    codes = sorted({LANGUAGES.get(code, code) for code in codes})
    if len(codes) == 2 and "en" in codes:
        codes.remove("en")
    return "-".join(codes) if len(codes) <= 2 else "mul"
