"""DRFusion: degradation-robust fusion with a joint observation model.

Three quantities are denoised together: both sources and the fused image, x = [x1; x2; f]. One
network predicts their noise and a weight map m; each sampling step estimates x0, corrects it with
the joint observation model ``f = m x1 + (1 - m) x2, y_i = A_i x_i`` and goes one DDIM step back.
No random number is used.

Source: "Degradation-Robust Fusion: An Efficient Degradation-Aware Diffusion Framework for
Multimodal Image Fusion in Arbitrary Degradation Scenarios" (equations 6 to 19) and the public code
YShi-cool/DRFusion. Where they differ:

* the code's correction of f subtracts the observations and uses the corrected sources; equal to the
  paper's for lambda = 1 (``update="code"``, the default, because users' checkpoints were trained
  with it, against ``update="paper"``, equation 19);
* the code's lambda is 3.3e-5 at the last step, so the last estimate stands as the network made it;
  the paper corrects every step. ``update="paper"`` does so.

Sizes ``-m`` and ``-s`` are this project's: narrower, working on 2x2 pixel blocks as channels
(space to depth), and without the last step's 3.3e-5 correction, so that the weight-map decoder
need not run there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.errors import SettingError
from fuseengine.kernels import ddim_step, joint_ddim_step
from fuseengine.models.base import FusionModel
from fuseengine.models.layers import (
    ChannelSpatialGate,
    ResidualBlock,
    TimeShifts,
    split_channels,
)
from fuseengine.models.observation import Identity, Operator, correct_jointly
from fuseengine.models.pictures import crop_like
from fuseengine.models.sampling import Step

_LEVELS = (1, 2, 4, 8)
"""Width multipliers. Gated skips are added, not concatenated, so widths must double per level."""


class Decoder(nn.Module):
    """Upward path with gated skips added at each level, and its head.

    Args:
        width: channels of the finest level.
        out: channels of the head's result.
        blocks: residual blocks per level.
        groups: GroupNorm groups.
        dropout: probability in the residual blocks.
    """

    def __init__(self, width: int, out: int, *, blocks: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.gates = nn.ModuleList(ChannelSpatialGate(width * m) for m in _LEVELS)
        # From level 3 to 2 the width halves at equal size; then three up-steps to full size.
        widths = [width * m for m in (8, 4, 2, 1, 1)]
        self.levels = nn.ModuleList(
            nn.ModuleList(
                ResidualBlock(coarse if i == 0 else fine, fine, groups=groups, dropout=dropout)
                for i in range(blocks)
            )
            for coarse, fine in pairwise(widths)
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(w, w, 3, stride=2, padding=1, output_padding=1) for w in widths[2:]
        )
        self.norm = nn.GroupNorm(groups, width)
        self.head = nn.Conv2d(width, out, 3, padding=1)

    def block_widths(self) -> list[int]:
        """Output channels of each residual block in the order of use."""
        return [block.conv2.out_channels for level in self.levels for block in level]

    def forward(self, middle: Tensor, skips: Sequence[Tensor], shifts: Sequence[Tensor]) -> Tensor:
        """Middle features, four skips (fine to coarse), a shift per block -> (N, out, H, W)."""
        shift = iter(shifts)
        h = middle + self.gates[3](skips[3])
        for i, level in enumerate(self.levels):
            for block in level:
                h = block(h, next(shift))
            if i > 0:
                h = self.ups[i - 1](h)
            if i < 3:
                skip = skips[2 - i]
                # Down-steps round sizes up, so an up-step may give one row or column too many.
                h = h[:, :, : skip.shape[2], : skip.shape[3]] + self.gates[2 - i](skip)
        return self.head(F.silu(self.norm(h)))


class NoisePredictor(nn.Module):
    """The U-Net with two decoders: noise of [x1, x2, f] and the weight map.

    Args:
        width: channels of the finest level (64 in the official network).
        blocks: residual blocks per level (2).
        groups: GroupNorm groups (32).
        dropout: probability, training only (0.1).
        patch: space-to-depth factor at the input and depth-to-space at the heads (1 = none).
    """

    def __init__(
        self, width: int, *, blocks: int, groups: int, dropout: float, patch: int = 1
    ) -> None:
        super().__init__()
        self.patch = patch
        make: dict[str, Any] = {"groups": groups, "dropout": dropout}
        self.stem = nn.Conv2d(3 * patch * patch, width, 3, padding=1)
        self.down_levels = nn.ModuleList()
        channels = width
        for multiplier in _LEVELS:
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(ResidualBlock(channels, width * multiplier, **make))
                channels = width * multiplier
            self.down_levels.append(level)
        self.downs = nn.ModuleList(
            nn.Conv2d(width * m, width * m, 3, stride=2, padding=1) for m in _LEVELS[:-1]
        )
        self.middle = nn.ModuleList(ResidualBlock(channels, channels, **make) for _ in range(2))
        self.noise = Decoder(width, 3 * patch * patch, blocks=blocks, **make)
        self.weight = Decoder(width, patch * patch, blocks=blocks, **make)
        self.widths = [
            *(b.conv2.out_channels for level in self.down_levels for b in level),
            *(b.conv2.out_channels for b in self.middle),
            *self.noise.block_widths(),
            *self.weight.block_widths(),
        ]

    def forward(self, x: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the noise and the weight map.

        Args:
            x: (N, 3, H, W): noisy source 1, source 2 and fused image. H, W multiples of 2 * patch.
            shifts: (1 or N, sum(self.widths)) from :class:`TimeShifts`.

        Returns:
            noise (N, 3, H, W) and weights (N, 1, H, W) in (0, 1).
        """
        shift = split_channels(shifts, self.widths)
        n = len(self.noise.block_widths())
        trunk, noise_shifts, weight_shifts = iter(shift[: -2 * n]), shift[-2 * n : -n], shift[-n:]
        h = self.stem(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = []
        for i, level in enumerate(self.down_levels):
            for block in level:
                h = block(h, next(trunk))
            if i < len(self.downs):
                h = self.downs[i](h)
            skips.append(h)
        for block in self.middle:
            h = block(h, next(trunk))
        eps = self.noise(h, skips, noise_shifts)
        logit = self.weight(h, skips, weight_shifts)
        if self.patch > 1:
            eps, logit = F.pixel_shuffle(eps, self.patch), F.pixel_shuffle(logit, self.patch)
        return eps, torch.sigmoid(logit)


@dataclass(frozen=True)
class JointStep(Step):
    """A sampling step with the scale lambda of its correction."""

    lam: float | Tensor


class DRFusion(FusionModel):
    """DRFusion with its sampler; see the module's docstring for sources and deviations.

    Args:
        width: channels of the finest level.
        blocks: residual blocks per level.
        groups: GroupNorm groups; must divide width.
        dropout: dropout in the residual blocks, training only.
        patch: space-to-depth factor (1 in the official network).
        steps: sampling steps T; as many alphas are learned.
        update: "code" (official) or "paper" (equation 19 at every step).
        operators: degradation operators (A1, A2) of the two sources; others than identity need
            update="paper", which is then the default.
        sigma_y: noise level of the observations, in the range [0, 1] of the images.
        correct_last: whether the last step's estimate is corrected: in the code's form by
            lambda = 3.3e-5, under half a grey level; the paper's form always does.

    Raises:
        SettingError: a setting outside what is allowed.
    """

    channels = "luma"
    stages = ("time", "unet")

    def __init__(
        self,
        *,
        width: int = 64,
        blocks: int = 2,
        groups: int = 32,
        dropout: float = 0.1,
        patch: int = 1,
        steps: int = 3,
        update: str | None = None,
        operators: tuple[Operator, Operator] | None = None,
        sigma_y: float | None = None,
        correct_last: bool = True,
    ) -> None:
        super().__init__()
        degraded = operators is not None and any(not isinstance(o, Identity) for o in operators)
        update = update or ("paper" if degraded else "code")
        if update not in ("code", "paper"):
            raise SettingError(f"update={update!r}; expected 'code' or 'paper'")
        if degraded and update == "code":
            raise SettingError(
                "update='code' knows identity operators only (the official code has no others); "
                "use update='paper' with degradation operators"
            )
        if min(steps, width, groups, blocks, patch) < 1 or width % groups:
            raise SettingError(
                f"steps={steps}, width={width}, groups={groups}, blocks={blocks}, patch={patch}; "
                "expected each >= 1, and groups to divide width"
            )
        self.steps, self.update = steps, update
        self.correct_last = correct_last or update == "paper"
        self.sigma_y = (0.03 if update == "code" else 0.0) if sigma_y is None else sigma_y
        self.operators = nn.ModuleList(operators or (Identity(), Identity()))
        self.multiple = math.lcm(2 * patch, *(o.multiple for o in self.operators))
        self.alpha = nn.Parameter(torch.full((steps,), 0.5))
        self.unet = NoisePredictor(
            width, blocks=blocks, groups=groups, dropout=dropout, patch=patch
        )
        self.time = TimeShifts(width, 4 * width, self.unet.widths)

    def schedule(self) -> list[JointStep]:
        """The steps t = T .. 1 with their coefficients (the official code's ``Net`` and ``Step``).

        abar_t = alpha_1 ... alpha_t; lambda_t = min(1, sigma_t / (a_t sigma_y)) with
        sigma_t^2 = beta_t (1 - abar_{t-1}) / (1 - abar_t),
        a_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t) and 1e-12 as the floor under every root and
        division.

        Returns:
            Python numbers computed in float64; while training, 0-d tensors that carry gradients.
        """
        tiny = 1e-12
        learn = self.training and torch.is_grad_enabled()
        alpha = self.alpha if learn else self.alpha.detach().double().cpu()
        abar = torch.cat([alpha.new_ones(1), alpha.cumprod(0)])
        steps = []
        for t in range(self.steps, 0, -1):
            now, prev = abar[t], abar[t - 1]
            beta = 1 - now / prev.clamp_min(tiny)
            rest = (1 - now).clamp_min(tiny)
            sigma = (beta * (1 - prev) / rest).clamp_min(tiny).sqrt()
            reach = prev.clamp_min(tiny).sqrt() * beta / rest * self.sigma_y
            lam = torch.where(sigma >= reach, 1.0, sigma / reach.clamp_min(tiny))
            values = [v.clamp_min(tiny).sqrt() for v in (now, 1 - now, prev, 1 - prev)] + [lam]
            if not learn:
                values = [float(v) for v in values]
            if t == 1 and not self.correct_last:
                values[-1] = 0.0
            steps.append(JointStep(t, *values))
        return steps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Fuse a pair.

        Args:
            a: source 1 (infrared), (N, 1, H, W) in [0, 1], of any size.
                A low-resolution source (operator :class:`Downsample`) comes enlarged to it.
            b: source 2 (luma of the visible image), likewise.

        Returns:
            The fused image (N, 1, H, W), clamped to [0, 1].
        """
        fused = self.sample(*self.prepare(a, b))[:, 2:3].clamp(0.0, 1.0)
        return crop_like(fused, a)

    def sample(self, a: Tensor, b: Tensor) -> Tensor:
        """The joint estimate x_0 = [source 1, source 2, fused], (N, 3, H, W), not clamped.

        Height and width must be multiples of ``self.multiple``.
        """
        schedule = self.schedule()
        first, second = self.operators
        y1, y2 = first.observed(a), second.observed(b)
        x = torch.cat([a, b, (a + b) * 0.5], dim=1) * schedule[0].sqrt_abar
        degraded = not all(isinstance(operator, Identity) for operator in self.operators)
        for step in schedule:
            eps, m = self.unet(x, self.time(step.t))
            if degraded:
                x0 = (x - eps * step.sqrt_one_minus_abar) * (1.0 / step.sqrt_abar)
                x0 = correct_jointly(x0, m, y1, y2, first, second, lam=step.lam)
                x = x0 * step.sqrt_abar_prev + eps * step.sqrt_one_minus_abar_prev
            elif step.lam == 0.0:  # nothing is corrected, so the weight map is not needed
                x = ddim_step(x, eps, *step.scales())
            else:
                x = joint_ddim_step(x, eps, m, a, b, *step.scales(), step.lam, form=self.update)
        return x

    official_ignored = ("input_help_scale_factor", "merge_scale_factor")
    """Entries of official checkpoints that take no part in the computation."""

    def official_names(self) -> dict[str, str]:
        """Own parameter name -> name in the official checkpoint (module ``Net``)."""
        unet = self.unet
        names = {"alpha": "alpha"}

        def put(own: str, official: str) -> None:
            for kind in ("weight", "bias"):
                names[f"{own}.{kind}"] = f"{official}.{kind}"

        time_slots: list[str] = []

        def put_block(own: str, official: str, block: ResidualBlock) -> None:
            for part, place in (
                ("norm1", "conv1.0"),
                ("conv1", "conv1.2"),
                ("norm2", "conv2.0"),
                ("conv2", "conv2.3"),
            ):
                put(f"{own}.{part}", f"{official}.0.{place}")
            if isinstance(block.shortcut, nn.Conv2d):
                put(f"{own}.shortcut", f"{official}.0.shortcut")
            time_slots.append(f"{official}.0.time_emb.1")

        put("unet.stem", "unet.inBlock")
        index = 0
        for i, level in enumerate(unet.down_levels):
            for j, block in enumerate(level):
                put_block(f"unet.down_levels.{i}.{j}", f"unet.downBlock.{index}", block)
                index += 1
            if i < len(unet.downs):
                put(f"unet.downs.{i}", f"unet.downBlock.{index}.0.op")
                index += 1
        for i, block in enumerate(unet.middle):
            put_block(f"unet.middle.{i}", f"unet.middleBlock.{i}", block)
        for own, path, gates, head in (
            ("noise", "upBlock", "attention_block", "outBlock"),
            ("weight", "fusionBlock", "attention_block_1", "fusion_outBlock"),
        ):
            decoder = getattr(unet, own)
            index = 0
            for i, level in enumerate(decoder.levels):
                for j, block in enumerate(level):
                    put_block(f"unet.{own}.levels.{i}.{j}", f"unet.{path}.{index}", block)
                    index += 1
                if i > 0:
                    put(f"unet.{own}.ups.{i - 1}", f"unet.{path}.{index}.0.op")
                    index += 1
            for i in range(len(decoder.gates)):
                for part, place in (("squeeze", "fc1"), ("excite", "fc2"), ("spatial", "conv")):
                    put(f"unet.{own}.gates.{i}.{part}", f"unet.{gates}.{i}.{place}")
            put(f"unet.{own}.norm", f"unet.{head}.0")
            put(f"unet.{own}.head", f"unet.{head}.2")
        for i in (0, 2):
            put(f"time.embed.{i}", f"unet.time_embed.{i}")
        for i, official in enumerate(time_slots):
            put(f"time.project.{i}", official)
        return names
