"""What a run says of itself while it trains: `log.jsonl`, TensorBoard, Weights & Biases, and the line that a user sees.

Tokens are real ones of all ranks together, padding never counted.
"""

import json
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from rich.console import Console

from mlmkit.errors import UserError, first_line
from mlmkit.files import write_text
from mlmkit.train.config import Config, RunConfig

log = logging.getLogger(__name__)

# Of the steps since the last entry; `learning` are those with a target.
NO_STEPS = {"steps": 0, "learning": 0, "tokens": 0, "masked": 0, "loss": 0.0, "seconds": 0.0}
SECONDS_BETWEEN_LINES = 10.0  # where no bar moves: often enough to see life in a Slurm log


def check_loggers(config: RunConfig) -> None:
    """Raise `UserError` if TensorBoard or Weights & Biases is asked for and cannot be imported.

    They are imported, not looked for: the folder `wandb` that a run leaves behind looks like a package.
    """
    for name, member in {"tensorboard": "torch.utils.tensorboard:SummaryWriter", "wandb": "wandb:init"}.items():
        try:
            if getattr(config, name):
                resolve_name(member)
        except (ImportError, AttributeError):
            raise UserError(f"train.{name} needs a package: pip install 'mlmkit[{name}]'") from None


class TrainingLog:
    """Takes every step in, and writes an entry every `train.log_every` of them: means and sums since the last one.

    `step` is the one resumed from, with the `sums` that were open there; what was written of later ones is dropped.
    A step without a target has no loss: it does not count in the mean, and an entry of such steps has none, which a
    warning says. `flops_per_token` and `peak_flops`, of all GPUs together, give the share of the hardware's rate that
    was used (MFU); 0 where one is unknown. Only the first rank writes: the others pass `is_first=False`.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        step: int,
        sums: dict[str, float] = NO_STEPS,
        *,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        is_first: bool = True,
    ) -> None:
        self.every, self.last_step = config.train.log_every, config.train.steps
        self.batch_tokens = config.train.global_batch_tokens
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.writers = _open_writers(run, config, step) if is_first else []
        entries = read_log(run) if is_first else []
        self.measured = {(entry["step"], entry["held_out"]["mask_digest"]) for entry in entries if "held_out" in entry}
        self.speaks = is_first and not Console(stderr=True).is_terminal  # on a terminal the bar does
        self.spoke, self.description = -SECONDS_BETWEEN_LINES, "training"
        self._restart(sums)

    def _restart(self, sums: dict[str, float]) -> None:
        self.sums, self.since = {**sums}, time.perf_counter() - sums["seconds"]

    def open_sums(self) -> dict[str, float]:
        """What a checkpoint keeps, so that the next entry after a resume counts all steps since the last one."""
        return self.sums | {"seconds": time.perf_counter() - self.since}

    def record(self, step: int, *, loss: float, tokens: int, masked: int, **latest: float) -> str:
        """Take a step in, with its `tokens` and `masked` tokens of all ranks; returns the progress line.

        Of `latest` (epoch, learning rate, ...) an entry has the values of its last step.
        """
        added = {"steps": 1, "learning": int(masked > 0), "tokens": tokens, "masked": masked, "loss": loss}
        self.sums |= {name: self.sums[name] + value for name, value in added.items()}
        if step % self.every and step != self.last_step:
            return self.description
        sums, seconds = self.sums, max(time.perf_counter() - self.since, 1e-9)
        entry = {
            "step": step,
            **latest,
            **({"loss": sums["loss"] / sums["learning"]} if sums["learning"] else {}),
            "tokens": sums["tokens"],
            "masked": sums["masked"],
            "fill": sums["tokens"] / (sums["steps"] * self.batch_tokens),
            "tokens_per_second": sums["tokens"] / seconds,
        }
        if empty := sums["steps"] - sums["learning"]:
            log.warning("step %d: %d of the last %d steps had nothing to predict", step, empty, sums["steps"])
        if self.peak_flops:
            entry["mfu"] = self.flops_per_token * entry["tokens_per_second"] / self.peak_flops
        self._write(entry)
        self.description = f"training  {_summary(entry)}"
        if self.speaks and (step == self.last_step or time.perf_counter() - self.spoke >= SECONDS_BETWEEN_LINES):
            left = timedelta(seconds=round((self.last_step - step) * seconds / sums["steps"]))
            log.info("step %d/%d  %s  %s left", step, self.last_step, _summary(entry), left)
            self.spoke = time.perf_counter()
        self._restart(NO_STEPS)
        return self.description

    def held_out(self, step: int, result: dict[str, Any]) -> None:
        """Write what is of interest in the `result.json` of a held-out evaluation, metrics and mask digest, once."""
        digest = result["mask_digest"]
        if (step, digest) in self.measured or not self.writers:
            return
        self.measured.add((step, digest))
        self._write({"step": step, "held_out": {"mask_digest": digest, **result["metrics"]}})
        found = result["metrics"]["masked_cross_entropy"]
        interval = "" if found["low"] is None else f" ({found['low']:.4f} to {found['high']:.4f})"
        shown = f"{found['value']:.4f}{interval}"
        log.info("step %d/%d  held-out masked cross-entropy %s", step, self.last_step, shown)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within, an evaluation or a checkpoint, does not count as training time."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def _write(self, entry: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(entry)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for writer in self.writers:
            writer.close(failed=kind is not None)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of `log.jsonl` that are complete: a kill may have cut the last one. A warning names damaged ones."""
    path, entries = run / "log.jsonl", []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry:
            entries.append(entry)
        elif number < len(lines) or line.endswith(b"}"):
            log.warning("%s: line %d is damaged and left out", path, number)
    return entries


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line, unless it lacks what resuming and drawing need."""
    try:
        entry = json.loads(line)
        if held_out := entry.get("held_out"):
            metric = held_out["masked_cross_entropy"]
            needed = [metric["value"], metric["low"] or 0.0, metric["high"] or 0.0, int(held_out["mask_digest"], 16)]
        else:
            needed = [entry["learning_rate"], entry.get("loss", 0.0)]
        is_sound = type(entry["step"]) is int and all(isinstance(value, int | float) for value in needed)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return entry if is_sound else None


def _summary(entry: dict[str, Any]) -> str:
    parts = [f"loss {entry['loss']:.3f}"] if "loss" in entry else ["nothing masked"]
    parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in entry:
        parts.append(f"MFU {entry['mfu']:.0%}")
    return "  ".join([*parts, f"lr {entry['learning_rate']:.2e}", f"fill {entry['fill']:.1%}"])


# ---------------------------------------------------------------- where entries go


def _open_writers(run: Path, config: Config, step: int) -> "list[_JsonLines | _TensorBoard | _WeightsAndBiases]":
    writers: list[_JsonLines | _TensorBoard | _WeightsAndBiases] = [_JsonLines(run, step)]
    if config.train.tensorboard:
        writers.append(_TensorBoard(run / "tensorboard", step))
    if config.train.wandb:
        writers.append(_WeightsAndBiases(run, config))
    return writers


class _JsonLines:
    def __init__(self, run: Path, step: int) -> None:
        path = run / "log.jsonl"
        kept = "".join(json.dumps(entry) + "\n" for entry in read_log(run) if entry["step"] <= step)
        write_text(path, kept)
        self.file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def close(self, *, failed: bool) -> None:
        self.file.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what a run that was killed had written of the steps that are now taken again.
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        for name, value in _scalars(entry).items():
            self.writer.add_scalar(name, value, entry["step"])
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, run: Path, config: Config) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        kept = run / "wandb-id.txt"
        if not kept.exists():
            write_text(kept, secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=config.train.wandb,
                id=kept.read_text(encoding="utf-8"),
                name=run.resolve().name,
                dir=run,
                config=asdict(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(f"train.wandb: {first_line(error)} Or set WANDB_MODE=offline.") from error

    def write(self, entry: dict[str, Any]) -> None:
        self.run.log(_scalars(entry), step=entry["step"])

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    """`train/loss`, ..., or `held_out/masked_cross_entropy` with its bounds."""
    if "held_out" not in entry:
        return {f"train/{name}": value for name, value in entry.items() if name != "step"}
    metrics = {name: metric for name, metric in entry["held_out"].items() if isinstance(metric, dict)}
    return {
        f"held_out/{name}" + ("" if bound == "value" else f"_{bound}"): metric[bound]
        for name, metric in metrics.items()
        for bound in ("value", "low", "high")
        if metric.get(bound) is not None
    }
