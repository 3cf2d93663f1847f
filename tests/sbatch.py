"""`sbatch --wait` for a machine without Slurm: runs the elements of a job array here, with the given limit at once."""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

parser = argparse.ArgumentParser()
for option in ("--job-name", "--dependency", "--array", "--output", "--wrap"):
    parser.add_argument(option, required=True)
parser.add_argument("--wait", action="store_true", required=True)
parser.add_argument("--parsable", action="store_true", required=True)
arguments = parser.parse_args()
elements, _, limit = arguments.array.partition("%")


def run(element: str) -> int:
    with Path(arguments.output.replace("%A", str(os.getpid())).replace("%a", element)).open("wb") as log:
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": element}
        return subprocess.run(["sh", "-c", arguments.wrap], stdout=log, stderr=log, env=environment).returncode


with ThreadPoolExecutor(int(limit or 2)) as pool:
    codes = list(pool.map(run, elements.split(",")))
sys.stdout.write(f"{os.getpid()}\n")
raise SystemExit(max(code % 256 for code in codes))
