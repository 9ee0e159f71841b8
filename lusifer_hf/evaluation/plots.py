"""Pictures of scores: bars by language, and languages by families in color; each as PNG and SVG."""

import re
import textwrap
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from ..training.plots import COLORS
from .statistics import AVERAGE, Interval


try:  # not pyplot: it keeps figures, and may want a display
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
except ImportError as error:
    raise ImportError('The pictures of a report need matplotlib: pip install "lusifer-hf[eval]"') from error

NOTHING = "–"
MAP = "cividis"  # its brightness rises evenly, also for the color-blind and in print
MAPS_IN_A_ROW = 3
ROW_INCHES = 11  # more bars go on in a further row
BARS = 0.84  # of a column's width


def plot_bars(table: pd.DataFrame, intervals: Mapping[str, Mapping[str, Interval]], path: Path, *, title: str):
    """
    A group of bars for each column, a bar for each model, with its interval where there is one.

    Args:
        table (`pd.DataFrame`):
            Scores from 0 to 100, models by languages or tasks, complete; the column `"average"` stands apart.
        intervals (mapping):
            Of each model, by column.
        path (`Path`):
            Without a suffix.
        title (`str`):
            Of the picture.
    """
    models, columns = list(table.index), list(table.columns)
    inches = max(0.6, 0.19 * len(models) + 0.2)  # of a column
    rows = -(-len(columns) // int(ROW_INCHES / inches))
    in_a_row = -(-len(columns) // rows)
    width = max(6, 1 + in_a_row * inches)
    bar_inches = BARS * (width - 1) / in_a_row / len(models)
    tops = [100 * interval.high for of_model in intervals.values() for interval in of_model.values()]
    ceiling = 1.1 * np.nanmax([1, *tops, *table.max()])
    slanted = max(map(len, columns)) > 8
    with _figure(path, width, (3.1 + 0.8 * slanted) * rows + 0.9) as figure:
        for axis, number in zip(figure.subplots(rows, 1, squeeze=False)[:, 0], range(rows), strict=True):
            shown = columns[number * in_a_row : (number + 1) * in_a_row]
            places = [place + 0.3 * (column == AVERAGE) for place, column in enumerate(shown)]
            for index, model in enumerate(models):
                lefts = [place + BARS * ((index + 0.5) / len(models) - 0.5) for place in places]
                scores = table.loc[model, shown]
                label = model if number == 0 else None
                axis.bar(lefts, scores, 0.94 * BARS / len(models), color=COLORS[index % len(COLORS)], label=label)
                for left, column, score in zip(lefts, shown, scores, strict=True):
                    top = _draw_interval(axis, left, intervals[model].get(column), score)
                    if bar_inches >= 0.4:  # as wide as the number
                        axis.text(left, max(top, 0) + 0.01 * ceiling, f"{score:.1f}", ha="center", fontsize=9)
            axis.set_xticks(places, shown, fontsize=11)
            if slanted:
                axis.tick_params(axis="x", labelrotation=30)
                for tick in axis.get_xticklabels():
                    tick.set(ha="right", rotation_mode="anchor")
            axis.set_xlim(-0.6, in_a_row - 0.1)
            axis.set_ylim(min(0, table.min().min()), ceiling)
            axis.set_ylabel("score", fontsize=11)
            axis.tick_params(axis="x", length=0)
            axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        across = max(1, min(len(models), int(width * 11 / (max(map(len, models)) + 8))))
        figure.legend(loc="outside lower center", ncols=across, frameon=False, fontsize=10.5)


def _draw_interval(axis, left: float, interval: Interval | None, score: float) -> float:
    """Draws it, if there is one; returns what the number has to stand above."""
    if interval is None or interval.unit is None:
        return score
    edge = [withStroke(linewidth=2.8, foreground="white")]  # to be seen on dark bars
    axis.vlines(left, 100 * interval.low, 100 * interval.high, color="black", linewidth=1.1, path_effects=edge)
    return max(score, 100 * interval.high)


def plot_heat_maps(tables: Mapping[str, pd.DataFrame], path: Path):
    """A map for each model, scores from 0 to 100 in languages by families, all in one scale."""
    languages, families = (list(axis) for axis in next(iter(tables.values())).axes)
    scores = pd.concat(tables.values()).stack()
    scale = Normalize(scores.min(), max(scores.max(), scores.min() + 1))
    across = min(len(tables), MAPS_IN_A_ROW)
    down = -(-len(tables) // across)
    width, height = max(3.2, 0.66 * len(families) + 0.6), 0.32 * len(languages) + 1.9
    with _figure(path, max(5, across * width + 1), down * height) as figure:
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis in axes[len(tables) :]:
            axis.set_axis_off()
        for axis, (model, table) in zip(axes, tables.items(), strict=False):
            image = axis.imshow(table, cmap=colormaps[MAP].with_extremes(bad="#EEEEEE"), norm=scale, aspect="auto")
            for row, values in enumerate(table.to_numpy()):
                for column, score in enumerate(values):
                    text = NOTHING if pd.isna(score) else f"{score:.1f}"
                    dark = pd.isna(score) or scale(score) > 0.5
                    axis.text(
                        column, row, text, ha="center", va="center", fontsize=9, color="black" if dark else "white"
                    )
            axis.set_xticks(range(len(families)), [_spaced(name) for name in families], fontsize=9.5)
            for tick in axis.get_xticklabels():
                tick.set(rotation=35, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(languages)), languages, fontsize=10.5)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            lines = textwrap.fill(model, int(9 * width))
            axis.set_title(lines, loc="left", fontsize=12.5, fontweight="bold")
        bar = figure.colorbar(image, ax=list(axes), label="score", fraction=0.03, pad=0.02, aspect=30)
        bar.outline.set_visible(False)


def _spaced(family: str) -> str:
    """Pair Classification."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", family)


@contextmanager
def _figure(path: Path, width: float, height: float):
    with rc_context({"svg.hashsalt": "lusifer-hf"}):  # the same picture has the same file
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path.with_name(f"{path.name}.png"), metadata={"Software": None})
        figure.set_layout_engine("none")  # laid out for the PNG: the SVG is the same picture
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
