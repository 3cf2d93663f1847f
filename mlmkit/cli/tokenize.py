"""The command that tokenises texts ahead of training."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlmkit.cli.options import CONFIG, PATH, JsonOption, VerifyOption, argument, command, option, option_class, switch
from mlmkit.console import print_json, print_table, say
from mlmkit.errors import require

if TYPE_CHECKING:
    from mlmkit.stored import StoredCorpus


@option_class
class TokenizeOptions(JsonOption, VerifyOption):
    config: str = argument(CONFIG, type=click.Path())
    overrides: tuple[str, ...] = option(
        "--set", "Override a setting of CONFIG. Repeatable.", multiple=True, metavar="TABLE.KEY=VALUE"
    )
    output: Path = option("--output", "Folder to write.", type=PATH, required=True, metavar="OUTPUT")
    words: bool = switch(
        "--words", "Store the word boundaries of training texts too, so that eval can measure on them."
    )
    workers: int | None = option(
        "--workers",
        "Processes; on a cluster, tasks that run at the same time.",
        shown_default="one per core",
        type=click.IntRange(1, 4096),
        metavar="N",
    )
    engine: str | None = option(
        "--engine",
        "Tokenise on a cluster.",
        shown_default="on this machine",
        type=click.Choice(["ray", "slurm"]),
        metavar="ray|slurm",
    )


@command(TokenizeOptions)
def tokenize(options: TokenizeOptions) -> None:
    """Tokenise the texts of CONFIG before training.

    train and eval then read the tokens in place of the texts. OUTPUT gets the tokenizer and a folder per text. The
    result does not depend on the number of workers.

    \b
    For example:
      mlmkit tokenize config.toml --output tokens

    Run the same command again to resume after an interruption.
    """
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.cluster import run_on_cluster
    from mlmkit.distributed import cores
    from mlmkit.train.config_file import load_config
    from mlmkit.train.tokens import TOKENIZER, tokenize_texts

    config = load_config(options.config, options.overrides)
    workers = options.workers or cores()
    run = None
    if options.engine:
        cluster = {"engine": options.engine, "workers": options.workers}
        run = partial(run_on_cluster, tokenizer=options.output / TOKENIZER, **cluster)
    corpora = tokenize_texts(config, options.output, workers=workers, words=options.words, run=run)
    if options.as_json:
        names = ("documents", "tokens", "characters", "bytes", "unknown_characters", "blank", "bad_rows", "fingerprint")
        print_json({name: {key: corpus.record[key] for key in names} for name, corpus in corpora.items()})
        return
    header = ("folder", "documents", "tokens", "bytes per token", "tokens per word", "unknown", "text")
    print_table([_row(corpus) for corpus in corpora.values()], header, align="lrrrrrl", expendable=("bytes per token",))
    say("")
    say("name the folders in place of their texts in the configuration, and the tokenizer:")
    for name, value in _settings(corpora, options.output / TOKENIZER).items():
        say(f"  {name} = {json.dumps(value, ensure_ascii=False)}")


def _row(corpus: "StoredCorpus") -> list[str]:
    size = sum(path.stat().st_size for path in corpus.folder.rglob("*") if path.is_file())
    tokens = max(corpus.tokens, 1)
    counts = [f"{len(corpus):,}", f"{corpus.tokens:,}", f"{size / tokens:.2f}"]
    rates = [f"{corpus.tokens / max(corpus.sizes['words'], 1):.2f}", f"{corpus.unknown_share:.2%}"]
    return [corpus.folder.name, *counts, *rates, corpus.name]


def _settings(corpora: "dict[str, StoredCorpus]", tokenizer: Path) -> dict[str, str | list[str]]:
    folders = {name: str(corpus.folder) for name, corpus in corpora.items()}
    train = [folder for name, folder in folders.items() if name.startswith("train-")]
    held_out = {name: folder for name, folder in folders.items() if not name.startswith("train-")}
    single = len(held_out) == 1
    settings = {"data.held_out" if single else f"held_out.{name}": folder for name, folder in held_out.items()}
    return {"data.train": train if train[1:] else train[0], **settings, "tokenizer.path": str(tokenizer)}
