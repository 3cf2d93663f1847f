"""Every masked LM of transformers, tiny and random: exported, and run at shapes that the export never saw.

If TensorRT for RTX is installed, each exported graph is also built into plans in four precisions; none of them is run.
Each architecture has a process of its own, two at a time. `--page docs/architectures.md` replaces the
table on that page.
"""

import argparse
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, Table, main, say, split_page, versions, write_block
from plans import PRECISIONS, builder_name, random_batches, write_plan_graph
from processes import ContestantError, contestants

from mlmkit.export.profiles import PlanOptions

BOUND = 1e-4  # nats, as in the export
LONGEST = 64  # the limit in the configurations
UNBOUNDED = 100  # the longest row that is tried if an architecture has no limit
TIMEOUT = 600  # seconds per architecture, for export and plans each
# (batch, longest row, masked positions), 0 for the longest possible row; the export sees 2 x 7 with 3 masked.
SHAPES = ((1, 0, 5), (17, 13, 300), (3, 31, 1), (5, 7, 0), (1, 9, 300), (17, 0, 40), (2, 16, 8), (1, 1, 1))
PLAN_OPTIONS = PlanOptions(max_batch=4, max_seq=LONGEST, max_masked=16)  # two profiles

# Small values for all names that configurations use for a size; each class takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 200),
    **dict.fromkeys(("hidden_size", "d_model", "dim", "emb_dim", "d_latents"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_heads", "n_head"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 2),
    **dict.fromkeys(("d_head", "head_dim", "attention_head_size"), 64),  # as in most published models, for TensorRT
    **dict.fromkeys(("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 64),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "entity_emb_size", "embedding_rank"), 16),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim", "intra_bottleneck_size"), 16),
    **dict.fromkeys(("max_position_embeddings",), LONGEST),
    **dict.fromkeys(("sliding_window", "local_attention", "attention_window", "num_latents"), 8),
    **dict.fromkeys(("num_self_attends_per_block",), 1),
}
# What an architecture requires beyond that.
EXTRAS: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},  # as in the published checkpoints
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "funnel": {"block_sizes": [1, 1]},
    "luke": {"entity_vocab_size": 20},
    "mobilebert": {"intra_bottleneck_size": 64},
    "neomme": {"num_key_value_heads": 1},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 96],
        "feed_forward_size": 64,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "is_decoder": False,
    },
    "rembert": {"output_embedding_size": 48},
    "squeezebert": {"embedding_size": 128},
    "xmod": {"default_language": "en_XX"},
}

# ---------------------------------------------------------------- one architecture


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
    plans: dict[str, int | str] = field(default_factory=dict)  # by precision: fused attentions, or why none is built


def build(name: str) -> Any:
    """A tiny random network in evaluation mode. No weight is zero and matrices are scaled up, so that errors show."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

    config_class = CONFIG_MAPPING[name]
    values = tiny_values(config_class()) | EXTRAS.get(name, {})
    torch.manual_seed(0)
    network = AutoModelForMaskedLM.from_config(config_class(**values)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
            if parameter.ndim > 1:
                parameter.mul_(3)
    return network


def tiny_values(default: Any) -> dict[str, Any]:
    """Arguments that make a configuration tiny, with special ids in the lower half of the vocabulary."""
    names = {*default.to_dict(), *default.attribute_map}
    values = {name: size for name, size in SIZES.items() if name in names}
    for part in default.sub_configs:
        if inner := getattr(default, part, None):
            values[part] = {"model_type": inner.model_type, **tiny_values(inner)}
    for name in names:
        if name.endswith("_token_id") and (getattr(default, name, None) or 0) >= SIZES["vocab_size"] // 2:
            values[name] = {"pad": 0, "bos": 1, "cls": 1, "eos": 2, "sep": 2}.get(name.removesuffix("_token_id"), 4)
    return values


def check(name: str, folder: Path) -> Row:
    """Build, probe, export and compare one architecture; the graph stays in `folder`."""
    from mlmkit.export.onnx import write_onnx
    from mlmkit.model import MaskedLM, sees_context, sees_padding
    from mlmkit.packing import enable_packing

    row, stage = Row(name), "build"
    try:
        model = MaskedLM(build(name))
        stage = "torch"
        row.gathers_before_head = model.gathers_before_head
        row.max_length = model.max_length()
        longest = min(row.max_length, UNBOUNDED)
        row.runs_at_max_length, row.fails_beyond = runs(model, longest), not runs(model, longest + 1)
        row.sees_padding = sees_padding(model, pad_id(model))
        if not sees_context(model):
            raise ValueError("its prediction for a token does not depend on the others")
        stage = "export"
        write_onnx(model, folder / "model.onnx")
        stage = "run"
        compare(model, folder / "model.onnx", longest, row)
        stage = "packing"
        row.packs = enable_packing(model)
    except Exception as error:
        row.reason = f"{stage}: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"[:300]
    return row


def add_plans(row: Row, folder: Path) -> None:
    """Build a plan in each precision from the graph that `check` left in `folder`; fill in the row."""
    from mlmkit.export.tensorrt import SEE_ARCHITECTURES, build_plan

    facts: dict[str, Any] = {"architecture": row.name, "max_length": row.max_length, "options": PLAN_OPTIONS}
    batches = random_batches(SIZES["vocab_size"], 4, 32)
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as temporary:
            graph = shutil.copytree(folder, Path(temporary) / "plan") / "model.onnx"
            try:
                write_plan_graph(graph, precision, batches)
                built = build_plan(graph, graph.parent, precision=precision, **facts)
                row.plans[precision] = min(built.fused_attention.get(profile.name, 0) for profile in built.profiles)
            except Exception as error:
                reason = str(error).removeprefix("model.onnx: ").removesuffix(f": {SEE_ARCHITECTURES}")
                row.plans[precision] = next(iter(reason.splitlines()), type(error).__name__)[:300]


def compare(model: Any, path: Path, longest: int, row: Row) -> None:
    """Run the graph beside torch at every shape that torch can run; fill in the row."""
    import onnx_ir
    import onnxruntime as ort
    import torch

    from mlmkit.backends import Scored

    row.operators = sorted(
        {f"{node.domain}::{node.op_type}".lstrip(":") for node in onnx_ir.load(path).graph.all_nodes()}
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    differences, ranks, best = [], [], []
    for batch, seq, masked in SHAPES:
        inputs = ragged(model, batch, seq or longest, masked)
        try:
            with torch.inference_mode():
                expected = [output.numpy() for output in model(*map(torch.from_numpy, inputs.values()))]
        except (RuntimeError, IndexError):
            row.torch_fails_at.append(f"{batch} x {seq or longest}")
            continue
        outputs = [np.asarray(output) for output in session.run(Scored._fields, inputs)]
        if (shapes := [output.shape for output in outputs]) != [output.shape for output in expected]:
            raise ValueError(f"outputs of shapes {shapes} at {batch} x {seq or longest} with {masked} masked")
        differences += [float(np.abs(outputs[i] - expected[i]).max(initial=0)) for i in (0, 2)]
        ranks.append(outputs[1] == expected[1])
        best.append(outputs[3][:, 0] == expected[3][:, 0])
    row.max_log_prob_difference = float(np.max(differences))
    row.rank_agreement, row.top_1_agreement = (float(np.concatenate(agree).mean()) for agree in (ranks, best))
    if not row.max_log_prob_difference <= BOUND:
        raise ValueError(f"other numbers: log-probabilities differ by up to {row.max_log_prob_difference:.1e}")


def ragged(model: Any, batch: int, seq: int, masked: int) -> dict[str, np.ndarray]:
    """The graph's inputs: ordinary ids in padded rows of random lengths, the first one full."""
    generator = np.random.default_rng(batch * 1000 + seq)
    input_ids = generator.integers(model.vocabulary_size // 2, model.vocabulary_size, (batch, seq))
    attention_mask = np.ones_like(input_ids)
    for row in range(1, batch):
        attention_mask[row, generator.integers(1, seq + 1) :] = 0
    input_ids[attention_mask == 0] = pad_id(model)
    real = np.flatnonzero(attention_mask)
    positions = np.sort(generator.choice(real, masked, replace=masked > len(real)))
    targets = generator.integers(0, model.vocabulary_size, masked)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "positions": positions, "targets": targets}


def pad_id(model: Any) -> int:
    return getattr(model.network.config.get_text_config(), "pad_token_id", None) or 0


def runs(model: Any, length: int) -> bool:
    import torch

    input_ids = torch.full((1, length), model.vocabulary_size - 1)
    try:
        with torch.inference_mode():
            model(input_ids, torch.ones_like(input_ids), torch.tensor([length - 1]), torch.tensor([9]))
    except (RuntimeError, LookupError, ValueError, AssertionError):
        return False
    return True


# ---------------------------------------------------------------- all of them


def check_apart(name: str) -> Row:
    """`check` and `add_plans` in a process of its own, so that a crash or a hang does not affect other rows."""
    with tempfile.TemporaryDirectory() as temporary, contestants({name: (str, name)}) as started:
        try:
            row: Row = started[name].call(check, Path(temporary), timeout=TIMEOUT)
        except ContestantError as error:
            return Row(name, str(error))
        if builder_name() and not row.reason:
            try:
                row.plans = started[name].call(_plans_of, row, Path(temporary), timeout=TIMEOUT)
            except ContestantError as error:
                row.plans = dict.fromkeys(PRECISIONS, str(error))
        return row


def _plans_of(_name: str, row: Row, folder: Path) -> dict[str, int | str]:
    add_plans(row, folder)
    return row.plans


def measure(options: argparse.Namespace) -> Report:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if options.page:
        split_page(Path(options.page), SCRIPT)  # fails before the hours, not after them
    os.environ["OMP_NUM_THREADS"] = "1"
    named = [name for name in options.only if name] or list(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(check_apart, named):
            rows.append(row)
            say(f"{cells(row)} {row.reason} {row.plans}")
    if options.page:
        write_page(Path(options.page), rows)
    return Report(
        [Table("", HEADER, [cells(row) for row in rows])],
        summary(rows),
        figures=[asdict(row) for row in rows],
    )


# ---------------------------------------------------------------- the page

SCRIPT = Path(__file__).name
HEADER = ["architecture", "max \\|Δ log P\\|", "rank, best agree", "head sees", "packs", "sees padding", "longest row"]
HEADER += [*PRECISIONS, "tokenizer"]
NO_PLANS = "TensorRT for RTX was not installed, so no plan was built."


def write_page(page: Path, rows: list[Row]) -> None:
    of_packages = versions("transformers", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
    written = (
        f"*Written by `python benchmarks/{SCRIPT} --page docs/architectures.md` on {date.today()}: "
        f"{', '.join(f'{name} {number}' for name, number in of_packages.items())}.*"
    )
    table = Table("", HEADER, [cells(row) for row in rows]).markdown()
    write_block(page, SCRIPT, [written, *summary(rows), table, *reasons(rows)])


def summary(rows: list[Row]) -> list[str]:
    good = [row for row in rows if not row.reason]
    worst = max((row.max_log_prob_difference or 0 for row in good), default=0)
    plans = [plan for row in good for plan in row.plans.values()]
    built = sum(isinstance(plan, int) for plan in plans)
    return [
        f"**{len(good)} of {len(rows)} export and agree**: no log-probability, of targets or of the 100 best, is off "
        f"by more than {worst:.1e} nats (bound {BOUND:.0e}).",
        f"**{built} of {len(plans)} plans build**, by {builder_name() or 'TensorRT for RTX'}." if plans else NO_PLANS,
    ]


def reasons(rows: list[Row]) -> list[str]:
    """Why an architecture is not exported, runs at fewer shapes, or has no plan (in some precisions or in all)."""
    lines = []
    for row in rows:
        if row.reason:
            lines.append(f"- **{row.name}** is not exported: `{row.reason[:120]}`")
        if row.torch_fails_at:
            lines.append(f"- **{row.name}**: torch fails at {', '.join(row.torch_fails_at)}")
        by_reason: dict[str, list[str]] = {}
        for precision, plan in row.plans.items():
            if isinstance(plan, str):
                by_reason.setdefault(plan, []).append(precision)
        for reason, precisions in by_reason.items():
            where = "" if len(precisions) == len(PRECISIONS) else f" in {', '.join(precisions)}"
            lines.append(f"- **{row.name}** has no plan{where}: `{reason}`")
    return ["\n".join(lines)]


def cells(row: Row) -> list[str]:
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
    measured = [row.name, *numbers, head, yes[row.packs], yes[row.sees_padding], length, *plan_cells(row)]
    return [*measured, tokenizer_cell(row.name)]


def tokenizer_cell(name: str) -> str:
    """What mlmkit does with the tokenizer that transformers lists for an architecture, or with a tokenizer.json."""
    from transformers import PreTrainedTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    listed = TOKENIZER_MAPPING_NAMES.get(name)
    kind = tokenizer_class_from_name(listed) if listed else None
    if name == "tapas":
        return "no"
    return "torch only" if kind and issubclass(kind, PreTrainedTokenizer) else "yes"


def plan_cells(row: Row) -> list[str]:
    """Cells per precision: whether a plan builds, and how many of its attentions are fused."""
    shown = {None: "", 0: "yes"}
    plans = [row.plans.get(precision) for precision in PRECISIONS]
    return ["no" if isinstance(plan, str) else shown.get(plan, f"{plan} fused") for plan in plans]


if __name__ == "__main__":
    main(__doc__, measure, only=(("",), ("bert", "roberta")), page=("", ""))
