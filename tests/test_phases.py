"""Phases, branches and extensions: the same weights and data as a run that is never interrupted."""

import json
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from conftest import paragraphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train_resume import complete, kill_when, last_step
from training import Ranks, log_lines, same_weights, small_architecture, stored, write_config
from transformers import AutoConfig

from mlmkit.cli import main
from mlmkit.corpus import tokenize
from mlmkit.errors import UserError
from mlmkit.pretrained import load_pretrained
from mlmkit.train import order
from mlmkit.train.checkpoints import branch_config, saved_checkpoints
from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig
from mlmkit.train.config_file import load_config
from mlmkit.train.loop import train
from mlmkit.train.order import NOWHERE, Position
from mlmkit.train.rows import RowBuilder, passes_per_epoch

# The data of a phase: another mix, other windows, other packs and another batch; and a batch warm-up.
PHASES = """
[[phase]]
name = "first"
train.tokens = "4k"
train.initial_batch_tokens = 512
train.batch_warmup_tokens = "2k"
data.temperature = 0.5
[[phase]]
name = "longer"
train.steps = 6
model.max_length = 64
model.rope_theta = 20000
masking.mask_prob = 0.3
[[phase]]
name = "decay"
train.epochs = 0.1
train.micro_batch_tokens = 512
train.global_batch_tokens = 1024
data.train = {texts}
optim.schedule = "1-sqrt"
"""
KILLS = int(os.environ.get("MLMKIT_KILLS", "3"))  # 25 take some minutes


@pytest.fixture(scope="module")
def texts(tmp_path_factory, text_file) -> list[str]:
    lines, folder = text_file.read_text().splitlines(keepends=True), tmp_path_factory.mktemp("texts")
    for name, begin in (("a", 0), ("b", 1)):
        (folder / f"{name}.txt").write_text("".join(lines[begin :: 2 + begin]))
    return [str(folder / "a.txt"), str(folder / "b.txt")]


def make(
    tmp_path: Path, texts: list[str], *overrides: str, phases: str = "", architecture: str = "modernbert"
) -> Config:
    path = small_architecture(tmp_path, model_type=architecture, hidden_dropout_prob=0.2)
    lists = (f"data.train={texts}", "train.save_every=3", "train.log_every=1", "optim.schedule=constant")
    base = write_config(tmp_path, Path(texts[0]), path, *lists)
    file = tmp_path / "config.toml"
    content = file.read_text().replace("steps = 12\n", "") if phases else file.read_text()
    content = content.replace("batch_tokens = 512", "batch_tokens = 1024") if "batch_warmup" in phases else content
    file.write_text(content + phases.format(texts=texts[::-1]))
    assert base.train.steps == 12
    return load_config(file, [*lists, *overrides])


@pytest.mark.parametrize(("world", "overrides"), [(1, ("data.workers=2",)), (2, ()), (2, ("train.parallel=fsdp",))])
def test_three_phases_killed_at_any_moment_end_with_the_same_weights(tmp_path, texts, world, overrides):
    config = make(tmp_path, texts, *overrides, phases=PHASES)
    expected, run, began = tmp_path / "straight", tmp_path / "killed", time.perf_counter()
    complete(config, expected, world)
    seconds = time.perf_counter() - began
    steps = last_step(expected)
    for number in range(KILLS):
        target = steps * number // KILLS
        kill_when(
            lambda step=target: last_step(run) >= step,
            Ranks(config, run, world),
            random.Random().uniform(0, seconds / 10),
        )
    complete(config, run, world)
    assert same_weights(run / "model", expected / "model")
    kept, whole = ([entry | {"tokens_per_second": 0} for entry in log_lines(each)] for each in (run, expected))
    assert kept == whole
    assert list(dict.fromkeys(entry["phase"] for entry in whole)) == ["first", "longer", "decay"]


def test_the_end_of_each_phase_is_kept_and_says_its_phase(tmp_path, texts):
    config = make(tmp_path, texts, "train.keep_checkpoints=1", phases=PHASES)
    run = tmp_path / "run"
    train(config, run)
    states = [json.loads((saved / "trainer.json").read_text()) for saved in saved_checkpoints(run)]
    assert [state["phase"] for state in states if state["is_phase_end"]] == ["first", "longer", "decay"]
    assert all(state["is_phase_end"] for state in states)
    assert states[0]["position"]["cursor"]["phase_tokens"] >= 4000
    lengths = [
        json.loads((saved / "config.json").read_text())["max_position_embeddings"] for saved in saved_checkpoints(run)
    ]
    assert lengths[0] < lengths[1] == lengths[2]
    configs = [AutoConfig.from_pretrained(saved) for saved in saved_checkpoints(run)]
    thetas = [config.rope_parameters["full_attention"]["rope_theta"] for config in configs]
    assert (thetas[0] != 20000, thetas[1:]) == (True, [20000, 20000])
    assert branch_config(run, saved_checkpoints(run)[1]) == config.phases["longer"]


LONGER = '[[phase]]\nname = "a"\ntrain.steps = 3\n[[phase]]\nname = "b"\ntrain.steps = 3\n'


def test_a_table_of_positions_is_stretched_only_if_asked(tmp_path, texts):
    """That a phase cannot begin is known before the first one."""
    make_bert = partial(make, tmp_path, texts, phases=LONGER, architecture="bert")
    for wrong, message in (
        (("phase.b.model.max_length=64",), r"has a table of 48 positions: model.max_length \(64\) must not exceed it"),
        (
            ("phase.b.model.interpolate_positions=true",),
            "interpolate_positions has no effect, as the model has no table",
        ),
        (("phase.b.model.rope_theta=1e5",), "model.rope_theta has no effect, as the model has no rotary positions"),
    ):
        with pytest.raises(UserError, match=message):
            train(make_bert(*wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = train(
        make_bert("phase.b.model.max_length=64", "phase.b.model.interpolate_positions=true"), tmp_path / "run"
    )
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] == 64


def test_phases_that_change_nothing_are_one(tmp_path, texts):
    (tmp_path / "one").mkdir()
    one = make(tmp_path / "one", texts)
    same = '[[phase]]\nname = "a"\ntrain.steps = 5\n[[phase]]\nname = "b"\ntrain.steps = 7\n'
    train(one, tmp_path / "one" / "run")
    train(make(tmp_path, texts, phases=same), tmp_path / "run")
    assert same_weights(tmp_path / "run" / "model", tmp_path / "one" / "run" / "model")


def test_a_branch_continues_as_its_run_would_have(tmp_path, texts):
    """A decay from step 6 of a plateau is a wsd run of 12 steps, and a branch that changes nothing is the run."""
    plateau, decayed = make(tmp_path, texts), make(tmp_path, texts, "optim.schedule=wsd", "optim.decay_share=0.5")
    train(plateau, tmp_path / "plateau")
    train(decayed, tmp_path / "decayed")
    start = tmp_path / "plateau" / "checkpoints" / "step-00000009"
    for name, schedule, whole in (("same", "constant", "plateau"), ("decay", "linear", "decayed")):
        file = tmp_path / f"{name}.toml"
        begin, steps = (start, 3) if name == "same" else (tmp_path / "kept", 6)
        file.write_text(f'[train]\nsteps = {steps}\n[optim]\nschedule = "{schedule}"\n')
        if name == "decay":  # the run as it was at step 6
            early = replace(plateau, train=replace(plateau.train, steps=6))
            train(early, tmp_path / "kept-run")
            [*_, begin] = saved_checkpoints(tmp_path / "kept-run")
        branch = load_config(file, base=branch_config(tmp_path / name, begin))
        assert branch.data == plateau.data and branch.tokenizer == plateau.tokenizer
        for _ in range(2):  # the second time it is finished
            train(branch, tmp_path / name, begin)
        assert same_weights(tmp_path / name / "model", tmp_path / whole / "model"), name
        assert [entry["step"] for entry in log_lines(tmp_path / name)] == list(range(13 - steps, 13))
        with pytest.raises(UserError, match="begun with another --from"):
            train(branch, tmp_path / name)
    shutil.rmtree(tmp_path / "plateau")  # the branch has a copy of what it began with
    assert load_config(tmp_path / "same.toml", base=branch_config(tmp_path / "same", start)) == load_config(
        tmp_path / "same.toml", base=plateau
    )
    train(load_config(tmp_path / "same.toml", base=branch_config(tmp_path / "same", start)), tmp_path / "same", start)


def test_a_plateau_can_be_extended(tmp_path, texts):
    straight, short = make(tmp_path, texts), make(tmp_path, texts, "train.steps=7")
    train(straight, tmp_path / "straight")
    for config in (short, straight):
        train(config, tmp_path / "run")
    assert same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")
    assert log_steps(tmp_path / "run") == log_steps(tmp_path / "straight")
    with pytest.raises(UserError, match=r"length \(12 steps, 1 of warm-up, now 7 steps"):
        train(short, tmp_path / "run")
    train(make(tmp_path, texts, "train.steps=7", "optim.schedule=wsd"), tmp_path / "wsd")
    with pytest.raises(UserError, match=r"length .*only a constant learning rate with the same warm-up"):
        train(make(tmp_path, texts, "optim.schedule=wsd"), tmp_path / "wsd")


def test_a_damaged_parent_of_a_branch_is_named(tmp_path, texts):
    """Without the advice for a run's own checkpoints, to delete it and resume from an earlier one."""
    train(make(tmp_path, texts, "train.steps=4"), tmp_path / "run")
    start = tmp_path / "run" / "checkpoints" / "step-00000004"
    (tmp_path / "branch.toml").write_text("[train]\nsteps = 2\n")
    branch = load_config(tmp_path / "branch.toml", base=branch_config(tmp_path / "branch", start))
    [part] = (start / "optimizer").glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="is not what was saved") as caught:
        train(branch, tmp_path / "branch", start)
    assert "delete it" not in str(caught.value)


def log_steps(run: Path) -> list[int]:
    return [entry["step"] for entry in log_lines(run)]


def test_what_has_not_begun_may_change(tmp_path, texts):
    """After its first phase a run gets another second one, and a third."""
    first = '[[phase]]\nname = "a"\ntrain.steps = 4\n'
    second = first + '[[phase]]\nname = "b"\ntrain.steps = 3\noptim.lr = 1e-3\n'
    config, longer = (make(tmp_path, texts, phases=phases) for phases in (first, second))
    for each in (config, longer):
        train(each, tmp_path / "run")
    train(longer, tmp_path / "straight")
    assert same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")
    with pytest.raises(UserError, match=r"another optim.lr \(0.001, now 0.005\) in phase b"):
        train(make(tmp_path, texts, "phase.b.optim.lr=5e-3", phases=second), tmp_path / "run")


# ---------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def parts(checkpoint, tmp_path_factory):
    _, tokenizer = load_pretrained(str(checkpoint("roberta")))
    folder, tokenised = tmp_path_factory.mktemp("parts"), (tokenize(paragraphs()[i::3], tokenizer) for i in range(3))
    return tokenizer, [stored(each, folder / str(i), f"{i}.txt", 1 + i) for i, each in enumerate(tokenised)]


mixes = st.tuples(
    st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True),
    st.sampled_from([0.3, 1.0, 2.0]),  # the weight of the first text
    st.sampled_from([64, 128, 512]),  # tokens per pack
    st.integers(1, 40),  # packs
)


@given(st.lists(mixes, min_size=2, max_size=4), st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_phase_shows_again_what_was_seen_while_there_is_more(parts, monkeypatch, phases, packed):
    """Whatever the mixes and packs: a window of a pass comes once, and no later pass before the rest of it is taken."""
    monkeypatch.setattr(order, "WINDOWS_PER_BLOCK", 16)
    tokenizer, corpora = parts
    position, shown, sizes = NOWHERE, Counter(), {}
    for members, weight, budget, packs in phases:
        config = Config(
            data=DataConfig(train=("x.txt",) * len(members), weights=(weight, *[1.0] * (len(members) - 1))),
            model=ModelConfig(max_length=64),
            train=RunConfig(steps=packs, global_batch_tokens=budget, micro_batch_tokens=budget),
        )
        rows = RowBuilder(config, [corpora[i] for i in members], tokenizer, packed=packed, position=position)
        sizes |= {stream.text: stream.size for stream in rows.order.streams}
        cursor = rows.cursor
        for cursor, block, chosen in islice(  # noqa: B007 - the last one is used
            rows.packs(rows.cursor), packs
        ):
            windows = block.take(chosen)
            shown.update(
                (rows.corpora[source].fingerprint, number, window)
                for source, number, window in zip(
                    windows.source.tolist(), windows.pass_number.tolist(), windows.spans.tolist(), strict=True
                )
            )
        position = Position.from_json(json.loads(json.dumps(asdict(rows.position(cursor)))))
    assert max(shown.values()) == 1
    for text, size in sizes.items():
        by_pass = Counter(number for name, number, _ in shown if name == text)
        waiting = next(len(stream.left) for stream in position.remaining if stream.text == text)
        assert sum(size - by_pass[number] for number in range(max(by_pass, default=0))) <= waiting


def test_other_windows_begin_a_new_pass(parts):
    tokenizer, corpora = parts
    short, long = (
        Config(data=DataConfig(train=("x.txt",)), model=ModelConfig(max_length=length), train=RunConfig())
        for length in (16, 64)
    )
    rows = RowBuilder(short, corpora[:1], tokenizer, packed=True)
    cursor, _, _ = next(rows.packs(rows.cursor))
    [after] = RowBuilder(long, corpora[:1], tokenizer, packed=True, position=rows.position(cursor)).order.streams
    assert (after.begin, after.left) == (after.size, ())


def test_a_temperature_weights_the_texts_by_size(parts):
    _, corpora = parts
    sizes = [corpus.tokens for corpus in corpora]
    data = DataConfig(train=("a.txt", "b.txt", "c.txt"), temperature=0.5)
    shares = [weight * size for weight, size in zip(passes_per_epoch(data, corpora), sizes, strict=True)]
    assert sum(shares) == pytest.approx(sum(sizes))
    assert [share / shares[0] for share in shares] == pytest.approx([(size / sizes[0]) ** 0.5 for size in sizes])
    assert passes_per_epoch(replace(data, temperature=1.0), corpora) == pytest.approx((1.0, 1.0, 1.0))


# ---------------------------------------------------------------- the configuration

TWO = '[[phase]]\nname = "a"\ntrain.steps = 5\n[[phase]]\nname = "b"\ntrain.tokens = "2k"\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[train]\nsteps = 5\n" + TWO, "train.steps has no effect, as each phase has its own length"),
        (TWO + "train.seed = 1\n", "phase b: train.seed belongs to the whole run"),
        (
            TWO + "masking.mask_prop = 0.3\n",
            r"phase b: unknown setting masking.mask_prop: did you mean masking.mask_prob\?",
        ),
        (TWO + "optim.decay_share = 0.5\n", "optim.decay_share has no effect"),
        (TWO + '[[phase]]\nname = "a"\ntrain.steps = 5\n', "a name of its own"),
        (TWO + '[[phase]]\nname = "c"\n', "phase c: it needs a length"),
        (TWO + "[[phase]]\ntrain.steps = 5\n", "needs a name of letters, digits, _ and -, not None"),
        (TWO + "train.epochs = 2\n", "train.tokens and train.epochs both give a length"),
        (TWO + "optim.warmup_tokens = 2000\n", r"optim.warmup_tokens \(2000\) must end before train.tokens \(2000\)"),
        ("[phase]\nname = 1\n", r"write each phase as \[\[phase\]\]"),
        ("[train]\ntokens = '10X'\n", r"train.tokens must be positive, such as 5000000 or .10B., not '10X'"),
        ("[train]\ntokens = 9000\ninitial_batch_tokens = 8192\nbatch_warmup_tokens = 1\n", "at least 2, into"),
        (
            "[optim]\nlr = 1e-4\n" + TWO.replace("= 5", "= 5\noptim.lr = 1e-3"),
            "optim.lr has no effect, as the first phase",
        ),
        (TWO + "optm.lr = 1\n", "phase b: a phase: unknown table optm"),
        ("[[phase]]\nname = 'a'\ntrain.steps = 5\noptim = 3\n", "optim must be a table"),
        ("phase = 3\n", r"write each phase as \[\[phase\]\]"),
        ("held_out = 'text.txt'\n", "held_out must be a table"),
        ("[train]\ninitial_batch_tokens = 4096\n", "need each other"),
        ("[train]\ninitial_batch_tokens = 3000\nbatch_warmup_tokens = 9\n", r"initial_batch_tokens \(3000\) must be"),
        ("[optim]\nwarmup_steps = 5\nwarmup_share = 0.1\n", "warmup_steps and optim.warmup_share both give a length"),
    ],
)
def test_phases_that_cannot_be_are_refused(tmp_path, content, message):
    (tmp_path / "config.toml").write_text('data.train = "text.txt"\n' + content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "config.toml")


def test_a_phase_keeps_what_the_one_before_set_but_its_length_warm_up_and_ramp(tmp_path):
    content = '[data]\ntrain = "text.txt"\n[masking]\nmask_prob = 0.4\n[optim]\nwarmup_steps = 3\n' + TWO
    content = content.replace("steps = 5", "steps = 5\nmasking.final_mask_prob = 0.2\noptim.lr = 5e-4")
    (tmp_path / "config.toml").write_text(content)
    first, second = load_config(tmp_path / "config.toml", ["phase.b.model.max_length=64"]).phases.values()
    assert (first.train.steps, first.optim.warmup_steps, first.masking.mask_prob) == (5, 3, 0.4)
    assert (second.train.steps, second.train.tokens, second.optim.warmup_steps) == (None, 2000, 0)
    assert (second.masking.mask_prob, second.masking.final_mask_prob, second.optim.lr) == (0.2, None, 5e-4)
    assert (first.model.max_length, second.model.max_length) == (512, 64)
    for wrong in ("phase.c.optim.lr=1", "phase.b.lr=1", "optim.lr"):
        with pytest.raises(UserError, match=f"--set {wrong}"):
            load_config(tmp_path / "config.toml", [wrong])


def test_a_branch_is_refused_what_it_cannot_change(tmp_path, capsys):
    base = Config(data=DataConfig(train=("text.txt",)), train=RunConfig(steps=5))
    file = tmp_path / "branch.toml"
    file.write_text('[model]\narchitecture = "bert-small"\n[train]\nsteps = 3\ndevice = "cpu"\n')
    branch = load_config(file, base=base)
    assert (branch.train.steps, branch.train.device, branch.optim.warmup_steps) == (3, "cpu", 0)
    for setting, message in (("optm.lr=1", "unknown table optm"), ("train.steps=", "a branch needs a length")):
        with pytest.raises(UserError, match=message):
            load_config(file, [setting], base)
    with pytest.raises(UserError, match=r"train.seed cannot change in a branch: it is 0 in the checkpoint"):
        load_config(file, ["train.seed=1"], base)
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(file), "--from", str(tmp_path), "--output", str(tmp_path / "run")])
    assert "is not a checkpoint of a run: name RUN/checkpoints/step-N" in capsys.readouterr().err
