"""The model that a run starts or resumes with: built, or loaded and fitted to the run's vocabulary and row length."""

import copy
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from mlmkit.backends.torch import pick_device
from mlmkit.distributed import available_memory
from mlmkit.errors import UserError
from mlmkit.model import MaskedLM
from mlmkit.pretrained import load_pretrained
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config, ModelConfig
from mlmkit.train.presets import build_config, position_offset, set_special_ids
from mlmkit.train.vocabulary import extends, row_sources

POSITIONS = "max_position_embeddings"

log = logging.getLogger(__name__)


def build_model(
    config: Config, tokenizer: Tokenizer, resume_from: Path | None = None, *, quiet: bool = False
) -> MaskedLM:
    """The model from the checkpoint to resume, from `model.init_from`, or with random weights from `train.seed`.

    The same arguments give the same weights. With `quiet`, the log does not say how a loaded model was changed. Raises
    `UserError` for settings of `[model]` that do not fit the model, and for a new model that does not fit into memory.
    """
    torch.manual_seed(config.train.seed)
    if checkpoint := resume_from or config.model.init_from:
        is_new = resume_from is None
        model, old = load_pretrained(str(checkpoint), new_head=is_new and config.model.new_head)
        return fit_model(model, old, tokenizer, config.model, str(checkpoint), begins=is_new, quiet=quiet)
    if config.model.interpolate_positions:
        raise UserError("model.interpolate_positions has no effect on a new model: leave it out")
    name = config.model.architecture
    hf_config = build_config(name, tokenizer, config.model.max_length)
    _set_rope_theta(hf_config, config.model.rope_theta, name)
    # Weights are float32. On a CPU, gradients and AdamW's two moments come on top.
    with torch.device("meta"):
        count, free = AutoModelForMaskedLM.from_config(hf_config).num_parameters(), available_memory() / 1e9
    if (needed := count / 1e9 * (16 if pick_device(config.train.device) == "cpu" else 4)) > free:
        raise UserError(f"{name} takes {needed:,.1f} GB of memory for {count:,} parameters; {free:,.1f} GB are free")
    return MaskedLM(AutoModelForMaskedLM.from_config(hf_config))


def fit_model(
    model: MaskedLM,
    old: Tokenizer,
    new: Tokenizer,
    settings: ModelConfig,
    name: str = "the model",
    *,
    begins: bool = True,
    quiet: bool = True,
) -> MaskedLM:
    """The model of the tokenizer `old` with the vocabulary of `new`, and the row length and rotary base of `settings`.

    `begins` says that these settings begin here, so that one without effect is refused. `name` is for messages. Raises
    `UserError` as `build_model` does.
    """
    fitted = _fitted(model, old, new, settings, name, logging.DEBUG if quiet else logging.INFO)
    stretches = fitted.max_length() > model.max_length() and _sized_by(model, POSITIONS)
    if begins and settings.interpolate_positions and not stretches:
        raise UserError(
            f"model.interpolate_positions has no effect, as {name} has no table of positions to stretch to "
            f"model.max_length ({settings.max_length}): leave it out"
        )
    return fitted


# ---------------------------------------------------------------- fitting a loaded model


def _fitted(model: MaskedLM, old: Tokenizer, new: Tokenizer, settings: ModelConfig, name: str, level: int) -> MaskedLM:
    """It is built again from its changed configuration, so that everything computed from that (position ids, rotary
    angles, the padding row) is right, and then gets the old weights. `name` is for messages.
    """
    hf_config = copy.deepcopy(model.network.config)
    _set_rope_theta(hf_config, settings.rope_theta, name)
    changed: dict[str, Tensor] = {}
    if not extends(new, old) or new.vocabulary_size > old.vocabulary_size:
        changed |= _change_vocabulary(model, hf_config, old, new, level)
    changed |= _change_positions(model, hf_config, settings, name, level)
    if not changed and hf_config.to_dict() == model.network.config.to_dict():
        return model
    network = AutoModelForMaskedLM.from_config(hf_config, dtype=torch.float32)
    # A buffer of another size, such as position ids, follows from the configuration.
    state = network.state_dict()
    kept = {key: value for key, value in model.network.state_dict().items() if value.shape == state[key].shape}
    network.load_state_dict(kept | changed, strict=False)
    return MaskedLM(network.eval())


def _change_vocabulary(
    model: MaskedLM, hf_config: PreTrainedConfig, old: Tokenizer, new: Tokenizer, level: int
) -> dict[str, Tensor]:
    """Change the configuration to the vocabulary of `new`, and return the weights that have a row per token."""
    sources = row_sources(new, old)
    if extends(new, old):  # rows that fill the table up to a round size stay
        sources += [[id] for id in range(len(sources), model.vocabulary_size)]
    else:
        set_special_ids(hf_config, new)
    counts = [len(ids) for ids in sources]
    copied, made_up = counts.count(1), counts.count(0)
    message = "embeddings of %d tokens: %d rows copied, %d the mean of their old pieces, %d the mean of all rows"
    log.log(level, message, len(sources), copied, len(sources) - copied - made_up, made_up)
    hf_config.get_text_config().vocab_size = len(sources)
    return {
        key: _mean_rows(weight.movedim(axis, 0), sources).movedim(0, axis)
        for key, weight, axis in _sized_by(model, "vocab_size")
    }


def _mean_rows(rows: Tensor, sources: list[list[int]]) -> Tensor:
    """Row i is the mean of the rows `sources[i]`, or of all rows if there are none. `rows` is `[old tokens, ...]`."""
    table = torch.cat([rows, rows.mean(0, keepdim=True)]).reshape(len(rows) + 1, -1)
    bags = [ids or [len(rows)] for ids in sources]
    starts = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
    means = F.embedding_bag(torch.tensor([id for ids in bags for id in ids]), table, starts, mode="mean")
    return means.view(len(sources), *rows.shape[1:])


def _change_positions(
    model: MaskedLM, hf_config: PreTrainedConfig, settings: ModelConfig, name: str, level: int
) -> dict[str, Tensor]:
    """Change the configuration to rows of `model.max_length`, and return the weights that have a row per position.

    The first row is that of the first position: 0, or the one after the padding id's in the RoBERTa family.
    """
    limit, offset, new_offset = model.max_length(), model.position_offset, position_offset(hf_config)
    length = max(settings.max_length, limit)
    if length == limit and new_offset == offset:
        return {}
    tables = _sized_by(model, POSITIONS)
    if length > limit:
        if tables and not settings.interpolate_positions:
            raise UserError(
                f"{name} has a table of {limit} positions: model.max_length ({length}) must not exceed it, unless "
                "model.interpolate_positions = true stretches it"
            )
        log.log(level, "%s was made for rows of %d tokens; training it on %d", name, limit, length)
    hf_config.get_text_config().max_position_embeddings = length + new_offset
    changed = {}
    for key, weight, axis in tables:
        if weight.ndim != 2 or axis != 0 or len(weight) != limit + offset:
            raise UserError(f"{name} cannot take longer rows: {key} is not a table with one row per position")
        rows = F.interpolate(weight[offset:].T[None], length, mode="linear", align_corners=True)[0].T
        changed[key] = F.pad(rows, (0, 0, new_offset, 0))
    return changed


def _sized_by(model: MaskedLM, key: str) -> list[tuple[str, Tensor, int]]:
    """The weights that have an axis whose size follows an entry of the configuration: name, weight and axis."""

    def shapes(extra: int) -> dict[str, torch.Size]:
        hf_config = copy.deepcopy(model.network.config)
        text = hf_config.get_text_config()
        setattr(text, key, getattr(text, key) + extra)
        with torch.device("meta"):
            network = AutoModelForMaskedLM.from_config(hf_config)
        return {name: weight.shape for name, weight in network.named_parameters(remove_duplicate=False)}

    before, after = shapes(0), shapes(1)
    return [
        (name, weight.detach(), axis)
        for name, weight in model.network.named_parameters(remove_duplicate=False)  # tied ones under each name
        for axis in range(weight.ndim)
        if before[name][axis] != after[name][axis]
    ]


def _set_rope_theta(hf_config: PreTrainedConfig, theta: float | None, name: str) -> None:
    """Set the base of the rotary angles; of the layers that see the whole row, if others see a window of it."""
    text = hf_config.get_text_config()
    if theta is None:
        return
    if not (rope := copy.deepcopy(getattr(text, "rope_parameters", None))):
        raise UserError(f"model.rope_theta has no effect, as {name} has no rotary positions: leave it out")
    rope.get("full_attention", rope)["rope_theta"] = theta
    text.rope_parameters = rope
