"""
The contract of intervals and comparisons: a 95 % interval holds the truth about 95 times in 100; both models of a
comparison see the same resamples; what was resampled is said, and nothing is invented where there is too little of it.
The examples behind a score give mteb's own score again, for every kind of task that has them.
"""

import json
import time
from pathlib import Path

import mteb
import numpy as np
import pytest
from mteb import mocks
from mteb.results import TaskResult
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, f1_score

from lusifer_hf.cli import main
from lusifer_hf.evaluation.examples import known_tasks, load_examples
from lusifer_hf.evaluation.results import Entry, entries, find_evaluation, find_evaluations, language_of
from lusifer_hf.evaluation.statistics import (
    AveragePrecision,
    Mean,
    RankCorrelation,
    bootstrap,
    compare_results,
)


def result(task: str, scores: dict[str, float], split: str = "test") -> TaskResult:
    """Scores of 0 to 1 by the three letters of a language, which also is the subset's name."""
    subsets = [
        {"main_score": score, "accuracy": score, "f1": 2.0, "hf_subset": language, "languages": [f"{language}-Latn"]}
        for language, score in scores.items()
    ]
    return TaskResult(
        task_name=task, dataset_revision="1", mteb_version="2.26.0", evaluation_time=1.0, scores={split: subsets}
    )


def score_intervals(results: list[TaskResult], examples: dict | None = None, **options) -> dict:
    return bootstrap([entry for result in results for entry in entries(result)], examples or {}, **options)


def single(examples) -> tuple[list[Entry], dict]:
    """One language with a set of one task."""
    row = Entry("task", "test", "eng", "en", examples(np.ones((1, examples.size))).item())
    return [row], {row[:3]: examples}


# Scores of resamples


def test_scores_of_resamples_are_those_of_scipy_and_scikit_learn():
    generator = np.random.default_rng(0)
    gold = generator.normal(size=60).round(1)
    predicted = np.stack([(gold + generator.normal(size=60)).round(), generator.normal(size=60).round(1)])  # with ties
    labels = (gold > 0).astype(int)
    rows = generator.integers(60, size=(20, 60))
    counts = np.stack([np.bincount(drawn, minlength=60) for drawn in rows]).astype(float)
    correlations = RankCorrelation(predicted[0], gold)(counts)
    precisions = AveragePrecision(predicted, labels)(counts)
    means = Mean(gold)(counts)
    assert len(set(correlations)) == len(set(precisions)) == 20
    for index, drawn in enumerate(rows):
        assert correlations[index] == pytest.approx(spearmanr(predicted[0][drawn], gold[drawn])[0])
        each = [average_precision_score(labels[drawn], values[drawn]) for values in predicted]
        assert precisions[index] == pytest.approx(max(each))
        assert means[index] == pytest.approx(gold[drawn].mean())


def test_resamples_of_equal_values_have_a_score():
    counts = np.eye(4) * 4
    assert (RankCorrelation(np.arange(4.0), np.arange(4.0))(counts) == 0).all()
    assert (AveragePrecision(np.arange(4.0)[None], np.array([0, 0, 0, 1]))(counts) == [0, 0, 0, 1]).all()


# Coverage


def bernoulli(generator) -> Mean:
    return Mean((generator.random(50) < 0.7).astype(float))


def skewed(generator) -> Mean:
    return Mean(generator.beta(0.5, 0.3, 50))


def correlated(generator) -> RankCorrelation:
    one, noise = generator.normal(size=(2, 50))
    return RankCorrelation(0.6 * one + 0.8 * noise, one)


@pytest.mark.parametrize(
    "draw, truth", [(bernoulli, 0.7), (skewed, 0.5 / 0.8), (correlated, 6 / np.pi * np.arcsin(0.3))]
)
def test_intervals_of_examples_hold_the_truth(draw, truth):
    held = 0
    for trial in range(300):
        rows, examples = single(draw(np.random.default_rng(trial)))
        interval = bootstrap(rows, examples, resamples=400, seed=trial)["en"]
        assert (interval.unit, interval.size) == ("examples", 50)
        held += interval.low <= truth <= interval.high
    assert 0.90 <= held / 300 <= 0.99


@pytest.mark.parametrize("count", [5, 8, 20])
def test_intervals_of_tasks_hold_the_truth(count):
    held = 0
    for trial in range(400):
        scores = np.random.default_rng(trial).normal(0.6, 0.1, count)
        interval = score_intervals([result(f"t{i}", {"eng": x}) for i, x in enumerate(scores)], seed=trial)["en"]
        assert (interval.unit, interval.size) == ("tasks", count)
        held += interval.low <= 0.6 <= interval.high
    assert 0.90 <= held / 400 <= 0.99


def test_differences_hold_the_truth():
    held = 0
    for trial in range(300):
        difficulty, *noise = np.random.default_rng(trial).normal(size=(3, 60))
        values = [difficulty + shift + own for shift, own in zip((1, 0.5), noise, strict=True)]
        examples = [{("t", "test", "eng"): Mean(own)} for own in values]
        sides = [[result("t", {"eng": own.mean()})] for own in values]
        difference = compare_results(*sides, examples, resamples=400, seed=trial)["en"].difference
        held += difference.low <= 0.5 <= difference.high
    assert 0.90 <= held / 300 <= 0.99


# What is resampled


def test_too_few_tasks_give_no_interval():
    found = score_intervals([result(f"t{i}", {"eng": 0.5 + i / 10}) for i in range(4)])["en"]
    assert (found.unit, found.estimate, found.tasks) == (None, pytest.approx(0.65), 4)
    assert np.isnan([found.low, found.high]).all()
    assert str(found) == "nothing: too few (4 tasks)"


def test_examples_count_only_where_all_tasks_have_them():
    results = [result(f"t{i}", {"eng": 0.5, "fra": 0.5}) for i in range(6)]
    examples = {(f"t{i}", "test", language): Mean(np.full(20, 0.5)) for i in range(6) for language in ("eng", "fra")}
    assert {name: str(found) for name, found in score_intervals(results, examples).items()} == {
        "en": "120 examples of 6 tasks",
        "fr": "120 examples of 6 tasks",
        "average": "240 examples of 6 tasks",
    }
    del examples["t3", "test", "fra"]
    examples["t2", "test", "eng"] = Mean(np.full(4, 0.5))  # too few for an interval
    assert {str(found) for found in score_intervals(results, examples).values()} == {"6 tasks"}
    found = score_intervals(results, examples, unit="examples")
    assert (found["en"].unit, str(found["fr"])) == (None, "100 examples of 5 tasks")
    assert {str(found) for found in score_intervals(results, examples, unit="tasks").values()} == {"6 tasks"}


def test_translations_of_a_set_are_resampled_together():
    values = np.random.default_rng(0).random(80)
    results = [result("t", {"eng": values.mean(), "fra": values.mean()})]
    examples = {("t", "test", language): Mean(values) for language in ("eng", "fra")}
    english, french, average = score_intervals(results, examples).values()
    assert english == french
    # Drawn apart, the interval of their mean would be narrower by a factor of sqrt(2).
    assert (average.low, average.high) == pytest.approx((english.low, english.high))


def test_seeds():
    rows, examples = single(skewed(np.random.default_rng(0)))
    first, again, other = (bootstrap(rows, examples, seed=seed)["en"] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.low == pytest.approx(other.low, abs=0.05)


def test_chunks_change_nothing(monkeypatch):
    rows, examples = single(correlated(np.random.default_rng(0)))
    whole = bootstrap(rows, examples)["en"]
    monkeypatch.setattr("lusifer_hf.evaluation.statistics.CHUNK_ELEMENTS", 1700)
    assert bootstrap(rows, examples)["en"] == pytest.approx(whole)


def test_twenty_languages_take_seconds():
    generator = np.random.default_rng(0)
    rows, examples = [], {}
    for language in range(20):
        for task in range(5):
            rows.append(Entry(f"t{task}", "test", f"l{language}", f"l{language}", 0.5))
            examples[rows[-1][:3]] = Mean(generator.random(1000))
    start = time.process_time()
    assert len(bootstrap(rows, examples)) == 21
    assert time.process_time() - start < 10


# Comparisons


def pair(shift: float) -> tuple:
    """Two models on five tasks, whose examples are far apart and whose difference on each is near `shift`."""
    generator = np.random.default_rng(0)
    sides, examples = ([], []), ({}, {})
    for task in range(5):
        values = generator.normal(0.5, 0.2, 100)
        better = values + shift + generator.normal(0, 0.01, 100)
        for side, own, scores in zip(sides, examples, (better, values), strict=True):
            own[f"t{task}", "test", "eng"] = Mean(scores)
            side.append(result(f"t{task}", {"eng": scores.mean()}))
    return *sides, examples


@pytest.mark.parametrize("unit", ["examples", "tasks"])
def test_a_model_is_equal_to_itself(unit):
    results, _, (examples, _) = pair(0)
    found = compare_results(results, results, (examples, examples), unit=unit)["en"]
    assert (found.difference.estimate, found.difference.low, found.difference.high) == (0, 0, 0)
    assert found.difference.unit == unit
    assert found.verdict == "within noise"


@pytest.mark.parametrize("unit", ["examples", "tasks"])
def test_a_difference_is_found_that_each_interval_alone_hides(unit):
    first, second, examples = pair(0.01)
    found = compare_results(first, second, examples, unit=unit)["en"]
    assert found.verdict == "first"
    assert found.difference.estimate == pytest.approx(0.01, abs=0.003)
    assert compare_results(second, first, examples[::-1], unit=unit)["en"].verdict == "second"
    one, other = (score_intervals(side, own)["en"] for side, own in zip((first, second), examples, strict=True))
    assert one.low < other.high


def test_only_what_both_have_is_compared(caplog):
    first, second = ([result(f"t{i}", {"eng": 0.5}) for i in numbers] for numbers in (range(6), range(1, 8)))
    found = compare_results(first, second)["en"]
    assert found.difference.tasks == 5
    assert "t0, t6, t7" in caplog.text
    with pytest.raises(ValueError, match=r"no task in common\. The first has t0; the second t5"):
        compare_results(first[:1], second[4:5])


def test_scores_that_are_no_numbers_are_left_out(caplog):
    first, second = ([result(f"t{i}", {"eng": score}) for i in range(6)] for score in (0.5, 0.4))
    second[3] = result("t3", {"eng": float("nan")})
    found = compare_results(first, second)["en"]
    assert (found.difference.tasks, found.verdict) == (5, "first")
    assert "t3 test eng has nan as its score" in caplog.text


def test_sets_of_other_examples_are_no_pairs(caplog):
    first, second, examples = pair(0.01)
    examples[1]["t0", "test", "eng"] = Mean(np.ones(99))
    assert compare_results(first, second, examples)["en"].difference.unit == "tasks"
    assert "100 and 99 examples" in caplog.text


def test_bad_arguments():
    rows, examples = single(bernoulli(np.random.default_rng(0)))
    with pytest.raises(ValueError, match="unit='rows' is not one of 'examples', 'tasks'"):
        bootstrap(rows, examples, unit="rows")
    with pytest.raises(ValueError, match="resamples=10 is too few"):
        bootstrap(rows, examples, resamples=10)
    with pytest.raises(ValueError, match="The examples of no task are known"):
        bootstrap(rows, {}, unit="examples")


# Results and predictions of mteb


@pytest.mark.parametrize(
    "languages, column",
    [
        (["eng-Latn"], "en"),
        (["arb-Arab"], "ar"),
        (["eng-Latn", "deu-Latn"], "de"),
        (["deu-Latn", "ara-Arab"], "ar-de"),
        (["srp-Latn", "srp-Cyrl"], "srp"),
        (["eng-Latn", "deu-Latn", "fra-Latn"], "mul"),
    ],
)
def test_columns(languages, column):
    assert language_of(languages) == column


@pytest.fixture(scope="module")
def mocked(tmp_path_factory) -> tuple[Path, list]:
    """A random model on mteb's mock tasks of every kind of text task: the folder, and the tasks with their data."""
    folder = tmp_path_factory.mktemp("mocked")
    tasks = [
        task()
        for task in (
            mocks.MockMultilingualRetrievalTask,
            mocks.MockMultilingualRerankingTask,
            mocks.MockBitextMiningTask,
            mocks.MockMultilingualParallelBitextMiningTask,
            mocks.MockClassificationTask,
            mocks.MockMultilabelClassification,
            mocks.MockMultilingualSTSTask,
            mocks.MockPairClassificationTask,
            mocks.MockSummarizationTask,
            mocks.LegacyMockClusteringFastTask,
        )
    ]
    model = mteb.get_model("mteb/baseline-random-encoder")
    cache = mteb.ResultCache(folder)
    mteb.evaluate(model, tasks, cache=cache, prediction_folder=folder / "predictions", show_progress_bar=False)
    return folder, tasks


def test_examples_give_the_scores_of_mteb(mocked, caplog):
    folder, tasks = mocked
    evaluation = find_evaluation(folder, "mteb/baseline-random-encoder")
    results = evaluation.load()
    examples = load_examples(evaluation, results, folder, tasks)
    scores = {entry[:3]: entry.score for result in results for entry in entries(result)}
    without = ("MockMultilabelClassification", "MockSummarizationTask", "LegacyMockClusteringFastTask")
    assert {task.metadata.name for task in tasks} == {task for task, _, _ in scores}
    assert examples.keys() == {key for key in scores if key[0] not in without}
    assert len(set(scores.values())) > 2
    for key, found in examples.items():
        assert found(np.ones((1, found.size))).item() == pytest.approx(scores[key], abs=1e-5)
    assert not caplog.text
    alone = load_examples(evaluation, results, folder)
    assert "MockMultilingualSTSTask, MockPairClassificationTask" in caplog.text
    assert {task for task, _, _ in alone} == {"MockBitextMiningTask", "MockMultilingualParallelBitextMiningTask"}


def test_known_tasks_have_only_the_evaluated_subsets():
    (task,) = known_tasks([result("MassiveIntentClassification", {"fr": 0.5, "sw": 0.5}), result("mine", {"eng": 1})])
    assert (task.metadata.name, sorted(task.hf_subsets)) == ("MassiveIntentClassification", ["fr", "sw"])
    assert not task.data_loaded


def store(folder: Path, name: str, nearest: dict[str, np.ndarray], revision: str = "1", meta: str | None = None):
    """Results and predictions of bitext mining, laid out as mteb does, from the nearest sentences by task."""
    run = folder / "results" / name.replace("/", "__") / revision
    predictions = folder / "predictions" / name.replace("/", "__") / revision
    for path in (run, predictions):
        path.mkdir(parents=True)
    (run / "model_meta.json").write_text(json.dumps({"name": name, "revision": revision}))
    for task, rows in nearest.items():
        result(task, {"fra": round(float(np.mean(rows == np.arange(len(rows)))), 6)}).to_disk(run / f"{task}.json")
        matches = [{"corpus_id": int(row), "score": 0.5} for row in rows]
        saved = {"mteb_model_meta": {"model_name": meta or name, "revision": revision}}
        saved["fra"] = {"test": {"sentence1-sentence2": matches}}
        (predictions / f"{task}_predictions.json").write_text(json.dumps(saved))


def neighbours(accuracy: float, size: int = 200) -> np.ndarray:
    rows = np.arange(size)
    wrong = round(size * (1 - accuracy))
    rows[:wrong] = np.roll(rows[:wrong], 1)
    return rows


def test_f1_of_bitext_mining(tmp_path):
    nearest = np.random.default_rng(0).integers(20, size=30)
    nearest[:10] = np.arange(10)
    store(tmp_path, "a", {"bitext": nearest})
    evaluation = find_evaluation(tmp_path)
    (loaded,) = evaluation.load()
    loaded.scores["test"][0]["main_score"] = loaded.scores["test"][0]["f1"] = f1_score(
        np.arange(30), nearest, average="weighted", zero_division=0
    )
    (found,) = load_examples(evaluation, [loaded], tmp_path).values()
    assert set(found.values) > {0.0}


def test_predictions_of_another_run_are_not_used(tmp_path, caplog):
    store(tmp_path, "a", {"bitext": neighbours(0.5), "other": neighbours(0.9)})
    evaluation = find_evaluation(tmp_path)
    results = evaluation.load()
    assert len(load_examples(evaluation, results, tmp_path)) == 2
    results[0].scores["test"][0]["main_score"] = 0.51
    assert [key[0] for key in load_examples(evaluation, results, tmp_path)] == ["other"]
    assert "bitext_predictions.json gives 0.500000 for test fra, but the main score is 0.510000" in caplog.text
    store(tmp_path / "later", "b", {"bitext": neighbours(0.5)}, meta="c")
    evaluation = find_evaluation(tmp_path / "later")
    assert load_examples(evaluation, evaluation.load(), tmp_path) == {}


def test_damaged_and_doubled_predictions(tmp_path):
    store(tmp_path, "a", {"bitext": neighbours(0.5)})
    evaluation = find_evaluation(tmp_path)
    (path,) = tmp_path.rglob("*_predictions.json")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="are both predictions of a@1"):
        load_examples(evaluation, evaluation.load(), tmp_path)
    copy.write_text('{"fra": {}}')
    with pytest.raises(ValueError, match=f"{copy} does not begin with the model"):
        load_examples(evaluation, evaluation.load(), tmp_path)


# lusifer-hf compare


def test_compare_two_models_of_a_folder(tmp_path, capsys):
    store(tmp_path, "me/good", {"bitext": neighbours(0.9), "more": neighbours(0.8)})
    store(tmp_path, "me/bad", {"bitext": neighbours(0.6), "more": neighbours(0.8)})
    assert main(["compare", "me/good", "me/bad", "--results", str(tmp_path), "--resamples", "500"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| fr |"))
    assert row.startswith("| fr | 85.00 | 70.00 | 15.00 | ")
    assert row.endswith("| me/good is better | 400 examples of 2 tasks |")
    assert main(["compare", "me/good", "me/good", "--results", str(tmp_path)]) == 0
    assert "| 0.00 | 0.00 to 0.00 | within noise | 400 examples of 2 tasks |" in capsys.readouterr().out
    assert main(["compare", "me/good", "me/bad", "--results", str(tmp_path), "--unit", "tasks"]) == 0
    assert "| – | – | nothing: too few (2 tasks) |" in capsys.readouterr().out


def test_compare_two_folders(tmp_path, capsys):
    for folder, accuracy in (("one", 0.5), ("two", 0.9)):
        store(tmp_path / folder, "me/model", {"bitext": neighbours(accuracy)})
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'one'}: me/model@1" in printed
    assert "two is better | 200 examples of 1 task |" in printed


def compare_error(capsys, *arguments) -> str:
    assert main(["compare", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_bad_input_to_compare(tmp_path, capsys):
    both = tmp_path / "both"
    store(both, "me/model", {"bitext": neighbours(0.5)})
    store(both, "me/model", {"bitext": neighbours(0.5)}, revision="2")
    store(both, "me/base", {"other": neighbours(0.5)})
    (tmp_path / "empty").mkdir()
    assert "absent is no folder" in compare_error(capsys, tmp_path / "absent", both)
    assert "empty holds no results" in compare_error(capsys, tmp_path / "empty", both)
    assert "The nearest names: 'me/model', 'me/base'" in compare_error(
        capsys, "me/modle", "me/base", "--results", both
    )
    message = compare_error(capsys, "me/model", "me/base", "--results", both)
    assert "2 evaluations, me/model@1 (" in message
    assert "me/model@2 (" in message
    assert "choose one by its folder or as NAME@REVISION" in message
    assert "no task in common" in compare_error(capsys, "me/model@2", "me/base", "--results", both)
    assert "resamples=5" in compare_error(capsys, "me/base", "me/base", "--results", both, "--resamples", 5)

    (damaged,) = both.rglob("other.json")
    damaged.write_text(damaged.read_text()[:80])
    assert f"{damaged} is no result of an mteb task" in compare_error(capsys, "me/base", "me/base", "--results", both)
    damaged.write_text('{"task_name": "other"}')
    assert f"{damaged} is no result of an mteb task" in compare_error(capsys, "me/base", "me/base", "--results", both)
    damaged.with_name("model_meta.json").write_text("{}")
    assert "does not name a model" in compare_error(capsys, "me/base", "me/base", "--results", both)


def test_results_of_mteb_are_found(mocked):
    folder, tasks = mocked
    (found,) = find_evaluations(folder)
    assert (found.model, found.revision) == ("mteb/baseline-random-encoder", "2")
    assert [result.task_name for result in found.load()] == sorted(task.metadata.name for task in tasks)
