"""How numbers are shown to people: the names of metrics and slices, and number formats.

The report, the comparison, the model card and the terminal share them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlmkit.eval.statistics import RESAMPLES

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


def headline(name: str) -> tuple[str, str, str]:
    """Label, unit and format of a metric. A correlation's label is its name."""
    return HEADLINES.get(name, (name.replace("_", " "), "", "{:.4f}"))


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
    return "".join(char for char in text.replace("|", "\\|").replace("<", "&lt;") if char.isprintable())
