"""The report of a result, `report.html`, made from the stored result alone."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit.eval.display import SLICE_METRICS, SLICINGS, headline
from mlmkit.eval.metrics import CALIBRATION_BINS, calibration_bin, describe_unknown
from mlmkit.eval.pages import render
from mlmkit.eval.result import Metric, Result
from mlmkit.eval.results_store import REPORT, StoredResult, read_blocks
from mlmkit.eval.rows import how_masked
from mlmkit.overlap import describe_overlap

log = logging.getLogger(__name__)

LARGEST_LOSS, LOSS_BINS, PROBABILITY_BINS = 14.0, 28, 20


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
    headlines = [(*headline(name), value) for name, value in result["metrics"].items()]
    if not items and "unigram_entropy" in result:  # older results lack it
        entropy: Metric = {"value": result["unigram_entropy"], "low": None, "high": None}
        headlines.insert(1, ("unigram entropy", "nats per token, to beat", "{:.4f}", entropy))
    figures, groups_figure = _figures(stored, metric, references)
    render(
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
        headline=headline,
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
