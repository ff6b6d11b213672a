"""``Stream``: two cameras in, fused frames out.

::

    capture infrared ─┐
                      ├─ pair ─ prepare ─►[ ]─► fuse ─►[ ]─► whoever iterates
    capture visible ──┘

Four threads beside the consumer's; between them bounded channels. Where cameras are live, or a
deadline is given, nobody waits for room: what is newer takes the place of what waits, and is
counted. Otherwise nothing is dropped, and the fastest waits for the slowest.

On a GPU fusing is two threads, one that queues frames and one that takes the results, with two
frames under way (:mod:`fuseengine.pipelined`). Of a recording, the next frame is copied to the GPU
while one is computed. Of live cameras, a pair is chosen when the GPU has nothing left to compute,
so that it is no older than it would be otherwise; then copies of the frame before go on meanwhile.
"""

from __future__ import annotations

import functools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from fuseengine.alignment import Alignment
from fuseengine.errors import (
    DeadlineError,
    FrameError,
    SettingError,
    SizeMismatchError,
    SourceError,
)
from fuseengine.pipelined import SLOTS, Pipelined
from fuseengine.runtime.frames import range_bounds
from fuseengine.temporal import Memory
from fuseengine.thermal import ThermalInput
from fuseengine.video.channels import Channel, Finished, PairBox
from fuseengine.video.events import Event, Kind, Listener, log_event
from fuseengine.video.frames import (
    YUV,
    CameraFrame,
    FusedFrame,
    Image,
    Picture,
    format_of,
    with_luma,
)
from fuseengine.video.pairing import CAMERAS, INFRARED, VISIBLE, Pair, Pairer
from fuseengine.video.sources import Paced, Source, open_source
from fuseengine.video.statistics import StreamStats

Prepare = Callable[[CameraFrame], Image]
"""Makes what the engine takes of a camera's frame."""

_WAITING = 4
"""Frames of a camera that may wait for their partner."""

_WARM_RUNS = 5
_WARM_BUDGET_S = 1.0
_JOIN_S = 10.0


@dataclass(frozen=True)
class _Prepared:
    """What the fusion thread needs of a pair."""

    pair: Pair
    infrared: Image
    visible: Image
    keeps_chroma: bool


class _Result(Protocol):
    """Of the engine, for a pair: there, or on its way (:class:`fuseengine.pipelined.Ticket`)."""

    def computed(self) -> None:
        """Wait until the engine could compute another pair."""

    def result(self) -> Image:
        """Wait for the fused image; called once."""


@dataclass(frozen=True)
class _Ready:
    """A result that is there."""

    image: Image

    def computed(self) -> None:
        """It is."""

    def result(self) -> Image:
        """The image."""
        return self.image


@dataclass(frozen=True)
class _Begun:
    """A pair that the engine has taken, and when."""

    prepared: _Prepared
    begin_s: float
    result: _Result


class Stream:
    """Fuses the frames of two cameras as they come.

    ::

        with fe.Stream(engine, deadline_ms=33) as stream:
            for frame in stream.run("/dev/video1", "rtsp://camera/1"):
                show(frame.rgb())

    Attributes:
        stats: counts of the run that is going on, or of the last one.
        memory: with temporal="warm", what the next frame starts from, and its counts.
    """

    def __init__(
        self,
        engine: Callable[..., Image],
        *,
        deadline_ms: float | None = None,
        strict: bool = False,
        queue: int = 1,
        tolerance_ms: float | None = None,
        offset_ms: float = 0.0,
        stall_s: float = 1.0,
        prepare_infrared: Prepare | None = None,
        prepare_visible: Prepare | None = None,
        thermal: ThermalInput | None = None,
        alignment: Alignment | None = None,
        resize: Literal["infrared"] | None = None,
        infrared_range: tuple[float, float] | Literal["minmax"] | None = None,
        temporal: Literal["warm"] | None = None,
        on_event: Listener = log_event,
    ) -> None:
        """Describes the stream; nothing runs yet.

        Args:
            engine: a :class:`fuseengine.Engine`, or any callable ``(infrared, visible) -> fused``.
                It may have ``size``, the only (height, width) it takes, and
                ``program.channels``: where that is "luma", YUV frames reach it as their Y.
            deadline_ms: largest time from a frame's capture to its fused frame. Recorded frames
                are then played at their own speed. None: live cameras are followed as well as the
                engine can, and of recorded frames none is dropped.
            strict: a deadline that the engine cannot keep is an error, not an event.
            queue: prepared pairs that may wait for the engine. More than one smooths over an
                engine whose times vary; what would miss the deadline gives way to what is newer.
            tolerance_ms: largest time between the frames of a pair; by default half the interval
                of the slower camera.
            offset_ms: infrared time minus visible time of one moment.
            stall_s: a live camera that gives no frame for so long has stalled.
            prepare_infrared: makes of an infrared frame an array that the engine takes, uint8,
                uint16 or floats in [0, 1]: gain control, noise correction. By default frames are
                taken as they are, of YUV frames the Y.
            prepare_visible: likewise, of a visible frame. What it gives is what the fused frame
                looks like. By default a luma engine gets the Y of YUV frames, and the fused
                frame is YUV again.
            thermal: gain control and corrections of the infrared camera's counts.
            alignment: samples both cameras' frames on its grid, which is what the engine fuses and
                the fused frames show; RGB then, of a grey visible camera grey, unless that grid is
                the visible camera's own.
            resize: "infrared" resamples infrared frames to the visible ones' size.
            infrared_range: as for the engine: what counts are black and white.
            temporal: "warm": each frame starts from what the one before became and needs fewer
                sampling steps; after a cut, and where frames are lost for long, one is sampled in
                full. The engine must have been compiled with ``temporal="warm"``.
            on_event: called with every :class:`~fuseengine.video.Event`, from the stream's
                threads, one at a time. By default they go to the logger "fuseengine.video".

        Raises:
            SettingError: a value outside what is allowed.
        """
        if deadline_ms is not None and not 0 < deadline_ms < math.inf:
            raise SettingError(f"deadline_ms: got {deadline_ms}, expected milliseconds above 0")
        if queue < 1:
            raise SettingError(f"queue: got {queue}, expected 1 or more pairs")
        if not stall_s > 0:
            raise SettingError(f"stall_s: got {stall_s}, expected seconds above 0")
        if resize not in (None, "infrared"):
            raise SettingError(f"resize: got {resize!r}, expected None or 'infrared'")
        range_bounds(infrared_range)
        Pairer(None if tolerance_ms is None else tolerance_ms / 1e3)
        self.engine = engine
        self.deadline_ms, self.strict, self.queue = deadline_ms, strict, queue
        self.tolerance_ms, self.offset_ms, self.stall_s = tolerance_ms, offset_ms, stall_s
        # Gain control works on counts, whatever the engine takes.
        plain_infrared = self._plain if thermal is None else CameraFrame.luma
        self._prepare = (prepare_infrared or plain_infrared, prepare_visible or self._plain)
        self._own_visible = prepare_visible is None and _keeps_visible(alignment)
        self._own_sizes = prepare_infrared is None and prepare_visible is None
        self.thermal, self.alignment, self.resize = thermal, alignment, resize
        self.options: dict[str, Any] = {}
        if resize is not None and alignment is None:
            self.options["resize"] = resize
        if infrared_range is not None:
            self.options["infrared_range"] = infrared_range
        self.memory = None if temporal is None else _memory(engine, temporal)
        if self.memory is not None:
            self.options["memory"] = self.memory
        self._on_event = on_event
        self._telling = threading.RLock()
        self.stats = StreamStats()
        self._run: _Run | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the visible frames that the engine takes; None: any."""
        return getattr(self.engine, "size", None)

    @property
    def takes_luma(self) -> bool:
        """Whether the engine works on luma."""
        return getattr(getattr(self.engine, "program", None), "channels", "rgb") == "luma"

    def run(self, infrared: Any, visible: Any) -> Iterator[FusedFrame]:
        """Fuse two sources until one of them ends.

        What goes wrong in any thread is raised here. Leaving the loop, an error and Ctrl-C stop
        all threads and close the sources.

        Args:
            infrared: an open source, which the run takes over, or what
                :func:`~fuseengine.video.open_source` takes.
            visible: likewise.

        Returns:
            An iterator over the fused frames; each one's image is the caller's own.

        Raises:
            SourceError: a source cannot be opened, or one is live and the other is recorded.
            SizeMismatchError: the sources' sizes do not fit each other or the engine.
            DeadlineError: the engine cannot keep the deadline, and the stream is strict.
        """
        self.close()
        self.forget()
        run = _Run(self, infrared, visible)
        self._run, self.stats = run, run.stats
        return run.frames()

    def close(self) -> None:
        """Stop what is running."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def forget(self) -> None:
        """Sample the next frame in full, and count anew; for a stream with ``temporal``."""
        if self.memory is not None:
            self.memory = self.options["memory"] = Memory(cut=self.memory.cut)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        with self._telling:
            self._on_event(event)

    def pipeline(self) -> Pipelined | None:
        """For a run that overlaps copies with computation; None: the engine is called.

        That is so on the CPU, where there are no copies, and where a frame starts from the one
        before.
        """
        if self.memory is not None or getattr(self.engine, "device", "cpu") == "cpu":
            return None
        make = getattr(self.engine, "pipelined", None)
        return None if make is None else make()

    def infrared(self, frame: CameraFrame) -> Image:
        """What the engine gets of an infrared frame."""
        image, align = self._prepare[INFRARED](frame), self.alignment
        if self.thermal is None:
            return image if align is None else align.infrared(image)
        if align is None:
            return self.thermal(image)
        counts = self.thermal.correct(image)
        make_table = getattr(self.thermal.gain, "table", None)
        if make_table is None:  # a local gain has no table
            return align.infrared(self.thermal.gain(counts))
        return align.infrared(counts, table=make_table(counts))

    def visible(self, frame: CameraFrame) -> Image:
        """What the engine gets of a visible frame."""
        if self.alignment is None:
            return self._prepare[VISIBLE](frame)
        if self._own_visible:
            return self._plain(frame)
        return self.alignment.visible(frame.rgb() if frame.format in YUV else frame.image)

    def seen(self, visible: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of what the engine gets, as far as is known, for visible frames."""
        return visible if self.alignment is None else self.alignment.size

    def fits(self, infrared: tuple[int, int], visible: tuple[int, int]) -> bool:
        """Whether frames of these sizes can be fused with each other."""
        if self.alignment is not None:
            rig = self.alignment.rig
            return (infrared, visible) == (rig.infrared.size, rig.visible.size)
        # What becomes of a size in a caller's own preparation is the caller's affair.
        return infrared == visible or self.resize is not None or not self._own_sizes

    def keeps_chroma(self, visible: CameraFrame) -> bool:
        """Whether the fused frame is the engine's luma with the visible frame's chroma."""
        return self._own_visible and self.takes_luma and visible.format in YUV

    def _plain(self, frame: CameraFrame) -> Image:
        if frame.format not in YUV:
            return frame.image
        return frame.luma() if self.takes_luma else frame.rgb()


def _memory(engine: object, temporal: str) -> Memory:
    if temporal != "warm":
        raise SettingError(f"temporal: got {temporal!r}, expected None or 'warm'")
    if getattr(engine, "resumed", None) is None:
        raise SettingError(
            "temporal='warm': the engine samples every frame in full; expected one that was "
            "compiled with temporal='warm'"
        )
    return Memory()


class _Run:
    """One run of a stream: its sources, threads and channels."""

    def __init__(self, stream: Stream, infrared: Any, visible: Any) -> None:
        self.stream, self.stats = stream, StreamStats()
        self._sources: list[Source] = []
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._pipeline: Pipelined | None = None
        self._refusing = False
        self._closing = threading.Lock()
        self._closed = False
        try:
            for camera, given in zip(CAMERAS, (infrared, visible), strict=True):
                source = open_source(given)
                source.listen(camera, stream.tell)
                self._sources.append(source)
            self._live = self._match_clocks()
            self._sizes = [source.size for source in self._sources]
            self._check_sizes()
            self._pipeline = stream.pipeline()
            self._engine_ms = self._warm_up()
            self._check_deadline()
        except BaseException:
            self._close_ends()
            raise
        self._pairer = Pairer(
            None if stream.tolerance_ms is None else stream.tolerance_ms / 1e3,
            stream.offset_ms / 1e3,
            (self._sources[INFRARED].rate, self._sources[VISIBLE].rate),
        )
        self._prepared: Channel[_Prepared] = Channel(stream.queue, newest=self._live)
        self._begun: Channel[_Begun] = Channel(SLOTS - 1, newest=False)
        self._fused: Channel[FusedFrame] = Channel(1, newest=False)

    def frames(self) -> Iterator[FusedFrame]:
        try:
            running = self._start()
            while running:
                try:
                    frame = self._fused.get()
                except Finished:
                    break
                yield frame
        finally:
            self.close()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop the threads and wait for them; may be called more than once."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            started = bool(self._threads)
            for source in self._sources:
                source.stop()
            if not started:
                self._close_ends()
                return
            self._box.close()
            for channel in (self._prepared, self._begun, self._fused):
                channel.close()
            for thread in self._threads:
                # A camera's driver may hold its thread longer; it is a daemon.
                thread.join(_JOIN_S)
            if self._pipeline is not None:
                self._pipeline.close()
            self._count()

    # --- before it starts -------------------------------------------------------------------------

    def _match_clocks(self) -> bool:
        """Whether frames come at their own pace; recorded ones do under a deadline."""
        live = [source.live for source in self._sources]
        if self.stream.deadline_ms is not None and not any(live):
            self._sources = [Paced(source) for source in self._sources]
            return True
        if live[0] != live[1]:
            recorded = self._sources[live.index(False)]
            raise SourceError(
                f"one source is live and the other, {recorded.name}, is recorded: their times have "
                "nothing in common; expected two of a kind: open the recording with "
                "open_source(..., realtime=True) to play it at its own speed"
            )
        return live[0]

    def _check_sizes(self) -> None:
        infrared, visible = self._sizes
        stream, alignment = self.stream, self.stream.alignment
        wanted, seen = stream.size, stream.seen(visible)
        if wanted is not None and seen != wanted:
            which = "aligned frames" if alignment else "visible frames"
            raise SizeMismatchError(
                f"the {which} of {self._sources[VISIBLE].name} are {_by(seen)} (height x width), "
                f"expected {_by(wanted)}, for which the engine was compiled; compile one for their "
                "size, or with size=None for any size"
            )
        if stream.fits(infrared, visible):
            return
        if alignment is not None:
            rig = alignment.rig
            raise SizeMismatchError(
                f"the infrared frames are {_by(infrared)} and the visible ones {_by(visible)} "
                f"(height x width), expected {_by(rig.infrared.size)} and {_by(rig.visible.size)}, "
                "for which the rig was calibrated; calibrate it at the cameras' sizes"
            )
        raise SizeMismatchError(
            f"the infrared frames are {_by(infrared)} and the visible ones {_by(visible)} "
            "(height x width), expected equal sizes; pass an alignment of the two cameras, or "
            "resize='infrared' if both show the same view"
        )

    def _warm_up(self) -> float:
        """Milliseconds of a call, after the first ones; NaN where it does not matter."""
        if not self._live:
            return math.nan
        stream, size = self.stream, self.stream.seen(self._sizes[VISIBLE])
        rng = np.random.default_rng(0)
        planes = (size,) if stream.takes_luma else ((*size, 3),)
        visible = rng.integers(0, 256, planes[0], np.uint8)
        infrared = rng.integers(0, 256, size, np.uint8)
        options = {k: v for k, v in stream.options.items() if k != "infrared_range"}
        self._begin(infrared, visible, options).result()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < _WARM_RUNS and time.perf_counter() - begin < _WARM_BUDGET_S:
            start = time.perf_counter()
            self._begin(infrared, visible, options).result()
            times.append((time.perf_counter() - start) * 1e3)
        stream.forget()
        return statistics.median(times)

    def _check_deadline(self) -> None:
        deadline, took = self.stream.deadline_ms, self._engine_ms
        if deadline is None or took <= deadline:
            return
        message = (
            f"a deadline of {deadline:g} ms cannot be kept: the engine alone takes {took:.1f} ms "
            f"here, {1e3 / took:.1f} frames a second; {self._achievable(deadline)}"
        )
        if self.stream.strict:
            raise DeadlineError(message)
        self.stream.tell(Event("deadline", "", message + "; the newest pair is fused each time"))

    def _achievable(self, deadline: float) -> str:
        report = getattr(self.stream.engine, "report", None)
        tried = [
            (item.milliseconds, f"{item.backend} {item.precision}")
            for item in getattr(report, "candidates", ())
            if item.milliseconds is not None
        ]
        if not tried:
            return "a smaller size or model, or a longer deadline, is needed"
        fastest, name = min(tried)
        verdict = "keeps it" if fastest <= deadline else "is the fastest of all that was tried"
        return (
            f"{name} {verdict} with {fastest:.1f} ms when it was compiled; else a smaller size or "
            "model, or a longer deadline, is needed"
        )

    # --- threads ----------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Whether the threads run now: not if it was closed before."""
        with self._closing:
            if self._closed:
                return False
            self._box = PairBox(
                self._pairer,
                capacity=_WAITING,
                live=self._live,
                stall_s=self.stream.stall_s,
                on_stall=self._stalled,
            )
            start = time.monotonic()
            for source in self._sources:
                if isinstance(source, Paced):
                    source.start(start)  # both at once, and not before the engine was warm
            work: list[tuple[str, Callable[[], None]]] = [
                (f"capture {name}", functools.partial(self._capture, camera))
                for camera, name in enumerate(CAMERAS)
            ]
            work.append(("prepare", self._prepare))
            if self._pipeline is None:
                work.append(("fuse", self._fuse))
            else:
                work += [("queue", self._queue), ("collect", self._collect)]
            for name, function in work:
                self._threads.append(
                    threading.Thread(
                        target=self._guard, args=(function,), name=f"fuse: {name}", daemon=True
                    )
                )
            for thread in self._threads:
                thread.start()
        return True

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Finished:
            pass
        except BaseException as error:
            if self._error is None:
                self._error = error
            for source in self._sources:
                source.stop()
            self._box.close()
            self._prepared.close()
            if self._pipeline is None:
                self._fused.finish()
            else:
                self._begun.finish()  # what is under way is handed over before

    def _capture(self, camera: int) -> None:
        source, counts = self._sources[camera], self.stats.cameras[camera]
        try:
            while (frame := source.read()) is not None:
                counts.captured += 1
                self._watch_size(camera, frame)
                stalled_s = self._box.put(camera, frame)
                if stalled_s is not None:
                    self._tell("resume", camera, f"frames again after {stalled_s:.1f} s")
            if not self._closed and self._error is None:
                self._tell("end", camera, f"no more frames after {counts.captured}")
        finally:
            self._box.end(camera)
            source.close()

    def _watch_size(self, camera: int, frame: CameraFrame) -> None:
        if frame.size == self._sizes[camera]:
            return
        before, self._sizes[camera] = self._sizes[camera], frame.size
        wanted = None if self.stream.alignment else self.stream.size
        if camera == VISIBLE and wanted is not None:
            fate = "as the engine takes them" if frame.size == wanted else "dropped from now on"
            if frame.size != wanted:
                fate += f", because the engine is for {_by(wanted)}"
        else:
            fate = "dropped unless both cameras agree"
            if self.stream.fits(*self._sizes):
                fate = "fused as they come"
        self._tell(
            "size", camera, f"frames changed from {_by(before)} to {_by(frame.size)}: {fate}"
        )

    def _stalled(self, camera: int, seconds: float) -> None:
        self.stats.cameras[camera].stalls += 1
        self._tell("stall", camera, f"no frame for {seconds:.1f} s; waiting")

    def _prepare(self) -> None:
        stream = self.stream
        refusing = False
        try:
            while True:
                pair = self._box.take()
                self.stats.paired += 1
                wanted = stream.size
                if not stream.fits(pair.infrared.size, pair.visible.size) or (
                    wanted is not None and stream.seen(pair.visible.size) != wanted
                ):
                    self.stats.refused += 1
                    continue
                try:
                    prepared = self._prepared_pair(pair)
                except FrameError as error:
                    self.stats.refused += 1
                    if not refusing:
                        self._tell("refused", None, f"a pair cannot be prepared: {error}")
                    refusing = True
                    continue
                refusing = False
                self._prepared.put(prepared)
        finally:
            self._prepared.finish()

    def _prepared_pair(self, pair: Pair) -> _Prepared:
        stream = self.stream
        infrared, visible = stream.infrared(pair.infrared), stream.visible(pair.visible)
        return _Prepared(pair, infrared, visible, stream.keeps_chroma(pair.visible))

    def _fuse(self) -> None:
        """Call the engine for one pair after the other."""
        try:
            while True:
                # A pair is chosen once its result can be handed over: no older than need be.
                self._fused.wait_for_room()
                begun = self._begun_pair()
                if begun is not None:
                    self._fused.put(self._finished(begun))
        finally:
            self._fused.finish()

    def _queue(self) -> None:
        """Like :meth:`_fuse` up to where one would wait for the result."""
        ahead: _Begun | None = None
        try:
            while True:
                # With one waiting here and one that is being collected, all slots are taken.
                self._begun.wait_for_room()
                if self._live:
                    if ahead is not None:
                        ahead.result.computed()
                    self._fused.reserve()
                begun = self._begun_pair()
                if begun is not None:
                    self._begun.put(begun)
                    ahead = begun
                elif self._live:
                    self._fused.forgo()
        finally:
            self._begun.finish()

    def _collect(self) -> None:
        """Hand over what is under way, in its order."""
        try:
            while True:
                frame = self._finished(self._begun.get())
                self._fused.put(frame, promised=self._live)
        finally:
            self._begun.close()
            self._fused.finish()

    def _begun_pair(self) -> _Begun | None:
        """Give the engine the next pair; None: it refuses that."""
        skip = self._would_be_late if self._live and self.stream.deadline_ms is not None else None
        prepared = self._prepared.get(skip)
        begin_s = time.perf_counter()
        try:
            result = self._begin(prepared.infrared, prepared.visible, self.stream.options)
        except FrameError as error:
            self.stats.refused += 1
            if not self._refusing:
                self._tell("refused", None, f"the engine refuses a pair: {error}")
            self._refusing = True
            return None
        self._refusing = False
        return _Begun(prepared, begin_s, result)

    def _begin(self, infrared: Image, visible: Image, options: dict[str, Any]) -> _Result:
        # What a preparation put on the GPU is there already.
        on_host = isinstance(infrared, np.ndarray) and isinstance(visible, np.ndarray)
        if self._pipeline is not None and on_host:
            return self._pipeline.submit(infrared, visible, **options)
        return _Ready(self.stream.engine(infrared, visible, **options))

    def _finished(self, begun: _Begun) -> FusedFrame:
        image = begun.result.result()
        took = (time.perf_counter() - begun.begin_s) * 1e3
        if self._live:
            self._engine_ms += 0.1 * (took - self._engine_ms)
        return self._fused_frame(begun.prepared, image)

    def _would_be_late(self, prepared: _Prepared) -> bool:
        age_ms = (time.monotonic() - self._captured(prepared.pair)) * 1e3
        return age_ms + self._engine_ms > (self.stream.deadline_ms or math.inf)

    def _captured(self, pair: Pair) -> float:
        """When the older frame of a pair was captured, or read from its file."""
        if not self._live:
            return min(pair.infrared.arrived_s, pair.visible.arrived_s)
        return min(pair.infrared.time_s - self.stream.offset_ms / 1e3, pair.visible.time_s)

    def _fused_frame(self, prepared: _Prepared, image: Image) -> FusedFrame:
        pair, visible = prepared.pair, prepared.pair.visible
        if prepared.keeps_chroma:
            picture = Picture(with_luma(image, visible), visible.format, visible.colour)
        else:
            picture = Picture(image, format_of(image))
        now = time.monotonic()
        latency = (now - self._captured(pair)) * 1e3
        late = self.stream.deadline_ms is not None and latency > self.stream.deadline_ms
        frame = FusedFrame(
            picture.image,
            picture.format,
            picture.colour,
            time_s=visible.time_s,
            index=self.stats.fused,
            infrared_time_s=pair.infrared.time_s,
            visible_time_s=visible.time_s,
            latency_ms=latency,
            late=late,
        )
        self.stats.count_fused(now, latency, late)
        self._count()
        return frame

    def _count(self) -> None:
        """Bring the counts that others keep into the statistics."""
        self.stats.dropped = self._prepared.dropped
        for camera, counts in enumerate(self.stats.cameras):
            source = self._sources[camera]
            counts.unpaired = self._pairer.unpaired[camera]
            counts.broken, counts.missed = source.broken, source.missed
            counts.reconnects = source.reconnects

    def _close_ends(self) -> None:
        for source in self._sources:
            source.stop()
            source.close()
        if self._pipeline is not None:
            self._pipeline.close()

    def _tell(self, kind: Kind, camera: int | None, message: str) -> None:
        self.stream.tell(Event(kind, "" if camera is None else CAMERAS[camera], message))


def _keeps_visible(alignment: Alignment | None) -> bool:
    """Whether visible frames reach the engine as they are: YUV ones stay YUV."""
    return alignment is None or alignment.keeps_visible


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
