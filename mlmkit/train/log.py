"""The training log: `log.jsonl`, TensorBoard, Weights & Biases, and the progress line that a user sees.

Tokens are real ones, summed over all ranks; padding never counts.
"""

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from mlmkit.errors import UserError, first_line, install_hint
from mlmkit.files import write_text
from mlmkit.progress import has_bars
from mlmkit.train.config import HELD_OUT, Config, RunConfig

log = logging.getLogger(__name__)

# Sums over the steps since the last entry; `learning` counts the steps with a target.
NO_STEPS = {"steps": 0, "learning": 0, "tokens": 0, "masked": 0, "capacity": 0, "loss": 0.0, "seconds": 0.0}
SECONDS_BETWEEN_LINES = 10.0  # without a terminal, often enough to show progress in a Slurm log


def check_loggers(config: RunConfig) -> None:
    """Raise `UserError` if TensorBoard or Weights & Biases is configured and cannot be imported.

    `find_spec` is not enough: the folder `wandb` that a run leaves behind looks like a package.
    """
    for name, member in {"tensorboard": "torch.utils.tensorboard:SummaryWriter", "wandb": "wandb:init"}.items():
        try:
            if getattr(config, name):
                resolve_name(member)
        except (ImportError, AttributeError):
            raise UserError(f"train.{name} needs a package: {install_hint(name)}") from None


class TrainingLog:
    """Records every step and writes an entry every `train.log_every` steps: means and sums since the last entry.

    `step` and `sums` are those of the checkpoint that the run resumes from; entries of later steps are dropped. `phase`
    is the name of the phase, or "", and `last_step` its last step, if that is known. A step without a target has no
    loss and does not count in the mean. `flops_per_token` and `peak_flops`, of all GPUs together, give the share of the
    hardware's rate that was used (MFU); 0 if unknown. Only the rank with `is_first` writes.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        step: int,
        sums: dict[str, float] = NO_STEPS,
        *,
        phase: str = "",
        last_step: int | None = None,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        is_first: bool = True,
    ) -> None:
        self.phase, self.last_step = phase, last_step
        self.every = config.train.log_every
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.stack = ExitStack()
        self.writers = _open_writers(run, config, step, self.stack) if is_first else []
        entries = read_log(run) if is_first else []
        self.evaluated = {(entry["step"], *held_out_set(entry)) for entry in entries if "held_out" in entry}
        self.logs_lines = is_first and not has_bars()
        self.last_line, self.figures = -SECONDS_BETWEEN_LINES, [""]
        self._restart(sums)

    def _restart(self, sums: dict[str, float]) -> None:
        self.sums, self.since = {**sums}, time.perf_counter() - sums["seconds"]

    def open_sums(self) -> dict[str, float]:
        """What a checkpoint saves, so that the first entry after a resume covers all steps since the last one."""
        return self.sums | {"seconds": time.perf_counter() - self.since}

    def record(
        self,
        step: int,
        *,
        loss: float,
        tokens: int,
        masked: int,
        capacity: int,
        share: float,
        steps_left: int,
        **latest: float,
    ) -> list[str]:
        """Record a step with `tokens` (of `capacity`) and `masked` tokens over all ranks; returns what a bar shows.

        `share` of the phase is done: 1.0 after its last step. An entry takes `latest` (epoch, learning rate,
        ...) from its last step.
        """
        added = {"steps": 1, "learning": int(masked > 0), "tokens": tokens, "masked": masked, "loss": loss}
        self.sums |= {name: self.sums[name] + value for name, value in {**added, "capacity": capacity}.items()}
        where = self.where(step, share)
        if step % self.every and share < 1:
            return [where, *self.figures]
        sums, seconds = self.sums, max(time.perf_counter() - self.since, 1e-9)
        entry = {
            "step": step,
            **({"phase": self.phase} if self.phase else {}),
            **latest,
            **({"loss": sums["loss"] / sums["learning"]} if sums["learning"] else {}),
            "tokens": sums["tokens"],
            "masked": sums["masked"],
            "fill": sums["tokens"] / sums["capacity"],
            "tokens_per_second": sums["tokens"] / seconds,
        }
        if empty := sums["steps"] - sums["learning"]:
            log.warning("step %d: %d of the last %d steps had nothing to predict", step, empty, sums["steps"])
        if self.peak_flops:
            entry["mfu"] = self.flops_per_token * entry["tokens_per_second"] / self.peak_flops
        self._write(entry)
        self.figures = _figures(entry)
        if self.logs_lines and (share >= 1 or time.perf_counter() - self.last_line >= SECONDS_BETWEEN_LINES):
            left = timedelta(seconds=round(steps_left * seconds / sums["steps"]))
            log.info("%s  %s  %s left", where, "  ".join(self.figures), left)
            self.last_line = time.perf_counter()
        self._restart(NO_STEPS)
        return [where, *self.figures]

    def held_out(self, step: int, results: Mapping[str, dict[str, Any]]) -> None:
        """Write what `held_out_metrics` takes from each held-out evaluation's `result.json`, by name, once."""
        for name, result in results.items():
            entry = {"step": step, "held_out": {"name": name, **held_out_metrics(result)}}
            if not self.writers or (key := (step, *held_out_set(entry))) in self.evaluated:
                continue
            self.evaluated.add(key)
            self._write(entry)
            metric, entropy = entry["held_out"]["masked_cross_entropy"], entry["held_out"]["unigram_entropy"]
            interval = "" if metric["low"] is None else f" ({metric['low']:.4f} to {metric['high']:.4f})"
            shown = f"{metric['value']:.4f}{interval}" + ("" if entropy is None else f", unigram {entropy:.4f}")
            log.info("%s  %s cross-entropy %s", self.where(step), name, shown)

    def where(self, step: int, share: float | None = None) -> str:
        """Phase and step, with its number of steps, or, if that is not known, the `share` that is done."""
        total = f"/{self.last_step}" if self.last_step else "" if share is None else f" ({share:.0%})"
        return f"{self.phase} step {step}{total}".lstrip()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block, such as an evaluation or a checkpoint, from the training time."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def _write(self, entry: dict[str, Any]) -> None:
        for write in self.writers:
            write(entry)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *failure: Any) -> None:
        self.stack.__exit__(*failure)


def held_out_metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    """The mask digest, the unigram entropy (None in older results) and the metrics of a `result.json`."""
    kept = {"mask_digest": result["mask_digest"], "unigram_entropy": result.get("unigram_entropy")}
    return {**kept, **result["metrics"]}


def held_out_set(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Name and mask digest of the text of a held-out entry; older entries have no name, as there was one text."""
    return entry["held_out"].get("name", HELD_OUT), entry["held_out"]["mask_digest"]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of `log.jsonl`. A last line that a kill cut off is skipped, a damaged one with a warning."""
    path, entries = run / "log.jsonl", []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        entry = _parse_entry(line)
        if entry:
            entries.append(entry)
        elif number < len(lines) or line.endswith(b"}"):
            log.warning("%s: line %d is damaged and left out", path, number)
    return entries


def draw_loss(run: Path) -> Path | None:
    """Draw `log.jsonl` as `RUN/loss.png`; None if it has no loss, or matplotlib is missing."""
    entries, path = read_log(run), run / "loss.png"
    if not any("loss" in entry for entry in entries) or not can_draw(path):
        return None
    from mlmkit.eval.plots import training_curves

    training_curves(entries, run.resolve().name, path)
    return path


def can_draw(path: Path) -> bool:
    """Whether matplotlib is installed; logs that `path` is left out if not."""
    if find_spec("matplotlib"):
        return True
    log.info("%s is left out, because it needs matplotlib: %s", path, install_hint("report"))
    return False


def _parse_entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line, or None if it lacks what resuming and drawing need."""
    try:
        entry = json.loads(line)
        if held_out := entry.get("held_out"):
            metric = held_out["masked_cross_entropy"]
            needed = [metric["value"], metric["low"] or 0.0, metric["high"] or 0.0, int(held_out["mask_digest"], 16)]
        else:
            needed = [entry["learning_rate"], entry.get("loss", 0.0)]
        is_complete = type(entry["step"]) is int and all(isinstance(value, int | float) for value in needed)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return entry if is_complete else None


def _figures(entry: dict[str, Any]) -> list[str]:
    parts = [f"loss {entry['loss']:.3f}"] if "loss" in entry else ["nothing masked"]
    parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in entry:
        parts.append(f"MFU {entry['mfu']:.0%}")
    return parts


def _open_writers(run: Path, config: Config, step: int, stack: ExitStack) -> list[Callable[[dict[str, Any]], object]]:
    """A function per destination that writes an entry. `stack` closes them."""
    path = run / "log.jsonl"
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in read_log(run) if entry["step"] <= step))
    file = stack.enter_context(path.open("a", encoding="utf-8"))

    def write_line(entry: dict[str, Any]) -> None:
        file.write(json.dumps(entry) + "\n")
        file.flush()

    writers: list[Callable[[dict[str, Any]], object]] = [write_line]
    if config.train.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # `purge_step` hides what a killed run wrote for the steps that are now repeated.
        board = stack.enter_context(SummaryWriter(str(run / "tensorboard"), purge_step=step + 1))

        def write_points(entry: dict[str, Any]) -> None:
            for name, value in _scalars(entry).items():
                board.add_scalar(name, value, entry["step"])
            board.flush()

        writers.append(write_points)
    if config.train.wandb:
        project = _open_wandb(run, config)
        stack.push(lambda kind, *_: project.finish(exit_code=int(kind is not None)))
        writers.append(lambda entry: project.log(_scalars(entry), step=entry["step"]))
    return writers


def _open_wandb(run: Path, config: Config) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    run_id = run / "wandb-id.txt"
    if not run_id.exists():
        write_text(run_id, secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.train.wandb,
            id=run_id.read_text(encoding="utf-8"),
            name=run.resolve().name,
            dir=run,
            config=asdict(config),
            resume="allow",
        )
    except wandb.Error as error:
        raise UserError(f"train.wandb: {first_line(error)} Or set WANDB_MODE=offline.") from error


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    """An entry's values under flat names: `train/loss`, ..., `held_out/masked_cross_entropy` with its bounds.

    One of several held-out texts has its name in between: `held_out/NAME/masked_cross_entropy`.
    """
    if "held_out" not in entry:
        return {f"train/{name}": value for name, value in entry.items() if name not in ("step", "phase")}
    name, _ = held_out_set(entry)
    group = "held_out" if name == HELD_OUT else f"held_out/{name}"
    metrics = {name: metric for name, metric in entry["held_out"].items() if isinstance(metric, dict)}
    return {
        f"{group}/{name}" + ("" if bound == "value" else f"_{bound}"): metric[bound]
        for name, metric in metrics.items()
        for bound in ("value", "low", "high")
        if metric.get(bound) is not None
    }
