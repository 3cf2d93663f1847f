"""Checkpoints, written atomically: Hugging Face folders with the optimiser state and the cursor beside the weights.

`RUN/checkpoints/step-00000500/` holds `config.json`, `model.safetensors` and the tokenizer's files, which any Hugging
Face tool loads; `optimizer/`, safetensors written by `torch.distributed.checkpoint`, one part per rank; and
`trainer.json`, the `State`. `held-out/`, or `held-out-NAME/` for each of several texts, the evaluation of these
weights, is added later.
`RUN/initial/` holds the weights before the first step in the same way, without optimiser and cursor.
"""

import errno
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from filecmp import cmpfiles
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from mlmkit.distributed import Ranks
from mlmkit.errors import DamagedError, EndedElsewhereError, UserError, first_line
from mlmkit.files import changed_file, content, hash_tree, new_folder, read_record, remove, write_record
from mlmkit.model import MaskedLM
from mlmkit.pretrained import save_config
from mlmkit.train.config import HELD_OUT, Config, as_tables, from_tables
from mlmkit.train.log import NO_STEPS
from mlmkit.train.order import NOWHERE, Position
from mlmkit.train.precision import unrecorded_precision
from mlmkit.train.step import full_weights

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
CURSOR, OPTIMIZER, INITIAL, HELD_OUT_METRICS = "trainer.json", "optimizer", "initial", "held_out.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """What a checkpoint keeps beside weights and optimiser state.

    `config` is that of the phase, by the name `phase`; `is_phase_end` says that the phase ended here. `mask_prob` is
    the mask rate of the last step, and `sums` are the open sums of the log. `is_kept` says that `train.keep_at_words`
    asks for this checkpoint.
    """

    config: Config
    position: Position = NOWHERE
    phase: str = ""
    is_phase_end: bool = False
    mask_prob: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: NO_STEPS)
    is_kept: bool = False


def saved_checkpoints(run: Path) -> list[Path]:
    """The checkpoints, oldest first. Each is complete, because it is created and removed atomically."""
    return sorted((run / "checkpoints").glob(f"step-{'[0-9]' * 8}"))


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    return next(reversed(saved_checkpoints(run)), None)


# ---------------------------------------------------------------- saving


def save_checkpoint(run: Path, state: State, model: MaskedLM, optimizers: Sequence[Optimizer], ranks: Ranks) -> Path:
    """Write the checkpoint of the step at `state.position`; every rank takes part.

    Raises `UserError` when it cannot be written. Earlier checkpoints are untouched.
    """
    final = run / "checkpoints" / f"step-{state.position.cursor.step:08d}"
    with _new_folder(final, run, ranks) as folder:
        writer = HuggingFaceStorageWriter(str(folder / OPTIMIZER), save_distributed=True)
        tensors = _tensors(get_optimizer_state_dict(model, list(optimizers), options=FLAT))
        with _single_process_is_fine():
            save(tensors, storage_writer=writer, no_dist=ranks.world == 1)
        _save_model(model, run / "tokenizer", folder, ranks)
        values = asdict(state) | {"config": as_tables(state.config)}
        ranks.from_first(lambda: write_record(folder / CURSOR, {**values, "files": hash_tree(folder)}))
    return final


def save_initial(run: Path, model: MaskedLM, ranks: Ranks) -> None:
    """Write the model before its first step to `RUN/initial`; every rank takes part. Raises as `save_checkpoint`."""
    with _new_folder(run / INITIAL, run, ranks) as folder:
        _save_model(model, run / "tokenizer", folder, ranks)


@contextmanager
def _new_folder(final: Path, run: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a temporary folder on all ranks, which becomes `final` at the end. Raises as `save_checkpoint`."""
    try:
        with ExitStack() as stack:
            yield Path(ranks.from_first(lambda: str(stack.enter_context(new_folder(final, replaces=CURSOR)))))
            ranks.from_first(stack.close)
    except (UserError, SafetensorError, CheckpointException) as error:
        text = first_line(_cause(error))
        message = text if str(final) in text else f"cannot write {final}: {text}"
        last = last_checkpoint(run)
        resume = f"the same command resumes from {last}" if last else "the same command begins anew"
        raise UserError(f"{message}: free some space or repair the folder, then {resume}") from error


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint warns on every single-process save and load."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The optimiser state that changes; learning rates and weight decay come from the configuration."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _cause(error: BaseException) -> BaseException:
    """The error of the first failed rank. Raises it if it is a `KeyboardInterrupt`."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    if isinstance(cause, KeyboardInterrupt):
        raise cause from error
    return cause


def _save_model(model: MaskedLM, tokenizer_folder: Path, folder: Path, ranks: Ranks) -> None:
    """Write the part of a checkpoint that Hugging Face tools read; every rank takes part."""
    weights = full_weights(model)

    def write() -> None:
        model.network.save_pretrained(folder, state_dict=weights)
        save_config(model.network.config, folder)
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)

    ranks.from_first(write)


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Copy the part of a checkpoint that Hugging Face tools read. A folder that has all of it already stays as it is.

    Otherwise other files in the folder, such as a card or graphs, describe the old weights: they are removed, and a
    warning says so.
    """
    ignored = shutil.ignore_patterns(OPTIMIZER, CURSOR, f"{HELD_OUT}*")
    names = {path.name for path in checkpoint.iterdir()}
    names -= ignored(str(checkpoint), [*names])
    before = {path.name for path in content(folder)} if folder.is_dir() else set[str]()
    if names <= before and not any(cmpfiles(checkpoint, folder, names, shallow=False)[1:]):
        return
    with new_folder(folder, replaces="config.json") as building:
        shutil.copytree(checkpoint, building, ignore=ignored, dirs_exist_ok=True)
    if others := sorted(before - names):
        log.warning(
            "%s has other weights than before, so mlmkit removed %s: mlmkit card %s writes a card again, mlmkit export "
            "%s --output %s --layout transformers a graph",
            *(folder, ", ".join(others), folder, folder, folder),
        )


# ---------------------------------------------------------------- resuming


@contextmanager
def resuming(checkpoint: Path | None) -> Iterator[None]:
    """Turn an error while a checkpoint is loaded into a `UserError` that says what to do."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        is_of_system = isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)
        if checkpoint is None or is_of_system or is_out_of_memory(cause) or isinstance(cause, EndedElsewhereError):
            raise
        earlier = [other for other in saved_checkpoints(checkpoint.parent.parent) if other < checkpoint]
        resume = f"resumes from {earlier[-1]}" if earlier else "begins anew"
        advice = f"delete it if it is damaged, and the same command {resume}"
        raise UserError(f"{checkpoint} cannot be resumed: {first_line(cause)}: {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out, on a GPU or the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def read_state(folder: Path, *, verify: bool = True) -> State:
    """The state that `save_checkpoint` was given.

    Raises `DamagedError` if a file of the checkpoint has changed; without `verify` only the state itself is read.
    """
    values = read_record(folder / CURSOR, "its cursor is lost")
    if verify and (name := changed_file(folder, values["files"])):
        raise DamagedError(f"{name} is not what was saved")
    if "position" not in values:
        raise UserError(f"{folder} was written by an earlier version of mlmkit: set model.init_from to it instead")
    stated = {name: values[name] for name in ("phase", "is_phase_end", "mask_prob", "sums")}
    position, config = Position.from_json(values["position"]), from_tables(values["config"])
    return State(config, position, **stated, is_kept=values.get("is_kept", False))  # earlier versions lack it


def origin_folder(run: Path, start_from: Path) -> Path:
    """The folder with the state that a branch began with: the checkpoint, or the branch's own copy if that is gone."""
    return start_from if (start_from / CURSOR).exists() else run


def branch_config(run: Path, start_from: Path) -> Config:
    """The configuration with which a branch begins: that of the checkpoint's phase, at the mask rate it had reached.

    Raises `UserError` if it is not a checkpoint of a run.
    """
    folder = origin_folder(run, start_from)
    if not (folder / CURSOR).exists():
        raise UserError(f"--from {start_from} is not a checkpoint of a run: name RUN/checkpoints/step-N")
    state = read_state(folder, verify=False)
    masking = replace(state.config.masking, mask_prob=state.mask_prob, final_mask_prob=None)
    train = state.config.train
    if train.precision == "auto":  # of an earlier version: checkpoints record the resolved one
        train = replace(train, precision=unrecorded_precision(train.device))
    return replace(state.config, masking=masking, train=train)


def load_optimizers(folder: Path, model: MaskedLM, optimizers: Sequence[Optimizer], ranks: Ranks) -> None:
    """Restore the optimiser state, whatever the number of ranks that wrote it.

    A weight that has another shape than in the checkpoint, such as a longer table of positions, starts afresh.
    """
    state = get_optimizer_state_dict(model, list(optimizers), options=FLAT)
    tensors, reader = _tensors(state), HuggingFaceStorageReader(str(folder / OPTIMIZER))
    with _single_process_is_fine():
        fresh = _reshaped(tensors, reader.read_metadata().state_dict_metadata)
        saved = {name: value for name, value in tensors.items() if name not in fresh}
        load(saved, storage_reader=reader, no_dist=ranks.world == 1)
    restored: dict[str, Any] = {**state, **saved, **fresh}
    set_optimizer_state_dict(model, list(optimizers), restored, options=FLAT)


def _reshaped(tensors: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Tensor]:
    """Zeros for the whole state, the step count too, of each weight whose saved state has another shape."""
    sizes = {name: saved[name].size for name in tensors if name in saved}
    owners = {name.rpartition(".")[0] for name, size in sizes.items() if size != tensors[name].shape}
    if owners:
        log.info("the optimiser starts afresh for %s, which has another shape than before", ", ".join(sorted(owners)))
    return {name: torch.zeros_like(value) for name, value in tensors.items() if name.rpartition(".")[0] in owners}


# ---------------------------------------------------------------- which to keep


def prune(run: Path, keep: int) -> None:
    """Delete checkpoints, but keep the newest `keep`, the best on each held-out text, and those that `State` spares."""
    saved, best = saved_checkpoints(run), {}
    for checkpoint in saved:
        for path in checkpoint.glob(f"{HELD_OUT}*/result.json"):
            if result := read_remeasurable(path):
                loss = result["metrics"]["masked_cross_entropy"]["value"], checkpoint
                best[result["mask_digest"]] = min(loss, best.get(result["mask_digest"], loss))
    kept = {checkpoint for _, checkpoint in best.values()}
    for old in saved[:-keep]:
        state = read_remeasurable(old / CURSOR) or {}
        if not (old in kept or state.get("is_phase_end") or state.get("is_kept")):
            remove(old)


def held_out_folder(checkpoint: Path, name: str) -> Path:
    """Where the evaluation on the held-out text of this name is: `held-out-NAME`, or `held-out` for a single text."""
    return checkpoint / (HELD_OUT if name == HELD_OUT else f"{HELD_OUT}-{name}")


def held_out_result(checkpoint: Path, name: str, digest: str) -> dict[str, Any] | None:
    """`result.json` of an evaluation on a held-out text, if there is one with this mask digest."""
    result = read_remeasurable(held_out_folder(checkpoint, name) / "result.json")
    return result if result and result["mask_digest"] == digest else None


def read_remeasurable(path: Path) -> dict[str, Any] | None:
    """A record that can be measured again: None if it is missing, or, with a warning, if it is damaged."""
    try:
        return read_record(path, "it is ignored") if path.exists() else None
    except DamagedError as error:
        log.warning("%s", error)
        return None
