"""The picture of a run: its loss, held-out and in training, and the learning rate, as `RUN/loss.png`."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.train.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

INK, MUTED, LINE, ONE, TWO = "#22262b", "#6b727b", "#e3e6ea", "#2f6fb4", "#c4571b"
STYLE: dict[Any, Any] = {  # matplotlib's stubs know its keys as literals only
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "legend.frameon": False,
}
DOTS_PER_INCH = 150
FEW = 50  # entries of which each gets a dot, and no line through their mean


def draw_loss(run: Path) -> Path | None:
    """Draw what `log.jsonl` holds; None, with a line in the log, without matplotlib or without an entry."""
    entries = read_log(run)
    steps = [entry for entry in entries if "loss" in entry]
    path = run / "loss.png"
    if not steps or not can_draw(path):
        return None
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.6), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(3.2, 1))
        step = np.array([entry["step"] for entry in steps])
        _training(above, step, np.array([entry["loss"] for entry in steps]))
        measured = [entry for entry in entries if "held_out" in entry]
        digests = [entry["held_out"]["mask_digest"] for entry in measured]
        for digest in dict.fromkeys(digests):  # of a text each, the last one's the run's
            own = [entry for entry, of in zip(measured, digests, strict=True) if of == digest]
            metrics = [entry["held_out"]["masked_cross_entropy"] for entry in own]
            color, label = (TWO, "held out, 95 % interval") if digest == digests[-1] else (MUTED, "another text")
            style = {"color": color, "linewidth": 0.8, "markersize": 4 if len(own) <= FEW else 2}
            label += f", last {metrics[-1]['value']:.3f}"
            draw_intervals(above, [entry["step"] for entry in own], metrics, label=label, **style)
        above.set_ylabel("cross-entropy, nats a masked token")
        figure.suptitle(run.resolve().name, x=0.01, ha="left", fontsize=12)
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, fontsize=9)
        below.plot(
            step,
            [entry["learning_rate"] for entry in steps],
            color=INK,
            marker="o" if len(step) < 2 else "",
            markersize=4,
        )
        below.set(xlabel="step", ylabel="learning rate")
        below.set_xlim(0, 1.01 * step[-1])
        below.set_ylim(bottom=0)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.xaxis.set_major_formatter("{x:,.0f}")
        below.yaxis.set_major_formatter("{x:.3g}")
        figure.align_ylabels()
        save(figure, path)
    return path


def can_draw(path: Path) -> bool:
    """Whether matplotlib is there; says in the log what is left out if not."""
    if find_spec("matplotlib"):
        return True
    log.info("%s is left out, as it needs matplotlib: pip install 'mlmkit[report]'", path)
    return False


def save(figure: "Figure", path: Path) -> None:
    """As PNG, on white."""
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png", metadata={"Software": None})


def _training(axes: "Axes", step: NDArray[np.int64], loss: NDArray[np.float64]) -> None:
    if len(step) <= FEW:
        axes.plot(step, loss, color=ONE, marker="o", markersize=3.5, label=f"training, last {loss[-1]:.3f}")
        return
    mean = smooth(loss, max(len(loss) // FEW, 5))
    axes.plot(step, loss, color=ONE, alpha=0.3, linewidth=0.7, label="training")
    axes.plot(step, mean, color=ONE, linewidth=1.8, label=f"smoothed, last {mean[-1]:.3f}")


def draw_intervals(axes: "Axes", places: Sequence[float], metrics: list[dict[str, Any]], **style: Any) -> None:
    """A line through the metrics' values, each with its interval; that of a single document has no bounds."""
    value, low, high = (
        [metric["value"] if metric[name] is None else metric[name] for metric in metrics]
        for name in ("value", "low", "high")
    )
    axes.vlines(places, low, high, color=style["color"], linewidth=1.3, zorder=3)
    axes.plot(places, value, marker="o", **style)


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean over the `width` values around each of `[entries]`, fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
