"""The denoising U-Net of DDPM, and the modules that stand beside it.

One network, with the variants of the public codes as arguments: SR3's (DMFuse, DMNet), DRMF's
restoration and weight networks, Mask-DiFuser's.

What does not depend on the sample x_t is not in it but comes as an input, from stages that run once
per engine or once per frame: the time shifts of all blocks (:class:`~.layers.TimeShifts`), the part
of the first convolution that sees the condition pictures (``hint``), keys and values of
cross-attention.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.errors import SettingError
from fuseengine.models.layers import (
    Activation,
    BlockConv,
    ResidualBlock,
    TimeShifts,
    split_channels,
)


class Level(nn.Module):
    """Residual blocks at one resolution, each perhaps followed by attention, and the way on.

    Args:
        blocks: the residual blocks in order of use.
        attention: one attention per block, or none.
        resample: convolution of the step down or up; None at the end of a path.
    """

    def __init__(
        self, blocks: list[nn.Module], attention: list[nn.Module], resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleList(attention)
        self.resample = resample


class UNet(nn.Module):
    """The U-Net: ``unet(x, shifts)`` -> noise, or (noise, tap, tap, ...).

    Going down each level has ``blocks`` residual blocks, going up one more, each of which first
    takes the next skip (the stem's, every block's and every down-step's output) by concatenation.
    Heights and widths must be multiples of ``multiple``.

    Args:
        channels: channels of x.
        out: channels of the result.
        width: channels of the finest level, before its multiplier.
        multipliers: channels of each level, fine to coarse, in units of ``width``.
        blocks: residual blocks per level going down.
        attention: makes an attention for a width; None for a network without.
        attention_levels: levels (0 is the finest) with attention after each of their blocks.
        attention_in_middle: whether attention stands between the two blocks of the middle.
        concat_levels: levels that take skips going up; all by default.
        groups: groups of every norm.
        eps: epsilon of every norm.
        activation: in the blocks and before the head.
        dropout: probability in the blocks, training only.
        down_padding: "both" pads the strided 3x3 convolution by one on every side; "after" by one
            on the right and at the bottom (the DDPM code's).
        patch: works on p x p blocks of pixels as channels.
        taps: (level, block) of the decoder whose outputs are returned besides; block counts from
            0, in order of use.
        stem: what brings x to the finest level's width; a 3x3 convolution by default.

    Attributes:
        widths: output channels of each residual block in order of use, for ``TimeShifts``.
        multiple: what heights and widths must be multiples of.

    Raises:
        SettingError: a number below 1, or groups that do not divide every width.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        width: int,
        *,
        multipliers: Sequence[float],
        blocks: int = 2,
        attention: Callable[[int], nn.Module] | None = None,
        attention_levels: Collection[int] = (),
        attention_in_middle: bool = True,
        concat_levels: Collection[int] | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        activation: Activation = F.silu,
        dropout: float = 0.0,
        down_padding: Literal["both", "after"] = "both",
        patch: int = 1,
        taps: Sequence[tuple[int, int]] = (),
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        levels = [int(width * m) for m in multipliers]
        if min(width, blocks, groups, patch, len(levels), *levels) < 1:
            raise SettingError(
                f"width={width}, multipliers={tuple(multipliers)}, blocks={blocks}, "
                f"groups={groups}, patch={patch}; expected each >= 1"
            )
        if any(w % groups for w in (width, *levels)):
            raise SettingError(
                f"groups={groups}, widths {(width, *levels)}; expected groups to divide every width"
            )
        depth = len(levels)
        self.multiple = patch * 2 ** (depth - 1)
        self.patch, self.activation, self.taps = patch, activation, tuple(taps)
        self.pad_after = down_padding == "after"
        self.concat_levels = frozenset(range(depth) if concat_levels is None else concat_levels)

        def block(before: int, after: int) -> ResidualBlock:
            return ResidualBlock(
                before, after, groups=groups, eps=eps, activation=activation, dropout=dropout
            )

        def attentions(level: int, count: int) -> list[nn.Module]:
            if attention is None or level not in attention_levels:
                return []
            return [attention(levels[level]) for _ in range(count)]

        self.stem = stem or BlockConv(channels, width, patch=patch)
        now, skips = width, [width]
        down = []
        for i, after in enumerate(levels):
            made: list[nn.Module] = []
            for _ in range(blocks):
                made.append(block(now, after))
                now = after
                skips.append(now)
            step = None
            if i < depth - 1:
                step = nn.Conv2d(now, now, 3, stride=2, padding=0 if self.pad_after else 1)
                skips.append(now)
            down.append(Level(made, attentions(i, blocks), step))
        self.down = nn.ModuleList(down)
        middle = [attention(now)] if attention is not None and attention_in_middle else []
        self.middle = Level([block(now, now), block(now, now)], middle, None)
        up: list[Level] = []  # in order of use; stored fine to coarse like the way down
        for i, after in reversed(list(enumerate(levels))):
            made = []
            for _ in range(blocks + 1):
                skip = skips.pop()
                made.append(block(now + (skip if i in self.concat_levels else 0), after))
                now = after
            step = nn.Conv2d(now, now, 3, padding=1) if i else None
            up.append(Level(made, attentions(i, blocks + 1), step))
        self.up = nn.ModuleList(reversed(up))
        self.norm = nn.GroupNorm(groups, now, eps=eps)
        self.head = nn.Conv2d(now, out * patch * patch, 3, padding=1)
        self.widths = [b.conv2.out_channels for b in self.blocks()]

    def blocks(self) -> Iterator[ResidualBlock]:
        """The residual blocks in order of use."""
        for level in (*self.down, self.middle, *reversed(self.up)):
            yield from level.blocks

    def attentions(self) -> Iterator[nn.Module]:
        """The attentions in order of use."""
        for level in (*self.down, self.middle, *reversed(self.up)):
            yield from level.attention

    def forward(self, x: Tensor, shifts: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Predict the noise.

        Args:
            x: (N, channels, H, W), H and W multiples of ``self.multiple``.
            shifts: (1 or N, sum(self.widths)) from :class:`~.layers.TimeShifts`.

        Returns:
            (N, out, H, W); with taps a tuple of it and of each tap (N, width, h, w).
        """
        return self.denoise(self.stem(x), shifts)

    def denoise(
        self, h: Tensor, shifts: Tensor, contexts: Sequence[Sequence[Tensor]] = ()
    ) -> Tensor | tuple[Tensor, ...]:
        """The network behind its stem.

        Args:
            h: (N, width, H / patch, W / patch).
            shifts: as in :meth:`forward`.
            contexts: for each attention in order of use what it takes besides its features.

        Returns:
            As :meth:`forward`.
        """
        shift, context = iter(split_channels(shifts, self.widths)), iter(contexts)

        def run(level: Level, j: int, h: Tensor) -> Tensor:
            h = level.blocks[j](h, next(shift))
            return level.attention[j](h, *next(context, ())) if j < len(level.attention) else h

        skips = [h]
        for level in self.down:
            for j in range(len(level.blocks)):
                h = run(level, j, h)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(F.pad(h, (0, 1, 0, 1)) if self.pad_after else h)
                skips.append(h)
        h = run(self.middle, 1, run(self.middle, 0, h))
        tapped = {}
        for i, level in reversed(list(enumerate(self.up))):
            for j in range(len(level.blocks)):
                skip = skips.pop()
                h = run(level, j, torch.cat([h, skip], dim=1) if i in self.concat_levels else h)
                tapped[i, j] = h
            if level.resample is not None:
                h = level.resample(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.head(self.activation(self.norm(h)))
        if self.patch > 1:
            h = F.pixel_shuffle(h, self.patch)
        return (h, *(tapped[tap] for tap in self.taps)) if self.taps else h


class ConditionedUNet(UNet):
    """A U-Net whose first convolution also saw other pictures: ``unet(x, shifts, hint)``.

    A convolution over concatenated channels is the sum of two convolutions; the one over what does
    not change from step to step is made once, outside, and comes as ``hint``.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, shifts: Tensor, hint: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """As :class:`UNet`, with hint (N, width, H / patch, W / patch) added to the stem."""
        return self.denoise(self.stem(x) + hint, shifts)


class Denoiser(nn.Module):
    """A U-Net and its time shifts, each a stage of its own: ``denoiser(x, t)``.

    Args:
        unet: the network.
        time: its time shifts.
    """

    def __init__(self, unet: UNet, time: TimeShifts) -> None:
        super().__init__()
        self.unet, self.time = unet, time

    def forward(self, x: Tensor, t: float | Tensor, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """``unet(x, time(t), *given)``."""
        return self.unet(x, self.time(t), *given)


class ConditionedDenoiser(Denoiser):
    """A denoiser with the stage that makes its U-Net's hint: ``denoiser(x, t, hint)``.

    Args:
        unet: the network.
        time: its time shifts.
        condition: from the condition pictures to the hint; called once per frame.
    """

    def __init__(self, unet: ConditionedUNet, time: TimeShifts, condition: nn.Module) -> None:
        super().__init__(unet, time)
        self.condition = condition
