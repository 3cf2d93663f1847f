"""The training loop, top to bottom."""

import json
import logging
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlmkit.backends.torch import pick_device
from mlmkit.errors import CheckError
from mlmkit.files import new_folder
from mlmkit.model import MaskedLM
from mlmkit.packing import enable_packing
from mlmkit.progress import progress
from mlmkit.train.checkpoint import checkpoints, load_optimizer, save_checkpoint, save_model
from mlmkit.train.config import Config, OptimConfig
from mlmkit.train.data import MicroBatch
from mlmkit.train.order import Cursor
from mlmkit.train.start import begin_or_check, build_model, make_data

log = logging.getLogger(__name__)


def train(config: Config, run: Path) -> Path:
    """Train as configured, or go on where an interrupted run in the same folder stopped.

    Returns the folder of the finished model, `RUN/model`. `RUN/log.jsonl` has a line every `train.log_every` steps.
    Raises `UserError` for input that cannot be trained on and `CheckError` when the loss is no longer finite.
    """
    tokenizer, corpus = begin_or_check(config, run)
    if (run / "model").exists():
        log.info("%s is finished: nothing to train", run)
        return run / "model"

    device = torch.device(pick_device(config.train.device))
    saved = checkpoints(run)
    torch.manual_seed(config.train.seed)
    model = build_model(config, tokenizer, resume_from=saved[-1] if saved else None)
    packed = enable_packing(model)
    if not packed:
        log.warning("%s cannot be packed: training on padded batches", type(model.network).__name__)
    model.to(device).train()
    optimizer = build_optimizer(model, config.optim, fused=device.type == "cuda")
    step = load_optimizer(saved[-1], optimizer) if saved else 0
    if saved:
        log.info("resuming %s after step %d", run, step)

    data = make_data(config, tokenizer, corpus, model, packed=packed)
    log.info(
        "%s, %.1f M parameters, vocabulary %d; %d documents, %d tokens; %s",
        config.model.init_from or config.model.architecture,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        tokenizer.vocabulary_size,
        len(corpus),
        len(corpus.ids),
        device,
    )
    micro_batches = config.train.global_batch_tokens // config.train.micro_batch_tokens
    batches = islice(data.batches(Cursor(), micro_batches=micro_batches, steps=config.train.steps), step, None)
    with TrainingLog(run / "log.jsonl", step, config.train.log_every) as training_log, progress() as bar:
        task = bar.add_task("training", total=config.train.steps, completed=step)
        while step < config.train.steps:
            cursor, batch = next(batches)
            lr = learning_rate(step, config.optim, config.train.steps)
            torch.manual_seed(config.train.seed + step)  # dropout depends on the step: no generator state to resume
            loss, grad_norm = train_step(model, optimizer, batch, lr, config.optim.max_grad_norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                last_good = next(reversed(checkpoints(run)), "none yet")
                raise CheckError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.3g}: "
                    f"lower optim.lr (last good checkpoint: {last_good})"
                )
            step += 1
            description = training_log.record(step, cursor.epoch, batch, loss, lr, grad_norm)
            bar.update(task, completed=step, description=description)
            if step % config.train.save_every == 0 or step == config.train.steps:
                save_checkpoint(run, step, model.network, run / "tokenizer", optimizer, config.train.keep_checkpoints)

    with new_folder(run / "model", replaces="config.json") as folder:
        save_model(model.network, run / "tokenizer", folder)
    return run / "model"


def train_step(
    model: MaskedLM,
    optimizer: torch.optim.Optimizer,
    batch: list[MicroBatch],
    lr: float,
    max_grad_norm: float,
) -> tuple[float, float]:
    """One update; returns the mean loss over the masked tokens of the whole batch, and the gradient norm.

    Each micro-batch's summed loss is divided by the global count of masked tokens, so how the batch is cut into
    micro-batches does not change the gradient.
    """
    masked = max(sum(len(micro.targets) for micro in batch), 1)
    total = torch.zeros((), device=model.device)
    for micro in batch:
        micro = micro.to(model.device)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model.loss_sum(micro.positions, micro.targets, **micro.inputs) / masked
        loss.backward()
        total += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return total.item(), grad_norm.item()


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then linear decay to zero at `steps`. `step` counts from 0."""
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (steps - step) / max(steps - warmup, 1)


def build_optimizer(model: MaskedLM, config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW with no decay on vectors: biases and the scales of normalisations."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


class TrainingLog:
    """`log.jsonl`: one JSON object every few steps. On a resume, lines after the resumed step are dropped."""

    def __init__(self, path: Path, step: int, every: int) -> None:
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
        self.file, self.every = path.open("a"), every
        self.description = "training"
        self._restart()

    def _restart(self) -> None:
        self.since, self.tokens, self.masked, self.steps, self.loss = time.perf_counter(), 0, 0, 0, 0.0

    def record(self, step: int, epoch: int, batch: list[MicroBatch], loss: float, lr: float, grad_norm: float) -> str:
        """Take a step in; returns the progress line. Tokens a second count real tokens, padding never."""
        self.tokens += sum(micro.tokens for micro in batch)
        self.masked += sum(len(micro.targets) for micro in batch)
        self.steps += 1
        self.loss += loss
        if step % self.every == 0:
            seconds = time.perf_counter() - self.since
            entry = {
                "step": step,
                "epoch": epoch,
                "loss": self.loss / self.steps,
                "learning_rate": lr,
                "gradient_norm": grad_norm,
                "tokens": self.tokens,
                "masked": self.masked,
                "tokens_per_second": self.tokens / seconds,
            }
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
            self.description = f"training  loss {entry['loss']:.3f}  {entry['tokens_per_second']:,.0f} tokens/s"
            self._restart()
        return self.description

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("}\n"):  # a kill may have cut the last one
                yield line
