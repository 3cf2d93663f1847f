"""Tokenising, caching, windows."""

import os
import pickle
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from conftest import PORTUGUESE, paragraphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import stored

from mlmkit.corpus import Corpus, encode_documents, tokenize
from mlmkit.errors import UserError
from mlmkit.files import recorded_sha256, verifying
from mlmkit.locations import Source
from mlmkit.masking import document_key
from mlmkit.shards import finish, make_shards, plan_corpus
from mlmkit.token_cache import cache_folder, load_corpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.spans import CorpusWindows, index_windows
from mlmkit.windows import cut_windows, nearest_window, overlapping_windows, ranges

lengths_strategy = st.lists(st.integers(0, 60), min_size=1, max_size=10).map(lambda values: np.array(values))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------ tokenising


@pytest.fixture
def wordpiece(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder("wordpiece"))


@pytest.fixture
def entries(tmp_path, monkeypatch) -> Path:
    """The folder of cached tokens, in a token cache of the test's own."""
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_corpus_is_what_transformers_says(wordpiece, tokenizer_folder, text_file):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer_folder("wordpiece"))
    stored = load_corpus(Source(str(text_file)), wordpiece)
    documents, corpus = paragraphs(), stored.part(0, len(stored))
    assert len(corpus) == len(documents)
    for index, text in enumerate(documents):
        here = slice(corpus.starts[index], corpus.starts[index + 1])
        expected = reference(text, add_special_tokens=False, split_special_tokens=True)
        assert corpus.ids[here].tolist() == expected["input_ids"]
        assert corpus.words[here].tolist() == expected.word_ids()
        assert int(corpus.keys[index]) == document_key(text)
        assert corpus.text_sizes[index].tolist() == [len(text.split()), len(text), len(text.encode()), 0]


def test_a_stored_corpus_is_the_one_in_memory(wordpiece, tmp_path):
    """Also where the shards end within the documents asked for, and without words."""
    texts = [*paragraphs()[:40], "", *paragraphs()[40:60]]
    expected = tokenize(texts, wordpiece)
    corpus = stored(expected, tmp_path / "corpus", shards=7)
    assert (len(corpus), corpus.tokens, corpus.sizes) == (len(expected), expected.tokens, expected.sizes)
    assert corpus.lengths.tolist() == expected.lengths.tolist()
    assert np.concatenate([*corpus.key_blocks()]).tolist() == expected.keys.tolist()
    assert np.concatenate([block.ids for block in corpus.blocks()]).tolist() == expected.ids.tolist()
    for begin, end in ((0, 61), (0, 1), (5, 23), (60, 61), (30, 30)):
        assert pickle.dumps(corpus.part(begin, end)) == pickle.dumps(expected.part(begin, end))


def test_a_stored_corpus_travels_as_its_place(wordpiece, text_file):
    corpus = load_corpus(Source(str(text_file)), wordpiece)
    corpus.part(0, 1)  # opens files
    received = pickle.loads(pickle.dumps(corpus))
    assert pickle.dumps(received.part(3, 9)) == pickle.dumps(corpus.part(3, 9))
    assert (received.name, received.fingerprint) == (str(text_file), corpus.fingerprint)


def test_cache_is_used_and_follows_content_tokenizer_and_options(wordpiece, tokenizer_folder, tmp_path, entries):
    path = write(tmp_path / "a.txt", b"one two\n\nthree\n")
    first = load_corpus(Source(str(path)), wordpiece)
    copy = load_corpus(Source(str(write(tmp_path / "copy.txt", path.read_bytes()))), wordpiece)
    assert copy.lengths.tolist() == first.lengths.tolist()
    assert len(list(entries.iterdir())) == 1
    load_corpus(Source(str(path), blank_line=True), wordpiece)
    load_corpus(Source(str(path)), Tokenizer.from_folder(tokenizer_folder("bpe")))
    assert not load_corpus(Source(str(path)), wordpiece, words=False).has_words
    write(path, b"one two\n\nfour\n")
    assert load_corpus(Source(str(path)), wordpiece).fingerprint != first.fingerprint
    assert len(list(entries.iterdir())) == 5
    assert not list(entries.glob(".*"))


def test_nothing_is_left_in_the_cache_when_reading_fails(wordpiece, tmp_path, entries):
    for content in (b"good\n\xff\n", b"", b" \n\t\n"):
        with pytest.raises(UserError):
            load_corpus(Source(str(write(tmp_path / "a.txt", content))), wordpiece)
    assert not list(entries.iterdir())


@pytest.mark.parametrize("room", [0, 1000, 5000])
def test_a_full_disk_is_named_and_nothing_is_left(wordpiece, tmp_path, entries, room):
    """Simulated by a limit of `room` bytes per file: a different error in the same code."""
    path = write(tmp_path / "a.txt", "\n".join(paragraphs()).encode())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot use the token cache .*: set MLMKIT_CACHE to another folder"):
            load_corpus(Source(str(path)), wordpiece)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(entries.iterdir())


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", ["ids.npy", "words.npy", "documents.npy", "sizes.npy", "tokens.json"])
@pytest.mark.parametrize("damage", [flip, lambda content: content[: len(content) // 2], lambda _: b"", None])
def test_a_damaged_cache_is_made_again(wordpiece, tmp_path, entries, caplog, name, damage):
    path = write(tmp_path / "a.txt", b"one two three\nfour\n")
    expected = pickle.dumps(load_corpus(Source(str(path)), wordpiece).part(0, 2))
    (entry,) = entries.iterdir()
    (file,) = entry.rglob(name)
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(content))
    assert pickle.dumps(load_corpus(Source(str(path)), wordpiece).part(0, 2)) == expected
    # Without tokens.json, the shards are complete and the corpus is not.
    said = [] if file.name == "tokens.json" and damage is None else [entry]
    assert caplog.messages == [f"the token cache {folder} is damaged: tokenising {path} again" for folder in said]
    assert file.read_bytes() == content


def test_a_text_that_grows_while_it_is_read_is_not_kept_under_its_old_hash(wordpiece, tmp_path, entries):
    path = write(tmp_path / "a.txt", b"one two three\n")
    source = Source(str(path))
    folder = cache_folder(source, wordpiece)
    plan_corpus(source, wordpiece, folder, words=True)
    write(path, b"one two three\nfour\n")
    make_shards(folder, 0, wordpiece)
    with pytest.raises(UserError, match="was changed while it was being read"):
        finish(folder)
    assert len(load_corpus(source, wordpiece)) == 2
    write(path, b"one two three\n")
    assert len(load_corpus(source, wordpiece)) == 1


def test_a_file_is_hashed_once(tmp_path, monkeypatch, entries):
    path = write(tmp_path / "a.txt", b"text")
    old = path.stat().st_mtime_ns - 10**10
    hashed = []
    monkeypatch.setattr("mlmkit.files.file_sha256", lambda path: hashed.append(path) or f"hash {len(hashed)}")
    assert [recorded_sha256([path])[0] for _ in range(2)] == ["hash 1", "hash 2"]  # too young: it may change unseen
    os.utime(path, ns=(old, old))
    assert [recorded_sha256([path])[0] for _ in range(2)] == ["hash 3", "hash 3"]
    with verifying():
        assert recorded_sha256([path])[0] == "hash 4"
    assert recorded_sha256([path])[0] == "hash 4"
    write(path, b"tex")
    os.utime(path, ns=(old, old))
    assert recorded_sha256([path])[0] == "hash 5"
    os.utime(path, ns=(old - 1, old - 1))
    assert recorded_sha256([path])[0] == "hash 6"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_who_may_read_the_cache(wordpiece, tmp_path, entries, umask):
    path = write(tmp_path / "a.txt", b"one two three\n")
    before = os.umask(umask)
    try:
        len(CorpusWindows(load_corpus(Source(str(path)), wordpiece), 13))
    finally:
        os.umask(before)
    for made in entries.parent.rglob("*"):
        assert made.stat().st_mode & 0o777 == (0o777 if made.is_dir() else 0o666) & ~umask


@given(st.lists(st.text(alphabet="ab ", max_size=19), max_size=20), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_texts_are_tokenised_in_batches_of_bounded_size(wordpiece, texts, keep_blank):
    """A text that does not fit comes in stretches; together they are the tokens of the whole texts."""
    pieces = [(text[at : at + 5], at + 5 >= len(text)) for text in texts for at in range(0, len(text) or 1, 5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlmkit.corpus.CHARACTERS_PER_BATCH", 12)
        patch.setattr("mlmkit.corpus.DOCUMENTS_PER_BLOCK", 5)
        stretches = list(encode_documents(pieces, wordpiece, keep_blank=keep_blank))
    assert sum(stretch.texts for stretch in stretches) == len(texts)
    kept = [text for text in texts if keep_blank or text.strip()]
    assert sum(stretch.blank for stretch in stretches) == len(texts) - len(kept)
    assert max((len(stretch.lengths) for stretch in stretches), default=0) <= 5
    ids: list[int] = []
    closed = 0
    for stretch in stretches:
        ids += stretch.ids.tolist()
        closed += int(stretch.lengths.sum())
        ids = ids[:closed] if stretch.is_dropped else ids
    if kept:
        expected = tokenize(kept, wordpiece)
        assert ids == expected.ids.tolist()
        for name in ("keys", "text_sizes", "lengths"):
            joined = np.concatenate([getattr(stretch, name) for stretch in stretches])
            assert joined.tolist() == getattr(expected, name).tolist()


def test_fingerprint_is_of_texts_and_order_not_of_the_tokenizer(wordpiece, tokenizer_folder):
    bpe = Tokenizer.from_folder(tokenizer_folder("bpe"))
    assert tokenize(PORTUGUESE, wordpiece).fingerprint == tokenize(PORTUGUESE, bpe).fingerprint
    assert tokenize(PORTUGUESE, wordpiece).fingerprint != tokenize(PORTUGUESE[::-1], wordpiece).fingerprint


def test_documents_without_tokens_are_kept(wordpiece):
    corpus = tokenize(["", "a b", "\u200b"], wordpiece)
    assert len(corpus) == 3
    assert corpus.lengths[0] == 0
    assert tokenize([""], wordpiece).starts.tolist() == [0, 0]


# ------------------------------------------------------------------ windows


@given(lengths_strategy, st.integers(1, 20), st.integers(1, 9), st.integers(1, 4), st.randoms())
@settings(deadline=None)
def test_windows_are_found_by_their_numbers(lengths, capacity, tokens_a_word, shards, rng):
    """Document, offsets, key, tokens and the beginning of the first word, whatever is asked for in which order."""
    offset = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    keys, sizes = np.arange(len(lengths)).astype(np.uint64) + 7, np.zeros((len(lengths), 4), np.int64)
    corpus = Corpus(offset, (offset // tokens_a_word).astype(np.int32), starts, keys, sizes)
    expected = cut_windows(lengths, capacity)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlmkit.train.spans.GROUP", 3)
        patch.setattr("mlmkit.train.spans.LOOKED_BACK", 2)
        windows = CorpusWindows(stored(corpus, Path(folder), shards=min(shards, len(lengths))), capacity)
        assert len(windows) == len(expected)
        numbers = np.array(rng.sample(range(len(expected)), rng.randint(0, len(expected))), np.int64)
        spans = windows.locate(numbers)
        for name in ("document", "start", "length"):
            assert spans[name].tolist() == getattr(expected, name)[numbers].tolist()
        assert spans["key"].tolist() == keys[spans["document"]].tolist()
        tokens = ranges(starts[spans["document"]] + spans["start"], spans["length"])
        assert windows.ids(spans).tolist() == offset[tokens].tolist()
        assert windows.word_begins(spans).tolist() == (offset[tokens] % tokens_a_word == 0).tolist()
        assert windows.word_starts(spans).tolist() == (spans["start"] // tokens_a_word * tokens_a_word).tolist()


def test_a_damaged_index_of_windows_is_made_again(wordpiece, tmp_path, entries, caplog):
    (tmp_path / "a.txt").write_text("\n".join(paragraphs()))
    corpus = load_corpus(Source(str(tmp_path / "a.txt")), wordpiece)
    expected = index_windows(corpus, 13).tolist()
    assert expected[-1] == len(cut_windows(corpus.lengths, 13))
    (index,) = (entries.parent / "windows").rglob("index.npy")
    content = index.read_bytes()
    for damaged in (content[: len(content) // 2], b"half", flip(content)):
        index.unlink()
        index.write_bytes(damaged)
        caplog.clear()
        assert index_windows(corpus, 13).tolist() == expected
        assert caplog.messages == [f"the token cache {index.parent} is damaged: rebuilding it"]


@given(lengths_strategy, st.integers(1, 20))
def test_cut_windows_cover_each_token_once(lengths, capacity):
    windows = cut_windows(lengths, capacity)
    for document, length in enumerate(lengths):
        here = windows.document == document
        assert here.sum() == -(-length // capacity)
        covered = [t for s, n in zip(windows.start[here], windows.length[here], strict=True) for t in range(s, s + n)]
        assert covered == list(range(length))
        if here.any():
            assert windows.length[here].max() <= capacity
            assert windows.length[here].max() - windows.length[here].min() <= 1


@given(lengths_strategy, st.integers(1, 20))
def test_overlapping_windows_follow_their_definition(lengths, capacity):
    """Brute force: equal windows over the document, each token scored by the one whose centre is nearest."""
    windows = overlapping_windows(lengths, capacity)
    document = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    chosen = nearest_window(windows, document, offset)
    for d, i, row in zip(document.tolist(), offset.tolist(), chosen.tolist(), strict=True):
        assert windows.document[row] == d
        assert windows.start[row] <= i < windows.start[row] + windows.length[row]
        rows = np.flatnonzero(windows.document == d).tolist()
        distance = {r: abs(2 * i - (2 * windows.start[r] + windows.length[r] - 1)) for r in rows}
        assert row == min(rows, key=lambda r: (distance[r], r))
    for d, n in enumerate(lengths.tolist()):
        here = windows.document == d
        assert set(windows.length[here].tolist()) <= {min(n, capacity)}
        if n > capacity:
            starts = windows.start[here]
            assert starts[0] == 0
            assert starts[-1] == n - capacity
            assert np.diff(starts).max() <= max(capacity // 2, 1)
