"""A picture of a run: loss, similarities, evaluation and learning rate over the steps."""

import math
import os
import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

PLOT_NAME = "training.png"
MAIN_SCORES = ("_ndcg@10", "_f1", "_accuracy")
# Okabe and Ito's colours, which the colour-blind can tell apart; their yellow darker, to be seen on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#A89A00")
BLUE, ORANGE, GREEN, VERMILION = COLORS[:4]
SMOOTHED_FROM = 25  # from so many points on the values are faint, and their running mean is drawn over them


def plot_run(log_history: list[dict], path: str | Path):
    """Draw what `state.log_history` holds to a PNG; without matplotlib an `ImportError` that names the extra."""
    try:  # not pyplot: it keeps figures, and may want a display
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('The picture of a run needs matplotlib: pip install "lusifer-hf[train]"') from error

    steps, epochs = (max((logs.get(name, 0) for logs in log_history), default=0) for name in ("step", "epoch"))
    logged = {name for logs in log_history for name in logs}
    panels = [
        (draw, height)
        for draw, height, shown in (
            (_draw_loss, 3.2, True),
            (_draw_similarities, 2.5, {"positive_similarity", "negative_similarity"} & logged),
            (_draw_scores, 2.8, _score_names(log_history)),
            (_draw_learning_rate, 1.6, "learning_rate" in logged),
        )
        if shown
    ]
    heights = [height for _, height in panels]
    figure = Figure(figsize=(11, sum(heights) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for (draw, _), axis in zip(panels, axes, strict=True):
        draw(axis, log_history)
        axis.set_xlim(0, 1.01 * max(steps, 1))
        axis.grid(color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:  # beside the panel, where it covers nothing
            axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=11)
    axes[-1].set_xlabel("optimizer step", fontsize=11)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels()
    figure.suptitle(f"Training: {steps:,} steps, {epochs:.3g} epochs", fontsize=15, fontweight="bold")
    partial = Path(path).with_name(f".{Path(path).name}.partial")  # a run that is stopped leaves the picture whole
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, path)


class PlotCallback(TrainerCallback):
    """Keeps `training.png` in the output folder and beside each checkpoint; a failure is a warning."""

    def on_save(self, args, state, control, **kwargs):
        self._plot(args, state, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self._plot(args, state)

    def _plot(self, args, state, checkpoint: Path | None = None):
        if not state.is_world_process_zero:
            return
        try:
            path = Path(args.output_dir) / PLOT_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            plot_run(state.log_history, path)
            if checkpoint is not None:
                shutil.copyfile(path, checkpoint / PLOT_NAME)
        except Exception as error:  # of whatever kind: no picture is worth a run
            logger.warning_once(f"{PLOT_NAME} was not written: {error}")


def _draw_loss(axis, log_history: list[dict]):
    _describe(axis, "Loss (lower is better)", "nats")
    _draw_values(axis, log_history, "loss", "training", BLUE)


def _draw_similarities(axis, log_history: list[dict]):
    _describe(axis, "Similarity of queries with their positives and negatives", "cosine")
    _draw_values(axis, log_history, "positive_similarity", "positives", GREEN)
    _draw_values(axis, log_history, "negative_similarity", "negatives", VERMILION)


def _draw_scores(axis, log_history: list[dict]):
    _describe(axis, "Evaluation (higher is better)", "score, 0 to 1")
    names = _score_names(log_history)
    crowded = len(names) > len(COLORS)  # more lines than one can tell apart
    for index, name in enumerate(names):
        steps, values = _series(log_history, name)
        if crowded:
            label = f"each of {len(names)} sets" if index == 0 else None
            axis.plot(steps, values, color="#BBBBBB", linewidth=1.2, marker="o", markersize=3, label=label)
        else:
            label = name.removeprefix("eval_").replace("_", " ")
            axis.plot(steps, values, color=COLORS[index], linewidth=1.6, marker="o", markersize=4, label=label)
    if len(names) > 1:
        steps, values = _series(log_history, "eval_mean")
        axis.plot(steps, values, color="black", linewidth=2.6, marker="o", markersize=5, label="mean")


def _draw_learning_rate(axis, log_history: list[dict]):
    _describe(axis, "Learning rate")
    axis.plot(*_series(log_history, "learning_rate"), color=BLUE, linewidth=1.8)
    axis.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0")
    axis.set_ylim(bottom=0)


def _describe(axis, title: str, unit: str = ""):
    axis.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axis.set_ylabel(unit, fontsize=11)
    axis.tick_params(labelsize=10.5)


def _draw_values(axis, log_history: list[dict], name: str, label: str, color: str):
    """One line; with many points the raw ones faint and their running mean."""
    steps, values = _series(log_history, name)
    if len(values) < SMOOTHED_FROM:
        axis.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=4, label=label)
        return
    half = len(values) // 50 + 1
    axis.plot(steps, values, color=color, alpha=0.3, linewidth=1, label=f"{label}, as logged")
    # On both sides, so that the curve does not lag; on fewer at both ends.
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    means = [sum(window) / len(window) for window in windows]
    axis.plot(steps, means, color=color, linewidth=2.2, label=f"{label}, mean of {2 * half + 1}")


def _score_names(log_history: list[dict]) -> list[str]:
    """The main score of each evaluation set, in the order of the log."""
    names = dict.fromkeys(name for logs in log_history for name in logs)
    return [name for name in names if name.startswith("eval_") and name.endswith(MAIN_SCORES)]


def _series(log_history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of what was logged under a name."""
    points = [(logs["step"], logs[name]) for logs in log_history if name in logs and math.isfinite(logs[name])]
    return [step for step, _ in points], [value for _, value in points]
