"""Beginning a run, or finding that a folder holds the same one."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlmkit import model as masked_lm
from mlmkit.backends.torch import pick_device
from mlmkit.corpus import Corpus, load_corpus
from mlmkit.documents import read_documents
from mlmkit.errors import UserError
from mlmkit.files import new_folder
from mlmkit.model import MaskedLM
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config
from mlmkit.train.data import TrainingData
from mlmkit.train.presets import build_config
from mlmkit.train.tokenizer import train_tokenizer

log = logging.getLogger(__name__)


def begin_or_check(config: Config, run: Path) -> tuple[Tokenizer, Corpus]:
    """The run's tokenizer and tokenised text.

    A new run's folder, with `tokenizer/` and `run.json`, appears whole, and only if training can start. A folder that
    was begun with another configuration, text or tokenizer is refused: `UserError` names the first difference.
    """
    pick_device(config.train.device)  # refuse before anything is written
    if not (run / "run.json").exists():
        if run.exists() and not run.is_dir():
            raise UserError(f"{run} is not a folder: choose another --output")
        if run.is_dir() and any(run.iterdir()):
            raise UserError(f"{run} holds something else than a training run: choose another --output")
        _begin(config, run)
    tokenizer = masked_lm.load_tokenizer(str(run / "tokenizer"))
    corpus = load_corpus(config.data.sources[0], tokenizer)
    before = json.loads((run / "run.json").read_text())
    if difference := _first_difference(before, _identity(config, corpus, tokenizer), ""):
        raise UserError(f"{run} was begun with another {difference}: choose another --output, or delete that folder")
    return tokenizer, corpus


def _begin(config: Config, run: Path) -> None:
    with new_folder(run) as building:
        tokenizer = _prepare_tokenizer(config, building / "tokenizer")
        corpus = load_corpus(config.data.sources[0], tokenizer)
        model = build_model(config, tokenizer)
        make_data(config, tokenizer, corpus, model, packed=True)
        (building / "run.json").write_text(json.dumps(_identity(config, corpus, tokenizer), indent=2) + "\n")


def _prepare_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """The run's own copy: trained on the text, given by `tokenizer.path`, or that of `model.init_from`."""
    if given := config.model.init_from or config.tokenizer.path:
        masked_lm.load_tokenizer(given)  # refuses what mlmkit cannot use
        tokenizer = AutoTokenizer.from_pretrained(given)
    else:
        log.info("training a %s tokenizer of %d entries", config.tokenizer.kind, config.tokenizer.vocab_size)
        tokenizer = train_tokenizer(
            lambda: read_documents(config.data.sources[0]), config.tokenizer, config.model.max_length
        )
    tokenizer.save_pretrained(folder)
    return masked_lm.load_tokenizer(str(folder))


def build_model(config: Config, tokenizer: Tokenizer, resume_from: Path | None = None) -> MaskedLM:
    """From the checkpoint to resume, from `model.init_from`, or with random weights."""
    if pretrained := resume_from or config.model.init_from:
        return masked_lm.load_pretrained(str(pretrained))[0]
    hf_config = build_config(config.model.architecture, tokenizer, config.model.max_length)
    return MaskedLM(AutoModelForMaskedLM.from_config(hf_config))


def make_data(config: Config, tokenizer: Tokenizer, corpus: Corpus, model: MaskedLM, *, packed: bool) -> TrainingData:
    """The corpus as the model takes it. Raises `UserError` when there is nothing to train on."""
    return TrainingData(
        [corpus],
        config.data.passes[:1],
        tokenizer,
        config.masking,
        max_length=min(config.model.max_length, model.max_length()),
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.train.seed,
        packed=packed,
        position_offset=model.position_offset,
    )


def _identity(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must not change between the start of a run and its resumption, as JSON gives it back."""
    identity = {"config": config.as_dict(), "corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    return json.loads(json.dumps(identity))


def _first_difference(before: object, now: object, name: str) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _first_difference(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return ""
    return "" if before == now else f"{name} ({before!r}, now {now!r})"
