"""The training loop, top to bottom.

`start.py` creates or checks the run's folder, `_train_phase` takes the steps of one phase from the last checkpoint, and
`finish` copies the last checkpoint to `RUN/model`. A phase begins as a resumed run does: the model is built again from
the checkpoint that ends the phase before. Running the same command again repeats all this from the last saved step.
"""

import gc
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mlmkit.backends.torch import pick_device
from mlmkit.distributed import Ranks, said_once
from mlmkit.distributed import ranks as find_ranks
from mlmkit.errors import CheckError, StoppedError, UserError
from mlmkit.files import write_record
from mlmkit.locations import Source
from mlmkit.progress import progress_bars
from mlmkit.stored import StoredCorpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import (
    HELD_OUT_METRICS,
    State,
    copy_model,
    held_out_result,
    is_out_of_memory,
    last_checkpoint,
    load_optimizers,
    origin_folder,
    prune,
    read_remeasurable,
    read_state,
    resuming,
    save_checkpoint,
)
from mlmkit.train.config import Config
from mlmkit.train.cost import flops_per_token, peak_flops
from mlmkit.train.data import MicroBatch
from mlmkit.train.held_out import evaluate_checkpoint, evaluate_initial, held_out_digests
from mlmkit.train.log import NO_STEPS, TrainingLog, check_loggers, draw_loss, held_out_metrics, read_log
from mlmkit.train.model_setup import build_model
from mlmkit.train.optimisers import build_optimizers
from mlmkit.train.order import Position
from mlmkit.train.precision import resolve_precision
from mlmkit.train.rows import phase_schedule
from mlmkit.train.schedule import Schedule
from mlmkit.train.start import begin_or_check, begun_precision, corpora_of, prepare, run_lock
from mlmkit.train.step import backward, clip_gradients, compile_layers, parallelise, update

log = logging.getLogger(__name__)

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


@dataclass(frozen=True)
class Run:
    """What stays the same through the phases of a run."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    texts: dict[Source, StoredCorpus]
    schedules: list[Schedule]
    digests: dict[str, str]
    first_step: int | None  # where it began with trained weights; None if with random ones
    device: torch.device
    ranks: Ranks
    stop: list[int]


def train(config: Config, run: Path, start_from: Path | None = None) -> Path:
    """Train as configured, or resume an interrupted run in the same folder; under torchrun, call it on every rank.

    With `start_from`, a checkpoint of another run, the first phase continues with its weights, optimiser state and
    place in the data (`load_config` with `base` gives its configuration).

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
            precision = ranks.from_first(
                lambda: resolve_precision(config.train.precision, device.type, begun_precision(config, run))
            )
            config = replace(config, train=replace(config.train, precision=precision))
            tokenizer, texts = begin_or_check(config, run, ranks, start_from)
            schedules = [phase_schedule(p, corpora_of(p, texts), tokenizer) for p in config.phases.values()]
            digests = ranks.from_first(lambda: held_out_digests(config, tokenizer))
            # Only the first rank looks at the folder: a network file system may show the others an older state.
            if ranks.from_first(lambda: is_finished(run, schedules, digests)):
                log.info("%s is finished: nothing to train", run)
                return run / "model"
            first_step = 0 if config.model.init_from else None
            if start_from:
                first_step = read_state(origin_folder(run, start_from), verify=False).position.cursor.step
            with stop_signals(run, ranks) as stop:
                whole = Run(run, config, tokenizer, texts, schedules, digests, first_step, device, ranks, stop)
                _train(whole, start_from)
                return run / "model"
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


def _train(run: Run, start_from: Path | None) -> None:
    phases = list(run.config.phases.items())
    saved = run.ranks.from_first(lambda: last_checkpoint(run.folder))
    state = State(phases[0][1])
    if start := saved or start_from:
        with resuming(saved):
            state = run.ranks.from_first(partial(read_state, start))
        if not saved:
            state = replace(state, position=state.position.next_phase(0), sums=NO_STEPS)
        log.info("%s %s after step %d", "resuming" if saved else "branching from", start, state.position.cursor.step)
    position: Position | None = state.position
    while position:
        state = _train_phase(run, *phases[position.cursor.phase], replace(state, position=position), start)
        start = run.ranks.from_first(lambda: last_checkpoint(run.folder))
        position = next_position(state.position, run.schedules)
        gc.collect()  # reference cycles of DDP and torch.compile keep the model of this phase in memory
    words = round(state.position.cursor.words)
    if missed := [mark for mark in run.config.train.keep_at_words if mark > words]:
        log.warning("the run saw %d words, so it has no checkpoint at train.keep_at_words %s", words, missed)
    run.ranks.from_first(lambda: finish(run.folder, run.digests))


def next_position(position: Position, schedules: Sequence[Schedule]) -> Position | None:
    """The position itself, or, if its phase is over, the beginning of the next; None after the last."""
    while schedules[phase := position.cursor.phase].is_over(position.cursor):
        if phase + 1 == len(schedules):
            return None
        position = position.next_phase(phase + 1)
    return position


def _train_phase(run: Run, name: str, config: Config, state: State, start: Path | None) -> State:
    """Train from `state`, with the weights of the checkpoint `start`, to the end of the phase; returns the state."""
    ranks, device = run.ranks, run.device
    own = start if start and start.is_relative_to(run.folder) else None  # not the one that a branch begins with
    with resuming(own):
        model = build_model(config, run.tokenizer, resume_from=start)
    corpora = corpora_of(config, run.texts)
    data = prepare(model, config, run.tokenizer, corpora, position=state.position, is_fresh=start is None)
    schedule, cursor = data.rows.schedule, data.rows.cursor
    peak, flops = 0.0, 0.0
    if device.type == "cuda" and config.train.precision == "bf16":  # `peak_flops` knows no other rate
        peak = ranks.world * peak_flops(torch.cuda.get_device_name(device))
    if peak:
        _, block, members = next(data.rows.packs(cursor))
        flops = flops_per_token(model, block.length[members] + data.rows.added, config.masking.mask_prob)

    model.to(device).train()
    if config.train.compile:
        compile_layers(model)
    module = parallelise(model, ranks, config.train.parallel)
    optimizers = build_optimizers(model, config.optim)
    with resuming(own):
        if start:
            load_optimizers(start, model, optimizers, ranks)
    batches = data.batches(cursor, rank=ranks.rank, world=ranks.world, workers=config.data.workers)
    log.info(
        "%s%s, %.1f M parameters, vocabulary %d; %d documents, %d tokens; %s, %s",
        f"{name}: " if name else "",
        config.model.init_from or config.model.architecture,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        run.tokenizer.vocabulary_size,
        sum(len(corpus) for corpus in corpora),
        sum(corpus.tokens for corpus in corpora),
        f"{ranks.world} x {device.type}" if ranks.world > 1 else device.type,
        config.train.precision,
    )
    last_step = None if schedule.in_tokens else cursor.step - cursor.phase_steps + schedule.total
    most = config.train.global_batch_tokens // config.train.micro_batch_tokens
    with (
        TrainingLog(
            run.folder,
            config,
            cursor.step,
            state.sums,
            phase=name,
            last_step=last_step,
            flops_per_token=flops,
            peak_flops=peak,
            is_first=ranks.is_first,
        ) as training_log,
        progress_bars(shown=ranks.is_first) as bars,
    ):
        bar = bars.add("", schedule.total)
        bar.show(done := schedule.done(cursor), [training_log.where(cursor.step, done / schedule.total), ""])

        def evaluate_and_prune(checkpoint: Path) -> None:
            results = evaluate_checkpoint(checkpoint, run.config, run.digests, device.type, ranks)
            training_log.held_out(cursor.step, results)
            ranks.from_first(lambda: prune(run.folder, config.train.keep_checkpoints))

        if run.first_step is not None:
            with training_log.paused():
                results = evaluate_initial(run.folder, model, run.config, run.digests, device.type, ranks)
                training_log.held_out(run.first_step, results)
        if own:
            evaluate_and_prune(own)  # a kill may have prevented it, or the held-out text may have changed
        while not schedule.is_over(cursor):
            before, (cursor, batch) = cursor, next(batches)
            micro_batches = schedule.micro_batches(before)
            masked, tokens, stopping = ranks.sum(
                sum(len(micro.targets) for micro in batch), sum(micro.tokens for micro in batch), len(run.stop)
            )
            factor = schedule.learning_rate_factor(before, cursor)
            lr = factor * config.optim.lr
            # One dropout seed per micro-batch, so there is no generator state to save and ranks change nothing.
            seed = config.train.seed + before.step * most
            seeds = range(seed, seed + micro_batches)[ranks.rank :: ranks.world]
            scale, precision = ranks.world / max(masked, 1), config.train.precision
            try:
                loss = backward(module, batch, seeds, scale=scale, device=device, precision=precision)
            except RuntimeError as error:
                raise _memory_error(error, config, run.folder) or error from error
            grad_norm = clip_gradients(model, config.optim.max_grad_norm)
            loss = ranks.sum(loss)[0] / ranks.world
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise _not_finite(run.folder, before.step, loss, grad_norm, lr, batch)
            update(optimizers, factor)
            mask_prob = schedule.recipe(before, cursor).mask_prob
            share = min(schedule.done(cursor) / schedule.total, 1.0)
            shown = training_log.record(
                cursor.step,
                epoch=cursor.epoch,
                loss=loss,
                learning_rate=lr,
                gradient_norm=grad_norm,
                tokens=int(tokens),
                masked=int(masked),
                capacity=micro_batches * config.train.micro_batch_tokens,
                mask_prob=mask_prob,
                tokens_seen=cursor.tokens,
                words_seen=cursor.words,
                share=share,
                steps_left=round(cursor.phase_steps * (1 / share - 1)),
            )
            bar.show(schedule.done(cursor), shown)
            is_last = schedule.is_over(cursor)
            is_kept = any(round(before.words) < mark <= round(cursor.words) for mark in config.train.keep_at_words)
            if stopping or is_last or is_kept or cursor.step % config.train.save_every == 0:
                sums = training_log.open_sums()
                with training_log.paused():
                    state = State(config, data.rows.position(cursor), name, is_last, mask_prob, sums, is_kept)
                    checkpoint = save_checkpoint(run.folder, state, model, optimizers, ranks)
                    if stopping and not (is_last and cursor.phase + 1 == len(run.schedules)):
                        raise _stopped(run.stop, cursor.step, checkpoint)
                    evaluate_and_prune(checkpoint)
    return state


def is_finished(run: Path, schedules: Sequence[Schedule], digests: dict[str, str]) -> bool:
    """Whether the run is over, and has its model and the results on the held-out texts with these mask digests.

    Raises `UserError` when no checkpoint is left to measure a missing result on.
    """
    measured = read_remeasurable(run / HELD_OUT_METRICS) if digests else None
    has_model, last = (run / "model").exists(), last_checkpoint(run)
    is_measured = all((measured or {}).get(name, {}).get("mask_digest") == digests[name] for name in digests)
    with resuming(last):
        is_over = not (last and next_position(read_state(last, verify=False).position, schedules))
    if has_model and not is_measured and not last:
        raise UserError(f"{run} is finished and has no checkpoint to evaluate: use mlmkit eval {run / 'model'}")
    return has_model and is_measured and is_over


def finish(run: Path, digests: dict[str, str]) -> None:
    """Copy the last checkpoint to `RUN/model`, and write its held-out results and the loss curve.

    Raises `CheckError` if no step had a token to predict.
    """
    last = last_checkpoint(run)
    if not last or not any("loss" in entry for entry in read_log(run)):
        raise CheckError(f"no step of {run} had a token to predict: raise masking.mask_prob or the batch size")
    results = {name: held_out_result(last, name, digest) for name, digest in digests.items()}
    if results:
        metrics = {name: held_out_metrics(result) for name, result in results.items() if result}
        write_record(run / HELD_OUT_METRICS, metrics)
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


def _stopped(seen: list[int], step: int, checkpoint: Path) -> StoppedError:
    number = next(iter(seen), signal.SIGTERM)  # another rank may have received it
    name = signal.Signals(number).name
    return StoppedError(f"{name}: saved step {step} in {checkpoint}: the same command resumes", number)


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
