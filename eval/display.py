"""How numbers are shown to people: the names of metrics and slices, and number formats.

The report, the comparison, the model card and the terminal share them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlmkit.eval.statistics import RESAMPLES

SHARE, SMALL, PERPLEXITY, TOTAL = "{:.2%}", "{:.4f}", "{:,.2f}", "{:,.1f}"  # the formats of all metrics
LARGEST = 1e6  # larger values are in scientific notation, except for totals
HEADLINES = {  # the cards of the report: label, unit, format
    "masked_cross_entropy": ("masked cross-entropy", "nats per token", SMALL),
    "masked_perplexity": ("masked perplexity", "", PERPLEXITY),
    "masked_accuracy": ("masked accuracy", "", SHARE),
    "masked_top5_accuracy": ("top-5 accuracy", "", SHARE),
    "mean_reciprocal_rank": ("mean reciprocal rank", "", SMALL),
    "expected_calibration_error": ("calibration error", "", SHARE),
    "pseudo_perplexity": ("pseudo-perplexity", "per token", PERPLEXITY),
    "pseudo_perplexity_per_word": ("pseudo-perplexity", "per word", PERPLEXITY),
    "pseudo_perplexity_per_character": ("pseudo-perplexity", "per character", SMALL),
    "bits_per_byte": ("bits per byte", "", SMALL),
    "pseudo_log_likelihood": ("pseudo-log-likelihood", "nats", TOTAL),
    "pair_accuracy": ("pairs right", "by PLL", SHARE),
    "pair_accuracy_per_token": ("pairs right", "by PLL per token", SHARE),
    "pair_accuracy_macro": ("pairs right", "mean of paradigms", SHARE),
    "first_preferred": ("first preferred", "by PLL", SHARE),
    "first_preferred_per_token": ("first preferred", "by PLL per token", SHARE),
    "first_preferred_macro": ("first preferred", "mean of paradigms", SHARE),
    "choice_accuracy": ("choices right", "", SHARE),
    "choice_accuracy_macro": ("choices right", "mean of paradigms", SHARE),
    "cloze_log_probability": ("log-probability of the target", "nats per item", SMALL),
    "cloze_probability": ("probability of the target", "", SHARE),
    "cloze_accuracy": ("targets right", "every token the most probable", SHARE),
    "pseudo_perplexity_good": ("pseudo-perplexity", "better sentences", PERPLEXITY),
    "pseudo_perplexity_bad": ("pseudo-perplexity", "worse sentences", PERPLEXITY),
    "pseudo_perplexity_first": ("pseudo-perplexity", "first sentences", PERPLEXITY),
    "pseudo_perplexity_second": ("pseudo-perplexity", "second sentences", PERPLEXITY),
}
ARROWS = {"lower": "↓", "higher": "↑", "neither": ""}  # which values are better
CORRELATIONS = {"_spearman": "Spearman's correlation", "_pearson": "Pearson's correlation", "_r2_gain": "gain of R²"}
SLICINGS = {
    "frequency": ("token frequency", "How often the token occurs in this corpus."),
    "position": ("position", "Tokens before it in its document."),
    "length": ("document length", "Tokens in its document."),
    "piece": ("word or subword", "Whether the token is a whole word, or the first or a later piece of one."),
    "treatment": ("treatment", "What the model saw in its place: the mask, a random token, or the token itself."),
}
SLICE_COLUMNS = {  # of the report's tables of slices; the first is drawn as a bar, and compared by slice
    "masked": ("masked_cross_entropy", "masked_accuracy"),
    "pseudo": ("pseudo_perplexity",),
}


def headline(name: str) -> tuple[str, str, str]:
    """Label, unit and format of a metric. A correlation's label is the name that its set gives it."""
    for suffix, statistic in CORRELATIONS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix).replace("_", " "), statistic, SMALL
    return HEADLINES.get(name, (name.replace("_", " "), "", SMALL))


def model_name(path: str) -> str:
    """What a model is called: its folder, or its run. See `name_parts`."""
    return name_parts(path)[-1]


def name_parts(path: str) -> tuple[str, ...]:
    """A model's path without what all runs share: `RUN/model` is called RUN, `RUN/checkpoints/step-N` RUN/step-N."""
    parts = [part for part in Path(path).parts if part not in ("model", "checkpoints", Path(path).anchor)]
    if len(parts) > 1 and re.fullmatch(r"initial|artifact|checkpoint|step-\d+", parts[-1]):
        parts[-2:] = ["/".join(parts[-2:])]
    return tuple(parts) or (path,)


def slice_name(label: str) -> str:
    """A slice's label: `1000-9999` with separators, `whole-word` as two words."""
    if not label[0].isdigit():
        return label.replace("-", " ")
    return re.sub(r"\d+", lambda count: f"{int(count[0]):,}", label).replace("-", " to ")


def number(value: float | None, form: str = SMALL) -> str:
    """A metric's value; a dash for None."""
    if value is None:
        return "–"
    return (form if abs(value) < LARGEST else re.sub(r",?\.[24]f", ".3e", form)).format(value)


def signed(value: float | None, form: str = SMALL) -> str:
    """A difference of values in this format; in scientific notation where that would show less than two digits."""
    is_small = value and form.endswith("f}") and abs(value) < 10.0 ** (1 - int(form[-3]))
    return number(value, "{:+.1e}" if is_small else form.replace("{:", "{:+"))


def span(metric: Mapping[str, Any], form: str = "") -> str:
    """An interval, of a difference unless `form` is given; a dash if there is none."""
    if metric["low"] is metric["high"] is None:
        return "–"
    return " to ".join(number(metric[key], form) if form else signed(metric[key]) for key in ("low", "high"))


def p_value(value: float | None) -> str:
    """A p-value; the smallest that the bootstrap can give is shown as a bound."""
    lowest = 2 / (RESAMPLES + 1)
    return f"< {lowest:.3f}" if value == lowest else number(value, "{:.3f}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A Markdown table whose columns line up as text too. `align` has "l" or "r" per column; the rest are "l".

    Cells cannot break out of the table or act as HTML: names of sets and models come from users.
    """
    lines = [[markdown_cell(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    is_right = [letter == "r" for letter in align.ljust(len(widths), "l")]
    lines.insert(1, ["-" * (width - right) + ":" * right for width, right in zip(widths, is_right, strict=True)])
    return "".join(
        f"| {' | '.join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells)} |\n"
        for cells in (zip(line, widths, is_right, strict=True) for line in lines)
    )


def markdown_cell(text: str) -> str:
    """Text that cannot break out of a cell or act as HTML."""
    # A backslash too: one before a "|" would undo the escape.
    escaped = re.sub(r"([\\|])", r"\\\1", text).replace("<", "&lt;")
    return "".join(char for char in escaped if char.isprintable())
