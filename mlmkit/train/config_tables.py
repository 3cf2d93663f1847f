"""The tables of the training configuration: a dataclass each, with its defaults, types and ranges."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any

from mlmkit.backends import DEVICES
from mlmkit.locations import Source
from mlmkit.masking import MaskRecipe
from mlmkit.toml import Rule, one_of

SCHEDULES = ("constant", "linear", "cosine", "1-sqrt", "wsd")
UNITS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# The comparisons are false for NaN.
POSITIVE = Rule(lambda value: 0 < value < 1 << 40, "positive and finite")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < 1 << 40, "at least 0 and finite")
DECAY_RATE = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
# 0.001 is eight tokens of a batch of 8,192. A model learns to predict masked tokens from the others.
MASK_RATE = Rule(lambda value: 0.001 <= value < 1, "at least 0.001 and below 1")
SHARE = Rule(lambda value: 0 < value < 1, "above 0 and below 1")
PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]


def _count(value: Any) -> Any:
    """Whole numbers may be written as "10B" or "1.5M"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMBT])", value) if isinstance(value, str) else None
    return round(float(match[1]) * UNITS[match[2]]) if match else value


Count = Annotated[int, Rule(lambda value: 0 < value < 1 << 60, 'positive, such as 5000000 or "10B"', _count)]


Weight = Annotated[float, Rule(lambda value: 0 < value < 1 << 20, "positive and finite")]
HeldOut = Annotated[
    str | float, Rule(lambda value: isinstance(value, str) or 0 < value < 0.5, "a share above 0 and below 0.5")
]


@dataclass(frozen=True)
class SourceConfig:
    """`[[data.source]]`: a text to train on, from one or more locations. The default of `text_field` is that of
    `[data]`, and `format` is given by the suffix of each file.
    """

    path: tuple[str, ...]
    text_field: str = ""
    weight: Weight = 1.0
    format: str = ""


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: one or more texts to train on. Paths are relative to the working directory.

    `weights` says how often an epoch shows each text: 1.0 by default, and 0.5 shows every other document. Instead,
    `temperature` samples a text of n tokens in proportion to n ** temperature: 1 as they are, 0 all equally often.
    `source` are texts that state more than a location, in place of `train` and `weights`. `held_out` is evaluated at
    each checkpoint: the location of a text (for several, `[held_out]`), or a share of the training documents, which
    their keys select. `workers` is the number of processes that build batches; with 0 the training process does.
    """

    train: tuple[str, ...] = ()
    source: tuple[SourceConfig, ...] = ()
    weights: tuple[Weight, ...] = ()
    temperature: Annotated[float, Rule(lambda value: 0 <= value <= 1, "between 0 and 1")] | None = None
    held_out: HeldOut = ""
    text_field: str = "text"
    blank_line: bool = False
    on_bad_row: str = "error"
    workers: Annotated[int, Rule(lambda value: 0 <= value <= 256, "between 0 and 256")] = 0

    @property
    def sources(self) -> list[Source]:
        """The training texts for `load_corpus`, without the held-out share of their documents."""
        texts = self.source or [SourceConfig((location,)) for location in self.train]
        return [replace(self.text(text), keys=(self.held_out_share, 1.0)) for text in texts]

    def text(self, stated: SourceConfig) -> Source:
        """The whole text of a source."""
        field = stated.text_field or self.text_field
        return Source(stated.path, field, self.blank_line, format=stated.format, on_bad_row=self.on_bad_row)

    @property
    def held_out_share(self) -> float:
        """The share of the training documents that is held out."""
        return 0.0 if isinstance(self.held_out, str) else self.held_out

    @property
    def source_weights(self) -> tuple[float, ...]:
        """How often an epoch shows each text; empty if all are shown once."""
        weights = tuple(text.weight for text in self.source) or self.weights
        return () if {*weights} == {1.0} else weights


@dataclass(frozen=True)
class TokenizerConfig:
    """`[tokenizer]`: an existing one at `path`, or that of `model.init_from`; otherwise one is trained on `data.train`.

    With `vocab_size`, one is trained for `model.init_from` too. `train_tokens` trains it on a sample of about that many
    tokens. `add` names a file of words to add, one per line.
    """

    path: str = ""
    kind: Annotated[str, one_of("wordpiece", "bpe")] = "wordpiece"  # bpe is byte-level
    # Ranks are exact up to 2**24 (`MaskedLM.forward`). The tokenizers library aborts the process at 2**30.
    vocab_size: Annotated[int, Rule(lambda value: 0 < value <= 1 << 24, "between 1 and 2**24")] | None = None
    lowercase: bool = False
    train_tokens: Count | None = None
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
    """`[masking]`: the recipe of mask-v1. The rate goes linearly from `mask_prob` to `final_mask_prob`, if given, over
    the run or the phase.
    """

    mask_prob: Annotated[float, MASK_RATE] = 0.15
    final_mask_prob: Annotated[float, MASK_RATE] | None = None
    replace_prob: float = 0.8
    random_prob: float = 0.1
    whole_word: bool = False

    def __post_init__(self) -> None:
        for progress in (0.0, 1.0):
            self.recipe(progress)

    def recipe(self, progress: float) -> MaskRecipe:
        """The recipe after a share `progress` of the phase, 0 to 1. Raises `UserError` as `MaskRecipe` does."""
        final = self.mask_prob if self.final_mask_prob is None else self.final_mask_prob
        rate = self.mask_prob + (final - self.mask_prob) * progress
        return MaskRecipe(rate, self.replace_prob, self.random_prob, self.whole_word)


@dataclass(frozen=True)
class OptimConfig:
    """`[optim]`: AdamW, StableAdamW, or Muon for the hidden matrices with AdamW for the rest; and the schedule.

    `schedule` says what the learning rate does after the warm-up: `constant`; decay to zero (`linear`, `cosine`,
    `1-sqrt`); or `wsd`, constant with decay of `decay_shape` over the last `decay_share`. The warm-up is a number of
    steps, of tokens, or a share of the phase; 100 steps by default, or a tenth of at most 100. The default of `beta2`
    is RoBERTa's (Liu et al. 2019, section 4): 0.999 is unstable with large batches.
    """

    name: Annotated[str, one_of("adamw", "muon", "stable_adamw")] = "adamw"
    lr: PositiveFloat = 1e-3
    beta1: Annotated[float, DECAY_RATE] = 0.9
    beta2: Annotated[float, DECAY_RATE] = 0.98
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    schedule: Annotated[str, one_of(*SCHEDULES)] = "linear"
    decay_share: Annotated[float, Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")] = 0.2
    decay_shape: Annotated[str, one_of("linear", "1-sqrt")] = "linear"
    warmup_steps: Annotated[int, NOT_NEGATIVE] | None = None
    warmup_tokens: Count | None = None
    warmup_share: Annotated[float, SHARE] | None = None
    max_grad_norm: PositiveFloat = 1.0


@dataclass(frozen=True)
class RunConfig:
    """`[train]`: the run's length, batches and checkpoints. Tokens are real ones, special tokens included.

    The length is a number of `steps` (1,000 by default), of `tokens`, or of `epochs`. A batch has room for
    `global_batch_tokens`, and first for `initial_batch_tokens`, which grow to it over `batch_warmup_tokens`. A
    checkpoint is kept at the first step after each number of words in `keep_at_words` (see `Cursor`). For `precision`
    see `resolve_precision`; the configuration in a checkpoint has the resolved one.
    """

    steps: PositiveInt | None = None
    tokens: Count | None = None
    epochs: PositiveFloat | None = None
    initial_batch_tokens: PositiveInt | None = None
    batch_warmup_tokens: Count | None = None
    global_batch_tokens: PositiveInt = 8192
    micro_batch_tokens: PositiveInt = 8192
    seed: Annotated[int, Rule(lambda value: 0 <= value < 1 << 63, "between 0 and 2**63 - 1")] = 0
    save_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    keep_at_words: tuple[Count, ...] = ()
    log_every: PositiveInt = 10
    device: Annotated[str, one_of(*DEVICES)] = "auto"
    precision: Annotated[str, one_of("auto", "fp32", "bf16")] = "auto"
    parallel: Annotated[str, one_of("ddp", "fsdp")] = "ddp"
    compile: bool = False
    checkpoint_activations: bool = False  # keep only the input of each layer, and compute the rest again
    tensorboard: bool = False
    wandb: str = ""  # the project's name
