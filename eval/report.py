"""Results and comparisons for people: `report.html`, `compare.html`, and the comparison's lines for the terminal.

The pages need no network and are made from stored results alone.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit.errors import UserError, require
from mlmkit.eval.metrics import CALIBRATION_BINS, calibration_bin, describe_unknown
from mlmkit.eval.result import Metric, Result
from mlmkit.eval.results_store import REPORT, StoredResult, read_blocks
from mlmkit.eval.rows import how_masked
from mlmkit.eval.statistics import RESAMPLES
from mlmkit.files import write_text
from mlmkit.overlap import describe_overlap

log = logging.getLogger(__name__)

LARGEST_LOSS, LOSS_BINS, PROBABILITY_BINS = 14.0, 28, 20
ROUNDING = 1e-6  # scores are float32
HEADLINES = {  # the cards of the report: label, unit, format
    "masked_cross_entropy": ("masked cross-entropy", "nats per token", "{:.4f}"),
    "masked_perplexity": ("masked perplexity", "", "{:,.2f}"),
    "masked_accuracy": ("masked accuracy", "", "{:.2%}"),
    "masked_top5_accuracy": ("top-5 accuracy", "", "{:.2%}"),
    "mean_reciprocal_rank": ("mean reciprocal rank", "", "{:.4f}"),
    "expected_calibration_error": ("calibration error", "", "{:.2%}"),
    "pseudo_perplexity": ("pseudo-perplexity", "per token", "{:,.2f}"),
    "pseudo_perplexity_per_word": ("pseudo-perplexity", "per word", "{:,.4g}"),
    "pseudo_perplexity_per_character": ("pseudo-perplexity", "per character", "{:,.4f}"),
    "bits_per_byte": ("bits per byte", "", "{:.4f}"),
    "pseudo_log_likelihood": ("pseudo-log-likelihood", "nats", "{:,.1f}"),
    "pair_accuracy": ("pairs right", "by PLL", "{:.2%}"),
    "pair_accuracy_per_token": ("pairs right", "by PLL per token", "{:.2%}"),
    "pair_accuracy_macro": ("pairs right", "mean of paradigms", "{:.2%}"),
    "first_preferred": ("first preferred", "by PLL", "{:.2%}"),
    "first_preferred_per_token": ("first preferred", "by PLL per token", "{:.2%}"),
    "first_preferred_macro": ("first preferred", "mean of paradigms", "{:.2%}"),
    "choice_accuracy": ("choices right", "", "{:.2%}"),
    "choice_accuracy_macro": ("choices right", "mean of paradigms", "{:.2%}"),
    "cloze_log_probability": ("log-probability of the target", "nats per item", "{:.4f}"),
    "cloze_probability": ("probability of the target", "", "{:.2%}"),
    "cloze_accuracy": ("targets right", "every token the most probable", "{:.2%}"),
    "pseudo_perplexity_good": ("pseudo-perplexity", "better sentences", "{:,.2f}"),
    "pseudo_perplexity_bad": ("pseudo-perplexity", "worse sentences", "{:,.2f}"),
    "pseudo_perplexity_first": ("pseudo-perplexity", "first sentences", "{:,.2f}"),
    "pseudo_perplexity_second": ("pseudo-perplexity", "second sentences", "{:,.2f}"),
}
SLICINGS = {
    "frequency": ("token frequency", "How often the token occurs in this corpus."),
    "position": ("position", "Tokens before it in its document."),
    "length": ("document length", "Tokens in its document."),
    "piece": ("word or subword", "Whether the token is a whole word, or the first or a later piece of one."),
    "treatment": ("treatment", "What the model saw in its place: the mask, a random token, or the token itself."),
}
SLICE_METRICS = {  # drawn by slice: metric, label of the axis
    "masked": ("masked_cross_entropy", "cross-entropy, nats"),
    "pseudo": ("pseudo_perplexity", "pseudo-perplexity"),
}

# ---------------------------------------------------------------- the report of a result


def write_report(stored: StoredResult) -> bool:
    """Write `report.html` into an evaluation's folder. Returns False if `mlmkit[report]` is not installed.

    A read-only folder gets a warning and no report, and returns False too.
    """
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        return False
    if not os.access(stored.folder, os.W_OK):
        log.warning("%s is read-only: %s stays as it is", stored.folder, REPORT)
        return False
    result = stored.result
    metric = "masked" if "masked" in result["scored"] else "pseudo"
    declared = result["set"] or {}
    references = [item for item in declared.get("reference", []) if item["metric"] in result["metrics"]]
    items = result.get("items", {})
    headlines = [(*_headline(name), value) for name, value in result["metrics"].items()]
    if not items and "unigram_entropy" in result:  # older results lack it
        entropy: Metric = {"value": result["unigram_entropy"], "low": None, "high": None}
        headlines.insert(1, ("unigram entropy", "nats per token, to beat", "{:.4f}", entropy))
    figures, groups_figure = _figures(stored, metric, references)
    _render(
        "report.html.jinja",
        stored.folder / REPORT,
        result=result,
        unknown=describe_unknown(result["unknown"]),
        overlap=describe_overlap(result["corpus"].get("overlap")),
        metric=metric,
        scored=scored_tokens(result),
        masked=how_masked(pseudo["variant"], pseudo["appended_masks"]) if (pseudo := result["pseudo"]) else "",
        title=declared.get("name") or Path(result["corpus"]["source"]["location"]).name,
        model=Path(result["model"]["path"]).name,
        headlines=headlines,
        figures=figures,
        items=items,
        headline=_headline,
        groups_figure=groups_figure,
        references=references,
        slicings=SLICINGS,
    )
    return True


def scored_tokens(result: Result) -> dict[str, str]:
    """How many tokens were scored, which, and how they were masked, in words, by kind of score."""
    masking, pseudo, scored, described = result["masking"], result["pseudo"], result["scored"], dict[str, str]()
    if "masked" in scored:
        treatment = f"{masking['replace_prob']} masked, {masking['random_prob']} random"
        words, seeds = ", whole words" if masking["whole_word"] else "", ", ".join(map(str, masking["seeds"]))
        described["masked tokens"] = (
            f"{scored['masked']:,}; {masking['algorithm']}, {masking['mask_prob']} selected: {treatment}{words}; "
            f"mask seed {seeds}, epoch {masking['epoch']}"
        )
    if pseudo:
        how = how_masked(pseudo["variant"], pseudo["appended_masks"])
        sample = f"; a sample of {pseudo['sample']}, mask seed {masking['seed']}" if pseudo["sample"] < 1 else ""
        count = f"{scored['pseudo']:,} of {result['corpus']['tokens']:,} tokens"
        described["pseudo-likelihood"] = f"{count}; {pseudo['variant']}, {how}{sample}"
    return described


def _headline(name: str) -> tuple[str, str, str]:
    """Label, unit and format of a metric. A correlation's label is its name."""
    return HEADLINES.get(name, (name.replace("_", " "), "", "{:.4f}"))


def _figures(
    stored: StoredResult, metric: str, references: list[dict[str, Any]]
) -> tuple[list[tuple[str, str, str]], str]:
    """Caption, SVG and note of each figure, and the figure of the items' groups, "" without groups."""
    from mlmkit.eval import plots

    result, histograms = stored.result, _histograms(stored, metric)
    tokens, losses = histograms["tokens"], histograms["losses"]
    figures = [
        (
            f"Loss of the {tokens.sum():,.0f} scored tokens",
            plots.loss_histogram(histograms["counts"], histograms["best"], histograms["edges"]),
            f"Tokens of {LARGEST_LOSS:.0f} nats and more are in the last bar.",
        ),
        (
            "Where the loss comes from",
            plots.loss_by_probability(tokens, losses),
            "Tokens, and their share of the summed loss, by the probability that the original token was given.",
        ),
    ]
    if metric == "masked":
        error = result["metrics"]["expected_calibration_error"]["value"]
        note = f"On the dashed line the model is right as often as it says. Expected error {error:.2%}."
        with np.errstate(invalid="ignore"):
            count, confidence, right = histograms["calibration"]
            figures.append(("Calibration", plots.calibration(confidence / count, right / count, count), note))
    name, axis = SLICE_METRICS[metric]
    for slicing, (label, note) in SLICINGS.items():
        if slices := result["slices"].get(metric, {}).get(slicing):
            values = {slice_name: found[name]["value"] for slice_name, found in slices.items()}
            figures.append((f"Loss by {label}", plots.slice_bars(slicing, values, axis), note))
    published = [reference for reference in references if reference["phenomena"]][:5]
    items = result.get("items", {})
    groups = items.get("phenomena") or items.get("paradigms")
    if not groups or "chance" not in items:
        return figures, ""
    return figures, plots.group_accuracies(groups, items["metrics"][0], items["chance"], published)


def _histograms(stored: StoredResult, metric: str) -> dict[str, Any]:
    """Counts of the scored tokens by loss and by probability, and calibration bins, read in blocks."""
    edges = np.linspace(0, LARGEST_LOSS, LOSS_BINS + 1)
    sums = {"counts": np.zeros(LOSS_BINS), "best": np.zeros(LOSS_BINS), "calibration": np.zeros((3, CALIBRATION_BINS))}
    sums |= {"tokens": np.zeros(PROBABILITY_BINS), "losses": np.zeros(PROBABILITY_BINS)}
    for seed in stored.result["masking"]["seeds"] if metric == "masked" else [None]:
        for table, _ in read_blocks(stored.folder, metric, seed):
            loss = -table["log_prob"].to_numpy().astype(np.float64)
            is_best = table["rank"].to_numpy() == 0
            by_loss = np.minimum(np.searchsorted(edges, loss, side="right") - 1, LOSS_BINS - 1)
            sums["counts"] += np.bincount(by_loss, minlength=LOSS_BINS)
            sums["best"] += np.bincount(by_loss, weights=is_best, minlength=LOSS_BINS)
            by_probability = np.minimum((np.exp(-loss) * PROBABILITY_BINS).astype(int), PROBABILITY_BINS - 1)
            sums["tokens"] += np.bincount(by_probability, minlength=PROBABILITY_BINS)
            sums["losses"] += np.bincount(by_probability, weights=loss, minlength=PROBABILITY_BINS)
            if metric == "masked":
                confidence = np.exp(table["top_log_prob"].to_numpy().astype(np.float64))
                weights = (np.ones(len(loss)), confidence, is_best)
                bins = [np.bincount(calibration_bin(confidence), each, CALIBRATION_BINS) for each in weights]
                sums["calibration"] += bins
    return {**sums, "edges": edges}


# ---------------------------------------------------------------- comparisons

Row = dict[str, Any]


def write_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Write `compare.html` into `folder`. Raises `UserError` without `mlmkit[report]`, or if it cannot be written."""
    require("report", "jinja2", "matplotlib")
    from mlmkit.eval import plots

    sections = []
    for other in comparison["comparisons"]:
        different, agreement = differing_rows(other)
        figures = {}
        for name in ("masked_cross_entropy", "pseudo_perplexity", *other.get("items", {}).get("metrics", ())[:1]):
            own = [(label, row) for label, row in different if label.split()[0] == name]
            rows = [(f"{label[len(name) :] or 'all'} (n: {measured_on(row)})".strip(), row) for label, row in own]
            if len(rows) > 1:
                title = name.replace("_", " ")
                axis = f"{title}, B − A ({rows[0][1]['better']} is better)"
                figures[f"{title.capitalize()} by slice"] = plots.differences(rows, axis)
        sections.append({"other": other, "different": different, "agreement": agreement, "figures": figures})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "comparison": comparison,
            "sections": sections,
            "size": measured_on,
            "describe_unknown": describe_unknown,
        }
        _render("compare.html.jinja", folder / "compare.html", **content)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def describe_side(letter: str, side: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that say what a side of a comparison is."""
    yield f"{letter}: {side['folder']} ({side['model']}, {side['backend']})"
    if unknown := describe_unknown(side["unknown"]):
        yield f"note: in {letter}, {unknown}"


def _named_rows(other: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    """Every difference with its name: overall, then one metric by slice and by group of items."""
    yield from other["metrics"].items()
    for metric, slicings in other["slices"].items():
        name, _ = SLICE_METRICS[metric]
        for slicing, slices in slicings.items():
            yield from ((f"{name} {slicing} {label}", row[name]) for label, row in slices.items())
    for groups in other.get("items", {}).get("groups", {}).values():
        for name, rows in groups.items():
            metric = next(iter(rows))
            yield f"{metric} {name}", rows[metric]


def differing_rows(other: dict[str, Any]) -> tuple[list[tuple[str, Row]], str]:
    """The rows where A and B differ by more than rounding, and a line about the others, "" if there are none."""
    gaps = [(_gap(row), name, row) for name, row in _named_rows(other)]
    agreed = [gap for gap, _, _ in gaps if gap <= ROUNDING]
    largest = f"to {max(agreed):.0e}" if any(agreed) else "exactly"
    line = f"A and B agree {largest} in {len(agreed)} of {len(gaps)} rows" if agreed else ""
    return [(name, row) for gap, name, row in gaps if gap > ROUNDING], line


def _gap(row: Row) -> float:
    """How far A and B, or an end of the interval, are apart; relative to values above 1."""
    if row["difference"] is None:
        return math.inf
    widest = max(abs(row[name] or 0) for name in ("difference", "low", "high"))
    return widest / max(1.0, abs(row["a"]), abs(row["b"]))


def measured_on(row: Row) -> str:
    """What a row is measured on: tokens (of A and of B, if they differ) and documents, or items."""
    if "items" in row:
        return f"{row['items']:,}"
    return " / ".join(f"{count:,}" for count in (*dict.fromkeys(row["tokens"]), row["documents"]))


# ---------------------------------------------------------------- templates and numbers


def _render(template: str, path: Path, **content: Any) -> None:
    """Write a template of `eval/templates`, with everything escaped that it does not mark as safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, **options)
    environment.filters |= {"number": number, "signed": signed, "span": span, "p_value": p_value, "heat": heat}
    write_text(path, environment.get_template(template).render(**content))


def number(value: float | None, form: str = "{:.4f}") -> str:
    """A metric's value; a dash for None."""
    return "–" if value is None else (form if abs(value) < 1e6 else form.replace(".4f", ".3e")).format(value)


def signed(value: float | None) -> str:
    """A difference; small ones in scientific notation."""
    return number(value, "{:+.1e}" if value and abs(value) < 1e-3 else "{:+.4f}")


def span(metric: Mapping[str, Any], form: str = "") -> str:
    """An interval, of a difference unless `form` is given; a dash if there is none."""
    if metric["low"] is metric["high"] is None:
        return "–"
    return " to ".join(number(metric[key], form) if form else signed(metric[key]) for key in ("low", "high"))


def p_value(value: float | None) -> str:
    """A p-value; the smallest that the bootstrap can give is shown as a bound."""
    lowest = 2 / (RESAMPLES + 1)
    return f"< {lowest:.3f}" if value == lowest else number(value, "{:.3f}")


def heat(log_prob: float | None) -> str:
    """How unexpected a token was, as a share of the strongest colour: 0 if certain, 1 from 8 nats."""
    return "0" if log_prob is None else f"{math.sqrt(min(-log_prob, 8.0) / 8.0):.2f}"
