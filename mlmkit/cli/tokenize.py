"""The command that tokenises texts ahead of training."""

import os
import shlex
from functools import partial
from pathlib import Path

import click

from mlmkit.cli.options import PATH, JsonOption, VerifyOption, argument, command, option, option_class, switch
from mlmkit.console import print_json, print_table, say
from mlmkit.errors import require


@option_class
class TokenizeOptions(VerifyOption, JsonOption):
    config: str = argument(type=click.Path())
    overrides: tuple[str, ...] = option(
        "--set", "Override a setting. Repeatable.", multiple=True, metavar="TABLE.KEY=VALUE"
    )
    output: Path = option("--output", "The folder to write.", type=PATH, required=True)
    workers: int | None = option(
        "--workers", "Processes, or tasks at once on a cluster. Default: one per core.", type=click.IntRange(1, 4096)
    )
    engine: str | None = option(
        "--engine", "Tokenise on a cluster. Default: on this machine.", type=click.Choice(["ray", "slurm"])
    )
    words: bool = switch("--words", "Say where words begin in training texts too, to evaluate on them.")


@command(TokenizeOptions)
def tokenize(options: TokenizeOptions) -> None:
    """Tokenise the texts of CONFIG, which train and eval then read in place of the texts.

    Run the same command again to resume an interrupted one. OUTPUT gets the tokenizer and a folder per text. The result
    does not depend on the number of workers.
    """
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.cluster import run_on_cluster
    from mlmkit.train.config_file import load_config
    from mlmkit.train.tokens import TOKENIZER, tokenize_texts

    config = load_config(options.config, options.overrides)
    workers = options.workers or len(os.sched_getaffinity(0))
    run = None
    if options.engine:
        cluster = {"engine": options.engine, "workers": options.workers}
        run = partial(run_on_cluster, tokenizer=options.output / TOKENIZER, **cluster)
    corpora = tokenize_texts(config, options.output, workers=workers, words=options.words, run=run)
    if options.as_json:
        names = ("documents", "tokens", "characters", "bytes", "unknown_characters", "blank", "bad_rows", "fingerprint")
        print_json({name: {key: corpus.record[key] for key in names} for name, corpus in corpora.items()})
        return
    header = ("text", "documents", "tokens", "bytes on disk per token", "from")
    rows = [
        (
            name,
            f"{len(corpus):,}",
            f"{corpus.tokens:,}",
            f"{_size(corpus.folder) / max(corpus.tokens, 1):.2f}",
            corpus.name,
        )
        for name, corpus in corpora.items()
    ]
    print_table(rows, header, align="lrrrl")
    say("")
    say("use them in a configuration, in place of the texts:")
    for key, folder in [
        ("[tokenizer] path", options.output / TOKENIZER),
        *((name, c.folder) for name, c in corpora.items()),
    ]:
        say(f"  {key}: {shlex.quote(str(folder))}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
