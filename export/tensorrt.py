"""An artifact's graph → a TensorRT plan, on the machine that will run it. Needs neither torch nor transformers.

The network is strongly typed: every layer computes in the type that the graph says, and TensorRT chooses none. That is
the only kind that TensorRT 11 has.
"""

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensorrt as trt  # pyright: ignore[reportMissingModuleSource]
from rich.progress import Progress, TaskID

from mlmkit.artifact import DYNAMIC_INT8, GRAPH, PLAN, Manifest, Profile, TensorRT
from mlmkit.backends.cuda import Gpu, find_gpu
from mlmkit.backends.tensorrt import Logger, create_runtime
from mlmkit.errors import UserError
from mlmkit.files import atomic, cache_root
from mlmkit.progress import progress

log = logging.getLogger(__name__)

LAYERS = "layers.json"
# What the engine inspector calls the types, in lower case: "Half", "Row major linear FP16 format", "Float", ...
TYPES = ("bf16", "fp16", "fp32", "fp8", "int8", "int32", "int64", "bool")


@dataclass(frozen=True)
class PlanOptions:
    """What one run may hold: at most `max_batch` rows of at most `max_seq` tokens, and `max_masked` positions.

    Larger batches are split when they run. Rows longer than `max_seq`, up to what the model takes, run one by one.
    """

    max_batch: int = 64
    max_seq: int = 512
    max_masked: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")


def build_plan(folder: Path, manifest: Manifest, options: PlanOptions | None = None) -> TensorRT:
    """Build `model.plan` from the folder's `model.onnx`.

    Writes it and `layers.json`, what each of its layers computes in, into the folder, and returns what the manifest is
    to say, without parity. The caller hashes the files, checks parity and writes the manifest.
    Raises `UserError` for options that do not fit, where no GPU answers, for a graph that TensorRT does not take, a
    build that fails and a GPU that is too small.
    """
    options = options or PlanOptions()
    if manifest.precision == DYNAMIC_INT8:
        raise UserError("TensorRT has no dynamic int8: export with --precision int8, fp16 or bf16")
    gpu = find_gpu()
    profiles = make_profiles(options, manifest.max_length)
    logger = Logger()
    log.info("building %s with TensorRT %s for %s: minutes", PLAN, trt.__version__, gpu.name)
    plan = _build(folder / GRAPH, profiles, gpu, logger)
    layers = _inspect(plan, logger)
    (folder / PLAN).write_bytes(plan)
    (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
    return TensorRT(
        version=trt.__version__,
        compute_capability=gpu.compute_capability,
        gpu=gpu.name,
        profiles=profiles,
        layers=count_types(layers),
        parity={},
    )


def make_profiles(options: PlanOptions, max_length: int) -> list[Profile]:
    """One for few short texts, one for full batches and, if the model takes longer rows than those, one for such a row.

    A profile's memory is that of its largest batch times its longest row, so that many rows and long ones must not
    share one. What they are tuned for has not been measured yet.
    """
    batch, seq, masked = options.max_batch, min(options.max_seq, max_length), options.max_masked
    usual_rows, usual_length = -(-batch // 2), min(128, seq)
    usual_masked = min(max(usual_rows * usual_length * 15 // 100, 1), masked)  # mask-v1's default share
    profiles = [
        Profile("latency", (1, 1, min(4, batch)), (1, min(32, seq), seq), (1, min(4, masked), min(64, masked))),
        Profile("throughput", (1, usual_rows, batch), (1, usual_length, seq), (1, usual_masked, masked)),
    ]
    if seq < max_length:
        usual_masked = min(max(max_length * 15 // 100, 1), masked)
        profiles.append(Profile("long", (1, 1, 1), (1, max_length, max_length), (1, usual_masked, masked)))
    return profiles


def count_types(information: dict[str, Any]) -> dict[str, int]:
    """How many layers write each type, from the engine inspector's account. Layers that write nothing are left out."""
    counts = Counter()
    for layer in information.get("Layers", []):
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []
        for written in {_type_name(str(output.get("Format/Datatype", ""))) for output in outputs}:
            counts[written] += 1
    return dict(sorted(counts.items()))


def _type_name(described: str) -> str:
    lowered = described.lower().replace("bfloat16", "bf16").replace("half", "fp16").replace("float", "fp32")
    return next((name for name in TYPES if name in lowered), described or "unknown")


def _build(graph: Path, profiles: list[Profile], gpu: Gpu, logger: Logger) -> trt.IHostMemory:
    try:
        builder = trt.Builder(logger)
    except TypeError:  # how the bindings say that the library made none
        raise UserError(f"TensorRT cannot start here: {logger.reason()}") from None
    # In TensorRT 11 the flag does nothing and every network is so.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)  # it owns the weights, so it must live until the plan is built
    if not parser.parse_from_file(str(graph)):
        raise UserError(f"{graph}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; ten bits of mantissa would break parity
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows names alone
    for wanted in profiles:
        _add_profile(builder, network, config, wanted)
    _load_timing_cache(config, cache_file := _cache_file(gpu))
    with progress() as bars:
        monitor = _Monitor(bars)
        config.progress_monitor = monitor
        plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise UserError(
            f"{graph}: TensorRT cannot build the plan: {logger.reason()}: a smaller --max-batch, --max-seq or "
            "--max-masked needs less memory"
        )
    _save_timing_cache(config, cache_file)
    return plan


def _parser_errors(parser: trt.OnnxParser) -> str:
    if not parser.num_errors:
        return "TensorRT cannot parse it and gives no reason"
    error: trt.ParserError = parser.get_error(0)
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    place = (
        f"does not take node {error.node_name()!r} ({error.node_operator()})"
        if error.node_name()
        else "cannot parse it"
    )
    return f"TensorRT {place}: {' '.join(error.desc().split())}{more}"


def _add_profile(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, wanted: Profile
) -> None:
    profile = builder.create_optimization_profile()
    rows = list(zip(wanted.batch, wanted.seq, strict=True))
    positions = [(size,) for size in wanted.masked]
    for tensor in [network.get_input(index) for index in range(network.num_inputs)]:
        smallest, usual, largest = rows if len(tensor.shape) == 2 else positions
        profile.set_shape(tensor.name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"TensorRT refuses the profile {wanted}")


def _cache_file(gpu: Gpu) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu.name)
    return cache_root() / "tensorrt" / f"timing-{trt.__version__}-{name}.cache"


def _load_timing_cache(config: trt.IBuilderConfig, file: Path) -> None:
    """Attach the timings of earlier builds; a cache that is broken or of another GPU gives way to a new one."""
    content = file.read_bytes() if file.is_file() else b""
    cache: trt.ITimingCache = config.create_timing_cache(content)
    if content and (cache is None or not config.set_timing_cache(cache, False)):
        log.info("the timing cache %s is not of this TensorRT and GPU: starting a new one", file)
        content = b""
        cache = config.create_timing_cache(content)
    if not content:
        config.set_timing_cache(cache, False)


def _save_timing_cache(config: trt.IBuilderConfig, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as partial:
            partial.write_bytes(config.get_timing_cache().serialize())
    except OSError as error:
        log.warning("cannot keep the timing cache %s: %s", file, error.strerror)


def _inspect(plan: trt.IHostMemory, logger: Logger) -> dict[str, Any]:
    """Load the plan once, as it will be loaded, and give the inspector's account of its layers."""
    runtime = create_runtime(logger)
    engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(f"TensorRT cannot load the {PLAN} that it built: {logger.reason()}")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return json.loads(text)
    except ValueError as error:  # a report, not worth the plan
        log.warning("TensorRT's account of %s is no JSON: %s", PLAN, error)
        return {}


class _Monitor(trt.IProgressMonitor):
    """Bars for the phases of a build, nested as TensorRT nests them. Called from threads of TensorRT's own.

    An exception must not leave these calls, so an interrupt becomes a cancelled build.
    """

    def __init__(self, bars: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._bars, self._tasks, self._lock = bars, dict[str, TaskID](), threading.Lock()
        self.interrupted = False

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._guard():
            description = f"  {phase_name}" if parent_phase else phase_name
            self._tasks[phase_name] = self._bars.add_task(description, total=num_steps)

    def phase_finish(self, phase_name: str) -> None:
        with self._guard():
            if phase_name in self._tasks:
                self._bars.remove_task(self._tasks.pop(phase_name))

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._guard():
            if phase_name in self._tasks:
                self._bars.update(self._tasks[phase_name], completed=step + 1)
        return not self.interrupted

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except KeyboardInterrupt:
            self.interrupted = True
