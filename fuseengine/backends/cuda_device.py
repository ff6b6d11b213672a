"""A CUDA device for the executor: torch tensors as buffers, one CUDA graph for the whole frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fuseengine.kernels as kernels
from fuseengine.errors import CaptureError
from fuseengine.models.pictures import stretch
from fuseengine.program import Node
from fuseengine.runtime.lanes import Mark

Call = Callable[[], object]


class TorchDevice:
    """Arrays are float32 tensors; ops are the project's PyTorch functions.

    On a CUDA device :meth:`wrap` captures all calls into one graph. On "cpu" it runs them one by
    one, which is how the tests exercise everything here but the graph.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self._staging: dict[int, Tensor] = {}
        self._lanes: TorchLanes | None = None

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A float32 tensor of zeros."""
        return torch.zeros(shape, device=self.device)

    def constant(self, array: NDArray[np.float32]) -> Tensor:
        """The array on the device."""
        return torch.tensor(array, device=self.device)

    def bind_op(self, node: Node, inputs: Sequence[Tensor], output: Tensor) -> Call:
        """An op whose result is copied to its buffer.

        Raises:
            CaptureError: unknown op.
        """
        if node.target in _SPECTRA:
            return self._bind_filter(node, inputs, output)
        if node.target not in _OPS:
            raise CaptureError(f"op {node.target!r} is unknown on {self.device}")
        function, attrs = _OPS[node.target], node.attrs

        def call() -> None:
            with torch.inference_mode():
                output.copy_(function(inputs, attrs))

        return call

    def _bind_filter(self, node: Node, inputs: Sequence[Tensor], output: Tensor) -> Call:
        # A filter's kernel is a constant of the program: its spectrum is computed once, in float64.
        x, kernel = inputs
        size = (int(x.shape[-2]), int(x.shape[-1]))
        spectrum = _SPECTRA[node.target](kernel.double(), size, node.attrs).to(torch.complex64)

        def call() -> None:
            with torch.inference_mode():
                output.copy_(kernels.wiener_filter(x, spectrum))

        return call

    def wrap(self, calls: Sequence[Call]) -> Call:
        """One CUDA graph; warmed up twice first, so that nothing allocates or compiles inside."""
        calls = tuple(calls)

        def run() -> None:
            for call in calls:
                call()

        if self.device.type != "cuda":
            return run
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The default mode forbids CUDA calls to every other thread while the graph is captured.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def staging(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Page-locked host tensors beside device tensors, made once and kept."""
        for tensor in tensors:
            if id(tensor) not in self._staging:
                pinned = self.device.type == "cuda"
                self._staging[id(tensor)] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=pinned
                )
        return [self._staging[id(tensor)] for tensor in tensors]

    def active(self) -> AbstractContextManager[object]:
        """Nothing: calls run on PyTorch's current stream."""
        return nullcontext()

    def host(self, array: Tensor) -> NDArray[np.float32]:
        """Page-locked memory beside the tensor."""
        return self.staging([array])[0].numpy()

    def send(self, array: Tensor) -> None:
        """Copy without waiting."""
        if self._lanes is not None:
            # Frames in the lanes use the same buffers; the caller's stream may be another.
            self._lanes.hold_back_current()
        array.copy_(self.staging([array])[0], non_blocking=True)

    def fetch(self, array: Tensor) -> NDArray[np.float32]:
        """Copy, and wait for it."""
        (host,) = self.staging([array])
        host.copy_(array, non_blocking=True)
        self.synchronize()
        return host.numpy()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def lanes(self) -> TorchLanes:
        """Streams for copies beside the default stream, where others compute as well."""
        if self._lanes is None:
            self._lanes = TorchLanes(self.device)
        return self._lanes


class TorchLane:
    """A CUDA stream; None on "cpu", where everything is done at once."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with self.active():
            target.copy_(source, non_blocking=True)

    send = copy = fetch = _copy

    def record(self, mark: Mark) -> None:
        """See :class:`fuseengine.runtime.lanes.Lane`."""
        if self.stream is not None:
            cast(torch.cuda.Event, mark).record(self.stream)

    def after(self, mark: Mark) -> None:
        """Likewise."""
        if self.stream is not None:
            self.stream.wait_event(cast(torch.cuda.Event, mark))

    def active(self) -> AbstractContextManager[object]:
        """The stream is PyTorch's current one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class TorchLanes:
    """A stream for each way of copying; computation stays on the default stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        streams: list[torch.cuda.Stream | None] = [None] * 3
        if device.type == "cuda":
            # Such streams do not wait for the default one, nor does it for them.
            side = [torch.cuda.Stream(device) for _ in range(2)]
            streams = [side[0], torch.cuda.default_stream(device), side[1]]
        self.into, self.compute, self.out = map(TorchLane, streams)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of any values."""
        with self.compute.active():
            return torch.empty(shape, device=self.device)

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the host."""
        return torch.empty(shape, pin_memory=self.device.type == "cuda")

    def mark(self) -> Mark:
        """An event that lets a waiting thread sleep: the processor has other frames to prepare."""
        return torch.cuda.Event(blocking=True) if self.device.type == "cuda" else _Reached()

    def synchronize(self) -> None:
        """Wait for the default stream."""
        if self.compute.stream is not None:
            self.compute.stream.synchronize()

    def hold_back_current(self) -> None:
        """What the calling thread queues comes after the frames in the lanes."""
        if self.compute.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.compute.stream)


class _Reached:
    """A mark where nothing is ever queued."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def op(inputs: Sequence[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        operands: list[Any] = list(inputs)
        if "scalar" in attrs:
            operands.insert(0 if attrs.get("scalar_first") else 1, attrs["scalar"])
        return function(*operands)

    return op


def _step(inputs: Sequence[Tensor], attrs: Mapping[str, Any]) -> Tensor:
    scales = (attrs[name] for name in _SCALES)
    x, eps, *noise = inputs
    return kernels.ddim_step(x, eps, *scales, *noise, *((attrs["eta"],) if noise else ()))


def _composed(inputs: Sequence[Tensor], attrs: Mapping[str, Any]) -> Tensor:
    scales = (attrs[name] for name in _SCALES)
    return kernels.compose_priors(*inputs, *scales, form=attrs["form"])


def _joint(inputs: Sequence[Tensor], attrs: Mapping[str, Any]) -> Tensor:
    scales = (attrs[name] for name in (*_SCALES, "lam"))
    return kernels.joint_ddim_step(*inputs, *scales, form=attrs["form"])


_SCALES = ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_abar_prev", "sqrt_one_minus_abar_prev")

_OPS: dict[str, Callable[[Sequence[Tensor], Mapping[str, Any]], Tensor]] = {
    "add": _scalar(lambda x, y: x + y),
    "sub": _scalar(lambda x, y: x - y),
    "mul": _scalar(lambda x, y: x * y),
    "div": _scalar(lambda x, y: x / y),
    "concat": lambda inputs, attrs: torch.cat(list(inputs), dim=attrs["axis"]),
    "slice": lambda inputs, attrs: inputs[0][tuple(slice(*b) for b in attrs["bounds"])],
    "clamp": lambda inputs, attrs: inputs[0].clamp(attrs["min"], attrs["max"]),
    "stretch": lambda inputs, attrs: stretch(inputs[0], per=attrs["per"]),
    "compose_priors": _composed,
    "criss_cross_attention": lambda inputs, attrs: kernels.criss_cross_attention(*inputs),
    "ddim_step": _step,
    "joint_ddim_step": _joint,
    "block_mean": lambda inputs, attrs: kernels.block_mean(inputs[0], attrs["scale"]),
    "block_repeat": lambda inputs, attrs: kernels.block_repeat(inputs[0], attrs["scale"]),
}

_SPECTRA: dict[str, Callable[[Tensor, tuple[int, int], Mapping[str, Any]], Tensor]] = {
    "circular_convolution": lambda kernel, size, attrs: kernels.kernel_spectrum(kernel, size),
    "wiener_deconvolution": lambda kernel, size, attrs: kernels.wiener_spectrum(
        kernel, size, attrs["regularisation"]
    ),
}
