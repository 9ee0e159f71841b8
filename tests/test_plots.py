"""
The contract of a run's picture: one panel for each kind of value that was logged, with a title, a unit and a legend
that covers nothing; values that are no numbers do not spoil it; the callback keeps it in the output folder and beside
each checkpoint, by the first process only, and a run never fails for it.
"""

import itertools
import math
import sys

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from transformers import Trainer, TrainerState, TrainingArguments

from lusifer_hf.training import plots
from lusifer_hf.training.plots import PlotCallback, plot_run


LOSS, SIMILARITY, SCORES, RATE = "Loss (lower", "Similarity of", "Evaluation (higher", "Learning rate"


def history(count: int, *, similarities: bool = True, sets: int = 3) -> list[dict]:
    """As a run's `state.log_history`: a log every 10 steps, three evaluations, and the summary at the end."""
    logs = []
    for index in range(1, count + 1):
        log = {"loss": 3 / index, "grad_norm": 1.0, "learning_rate": 1e-4 / index, "squad/loss": 2 / index}
        if similarities:
            log |= {"positive_similarity": 1 - 1 / index, "negative_similarity": 1 / index}
        logs.append({**log, "epoch": index / count, "step": 10 * index})
        if sets and index % (count // 3) == 0:
            kinds = itertools.cycle(["ndcg@10", "f1", "accuracy"])
            scores = {f"eval_set{number}_{next(kinds)}": 0.1 * (1 + number % 5) for number in range(sets)}
            scores |= {"eval_set1_f1_src_eng": 0.9, "eval_mean": 0.3, "eval_runtime": 5.0}
            logs.append({**scores, "epoch": index / count, "step": 10 * index})
    return [*logs, {"train_runtime": 9.0, "train_loss": 1.0, "epoch": 1.0, "step": 10 * count}]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """`draw(log_history)`: the figure that was saved."""
    figures = []
    save = Figure.savefig

    def save_and_keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)

    def drawn(log_history):
        plot_run(log_history, tmp_path / "run.png")
        assert imread(tmp_path / "run.png").shape[1] >= 1000
        assert [path.name for path in tmp_path.iterdir()] == ["run.png"]
        return figures[-1]

    return drawn


def labels(axis) -> list[str]:
    return axis.get_legend_handles_labels()[1]


def panel(figure, title: str):
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left").startswith(title)]
    return axis


@pytest.mark.parametrize(
    "log_history, titles",
    [
        (history(30), [LOSS, SIMILARITY, SCORES, RATE]),
        (history(30, similarities=False), [LOSS, SCORES, RATE]),
        (history(30, sets=0), [LOSS, SIMILARITY, RATE]),
        (history(30, similarities=False, sets=0), [LOSS, RATE]),
        ([], [LOSS]),
    ],
)
def test_a_panel_for_what_was_logged(draw, log_history, titles):
    figure = draw(log_history)
    assert len(figure.axes) == len(titles)
    for axis, title in zip(figure.axes, titles, strict=True):
        assert axis.get_title(loc="left").startswith(title)
        assert axis.get_ylabel() or title == RATE
    assert figure.axes[-1].get_xlabel() == "optimizer step"


@pytest.mark.parametrize("count, sets", [(9, 3), (300, 3), (300, 14)])
def test_nothing_covers_anything(draw, count, sets):
    figure = draw(history(count, sets=sets))
    renderer = figure.canvas.get_renderer()
    boxes = {"title": figure._suptitle.get_window_extent(renderer)}
    for index, axis in enumerate(figure.axes):
        boxes[f"lines {index}"] = axis.get_window_extent(renderer)
        boxes[f"title {index}"] = axis._left_title.get_window_extent(renderer)
        if axis.get_legend():
            boxes[f"legend {index}"] = axis.get_legend().get_window_extent(renderer)
        for number, tick in enumerate(axis.get_yticklabels()):
            low, high = sorted(axis.get_ylim())
            if low <= tick.get_position()[1] <= high:
                boxes[f"tick {index} {number}"] = tick.get_window_extent(renderer)
    assert len(boxes) > 20
    for (first, one), (second, other) in itertools.combinations(boxes.items(), 2):
        assert not one.overlaps(other), f"{first} covers {second}"
    for name, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0, f"{name} is cut off"
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, f"{name} is cut off"


def test_values_and_their_mean(draw):
    axis = panel(draw(history(300)), LOSS)
    raw, mean = axis.lines
    assert labels(axis) == ["training, as logged", "training, mean of 15"]
    assert raw.get_alpha() < 0.5
    assert list(raw.get_xdata()) == [10 * index for index in range(1, 301)]
    assert list(raw.get_ydata()) == [3 / index for index in range(1, 301)]
    assert mean.get_ydata()[100] == pytest.approx(sum(3 / index for index in range(94, 109)) / 15)
    assert len(panel(draw(history(9)), LOSS).lines) == 1


def test_main_scores_and_their_mean(draw):
    axis = panel(draw(history(30)), SCORES)
    assert labels(axis) == ["set0 ndcg@10", "set1 f1", "set2 accuracy", "mean"]
    assert list(axis.lines[1].get_xdata()) == [100, 200, 300]
    assert list(axis.lines[1].get_ydata()) == [0.2] * 3
    assert labels(panel(draw(history(30, sets=1)), SCORES)) == ["set0 ndcg@10"]
    assert labels(panel(draw(history(30, sets=14)), SCORES)) == ["each of 14 sets", "mean"]


def test_values_that_are_no_numbers_are_left_out(draw):
    log_history = history(30)
    log_history[3]["loss"], log_history[5]["loss"] = math.nan, math.inf
    raw, mean = panel(draw(log_history), LOSS).lines
    assert len(raw.get_ydata()) == 28
    assert all(map(math.isfinite, mean.get_ydata()))


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"loss": (self.weight - x).square().mean()}


def run(folder) -> TrainerState:
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, logging_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(Line(), arguments, train_dataset=[{"x": torch.ones(())}] * 8, callbacks=[PlotCallback()])
    trainer.train()
    return trainer.state


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(plots.logger, "warning_once", messages.append, raising=False)
    return messages


def test_callback_keeps_a_picture_beside_each_checkpoint(tmp_path, warnings):
    run(tmp_path)
    pictures = [tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    contents = [(folder / "training.png").read_bytes() for folder in pictures]
    assert contents[1] != contents[2], "the second picture shows no more than the first"
    assert not warnings
    assert not list(tmp_path.rglob("*.partial"))


def test_only_the_first_process_draws(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(log_history=history(9), is_world_process_zero=False)
    PlotCallback().on_train_end(arguments, state, None)
    assert not list(tmp_path.rglob("*.png"))
    state.is_world_process_zero = True
    PlotCallback().on_train_end(arguments, state, None)
    assert (tmp_path / "training.png").exists()


def test_a_run_goes_on_without_matplotlib(tmp_path, monkeypatch, warnings):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(tmp_path).global_step == 4
    assert warnings
    assert 'pip install "lusifer-hf[train]"' in warnings[0]
    assert not list(tmp_path.rglob("*.png"))


def test_a_run_goes_on_whatever_fails(tmp_path, monkeypatch, warnings):
    def fail(*args):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "plot_run", fail)
    assert run(tmp_path).global_step == 4
    assert "no fonts" in warnings[0]
