"""DMFuse: features of a diffusion model, fused by criss-cross attention.

A denoising U-Net (SR3's) is the feature extractor. Each picture is noised a little, at three
levels t = 5, 50, 100, and the decoder of the U-Net is read out at every resolution:

    x_t = c x + sqrt(1 - c^2) n,   c uniform in [sqrt(abar_t), sqrt(abar_{t-1})]
    F^k = [F^k(x_5), F^k(x_50), F^k(x_100)]                      resolution k = 1, 1/2, ..., 1/16
    E^k = scSE(ReLU(conv(F^k)))                                  the same for both modalities
    A_x = criss-cross attention with the other modality's queries: q_y(n) . k_x(m), values v_x(m)
    C^k = [gamma A_ir + E_ir, gamma A_vi + E_vi]
    f   = merge([refine(up(f)), C^k])                            from 1/16 to full size
    out = max(0, tanh(conv1x1 f))

Source: the paper of DMFuse (equations 1 to 9) and the public code Zhishe-Wang/DMFuse, whose U-Net
is that of SR3 (Saharia et al. 2021) as in Dif-Fusion. Where they differ the code is followed,
because users' checkpoints were trained with it:

* the paper adds the attention plainly and lets the centre pixel give the key and the path the
  queries (equations 6 to 8); the code weighs it by a learned gamma (0.0066 in the public head) and
  takes the query at the centre. ``update="paper"`` gives the paper's attention and sum;
* the paper speaks of encoder features and counts two passes of the U-Net; the code takes the first
  decoder block after each up-step, at three noise levels of both pictures: six passes. ``times``
  has them;
* both noises of the code are drawn anew at each call. Here they come from a seed, and all of them
  can be handed in.

The code pads with white to multiples of 32, which shows a little near the right and lower edge; so
does this model (``padding="reflect"`` does not).

Parameters: U-Net 24,473,315 and head 531,374 (the public head's file holds 119,632 more that never
run), together 25,004,689; the paper counts 24.967 M. ``dmfuse-s`` is this project's: narrower, four
levels, on 2x2 blocks of pixels as channels, attention in the U-Net's middle only, reflected at the
border, and its head says which source to follow and what to add (``residual``, ``Correction``);
775,917 parameters, 70 GFLOP for a 640x480 pair, all six passes and the criss-cross attention
included.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.errors import SettingError
from fuseengine.kernels import criss_cross_attention
from fuseengine.models.base import FusionModel
from fuseengine.models.checkpoint import Official
from fuseengine.models.layers import (
    BlockConv,
    ChannelSpatialGate,
    ResidualBlock,
    SelfAttention,
    TimeShifts,
)
from fuseengine.models.pictures import Padding, crop_like
from fuseengine.models.sampling import Draws, cosine_schedule, diffuse
from fuseengine.models.unet import Denoiser, UNet

_TIMESTEPS = 2000
_SOURCES = ("ir", "vi")
"""Names of the two pictures in the names of random numbers."""


def _reflected_conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, padding_mode="reflect")


class FeatureEncoder(nn.Module):
    """Features of all noise levels at one resolution to the head's width: E^k.

    Args:
        channels: width of the concatenated features.
        out: width of the head.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = _reflected_conv(channels, out)
        self.gate = ChannelSpatialGate(out, 2, combine="sum")

    def forward(self, features: Tensor) -> Tensor:
        """(N, channels, h, w) -> (N, out, h, w)."""
        return self.gate(F.relu(self.conv(features)))


class Projections(nn.Module):
    """Queries, keys and values of the criss-cross attention, the same for all resolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(width, max(width // 8, 1), 1)
        self.key = nn.Conv2d(width, max(width // 8, 1), 1)
        self.value = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, width, h, w) -> queries, keys (N, width / 8, h, w) and values (N, width, h, w)."""
        return self.query(x), self.key(x), self.value(x)


class Join(nn.Module):
    """C^k = [gamma A_ir + E_ir, gamma A_vi + E_vi].

    Args:
        learned: whether gamma is learned, from 0; else it is 1.
    """

    def __init__(self, *, learned: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1)) if learned else None

    def forward(self, x: Tensor, attended_x: Tensor, y: Tensor, attended_y: Tensor) -> Tensor:
        """Four (N, width, h, w) -> (N, 2 width, h, w)."""
        if self.gamma is not None:
            attended_x, attended_y = attended_x * self.gamma, attended_y * self.gamma
        return torch.cat([attended_x + x, attended_y + y], dim=1)


class DecoderStep(nn.Module):
    """``merge([refine(up(f)), C^k])``, the same layers at every resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.refine = _reflected_conv(2 * width, 2 * width)
        self.merge = _reflected_conv(4 * width, 2 * width)

    def forward(self, coarse: Tensor, joined: Tensor) -> Tensor:
        """(N, 2 width, h, w), (N, 2 width, 2h, 2w) -> (N, 2 width, 2h, 2w)."""
        up = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        up = F.leaky_relu(self.refine(up), 0.2)
        return F.leaky_relu(self.merge(torch.cat([up, joined], dim=1)), 0.2)


class Output(nn.Module):
    """``tanh(conv1x1 f)``, blocks of pixels from channels."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(2 * width, patch * patch, 1)

    def forward(self, f: Tensor) -> Tensor:
        """(N, 2 width, H / patch, W / patch) -> (N, 1, H, W) in (-1, 1)."""
        f = self.conv(f)
        return torch.tanh(F.pixel_shuffle(f, self.patch) if self.patch > 1 else f)


class Correction(nn.Module):
    """``(a + b) / 2 + s (a - b) / 2 + c``: s = 1 is a, s = -1 is b; c is added.

    s and c come from f and from both pictures: features that have gone through norms do not say
    which picture is the brighter one.

    Args:
        width: channels of the head per modality.
        patch: space-to-depth factor.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.look = BlockConv(2, width, patch=patch)
        self.join = nn.Conv2d(3 * width, 2 * width, 3, padding=1)
        self.conv = nn.Conv2d(2 * width, 2 * patch * patch, 1)

    def forward(self, f: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(N, 2 width, H / patch, W / patch), two (N, 1, H, W) -> (N, 1, H, W) in (-1, 2)."""
        seen = F.leaky_relu(self.look(torch.cat([a, b], dim=1)), 0.2)
        f = f + F.leaky_relu(self.join(torch.cat([f, seen], dim=1)), 0.2)
        added, side = self.conv(f).chunk(2, dim=1)
        if self.patch > 1:
            added, side = (F.pixel_shuffle(y, self.patch) for y in (added, side))
        return (a + b) * 0.5 + torch.tanh(side) * ((a - b) * 0.5) + torch.tanh(added)


class DMFuse(FusionModel):
    """DMFuse; see the module's docstring for sources and deviations.

    Args:
        times: noise levels at which features are taken, 1 to 2000.
        update: "code" (official) or "paper" (attention and sum as in equations 6 to 8).
        seed: of the noise and its levels.
        width: channels of the U-Net's finest level.
        multipliers: width of each level, fine to coarse, in units of the width.
        blocks: residual blocks per level of the U-Net.
        attention: levels (0 is the finest) of the U-Net with self-attention after each block; it
            also stands in the middle.
        groups: GroupNorm groups; must divide every width.
        dropout: dropout in the residual blocks, training only.
        head_width: channels of the fusion head per modality.
        patch: space-to-depth factor of the U-Net and the head (1 in the official network).
        padding: what stands right of and below a picture whose size is no multiple: "white"
            (official) or "reflect".
        residual: whether the head starts from the sources, see :class:`Correction`; officially it
            gives the fused picture.

    Raises:
        SettingError: a setting outside what is allowed.
    """

    channels = "luma"

    def __init__(
        self,
        *,
        times: Sequence[int] = (5, 50, 100),
        update: str = "code",
        seed: int = 0,
        width: int = 32,
        multipliers: Sequence[float] = (1, 2, 4, 8, 8),
        blocks: int = 2,
        attention: Collection[int] = (4,),
        groups: int = 32,
        dropout: float = 0.2,
        head_width: int = 32,
        patch: int = 1,
        padding: Padding = "white",
        residual: bool = False,
    ) -> None:
        super().__init__()
        if update not in ("code", "paper"):
            raise SettingError(f"update={update!r}; expected one of ('code', 'paper')")
        if not times or any(not 1 <= t <= _TIMESTEPS for t in times):
            raise SettingError(f"times={tuple(times)}; expected numbers from 1 to {_TIMESTEPS}")
        if padding not in ("white", "reflect"):
            raise SettingError(f"padding={padding!r}; expected one of ('white', 'reflect')")
        if head_width < 2:
            raise SettingError(f"head_width={head_width}; expected a number >= 2")
        self.times, self.update, self.seed = tuple(times), update, seed
        self.padding, self.residual = padding, residual
        self.table = cosine_schedule(_TIMESTEPS)
        unet = UNet(
            3,
            3,
            width,
            multipliers=multipliers,
            blocks=blocks,
            attention=partial(SelfAttention, groups=groups, bias=False),
            attention_levels=attention,
            groups=groups,
            dropout=dropout,
            patch=patch,
            taps=[(level, 0) for level in range(len(multipliers))],
        )
        time = TimeShifts(
            width, 4 * width, unet.widths, out=width, layout="sin-cos", activate=False
        )
        self.diffusion = Denoiser(unet, time)
        # Neighbouring levels of equal width share an encoder, as 1/8 and 1/16 do in the code.
        widths = [level.blocks[0].conv2.out_channels for level in unet.up]
        self.encoder_of = list(accumulate((w != v for v, w in pairwise(widths)), initial=0))
        distinct = [w for w, _ in groupby(widths)]
        self.encoders = nn.ModuleList(FeatureEncoder(len(times) * w, head_width) for w in distinct)
        self.project = Projections(head_width)
        self.join = Join(learned=update == "code")
        self.decoder = DecoderStep(head_width)
        self.output = (Correction if residual else Output)(head_width, patch)
        # Reflection at the coarsest level needs two pixels there; the public code pads to 32.
        self.multiple = math.lcm(32, 2 * unet.multiple)
        self.stages = (
            "diffusion.time",
            "diffusion.unet",
            *(f"encoders.{i}" for i in range(len(distinct))),
            "project",
            "join",
            "decoder",
            "output",
        )

    def noise_names(self) -> list[str]:
        """Names of the random numbers of one forward: a level and a noise per picture and time."""
        return [
            f"{kind}_{source}_t{t}"
            for source in _SOURCES
            for t in self.times
            for kind in ("level", "noise")
        ]

    def forward(self, a: Tensor, b: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """Fuse a pair.

        Args:
            a: infrared, (N, 1, H, W) in [0, 1], of any size.
            b: luma of the visible picture, likewise.
            noise: ``level_ir_t5`` (N,), the noise level c, ``noise_ir_t5`` (N, 3, H, W) at the
                padded size, and so on; see :meth:`noise_names`.

        Returns:
            (N, 1, H, W) in [0, 1].

        Raises:
            FrameError, SizeMismatchError: pictures that cannot be used.
            SettingError: noise of another name or shape.
        """
        first, second = self.prepare(a, b)
        return crop_like(self.fuse(first, second, noise), a).clamp(0.0, 1.0)

    def fuse(self, a: Tensor, b: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """The fused picture for pictures whose sides are multiples of ``multiple``.

        In (-1, 1), or with ``residual`` less than 1 from what lies between the sources.
        """
        draws = Draws(self.noise_names(), noise, self.seed)
        encoded_a, encoded_b = (
            [self.encoders[i](f) for i, f in zip(self.encoder_of, features, strict=True)]
            for features in (self.features(a, "ir", draws), self.features(b, "vi", draws))
        )
        joined = [self.exchange(x, y) for x, y in zip(encoded_a, encoded_b, strict=True)]
        f = joined[-1]
        for level in reversed(joined[:-1]):
            f = self.decoder(f, level)
        return self.output(f, a, b) if self.residual else self.output(f)

    def features(self, picture: Tensor, source: str, draws: Draws) -> list[Tensor]:
        """F^k: decoder features of all noise levels side by side, per resolution, fine to coarse.

        Args:
            picture: (N, 1, H, W) in [0, 1].
            source: "ir" or "vi", for the names of the random numbers.
            draws: where they come from.
        """
        x = picture * 2.0 - 1.0
        x = torch.cat([x, x, x], dim=1)
        found = []
        for t in self.times:
            low, high = float(self.table[t]) ** 0.5, float(self.table[t - 1]) ** 0.5
            level = draws.uniform(f"level_{source}_t{t}", low, high, x)
            noisy = diffuse(x, draws.normal(f"noise_{source}_t{t}", x), level)
            made = self.diffusion(noisy, level)
            found.append([made[1 + k] for k in range(len(self.encoder_of))])
        return [torch.cat(maps, dim=1) for maps in zip(*found, strict=True)]

    def exchange(self, x: Tensor, y: Tensor) -> Tensor:
        """C^k: both modalities' features with what the other one's queries found in them."""
        query_x, key_x, value_x = self.project(x)
        query_y, key_y, value_y = self.project(y)
        if self.update == "paper":
            attended_x = criss_cross_attention(key_x, query_y, value_x)
            attended_y = criss_cross_attention(key_y, query_x, value_y)
        else:
            attended_x = criss_cross_attention(query_y, key_x, value_x)
            attended_y = criss_cross_attention(query_x, key_y, value_y)
        return self.join(x, attended_x, y, attended_y)

    @property
    def official_ignored(self) -> tuple[str, ...]:
        """Entries of official files that take no part: schedules, layers that never run."""
        schedules = ("betas", "*alphas_cumprod*", "sqrt_recip*", "posterior_*")
        unused = ("conv_in[2345].*", "conv_t[23].*")
        return (*schedules, *unused, *(("crossatten.gamma",) if self.join.gamma is None else ()))

    def official_parts(self) -> dict[str, dict[str, Official]]:
        """For each official file (diffusion, head): own name -> where it stands in it."""
        return {"diffusion": self._diffusion_names(), "head": self._head_names()}

    def _diffusion_names(self) -> dict[str, Official]:
        unet = self.diffusion.unet
        names: dict[str, Official] = {}
        projections: list[str] = []

        def put(own: str, official: str, kinds: Sequence[str] = ("weight", "bias")) -> None:
            for kind in kinds:
                names[f"diffusion.{own}.{kind}"] = Official((f"denoise_fn.{official}.{kind}",))

        def put_block(own: str, official: str, block: ResidualBlock) -> None:
            for layer, place in (("norm1", "block1.block.0"), ("conv1", "block1.block.3")):
                put(f"{own}.{layer}", f"{official}.res_block.{place}")
            for layer, place in (("norm2", "block2.block.0"), ("conv2", "block2.block.3")):
                put(f"{own}.{layer}", f"{official}.res_block.{place}")
            if isinstance(block.shortcut, nn.Conv2d):
                put(f"{own}.shortcut", f"{official}.res_block.res_conv")
            projections.append(f"{official}.res_block.noise_func.noise_func.0")

        def put_path(path: str, official: str, levels: Sequence[tuple[int, nn.Module]]) -> None:
            index = 0
            for i, level in levels:
                for j, block in enumerate(level.blocks):
                    own = f"unet.{path}.{i}" if path != "middle" else "unet.middle"
                    put_block(f"{own}.blocks.{j}", f"{official}.{index}", block)
                    if j < len(level.attention):
                        attention = f"{own}.attention.{j}"
                        put(f"{attention}.norm", f"{official}.{index}.attn.norm")
                        put(f"{attention}.qkv", f"{official}.{index}.attn.qkv", ["weight"])
                        put(f"{attention}.out", f"{official}.{index}.attn.out")
                    index += 1
                if level.resample is not None:
                    put(f"unet.{path}.{i}.resample", f"{official}.{index}.conv")
                    index += 1

        put("unet.stem.conv", "init_conv")
        put_path("down", "downs", list(enumerate(unet.down)))
        put_path("middle", "mid", [(0, unet.middle)])
        put_path("up", "ups", list(enumerate(unet.up))[::-1])
        put("unet.norm", "final_conv.block.0")
        put("unet.head", "final_conv.block.3")
        put("time.embed.0", "noise_level_mlp.1")
        put("time.embed.2", "noise_level_mlp.3")
        for i, official in enumerate(projections):
            put(f"time.project.{i}", official)
        return names

    def _head_names(self) -> dict[str, Official]:
        places = {
            "decoder.refine": "conv_in1.conv2d",
            "decoder.merge": "conv_t4.conv2d",
            "output.conv": "conv_t1.conv1.conv2d",
            "project.query": "crossatten.query_conv",
            "project.key": "crossatten.key_conv",
            "project.value": "crossatten.value_conv",
        }
        for i in range(len(self.encoders)):
            places[f"encoders.{i}.conv"] = f"en{i}.conv1.conv2d"
            gate = f"en{i}.ChannelSpatialSELayer"
            places[f"encoders.{i}.gate.squeeze"] = f"{gate}.cSE.fc1"
            places[f"encoders.{i}.gate.excite"] = f"{gate}.cSE.fc2"
            places[f"encoders.{i}.gate.spatial"] = f"{gate}.sSE.conv"
        names = {
            f"{own}.{kind}": Official((f"{official}.{kind}",))
            for own, official in places.items()
            for kind in ("weight", "bias")
        }
        if self.join.gamma is not None:
            names["join.gamma"] = Official(("crossatten.gamma",))
        return names
