"""Where a score is bit-identical, and how far it moves elsewhere.

One sentence is scored alone, and then among others: in batches of other sizes, behind more padding, at another place of
the batch, one position at a time, with other numbers of threads. Shown for each architecture, backend and change:
whether every bit stayed, or the largest difference of a log-probability in nats. Random weights; two layers of the
widths of real models. By default BERT at one width: `--kinds` and `--widths` name more.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from harness import Report, Table, isolated, main, use_cores

LENGTHS = (1, 5, 23, 100)
VOCABULARY = 4000


def write_checkpoint(folder: Path, kind: str, width: int) -> None:
    """Random weights, and a tokenizer that is only there because a checkpoint has one."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from mlmkit.pydocs import topics
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(
        lambda: topics()[:20], TokenizerConfig(kind="wordpiece", vocab_size=VOCABULARY), max_length=512
    )
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": width // 64}
    sizes |= {"intermediate_size": 4 * width, "max_position_embeddings": 514, "vocab_size": VOCABULARY}
    sizes |= {"embedding_size": width} if kind in ("electra", "albert") else {}
    sizes |= (
        {"dim": width, "n_layers": 2, "n_heads": width // 64, "hidden_dim": 4 * width} if kind == "distilbert" else {}
    )
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **{key: value for key, value in special.items() if value is not None})
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def batch_of(rows: list[np.ndarray], longest: int):
    """Rows padded to `longest`, every token a target of its own row."""
    from mlmkit.backends import Batch

    input_ids = np.zeros((len(rows), longest), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)], attention_mask[number, : len(row)] = row, 1
    positions = np.flatnonzero(attention_mask)
    return Batch(input_ids, attention_mask, positions, input_ids.ravel()[positions])


def score(folder: Path, backend: str, threads: int) -> dict[str, np.ndarray]:
    """Log-probabilities of the same sentences under every change, in a process with its number of threads."""
    use_cores(threads)
    from mlmkit.backends import Batch, load

    model = load(str(folder / ("artifact" if backend == "onnx" else "checkpoint")), backend)
    generator = np.random.default_rng(0)
    rows = [generator.integers(10, VOCABULARY, size=length) for length in LENGTHS]
    others = [generator.integers(10, VOCABULARY, size=16) for _ in range(31)]
    found = {}
    for length, row in zip(LENGTHS, rows, strict=True):
        mates = [other[:length] for other in others]
        found[f"alone {length}"] = model.score(batch_of([row], length)).log_prob
        for size in (2, 7, 32):
            found[f"batch {length} {size}"] = model.score(batch_of([row, *mates[: size - 1]], length)).log_prob[:length]
        whole = batch_of([row], length)
        alone = [Batch(*whole[:2], whole.positions[[i]], whole.targets[[i]]) for i in range(length)]
        found[f"positions {length}"] = np.concatenate([model.score(batch).log_prob for batch in alone])
        found[f"place {length}"] = model.score(batch_of([*mates[:6], row], length)).log_prob[-length:]
        for padding in (1, 9, 200):
            found[f"padding {length} {padding}"] = model.score(batch_of([row], length + padding)).log_prob
    return found


def measure(options: argparse.Namespace) -> Report:
    """A row a model and backend."""
    rows = []
    for kind in options.kinds:
        for width in options.widths:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                isolated(write, folder, kind, width)
                for backend in ("onnx", "torch"):
                    runs = [isolated(score, folder, backend, threads) for threads in (1, options.threads)]
                    cells = [describe(runs, change) for change in ("batch", "place", "padding", "positions", "threads")]
                    rows.append([kind, width, backend, *cells])
    header = ["model", "width", "backend", "batch", "place", "padding", "positions", "threads"]
    return Report([Table("", header, rows)], figures=rows)


def write(folder: Path, kind: str, width: int) -> None:
    """Checkpoint and artifact."""
    from mlmkit.export.export import export

    write_checkpoint(folder / "checkpoint", kind, width)
    export(str(folder / "checkpoint"), folder / "artifact")


def describe(runs: list[dict[str, np.ndarray]], change: str) -> str:
    """`same` if every bit is, else the largest difference."""
    if change == "threads":
        pairs = [(runs[0][name], runs[1][name]) for name in runs[0]]
    else:
        names = [name for name in runs[0] if name.startswith(change)]
        pairs = [(run[name], run[f"alone {name.split()[1]}"]) for run in runs for name in names]
    largest = max(float(np.abs(one - other).max()) for one, other in pairs)
    return "same" if all(np.array_equal(one, other) for one, other in pairs) else f"{largest:.1e}"


if __name__ == "__main__":
    main(__doc__, measure, kinds=(("bert",), ("bert",)), widths=((768,), (128,)))
