"""Tokenising, caching, windows."""

import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from conftest import PORTUGUESE, paragraphs
from hypothesis import given
from hypothesis import strategies as st

from mlmkit.corpus import Corpus, _batches, cache_folder, gather, load_corpus, stream_corpus, tokenize
from mlmkit.errors import UserError
from mlmkit.locations import Source
from mlmkit.masking import document_key
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import cut_windows, nearest_window, overlapping_windows, window_table

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
    corpus = load_corpus(Source(str(text_file)), wordpiece)
    documents = paragraphs()
    assert len(corpus) == len(documents)
    for index, text in enumerate(documents):
        here = slice(corpus.starts[index], corpus.starts[index + 1])
        expected = reference(text, add_special_tokens=False, split_special_tokens=True)
        assert corpus.ids[here].tolist() == expected["input_ids"]
        assert corpus.words[here].tolist() == expected.word_ids()
        assert int(corpus.keys[index]) == document_key(text)
        assert corpus.text_sizes[index].tolist() == [len(text.split()), len(text), len(text.encode()), 0]


def test_cache_is_used_and_follows_content_tokenizer_and_options(wordpiece, tokenizer_folder, tmp_path, entries):
    path = write(tmp_path / "a.txt", b"one two\n\nthree\n")
    first = load_corpus(Source(str(path)), wordpiece)
    copy = load_corpus(Source(str(write(tmp_path / "copy.txt", path.read_bytes()))), wordpiece)
    assert copy.starts.tolist() == first.starts.tolist()
    assert len(list(entries.iterdir())) == 1
    load_corpus(Source(str(path), blank_line=True), wordpiece)
    load_corpus(Source(str(path)), Tokenizer.from_folder(tokenizer_folder("bpe")))
    write(path, b"one two\n\nfour\n")
    assert load_corpus(Source(str(path)), wordpiece).fingerprint != first.fingerprint
    assert len(list(entries.iterdir())) == 4
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
        with pytest.raises(UserError, match=r"cannot use the token cache .*: point MLMKIT_CACHE elsewhere"):
            load_corpus(Source(str(path)), wordpiece)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(entries.iterdir())


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", ["ids", "words", "starts", "keys", "text_sizes", "meta.json"])
@pytest.mark.parametrize("damage", [flip, lambda content: content[: len(content) // 2], lambda _: b"", None])
def test_a_damaged_cache_is_made_again(wordpiece, tmp_path, entries, caplog, name, damage):
    path = write(tmp_path / "a.txt", b"one two three\nfour\n")
    expected = pickle.dumps(load_corpus(Source(str(path)), wordpiece).part(0, 2))
    (entry,) = entries.iterdir()
    content = (entry / name).read_bytes()
    (entry / name).unlink()
    if damage is not None:
        (entry / name).write_bytes(damage(content))
    assert pickle.dumps(load_corpus(Source(str(path)), wordpiece).part(0, 2)) == expected
    assert caplog.messages == [f"the token cache {entry} is damaged: tokenising {path} again"]
    assert (entry / name).read_bytes() == content


def test_a_text_that_grows_while_it_is_read_is_not_kept_under_its_old_hash(wordpiece, tmp_path, entries):
    path = write(tmp_path / "a.txt", b"one two three\n")
    source = Source(str(path))
    folder = cache_folder(source, wordpiece)
    write(path, b"one two three\nfour\n")
    with pytest.raises(UserError, match="was changed while it was being read"):
        list(stream_corpus(source, wordpiece, folder))
    assert folder.parent == entries and not list(entries.iterdir())
    assert len(load_corpus(source, wordpiece)) == 2
    write(path, b"one two three\n")
    assert len(load_corpus(source, wordpiece)) == 1


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_who_may_read_the_cache(wordpiece, tmp_path, entries, umask):
    path = write(tmp_path / "a.txt", b"one two three\n")
    before = os.umask(umask)
    try:
        window_table(load_corpus(Source(str(path)), wordpiece), 13)
    finally:
        os.umask(before)
    for made in entries.parent.rglob("*"):
        assert made.stat().st_mode & 0o777 == (0o777 if made.is_dir() else 0o666) & ~umask


@given(st.lists(st.text(alphabet="ab", max_size=9), max_size=20))
def test_texts_are_tokenised_in_batches_of_bounded_size(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlmkit.corpus.CHARACTERS_PER_BATCH", 12)
        patch.setattr("mlmkit.corpus.DOCUMENTS_PER_BLOCK", 5)
        batches = list(_batches(texts))
    assert [text for batch in batches for text in batch] == texts
    for batch in batches:
        assert 1 <= len(batch) <= 5
        assert len(batch) == 1 or sum(map(len, batch)) <= 12


def test_fingerprint_is_of_texts_and_order_not_of_the_tokenizer(wordpiece, tokenizer_folder):
    bpe = Tokenizer.from_folder(tokenizer_folder("bpe"))
    assert tokenize(PORTUGUESE, wordpiece).fingerprint == tokenize(PORTUGUESE, bpe).fingerprint
    assert tokenize(PORTUGUESE, wordpiece).fingerprint != tokenize(PORTUGUESE[::-1], wordpiece).fingerprint


def test_documents_without_tokens_are_kept(wordpiece):
    corpus = tokenize(["", "a b", "\u200b"], wordpiece)
    assert len(corpus) == 3
    assert corpus.lengths[0] == 0
    assert tokenize([""], wordpiece).starts.tolist() == [0, 0]


def test_a_cached_corpus_travels_as_its_place(wordpiece, text_file):
    corpus = load_corpus(Source(str(text_file)), wordpiece)
    sent = pickle.dumps(corpus)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert (received.ids == corpus.ids).all()
    assert (received.name, received.fingerprint) == (str(text_file), corpus.fingerprint)
    in_memory = corpus.part(2, 9)
    assert (pickle.loads(pickle.dumps(in_memory)).ids == in_memory.ids).all()


# ------------------------------------------------------------------ windows


def test_a_cached_table_of_windows_is_the_one_made_in_memory(wordpiece, tmp_path, entries, monkeypatch, caplog):
    monkeypatch.setattr("mlmkit.windows.DOCUMENTS_PER_BLOCK", 7)
    (tmp_path / "a.txt").write_text("\n".join(paragraphs()))
    corpus = load_corpus(Source(str(tmp_path / "a.txt")), wordpiece)
    for _ in range(2):  # written, then found
        table = window_table(corpus, 13)
        assert isinstance(table, np.memmap)
        expected = cut_windows(corpus.lengths, 13)
        assert np.array_equal(table[:, :3].T, [expected.document, expected.start, expected.length])
        assert (table == window_table(corpus.part(0, len(corpus)), 13)).all()
    assert corpus.folder is not None
    assert not list(corpus.folder.glob(".*"))
    rows = corpus.folder / "windows-13" / "rows"
    content, table = rows.read_bytes(), window_table(corpus, 13)
    for damaged in (content[: len(content) // 64 * 32], b"half a row", flip(content)):
        rows.unlink()  # the table above is mapped from it
        rows.write_bytes(damaged)
        caplog.clear()
        assert (window_table(corpus, 13) == table).all()
        assert caplog.messages == [f"the token cache {rows.parent} is damaged: rebuilding it"]


@given(lengths_strategy, st.integers(1, 20), st.integers(1, 9))
def test_windows_know_where_their_first_word_begins(lengths, capacity, tokens_a_word):
    offset = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sizes = np.zeros((len(lengths), 3), np.int64)
    words = (offset // tokens_a_word).astype(np.int32)
    corpus = Corpus(offset, words, starts, np.zeros(len(lengths), np.uint64), sizes)
    for _, start, _, word_start in window_table(corpus, capacity).tolist():
        assert word_start == start // tokens_a_word * tokens_a_word


def test_gathering_from_a_map_is_indexing(tmp_path):
    np.arange(6000, dtype=np.int64).tofile(tmp_path / "a")
    mapped = np.memmap(tmp_path / "a", np.int64, "r").reshape(-1, 3)
    index = np.random.default_rng(0).integers(0, 2000, 1500)
    assert (gather(mapped, index) == mapped[index]).all()
    assert gather(mapped, index[:0]).shape == (0, 3)


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
