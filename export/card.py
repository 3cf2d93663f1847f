"""A model card for the Hugging Face hub: what the artifact is, how to run it, its parity and its metrics."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlmkit.artifact import CARD, FLAVOURS, MANIFEST, Manifest, report_rows
from mlmkit.errors import UserError
from mlmkit.tokenizer import Tokenizer

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

INTRODUCTION = """\
# {architecture} masked language model, {precision} ONNX

An artifact of mlmkit{source}: a graph that scores masked positions only, for ONNX Runtime{tensorrt}. It takes texts
of up to {max_length:,} tokens and has a vocabulary of {vocabulary_size:,}. The files are hashed, and mlmkit refuses
to run one that has changed.

## Running it

```
pip install mlmkit
hf download USER/NAME --local-dir ARTIFACT
mlmkit inspect ARTIFACT
mlmkit fill ARTIFACT "To be or not to {mask}."
mlmkit score ARTIFACT sentences.txt --per-token
mlmkit eval ARTIFACT --set corpus.txt --mask-seed 0 --output result
```

```python
import mlmkit
from mlmkit.fill import fill

fill(mlmkit.load("ARTIFACT"), "To be or not to {mask}.")
mlmkit.pseudo_log_likelihood("ARTIFACT", ["The keys are here.", "The keys is here."])
```

`AutoTokenizer` and `AutoConfig` of transformers read the folder. The pipelines of optimum and transformers.js cannot
run the graph: besides `input_ids` and `attention_mask` it takes `positions` and `targets`, and it returns
log-probabilities and ranks, not logits.
"""


def write_card(folder: Path, manifest: Manifest, *, checkpoint: str, results: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the artifact's README.md. It is not hashed, so its owner may edit it.

    `checkpoint` is what was exported; a hub name becomes the base model. `results`, the contents of `result.json`
    files, are shown as a table. Raises `UserError` for a result of other weights.
    """
    for result in results:
        if result["model"]["fingerprint"] != manifest.fingerprint:
            raise UserError(f"the result of {result['model']['path']} was not measured on the weights of {checkpoint}")
    base = checkpoint if HUB_NAME.fullmatch(checkpoint) and not Path(checkpoint).exists() else ""
    introduction = INTRODUCTION.format(
        architecture=manifest.architecture,
        precision=manifest.precision,
        source=f", exported from [{base}](https://huggingface.co/{base})" if base else "",
        tensorrt=f", and a plan of {FLAVOURS[manifest.tensorrt.flavour]}" if manifest.tensorrt else "",
        max_length=manifest.max_length,
        vocabulary_size=manifest.vocabulary_size,
        mask=Tokenizer.from_folder(folder).mask_token,
    )
    parts = [_front_matter(manifest, base), introduction, _parity(manifest), _metrics(results), _files(manifest)]
    (folder / CARD).write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _front_matter(manifest: Manifest, base: str) -> str:
    """The YAML that the hub reads. Each value is JSON, which is valid YAML."""
    values: dict[str, Any] = {"library_name": "mlmkit", "pipeline_tag": "fill-mask"}
    if base:
        values["base_model"] = base
        if manifest.precision != "fp32":
            values["base_model_relation"] = "quantized"
    tensorrt = ["tensorrt"] if manifest.tensorrt else []
    values["tags"] = ["mlmkit", "masked-lm", "onnx", *tensorrt, manifest.architecture, manifest.precision]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def _parity(manifest: Manifest) -> str:
    verdict = "Within the bounds that the export demands."
    if manifest.drift_allowed:
        verdict = "**Beyond the bounds that the export demands**; exported anyway, with `--allow-drift`."
    return (
        "## Parity with the checkpoint\n\nThe engine against the checkpoint in float32, on real text; differences of "
        f"log-probabilities in nats. {verdict}\n\n" + _table(("", "value"), report_rows(manifest.parity))
    )


def _metrics(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for result in results:
        source = result["corpus"]["source"]
        name = source["set"] or Path(source["location"] or "texts").name
        run_by = f"{result['backend']['name']} on {result['backend']['device']}, {result['model']['precision']}"
        for metric, figures in result["metrics"].items():
            interval = "-" if figures["low"] is None else f"{_number(figures['low'])} to {_number(figures['high'])}"
            digest = result.get("mask_digest", "")
            rows.append((name, metric.replace("_", " "), _number(figures["value"]), interval, run_by, digest))
    if not rows:
        return ""
    head = ("set", "metric", "value", "95 % interval", "run by", "mask digest")
    return "## Metrics\n\nLogarithms are natural; intervals are over documents.\n\n" + _table(head, rows)


def _files(manifest: Manifest) -> str:
    rows = [(f"`{name}`", f"`{digest}`") for name, digest in manifest.files.items()]
    weights = f"Weights' fingerprint: `{manifest.fingerprint}`. Exported by mlmkit {manifest.mlmkit_version}.\n"
    return f"## Files\n\nAs `{MANIFEST}` lists them.\n\n{_table(('file', 'SHA-256'), rows)}\n{weights}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot break out of its cell or act as HTML: the names of sets come from users."""
    return "".join(char for char in text.replace("|", "\\|").replace("<", "&lt;") if char.isprintable())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
