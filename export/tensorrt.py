"""An ONNX graph → a TensorRT plan. Needs neither torch nor transformers.

The network is strongly typed: every layer computes in the type that the graph states, and TensorRT chooses none. Its
version 11 has no other kind. TensorRT builds on the GPU that will run the plan; TensorRT for RTX builds ahead of
time, without a GPU, for all its cards.
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

from mlmkit.artifact import DYNAMIC_INT8, PLAN, Profile, TensorRT
from mlmkit.backends.tensorrt.bindings import FLAVOUR, LOGGER, NAME, RTX, create_runtime, trt
from mlmkit.errors import UserError
from mlmkit.export.profiles import PORTABLE, TARGETS, PlanOptions, make_profiles
from mlmkit.progress import Bar, Bars, progress_bars

log = logging.getLogger(__name__)

LAYERS = "layers.json"
BUILDING = threading.Lock()  # one build at a time: all builds of a process log to one logger, which is read afterwards
# TensorRT's names for types contain these in lower case: "Half", "Row major linear FP16 format", "Float", ...
TYPES = ("bf16", "fp16", "fp32", "fp8", "int8", "int32", "int64", "bool")
FUSED_ATTENTION = "_gemm_mha"  # the tactic of a layer that computes a whole attention begins with this
# The parser takes no ScatterElements with a reduction of max or min, and no standard operators replace it.
NOT_BUILT = {"tapas": "its pooling over cells needs ScatterElements with max and min"}
SEE_ARCHITECTURES = "docs/architectures.md lists the architectures that build"
PROFILE, COMPILED = re.compile(r"\[profile (\d+)\]"), re.compile(r"_myl(\d+)_\d+$")  # in the names of layers
# A layer in the verbose log of TensorRT for RTX, whose engine inspector would need a driver.
LAYER = re.compile(
    r"^Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w*), Inputs: .*?, Outputs: \[(?P<Outputs>.*)\], "
    r"TacticName: (?P<TacticName>.*?), StreamId: \d+, Metadata: (?P<Metadata>.*)$",
    re.MULTILINE,
)


def build_plan(
    graph: Path, folder: Path, *, architecture: str, precision: str, max_length: int, options: PlanOptions
) -> TensorRT:
    """Build `model.plan` from `graph` into `folder`, with `layers.json`, which says what each layer computes in.

    Returns the manifest's entry, without parity; the caller hashes the files, checks parity and writes the manifest.
    Raises `UserError` for options that do not fit, a graph that TensorRT does not take, and a build that fails; with
    TensorRT (not for RTX) also if there is no GPU, or it is too small.
    """
    targets, profiles = plan_targets(architecture, precision, options), make_profiles(options, max_length)
    log.info("building %s with %s %s for compute capability %s", PLAN, NAME, trt.__version__, ", ".join(targets))
    with BUILDING, progress_bars() as bars:
        with _signals_cancel(monitor := _Monitor(bars)):
            plan = _build(graph, profiles, options.target, monitor)
        information, scratch = _read_log() if RTX else _inspect(plan)
    if not information.get("Layers") or len(scratch) != len(profiles):
        log.warning("%s %s describes %s in a form that mlmkit does not know", NAME, trt.__version__, PLAN)
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
    """The compute capabilities that a plan would be built for.

    Raises `UserError` if no plan can be built: call it before the work of an export.
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


# ---------------------------------------------------------------- the build


def _build(graph: Path, profiles: list[Profile], target: str | None, monitor: "_Monitor") -> trt.IHostMemory:
    LOGGER.clear()
    try:
        builder = trt.Builder(LOGGER)
    except TypeError:  # the bindings raise this when the library returns no builder
        raise UserError(f"{NAME} cannot start here: {LOGGER.reason()}") from None
    # TensorRT 11 ignores the flag: every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)  # owns the weights, so it must live until the plan is built
    if not parser.parse_from_file(str(graph)):
        raise UserError(f"{graph.name}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; its ten-bit mantissa would break parity
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise layers are described by name only
    if target:
        from mlmkit.backends.tensorrt.rtx import set_target

        set_target(config, target)
    for profile in profiles:
        _add_profile(builder, network, config, profile)
    config.progress_monitor = monitor
    plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    if plan is None:
        reason = LOGGER.reason()
        hint = ": reduce --max-batch, --max-seq or --max-masked" if "out of memory" in reason else ""
        raise UserError(f"{NAME} cannot build a plan of {graph.name}: {reason}{hint}")
    return plan


def _parser_errors(parser: trt.OnnxParser) -> str:
    """The first node that the parser refuses. Its own descriptions are assertions from its source code."""
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
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, sizes: Profile
) -> None:
    profile = builder.create_optimization_profile()
    rows = list(zip(sizes.batch, sizes.seq, strict=True))
    positions = [(size,) for size in sizes.masked]
    for tensor in [network.get_input(index) for index in range(network.num_inputs)]:
        smallest, usual, largest = rows if len(tensor.shape) == 2 else positions
        profile.set_shape(tensor.name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"{NAME} refuses the profile {sizes}")


class _Monitor(trt.IProgressMonitor):
    """A progress bar per phase of a build. TensorRT calls it from its own threads.

    `cancelled` is the number of the signal that ends the build, or 0.
    """

    def __init__(self, bars: Bars) -> None:
        trt.IProgressMonitor.__init__(self)
        self._bars, self._phases = bars, dict[str, Bar]()
        self.cancelled = 0

    def cancel(self, number: int, _frame: Any) -> None:
        """A signal handler: end the build at its next step."""
        self.cancelled = number

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._phases[phase_name] = self._bars.add(("  " if parent_phase else "") + phase_name, num_steps, "steps")

    def phase_finish(self, phase_name: str) -> None:
        self._phases[phase_name].remove()

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._phases[phase_name].show(step + 1)
        return not self.cancelled


@contextmanager
def _signals_cancel(monitor: _Monitor) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM cancel the build, and raise them after it.

    Python would run their handlers inside the next callback from TensorRT, such as `Logger.log`, and the bindings
    swallow exceptions raised there.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
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


# ---------------------------------------------------------------- what was built


def _read_log() -> tuple[dict[str, Any], list[int]]:
    """The layers of the last build in the inspector's form, and the bytes of scratch memory per profile."""
    layers = []
    for match in LAYER.finditer(LOGGER.layers):
        types = re.findall(r"Datatype: (\w+)", match["Outputs"])
        layers.append(match.groupdict() | {"Outputs": [{"Format/Datatype": name} for name in types]})
    return {"Layers": layers}, LOGGER.scratch


def _inspect(plan: trt.IHostMemory) -> tuple[dict[str, Any], list[int]]:
    """The engine inspector's description of the layers, and the bytes of scratch memory per profile."""
    runtime = create_runtime()
    engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(f"{NAME} cannot load the {PLAN} that it built: {LOGGER.reason()}")
    scratch = [engine.get_device_memory_size_for_profile_v2(i) for i in range(engine.num_optimization_profiles)]
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return json.loads(text), scratch
    except ValueError as error:  # only a report: keep the plan
        log.warning("TensorRT's description of %s is not JSON: %s", PLAN, error)
        return {}, scratch


def count_layers(information: dict[str, Any], profiles: list[str]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Per profile, how many layers write each type; and how many layers are a fused attention, if any.

    `information` is the engine inspector's. Layers that write nothing are not counted.
    """
    counts, fused = {name: Counter[str]() for name in profiles}, Counter[str]()
    layers = [layer for layer in information.get("Layers", []) if isinstance(layer, dict)]  # a string is only a name
    # The name of a layer, or of another layer in its compiled graph, says its profile; without that it is the first.
    names = [str(layer.get("Name", "")) for layer in layers]
    marks = [(PROFILE.search(name), COMPILED.search(name)) for name in names]
    graphs = {graph[1]: int(profile[1]) for profile, graph in marks if profile and graph}
    for layer, (own, graph) in zip(layers, marks, strict=True):
        profile = profiles[int(own[1]) if own else graphs.get(graph[1], 0) if graph else 0]
        for kind in {_type_name(str(output.get("Format/Datatype", ""))) for output in layer.get("Outputs", [])}:
            counts[profile][kind] += 1
        fused[profile] += str(layer.get("TacticName", "")).startswith(FUSED_ATTENTION)
    return {name: dict(sorted(types.items())) for name, types in counts.items()}, dict(+fused)


def _type_name(described: str) -> str:
    lowered = described.lower().replace("bfloat16", "bf16").replace("half", "fp16").replace("float", "fp32")
    return next((name for name in TYPES if name in lowered), described or "unknown")
