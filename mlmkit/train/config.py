"""The training configuration: one dataclass per TOML table. Every key has a default except `data.train`."""

import re
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
HELD_OUT = "held-out"  # the name of the set that `data.held_out` gives
# `mlmkit.train.held_out` makes folders of the names, and folders of eight hexadecimal digits for replaced texts.
SET_NAME = re.compile(r"(?![0-9a-f]{8}$)[a-z][a-z0-9_-]{0,63}")
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
    held_out: str = ""  # evaluated at each checkpoint; several texts: `[held_out]`
    text_field: str = "text"
    blank_line: bool = False
    workers: Annotated[int, Rule(lambda value: 0 <= value <= 256, "between 0 and 256")] = 0

    @property
    def sources(self) -> list[Source]:
        """The training texts for `load_corpus`."""
        return [Source(location, self.text_field, self.blank_line) for location in self.train]

    @property
    def passes(self) -> tuple[float, ...]:
        """Passes per epoch over each text."""
        return self.weights or (1.0,) * len(self.train)


@dataclass(frozen=True)
class TokenizerConfig:
    """`[tokenizer]`: an existing one at `path`; otherwise one is trained on `data.train`."""

    path: str = ""
    kind: Annotated[str, one_of("wordpiece", "bpe")] = "wordpiece"  # bpe is byte-level
    # Ranks are exact up to 2**24 (`MaskedLM.forward`). The tokenizers library aborts the process at 2**30.
    vocab_size: Annotated[int, Rule(lambda value: 0 < value <= 1 << 24, "between 1 and 2**24")] = 16000
    lowercase: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: a preset or the path of a Hugging Face `config.json`; or a checkpoint to continue from."""

    architecture: str = "bert-small"
    init_from: str = ""
    max_length: PositiveInt = 512


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
    """The whole configuration. Raises `UserError` for tables that do not fit together.

    `held_out` gives each of several held-out texts a name; the first is the primary one, by which sweeps compare.
    """

    data: DataConfig = field(default_factory=DataConfig)
    held_out: dict[str, str] = field(default_factory=dict)
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
        if self.data.held_out and self.held_out:
            raise UserError("data.held_out and [held_out] exclude each other: name all held-out texts in [held_out]")
        if wrong := [name for name in self.held_out if not SET_NAME.fullmatch(name)]:
            raise UserError(
                f"held_out.{wrong[0]}: name it with lower-case letters, digits, - and _, a letter first; "
                "not with eight hexadecimal digits"
            )
        if self.train.micro_batch_tokens < self.model.max_length:
            raise UserError(
                f"train.micro_batch_tokens ({self.train.micro_batch_tokens}) must hold one row of model.max_length "
                f"({self.model.max_length}): raise it, or lower model.max_length"
            )
        if self.train.global_batch_tokens % self.train.micro_batch_tokens:
            raise UserError("train.global_batch_tokens must be a multiple of train.micro_batch_tokens")

    @property
    def held_out_sources(self) -> dict[str, Source]:
        """The held-out texts for `load_corpus`, by name."""
        locations = self.held_out or {HELD_OUT: self.data.held_out}
        reading = self.data.text_field, self.data.blank_line
        return {name: Source(location, *reading) for name, location in locations.items() if location}


def _are_tables(config: Config) -> set[bool]:
    return {is_table(source.location) for source in (*config.data.sources, *config.held_out_sources.values())}


_TRAINED = "tokenizer.kind tokenizer.vocab_size tokenizer.lowercase"
# Keys without effect, when that holds, and why. They are refused if the user gave them, even with the default value.
WITHOUT_EFFECT: tuple[tuple[str, Callable[[Config], object], str], ...] = (
    (f"model.architecture tokenizer.path {_TRAINED}", lambda c: c.model.init_from, "model.init_from brings its own"),
    (_TRAINED, lambda c: c.tokenizer.path, "tokenizer.path names a finished tokenizer"),
    ("data.text_field", lambda c: True not in _are_tables(c), "text files have no fields"),
    ("data.blank_line", lambda c: c.data.blank_line and False not in _are_tables(c), "there is no text file"),
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
