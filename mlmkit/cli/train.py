"""The commands that train and average: demo, train, average."""

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mlmkit.cli.options import CONFIG, PATH, JsonOption, VerifyOption, argument, command, option, option_class, switch
from mlmkit.collector import collector_paused
from mlmkit.console import print_json, print_table, say
from mlmkit.errors import UserError, require


@option_class
class DemoOptions:
    text: str | None = option(
        "--text", "Train on this text file instead (one document per line).", type=click.Path(), metavar="FILE"
    )
    output: Path = option(
        "--output",
        "Folder for everything that the demo writes.",
        type=PATH,
        default=Path("mlmkit-demo"),
        metavar="OUTPUT",
    )


@command(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Try everything in a few minutes.

    Trains a tokenizer and a small BERT on Python's own documentation, exports the model to ONNX with a parity check,
    evaluates both on held-out documents with the same masks, and fills a few masks.

    Run the same command again to resume after an interruption.
    """
    require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
    from mlmkit.demo import run_demo

    run_demo(options.output, options.text)


@option_class
class TrainOptions(JsonOption, VerifyOption):
    config: str = argument(CONFIG, type=click.Path(), default="")
    output: Path | None = option(
        "--output", "Folder of the run. Only --dry-run needs none.", type=PATH, metavar="OUTPUT"
    )
    overrides: tuple[str, ...] = option(
        "--set", "Override a setting of CONFIG. Repeatable.", multiple=True, metavar="TABLE.KEY=VALUE"
    )
    print_config: bool = switch("--print-config", "Print a CONFIG with every setting and its default, and exit.")
    dry_run: bool = switch("--dry-run", "Show what would be trained and what it costs, and exit.")
    sweeps: tuple[str, ...] = option(
        "--sweep",
        "Train once per value and compare on held-out text. Repeat to try all combinations.",
        multiple=True,
        metavar="TABLE.KEY=VALUE,VALUE,...",
    )
    start_from: Path | None = option(
        "--from",
        "Branch from a checkpoint of a run: keep its weights, optimiser state and place in the data. CONFIG says what "
        "changes.",
        type=PATH,
        metavar="CHECKPOINT",
    )


@command(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a model as CONFIG describes.

    \b
    For example:
      mlmkit train --print-config > config.toml     # then set data.train in it
      mlmkit train config.toml --output run
      mlmkit train config.toml --output run2 --set optim.lr=5e-4
      torchrun --nproc-per-node 2 -m mlmkit train config.toml --output run

    Presets for model.architecture: bert-tiny, bert-mini, bert-small, bert-base, bert-large, roberta-base, distilbert,
    modernbert-tiny, modernbert-base, modernbert-large. It also takes the path of a Hugging Face config.json.

    The model is saved to OUTPUT/model, a Hugging Face folder. Run the same command again to resume after an
    interruption.
    """
    if options.print_config:
        if any(value for name, value in vars(options).items() if name != "print_config"):
            raise UserError("--print-config prints the defaults: leave out CONFIG and all other options")
        template = Path(__file__).parent.parent / "train" / "template.toml"
        click.echo(template.read_text(encoding="utf-8"), nl=False)
        return
    if not options.config:
        raise click.UsageError("Missing argument 'CONFIG'.")
    from mlmkit.distributed import said_once
    from mlmkit.train.config_file import load_config

    with said_once():
        base = None
        if options.start_from:
            require("train", "torch", "transformers", "safetensors")
            from mlmkit.train.checkpoints import branch_config

            base = branch_config(options.output or Path(), options.start_from)
        settings = load_config(options.config, options.overrides, base)
        if options.dry_run and options.sweeps:
            raise UserError("--dry-run shows a single run: leave out --sweep")
        if not options.dry_run and options.output is None:
            raise UserError("--output is missing: name the run folder")
        require("train", "torch", "transformers", "safetensors")
    if options.dry_run:
        from mlmkit.train.cost import dry_run, figures, first_texts

        reports = dry_run(settings, options.start_from)
        if options.as_json:
            tables = {name: asdict(report) for name, report in reports.items()}
            print_json(tables.get("", tables))
        else:
            for name, report in reports.items():
                if name:
                    say(f"phase {name}")
                print_table(figures(report).items())
                for line in first_texts(report):
                    say(line)
    elif options.output and options.sweeps:
        from mlmkit.train.sweep import check, make_trials, sweep

        with said_once():
            trials = make_trials(options.config, options.overrides, options.sweeps, base)
        if results := sweep(trials, options.output, options.start_from):  # on the first rank
            if options.as_json:
                print_json(results)
            else:
                _print_sweep(results, options.output)
            check(results)
    elif options.output:
        with collector_paused():
            from mlmkit.train.loop import train as run_training
        from mlmkit.train.summary import summarise

        run_training(settings, options.output, options.start_from)
        if os.environ.get("RANK", "0") == "0":
            outcome = summarise(options.output, settings)
            print_json(outcome) if options.as_json else _print_summary(outcome)


def _print_sweep(results: dict[str, Any], output: Path) -> None:
    from mlmkit.train.sweep import ACCURACY, INTERVAL, explain, table

    header, *rows = table(results)
    others = header[header.index(ACCURACY) + 1 : -1]
    print_table(rows, header, align="r" * (len(header) - 1), expendable=(ACCURACY, INTERVAL, *reversed(others)))
    for line in explain(results):
        say(line)
    say("")
    plot = {"plot": output / "sweep.png"} if (output / "sweep.png").exists() else {}
    lowest = {"lowest loss": output / results["lowest"] / "model"}
    print_table(({"table": output / "sweep.md", "details": output / "sweep.json"} | plot | lowest).items())


def _print_summary(summary: dict[str, Any]) -> None:
    from mlmkit.train.summary import held_out_table

    say(f"model: {summary['model']}")
    for name, values in summary["held_out"].items():
        if best := values["best"]:
            say(f"best checkpoint on {name}: {best['checkpoint']} ({best['value']:.4f})")
    if summary["loss_curve"]:
        say(f"loss curve: {summary['loss_curve']}")
    if summary["held_out"]:
        header, *rows = held_out_table(summary)
        say("")
        say("held-out masked cross-entropy, nats (95 % interval); unigram entropy to beat")
        print_table(rows, header, align="lrrrr")
    say("")
    say("next:")
    for line in summary["next"]:
        say(f"  {line}")


@option_class
class AverageOptions(JsonOption):
    checkpoints: tuple[str, ...] = argument(
        "Folders of checkpoints with the same configuration, tokenizer and tensors.",
        nargs=-1,
        required=True,
        metavar="CHECKPOINT_A CHECKPOINT_B [...]",
    )
    output: Path = option("--output", "Folder to write the model to.", type=PATH, required=True, metavar="OUTPUT")
    weights: str | None = option(
        "--weights", "Weight of each checkpoint.", shown_default="all equal", metavar="N,N,..."
    )
    overwrite: bool = switch("--overwrite", "Replace an existing model.")


@command(AverageOptions)
def average(options: AverageOptions) -> None:
    """Average the weights of checkpoints.

    \b
    For example:
      mlmkit average run/checkpoints/step-* --output mean

    The mean is computed in float64.
    """
    try:
        weights = [float(each) for each in options.weights.split(",")] if options.weights else []
    except ValueError:
        raise UserError(f"--weights {options.weights}: write numbers separated by commas") from None
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.average import average as run_average

    shares = run_average(options.checkpoints, options.output, weights, overwrite=options.overwrite)
    model, averaged = str(options.output), list(options.checkpoints)
    if options.as_json:
        print_json({"model": model, "checkpoints": averaged, "shares": shares})
        return
    print_table([(f"{share:.2%}", checkpoint) for checkpoint, share in zip(averaged, shares, strict=True)], align="r")
    say(f"model: {model}")
    say(f"evaluate it: mlmkit eval {shlex.quote(model)} --set TEXT --output RESULT")
