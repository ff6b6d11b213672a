"""The contenders of the end-to-end benchmark: what a competent user would run instead, and us.

A contender is prepared once (loaded, exported, compiled, warmed) and then called without
arguments. Peers run the whole model on prepared float tensors. Each optional library is imported
where it is used.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import fuseengine as fe
from fuseengine.backends import openvino

if TYPE_CHECKING:
    from torch import Tensor, nn

Floats = NDArray[np.float32]

EXACT_DB = 80.0
"""What a float32 contender must reach against float32 eager."""
FRAME_DB = 55.0
"""The same after rounding to 8 bits, where a rounding error flips single grey levels."""
REDUCED_DB = 40.0
"""What a contender in reduced precision must reach."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        model: name of the configuration.
        size: (height, width) of the frames.
        device: "cpu" or "cuda".
        threads: CPU threads of every contender.
        untrained: random weights (seed 0) instead of the packaged ones.
    """

    model: str
    size: tuple[int, int]
    device: str = "cpu"
    threads: int = 1
    untrained: bool = False

    def load(self) -> nn.Module:
        """The model in float32 on the device."""
        import torch

        if self.untrained:
            torch.manual_seed(0)
            return fe.build(self.model).to(self.device)
        return fe.load_model(self.model).to(self.device)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "size": tuple(data["size"])})


@dataclasses.dataclass(frozen=True)
class Ready:
    """A prepared contender.

    Attributes:
        run: one fusion; on a CUDA device it may return before the device is done.
        result: the last result, on the host: float32 (1, 1, H, W), or a uint8 frame.
        how: what it really runs, if that is a choice.
        seconds: time to compile, if the contender knows it better than a clock around it.
    """

    run: Callable[[], object]
    result: Callable[[], NDArray[Any]]
    how: str = ""
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        key: short name for the command line.
        name: name for readers.
        precision: "fp32" or what it computes in.
        prepare: makes it ready; may raise anything its library raises.
        frames: whether it goes from uint8 frames to a uint8 frame.
    """

    key: str
    name: str
    precision: str
    prepare: Callable[[], Ready]
    frames: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is FuseEngine."""
        return self.key.startswith("fuseengine")

    @property
    def least_db(self) -> float:
        """PSNR against float32 eager below which it counts as wrong."""
        if self.precision != "fp32":
            return REDUCED_DB
        return FRAME_DB if self.frames else EXACT_DB


class MissingPackageError(RuntimeError):
    """A peer's library is not installed."""


def need(package: str) -> None:
    """Raise MissingPackageError unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(f"{package} is not installed here")


def reason(error: BaseException, limit: int = 160) -> str:
    """An error in one line without the folders of the machine it happened on."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?:~|[A-Za-z]:)?[/\\](?:[\w.+-]+[/\\])+", "", lines[0])
    return f"{type(error).__name__}: {text}"[:limit].rstrip(": ")


# --- PyTorch --------------------------------------------------------------------------------------


def plain(model: nn.Module, a: Floats, b: Floats) -> nn.Module:
    """The model with its sampling loop unrolled, its schedule as numbers, and standard operators.

    ``torch.compile`` and the ONNX exporter cannot see through the schedule's ``float(alpha)``, our
    registered ops and the random numbers' generator; this is what a user would write for them.

    Args:
        model: a model with ``stages``.
        a: source 1; its random numbers are made for pictures of this size, once.
        b: source 2.

    Returns:
        A graph module on copies of the stages, in evaluation mode.
    """
    import torch
    from torch import fx

    from fuseengine import kernels
    from fuseengine.models.sampling import standard_normal

    model = copy.deepcopy(model).eval()
    stages = tuple(getattr(model, "stages", ()))
    if not stages:
        return model
    extra = list(inspect.signature(model.forward).parameters)[2:]

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name in stages

        def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
            return attr_val

    class Noise(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is standard_normal:
                model.register_buffer(n.name, result)
            return result

    with torch.no_grad():
        graph = Tracer().trace(model, concrete_args=dict.fromkeys(extra))
        for node in [n for n in graph.nodes if n.op == "placeholder"][2:]:
            for reader in list(node.users):  # fx's own assertion that nothing is handed in
                graph.erase_node(reader)
            graph.erase_node(node)
        device = next(model.parameters()).device
        given = [torch.from_numpy(x).to(device) for x in (a, b)]
        if any(node.target is standard_normal for node in graph.nodes):
            Noise(fx.GraphModule(model, graph)).run(*given)
    swaps = {
        kernels.compose_priors: kernels.compose_priors_reference,
        kernels.criss_cross_attention: kernels.criss_cross_attention_reference,
        kernels.ddim_step: kernels.ddim_step_reference,
        kernels.joint_ddim_step: kernels.joint_ddim_step_reference,
    }
    for node in list(graph.nodes):
        if node.target is standard_normal:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.create_node("get_attr", node.name))
            graph.erase_node(node)
        elif node.op == "call_function":
            node.target = swaps.get(node.target, node.target)
    return fx.GraphModule(model, graph).eval()


def torch_peer(
    model: nn.Module,
    a: Floats,
    b: Floats,
    case: Case,
    *,
    channels_last: bool = False,
    dtype: str = "",
    compile_mode: str = "",
    graph: bool = False,
    tf32: bool = False,
) -> Ready:
    """The whole model through PyTorch.

    Args:
        model: float32, on the device; it is copied.
        a: source 1, (1, 1, H, W).
        b: source 2.
        case: device and threads.
        channels_last: weights in channels-last layout.
        dtype: "bfloat16" or "float16" for autocast; "" for float32.
        compile_mode: mode of ``torch.compile``; "" runs eagerly.
        graph: capture the eager model into a CUDA graph.
        tf32: let convolutions and products round to TF32.

    Returns:
        The contender, warmed.
    """
    import torch

    torch.set_num_threads(case.threads)
    # The model's own forward reads its learned schedule back from the device, which a graph cannot
    # hold, and under autocast it gives our ops two dtypes at once.
    simple = compile_mode or graph or dtype
    module = plain(model, a, b) if simple else copy.deepcopy(model).eval()
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    if compile_mode:
        module = torch.compile(module, mode=compile_mode, dynamic=False)
    given = [torch.from_numpy(x).to(case.device) for x in (a, b)]
    last: list[Tensor] = []

    def run() -> None:
        with torch.inference_mode(), rounding(tf32), contextlib.ExitStack() as stack:
            if compile_mode and case.device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            if dtype:
                stack.enter_context(torch.autocast(case.device, getattr(torch, dtype)))
            last[:] = [module(*given)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's remarks are no part of a benchmark
        for _ in range(3):
            run()
    call = in_cuda_graph(run) if graph else run
    return Ready(call, lambda: last[0].float().cpu().numpy())


def in_cuda_graph(run: Callable[[], object]) -> Callable[[], object]:
    """A call that replays what ``run`` does on the device; ``run`` has been called before."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextlib.contextmanager
def rounding(tf32: bool) -> Iterator[None]:
    """Whether float32 products and convolutions on a CUDA device may round to TF32 in the body."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    # cuDNN rounds float32 to TF32 unless told otherwise; a float32 row must be float32.
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products


# --- runtimes that take ONNX ----------------------------------------------------------------------


def export_onnx(model: nn.Module, a: Floats, b: Floats, path: Path) -> Path:
    """The whole model as ONNX through PyTorch's own exporter, for this size.

    Returns:
        The path; an existing file is kept.
    """
    if path.exists():
        return path
    for package in ("onnx", "onnxscript"):
        need(package)
    import torch

    given = tuple(torch.from_numpy(x) for x in (a, b))
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain(model, a, b).cpu(),
            given,
            path,
            input_names=["a", "b"],
            output_names=["fused"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return path


def onnxruntime_peer(path: Path, a: Floats, b: Floats, threads: int) -> Ready:
    """ONNX Runtime's CPU provider, float32, all graph optimisations (the default)."""
    need("onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed, last = {"a": a, "b": b}, []

    def run() -> None:
        last[:] = session.run(None, feed)

    run()
    return Ready(run, lambda: last[0])


def openvino_peer(path: Path, a: Floats, b: Floats, threads: int, precision: str = "f32") -> Ready:
    """OpenVINO's CPU plugin with the latency hint and the precision said explicitly.

    Raises:
        RuntimeError: the processor does not compute in the precision.
    """
    need("openvino")
    from openvino import properties

    core = openvino.core()
    offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision != "f32" and precision.upper() not in offered:
        raise RuntimeError(f"this processor has no {precision}")
    compiled = core.compile_model(
        path,
        "CPU",
        {
            properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
            properties.hint.inference_precision: precision,
            properties.inference_num_threads: threads,
        },
    )
    request, feed = compiled.create_infer_request(), [a, b]

    def run() -> None:
        request.infer(feed, share_inputs=True, share_outputs=True)

    run()
    return Ready(run, lambda: request.get_output_tensor(0).data)


# --- FuseEngine -----------------------------------------------------------------------------------


class Engines:
    """FuseEngine's engines of one run, each compiled once and shown as two contenders.

    Args:
        case: what is run.
        model: the model, on the case's device.
        a: source 1 as floats, (1, 1, Hp, Wp).
        b: source 2.
        frames: the uint8 frames behind a and b.
        effort: of the search.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        a: Floats,
        b: Floats,
        frames: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        effort: str = "quick",
    ) -> None:
        self.case, self.model, self.effort = case, model, effort
        self.floats, self.frames = (a, b), frames
        self.compiled: dict[str, fe.Engine] = {}

    def contenders(self, precision: str) -> list[Contender]:
        """The program alone, and the whole call, in a precision."""
        key, name = f"fuseengine-{precision}", f"FuseEngine {precision}"
        return [
            Contender(key, name, precision, lambda: self._program(precision)),
            Contender(
                f"{key}-frames", f"{name}, frames", precision, lambda: self._call(precision), True
            ),
        ]

    def engine(self, precision: str) -> fe.Engine:
        """The engine of a precision."""
        if precision not in self.compiled:
            self.compiled[precision] = compile_engine(self.case, self.model, precision, self.effort)
        return self.compiled[precision]

    def _program(self, precision: str) -> Ready:
        engine = self.engine(precision)
        _, executor = engine._plan(self.case.size)
        for target, source in zip(executor.inputs, self.floats, strict=True):
            target[...] = executor.device.constant(source)
        executor.run()

        def result() -> Floats:
            fused = executor.output
            return fused if isinstance(fused, np.ndarray) else fused.cpu().numpy()

        return Ready(executor.run, result, how(engine), engine.report.seconds)

    def _call(self, precision: str) -> Ready:
        # The engine's input buffers are shared with the program's row: same floats, same result.
        engine, last = self.engine(precision), []

        def run() -> None:
            last[:] = [engine(*self.frames)]

        run()
        return Ready(run, lambda: last[0], how(engine), engine.report.seconds)


def compile_engine(case: Case, model: nn.Module | None, precision: str, effort: str) -> fe.Engine:
    """An engine as a user would get it; from the cache where there is one.

    Args:
        case: what is run.
        model: the model where it is at hand; packaged ones are compiled by name.
        precision: "auto" or a precision.
        effort: "quick" or "full".
    """
    by_name = not case.untrained and case.device == "cpu"
    return fe.compile(
        case.model if by_name else (model if model is not None else case.load()),
        case.size,
        device=case.device,
        precision=precision,
        effort=effort,
        threads=case.threads,
        # A cached engine is keyed by ONNX stages, which a GPU's backends do not use.
        cache=case.device == "cpu",
    )


def how(engine: fe.Engine) -> str:
    """Which backend and precision each stage got."""
    return ", ".join(dict.fromkeys(engine.report.choice.values()))


# --- peak memory, in a process of its own ---------------------------------------------------------


def memory_of(key: str, case_json: Mapping[str, Any], folder: str, effort: str) -> None:
    """Fuse three times in this process; :func:`benchmarks.harness.peak_memory` watches.

    What a deployed process would do: runtimes read the exported file and FuseEngine its cache, so
    PyTorch is in a number only where it is needed.

    Args:
        key: the contender's short name.
        case_json: a :class:`Case`.
        folder: holds inputs.npz and, where exported, model.onnx.
        effort: of FuseEngine's search.
    """
    case = Case.from_json(case_json)
    with np.load(Path(folder) / "inputs.npz") as inputs:
        a, b, ir, vis = (inputs[name] for name in ("a", "b", "ir", "vis"))
    onnx = Path(folder) / "model.onnx"
    if key.startswith("fuseengine-"):
        precision = key.split("-")[1]
        engine = compile_engine(case, None, precision, effort)
        ready = Ready(lambda: engine(ir, vis), lambda: vis)
    elif key == "onnxruntime":
        ready = onnxruntime_peer(onnx, a, b, case.threads)
    elif key.startswith("openvino"):
        ready = openvino_peer(onnx, a, b, case.threads, "bf16" if key.endswith("bf16") else "f32")
    else:
        ready = torch_peer(case.load(), a, b, case, **TORCH_PEERS[key][2])
    for _ in range(3):
        ready.run()


TORCH_PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eager": ("torch eager fp32", "fp32", {}),
    "eager-nhwc": ("torch eager channels_last fp32", "fp32", {"channels_last": True}),
    "compile": ("torch.compile fp32", "fp32", {"compile_mode": "default"}),
    "eager-bf16": ("torch eager bf16", "bf16", {"dtype": "bfloat16"}),
}
"""Key -> name, precision, options of :func:`torch_peer`; on every device."""

CUDA_PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "graph": ("torch CUDA graph fp32", "fp32", {"graph": True}),
    "graph-tf32": ("torch CUDA graph tf32", "tf32", {"graph": True, "tf32": True}),
    "graph-bf16": (
        "torch CUDA graph channels_last bf16",
        "bf16",
        {"graph": True, "dtype": "bfloat16", "channels_last": True},
    ),
    "graph-fp16": (
        "torch CUDA graph channels_last fp16",
        "fp16",
        {"graph": True, "dtype": "float16", "channels_last": True},
    ),
    "compile-fp16": (
        "torch.compile channels_last fp16",
        "fp16",
        {"compile_mode": "default", "dtype": "float16", "channels_last": True},
    ),
}
"""The same, only on a CUDA device."""

RUNTIME_PEERS = ("onnxruntime", "openvino", "openvino-bf16")
"""Keys of the runtimes that run on the CPU."""


def peer_keys(device: str) -> list[str]:
    """Every peer's key, quickest to prepare first."""
    cuda = device == "cuda"
    torch_keys = [*TORCH_PEERS, *(CUDA_PEERS if cuda else ())]
    keys = [key for key in torch_keys if not key.startswith("compile")]
    keys += () if cuda else RUNTIME_PEERS
    return keys + [key for key in torch_keys if key.startswith("compile")]


def make_peers(
    case: Case,
    model: nn.Module,
    a: Floats,
    b: Floats,
    folder: Path,
    *,
    keys: list[str] | None = None,
    compile_mode: str = "default",
) -> list[Contender]:
    """The peers of a run.

    Args:
        case: what is run.
        model: the model, on the case's device.
        a: source 1, (1, 1, Hp, Wp).
        b: source 2.
        folder: where the exported model is written.
        keys: which, of :func:`peer_keys`; all by default.
        compile_mode: mode of ``torch.compile``.

    Returns:
        Contenders, not yet prepared.
    """
    onnx = folder / "model.onnx"

    def torch_contender(key: str) -> Contender:
        name, precision, options = {**TORCH_PEERS, **CUDA_PEERS}[key]
        if "compile_mode" in options:
            options = {**options, "compile_mode": compile_mode}
            name += "" if compile_mode == "default" else f", {compile_mode}"
        return Contender(key, name, precision, lambda: torch_peer(model, a, b, case, **options))

    def runtime(key: str) -> Contender:
        if key == "onnxruntime":
            return Contender(
                key,
                "ONNX Runtime fp32",
                "fp32",
                lambda: onnxruntime_peer(export_onnx(model, a, b, onnx), a, b, case.threads),
            )
        precision = "bf16" if key.endswith("bf16") else "fp32"
        hint = {"bf16": "bf16", "fp32": "f32"}[precision]

        def prepare() -> Ready:
            need("openvino")
            return openvino_peer(export_onnx(model, a, b, onnx), a, b, case.threads, hint)

        return Contender(key, f"OpenVINO {precision}", precision, prepare)

    return [
        runtime(key) if key in RUNTIME_PEERS else torch_contender(key)
        for key in (peer_keys(case.device) if keys is None else keys)
    ]


def demo_frames(size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The packaged demo pair in a size: infrared (H, W), visible (H, W, 3)."""
    from PIL import Image

    def fit(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if frame.shape[:2] == size:
            return frame
        return np.array(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR))

    infrared, visible = fe.demo_pair()
    return fit(infrared), fit(visible)
