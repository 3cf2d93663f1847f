"""Run README's commands. Write their figures to benchmarks/results/readme.json and the pictures in docs/images.

    python benchmarks/tour.py

Takes about five minutes and needs Chromium. On one machine every figure but the speeds is the same each time, to the
last digit that README shows, so this is not part of `make bench`. A test compares README with the file.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import machine
from processes import ROOT

from mlmkit.demo import prepare_text

KEPT = ("metrics", "unigram_entropy", "mask_digest", "corpus", "masking", "scored", "backend", "timing")  # of a result
WIDTH, HEIGHT = 1280, 800  # of the pictures, in CSS pixels


def readme_config() -> str:
    """The training configuration that README shows."""
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("<<'TOML'\n")
    return rest.partition("TOML\n")[0]


def main() -> None:
    def mlmkit(*words: object) -> Any:
        command = [sys.executable, "-m", "mlmkit", *map(str, words), "--json"]
        answer = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
        return json.loads(answer)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_text(folder / "mlmkit-demo", None)
        (folder / "config.toml").write_text(readme_config(), encoding="utf-8")
        held_out = ("--set", "mlmkit-demo/heldout.txt")
        figures = {
            "command": "python benchmarks/tour.py",
            **machine(),
            "config": readme_config(),
            "train": mlmkit("train", "config.toml", "--output", "run")["held_out"],
            "export": mlmkit("export", "run/model", "--output", "artifact")["parity"],
            "eval": kept(mlmkit("eval", "artifact", *held_out, "--output", "result")),
            "eval_torch": kept(mlmkit("eval", "run/model", *held_out, "--output", "result-torch")),
            "compare": mlmkit("compare", "result", "result-torch")["comparisons"][0]["metrics"],
            "fill": mlmkit("fill", "artifact", "Raise ValueError [MASK] the string is empty."),
        }
        photograph(folder / "result" / "report.html")
    path = ROOT / "benchmarks" / "results" / "readme.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """The parts of a result that README shows, without tokens, slices and paths."""
    return {key: result[key] for key in KEPT}


def photograph(page: Path) -> None:
    """Write the top of the page as docs/images/report.png and, in dark, report-dark.png."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        tab.goto(page.as_uri())
        tab.screenshot(path=ROOT / "docs" / "images" / "report.png")
        tab.emulate_media(color_scheme="dark")
        tab.screenshot(path=ROOT / "docs" / "images" / "report-dark.png")
        browser.close()


if __name__ == "__main__":
    main()
