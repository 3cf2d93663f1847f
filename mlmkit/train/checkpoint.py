"""Checkpoints: Hugging Face folders with the optimisers' state beside them, whole or absent, never half-written.

`RUN/checkpoints/step-00000500/` holds `config.json`, `model.safetensors` and the tokenizer's files, which any Hugging
Face tool loads, `optimizer/`, written by `torch.distributed.checkpoint` as safetensors, each rank its share, and
`trainer.json`, the cursor and the open sums of the log. `held-out/`, the evaluation of these weights, joins it later.
"""

import json
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
from mlmkit.errors import UserError
from mlmkit.files import new_folder
from mlmkit.model import MaskedLM
from mlmkit.train.parallel import whole_weights

# torch.distributed.checkpoint warns on every save and load of a single process, which most runs are.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
CURSOR, OPTIMIZER, HELD_OUT = "trainer.json", "optimizer", "held-out"


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
                (folder / CURSOR).write_text(json.dumps(state))
                stack.close()

            ranks.from_first(commit)
    except (UserError, SafetensorError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from error
        last = next(reversed(checkpoints(run)), None)
        go_on = f"the same command goes on from {last}" if last else "there is no earlier checkpoint"
        raise UserError(f"{_one_line(final, cause)}: make room or mend the folder, then {go_on}") from error
    return final


def _one_line(final: Path, cause: BaseException) -> str:
    text = str(cause).splitlines()[0]
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
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob(f"step-*/{CURSOR}"))


def load_checkpoint(folder: Path, model: MaskedLM, optimizers: Sequence[Optimizer], ranks: Ranks) -> dict[str, Any]:
    """Restore the optimisers' state, whatever the number of ranks that wrote it; returns what `trainer.json` holds."""
    state = get_optimizer_state_dict(model, list(optimizers), options=FLAT)
    tensors = _tensors(state)
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / OPTIMIZER)), no_dist=ranks.world == 1)
    set_optimizer_state_dict(model, list(optimizers), {**state, **tensors}, options=FLAT)
    return json.loads((folder / CURSOR).read_text())


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and, of each held-out text, the one with the least cross-entropy."""
    found, losses = checkpoints(run), {}
    for checkpoint in found:
        for path in checkpoint.glob(f"{HELD_OUT}*/result.json"):
            result = json.loads(path.read_text())
            loss = result["metrics"]["masked_cross_entropy"]["value"], checkpoint
            losses[result["mask_digest"]] = min(loss, losses.get(result["mask_digest"], loss))
    best = {checkpoint for _, checkpoint in losses.values()}
    for old in found[:-keep]:
        if old not in best:
            shutil.rmtree(old, ignore_errors=True)


def held_out_result(checkpoint: Path) -> dict[str, Any] | None:
    """`result.json` of the checkpoint's held-out evaluation, if there is one."""
    path = checkpoint / HELD_OUT / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """What changes in the optimisers' state; rates and decay are the configuration's."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
