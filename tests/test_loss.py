"""The sliced vocabulary loss has the value and the gradients of the plain one."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model import VOCABULARY, ragged, tiny

from mlmkit import loss
from mlmkit.loss import linear_cross_entropy_sum
from mlmkit.model import MaskedLM
from mlmkit.train.step import LossModule


@pytest.fixture(autouse=True)
def slices_of_three_rows(monkeypatch):
    """Make many slices, the last of them shorter."""
    monkeypatch.setattr(loss, "SLICE_BYTES", 3 * VOCABULARY * 4)


def plain(model: MaskedLM, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return F.cross_entropy(model.logits(positions, **inputs), targets, reduction="sum")


def batch() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    input_ids, attention_mask, positions, targets = ragged()
    return positions, targets, {"input_ids": input_ids, "attention_mask": attention_mask}


def gradients(model: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "electra", "mobilebert"])
def test_gradient_equals_the_plain_one(name, dtype, bound):
    """MobileBERT's logits are more than a matrix product, so its loss is the plain one."""
    model = tiny(name)
    model.to(dtype)
    positions, targets, inputs = batch()
    assert model.ends_in_linear == (name != "mobilebert")
    found_loss, expected_loss = model.loss_sum(positions, targets, **inputs), plain(model, positions, targets, **inputs)
    assert found_loss.dtype == dtype
    torch.testing.assert_close(found_loss, expected_loss, rtol=bound, atol=0)
    found, expected = gradients(model, found_loss / 7), gradients(model, expected_loss / 7)
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    assert scale > 1e-3
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=bound, atol=bound * scale)


def test_products_in_bfloat16_leave_the_loss_and_the_gradients_in_float32():
    model = tiny("bert")
    positions, targets, inputs = batch()
    expected_loss = plain(model, positions, targets, **inputs)
    expected = gradients(model, expected_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = model.loss_sum(positions, targets, **inputs)
    assert value.dtype == torch.float32
    assert value != value.bfloat16().float()
    torch.testing.assert_close(value, expected_loss, rtol=0.02, atol=0)
    found = gradients(model, value)
    decoder = "network.bert.embeddings.word_embeddings.weight"
    assert found[decoder].dtype == torch.float32
    assert (found[decoder] - expected[decoder]).norm() < 0.05 * expected[decoder].norm()


def test_nothing_masked_is_a_loss_of_zero_and_gradients_of_zero():
    model = tiny("bert")
    _, _, inputs = batch()
    nothing = torch.zeros(0, dtype=torch.long)
    value = model.loss_sum(nothing, nothing, **inputs)
    assert value == 0
    found = gradients(model, value)
    assert "network.bert.embeddings.word_embeddings.weight" in found
    assert not any(grad.any() for grad in found.values())


def test_what_is_frozen_gets_no_gradient():
    model = tiny("bert")
    decoder: Any = model.network.get_output_embeddings()
    decoder.weight.requires_grad_(False)
    positions, targets, inputs = batch()
    found = gradients(model, model.loss_sum(positions, targets, **inputs))
    expected = gradients(model, plain(model, positions, targets, **inputs))
    assert found.keys() == expected.keys()
    assert decoder.weight.grad is None
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_refused_and_not_wrong():
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(VOCABULARY, 4, requires_grad=True)
    value = 0.5 * linear_cross_entropy_sum(hidden, weight, None, torch.arange(7))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_without_gradients_none_are_computed(monkeypatch):
    model = tiny("bert")
    positions, targets, inputs = batch()
    monkeypatch.setattr(loss, "_add_gradients", lambda *_: pytest.fail("gradients under no_grad"))
    with torch.no_grad():
        value = model.loss_sum(positions, targets, **inputs)
        torch.testing.assert_close(value, plain(model, positions, targets, **inputs))


def test_the_model_is_whole_after_a_loss_even_one_that_failed():
    model = tiny("bert")
    positions, targets, inputs = batch()
    before = model.network(**inputs).logits
    model.loss_sum(positions, targets, **inputs)
    with pytest.raises(IndexError):
        model.loss_sum(positions + 1000, targets, **inputs)
    assert torch.equal(model.network(**inputs).logits, before)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradient_under_data_parallelism(parallel, process_group):
    """The wrapped forward uses a matrix that is tied to the embeddings, sharded or not."""
    from torch.distributed.fsdp import fully_shard

    model = tiny("bert")
    positions, targets, inputs = batch()
    expected = gradients(model, plain(model, positions, targets, **inputs))
    wrapped: torch.nn.Module = LossModule(copy.deepcopy(model))
    if parallel == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)
    else:
        encoder: Any = wrapped.model.network.base_model  # pyright: ignore[reportAttributeAccessIssue]
        for layer in encoder.encoder.layer:
            fully_shard(layer)
        fully_shard(wrapped)
    wrapped(positions, targets, inputs).backward()
    for key, parameter in wrapped.named_parameters():
        name = key.removeprefix("module.").removeprefix("model.")
        if name not in expected:
            assert parameter.grad is None
            continue
        grad: Any = parameter.grad
        grad = grad.full_tensor() if parallel == "fsdp" else grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)
