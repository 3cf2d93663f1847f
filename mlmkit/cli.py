"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from mlmkit import __version__
from mlmkit.errors import CheckError, UserError, require

INTERRUPTED, TERMINATED = 130, 143


class _HelpfulGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["demo", "train", "export", "eval", "score", "fill"]  # the order in which they are used


@click.group(cls=_HelpfulGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlmkit")
@click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks.")
def cli(verbose: bool) -> None:
    """Masked language models the whole way: train, export, evaluate, fill.

    MODEL is a Hugging Face checkpoint (a folder or a hub name), or an artifact that `mlmkit export` wrote. Results go
    to standard output; progress and messages go to standard error.
    """
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mlmkit").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error that the user can mend is one line on standard error."""
    # As Ctrl-C does, so that what is half-written is removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        code = cli.main(args=arguments, prog_name="mlmkit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        code = 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mlmkit"
        code = _fail(f"{error.format_message()} (see {command} --help)", 2)
    except (UserError, CheckError) as error:
        if logging.getLogger("mlmkit").level == logging.DEBUG:
            raise
        code = _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted", INTERRUPTED)
    except OSError as error:  # a full disk, a name too long, a folder that went away
        if isinstance(error, BrokenPipeError):  # the reader of our output has left: `mlmkit ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        else:
            code = _fail(f"{error.strerror or error}: {str(error.filename or '')[:200]}".rstrip(": "), 2)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    click.echo(f"mlmkit: {' '.join(message.split())}", err=True)
    return code


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to run it."
    )(command)
    return click.option(
        "--backend", default="auto", show_default=True, metavar="auto|torch|onnx", help="What runs the model."
    )(command)


def _text_options(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option(
        "--blank-line", is_flag=True, help="In a text file, a document is a block of lines, not a line."
    )(command)
    return click.option(
        "--text-field", default="text", show_default=True, help="The key or column that holds the text."
    )(command)


def _json_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


_overwrite_option = click.option("--overwrite", is_flag=True, help="Replace --output if it exists.")


@cli.command()
@click.option("--text", type=click.Path(), help="Train on this text file (a document a line) instead.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("mlmkit-demo"), show_default=True)
def demo(text: str | None, output: Path) -> None:
    """Everything below, in minutes, on Python's own docs.

    Trains a tokenizer and a small BERT, exports it to ONNX with a parity check, evaluates both on held-out documents
    with the same masks, and fills a few. Run again, it goes on from what is already there.
    """
    require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
    from mlmkit.demo import run_demo

    run_demo(output, text)


@cli.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a setting. Repeatable.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The run folder.")
@_json_option
def train(config: str, overrides: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Train a model as CONFIG (a TOML file) says.

    The same command goes on where an interrupted run stopped. The model ends up in OUTPUT/model, a Hugging Face folder.
    """
    from mlmkit.train.config import load_config

    settings = load_config(config, overrides)
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.train.loop import train as run_training

    model = run_training(settings, output)
    last = (output / "log.jsonl").read_text().splitlines()[-1:]
    if as_json:
        _print_json({"model": str(model), "last_log_entry": json.loads(last[0]) if last else None})
    else:
        click.echo(f"model: {model}")


@cli.command()
@click.argument("checkpoint")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The artifact folder to write.")
@click.option("--text", type=click.Path(), help="Prove parity on this text file instead of Python's documentation.")
@_overwrite_option
@_json_option
def export(checkpoint: str, output: Path, text: str | None, overwrite: bool, as_json: bool) -> None:
    """Export CHECKPOINT to ONNX, proven equal to it.

    The proof is made on real text: the same masked tokens through both.

    Nothing is written unless every log-probability agrees within 1e-4.
    """
    require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
    from itertools import islice

    from mlmkit.artifact import MANIFEST
    from mlmkit.corpus import Source, read_documents
    from mlmkit.export.export import export as run_export
    from mlmkit.export.parity import TEXTS
    from mlmkit.files import refuse_existing

    refuse_existing(output, MANIFEST if overwrite else "")
    texts = list(islice(read_documents(Source(text)), TEXTS)) if text else []
    if text and not texts:
        raise UserError(f"{text}: no documents in it")
    parity = run_export(checkpoint, output, texts=texts, overwrite=overwrite)
    if as_json:
        _print_json({"artifact": str(output), "parity": parity.as_dict()})
        return
    click.echo(
        f"parity over {parity.masked} masked tokens: largest difference {parity.max_log_prob_difference:.1e} nats, "
        f"mean {parity.mean_log_prob_difference:.1e}; same rank {parity.rank_agreement:.2%}"
    )
    click.echo(f"artifact: {output}")


@cli.command(name="eval")
@click.argument("model")
@click.option("--set", "sets", multiple=True, required=True, metavar="FILE", help="Text to measure on. Repeatable.")
@click.option("--mask-seed", default=0, show_default=True, help="Seed of the masks.")
@click.option("--metric", "metrics", multiple=True, metavar="masked|pseudo", help="Repeatable. Default: masked.")
@click.option("--mask-prob", default=0.15, show_default=True, help="Share of tokens to select.")
@click.option("--replace-prob", default=0.8, show_default=True, help="Share of those that become the mask.")
@click.option("--random-prob", default=0.1, show_default=True, help="Share of those that become a random token.")
@click.option("--whole-word", is_flag=True, help="Select whole words.")
@click.option("--pll", default="original", show_default=True, metavar="original|within-word", help="Pseudo-likelihood.")
@click.option("--pseudo-sample", default=1.0, show_default=True, help="Share of tokens that pseudo scores.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Tokens a batch, padding included. Default: by device.",
)
@_text_options
@click.option("--output", type=click.Path(path_type=Path), help="Folder for result.json and tokens.parquet.")
@_overwrite_option
@_model_options
@_json_option
def evaluate(
    model: str,
    sets: tuple[str, ...],
    mask_seed: int,
    metrics: tuple[str, ...],
    mask_prob: float,
    replace_prob: float,
    random_prob: float,
    whole_word: bool,
    pll: str,
    pseudo_sample: float,
    batch_tokens: int,
    text_field: str,
    blank_line: bool,
    output: Path | None,
    overwrite: bool,
    backend: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure MODEL on text, with masks that anyone can reproduce.

    A set is a text file (a document a line), .jsonl, .parquet, or hub:NAME[:CONFIG][@SPLIT]. With several sets, OUTPUT
    holds a folder for each.
    """
    from mlmkit.backends import load
    from mlmkit.corpus import HUB, Source, existing_file
    from mlmkit.eval.evaluate import PseudoOptions, write_evaluation
    from mlmkit.eval.evaluate import evaluate as run_evaluation
    from mlmkit.files import refuse_existing
    from mlmkit.masking import MaskRecipe

    recipe = MaskRecipe(mask_prob, replace_prob, random_prob, whole_word)
    pseudo = PseudoOptions(pll, pseudo_sample)
    folders = _result_folders(output, sets)
    for location, folder in zip(sets, folders, strict=True):
        if not location.startswith(HUB):
            existing_file(location)
        if folder:
            refuse_existing(folder, "result.json" if overwrite else "")
    loaded = load(model, backend, device)
    results = []
    for location, folder in zip(sets, folders, strict=True):
        evaluation = run_evaluation(
            loaded,
            Source(location, text_field, blank_line),
            metrics=metrics or ("masked",),
            recipe=recipe,
            mask_seed=mask_seed,
            pseudo=pseudo,
            batch_tokens=batch_tokens,
        )
        if folder:
            write_evaluation(evaluation, folder, overwrite=overwrite)
        results.append(evaluation.result)
        if not as_json:
            _print_result(evaluation.result, folder)
    if as_json:
        _print_json(results[0] if len(results) == 1 else {"results": results})


def _result_folders(output: Path | None, sets: tuple[str, ...]) -> list[Path | None]:
    if output is None or len(sets) == 1:
        return [output] * len(sets)
    names = [Path(location.replace(":", "-")).stem for location in sets]
    if len(set(names)) < len(names):
        raise UserError("two sets have the same name: evaluate them into different --output folders")
    return [output / name for name in names]


def _print_result(result: dict[str, Any], folder: Path | None) -> None:
    corpus = result["corpus"]
    click.echo(f"{corpus['source']['location']}: {corpus['documents']} documents, {corpus['tokens']} tokens")
    for name, metric in result["metrics"].items():
        value, low, high = (
            f"{metric[key]:.4f}" if metric[key] is not None else "-" for key in ("value", "low", "high")
        )
        click.echo(f"  {name:32} {value:>14}   95 % [{low}, {high}]")
    if corpus["windowed_documents"]:
        click.echo(f"  {corpus['windowed_documents']} documents were longer than the model takes, and read in windows")
    click.echo(f"  {'mask_digest':32} {result['mask_digest']}")
    if folder:
        click.echo(f"result: {folder}")


@cli.command()
@click.argument("model")
@click.argument("file", default="-")
@click.option("--pll", default="original", show_default=True, metavar="original|within-word", help="Which variant.")
@click.option("--per-token", is_flag=True, help="Show each token's log-probability.")
@_text_options
@_model_options
@_json_option
def score(
    model: str,
    file: str,
    pll: str,
    per_token: bool,
    text_field: str,
    blank_line: bool,
    backend: str,
    device: str,
    as_json: bool,
) -> None:
    """Pseudo-log-likelihood of each text in FILE.

    FILE is standard input by default; the logarithm is the natural one.

    Prints a line a text: the sum, the number of tokens, the text. Lines of white space only are left out.
    """
    from mlmkit.backends import load
    from mlmkit.corpus import Source, read_documents
    from mlmkit.eval.pseudo import score_texts

    location = "/dev/stdin" if file == "-" else file
    texts = list(read_documents(Source(location, text_field, blank_line)))
    if not texts:
        raise UserError(f"{'standard input' if file == '-' else file}: there is no text to score")
    loaded = load(model, backend, device)
    scores = score_texts(loaded, texts, variant=pll)
    if as_json:
        _print_json({"pll": pll, "texts": [_score_json(loaded, item, per_token) for item in scores]})
        return
    for item in scores:
        text = " ".join(item.text.splitlines())
        click.echo(f"{item.pseudo_log_likelihood:.4f}\t{len(item.token_ids)}\t{text}")
        if per_token:
            for id, log_prob in zip(item.token_ids.tolist(), item.log_prob.tolist(), strict=True):
                click.echo(f"    {log_prob:9.4f}  {loaded.tokenizer.token(id)}")


def _score_json(loaded: Any, item: Any, per_token: bool) -> dict[str, Any]:
    entry = {
        "text": item.text,
        "pseudo_log_likelihood": item.pseudo_log_likelihood,
        "tokens": len(item.token_ids),
    }
    if per_token:
        entry["per_token"] = [
            {"token": id, "token_str": loaded.tokenizer.token(id), "log_prob": log_prob}
            for id, log_prob in zip(item.token_ids.tolist(), item.log_prob.tolist(), strict=True)
        ]
    return entry


@cli.command()
@click.argument("model")
@click.argument("text")
@click.option("--top-k", default=5, show_default=True, help="Candidates a mask.")
@click.option("--targets", multiple=True, help="Rank these only. Repeatable, or separated by commas.")
@_model_options
@_json_option
def fill(model: str, text: str, top_k: int, targets: tuple[str, ...], backend: str, device: str, as_json: bool) -> None:
    """Fill each mask in TEXT.

    For example: mlmkit fill MODEL "O rato [MASK] a roupa do rei de Roma."

    The mask is written as the model's tokenizer writes it: [MASK] for BERT, <mask> for RoBERTa.
    """
    from mlmkit.backends import load
    from mlmkit.fill import fill as run_fill

    wanted = [target.strip() for group in targets for target in group.split(",") if target.strip()]
    if targets and not wanted:
        raise UserError("--targets names no target")
    candidates = run_fill(load(model, backend, device), text, top_k=top_k, targets=wanted)
    if as_json:
        _print_json({"text": text, "masks": candidates})
        return
    for number, row in enumerate(candidates, start=1):
        if len(candidates) > 1:
            click.echo(f"mask {number}")
        for candidate in row:
            click.echo(f"{candidate['score']:8.4f}  {candidate['token_str']:16}  {candidate['sequence']}")
