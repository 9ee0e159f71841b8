"""
The examples behind finished scores: mteb's saved predictions, scored one by one.

mteb saves what a model predicted (`prediction_folder`), but neither the labels nor a score for each example. Bitext
mining needs none: sentence i belongs to sentence i. All other kinds take labels from the task's data. Whatever is
computed here must give mteb's own main score again, or it is not used.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import mteb
import numpy as np
import pytrec_eval
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.results import TaskResult

from .results import Evaluation
from .statistics import AveragePrecision, Examples, Key, Mean, RankCorrelation


logger = logging.getLogger(__name__)

PREDICTIONS = "_predictions.json"  # after the task's name, in mteb
META_CHARACTERS = 10_000  # the model's name and revision stand before any prediction
# mteb's names of a score to trec_eval's
RETRIEVAL_MEASURES = {
    "ndcg": "ndcg_cut",
    "map": "map_cut",
    "recall": "recall",
    "precision": "P",
    "hit_rate": "success",
}
# Of a way to compare two embeddings: what mteb saves, and whether more of it is more alike.
SIMILARITIES = {
    "similarity": ("similarity_scores", 1),
    "cosine": ("cosine_scores", 1),
    "manhattan": ("manhattan_distances", -1),
    "euclidean": ("euclidean_distances", -1),
    "dot": ("dot_scores", 1),
}
TOLERANCE = 1e-5  # mteb rounds scores to six digits


def load_examples(
    evaluation: Evaluation, results: Sequence[TaskResult], folder: str | Path, tasks: Sequence[AbsTask] = ()
) -> dict[Key, Examples]:
    """
    The examples of an evaluation's scores, as far as its predictions are there.

    Args:
        evaluation (`Evaluation`):
            The model and revision that the predictions must be of.
        results (sequence of `TaskResult`):
            What `evaluation.load()` returned.
        folder (`str` or `Path`):
            Where mteb's prediction files lie, at any depth.
        tasks (sequence of `AbsTask`, *optional*):
            The tasks with their data; it is loaded where a prediction needs it. Without its task only bitext mining
            has examples.

    Returns:
        The examples of (task, split, subset). Missing are clustering, summarization, multilabel classification, and
        macro F1; and with a warning, tasks without their labels and predictions that do not give the score in
        `results`.
    """
    by_name = {task.metadata.name: task for task in tasks}
    files = _find_predictions(evaluation, folder)
    examples = {}
    for result in results:
        name = result.task_name
        if name not in files:
            continue
        predictions = json.loads(files[name].read_text(encoding="utf-8"))
        for split, subsets in result.scores.items():
            for scores in subsets:
                found = _score(by_name.get(name), predictions, split, scores)
                if found is None:
                    continue
                again, score = found(np.ones((1, found.size))).item(), scores["main_score"]
                if abs(again - score) <= TOLERANCE:
                    examples[name, split, scores["hf_subset"]] = found
                else:
                    logger.warning(
                        f"{files[name]} gives {again:.6f} for {split} {scores['hf_subset']}, but the main score is "
                        f"{score:.6f}: its examples are not used."
                    )
    unlabelled = sorted(files.keys() - by_name.keys() - {task for task, _, _ in examples})
    if unlabelled:
        logger.warning(f"No labels for the examples of {', '.join(unlabelled)}: pass the tasks (--local their files).")
    return examples


def known_tasks(results: Sequence[TaskResult]) -> list[AbsTask]:
    """The tasks of results that mteb knows, with the subsets that were evaluated; their data is not loaded."""
    tasks = []
    for result in results:
        try:
            tasks.append(mteb.get_task(result.task_name, hf_subsets=result.hf_subsets))
        except KeyError:  # made from a user's files
            logger.debug(f"{result.task_name} is no task of mteb.")
    return tasks


def _find_predictions(evaluation: Evaluation, folder: str | Path) -> dict[str, Path]:
    """The prediction file of each task."""
    files: dict[str, Path] = {}
    for path in sorted(Path(folder).rglob(f"*{PREDICTIONS}")):
        with open(path, encoding="utf-8") as file:
            head = file.read(META_CHARACTERS)
        try:
            meta, _ = json.JSONDecoder().raw_decode(head, head.index("{", 1))
            model = meta["model_name"], str(meta["revision"] or "no_revision_available")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not begin with the model that made it ({error!r}): delete it.") from error
        if model != (evaluation.model, evaluation.revision):
            continue
        task = path.name.removesuffix(PREDICTIONS)
        if task in files:
            raise ValueError(f"{files[task]} and {path} are both predictions of {evaluation.name}: delete one.")
        files[task] = path
    return files


def _score(task: AbsTask | None, predictions: dict, split: str, scores: dict) -> Examples | None:
    """The examples of one subset; None where they cannot be known."""
    subset = scores["hf_subset"]
    parallel = predictions.get("parallel", {}).get(split, {}).get(subset)  # bitext mining of many languages at once
    predicted = predictions.get(subset, {}).get(split)
    if predicted is None and parallel is None:
        return None
    if task is None or isinstance(task, AbsTaskBitextMining):
        return _bitext(scores, parallel or predicted)
    if not task.data_loaded:
        task.load_data()
    main_score = task.metadata.main_score
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        return _retrieval(task, predicted, task.dataset[subset][split]["relevant_docs"])
    data = task.dataset[subset] if subset in task.dataset else task.dataset
    data = data[split]
    if isinstance(task, AbsTaskClassification) and main_score == "accuracy":
        return _classification(predicted, np.array(data[task.label_column_name]))
    if isinstance(task, AbsTaskSTS) and main_score == "cosine_spearman":
        return RankCorrelation(np.array(predicted["cosine_scores"]), np.array(data["score"], dtype=float))
    if isinstance(task, AbsTaskPairClassification) and main_score.endswith("_ap"):
        labels = data[0] if len(data) == 1 else data  # older data sets are one row of lists
        return _pairs(predicted, np.array(labels[task.label_column_name]), main_score.removesuffix("_ap"))
    return None


def _bitext(scores: dict, predicted: object) -> Mean | None:
    """The nearest sentence of each, where sentence i belongs to sentence i."""
    if isinstance(predicted, dict) and len(predicted) == 1:
        (predicted,) = predicted.values()  # by the pair's column names
    if not (isinstance(predicted, list) and predicted and isinstance(predicted[0], dict)):
        return None
    if "corpus_id" not in predicted[0]:
        return None
    nearest = np.array([match["corpus_id"] for match in predicted])
    hits = nearest == np.arange(len(nearest))
    # Every sentence is a class of its own; its F1 falls with the others that it is the nearest of.
    f1 = 2 * hits / (1 + np.bincount(nearest, minlength=len(nearest))[: len(nearest)])
    is_f1 = abs(scores["main_score"] - scores["f1"]) <= abs(scores["main_score"] - scores["accuracy"])
    return Mean(f1 if is_f1 else hits.astype(float))


def _retrieval(task: AbsTaskRetrieval, rankings: dict, relevant: dict) -> Mean | None:
    """Every query's score, in the order of the queries' ids."""
    name, _, cutoff = task.metadata.main_score.rpartition("_at_")
    if name not in RETRIEVAL_MEASURES:
        return None
    if task.ignore_identical_ids:
        rankings = {
            query: {document: score for document, score in ranking.items() if document != query}
            for query, ranking in rankings.items()
        }
    if task.skip_first_result:
        rankings = {
            query: dict(sorted(ranking.items(), key=lambda item: item[1], reverse=True)[1:])
            for query, ranking in rankings.items()
        }
    measure = RETRIEVAL_MEASURES[name]
    evaluated = pytrec_eval.RelevanceEvaluator(relevant, {f"{measure}.{cutoff}"}).evaluate(rankings)
    return Mean(np.array([evaluated[query][f"{measure}_{cutoff}"] for query in sorted(evaluated)]))


def _classification(predicted: list, labels: np.ndarray) -> Mean | None:
    """How many of mteb's classifiers are right about each row."""
    if any(len(experiment) != len(labels) for experiment in predicted):
        return None  # cross-validation: each part of the rows has a classifier of its own
    return Mean((np.array(predicted) == labels).mean(axis=0))


def _pairs(predicted: dict, labels: np.ndarray, way: str) -> AveragePrecision:
    ways = SIMILARITIES.values() if way == "max" else [SIMILARITIES[way]]
    return AveragePrecision(np.array([sign * np.array(predicted[name]) for name, sign in ways]), labels)
