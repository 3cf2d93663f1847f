"""Packed and padded documents give the same results, in every masked LM of transformers that can be built tiny."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as T
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from benchmarks.architectures import SIZES, build
from mlmkit import packing
from mlmkit.model import MaskedLM
from mlmkit.packing import Pack, enable_packing, packed_inputs, pad_pack

PACKABLE = {
    "albert", "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "esm", "esmc", "eurobert", "gte",
    "jina_embeddings_v3", "layoutlm", "modernbert", "modernvbert", "neomme", "nomic_bert", "roberta",
    "roberta-prelayernorm", "roc_bert", "ultrabert", "ultravbert", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
# Without the attention interface, or mixing positions elsewhere too: packing must be refused.
UNPACKABLE = {
    "bart", "big_bird", "convbert", "deberta", "deberta-v2", "flaubert", "fnet", "funnel", "ibert", "longformer",
    "luke", "mbart", "megatron-bert", "mobilebert", "mpnet", "mra", "mvp", "nystromformer", "perceiver", "reformer",
    "rembert", "roformer", "squeezebert", "tapas", "xlm", "yoso",
}  # fmt: skip
# For gradients: rope with a sliding window, position ids that begin at 2, tied and untied heads.
FAMILIES = ["bert", "modernbert", "roberta", "eurobert", "distilbert", "esm"]


def model_and_documents(name: str) -> tuple[MaskedLM, list[torch.Tensor]]:
    """Return a model and documents: one of maximum length, single tokens, and lengths between."""
    model = MaskedLM(build(name))
    generator = torch.Generator().manual_seed(0)
    lengths = [13, model.max_length(), 1, *torch.randint(2, 40, (4,), generator=generator).tolist(), 1]
    half = model.vocabulary_size // 2
    return model, [torch.randint(half, 2 * half, (length,), generator=generator) for length in lengths]


def padded(documents: list[torch.Tensor]) -> dict[str, Any]:
    input_ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    is_token = torch.arange(input_ids.shape[1]) < torch.tensor([len(document) for document in documents])[:, None]
    positions = is_token.flatten().nonzero().squeeze(1)
    return {"positions": positions, "input_ids": input_ids, "attention_mask": is_token.long()}


def lay_end_to_end(model: MaskedLM, documents: list[torch.Tensor]) -> Pack:
    lengths = [len(document) for document in documents]
    position_ids = torch.cat([torch.arange(length) for length in lengths]) + model.position_offset
    ends = torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32)
    return Pack(torch.cat(documents)[None], position_ids[None], ends, max(lengths))


def packed(model: MaskedLM, documents: list[torch.Tensor]) -> dict[str, Any]:
    return {"positions": torch.arange(sum(map(len, documents))), **packed_inputs(lay_end_to_end(model, documents))}


def gradients(model: MaskedLM, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    targets = torch.arange(len(inputs["positions"]), device=model.device) % model.vocabulary_size
    model.loss_sum(targets=targets, **inputs).backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    assert scale > 0.1
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, rtol=0, atol=bound * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_architecture_is_here():
    """If a new version of transformers has another, add it to one of the two sets."""
    assert set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) <= PACKABLE | UNPACKABLE


@pytest.mark.parametrize("name", sorted(PACKABLE & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)))
def test_packed_equals_padded_and_documents_do_not_see_each_other(name):
    model, documents = model_and_documents(name)
    assert model.max_length() in (62, 64)
    with torch.no_grad():
        expected = model.logits(**padded(documents))
        assert enable_packing(model)
        found = model.logits(**packed(model, documents))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)

        changed = [*documents[:3], documents[3].flip(0), *documents[4:]]
        after = model.logits(**packed(model, changed))
    begin = sum(map(len, documents[:3]))
    end = begin + len(documents[3])
    assert torch.equal(after[:begin], found[:begin])
    assert torch.equal(after[end:], found[end:])
    assert not torch.equal(after[begin:end], found[begin:end])


@pytest.mark.parametrize("name", sorted(UNPACKABLE & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)))
def test_what_cannot_be_packed_is_found_out_and_left_as_it_was(name):
    model = MaskedLM(build(name))
    inputs = packing.probe_inputs(model, [9])
    with torch.no_grad():
        before = model.logits(**inputs)
        assert not enable_packing(model)
        torch.testing.assert_close(model.logits(**inputs), before, atol=2e-6, rtol=0)  # Reformer hashes randomly


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_gradients_equal_padded_ones(name):
    model, documents = model_and_documents(name)
    model.double()
    expected = gradients(model, padded(documents))
    model.float()
    assert enable_packing(model)
    model.double()
    assert_same_gradients(gradients(model, packed(model, documents)), expected, 1e-9)


# ------------------------------------------------------------------ what the probe must not miss


def test_a_buffer_as_long_as_the_position_table_is_found_out(monkeypatch):
    """Segment ids come from a buffer of that length: too short for a longer pack, enough for a short one."""
    monkeypatch.setitem(SIZES, "max_position_embeddings", 512)
    model = MaskedLM(build("bert"))
    embeddings: Any = model.network.base_model.embeddings

    def add(_module, inputs, named):
        return inputs, named | {"token_type_ids": torch.zeros(1, 512).long()[:, : named["input_ids"].shape[1]]}

    embeddings.register_forward_pre_hook(add, with_kwargs=True)
    assert not enable_packing(model)


def test_position_ids_that_are_not_taken_are_found_out():
    model = MaskedLM(build("bert"))
    embeddings: Any = model.network.base_model.embeddings

    def ignore(_module, inputs, named):
        return inputs, named | {"position_ids": (torch.arange(named["input_ids"].shape[1]) % 64)[None]}

    embeddings.register_forward_pre_hook(ignore, with_kwargs=True)
    assert not enable_packing(model)


@pytest.mark.parametrize("extra", [{"softcap": 50.0}, {"attention_mask": torch.full((1, 1, 1, 1), 1e-9)}])
def test_an_attention_with_more_to_it_is_found_out(monkeypatch, extra):
    """Its effect is too small to show in the logits of random weights."""
    real = packing._packed_attention

    def with_more(module, query, key, value, attention_mask, **named):
        mask = extra.get("attention_mask", attention_mask)
        return real(module, query, key, value, mask, **named | ({} if "attention_mask" in extra else extra))

    T.AttentionInterface.register(packing.PACKED_ATTENTION, with_more)
    try:
        assert not enable_packing(MaskedLM(build("bert")))
    finally:
        T.AttentionInterface.register(packing.PACKED_ATTENTION, real)
    assert enable_packing(MaskedLM(build("bert")))


# ------------------------------------------------------------------ packs of fixed shape


def test_a_padded_pack_has_the_shapes_asked_for():
    model, documents = model_and_documents("roberta")
    pack = lay_end_to_end(model, documents[:1])
    fixed = pad_pack(pack, total=100, most=3, longest=62, pad_id=3)
    assert fixed.input_ids.shape == fixed.position_ids.shape == (1, 100)
    assert fixed.longest == 62
    assert fixed.cu_seqlens.tolist() == [0, 13, 75, 100, 100, 100]
    assert fixed.cu_seqlens.dtype == torch.int32
    assert fixed.input_ids[0, :13].tolist() == pack.input_ids[0].tolist()
    assert set(fixed.input_ids[0, 13:].tolist()) == {3}
    assert fixed.position_ids[0].tolist() == [*range(2, 15), *range(2, 64), *range(2, 27)]
    full = pad_pack(pack, total=13, most=1, longest=13, pad_id=3)
    assert (full.input_ids.shape, full.cu_seqlens.tolist()) == ((1, 13), [0, 13, 13])


@pytest.mark.parametrize("sizes", [(12, 3, 13), (13, 0, 13), (13, 1, 12)])
def test_a_pack_that_does_not_fit_is_refused(sizes):
    model, documents = model_and_documents("bert")
    total, most, longest = sizes
    with pytest.raises(ValueError, match="1 documents, 13 tokens"):
        pad_pack(lay_end_to_end(model, documents[:1]), total=total, most=most, longest=longest, pad_id=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_neither_logits_nor_gradients(name):
    model, documents = model_and_documents(name)
    assert enable_packing(model)
    model.double()
    inputs = packed(model, documents)
    fixed = pad_pack(lay_end_to_end(model, documents), total=300, most=20, longest=model.max_length(), pad_id=0)
    others = {"positions": inputs["positions"], **packed_inputs(fixed)}
    with torch.no_grad():
        torch.testing.assert_close(model.logits(**others), model.logits(**inputs), atol=1e-10, rtol=1e-10)
    assert_same_gradients(gradients(model, others), gradients(model, inputs), 1e-10)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [4, 2])
def test_both_forms_of_attention_agree(window, heads):
    """The compiled and the eager form, with empty documents and grouped queries."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 1, 14, 14, 40, 40, 40], dtype=torch.int32)
    query, key, value = (
        torch.randn(1, count, 40, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for count in (4, heads, heads)
    )
    weights = torch.randn(1, 40, 4, 8, dtype=torch.float64, generator=generator)
    results = []
    for form in (packing._one_by_one, packing._padded):
        output = form(query, key, value, ends, 30, 0.3, window)
        results.append([output, *torch.autograd.grad((output * weights).sum(), (query, key, value))])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [4, 2])
def test_varlen_attn_is_asked_for_the_same_attention(window, heads):
    """By torch's own function, on a kernel for the CPU that is written out here as torch documents its arguments."""
    from torch.nn.attention import varlen  # three seconds

    @varlen._varlen_attn.register_kernel("cpu")
    def _(query, key, value, ends, _ends_k, _max_q, _max_k, _is_causal, scale, reach, *_):
        outputs = []
        for begin, end in pairwise(ends.tolist()):
            states = (each[begin:end].transpose(0, 1) for each in (query, key, value))
            q, k, v = (each.repeat_interleave(query.shape[1] // each.shape[0], 0) for each in states)
            behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            is_seen = ((behind <= reach[0]) | (reach[0] < 0)) & ((-behind <= reach[1]) | (reach[1] < 0))
            outputs.append((q @ k.mT * scale).masked_fill(~is_seen, -torch.inf).softmax(-1) @ v)
        output = torch.cat(outputs, 1).transpose(0, 1).contiguous()
        return output, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, count, 40, 8, generator=generator) for count in (4, heads, heads))
    ends = torch.tensor([0, 1, 14, 14, 40, 40], dtype=torch.int32)
    forms = (packing._on_cuda, packing._one_by_one)
    found, expected = (form(query, key, value, ends, 30, 0.3, window) for form in forms)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
