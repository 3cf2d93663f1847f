"""The report of a result, `report.html`, made from the stored result alone."""

import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit.eval.columns import as_numpy
from mlmkit.eval.display import SLICE_COLUMNS, SLICINGS, headline, model_name, slice_name
from mlmkit.eval.metrics import CALIBRATION_BINS, calibration_bin, describe_unknown
from mlmkit.eval.pages import render
from mlmkit.eval.result import Metric, Result
from mlmkit.eval.results_store import REPORT, StoredResult, read_blocks
from mlmkit.eval.rows import how_masked
from mlmkit.overlap import describe_overlap

log = logging.getLogger(__name__)

LARGEST_LOSS, LOSS_BINS = 14.0, 28
POWERS_OF_TEN = 7  # bins of P: 1 to 0.1, ..., and all below 10 to the minus 6


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
        model=model_name(result["model"]["path"]),
        date=result.get("date", "")[:10],
        command=command_line(result["command"]),
        headlines=headlines,
        figures=_figures(stored, metric),
        items=items,
        headline=headline,
        groups_figure=_groups_figure(items, references),
        references=references,
        slices=list(_slice_tables(result)),
        slice_columns=SLICE_COLUMNS,
        slice_name=slice_name,
        examples={name: [(each, list(example_pieces(each))) for each in own] for name, own in _examples(result)},
        joined=any("text" not in each for _, own in _examples(result) for each in own),
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


def command_line(command: Sequence[str]) -> str:
    """The stored arguments of a process as a command that a shell understands."""
    program, *arguments = command
    name = Path(program).name
    if name in ("mlmkit", "__main__.py"):
        return shlex.join(["mlmkit", *arguments])
    return shlex.join(["python", *command] if name.endswith(".py") else command)


# ---------------------------------------------------------------- slices and examples


def _slice_tables(result: Result) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Kind of score, title, note and slices of each slicing that tells slices apart."""
    for kind, slicings in result["slices"].items():
        for slicing, (label, note) in SLICINGS.items():
            if len(slices := slicings.get(slicing, {})) > 1:
                yield kind, label, note, slices


def _examples(result: Result) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, title in (("worst", "Least expected tokens"), ("best", "Most expected tokens")):
        yield title, result["examples"][name]


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text: what lies between tokens, a token, or several that share characters.

    `tokens` are these, joined, as people read them; `log_prob` is None if one was not scored.
    """

    text: str
    tokens: str = ""
    log_prob: float | None = None
    is_target: bool = False


def example_pieces(example: Mapping[str, Any]) -> Iterator[Piece]:
    """The text of an example in pieces. Where the text itself is not stored, its tokens are joined by words."""
    if "text" not in example:
        for number, token in enumerate(example["tokens"]):
            if number and token["begins_word"]:
                yield Piece(" ")
            yield _piece(example, [number], token["text"])
        return
    text, reached = example["text"], 0
    for begin, end, group in _groups(example["tokens"]):
        if own := text[begin:end].strip():  # a token's space before its word is not coloured
            begin = text.index(own, begin)
            end = begin + len(own)
        yield Piece(text[reached:begin])
        yield _piece(example, group, text[begin:end])
        reached = end
    yield Piece(text[reached:])


def _groups(tokens: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, list[int]]]:
    """Begin, end and indices of the tokens that share characters, as the bytes of a character do; most are alone."""
    groups: list[tuple[int, int, list[int]]] = []
    for number, token in enumerate(tokens):
        begin, end = token["span"]
        if groups and (begin < groups[-1][1] or begin == end):
            first, last, members = groups[-1]
            groups[-1] = first, max(last, end), [*members, number]
        else:
            groups.append((begin, end, [number]))
    return groups


def _piece(example: Mapping[str, Any], group: Sequence[int], text: str) -> Piece:
    tokens = [example["tokens"][number] for number in group]
    scores = [token["log_prob"] for token in tokens]
    log_prob = None if None in scores else sum(scores)
    return Piece(text, "".join(token["text"] for token in tokens), log_prob, example["target"] in group)


# ---------------------------------------------------------------- figures


def _groups_figure(items: Mapping[str, Any], references: Sequence[Mapping[str, Any]]) -> str:
    """The figure of the items' groups as SVG; "" without groups or chance level."""
    from mlmkit.eval import plots

    groups = items.get("phenomena") or items.get("paradigms")
    if not groups or "chance" not in items:
        return ""
    metric = items["metrics"][0]
    published = [reference for reference in references if reference["phenomena"] and reference["metric"] == metric]
    label = ", ".join(headline(metric)[:2])
    return plots.group_accuracies(groups, metric, label.removesuffix(", "), items["chance"], published[:5])


def _figures(stored: StoredResult, metric: str) -> list[tuple[str, str, str]]:
    """Caption, SVG and note of each figure."""
    from mlmkit.eval import plots

    result, histograms = stored.result, _histograms(stored, metric)
    tokens = histograms["tokens"]
    figures = [
        (
            f"Loss of the {tokens.sum():,.0f} scored tokens",
            plots.loss_histogram(histograms["counts"], histograms["best"], histograms["edges"]),
            f"Tokens of {LARGEST_LOSS:.0f} nats and more are in the last bar.",
        ),
        (
            "Where the loss comes from",
            plots.loss_by_probability(tokens, histograms["losses"]),
            "Tokens, and their share of the summed loss, by the probability that the original token was given.",
        ),
    ]
    if metric == "masked":
        error = result["metrics"]["expected_calibration_error"]["value"]
        note = f"On the dashed line the model is right as often as it says. Expected error {error:.2%}."
        note += " The larger a point, the more tokens."
        with np.errstate(invalid="ignore"):
            count, confidence, right = histograms["calibration"]
            figures.append(("Calibration", plots.calibration(confidence / count, right / count, count), note))
    return figures


def _histograms(stored: StoredResult, metric: str) -> dict[str, Any]:
    """Counts of the scored tokens by loss and by probability, and calibration bins, read in blocks."""
    edges = np.linspace(0, LARGEST_LOSS, LOSS_BINS + 1)
    sums = {"counts": np.zeros(LOSS_BINS), "best": np.zeros(LOSS_BINS), "calibration": np.zeros((3, CALIBRATION_BINS))}
    sums |= {"tokens": np.zeros(POWERS_OF_TEN), "losses": np.zeros(POWERS_OF_TEN)}
    for seed in stored.result["masking"]["seeds"] if metric == "masked" else [None]:
        for table, _ in read_blocks(stored.folder, metric, seed):
            loss = -as_numpy(table["log_prob"]).astype(np.float64)
            is_best = as_numpy(table["rank"]) == 0
            by_loss = np.minimum(np.searchsorted(edges, loss, side="right") - 1, LOSS_BINS - 1)
            sums["counts"] += np.bincount(by_loss, minlength=LOSS_BINS)
            sums["best"] += np.bincount(by_loss, weights=is_best, minlength=LOSS_BINS)
            by_probability = np.clip(loss / np.log(10), 0, POWERS_OF_TEN - 1).astype(int)
            sums["tokens"] += np.bincount(by_probability, minlength=POWERS_OF_TEN)
            sums["losses"] += np.bincount(by_probability, weights=loss, minlength=POWERS_OF_TEN)
            if metric == "masked":
                confidence = np.exp(as_numpy(table["top_log_prob"]).astype(np.float64))
                weights = (np.ones(len(loss)), confidence, is_best)
                bins = [np.bincount(calibration_bin(confidence), each, CALIBRATION_BINS) for each in weights]
                sums["calibration"] += bins
    return {**sums, "edges": edges}
