"""Calibration: which magnitudes the tensors of a model's networks take on real pictures.

The captured program is run in float32 on pairs of pictures. What every call of a stage is given is
recorded; each network is then run on it once more with its inner tensors as outputs, a share of
them at a time, and the magnitudes are counted in histograms that grow with their range. Memory is
bounded by the share, however many pictures and tensors there are.

ONNX Runtime's own calibrators are not used: they have no mean-square criterion, and they make all
inner tensors of a network outputs at once, gigabytes for a picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from fuseengine.backends.onnxruntime import session_options
from fuseengine.demo import demo_pair
from fuseengine.errors import FrameError, ImageFileError, SettingError
from fuseengine.pairs import Pair, model_inputs
from fuseengine.program import Program, StageVariant
from fuseengine.runtime.executor import Executor, StageRunner
from fuseengine.runtime.frames import prepare_pair
from fuseengine.runtime.images import pair_files, read_image

METHODS = ("max", "percentile", "mse")

LEVELS = 127
"""Symmetric int8 has the levels -127 .. 127; -128 is left out, as TensorRT and ONNX Runtime do."""

WINDOW = (256, 320)
"""Calibration looks at a part of a picture, height x width at most: statistics need no more."""

_BINS = 4096
_COUNTED = 1 << 16
"""Values of one tensor that are counted per call, evenly spaced; the largest is always seen."""
_SHARE = 256 << 20
"""Bytes of inner tensors that are outputs at a time."""
_MOST_PAIRS = 32


class Histogram:
    """Counts of magnitudes |x| in equal bins; the bins double in width when a larger value comes.

    Widths are powers of two, so merging bins loses nothing but resolution, and two histograms of
    the same values agree whatever the order in which they came.

    Attributes:
        counts: int64 per bin; bin i holds magnitudes in [i, i + 1) * width.
        width: of a bin; 0 as long as nothing but zeros was seen.
        top: the largest magnitude, exactly.
    """

    def __init__(self, bins: int = _BINS) -> None:
        self.counts = np.zeros(bins, dtype=np.int64)
        self.width = 0.0
        self.top = 0.0

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Count an array of any shape.

        Raises:
            FrameError: a value is not finite; no range can be read from that.
        """
        if not values.size:
            return
        top = float(np.abs(values).max())
        if not np.isfinite(top):
            raise FrameError(
                "calibration: got NaN or infinity inside a network; expected finite values: check "
                "the calibration pictures, and the model in float32"
            )
        flat = values.reshape(-1)
        if flat.size > _COUNTED:
            # An odd step, so that it is no divisor of a power-of-two row.
            flat = flat[:: (flat.size // _COUNTED) | 1]
        self._widen(top)
        self.top = max(self.top, top)
        if self.width == 0.0:
            self.counts[0] += flat.size
            return
        # In float64: the factor of a tiny width is no float32.
        index = np.multiply(np.abs(flat), 1.0 / self.width, dtype=np.float64).astype(np.int64)
        np.minimum(index, len(self.counts) - 1, out=index)
        self.counts += np.bincount(index, minlength=len(self.counts))

    def range(self, method: str, percentile: float = 99.99) -> float:
        """The magnitude that becomes the largest int8 level.

        Args:
            method: "max": the largest seen; "percentile": the least bin edge below which at least
                this share of the values lies; "mse": the one with the least mean square error of
                rounding and clipping.
            percentile: for "percentile", in (0, 100].

        Returns:
            A number above 0; 1 where only zeros were seen.

        Raises:
            SettingError: an unknown method, or a percentile out of its range.
        """
        if method not in METHODS:
            raise SettingError(f"method={method!r}; expected one of {', '.join(METHODS)}")
        if self.width == 0.0:
            return 1.0
        if method == "max":
            return self.top
        if method == "mse":
            return self._least_error()
        if not 0.0 < percentile <= 100.0:
            raise SettingError(f"percentile={percentile}; expected a number in (0, 100]")
        below = np.cumsum(self.counts)
        index = int(np.searchsorted(below, below[-1] * (percentile / 100.0)))
        return min(self.top, (index + 1) * self.width)

    def _widen(self, top: float) -> None:
        bins = len(self.counts)
        if top == 0.0:
            return
        # frexp: top = m * 2**e with 0.5 <= m < 1, so 2**e is above top.
        needed = float(np.ldexp(1.0, int(np.frexp(top)[1]))) / bins
        if self.width == 0.0:
            self.width = max(needed, float(np.finfo(np.float64).tiny))
        while self.width < needed:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(bins - len(merged), dtype=np.int64)])
            self.width *= 2.0

    def _least_error(self) -> float:
        """Search clipping points from a sixteenth of the largest value up to it."""
        filled = np.flatnonzero(self.counts)
        centres = ((filled + 0.5) * self.width)[None]
        weights = self.counts[filled]
        clips = (np.geomspace(1 / 16, 1.0, 81) * self.top)[:, None]
        steps = clips / LEVELS
        rounded = np.minimum(np.rint(centres / steps), LEVELS) * steps
        errors = ((rounded - centres) ** 2) @ weights
        return float(clips[int(np.argmin(errors)), 0])


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one network.

    Attributes:
        histograms: tensor -> magnitudes.
        elements: tensor -> its number of elements in one call.
    """

    histograms: Mapping[str, Histogram]
    elements: Mapping[str, int]

    def ranges(self, method: str, percentile: float = 99.99) -> dict[str, float]:
        """Tensor -> magnitude of the largest level, see :meth:`Histogram.range`."""
        return {n: h.range(method, percentile) for n, h in self.histograms.items()}


# --- pictures -------------------------------------------------------------------------------------


def calibration_pairs(
    program: Program, frames: Sequence[tuple[Any, Any]] | None, *, window: tuple[int, int] = WINDOW
) -> list[Pair]:
    """Model inputs to calibrate on.

    Args:
        program: the captured model: its channels, multiple and padding.
        frames: pairs of frames as an engine takes them, of any size; the demo pair and variations
            of it (:func:`demo_variations`) when None.
        window: height and width of the part that is looked at; smaller pictures are used whole.

    Returns:
        Pairs (1, C, H, W) in [0, 1], at most 32, evenly chosen from what is given.

    Raises:
        FrameError: frames that cannot be used (NaN, another size than their partner's, ...); the
            message says which pair.
    """
    given = demo_variations() if frames is None else frames
    pairs: list[Pair] = []
    for number in evenly(len(given)):
        infrared, visible = given[number]
        try:
            for ir, vis in prepare_pair(infrared, visible):
                pairs.append(_planes(program, ir, vis, window, len(pairs)))
        except FrameError as error:
            raise type(error)(f"calibration pair {number}: {error}") from error
    return pairs


def evenly(count: int, most: int = _MOST_PAIRS) -> range:
    """Indices of at most so many of a number of things, evenly spaced, the first among them."""
    return range(0, count, max(1, -(-count // most)))


def read_pairs(
    infrared: str | os.PathLike[str], visible: str | os.PathLike[str]
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Calibration frames from two folders, paired by file name without the suffix.

    Args:
        infrared: folder of infrared images.
        visible: folder of visible images.

    Returns:
        (infrared, visible) as they are in the files, at most 32 pairs, evenly chosen by name.

    Raises:
        ImageFileError: a folder is missing or has no images, nothing is paired, or a file cannot
            be read.
    """
    found, *lonely = pair_files(infrared, visible)
    if not found:
        raise ImageFileError(
            f"calibration: got {len(lonely[0])} images in {infrared} and {len(lonely[1])} in "
            f"{visible} without a common name; expected at least one pair of images that have the "
            "same name up to the suffix"
        )
    return [(read_image(found[i][0]), read_image(found[i][1])) for i in evenly(len(found))]


def demo_variations() -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The demo pair; dark, bright, noisy, black-hot, and with its sources exchanged.

    A stand-in for pictures of the camera, which are better: it knows one scene.
    """
    infrared, visible = demo_pair()
    rng = np.random.default_rng(0)

    def toned(frame: NDArray[np.uint8], gain: float, gamma: float) -> NDArray[np.uint8]:
        tone = np.clip((frame / 255.0) ** gamma * gain, 0, 1) * 255
        return np.rint(tone).astype(np.uint8)

    def noisy(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        grain = frame + rng.normal(0, 8, frame.shape)
        return np.clip(np.rint(grain), 0, 255).astype(np.uint8)

    return [
        (infrared, visible),
        (infrared, toned(visible, 0.4, 1.2)),
        (toned(infrared, 0.6, 1.0), toned(visible, 1.0, 0.6)),
        (noisy(infrared), noisy(visible)),
        (255 - infrared, visible),
        (np.ascontiguousarray(visible[::-1]), np.ascontiguousarray(infrared[::-1])),
    ]


def _planes(
    program: Program,
    infrared: NDArray[Any],
    visible: NDArray[Any],
    window: tuple[int, int],
    number: int,
) -> Pair:
    """A window of a pair as the model's inputs: the centre's first, other places later."""
    shares = ((0.5 + number * 0.618) % 1.0, (0.5 + number * 0.755) % 1.0)
    part = tuple(
        slice(start := int(max(0, n - most) * share), start + min(n, most))
        for n, most, share in zip(visible.shape[:2], window, shares, strict=True)
    )
    ir, vis = np.ascontiguousarray(infrared[part]), np.ascontiguousarray(visible[part])
    (pair,) = model_inputs(program, (vis.shape[0], vis.shape[1]), [(ir, vis)])
    return pair


# --- networks -------------------------------------------------------------------------------------


def record_calls(
    program: Program, runners: Mapping[StageVariant, StageRunner], pairs: Iterable[Pair]
) -> tuple[dict[StageVariant, list[list[NDArray[np.float32]]]], list[NDArray[np.float32]]]:
    """Run a program and keep what its stages are given.

    Args:
        program: the captured model.
        runners: its networks in float32 on the CPU, for inputs of any size.
        pairs: model inputs.

    Returns:
        Per variant the inputs of every call, and the fused picture of every pair.
    """
    calls: dict[StageVariant, list[list[NDArray[np.float32]]]] = {v: [] for v in runners}
    recorders = {v: _Recorder(runner, calls[v]) for v, runner in runners.items()}
    fused = [run_on(program, recorders, pair) for pair in pairs]
    return calls, fused


def run_on(
    program: Program, runners: Mapping[StageVariant, StageRunner], pair: Pair
) -> NDArray[np.float32]:
    """The fused picture of one pair, on the CPU."""
    executor = Executor(program, (pair[0].shape[2], pair[0].shape[3]), runners)
    for target, source in zip(executor.inputs, pair, strict=True):
        target[...] = source
    executor.run()
    return executor.output.copy()


class _Recorder:
    """A runner that copies what its calls are given."""

    def __init__(self, runner: StageRunner, calls: list[list[NDArray[np.float32]]]) -> None:
        self.runner, self.calls = runner, calls

    def bind(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[[], object]:
        call = self.runner.bind(inputs, outputs)

        def recorded() -> None:
            self.calls.append([array.copy() for array in inputs])
            call()

        return recorded


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    calls: Sequence[Sequence[NDArray[np.float32]]],
    *,
    threads: int = 1,
) -> Statistics:
    """Count the magnitudes of a network's tensors over recorded calls.

    Args:
        model: the network in float32.
        tensors: names of inner tensors, inputs or outputs.
        calls: the network's inputs per call, in the model's order.
        threads: CPU threads.

    Raises:
        FrameError: a value is NaN or infinite.
    """
    names = [value.name for value in model.graph.input]
    histograms = {name: Histogram() for name in tensors}
    elements: dict[str, int] = {}
    inner = [name for name in dict.fromkeys(tensors) if name not in names]

    def count(found: Iterable[tuple[str, NDArray[np.float32]]]) -> None:
        for name, array in found:
            histograms[name].add(array)
            elements[name] = array.size

    for call in calls:
        given = dict(zip(names, call, strict=True))
        count((name, given[name]) for name in names if name in histograms)
    begin, width = 0, 1  # the first tensor alone says how large tensors are
    while begin < len(inner):
        share = inner[begin : begin + width]
        session = _with_outputs(model, share, threads)
        for call in calls:
            count(zip(share, session.run(share, dict(zip(names, call, strict=True))), strict=True))
        largest = 4 * max(elements.values())
        begin, width = begin + width, max(1, _SHARE // largest)
    return Statistics(histograms, elements)


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str], threads: int) -> Any:
    """A session of the network whose outputs are these tensors alone."""
    import onnxruntime as ort

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
