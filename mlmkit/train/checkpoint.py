"""Checkpoints: Hugging Face folders with the optimisers' state beside them, whole or absent, never half-written.

`RUN/checkpoints/step-00000500/` holds `config.json`, `model.safetensors` and the tokenizer's files, which any Hugging
Face tool loads, `optimizer/`, written by `torch.distributed.checkpoint` as safetensors, each rank its share, and
`trainer.json`, the cursor and the open sums of the log. `held-out/`, the evaluation of these weights, joins it later.
"""

import errno
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from mlmkit.files import changed_file, hash_tree, new_folder, read_record, remove, write_record
from mlmkit.model import MaskedLM
from mlmkit.train.parallel import whole_weights

# torch.distributed.checkpoint warns on every save and load of a single process, which most runs are.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
CURSOR, OPTIMIZER, HELD_OUT, HELD_OUT_METRICS = "trainer.json", "optimizer", "held-out", "held_out.json"

log = logging.getLogger(__name__)


def save_checkpoint(
    run: Path, state: dict[str, Any], model: MaskedLM, optimizers: Sequence[Optimizer], ranks: Ranks
) -> Path:
    """Write the checkpoint of `state["step"]`; every rank takes part.

    Raises `UserError` when it cannot be written. Earlier checkpoints are untouched.
    """
    final = run / "checkpoints" / f"step-{state['step']:08d}"
    try:
        with ExitStack() as stack:
            folder = Path(ranks.from_first(lambda: str(stack.enter_context(new_folder(final, replaces=CURSOR)))))
            writer = HuggingFaceStorageWriter(str(folder / OPTIMIZER), save_distributed=True)
            tensors = _tensors(get_optimizer_state_dict(model, list(optimizers), options=FLAT))
            save(tensors, storage_writer=writer, no_dist=ranks.world == 1)
            save_model(model, run / "tokenizer", folder, ranks)

            def commit() -> None:
                write_record(folder / CURSOR, {**state, "files": hash_tree(folder)})
                stack.close()

            ranks.from_first(commit)
    except (UserError, SafetensorError, CheckpointException) as error:
        cause = _cause(error)
        last = next(reversed(checkpoints(run)), None)
        go_on = f"the same command goes on from {last}" if last else "the same command begins anew"
        raise UserError(f"{_one_line(final, cause)}: make room or mend the folder, then {go_on}") from error
    return final


def _cause(error: BaseException) -> BaseException:
    """What a rank failed of. Raises `KeyboardInterrupt` if it was that."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    if isinstance(cause, KeyboardInterrupt):
        raise cause from error
    return cause


def _one_line(final: Path, cause: BaseException) -> str:
    text = first_line(cause)
    return text if str(final) in text else f"cannot write {final}: {text}"


def save_model(model: MaskedLM, tokenizer_folder: Path, folder: Path, ranks: Ranks) -> None:
    """The part of a checkpoint that Hugging Face tools read; every rank takes part."""
    weights = whole_weights(model)

    def write() -> None:
        model.network.save_pretrained(folder, state_dict=weights)
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)

    ranks.from_first(write)


def copy_model(checkpoint: Path, folder: Path) -> None:
    """The same part of a checkpoint, alone."""
    with new_folder(folder, replaces="config.json") as building:
        ignored = shutil.ignore_patterns(OPTIMIZER, CURSOR, f"{HELD_OUT}*")
        shutil.copytree(checkpoint, building, ignore=ignored, dirs_exist_ok=True)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints, oldest first. Each is complete, as it appears and goes at once."""
    return sorted((run / "checkpoints").glob(f"step-{'[0-9]' * 8}"))


@contextmanager
def resuming(checkpoint: Path | None) -> Iterator[None]:
    """Raise `UserError` that says what to do when a checkpoint, if there is one, cannot be resumed."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        is_of_system = isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)
        if checkpoint is None or is_of_system or is_out_of_memory(cause) or isinstance(cause, EndedElsewhereError):
            raise
        earlier = [other for other in checkpoints(checkpoint.parent.parent) if other < checkpoint]
        go_on = f"goes on from {earlier[-1]}" if earlier else "begins anew"
        advice = f"delete it if it is damaged, and the same command {go_on}"
        raise UserError(f"{checkpoint} cannot be resumed: {first_line(cause)}: {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that there is too little memory, on a GPU or not."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given. Raises `DamagedError` if a file of the checkpoint has changed."""
    state = read_record(folder / CURSOR, "the place in the text is lost")
    if name := changed_file(folder, state.pop("files")):
        raise DamagedError(f"{name} is not what was saved")
    return state


def load_optimizers(folder: Path, model: MaskedLM, optimizers: Sequence[Optimizer], ranks: Ranks) -> None:
    """Restore the optimisers' state, whatever the number of ranks that wrote it."""
    state = get_optimizer_state_dict(model, list(optimizers), options=FLAT)
    tensors = _tensors(state)
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / OPTIMIZER)), no_dist=ranks.world == 1)
    set_optimizer_state_dict(model, list(optimizers), {**state, **tensors}, options=FLAT)


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and, of each held-out text, the one with the least cross-entropy."""
    found, losses = checkpoints(run), {}
    for checkpoint in found:
        for path in checkpoint.glob(f"{HELD_OUT}*/result.json"):
            if result := recall(path):
                loss = result["metrics"]["masked_cross_entropy"]["value"], checkpoint
                losses[result["mask_digest"]] = min(loss, losses.get(result["mask_digest"], loss))
    best = {checkpoint for _, checkpoint in losses.values()}
    for old in found[:-keep]:
        if old not in best:
            remove(old)


def held_out_result(checkpoint: Path) -> dict[str, Any] | None:
    """`result.json` of the checkpoint's held-out evaluation, if there is one."""
    return recall(checkpoint / HELD_OUT / "result.json")


def recall(path: Path) -> dict[str, Any] | None:
    """A record that can be made again: None, with a warning, if it is damaged; None if it is missing."""
    try:
        return read_record(path, "it does not count") if path.exists() else None
    except DamagedError as error:
        log.warning("%s", error)
        return None


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """What changes in the optimisers' state; rates and decay are the configuration's."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
