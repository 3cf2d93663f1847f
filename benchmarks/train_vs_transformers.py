"""Training: mlmkit's loop against transformers.Trainer, the same model on the same text, in real tokens per second.

Contestants take turns, each in a process of its own:

- mlmkit: `mlmkit.train.loop.train` as `mlmkit train` calls it; its figures are those of its log,
- Trainer, paragraphs: one paragraph per example, `DataCollatorForLanguageModeling`, padded to the longest of the batch,
- Trainer, by length: the same with `train_sampling_strategy="group_by_length"`, which gives up the random order,
- Trainer, run_mlm.py: all paragraphs end to end, cut to full rows: no padding, but documents see each other.

Trainer computes the logits of every position. It gets its text tokenised, and neither logs nor saves. Both sides use
the batch size within a step that a short trial finds fastest. A step has about as many tokens on both sides and is one
update of AdamW. Real tokens are the sum of the attention mask, special tokens included. The first steps of a turn, and
starting and ending a training, are not counted.

The hardware limit is six operations per encoder parameter and real token, at the best rate at which torch multiplies
matrices here; attention and vocabulary head come on top. Needs accelerate, which Trainer imports. gpu.py runs the
same on CUDA, under bfloat16 autocast.
"""

import argparse
import gc
import json
import operator
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from harness import Report, SkippedError, alternate, main, matrix_rate, ratios, say, table
from inputs import TINY, documents, encoder_parameters, logged_steps, write_lines, write_tokenizer
from processes import contestants, isolated, memory_mib

from mlmkit.documents import read_documents
from mlmkit.locations import Source
from mlmkit.train.config import Config, DataConfig, MaskingConfig, ModelConfig, OptimConfig, RunConfig, TokenizerConfig

UNCOUNTED_STEPS = 2  # at the start of a turn: kernels are chosen, memory grows
MLMKIT, PARAGRAPHS, BY_LENGTH = "mlmkit", "Trainer, paragraphs", "Trainer, by length"
RUN_MLM = "Trainer, run_mlm.py"
WARMUP_STEPS, SEED = 1, 1
Examples = list[dict[str, list[int]]]  # as Trainer takes them


@dataclass(frozen=True)
class Case:
    """A model, the tokens per row and per step, and the numbers of micro-batches per step to try."""

    architecture: str
    length: int
    vocabulary: int
    mask_prob: float
    step_tokens: int
    micro_batches: tuple[int, ...] = (1, 2)


CPU_CASE = Case("bert-mini", 256, 16_000, 0.15, 4096)
GPU_CASES = (
    Case("bert-base", 512, 30_522, 0.15, 1 << 17),
    Case("modernbert-base", 1024, 50_368, 0.3, 1 << 17),
)


class Turn(NamedTuple):
    """Real tokens per second, their number, the loss per step, and the peak memory on the device so far.

    The loss is the sum over the micro-batches that is differentiated. It shows that all do the same work; transformers
    5.23 does not divide BERT's by the number of micro-batches.
    """

    rate: float
    tokens: int
    loss: float
    peak_gib: float


def open_contestant(
    case: Case, text: Path, tokenizer: Path, architecture: str, way: str, device: str
) -> Callable[[int, int], Turn]:
    """What a contestant keeps between turns. A call with numbers of micro-batches and steps is a turn."""
    if way == MLMKIT:
        work = partial(train_with_mlmkit, mlmkit_config(case, text, tokenizer, architecture, device))
    else:
        work = partial(train_with_trainer, *tokenised(case, text, tokenizer, architecture, way), case, way, device)
    return partial(take_turn, work, device)


def take_turn(work: Callable[[int, int], Turn], device: str, micro_batches: int, steps: int) -> Turn:
    """A turn with the contestant's peak memory: resident, or allocated on the GPU, which is then freed for the next."""
    import torch

    turn = work(micro_batches, steps)
    if device == "cpu":
        return turn._replace(peak_gib=memory_mib() / 1024)
    peak = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    return turn._replace(peak_gib=peak)


def mlmkit_config(case: Case, text: Path, tokenizer: Path, architecture: str, device: str) -> Config:
    return Config(
        data=DataConfig(train=(str(text),)),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        model=ModelConfig(architecture=architecture, max_length=case.length),
        masking=MaskingConfig(mask_prob=case.mask_prob),
        optim=OptimConfig(warmup_steps=WARMUP_STEPS),
        train=RunConfig(
            global_batch_tokens=case.step_tokens,
            micro_batch_tokens=case.step_tokens,
            save_every=1 << 30,
            log_every=1,
            device=device,
            precision="bf16" if device == "cuda" else "fp32",  # as Trainer
            compile=device == "cuda",
            seed=SEED,
        ),
    )


def train_with_mlmkit(config: Config, micro_batches: int, steps: int) -> Turn:
    """A whole run; the log's lines after the uncounted steps give the figures."""
    size = max(config.train.global_batch_tokens // micro_batches, config.model.max_length)
    settings = replace(config.train, micro_batch_tokens=size, steps=steps + UNCOUNTED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        lines = logged_steps(replace(config, train=settings), Path(folder) / "run")[UNCOUNTED_STEPS:]
    tokens = sum(line["tokens"] for line in lines)
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines)
    return Turn(tokens / seconds, tokens, sum(line["loss"] for line in lines) / len(lines), 0.0)


def tokenised(case: Case, text: Path, tokenizer_folder: Path, architecture: str, way: str) -> tuple[Any, Any, Examples]:
    """Trainer's tokenizer, the Hugging Face configuration that mlmkit builds, and the examples.

    As `run_mlm.py` tokenises, with and without its `--line_by_line`.
    """
    from transformers import AutoTokenizer

    from mlmkit.pretrained import load_tokenizer
    from mlmkit.train.presets import build_config

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    lines = list(read_documents(Source(str(text))))
    if way == RUN_MLM:
        columns = tokenizer(lines, return_special_tokens_mask=True, return_attention_mask=True)
        joined = {name: list(chain(*values)) for name, values in columns.items()}
        ends = range(case.length, len(joined["input_ids"]) + 1, case.length)
        examples = [{name: values[end - case.length : end] for name, values in joined.items()} for end in ends]
    else:
        columns = tokenizer(lines, truncation=True, max_length=case.length, return_special_tokens_mask=True)
        examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return tokenizer, build_config(architecture, load_tokenizer(str(tokenizer_folder)), case.length), examples


def train_with_trainer(
    tokenizer: Any, config: Any, examples: Examples, case: Case, way: str, device: str, micro_batches: int, steps: int
) -> Turn:
    """Time is taken between steps, tokens are counted where the model takes its inputs."""
    import torch
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    torch.manual_seed(SEED)
    model = AutoModelForMaskedLM.from_config(config)
    counted: list[Any] = []
    times: list[float] = []

    def count(_module: Any, _positional: Any, named: dict[str, Any], output: Any) -> None:
        # Kept as tensors: reading them would wait for the device.
        counted.append((named["attention_mask"].sum(), output["loss"].detach()))

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (UNCOUNTED_STEPS, UNCOUNTED_STEPS + steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())
                if state.global_step == UNCOUNTED_STEPS:
                    counted.clear()

    model.register_forward_hook(count, with_kwargs=True)
    mean_length = sum(len(example["input_ids"]) for example in examples) / len(examples)
    optim = OptimConfig()
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            output_dir=folder,
            max_steps=steps + UNCOUNTED_STEPS,
            per_device_train_batch_size=max(1, round(case.step_tokens / micro_batches / mean_length)),
            gradient_accumulation_steps=micro_batches,
            learning_rate=optim.lr,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            warmup_steps=WARMUP_STEPS,
            seed=SEED,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            train_sampling_strategy="group_by_length" if way == BY_LENGTH else "random",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=case.mask_prob)
        trainer = Trainer(model, arguments, collator, examples, callbacks=[Clock()])  # pyright: ignore[reportArgumentType]
        trainer.train()
    tokens, losses = zip(*counted, strict=True)
    total = int(sum(tokens))
    return Turn(total / (times[1] - times[0]), total, float(sum(losses)) / steps, 0.0)


def tiny_architecture(case: Case, folder: Path) -> str:
    path = folder / f"{case.architecture}.json"
    path.write_text(json.dumps(TINY | {"model_type": case.architecture.split("-")[0]}))
    return str(path)


def measure(options: argparse.Namespace) -> Report:
    if not find_spec("accelerate"):
        raise SkippedError("transformers.Trainer needs accelerate: pip install accelerate")
    case = replace(CPU_CASE, length=64, vocabulary=2000, step_tokens=1024) if options.quick else CPU_CASE
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines, tokenizer = documents()[: options.documents], folder / "tokenizer"
        text = write_lines(folder / "train.txt", lines)
        isolated(write_tokenizer, tokenizer, lines, case.vocabulary, case.length)
        architecture = tiny_architecture(case, folder) if options.quick else case.architecture
        makers = {
            way: (open_contestant, case, text, tokenizer, architecture, way, "cpu")
            for way in (MLMKIT, PARAGRAPHS, BY_LENGTH, RUN_MLM)
        }
        with contestants(makers) as started:

            def turn(way: str, micro_batches: int, steps: int) -> Turn:
                taken = started[way].call(operator.call, micro_batches, steps)
                say(f"{way}, {micro_batches} micro-batches per step: {taken.rate:,.0f} tokens/s")
                return taken

            fastest = {way: max(case.micro_batches, key=lambda count: turn(way, count, 1).rate) for way in started}
            turns = {way: partial(turn, way, fastest[way], options.steps) for way in started}
            taken = alternate(turns, options.rounds, warm=True)  # each turn has uncounted steps of its own
        rate = isolated(matrix_rate, "cpu")
        floor = rate / 6 / isolated(trained_parameters, tokenizer, architecture, case.length)
    rates = {way: [turn.rate for turn in of_way] for way, of_way in taken.items()}
    fast = {way: ratios(of_way, rates[MLMKIT]) for way, of_way in rates.items()}
    floor_row = {"": f"hardware limit, {rate / 1e9:,.0f} GFLOP/s", "real tokens/s": floor, "share of the limit": 1.0}
    rows = [
        {
            "": way,
            "real tokens/s": median(rates[way]),
            "share of the limit": median(rates[way]) / floor,
            "mlmkit is x times as fast": fast[way],
            "micro-batches per step": fastest[way],
            "tokens per turn": int(median(turn.tokens for turn in of_way)),
            "loss per step": median(turn.loss for turn in of_way),
            "peak RSS GiB": max(turn.peak_gib for turn in of_way),
        }
        for way, of_way in taken.items()
    ]
    return Report(
        [table(f"{case.architecture} at {case.length}", [floor_row, *rows])],
        headlines={
            "train_times_trainer_paragraphs": median(fast[PARAGRAPHS]),
            "train_times_trainer_by_length": median(fast[BY_LENGTH]),
            "train_times_run_mlm": median(fast[RUN_MLM]),
        },
        figures={
            "case": asdict(case),
            "operations_per_second": rate,
            "floor_tokens_per_second": floor,
            "turns": {way: [turn._asdict() for turn in of_way] for way, of_way in taken.items()},
        },
    )


def trained_parameters(tokenizer: Path, architecture: str, length: int) -> int:
    """The parameters that the hardware limit counts, of the network that all contestants train."""
    from mlmkit.pretrained import load_tokenizer
    from mlmkit.train.presets import build_config

    return encoder_parameters(build_config(architecture, load_tokenizer(str(tokenizer)), length))


if __name__ == "__main__":
    main(__doc__, measure, rounds=(3, 1), steps=(3, 2), documents=(40_000, 1000))
