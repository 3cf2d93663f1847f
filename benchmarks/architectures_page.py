"""docs/architectures.md, from the rows of architectures.py."""

import platform
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

from harness import Table
from plans import PRECISIONS, builder_name

HEADER = ["architecture", "max \\|Δ log P\\|", "rank, best agree", "head sees", "packs", "sees padding"]
HEADER += ["longest row", ""]
BOUND = 1e-4  # nats, the export's own
LONGEST = 64  # the limit in the configurations
UNBOUNDED = 100  # the longest row tried where an architecture names no limit
# The reason for a failure, or a limit of a success, read from transformers' sources.
IMAGES = "Text only: the scoring graph takes no images."
SHIFTED = "Encoder and decoder: the decoder reads the corrupted text again, shifted by one, as transformers has it."
NOTES = {
    "bart": SHIFTED,
    "big_bird": "Always with full attention: transformers switches block-sparse attention off for good at the first "
    "short row, and mlmkit's probes are short.",
    "funnel": "Its pooling takes the row's length as a number, and the exporter fixes it.",
    "layoutlm": "Text alone: every box is at the origin.",
    "longformer": "The exporter cannot follow its sliding chunks, whose number is computed as a tensor from the "
    "row's length.",
    "luke": "Text alone, without entities.",
    "mbart": SHIFTED + " Its `shift_tokens_right` squeezes the batch away where it is 1; the parity check stops the "
    "export.",
    "mobilebert": "The padding's vector is zero here; where it is not, padding is seen by its neighbours. mlmkit asks "
    "each checkpoint anew.",
    "modernvbert": IMAGES,
    "mra": "Its attention is a CUDA kernel; without it transformers takes zeros for the result and says nothing. "
    "mlmkit refuses the checkpoint.",
    "mvp": SHIFTED,
    "neomme": IMAGES,
    "nystromformer": "With as many landmarks as segments, as in its default configuration, which is full attention.",
    "perceiver": "Its head reads all hidden states from places of its own, so it runs at every position.",
    "reformer": "Its chunks and hashes take the row's length as a number, and the exporter fixes it.",
    "roc_bert": "Without the shapes and sounds of its characters.",
    "tapas": "Text alone, without a table's rows and columns.",
    "ultravbert": IMAGES,
    "xmod": "For its default language.",
    "yoso": "In evaluation it takes the expectation, not random hashes.",
}
PLANS_NOTE = (
    "*2 fused*: two attentions are one kernel each, in every profile; *yes*: the plan builds, but attention is "
    "computed in parts; *no*: there is no plan. Building shows neither that the numbers are right nor how fast a plan "
    "is: none has been run."
)
NO_PLANS = "TensorRT for RTX was not installed, so no plan was built."


@dataclass
class Row:
    """The results of one architecture. `reason` is empty if the graph was exported and agrees with torch."""

    name: str
    reason: str = ""
    max_log_prob_difference: float | None = None
    rank_agreement: float | None = None
    top_1_agreement: float | None = None
    torch_fails_at: list[str] = field(default_factory=list)
    gathers_before_head: bool | None = None
    packs: bool | None = None
    sees_padding: bool | None = None
    max_length: int | None = None
    runs_at_max_length: bool | None = None
    fails_beyond: bool | None = None
    operators: list[str] = field(default_factory=list)
    plans: dict[str, int | str] = field(
        default_factory=dict
    )  # by precision: fused attentions, or why no plan was built


def write_page(path: Path, rows: list[Row]) -> None:
    """Write `docs/architectures.md`."""
    import onnxruntime

    good = [row for row in rows if not row.reason]
    failed = [row for row in rows if row.reason]
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "onnx", "onnxscript"))
    worst = max(row.max_log_prob_difference or 0 for row in good)
    lines = [
        "# Architectures",
        "",
        f"*Written by `python benchmarks/architectures.py --page docs/architectures.md` on {date.today()}: {versions}, "
        f"onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}.*",
        "",
        f"transformers knows {len(rows)} architectures with a masked LM. Each was built tiny from its configuration "
        "class, with two layers, heads of 64 as most published models have (MobileBERT's of 32), and random weights; "
        "exported with the scoring graph ([architecture.md](architecture.md)) and run on "
        "ONNX Runtime's CPU beside torch in float32 at shapes that the export never saw: batches of 1 to 17 ragged "
        "rows, 1 token to the longest row, 0 to 300 masked positions.",
        "",
        f"**{len(good)} of {len(rows)} export and agree**: no log-probability, of targets or of the 100 best, is off "
        f"by more than {worst:.1e} nats (bound {BOUND:.0e}). {len(failed)} do not; the reasons are below.",
        "",
        Table("", HEADER, [cells(row) for row in rows]).markdown(),
        "",
        "- *rank, best agree*: the share of targets with the same rank, and of positions with the same best candidate.",
        "- *head sees*: the masked positions alone, or all of them where the head cannot work on gathered rows. Found "
        "by a probe whenever a model is wrapped; the numbers are right either way.",
        "- *packs*: whether training lays documents end to end in one row; otherwise batches are padded.",
        "- *sees padding*: a row's scores change with the padding behind it, so batches hold rows of one length.",
        f"- *longest row*: what mlmkit lets through, of {LONGEST} in the configuration. It ran in torch. One token "
        "more fails there (*table*), or runs as well, and the limit is the configuration's word (*configured*).",
        "",
        "## Not exported",
        "",
        *(f"- **{row.name}**: {NOTES.get(row.name, 'Not looked into.')} (`{row.reason[:120]}`)" for row in failed),
        "",
        *plan_lines(good),
        "## Worth knowing",
        "",
        *(f"- **{row.name}**: {NOTES[row.name]}" for row in good if row.name in NOTES),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def cells(row: Row) -> list[str]:
    """A row of the page's first table."""
    yes = {True: "yes", False: "no", None: ""}
    length = "" if row.max_length is None else "no limit" if row.max_length > UNBOUNDED else str(row.max_length)
    if length.isdigit():
        length += ", table" if row.fails_beyond else ", configured"
    if length and not row.runs_at_max_length:
        length += ", **fails**"
    numbers = ["", ""]
    if row.max_log_prob_difference is not None:
        numbers = [f"{row.max_log_prob_difference:.1e}", f"{row.rank_agreement:.4g}, {row.top_1_agreement:.4g}"]
    head = {True: "masked", False: "all", None: ""}[row.gathers_before_head]
    failing = f"torch fails at {', '.join(row.torch_fails_at)}" if row.torch_fails_at else ""
    note = "**not exported**" if row.reason else failing
    return [row.name, *numbers, head, yes[row.packs], yes[row.sees_padding], length, note]


def plan_cells(row: Row) -> list[str]:
    """Cells per precision: whether a plan builds, and how many of its attentions are fused."""
    shown = {None: "", 0: "yes"}
    plans = [row.plans.get(precision) for precision in PRECISIONS]
    return ["no" if isinstance(plan, str) else shown.get(plan, f"{plan} fused") for plan in plans]


def not_built(row: Row) -> list[str]:
    """Why TensorRT does not build an architecture: each reason, with its precisions unless it holds for all."""
    reasons: dict[str, list[str]] = {}
    for precision, plan in row.plans.items():
        if isinstance(plan, str):
            reasons.setdefault(plan, []).append(precision)
    return [
        f"`{reason}`" if len(precisions) == len(PRECISIONS) else f"in {', '.join(precisions)}: `{reason}`"
        for reason, precisions in reasons.items()
    ]


def plan_lines(rows: list[Row]) -> list[str]:
    """The page's sections on TensorRT, for the exported architectures."""
    if not any(row.plans for row in rows):
        return ["## TensorRT", "", NO_PLANS, ""]
    built = sum(isinstance(plan, int) for row in rows for plan in row.plans.values())
    plans = [[row.name, *plan_cells(row)] for row in rows]
    missing = [f"- **{row.name}**: {'; '.join(reasons)}" for row in rows if (reasons := not_built(row))]
    return [
        "## TensorRT",
        "",
        f"Each graph was also built into plans by {builder_name() or 'TensorRT for RTX'}, in four precisions, as "
        "`mlmkit export --trt` builds them: int8 means int8 and float16. Ranges and scales come from random tokens. "
        f"**{built} of {sum(len(row.plans) for row in rows)} build.**",
        "",
        PLANS_NOTE,
        "",
        Table("", ["architecture", *PRECISIONS], plans).markdown(),
        "",
        "## Not built by TensorRT",
        "",
        *(missing or ["All of them are built."]),
        "",
    ]
