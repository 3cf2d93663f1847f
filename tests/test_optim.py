"""Optimisers: what each updates, Muon's formulas, bit-identical state after a restore, sharding, schedules."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from interruptions import free_port
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from training import log_lines, stored, write_config
from transformers import AutoModelForMaskedLM

from mlmkit.corpus import tokenize
from mlmkit.documents import read_documents
from mlmkit.errors import UserError
from mlmkit.locations import Source
from mlmkit.model import MaskedLM, probe_inputs
from mlmkit.pretrained import load_pretrained
from mlmkit.tokenizer import Tokenizer
from mlmkit.train import loop
from mlmkit.train.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from mlmkit.train.config_file import load_config
from mlmkit.train.config_tables import SCHEDULES
from mlmkit.train.optimisers import Muon, build_optimizers, hidden_matrices
from mlmkit.train.order import Cursor
from mlmkit.train.presets import build_config, fit_output_bias
from mlmkit.train.schedule import make_schedule

MUON = OptimConfig(name="muon", lr=1e-2, weight_decay=0.1)
STABLE = OptimConfig(name="stable_adamw", lr=1e-2, weight_decay=0.1, eps=1e-3)
# A key's bias has no gradient but rounding, which a small eps would blow up to a step.
CALM = replace(MUON, eps=1e-3)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def one_step(model: MaskedLM, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    """Take one step towards arbitrary targets that depend on the seed."""
    inputs = probe_inputs(model, [20])
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(model.vocabulary_size, (20,), generator=generator)
    model.loss_sum(targets=targets, **inputs).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def weights(model: MaskedLM) -> dict[str, torch.Tensor]:
    """Copies of the weights, gathered if they are sharded."""
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: values.detach().clone() for name, values in whole.items()}


# ------------------------------------------------------------------ who updates what


def test_adamw_decays_matrices_alone(checkpoint):
    model, _ = load_pretrained(str(checkpoint("bert")))
    (adamw,) = build_optimizers(model, OptimConfig(lr=3e-3))
    decay = {p: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if decay[p] == 0} == {
        name for name, _ in model.named_parameters() if name.endswith("bias") or "LayerNorm.weight" in name
    }
    assert all(group["initial_lr"] == 3e-3 for group in adamw.param_groups)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BLOCK = {"bert": 6, "roberta": 6, "electra": 6, "modernbert": 4, "deberta-v2": 6, "mpnet": 6, "roformer": 6}


@pytest.mark.parametrize("kind", [*BLOCK, "distilbert", "albert"])
def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(kind, tokenizer_folder, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model_type": kind, **SMALL, "dim": 32, "n_layers": 2, "n_heads": 2}))
    tokenizer = Tokenizer.from_folder(tokenizer_folder("wordpiece"))
    with torch.device("meta"):
        model = MaskedLM(AutoModelForMaskedLM.from_config(build_config(str(tmp_path / "a.json"), tokenizer, 48)))
    adamw, muon = build_optimizers(model, MUON)
    taken = [[p for group in each.param_groups for p in group["params"]] for each in (adamw, muon)]
    assert {id(p) for p in taken[1]} == {id(p) for p in hidden_matrices(model)}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, taken[0] + taken[1])) == sorted(trained)  # each exactly once
    blocks = 1 if kind == "albert" else 2  # which shares one among its layers
    assert len(taken[1]) == blocks * BLOCK.get(kind, 6)
    names = {id(p): name for name, p in model.named_parameters()}
    assert not [names[id(p)] for p in taken[1] if "embedding" in names[id(p)] or model.vocabulary_size in p.shape]
    assert all(group["initial_lr"] == MUON.lr for each in (adamw, muon) for group in each.param_groups)


def test_frozen_weights_have_no_optimizer(checkpoint):
    model, _ = load_pretrained(str(checkpoint("bert")))
    frozen = hidden_matrices(model)[0]
    frozen.requires_grad_(False)
    optimizers = build_optimizers(model, MUON)
    assert not [p for each in optimizers for group in each.param_groups for p in group["params"] if p is frozen]


def test_a_model_without_hidden_matrices_is_refused_by_muon(checkpoint):
    model, _ = load_pretrained(str(checkpoint("bert")))
    for parameter in hidden_matrices(model):
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match=r"set optim\.name to adamw"):
        build_optimizers(model, MUON)


# ------------------------------------------------------------------ Muon's update


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_updates_as_its_papers_say(shape):
    """Two steps against the formulas in float64: Jordan et al. 2024, Liu et al. 2025. bfloat16 would be 1e-4 off."""
    generator = np.random.default_rng(0)
    start, gradients = generator.normal(size=shape), generator.normal(size=(2, *shape))
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    muon = Muon([parameter], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    expected, momentum = start.copy(), np.zeros(shape)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        muon.step()
        assert parameter.grad.equal(torch.tensor(gradient, dtype=torch.float32))
        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.05 * gradient + 0.95 * momentum
        update = update if shape[0] <= shape[1] else update.T
        update = update / np.linalg.norm(update)
        for _ in range(5):
            gram = update @ update.T
            update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
        update = update if shape[0] <= shape[1] else update.T
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * 0.2 * np.sqrt(max(shape)) * update
    np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-6)


def test_stable_adamw_updates_as_its_paper_says(checkpoint):
    """Three steps, the last with a gradient a hundred times as large, against algorithm 2 of Wortsman et al. 2023."""
    model, _ = load_pretrained(str(checkpoint("bert")))
    (optimizer,) = build_optimizers(model, STABLE)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay.values()) == {0.0, 0.1}
    expected = {p: p.detach().double().numpy().copy() for p in decay}
    first, second = ({p: np.zeros(p.shape) for p in decay} for _ in range(2))
    generator, slowed = torch.Generator().manual_seed(0), 0
    for step, scale in enumerate((1.0, 1.0, 100.0), 1):
        for p, value in expected.items():
            p.grad = scale * torch.randn(p.shape, generator=generator)
            gradient = p.grad.double().numpy()
            first[p] = 0.9 * first[p] + 0.1 * gradient
            second[p] = 0.98 * second[p] + 0.02 * gradient**2
            m, v = first[p] / (1 - 0.9**step), second[p] / (1 - 0.98**step)
            rms = np.sqrt(np.mean(gradient**2 / np.maximum(v, STABLE.eps**2)))
            lr = STABLE.lr / max(1.0, rms)
            slowed += rms > 1.5
            value -= lr * (decay[p] * value + m / (np.sqrt(v) + STABLE.eps))
        optimizer.step()
    assert slowed >= len(decay) / 2  # else this is AdamW
    for p, value in expected.items():
        np.testing.assert_allclose(p.detach().numpy(), value, atol=2e-6, rtol=2e-5)


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("config", [OptimConfig(), MUON, STABLE], ids=["adamw", "muon", "stable_adamw"])
def test_state_comes_back_to_the_bit(checkpoint, kind, config):
    """Steps, state out, state into a fresh model's fresh optimisers, more steps: the same weights."""
    model, _ = load_pretrained(str(checkpoint(kind)))
    optimizers = build_optimizers(model, config)
    for seed in range(3):
        one_step(model, optimizers, seed)
    kept = copy.deepcopy(get_optimizer_state_dict(model, optimizers, options=FLAT))
    other, _ = load_pretrained(str(checkpoint(kind)))
    other.load_state_dict(weights(model), strict=False)  # strict would miss the names of tied weights
    others = build_optimizers(other, replace(config, lr=1.0))
    set_optimizer_state_dict(other, others, copy.deepcopy(kept), options=FLAT)

    back = get_optimizer_state_dict(other, others, options=FLAT)
    assert back.keys() == kept.keys()
    assert any(name.endswith("initial_lr") for name in kept)
    for name, value in kept.items():
        assert np.array_equal(np.asarray(value), np.asarray(back[name])), name
    for seed in range(3, 6):
        one_step(model, optimizers, seed)
        one_step(other, others, seed)
    straight, resumed = weights(model), weights(other)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# ------------------------------------------------------------------ sharding


def sharded_steps(rank: int, port: int, folder: str, result: str, config: OptimConfig) -> None:
    """Two ranks, each block and the whole sharded, three steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, _ = load_pretrained(folder)
    for module in model.network.base_model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(model.network)
    optimizers = build_optimizers(model, config)
    assert all(isinstance(p, DTensor) for each in optimizers for group in each.param_groups for p in group["params"])
    for seed in range(3):
        one_step(model, optimizers, seed)
    whole = weights(model)
    if rank == 0:
        torch.save(whole, result)
    dist.destroy_process_group()


@pytest.mark.parametrize("config", [CALM, STABLE], ids=["muon", "stable_adamw"])
def test_sharded_weights_are_updated_as_whole_ones(checkpoint, tmp_path, config):
    folder = str(checkpoint("bert"))
    model, _ = load_pretrained(folder)
    optimizers = build_optimizers(model, config)
    before = weights(model)
    for seed in range(3):
        one_step(model, optimizers, seed)
    expected = weights(model)
    arguments: tuple[Any, ...] = (free_port(), folder, str(tmp_path / "whole.pt"), config)
    start_processes(sharded_steps, arguments, nprocs=2, start_method="forkserver")  # torch is imported already
    found = torch.load(Path(tmp_path / "whole.pt"), weights_only=True)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=2e-5, rtol=1e-5, msg=name)
    assert max(float((expected[name] - before[name]).abs().max()) for name in expected) > 1e-3


# ------------------------------------------------------------------ schedules


TEXT = DataConfig(train=("text.txt",))


def factors(optim: OptimConfig, **run: Any) -> list[float]:
    """The factor of every step of a phase, whose steps have 10 tokens each."""
    schedule = make_schedule(Config(data=TEXT, optim=optim, train=RunConfig(**run)), epoch_tokens=100)
    cursors = [Cursor(step, 0, step, 10 * step) for step in range(500)]
    return [schedule.learning_rate_factor(*pair) for pair in pairwise(cursors) if not schedule.is_over(pair[0])]


@given(
    schedule=st.sampled_from(SCHEDULES),
    shape=st.sampled_from(["linear", "1-sqrt"]),
    steps=st.integers(1, 400),
    warmup=st.integers(0, 399),
    decay_share=st.floats(1e-3, 1.0),
    in_tokens=st.booleans(),
)
def test_schedules_rise_then_fall_to_zero(schedule, shape, steps, warmup, decay_share, in_tokens):
    warmup = min(warmup, steps - 1)
    unit = 10 if in_tokens else 1
    lengths = {"tokens": 10 * steps} if in_tokens else {"steps": steps}
    optim = OptimConfig(schedule=schedule, decay_shape=shape, decay_share=decay_share, warmup_steps=warmup)
    if in_tokens and warmup:
        optim = replace(optim, warmup_steps=None, warmup_tokens=10 * warmup)
    all_factors = factors(optim, **lengths)
    assert len(all_factors) == steps
    assert all(0 < factor <= 1 for factor in all_factors)
    assert all_factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    fall = all_factors[warmup:]
    assert all(later <= earlier for earlier, later in pairwise(fall))
    assert fall[0] == 1.0  # no jump where the warm-up ends
    if schedule == "constant":
        assert set(fall) == {1.0}
    else:  # zero is a step away
        reach = max(round(decay_share * steps * unit), 1) / unit if schedule == "wsd" else len(fall)
        assert fall[-1] <= 1.000001 / max(min(len(fall), reach), 1)


def test_schedules_have_their_shapes():
    wsd = OptimConfig(schedule="wsd", warmup_steps=10, decay_share=0.2)
    assert factors(wsd, steps=100)[9:81] == [1.0] * 72
    assert factors(wsd, steps=100)[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    root = [1 - math.sqrt((step - 80) / 20) for step in range(80, 100)]
    assert factors(replace(wsd, decay_shape="1-sqrt"), steps=100)[80:] == pytest.approx(root)
    cosine = factors(replace(wsd, schedule="cosine"), steps=100)
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[99] == pytest.approx(0.5 - 0.5 * np.cos(np.pi / 90))
    linear = factors(replace(wsd, schedule="linear", warmup_steps=4, lr=2e-3), steps=12)
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1.0, *((12 - step) / 8 for step in range(4, 12))])
    decay = factors(OptimConfig(schedule="1-sqrt", warmup_steps=0), steps=4)
    assert decay == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


def test_a_length_may_be_in_tokens_or_epochs_and_a_warm_up_in_another_unit():
    """A step has 10 tokens and an epoch 100; a full batch has room for 20."""
    batch = {"global_batch_tokens": 512, "micro_batch_tokens": 512}
    constant = OptimConfig(schedule="constant", warmup_steps=0)
    assert [len(factors(constant, **length)) for length in ({"tokens": 95}, {"epochs": 2.5})] == [10, 25]
    share = OptimConfig(schedule="constant", warmup_share=0.5)
    assert factors(share, tokens=80)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors(share, epochs=0.8)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    by_tokens = OptimConfig(schedule="constant", warmup_tokens=1024)  # two full batches
    assert factors(by_tokens, steps=5, **batch) == [0.5, 1.0, 1.0, 1.0, 1.0]
    by_steps = OptimConfig(schedule="constant", warmup_steps=2)
    assert factors(by_steps, tokens=2048, **batch)[:2] == [10 / 1024, 20 / 1024]
    with pytest.raises(UserError, match=r"warmup_steps \(100\) must end before train.epochs \(2.0\)"):
        factors(OptimConfig(warmup_steps=100), epochs=2.0)


def test_a_batch_warms_up_with_equally_many_steps_per_size():
    run = RunConfig(
        tokens=100_000,
        global_batch_tokens=2048,
        initial_batch_tokens=512,
        micro_batch_tokens=256,
        batch_warmup_tokens=30_720,
    )
    config = Config(data=TEXT, model=ModelConfig(max_length=128), train=run)
    schedule, cursor, sizes = make_schedule(config, 0), Cursor(), []
    while not schedule.is_over(cursor):
        sizes.append(schedule.micro_batches(cursor))
        cursor = replace(cursor, phase_tokens=cursor.phase_tokens + 256 * sizes[-1])
    assert sizes == sorted(sizes)
    assert [sizes.count(size) for size in (2, 4, 6)] == [10, 10, 10]  # 30,720 = 10 * (512 + 1,024 + 1,536)
    assert set(sizes) == {2, 4, 6, 8}


# ------------------------------------------------------------------ the first weights


def test_a_new_model_begins_at_the_frequencies_of_its_text(text_file, tmp_path):
    """The first loss is the unigram entropy, not log V; a text of twice the weight counts twice."""
    settings = ("train.steps=1", "optim.warmup_steps=0", "train.log_every=1")
    sizes = ("train.global_batch_tokens=2048", "train.micro_batch_tokens=2048")
    loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings, *sizes), tmp_path / "run")
    tokenizer = Tokenizer.from_folder(tmp_path / "run" / "tokenizer")
    ids = tokenize(read_documents(Source(str(text_file))), tokenizer).ids
    counts = np.bincount(ids, minlength=tokenizer.vocabulary_size) + 1
    entropy = -np.log(counts / counts.sum())[ids].mean()
    assert entropy < np.log(tokenizer.vocabulary_size) - 0.5
    assert log_lines(tmp_path / "run")[0]["loss"] == pytest.approx(entropy, abs=0.2)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_the_output_bias_is_that_of_the_weighted_texts(checkpoint, tmp_path, kind):
    model, tokenizer = load_pretrained(str(checkpoint(kind)))
    texts = [tokenize([text], tokenizer) for text in ("a a a b", "b c")]
    on_disk = [stored(text, tmp_path / str(number)) for number, text in enumerate(texts)]
    fit_output_bias(model, on_disk, [2.0, 0.5])
    counts = np.ones(model.vocabulary_size)
    for text, weight in zip(texts, (2.0, 0.5), strict=True):
        for token in text.ids:
            counts[token] += weight
    decoder: Any = model.network.get_output_embeddings()
    np.testing.assert_allclose(decoder.bias.detach().numpy(), np.log(counts / counts.sum()), rtol=1e-6)
    inputs = probe_inputs(model, [5])
    before = model.logits(**inputs)
    fit_output_bias(model, [on_disk[1]], [1.0])
    assert not torch.equal(before, model.logits(**inputs))  # the forward uses this bias


# ------------------------------------------------------------------ recipes

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {  # millions of parameters
    "wiki_en_cpu": 4.4,
    "babylm_h200": 29.5,
    "babylm_h200_100_epochs": 29.5,
    "modernbert_base": 149.7,
    "ettin_17m": 16.9,
    "mmbert_base": 307.8,  # with the vocabulary of its tokenizer on the hub
}


def test_every_recipe_is_listed():
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_make_the_model_that_they_say(name, tokenizer_folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(f"recipes/{name}.toml", ["data.train=['a.txt','b.txt']"])
    tokenizer = Tokenizer.from_folder(tokenizer_folder("wordpiece"))
    architecture = build_config(config.model.architecture, tokenizer, config.model.max_length)
    architecture.vocab_size = config.tokenizer.vocab_size or 256_000
    with torch.device("meta"):
        model = MaskedLM(AutoModelForMaskedLM.from_config(architecture))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(RECIPES[name], abs=0.1)
    assert model.max_length() == config.model.max_length
    assert len(build_optimizers(model, config.optim)) == (2 if config.optim.name == "muon" else 1)
