"""Exact pseudo-log-likelihood and masked cross-entropy: mlmkit against the loop one writes with transformers.

A BERT-base shape with random weights in float32, on real English sentences of about 20 wordpieces. Measured are

- the plain loop, as minicons has it: a masked copy for each token, padded, the logits of every position, of which the
  masked one is kept; at the batch size that a short trial finds best,
- mlmkit on torch and, on the CPU, on ONNX Runtime, through `score_texts`,
- on the CPU, a copy of the graph with the layers' matrix products in dynamic int8 (a trained model loses differently),
- the floor: two operations for each parameter of the encoder's layers and each real token, at the best rate at which
  torch multiplies float32 matrices here. Attention, vocabulary head and padding come on top of it.

Then masked cross-entropy of documents (rows) of Wikipedia: transformers with its collator and loss, against
`mlmkit eval`. Neither's time counts tokenising; mlmkit's counts opening the ONNX session.

Each measurement is a process of its own, so that its peak memory is its own, and the rounds alternate. MLMKIT_DATA
names a folder with tokenizers/bert-base-uncased/vocab.txt, ud_en_ewt/test.txt and wiki_en/heldout.txt.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any, cast

BOUND, DOCUMENTS_A_BATCH = 1e-3, 32  # nats; of transformers
TRIAL = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (8, 16, 32, 64, 128)}  # sentences a batch of the plain loop


# ---------------------------------------------------------------- measurements, each a process of its own


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Checkpoint, artifact, int8 graph and texts; how many parameters the encoder's layers have."""
    from onnx.utils import extract_model
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from pll_sharing import bert, bert_tokenizer, lines_of, pick_sentences

    from mlmkit.export.export import export

    folder, tokenizer = options.folder, bert_tokenizer()
    sentences = pick_sentences(options.sentences, tokenizer)
    documents = lines_of("wiki_en/heldout.txt")[: options.documents]
    (folder / "sentences.json").write_text(json.dumps(sentences))
    (folder / "documents.txt").write_text("\n".join(documents), encoding="utf-8")
    model = bert(options.layers, tokenizer)
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    if options.device == "cpu":
        export(str(folder / "checkpoint"), folder / "artifact", texts=sentences[:16])
        graph, inputs = str(folder / "artifact" / "model.onnx"), ["input_ids", "attention_mask", "positions", "targets"]
        extract_model(graph, str(folder / "scoring.onnx"), inputs, ["log_prob", "rank"])
        quantize_dynamic(folder / "scoring.onnx", folder / "int8.onnx", ["MatMul"], weight_type=QuantType.QInt8)
    body = sum(values.numel() for values in model.bert.encoder.parameters())
    return {"body": body, "corpus": {"rows": len(documents), "tokens": sum(map(len, tokenizer(documents).input_ids))}}


def measure_rate(options: argparse.Namespace) -> dict[str, Any]:
    """Operations a second in float32."""
    from engines import matrix_rate

    return {"rate": matrix_rate(options.device)}


def pseudo(options: argparse.Namespace) -> dict[str, Any]:
    """One contestant over all sentences, after a few to warm up."""
    sentences = json.loads((options.folder / "sentences.json").read_text())[: options.sentences]
    score = plain_loop(options) if options.measure == "plain" else mlmkit_scorer(options)
    score(sentences[:8])
    began = time.perf_counter()
    scores = score(sentences)
    seconds = time.perf_counter() - began
    lengths = [len(text) for text in scores]
    tokens = sum(length * (length + 2) for length in lengths)  # with [CLS] and [SEP]
    return {"seconds": seconds, "rows": sum(lengths), "tokens": tokens, "scores": scores}


def plain_loop(options: argparse.Namespace) -> Callable[[list[str]], list[list[float]]]:
    """From sentences to the log-probability of each token, masked alone; `options.size` sentences a batch."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.folder / "checkpoint")
    model = AutoModelForMaskedLM.from_pretrained(options.folder / "checkpoint").eval().to(options.device)
    special = set(tokenizer.all_special_ids)

    def score(sentences: list[str]) -> list[list[float]]:
        scores = []
        for begin in range(0, len(sentences), options.size):
            texts = tokenizer(sentences[begin : begin + options.size])["input_ids"]
            places = [[place for place, id in enumerate(ids) if id not in special] for ids in texts]
            copies = [(ids, place) for ids, scored in zip(texts, places, strict=True) for place in scored]
            rows = [[*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]] for ids, place in copies]
            inputs, every = tokenizer.pad({"input_ids": rows}, return_tensors="pt"), torch.arange(len(rows))
            with torch.inference_mode():
                logits = model(**inputs.to(options.device)).logits[every, [place for _, place in copies]]
                log_probs = logits.log_softmax(-1)[every, [ids[place] for ids, place in copies]]
            scores += log_probs.cpu().split([len(scored) for scored in places])
        return [text.tolist() for text in scores]

    return score


def mlmkit_scorer(options: argparse.Namespace) -> Callable[[list[str]], list[list[float]]]:
    """The same by `score_texts`; the int8 graph behind as much of a backend as that needs, so in the same batches."""
    from mlmkit.backends import Scored, load
    from mlmkit.eval.pseudo import score_texts

    path = options.folder / ("checkpoint" if options.measure == "torch" else "artifact")
    model: Any = load(str(path), "torch" if options.measure == "torch" else "onnx", options.device)
    if options.measure == "int8":
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        session = onnxruntime.InferenceSession(options.folder / "int8.onnx", settings, ["CPUExecutionProvider"])
        info, score = model.info, lambda batch: Scored(*cast(Any, session.run(None, batch._asdict())))
        model = SimpleNamespace(name="int8", device="cpu", info=info, tokenizer=model.tokenizer, score=score)
    return lambda sentences: [text.log_prob.tolist() for text in score_texts(model, sentences)]


def masked(options: argparse.Namespace) -> dict[str, Any]:
    """By transformers: documents in file order, cut at 512 tokens, padded to the batch's longest."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(options.folder / "checkpoint")
    model = AutoModelForMaskedLM.from_pretrained(options.folder / "checkpoint").eval().to(options.device)
    documents = (options.folder / "documents.txt").read_text(encoding="utf-8").split("\n")
    rows = [{"input_ids": ids} for ids in tokenizer(documents, truncation=True).input_ids]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)

    began = time.perf_counter()
    for first in range(0, len(rows), DOCUMENTS_A_BATCH):
        batch = collate(rows[first : first + DOCUMENTS_A_BATCH]).to(options.device)
        with torch.inference_mode():
            model(**batch).loss.item()
    seconds, tokens = time.perf_counter() - began, sum(len(row["input_ids"]) for row in rows)
    return {"seconds": seconds, "rows": len(rows), "tokens": tokens}


# ---------------------------------------------------------------- rounds and the table


def run(command: list[str]) -> dict[str, Any]:
    """What a process prints as JSON, and its peak memory: counted from the fork, so this one imports nothing large."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as process:
        output = cast(Any, process.stdout).read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(1 if process.returncode == 1 else f"status {process.returncode}: {' '.join(command)}")
    return {**json.loads(output.splitlines()[-1]), "gib": usage.ru_maxrss / (1 << 20)}


def compare(options: argparse.Namespace, folder: Path) -> None:
    """All rounds, and the table."""

    def measure(name: str, *more: object) -> dict[str, Any]:
        return run([__file__, *sys.argv[1:], "--measure", name, "--folder", str(folder), *map(str, more)])

    def mlmkit_eval(model: str) -> dict[str, Any]:
        what = [str(folder / model), "--set", str(folder / "documents.txt"), "--metric", "masked"]
        result = run(["-m", "mlmkit", "eval", *what, "--device", options.device, "--json"])
        return {"seconds": result["timing"]["masked"]["seconds"], "gib": result["gib"], **prepared["corpus"]}

    prepared, trial = measure("prepare"), TRIAL[options.device]
    few = ("--sentences", min(options.sentences, max(trial)))
    size = min(trial, key=lambda size: measure("plain", "--size", size, *few)["seconds"])
    models = {"torch": "checkpoint", "onnx": "artifact"} if options.device == "cpu" else {"torch": "checkpoint"}
    contestants = {"plain": partial(measure, "plain", "--size", size)}
    contestants |= {name: partial(measure, name) for name in [*models] + ["int8"] * ("onnx" in models)}
    contestants["masked, transformers"] = partial(measure, "masked")
    contestants |= {f"masked, {name}": partial(mlmkit_eval, model) for name, model in models.items()}
    results, rate = {name: [] for name in contestants}, 0.0
    for _ in range(options.rounds):
        for name, contestant in contestants.items():
            rate = max(rate, measure("rate")["rate"])  # other work on the machine only lowers it
            results[name].append(contestant())
    print(table(results, rate, rate / 2 / prepared["body"]))  # noqa: T201
    print(f"\nThe plain loop: {size} sentences a batch. {agreement(results, list(models))}.")  # noqa: T201


def table(results: dict[str, list[dict[str, Any]]], rate: float, floor: float) -> str:
    """A row a contestant, in Markdown: medians over the rounds, and the range of the ratios within a round."""
    plain = results["plain"][0]
    lines = [
        "| | rows/s | tokens/s | share of the floor | x the first | peak RSS GiB |\n|---|---|---|---|---|---|",
        f"| floor, {rate / 1e9:.0f} GFLOP/s | {floor * plain['rows'] / plain['tokens']:.1f} | {floor:.0f} | 1.00 | | |",
    ]
    for name, runs in results.items():
        first = results["masked, transformers" if name.startswith("masked") else "plain"]
        ratios = [other["seconds"] / run["seconds"] for other, run in zip(first, runs, strict=True)]
        seconds, tokens, gib = median(run["seconds"] for run in runs), runs[0]["tokens"], median(r["gib"] for r in runs)
        lines.append(
            f"| {name} | {runs[0]['rows'] / seconds:.1f} | {tokens / seconds:.0f} | {tokens / seconds / floor:.2f} "
            f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {gib:.2f} |"
        )
    return "\n".join(lines)


def agreement(results: dict[str, list[dict[str, Any]]], engines: list[str]) -> str:
    """How far apart the results of one round are. Fails where float32 differs by more than `BOUND`."""
    scores = {name: runs[0]["scores"] for name, runs in results.items() if "scores" in runs[0]}
    sums = {name: [sum(text) for text in texts] for name, texts in scores.items()}
    worst = max(abs(a - b) for name in engines for a, b in zip(sums["plain"], sums[name], strict=True))
    assert worst <= BOUND, f"a sentence's pseudo-log-likelihood differs by {worst:.1e} nats"
    said = f"Pseudo-log-likelihoods differ by at most {worst:.1e} nats"
    if "int8" in scores:
        apart = [a - b for a, b in zip(chain(*scores["onnx"]), chain(*scores["int8"]), strict=True)]
        said += f"; int8: log P by {mean(map(abs, apart)):.1e} in the mean, cross-entropy by {mean(apart):+.1e}"
    return said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "sentences": 200, "documents": 200, "rounds": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, kind in {"measure": str, "folder": Path, "size": int}.items():  # this script's own, for its processes
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    others = {"prepare": prepare, "rate": measure_rate, "masked": masked}
    if options.measure:
        print(json.dumps(others.get(options.measure, pseudo)(options)))  # noqa: T201
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # ONNX Runtime counts them
        with tempfile.TemporaryDirectory() as temporary:
            os.environ |= {"OMP_NUM_THREADS": str(options.threads), "MLMKIT_CACHE": f"{temporary}/cache"}
            os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            compare(options, Path(temporary))
