"""The command score."""

import math
from typing import TYPE_CHECKING, Any

from mlmkit.cli.options import (
    BATCH_COUPLING,
    InferenceOptions,
    JsonOption,
    TextOptions,
    argument,
    command,
    option,
    option_class,
    switch,
)
from mlmkit.console import number, print_json, say
from mlmkit.errors import UserError

if TYPE_CHECKING:
    from mlmkit.eval.score_texts import TextScore
    from mlmkit.tokenizer import Tokenizer


@option_class
class ScoreOptions(InferenceOptions, TextOptions, JsonOption):
    file: str = argument("Texts to score; - (the default) is standard input.", default="-")
    pll: str = option(
        "--pll",
        "Mask one token at a time, or also the later tokens of its word.",
        default="original",
        metavar="original|within-word",
    )
    per_token: bool = switch("--per-token", "Show each token's log-probability.")
    per_word: bool = switch("--per-word", "Show each word's surprisal, -log P. Words stand between white space.")
    bits: bool = switch("--bits", "With --per-word: show the surprisal in bits, -log2 P.")
    allow_batch_coupling: bool = switch("--allow-batch-coupling", BATCH_COUPLING)


@command(ScoreOptions)
def score(options: ScoreOptions) -> None:
    """Print the pseudo-log-likelihood of texts.

    \b
    For example:
      echo "O rato roeu a roupa do rei de Roma." | mlmkit score MODEL
      mlmkit score MODEL sentences.txt --per-word --bits --pll within-word

    Prints one line per text: the sum of the log-probabilities in nats ("-" if no token is scored), the number of
    tokens, the text. Skips blank lines.
    """
    from mlmkit.documents import read_documents
    from mlmkit.eval.rows import pll_variant
    from mlmkit.eval.score_texts import pseudo_log_likelihood

    pll = pll_variant(options.pll)
    if options.bits and not options.per_word:
        raise UserError("--bits is the unit of the words' surprisal: add --per-word")
    texts = list(read_documents(options.source(options.file)))
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
        say(f"{number(entry['pseudo_log_likelihood'])}\t{entry['tokens']}\t{text}")
        for word in entry.get("per_word", ()):
            say(f"    {number(word['surprisal']):>9}  {word['begin']}-{word['end']}  {word['word']}")
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
