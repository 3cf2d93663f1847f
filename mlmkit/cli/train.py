"""The commands that train: demo, train."""

import os
from dataclasses import asdict
from pathlib import Path

import click

from mlmkit.cli.options import json_option
from mlmkit.console import print_json, say
from mlmkit.errors import UserError, require


@click.command()
@click.option("--text", type=click.Path(), help="Train on this text file (one document per line) instead.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("mlmkit-demo"), show_default=True)
def demo(text: str | None, output: Path) -> None:
    """Everything below, in minutes, on Python's own docs.

    Trains a tokenizer and a small BERT, exports it to ONNX with a parity check, evaluates both on held-out documents
    with the same masks, and fills a few masks. Run it again to resume from what is already there.
    """
    require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
    from mlmkit.demo import run_demo

    run_demo(output, text)


@click.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a setting. Repeatable.")
@click.option("--output", type=click.Path(path_type=Path), help="The run folder.")
@click.option("--dry-run", "dry", is_flag=True, help="Show what would be trained and what it costs, and exit.")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="TABLE.KEY=VALUE,VALUE,...",
    help="Train once per value and compare on data.held_out. Repeat to try all combinations.",
)
@json_option
def train(
    config: str, overrides: tuple[str, ...], output: Path | None, dry: bool, sweeps: tuple[str, ...], as_json: bool
) -> None:
    """Train a model from CONFIG (a TOML file).

    Run the same command again to resume an interrupted run. The model is saved to OUTPUT/model, a Hugging Face folder.
    On several GPUs: torchrun --nproc-per-node N -m mlmkit train CONFIG --output OUTPUT.
    """
    from mlmkit.distributed import said_once
    from mlmkit.train.config import load_config

    with said_once():
        settings = load_config(config, overrides)
        if dry and sweeps:
            raise UserError("--dry-run shows a single run: leave out --sweep")
        if not dry and output is None:
            raise UserError("--output is missing: name the run folder")
        require("train", "torch", "transformers", "safetensors")
    if dry:
        from mlmkit.train.cost import dry_run, lines

        summary = dry_run(settings)
        if as_json:
            print_json(asdict(summary))
        else:
            for line in lines(summary):
                say(line)
    elif output is not None and sweeps:
        from mlmkit.train.sweep import check, make_trials, sweep, table

        with said_once():
            trials = make_trials(config, overrides, sweeps)
        if results := sweep(trials, output):  # on the first rank
            if as_json:
                print_json(results)
            else:
                for line in table(results).splitlines():
                    say(line)
            check(results)
    elif output is not None:
        from mlmkit.train.log import read_log
        from mlmkit.train.loop import train as run_training

        model = run_training(settings, output)
        if os.environ.get("RANK", "0") != "0":
            return
        if as_json:
            last = [entry for entry in read_log(output) if "loss" in entry][-1:]
            print_json({"model": str(model), "last_log_entry": last[0] if last else None})
        else:
            say(f"model: {model}")
