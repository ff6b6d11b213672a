"""Mask-DiFuser: a diffusion model that reconstructs what complementary masks hid in each source.

    F_f = E_c(x_A, x_B)                             content features, full resolution            (9)
    S_A = E_s(x_A),  S_B = E_s(x_B)                 semantic features, 1/4 resolution           (10)
    h  <- h + W [softmax(Q K_A^T / sqrt(d)) V_A, softmax(Q K_B^T / sqrt(d)) V_B]                (11)
          Q from h, K and V from S, in the U-Net at 1/4 resolution and in its middle
    eps = U([conv x_t, F_f], t; S_A, S_B)
    x_0 by DDIM, 5 steps, eta = 1

Source: Tang et al., "Mask-DiFuser: A Masked Diffusion Model for Unified Unsupervised Image Fusion",
and the scripts of Linfeng-Tang/Mask-DiFuser (settings; the network's files are not public). They
acknowledge YuyangYin/CLEDiffusion, whose U-Net and sampler have the same names and settings, and
which is followed where the paper is silent. Read so, because no source says it:

* x_t goes through a 3x3 convolution to 64 channels before it meets F_f, a 3x3 convolution after;
* keys and values of both sources are made by the same 1x1 convolutions, as the semantic encoder is
  shared; the results of both attentions are concatenated and brought to C by a 1x1 convolution;
* content encoder: 64 channels, an attention-parallel feature mixer (channel and pixel branch added
  under one sigmoid), two residual blocks of 128 channels;
* semantic encoder: ``semantic="budget"`` is as large as the paper's count asks for (171.28 M
  parameters in all against the printed 171.26 M, 4644 G multiply-adds per step at 640x480
  against 4667), ``"lean"`` has the widths that the text names (84.8 M). The shape of
  neither is the paper's;
* sampling ends at abar = 1, without noise in the last step (CLEDiffusion stops one table entry
  earlier and clips), and the result is stretched to [0, 1] per picture over all channels, as the
  scripts do. ``scaling="clamp"`` maps [-1, 1] to [0, 1] instead.

No output of the official network is public, so nothing here is checked against it.

``mask-difuser-s`` is this project's: narrower, on 2x2 blocks of pixels as channels, attention at
1/16 resolution, and scaled by clamping. It predicts x_0 as a correction of the sources' mean
(``predict="correction"``): a few channels cannot carry the noise, or even both pictures, of every
pixel through a network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.errors import SettingError
from fuseengine.models.base import FusionModel
from fuseengine.models.layers import (
    BlockConv,
    CrossAttention,
    KeysAndValues,
    TimeShifts,
    split_channels,
)
from fuseengine.models.pictures import crop_like, stretch
from fuseengine.models.sampling import (
    Draws,
    Step,
    diffuse,
    linear_schedule,
    make_steps,
    predict_noise,
    sample_ddim,
    spaced_timesteps,
)
from fuseengine.models.transformer import TransformerLayer
from fuseengine.models.unet import UNet

_TIMESTEPS = 1000


class PlainBlock(nn.Module):
    """``x + conv3x3(relu(conv3x3(x)))``: a residual block without norms.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        return x + self.conv2(F.relu(self.conv1(x)))


class FeatureMixer(nn.Module):
    """Attention-parallel feature mixer (APFM): ``x + x * sigmoid(channel(x) + pixel(x))``.

    Args:
        channels: of input and output.
        hidden: width inside both branches.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        self.pixel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        channel = self.channel(x.mean(dim=(2, 3), keepdim=True))
        return x + x * torch.sigmoid(channel + self.pixel(x))


class ContentEncoder(nn.Module):
    """E_c, and the half of the U-Net's first convolution that sees F_f (its ``hint``).

    Args:
        width: channels of F_f.
        hint: channels of the result.
        blocks: residual blocks of the extractor that both sources share.
        patch: space-to-depth factor at the input.
    """

    def __init__(self, width: int, hint: int, *, blocks: int, patch: int) -> None:
        super().__init__()
        self.extract = nn.Sequential(
            BlockConv(3, width, patch=patch), *(PlainBlock(width) for _ in range(blocks))
        )
        self.mix = FeatureMixer(2 * width, max(width // 4, 1))
        self.reinforce = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            PlainBlock(2 * width),
            PlainBlock(2 * width),
            nn.Conv2d(2 * width, width, 3, padding=1),
        )
        self.hint = nn.Conv2d(width, hint, 3, padding=1, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two (N, 3, H, W) -> (N, hint, H / patch, W / patch)."""
        both = torch.cat([self.extract(a), self.extract(b)], dim=1)
        return self.hint(self.reinforce(self.mix(both)))


class SemanticEncoder(nn.Module):
    """E_s: strided convolutions, then transformer layers at one or two resolutions.

    Args:
        widths: channels after each stride-2 convolution of the stem; the last is the layers'.
        layers: transformer layers at the stem's resolution.
        coarse: (channels, layers) at half of it, whose result is enlarged and added; or None.
        out: channels of S.
        groups: of the norms between the stem's convolutions.
        heads: of each layer's attention.
    """

    def __init__(
        self,
        widths: Sequence[int],
        layers: int,
        *,
        coarse: tuple[int, int] | None,
        out: int,
        groups: int,
        heads: int = 8,
    ) -> None:
        super().__init__()
        stem: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1)]
        for before, after in pairwise(widths):
            stem += [nn.GroupNorm(groups, before), nn.SiLU()]
            stem.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
        self.stem = nn.Sequential(*stem)
        width = widths[-1]
        self.layers = nn.Sequential(*(TransformerLayer(width, heads, 2.66) for _ in range(layers)))
        self.coarse = None
        if coarse is not None:
            inside, count = coarse
            self.coarse = nn.Sequential(
                nn.Conv2d(width, inside, 3, stride=2, padding=1),
                *(TransformerLayer(inside, heads, 2.66) for _ in range(count)),
                nn.Upsample(scale_factor=2.0, mode="nearest"),
                nn.Conv2d(inside, width, 3, padding=1),
            )
        self.out = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, out, H / 2^k, W / 2^k) with k convolutions in the stem."""
        h = self.layers(self.stem(x))
        if self.coarse is not None:
            h = h + self.coarse(h)
        return self.out(h)


class SourceUNet(UNet):
    """A U-Net with a hint for its stem and two sources for its cross-attentions."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shifts: Tensor, hint: Tensor, source_a: Tensor, source_b: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """Predict.

        Args:
            x: x_t, (N, 3, H, W).
            shifts: from the time stage.
            hint: from :class:`ContentEncoder`.
            source_a: keys and values of source A, from :class:`KeysAndValues`.
            source_b: of source B.

        Returns:
            (N, 3, H, W): noise or x_0.
        """
        pairs = [2 * attention.query.out_channels for attention in self.attentions()]
        contexts = zip(
            split_channels(source_a, pairs), split_channels(source_b, pairs), strict=True
        )
        return self.denoise(self.stem(x) + hint, shifts, list(contexts))


class MaskDiFuser(FusionModel):
    """Mask-DiFuser; see the module's docstring for sources and readings.

    Args:
        steps: sampling steps, evaluated at ``range(0, 1000, 1000 // steps)``.
        eta: 1 is stochastic (official), 0 deterministic.
        predict: what the U-Net's result means, "noise" (official), "clean" (x_0) or "correction"
            (x_0 less the sources' mean).
        scaling: "min-max" (official, per picture) or "clamp".
        semantic: "budget" or "lean"; see the module's docstring.
        seed: of the starting noise and the steps'.
        width: channels of the U-Net's finest level.
        content_width: channels of F_f.
        content_blocks: residual blocks of the content encoder's extractor.
        semantic_widths: of the semantic encoder's stem, one per halving; the preset's by default.
        semantic_layers: transformer layers behind it; the preset's by default.
        multipliers: width of each level, fine to coarse, in units of the width.
        blocks: residual blocks per level.
        attention: levels (0 is the finest) with cross-attention after each block; it also stands
            in the middle.
        groups: GroupNorm groups; must divide every width.
        dropout: dropout in the residual blocks, training only.
        patch: space-to-depth factor of the U-Net and the content encoder.

    Raises:
        SettingError: a setting outside what is allowed.
    """

    channels = "rgb"
    stages = ("content", "semantic", "keys", "time", "unet")
    resumed_steps = 1

    def __init__(
        self,
        *,
        steps: int = 5,
        eta: float = 1.0,
        predict: str = "noise",
        scaling: str = "min-max",
        semantic: str = "budget",
        seed: int = 0,
        width: int = 128,
        content_width: int = 64,
        content_blocks: int = 4,
        semantic_widths: Sequence[int] | None = None,
        semantic_layers: int | None = None,
        multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks: int = 2,
        attention: Collection[int] = (2,),
        groups: int = 32,
        dropout: float = 0.1,
        patch: int = 1,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("predict", predict, ("noise", "clean", "correction")),
            ("scaling", scaling, ("min-max", "clamp")),
            ("semantic", semantic, tuple(_SEMANTIC)),
        ):
            if given not in known:
                raise SettingError(f"{name}={given!r}; expected one of {known}")
        if not 0.0 <= eta <= 1.0:
            raise SettingError(f"eta={eta}; expected 0 (deterministic) to 1")
        self.steps, self.eta, self.predict, self.scaling = steps, eta, predict, scaling
        self.seed = seed
        self.table = linear_schedule(_TIMESTEPS)
        self.schedule()  # refuses a number of steps that cannot be
        preset_widths, preset_layers, coarse = _SEMANTIC[semantic]
        widths = tuple(semantic_widths or preset_widths)
        out = 128 if semantic_widths is None else widths[-1]
        self.content = ContentEncoder(content_width, width, blocks=content_blocks, patch=patch)
        self.semantic = SemanticEncoder(
            widths,
            preset_layers if semantic_layers is None else semantic_layers,
            coarse=coarse if semantic_widths is None else None,
            out=out,
            groups=groups,
        )
        stem = nn.Sequential(
            BlockConv(3, content_width, patch=patch),
            nn.Conv2d(content_width, width, 3, padding=1),
        )
        self.unet = SourceUNet(
            3,
            3,
            width,
            multipliers=multipliers,
            blocks=blocks,
            attention=partial(CrossAttention, groups=groups),
            attention_levels=attention,
            groups=groups,
            dropout=dropout,
            patch=patch,
            stem=stem,
        )
        self.keys = KeysAndValues(out, [a.query.out_channels for a in self.unet.attentions()])
        self.time = TimeShifts(width, 4 * width, self.unet.widths, layout="interleaved")
        halvings = len(widths) + (self.semantic.coarse is not None)
        self.multiple = max(16, self.unet.multiple, 2**halvings)

    def schedule(self) -> list[Step]:
        """The sampling steps.

        Raises:
            SettingError: steps outside 1..1000.
        """
        return make_steps(self.table, spaced_timesteps(_TIMESTEPS, self.steps))

    def forward(self, a: Tensor, b: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """Fuse a pair.

        Args:
            a: source A, (N, 3, H, W) or (N, 1, H, W) in [0, 1], of any size.
            b: source B, likewise.
            noise: ``x_T`` and, for eta above 0, ``z_t800`` and so on for every step but the last,
                (N, 3, H, W) at the padded size.

        Returns:
            (N, 3, H, W) in [0, 1].

        Raises:
            FrameError, SizeMismatchError: pictures that cannot be used.
            SettingError: noise of another name or shape.
        """
        first, second = self.prepare(a, b)
        return self.scaled(crop_like(self.sample(first, second, noise), a))

    def resume(self, a: Tensor, b: Tensor, previous: Tensor, *, steps: int) -> Tensor:
        """The last steps alone, from the frame before with the noise of the first of them.

        As SDEdit (Meng et al. 2022) starts from a guide; the noise is the forward's, so the same in
        every frame. See :meth:`FusionModel.resume`.
        """
        schedule = self.schedule()
        if not 1 <= steps < len(schedule):
            raise SettingError(
                f"steps={steps}; expected 1 to {len(schedule) - 1}, fewer than the model's own"
            )
        first, second, before = self.prepare(a, b, previous)
        noise = Draws(("x_T",), None, self.seed).normal("x_T", before)
        start = diffuse(before * 2.0 - 1.0, noise, schedule[-steps].sqrt_abar)
        return self.scaled(crop_like(self.denoise(start, first, second, schedule[-steps:]), a))

    def scaled(self, x: Tensor) -> Tensor:
        """x_0 as a picture in [0, 1]."""
        if self.scaling == "min-max":
            return stretch(x, per="picture")
        return (x * 0.5 + 0.5).clamp(0.0, 1.0)

    def sample(self, a: Tensor, b: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """x_0, (N, 3, H, W), about [-1, 1], not clamped.

        Takes pictures (N, 3, H, W) in [0, 1] whose sides are multiples of ``self.multiple``.
        """
        schedule = self.schedule()
        draws = Draws(["x_T", *(f"z_t{step.t}" for step in schedule[:-1])], noise, self.seed)
        return self.denoise(draws.normal("x_T", a), a, b, schedule, draws)

    def denoise(
        self, x: Tensor, a: Tensor, b: Tensor, schedule: Sequence[Step], draws: Draws | None = None
    ) -> Tensor:
        """From x at the first of some steps to x_0; see :meth:`sample`.

        ``draws``: of the noise that each step adds; from the model's seed by default.
        """
        if draws is None:
            draws = Draws([f"z_t{step.t}" for step in schedule[:-1]], None, self.seed)
        sources, base = self.sources(a, b), self.base(a, b)
        return sample_ddim(
            lambda x, step: self.noise(x, step, *sources, base=base),
            x,
            schedule,
            eta=self.eta,
            draws=draws,
        )

    def sources(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the sources alone: hint, keys and values of A, and of B."""
        a, b = a * 2.0 - 1.0, b * 2.0 - 1.0
        return self.content(a, b), self.keys(self.semantic(a)), self.keys(self.semantic(b))

    def base(self, a: Tensor, b: Tensor) -> Tensor | None:
        """What the U-Net corrects: the sources' mean on [-1, 1]; None for another ``predict``."""
        return (a + b) - 1.0 if self.predict == "correction" else None

    def noise(self, x: Tensor, step: Step, *sources: Tensor, base: Tensor | None = None) -> Tensor:
        """The noise in x_t, (N, 3, H, W)."""
        found = self.unet(x, self.time(step.t), *sources)
        if self.predict == "noise":
            return found
        return predict_noise(x, found if base is None else found + base, step)


_SEMANTIC: dict[str, tuple[tuple[int, ...], int, tuple[int, int] | None]] = {
    "lean": ((64, 128), 4, None),
    "budget": ((64, 384), 20, (512, 15)),
}
"""Stem widths, layers, and channels and layers at half resolution."""
