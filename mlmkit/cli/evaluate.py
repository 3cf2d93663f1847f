"""The command eval."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlmkit.cli.evaluation_output import list_sets, print_result, value_and_interval
from mlmkit.cli.options import (
    BATCH_COUPLING,
    MODEL,
    PATH,
    InferenceOptions,
    JsonOption,
    TextOptions,
    VerifyOption,
    argument,
    command,
    option,
    option_class,
    switch,
)
from mlmkit.console import number, print_json, print_table, say
from mlmkit.errors import UserError, require

if TYPE_CHECKING:
    from mlmkit.distributed import Ranks
    from mlmkit.eval.babylm import Predictions
    from mlmkit.eval.data import EvalData
    from mlmkit.eval.result import Result
    from mlmkit.eval.rows import Settings
    from mlmkit.eval.sets import Request
    from mlmkit.eval.suites import Suite

PAIRS = "pairs"


@option_class
class MaskOptions:
    """How `--metric masked` selects and replaces tokens."""

    heading = "Masks, for --metric masked"
    mask_seed: int | None = option("--mask-seed", "Seed of the masks.", shown_default=0, type=int, metavar="N")
    mask_seeds: str | None = option(
        "--mask-seeds", "Measure with several seeds, and show the spread between them.", metavar="N,N,..."
    )
    mask_prob: float = option("--mask-prob", "Share of the tokens to select.", default=0.15, metavar="SHARE")
    replace_prob: float = option(
        "--replace-prob", "Share of the selected tokens that become the mask.", default=0.8, metavar="SHARE"
    )
    random_prob: float = option(
        "--random-prob", "Share of the selected tokens that become a random token.", default=0.1, metavar="SHARE"
    )
    whole_word: bool = switch("--whole-word", "Select whole words.")


@option_class
class PseudoOptions:
    """How pseudo-likelihoods are computed."""

    heading = "Pseudo-likelihood, for --metric pseudo and test items"
    pll: str | None = option(
        "--pll",
        "Mask one token at a time, or also the later tokens of its word.",
        shown_default="the set's own, or else original",
        metavar="original|within-word",
    )
    pseudo_sample: float = option(
        "--pseudo-sample", "Share of the tokens to score, for --metric pseudo.", default=1.0, metavar="SHARE"
    )


@option_class
class SetOptions:
    """Where sets are, what is in them, and what their suites write."""

    heading = "Sets and suites"
    list_sets: bool = switch("--list-sets", "List the built-in sets and exit.")
    check_set: str | None = option(
        "--check-set", "Show how the items of a set will be scored, and list every problem in it.", metavar="SET|FILE"
    )
    data_dir: str | None = option(
        "--data-dir", "Folder with local copies of the sets.", shown_default="$MLMKIT_DATA", metavar="DIR"
    )
    by_paradigm: bool = switch("--by-paradigm", "Print the metrics of each paradigm of a set too.")
    babylm: Path | None = option(
        "--babylm-predictions",
        "Folder to write the suite's predictions to, in the form that BabyLM's leaderboard takes.",
        type=PATH,
        metavar="DIR",
    )


@option_class
class EvalOptions(MaskOptions, PseudoOptions, InferenceOptions, TextOptions, SetOptions, JsonOption, VerifyOption):
    model: str = argument(MODEL, default="")
    sets: tuple[str, ...] = option(
        "--set", "What to measure on. Repeatable. Give either --set or --suite.", multiple=True, metavar="SET|FILE"
    )
    suite: str | None = option(
        "--suite",
        "Measure on several sets, and show their main metrics in one table.",
        metavar="babylm-strict|babylm-fast|multilingual-pairs|FILE",
    )
    metrics: tuple[str, ...] = option(
        "--metric",
        "What to measure. Repeatable.",
        shown_default="masked for text, the set's own for items",
        multiple=True,
        metavar="masked|pseudo|pairs",
    )
    output: Path | None = option(
        "--output",
        "Folder for result.json, the tables and report.html. Without it, results are only printed.",
        type=PATH,
        metavar="OUTPUT",
    )
    overwrite: bool = switch("--overwrite", "Replace an existing result.")
    every: bool = switch("--every", "MODEL is the folder of a training run: measure each checkpoint that it has kept.")
    batch_tokens: int | None = option(
        "--batch-tokens",
        "Tokens per padded batch.",
        shown_default="depends on the device",
        type=click.IntRange(min=0),
        metavar="N",
    )
    allow_batch_coupling: bool = switch("--allow-batch-coupling", BATCH_COUPLING)


@command(EvalOptions, "eval")
def evaluate(options: EvalOptions) -> None:
    """Measure MODEL on text or test items.

    \b
    For example:
      mlmkit eval run/model --set heldout.txt --output result
      mlmkit eval artifact --set wikitext-2 --metric masked --metric pseudo

    A set is a name from --list-sets, a .toml file that declares one, a text file (one document per line), .jsonl,
    .csv, .tsv, .parquet, or hub:NAME[:CONFIG][@SPLIT]. Test items are minimal pairs, choices and cloze items.

    With several sets, OUTPUT holds a folder for each. With --suite, OUTPUT/suite.json holds the table. With --every,
    OUTPUT is MODEL/evaluations by default, and later calls measure only new checkpoints.

    Run the same command again to resume after an interruption. torchrun -m mlmkit eval shares the work between
    processes.
    """
    from mlmkit.eval.sets import data_folder, find_set

    data = data_folder(options.data_dir)
    if options.list_sets:
        list_sets(data, options.as_json)
        return
    if not options.model:
        raise click.UsageError("Missing argument 'MODEL'.")
    if options.check_set:
        _check_set(options, data)
        return
    if bool(options.sets) == bool(options.suite):
        raise click.UsageError("Give either --set or --suite.")
    if options.by_paradigm and (options.suite or options.every or options.as_json):
        raise click.UsageError("--by-paradigm has no effect with --suite, --every or --json: leave it out.")
    if options.trust_remote_code and options.every:
        raise click.UsageError("--trust-remote-code has no effect with --every: a run's checkpoints have no code.")
    if options.babylm and not options.suite:
        raise click.UsageError("--babylm-predictions needs --suite babylm-strict, or another with a table [babylm].")
    import tempfile

    from mlmkit.distributed import claim_gpu, said_once
    from mlmkit.distributed import ranks as find_ranks
    from mlmkit.eval.babylm import check_places
    from mlmkit.eval.evaluate import run_evaluation
    from mlmkit.eval.suites import each_or_none, find_suite
    from mlmkit.masking import MaskRecipe

    ranks = find_ranks()
    output = options.output
    with said_once():
        if ranks.world > 1 and output is None and not options.every:
            raise UserError("under torchrun the ranks share a folder: name one with --output")
        reading = {"text_field": options.text_field, "blank_line": options.blank_line}
        suite = find_suite(options.suite) if options.suite else None
        find = partial(find_set, data=data, pairs=PAIRS in options.metrics, **reading)
        requests = each_or_none(find, suite.sets if suite else options.sets)
        settings = [_settings(options, request) for request in requests]
        has_masks = any("masked" in each.metrics or each.pseudo_sample < 1.0 for each in settings)
        if not has_masks and (settings[0].recipe != MaskRecipe() or settings[0].mask_seeds != (0,)):
            raise UserError("--mask-seed, --mask-prob and similar options need --metric masked: leave them out")
        if suite and options.babylm:
            check_places(suite, requests)
    claim_gpu(ranks)
    if options.every:
        _evaluate_every(options, requests, settings, suite, ranks)
        return
    backend = options.load()
    results = []
    with ExitStack() as stack:
        base = output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "result"
        folders = _folders(base, requests, always=bool(suite))
        contents = each_or_none(lambda request: request.read(backend.tokenizer), requests)
        for request, chosen, content, folder in zip(requests, settings, contents, folders, strict=True):
            result = run_evaluation(
                backend,
                content,
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
                if not suite:
                    print_result(result, by_paradigm=options.by_paradigm)
                if output:
                    say(f"result: {folder}")
        if suite and ranks.is_first:
            _finish_suite(options, suite, contents, folders, results)
    if options.as_json and not suite and ranks.is_first:
        print_json(results[0] if len(results) == 1 else {"results": results})
    ranks.close()


def _check_set(options: EvalOptions, data: Path | None) -> None:
    from mlmkit.eval.check_set import check_set
    from mlmkit.eval.sets import find_set

    if options.sets or options.suite or options.every or options.output:
        raise click.UsageError("--check-set measures nothing: leave out --set, --suite, --every and --output.")
    request = find_set(options.check_set or "", data, pairs=PAIRS in options.metrics)
    report, problems = check_set(request, options.load(), _settings(options, request))
    if options.as_json:
        print_json({"report": report, "problems": problems})
    else:
        for line in (*report, *(f"problem: {problem}" for problem in problems)):
            say(line)
    if problems:
        raise UserError(f"{options.check_set} cannot be evaluated: {len(problems)} problems, see above")


def _predictions(options: EvalOptions, suite: "Suite | None") -> "Predictions | None":
    """What writes predictions for BabyLM, if the user wants them."""
    from mlmkit.eval.babylm import Predictions

    if not (options.babylm and suite):
        return None
    return Predictions(options.babylm / Path(options.model).resolve().stem, suite.babylm)


def _evaluate_every(
    options: EvalOptions,
    requests: list["Request"],
    settings: list["Settings"],
    suite: "Suite | None",
    ranks: "Ranks",
) -> None:
    require("train", "torch", "transformers", "safetensors")
    from mlmkit.train.evaluations import evaluate_run

    output = options.output or Path(options.model) / "evaluations"
    _folders(output, requests, always=True)  # refuses two sets of the same name
    rows = evaluate_run(
        Path(options.model),
        list(zip(requests, settings, strict=True)),
        output,
        backend=options.backend,
        device=options.device,
        ranks=ranks,
        predictions=_predictions(options, suite),
        batch_tokens=options.batch_tokens or 0,
        allow_batch_coupling=options.allow_batch_coupling,
        overwrite=options.overwrite,
    )
    if ranks.is_first and options.as_json:
        print_json({"output": str(output), "evaluations": rows})
    elif ranks.is_first:
        columns = {row["set"]: row["metric"] for row in rows}
        cells = {(row["set"], row["step"]): " ".join(value_and_interval(row)) for row in rows}
        places = {row["step"]: (row["checkpoint"], f"{row['tokens']:,}", f"{row['words']:,}") for row in rows}
        print_table(
            [[*places[step], *(cells.get((name, step), "-") for name in columns)] for step in sorted(places)],
            ["checkpoint", "tokens", "words", *(f"{name} {metric}" for name, metric in columns.items())],
            align="l" + "r" * (2 + len(columns)),
            expendable=("words", "tokens"),
        )
        say(f"results: {output}")
    ranks.close()


def _finish_suite(
    options: EvalOptions, suite: "Suite", contents: list["EvalData"], folders: list[Path], results: list["Result"]
) -> None:
    """Write and show the table of a suite, and write its predictions."""
    from mlmkit.eval.suites import SUITE, suite_record
    from mlmkit.files import write_record

    record = suite_record(suite, folders, results)
    if options.output:
        write_record(options.output / SUITE, record)
    if options.as_json:
        print_json(record)
    else:
        rows = []
        for row in record["sets"]:
            published = next((f"{number(each['value'])} {each['model']}" for each in row["published"]), "")
            rows.append([row["set"], row["metric"], *value_and_interval(row), row["n"], published])
        header = ["set", "metric", "value", "95 % interval", "n", "published"]
        print_table(rows, header, align="llrlrl", expendable=("n", "metric"))
    if predictions := _predictions(options, suite):
        for folder, content in zip(folders, contents, strict=True):
            written = predictions.write(folder.name, content, folder)
            if written and not options.as_json:
                say(f"predictions: {written}")


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


def _folders(output: Path, requests: list["Request"], *, always: bool) -> list[Path]:
    if len(requests) == 1 and not always:
        return [output]
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        raise UserError("two sets have the same name: evaluate them into different --output folders")
    return [output / name for name in names]
