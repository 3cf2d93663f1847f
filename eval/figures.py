"""The report's figures: SVG text whose colours are the page's CSS variables, so that they follow light and dark."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

matplotlib.use("svg")

# Stand-ins that the page's own colours replace.
INK, MUTED, LINE, ONE, TWO = "#0a0b0c", "#1a1b1c", "#2a2b2c", "#3a3b3c", "#4a4b4c"
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", ONE: "--one", TWO: "--two"}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
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


def loss_histogram(counts: np.ndarray, right: np.ndarray, edges: np.ndarray) -> str:
    """Tokens by -log P, with the probability on top; `right` `[bins]` of the `counts` `[bins]` have rank 0."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.8, 3.7)
        total, width = max(counts.sum(), 1), np.diff(edges)
        right, wrong = 100 * right / total, 100 * (counts - right) / total
        axes.bar(edges[:-1], right, width, align="edge", color=ONE, label="is the best guess")
        axes.bar(edges[:-1], wrong, width, right, align="edge", color=TWO, label="is not")
        axes.set(xlabel="−log P of the original token, nats", ylabel="% of scored tokens")
        axes.set_xlim(edges[0], edges[-1])
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right")
        top = axes.secondary_xaxis("top")
        ticks = [1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6]
        shown = [tick for tick in ticks if -np.log(tick) <= edges[-1]]
        top.set_xticks([-np.log(tick) for tick in shown], [f"{tick:g}" for tick in shown])
        top.set_xlabel("P of it")
        return _svg(figure, "loss")


def loss_curve(tokens: np.ndarray, losses: np.ndarray) -> str:
    """Where the loss comes from: share of tokens and of the summed loss by P, `[bins]`, and the curve -log P."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.8, 3.7)
        edges = np.linspace(0, 1, len(tokens) + 1)
        width = np.diff(edges) / 2
        axes.bar(edges[:-1], 100 * tokens / max(tokens.sum(), 1), width, align="edge", color=ONE, label="tokens")
        axes.bar(
            edges[:-1] + width, 100 * losses / max(losses.sum(), 1e-12), width, align="edge", color=TWO, label="loss"
        )
        axes.set(xlabel="P of the original token", ylabel="% of all")
        axes.set_xlim(0, 1)
        axes.grid(axis="x", visible=False)
        curve = axes.twinx()
        curve.grid(visible=False)
        curve.spines["right"].set_visible(True)
        p = np.linspace(1e-3, 1, 400)
        curve.plot(p, -np.log(p), color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        curve.set_ylim(0, 7)
        curve.set_ylabel("−log P, nats (dashed)")
        axes.legend(loc="upper center")
        return _svg(figure, "curve")


def calibration(confidence: np.ndarray, accuracy: np.ndarray, counts: np.ndarray) -> str:
    """Accuracy against confidence, a point a bin, its area the share of tokens, `[bins]`; NaN where a bin is empty."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.8, 3.7)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
        full = counts > 0
        axes.plot(confidence[full], accuracy[full], color=ONE, linewidth=1)
        area = 30 + 500 * counts[full] / max(counts.sum(), 1)
        axes.scatter(confidence[full], accuracy[full], s=area, color=ONE, alpha=0.75, linewidths=0, clip_on=False)
        axes.set(xlabel="confidence: P of the best guess", ylabel="how often it is right", xlim=(0, 1), ylim=(0, 1))
        return _svg(figure, "calibration")


def slice_bars(split: str, slices: dict[str, Any], metric: str, label: str) -> str:
    """A metric by slice, with intervals."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.8, 3.4)
        names = list(slices)
        values = [slices[name][metric]["value"] or np.nan for name in names]
        places = np.arange(len(names))
        axes.bar(places, values, 0.62, color=ONE, alpha=0.85)
        _whiskers(axes, places, [slices[name][metric] for name in names])
        axes.set_xticks(places, names, rotation=30 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center")
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        return _svg(figure, f"slices-{split}")


def pair_bars(groups: dict[str, Any], references: Sequence[dict[str, Any]]) -> str:
    """Accuracy of each phenomenon with its interval, and what others have published as marks beside it."""
    with matplotlib.rc_context(STYLE):
        names = sorted(groups, key=lambda name: groups[name]["pair_accuracy"]["value"])
        figure, axes = _axes(7.2, 1.4 + 0.34 * len(names))
        places = np.arange(len(names))
        axes.barh(places, [100 * groups[name]["pair_accuracy"]["value"] for name in names], 0.6, color=ONE, alpha=0.85)
        for place, name in zip(places, names, strict=True):
            found = groups[name]["pair_accuracy"]
            if found["low"] is not None:
                axes.plot([100 * found["low"], 100 * found["high"]], [place, place], color=INK, linewidth=1.2)
        for number, reference in enumerate(references):
            known = [(place, name) for place, name in zip(places, names, strict=True) if name in reference["phenomena"]]
            axes.plot(
                [100 * reference["phenomena"][name] for _, name in known],
                [place for place, _ in known],
                linestyle="none",
                marker="od^sv"[number % 5],
                markersize=6,
                markerfacecolor="none",
                markeredgecolor=TWO,
                label=reference["model"],
            )
        axes.axvline(50, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
        axes.set_yticks(places, [name.replace("_", " ") for name in names])
        axes.set(xlabel="% of pairs right (dashed: chance)", xlim=(0, 100), ylim=(-0.6, len(names) - 0.4))
        axes.grid(axis="y", visible=False)
        if references:
            axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, fontsize=10)
        return _svg(figure, "pairs")


def differences(rows: Sequence[tuple[str, dict[str, Any]]], label: str) -> str:
    """Differences with their intervals, a line each."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(7.2, 1.0 + 0.28 * len(rows))
        for place, (_, found) in enumerate(reversed(rows)):
            if found["difference"] is None:
                continue
            color = MUTED if found["p_value"] is None or found["p_value"] >= 0.05 else ONE
            if found["low"] is not None and found["high"] is not None:
                axes.plot([found["low"], found["high"]], [place, place], color=color, linewidth=2)
            axes.plot(found["difference"], place, "o", color=color, markersize=6)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set(xlabel=label, ylim=(-0.6, len(rows) - 0.4))
        axes.grid(axis="y", visible=False)
        return _svg(figure, "differences")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _whiskers(axes: Axes, places: np.ndarray, found: Sequence[dict[str, Any]]) -> None:
    for place, interval in zip(places, found, strict=True):
        if interval["low"] is not None and interval["high"] is not None:
            axes.plot([place, place], [interval["low"], interval["high"]], color=INK, linewidth=1.2)


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG that fills its container; the same figure gives the same bytes."""
    text = io.StringIO()
    # Text stays text, so it is the reader's fonts that must have its letters, not ours.
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings(action="ignore"):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})  # savefig draws twice
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg
