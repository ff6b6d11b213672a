"""DMNet: dense transformer and invertible encoders with a diffusion model between the modalities.

    base:    P_i = B(I_i)                       B: dense transformer block (DTB)          (1)
    detail:  D_i = D(P_i)                       D: dense invertible block (DIB)           (2)
    latent:  L = M(conv(P_a, P_b))              M: decoder features of a diffusion U-Net  (9)
    fused:   F = E(A(D_a) + A(D_b) + A(L))      A: channel-spatial attention, E: decoder  (10, 12)

Source: the paper "DMNet" (equations 1 to 19; its repository Pancy9476/DMNet holds no code). Layers
that the paper takes from elsewhere follow their public sources: CDDFuse (Zhao et al., CVPR 2023)
for the transformer and invertible layers, SR3 and Dif-Fusion for the U-Net, CBAM (Woo et al., ECCV
2018) for the attention. What the paper leaves open is read here as:

* "dense": each of the five (three) layers feeds the next, the block gives the mean of their
  outputs (the tuning numbers 1/5 and 1/3);
* one encoder and one decoder serve both modalities, as the notation says: 385.80 M parameters
  against the printed 386.36 M (-0.14 %);
* the convolution over all features of the U-Net (15 decoder maps at three noise levels) acts on
  each map in its own resolution, and what it gives is enlarged and added up. A convolution of a
  concatenation is a sum of convolutions, so the parameters are those of one convolution over 26,496
  channels, which at full resolution would need 32 GB for 640x480.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuseengine.errors import SettingError
from fuseengine.models.base import FusionModel
from fuseengine.models.layers import BlockConv, SelfAttention, TimeShifts
from fuseengine.models.pictures import crop_like
from fuseengine.models.sampling import Draws, cosine_schedule, diffuse
from fuseengine.models.transformer import TransformerLayer
from fuseengine.models.unet import UNet

_TIMESTEPS = 2000


class DenseTransformerBlock(nn.Module):
    """Transformer layers in a row; the mean of all their outputs.

    Args:
        channels: of input and output.
        layers: how many.
        heads: of each layer's attention.
    """

    def __init__(self, channels: int, *, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(channels, heads, 2.0) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        return _mean_of_chain(self.layers, x)


class Bottleneck(nn.Module):
    """1x1, ReLU6, depthwise 3x3 over a reflected border, ReLU6, 1x1 (MobileNetV2's).

    Args:
        channels: of input and output; twice as many inside.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = 2 * channels
        self.widen = nn.Conv2d(channels, inside, 1, bias=False)
        self.mix = nn.Conv2d(inside, inside, 3, groups=inside, bias=False)
        self.narrow = nn.Conv2d(inside, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W), H and W at least 2 -> the same shape."""
        h = F.pad(F.relu6(self.widen(x)), (1, 1, 1, 1), mode="reflect")
        return self.narrow(F.relu6(self.mix(h)))


class InvertibleLayer(nn.Module):
    """Affine coupling of two halves of the channels, after a 1x1 convolution that mixes them.

    ``[u, v] = conv1x1(x);  v' = v + phi(u);  u' = u * exp(rho(v')) + eta(v')``

    Args:
        channels: even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.shuffle = nn.Conv2d(channels, channels, 1)
        self.phi, self.rho, self.eta = (Bottleneck(half) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        u, v = self.shuffle(x).chunk(2, dim=1)
        v = v + self.phi(u)
        u = u * torch.exp(self.rho(v)) + self.eta(v)
        return torch.cat([u, v], dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """The x that forward turns into y; the 1x1 matrix is inverted in float64."""
        u, v = y.chunk(2, dim=1)
        u = (u - self.eta(v)) * torch.exp(-self.rho(v))
        v = v - self.phi(u)
        matrix = torch.linalg.inv(self.shuffle.weight[:, :, 0, 0].double()).to(y.dtype)
        x = torch.cat([u, v], dim=1) - self.shuffle.bias[:, None, None]
        return F.conv2d(x, matrix[:, :, None, None])


class DenseInvertibleBlock(nn.Module):
    """Invertible layers in a row; the mean of all their outputs (which is not invertible itself).

    Args:
        channels: even.
        layers: how many.
    """

    def __init__(self, channels: int, *, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InvertibleLayer(channels) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        return _mean_of_chain(self.layers, x)


def _mean_of_chain(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    outputs = []
    for layer in layers:
        x = layer(x)
        outputs.append(x)
    return sum(outputs[1:], outputs[0]) * (1.0 / len(outputs))


class ChannelSpatialAttention(nn.Module):
    """CBAM with mixed pooling in place of the average: ``p max + (1 - p) mean``, p = 1/2.

    ``x <- x * sigmoid(mlp(mixed) + mlp(max))`` over channels, then
    ``x <- x * sigmoid(conv7x7[mixed, max])`` over pixels. No biases.

    Args:
        channels: C.
        reduction: the MLP's hidden width is C over it.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Conv2d(channels, hidden, 1, bias=False)
        self.excite = nn.Conv2d(hidden, channels, 1, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (N, C, H, W) -> the same shape."""
        mixed, largest = _pooled(x, (2, 3))
        gate = [self.excite(F.relu(self.squeeze(pool))) for pool in (mixed, largest)]
        x = x * torch.sigmoid(gate[0] + gate[1])
        return x * torch.sigmoid(self.spatial(torch.cat(_pooled(x, (1,)), dim=1)))


def _pooled(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    largest = x.amax(dim=dims, keepdim=True)
    return 0.5 * (largest + x.mean(dim=dims, keepdim=True)), largest


class Encoder(nn.Module):
    """Embedding, base features and detail features of one picture.

    Args:
        width: channels of the features.
        layers: of the dense transformer block and of the dense invertible block.
        heads: of each transformer layer's attention.
        patch: space-to-depth factor at the input.
    """

    def __init__(self, width: int, layers: tuple[int, int], *, heads: int, patch: int) -> None:
        super().__init__()
        self.embed = BlockConv(1, width, patch=patch, bias=False)
        self.base = DenseTransformerBlock(width, layers=layers[0], heads=heads)
        self.detail = DenseInvertibleBlock(width, layers=layers[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, H, W) -> P and D, (N, width, H / patch, W / patch)."""
        base = self.base(self.embed(x))
        return base, self.detail(base)


class Latent(nn.Module):
    """L: one convolution over all the U-Net's features at all noise levels, as a sum over maps.

    Args:
        widths: channels of each map.
        scales: by how much each map is smaller than the result.
        out: channels of L.
    """

    def __init__(self, widths: Sequence[int], scales: Sequence[int], out: int) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.parts = nn.ModuleList(
            nn.Conv2d(width, out, 3, padding=1, bias=False) for width in widths
        )
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps (N, widths[i], h / scales[i], w / scales[i]) -> (N, out, h, w)."""
        sums: dict[int, Tensor] = {}  # maps of one size are added before they are enlarged
        for part, scale, features in zip(self.parts, self.scales, maps, strict=True):
            made = part(features)
            sums[scale] = sums[scale] + made if scale in sums else made
        total: Tensor | None = None
        for scale, made in sums.items():
            if scale > 1:
                made = F.interpolate(
                    made, scale_factor=float(scale), mode="bilinear", align_corners=False
                )
            total = made if total is None else total + made
        return total + self.bias[:, None, None]


class Decoder(nn.Module):
    """E: transformer layers and two convolutions, from features to a picture.

    Args:
        width: channels of the features.
        layers: transformer layers.
        heads: of each layer's attention.
        patch: depth-to-space factor at the output.
    """

    def __init__(self, width: int, layers: int, *, heads: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.layers = nn.Sequential(*(TransformerLayer(width, heads, 2.0) for _ in range(layers)))
        self.narrow = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
        self.picture = nn.Conv2d(width // 2, patch * patch, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(N, width, H / patch, W / patch) -> (N, 1, H, W) in (0, 1)."""
        x = self.picture(F.leaky_relu(self.narrow(self.layers(features))))
        return torch.sigmoid(F.pixel_shuffle(x, self.patch) if self.patch > 1 else x)


class Head(nn.Module):
    """``E(A(D_a) + A(D_b) + A(L))``: attention on the three kinds of features, and the decoder.

    Args:
        attention: A.
        latent: from the U-Net's features to L.
        decoder: E.
    """

    def __init__(
        self, attention: ChannelSpatialAttention, latent: Latent, decoder: Decoder
    ) -> None:
        super().__init__()
        self.attention, self.latent, self.decoder = attention, latent, decoder

    def forward(self, detail_a: Tensor, detail_b: Tensor, *maps: Tensor) -> Tensor:
        """Detail features of both pictures and the U-Net's features -> (N, 1, H, W) in (0, 1)."""
        features = self.attention(detail_a) + self.attention(detail_b)
        return self.decoder(features + self.attention(self.latent(*maps)))

    def reconstruct(self, detail: Tensor) -> Tensor:
        """``E(A(D))``: the picture itself, training stage I (equation 11)."""
        return self.decoder(self.attention(detail))


class DMNet(FusionModel):
    """DMNet; see the module's docstring for sources and readings.

    Args:
        times: noise levels at which the U-Net's features are taken, 1 to 2000.
        seed: of the noise and its levels.
        width: channels of base, detail and latent features.
        layers: of the dense transformer block, the dense invertible block and the decoder.
        heads: of each transformer layer's attention; divides the width.
        unet_width: channels of the U-Net's finest level.
        multipliers: width of each of its levels, fine to coarse, in units of unet_width.
        blocks: residual blocks per level.
        groups: GroupNorm groups; must divide every width of the U-Net.
        dropout: dropout in the residual blocks, training only.
        patch: space-to-depth factor of encoder and decoder.
        unet_patch: of the U-Net, on top of it.

    Raises:
        SettingError: a setting outside what is allowed.
    """

    channels = "luma"
    stages = ("encoder", "compress", "time", "unet", "head")

    def __init__(
        self,
        *,
        times: Sequence[int] = (5, 50, 100),
        seed: int = 0,
        width: int = 64,
        layers: tuple[int, int, int] = (5, 3, 4),
        heads: int = 8,
        unet_width: int = 128,
        multipliers: Sequence[float] = (1, 2, 4, 8, 8),
        blocks: int = 2,
        groups: int = 32,
        dropout: float = 0.2,
        patch: int = 1,
        unet_patch: int = 1,
    ) -> None:
        super().__init__()
        if not times or any(not 1 <= t <= _TIMESTEPS for t in times):
            raise SettingError(f"times={tuple(times)}; expected numbers from 1 to {_TIMESTEPS}")
        if min(width, heads, patch, unet_patch, *layers) < 1 or width % heads or width % 2:
            raise SettingError(
                f"width={width}, layers={tuple(layers)}, heads={heads}, patch={patch}, "
                f"unet_patch={unet_patch}; expected each >= 1, an even width, heads to divide it"
            )
        self.times, self.seed = tuple(times), seed
        self.table = cosine_schedule(_TIMESTEPS)
        levels = range(len(multipliers))
        taps = [(level, block) for level in levels for block in range(blocks + 1)]
        self.encoder = Encoder(width, layers[:2], heads=heads, patch=patch)
        self.compress = nn.Conv2d(2 * width, 2, 3, padding=1, bias=False)
        self.unet = UNet(
            2,
            2,
            unet_width,
            multipliers=multipliers,
            blocks=blocks,
            attention=partial(SelfAttention, groups=groups, bias=False),
            groups=groups,
            dropout=dropout,
            patch=unet_patch,
            taps=taps,
        )
        self.time = TimeShifts(
            unet_width,
            4 * unet_width,
            self.unet.widths,
            out=unet_width,
            layout="sin-cos",
            activate=False,
        )
        widths = [self.unet.up[i].blocks[j].conv2.out_channels for i, j in taps]
        scales = [unet_patch * 2**i for i, _ in taps]
        self.head = Head(
            ChannelSpatialAttention(width),
            Latent(widths * len(self.times), scales * len(self.times), width),
            Decoder(width, layers[2], heads=heads, patch=patch),
        )
        self.multiple = patch * self.unet.multiple

    def forward(self, a: Tensor, b: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """Fuse a pair (stage II).

        Args:
            a: source 1 (infrared), (N, 1, H, W) in [0, 1], of any size.
            b: source 2 (luma of the visible picture), likewise.
            noise: ``noise_t5`` and so on, (N, 2, H / patch, W / patch) at the padded size, and
                ``level_t5`` and so on, (N,): the square roots of abar.

        Returns:
            (N, 1, H, W) in (0, 1).

        Raises:
            FrameError, SizeMismatchError: pictures that cannot be used.
            SettingError: noise of another name or shape.
        """
        first, second = self.prepare(a, b)
        base_a, detail_a = self.encoder(first)
        base_b, detail_b = self.encoder(second)
        x = self.compress(torch.cat([base_a, base_b], dim=1))
        names = [f"{kind}_t{t}" for t in self.times for kind in ("noise", "level")]
        draws = Draws(names, noise, self.seed)
        maps: list[Tensor] = []
        for t in self.times:
            low, high = (float(self.table[k]) ** 0.5 for k in (t, t - 1))
            level = draws.uniform(f"level_t{t}", low, high, x)
            noisy = diffuse(x, draws.normal(f"noise_t{t}", x), level)
            features = self.unet(noisy, self.time(level))
            maps += [features[1 + i] for i in range(len(self.unet.taps))]
        return crop_like(self.head(detail_a, detail_b, *maps), a)

    def reconstruct(self, picture: Tensor) -> Tensor:
        """Stage I: the picture (N, 1, H, W) through encoder and decoder alone."""
        return self.head.reconstruct(self.encoder(picture)[1])
