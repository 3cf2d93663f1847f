"""Rows of the last layer that no scored logit depends on: the same numbers without computing them."""

import copy
from typing import Any

import pytest
import torch
from test_model import NAMES, ragged, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mlmkit.model import MaskedLM

BERT = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
SKIPPING = {
    "bert": BERT,
    "roberta": BERT,
    "modernbert": ["attn.Wo", "mlp.Wi", "mlp.Wo"],  # query, key and value are one Linear
    "distilbert": ["attention.q_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"],
    "albert": [],  # its layers are one
    "deberta-v2": ["attention.self.query_proj", *BERT[1:]],  # those of relative positions have other shapes
}


def skipping(model: MaskedLM) -> list[str]:
    """The `Linear`s that leave out rows, by their names in the last layer."""
    names = [name for name, module in model.network.named_modules() if module._forward_pre_hooks]
    return [name.split(f"{model.network.config.num_hidden_layers - 1}.", 1)[1] for name in names]


def trained_on(model: MaskedLM, *, skips_rows: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, with dropout from the same seed."""
    model.skips_rows = skips_rows
    input_ids, attention_mask, positions, targets = ragged()
    torch.manual_seed(0)
    model.zero_grad()
    loss = model.train().loss_sum(positions, targets, input_ids=input_ids, attention_mask=attention_mask)
    loss.backward()
    return loss.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_the_same(name):
    model = tiny(name)
    loss, grads = trained_on(model, skips_rows=True)
    expected, of_all = trained_on(model, skips_rows=False)
    assert grads.keys() == of_all.keys()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, of_all[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "expected"), SKIPPING.items())
def test_which_products_leave_out_rows(name, expected):
    assert skipping(tiny(name)) == expected


def test_the_products_cost_as_many_rows_as_are_scored():
    model = tiny("bert")
    input_ids, attention_mask, positions, _ = ragged()
    counts = []
    for model.skips_rows in (True, False):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.logits(positions, input_ids=input_ids, attention_mask=attention_mask)
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    config = model.network.config
    weights = 2 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    assert counts[1] - counts[0] == 2 * weights * (input_ids.numel() - len(positions))


def test_a_copy_has_positions_of_its_own():
    model = tiny("bert")
    copied = copy.deepcopy(model)
    model._scored.positions = torch.tensor([0])
    assert copied._scored.positions is None
    input_ids, attention_mask, positions, targets = ragged()
    with torch.no_grad():
        found = copied(input_ids, attention_mask, positions, targets)
        model._scored.positions = None
        torch.testing.assert_close(found, model(input_ids, attention_mask, positions, targets), atol=0, rtol=0)


def test_rows_that_later_layers_need_are_computed():
    """The probe looks at the logits too: here a convolution between the last layer and the head mixes positions."""

    def mix(_module: nn.Module, _inputs: object, output: Any) -> Any:
        output["last_hidden_state"] = output[0] + output[0].roll(1, 1)
        return output

    network: Any = tiny("distilbert").network
    network.base_model.transformer.register_forward_hook(mix)
    model = MaskedLM(network)
    assert model.gathers_before_head
    assert not model.skips_rows
