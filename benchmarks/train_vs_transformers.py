"""Training: mlmkit's loop against transformers.Trainer, the same model on the same text, in real tokens a second.

Contestants, each in a process of its own, taking turns:

- mlmkit: `mlmkit.train.loop.train` as `mlmkit train` calls it, figures from its log,
- Trainer, paragraphs: one paragraph an example, `DataCollatorForLanguageModeling`, padded to the longest of the batch,
- Trainer, by length: the same with `train_sampling_strategy="group_by_length"`, which gives up on a random order,
- Trainer, run_mlm.py: all paragraphs end to end, cut to full rows, so nothing is padded and documents see each other.

Trainer computes the logits of every position. It gets its text tokenised, does not log or save, and both sides get the
batch size within a step that a short trial finds fastest. A step has about as many tokens on both sides, and is one
update of AdamW. Real tokens are the sum of the attention mask, special tokens included; the first steps of a turn are
not counted, nor are start and end of training. On CUDA both run under bfloat16 autocast.

The floor is six operations for each parameter of the encoder's layers and each real token, at the best rate at which
torch multiplies matrices here; attention and vocabulary head come on top. Needs accelerate, which Trainer imports.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from engines import matrix_rate
from harness import (
    Bars,
    Contestant,
    Report,
    SkippedError,
    Table,
    alternate,
    isolated,
    main,
    peak_mib,
    ratios,
    say,
    spread,
)
from inputs import TINY, documents, encoder_parameters, write_lines

from mlmkit.documents import Source, read_documents
from mlmkit.train.config import (
    Config,
    DataConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TokenizerConfig,
)

WARM_UP = 2  # steps of a turn that are not counted: kernels are chosen, memory grows
PARAGRAPHS, BY_LENGTH, RUN_MLM = "Trainer, paragraphs", "Trainer, by length", "Trainer, run_mlm.py"
DATA_SEED = 1


@dataclass(frozen=True)
class Case:
    """A model at a length, and how many tokens a step has. `divisions` of a step are tried as micro-batches."""

    architecture: str
    length: int
    vocabulary: int
    mask_prob: float
    step_tokens: int
    divisions: tuple[int, ...]


CASES = {
    "cpu": (Case("bert-mini", 256, 16_000, 0.15, 4096, (1, 2)),),
    # A step of about 262 k tokens, as a pretraining run has it; vocabularies of the published sizes.
    "cuda": (
        Case("bert-base", 512, 30_522, 0.15, 1 << 18, (2, 4, 8)),
        Case("modernbert-base", 1024, 50_368, 0.3, 1 << 18, (2, 4, 8)),
    ),
}


@dataclass(frozen=True)
class Turn:
    """What a turn counted: real tokens, seconds, and the loss a step, the sum over its batches that is differentiated.

    It shows that all did the same work. In transformers 5.23 BERT's is not divided by the batches of a step.
    """

    tokens: int
    seconds: float
    loss: float

    @property
    def rate(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds


# ---------------------------------------------------------------- mlmkit


def mlmkit_config(case: Case, text: Path, tokenizer: Path, device: str, architecture: str) -> Config:
    """The defaults, but for what the case says."""
    return Config(
        data=DataConfig(train=(str(text),)),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        model=ModelConfig(architecture=architecture, max_length=case.length),
        masking=MaskingConfig(mask_prob=case.mask_prob),
        optim=OptimConfig(warmup_steps=10),
        train=RunConfig(
            global_batch_tokens=case.step_tokens,
            micro_batch_tokens=case.step_tokens,
            log_every=1,
            device=device,
            compile=device == "cuda",
            seed=DATA_SEED,
        ),
    )


def train_with_mlmkit(config: Config, division: int, steps: int) -> Turn:
    """A whole run, of which the log's lines after the warm-up count."""
    from mlmkit.train.loop import train

    micro = max(config.train.global_batch_tokens // division, config.model.max_length)
    settings = replace(config.train, micro_batch_tokens=micro, steps=steps + WARM_UP, save_every=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        train(replace(config, train=settings), Path(folder) / "run")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()][WARM_UP:]
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines)
    return Turn(sum(line["tokens"] for line in lines), seconds, sum(line["loss"] for line in lines) / len(lines))


# ---------------------------------------------------------------- transformers


@dataclass(frozen=True)
class Rows:
    """What Trainer trains on: tokenised once, and the same Hugging Face configuration that mlmkit builds."""

    tokenizer: Any
    config: Any
    examples: list[dict[str, list[int]]]
    mean_length: float


def rows_for_trainer(case: Case, text: Path, tokenizer_folder: Path, architecture: str, way: str) -> Rows:
    """Tokenised as `run_mlm.py` does, with and without its `--line_by_line`."""
    from transformers import AutoTokenizer

    from mlmkit.pretrained import load_tokenizer
    from mlmkit.train.presets import build_config

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    lines = list(read_documents(Source(str(text))))
    if way == RUN_MLM:
        columns = tokenizer(lines, return_special_tokens_mask=True, return_attention_mask=True)
        whole = {name: list(chain(*values)) for name, values in columns.items()}
        ends = range(case.length, len(whole["input_ids"]) + 1, case.length)
        examples = [{name: values[end - case.length : end] for name, values in whole.items()} for end in ends]
    else:
        columns = tokenizer(lines, truncation=True, max_length=case.length, return_special_tokens_mask=True)
        examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    mean = sum(len(example["input_ids"]) for example in examples) / len(examples)
    config = build_config(architecture, load_tokenizer(str(tokenizer_folder)), case.length)
    return Rows(tokenizer, config, examples, mean)


def train_with_trainer(rows: Rows, case: Case, way: str, device: str, division: int, steps: int) -> Turn:
    """`division` batches a step; time is taken between steps, tokens where the model takes its inputs."""
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    torch.manual_seed(DATA_SEED)
    model = AutoModelForMaskedLM.from_config(rows.config)
    counted: list[Any] = []
    times: list[float] = []

    def count(_module: Any, _positional: Any, named: dict[str, Any], output: Any) -> None:
        # Tensors: to read them would wait for the device.
        counted.append((named["attention_mask"].sum(), output["loss"].detach()))

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (WARM_UP, WARM_UP + steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())
                if state.global_step == WARM_UP:
                    counted.clear()

    model.register_forward_hook(count, with_kwargs=True)
    optim = OptimConfig()
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            output_dir=folder,
            max_steps=steps + WARM_UP,
            per_device_train_batch_size=max(1, round(case.step_tokens / division / rows.mean_length)),
            gradient_accumulation_steps=division,
            learning_rate=optim.lr,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            warmup_steps=10,
            seed=DATA_SEED,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            dataloader_num_workers=0,
            train_sampling_strategy="group_by_length" if way == BY_LENGTH else "random",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(rows.tokenizer, mlm_probability=case.mask_prob)
        trainer = Trainer(model, arguments, collator, rows.examples, callbacks=[Clock()])  # pyright: ignore[reportArgumentType]
        trainer.train()
    tokens, losses = zip(*counted, strict=True)
    return Turn(int(sum(tokens)), times[1] - times[0], float(sum(losses)) / steps)


# ---------------------------------------------------------------- the comparison


def make_nothing() -> None:
    """mlmkit's process keeps nothing between turns."""


def turn_of_mlmkit(_: None, config: Config, division: int, steps: int) -> Turn:
    """For `Contestant.call`."""
    return train_with_mlmkit(config, division, steps)


def write_tokenizer(folder: Path, text: Path, case: Case) -> None:
    """WordPiece, of the case's size."""
    from mlmkit.train.tokenizer import train_tokenizer

    wanted = TokenizerConfig(vocab_size=case.vocabulary)
    train_tokenizer(lambda: read_documents(Source(str(text))), wanted, case.length).save_pretrained(folder)


def compare(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Find each contestant's batch size, then let them take turns."""
    text, tokenizer = write_lines(folder / "train.txt", documents()[: options.documents]), folder / "tokenizer"
    isolated(write_tokenizer, tokenizer, text, case)
    architecture = case.architecture
    if options.quick:
        architecture = str(folder / "architecture.json")
        values = TINY | {"model_type": case.architecture.split("-")[0], "hidden_dropout_prob": 0.0}
        Path(architecture).write_text(json.dumps(values))
    config = mlmkit_config(case, text, tokenizer, options.device, architecture)
    processes = {"mlmkit": Contestant(make_nothing)}
    for way in (PARAGRAPHS, BY_LENGTH, RUN_MLM):
        processes[way] = Contestant(rows_for_trainer, case, text, tokenizer, architecture, way)

    def turn(name: str, division: int, steps: int) -> Turn:
        if name == "mlmkit":
            taken = processes[name].call(turn_of_mlmkit, config, division, steps)
        else:
            taken = processes[name].call(train_with_trainer, case, name, options.device, division, steps)
        say(f"{name}, {division} batches a step: {taken.rate:,.0f} tokens/s")
        return taken

    best = {}
    for name in processes:
        trial = {division: turn(name, division, options.trial_steps).rate for division in case.divisions}
        best[name] = max(trial, key=lambda division: trial[division])
    calls = {name: partial(turn, name, best[name], options.steps) for name in processes}
    turns = alternate(calls, options.rounds, warm=True)  # each turn has steps of its own that are not counted
    memory = {name: process.call(peak_mib) / 1024 for name, process in processes.items()}
    for process in processes.values():
        process.stop()
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    rate = isolated(matrix_rate, options.device, dtype)
    rates = {name: [each.rate for each in taken] for name, taken in turns.items()}
    return {
        "case": asdict(case),
        "operations_per_second": rate,
        "floor_tokens_per_second": rate / 6 / isolated(body_parameters, architecture, tokenizer, case.length),
        "contestants": {
            name: {
                "micro_batches": best[name],
                "tokens_per_second": rates[name],
                "tokens": [each.tokens for each in taken],
                "loss": [each.loss for each in taken],
                "mlmkit_is_times_as_fast": ratios(rates[name], rates["mlmkit"]),
                "peak_rss_gib": memory[name],
            }
            for name, taken in turns.items()
        },
    }


def body_parameters(architecture: str, tokenizer: Path, length: int) -> int:
    """Of the network that both sides train."""
    from mlmkit.pretrained import load_tokenizer
    from mlmkit.train.presets import build_config

    return encoder_parameters(build_config(architecture, load_tokenizer(str(tokenizer)), length))


def table(result: dict[str, Any]) -> Table:
    """A row a contestant: medians, and mlmkit's ratio to it with its range within a round."""
    floor = result["floor_tokens_per_second"]
    rows: list[list[object]] = [
        [f"floor, {result['operations_per_second'] / 1e9:,.0f} GFLOP/s", f"{floor:,.0f}", "1.00", *[""] * 5]
    ]
    rows += [
        [
            name,
            f"{median(found['tokens_per_second']):,.0f}",
            f"{median(found['tokens_per_second']) / floor:.2f}",
            spread(found["mlmkit_is_times_as_fast"]),
            found["micro_batches"],
            f"{median(found['tokens']):,.0f}",
            f"{median(found['loss']):.2f}",
            f"{found['peak_rss_gib']:.2f}",
        ]
        for name, found in result["contestants"].items()
    ]
    header = ["", "real tokens/s", "of the floor", "mlmkit is x times as fast", "batches a step", "tokens a turn"]
    case = result["case"]
    return Table(f"{case['architecture']} at {case['length']}", [*header, "loss a step", "peak RSS GiB"], rows)


def measure(options: argparse.Namespace) -> Report:
    """A table a case of the device."""
    if not find_spec("accelerate"):
        raise SkippedError("transformers.Trainer needs accelerate: pip install accelerate")
    results = []
    for case in CASES[options.cases or options.device]:
        with tempfile.TemporaryDirectory() as temporary:
            results.append(compare(shrunk(case) if options.quick else case, options, Path(temporary)))
    first = results[0]["contestants"]
    return Report(
        [table(result) for result in results],
        headlines={
            "train_times_trainer_paragraphs": median(first[PARAGRAPHS]["mlmkit_is_times_as_fast"]),
            "train_times_trainer_by_length": median(first[BY_LENGTH]["mlmkit_is_times_as_fast"]),
            "train_times_run_mlm": median(first[RUN_MLM]["mlmkit_is_times_as_fast"]),
            "train_tokens_per_second": median(first["mlmkit"]["tokens_per_second"]),
        },
        bars=Bars(
            f"Training {results[0]['case']['architecture']}",
            "real tokens a second",
            {name: found["tokens_per_second"] for name, found in first.items()},
        ),
        figures=results,
    )


def shrunk(case: Case) -> Case:
    """For a dry run."""
    return replace(case, length=min(case.length, 64), vocabulary=2000, step_tokens=1024, divisions=(1, 2))


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        rounds=(3, 1),
        steps=(3, 2),
        trial_steps=(1, 1),
        documents=(40_000, 1000),
        device=("cpu", "cpu"),
        cases=("", ""),
    )
