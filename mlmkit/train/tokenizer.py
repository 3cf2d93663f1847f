"""Train a tokenizer that `AutoTokenizer` can load."""

import logging
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlmkit.errors import DamagedError, UserError
from mlmkit.files import read_record, write_record
from mlmkit.masking import document_key
from mlmkit.token_cache import cache_errors
from mlmkit.train.config import TokenizerConfig

log = logging.getLogger(__name__)

WORDPIECE_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
BPE_SPECIALS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}

# Longer words are cut. WordPiece turns a word of more than 100 characters into one unknown token, and a higher limit
# costs time: protein sequences take 6 us per letter in words of 100 and 36 us in words of 500. Both trainers took 35 s
# for one word of 200,000.
LONGEST_WORD = 100  # characters, WordPiece
LONGEST_TRAINING_WORD = 1000  # bytes, BPE, while it trains


# English and Portuguese have 3.7 to 4.7 in vocabularies of their own with 16,000 and 32,000 entries.
BYTES_PER_TOKEN = 4


def sample_documents(documents: Iterable[str], tokens: int) -> list[str]:
    """The documents with the highest keys, of about so many tokens together, or all if they are fewer.

    A function of the documents, whatever their order. Raises `UserError` if the first of them is longer.
    """
    limit, size, floor = tokens * BYTES_PER_TOKEN, 0, -1
    sample: list[tuple[int, str]] = []  # a heap
    for text in documents:
        if (key := document_key(text)) <= floor:
            continue
        heappush(sample, (key, text))
        size += len(text.encode())
        while size > limit:  # documents with one key go together
            floor = sample[0][0]
            while sample and sample[0][0] == floor:
                size -= len(heappop(sample)[1].encode())
    if not sample:
        raise UserError(f"tokenizer.train_tokens ({tokens}) is smaller than one document: raise it")
    taken = f"{'all' if floor < 0 else 'a sample of'} {len(sample)} documents"
    log.info("it is trained on %s, about %d of the %d tokens asked for", taken, size // BYTES_PER_TOKEN, tokens)
    return [text for _, text in sample]


def train_tokenizer(
    documents: Callable[[], Iterable[str]], config: TokenizerConfig, max_length: int, cached: Path | None = None
) -> PreTrainedTokenizerFast:
    """WordPiece like BERT's or byte-level BPE like RoBERTa's, with at most `config.entries` entries.

    `documents` is called once per pass over the text. The same text gives the same tokenizer. Accents are always kept:
    BERT drops them when it lowercases, which merges "avó" and "avô". With a file `cached`, it is read from there, or
    written to it.

    Raises `UserError` when `vocab_size` is smaller than the number of characters.
    """
    wordpiece = config.kind == "wordpiece"
    rust = _read(cached) if cached else None
    if not rust:
        log.info("training a %s tokenizer with %d entries", config.kind, config.entries)
        rust = _train_wordpiece(documents, config) if wordpiece else _train_bpe(documents, config)
        if (size := rust.get_vocab_size()) > config.entries:
            raise UserError(
                f"tokenizer.vocab_size ({config.entries}) is too small: the text's characters alone take {size}"
            )
        if cached:
            with cache_errors(cached):
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_record(cached, {"tokenizer": rust.to_str()})
    return _wrap(rust, WORDPIECE_SPECIALS if wordpiece else BPE_SPECIALS, max_length)


def _read(cached: Path) -> RustTokenizer | None:
    try:
        rust = RustTokenizer.from_str(read_record(cached, "it is trained again")["tokenizer"])
    except DamagedError as error:
        if cached.exists():
            log.warning("%s", error)
        return None
    log.info("the tokenizer was trained on this text before: %s", cached)
    return rust


def _train_wordpiece(documents: Callable[[], Iterable[str]], config: TokenizerConfig) -> RustTokenizer:
    def untrained(model: models.WordPiece) -> RustTokenizer:
        rust = RustTokenizer(model)
        rust.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase, strip_accents=False)
        cut = pre_tokenizers.FixedLength(LONGEST_WORD)
        rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), cut])
        rust.decoder = decoders.WordPiece()
        return rust

    def train(vocab_size: int, first: list[str]) -> dict[str, int]:
        rust = untrained(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
        rust.train_from_iterator(documents(), trainer)
        return rust.get_vocab()

    # The library numbers the characters inside words ("##a") in hash map order, which differs from run to run, and
    # breaks ties between merges by these numbers. A pass without merges lists the characters; passing them, sorted, as
    # special tokens makes both deterministic.
    specials = list(WORDPIECE_SPECIALS.values())
    inner = sorted(token for token in train(0, specials) if len(token) == 3 and token.startswith("##"))
    return untrained(models.WordPiece(train(config.entries, specials + inner), unk_token="[UNK]"))


def _train_bpe(documents: Callable[[], Iterable[str]], config: TokenizerConfig) -> RustTokenizer:
    rust = RustTokenizer(models.BPE())
    if config.lowercase:
        rust.normalizer = normalizers.Lowercase()
    words, cut = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(LONGEST_TRAINING_WORD)
    rust.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.entries,
        special_tokens=list(dict.fromkeys(BPE_SPECIALS.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(documents(), trainer)
    rust.pre_tokenizer = words
    return rust


def _wrap(rust: RustTokenizer, specials: dict[str, str], max_length: int) -> PreTrainedTokenizerFast:
    """Add the special tokens, and frame a text with [CLS] and [SEP] or their equivalents."""
    rust.add_special_tokens(list(dict.fromkeys(specials.values())))
    cls, sep = specials["cls_token"], specials["sep_token"]
    rust.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, rust.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=rust, model_max_length=max_length, **specials)
