"""The training configuration: one TOML table a dataclass, every key with a default but the text."""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from mlmkit.backends import DEVICES
from mlmkit.documents import Source, is_table
from mlmkit.errors import UserError
from mlmkit.masking import MaskRecipe
from mlmkit.toml import build, read_toml

CHOICES = {
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("linear", "cosine", "wsd"),
    "train.parallel": ("ddp", "fsdp"),
    "train.device": DEVICES,
    "tokenizer.kind": ("wordpiece", "bpe"),
}
# Settings, what holds for each of their values (false for NaN), and how that is said.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "model.max_length train.steps train.global_batch_tokens train.micro_batch_tokens train.save_every "
        "train.keep_checkpoints train.log_every optim.eps optim.lr optim.max_grad_norm",
        lambda value: 0 < value < 1 << 40,
        "positive and finite",
    ),
    ("optim.weight_decay optim.warmup_steps", lambda value: 0 <= value < 1 << 40, "at least 0 and finite"),
    ("optim.beta1 optim.beta2", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    # 0.001 is eight tokens of a batch of 8,192. A model learns to tell masked tokens by those that are not.
    ("masking.mask_prob", lambda value: 0.001 <= value < 1, "at least 0.001 and below 1"),
    ("masking.final_mask_prob", lambda value: value is None or 0.001 <= value < 1, "at least 0.001 and below 1"),
    ("optim.decay_share", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("data.weights", lambda value: 0 < value < 1 << 20, "positive and finite"),
    ("data.workers", lambda value: 0 <= value <= 256, "between 0 and 256"),
    ("train.seed", lambda value: 0 <= value < 1 << 63, "between 0 and 2**63 - 1"),
    # Up to here a rank is exact (`MaskedLM.forward`). The tokenizers library aborts the process at 2**30.
    ("tokenizer.vocab_size", lambda value: 0 < value <= 1 << 24, "between 1 and 2**24"),
    *((name, known.__contains__, f"one of {', '.join(known)}") for name, known in CHOICES.items()),
)


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: the text to train on, one location or several. Paths are relative to where the command runs.

    `weights` says how often an epoch shows each of them (1.0 where not given; 0.5 is every other document).
    """

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    held_out: str = ""  # evaluated at each checkpoint
    text_field: str = "text"
    blank_line: bool = False
    workers: int = 0  # processes that build batches beside the training loop

    @property
    def sources(self) -> list[Source]:
        """As `corpus` reads them."""
        return [Source(location, self.text_field, self.blank_line) for location in self.train]

    @property
    def held_out_source(self) -> Source:
        """The same of the held-out text."""
        return Source(self.held_out, self.text_field, self.blank_line)

    @property
    def passes(self) -> tuple[float, ...]:
        """The weight of each source."""
        return self.weights or (1.0,) * len(self.train)


@dataclass(frozen=True)
class TokenizerConfig:
    """`[tokenizer]`: `path` takes a finished one; otherwise one is trained on `data.train`."""

    path: str = ""
    kind: str = "wordpiece"  # or "bpe", byte-level
    vocab_size: int = 16000
    lowercase: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: a preset's name or a Hugging Face `config.json`; `init_from` continues from a checkpoint."""

    architecture: str = "bert-small"
    init_from: str = ""
    max_length: int = 512


@dataclass(frozen=True)
class MaskingConfig:
    """`[masking]`: the recipe of mask-v1. From `mask_prob` linearly to `final_mask_prob`, if given."""

    mask_prob: float = 0.15
    final_mask_prob: float | None = None
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
    """`[optim]`: AdamW, or Muon for the hidden matrices and AdamW for the rest; warm-up, then a schedule."""

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98  # as RoBERTa (Liu et al. 2019, section 4): 0.999 is unstable with large batches
    eps: float = 1e-6
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup_steps: int = 100  # of a file that does not say: a tenth of the steps if they are 100 at most
    decay_share: float = 0.2  # of all steps, at the end of the schedule wsd
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class RunConfig:
    """`[train]`: how long, how much at once, how often to save. Batch sizes count tokens, specials included."""

    steps: int = 1000
    global_batch_tokens: int = 8192
    micro_batch_tokens: int = 8192
    seed: int = 0
    save_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    device: str = "auto"
    parallel: str = "ddp"
    compile: bool = False
    tensorboard: bool = False
    wandb: str = ""  # a project's name


@dataclass(frozen=True)
class Config:
    """All of it. Raises `UserError` for what cannot work."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for names, holds, rule in RANGES:
            for name in names.split():
                values = attrgetter(name)(self)
                for value in values if isinstance(values, tuple) else (values,):
                    if not holds(value):
                        raise UserError(f"{name} must be {rule}, not {value!r}")
        if not self.data.train:
            raise UserError("data.train is missing: name the text to train on")
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            raise UserError(
                f"data.weights has {len(self.data.weights)} numbers for {len(self.data.train)} texts: give one for each"
            )
        if self.train.micro_batch_tokens < self.model.max_length:
            raise UserError(
                f"train.micro_batch_tokens ({self.train.micro_batch_tokens}) must hold one row of model.max_length "
                f"({self.model.max_length}): raise the one or lower the other"
            )
        if self.train.global_batch_tokens % self.train.micro_batch_tokens:
            raise UserError("train.global_batch_tokens must be a multiple of train.micro_batch_tokens")


def _are_tables(data: DataConfig) -> set[bool]:
    return {is_table(location) for location in (*data.train, data.held_out) if location}


_TRAINED = "tokenizer.kind tokenizer.vocab_size tokenizer.lowercase"
# Settings without effect, when, and why: refused where the user gives them, which a default's value cannot tell.
IDLE: tuple[tuple[str, Callable[[Config], object], str], ...] = (
    (f"model.architecture tokenizer.path {_TRAINED}", lambda c: c.model.init_from, "model.init_from brings its own"),
    (_TRAINED, lambda c: c.tokenizer.path, "tokenizer.path names a finished tokenizer"),
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
    for names, is_idle, reason in IDLE:
        if (idle := sorted(given.intersection(names.split()))) and is_idle(config):
            raise UserError(f"{idle[0]} has no effect, as {reason}: leave it out")
    return config


def _toml_value(text: str) -> Any:
    """A TOML value, or the text itself, so that `--set data.train=corpus.txt` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
