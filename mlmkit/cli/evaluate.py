"""The commands that measure: eval, compare, report, score."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from mlmkit.cli.options import json_option, model_options, overwrite_option, text_options
from mlmkit.console import print_json, say
from mlmkit.errors import UserError

PAIRS = "pairs"


@click.command(name="eval")
@click.argument("model", required=False)
@click.option("--set", "sets", multiple=True, metavar="NAME|FILE", help="What to measure on. Repeatable.")
@click.option("--list-sets", is_flag=True, help="Show the sets that have names, and stop.")
@click.option("--data-dir", help="Where local copies of the sets lie. Default: $MLMKIT_DATA.")
@click.option("--metric", "metrics", multiple=True, metavar="masked|pseudo|pairs", help="Repeatable. Default: by set.")
@click.option("--mask-seed", type=int, default=None, help="Seed of the masks. Default: 0.")
@click.option("--mask-seeds", metavar="N,N,...", help="Several seeds, for the spread between masks.")
@click.option("--mask-prob", default=0.15, show_default=True, help="Share of tokens to select.")
@click.option("--replace-prob", default=0.8, show_default=True, help="Share of those that become the mask.")
@click.option("--random-prob", default=0.1, show_default=True, help="Share of those that become a random token.")
@click.option("--whole-word", is_flag=True, help="Select whole words.")
@click.option("--pll", default="original", show_default=True, metavar="original|within-word", help="Pseudo-likelihood.")
@click.option("--pseudo-sample", default=1.0, show_default=True, help="Share of tokens that pseudo scores.")
@click.option("--batch-tokens", type=click.IntRange(min=0), default=0, metavar="N", help="Tokens a batch, padding too.")
@click.option("--allow-batch-coupling", is_flag=True, help="Measure a dynamically quantized model all the same.")
@text_options
@click.option("--output", type=click.Path(path_type=Path), help="Folder for result.json, the tables and report.html.")
@overwrite_option
@model_options
@json_option
def evaluate(
    model: str | None,
    sets: tuple[str, ...],
    list_sets: bool,
    data_dir: str | None,
    metrics: tuple[str, ...],
    mask_seed: int | None,
    mask_seeds: str | None,
    mask_prob: float,
    replace_prob: float,
    random_prob: float,
    whole_word: bool,
    pll: str,
    pseudo_sample: float,
    batch_tokens: int,
    allow_batch_coupling: bool,
    text_field: str,
    blank_line: bool,
    output: Path | None,
    overwrite: bool,
    backend: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure MODEL on text or minimal pairs, with masks that anyone can reproduce.

    A set is a name that --list-sets shows, a .toml file that declares one, a text file (a document a line), .jsonl,
    .csv, .tsv, .parquet, or hub:NAME[:CONFIG][@SPLIT]. With several sets, OUTPUT holds a folder for each.

    The same command goes on where an interrupted one stopped. torchrun -m mlmkit eval shares the work.
    """
    from mlmkit.eval.sets import data_folder, find_set

    data = data_folder(data_dir)
    if list_sets:
        _list_sets(data, as_json)
        return
    if not model:
        raise click.UsageError("Missing argument 'MODEL'.")
    if not sets:
        raise click.UsageError("Missing option '--set'.")
    from mlmkit.backends import load
    from mlmkit.distributed import claim_gpu, said_once
    from mlmkit.distributed import ranks as find_ranks
    from mlmkit.eval.evaluate import evaluate as run_evaluation
    from mlmkit.eval.passes import Settings
    from mlmkit.masking import MaskRecipe

    ranks = find_ranks()
    with said_once():
        if ranks.world > 1 and output is None:
            raise UserError("under torchrun the ranks meet in a folder: name one with --output")
        options = {"text_field": text_field, "blank_line": blank_line, "pairs": PAIRS in metrics}
        requests = [find_set(name, data, **options) for name in sets]
        common: dict[str, Any] = {
            "recipe": MaskRecipe(mask_prob, replace_prob, random_prob, whole_word),
            "mask_seeds": _seeds(mask_seed, mask_seeds),
            "variant": pll,
            "pseudo_sample": pseudo_sample,
        }
        settings = [Settings(metrics=_metrics(request, metrics), **common) for request in requests]
    claim_gpu(ranks)
    loaded = load(model, backend, device)
    results = []
    with ExitStack() as stack:
        base = output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "result"
        for request, chosen, folder in zip(requests, settings, _folders(base, requests), strict=True):
            result = run_evaluation(
                loaded,
                request.read(loaded.tokenizer),
                chosen,
                folder,
                declared=request.declared,
                batch_tokens=batch_tokens,
                allow_batch_coupling=allow_batch_coupling,
                overwrite=overwrite,
                report=output is not None,
                ranks=ranks,
            )
            if not ranks.is_first:
                continue
            results.append(result)
            if not as_json:
                _print_result(result, folder if output else None)
    if as_json and ranks.is_first:
        print_json(results[0] if len(results) == 1 else {"results": results})
    ranks.close()


def _metrics(request: Any, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Those asked for, or the set's own."""
    if request.task == PAIRS:
        if set(metrics) - {PAIRS}:
            raise UserError(f"{request.name} holds pairs, which are measured by --metric pairs alone")
        return ("pseudo",)
    if PAIRS in metrics:
        raise UserError(f"{request.name} holds text, not pairs: choose --metric masked or pseudo")
    return metrics or ("masked",)


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...]:
    if seeds is None:
        return (seed or 0,)
    if seed is not None:
        raise UserError("name the seeds with --mask-seed or --mask-seeds, not with both")
    try:
        return tuple(int(item) for item in seeds.split(","))
    except ValueError:
        raise UserError(f"--mask-seeds takes numbers separated by commas, not {seeds!r}") from None


def _folders(output: Path, requests: list[Any]) -> list[Path]:
    if len(requests) == 1:
        return [output]
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        raise UserError("two sets have the same name: evaluate them into different --output folders")
    return [output / name for name in names]


def _list_sets(data: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from mlmkit.eval.sets import built_in_sets

    rows = []
    for item in built_in_sets():
        is_local = bool(data and item.local and (data / item.local).exists())
        rows.append({**asdict(item), "available": "local" if is_local else "hub" if item.hub else "missing"})
    if as_json:
        print_json({"sets": rows})
        return
    for row in rows:
        say(f"{row['name']:17} {row['task']:6} {row['language']:3} {row['available']:8} {row['description']}")


def _print_result(result: dict[str, Any], folder: Path | None) -> None:
    from mlmkit.eval.metrics import describe_unknown

    corpus = result["corpus"]
    source = corpus["source"]
    say(f"{source['set'] or source['location']}: {corpus['documents']} documents, {corpus['tokens']} tokens")
    for name, metric in result["metrics"].items():
        error = f"   standard error {_number(metric['standard_error'])}" if metric.get("standard_error") else ""
        say(f"  {name:32} {_number(metric['value']):>14}   95 % {_range(metric)}{error}")
    if "mask_seeds" in result:
        seeds = result["mask_seeds"]
        for name, found in seeds["spread"].items():
            say(
                f"  {name:32} {_number(found['mean']):>14}   sd {_number(found['standard_deviation'])} "
                f"over {len(seeds['by_seed'])} mask seeds"
            )
    pairs = result.get("pairs", {})
    for name, group in pairs.get("phenomena", {}).items():
        ties = f"   {group['ties']} ties" if group["ties"] else ""
        accuracy = group["pair_accuracy"]
        value = f"{_number(accuracy['value']):>14}   95 % {_range(accuracy)}"
        say(f"  {name:32} {value}   {group['pairs']} pairs{ties}")
    for name, problem in (("ties", "are ties, which"), ("unscored", "have a sentence without a scored token, and")):
        if pairs.get(name):
            say(f"  {pairs[name]} of {pairs['pairs']} pairs {problem} count as wrong")
    if unknown := describe_unknown(result["unknown"]):
        say(f"  {unknown}")
    if corpus["windowed_documents"]:
        say(f"  {corpus['windowed_documents']} documents were longer than the model takes, and read in windows")
    if corpus["empty_texts"]:
        say(f"  {corpus['empty_texts']} empty texts were left out")
    if "mask_digest" in result:
        say(f"  {'mask_digest':32} {result['mask_digest']}")
    if folder:
        say(f"result: {folder}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _range(metric: dict[str, float | None]) -> str:
    low, high = metric["low"], metric["high"]
    return "-" if low is high is None else f"[{_number(low)}, {_number(high)}]"


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULT_A RESULT_B [RESULT ...]")
@click.option("--output", type=click.Path(path_type=Path), help="Write a page, compare.html, into this folder.")
@click.option("--top", default=20, show_default=True, type=click.IntRange(min=0), help="How many tokens to show.")
@json_option
def compare(results: tuple[str, ...], output: Path | None, top: int, as_json: bool) -> None:
    """Compare evaluations of the same text and masks, each with RESULT_A.

    Shows each metric's difference with its paired interval and p-value, overall and by slice, and the tokens where the
    two differ most. Results on another text or with other masks are refused.
    """
    from mlmkit.eval.compare import compare as run_comparison
    from mlmkit.eval.compare_page import print_lines, write_page

    if len(results) < 2:
        raise UserError("name two results or more to compare")
    comparison = run_comparison([Path(item) for item in results], top)
    if output:
        write_page(comparison, output)
    if as_json:
        print_json(comparison)
        return
    for line in print_lines(comparison):
        say(line)
    if output:
        say(f"page: {output / 'compare.html'}")


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
def report(result: Path) -> None:
    """Write RESULT/report.html again, from what is stored there."""
    from mlmkit.errors import require
    from mlmkit.eval.report import write_report
    from mlmkit.eval.stored import load_result

    require("report", "jinja2", "matplotlib")
    if not write_report(load_result(result)):
        raise UserError(f"{result} is read-only: copy it to where its report may be written")
    say(result / "report.html")


@click.command()
@click.argument("model")
@click.argument("file", default="-")
@click.option("--pll", default="original", show_default=True, metavar="original|within-word", help="Which variant.")
@click.option("--per-token", is_flag=True, help="Show each token's log-probability.")
@click.option("--allow-batch-coupling", is_flag=True, help="Score with a dynamically quantized model all the same.")
@text_options
@model_options
@json_option
def score(
    model: str,
    file: str,
    pll: str,
    per_token: bool,
    allow_batch_coupling: bool,
    text_field: str,
    blank_line: bool,
    backend: str,
    device: str,
    as_json: bool,
) -> None:
    """Pseudo-log-likelihood of each text in FILE.

    FILE is standard input by default; the logarithm is the natural one.

    Prints a line for each text: the sum ("-" without a scored token), the number of tokens, the text. Lines of white
    space only are left out.
    """
    from mlmkit.backends import load
    from mlmkit.documents import Source, read_documents
    from mlmkit.eval.pseudo import score_texts

    location = "/dev/stdin" if file == "-" else file
    texts = list(read_documents(Source(location, text_field, blank_line)))
    if not texts:
        raise UserError(f"{'standard input' if file == '-' else file}: there is no text to score")
    loaded = load(model, backend, device)
    scores = score_texts(loaded, texts, variant=pll, allow_batch_coupling=allow_batch_coupling)
    if as_json:
        print_json({"pll": pll, "texts": [_score_json(loaded, item, per_token) for item in scores]})
        return
    for item in scores:
        text = " ".join(item.text.splitlines())
        say(f"{_number(item.pseudo_log_likelihood)}\t{len(item.token_ids)}\t{text}")
        if per_token:
            for id, log_prob in zip(item.token_ids.tolist(), item.log_prob.tolist(), strict=True):
                say(f"    {log_prob:9.4f}  {loaded.tokenizer.token(id)}")


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
