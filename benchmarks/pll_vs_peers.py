"""Exact pseudo-log-likelihood and masked cross-entropy: mlmkit against the loop that people write with transformers.

A BERT-base shape with random weights in float32 scores English sentences of about 20 wordpieces. Contestants, each in a
process of its own:

- the plain loop, as minicons has it: a masked copy per token, padded, and the logits of every position, of which the
  masked one is kept; its batch size is the fastest in a short trial,
- mlmkit on torch and on ONNX Runtime, through `pseudo_log_likelihood`,
- mlmkit on a dynamic int8 artifact (what it costs in accuracy differs for a trained model).

The hardware limit is two operations per encoder parameter and real token, at the best rate at which torch multiplies
float32 matrices here. Attention, vocabulary head and padding come on top of it.

Then masked cross-entropy of documents: transformers with its collator and loss, in batches of documents in file order,
against `mlmkit.evaluate`. Tokenising is not counted on either side. Short documents (up to 128 tokens) need batches
with little padding; long ones (400 to 510 tokens, consecutive documents joined) show the cost of attention.
"""

import argparse
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from statistics import mean, median
from typing import Any, NamedTuple

from harness import Report, Table, alternate, main, matrix_rate, ratios, table
from inputs import (
    artifact,
    bert_tokenizer,
    checkpoint,
    encoder_parameters,
    long_documents,
    sentences,
    short_documents,
)
from processes import calls, contestants, isolated

BOUND = 1e-3  # nats per sentence
BATCH_DOCUMENTS = 32  # of transformers
SHORT_TOKENS, LONG_TOKENS = 128, (400, 510)
TRIED_SENTENCES = (1, 4, 8)  # batch sizes of the plain loop; 16 took 2 % longer than 4
SENTENCE_TOKENS = 20
PLAIN, PEER, BEST, INT8 = "plain loop", "transformers", "onnx", "onnx, int8-dynamic"
Scorer = Callable[[list[str], int], list[list[float]]]  # texts, batch size -> log-probabilities of each text's tokens
Reader = Callable[[list[str]], "Pass"]


class Pass(NamedTuple):
    """Seconds of one pass, the rows and real tokens that it ran, and each text's log-probabilities."""

    seconds: float
    rows: int
    tokens: int
    scores: list[list[float]]


def pseudo_pass(score: Scorer, texts: list[str], size: int) -> Pass:
    """One pass over the sentences, in batches of `size` if the scorer does not choose its own."""
    began = time.perf_counter()
    scores = score(texts, size)
    seconds = time.perf_counter() - began
    lengths = [len(text) for text in scores]
    return Pass(seconds, sum(lengths), sum(length * (length + 2) for length in lengths), scores)  # 2: [CLS] and [SEP]


def plain_loop(source: str) -> Scorer:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model = AutoModelForMaskedLM.from_pretrained(source).eval()
    special = set(tokenizer.all_special_ids)

    def score(texts: list[str], size: int) -> list[list[float]]:
        scores = []
        for begin in range(0, len(texts), size):
            batch = tokenizer(texts[begin : begin + size])["input_ids"]
            positions = [[position for position, id in enumerate(ids) if id not in special] for ids in batch]
            copies = [(ids, position) for ids, scored in zip(batch, positions, strict=True) for position in scored]
            rows = [[*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]] for ids, position in copies]
            inputs, every = tokenizer.pad({"input_ids": rows}, return_tensors="pt"), torch.arange(len(rows))
            with torch.inference_mode():
                logits = model(**inputs).logits[every, [position for _, position in copies]]
                log_probs = logits.log_softmax(-1)[every, [ids[position] for ids, position in copies]]
            scores += log_probs.split([len(scored) for scored in positions])
        return [text.tolist() for text in scores]

    return score


def mlmkit_scorer(source: str, backend: str) -> Scorer:
    """`pseudo_log_likelihood`, which chooses its own batches."""
    from mlmkit.backends import load
    from mlmkit.eval.score_texts import pseudo_log_likelihood

    model = load(source, backend, "cpu")
    return lambda texts, _: [
        text.log_prob.tolist() for text in pseudo_log_likelihood(model, texts, allow_batch_coupling=True)
    ]


def transformers_reader(source: str) -> Reader:
    """Reads documents in file order, cut at 512 tokens, padded to the longest of the batch."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model = AutoModelForMaskedLM.from_pretrained(source).eval()
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def read(documents: list[str]) -> Pass:
        rows: list[Any] = [{"input_ids": ids} for ids in tokenizer(documents, truncation=True).input_ids]
        began = time.perf_counter()
        for begin in range(0, len(rows), BATCH_DOCUMENTS):
            with torch.inference_mode():
                model(**collate(rows[begin : begin + BATCH_DOCUMENTS])).loss.item()
        return Pass(time.perf_counter() - began, len(rows), sum(len(row["input_ids"]) for row in rows), [])

    return read


def mlmkit_reader(source: str, backend: str) -> Reader:
    """The scoring pass of `mlmkit.evaluate`, as it times it itself."""
    from mlmkit.backends import load
    from mlmkit.eval.api import evaluate

    model = load(source, backend, "cpu")

    def read(documents: list[str]) -> Pass:
        timing = evaluate(model, documents, metrics=["masked"]).result["timing"]["masked"]
        return Pass(timing["seconds"], timing["rows"], round(timing["tokens_per_second"] * timing["seconds"]), [])

    return read


def measure(options: argparse.Namespace) -> Report:
    layers = {"num_hidden_layers": options.layers}
    source, target = str(checkpoint("bert-base", **layers)), str(artifact("bert-base", **layers))
    small = str(artifact("bert-base", "--precision", "int8-dynamic", "--allow-drift", **layers))
    texts = sentences(options.sentences, SENTENCE_TOKENS, bert_tokenizer())
    documents = {
        "short": short_documents(options.short, SHORT_TOKENS, bert_tokenizer()),
        "long": long_documents(options.long, *LONG_TOKENS, bert_tokenizer()),
    }
    scorers = {
        PLAIN: (plain_loop, source),
        "torch": (mlmkit_scorer, source, "torch"),
        BEST: (mlmkit_scorer, target, "onnx"),
        INT8: (mlmkit_scorer, small, "onnx"),
    }
    readers = {
        PEER: (transformers_reader, source),
        "torch": (mlmkit_reader, source, "torch"),
        BEST: (mlmkit_reader, target, "onnx"),
    }
    rate = isolated(matrix_rate, "cpu")
    with contestants(scorers) as started:
        few = texts[: max(TRIED_SENTENCES)]
        for contestant in started.values():
            contestant.call(pseudo_pass, few[:4], 4)
        sizes = [size for size in TRIED_SENTENCES if size <= len(few)]
        trial = {size: started[PLAIN].call(pseudo_pass, few, size).seconds for size in sizes}
        size = min(trial, key=lambda size: trial[size])
        scored = alternate(calls(started, pseudo_pass, texts, size), options.rounds, warm=True)
        peaks = {name: contestant.peak_gib() for name, contestant in started.items()}
    read = {}
    with contestants(readers) as started:
        for contestant in started.values():
            contestant.call(operator.call, documents["short"][:4])
        for kind, texts_of_kind in documents.items():
            read[kind] = alternate(calls(started, operator.call, texts_of_kind), options.rounds, warm=True)
        read_peaks = {name: contestant.peak_gib() for name, contestant in started.items()}
    rate = max(rate, isolated(matrix_rate, "cpu"))  # other work on the machine only lowers it

    floor = rate / 2 / isolated(encoder_parameters, source)
    pll = Speeds("Pseudo-log-likelihood", scored, PLAIN, floor, peaks)
    short, long = (Speeds(heading(kind, passes), passes, PEER, floor, read_peaks) for kind, passes in read.items())
    return Report(
        [each.table(rate) for each in (pll, short, long)],
        [
            f"The plain loop: {size} sentences per batch, the best of {', '.join(map(str, trial))}. "
            f"{agreement({name: passes[0].scores for name, passes in scored.items()})}."
        ],
        {
            "pll_times_as_fast": median(pll.fast[BEST]),
            "pll_int8_times_as_fast": median(pll.fast[INT8]),
            "masked_short_times_as_fast": median(short.fast[BEST]),
            "masked_long_times_as_fast": median(long.fast[BEST]),
            "masked_long_share_of_floor": long.share(BEST),
            "pll_share_of_floor": pll.share(BEST),
        },
        figures={
            "seconds": {each.title: each.seconds for each in (pll, short, long)},
            "operations_per_second": rate,
            "trial": trial,
            "peak_gib": {"pseudo": peaks, "masked": read_peaks},
        },
    )


def heading(kind: str, passes: dict[str, list[Pass]]) -> str:
    first = passes[PEER][0]
    return f"Masked cross-entropy, {first.rows} {kind} documents of {first.tokens / first.rows:.0f} tokens on average"


@dataclass(frozen=True)
class Speeds:
    """The passes of contestants over the same texts, by name. `floor` is the hardware limit in tokens per second."""

    title: str
    passes: dict[str, list[Pass]]
    peer: str
    floor: float
    peaks: dict[str, float]

    @property
    def seconds(self) -> dict[str, list[float]]:
        return {name: [each.seconds for each in taken] for name, taken in self.passes.items()}

    @property
    def fast(self) -> dict[str, list[float]]:
        """How many times as fast as the peer each one was, per round."""
        return {name: ratios(times, self.seconds[self.peer]) for name, times in self.seconds.items()}

    def share(self, name: str) -> float:
        """A contestant's share of the hardware limit."""
        return self.passes[name][0].tokens / median(self.seconds[name]) / self.floor

    def table(self, rate: float) -> Table:
        """A row per contestant, below the hardware limit: medians over the rounds."""
        first = self.passes[self.peer][0]
        rows = [_speed(f"hardware limit, {rate / 1e9:.0f} GFLOP/s", first, first.tokens / self.floor, 1.0)]
        for name, taken in self.passes.items():
            row = _speed(name, taken[0], median(self.seconds[name]), self.share(name))
            rows.append(row | {"x the peer": self.fast[name], "peak RSS GiB": self.peaks[name]})
        return table(self.title, rows)


def _speed(name: str, one: Pass, seconds: float, share: float) -> dict[str, object]:
    per_second = {"rows/s": one.rows / seconds, "tokens/s": one.tokens / seconds}
    return {"": name, **per_second, "share of the limit": share}


def agreement(scores: dict[str, list[list[float]]]) -> str:
    """How far the scores of one round are apart. Fails if float32 differs by more than `BOUND`."""
    sums = {name: [sum(text) for text in texts] for name, texts in scores.items() if name != INT8}
    worst = max(abs(a - b) for of_engine in sums.values() for a, b in zip(sums[PLAIN], of_engine, strict=True))
    assert worst <= BOUND, f"a sentence's pseudo-log-likelihood differs by {worst:.1e} nats"
    apart = [a - b for a, b in zip(chain(*scores[BEST]), chain(*scores[INT8]), strict=True)]
    return (
        f"Pseudo-log-likelihoods differ by at most {worst:.1e} nats. {INT8}: log P differs by "
        f"{mean(map(abs, apart)):.1e} on average, cross-entropy by {mean(apart):+.1e}"
    )


if __name__ == "__main__":
    main(__doc__, measure, layers=(0, 2), sentences=(16, 8), short=(48, 8), long=(4, 1), rounds=(3, 1))
