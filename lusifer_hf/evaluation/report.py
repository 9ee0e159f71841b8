"""
The report on evaluations: tables shaped like the paper's, intervals, pictures, and metadata for model cards.

`write_report` in three steps: (1) keep the scores that all models have, so that no average is over other tasks than
the one beside it, (2) average them by language and by family, (3) write. The same results give the same files.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump
from mteb.results import TaskResult

from .plots import NOTHING, plot_bars, plot_heat_maps
from .results import LANGUAGES, Entry, changed_tasks, entries
from .statistics import AVERAGE, Comparison, Examples, Interval, Key, bootstrap


logger = logging.getLogger(__name__)

MULTILINGUAL, CROSS_LINGUAL = "LUSIFER(multilingual)", "LUSIFER(cross-lingual)"
PUBLISHED = {  # tables 1 and 2 of the paper
    MULTILINGUAL: Path(__file__).parent / "published" / "multilingual.csv",
    CROSS_LINGUAL: Path(__file__).parent / "published" / "cross-lingual.csv",
}
NEWER = ".v2"  # after the name of a data set of which the paper has the first version
FAMILIES = ("Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "STS", "BitextMining")
BALANCED = "balanced average"

Column = Literal["language", "task"]


def write_report(
    results: Mapping[str, Sequence[TaskResult]],
    families: Mapping[str, str],
    folder: str | Path,
    *,
    benchmark: str | None = None,
    examples: Mapping[str, Mapping[Key, Examples]] | None = None,
) -> Path:
    """
    Report on the evaluation of one model, or compare several.

    Args:
        results (mapping):
            Each model's name with its results; a model without any is left out, with a warning.
        families (mapping):
            Each task's name with its type in mteb, such as `"Retrieval"`.
        folder (`str` or `Path`):
            Where to write: `report.md`, the tables `scores.csv` and `languages.csv` (`tasks.csv` for the cross-lingual
            benchmark), the pictures of both as `.png` and `.svg`, and `model-index/MODEL.yml`. Files of an earlier
            report are replaced.
        benchmark (`str`, *optional*):
            The benchmark that the tasks are of. With `"LUSIFER(multilingual)"` or `"LUSIFER(cross-lingual)"` the
            published figures stand beside the models; the latter is reported by task, as in the paper.
        examples (mapping, *optional*):
            For each model's name what [`load_examples`] returned. Intervals are over tasks where it is not known of
            all models.

    Returns:
        `Path`: `report.md`.

    Raises:
        `ValueError`: there is no result, a task without a family, or no score that all models have; before anything
        is written.
    """
    folder = Path(folder)
    for model in [model for model, tasks in results.items() if not tasks]:
        logger.warning(f"{model} has no results, and is left out of the report.")
    results = {model: tasks for model, tasks in results.items() if tasks}
    scores = _scores(results, families)
    changed = changed_tasks(result for tasks in results.values() for result in tasks)
    in_common = scores.groupby(["task", "split", "subset"])["model"].transform("nunique") == len(results)
    shared = scores[in_common & ~scores["task"].isin(changed)]
    if shared.empty:
        raise ValueError(f"There is no task that all of {', '.join(results)} were evaluated on: report on each alone.")
    by: Column = "task" if benchmark == CROSS_LINGUAL else "language"
    table, by_family = _average(shared, by), _average_by_family(shared)
    if by == "task":
        table = table[_ordered(table, [f"{name}{new}" for name in _figures(benchmark) for new in ("", NEWER)])]
    published = _published(benchmark, table)
    of_models = [(examples or {}).get(model, {}) for model in results]
    known_of_all = set.intersection(*map(set, of_models))  # so that intervals side by side are of the same kind
    intervals = {
        model: _intervals(shared, model, by, {key: found[key] for key in known_of_all})
        for model, found in zip(results, of_models, strict=True)
    }

    (folder / "model-index").mkdir(parents=True, exist_ok=True)
    scores.to_csv(folder / "scores.csv", index=False, float_format="%.4f", lineterminator="\n")
    rows = pd.concat([table, published], keys=["evaluated", "published"], names=["source", "model"])
    rows.round(2).to_csv(folder / f"{by}s.csv", lineterminator="\n")
    bars = table.drop(columns=BALANCED, errors="ignore")
    plot_bars(bars, intervals, folder / f"{by}s", title=f"Scores by {by}")
    plot_heat_maps(by_family, folder / "families")
    for model in results:
        name = re.sub(r"[^\w.-]+", "__", model)
        index = _model_index(model, results[model], families)
        (folder / "model-index" / f"{name}.yml").write_text(index, encoding="utf-8")
    paragraphs = [
        *_head(benchmark, scores, shared),
        *_models_section(by, table, published),
        *_families_section(by_family),
        *_intervals_section(by, table, intervals),
        *(_tasks_section(shared) if by == "language" else ()),
    ]
    (folder / "report.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return folder / "report.md"


def comparison_table(first: str, second: str, comparisons: Mapping[str, Comparison]) -> str:
    """What [`compare_results`] returned, in Markdown, under the names of the two models."""
    first, second = _escape(first), _escape(second)
    verdicts = {"first": f"{first} is better", "second": f"{second} is better", None: NOTHING}
    rows = []
    for language in _ordered(comparisons, LANGUAGES.values()):
        one, other, difference = comparisons[language]
        _, interval, resampled = _interval_cells(difference)
        verdict = comparisons[language].verdict
        scores = [_number(100 * score) for score in (one, other, difference.estimate)]
        rows.append([language, *scores, interval, verdicts.get(verdict, verdict), resampled])
    judged = sum(language != AVERAGE and one.verdict is not None for language, one in comparisons.items())
    return (
        _table(["language", first, second, "difference", "95 % interval", "", "resampled"], rows)
        + "\n\nThe intervals are of the difference on the same resamples, each for its language alone: where nothing "
        f"differs, {0.05 * judged:.1f} of {judged} on average would be called different."
    )


def _scores(results: Mapping[str, Sequence[TaskResult]], families: Mapping[str, str]) -> pd.DataFrame:
    """One row for each score, from 0 to 100."""
    if not results:
        raise ValueError("There are no results to report on.")
    unknown = sorted({result.task_name for tasks in results.values() for result in tasks} - families.keys())
    if unknown:
        raise ValueError(f"`families` does not say what kind of task these are: {', '.join(unknown)}.")
    rows = [
        (model, entry.task, families[entry.task], entry.language, entry.split, entry.subset, 100 * entry.score)
        for model, tasks in results.items()
        for result in sorted(tasks, key=lambda result: result.task_name)
        for entry in entries(result)
    ]
    scores = pd.DataFrame(rows, columns=["model", "task", "family", "language", "split", "subset", "score"])
    # In this order, which also is that of tables and pictures.
    scores["model"] = pd.Categorical(scores["model"], list(results))
    scores["family"] = pd.Categorical(scores["family"], _ordered(scores["family"], FAMILIES))
    scores["language"] = pd.Categorical(scores["language"], _ordered(scores["language"], LANGUAGES.values()))
    return scores


def _ordered(names: Iterable[str], first: Iterable[str]) -> list[str]:
    names, first = set(names), list(dict.fromkeys(first))
    return [name for name in first if name in names] + sorted(
        names.difference(first), key=lambda name: (name == AVERAGE, name)
    )


def _average(shared: pd.DataFrame, by: Column) -> pd.DataFrame:
    """Models by languages, or by tasks, then their averages."""
    cells = shared.groupby(["model", by, "family", "task"], observed=True)["score"].mean()
    table = cells.groupby(["model", by], observed=True).mean().unstack()
    table.columns = list(table.columns)
    average = table.mean(axis=1)
    if by == "language":
        of_families = cells.groupby(["model", by, "family"], observed=True).mean()
        of_languages = of_families.groupby(["model", by], observed=True).mean()
        table[BALANCED] = of_languages.groupby("model", observed=True).mean()
    table.insert(len(table.columns) - (by == "language"), AVERAGE, average)
    return table


def _average_by_family(shared: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each model languages by families; NaN where there is no task."""
    cells = shared.groupby(["model", "language", "family", "task"], observed=True)["score"].mean()
    means = cells.groupby(["model", "language", "family"], observed=True).mean().unstack()
    return {model: means.loc[model] for model in means.index.unique("model")}


def _figures(benchmark: str) -> pd.DataFrame:
    return pd.read_csv(PUBLISHED[benchmark], index_col="model")


def _published(benchmark: str | None, table: pd.DataFrame) -> pd.DataFrame:
    """The published models in the columns of the table; no row where nothing was published."""
    if benchmark not in PUBLISHED:
        return pd.DataFrame(columns=table.columns, dtype=float)
    figures = _figures(benchmark)
    names = figures.index + figures.pop("multilingual_training_data").map({True: " †", False: ""})
    columns = {column: column.removesuffix(NEWER) for column in table.columns}
    rows = figures.reindex(columns=list(columns.values())).set_axis(list(columns), axis=1).set_axis(names)
    shown = [column for column in columns if column not in (AVERAGE, BALANCED)]
    if set(map(columns.get, shown)) != set(figures.columns) - {AVERAGE}:
        rows[AVERAGE] = rows[shown].mean(axis=1, skipna=False)  # over the same columns as the models beside it
    return rows


def _intervals(shared: pd.DataFrame, model: str, by: Column, examples: Mapping[Key, Examples]) -> dict[str, Interval]:
    rows = shared[shared["model"] == model]
    return bootstrap(
        [Entry(row.task, row.split, row.subset, getattr(row, by), row.score / 100) for row in rows.itertuples()],
        examples,
    )


# Text


def _head(benchmark: str | None, scores: pd.DataFrame, shared: pd.DataFrame) -> Iterator[str]:
    yield f"# Evaluation{f': {_escape(benchmark)}' if benchmark else ''}"
    tasks, languages = shared["task"].nunique(), shared["language"].nunique()
    yield (
        f"{', '.join(map(_escape, shared['model'].unique()))} on {tasks} task{'s' * (tasks != 1)} in {languages} "
        f"language{'s' * (languages != 1)}. Scores are each task's main score in mteb, from 0 to 100; every single "
        "one is in [scores.csv](scores.csv)."
    )
    left_out = [
        f"{_escape(task)} ({', '.join(rows['language'].unique())}; "
        f"of {', '.join(map(_escape, rows['model'].unique()))})"
        for task, rows in scores.drop(shared.index).groupby("task")
    ]
    if left_out:
        yield f"**Left out below, because not all models have it on the same data:** {'; '.join(left_out)}."


def _models_section(by: Column, table: pd.DataFrame, published: pd.DataFrame) -> Iterator[str]:
    yield f"## By {by}"
    rounded, rows = table.round(2), []
    best = rounded.max() if len(table) > 1 else rounded.max() + 1  # a single model is not marked
    for model, row in rounded.iterrows():
        cells = (f"**{_number(x)}**" if x == best[name] else _number(x) for name, x in row.items())
        rows.append([_escape(model), *cells])
    for model, row in published.iterrows():
        rows.append([f"*{_escape(model)}*", *(NOTHING if pd.isna(x) else f"*{_number(x)}*" for x in row)])
    yield _table(["model", *map(_escape, table.columns)], rows)
    if by == "language":
        yield (
            f"**{AVERAGE}**: the mean over languages of the mean over a language's tasks, as in the paper. "
            f"**{BALANCED}**: the mean over languages of the mean over a language's families of the mean over a "
            "family's tasks, so that the families of a language weigh alike however many tasks they have."
        )
    else:
        yield f"A task's score is the mean over its subsets. **{AVERAGE}**: the mean over tasks, as in the paper."
    if len(published):
        yield (
            "In italics: published figures (arXiv 2501.00874), computed by its authors over the paper's full list of "
            "tasks. They compare with this evaluation as far as its tasks are the same. †: trained on multilingual "
            "data."
        )
        for column in table.columns[table.columns.str.endswith(NEWER)]:
            yield f"Published under {column} is the score of {column.removesuffix(NEWER)}."
    yield f"![Scores by {by}]({by}s.png)"
    yield "The lines are the intervals below, where there are any."


def _families_section(by_family: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    yield "## By language and family"
    for model, means in by_family.items():
        if len(by_family) > 1:
            yield f"### {_escape(model)}"
        yield _table(["language", *means.columns], ([name, *map(_number, row)] for name, *row in means.itertuples()))
    yield "![Scores by language and family](families.png)"


def _intervals_section(
    by: Column, table: pd.DataFrame, intervals: Mapping[str, Mapping[str, Interval]]
) -> Iterator[str]:
    yield "## Intervals"
    yield (
        f"95 % confidence intervals, each for its {by} alone, by the bootstrap over what the last column names. "
        "Examples: how the score varies with other examples of the same tasks. Tasks: with other tasks."
    )
    yield _table(
        [by, "model", "score", "95 % interval", "resampled"],
        (
            [_escape(name), _escape(model), *_interval_cells(intervals[model][name])]
            for name in table.columns
            for model in table.index
            if name in intervals[model]
        ),
    )


def _tasks_section(shared: pd.DataFrame) -> Iterator[str]:
    yield "## By task"
    cells = shared.groupby(["task", "family", "language", "model"], observed=True)["score"].mean()
    means = cells.groupby(["task", "family", "model"], observed=True).mean().unstack()
    yield _table(
        ["task", "family", *map(_escape, means.columns)],
        ([_escape(task), family, *map(_number, row)] for (task, family), *row in means.itertuples()),
    )
    yield "A task's score is the mean over its languages."


def _interval_cells(interval: Interval) -> list[str]:
    between = NOTHING if interval.unit is None else f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"
    return [_number(100 * interval.estimate), between, str(interval)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(score: float) -> str:
    return NOTHING if pd.isna(score) else f"{score:.2f}"


def _escape(name: str) -> str:
    """A name as Markdown shows it; an underscore inside a word means nothing there."""
    return re.sub(r"[\\`*\[\]<>|#~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(name.split()))


def _model_index(model: str, results: Sequence[TaskResult], families: Mapping[str, str]) -> str:
    """YAML for the head of a model card, from which the Hub shows results."""
    found = [
        EvalResult(
            task_type=families[result.task_name],
            dataset_type=result.task_name,
            dataset_name=f"MTEB {result.task_name} ({scores['hf_subset']})",
            dataset_config=scores["hf_subset"],
            dataset_split=split,
            dataset_revision=result.dataset_revision,
            metric_type="main_score",
            metric_value=round(100 * scores["main_score"], 4),
            source_name="MTEB",
            source_url="https://github.com/embeddings-benchmark/mteb/",
        )
        for result in sorted(results, key=lambda result: result.task_name)
        for split, subsets in result.scores.items()
        for scores in subsets
    ]
    return yaml_dump({"model-index": eval_results_to_model_index(model, found)})
