"""
The contract of the report: the averages are what it says they are, over what all models have and nothing else; what is
published never mixes with what was evaluated; the same results give the same bytes; nothing in a picture covers
anything.
"""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from matplotlib.figure import Figure
from matplotlib.image import imread
from mteb.results import TaskResult

from lusifer_hf.evaluation.report import CROSS_LINGUAL, MULTILINGUAL, PUBLISHED, comparison_table, write_report
from lusifer_hf.evaluation.results import LANGUAGES
from lusifer_hf.evaluation.statistics import Mean, compare_results


FAMILIES = ("Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "STS")
# English, then others in the order of the paper, then one that it lacks.
CODES = [*{name: code for code, name in LANGUAGES.items()}.values(), "urd"]


def result(task: str, scores: dict[str, float], split: str = "test") -> TaskResult:
    """Scores of 0 to 1 by language, or two languages with a hyphen."""
    subsets = [
        {"main_score": score, "hf_subset": name, "languages": [f"{code}-Latn" for code in name.split("-")]}
        for name, score in scores.items()
    ]
    return TaskResult(
        task_name=task, dataset_revision="7", mteb_version="2.26.0", evaluation_time=1.0, scores={split: subsets}
    )


def tables(report: Path) -> list[list[list[str]]]:
    """The cells of every table of a Markdown file, which must have equally many in all lines."""
    found = []
    for is_table, lines in itertools.groupby(report.read_text().splitlines(), lambda line: line.startswith("|")):
        if is_table:
            rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
            assert len({len(row) for row in rows}) == 1
            found.append([rows[0], *rows[2:]])
    return found


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


# Averages


KINDS = {"a": "Retrieval", "b": "Retrieval", "c": "STS"}


def test_averages(tmp_path):
    results = [
        result("a", {"eng": 0.1, "fra": 0.5}),
        result("b", {"eng": 0.3}),
        result("c", {"eng": 0.8, "eng-fra": 0.9}),
    ]
    report = write_report({"mine": results}, KINDS, tmp_path)
    by_language, by_family, _, by_task = tables(report)
    assert by_language == [
        ["model", "en", "fr", "average", "balanced average"],
        # en: (10 + 30 + 80) / 3, and ((10 + 30) / 2 + 80) / 2; fr: (50 + 90) / 2 either way
        ["mine", "40.00", "70.00", "55.00", "60.00"],
    ]
    assert by_family == [["language", "Retrieval", "STS"], ["en", "20.00", "80.00"], ["fr", "50.00", "90.00"]]
    assert by_task[1:] == [["a", "Retrieval", "30.00"], ["b", "Retrieval", "30.00"], ["c", "STS", "85.00"]]
    assert "**" not in " ".join(by_language[1])  # one model is not the best of any


def test_subsets_and_splits_of_a_language_are_one_task(tmp_path):
    both = result("a", {"eng": 0.2, "eng-eng": 0.6})
    both.scores["dev"] = result("a", {"eng": 0.7}).scores["test"]
    report = write_report({"mine": [both, result("c", {"eng": 0.9})]}, KINDS, tmp_path)
    assert tables(report)[0][1] == ["mine", "70.00", "70.00", "70.00"]


def test_only_what_all_models_have_is_averaged(tmp_path):
    complete = [result("a", {"eng": 0.5, "fra": 0.5}), result("b", {"eng": 0.1}), result("c", {"tel": 0.1})]
    easy = [result("a", {"eng": 0.6, "fra": 0.4})]  # would win with its own average
    report = write_report({"complete": complete, "easy": easy}, KINDS, tmp_path)
    assert tables(report)[0][1:] == [
        ["complete", "50.00", "**50.00**", "**50.00**", "**50.00**"],
        ["easy", "**60.00**", "40.00", "**50.00**", "**50.00**"],
    ]
    assert "b (en; of complete); c (te; of complete)." in report.read_text()
    scores = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(scores) == 1 + 4 + 2
    assert "complete,c,STS,te,test,tel,10.0000" in scores


def test_other_versions_of_the_data_do_not_compare(tmp_path, caplog):
    before, after = ([result("a", {"eng": score}), result("c", {"eng": 0.5})] for score in (0.1, 0.9))
    after[0].dataset_revision = "8"
    report = write_report({"before": before, "after": after}, KINDS, tmp_path)
    assert [row[1] for row in tables(report)[0][1:]] == ["**50.00**", "**50.00**"]
    assert "a (en; of before, after)." in report.read_text()
    assert "a was evaluated on different versions of its data (7, 8)" in caplog.text
    assert compare_results(before, after)["en"].difference.estimate == 0


def test_families_that_a_language_lacks(tmp_path):
    results = [result("a", {"eng": 0.5}), result("c", {"fra": 0.5})]
    by_family = tables(write_report({"mine": results}, KINDS, tmp_path))[1]
    assert by_family[1:] == [["en", "50.00", "–"], ["fr", "–", "50.00"]]


# Published figures


def test_published_figures_are_those_of_the_paper(shared_folder):
    facts = json.loads((shared_folder / "facts" / "paper_results.json").read_text(encoding="utf-8"))
    trained_on = {}
    for benchmark, key in ((MULTILINGUAL, "table1"), (CROSS_LINGUAL, "table2")):
        rows = rows_of(PUBLISHED[benchmark])
        assert list(rows) == [row["model"] for row in facts[key]]
        for row in facts[key]:
            figures = rows[row["model"]]
            trained_on.setdefault(row["model"], row.get("multilingual_training_data"))
            assert figures.pop("multilingual_training_data") == str(trained_on[figures.pop("model")]).lower()
            assert float(figures.pop("average")) == row["average"]
            assert {name: float(score) for name, score in figures.items()} == row["scores"]
    assert rows["LUSIFER"]["IndicCrosslingualSTS"] == "43.40"


def test_published_figures_stand_beside_the_benchmark_alone(tmp_path):
    scores = {code: 0.02 for code in CODES[:14]}  # less than was published: that takes no mark from them
    results = {"one": [result("a", scores)], "two": [result("a", scores | {"eng": 0.01})]}
    assert len(tables(write_report(results, KINDS, tmp_path / "other", benchmark="mine"))[0]) == 3
    report = write_report(results, KINDS, tmp_path / "paper", benchmark=MULTILINGUAL)
    table = tables(report)[0]
    assert len(table) == 3 + 14
    assert table[1] == ["one", *["**2.00**"] * 16]
    assert table[2] == ["two", "1.00", *["**2.00**"] * 13, "1.93", "1.93"]
    assert table[3][0] == "*Jina-embeddings-v3 †*"
    assert (table[-1][0], *table[-1][-2:]) == ("*LUSIFER*", "*62.63*", "–")
    assert not any("**" in cell for row in table[3:] for cell in row)
    assert "published figures" in report.read_text()
    assert rows_of(tmp_path / "paper" / "languages.csv")["LUSIFER"]["source"] == "published"


def test_published_averages_are_over_the_languages_shown(tmp_path):
    languages = {"mine": [result("a", {"eng": 0.5, "tel": 0.5})]}
    table = tables(write_report(languages, KINDS, tmp_path, benchmark=MULTILINGUAL))[0]
    assert table[-1] == ["*LUSIFER*", "*57.20*", "*69.30*", "*63.25*", "–"]
    more = {"mine": [result("a", {"eng": 0.5, "urd": 0.5})]}
    table = tables(write_report(more, KINDS, tmp_path, benchmark=MULTILINGUAL))[0]
    assert table[-1] == ["*LUSIFER*", "*57.20*", "–", "–", "–"]


def test_cross_lingual_tasks_are_reported_as_in_the_paper(tmp_path):
    kinds = {"STS17": "STS", "STS22.v2": "STS", "MLQARetrieval": "Retrieval"}
    results = [
        result("STS17", {"eng-deu": 0.5, "eng-fra": 0.7}),
        result("STS22.v2", {"deu-fra": 0.3}),
        result("MLQARetrieval", {"ara-deu": 0.4, "deu-ara": 0.2}),
    ]
    report = write_report({"mine": results}, kinds, tmp_path, benchmark=CROSS_LINGUAL)
    by_task, by_language, _ = tables(report)
    assert by_task[0] == ["model", "MLQARetrieval", "STS17", "STS22.v2", "average"]
    assert by_task[1] == ["mine", "30.00", "60.00", "30.00", "40.00"]
    assert "Published under STS22.v2 is the score of STS22." in report.read_text()
    assert by_task[-1] == ["*LUSIFER*", "*36.68*", "*81.09*", "*70.49*", "*62.75*"]
    assert [row[0] for row in by_language] == ["language", "fr", "de", "ar-de", "de-fr"]
    assert (tmp_path / "tasks.csv").exists() and (tmp_path / "tasks.png").exists()


# Intervals


def test_intervals_say_what_was_resampled(tmp_path):
    results = [result("a", {"eng": 0.5, "fra": 0.5}), result("c", {"eng": 0.5})]
    examples = {("a", "test", "fra"): Mean([0.0, 1.0] * 50)}
    report = write_report({"mine": results}, KINDS, tmp_path, examples={"mine": examples})
    table = tables(report)[2]
    assert table[0] == ["language", "model", "score", "95 % interval", "resampled"]
    assert table[1] == ["en", "mine", "50.00", "–", "nothing: too few (2 tasks)"]
    low, high = map(float, table[2][3].split(" to "))
    assert 35 < low < 45 and 55 < high < 65  # 1.96 standard errors of 5 points
    assert table[2][4] == "100 examples of 1 task"

    # Beside a model whose examples are not known, tasks are resampled for both.
    report = write_report({"mine": results, "other": results}, KINDS, tmp_path, examples={"mine": examples})
    assert {row[4] for row in tables(report)[3][1:]} == {"nothing: too few (1 task)", "nothing: too few (2 tasks)"}


def test_comparison_table():
    first, second = ([result(f"t{i}", {"eng": score, "urd": 0.5})] for i, score in ((0, 0.9), (0, 0.4)))
    values = Mean([0.4] * 30), Mean([0.9] * 30)
    examples = tuple({("t0", "test", "eng"): own} for own in values[::-1])
    lines = comparison_table("me/a|b", "c", compare_results(first, second, examples)).splitlines()
    assert lines[0].startswith(r"| language | me/a\|b | c | difference |")
    assert lines[2] == r"| en | 90.00 | 40.00 | 50.00 | 50.00 to 50.00 | me/a\|b is better | 30 examples of 1 task |"
    assert lines[3] == "| urd | 50.00 | 50.00 | 0.00 | – | – | nothing: too few (1 task) |"
    assert "0.1 of 1 on average" in lines[-1]


# Files


def test_model_index_is_what_the_hub_reads(tmp_path):
    results = [result("a", {"eng": 0.123456, "fra": 0.5}), result("c", {"eng": 0.9})]
    write_report({"me/my model": results}, KINDS, tmp_path)
    (path,) = (tmp_path / "model-index").iterdir()
    assert path.name == "me__my__model.yml"
    name, found = model_index_to_eval_results(yaml.safe_load(path.read_text())["model-index"])
    assert name == "me/my model"
    assert [(one.task_type, one.dataset_type, one.dataset_config, one.metric_value) for one in found] == [
        ("Retrieval", "a", "eng", 12.3456),
        ("Retrieval", "a", "fra", 50.0),
        ("STS", "c", "eng", 90.0),
    ]
    assert found[0].dataset_revision == "7"


def test_names_are_shown_as_they_are(tmp_path):
    report = write_report({"a_b|c*_d_": [result("a", {"eng": 0.5})]}, KINDS, tmp_path)
    assert r"| a_b\|c\*\_d\_ | 50.00 |" in report.read_text()


def test_the_same_results_give_the_same_files(tmp_path):
    results = {"one": [result("c", {"eng": 0.5}), result("a", {"fra": 0.1})], "two": []}
    results["two"] = results["one"][::-1]  # in another order
    for folder in ("first", "second"):
        write_report(results, KINDS, tmp_path / folder, benchmark=MULTILINGUAL)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert {"report.md", "languages.svg", "languages.png", "families.svg"} <= {str(path) for path in files}
    for path in files:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path
    table = tables(tmp_path / "first" / "report.md")[0]
    assert table[1][1:] == table[2][1:]


def test_bad_input_is_known_before_anything_is_written(tmp_path, caplog):
    folder = tmp_path / "report"
    one = [result("a", {"eng": 0.5})]
    with pytest.raises(ValueError, match="There are no results to report on"):
        write_report({"mine": []}, KINDS, folder)
    with pytest.raises(ValueError, match="`families` does not say what kind of task these are: a"):
        write_report({"mine": one}, {"c": "STS"}, folder)
    with pytest.raises(ValueError, match="no task that all of mine, other were evaluated on"):
        write_report({"mine": one, "other": [result("a", {"fra": 0.5})]}, KINDS, folder)
    assert not folder.exists()
    write_report({"mine": one, "failed": []}, KINDS, folder)
    assert "failed has no results" in caplog.text


# Pictures


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that was saved, once."""
    saved = []
    save = Figure.savefig

    def save_and_keep(figure, *args, **kwargs):
        if figure not in saved:
            saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    return saved


NAMES = [
    "mine",
    "intfloat/multilingual-e5-large-instruct",
    "Alibaba-NLP/gte-multilingual-base",
    "BAAI/bge-m3",
    "jinaai/jina-embeddings-v3",
    "me/an-untypically-long-name-of-a-model-that-somebody-tried",
]


@pytest.mark.parametrize("models, languages, families", [(1, 1, 1), (1, 20, 2), (2, 3, 6), (6, 20, 6)])
def test_nothing_covers_anything(tmp_path, figures, models, languages, families):
    kinds = {f"{family}{number}": family for family in FAMILIES[:families] for number in range(3)}
    results = {
        name: [
            result(task, {code: (7 * i + 5 * j + 3 * k) % 11 / 11 for k, code in enumerate(CODES[:languages])})
            for j, task in enumerate(kinds)
        ]
        for i, name in enumerate(NAMES[:models])
    }
    write_report(results, kinds, tmp_path)
    bars, maps = figures
    for figure, name in ((bars, "languages"), (maps, "families")):
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        texts, slanted = [figure._suptitle] if figure._suptitle else [], []
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        for axis in figure.axes:
            texts += [axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
            shown = [text for text in axis.get_xticklabels() if axis.get_xlim()[0] < text.get_position()[0]]
            (slanted if shown and shown[0].get_rotation() % 90 else texts).extend(shown)
            low, high = sorted(axis.get_ylim())
            texts += [text for text in axis.get_yticklabels() if low <= text.get_position()[1] <= high]
        boxes = [(text, text.get_window_extent(renderer)) for text in texts + slanted if text.get_text()]
        for text, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0, f"{text.get_text()} is cut off"
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, f"{text.get_text()} is cut off"
        boxes = [(text, box) for text, box in boxes if text not in slanted]
        for (one, box), (other, of_other) in itertools.combinations(boxes, 2):
            assert not box.overlaps(of_other), f"{one.get_text()} covers {other.get_text()}"
        # Slanted names run side by side: the distance between two of them must be more than a line.
        for one, other in itertools.pairwise(slanted):
            places = [text.get_transform().transform(text.get_position()) for text in (one, other)]
            between = (places[1] - places[0])[0] * math.sin(math.radians(one.get_rotation()))
            line = one.get_fontsize() * figure.dpi / 72
            assert between > line or between < 0, f"{one.get_text()} covers {other.get_text()}"
        assert imread(tmp_path / f"{name}.png").shape[1] <= 2800
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
    heights = [bar.get_height() for axis in bars.axes for bar in axis.patches]
    assert len(heights) == models * (languages + 1)
