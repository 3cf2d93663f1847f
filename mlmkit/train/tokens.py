"""Tokenise the texts of a training configuration ahead of training: `mlmkit tokenize CONFIG --output TOKENS`.

TOKENS/tokenizer/     the tokenizer, which the configuration then names as tokenizer.path
TOKENS/train-1/ ...   a `StoredCorpus` per training text
TOKENS/held-out/      one per held-out text, by its name
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from mlmkit.cluster import make_task, tasks_of
from mlmkit.errors import UserError
from mlmkit.files import atomic, content, locked, read_record, write_record
from mlmkit.hub import HUB
from mlmkit.locations import Source, is_remote
from mlmkit.progress import progress
from mlmkit.shards import finish, plan_corpus, warn_of_losses
from mlmkit.stored import StoredCorpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config
from mlmkit.train.workers import from_workers

RECORD, TOKENIZER = "tokenize.json", "tokenizer"


def tokenize_texts(
    config: Config, output: Path, *, workers: int, words: bool = False, run: Callable[[list[Path]], None] | None = None
) -> dict[str, StoredCorpus]:
    """Tokenise all texts of a configuration into `output`, and return them by name.

    With `words`, every text says where its words begin; otherwise held-out texts do, and training texts if a phase
    masks whole words. `run` makes the shards of planned folders; by default, `workers` processes of this machine do.

    A repeated call resumes. Raises `UserError` for what cannot be read, and for an `output` begun with other settings.
    """
    with locked(output):
        texts = _texts(config)
        tokenizer = _begin(config, texts, output)
        for name, source in texts.items():
            needs_words = words or config.needs_words or name in config.held_out_sources
            plan_corpus(source, tokenizer, output / name, words=needs_words)
        folders = [output / name for name in texts]
        (run or partial(_run_here, workers=workers))(folders)
        corpora = {name: finish(output / name) for name in texts}
        for corpus in corpora.values():
            warn_of_losses(corpus)
        return corpora


def _texts(config: Config) -> dict[str, Source]:
    texts = {f"train-{number}": _absolute(source) for number, source in enumerate(config.train_sources, start=1)}
    if taken := [name for name in config.held_out_sources if name.startswith("train-")]:
        raise UserError(f"held_out.{taken[0]}: a training text has this name: choose another")
    return texts | {name: _absolute(source) for name, source in config.held_out_sources.items()}


def _absolute(source: Source) -> Source:
    """The source with absolute paths: workers of a cluster, and a command that resumes, may run elsewhere."""
    kept = (location.startswith(HUB) or is_remote(location) for location in source.locations)
    paths = (each if keep else str(Path(each).absolute()) for each, keep in zip(source.locations, kept, strict=True))
    return replace(source, location=tuple(paths))


def _begin(config: Config, texts: dict[str, Source], output: Path) -> Tokenizer:
    """Create the folder with its tokenizer, or check that it was begun with the same settings."""
    from mlmkit.train.start import prepare_tokenizer

    sources = {name: asdict(source) for name, source in texts.items()}
    settings = {"tokenizer": asdict(config.tokenizer), "init_from": config.model.init_from, "texts": sources}
    settings = json.loads(json.dumps(settings))
    if not (output / RECORD).exists():
        if output.exists() and not output.is_dir():
            raise UserError(f"{output} is not a folder: choose another --output")
        if output.exists() and content(output):
            raise UserError(f"{output} holds something other than tokens: choose another --output")
        with atomic(output, folder=True) as building:
            prepare_tokenizer(config, building / TOKENIZER)
            write_record(building / RECORD, settings)
    elif (before := read_record(output / RECORD, f"delete {output}")) != settings:
        names = {"texts": "other texts", "tokenizer": "another tokenizer", "init_from": "another model.init_from"}
        difference = next(names[name] for name in names if before.get(name) != settings[name])
        raise UserError(f"{output} was begun with {difference}: choose another --output, or delete that folder")
    return Tokenizer.from_folder(output / TOKENIZER)


def _run_here(folders: list[Path], workers: int) -> None:
    tasks = tasks_of(folders)
    with progress("tokenising", len(tasks), "parts") as bar:
        for _ in from_workers(partial(_make, folders[0].parent / TOKENIZER, tasks), min(workers, len(tasks))):
            bar.advance()


def _make(tokenizer: Path, tasks: list[tuple[Path, int]], *, index: int, every: int) -> Iterator[int]:
    for number, task in enumerate(tasks[index::every]):
        make_task(tokenizer, task)
        yield number
