"""`train.checkpoint_activations`: the same weights to the bit, from less memory."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo
import transformers as T
from conftest import refusal
from test_layers import CONFIGS, loss, packs
from test_model import ragged, tiny
from torch._dynamo.backends.debugging import aot_eager
from training import Ranks, same_weights, small_architecture, write_config

from mlmkit.model import MaskedLM
from mlmkit.packing import enable_packing, pad_pack
from mlmkit.train.checkpoints import saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.loop import train
from mlmkit.train.step import checkpoint_layers, compile_layers

ON = "train.checkpoint_activations=true"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
ARCHITECTURES = {
    "bert": {"hidden_dropout_prob": 0.2},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "mlp_dropout": 0.2},
    "deberta-v2": {
        "hidden_dropout_prob": 0.2,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    },  # not packed
}


def configuration(folder: Path, text_file: Path, kind: str, *settings: str) -> Config:
    architecture = small_architecture(folder, model_type=kind, **SIZES, **ARCHITECTURES[kind])
    return write_config(folder, text_file, architecture, "train.steps=4", "train.save_every=2", *settings)


@pytest.mark.parametrize(
    ("kind", "world", "settings"),
    [
        ("bert", 1, ()),
        ("modernbert", 1, ()),
        ("deberta-v2", 1, ()),
        ("bert", 2, ()),
        ("modernbert", 2, ("train.parallel=fsdp",)),
    ],
)
def test_the_weights_are_the_same_to_the_bit(tmp_path, text_file, kind, world, settings):
    """With dropout, in two micro-batches per step."""
    for name, setting in (("off", ()), ("on", (ON,))):
        ranks = Ranks(configuration(tmp_path, text_file, kind, *settings, *setting), tmp_path / name, world)
        assert ranks.wait() == [0] * world, ranks.messages()
    assert same_weights(tmp_path / "on" / "model", tmp_path / "off" / "model")


def test_it_may_change_when_a_run_resumes(tmp_path, text_file):
    run = tmp_path / "run"
    model = train(configuration(tmp_path, text_file, "bert"), run)
    expected = model.rename(tmp_path / "expected")
    shutil.rmtree(saved_checkpoints(run)[-1])
    assert same_weights(train(configuration(tmp_path, text_file, "bert", ON), run), expected)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_less_is_kept_for_the_same_gradients(kind, compiled):
    config = CONFIGS[kind]()
    config.hidden_dropout_prob = config.mlp_dropout = 0.2
    torch._dynamo.reset()
    torch.manual_seed(0)
    usual = MaskedLM(T.AutoModelForMaskedLM.from_config(config))
    models, results = [usual, copy.deepcopy(usual)], []
    checkpoint_layers(models[1])
    pack = packs(usual, 1)[0]
    for model in models:
        assert enable_packing(model.eval())
        if compiled:
            compile_layers(model.train(), backend=aot_eager)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(
                model.train(), pad_pack(pack, total=256, most=8, longest=64, pad_id=0), pack.input_ids.shape[1]
            )
        value.backward()
        grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        results.append((sum(kept.values()), value, grads))
    (all_of_it, value, grads), (part, again, same) = results
    assert part < all_of_it / 2
    assert torch.equal(value, again)
    assert grads.keys() == same.keys()
    for name, grad in grads.items():  # compiled, the backward graph is another one, and rounds differently
        torch.testing.assert_close(same[name], grad, rtol=0, atol=1e-6 if compiled else 0, msg=name)


def test_a_layer_that_runs_many_times_is_recomputed():
    """ALBERT's only layer is its last one, and the backward pass needs all of its runs."""
    model = tiny("albert").eval()
    input_ids, attention_mask, positions, targets = ragged()

    def kept() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.loss_sum(positions, targets, input_ids=input_ids, attention_mask=attention_mask)
        return sum(sizes.values())

    before = kept()
    checkpoint_layers(model)
    assert kept() < before / 4


def test_layers_that_keep_a_cache_are_refused_in_one_line(capsys, tmp_path, text_file):
    write_config(tmp_path, text_file, small_architecture(tmp_path))
    settings = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    (tmp_path / "architecture.json").write_text(json.dumps({"model_type": "bart", **settings, **heads}))
    arguments = ["train", tmp_path / "config.toml", "--output", tmp_path / "run", "--set", ON]
    assert "train.checkpoint_activations does not work with a bart model: leave it out" in refusal(capsys, *arguments)
