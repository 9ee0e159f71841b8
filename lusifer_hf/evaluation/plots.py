"""Pictures of scores: bars by language, and languages by families in color; each as PNG and SVG."""

import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from ..training.plots import COLORS
from .statistics import AVERAGE, Interval


try:  # not pyplot: it keeps figures, and may want a display
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('The pictures of a report need matplotlib: pip install "lusifer-hf[eval]"') from error

NOTHING = "–"
MAP = "cividis"  # its brightness rises evenly, also for the color-blind and in print
MAPS_IN_A_ROW = 3


def plot_bars(table: pd.DataFrame, intervals: Mapping[str, Mapping[str, Interval]], path: Path):
    """
    A group of bars for each column, a bar for each model, with its interval where there is one.

    Args:
        table (`pd.DataFrame`):
            Scores from 0 to 100, models by languages or tasks; the column `"average"` stands apart.
        intervals (mapping):
            Of each model, by column.
        path (`Path`):
            Without a suffix.
    """
    models, columns = list(table.index), list(table.columns)
    width = 0.8 / len(models)
    places = [index + 0.4 * (column == AVERAGE) for index, column in enumerate(columns)]
    inches = min(24, max(6, 1.2 + len(columns) * max(0.55, 0.2 * len(models) + 0.15)))
    with _figure(path, inches, 4.6) as figure:
        axis = figure.subplots()
        bars = len(models) * len(columns)
        for number, model in enumerate(models):
            color = COLORS[number % len(COLORS)]
            for index, (column, place) in enumerate(zip(columns, places, strict=True)):
                score, left = table.loc[model, column], place + (number - (len(models) - 1) / 2) * width
                label = model if index == 0 else None
                if pd.isna(score):
                    axis.bar(left, 0, width, color=color, label=label)
                    axis.text(left, 0, NOTHING, ha="center", va="bottom", fontsize=9, color="#666666")
                    continue
                axis.bar(left, score, 0.92 * width, color=color, label=label)
                top, interval = score, intervals[model].get(column)
                if interval is not None and interval.unit is not None:
                    low, high = 100 * interval.low, 100 * interval.high
                    axis.vlines(left, low, high, color="#222222", linewidth=1.1)
                    top = max(top, high)
                if bars <= 24:  # where the numbers have room
                    axis.text(left, max(top, 0) + 1, f"{score:.1f}", ha="center", va="bottom", fontsize=9)
        axis.set_xticks(places, columns, fontsize=11, rotation=35 if max(map(len, columns)) > 8 else 0)
        if max(map(len, columns)) > 8:
            for tick in axis.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
        axis.set_xlim(places[0] - 0.6, places[-1] + 0.6)
        axis.set_ylabel("score", fontsize=11)
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        _title(axis, f"Scores by {table.columns.name or 'language'}")
        longest = max(map(len, models))
        in_a_row = max(1, min(len(models), int(inches * 9 / (longest + 6))))
        figure.legend(loc="outside lower center", ncols=in_a_row, frameon=False, fontsize=10.5)


def plot_heat_maps(tables: Mapping[str, pd.DataFrame], path: Path):
    """A map for each model, scores from 0 to 100 in languages by families, all in one scale."""
    languages, families = (list(axis) for axis in next(iter(tables.values())).axes)
    scores = pd.concat(tables.values()).stack()
    scale = Normalize(scores.min(), max(scores.max(), scores.min() + 1))
    across = min(len(tables), MAPS_IN_A_ROW)
    down = -(-len(tables) // across)
    width, height = max(3.4, 0.8 * len(families) + 0.9), 0.32 * len(languages) + 1.9
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
            _title(axis, model)
        figure.colorbar(image, ax=list(axes), label="score", fraction=0.04, pad=0.02).outline.set_visible(False)


def _title(axis, text: str):
    axis.set_title(text, loc="left", fontsize=12.5, fontweight="bold")


def _spaced(family: str) -> str:
    """Pair Classification."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", family)


@contextmanager
def _figure(path: Path, width: float, height: float):
    with rc_context({"svg.hashsalt": "lusifer-hf"}):  # the same picture has the same file
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=130, metadata={"Software": None})
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
