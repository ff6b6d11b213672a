"""Renders the demo pair: one street at dusk as a colour camera and a thermal camera see it.

    python -m fuseengine.demo.render            # rewrites the packaged PNG files

A small ray caster makes one linear RGB picture and one picture of thermal radiance from the same
rays, four to a pixel; then each passes through a model of its own camera. The colour camera blooms
round lamps, clips, and is noisy in the dark. The thermal camera has softer optics, a fixed pattern
of columns, and maps its range of radiance to 8 bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fuseengine.demo._noise import Array, blur, fbm, gaussian, smoothstep, value_noise
from fuseengine.demo._scene import EYE, STEAM_Z, Blocker, Light, Scene, Surface, build_scene

SIZE = (480, 640)
_HORIZON = 0.40  # of the height, from the top
# Four samples on a rotated grid: near-horizontal and near-vertical edges get five levels.
_SAMPLES = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))
_BAND = 1 << 18
_SKY_LIGHT = np.asarray([0.022, 0.031, 0.052], np.float32)


def render_pair(
    size: tuple[int, int] = SIZE, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render a registered infrared/visible pair.

    Args:
        size: (height, width) in pixels, each at least 1. The view covers the frame: another aspect
            ratio crops the scene, another size changes its resolution.
        seed: 0 is the packaged picture; other values move people, windows, textures and noise.

    Returns:
        infrared: uint8 (H, W), bright is warm.
        visible: uint8 (H, W, 3), sRGB.

    Raises:
        ValueError: a size below 1 or a negative seed.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size {size}: expected (height, width), each at least 1")
    if seed < 0:
        raise ValueError(f"seed {seed}: expected 0 or more")
    scene = build_scene(seed)
    scale = max(height / SIZE[0], width / SIZE[1])
    light = np.zeros((height * width, 3), np.float32)
    heat = np.zeros(height * width, np.float32)
    for start in range(0, height * width, _BAND):
        pixels = np.arange(start, min(start + _BAND, height * width))
        for dx, dy in _SAMPLES:
            u = (pixels % width + 0.5 + dx - width / 2) / (700 * scale)
            v = (height * _HORIZON - (pixels // width + 0.5 + dy)) / (700 * scale)
            rays = np.stack([u, v, np.ones_like(u)], axis=1).astype(np.float32)
            rgb, warmth = _trace(scene, rays)
            # Clipped before averaging, or the rim of a lamp would stay as hard as its centre.
            light[pixels] += np.minimum(rgb, 16) / len(_SAMPLES)
            heat[pixels] += warmth / len(_SAMPLES)
    salt = scene.salt + 900
    visible = _colour_camera(light.reshape(height, width, 3), scale, salt)
    infrared = _thermal_camera(heat.reshape(height, width), scale, salt + 50)
    return infrared, visible


def _trace(scene: Scene, rays: Array) -> tuple[Array, Array]:
    """Linear RGB (n, 3) and thermal radiance (n,) along rays (n, 3) from the eye."""
    depth = np.full(len(rays), np.inf, np.float32)
    owner = np.full(len(rays), -1, np.int32)
    for k, solid in enumerate(scene.solids):
        idx, t = solid.hit(EYE, rays)
        nearer = t < depth[idx]
        depth[idx[nearer]] = t[nearer]
        owner[idx[nearer]] = k
    rgb, heat = _sky(rays, scene.salt)
    order = np.argsort(owner, kind="stable")
    edges = np.searchsorted(owner[order], np.arange(len(scene.solids) + 1))
    for k, solid in enumerate(scene.solids):
        idx = order[edges[k] : edges[k + 1]]
        if len(idx):
            p = EYE + rays[idx] * depth[idx, None]
            surface = solid.surface(p, rays[idx])
            rgb[idx] = _shade(scene, p, rays[idx], surface)
            heat[idx] = _radiate(rays[idx], surface)
    _add_steam(rgb, rays, depth, scene.salt)
    return rgb, heat


def _sky(rays: Array, salt: int) -> tuple[Array, Array]:
    up = rays[:, 1] / np.linalg.norm(rays, axis=1)
    x, y = rays[:, 0] / (np.maximum(up, 0) + 0.12), 1 / (np.maximum(up, 0) + 0.12)
    cloud = smoothstep(0.42, 0.75, fbm(x * 2.2, y * 0.9, salt + 800, 5))
    t = smoothstep(0.0, 0.30, up)
    low, high = np.asarray([0.20, 0.115, 0.085]), np.asarray([0.020, 0.034, 0.075])
    rgb = (low + t[:, None] * (high - low)) * (1 - 0.25 * cloud[:, None])
    rgb += (cloud * (1 - 0.7 * t))[:, None] * np.asarray([0.10, 0.045, 0.04])
    heat = 0.035 + 0.10 * np.exp(-np.maximum(up, 0) / 0.07) + 0.05 * cloud
    return rgb.astype(np.float32), heat.astype(np.float32)


def _shade(scene: Scene, p: Array, d: Array, s: Surface) -> Array:
    """Light (n, 3) that leaves surface points towards the eye."""
    view = -d / np.linalg.norm(d, axis=1, keepdims=True)
    n = s.normal
    open_sky = 0.55 + 0.45 * n[:, 1]
    under_trees = 1 - 0.6 * smoothstep(3.2, 5.0, p[:, 0]) * smoothstep(42, 36, p[:, 2])
    contact = _contact(scene.blockers, p, n)
    irradiance = (open_sky * under_trees * contact)[:, None] * _SKY_LIGHT
    mirrored = np.zeros_like(irradiance)
    fresnel = 0.04 + 0.96 * (1 - np.clip(np.einsum("ij,ij->i", view, n), 0, 1)) ** 5
    for lamp in scene.lights:
        arriving, to = _arriving(lamp, p)
        if lamp.shadows:
            arriving = arriving * _shadow(scene.blockers, p, to)
        if lamp.axis[1] < -0.9:
            dapple = smoothstep(0.35, 0.6, value_noise(p[:, 0] * 1.7, p[:, 2] * 1.7, scene.salt))
            arriving = arriving * (1 - (1 - 0.35 * dapple) * smoothstep(3.0, 4.4, p[:, 0]))
        l_dir = to / np.linalg.norm(to, axis=1, keepdims=True)
        facing = np.einsum("ij,ij->i", n, l_dir)
        colour = np.asarray(lamp.colour, np.float32)
        irradiance += (arriving * np.maximum(facing, 0))[:, None] * colour
        half = l_dir + view
        half /= np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-6)
        lobe = np.maximum(np.einsum("ij,ij->i", n, half), 0) ** 90
        mirrored += (arriving * lobe * (facing > 0))[:, None] * colour * np.float32(2.2)
    bounce = 2 * np.einsum("ij,ij->i", view, n)[:, None] * n - view
    sky = smoothstep(-0.05, 0.4, bounce[:, 1])[:, None] * np.asarray([0.07, 0.08, 0.11], np.float32)
    gloss = s.gloss * contact
    out = s.albedo * irradiance + s.glow
    out += (gloss * (fresnel + 0.02))[:, None] * (sky * under_trees[:, None] * 1.4 + mirrored)
    haze = 1 - np.exp(-p[:, 2] / 420)
    return out + haze[:, None] * (np.asarray([0.075, 0.06, 0.055], np.float32) - out)


def _arriving(lamp: Light, p: Array) -> tuple[Array, Array]:
    """Irradiance across the beam at points, and the vectors (n, 3) from them to the lamp."""
    to = np.asarray(lamp.position, np.float32) - p
    far2 = np.maximum(np.einsum("ij,ij->i", to, to), 0.05)
    out = np.float32(lamp.power) / far2
    if lamp.spread:
        axis = np.asarray(lamp.axis, np.float32)
        along = np.maximum(-(to @ axis) / np.sqrt(far2 * np.float32(axis @ axis)), 0)
        out = out * along ** np.float32(lamp.spread)
    return out, to


def _shadow(blockers: list[Blocker], p: Array, to: Array) -> Array:
    """Share of a lamp's light that gets past the blockers, (n,) in [0, 1]."""
    out = np.ones(len(p), np.float32)
    run2 = np.maximum(to[:, 0] ** 2 + to[:, 2] ** 2, 1e-6)
    for b in blockers:
        ox, oz = np.float32(b.x) - p[:, 0], np.float32(b.z) - p[:, 2]
        t = np.clip((ox * to[:, 0] + oz * to[:, 2]) / run2, 0, 1)
        gap = np.hypot(ox - t * to[:, 0], oz - t * to[:, 2])
        y = p[:, 1] + t * to[:, 1]
        # A point inside the blocker is on the body itself and must not darken it.
        clear = np.hypot(ox, oz) > b.radius * 1.25
        soft = 0.15 + 0.35 * t
        hidden = smoothstep(1, -1, (gap - b.radius) / (soft * b.radius))
        out *= 1 - hidden * smoothstep(b.height + 0.1, b.height - 0.1, y) * clear
    return out


def _contact(blockers: list[Blocker], p: Array, n: Array) -> Array:
    """Darkening of the ground below people and cars, (n,) in [0, 1]."""
    out = np.ones(len(p), np.float32)
    ground = (n[:, 1] > 0.9) & (p[:, 1] < 0.3)
    if ground.any():
        for b in blockers:
            gap = np.hypot(p[ground, 0] - b.x, p[ground, 2] - b.z) / (1.15 * b.radius)
            out[ground] *= 1 - 0.8 * np.exp(-(gap**4))
    return out


def _radiate(d: Array, s: Surface) -> Array:
    """Thermal radiance (n,): own emission plus the cold sky or the street mirrored in it."""
    view = -d / np.linalg.norm(d, axis=1, keepdims=True)
    cos = np.clip(np.einsum("ij,ij->i", view, s.normal), 0, 1)
    up = 2 * cos * s.normal[:, 1] - view[:, 1]
    around = 0.06 + 0.26 * smoothstep(0.35, -0.15, up)
    share = s.gloss * (0.10 + 0.5 * (1 - cos) ** 5)
    # Surfaces that see the sky have lost more heat by the evening.
    own = s.heat - 0.018 * s.normal[:, 1]
    return own + share * (around - own)


def _add_steam(rgb: Array, rays: Array, depth: Array, salt: int) -> None:
    """Blend the plume over what is behind it: it scatters light and passes thermal radiance."""
    p = EYE + rays * np.float32(STEAM_Z)
    y = p[:, 1]
    rise = np.maximum(y, 0)
    x = (p[:, 0] - 1.1 - 0.10 * rise - 0.05 * rise * np.sin(2.1 * rise)) / (0.55 + 0.42 * rise)
    idx = np.flatnonzero((depth > STEAM_Z) & (y > -0.05) & (y < 5) & (np.abs(x) < 2))
    if not len(idx):
        return
    x, y, px = x[idx], y[idx], p[idx, 0]
    swirl = fbm(px * 0.8, y * 0.7 + 9, salt + 850, 2)
    puff = fbm(px * 1.5 + 1.6 * swirl, y * 1.3 - 1.2 * swirl, salt + 851, 4)
    body = np.exp(-(x**2) * 1.6) * smoothstep(5.0, 0.8, y) * smoothstep(-0.05, 0.3, y)
    alpha = np.clip(body * (0.25 + 1.75 * puff), 0, 0.96)[:, None]
    lit = np.maximum(0.10 + 0.05 * y + 0.14 * (puff - 0.5), 0.02)[:, None]
    rgb[idx] += alpha * (lit * np.asarray([1.0, 0.80, 0.58], np.float32) - rgb[idx])


def _colour_camera(light: Array, scale: float, salt: int) -> NDArray[np.uint8]:
    height, width, _ = light.shape
    excess = np.minimum(np.maximum(light - 0.9, 0), 12)
    halo = 0.12 * blur(excess, 2.2 * scale) + 0.09 * blur(excess, 9 * scale)
    halo += 0.2 * blur(excess, 34 * scale)
    out = blur(light, 0.42 * scale if scale > 1 else 0.42) + halo
    out *= (1 - 0.28 * _off_axis(height, width))[:, :, None]
    out = 1.55 * out
    # Shot noise grows with the root of the signal, read noise does not.
    grain = np.stack([gaussian((height, width), salt + k) for k in range(3)], axis=2)
    out = out + grain * np.sqrt(1.0e-5 + 1.5e-4 * np.maximum(out, 0))
    out = np.maximum(out, 0)
    out = out * (1 + out / 2.6**2) / (1 + 0.75 * out)
    out = np.clip(out, 0, 1)
    out = np.where(out < 0.0031308, 12.92 * out, 1.055 * out ** (1 / 2.4) - 0.055)
    return np.floor(255 * out + 0.5).astype(np.uint8)


def _thermal_camera(heat: Array, scale: float, salt: int) -> NDArray[np.uint8]:
    height, width = heat.shape
    out = blur(heat, 0.95 * scale)
    out += 0.05 * blur(np.maximum(heat - 0.55, 0), 7 * scale)
    out -= 0.02 * _off_axis(height, width)
    out += 0.0035 * gaussian((height, width), salt)
    out += 0.0022 * gaussian((1, width), salt + 1) + 0.0012 * gaussian((height, 1), salt + 2)
    # The gain spreads the street's narrow range; the knee keeps detail in the hottest bodies.
    level = 0.055 + 0.30 * out + 1.5 * np.maximum(out - 0.16, 0) ** 1.4
    level = np.where(level < 0.7, level, 0.7 + 0.3 * np.tanh((level - 0.7) / 0.3))
    return np.floor(np.clip(255 * level, 0, 255) + 0.5).astype(np.uint8)


def _off_axis(height: int, width: int) -> Array:
    """Squared distance from the optical axis, 0 at the centre to 1 in a corner, (H, W)."""
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2)[:, None]
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2)[None]
    return (x * x + y * y) / np.float32((width / 2) ** 2 + (height / 2) ** 2)


def main() -> None:
    """Rewrite the packaged PNG files."""
    from PIL import Image

    here = Path(__file__).parent
    for name, image in zip(("infrared", "visible"), render_pair(), strict=True):
        Image.fromarray(image).save(here / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
