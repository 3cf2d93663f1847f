"""Figures in one style: inline SVG for the HTML pages, PNG files for training runs and sweeps.

Each function draws one figure from plain numbers. In an SVG the colours are CSS variables of the page, so that figures
follow its light or dark theme.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from mlmkit.eval.display import SHARE, headline

INK, MUTED, LINE, ONE, TWO = "#22262b", "#6b727b", "#e3e6ea", "#2f6fb4", "#c4571b"
DARK = ("#1b9e77", "#7570b3", "#e7298a", "#66a61e")  # ColorBrewer's Dark2, for more than two curves
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", ONE: "--one", TWO: "--two"}
STYLE: dict[Any, Any] = {  # matplotlib's stubs accept only literal keys
    "svg.fonttype": "none",  # keep text as text
    "text.parse_math": False,  # a dollar sign in a name is not LaTeX
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.8,
}
styled = matplotlib.rc_context(STYLE)  # a decorator: the style must hold while a figure is drawn and rendered
DASHED = {"linewidth": 1, "linestyle": (0, (4, 2))}
PNG_DOTS_PER_INCH = 150
FEW_TICKS = 12  # up to here each point gets a tick
FEW_POINTS = 50  # up to here each point gets a dot, beyond it a moving average

Floats = NDArray[np.float64]


@styled
def loss_histogram(counts: Floats, best: Floats, edges: Floats) -> str:
    """Tokens by −log P. Of the `counts` `[bins]`, `best` `[bins]` had rank 0; `edges` `[bins + 1]` are in nats."""
    figure, axes = new_figure(4.4, 3.6)
    percent, width = 100 / max(counts.sum(), 1), np.diff(edges)
    axes.bar(edges[:-1], percent * best, width, align="edge", color=ONE, label="is the best guess")
    axes.bar(edges[:-1], percent * (counts - best), width, percent * best, align="edge", color=TWO, label="is not")
    axes.set(xlabel="−log P of the original token, nats", ylabel="% of scored tokens", xlim=edges[[0, -1]])
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper left", ncols=2, title="The original token", alignment="left")
    powers = range(int(edges[-1] / np.log(10)) + 1)
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.log(10) * np.array(powers), [power_of_ten(power) for power in powers])
    top.set_xlabel("its P")
    return to_svg(figure, "loss")


@styled
def loss_by_probability(tokens: Floats, losses: Floats) -> str:
    """Percentages of the tokens and of the summed loss by P: `[bins]`, of 1 to 0.1, 0.1 to 0.01, ..., the rest."""
    figure, axes = new_figure(4.4, 3.6)
    for offset, values, color, name in ((0.3, tokens, ONE, "of the tokens"), (0.7, losses, TWO, "of the loss")):
        bars = axes.bar(np.arange(len(values)) + offset, 100 * values / max(values.sum(), 1e-12), 0.4, color=color)
        bars.set_label(name)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=8, padding=1)
    labels = [*map(power_of_ten, range(len(tokens))), "0"]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="P of the original token", ylabel="%", xlim=(0, len(tokens)))
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper left", ncols=2)
    return to_svg(figure, "loss-by-probability")


def power_of_ten(power: int) -> str:
    """10 to the minus `power`, as it is written."""
    return f"{10.0**-power:g}" if power < 4 else "10⁻" + str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


@styled
def calibration(confidence: Floats, accuracy: Floats, counts: Floats) -> str:
    """Accuracy against confidence, `[bins]`: the area of a point is its share of the tokens; empty bins are NaN."""
    figure, axes = new_figure(4.4, 3.6)
    axes.plot([0, 1], [0, 1], color=MUTED, **DASHED)
    full = counts > 0
    area = 30 + 500 * counts[full] / max(counts.sum(), 1)
    axes.plot(confidence[full], accuracy[full], color=ONE, linewidth=1)
    axes.scatter(confidence[full], accuracy[full], s=area, color=ONE, alpha=0.75, linewidths=0, clip_on=False)
    axes.set(xlabel="confidence: P of the best guess", ylabel="how often it is right", xlim=(0, 1), ylim=(0, 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return to_svg(figure, "calibration")


@styled
def group_accuracies(
    groups: Mapping[str, Mapping[str, Any]],
    metric: str,
    label: str,
    chance: float,
    references: Sequence[Mapping[str, Any]],
) -> str:
    """The `metric` of each group of items with its interval, beside published values (`phenomena`) and chance."""
    accuracy = {name: group[metric] for name, group in groups.items()}
    names = sorted(accuracy, key=lambda name: accuracy[name]["value"])
    figure, axes = new_figure(7, 1.2 + 0.34 * len(names))
    axes.barh(range(len(names)), [100 * accuracy[name]["value"] for name in names], 0.6, color=ONE, alpha=0.85)
    bounds = [accuracy[name] for name in names]
    draw_intervals(axes, range(len(names)), bounds, scale=100, horizontal=True, color=INK, linewidth=1.2)
    for number, reference in enumerate(references):
        published = 100 * np.array([reference["phenomena"].get(name) for name in names], float)
        mark = {"marker": "od^sv"[number % 5], "markerfacecolor": "none", "markeredgecolor": TWO, "markersize": 6}
        axes.plot(published, range(len(names)), linestyle="none", label=reference["model"], **mark)
    axes.axvline(100 * chance, color=MUTED, **DASHED)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlabel=f"{label}, % (dashed: chance)", xlim=(0, 100), ylim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y", visible=False)
    if references:
        figure.legend(loc="outside upper left", ncols=2, title="Published", alignment="left", fontsize=10)
    return to_svg(figure, "groups")


@styled
def training_curves(entries: Sequence[Mapping[str, Any]], name: str, path: Path) -> None:
    """Loss and learning rate of the run `name` by step as PNG.

    `entries` are those of `log.jsonl`, at least one of them with a loss.
    """
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "held_out" in entry]
    step, loss = (np.array([entry[column] for entry in steps]) for column in ("step", "loss"))
    figure, (above, below) = new_figure(8, 5.6, nrows=2, sharex=True, height_ratios=(3.2, 1))
    if len(steps) <= FEW_POINTS:
        above.plot(step, loss, color=ONE, marker="o", markersize=3.5, label=f"training, last {loss[-1]:.3f}")
    else:
        mean = moving_average(loss, max(len(loss) // FEW_POINTS, 5))
        above.plot(step, loss, color=ONE, alpha=0.3, linewidth=0.7, label="training")
        above.plot(step, mean, color=ONE, label=f"smoothed, last {mean[-1]:.3f}")
    # Older entries have no name, as there was one text.
    sets = [(entry["held_out"].get("name", "held-out"), entry["held_out"]["mask_digest"]) for entry in evaluations]
    current = dict(sets)  # the last text of each name
    colors = dict(zip(current, cycle([TWO, *DARK]), strict=False))
    for text, digest in dict.fromkeys(sets):
        same = [entry for entry, own in zip(evaluations, sets, strict=True) if own == (text, digest)]
        metrics = [entry["held_out"]["masked_cross_entropy"] for entry in same]
        is_current = current[text] == digest
        shown = "held out" if text == "held-out" else text
        color, label = (colors[text], f"{shown}, 95 % interval") if is_current else (MUTED, "another text")
        label += f", last {metrics[-1]['value']:.3f}"
        size = 4 if len(same) <= FEW_POINTS else 2
        _curve_with_intervals(above, [entry["step"] for entry in same], metrics, color, label, markersize=size)
        if is_current and (entropy := same[-1]["held_out"].get("unigram_entropy")):
            of_text = "" if len(current) == 1 else f" of {shown}"
            above.axhline(entropy, color=color, label=f"unigram entropy{of_text}, {entropy:.3f}", **DASHED)
    above.set_ylabel("cross-entropy, nats per masked token")
    columns = 3 if len(current) < 2 else 2
    above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, fontsize=9)
    figure.suptitle(f"Training loss of {name}", x=0.01, ha="left", fontsize=12)
    rates = [entry["learning_rate"] for entry in steps]
    below.plot(step, rates, color=INK, marker="o" if len(step) < 2 else "", markersize=4)
    below.set(xlabel="step", ylabel="learning rate", xlim=(0, 1.01 * step[-1]))
    below.set_ylim(bottom=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    _ticks_at(below, [0, *(step if len(step) <= FEW_TICKS else sorted({entry["step"] for entry in evaluations}))])
    below.xaxis.set_major_formatter("{x:,.0f}")
    below.yaxis.set_major_formatter("{x:.3g}")
    figure.align_ylabels()
    save_png(figure, path)


@styled
def sweep_curves(runs: Sequence[Mapping[str, Any]], best: str | None, held_out: str, path: Path) -> None:
    """Cross-entropy on the text `held_out` against the first swept setting as PNG, one line per value of the others.

    `runs` are those of `sweep.json` that did not fail; `best` is the name of one, or None.
    """
    key, *others = runs[0]["values"]
    values = list(dict.fromkeys(run["values"][key] for run in runs))
    is_scale = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    x = {value: value if is_scale else index for index, value in enumerate(values)}
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: x[run["values"][key]]):
        lines.setdefault(", ".join(f"{other} = {run['values'][other]}" for other in others), []).append(run)
    figure, axes = new_figure(7, 4.4)
    colors = matplotlib.colormaps["viridis"].resampled(len(lines) + 1)
    for number, (label, line) in enumerate(lines.items()):
        positions, metrics = [x[run["values"][key]] for run in line], [run["masked_cross_entropy"] for run in line]
        color = colors(number) if others else ONE
        _curve_with_intervals(axes, positions, metrics, color, label or "one training run")
        for position, run in zip(positions, line, strict=True):
            if run["run"] == best:
                circle = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": TWO, "label": "best"}
                axes.plot(position, run["masked_cross_entropy"]["value"], "o", **circle)
    if is_scale and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_xscale("log")
    if len(values) <= 8 or not is_scale:
        axes.set_xticks(list(x.values()), [f"{value:g}" if is_scale else str(value) for value in values])
        axes.minorticks_off()
    axes.set(xlabel=key, ylabel="cross-entropy, nats per masked token")
    axes.margins(x=0.08)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=9)
    title = f"Loss on {held_out} by {' and '.join([key, *others])}, 95 % intervals"
    figure.suptitle(fill(title, 70), x=0.01, ha="left", fontsize=12)
    save_png(figure, path)


@styled
def evaluation_curves(rows: Sequence[Mapping[str, Any]], run: str, path: Path) -> None:
    """Metrics of the checkpoints of `run` against the tokens seen as PNG: a panel per metric, a line per set.

    `rows` are those of `evaluations.json`.
    """
    names = list(dict.fromkeys(row["metric"] for row in rows))
    figure, panels = new_figure(8, 0.9 + 2.9 * len(names), nrows=len(names), sharex=True, squeeze=False)
    for axes, name in zip(panels[:, 0], names, strict=True):
        own = [row for row in rows if row["metric"] == name]
        for set_name, color in zip(dict.fromkeys(row["set"] for row in own), cycle([ONE, TWO, *DARK]), strict=False):
            line = [row for row in own if row["set"] == set_name]
            _curve_with_intervals(axes, [row["tokens"] for row in line], line, color, set_name, markersize=4)
        *label, form = headline(name)
        axes.set_ylabel("\n".join(filter(None, label)))
        if form == SHARE:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, fontsize=9)
    tokens, bottom = sorted({row["tokens"] for row in rows}), panels[-1, 0]
    if min(tokens) > 0 and max(tokens) >= 10 * min(tokens):
        bottom.set_xscale("log")
    bottom.set_xlabel("tokens seen, special tokens included")
    _ticks_at(bottom, tokens)
    bottom.xaxis.set_major_formatter(EngFormatter(sep="", places=1 if max(tokens) > 1e4 else None))
    figure.suptitle(f"Checkpoints of {run}, 95 % intervals", x=0.01, ha="left", fontsize=12)
    figure.align_ylabels()
    save_png(figure, path)


def _curve_with_intervals(
    axes: Axes, x: Sequence[float], metrics: Sequence[Mapping[str, Any]], color: Any, label: str, markersize: float = 5
) -> None:
    draw_intervals(axes, x, metrics, color=color, linewidth=1.3, zorder=3)
    values = [metric["value"] for metric in metrics]
    axes.plot(x, values, color=color, label=label, linewidth=0.8, marker="o", markersize=markersize)


def _ticks_at(axes: Axes, points: Sequence[float]) -> None:
    """Put the ticks of the x axis at ascending points, if these are few and far enough apart for their labels."""
    places = np.log(points) if axes.get_xscale() == "log" else np.array(points)
    if 1 < len(points) <= FEW_TICKS + 1 and np.diff(places).min() >= 0.06 * np.ptp(places):
        axes.set_xticks(points)
        axes.minorticks_off()


def moving_average(values: Floats, width: int) -> Floats:
    """The mean of the `width` values around each of `[entries]`, of fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


# ---------------------------------------------------------------- shared by all figures


def new_figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes: one, or an array of them as `subplots` says."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def draw_intervals(
    axes: Axes,
    positions: Sequence[float],
    metrics: Sequence[Mapping[str, Any]],
    *,
    scale: float = 1.0,
    horizontal: bool = False,
    **style: Any,
) -> None:
    """A line from `low` to `high` for each metric; none where these are None, as for a single document."""
    low, high = (scale * np.array([metric[bound] for metric in metrics], float) for bound in ("low", "high"))
    bounded = ~np.isnan(low + high)
    (axes.hlines if horizontal else axes.vlines)(np.array(positions)[bounded], low[bounded], high[bounded], **style)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG on white, without the version of matplotlib in it."""
    metadata = {"Software": None}
    figure.savefig(path, format="png", dpi=PNG_DOTS_PER_INCH, facecolor="white", metadata=metadata)


def to_svg(figure: Figure, name: str) -> str:
    """Inline SVG that fills its container. The same figure and `name` (unique in a page) give the same bytes."""
    text = io.StringIO()
    # The reader's fonts draw the text, so a letter that our fonts lack is no problem.
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings(action="ignore"):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})  # savefig would draw twice
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
