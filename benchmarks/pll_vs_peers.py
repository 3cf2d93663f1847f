"""Exact pseudo-log-likelihood and masked cross-entropy: mlmkit against the loop one writes with transformers.

A BERT-base shape with random weights in float32, on English sentences of about 20 wordpieces. Measured are

- the plain loop, as minicons has it: a masked copy for each token, padded, the logits of every position, of which the
  masked one is kept; at the batch size that a short trial finds best,
- mlmkit on torch and, on the CPU, on ONNX Runtime, through `score_texts`,
- on the CPU, `mlmkit export --precision int8-dynamic` (a trained model loses differently),
- the floor: two operations for each parameter of the encoder's layers and each real token, at the best rate at which
  torch multiplies float32 matrices here. Attention, vocabulary head and padding come on top of it.

Then masked cross-entropy of documents: transformers with its collator and loss, against `mlmkit.evaluate`. Neither's
time counts tokenising. Each contestant is a process of its own, so that its peak memory is its own.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from statistics import mean, median
from typing import Any, NamedTuple

from engines import matrix_rate
from harness import Bars, Contestant, Report, Table, alternate, isolated, main, peak_mib, ratios, spread
from inputs import artifact, bert_tokenizer, checkpoint, encoder_parameters, held_out, sentences

BOUND, DOCUMENTS_A_BATCH = 1e-3, 32  # nats; of transformers
TRIAL = {"cpu": (1, 4, 16, 32), "cuda": (8, 16, 32, 64, 128)}  # sentences a batch of the plain loop
TOKENS = 20  # a sentence
PLAIN, PEER = "plain loop", "masked, transformers"
Scorer = Callable[[list[str], int], list[list[float]]]


class Pass(NamedTuple):
    """Seconds of one pass, the rows and real tokens that it ran, and each text's log-probabilities."""

    seconds: float
    rows: int
    tokens: int
    scores: list[list[float]] | None


# ---------------------------------------------------------------- contestants, each a process of its own


def pseudo(score: Scorer, texts: list[str], size: int) -> Pass:
    """One pass over the sentences, in batches of `size` where the scorer does not choose them."""
    began = time.perf_counter()
    scores = score(texts, size)
    seconds = time.perf_counter() - began
    lengths = [len(text) for text in scores]
    return Pass(seconds, sum(lengths), sum(length * (length + 2) for length in lengths), scores)  # with [CLS] and [SEP]


def plain_loop(source: str, device: str) -> "Scorer":
    """The loop that one writes with transformers, as minicons has it."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model = AutoModelForMaskedLM.from_pretrained(source).eval().to(device)
    special = set(tokenizer.all_special_ids)

    def score(sentences: list[str], size: int) -> list[list[float]]:
        scores = []
        for begin in range(0, len(sentences), size):
            texts = tokenizer(sentences[begin : begin + size])["input_ids"]
            places = [[place for place, id in enumerate(ids) if id not in special] for ids in texts]
            copies = [(ids, place) for ids, scored in zip(texts, places, strict=True) for place in scored]
            rows = [[*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]] for ids, place in copies]
            inputs, every = tokenizer.pad({"input_ids": rows}, return_tensors="pt"), torch.arange(len(rows))
            with torch.inference_mode():
                logits = model(**inputs.to(device)).logits[every, [place for _, place in copies]]
                log_probs = logits.log_softmax(-1)[every, [ids[place] for ids, place in copies]]
            scores += log_probs.cpu().split([len(scored) for scored in places])
        return [text.tolist() for text in scores]

    return score


def mlmkit_scorer(source: str, backend: str, device: str) -> "Scorer":
    """The same by `score_texts`, which chooses its batches itself."""
    from mlmkit.backends import load
    from mlmkit.eval.pseudo import score_texts

    model = load(source, backend, device)
    return lambda sentences, _: [
        text.log_prob.tolist() for text in score_texts(model, sentences, allow_batch_coupling=True)
    ]


def open_transformers(source: str, documents: list[str], device: str) -> tuple:
    """The model, tokenised documents, and the collator that masks."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model = AutoModelForMaskedLM.from_pretrained(source).eval().to(device)
    rows = [{"input_ids": ids} for ids in tokenizer(documents, truncation=True).input_ids]
    return model, rows, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def masked_by_transformers(made: tuple, device: str) -> Pass:
    """Documents in file order, cut at 512 tokens, padded to the batch's longest."""
    import torch

    model, rows, collate = made

    began = time.perf_counter()
    for first in range(0, len(rows), DOCUMENTS_A_BATCH):
        batch = collate(rows[first : first + DOCUMENTS_A_BATCH]).to(device)
        with torch.inference_mode():
            model(**batch).loss.item()
    return Pass(time.perf_counter() - began, len(rows), sum(len(row["input_ids"]) for row in rows), None)


def open_mlmkit(source: str, backend: str, documents: list[str], device: str) -> tuple:
    """The engine and its material, not tokenised yet: `mlmkit eval` does that once, and keeps it."""
    from mlmkit.backends import load

    return load(source, backend, device), documents


def masked_by_mlmkit(made: tuple) -> Pass:
    """Of `mlmkit.evaluate`'s time, that of its pass."""
    from mlmkit.eval.api import evaluate

    model, documents = made
    result = evaluate(model, documents, metrics=["masked"]).result
    return Pass(result["timing"]["masked"]["seconds"], len(documents), result["corpus"]["tokens"], None)


# ---------------------------------------------------------------- rounds and the tables


def measure(options: argparse.Namespace) -> Report:
    """Both, in rounds."""
    device, layers = options.device, options.layers
    source = str(checkpoint("bert-base", num_hidden_layers=layers))
    texts = sentences(options.sentences, TOKENS, bert_tokenizer())
    documents = [line[:2000] for line in held_out()[: options.documents]]
    scorers = {
        PLAIN: Contestant(plain_loop, source, device),
        "torch": Contestant(mlmkit_scorer, source, "torch", device),
    }
    readers = {PEER: Contestant(open_transformers, source, documents, device)}
    readers["masked, torch"] = Contestant(open_mlmkit, source, "torch", documents, device)
    if device == "cpu":
        target = str(artifact("bert-base", num_hidden_layers=layers))
        small = str(artifact("bert-base", "--precision", "int8-dynamic", "--allow-drift", num_hidden_layers=layers))
        scorers["onnx"] = Contestant(mlmkit_scorer, target, "onnx", device)
        scorers["onnx, int8-dynamic"] = Contestant(mlmkit_scorer, small, "onnx", device)
        readers["masked, onnx"] = Contestant(open_mlmkit, target, "onnx", documents, device)

    few = texts[: max(TRIAL[device])]
    plain = scorers[PLAIN]
    for contestant in scorers.values():
        contestant.call(pseudo, few[:4], 4)
    trial = {size: plain.call(pseudo, few, size).seconds for size in TRIAL[device] if size <= len(few)}
    size = min(trial, key=lambda size: trial[size])
    rate = isolated(matrix_rate, device)
    calls = {name: partial(contestant.call, pseudo, texts, size) for name, contestant in scorers.items()}
    scored = alternate(calls, options.rounds, warm=True)
    calls = {name: partial(contestant.call, masked_by_mlmkit) for name, contestant in readers.items()}
    calls[PEER] = partial(readers[PEER].call, masked_by_transformers, device)
    read = alternate(calls, options.rounds)
    rate = max(rate, isolated(matrix_rate, device))  # other work on the machine only lowers it
    peaks = {name: contestant.call(peak_mib) / 1024 for name, contestant in (scorers | readers).items()}
    for contestant in (scorers | readers).values():
        contestant.stop()

    said = agreement({name: passes[0].scores or [] for name, passes in scored.items()})
    floor = rate / 2 / isolated(parameters_of, source)
    seconds = {name: [each.seconds for each in passes] for name, passes in (scored | read).items()}
    fast = {name: ratios(times, seconds[PEER if name in read else PLAIN]) for name, times in seconds.items()}
    best = "onnx" if device == "cpu" else "torch"
    return Report(
        [
            table("Pseudo-log-likelihood", scored, fast, floor, rate, peaks),
            table("Masked cross-entropy", read, fast, floor, rate, peaks),
        ],
        [f"The plain loop: {size} sentences a batch, the best of {', '.join(map(str, trial))}. {said}."],
        {
            "pll_times_as_fast": median(fast[best]),
            "pll_int8_times_as_fast": median(fast.get("onnx, int8-dynamic", [1.0])),
            "masked_times_as_fast": median(fast[f"masked, {best}"]),
            "pll_share_of_floor": scored[best][0].tokens / median(seconds[best]) / floor,
        },
        Bars(
            "Exact pseudo-log-likelihood",
            "rows, of a masked token each, a second",
            {name: [each.rows / each.seconds for each in passes] for name, passes in scored.items()},
        ),
        {"seconds": seconds, "operations_per_second": rate, "trial": trial, "peak_gib": peaks},
    )


def table(
    title: str,
    passes: dict[str, list[Pass]],
    fast: dict[str, list[float]],
    floor: float,
    rate: float,
    peaks: dict[str, float],
) -> Table:
    """A row a contestant: medians over the rounds."""
    first = next(iter(passes.values()))[0]
    rows: list[Sequence[object]] = [
        [
            f"floor, {rate / 1e9:.0f} GFLOP/s",
            f"{floor * first.rows / first.tokens:.1f}",
            f"{floor:,.0f}",
            "1.00",
            "",
            "",
        ]
    ]
    for name, taken in passes.items():
        seconds, tokens = median(each.seconds for each in taken), taken[0].tokens
        rates = [f"{taken[0].rows / seconds:.1f}", f"{tokens / seconds:,.0f}", f"{tokens / seconds / floor:.2f}"]
        rows.append([name, *rates, spread(fast[name]), f"{peaks[name]:.2f}"])
    return Table(title, ["", "rows/s", "tokens/s", "share of the floor", "x the peer", "peak RSS GiB"], rows)


def parameters_of(source: str) -> int:
    """Of a checkpoint's encoder."""
    from transformers import AutoConfig

    return encoder_parameters(AutoConfig.from_pretrained(source))


def agreement(scores: dict[str, list[list[float]]]) -> str:
    """How far apart the results of one round are. Fails where float32 differs by more than `BOUND`."""
    sums = {name: [sum(text) for text in texts] for name, texts in scores.items() if "int8" not in name}
    worst = max(abs(a - b) for of_engine in sums.values() for a, b in zip(sums[PLAIN], of_engine, strict=True))
    assert worst <= BOUND, f"a sentence's pseudo-log-likelihood differs by {worst:.1e} nats"
    said = f"Pseudo-log-likelihoods differ by at most {worst:.1e} nats"
    for name in scores.keys() - sums.keys():
        apart = [a - b for a, b in zip(chain(*scores["onnx"]), chain(*scores[name]), strict=True)]
        said += f"; {name}: log P by {mean(map(abs, apart)):.1e} in the mean, cross-entropy by {mean(apart):+.1e}"
    return said


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        layers=(0, 2),
        sentences=(16, 8),
        documents=(24, 8),
        rounds=(3, 1),
        device=("cpu", "cpu"),
    )
