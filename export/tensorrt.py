"""TensorRT plans from ONNX networks: built, cached, read back and described. No torch.

One path for ``tensorrt`` 10.3 (JetPack 6.2), 10.16 and 11.4, and for ``tensorrt_rtx`` 1.7. What one
of them lacks is asked for (``hasattr``), never assumed:

* Networks are strongly typed: precision is what the ONNX graph says (Cast, half-precision weights,
  Q/DQ). TensorRT 11 knows nothing else; 10 is told so; the flags for weak typing are not touched.
* ``tensorrt`` builds for the GPU that is in the machine. ``tensorrt_rtx`` also builds where there
  is none, for a compute capability that is named (7.5, 8.0, 8.6, 8.9, 12.0, 12.1).
* Plans of ``tensorrt_rtx`` take all their memory from the caller, else they could not be captured
  into a CUDA graph.

A plan belongs to one GPU model, one version of the library and one operating system: it is kept
in the cache folder under a hash of all of these, the network and the settings. Beside them lies a
timing cache per version and GPU: what ``tensorrt`` measured for one plan is not measured again for
the next (``tensorrt_rtx`` measures nothing when it builds).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import platform
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuseengine import cache as store
from fuseengine.errors import BackendUnavailableError, CacheError, CompileError, SettingError
from fuseengine.runtime.gpu import Gpu, gpus

if TYPE_CHECKING:
    from fuseengine.runtime.bundle import Bundle

log = logging.getLogger("fuseengine.tensorrt")

LIBRARIES = ("tensorrt", "tensorrt_rtx")
"""Import names, the preferred one first."""

Shape = tuple[int, ...]

_lock = threading.RLock()
"""A builder uses the whole machine, and errors come through one logger: one build at a time."""


# --- the library ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    Attributes:
        module: the Python module.
        name: its import name.
        version: "10.3.0".
    """

    module: Any
    name: str
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which compiles a plan's kernels on the device."""
        return self.name == "tensorrt_rtx"

    def targets(self) -> tuple[int, ...]:
        """Capabilities that it builds for without such a GPU; none for ``tensorrt``."""
        names = dir(getattr(self.module, "ComputeCapability", None))
        return tuple(sorted(int(n[2:]) for n in names if re.fullmatch(r"SM\d+", n)))


def find_library(name: str | None = None) -> Library:
    """The TensorRT that is installed.

    Args:
        name: one of :data:`LIBRARIES`; None: the first that is installed.

    Raises:
        BackendUnavailableError: it is not installed, or cannot be imported.
    """
    names = LIBRARIES if name is None else (name,)
    for candidate in names:
        if importlib.util.find_spec(candidate) is not None:
            return _imported(candidate)
    raise BackendUnavailableError(
        f"{' and '.join(names)} not installed; on a Jetson JetPack brings TensorRT (make the "
        "environment with --system-site-packages), elsewhere: pip install 'fuseengine[tensorrt]', "
        "or 'fuseengine[rtx]' for TensorRT-RTX"
    )


@functools.cache
def _imported(name: str) -> Library:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"{name} is installed but cannot be imported ({error}); install one that fits this "
            "Python and CUDA"
        ) from error
    return Library(module, name, str(module.__version__))


@functools.cache
def logger(library: Library) -> Any:
    """The logger of a library, which takes only one per process; messages go to ``logging``."""
    trt = library.module
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.INFO,
        "INFO": logging.DEBUG,
        "VERBOSE": logging.DEBUG - 5,
    }

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity.name, logging.INFO)
            # Errors are raised by us, with what was asked for: the log has them for completeness.
            if level == logging.ERROR:
                self.errors.append(message.strip())
                level = logging.INFO
            log.log(level, "%s", message)

    return Logger()


@contextlib.contextmanager
def _collected_errors(library: Library) -> Iterator[list[str]]:
    """The library's error messages while the block runs."""
    sink = logger(library)
    before, sink.errors = sink.errors, []
    try:
        yield sink.errors
    finally:
        sink.errors = before


# --- what is asked for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Sizes that one plan serves: an optimisation profile of one input.

    Attributes:
        smallest: of every dimension.
        usual: what it is tuned for.
        largest: of every dimension.
    """

    smallest: Shape
    usual: Shape
    largest: Shape

    def __post_init__(self) -> None:
        ranks = {len(self.smallest), len(self.usual), len(self.largest)}
        sides = zip(self.smallest, self.usual, self.largest, strict=len(ranks) == 1)
        if len(ranks) != 1 or any(not 0 < a <= b <= c for a, b, c in sides):
            raise SettingError(
                f"range {self.smallest}, {self.usual}, {self.largest}; expected three shapes of "
                "one rank, each dimension at least 1 and ascending"
            )


@dataclass(frozen=True)
class BuildSettings:
    """How a plan is built.

    Attributes:
        shapes: per input, a fixed shape or a :class:`Range`. Inputs whose shape the network fixes
            may be left out.
        tf32: whether float32 products may be rounded to TF32 (10 bits); by default float32 is
            float32.
        level: builder optimisation level, 0 (quick) to 5 (thorough); None: the library's own, 3.
        workspace_bytes: most scratch memory that one layer may use; None: all of the GPU's.
        capability: compute capability as two digits to build for without such a GPU
            (``tensorrt_rtx`` only); None: the GPU's that is there.
    """

    shapes: Mapping[str, Shape | Range] = field(default_factory=dict)
    tf32: bool = False
    level: int | None = None
    workspace_bytes: int | None = None
    capability: int | None = None

    def __post_init__(self) -> None:
        if self.level is not None and not 0 <= self.level <= 5:
            raise SettingError(f"level={self.level}; expected 0 (quick) to 5 (thorough), or None")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise SettingError(f"workspace_bytes={self.workspace_bytes}; expected 1 or more")
        for name, shape in self.shapes.items():
            if not isinstance(shape, Range) and any(n < 1 for n in shape):
                raise SettingError(f"shape of {name}: {shape}; expected numbers of at least 1")

    def text(self) -> str:
        """Everything that decides a plan, in a fixed order."""
        shapes = {
            name: dataclasses.astuple(shape) if isinstance(shape, Range) else tuple(shape)
            for name, shape in self.shapes.items()
        }
        rest = (self.tf32, self.level, self.workspace_bytes, self.capability)
        return json.dumps([shapes, rest], sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """A network as TensorRT built it.

    Attributes:
        content: what ``Runtime.deserialize_cuda_engine`` takes.
        package: import name of what built it.
        version: of that.
        target: of the GPU: its name and capability, or the capability alone.
        seconds: that building took; of one from the cache, that reading took.
        from_cache: whether it was built before.
    """

    content: bytes = field(repr=False)
    package: str
    version: str
    target: str
    seconds: float
    from_cache: bool = False


# --- building -------------------------------------------------------------------------------------


def build(
    network: bytes,
    settings: BuildSettings | None = None,
    *,
    library: str | None = None,
    cache: bool = True,
    bundle: Bundle | None = None,
) -> Plan:
    """Build a plan, or take the one that was built before from the bundle or the cache.

    Args:
        network: a serialised ONNX model in the precision that is to run.
        settings: shapes and limits.
        library: one of :data:`LIBRARIES`; None: the one that is installed.
        cache: whether plans and timings are kept and looked for.
        bundle: of the network; it is asked first, and told what was built, to be saved with it.

    Returns:
        The plan.

    Raises:
        BackendUnavailableError: TensorRT is not installed, there is no GPU that it could build for,
            or it does not build for the capability asked for.
        SettingError: a shape is missing or does not fit the network.
        CompileError: TensorRT cannot read or build the network; the message names the nodes.
    """
    begin = time.perf_counter()
    settings = settings or BuildSettings()
    found = find_library(library)
    target = _target(found, settings)
    key = _key(network, found, target, settings)
    content = None if bundle is None else bundle.plan(key)
    if content is None and cache and (files := store.load(key)) is not None:
        content = files.get("plan")
    from_cache = content is not None
    if content is None:
        with _lock, _collected_errors(found) as errors:
            content = _build(network, found, target, settings, errors, keep_timings=cache)
        if cache:
            _keep(key, content)
    if bundle is not None:
        about = {"library": found.name, "version": found.version, "for": target}
        bundle.keep_plan(key, content, about)
    seconds = time.perf_counter() - begin
    return Plan(content, found.name, found.version, target, seconds, from_cache)


def check(network: bytes, *, library: str | None = None) -> int:
    """Read a network without building it: seconds instead of minutes.

    Needs what creating a builder needs: ``tensorrt`` a GPU, ``tensorrt_rtx`` none.

    Args:
        network: a serialised ONNX model.
        library: one of :data:`LIBRARIES`; None: the one that is installed.

    Returns:
        The number of TensorRT layers that the network became.

    Raises:
        BackendUnavailableError: TensorRT is not installed, or finds no GPU and needs one.
        CompileError: it cannot read the network; the message names the nodes.
    """
    found = find_library(library)
    with _lock, _collected_errors(found) as errors:
        return int(_parsed(network, found, _builder(found, errors), errors).num_layers)


def _target(library: Library, settings: BuildSettings) -> str:
    """What a plan is built for, as text."""
    if settings.capability is not None:
        if settings.capability not in library.targets():
            known = ", ".join(map(str, library.targets())) or "none: it builds for the GPU present"
            raise BackendUnavailableError(
                f"capability {settings.capability} with {library.name} {library.version}; expected "
                f"one that it builds for elsewhere ({known}): build on the device itself"
            )
        return f"sm_{settings.capability}"
    gpu = _gpu(library)
    return f"{gpu.name} sm_{gpu.capability}"


def _gpu(library: Library) -> Gpu:
    present = gpus()
    if not present:
        remedy = " or name a capability to build for" if library.is_rtx else ""
        raise BackendUnavailableError(
            f"{library.name} {library.version} builds a plan for the GPU of the machine, and the "
            f"driver shows none here; build on the device{remedy}"
        )
    if library.is_rtx and present[0].capability not in library.targets():
        raise BackendUnavailableError(
            f"{present[0].name} has compute capability {present[0].capability}; {library.name} "
            f"{library.version} knows {library.targets()}: install tensorrt instead"
        )
    return present[0]


def _key(network: bytes, library: Library, target: str, settings: BuildSettings) -> str:
    digest = hashlib.sha256(network)
    system = f"{platform.system()} {platform.machine()}"
    for part in (library.name, library.version, target, system, settings.text()):
        digest.update(b"\0" + part.encode())
    return f"plan-{digest.hexdigest()[:40]}"


def _keep(key: str, content: bytes) -> None:
    try:
        store.store(key, {"plan": content})
    except CacheError as error:
        log.warning("the plan is not kept: %s", error)


def _builder(library: Library, errors: Sequence[str]) -> Any:
    try:
        builder = library.module.Builder(logger(library))
    except (TypeError, RuntimeError) as error:  # pybind11: a factory that returned nothing
        raise BackendUnavailableError(
            f"{library.name} {library.version} does not start: {_joined(errors) or error}; it "
            "needs an NVIDIA GPU and a driver for its CUDA version"
        ) from error
    return builder


def _parsed(network: bytes, library: Library, builder: Any, errors: Sequence[str]) -> Any:
    """The network definition of an ONNX model."""
    trt = library.module
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(flags)
    parser = trt.OnnxParser(definition, logger(library))
    if not parser.parse(network) or definition.num_outputs == 0:
        problems = [_problem(parser.get_error(i)) for i in range(parser.num_errors)]
        reasons = problems or list(errors) or ["it has no outputs"]
        raise CompileError(
            f"{library.name} {library.version} cannot read the network ({len(network)} bytes of "
            f"ONNX), {len(reasons)} problem{'s' if len(reasons) > 1 else ''}: {_joined(reasons)}; "
            "expected standard operators of opset 18 in precisions that it knows: export with "
            "'fuseengine export onnx', or use another backend"
        )
    return definition


def _problem(error: Any) -> str:
    """One of the parser's errors: node, operator, reason."""

    def ask(name: str) -> str:
        return str(getattr(error, name)()) if hasattr(error, name) else ""

    reason = " ".join(ask("desc").split()) or str(error)
    operator, name, number = ask("node_operator"), ask("node_name"), ask("node")
    if not name and number.startswith("-"):  # the file as a whole
        return reason
    where = f"node {name!r}" if name else f"node {number}"
    return f"{where} ({operator}): {reason}" if operator else f"{where}: {reason}"


def _build(
    network: bytes,
    library: Library,
    target: str,
    settings: BuildSettings,
    errors: list[str],
    *,
    keep_timings: bool,
) -> bytes:
    builder = _builder(library, errors)
    definition = _parsed(network, library, builder, errors)
    config = _config(library, builder, settings)
    _set_shapes(builder, definition, config, settings)
    path = timings = None
    # TensorRT-RTX measures nothing when it builds: its timing caches do nothing since 1.2.
    if keep_timings and not library.is_rtx:
        with contextlib.suppress(CacheError):  # no place for them
            path = _timings_path(library, target)
            timings = _load_timings(config, path)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise CompileError(
            f"{library.name} {library.version} cannot build the network for {target}: "
            f"{_joined(errors) or 'no reason given'}; try another precision, a larger "
            "workspace_bytes, or another backend"
        )
    if path is not None and timings is not None:
        _store_timings(config, path, read=timings)
    return bytes(plan)


def _config(library: Library, builder: Any, settings: BuildSettings) -> Any:
    trt, config = library.module, builder.create_builder_config()
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.level is not None and hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = settings.level
    if hasattr(trt.BuilderFlag, "TF32"):
        switch = config.set_flag if settings.tf32 else config.clear_flag
        switch(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    # The inspector tells types and shapes of plans built with this; it costs nothing at run time.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if library.is_rtx:
        name = "CURRENT" if settings.capability is None else f"SM{settings.capability}"
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    return config


def _set_shapes(builder: Any, definition: Any, config: Any, settings: BuildSettings) -> None:
    """Fix the inputs' shapes, or describe their ranges."""
    inputs = {t.name: t for t in map(definition.get_input, range(definition.num_inputs))}
    unknown = sorted(set(settings.shapes) - set(inputs))
    if unknown:
        raise SettingError(f"shapes of {unknown}; expected some of {list(inputs)}")
    profile = None
    for name, tensor in inputs.items():
        open_shape = tuple(tensor.shape)
        shape = settings.shapes.get(name)
        if shape is None:
            if -1 in open_shape:
                raise SettingError(
                    f"no shape for input {name!r} {open_shape}; expected one with numbers for -1"
                )
            continue
        for given in dataclasses.astuple(shape) if isinstance(shape, Range) else (shape,):
            fits = len(given) == len(open_shape) and all(
                want in (-1, have) for want, have in zip(open_shape, given, strict=True)
            )
            if not fits:
                raise SettingError(
                    f"shape {tuple(given)} for input {name!r}; expected {open_shape}, -1 is open"
                )
        if isinstance(shape, Range):
            profile = profile or builder.create_optimization_profile()
            profile.set_shape(name, shape.smallest, shape.usual, shape.largest)
        else:
            tensor.shape = tuple(shape)
    if profile is not None:
        config.add_optimization_profile(profile)


def _joined(messages: Sequence[str], limit: int = 5) -> str:
    """The first distinct messages in one line."""
    distinct = list(dict.fromkeys(" ".join(m.split()) for m in messages if m.strip()))
    rest = f"; and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return "; ".join(distinct[:limit]) + rest


# --- timing cache ---------------------------------------------------------------------------------


def _timings_path(library: Library, target: str) -> Path:
    name = re.sub(r"[^\w.-]+", "_", f"{library.name}-{library.version}-{target}")
    return store.cache_folder() / f"timings-{name}.bin"


def _load_timings(config: Any, path: Path) -> bytes | None:
    """Give the builder the timings of earlier builds.

    Returns:
        What was read; None where the library takes none.
    """
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    timings = config.create_timing_cache(content)
    if timings is None and content:
        log.warning("%s cannot be read and is written anew", path)
        content, timings = b"", config.create_timing_cache(b"")
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        return None
    return content


def _store_timings(config: Any, path: Path, *, read: bytes) -> None:
    """Write the timings, those of a build that ended meanwhile included."""
    timings = config.get_timing_cache()
    if timings is None:
        return
    with contextlib.suppress(OSError):
        now = path.read_bytes()
        if now != read and (others := config.create_timing_cache(now)) is not None:
            timings.combine(others, ignore_mismatch=False)
    content = bytes(timings.serialize())
    if content == read:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=".timings-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(beside).replace(path)
    except OSError as error:
        log.warning("the timings of this build are not kept: %s", error)


# --- reading back ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer of a plan.

    Attributes:
        name: made of the ONNX nodes' names that it does.
        kind: TensorRT's type, "CaskConvolution" or "kgen" for example; "" where it is not told.
        types: of its outputs, "fp32", "fp16", "bf16", "int8", "fp8", ...; none where not told.
        weight_bytes: of the weights that it is said to hold.
    """

    name: str
    kind: str
    types: tuple[str, ...]
    weight_bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """What the engine inspector tells of a plan.

    Attributes:
        layers: in order.
        tensors: names of inputs and outputs.
        activation_bytes: device memory that one execution context needs; None where not known.
        weight_bytes: of the whole plan; None where not known.
    """

    layers: tuple[Layer, ...]
    tensors: tuple[str, ...]
    activation_bytes: int | None = None
    weight_bytes: int | None = None

    @classmethod
    def from_json(cls, text: str, **numbers: int | None) -> Summary:
        """Read the inspector's JSON: of TensorRT 10 ("Bindings") or 11 ("I/O Tensors").

        Layers are objects in plans built with detailed verbosity, else names.

        Args:
            text: what ``get_engine_information`` gave.
            numbers: ``activation_bytes``, ``weight_bytes``.

        Raises:
            CompileError: it has neither form.
        """
        try:
            data = json.loads(text)
            layers = tuple(_layer(entry) for entry in data["Layers"])
            entries = data["I/O Tensors"] if "I/O Tensors" in data else data["Bindings"]
            tensors = tuple(e["Name"] if isinstance(e, dict) else str(e) for e in entries)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CompileError(
                f"the engine inspector gave {text[:60]!r} ({error!r}); expected an object with "
                "Layers, and Bindings (TensorRT 10) or I/O Tensors (TensorRT 11)"
            ) from error
        summary = cls(layers, tensors, **numbers)
        if summary.weight_bytes is None:
            told = sum(layer.weight_bytes for layer in layers)
            summary = dataclasses.replace(summary, weight_bytes=told or None)
        return summary

    def types(self) -> dict[str, int]:
        """How many layers give which type."""
        return dict(Counter(t for layer in self.layers for t in set(layer.types)))

    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind."""
        return dict(Counter(layer.kind for layer in self.layers if layer.kind))

    def __str__(self) -> str:
        """A few lines for people."""

        def counted(numbers: Mapping[str, int]) -> str:
            ordered = sorted(numbers.items(), key=lambda item: -item[1])
            return ", ".join(f"{count} {name}" for name, count in ordered) or "not told"

        def mega(number: int | None) -> str:
            return "not told" if number is None else f"{number / 2**20:.1f} MiB"

        return (
            f"{len(self.layers)} layers: {counted(self.kinds())}\n"
            f"types: {counted(self.types())}\n"
            f"weights {mega(self.weight_bytes)}, activations {mega(self.activation_bytes)}"
        )


_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "int32": 4, "int64": 8, "bool": 1}

_TYPE_NAMES = (
    (r"bf16|bfloat16", "bf16"),
    (r"fp16|half|float16", "fp16"),
    (r"fp8|e4m3", "fp8"),
    (r"fp4|e2m1", "fp4"),
    (r"int8", "int8"),
    (r"int4", "int4"),
    (r"int32", "int32"),
    (r"int64", "int64"),
    (r"bool", "bool"),
    (r"fp32|float32|float", "fp32"),
)
"""Patterns of the inspector's descriptions ("Row major linear FP16 format"), first match counts."""


def _type(text: str) -> str:
    for pattern, name in _TYPE_NAMES:
        if re.search(pattern, text.lower()):
            return name
    return ""


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", ())
    outputs = entry.get("Outputs") or ()
    keys = ("DataType", "Datatype", "Format/Datatype", "Format")
    found = (_type(" ".join(str(t[k]) for k in keys if k in t)) for t in outputs)
    weights = (entry.get(k) for k in ("Weights", "Bias"))
    held = sum(
        int(w.get("Count", 0)) * _BYTES.get(_type(str(w.get("Type", ""))), 4)
        for w in weights
        if isinstance(w, dict)
    )
    return Layer(
        str(entry.get("Name", "")),
        str(entry.get("LayerType", "")),
        tuple(dict.fromkeys(t for t in found if t)),
        held,
    )


class LoadedPlan:
    """A plan that a GPU can run.

    Attributes:
        reader: the TensorRT that reads it.
        engine: its ``ICudaEngine``.
        inputs: names of its inputs in the network's order.
        outputs: names of its outputs.
    """

    def __init__(self, plan: Plan) -> None:
        """Read a plan on the machine that it was built for.

        Raises:
            BackendUnavailableError: another version of the library is installed.
            CompileError: the library refuses it: another GPU, damaged.
        """
        self.reader = find_library(plan.package)
        if self.reader.version != plan.version:
            raise BackendUnavailableError(
                f"the plan is one of {plan.package} {plan.version}, installed is "
                f"{self.reader.version}; build it again here"
            )
        with _lock, _collected_errors(self.reader) as errors:
            # The runtime must outlive the engine.
            self._runtime = self.reader.module.Runtime(logger(self.reader))
            self.engine = self._runtime.deserialize_cuda_engine(plan.content)
            if self.engine is None:
                raise CompileError(
                    f"{self.reader.name} {self.reader.version} refuses the plan for "
                    f"{plan.target}: {_joined(errors) or 'no reason given'}; build it on this GPU"
                )
        mode = self.reader.module.TensorIOMode
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == mode.INPUT]
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) == mode.OUTPUT]

    @property
    def activation_bytes(self) -> int:
        """Device memory that one execution context needs."""
        name = "device_memory_size_v2"
        return int(getattr(self.engine, name if hasattr(self.engine, name) else name[:-3]))

    def summary(self) -> Summary:
        """What the engine inspector tells."""
        trt = self.reader.module
        inspector = self.engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        weights = None
        if hasattr(trt, "EngineStat") and hasattr(self.engine, "get_engine_stat"):
            weights = int(self.engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        return Summary.from_json(
            text, activation_bytes=self.activation_bytes, weight_bytes=weights or None
        )
