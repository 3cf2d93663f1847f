"""An artifact's graph → a TensorRT plan. Needs neither torch nor transformers.

The network is strongly typed: every layer computes in the type that the graph says, and TensorRT chooses none. That is
the only kind that TensorRT 11 has. TensorRT builds on the GPU that will run the plan; TensorRT for RTX builds ahead of
time, without a GPU, for all cards.
"""

import json
import logging
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from mlmkit.artifact import DYNAMIC_INT8, GRAPH, PLAN, Manifest, Profile, TensorRT
from mlmkit.backends.tensorrt.bindings import FLAVOUR, LOGGER, NAME, RTX, create_runtime, trt
from mlmkit.console import progress
from mlmkit.errors import UserError
from mlmkit.export.profiles import PORTABLE, TARGETS, PlanOptions, make_profiles

log = logging.getLogger(__name__)

LAYERS = "layers.json"
BUILDING = threading.Lock()  # one build at a time: TensorRT logs those of a process to one logger
# What TensorRT calls the types, in lower case: "Half", "Row major linear FP16 format", "Float", ...
TYPES = ("bf16", "fp16", "fp32", "fp8", "int8", "int32", "int64", "bool")
FUSED_ATTENTION = "_gemm_mha"  # how the tactic's name of a layer begins that computes all of an attention
# The parser takes no ScatterElements with a reduction of max or min, and no standard form replaces it.
NOT_BUILT = {"tapas": "its pooling over cells needs ScatterElements with max and min"}
SEE_ARCHITECTURES = "docs/architectures.md lists the architectures that build"
PROFILE, COMPILED = re.compile(r"\[profile (\d+)\]"), re.compile(r"_myl(\d+)_\d+$")  # in the names of layers
# A layer in the verbose log of TensorRT for RTX, whose engine inspector would need a driver.
LAYER = re.compile(
    r"^Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w*), Inputs: .*?, Outputs: \[(?P<Outputs>.*)\], "
    r"TacticName: (?P<TacticName>.*?), StreamId: \d+, Metadata: (?P<Metadata>.*)$",
    re.MULTILINE,
)


def build_plan(folder: Path, manifest: Manifest, options: PlanOptions, graph: Path | None = None) -> TensorRT:
    """Build `model.plan` from `graph`, by default the folder's `model.onnx`.

    Writes it and `layers.json`, what each of its layers computes in, into the folder, and returns what the manifest is
    to say, without parity. The caller hashes the files, checks parity and writes the manifest.
    Raises `UserError` for options that do not fit, for a graph that TensorRT does not take and a build that fails. With
    TensorRT, not for RTX, also where no GPU answers, and for a GPU that is too small.
    """
    targets = plan_targets(manifest.architecture, manifest.precision, options)
    profiles = make_profiles(options, manifest.max_length)
    log.info("building %s with %s %s for compute capability %s", PLAN, NAME, trt.__version__, ", ".join(targets))
    with BUILDING, progress() as bars:
        with _signals_kept(monitor := _Monitor(bars)):
            plan = _build(graph or folder / GRAPH, profiles, options.target, monitor)
        information, scratch = _read_log() if RTX else _inspect(plan)
    if not information.get("Layers") or len(scratch) != len(profiles):
        log.warning("%s %s describes %s in a form that is not known here", NAME, trt.__version__, PLAN)
    (folder / PLAN).write_bytes(plan)
    (folder / LAYERS).write_text(json.dumps(information, indent=1) + "\n", encoding="utf-8")
    names = [profile.name for profile in profiles]
    layers, fused = count_layers(information, names)
    return TensorRT(
        flavour=FLAVOUR,
        version=trt.__version__,
        targets=targets,
        profiles=profiles,
        layers=layers,
        fused_attention=fused,
        scratch_mib={name: round(size / 2**20, 1) for name, size in zip(names, scratch, strict=False)},
        gpu=None,
        parity=None,
    )


def plan_targets(architecture: str, precision: str, options: PlanOptions) -> list[str]:
    """The compute capabilities that a plan would be for.

    Raises `UserError` for what no plan can be built of, and where TensorRT, not for RTX, has no GPU: call it before
    the work of an export.
    """
    if architecture in NOT_BUILT:
        raise UserError(f"TensorRT cannot run a {architecture} model: {NOT_BUILT[architecture]}; export without --trt")
    if precision == DYNAMIC_INT8:
        raise UserError("TensorRT has no dynamic int8: export with --precision int8, fp16 or bf16")
    if options.target == "sm75" and precision != "fp16":
        raise UserError(f"sm75 (Turing) computes in float16 only, not in {precision}: export with --precision fp16")
    if RTX:
        return [TARGETS[options.target]] if options.target else PORTABLE
    from mlmkit.backends.tensorrt.cuda import find_gpu

    if options.target:
        raise UserError("--target is for TensorRT for RTX; TensorRT builds for the GPU of this machine")
    return [find_gpu().compute_capability]


def count_layers(information: dict[str, Any], profiles: list[str]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """By profile: how many layers write each type, and how many are a fused attention; none is left out.

    `information` is the engine inspector's. Layers that write nothing are not counted.
    """
    counts, fused = {name: Counter[str]() for name in profiles}, Counter[str]()
    layers = [layer for layer in information.get("Layers", []) if isinstance(layer, dict)]  # else names alone
    # A layer of another profile than the first says so in its name, or another layer of its compiled graph does.
    names = [str(layer.get("Name", "")) for layer in layers]
    places = [(PROFILE.search(name), COMPILED.search(name)) for name in names]
    graphs = {graph[1]: int(profile[1]) for profile, graph in places if profile and graph}
    for layer, (own, graph) in zip(layers, places, strict=True):
        profile = profiles[int(own[1]) if own else graphs.get(graph[1], 0) if graph else 0]
        for kind in {_type_name(str(output.get("Format/Datatype", ""))) for output in layer.get("Outputs", [])}:
            counts[profile][kind] += 1
        fused[profile] += str(layer.get("TacticName", "")).startswith(FUSED_ATTENTION)
    return {name: dict(sorted(types.items())) for name, types in counts.items()}, dict(+fused)


def _type_name(described: str) -> str:
    lowered = described.lower().replace("bfloat16", "bf16").replace("half", "fp16").replace("float", "fp32")
    return next((name for name in TYPES if name in lowered), described or "unknown")


def _build(graph: Path, profiles: list[Profile], target: str | None, monitor: "_Monitor") -> trt.IHostMemory:
    LOGGER.clear()
    try:
        builder = trt.Builder(LOGGER)
    except TypeError:  # how the bindings say that the library made none
        raise UserError(f"{NAME} cannot start here: {LOGGER.reason()}") from None
    # In TensorRT 11 the flag does nothing and every network is so.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)  # it owns the weights, so it must live until the plan is built
    if not parser.parse_from_file(str(graph)):
        raise UserError(f"{graph.name}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; ten bits of mantissa would break parity
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else layers are described by their names alone
    if target:
        from mlmkit.backends.tensorrt.rtx import set_target

        set_target(config, target)
    for wanted in profiles:
        _add_profile(builder, network, config, wanted)
    config.progress_monitor = monitor
    plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    if plan is None:
        reason = LOGGER.reason()
        hint = ": a smaller --max-batch, --max-seq or --max-masked needs less" if "out of memory" in reason else ""
        raise UserError(f"{NAME} cannot build a plan of {graph.name}: {reason}{hint}")
    return plan


def _parser_errors(parser: trt.OnnxParser) -> str:
    """What the parser says of the first node that it does not take. Its descriptions are assertions of its own code."""
    if not parser.num_errors:
        return f"{NAME} cannot parse it and gives no reason"
    error: trt.ParserError = parser.get_error(0)
    kind = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    if not error.node_operator():
        return f"{NAME} cannot parse it: {kind}{more}"
    return (
        f"{NAME} does not take {error.node_operator()} (node {error.node_name()!r}: {kind}{more}): {SEE_ARCHITECTURES}"
    )


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
        raise UserError(f"{NAME} refuses the profile {wanted}")


def _read_log() -> tuple[dict[str, Any], list[int]]:
    """The layers of the last plan that was built, in the inspector's form, and each profile's bytes of scratch."""
    layers = []
    for match in LAYER.finditer(LOGGER.layers):
        types = re.findall(r"Datatype: (\w+)", match["Outputs"])
        layers.append(match.groupdict() | {"Outputs": [{"Format/Datatype": name} for name in types]})
    return {"Layers": layers}, LOGGER.scratch


def _inspect(plan: trt.IHostMemory) -> tuple[dict[str, Any], list[int]]:
    """Load the plan once, as it will be loaded: the inspector's account of its layers, and bytes of scratch."""
    runtime = create_runtime()
    engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(f"{NAME} cannot load the {PLAN} that it built: {LOGGER.reason()}")
    scratch = [engine.get_device_memory_size_for_profile_v2(i) for i in range(engine.num_optimization_profiles)]
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return json.loads(text), scratch
    except ValueError as error:  # a report, not worth the plan
        log.warning("TensorRT's account of %s is no JSON: %s", PLAN, error)
        return {}, scratch


class _Monitor(trt.IProgressMonitor):
    """Bars for the phases of a build, nested as TensorRT nests them. Called from threads of TensorRT's own.

    `cancelled` is the number of the signal that ends the build, or 0.
    """

    def __init__(self, bars: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._bars, self._tasks, self._lock = bars, dict[str, TaskID](), threading.Lock()
        self.cancelled = 0

    def cancel(self, number: int, _frame: Any) -> None:
        """End the build at its next step: a handler of signals."""
        self.cancelled = number

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            description = f"  {phase_name}" if parent_phase else phase_name
            self._tasks[phase_name] = self._bars.add_task(description, total=num_steps)

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            if phase_name in self._tasks:
                self._bars.remove_task(self._tasks.pop(phase_name))

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            if phase_name in self._tasks:
                self._bars.update(self._tasks[phase_name], completed=step + 1)
        return not self.cancelled


@contextmanager
def _signals_kept(monitor: _Monitor) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM cancel the build, and raise them behind it.

    Python runs a handler in whatever runs next: while a graph is parsed and built that is a call of TensorRT's, such as
    `Logger.log`, and the bindings swallow the exception.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers, and gets signals
        yield
        return
    handlers = {number: signal.signal(number, monitor.cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if monitor.cancelled:
            signal.raise_signal(monitor.cancelled)
