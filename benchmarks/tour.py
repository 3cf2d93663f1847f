"""Write the figures that README shows of `mlmkit demo` and later commands to benchmarks/results/demo-<date>.json.

    python benchmarks/tour.py

Takes two minutes. On one machine every figure but the speeds is the same each time, to the last digit that README
shows, so this is not part of `make bench`. A test compares README with the file that it names.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import machine
from processes import ROOT

KEPT = ("metrics", "unigram_entropy", "mask_digest", "corpus", "masking", "scored", "backend", "timing")  # of a result
SENTENCES = "Return the name of the file.\nReturn the file of name the.\n"


def mlmkit(folder: Path, *words: object, text: str = "") -> str:
    command = [sys.executable, "-m", "mlmkit", *map(str, words)]
    return subprocess.run(command, cwd=folder, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """The parts of a result that README shows, without tokens, slices and paths."""
    return {key: result[key] for key in KEPT}


def main() -> None:
    figures: dict[str, Any] = {"command": "python benchmarks/tour.py", **machine(), "text": "Python's documentation"}
    demo = Path("mlmkit-demo")
    models = {"onnx": demo / "artifact", "torch": demo / "run" / "model"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def read(file: Path) -> Any:
            return json.loads((folder / demo / file).read_text(encoding="utf-8"))

        def answer(*words: object, text: str = "") -> Any:
            return json.loads(mlmkit(folder, *words, "--json", text=text))

        mlmkit(folder, "demo")
        results = {"torch": "eval-checkpoint", "onnx": "eval-artifact"}
        figures["demo"] = {name: kept(read(Path(result, "result.json"))) for name, result in results.items()}
        figures["parity"] = read(Path("artifact", "mlmkit.json"))["parity"]
        figures["fill"] = answer("fill", models["onnx"], "Return the [MASK] of the file.", "--top-k", 3)
        figures["score"] = answer("score", models["onnx"], text=SENTENCES)
        figures["eval"] = {
            name: kept(answer("eval", model, "--set", demo / "heldout.txt", "--output", demo / name))
            for name, model in models.items()
        }
        figures["compare"] = answer("compare", *(demo / name for name in models))["comparisons"][0]["metrics"]
    path = ROOT / "benchmarks" / "results" / f"demo-{figures['date'][:10]}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
