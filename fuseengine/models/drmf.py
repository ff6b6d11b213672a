"""DRMF: degradation-robust fusion by composing the diffusion priors of two modalities.

Each modality has its own restoration network (DRCDM): a conditional diffusion model that denoises
x_t given the degraded picture of that modality. Fusion runs both on one sample x_t; at each step a
small network (DPCM) weighs the two noise estimates per pixel, and one step of DDIM is taken with
the weighted noise:

    e_A = UNet_A([y_A, x_t], t),  e_B = UNet_B([y_B, x_t], t)
    x0_A = (x_t - sqrt(1 - abar_t) e_A) / sqrt(abar_t)
    w    = 1/2 at the first step, then phi([k, x0_A, w of the step before])
    e    = w e_A + (1 - w) e_B
    x0   = (x_t - sqrt(1 - abar_t) e) / sqrt(abar_t)
    x_t' = sqrt(abar_t') x0

with k the x0_A of the second step; the last step shows phi the x0_A of the step before instead of
its own. Medical pairs have one weight for all steps, w = phi([x0_A, x0_A, -1]) at the first.

Source: Tang et al., "DRMF: Degradation-Robust Multi-Modal Image Fusion via Composable Diffusion
Prior", ACM MM 2024 (equations 9 and 10), and the public code Linfeng-Tang/DRMF. Where they differ
the code is followed, because users' checkpoints were trained with it:

* the paper's step adds sqrt(1 - abar_t') e (equation 9); the code leaves it out in every fusion
  sampler, training included. ``update="paper"`` adds it;
* the paper's phi sees x_t^f and each x0 and gives a softmax over modalities; the code's is as
  above, its time input is always 1. No checkpoint has the paper's form;
* the code's result is stretched to [0, 1] per picture and channel, which can shift colours, and
  the paper says nothing of it. ``scaling="clamp"`` maps [-1, 1] to [0, 1] instead, as restoration
  does;
* the code's inference loads the plain weights; :func:`~fuseengine.load_checkpoint` takes the
  averaged copy (``ema=False`` for the plain ones). The code cannot write pictures whose width is no
  multiple of 16; here any size works, padded by reflection.

Parameters: two restoration networks of 82,962,435 and a weight network of 5,058,946, together
170,983,816.

``drmf-s`` is this project's: narrower, on 2x2 blocks of pixels as channels (the weight network on
4x4), attention in the middle only; 2,107,825 parameters, 103 GFLOP for a 640x480 pair. Its networks
predict the clean picture as a correction of the degraded one (``predict="clean"``): a few channels
cannot carry the noise of every pixel through a network, and an error of the noise at abar = 0.0015
is an error 26 times as large of the picture. Its step is the paper's, so that the networks see in
sampling what they saw in training, and its result is not stretched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.errors import SettingError
from fuseengine.kernels import compose_priors
from fuseengine.models.base import FusionModel
from fuseengine.models.checkpoint import Official
from fuseengine.models.layers import BlockConv, SelfAttention, TimeShifts
from fuseengine.models.pictures import crop_like, stretch
from fuseengine.models.sampling import (
    Draws,
    Step,
    linear_schedule,
    make_steps,
    predict_noise,
    predict_x0,
    sample_ddim,
    spaced_timesteps,
)
from fuseengine.models.unet import ConditionedDenoiser, ConditionedUNet, Denoiser, UNet

TASKS = ("infrared-visible", "medical", "restore")
_TIMESTEPS = 1000
_EPS = 1e-6
_EDGE_LEVEL = 2
"""Level of the weight network's decoder on whose features the edge head works."""


class WeightUNet(UNet):
    """DPCM: the weight of the first modality, and edges that only training looks at.

    LeakyReLU in place of SiLU, skips at the coarse levels only.
    """

    def __init__(self, width: int, *, multipliers: Sequence[float], **settings: Any) -> None:
        blocks = settings["blocks"]
        super().__init__(
            7,
            1,
            width,
            multipliers=multipliers,
            activation=F.leaky_relu,
            concat_levels=range(_EDGE_LEVEL, len(multipliers)),
            taps=((_EDGE_LEVEL, blocks),),
            **settings,
        )
        features = self.up[_EDGE_LEVEL].blocks[-1].conv2.out_channels
        self.edge = nn.Conv2d(features, 1, 3, padding=1)

    def forward(self, x: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """[k, x0, w] (N, 7, H, W) and shifts -> weight and edges, (N, 1, H, W) in [0, 1]."""
        logit, features = super().forward(x, shifts)
        edge = F.interpolate(
            self.edge(features),
            scale_factor=float(self.patch * 2**_EDGE_LEVEL),
            mode="bilinear",
            align_corners=True,
        )
        return (torch.tanh(logit) + 1.0) * 0.5, torch.sigmoid(edge)


class DRMF(FusionModel):
    """DRMF with its samplers; see the module's docstring for sources and deviations.

    Args:
        task: "infrared-visible" (a infrared, b visible), "medical" (a CT, b MRI: one weight for all
            steps), or "restore" (a alone is restored by ``infrared``, the only network; b is not
            looked at).
        steps: sampling steps S, evaluated at ``range(0, 1000, 1000 // S)``; an S that does not
            divide 1000 is evaluated once or more too often, as in the code. 5, for restoration 20.
        update: "code" (official) or "paper" (with the noise-direction term of equation 9).
        predict: what the restoration networks say: "noise" (official), or "clean": the clean
            picture less the degraded one.
        scaling: "min-max" (official, per picture and channel) or "clamp".
        seed: of the starting noise.
        width: channels of the restoration networks' finest level.
        weight_width: of the weight network's.
        multipliers: width of each level, fine to coarse, in units of the width.
        blocks: residual blocks per level.
        attention: levels (0 is the finest) with self-attention after each block; it also stands
            in the middle.
        groups: GroupNorm groups; must divide every width.
        dropout: dropout in the residual blocks, training only.
        patch: space-to-depth factor of the restoration networks (1 in the official ones).
        weight_patch: of the weight network.

    Raises:
        SettingError: a setting outside what is allowed.
    """

    channels = "rgb"

    def __init__(
        self,
        *,
        task: str = "infrared-visible",
        steps: int | None = None,
        update: str = "code",
        predict: str = "noise",
        scaling: str = "min-max",
        seed: int = 0,
        width: int = 128,
        weight_width: int = 32,
        multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks: int = 2,
        attention: Collection[int] = (2,),
        groups: int = 32,
        dropout: float = 0.0,
        patch: int = 1,
        weight_patch: int = 1,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("task", task, TASKS),
            ("update", update, ("code", "paper")),
            ("predict", predict, ("noise", "clean")),
            ("scaling", scaling, ("min-max", "clamp")),
        ):
            if given not in known:
                raise SettingError(f"{name}={given!r}; expected one of {known}")
        if len(multipliers) <= _EDGE_LEVEL:
            raise SettingError(f"multipliers={tuple(multipliers)}; expected at least three levels")
        self.task, self.update, self.predict = task, update, predict
        self.scaling, self.seed = scaling, seed
        self.steps = (20 if task == "restore" else 5) if steps is None else steps
        self.table = linear_schedule(_TIMESTEPS)
        self.schedule()  # refuses a number of steps that cannot be
        networks: dict[str, Any] = {
            "multipliers": multipliers,
            "blocks": blocks,
            "attention": partial(SelfAttention, groups=groups, eps=_EPS),
            "attention_levels": attention,
            "groups": groups,
            "eps": _EPS,
            "dropout": dropout,
            "down_padding": "after",
        }

        def time(width: int, unet: UNet) -> TimeShifts:
            return TimeShifts(width, 4 * width, unet.widths, layout="sin-cos", reach_max=True)

        def restoration() -> ConditionedDenoiser:
            unet = ConditionedUNet(3, 3, width, patch=patch, **networks)
            condition = BlockConv(3, width, patch=patch, bias=False)
            return ConditionedDenoiser(unet, time(width, unet), condition)

        self.infrared = restoration()
        networks_used: list[Denoiser] = [self.infrared]
        if task != "restore":
            self.visible = restoration()
            unet = WeightUNet(weight_width, patch=weight_patch, **networks)
            self.weight = Denoiser(unet, time(weight_width, unet))
            networks_used += [self.visible, self.weight]
        # The public code pads to 16 although its networks would be content with 8.
        self.multiple = max(16, *(network.unet.multiple for network in networks_used))

        restoration_stages = ("condition", "time", "unet")
        self.stages = tuple(f"infrared.{stage}" for stage in restoration_stages)
        if task != "restore":
            self.stages += tuple(f"visible.{stage}" for stage in restoration_stages)
            self.stages += ("weight.time", "weight.unet")

    def schedule(self, steps: int | None = None) -> list[Step]:
        """The sampling steps; ``self.steps`` of them by default.

        Raises:
            SettingError: steps outside 1..1000.
        """
        steps = self.steps if steps is None else steps
        return make_steps(self.table, spaced_timesteps(_TIMESTEPS, steps))

    def forward(
        self, a: Tensor, b: Tensor | None = None, noise: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Fuse a pair (or restore a, see ``task``).

        Args:
            a: source A, (N, 3, H, W) or (N, 1, H, W) in [0, 1], of any size.
            b: source B, likewise; may be left out by a model that restores.
            noise: ``x_T``, the starting noise (N, 3, H, W) at the padded size.

        Returns:
            (N, 3, H, W) in [0, 1].

        Raises:
            FrameError, SizeMismatchError: pictures that cannot be used.
            SettingError: noise of another name or shape.
        """
        if self.task == "restore":
            return self.restore(a, noise=noise)
        if b is None:
            raise SettingError(f"task={self.task!r} fuses two pictures; got one: give b")
        first, second = self.prepare(a, b)
        x = crop_like(self.sample(first, second, noise), a)
        return stretch(x) if self.scaling == "min-max" else (x * 0.5 + 0.5).clamp(0.0, 1.0)

    def sample(
        self,
        a: Tensor,
        b: Tensor,
        noise: Mapping[str, Tensor] | None = None,
        *,
        watch: Callable[[Tensor, Tensor, Tensor, Tensor, Step], None] | None = None,
    ) -> Tensor:
        """The composed prior's x_0, (N, 3, H, W), about [-1, 1], not clamped.

        Takes pictures (N, 3, H, W) in [0, 1] whose sides are multiples of ``self.multiple``.
        ``watch`` is called at every step with what :meth:`compose` gets (training looks at it).
        """
        schedule = self.schedule()
        a, b = a * 2.0 - 1.0, b * 2.0 - 1.0
        hint_a, hint_b = self.infrared.condition(a), self.visible.condition(b)
        x = Draws(("x_T",), noise, self.seed).normal("x_T", a)
        flat = torch.full_like(x[:, :1], 0.5)
        clean: list[Tensor] = []
        for n, step in enumerate(schedule):
            prior_a = self.prior(self.infrared, x, step, a, hint_a)
            prior_b = self.prior(self.visible, x, step, b, hint_b)
            clean.append(prior_a if self.predict == "clean" else predict_x0(x, prior_a, step))
            if self.task == "medical":
                if n == 0:
                    w = self.weigh(clean[0], clean[0], torch.full_like(flat, -1.0))
            elif n == 0:
                w = flat
            else:
                late = n == len(schedule) - 1
                w = self.weigh(clean[1], clean[n - 1 if late else n], w)
            if watch is not None:
                watch(x, prior_a, prior_b, w, step)
            x = self.compose(x, prior_a, prior_b, w, step)
        return x

    def prior(
        self, network: nn.Module, x: Tensor, step: Step, picture: Tensor, hint: Tensor
    ) -> Tensor:
        """What a restoration network says: the noise, or the clean picture (``predict``)."""
        made = network(x, step.t, hint)
        return made + picture if self.predict == "clean" else made

    def compose(
        self, x: Tensor, prior_a: Tensor, prior_b: Tensor, weight: Tensor, step: Step
    ) -> Tensor:
        """One step back with weighted priors; weighing x0 is weighing the noise."""
        priors = (prior_a, prior_b, weight)
        if self.predict == "noise":
            return compose_priors(x, *priors, *step.scales(), form=self.update)
        rest, abar, rest_prev, abar_prev = step.scales_of_x0()
        # With roles exchanged the code's missing term is the one of x.
        kept = rest_prev if self.update == "paper" else 0.0
        return compose_priors(x, *priors, rest, abar, kept, abar_prev, form="paper")

    def weigh(self, kept: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
        """DPCM: the weight (N, 1, H, W) of A from two estimates of it and the weight before."""
        return self.weight(torch.cat([kept, x0, weight], dim=1), 1)[0]

    def restore(
        self,
        picture: Tensor,
        modality: Literal["infrared", "visible"] = "infrared",
        *,
        steps: int | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Restore one modality's pictures by its network alone (DRCDM, plain DDIM).

        Args:
            picture: (N, 3, H, W) or (N, 1, H, W) in [0, 1], of any size.
            modality: which network.
            steps: sampling steps; the model's own for ``task="restore"``, else 20.
            noise: ``x_T``, the starting noise at the padded size.

        Returns:
            (N, 3, H, W) in [0, 1].
        """
        network = getattr(self, modality, None)
        if not isinstance(network, ConditionedDenoiser):
            raise SettingError(f"modality={modality!r}; this model has no such restoration network")
        if steps is None:
            steps = self.steps if self.task == "restore" else 20
        (padded,) = self.prepare(picture)
        padded = padded * 2.0 - 1.0
        hint = network.condition(padded)

        def noise_in(x: Tensor, step: Step) -> Tensor:
            prior = self.prior(network, x, step, padded, hint)
            return predict_noise(x, prior, step) if self.predict == "clean" else prior

        x = Draws(("x_T",), noise, self.seed).normal("x_T", padded)
        x = sample_ddim(noise_in, x, self.schedule(steps))
        return (crop_like(x, picture) * 0.5 + 0.5).clamp(0.0, 1.0)

    def official_parts(self) -> dict[str, dict[str, Official]]:
        """For each official file (infrared, visible, weight): own name -> where it stands in it."""
        return {
            part: _official_names(part, getattr(self, part))
            for part in ("infrared", "visible", "weight")
            if hasattr(self, part)
        }


def _official_names(part: str, network: Denoiser) -> dict[str, Official]:
    """Own name -> name in a file of the public code (``DiffusionUNet`` or ``WeightUNet``)."""
    unet = network.unet
    names: dict[str, Official] = {}
    projections: list[str] = []

    def put(own: str, *official: str) -> None:
        for kind in ("weight", "bias"):
            names[f"{part}.{own}.{kind}"] = Official(tuple(f"{o}.{kind}" for o in official))

    def put_block(own: str, official: str, block: nn.Module) -> None:
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{own}.{layer}", f"{official}.{layer}")
        if isinstance(block.shortcut, nn.Conv2d):
            put(f"{own}.shortcut", f"{official}.nin_shortcut")
        projections.append(f"{official}.temb_proj")

    def put_attention(own: str, official: str) -> None:
        put(f"{own}.norm", f"{official}.norm")
        put(f"{own}.qkv", *(f"{official}.{layer}" for layer in "qkv"))
        put(f"{own}.out", f"{official}.proj_out")

    def put_level(own: str, official: str, level: nn.Module, step: str) -> None:
        for j, block in enumerate(level.blocks):
            put_block(f"{own}.blocks.{j}", f"{official}.block.{j}", block)
        for j in range(len(level.attention)):
            put_attention(f"{own}.attention.{j}", f"{official}.attn.{j}")
        if level.resample is not None:
            put(f"{own}.resample", f"{official}.{step}.conv")

    put("unet.stem.conv", "conv_in")
    if isinstance(network, ConditionedDenoiser):
        # The official first convolution sees [condition, x]; here each has its own.
        ours = unet.stem.conv.in_channels
        theirs = network.condition.conv.in_channels
        both = ours + theirs
        names[f"{part}.condition.conv.weight"] = Official(("conv_in.weight",), (0, theirs, both))
        names[f"{part}.unet.stem.conv.weight"] = Official(("conv_in.weight",), (theirs, both, both))
    for i, level in enumerate(unet.down):
        put_level(f"unet.down.{i}", f"down.{i}", level, "downsample")
    for j, block in enumerate(unet.middle.blocks):
        put_block(f"unet.middle.blocks.{j}", f"mid.block_{j + 1}", block)
    put_attention("unet.middle.attention.0", "mid.attn_1")
    for i, level in reversed(list(enumerate(unet.up))):
        put_level(f"unet.up.{i}", f"up.{i}", level, "upsample")
    put("unet.norm", "norm_out")
    if isinstance(unet, WeightUNet):
        put("unet.head", "conv_out.0")
        put("unet.edge", "edge_head.0")
    else:
        put("unet.head", "conv_out")
    put("time.embed.0", "temb.dense.0")
    put("time.embed.2", "temb.dense.1")
    for i, official in enumerate(projections):
        put(f"time.project.{i}", official)
    return names
