"""The commands that measure: eval, compare, report, score."""

import math
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlmkit.cli.options import (
    PATH,
    JsonOption,
    ModelOptions,
    TextOptions,
    VerifyOption,
    argument,
    command,
    option,
    option_class,
    switch,
)
from mlmkit.console import print_json, print_table, say
from mlmkit.errors import UserError, require

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlmkit.distributed import Ranks
    from mlmkit.eval.result import Result
    from mlmkit.eval.rows import Settings
    from mlmkit.eval.score_texts import TextScore
    from mlmkit.eval.sets import Request
    from mlmkit.tokenizer import Tokenizer

PAIRS = "pairs"


@option_class
class EvalOptions(VerifyOption, JsonOption, ModelOptions, TextOptions):
    model: str = argument(default="")
    sets: tuple[str, ...] = option("--set", "What to measure on. Repeatable.", multiple=True, metavar="NAME|FILE")
    list_sets: bool = switch("--list-sets", "List the built-in sets and exit.")
    every: bool = switch("--every", "MODEL is the folder of a training run: measure each checkpoint that it has kept.")
    data_dir: str | None = option("--data-dir", "Folder with local copies of the sets. Default: $MLMKIT_DATA.")
    metrics: tuple[str, ...] = option(
        "--metric", "Repeatable. Default: by set.", multiple=True, metavar="masked|pseudo|pairs"
    )
    mask_seed: int | None = option("--mask-seed", "Seed of the masks. Default: 0.", type=int)
    mask_seeds: str | None = option(
        "--mask-seeds", "Several seeds, to show the spread between masks.", metavar="N,N,..."
    )
    mask_prob: float = option("--mask-prob", "Share of tokens to select.", default=0.15)
    replace_prob: float = option("--replace-prob", "Share of those that become the mask.", default=0.8)
    random_prob: float = option("--random-prob", "Share of those that become a random token.", default=0.1)
    whole_word: bool = switch("--whole-word", "Select whole words.")
    pll: str | None = option(
        "--pll", "Pseudo-likelihood. Default: by set, else original.", metavar="original|within-word"
    )
    pseudo_sample: float = option("--pseudo-sample", "Share of tokens to score for pseudo.", default=1.0)
    batch_tokens: int | None = option(
        "--batch-tokens", "Tokens per padded batch. Default: by device.", type=click.IntRange(min=0), metavar="N"
    )
    allow_batch_coupling: bool = switch("--allow-batch-coupling", "Measure a dynamically quantized model anyway.")
    output: Path | None = option("--output", "Folder for result.json, the tables and report.html.", type=PATH)
    overwrite: bool = switch("--overwrite", "Replace an existing result.")


@command(EvalOptions, "eval")
def evaluate(options: EvalOptions) -> None:
    """Measure MODEL on text, minimal pairs, choices or cloze items, with masks that anyone can reproduce.

    A set is a name from --list-sets, a .toml file that declares one, a text file (one document per line), .jsonl,
    .csv, .tsv, .parquet, or hub:NAME[:CONFIG][@SPLIT]. With several sets, OUTPUT holds a folder for each.

    Run the same command again to resume after an interruption. torchrun -m mlmkit eval shares the work. With --every,
    the default OUTPUT is MODEL/evaluations, and later calls measure only new checkpoints.
    """
    from mlmkit.eval.sets import data_folder, find_set

    data = data_folder(options.data_dir)
    if options.list_sets:
        _list_sets(data, options.as_json)
        return
    if not options.model:
        raise click.UsageError("Missing argument 'MODEL'.")
    if not options.sets:
        raise click.UsageError("Missing option '--set'.")
    import tempfile

    from mlmkit.distributed import claim_gpu, said_once
    from mlmkit.distributed import ranks as find_ranks
    from mlmkit.eval.evaluate import run_evaluation

    ranks = find_ranks()
    output = options.output
    with said_once():
        if ranks.world > 1 and output is None and not options.every:
            raise UserError("under torchrun the ranks share a folder: name one with --output")
        reading = {"text_field": options.text_field, "blank_line": options.blank_line}
        requests = [find_set(name, data, pairs=PAIRS in options.metrics, **reading) for name in options.sets]
        settings = [_settings(options, request) for request in requests]
    claim_gpu(ranks)
    if options.every:
        _evaluate_every(options, requests, settings, ranks)
        return
    backend = options.load()
    results = []
    with ExitStack() as stack:
        base = output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "result"
        for request, chosen, folder in zip(requests, settings, _folders(base, requests), strict=True):
            result = run_evaluation(
                backend,
                request.read(backend.tokenizer),
                chosen,
                folder,
                declared=request.declared,
                batch_tokens=options.batch_tokens or 0,
                allow_batch_coupling=options.allow_batch_coupling,
                overwrite=options.overwrite,
                report=output is not None,
                ranks=ranks,
            )
            results.append(result)
            if ranks.is_first and not options.as_json:
                _print_result(result)
                if output:
                    say(f"result: {folder}")
    if options.as_json and ranks.is_first:
        print_json(results[0] if len(results) == 1 else {"results": results})
    ranks.close()


def _evaluate_every(
    options: EvalOptions, requests: list["Request"], settings: list["Settings"], ranks: "Ranks"
) -> None:
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.train.evaluations import evaluate_run

    output = options.output or Path(options.model) / "evaluations"
    _folders(output, requests)  # refuses two sets of the same name
    rows = evaluate_run(
        Path(options.model),
        list(zip(requests, settings, strict=True)),
        output,
        backend=options.backend,
        device=options.device,
        ranks=ranks,
        batch_tokens=options.batch_tokens or 0,
        allow_batch_coupling=options.allow_batch_coupling,
        overwrite=options.overwrite,
    )
    if ranks.is_first and options.as_json:
        print_json({"output": str(output), "evaluations": rows})
    elif ranks.is_first:
        columns = {row["set"]: row["metric"] for row in rows}
        cells = {(row["set"], row["step"]): " ".join(_value(row)) for row in rows}
        places = {row["step"]: (row["checkpoint"], f"{row['tokens']:,}", f"{row['words']:,}") for row in rows}
        print_table(
            [[*places[step], *(cells.get((name, step), "-") for name in columns)] for step in sorted(places)],
            ["checkpoint", "tokens", "words", *(f"{name} {metric}" for name, metric in columns.items())],
            align="l" + "r" * (2 + len(columns)),
        )
        say(f"results: {output}")
    ranks.close()


def _settings(options: EvalOptions, request: "Request") -> "Settings":
    from mlmkit.eval.rows import Settings
    from mlmkit.masking import MaskRecipe

    metrics = options.metrics or ("masked",)
    if request.task != "text":
        if set(options.metrics) - {request.task}:
            raise UserError(f"{request.name} holds {request.task}, which only --metric {request.task} can measure")
        metrics = ("pseudo",)
    elif PAIRS in metrics:
        raise UserError(f"{request.name} holds text, not pairs: choose --metric masked or pseudo")
    settings = Settings(
        metrics=metrics,
        recipe=MaskRecipe(options.mask_prob, options.replace_prob, options.random_prob, options.whole_word),
        mask_seeds=_seeds(options.mask_seed, options.mask_seeds),
        variant=options.pll or "original",
        pseudo_sample=options.pseudo_sample,
    )
    return request.settings(settings, options.pll)


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...]:
    if seeds is None:
        return (seed or 0,)
    if seed is not None:
        raise UserError("--mask-seed and --mask-seeds exclude each other: name one of them")
    try:
        return tuple(int(item) for item in seeds.split(","))
    except ValueError:
        raise UserError(f"--mask-seeds takes numbers separated by commas, not {seeds!r}") from None


def _folders(output: Path, requests: list["Request"]) -> list[Path]:
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        raise UserError("two sets have the same name: evaluate them into different --output folders")
    return [output / name for name in names] if len(names) > 1 else [output]


def _list_sets(data: Path | None, as_json: bool) -> None:
    from mlmkit.eval.sets import built_in_sets

    rows = []
    for item in built_in_sets():
        is_local = bool(data and item.local and (data / item.local).exists())
        rows.append({**asdict(item), "available": "local" if is_local else "hub" if item.hub else "missing"})
    if as_json:
        print_json({"sets": rows})
        return
    columns = ("name", "task", "language", "available", "description")
    print_table([[row[name] for name in columns] for row in rows], columns)


def _print_result(result: "Result") -> None:
    from mlmkit.eval.metrics import describe_unknown
    from mlmkit.overlap import describe_overlap

    corpus = result["corpus"]
    source = corpus["source"]
    say(f"{source['set'] or source['location']}: {corpus['documents']} documents, {corpus['tokens']} tokens")
    rows = []
    for name, metric in result["metrics"].items():
        error = metric.get("standard_error")
        rows.append([name, *_value(metric), f"standard error {_number(error)}" if error else ""])
    if "unigram_entropy" in result and "items" not in result:  # older results lack it
        rows.insert(1, ["unigram_entropy", _number(result["unigram_entropy"]), "-", "to beat"])
    if "mask_seeds" in result:
        seeds = result["mask_seeds"]
        for name, spread in seeds["spread"].items():
            deviation = f"sd {_number(spread['standard_deviation'])} over {len(seeds['by_seed'])} mask seeds"
            rows.append([name, _number(spread["mean"]), "", deviation])
    items = result.get("items", {})
    for name, phenomenon in items.get("phenomena", {}).items():
        ties = f", {phenomenon['ties']} ties" if phenomenon.get("ties") else ""
        rows.append([name, *_value(phenomenon[items["metrics"][0]]), f"{phenomenon['items']} items{ties}"])
    print_table(rows, ["metric", "value", "95 % interval", ""], align="lr")
    if items:
        _print_items(items)
    if unknown := describe_unknown(result["unknown"]):
        say(unknown)
    if corpus["windowed_documents"]:
        say(f"{corpus['windowed_documents']} documents are longer than the model takes and were read in windows")
    if corpus["empty_texts"]:
        say(f"{corpus['empty_texts']} empty texts were left out")
    if overlap := describe_overlap(corpus.get("overlap")):
        say(overlap)
    if "mask_digest" in result:
        say(f"mask_digest: {result['mask_digest']}")


def _print_items(items: dict[str, Any]) -> None:
    if "chance" in items:
        say(f"chance level: {_number(items['chance'])}")
    problems = {"ties": "are ties, which count as wrong", "unscored": "have an option without a scored token, and "}
    problems["unscored"] += "count as wrong" if "chance" in items else "are left out"
    for name, problem in problems.items():
        if items.get(name):
            say(f"{items[name]} of {items['items']} items {problem}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _value(metric: "Mapping[str, Any]") -> tuple[str, str]:
    """A metric's value and interval."""
    low, high = metric["low"], metric["high"]
    return _number(metric["value"]), "-" if low is high is None else f"[{_number(low)}, {_number(high)}]"


@option_class
class CompareOptions(JsonOption):
    results: tuple[str, ...] = argument(nargs=-1, required=True, metavar="RESULT_A RESULT_B [RESULT ...]")
    output: Path | None = option("--output", "Folder to write compare.html to.", type=PATH)
    top: int = option("--top", "How many tokens to show.", default=20, type=click.IntRange(min=0))


@command(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Compare evaluations of the same text and masks, each with RESULT_A.

    Shows each metric's difference with its paired interval and p-value, overall and by slice, and the tokens where the
    two differ most. Refuses results on different text or with different masks.
    """
    from mlmkit.eval.compare import compare as run_comparison
    from mlmkit.eval.report import write_comparison

    if len(options.results) < 2:
        raise UserError("name at least two results to compare")
    comparison = run_comparison([Path(item) for item in options.results], options.top)
    if options.output:
        write_comparison(comparison, options.output)
    if options.as_json:
        print_json(comparison)
        return
    _print_comparison(comparison)
    if options.output:
        say(f"page: {options.output / 'compare.html'}")


def _print_comparison(comparison: dict[str, Any]) -> None:
    from mlmkit.eval.report import describe_side, differing_rows, measured_on, number, p_value, signed, span

    first = comparison["first"]
    for line in describe_side("A", first):
        say(line)
    for other in comparison["comparisons"]:
        for line in describe_side("B", other):
            say(line)
        if other["variant"] != first["variant"]:
            say(f"note: A is scored as {first['variant']}, B as {other['variant']}")
        different, agreement = differing_rows(other)
        if agreement:
            say(agreement)
        if not different:
            continue
        rows = []
        for name, row in different:
            sides = number(row["a"]), number(row["b"]), signed(row["difference"])
            rows.append([name, row["better"], *sides, span(row), p_value(row["p_value"]), measured_on(row)])
        n = "items" if "items" in other else "tokens / documents"
        print_table(rows, ["metric", "better", "A", "B", "B - A", "95 %", "p", f"n: {n}"], align="llrrrlrl")
        if other["tokens"]:
            say("tokens that differ most (log P):")
            tokens = []
            for token in other["tokens"]:
                where = f"document {token['document']}, token {token['offset']}"
                sides = (f"{token[name]:.3f}" for name in ("log_prob_a", "log_prob_b"))
                tokens.append([repr(token["token"]), where, *sides, f"{token['difference']:+.3f}"])
            print_table(tokens, ["token", "where", "A", "B", "B - A"], align="llrrr")


@click.command()
@click.argument("result", type=PATH)
def report(result: Path) -> None:
    """Write RESULT/report.html again, from the stored result."""
    from mlmkit.eval.report import write_report
    from mlmkit.eval.results_store import load_result

    require("report", "jinja2", "matplotlib")
    stored = load_result(result)
    if not os.access(result, os.W_OK):
        raise UserError(f"{result} is read-only: copy it to a writable folder")
    write_report(stored)
    say(result / "report.html")


@option_class
class ScoreOptions(JsonOption, ModelOptions, TextOptions):
    file: str = argument(default="-")
    pll: str = option("--pll", "Pseudo-likelihood.", default="original", metavar="original|within-word")
    per_token: bool = switch("--per-token", "Show each token's log-probability.")
    per_word: bool = switch("--per-word", "Show the surprisal, -log P, of each word between white space.")
    bits: bool = switch("--bits", "With --per-word: surprisal in bits, -log2 P.")
    allow_batch_coupling: bool = switch("--allow-batch-coupling", "Score with a dynamically quantized model anyway.")


@command(ScoreOptions)
def score(options: ScoreOptions) -> None:
    """Pseudo-log-likelihood of each text in FILE.

    FILE is standard input by default. Logarithms are natural.

    Prints one line per text: the sum ("-" without a scored token), the number of tokens, the text. Skips blank lines.
    """
    from mlmkit.documents import read_documents
    from mlmkit.eval.rows import pll_variant
    from mlmkit.eval.score_texts import pseudo_log_likelihood
    from mlmkit.locations import Source

    pll = pll_variant(options.pll)
    if options.bits and not options.per_word:
        raise UserError("--bits is the unit of the words' surprisal: add --per-word")
    location = "/dev/stdin" if options.file == "-" else options.file
    texts = list(read_documents(Source(location, options.text_field, options.blank_line)))
    if not texts:
        raise UserError(f"{'standard input' if options.file == '-' else options.file}: there is no text to score")
    backend = options.load()
    entries = []
    coupling = options.allow_batch_coupling
    for item in pseudo_log_likelihood(backend, texts, variant=pll, allow_batch_coupling=coupling):
        entry = {"text": item.text, "pseudo_log_likelihood": item.pseudo_log_likelihood, "tokens": len(item.log_prob)}
        entry |= {"per_word": _word_entries(item, math.log(2) if options.bits else 1.0)} if options.per_word else {}
        entry |= {"per_token": _token_entries(item, backend.tokenizer)} if options.per_token else {}
        entries.append(entry)
    if options.as_json:
        unit = {"surprisal_unit": "bits" if options.bits else "nats"} if options.per_word else {}
        print_json({"pll": pll, **unit, "texts": entries})
        return
    for entry in entries:
        text = " ".join(entry["text"].splitlines())
        say(f"{_number(entry['pseudo_log_likelihood'])}\t{entry['tokens']}\t{text}")
        for word in entry.get("per_word", ()):
            say(f"    {_number(word['surprisal']):>9}  {word['begin']}-{word['end']}  {word['word']}")
        for token in entry.get("per_token", ()):
            say(f"    {token['log_prob']:9.4f}  {token['token_str']}")


def _word_entries(item: "TextScore", nats_per_unit: float) -> list[dict[str, Any]]:
    return [
        {
            "word": word.text,
            "begin": word.begin,
            "end": word.end,
            "tokens": len(word.tokens),
            "surprisal": None if word.log_prob is None else -word.log_prob / nats_per_unit,
        }
        for word in item.words
    ]


def _token_entries(item: "TextScore", tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    word_of = {token: word.text for word in item.words for token in word.tokens}
    rows = zip(item.token_ids.tolist(), item.log_prob.tolist(), item.spans.tolist(), strict=True)
    return [
        {
            "token": id,
            "token_str": tokenizer.token(id),
            "word": word_of[index],
            "begin": begin,
            "end": end,
            "log_prob": log_prob,
        }
        for index, (id, log_prob, (begin, end)) in enumerate(rows)
    ]
