"""The training loop, top to bottom."""

import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from mlmkit.backends.torch import pick_device
from mlmkit.console import progress
from mlmkit.corpus import Corpus
from mlmkit.distributed import Ranks, said_once
from mlmkit.distributed import ranks as find_ranks
from mlmkit.errors import CheckError, StoppedError, UserError
from mlmkit.files import write_record
from mlmkit.packing import enable_packing
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoint import (
    HELD_OUT_METRICS,
    checkpoints,
    copy_model,
    held_out_result,
    is_out_of_memory,
    load_optimizers,
    prune,
    read_state,
    recall,
    resuming,
    save_checkpoint,
)
from mlmkit.train.config import Config
from mlmkit.train.curve import draw_loss
from mlmkit.train.data import MicroBatch, TrainingData
from mlmkit.train.dry_run import document_lengths
from mlmkit.train.estimate import flops_per_token, peak_flops
from mlmkit.train.layers import compile_layers
from mlmkit.train.log import NO_STEPS, TrainingLog, check_loggers, read_log
from mlmkit.train.optim import build_optimizers, learning_rate_factor
from mlmkit.train.order import Cursor
from mlmkit.train.parallel import clip_gradients, freeze_unused, parallelise, synchronised
from mlmkit.train.presets import fit_output_bias
from mlmkit.train.start import begin_or_check, build_model, run_lock
from mlmkit.train.texts import evaluate_checkpoint, held_out_digest

log = logging.getLogger(__name__)

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


def train(config: Config, run: Path) -> Path:
    """Train as configured, or go on where an interrupted run in the same folder stopped; on every rank of torchrun.

    Returns the folder of the finished model, `RUN/model`. `RUN/log.jsonl` has a line every `train.log_every` steps.
    Raises `UserError` for input that cannot be trained on, too little memory, and a disk that takes no checkpoint;
    `CheckError` when loss or gradient are no longer finite; `StoppedError` after Ctrl-C, SIGTERM or SIGUSR1.
    """
    ranks = find_ranks()
    if not ranks.is_first:
        logging.getLogger("mlmkit").setLevel(logging.ERROR)  # one rank speaks for all
    with said_once():
        device = torch.device(pick_device(config.train.device))
        check_loggers(config.train)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.local)
        torch.cuda.set_device(device)
    ranks.join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with run_lock(run, ranks):
            tokenizer, corpora = begin_or_check(config, run, ranks)
            mask_digest = ranks.from_first(lambda: held_out_digest(config, tokenizer))
            # The first rank's view of the folder is that of all: a network file system may show others an older one.
            if ranks.from_first(lambda: is_finished(run, mask_digest)):
                log.info("%s is finished: nothing to train", run)
                return run / "model"
            with stop_signals(run, ranks) as stop:
                return _train(config, run, tokenizer, corpora, mask_digest, device, ranks, stop)
    except BaseException as error:
        # DDP's reducer must be gone before its process group, or the process may hang at its end, in the destructor of
        # the last one to go (gloo, torch 2.13): the frames of the traceback would keep it.
        cause: BaseException | None = error
        while cause:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        ranks.close()


def _train(
    config: Config,
    run: Path,
    tokenizer: Tokenizer,
    corpora: Sequence[Corpus],
    mask_digest: str,
    device: torch.device,
    ranks: Ranks,
    stop: list[int],
) -> Path:
    saved = ranks.from_first(lambda: next(reversed(checkpoints(run)), None))
    torch.manual_seed(config.train.seed)
    with resuming(saved):
        state = ranks.from_first(lambda: read_state(saved)) if saved else {"log": NO_STEPS}
        model = build_model(config, tokenizer, resume_from=saved)
    if not (saved or config.model.init_from):
        fit_output_bias(model, corpora, config.data.passes)
    freeze_unused(model)
    packed = enable_packing(model)
    if not packed:
        log.warning("%s cannot be packed: training on padded batches", type(model.network).__name__)
    data = TrainingData(config, corpora, tokenizer, packed=packed, position_offset=model.position_offset)
    peak = ranks.world * peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0
    flops = 0.0
    if peak:
        _, [first] = next(data.batches(Cursor(), micro_batches=1, steps=1))
        flops = flops_per_token(model, document_lengths(first), config.masking.mask_prob)

    model.to(device).train()
    if config.train.compile:
        compile_layers(model)
    module = parallelise(model, ranks, config.train.parallel)
    optimizers = build_optimizers(model, config.optim)
    with resuming(saved):
        if saved:
            load_optimizers(saved, model, optimizers, ranks)
    sums = state.pop("log")
    cursor = Cursor(**state)
    micro_batches = config.train.global_batch_tokens // config.train.micro_batch_tokens
    steps, workers = config.train.steps, config.data.workers
    batches = data.batches(
        cursor, micro_batches=micro_batches, steps=steps, rank=ranks.rank, world=ranks.world, workers=workers
    )
    if saved:
        log.info("resuming %s after step %d", run, cursor.step)
    log.info(
        "%s, %.1f M parameters, vocabulary %d; %d documents, %d tokens; %s",
        config.model.init_from or config.model.architecture,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        tokenizer.vocabulary_size,
        sum(len(corpus) for corpus in corpora),
        sum(len(corpus.ids) for corpus in corpora),
        f"{ranks.world} x {device.type}" if ranks.world > 1 else device.type,
    )
    with (
        TrainingLog(
            run, config, cursor.step, sums, flops_per_token=flops, peak_flops=peak, is_first=ranks.is_first
        ) as training_log,
        progress(shown=ranks.is_first) as bar,
    ):
        task = bar.add_task("training", total=steps, completed=cursor.step)

        def measure(checkpoint: Path) -> None:
            if mask_digest:
                result = evaluate_checkpoint(checkpoint, config, mask_digest, device.type, ranks)
                training_log.held_out(cursor.step, result)
            ranks.from_first(lambda: prune(run, config.train.keep_checkpoints))

        if saved:
            measure(saved)  # a kill may have prevented it, or the text is another
        while cursor.step < steps:
            step = cursor.step
            cursor, batch = next(batches)
            masked, tokens, stopping = ranks.sum(
                sum(len(micro.targets) for micro in batch), sum(micro.tokens for micro in batch), len(stop)
            )
            factor = learning_rate_factor(step, steps, config.optim)
            lr = factor * config.optim.lr
            # Dropout depends on the micro-batch: there is no generator's state to resume, and ranks change nothing.
            seeds = range(config.train.seed + step * micro_batches, config.train.seed + (step + 1) * micro_batches)
            seeds = seeds[ranks.rank :: ranks.world]
            try:
                loss = backward(module, batch, seeds, scale=ranks.world / max(masked, 1), device=device)
            except RuntimeError as error:
                raise _memory_error(error, config, run) or error from error
            grad_norm = clip_gradients(model, config.optim.max_grad_norm)
            loss = ranks.sum(loss)[0] / ranks.world
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise _not_finite(run, step, loss, grad_norm, lr, batch)
            update(optimizers, factor)
            description = training_log.record(
                cursor.step,
                epoch=cursor.epoch,
                loss=loss,
                learning_rate=lr,
                gradient_norm=grad_norm,
                tokens=int(tokens),
                masked=int(masked),
                mask_prob=config.masking.recipe(step / max(steps - 1, 1)).mask_prob,
            )
            bar.update(task, completed=cursor.step, description=description)
            finished = cursor.step == steps
            if stopping or finished or cursor.step % config.train.save_every == 0:
                state = {**asdict(cursor), "log": training_log.open_sums()}
                with training_log.paused():
                    checkpoint = save_checkpoint(run, state, model, optimizers, ranks)
                    if stopping and not finished:
                        raise _stopped(stop, cursor.step, steps, checkpoint)
                    measure(checkpoint)
    ranks.from_first(lambda: finish(run))
    return run / "model"


def backward(
    module: nn.Module, batch: list[MicroBatch], seeds: Sequence[int], *, scale: float, device: torch.device
) -> float:
    """Accumulate the gradient of `scale` times the summed loss of this rank's micro-batches; returns that value.

    `scale` holds the count of masked tokens in the batches of *all* ranks, so how the global batch is cut into
    micro-batches and ranks does not change the gradient. `seeds` are those of dropout, one a micro-batch.
    """
    total = torch.zeros((), device=device)
    for index, (micro, seed) in enumerate(zip(batch, seeds, strict=True)):
        torch.manual_seed(seed)
        micro = micro.to(device)
        with synchronised(module, last=index == len(batch) - 1):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = module(micro.positions, micro.targets, micro.inputs) * scale
            loss.backward()
        total += loss.detach()
    return total.item()


def update(optimizers: Sequence[Optimizer], factor: float) -> None:
    """One step of each optimiser, at `factor` times its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def stop_signals(run: Path, ranks: Ranks) -> Iterator[list[int]]:
    """Collect Ctrl-C, and SIGTERM and SIGUSR1 as schedulers send them, instead of dying of them.

    A second one stops at once if either was Ctrl-C (torchrun passes a second Ctrl-C on as SIGTERM): `StoppedError` says
    what is lost.
    """
    seen: list[int] = []

    def receive(number: int, _: object) -> None:
        if seen and signal.SIGINT in (seen[0], number):
            raise KeyboardInterrupt
        seen.append(number)
        if number == signal.SIGINT and ranks.is_first:  # past sys.stderr, which may be in the middle of a write
            os.write(2, b"\nfinishing the step and saving it; Ctrl-C again stops at once and loses what is not saved\n")

    def again(ignored: "sys.UnraisableHookArgs") -> None:  # Python ignores what is raised while in a `__del__`
        if ignored.exc_type is not KeyboardInterrupt:
            return hook(ignored)
        return threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()

    hook, sys.unraisablehook = sys.unraisablehook, again
    # Outside of the main thread Python takes no handlers.
    names = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, receive) for name in names if (number := getattr(signal, name, None))}
    try:
        yield seen
    except KeyboardInterrupt:
        last = next(reversed(checkpoints(run)), None)
        lost = f"the steps after {last} are lost: the same command goes on there" if last else "all steps are lost"
        raise StoppedError(f"interrupted: {lost}", signal.SIGINT) from None
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def is_finished(run: Path, mask_digest: str) -> bool:
    """Whether the run has its model, and a result on the held-out text of this digest, if there is one.

    Raises `UserError` when there is no checkpoint left to measure that result on.
    """
    measured = (recall(run / HELD_OUT_METRICS) or {}).get("mask_digest", "")
    found, is_measured = (run / "model").exists(), mask_digest in ("", measured)
    if found and not is_measured and not checkpoints(run):
        raise UserError(f"{run} is finished and has no checkpoint to evaluate: use mlmkit eval {run / 'model'}")
    return found and is_measured


def finish(run: Path) -> None:
    """`RUN/model` from the last checkpoint, its held-out result and the loss curve beside it."""
    last = checkpoints(run)[-1]
    if not any("loss" in entry for entry in read_log(run)):
        raise CheckError(f"no step of {run} had a token to predict: raise masking.mask_prob, or the batch")
    if result := held_out_result(last):
        write_record(run / HELD_OUT_METRICS, {"mask_digest": result["mask_digest"], **result["metrics"]})
    draw_loss(run)
    copy_model(last, run / "model")


def _stopped(seen: list[int], step: int, steps: int, checkpoint: Path) -> StoppedError:
    number = next(iter(seen), signal.SIGTERM)  # another rank may have been the one to hear it
    name = signal.Signals(number).name
    return StoppedError(f"{name}: saved step {step} of {steps} in {checkpoint}: the same command goes on", number)


def _memory_error(error: RuntimeError, config: Config, run: Path) -> UserError | None:
    """What to do when there is too little memory; None if that is not what happened."""
    if not is_out_of_memory(error):
        return None
    advice = "lower train.micro_batch_tokens (train.global_batch_tokens may stay) or model.max_length"
    if last := next(reversed(checkpoints(run)), None):
        advice = f"a run keeps its batches: resume it with more memory, or begin one with model.init_from = {last}"
    return UserError(f"out of memory with train.micro_batch_tokens = {config.train.micro_batch_tokens}: {advice}")


def _not_finite(run: Path, step: int, loss: float, grad_norm: float, lr: float, batch: list[MicroBatch]) -> CheckError:
    documents = list(dict.fromkeys(name for micro in batch for name in micro.documents))
    shown = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
    return CheckError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.3g}: lower optim.lr, or look at "
        f"the documents of the batch ({shown}); last good checkpoint: {next(reversed(checkpoints(run)), 'none yet')}"
    )
