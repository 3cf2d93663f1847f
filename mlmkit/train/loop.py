"""The training loop, top to bottom.

A run has three phases: `start.py` creates or checks its folder, `_train` takes the steps, and `finish` copies the last
checkpoint to `RUN/model`. Running the same command again repeats them and resumes at the last saved step.
"""

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

from mlmkit.backends.torch import pick_device
from mlmkit.console import progress
from mlmkit.corpus import Corpus
from mlmkit.distributed import Ranks, said_once
from mlmkit.distributed import ranks as find_ranks
from mlmkit.errors import CheckError, StoppedError, UserError
from mlmkit.files import write_record
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import (
    HELD_OUT_METRICS,
    copy_model,
    held_out_result,
    is_out_of_memory,
    last_checkpoint,
    load_optimizers,
    prune,
    read_remeasurable,
    read_state,
    resuming,
    save_checkpoint,
)
from mlmkit.train.config import Config
from mlmkit.train.cost import flops_per_token, peak_flops
from mlmkit.train.data import MicroBatch
from mlmkit.train.held_out import evaluate_checkpoint, held_out_digest
from mlmkit.train.log import NO_STEPS, TrainingLog, check_loggers, draw_loss, read_log
from mlmkit.train.model_setup import build_model
from mlmkit.train.optimisers import build_optimizers, learning_rate_factor
from mlmkit.train.order import Cursor
from mlmkit.train.start import begin_or_check, prepare, run_lock
from mlmkit.train.step import backward, clip_gradients, compile_layers, parallelise, update

log = logging.getLogger(__name__)

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


def train(config: Config, run: Path) -> Path:
    """Train as configured, or resume an interrupted run in the same folder; under torchrun, call it on every rank.

    Returns the folder of the finished model, `RUN/model`. `RUN/log.jsonl` gets a line every `train.log_every` steps.
    Raises `UserError` for input that cannot be trained on, too little memory, or a full disk; `CheckError` when loss or
    gradient is no longer finite; `StoppedError` after Ctrl-C, SIGTERM or SIGUSR1.
    """
    ranks = find_ranks()
    if not ranks.is_first:
        logging.getLogger("mlmkit").setLevel(logging.ERROR)  # the first rank logs for all
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
            # Only the first rank looks at the folder: a network file system may show the others an older state.
            if ranks.from_first(lambda: is_finished(run, mask_digest)):
                log.info("%s is finished: nothing to train", run)
                return run / "model"
            with stop_signals(run, ranks) as stop:
                return _train(config, run, tokenizer, corpora, mask_digest, device, ranks, stop)
    except BaseException as error:
        # The frames of the traceback keep DDP's reducer alive. It must be gone before its process group, or the process
        # may hang at exit in the destructor of whichever goes last (gloo, torch 2.13).
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
    saved = ranks.from_first(lambda: last_checkpoint(run))
    with resuming(saved):
        state = ranks.from_first(lambda: read_state(saved)) if saved else {"log": NO_STEPS}
        model = build_model(config, tokenizer, resume_from=saved)
    data = prepare(model, config, tokenizer, corpora, resumed=saved is not None)
    peak = ranks.world * peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0
    flops = 0.0
    if peak:
        _, [first] = next(data.batches(Cursor(), micro_batches=1, steps=1))
        flops = flops_per_token(model, first.lengths, config.masking.mask_prob)

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

        def evaluate_and_prune(checkpoint: Path) -> None:
            if mask_digest:
                result = evaluate_checkpoint(checkpoint, config, mask_digest, device.type, ranks)
                training_log.held_out(cursor.step, result)
            ranks.from_first(lambda: prune(run, config.train.keep_checkpoints))

        if saved:
            evaluate_and_prune(saved)  # a kill may have prevented it, or the held-out text may have changed
        while cursor.step < steps:
            step = cursor.step
            cursor, batch = next(batches)
            masked, tokens, stopping = ranks.sum(
                sum(len(micro.targets) for micro in batch), sum(micro.tokens for micro in batch), len(stop)
            )
            factor = learning_rate_factor(step, steps, config.optim)
            lr = factor * config.optim.lr
            # One dropout seed per micro-batch, so there is no generator state to save and ranks change nothing.
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
            is_last = cursor.step == steps
            if stopping or is_last or cursor.step % config.train.save_every == 0:
                state = {**asdict(cursor), "log": training_log.open_sums()}
                with training_log.paused():
                    checkpoint = save_checkpoint(run, state, model, optimizers, ranks)
                    if stopping and not is_last:
                        raise _stopped(stop, cursor.step, steps, checkpoint)
                    evaluate_and_prune(checkpoint)
    ranks.from_first(lambda: finish(run))
    return run / "model"


def is_finished(run: Path, mask_digest: str) -> bool:
    """Whether the run has its model and, if `mask_digest` names a held-out text, its result on that text.

    Raises `UserError` when no checkpoint is left to measure that result on.
    """
    measured = (read_remeasurable(run / HELD_OUT_METRICS) or {}).get("mask_digest", "")
    has_model, is_measured = (run / "model").exists(), mask_digest in ("", measured)
    if has_model and not is_measured and not last_checkpoint(run):
        raise UserError(f"{run} is finished and has no checkpoint to evaluate: use mlmkit eval {run / 'model'}")
    return has_model and is_measured


def finish(run: Path) -> None:
    """Copy the last checkpoint to `RUN/model`, and write its held-out result and the loss curve.

    Raises `CheckError` if no step had a token to predict.
    """
    last = last_checkpoint(run)
    if not last or not any("loss" in entry for entry in read_log(run)):
        raise CheckError(f"no step of {run} had a token to predict: raise masking.mask_prob or the batch size")
    if result := held_out_result(last):
        write_record(run / HELD_OUT_METRICS, {"mask_digest": result["mask_digest"], **result["metrics"]})
    draw_loss(run)
    copy_model(last, run / "model")


# ---------------------------------------------------------------- ways to end early


@contextmanager
def stop_signals(run: Path, ranks: Ranks) -> Iterator[list[int]]:
    """Yield a list that collects Ctrl-C, and SIGTERM and SIGUSR1 as schedulers send them, so that the loop can save.

    A second signal stops at once if either was Ctrl-C (torchrun passes a second Ctrl-C on as SIGTERM), with a
    `StoppedError` that says what is lost.
    """
    seen: list[int] = []

    def receive(number: int, _: object) -> None:
        if seen and signal.SIGINT in (seen[0], number):
            raise KeyboardInterrupt
        seen.append(number)
        if number == signal.SIGINT and ranks.is_first:  # not through sys.stderr, which may be in the middle of a write
            os.write(2, b"\nfinishing the step and saving it; Ctrl-C again stops at once and loses what is not saved\n")

    def again(ignored: "sys.UnraisableHookArgs") -> None:  # Python ignores exceptions in a `__del__`
        if ignored.exc_type is not KeyboardInterrupt:
            return hook(ignored)
        return threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()

    hook, sys.unraisablehook = sys.unraisablehook, again
    # Python allows handlers in the main thread only.
    names = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, receive) for name in names if (number := getattr(signal, name, None))}
    try:
        yield seen
    except KeyboardInterrupt:
        last = last_checkpoint(run)
        lost = f"the steps after {last} are lost: the same command resumes there" if last else "all steps are lost"
        raise StoppedError(f"interrupted: {lost}", signal.SIGINT) from None
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(seen: list[int], step: int, steps: int, checkpoint: Path) -> StoppedError:
    number = next(iter(seen), signal.SIGTERM)  # another rank may have received it
    name = signal.Signals(number).name
    return StoppedError(f"{name}: saved step {step} of {steps} in {checkpoint}: the same command resumes", number)


def _memory_error(error: RuntimeError, config: Config, run: Path) -> UserError | None:
    """What to do when memory has run out; None for any other error."""
    if not is_out_of_memory(error):
        return None
    advice = "lower train.micro_batch_tokens (train.global_batch_tokens may stay) or model.max_length"
    if last := last_checkpoint(run):
        advice = f"a run keeps its batches: resume it with more memory, or begin one with model.init_from = {last}"
    return UserError(f"out of memory with train.micro_batch_tokens = {config.train.micro_batch_tokens}: {advice}")


def _not_finite(run: Path, step: int, loss: float, grad_norm: float, lr: float, batch: list[MicroBatch]) -> CheckError:
    documents = list(dict.fromkeys(name for micro in batch for name in micro.documents))
    shown = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
    return CheckError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.3g}: lower optim.lr, or look at "
        f"the documents of the batch ({shown}); last good checkpoint: {last_checkpoint(run) or 'none yet'}"
    )
