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

Needs accelerate (`pip install accelerate`), which Trainer imports. MLMKIT_DATA names a folder with wiki_en/train.txt.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

from engines import Contestant, isolated, markdown, peak_gib, spread

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

WARM_UP = 3  # steps of a turn that are not counted: kernels are chosen, memory grows
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
    "cpu": (Case("bert-mini", 256, 16_000, 0.15, 8192, (1, 2, 4)),),
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

    from mlmkit.model import load_tokenizer
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


def write_text(folder: Path, documents: int) -> Path:
    """The first paragraphs of Wikipedia."""
    text = folder / "train.txt"
    source = Source(str(Path(os.environ["MLMKIT_DATA"]) / "wiki_en" / "train.txt"))
    lines = islice(read_documents(source), documents)
    text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return text


def write_tokenizer(folder: Path, text: Path, case: Case) -> None:
    """WordPiece, of the case's size."""
    from mlmkit.train.tokenizer import train_tokenizer

    wanted = TokenizerConfig(vocab_size=case.vocabulary)
    train_tokenizer(lambda: read_documents(Source(str(text))), wanted, case.length).save_pretrained(folder)


def compare(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Find each contestant's batch size, then let them take turns."""
    text, tokenizer = write_text(folder, options.documents), folder / "tokenizer"
    isolated(write_tokenizer, tokenizer, text, case)
    architecture = case.architecture
    if options.quick:
        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        architecture = str(folder / "architecture.json")
        values = small | {"model_type": case.architecture.split("-")[0], "hidden_dropout_prob": 0.0}
        Path(architecture).write_text(json.dumps(values))
    config = mlmkit_config(case, text, tokenizer, options.device, architecture)
    processes = {"mlmkit": Contestant(make_nothing)}
    for way in (PARAGRAPHS, BY_LENGTH, RUN_MLM):
        processes[way] = Contestant(rows_for_trainer, case, text, tokenizer, architecture, way)

    def turn(name: str, division: int, steps: int) -> Turn:
        if name == "mlmkit":
            return processes[name].call(turn_of_mlmkit, config, division, steps)
        return processes[name].call(train_with_trainer, case, name, options.device, division, steps)

    best, turns = {}, {name: [] for name in processes}
    for name in processes:
        trial = {division: turn(name, division, options.trial_steps).rate for division in case.divisions}
        best[name] = max(trial, key=lambda division: trial[division])
        show(f"{name}: {', '.join(f'{rate:,.0f} in {division}' for division, rate in trial.items())}")
    for _ in range(options.rounds):
        for name in processes:
            turns[name].append(turn(name, best[name], options.steps))
            show(f"{name}: {turns[name][-1].rate:,.0f} tokens/s")
    memory = {name: process.call(peak_gib) for name, process in processes.items()}
    for process in processes.values():
        process.stop()
    return {
        "case": asdict(case),
        "contestants": {
            name: {
                "micro_batches": best[name],
                "tokens_per_second": [each.rate for each in taken],
                "tokens": [each.tokens for each in taken],
                "loss": [each.loss for each in taken],
                "mlmkit_is_times_as_fast": [a.rate / b.rate for a, b in zip(turns["mlmkit"], taken, strict=True)],
                "peak_rss_gib": memory[name],
            }
            for name, taken in turns.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """A row a contestant: medians, and mlmkit's ratio to it with its range within a round."""
    rows = [
        [
            name,
            f"{median(found['tokens_per_second']):,.0f}",
            spread(found["mlmkit_is_times_as_fast"]),
            found["micro_batches"],
            f"{median(found['tokens']):,.0f}",
            f"{median(found['loss']):.2f}",
            f"{found['peak_rss_gib']:.2f}",
        ]
        for name, found in result["contestants"].items()
    ]
    case = result["case"]
    header = [
        f"{case['architecture']} at {case['length']}",
        "real tokens/s",
        "mlmkit is x times as fast",
        "batches a step",
        "tokens a turn",
        "loss a step",
        "peak RSS GiB",
    ]
    return markdown(header, rows)


def show(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def shrunk(case: Case) -> Case:
    """For a dry run."""
    return replace(case, length=min(case.length, 64), vocabulary=2000, step_tokens=1024, divisions=(1, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", choices=list(CASES), help="default: those of the device")
    for name, default in {"threads": 2, "rounds": 5, "steps": 12, "trial-steps": 3, "documents": 40_000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="a dry run: tiny models and batches")
    options = parser.parse_args()
    if not find_spec("accelerate"):
        sys.exit("transformers.Trainer needs accelerate: pip install accelerate")
    cases = CASES[options.cases or options.device]
    if options.quick:
        cases = tuple(map(shrunk, cases))
        options.rounds, options.steps, options.trial_steps, options.documents = 2, 3, 1, 2000
    if options.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    results = []
    for case in cases:
        with tempfile.TemporaryDirectory() as temporary:
            results.append(compare(case, options, Path(temporary)))
        print(table(results[-1]) + "\n", flush=True)  # noqa: T201
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n")
