"""`report.html`: one page without a network, from a finished evaluation's stored files alone."""

import logging
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit.eval.metrics import CALIBRATION_BINS, calibration_bin, describe_unknown
from mlmkit.eval.statistics import RESAMPLES
from mlmkit.eval.stored import REPORT, Stored, read_blocks
from mlmkit.files import write_text

log = logging.getLogger(__name__)

LARGEST_LOSS = 14.0
LOSS_BINS = 28
PROBABILITY_BINS = 20
# What the page leads with, by task, and how each number is written.
HEADLINES = {
    "masked_cross_entropy": ("masked cross-entropy", "nats a token", "{:.4f}"),
    "masked_perplexity": ("masked perplexity", "", "{:,.2f}"),
    "masked_accuracy": ("masked accuracy", "", "{:.2%}"),
    "masked_top5_accuracy": ("top-5 accuracy", "", "{:.2%}"),
    "mean_reciprocal_rank": ("mean reciprocal rank", "", "{:.4f}"),
    "expected_calibration_error": ("calibration error", "", "{:.2%}"),
    "pseudo_perplexity": ("pseudo-perplexity", "a token", "{:,.2f}"),
    "pseudo_perplexity_per_word": ("pseudo-perplexity", "a word", "{:,.4g}"),
    "pseudo_perplexity_per_character": ("pseudo-perplexity", "a character", "{:,.4f}"),
    "bits_per_byte": ("bits per byte", "", "{:.4f}"),
    "pseudo_log_likelihood": ("pseudo-log-likelihood", "nats", "{:,.1f}"),
    "pair_accuracy": ("pairs right", "by the sum", "{:.2%}"),
    "pair_accuracy_per_token": ("pairs right", "by the mean a token", "{:.2%}"),
    "pair_accuracy_macro": ("pairs right", "mean of paradigms", "{:.2%}"),
    "pseudo_perplexity_good": ("pseudo-perplexity", "better sentences", "{:,.2f}"),
    "pseudo_perplexity_bad": ("pseudo-perplexity", "worse sentences", "{:,.2f}"),
}
SPLITS = {
    "frequency": ("token frequency", "How often the token occurs in this corpus."),
    "position": ("position", "Tokens before it in its document."),
    "length": ("document length", "Tokens in its document."),
    "piece": ("word or subword", "Whether the token is a whole word, or the first or a later piece of one."),
    "treatment": ("treatment", "What the model saw in its place: the mask, a random token, or the token itself."),
}


def write_report(stored: Stored) -> bool:
    """Write the page into an evaluation's folder, if what it needs (`mlmkit[report]`) is installed; whether it did.

    A read-only folder is left as it is, with a warning.
    """
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        return False
    if not os.access(stored.folder, os.W_OK):
        log.warning("%s is read-only: %s stays as it is", stored.folder, REPORT)
        return False
    render("report.html.jinja", stored.folder / REPORT, **_content(stored))
    return True


def render(template: str, path: Path, **content: Any) -> None:
    """A template of `eval/templates`, everything in it escaped but what it marks safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "span": span, "p_value": p_value, "heat": heat}
    write_text(path, environment.get_template(template).render(**content))


def _content(stored: Stored) -> dict[str, Any]:
    from mlmkit.eval import plots

    result = stored.result
    metric = "masked" if "masked" in result["scored"] else "pseudo"
    shapes = _shapes(stored, metric)
    drawn = [
        (
            f"Loss of the {shapes['tokens'].sum():,.0f} scored tokens",
            plots.loss_histogram(*shapes["histogram"]),
            f"Tokens of {LARGEST_LOSS:.0f} nats and more are in the last bar.",
        ),
        (
            "Where the loss comes from",
            plots.loss_by_probability(shapes["tokens"], shapes["losses"]),
            "Tokens, and their share of the summed loss, by the probability that the original token was given.",
        ),
    ]
    if metric == "masked":
        error = result["metrics"]["expected_calibration_error"]["value"]
        drawn.append(
            (
                "Calibration",
                plots.calibration(*shapes["calibration"]),
                f"On the dashed line the model is right as often as it says. Expected error {error:.2%}.",
            )
        )
    by_slice = "masked_cross_entropy" if metric == "masked" else "pseudo_perplexity"
    axis = "cross-entropy, nats" if metric == "masked" else "pseudo-perplexity"
    slices = result["slices"].get(metric, {})
    for split, (label, note) in SPLITS.items():
        if split in slices:
            values = {name: group[by_slice]["value"] for name, group in slices[split].items()}
            drawn.append((f"Loss by {label}", plots.slice_bars(split, values, axis), note))
    declared = result["set"] or {}
    references = [item for item in declared.get("reference", []) if item["metric"] in result["metrics"]]
    groups = result.get("pairs", {}).get("phenomena") or result.get("pairs", {}).get("paradigms") or {}
    pairs_figure = ""
    if groups:
        pairs_figure = plots.pair_accuracies(groups, [item for item in references if item["phenomena"]][:5])
    return {
        "result": result,
        "unknown": describe_unknown(result["unknown"]),
        "metric": metric,
        "title": declared.get("name") or Path(result["corpus"]["source"]["location"]).name,
        "model": Path(result["model"]["path"]).name,
        "headlines": [(*HEADLINES[name], found) for name, found in result["metrics"].items() if name in HEADLINES],
        "figures": drawn,
        "pairs_figure": pairs_figure,
        "references": references,
        "splits": SPLITS,
    }


def _shapes(stored: Stored, metric: str) -> dict[str, Any]:
    """Histograms over the scored tokens, read in stretches."""
    edges = np.linspace(0, LARGEST_LOSS, LOSS_BINS + 1)
    counts, right = np.zeros(LOSS_BINS), np.zeros(LOSS_BINS)
    tokens, losses = np.zeros(PROBABILITY_BINS), np.zeros(PROBABILITY_BINS)
    bins = np.zeros((3, CALIBRATION_BINS))
    seeds = stored.result["masking"]["seeds"] if metric == "masked" else [None]
    for seed in seeds:
        for table, _ in read_blocks(stored.folder, metric, seed):
            loss = -table["log_prob"].to_numpy().astype(np.float64)
            is_right = table["rank"].to_numpy() == 0
            place = np.minimum(np.searchsorted(edges, loss, side="right") - 1, LOSS_BINS - 1)
            counts += np.bincount(place, minlength=LOSS_BINS)
            right += np.bincount(place, weights=is_right, minlength=LOSS_BINS)
            place = np.minimum((np.exp(-loss) * PROBABILITY_BINS).astype(int), PROBABILITY_BINS - 1)
            tokens += np.bincount(place, minlength=PROBABILITY_BINS)
            losses += np.bincount(place, weights=loss, minlength=PROBABILITY_BINS)
            if metric == "masked":
                confidence = np.exp(table["top_log_prob"].to_numpy().astype(np.float64))
                place = calibration_bin(confidence)
                for row, weights in enumerate((np.ones(len(loss)), confidence, is_right)):
                    bins[row] += np.bincount(place, weights=weights, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        calibration = (bins[1] / bins[0], bins[2] / bins[0], bins[0])
    return {
        "histogram": (counts, right, edges),
        "tokens": tokens,
        "losses": losses,
        "calibration": calibration,
    }


def number(value: float | None, form: str = "{:.4f}") -> str:
    """A metric for people; a dash for one that does not exist."""
    return "–" if value is None else (form if abs(value) < 1e6 else form.replace(".4f", ".3e")).format(value)


def signed(value: float | None) -> str:
    """A difference for people, small ones by their power of ten."""
    return number(value, "{:+.1e}" if value and abs(value) < 1e-3 else "{:+.4f}")


def span(metric: dict[str, Any], form: str = "") -> str:
    """An interval for people, of a difference unless a form is given; a dash for one that does not exist."""
    if metric["low"] is metric["high"] is None:
        return "–"
    return " to ".join(number(metric[key], form) if form else signed(metric[key]) for key in ("low", "high"))


def p_value(value: float | None) -> str:
    """A p-value for people. The smallest that the bootstrap's draws can give is shown as a bound."""
    lowest = 2 / (RESAMPLES + 1)
    return f"< {lowest:.3f}" if value == lowest else number(value, "{:.3f}")


def heat(log_prob: float | None) -> str:
    """How unexpected a token was, as a share of the strongest colour: 0 for certain, 1 from 8 nats on."""
    return "0" if log_prob is None else f"{math.sqrt(min(-log_prob, 8.0) / 8.0):.2f}"
