"""The training configuration: one dataclass per TOML table. Every key has a default except `data.train`."""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from mlmkit.backends import DEVICES
from mlmkit.documents import Source, is_table
from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe
from mlmkit.toml import Rule, build, one_of, read_toml

SCHEDULES = ("linear", "cosine", "wsd")
# The comparisons are false for NaN.
POSITIVE = Rule(lambda value: 0 < value < 1 << 40, "positive and finite")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < 1 << 40, "at least 0 and finite")
DECAY_RATE = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
# 0.001 is eight tokens of a batch of 8,192. A model learns to predict masked tokens from the others.
MASK_RATE = Rule(lambda value: 0.001 <= value < 1, "at least 0.001 and below 1")
PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: one or more texts to train on. Paths are relative to the working directory.

    `weights` says how often an epoch shows each text: 1.0 by default, and 0.5 shows every other document. `workers` is
    the number of processes that build batches; with 0 the training process does.
    """

    train: tuple[str, ...] = ()
    weights: tuple[Annotated[float, Rule(lambda value: 0 < value < 1 << 20, "positive and finite")], ...] = ()
    held_out: str = ""  # evaluated at each checkpoint
    text_field: str = "text"
    blank_line: bool = False
    workers: Annotated[int, Rule(lambda value: 0 <= value <= 256, "between 0 and 256")] = 0

    @property
    def sources(self) -> list[Source]:
        """The training texts for `load_corpus`."""
        return [Source(location, self.text_field, self.blank_line) for location in self.train]

    @property
    def held_out_source(self) -> Source:
        """The held-out text for `load_corpus`."""
        return Source(self.held_out, self.text_field, self.blank_line)

    @property
    def passes(self) -> tuple[float, ...]:
        """Passes per epoch over each text."""
        return self.weights or (1.0,) * len(self.train)


@dataclass(frozen=True)
class TokenizerConfig:
    """`[tokenizer]`: an existing one at `path`, or that of `model.init_from`; otherwise one is trained on `data.train`.

    With `vocab_size`, one is trained for `model.init_from` too. `add` names a file of words to add, one per line.
    """

    path: str = ""
    kind: Annotated[str, one_of("wordpiece", "bpe")] = "wordpiece"  # bpe is byte-level
    # Ranks are exact up to 2**24 (`MaskedLM.forward`). The tokenizers library aborts the process at 2**30.
    vocab_size: Annotated[int, Rule(lambda value: 0 < value <= 1 << 24, "between 1 and 2**24")] | None = None
    lowercase: bool = False
    add: str = ""

    @property
    def entries(self) -> int:
        """The most entries that a trained tokenizer gets."""
        return self.vocab_size or 16000


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: a preset or the path of a Hugging Face `config.json`; or a checkpoint to continue from.

    `new_head` gives a checkpoint without a masked-LM head a random one. `rope_theta` is the base of rotary positions,
    `interpolate_positions` stretches a table of learned ones to `max_length`.
    """

    architecture: str = "bert-small"
    init_from: str = ""
    new_head: bool = False
    max_length: PositiveInt = 512
    rope_theta: PositiveFloat | None = None
    interpolate_positions: bool = False


@dataclass(frozen=True)
class MaskingConfig:
    """`[masking]`: the recipe of mask-v1. The rate goes linearly from `mask_prob` to `final_mask_prob`, if given."""

    mask_prob: Annotated[float, MASK_RATE] = 0.15
    final_mask_prob: Annotated[float, MASK_RATE] | None = None
    replace_prob: float = 0.8
    random_prob: float = 0.1
    whole_word: bool = False

    def __post_init__(self) -> None:
        for progress in (0.0, 1.0):
            self.recipe(progress)

    def recipe(self, progress: float) -> MaskRecipe:
        """The recipe after a share `progress` of the run, 0 to 1. Raises `UserError` as `MaskRecipe` does."""
        final = self.mask_prob if self.final_mask_prob is None else self.final_mask_prob
        rate = self.mask_prob + (final - self.mask_prob) * progress
        return MaskRecipe(rate, self.replace_prob, self.random_prob, self.whole_word)


@dataclass(frozen=True)
class OptimConfig:
    """`[optim]`: AdamW, or Muon for the hidden matrices with AdamW for the rest; and the learning rate schedule.

    `decay_share` is the share of all steps in which `wsd` decays. The default of `beta2` is RoBERTa's (Liu et al. 2019,
    section 4): 0.999 is unstable with large batches. A file without `warmup_steps` gets a tenth of the steps if there
    are at most 100.
    """

    name: Annotated[str, one_of("adamw", "muon")] = "adamw"
    lr: PositiveFloat = 1e-3
    beta1: Annotated[float, DECAY_RATE] = 0.9
    beta2: Annotated[float, DECAY_RATE] = 0.98
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    schedule: Annotated[str, one_of(*SCHEDULES)] = "linear"
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 100
    decay_share: Annotated[float, Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")] = 0.2
    max_grad_norm: PositiveFloat = 1.0


@dataclass(frozen=True)
class RunConfig:
    """`[train]`: the run's length, batches and checkpoints. Batch sizes count tokens, special tokens included."""

    steps: PositiveInt = 1000
    global_batch_tokens: PositiveInt = 8192
    micro_batch_tokens: PositiveInt = 8192
    seed: Annotated[int, Rule(lambda value: 0 <= value < 1 << 63, "between 0 and 2**63 - 1")] = 0
    save_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    device: Annotated[str, one_of(*DEVICES)] = "auto"
    parallel: Annotated[str, one_of("ddp", "fsdp")] = "ddp"
    compile: bool = False
    tensorboard: bool = False
    wandb: str = ""  # the project's name


@dataclass(frozen=True)
class Config:
    """The whole configuration. Raises `UserError` for tables that do not fit together."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.data.train:
            raise UserError("data.train is missing: name the text to train on")
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            raise UserError(
                f"data.weights has {len(self.data.weights)} numbers for {len(self.data.train)} texts: give one per text"
            )
        if self.train.micro_batch_tokens < self.model.max_length:
            raise UserError(
                f"train.micro_batch_tokens ({self.train.micro_batch_tokens}) must hold one row of model.max_length "
                f"({self.model.max_length}): raise it, or lower model.max_length"
            )
        if self.train.global_batch_tokens % self.train.micro_batch_tokens:
            raise UserError("train.global_batch_tokens must be a multiple of train.micro_batch_tokens")


def _are_tables(data: DataConfig) -> set[bool]:
    return {is_table(location) for location in (*data.train, data.held_out) if location}


_HOW_TRAINED = "tokenizer.kind tokenizer.lowercase"
_ADAPTED = "tokenizer.add model.new_head model.interpolate_positions"
# Keys without effect, when that holds, and why. They are refused if the user gave them, even with the default value.
WITHOUT_EFFECT: tuple[tuple[str, Callable[[Config], object], str], ...] = (
    ("model.architecture", lambda c: c.model.init_from, "model.init_from brings its own"),
    (f"{_HOW_TRAINED} tokenizer.vocab_size", lambda c: c.tokenizer.path, "tokenizer.path names a finished tokenizer"),
    (
        _HOW_TRAINED,
        lambda c: c.model.init_from and not c.tokenizer.vocab_size,
        "model.init_from brings its own tokenizer and no tokenizer.vocab_size asks for another",
    ),
    (_ADAPTED, lambda c: not c.model.init_from, "there is no model.init_from to change"),
    ("data.text_field", lambda c: True not in _are_tables(c.data), "text files have no fields"),
    ("data.blank_line", lambda c: c.data.blank_line and False not in _are_tables(c.data), "there is no text file"),
    ("data.weights", lambda c: len({*c.data.weights}) == 1 and 1.0 not in c.data.weights, "they are equal"),
    ("masking.final_mask_prob", lambda c: c.train.steps == 1, "one step has one rate"),
    ("optim.decay_share", lambda c: c.optim.schedule != "wsd", 'optim.schedule is not "wsd"'),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `table.key=value` overrides. Raises `UserError` naming a wrong or useless key."""
    tables = read_toml(path)
    for override in overrides:
        name, equals, value = override.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise UserError(f"--set {override}: write it as table.key=value, for example optim.lr=1e-3")
        values = tables.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"{path}: {table} must be a table, [{table}]")
        values[key] = _toml_value(value.strip())
    config: Config = build(Config, tables)
    if (warmup := config.optim.warmup_steps) >= (steps := config.train.steps):
        if "warmup_steps" in tables.get("optim", {}):
            raise UserError(f"optim.warmup_steps ({warmup}) must be below train.steps ({steps}), for the rate to decay")
        config = replace(config, optim=replace(config.optim, warmup_steps=steps // 10))
    given = {f"{table}.{key}" for table, values in tables.items() for key in values if values[key] not in ("", [])}
    for names, applies, reason in WITHOUT_EFFECT:
        if (useless := sorted(given.intersection(names.split()))) and applies(config):
            raise UserError(f"{useless[0]} has no effect, as {reason}: leave it out")
    return config


def _toml_value(text: str) -> Any:
    """A TOML value, or the text itself, so that `--set data.train=corpus.txt` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
