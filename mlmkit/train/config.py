"""The training configuration: its tables (config_tables.py) and phases. Every key has a default except `data.train`.

file, --set ──> tables ──> Config ──> Config.phases: one complete configuration per phase
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from mlmkit.errors import UserError
from mlmkit.hub import HUB
from mlmkit.locations import Source, last_part
from mlmkit.toml import build, checked
from mlmkit.train.config_tables import (
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
)

HELD_OUT = "held-out"  # the name of the set that `data.held_out` gives
# `mlmkit.train.held_out` makes folders of the names, and folders of eight hexadecimal digits for replaced texts.
SET_NAME = re.compile(r"(?![0-9a-f]{8}$)[a-z][a-z0-9_-]{0,63}")

# Settings that may change on resume: they affect neither data nor weights. Texts are compared by their fingerprints.
CHANGEABLE = {
    "data": "train source held_out text_field blank_line on_bad_row workers",
    "train": "device parallel checkpoint_activations save_every keep_checkpoints keep_at_words log_every tensorboard "
    "wandb",
}
# What a phase may change. The keys in PER_PHASE belong to one phase: the next does not inherit them.
PHASE_KEYS = {
    "data": "train source weights temperature text_field blank_line",
    "model": "max_length rope_theta interpolate_positions",
    "masking": "mask_prob final_mask_prob replace_prob random_prob whole_word",
    "optim": "lr beta1 beta2 eps weight_decay schedule decay_share decay_shape warmup_steps warmup_tokens warmup_share "
    "max_grad_norm",
    "train": "steps tokens epochs global_batch_tokens micro_batch_tokens initial_batch_tokens batch_warmup_tokens",
}
DEFAULT_WARMUP = 100  # steps
LENGTHS = ("steps", "tokens", "epochs")
WARMUPS = ("warmup_steps", "warmup_tokens", "warmup_share")
# What a phase drops when it sets one of these.
REPLACES = {
    "weights": ("temperature",),
    "temperature": ("weights",),
    "train": ("source",),
    "source": ("train", "weights", "temperature"),
    **dict.fromkeys(LENGTHS, LENGTHS),
    **dict.fromkeys(WARMUPS, WARMUPS),
}
PER_PHASE = {
    "model": {"interpolate_positions": False},
    "optim": {"warmup_steps": 0, "warmup_tokens": None, "warmup_share": None},
    "train": {**dict.fromkeys(LENGTHS), "initial_batch_tokens": None, "batch_warmup_tokens": None},
}


@dataclass(frozen=True)
class Config:
    """The whole configuration. Raises `UserError` for tables that do not fit together.

    `phase` holds the tables of `[[phase]]`, each with a `name` and the settings that it changes, by table.
    `held_out` gives each of several held-out texts a name; the first is the primary one, by which sweeps compare.
    """

    data: DataConfig = field(default_factory=DataConfig)
    held_out: dict[str, str] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)
    phase: tuple[dict, ...] = ()

    def __post_init__(self) -> None:
        if self.data.held_out and self.held_out and not self.data.held_out_share:
            raise UserError("data.held_out and [held_out] exclude each other: name all held-out texts in [held_out]")
        if wrong := [name for name in self.held_out if not SET_NAME.fullmatch(name)]:
            raise UserError(
                f"held_out.{wrong[0]}: a name has lower-case letters, digits, - and _, begins with a letter, "
                "and is not eight hexadecimal digits"
            )
        if self.phase:
            self.phases  # noqa: B018 - raises `UserError` for a phase that is wrong
        else:
            self._check()
        if taken := self.held_out.keys() & self._held_out_shares().keys():
            raise UserError(f"held_out.{taken.pop()} is the name of the held-out share: choose another name")

    def _check(self) -> None:
        self._check_data()
        run = self.train
        if run.micro_batch_tokens < self.model.max_length:
            raise UserError(
                f"train.micro_batch_tokens ({run.micro_batch_tokens}) must hold one row of model.max_length "
                f"({self.model.max_length}): raise it, or lower model.max_length"
            )
        if run.global_batch_tokens % run.micro_batch_tokens:
            raise UserError("train.global_batch_tokens must be a multiple of train.micro_batch_tokens")
        if (run.initial_batch_tokens is None) != (run.batch_warmup_tokens is None):
            raise UserError("train.initial_batch_tokens and train.batch_warmup_tokens need each other: give both")
        if initial := run.initial_batch_tokens:
            sizes, rest = divmod(run.global_batch_tokens, initial)
            if rest or sizes == 1 or initial % run.micro_batch_tokens:
                raise UserError(
                    f"train.initial_batch_tokens ({initial}) must be a multiple of train.micro_batch_tokens and go a "
                    "whole number of times, at least 2, into train.global_batch_tokens"
                )
        for name, keys in (("train", LENGTHS), ("optim", WARMUPS)):
            if len(given := [key for key in keys if getattr(getattr(self, name), key) is not None]) > 1:
                raise UserError(f"{name}.{given[0]} and {name}.{given[1]} both give a length: leave one out")
        if not run.epochs:
            self.warmup(run.tokens or self.steps)

    def _check_data(self) -> None:
        data = self.data
        if not (data.train or data.source) or not all(text.path for text in data.source):
            key = "data.source.path is empty" if data.source else "data.train is missing"
            raise UserError(f"{key}: name the text to train on")
        for key in ("train", "weights"):
            if data.source and getattr(data, key):
                raise UserError(f"data.{key} and [[data.source]] exclude each other: use path and weight in each table")
        for text in data.sources:
            if text.format and any(path.startswith(HUB) for path in text.locations):
                raise UserError(f"data.source.format has no effect on {HUB} datasets: leave it out")
        if data.weights and len(data.weights) != len(data.train):
            raise UserError(
                f"data.weights has {len(data.weights)} numbers for {len(data.train)} texts: give one per text"
            )
        if data.source_weights and data.temperature is not None:
            key = "data.source.weight" if data.source else "data.weights"
            raise UserError(f"{key} and data.temperature are two ways to weight the texts: give one")
        if data.source and len({*data.source_weights}) == 1:
            raise UserError("data.source.weight has no effect, as all are equal: leave it out")

    @property
    def train_sources(self) -> list[Source]:
        """The training texts of all phases, each once, for `load_corpus`."""
        return list(dict.fromkeys(source for phase in self.phases.values() for source in phase.data.sources))

    @property
    def needs_words(self) -> bool:
        """Whether a phase needs to know where the words of its training text begin."""
        return any(phase.masking.whole_word for phase in self.phases.values())

    @property
    def held_out_sources(self) -> dict[str, Source]:
        """The held-out texts for `load_corpus`, by name."""
        named = self.held_out if self.data.held_out_share else self.held_out or {HELD_OUT: str(self.data.held_out)}
        texts = {name: self.data.text(SourceConfig((location,))) for name, location in named.items() if location}
        return self._held_out_shares() | texts

    def _held_out_shares(self) -> dict[str, Source]:
        """The share of the training documents of all phases that is held out: a text for each way of reading them."""
        if not self.data.held_out_share:
            return {}
        texts: dict[Source, dict[str, None]] = {}
        for source in self.train_sources:
            text = replace(source, location="", keys=(0.0, self.data.held_out_share))
            texts.setdefault(text, {}).update(dict.fromkeys(source.locations))
        shares = [replace(text, location=tuple(paths)) for text, paths in texts.items()]
        return (
            {f"part-{number}": text for number, text in enumerate(shares, 1)} if shares[1:] else {HELD_OUT: shares[0]}
        )

    @property
    def steps(self) -> int:
        """The length in steps, if it is neither in tokens nor in epochs."""
        return self.train.steps or 1000

    def warmup(self, total: int) -> int:
        """The length of the warm-up in the unit of the phase, steps or tokens, of which it has `total`.

        A warm-up in the other unit is converted with full batches. Raises `UserError` if it is not below `total`.
        """
        optim, batch = self.optim, self.train.global_batch_tokens
        in_tokens = bool(self.train.tokens or self.train.epochs)
        if optim.warmup_share:
            return round(optim.warmup_share * total)
        if optim.warmup_tokens:
            name, warmup = "warmup_tokens", optim.warmup_tokens if in_tokens else -(-optim.warmup_tokens // batch)
        elif optim.warmup_steps is not None:
            name, warmup = "warmup_steps", optim.warmup_steps * (batch if in_tokens else 1)
        else:
            default = DEFAULT_WARMUP * (batch if in_tokens else 1)
            return default if default < total else total // 10
        if warmup >= total:
            length = next((f"train.{key} ({value})" for key in LENGTHS if (value := getattr(self.train, key))), total)
            value = getattr(optim, name)
            raise UserError(f"optim.{name} ({value}) must end before {length}, so that the schedule reaches its end")
        return warmup

    @cached_property
    def phases(self) -> dict[str, "Config"]:
        """The configuration of each phase by name, in order; the whole configuration as "" if there are no phases.

        A phase keeps what the phase before it set, except the settings in `PER_PHASE`. It starts at the mask rate with
        which that phase ended.
        """
        phases: dict[str, Config] = {}
        before = self
        for table in self.phase:
            name, changes = table.get("name"), {key: value for key, value in table.items() if key != "name"}
            if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"[[phase]] needs a name of letters, digits, _ and -, not {name!r}")
            if name in phases:
                raise UserError(f"two phases are called {name}: give each a name of its own")
            with named(name):
                given = setting_names(changes, "a phase")
                if not any(changes.get("train", {}).get(length) for length in LENGTHS):
                    raise UserError("it needs a length: set its train.steps, train.tokens or train.epochs")
                phases[name] = before = change(before, changes, follows=bool(phases))
                for key in given:
                    if key.partition(".")[2] not in PHASE_KEYS.get(key.partition(".")[0], "").split():
                        raise UserError(f"{key} belongs to the whole run: set it above the phases")
        return phases or {"": self}


@contextmanager
def named(phase: str) -> Iterator[None]:
    """Put the name of a phase, if it has one, before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise (UserError(f"phase {phase}: {error}") if phase else error) from None


def change(
    before: Config, changes: dict[str, Any], phase: Sequence[dict[str, Any]] = (), *, follows: bool = True
) -> Config:
    """`before` with the settings in `changes`, by table; `follows` says that it is the next phase after `before`.

    `phase` are the phases that begin with these settings.
    """
    tables = {}
    for name in {**PHASE_KEYS, **changes}:
        table = getattr(before, name)
        if follows:
            table = replace(table, **PER_PHASE.get(name, {}))
            if isinstance(table, MaskingConfig):
                table = replace(table, mask_prob=table.final_mask_prob or table.mask_prob, final_mask_prob=None)
        values = checked(type(table), changes.get(name, {}), f"{name}.")
        dropped = {other: getattr(type(table), other) for key in values for other in REPLACES.get(key, ())}
        tables[name] = replace(table, **dropped | values)
    return replace(before, **tables, phase=tuple(phase))


def setting_names(tables: dict[str, Any], where: str) -> list[str]:
    """The settings in `tables` as "table.key". Raises `UserError` for what is not a table of `Config`."""
    if wrong := [name for name, values in tables.items() if not isinstance(values, dict)]:
        raise UserError(f"{where}: {wrong[0]} must be a table, or written as table.key = value")
    known = [item.name for item in fields(Config)]
    if unknown := [name for name in tables if name not in known]:
        raise UserError(f"{where}: unknown table {unknown[0]}: known are {', '.join(known)}")
    return [f"{table}.{key}" for table, values in tables.items() for key in values if values[key] not in ("", [])]


def as_tables(config: Config) -> dict[str, Any]:
    """The configuration of one phase as JSON can hold it; `from_tables` reads it."""
    return {name: values for name, values in asdict(config).items() if name != "phase"}


def from_tables(tables: dict[str, Any]) -> Config:
    """The configuration that `as_tables` gave, also after a round trip through JSON."""
    stated = {
        name: {key: value for key, value in values.items() if value is not None} for name, values in tables.items()
    }
    return build(Config, stated)


def to_toml(config: Config) -> str:
    """The configuration of one phase as a file for `load_config`, without the settings of `CHANGEABLE["train"]`.

    A default is a comment, so the file states no setting that `load_config` would refuse as useless. Of a path there is
    the last part.
    """
    defaults, lines = as_tables(Config(DataConfig(train=("",)))), list[str]()
    for table, values in as_tables(config).items():
        for key, value in values.items():
            if value not in (None, "", (), []) and not (table == "train" and key in CHANGEABLE["train"].split()):
                comment = "# " if value == defaults[table].get(key) else ""
                lines.append(f"{comment}{table}.{key} = {_toml_value(value)}\n")
    return "".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        stated = [f"{key} = {_toml_value(each)}" for key, each in value.items() if each != ""]
        return f"{{ {', '.join(stated)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(last_part(value) if isinstance(value, str) else value, ensure_ascii=False)
