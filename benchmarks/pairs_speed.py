"""Minimal pairs: what scoring each distinct row once, and smaller batches, gain over scoring every row.

A BERT-base shape with random weights in float32 scores pairs of sentences of about 8 wordpieces, on ONNX Runtime and on
torch, each in a process of its own. Three ways take turns:

- every row, as before: a masked copy per token, batches of 2,048 tokens by length,
- distinct rows in batches of that size, as `mlmkit eval` makes them,
- distinct rows in batches of today's size.

Their scores must agree: to the bit on ONNX Runtime, within `BOUND` on torch. The hardware limit is the
encoder's matrix products for every row, at the fastest rate that torch reaches here. Heads, attention and the rest come
on top of it; a row that is scored once instead of twice saves time.

The pairs are the first `--first` of blimp-filtered if MLMKIT_DATA has BLiMP (a sample of `--pairs` of them), or else
made from Python's documentation: a sentence, and the same with another word in one place.
"""

import argparse
import random
import time
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from harness import Report, alternate, main, matrix_rate, ratios, table
from inputs import artifact, bert_tokenizer, checkpoint, encoder_parameters, sentences
from numpy.typing import NDArray
from processes import calls, contestants, isolated

BOUND = 1e-5  # nats per token on torch, whose last bits change with the batch; trained models are nearer
BEFORE = 2048  # tokens per batch
EVERY, DISTINCT, TODAY = f"every row, {BEFORE:,}", f"distinct rows, {BEFORE:,}", "distinct rows, today's batches"
SENTENCE_TOKENS = 8

Pairs = list[tuple[str, str]]


class Pass(NamedTuple):
    """Seconds of one pass, the rows and tokens that the model read, and the log-probability of each token."""

    seconds: float
    rows: int
    tokens: int
    log_prob: NDArray[np.float32]


class Scorer:
    """A loaded model and the rows of all pairs."""

    def __init__(self, path: str, backend: str, pairs: Pairs) -> None:
        from mlmkit.backends import capacity, load
        from mlmkit.corpus import tokenize
        from mlmkit.eval.rows import pseudo_rows

        self.model = load(path, backend, "cpu")
        self.corpus = tokenize([text for pair in pairs for text in pair], self.model.tokenizer)
        self.rows = pseudo_rows(self.corpus, self.model.tokenizer, capacity(self.model))
        self.read: list[int] = []
        score, self.model.score = self.model.score, self._count
        self._score = score

    def _count(self, batch: Any) -> Any:
        self.read += batch.attention_mask.sum(axis=1).tolist()
        return self._score(batch)


def scoring_pass(scorer: Scorer, way: str) -> Pass:
    from mlmkit.eval.scoring import score_rows

    scorer.read.clear()
    began = time.perf_counter()
    if way == EVERY:
        log_prob = every_row(scorer)
    else:
        budget = BEFORE if way == DISTINCT else 0
        log_prob = score_rows(scorer.model, scorer.corpus, scorer.rows, budget).log_prob
    return Pass(time.perf_counter() - began, len(scorer.read), sum(scorer.read), log_prob)


def every_row(scorer: Scorer) -> NDArray[np.float32]:
    from mlmkit.batching import length_batches
    from mlmkit.eval.scoring import build_batch

    tokenizer, rows = scorer.model.tokenizer, scorer.rows
    log_prob = np.empty(len(rows), np.float32)
    for index in length_batches(rows.lengths + tokenizer.added_tokens, BEFORE):
        batch, scored = build_batch(scorer.corpus, rows, index, tokenizer)
        log_prob[scored] = scorer.model.score(batch).log_prob
    return log_prob


def some_pairs(count: int, first: int) -> tuple[Pairs, str]:
    """The pairs, and what they are."""
    from mlmkit.errors import UserError
    from mlmkit.eval.sets import data_folder, find_set

    chance = random.Random(0)
    try:
        items = find_set("blimp-filtered", data_folder(None)).items()[:first]
    except UserError:
        texts = [text.split() for text in sentences(count, SENTENCE_TOKENS, bert_tokenizer())]
        words = [word for text in texts for word in text]
        return [(" ".join(text), " ".join(replaced(text, chance, words))) for text in texts], "made from documentation"
    chosen = sorted(chance.sample(range(len(items)), min(count, len(items))))
    pairs = [(items[index].options[0].text, items[index].options[1].text) for index in chosen]
    return pairs, f"of the first {len(items):,} of blimp-filtered"


def replaced(text: list[str], chance: random.Random, words: list[str]) -> list[str]:
    place = chance.randrange(len(text))
    return [*text[:place], chance.choice(words), *text[place + 1 :]]


def measure(options: argparse.Namespace) -> Report:
    layers = {"num_hidden_layers": options.layers}
    pairs, described = some_pairs(options.pairs, options.first)
    source = str(checkpoint("bert-base", **layers))
    models = {"onnx": str(artifact("bert-base", **layers)), "torch": source}
    rates, passes = [isolated(matrix_rate, "cpu")], dict[tuple[str, str], list[Pass]]()
    for backend, path in models.items():
        with contestants({backend: (Scorer, path, backend, pairs)}) as started:
            turns = {way: calls(started, scoring_pass, way)[backend] for way in (EVERY, DISTINCT, TODAY)}
            taken = alternate(turns, options.rounds)
        passes |= {(backend, way): taken[way] for way in turns}
        rates.append(isolated(matrix_rate, "cpu"))
    floor = max(rates) / 2 / isolated(encoder_parameters, source)  # tokens per second
    apart = {backend: agreement([passes[backend, way][0] for way in (EVERY, DISTINCT, TODAY)]) for backend in models}
    assert apart["onnx"] == 0.0, f"ONNX Runtime's scores differ by {apart['onnx']:.1e}"
    assert apart["torch"] <= BOUND, f"torch's scores differ by {apart['torch']:.1e}"

    seconds = {key: [each.seconds for each in taken] for key, taken in passes.items()}
    fast = {key: ratios(times, seconds[key[0], EVERY]) for key, times in seconds.items()}
    least = passes["onnx", EVERY][0].tokens / floor
    records: list[dict[str, object]] = [{"": f"hardware limit, every row, {max(rates) / 1e9:.0f} GFLOP/s"}]
    records[0] |= {"pairs/s": len(pairs) / least, "share of the limit": 1.0}
    for (backend, way), taken in passes.items():
        took = median(seconds[backend, way])
        record = {
            "": f"{backend}, {way}",
            "rows": taken[0].rows,
            "tokens": taken[0].tokens,
            "pairs/s": len(pairs) / took,
        }
        records.append(record | {"share of the limit": least / took, "x every row": fast[backend, way]})
    return Report(
        [table("Pairs", records)],
        [f"{len(pairs)} pairs {described}. Log-probabilities differ by at most {apart['torch']:.1e} on torch."],
        {f"pairs_{backend}_times_as_fast": median(fast[backend, TODAY]) for backend in models},
        figures={"seconds": {f"{a}, {b}": times for (a, b), times in seconds.items()}, "operations_per_second": rates},
    )


def agreement(passes: list[Pass]) -> float:
    """The largest difference of a token's log-probability from the first pass."""
    return float(max(np.abs(each.log_prob - passes[0].log_prob).max() for each in passes))


if __name__ == "__main__":
    main(__doc__, measure, layers=(0, 2), pairs=(60, 6), first=(2000, 2000), rounds=(3, 1))
