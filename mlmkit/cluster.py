"""Make the shards of planned corpora on many machines: with Ray, or as a Slurm job array.

Each split of a text is a task (`shards.make_shards`). Finished splits are found again, so the same command resumes an
interrupted run, and the result does not depend on the engine. All machines need the same mlmkit, and must see texts and
folders under the same paths. The environment variables of Ray and Slurm choose the cluster: docs/corpora.md.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from shutil import which
from typing import Any

from mlmkit.errors import UserError, first_line, require
from mlmkit.progress import progress
from mlmkit.shards import Plan, is_made, make_shards
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MOST_ELEMENTS = 1000  # of a job array: Slurm's MaxArraySize is 1001 by default
PREFIX = "mlmkit: "  # of the last line in a job's log, if a `UserError` ended it

_tokenizer = cache(Tokenizer.from_folder)


def run_on_cluster(folders: Sequence[Path], tokenizer: Path, engine: str, workers: int | None = None) -> None:
    """Make all shards of planned corpora. At most `workers` tasks run at once; by default, as many as the cluster can.

    `tokenizer` is the tokenizer's folder, and `engine` is "ray" or "slurm". Slurm's log files go to the folder `logs`
    beside the tokenizer. Raises the first `UserError` of a task, and `UserError` if the engine is missing or gives up.
    """
    folders, tokenizer = [folder.resolve() for folder in folders], tokenizer.resolve()
    tasks = tasks_of(folders)
    missing = [number for number, task in enumerate(tasks) if not is_made(*task)]
    if engine == "ray" and missing:
        with progress("tokenising", len(missing), "parts") as bar:
            for _ in run_with_ray(partial(make_task, tokenizer), [tasks[number] for number in missing], workers):
                bar.advance()
    while missing and engine == "slurm":  # what was killed is submitted again, as long as other tasks succeed
        problem = _submit(folders, tokenizer, missing, len(tasks), workers)
        before, missing = missing, [number for number in missing if not is_made(*tasks[number])]
        if missing == before:
            raise UserError(problem)


def tasks_of(folders: Iterable[Path]) -> list[tuple[Path, int]]:
    """The tasks of planned corpora: folder, and index of the split."""
    return [(folder, index) for folder in folders for index in range(len(Plan.read(folder).splits))]


def make_task(tokenizer: Path, task: tuple[Path, int]) -> None:
    """Make the shards of a split on one core. Raises `UserError` for text that cannot be read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core
    make_shards(*task, _tokenizer(tokenizer))


def run_with_ray(function: Callable[[Any], Any], arguments: Iterable[Any], workers: int | None = None) -> Iterator[Any]:
    """Call a function with each argument on a Ray cluster, and yield the results as they come, in any order.

    Uses the cluster at `RAY_ADDRESS`, or that of `ray start` on this machine, or starts Ray on this machine. A call has
    one core. It is repeated up to three times if its process dies. Raises a `UserError` of the function, and
    `UserError` if Ray gives up.
    """
    require("cluster", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that starts here would report to Ray's makers
    import ray
    from ray.exceptions import RayError, RayTaskError

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with nullcontext() if ray.is_initialized() else ray.init(**options):
            log.info("machines of the Ray cluster: %d, cores: %d", len(ray.nodes()), ray.cluster_resources()["CPU"])
            call = ray.remote(num_cpus=1, max_retries=3)(lambda argument: function(argument))
            waiting = iter(arguments)
            running = [call.remote(argument) for argument in islice(waiting, workers)]
            while running:
                done, running = ray.wait(running)
                running += [call.remote(argument) for argument in islice(waiting, 1)]
                yield ray.get(done[0])
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    except (RayError, ConnectionError) as error:
        raise UserError(f"Ray: {first_line(error)}: run the same command again to resume") from None


def _submit(folders: Sequence[Path], tokenizer: Path, missing: Sequence[int], tasks: int, workers: int | None) -> str:
    """Run the missing tasks in a job array, wait for its end, and return what to say if none of them succeeded.

    Element e of n makes tasks e, e + n, e + 2n, ... Raises the first `UserError` of a task.
    """
    if not which("sbatch"):
        raise UserError("there is no sbatch here: run this on a machine that submits jobs to Slurm")
    elements = min(tasks, MOST_ELEMENTS)
    array = ",".join(map(str, sorted({number % elements for number in missing}))) + (f"%{workers}" if workers else "")
    logs = tokenizer.parent / "logs"
    logs.mkdir(exist_ok=True)
    name = f"mlmkit-{blake2b(bytes(tokenizer), digest_size=4).hexdigest()}"
    command = shlex.join([sys.executable, "-m", "mlmkit.cluster", str(tokenizer), str(elements), *map(str, folders)])
    # A singleton waits for earlier jobs of its name, such as those of a command that was killed.
    options = [f"--job-name={name}", "--dependency=singleton", f"--array={array}", f"--output={logs}/%A_%a.log"]
    log.info("Slurm job %s makes %d of %d parts of the text; its logs are in %s", name, len(missing), tasks, logs)
    try:
        submit = ["sbatch", "--wait", "--parsable", *options, f"--wrap=exec {command}"]
        ended = subprocess.run(submit, capture_output=True, text=True)
    except BaseException:
        subprocess.run(["scancel", "--me", f"--name={name}"])
        raise
    if not (job := ended.stdout.strip().partition(";")[0]):
        raise UserError(ended.stderr.strip())
    for path in sorted(logs.glob(f"{job}_*.log")):
        last = path.read_text("utf-8", errors="replace").rstrip().rpartition("\n")[2]
        if last.startswith(PREFIX):
            raise UserError(last.removeprefix(PREFIX))
    return f"Slurm job {job} made nothing (exit code {ended.returncode}): see {logs}/{job}_*.log"


def _run_element(tokenizer: str, elements: str, *folders: str) -> None:
    for task in tasks_of(map(Path, folders))[int(os.environ["SLURM_ARRAY_TASK_ID"]) :: int(elements)]:
        make_task(Path(tokenizer), task)


if __name__ == "__main__":
    try:
        _run_element(*sys.argv[1:])
    except UserError as error:
        sys.exit(PREFIX + " ".join(str(error).split()))
