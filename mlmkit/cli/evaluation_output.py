"""What `mlmkit eval` prints: a result, and the list of sets."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmkit.console import number, print_json, print_table, say

if TYPE_CHECKING:
    from mlmkit.eval.result import Result


def list_sets(data: Path | None, as_json: bool) -> None:
    """Print the built-in sets and where each comes from: `data` is the folder of local copies."""
    from mlmkit.eval.sets import built_in_sets

    rows = []
    for item in built_in_sets():
        paths = [item.local.replace("{language}", language) for language in item.languages or [""]]
        is_local = bool(data and item.local and any((data / path).exists() for path in paths))
        available = "local" if is_local else "hub" if item.hub else "missing"
        rows.append({**asdict(item), "name": item.usage, "available": available})
    if as_json:
        print_json({"sets": rows})
        return
    cells = []
    for row in rows:
        name, language = row["name"].partition(":")[0], len(row["languages"]) or row["language"]
        cells.append([name, row["task"], language, row["available"], row["description"]])
    print_table(cells, ["name", "task", "language", "source", "description"], crop=True)
    say("")
    legend = {
        "local": f"found in the data folder, {data}"
        if data
        else "found in the data folder: --data-dir or $MLMKIT_DATA",
        "hub": "downloaded from the Hugging Face Hub on first use",
        "missing": "eval MODEL --set NAME says what to put where in the data folder",
        "a number": "so many languages: name one, as in --set multiblimp:por",
    }
    print_table(legend.items())
    say("Descriptions and licences: docs/sets.md, or --list-sets --json")


def print_result(result: "Result", *, by_paradigm: bool = False) -> None:
    """Print the metrics with their intervals, and what the reader must know about the text."""
    from mlmkit.eval.metrics import describe_unknown
    from mlmkit.overlap import describe_overlap

    corpus = result["corpus"]
    source = corpus["source"]
    say(f"{source['set'] or source['location']}: {corpus['documents']} documents, {corpus['tokens']} tokens")
    rows = []
    for name, metric in result["metrics"].items():
        error = metric.get("standard_error")
        rows.append([name, *value_and_interval(metric), f"standard error {number(error)}" if error else ""])
    if "unigram_entropy" in result and "items" not in result:  # older results lack it
        rows.insert(1, ["unigram_entropy", number(result["unigram_entropy"]), "-", "to beat"])
    if "mask_seeds" in result:
        seeds = result["mask_seeds"]
        for name, spread in seeds["spread"].items():
            rows.append([name, number(spread["mean"]), "", f"sd {number(spread['standard_deviation'])}"])
    items = result.get("items", {})
    paradigms = items.get("paradigms", {}) if by_paradigm else {}
    for name, group in [*items.get("phenomena", {}).items(), *paradigms.items()]:
        ties = f", {group['ties']} ties" if group.get("ties") else ""
        rows.append([name, *value_and_interval(group[items["metrics"][0]]), f"{group['items']} items{ties}"])
    print_table(rows, ["metric", "value", "95 % interval", ""], align="lr")
    if "mask_seeds" in result:
        say(f"sd: standard deviation between {len(result['mask_seeds']['by_seed'])} mask seeds, beside their mean")
    if items:
        _print_items(items)
    if by_paradigm and not paradigms:
        say("--by-paradigm: the set declares no paradigms")
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
        say(f"chance level: {number(items['chance'])}")
    problems = {"ties": "are ties, which count as wrong", "unscored": "have an option without a scored token, and "}
    problems["unscored"] += "count as wrong" if "chance" in items else "are left out"
    for name, problem in problems.items():
        if items.get(name):
            say(f"{items[name]} of {items['items']} items {problem}")


def value_and_interval(metric: Mapping[str, Any]) -> tuple[str, str]:
    """A metric's value and interval as text."""
    low, high = metric["low"], metric["high"]
    return number(metric["value"]), "-" if low is high is None else f"[{number(low)}, {number(high)}]"
