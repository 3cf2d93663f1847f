"""Compiled layers on packs of fixed shape: one compilation per kind of layer, and the same numbers as eager."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers as T
from test_packing import assert_same_gradients, lay_end_to_end
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from mlmkit.model import MaskedLM
from mlmkit.packing import Pack, enable_packing, packed_inputs, pad_pack
from mlmkit.train.step import compile_layers

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SPECIALS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
MODERN: dict[str, Any] = SPECIALS | {"local_attention": 8, "global_attn_every_n_layers": 2}
CONFIGS = {
    "bert": lambda: T.BertConfig(**SIZES, hidden_dropout_prob=0.0),
    "modernbert": lambda: T.ModernBertConfig(**SIZES, **MODERN),
}
# ModernBERT's layers: with a sliding window, without, and the first, which lacks a normalisation.
KINDS = {"bert": 1, "modernbert": 3}


@pytest.fixture
def model(request) -> MaskedLM:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = MaskedLM(T.AutoModelForMaskedLM.from_config(CONFIGS[request.param]()))
    assert enable_packing(model)
    return model.train()


def packs(model: MaskedLM, count: int) -> list[Pack]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for documents in torch.randint(1, 8, (count,), generator=generator).tolist():
        lengths = torch.randint(1, 30, (documents,), generator=generator)
        made.append(lay_end_to_end(model, [torch.randint(5, 200, (n,), generator=generator) for n in lengths.tolist()]))
    return made


def loss(model: MaskedLM, pack: Pack, tokens: int) -> torch.Tensor:
    """The loss at every third of the first `tokens` tokens, a number that changes from pack to pack."""
    positions = torch.arange(0, tokens, 3)
    return model.loss_sum(positions, positions % 200, **packed_inputs(pack))


@pytest.mark.parametrize(("model", "kinds"), KINDS.items(), indirect=["model"])
def test_ten_packs_compile_once(model, kinds):
    compiled, eager = [], copy.deepcopy(model)

    def count(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    assert compile_layers(model, backend=count) == 5
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, eager)]
    for number, pack in enumerate(packs(model, 10)):
        tokens = pack.input_ids.shape[1]
        fixed = pad_pack(pack, total=256, most=8, longest=64, pad_id=0)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            value = loss(model, fixed, tokens)
            expected = loss(eager, pack, tokens)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
            (value + expected).backward()
        compiled_grads, eager_grads = (
            {name: parameter.grad for name, parameter in each.named_parameters() if parameter.grad is not None}
            for each in (model, eager)
        )
        assert_same_gradients(compiled_grads, eager_grads, 1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(compiled) == kinds
    assert not counters["graph_break"]
    assert model.state_dict().keys() == eager.state_dict().keys()


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_other_shapes_can_run_without_compiling(model):
    before = [model.logits(torch.arange(5), **packed_inputs(pack)) for pack in packs(model, 3)]
    compile_layers(model, backend=lambda *_: pytest.fail("compiled"))
    with torch.compiler.set_stance("force_eager"):
        after = [model.logits(torch.arange(5), **packed_inputs(pack)) for pack in packs(model, 3)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
