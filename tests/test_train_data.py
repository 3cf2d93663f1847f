"""The training data: order, packs and masks do not depend on ranks, workers or interruptions."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paragraphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import stored

from mlmkit.corpus import Corpus, tokenize
from mlmkit.errors import UserError
from mlmkit.locations import Source
from mlmkit.masking import corrupt
from mlmkit.packing import enable_packing
from mlmkit.pretrained import load_pretrained
from mlmkit.token_cache import load_corpus
from mlmkit.tokenizer import Tokenizer
from mlmkit.train import order
from mlmkit.train.config import Config, DataConfig, MaskingConfig, ModelConfig, RunConfig
from mlmkit.train.data import MicroBatch, TrainingData
from mlmkit.train.order import Cursor, Order, Stream, permute, permute_chunks

seeds = st.integers(0, 2**63 - 1)


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(order, "WINDOWS_PER_BLOCK", 16)


# ------------------------------------------------------------------ the order


@given(st.integers(1, 3000), seeds, st.integers(0, 9))
def test_a_keyed_permutation_is_one(size, seed, number):
    key = Order((Stream("text", 8, 1),), (1.0,), seed)._key(1, [1, number])
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.integers(1, 3000), st.integers(1, 300), seeds)
def test_a_permutation_of_chunks_is_one_and_keeps_neighbours_together(size, chunks, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "CHUNKS", chunks)
        stream = Stream("text", 8, size)
        chunk = stream.chunk
        images = permute_chunks(np.arange(size), stream, Order((stream,), (1.0,), seed)._key(1, [1, 0]))
    assert sorted(images.tolist()) == list(range(size))
    assert chunk == max(1, min(64, size // chunks))
    together = int((np.diff(images) == 1).sum())
    assert together >= (size // chunk) * (chunk - 1) - 2 * chunk  # all but those around the short chunk


def test_permutations_are_uniform_and_unlike_each_other():
    """300 permutations of 256: the images, the differences of neighbours, and those between permutations."""
    one = Order((Stream("text", 8, 1),), (1.0,), 7)
    found = np.array([permute(np.arange(256), 256, one._key(1, [1, number])) for number in range(300)])
    statistics = {
        "place": np.bincount((found // 16 + 16 * (np.arange(256) // 16)).ravel(), minlength=256),
        "next": np.bincount((np.diff(found, axis=1) % 256).ravel(), minlength=256)[1:],
        "both": np.bincount(((found[1:] - found[:-1]) % 256).ravel(), minlength=256),
    }
    for name, counts in statistics.items():
        expected = counts.sum() / len(counts)
        chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
        assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5, name


def test_permutations_of_a_few_are_uniform():
    one = Order((Stream("text", 8, 1),), (1.0,), 7)
    keys = (one._key(1, [1, number]) for number in range(600))
    counts = Counter(tuple(permute(np.arange(3), 3, key).tolist()) for key in keys)
    assert len(counts) == 6
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 25  # 5 degrees of freedom


weights = st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0])


@given(st.lists(st.tuples(st.integers(1, 70), weights), min_size=1, max_size=3), seeds)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_epochs_take_each_source_pass_by_pass(small_blocks, sources, seed):
    """A pass shows each window once, passes follow each other, and an epoch has its share of them."""
    sizes, passes = zip(*sources, strict=True)
    planned = Order(tuple(Stream(str(i), 8, size) for i, size in enumerate(sizes)), passes, seed)
    shown = [Counter() for _ in sizes]
    for epoch in range(4):
        blocks = [planned.block(epoch, block) for block in range(planned.blocks(epoch))]
        assert max((len(source) for source, _, _ in blocks), default=0) < 32
        for block in blocks:
            for source, number, window in np.stack(block, axis=1).tolist():
                shown[source][number, window] += 1
        for size, weight, counts in zip(sizes, passes, shown, strict=True):
            seen = int((epoch + 1) * weight * size)
            assert max(counts.values(), default=1) == 1
            by_pass = Counter(number for number, _ in counts)
            expected = {number: min(size, seen - number * size) for number in range(-(-seen // size))}
            assert by_pass == expected


# ------------------------------------------------------------------ micro-batches


@pytest.fixture(scope="module")
def parts(checkpoint, tmp_path_factory):
    """A model, its tokenizer, and two corpora on disk, one of them in three shards."""
    model, tokenizer = load_pretrained(str(checkpoint("roberta")))
    texts, folder = paragraphs(), tmp_path_factory.mktemp("corpora")
    tokenised = [tokenize(texts[part::2], tokenizer) for part in (0, 1)]
    corpora = [stored(each, folder / str(i), f"{i}.txt", (1, 3)[i]) for i, each in enumerate(tokenised)]
    return model, tokenizer, corpora


def make_data(
    parts,
    *,
    masking=None,
    passes=(1.0, 1.0),
    packed=True,
    max_length=32,
    tokens=128,
    corpora=None,
    fixed=False,
    micro_batches=1,
    steps=1000,
) -> TrainingData:
    model, tokenizer, both = parts
    config = make_config(
        passes,
        masking or MaskingConfig(),
        max_length,
        tokens,
        micro_batches=micro_batches,
        steps=steps,
        seed=5,
        compile=fixed,
    )
    corpora = corpora or both[: len(passes)]
    return TrainingData(config, corpora, tokenizer, packed=packed, position_offset=model.position_offset)


def make_config(
    passes: tuple[float, ...], masking: MaskingConfig, max_length: int, tokens: int, micro_batches: int = 1, **train
) -> Config:
    return Config(
        data=DataConfig(train=("text.txt",) * len(passes), weights=passes),
        model=ModelConfig(max_length=max_length),
        masking=masking,
        train=RunConfig(global_batch_tokens=micro_batches * tokens, micro_batch_tokens=tokens, **train),
    )


def test_fixed_shapes_change_nothing_but_the_padding(parts):
    """Every batch has the same shapes, for torch.compile, and holds the same documents and targets."""
    plain, fixed = (
        make_data(parts, fixed=fixed, micro_batches=2, steps=20).batches(Cursor()) for fixed in (False, True)
    )
    shapes = set()
    for (place, batch), (same_place, padded) in zip(plain, fixed, strict=True):
        assert place == same_place
        for micro, other in zip(batch, padded, strict=True):
            assert (micro.tokens, micro.documents) == (other.tokens, other.documents)
            assert torch.equal(micro.positions, other.positions) and torch.equal(micro.targets, other.targets)
            assert torch.equal(micro.inputs["input_ids"], other.inputs["input_ids"][:, : micro.tokens])
            shapes.add(
                (*(other.inputs[name].shape for name in ("input_ids", "cu_seq_lens_q")), other.inputs["max_length_q"])
            )
    assert len(shapes) == 1


def contents(batch: list[MicroBatch]) -> list[dict]:
    """Everything in a batch, as values that compare."""
    values = [{**micro.inputs, "positions": micro.positions, "targets": micro.targets} for micro in batch]
    lists = [{name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in each.items()} for each in values]
    return [{**each, "documents": micro.documents} for each, micro in zip(lists, batch, strict=True)]


def epoch_of(data: TrainingData, epoch: int) -> Iterator[tuple[MicroBatch, np.ndarray, np.ndarray]]:
    """The micro-batches of an epoch, with source and pass of each row, and its span."""
    for after, block, members in data.rows.packs(Cursor(epoch=epoch)):
        if after.epoch > epoch:
            return
        taken = block.take(members)
        batch = data.lay_out(data.rows.build(taken, data.rows.masking.recipe(0)))
        yield batch, np.stack([taken.source, taken.pass_number], axis=1), taken.spans


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("passes", [(1.0,), (2.0, 1.0)])
def test_an_epoch_shows_each_token_once_a_pass_with_the_masks_of_its_document(
    parts, small_blocks, packed, whole_word, passes
):
    """Packed or padded, however the corpora are cut: the same ids are shown and the same are predicted."""
    _, tokenizer, on_disk = parts
    corpora = [corpus.part(0, len(corpus)) for corpus in on_disk]
    masking = MaskingConfig(0.4, whole_word=whole_word)
    data = make_data(parts, packed=packed, masking=masking, passes=passes)
    expected, shown, asked, targets = {}, {}, Counter(), Counter()
    for source, weight in enumerate(passes):
        corpus = corpora[source]
        for number in range(int(2 * weight), int(3 * weight)):
            arguments = corpus.ids, corpus.lengths, corpus.keys, masking.recipe(0), tokenizer.masking
            expected[source, number] = corrupt(*arguments, seed=5, epoch=number, words=corpus.words)
            shown[source, number] = np.zeros(len(corpus.ids), int)
    for batch, sources, rows in epoch_of(data, 2):
        ids = batch.inputs["input_ids"].numpy()
        assert batch.tokens <= ids.size <= 128
        flat, width = ids.ravel(), ids.shape[1]
        begins = np.cumsum([0, *(rows["length"] + 2)])[:-1] if packed else np.arange(len(rows)) * width
        at = {}
        for begin, (source, number), (document, start, length, *_) in zip(begins, sources, rows.tolist(), strict=True):
            corpus = corpora[source]
            where = corpus.starts[document] + start + np.arange(length)
            places = begin + 1 + np.arange(length)
            assert (flat[places] == expected[source, number].input_ids[where]).all()
            assert (flat[begin], flat[begin + 1 + length]) == (tokenizer.prefix[0], tokenizer.suffix[0])
            shown[source, number][where] += 1
            at.update({int(p): (source, number, int(w)) for p, w in zip(places, where, strict=True)})
        assert batch.documents == list(
            dict.fromkeys(f"{on_disk[s].name}:{d}" for s, d in zip(sources[:, 0], rows["document"], strict=True))
        )
        for position, target in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True):
            asked[at[position]] += 1
            targets[at[position], target] += 1
    assert all((counts == 1).all() for counts in shown.values())
    selected = [(*key, w) for key, corruption in expected.items() for w in corruption.selected.tolist()]
    assert asked == Counter(selected)
    assert targets == Counter(((s, n, w), int(corpora[s].ids[w])) for s, n, w in selected)


def test_the_order_does_not_depend_on_the_masking(parts):
    def shown(masking: MaskingConfig) -> list[list[str]]:
        batches = make_data(parts, masking=masking, steps=30).batches(Cursor())
        return [micro.documents for _, batch in batches for micro in batch]

    assert shown(MaskingConfig()) == shown(MaskingConfig(0.3, whole_word=True))


def test_the_mask_rate_follows_the_run(parts):
    """The masked share goes from the first rate to the last, and a higher rate masks a superset."""
    steps, rates = 80, {}
    for name, masking in {"falling": MaskingConfig(0.6, 0.1), "low": MaskingConfig(0.1)}.items():
        data = make_data(parts, masking=masking, steps=steps)
        rates[name] = [
            {int(position) for micro in batch for position in micro.positions} for _, batch in data.batches(Cursor())
        ]
    assert all(low <= falling for low, falling in zip(rates["low"], rates["falling"], strict=True))
    thirds = [sum(map(len, rates["falling"][begin : begin + 20])) for begin in (0, 30, 60)]
    assert thirds[0] > 1.3 * thirds[1] > 1.3 * 1.3 * thirds[2]
    assert rates["low"][-1] == rates["falling"][-1]


@given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 3), st.booleans())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_number_of_ranks_resumes_anywhere_to_the_same_global_batches(
    parts, small_blocks, step, micro_batches, world, packed
):
    """Across blocks and epochs: an epoch has about 25 packs in 5 blocks."""
    data = make_data(parts, packed=packed, passes=(0.5, 1.0), tokens=512, micro_batches=micro_batches, steps=33)
    straight = list(data.batches(Cursor()))
    cursor = straight[step - 1][0] if step else Cursor()
    cursor = Cursor(**json.loads(json.dumps(vars(cursor))))
    shares = [list(data.batches(cursor, rank=rank, world=world)) for rank in range(world)]
    for (after, whole), *taken in zip(straight[step:], *shares, strict=True):
        assert {place for place, _ in taken} == {after}
        for rank, (_, share) in enumerate(taken):
            assert contents(share) == contents(whole[rank::world])
    assert straight[-1][0].step == 33
    assert micro_batches * 33 < 40 or straight[-1][0].epoch > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_build_the_same_batches(parts, rank):
    data = make_data(parts, micro_batches=3, steps=15)
    batches = [
        list(data.batches(Cursor(2, 0, 2, 999, packs=6), rank=rank, world=2, workers=workers)) for workers in (0, 3)
    ]
    assert [cursor for cursor, _ in batches[0]] == [cursor for cursor, _ in batches[1]]
    assert [contents(batch) for _, batch in batches[0]] == [contents(batch) for _, batch in batches[1]]
    assert [len(batch) for _, batch in batches[0]] == [2 - rank] * 13


def test_gradient_does_not_depend_on_how_the_batch_is_cut(parts):
    """One micro-batch, many small ones and padded ones give the same gradient, in float64."""
    model, _, _ = parts
    _, block, windows = next(make_data(parts, tokens=512).rows.packs(Cursor()))

    def gradient(packed: bool, groups: list[list[int]]) -> torch.Tensor:
        data = make_data(parts, packed=packed)
        network = load_pretrained(str(model.network.name_or_path))[0]
        assert not packed or enable_packing(network)
        network.double()
        recipe = data.rows.masking.recipe(0)
        batch = [data.lay_out(data.rows.build(block.take(group), recipe)) for group in groups]
        masked = sum(len(micro.targets) for micro in batch)
        for micro in batch:
            logits = network.logits(micro.positions, **micro.inputs)
            loss = torch.nn.functional.cross_entropy(logits, micro.targets, reduction="sum")
            (loss / masked).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    whole = gradient(True, [windows])
    singles = gradient(True, [[window] for window in windows])
    padded = gradient(False, [windows[:3], windows[3:]])
    scale = whole.abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(singles, whole, atol=1e-9 * float(scale), rtol=1e-6)
    torch.testing.assert_close(padded, whole, atol=1e-9 * float(scale), rtol=1e-6)


# ------------------------------------------------------------------ odd text


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_odd_documents_are_trained_on(tokenizer_folder, tmp_path, kind):
    """Each token of every line that is not empty is shown once."""
    tokenizer = Tokenizer.from_folder(tokenizer_folder(kind))
    odd = ["\0", "a\0b", "\u200b", "\ufeffx", "[MASK] <mask> [SEP]</s>[PAD]"]
    odd += ["😀👩‍👩‍👧 🏳️‍🌈", "שלום עולם", "مرحبا \u202eabc"]
    lines = ["", *odd, "   ", "\t", "ab " * 100_000, "x" * 50_000, "", *paragraphs()[:5], "last without end"]
    (tmp_path / "odd.txt").write_bytes("\n".join(lines).encode())
    corpus = load_corpus(Source(str(tmp_path / "odd.txt")), tokenizer)
    assert len(corpus) == len([line for line in lines if line.strip()])
    config = make_config((1.0,), MaskingConfig(whole_word=True), 64, 512)
    data = TrainingData(config, [corpus], tokenizer, packed=True)
    shown, starts = Counter(), np.cumsum([0, *corpus.lengths])
    for batch, _, rows in epoch_of(data, 0):
        assert len(batch.positions) == len(batch.targets)
        shown.update(int(starts[d]) + place for d, s, n, *_ in rows.tolist() for place in range(s, s + n))
    assert shown == Counter(range(corpus.tokens))


def test_one_word_of_a_million_tokens_is_masked_as_one_word(parts, tmp_path):
    """Each window must find the draw of the word's first token without reading all tokens in between."""
    _, tokenizer, _ = parts
    count = 1_000_000
    ids = np.full(count, int(tokenizer.masking.ordinary[0]))
    starts, sizes = np.array([0, count]), np.zeros((1, 4), np.int64)
    for key in (3, 4, 5, 6):
        corpus = Corpus(ids, np.zeros(count, np.int32), starts, np.array([key], np.uint64), sizes)
        key_array, corpus = corpus.keys, stored(corpus, tmp_path / str(key))
        data = make_data(parts, masking=MaskingConfig(0.5, whole_word=True), passes=(1.0,), corpora=[corpus])
        recipe = data.rows.masking.recipe(0)
        first = corrupt(
            ids[:1], np.ones(1, np.int64), key_array, replace(recipe, whole_word=False), *(tokenizer.masking,), seed=5
        )
        began = time.process_time()
        for _, block, members in islice(data.rows.packs(Cursor()), 50):
            rows = data.rows.build(block.take(members), recipe)
            assert len(rows.positions) == len(first.selected) * int(block.length[members].sum())
        assert time.process_time() - began < 10


def test_nothing_to_train_on_is_named(parts, tmp_path):
    _, tokenizer, corpora = parts
    with pytest.raises(UserError, match="no room beside 2 special tokens"):
        make_data(parts, max_length=2)
    with pytest.raises(UserError, match=r"no tokens: empty\.txt"):
        make_data(parts, corpora=[corpora[0], stored(tokenize([""], tokenizer), tmp_path / "empty", "empty.txt")])
    with pytest.raises(UserError, match=r"data\.weights leave less than one document"):
        make_data(parts, passes=(1e-5, 1e-5))
    few = stored(tokenize(paragraphs()[:3], tokenizer), tmp_path / "few")
    rare = make_data(parts, corpora=[few], passes=(0.5,), steps=3)
    assert len(list(rare.batches(Cursor()))) == 3


# ------------------------------------------------------------------ processes that end


def test_a_worker_that_is_killed_is_named_and_the_others_end(parts):
    batches = make_data(parts, steps=10**6).batches(Cursor(), workers=2)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(workers[0].pid or 0, ignored)
    for _ in range(20):
        next(batches)
    workers[0].kill()
    with pytest.raises(UserError, match=r"exit code -9.*use fewer workers"):
        for _ in range(500):  # what lies in its pipe still comes
            next(batches)
    assert not multiprocessing.active_children()


def test_what_goes_wrong_in_a_worker_is_said_here(parts):
    data = make_data(parts)
    data.rows.windows[0].corpus = replace(data.rows.corpora[0], folder=Path("missing"))
    with pytest.raises(UserError, match=r"documents\.npy is damaged"):
        list(data.batches(Cursor(), workers=1))
