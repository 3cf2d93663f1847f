"""`mlmkit demo`: train, export, evaluate and fill on real text, with nothing downloaded."""

import logging
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from mlmkit.artifact import read_manifest
from mlmkit.backends import Backend, load
from mlmkit.console import print_table, say
from mlmkit.documents import read_documents
from mlmkit.errors import CheckError, UserError
from mlmkit.eval.api import Evaluation, evaluate
from mlmkit.eval.report import write_report
from mlmkit.eval.results_store import load_result
from mlmkit.export.export import export
from mlmkit.files import write_text
from mlmkit.fill import fill
from mlmkit.locations import Source
from mlmkit.masking import document_key
from mlmkit.pydocs import python_documentation
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config, DataConfig, MaskingConfig, ModelConfig, OptimConfig, RunConfig, TokenizerConfig
from mlmkit.train.loop import train

log = logging.getLogger(__name__)

HELD_OUT_ONE_IN = 20
PSEUDO_SAMPLE = 0.05  # share of the tokens
TOLERANCE = 1e-4  # nats between the cross-entropies of checkpoint and artifact
SENTENCES = (
    "Return a [MASK] object.",
    "If the argument is [MASK], an exception is raised.",
    "Return the [MASK] of the file as a [MASK].",
)


def demo_config(train_text: Path) -> Config:
    """A training that takes two minutes on two cores, chosen among a dozen by held-out loss (docs/decisions.md)."""
    return Config(
        data=DataConfig(train=(str(train_text),)),
        tokenizer=TokenizerConfig(vocab_size=4096, lowercase=True),
        model=ModelConfig(architecture="bert-tiny", max_length=128),
        masking=MaskingConfig(mask_prob=0.4),
        optim=OptimConfig(lr=3e-3),
        train=RunConfig(steps=900, global_batch_tokens=2048, micro_batch_tokens=2048, save_every=300),
    )


def run_demo(output: Path, text: str | None) -> None:
    """Train, export, evaluate, fill, and print the results. Raises `UserError` and `CheckError` as its steps do."""
    began = time.perf_counter()
    train_text, heldout_text = prepare_text(output, text)

    log.info("1/4 training on %s", train_text)
    checkpoint = train(demo_config(train_text), output / "run")

    artifact = output / "artifact"
    if artifact.exists():
        log.info("2/4 %s exists already", artifact)
    else:
        log.info("2/4 exporting to ONNX")
        export(str(checkpoint), artifact)

    log.info("3/4 evaluating both on %s, mask seed 0", heldout_text)
    models = {"checkpoint": load(str(checkpoint)), "artifact": load(str(artifact))}
    evaluations = {}
    for name, model in models.items():
        evaluations[name] = evaluate(
            model,
            Source(str(heldout_text)),
            metrics=("masked", "pseudo"),
            mask_seed=0,
            pseudo_sample=PSEUDO_SAMPLE,
            output=output / f"eval-{name}",
            overwrite=True,
        )
        write_report(load_result(output / f"eval-{name}"))
    difference = check_agreement(evaluations)

    log.info("4/4 filling masks")
    engine = models["artifact"]
    sentences = fillable_sentences(engine.tokenizer, heldout_text, own_text=text is not None)
    for sentence in sentences:
        show_fill(engine, sentence)

    names = [evaluation.result["backend"]["name"] for evaluation in evaluations.values()]
    print_table(result_rows(evaluations), ["held-out text, mask seed 0, in nats", *names], align="lrr")
    parity = read_manifest(artifact).parity
    say(
        f"Same masks, and cross-entropies {difference:.0e} nats apart. Parity at export, over {parity['masked']} "
        f"masked tokens: log P differs by at most {parity['max_log_prob_difference']:.1e} nats."
    )
    say("")
    say(f"Finished in {time.perf_counter() - began:.0f} s. Results:")
    contents = {
        "run/model": "the checkpoint, for any Hugging Face tool",
        "run/log.jsonl": "the training log",
        "artifact": "the ONNX engine, its tokenizer and mlmkit.json",
        "eval-checkpoint/report.html": "the evaluation on one page; result.json and the tokens are in the same folder",
    }
    print_table([(f"  {output / name}", content) for name, content in contents.items()])
    command = "mlmkit" if shutil.which("mlmkit") else os.path.relpath(Path(sys.executable).with_name("mlmkit"))
    say("")
    say(f'Try next:  {command} fill {artifact} "{sentences[0]}"')


def prepare_text(output: Path, text: str | None) -> tuple[Path, Path]:
    """Write `train.txt` and `heldout.txt`, one document per line; a document's hash decides where it goes.

    Raises `UserError` when one of them would be empty, or when `output` holds a demo on another text.
    """
    if text is None:
        log.info("collecting Python's documentation")
        documents = python_documentation()
    else:
        documents = list(dict.fromkeys(read_documents(Source(text))))
    is_held_out = [document_key(line) % HELD_OUT_ONE_IN == 0 for line in documents]
    if all(is_held_out) or not any(is_held_out):
        raise UserError(f"{text} has {len(documents)} documents: too few to hold one in {HELD_OUT_ONE_IN} out")
    train_text, heldout_text = output / "train.txt", output / "heldout.txt"
    for path, wanted in ((train_text, False), (heldout_text, True)):
        lines = [line for line, held_out in zip(documents, is_held_out, strict=True) if held_out == wanted]
        content = "".join(f"{line}\n" for line in lines)
        if path.exists() and path.read_bytes() != content.encode():
            raise UserError(f"{output} holds a demo on another text: choose another --output, or delete that folder")
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
    return train_text, heldout_text


def check_agreement(evaluations: dict[str, Evaluation]) -> float:
    """The difference of the two cross-entropies, in nats.

    Raises `CheckError` if they scored different positions, or differ by more than `TOLERANCE`.
    """
    first, second = (evaluation.result for evaluation in evaluations.values())
    if first["mask_digest"] != second["mask_digest"]:
        raise CheckError("the two evaluations have different mask digests")
    name = "masked_cross_entropy"
    values = [result["metrics"][name]["value"] for result in (first, second)]
    difference = abs(np.subtract(*np.array(values, dtype=np.float64)))  # NaN for a value that does not exist
    if not difference <= TOLERANCE:
        raise CheckError(f"checkpoint and artifact disagree by {difference:.2e} nats of masked cross-entropy")
    return difference


def fillable_sentences(tokenizer: Tokenizer, heldout_text: Path, *, own_text: bool) -> list[str]:
    """Sentences with a mask: fixed ones for our text; with `own_text`, the first words of held-out documents."""
    if not own_text:
        return [sentence.replace("[MASK]", tokenizer.mask_token) for sentence in SENTENCES]
    openings = [text.split()[:12] for text in read_documents(Source(str(heldout_text)))][:3]
    return [" ".join([*words[:-2], tokenizer.mask_token, *words[-1:]]) for words in openings]


def show_fill(model: Backend, sentence: str) -> None:
    """Print the sentence and the candidates for each of its masks."""
    say(f"  {sentence}")
    for candidates in fill(model, sentence, top_k=4):
        say("      " + "   ".join(f"{each['token_str']} {each['score']:.2f}" for each in candidates))


def result_rows(evaluations: dict[str, Evaluation]) -> list[list[str]]:
    """The rows of a table with both evaluations side by side, each with its label first."""
    results = [evaluation.result for evaluation in evaluations.values()]
    metrics = {
        "masked_cross_entropy": "masked cross-entropy",
        "masked_accuracy": "masked accuracy",
        "pseudo_perplexity": f"pseudo-perplexity, {results[0]['scored']['pseudo']:,} tokens",
    }
    return [
        ["unigram entropy, to beat", *(f"{r['unigram_entropy']:.4f}" for r in results if "unigram_entropy" in r)],
        *([label, *(f"{r['metrics'][name]['value']:.4f}" for r in results)] for name, label in metrics.items()),
        ["mask digest", *(r["mask_digest"][:12] + "…" for r in results)],
        ["tokens/s, masked", *(f"{r['timing']['masked']['tokens_per_second']:,.0f}" for r in results)],
    ]
