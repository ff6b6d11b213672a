"""The demo scene: a wet street at dusk, as data and materials.

Each material gives one surface both its looks: what a colour camera sees (albedo, glow, gloss) and
what a thermal camera sees (heat). Print, paint and brick exist in colour only; engines, skin and
warm rooms exist mostly in heat; the geometry is one, so the two pictures are registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fuseengine.demo._noise import Array, cell01, fbm, hash01, smoothstep, value_noise
from fuseengine.demo._solids import (
    Box,
    Foliage,
    Ground,
    Marched,
    Material,
    Surface,
    limb_distance,
    polygon_distance,
    smooth_min,
)

EYE = np.asarray([0.0, 2.3, 0.0], np.float32)
STEAM_Z = 20.5
_FOCAL = 700.0  # of the 480x640 picture; gives textures the footprint of a pixel

_ROAD = (-2.8, 3.4)
_LEFT_WALL, _PARK = -5.0, 5.2
_SHOP = (13.2, 19.0)

_GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
}
_FONT = {
    letter: np.array([[bit == "1" for bit in row] for row in rows.split()])
    for letter, rows in _GLYPHS.items()
}


@dataclass(frozen=True)
class Light:
    """A small lamp.

    Attributes:
        position: metres.
        colour: linear RGB.
        power: radiant intensity along the axis; irradiance is power / distance**2.
        axis: unit direction of the beam.
        spread: exponent of the cosine to the axis; 0 shines all round.
        shadows: whether people and cars stand in its way.
    """

    position: tuple[float, float, float]
    colour: tuple[float, float, float]
    power: float
    axis: tuple[float, float, float] = (0.0, -1.0, 0.0)
    spread: float = 0.0
    shadows: bool = False


@dataclass(frozen=True)
class Blocker:
    """An upright cylinder that stands for a person or half a car when shadows are cast."""

    x: float
    z: float
    radius: float
    height: float


@dataclass(frozen=True)
class Scene:
    """Solids, lights and shadow casters."""

    solids: list[Ground | Box | Foliage | Marched]
    lights: list[Light]
    blockers: list[Blocker]
    salt: int


def build_scene(seed: int) -> Scene:
    """The street; the seed changes where people stand, which windows are lit and all textures."""
    salt = 1000 * (seed + 1)

    def jitter(k: int) -> float:
        return float(hash01(np.asarray([k]), np.asarray([seed]), 77)[0]) - 0.5 if seed else 0.0

    people = [
        # On the crossing, under the first lamp.
        _Person(0.75 + jitter(1), 8.3, -1.75, 1.74, 0.9, (0.20, 0.05, 0.045), (0.03, 0.035, 0.06)),
        # In dark clothes under the trees: next to nothing in colour.
        _Person(3.8, 12.3 + jitter(2), 2.9, 1.80, 0.5, (0.018, 0.018, 0.02), (0.012, 0.012, 0.015)),
        # Behind the steam, in the middle of the road.
        _Person(1.05 + jitter(3), 23.0, 3.3, 1.72, 0.8, (0.05, 0.06, 0.05), (0.03, 0.03, 0.04)),
        # Before the shop window.
        _Person(-3.75, 16.2 + jitter(4), 0.4, 1.68, 0.6, (0.07, 0.09, 0.16), (0.05, 0.04, 0.035)),
        # Behind the bush.
        _Person(5.45, 14.9 + jitter(5), 2.6, 1.77, 0.2, (0.03, 0.04, 0.025), (0.02, 0.02, 0.02)),
    ]
    cars = [
        _Car(-1.25, 12.6, toward_eye=True, running=True, paint=(0.17, 0.18, 0.20)),
        _Car(2.35, 17.5, toward_eye=False, running=False, paint=(0.15, 0.022, 0.022)),
    ]
    pole = _plain((0.05, 0.05, 0.052), heat=0.27, gloss=0.2)
    solids: list[Ground | Box | Foliage | Marched] = [
        Ground(_ground(salt)),
        Box((_LEFT_WALL - 1, 0, 4), (_ROAD[0], 0.13, 60), _pavement(salt + 1)),
        Box((_ROAD[1], 0, 4), (_PARK, 0.13, 60), _pavement(salt + 2)),
        Box((-16, 0, 6), (_LEFT_WALL, 11.5, 33), _left_building(salt + 3)),
        Box((-5.4, 3.02, 6), (_LEFT_WALL + 0.16, 3.2, 33), _plain((0.22, 0.2, 0.17), 0.315)),
        Box((-5.4, 11.1, 6), (_LEFT_WALL + 0.35, 11.5, 33), _plain((0.2, 0.18, 0.16), 0.27)),
        Box((-5.2, 2.42, 13.1), (_LEFT_WALL + 0.2, 3.0, 19.1), _sign_board()),
        Box((-4.86, 3.3, 13.0), (-4.26, 5.5, 13.2), _blade_sign()),
        Box((-5.2, 4.0, 21.6), (_LEFT_WALL + 0.45, 4.7, 22.7), _air_conditioner()),
        Box((-30, 0, 47), (14, 8.6, 60), _far_building(salt + 4, 0.30)),
        Box((-11, 0, 52), (-2.5, 13.5, 60), _far_building(salt + 5, 0.22)),
        Box((5.2, 0, 5), (5.5, 0.62, 42), _park_wall(salt + 6)),
        # Lamp posts with their arms, and the post of the traffic sign.
        *(_post(x, z, 6.1, arm, pole) for x, z, arm in ((-3.1, 17.0, 1.3), (-3.1, 31.0, 1.3))),
        Box((-2.2, 6.02, 16.85), (-1.6, 6.14, 17.15), _lamp_head()),
        Box((-2.2, 6.02, 30.8), (-1.6, 6.16, 31.2), _lamp_head()),
        _post(3.78, 9.0, 2.75, 0.0, pole),
        Box((3.49, 2.15, 8.90), (4.07, 2.75, 8.92), _crossing_sign()),
        *(person.solid(salt + 20 + k) for k, person in enumerate(people)),
        *(car.solid(salt + 40 + k) for k, car in enumerate(cars)),
    ]
    for k, (x, z, lean) in enumerate(((6.1, 12.8, 0.25), (6.6, 19.5, -0.2), (6.4, 28.0, 0.1))):
        solids.append(_trunk(x, z, lean, salt + 60 + k))
        for j in range(9):
            dx, dy, dz = (_rand(salt, 10 * k + j, axis) - 0.5 for axis in range(3))
            solids.append(
                Foliage(
                    (x - 0.3 + 3.2 * dx, 5.2 + 2.5 * dy, z + 2.0 * dz),
                    (1.25 + 0.6 * dz, 0.95 + 0.4 * dx),
                    _leaves(salt + 70 + k, (0.05, 0.075, 0.025), 0.235),
                    salt + 100 + 10 * k + j,
                )
            )
    for k in range(12):
        z = 9.6 + 2.1 * k
        solids.append(
            Foliage(
                (6.5 + 0.5 * (_rand(salt, k, 5) - 0.5), 0.75, z),
                (1.0, 0.85 + 0.35 * _rand(salt, k, 6)),
                _leaves(salt + 200 + k, (0.045, 0.075, 0.03), 0.225),
                salt + 220 + k,
                11.0,
            )
        )
    bush = _leaves(salt + 240, (0.06, 0.085, 0.035), 0.23)
    solids.append(Foliage((5.5, 0.7, 13.4), (0.85, 0.85), bush, salt + 241, 12.0))
    for k in range(10):
        solids.append(
            Foliage(
                (4.0 + 3.2 * k, 3.2 + 2.5 * _rand(salt, k, 8), 43 + 0.2 * k),
                (3.4, 3.6 + _rand(salt, k, 9)),
                _leaves(salt + 260 + k, (0.04, 0.055, 0.03), 0.2),
                salt + 280 + k,
                3.0,
            )
        )

    warm, white = (1.0, 0.66, 0.33), (1.0, 0.95, 0.85)
    lights = [
        Light((-1.6, 6.0, 8.6), warm, 62, spread=2.2, shadows=True),
        Light((-1.9, 6.0, 17.0), warm, 70, spread=2.2, shadows=True),
        Light((-1.9, 6.0, 31.0), warm, 80, spread=2.0),
        Light((-4.7, 1.7, 16.1), (1.0, 0.82, 0.55), 7, (1.0, 0.0, 0.0), spread=1.0, shadows=True),
        Light((-4.5, 4.4, 12.8), (1.0, 0.12, 0.16), 2.2),
        *(
            Light((-1.25 + s * 0.62, 0.66, 12.45), white, 95, axis=(0.0, -0.06, -1.0), spread=60)
            for s in (-1, 1)
        ),
    ]
    bodies: list[_Person | _Car] = [*people, *cars]
    blockers = [blocker for body in bodies for blocker in body.blockers()]
    return Scene(solids, lights, blockers, salt)


def _rand(salt: int, k: int, axis: int) -> float:
    return float(hash01(np.asarray([k]), np.asarray([axis]), salt)[0])


def _blend(a: Sequence[float] | Array, b: Sequence[float] | Array, t: Array) -> Array:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a + t[:, None] * (b - a)


def _ridge(x: Array, period: float, width: float, footprint: Array) -> Array:
    """Anti-aliased thin lines at multiples of a period: 1 on a line, 0 off it."""
    off = np.abs((x / period + 0.5) % 1 - 0.5) * period
    soft = np.maximum(footprint, 1e-4)
    cover = np.clip((width / 2 - off) / soft + 0.5, 0, 1)
    # Lines thinner than a pixel keep their mean, so that they fade instead of shimmering.
    return np.minimum(cover, np.minimum(width / soft, 1))


def _plain(albedo: Sequence[float], heat: float, gloss: float = 0.0) -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        return Surface.plain(n, albedo, heat, gloss)

    return material


def _text(word: str, u: Array, v: Array, *, vertical: bool = False) -> Array:
    """Whether points of the unit square (v up) are on the strokes of a word."""
    u, v = np.clip(u, 0, 0.9999), np.clip(1 - v, 0, 0.9999)
    along, across = (v, u) if vertical else (u, v)
    slot = np.floor(along * len(word)).astype(np.int64)
    within = along * len(word) - slot
    gx, gy = (across, within) if vertical else (within, across)
    col = np.floor(gx * 7 - 1).astype(np.int64)
    row = np.floor(gy * 9 - 1).astype(np.int64)
    ok = (col >= 0) & (col < 5) & (row >= 0) & (row < 7)
    font = np.stack([_FONT[letter] for letter in word])
    return ok & font[slot, np.clip(row, 0, 6), np.clip(col, 0, 4)]


def _ground(salt: int) -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        x, z = p[:, 0], p[:, 2]
        foot = z * z / (_FOCAL * EYE[1])
        fade = np.clip(1.6 - 8 * z / _FOCAL * 4, 0.1, 1)
        grain = (value_noise(x * 60, z * 60, salt) - 0.5) * fade
        grain += (fbm(x * 14, z * 14, salt + 1, 3) - 0.5) * 0.8
        broad = fbm(x * 0.7, z * 0.35, salt + 2)
        tone = 0.085 * (1 + 0.85 * grain + 1.1 * (broad - 0.5))
        ruts = np.exp(-(((np.abs(x - 0.3) - 1.6) / 0.5) ** 2))
        tone *= 1 - 0.18 * ruts
        # A repaired trench and cracks.
        patch = (x > 1.5) & (x < 2.9) & (z > 6) & (z < 12.4)
        tone = np.where(patch, tone * 0.62, tone)
        vein = np.abs(fbm(x * 0.9 + 7, z * 0.5, salt + 3, 4) - 0.5)
        tone *= 1 - 0.6 * smoothstep(0.012, 0.0, vein - 0.2 * foot) * np.clip(1 - foot * 8, 0, 1)
        albedo = tone[:, None] * np.asarray([1.0, 0.98, 0.96], np.float32)
        s = Surface.plain(n, (0, 0, 0), 0.0)
        s.albedo = albedo
        s.heat = 0.365 + 0.05 * (broad - 0.5) + 0.022 * ruts + 0.006 * grain
        s.heat -= 0.012 * patch
        wet = smoothstep(0.42, 0.62, fbm(x * 0.9, z * 0.45, salt + 4, 4))
        s.gloss = (0.22 + 0.6 * wet * (0.75 + 0.5 * grain)).astype(np.float32)
        s.albedo *= (1 - 0.35 * wet)[:, None]
        s.heat -= 0.018 * wet

        worn = smoothstep(0.22, 0.62, fbm(x * 5, z * 5, salt + 5, 5))
        worn *= 0.75 + 0.4 * grain
        inside = (x > _ROAD[0] + 0.15) & (x < _ROAD[1] - 0.15)
        zebra = (z > 7.0) & (z < 9.7) & inside & ((x / 0.96) % 1 < 0.52)
        centre = (np.abs(x - 0.3) < 0.07) & (z > 11.6) & (((z - 11.6) / 4.5) % 1 < 0.55)
        edge = (np.abs(x - (_ROAD[0] + 0.3)) < 0.06) & (z > 10.2)
        stop = (z > 10.5) & (z < 10.95) & (x < 0.2) & inside
        paint = (zebra | centre | edge | stop) * worn
        s.albedo = _blend(s.albedo, (0.42, 0.41, 0.38), 0.9 * paint)
        s.heat -= 0.008 * paint

        lid = np.hypot(x - 1.25, z - 11.6)
        on = lid < 0.36
        rings = 0.5 + 0.5 * np.sin(lid[on] * 90)
        iron = _blend((0.03, 0.03, 0.03), (0.07, 0.065, 0.06), rings)
        s.paint(on, albedo=iron, heat=0.52, gloss=0.6)
        s.heat += 0.1 * np.exp(-((lid / 0.55) ** 2))
        grate = np.hypot(x - 1.1, z - STEAM_Z)
        s.heat += 0.22 * np.exp(-((grate / 0.5) ** 2))

        park = x > _PARK
        if park.any():
            g = fbm(x[park] * 9, z[park] * 9, salt + 6, 3)
            s.paint(park, albedo=_blend((0.02, 0.035, 0.012), (0.06, 0.085, 0.03), g), gloss=0.0)
            s.heat[park] = 0.22 + 0.03 * g
        # The engine and tyres of the waiting car warm the road below; tyre tracks lead to it.
        s.heat += 0.12 * np.exp(-((np.abs(x + 1.25) / 0.8) ** 4 + (np.abs(z - 13.6) / 1.4) ** 4))
        return s

    return material


def _pavement(salt: int) -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        x, z = p[:, 0], p[:, 2]
        s = Surface.plain(n, (0.16, 0.15, 0.135), 0.335, 0.12)
        foot = z * z / (_FOCAL * EYE[1])
        slab = cell01(x / 0.4, z / 0.4 + 0.5 * np.floor(x / 0.4), salt)
        joints = np.maximum(
            _ridge(x, 0.4, 0.02, z / _FOCAL),
            _ridge(z + 0.2 * np.floor(x / 0.4), 0.4, 0.025, foot),
        )
        grit = fbm(x * 30, z * 30, salt + 1, 2) - 0.5
        broad = fbm(x, z * 0.6, salt + 2, 3) - 0.5
        tone = (0.75 + 0.5 * slab) * (1 + 0.5 * grit + 0.7 * broad) * (1 - 0.65 * joints)
        s.albedo *= tone[:, None]
        kerb = (x > _ROAD[0] - 0.16) & (x < _ROAD[1] + 0.16)
        stone = cell01(z / 0.9, np.zeros_like(z), salt + 3) * 0.3 + 0.85
        stone = stone * (1 - 0.6 * _ridge(z, 0.9, 0.03, foot)) * (1 + 0.4 * grit)
        s.albedo[kerb] = (stone[:, None] * np.asarray([0.24, 0.235, 0.22], np.float32))[kerb]
        s.heat += 0.035 * broad + 0.004 * grit - 0.025 * kerb
        # The wall keeps the day's warmth near its foot.
        s.heat += 0.03 * np.exp(-np.abs(x - _LEFT_WALL) / 0.7)
        return s

    return material


def _bricks(h: Array, v: Array, foot: Array, salt: int, base: Sequence[float]) -> Array:
    """Albedo (n, 3) of brickwork at (h along, v up) metres."""
    course, long = 0.085, 0.26
    row = np.floor(v / course)
    shift = h / long + 0.5 * (row % 2)
    each = cell01(shift, row, salt)
    soot = fbm(h * 0.5, v * 0.4, salt + 1, 3)
    fade = np.clip(course / np.maximum(foot, 1e-4) - 1, 0, 1)
    tone = (1 + (0.75 * (each - 0.5)) * fade) * (0.65 + 0.7 * soot)
    mortar = np.maximum(
        _ridge(v, course, 0.014, foot), _ridge((shift % 1) * long, long, 0.014, foot)
    )
    hue = np.stack([0.1 * (each - 0.5), np.zeros_like(each), -0.08 * (each - 0.5)], axis=1)
    brick = tone[:, None] * (np.asarray(base, np.float32) * (1 + hue))
    return _blend(brick, (0.24, 0.22, 0.2), 0.75 * mortar)


def _windows(
    s: Surface,
    h: Array,
    v: Array,
    slope: tuple[Array, Array],
    salt: int,
    *,
    grid: tuple[float, float, float],
    opening: tuple[float, float],
    lit: float,
    where: np.ndarray,
) -> None:
    """Cut a regular grid of recessed windows into a wall.

    Args:
        s: the wall's surface, changed in place.
        h: metres along the wall, (n,).
        v: metres up, (n,).
        slope: metres along and up that a ray travels per metre into the wall.
        salt: selects which are lit and how.
        grid: period along, period up, height of the lowest sill.
        opening: width and height.
        lit: share of lit windows.
        where: (n,) the part of the wall that has windows.
    """
    width, height = opening
    ch, cv = np.floor(h / grid[0]), np.floor((v - grid[2]) / grid[1])
    u = h - (ch + 0.5) * grid[0]
    w = v - grid[2] - cv * grid[1]
    valid = where & (cv >= 0)
    hole = valid & (np.abs(u) < width / 2) & (w > 0) & (w < height)
    # Warmth leaks round every frame; sills and lintels are paler stone.
    edge = np.maximum(np.abs(u) - width / 2, np.maximum(-w, w - height))
    s.heat += np.where(valid, 0.035 * np.exp(-np.maximum(edge, 0) / 0.22), 0)
    sill = valid & (np.abs(u) < width / 2 + 0.12) & (w > -0.14) & (w <= 0)
    lintel = valid & (np.abs(u) < width / 2 + 0.15) & (w >= height) & (w < height + 0.2)
    s.paint(sill | lintel, albedo=(0.27, 0.25, 0.22))
    if not hole.any():
        return
    deep = 0.17
    u2, w2 = u[hole] + deep * slope[0][hole], w[hole] + deep * slope[1][hole]
    glass = (np.abs(u2) < width / 2) & (w2 > 0) & (w2 < height)
    frame = glass & (
        (np.abs(u2) > width / 2 - 0.07)
        | (np.abs(u2) < 0.03)
        | (w2 < 0.07)
        | (w2 > height - 0.07)
        | (np.abs(w2 - 0.68 * height) < 0.025)
    )
    on = cell01(ch[hole], cv[hole], salt) < lit
    mood = cell01(ch[hole], cv[hole], salt + 1)
    curtain = 0.55 + 0.45 * np.sin(u2 * 38 + 6 * mood)
    drawn = (np.abs(u2) > width * (0.18 + 0.25 * mood)).astype(np.float32)
    room = (0.35 + 0.65 * np.clip(w2 / height, 0, 1)) * (1 - 0.6 * drawn * curtain)
    furniture = 0.25 + 0.35 * value_noise(u2 * 5, mood * 50, salt)
    room *= 1 - 0.75 * smoothstep(0.02, -0.02, w2 - furniture)
    tint = _blend((1.0, 0.62, 0.26), (1.0, 0.84, 0.58), mood)
    glow = np.where(on[:, None], 0.62 * room[:, None] * tint, 0)
    glow = np.where((glass & ~frame)[:, None], glow, 0)
    s.paint(hole, albedo=(0.13, 0.12, 0.11), gloss=0.0)
    pane = np.where(glass, 0.0, 1.0)[:, None] * np.asarray([0.15, 0.14, 0.12], np.float32)
    pane = np.where(frame[:, None], np.asarray([0.3, 0.29, 0.27], np.float32), pane)
    s.albedo[hole] = pane
    s.glow[hole] = glow
    s.gloss[hole] = np.where(glass & ~frame, 0.9, 0)
    heat = np.where(on, 0.46 + 0.05 * mood, 0.27)
    s.heat[hole] = np.where(glass, np.where(frame, 0.4 * heat + 0.2, heat), 0.34)


def _left_building(salt: int) -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        h, v = p[:, 2], p[:, 1]
        inward = np.maximum(-d[:, 0], 1e-3)
        slope = (d[:, 2] / inward, d[:, 1] / inward)
        foot = h / _FOCAL
        s = Surface.plain(n, (0, 0, 0), 0.295)
        s.albedo = _bricks(h, v, foot, salt, (0.20, 0.105, 0.075))
        s.heat += 0.035 * (fbm(h * 0.3, v * 0.3, salt + 2, 3) - 0.5) - 0.004 * (v - 4)
        base = v < 3.0
        blocks = np.maximum(_ridge(v, 0.5, 0.03, foot), _ridge(h, 0.9, 0.03, 3 * foot))
        plaster = 0.7 + 0.6 * fbm(h * 1.3, v * 1.3, salt + 3, 4)
        plaster *= (1 - 0.5 * blocks) * (0.75 + 0.25 * smoothstep(0.1, 0.9, v))
        s.albedo[base] = (plaster[:, None] * np.asarray([0.25, 0.225, 0.185], np.float32))[base]
        s.heat[base] += 0.03
        _windows(
            s, h, v, slope, salt + 4,
            grid=(2.3, 2.75, 3.75), opening=(1.15, 1.65), lit=0.32, where=v > 3.3,
        )  # fmt: skip
        before = base & ((h < _SHOP[0] - 0.2) | (h > _SHOP[1] + 0.2)) & (v > 0.3)
        _windows(
            s, h, v, slope, salt + 5,
            grid=(3.1, 9.0, 0.9), opening=(1.2, 1.5), lit=0.2, where=before,
        )  # fmt: skip
        _shop_window(s, h, v, slope, salt + 6)
        return s

    return material


def _shop_window(s: Surface, h: Array, v: Array, slope: tuple[Array, Array], salt: int) -> None:
    """A lit display behind glass: rows of bright goods that the thermal camera cannot see."""
    hole = (h > _SHOP[0]) & (h < _SHOP[1]) & (v > 0.55) & (v < 2.4)
    if not hole.any():
        return
    deep = 0.55
    u, w = h[hole] + deep * slope[0][hole], v[hole] + deep * slope[1][hole]
    mullion = (np.abs((h[hole] - _SHOP[0]) / 1.45 % 1 - 0.5) > 0.475) | (v[hole] > 2.32)
    back = (u < _SHOP[1]) & (w < 2.36) & (w > 0.56)
    shelf = (w - 0.56) / 0.46
    row = np.floor(shelf)
    item = u / 0.27 + 0.37 * row
    tall = 0.45 + 0.45 * cell01(item, row, salt)
    goods = ((shelf % 1) < tall) & (np.abs(item % 1 - 0.5) < 0.40)
    goods &= cell01(item, row, salt + 1) > 0.12
    board = (shelf % 1) > 0.93
    colour = np.stack([0.05 + 0.95 * cell01(item, row, salt + k) ** 1.5 for k in (2, 3, 4)], axis=1)
    glow = np.where(goods[:, None], colour * 0.55, np.asarray([0.40, 0.31, 0.19], np.float32))
    glow = np.where(board[:, None], np.asarray([0.16, 0.1, 0.06], np.float32), glow)
    glow *= (0.55 + 0.35 * (w / 2.4) + 0.15 * np.sin(u * 2.2))[:, None]
    glow = np.where(back[:, None], glow, np.asarray([0.22, 0.16, 0.09], np.float32))
    s.glow[hole] = np.where(mullion[:, None], 0, glow * 0.85)
    s.paint(hole, albedo=(0.03, 0.03, 0.03), gloss=0.6)
    warmth = 0.47 + 0.05 * smoothstep(0.6, 2.3, v[hole]) + 0.02 * value_noise(u * 0.8, w, salt + 5)
    s.heat[hole] = np.where(mullion, 0.36, warmth)


def _far_building(salt: int, lit: float) -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        h, v = p[:, 0], p[:, 1]
        foot = p[:, 2] / _FOCAL
        s = Surface.plain(n, (0, 0, 0), 0.265)
        s.albedo = _bricks(h, v, foot, salt, (0.17, 0.15, 0.13))
        s.heat += 0.03 * (fbm(h * 0.2, v * 0.2, salt + 2, 3) - 0.5) - 0.003 * v
        inward = np.maximum(d[:, 2], 1e-3)
        _windows(
            s, h, v, (d[:, 0] / inward, d[:, 1] / inward), salt + 4,
            grid=(2.2, 2.7, 1.0), opening=(1.2, 1.5), lit=lit, where=n[:, 2] < -0.5,
        )  # fmt: skip
        return s

    return material


def _park_wall(salt: int) -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        h = np.where(np.abs(n[:, 2]) > 0.5, p[:, 0], p[:, 2])
        v = np.where(np.abs(n[:, 1]) > 0.5, p[:, 0], p[:, 1])
        s = Surface.plain(n, (0, 0, 0), 0.255)
        s.albedo = _bricks(h / 2.4, v / 2.4, p[:, 2] / _FOCAL / 2.4, salt, (0.15, 0.145, 0.13))
        s.heat += 0.02 * (fbm(h, v, salt + 1, 2) - 0.5)
        return s

    return material


def _sign_board() -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        s = Surface.plain(n, (0.03, 0.06, 0.05), 0.31, 0.2)
        u, v = (p[:, 2] - 14.0) / 4.2, (p[:, 1] - 2.45) / 0.52
        on = (n[:, 0] > 0.5) & (u > 0) & (u < 1) & (v > 0) & (v < 1)
        s.paint(on & _text("CAFE", u, v), glow=(0.95, 0.78, 0.45))
        return s

    return material


def _blade_sign() -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        s = Surface.plain(n, (0.05, 0.012, 0.016), 0.30, 0.2)
        u, v = (p[:, 0] + 4.83) / 0.54, (p[:, 1] - 3.38) / 2.04
        on = (n[:, 2] < -0.5) & (u > 0) & (u < 1) & (v > 0) & (v < 1)
        s.paint(n[:, 2] < -0.5, glow=(0.055, 0.006, 0.012))
        s.paint(on & _text("HOTEL", u, v, vertical=True), glow=(1.5, 0.22, 0.24))
        rim = np.maximum(np.abs(p[:, 0] + 4.56) - 0.3, np.abs(p[:, 1] - 4.4) - 1.1)
        s.paint((n[:, 2] < -0.5) & (rim > -0.035), glow=(0.5, 0.35, 0.2))
        return s

    return material


def _air_conditioner() -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        s = Surface.plain(n, (0.2, 0.2, 0.2), 0.42, 0.1)
        fan = np.hypot(p[:, 2] - 22.15, p[:, 1] - 4.35) < 0.28
        s.paint(fan & (n[:, 0] > 0.5), albedo=(0.05, 0.05, 0.05), heat=0.74)
        return s

    return material


def _lamp_head() -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        s = Surface.plain(n, (0.1, 0.1, 0.1), 0.55, 0.1)
        s.paint((n[:, 1] < -0.5) | (p[:, 1] < 6.06), glow=(14.0, 10.0, 5.5), heat=0.78)
        return s

    return material


def _crossing_sign() -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        s = Surface.plain(n, (0.02, 0.09, 0.32), 0.235, 0.1)
        x, y = (p[:, 0] - 3.78) / 0.29, (p[:, 1] - 2.45) / 0.3
        white = (y > -0.68) & (np.abs(x) < 0.78 * (0.8 - y) / 1.48)
        s.paint(white, albedo=(0.55, 0.55, 0.55))
        walker = (np.hypot(x, y - 0.22) < 0.1) | ((np.abs(x) < 0.09) & (y < 0.12) & (y > -0.2))
        stripes = (y < -0.45) & (y > -0.6) & ((x / 0.24) % 1 < 0.5) & (np.abs(x) < 0.5)
        legs = (y <= -0.2) & (y > -0.42) & (np.abs(np.abs(x) - 0.5 * (-0.16 - y)) < 0.06)
        s.paint(white & (walker | stripes | legs), albedo=(0.03, 0.03, 0.035))
        s.paint(np.maximum(np.abs(x), np.abs(y)) > 0.93, albedo=(0.5, 0.5, 0.5))
        return s

    return material


def _leaves(salt: int, colour: Sequence[float], heat: float) -> Material:
    def material(p: Array, d: Array, n: Array) -> Surface:
        each = value_noise(p[:, 0] * 11, p[:, 1] * 11, salt)
        s = Surface.plain(n, colour, heat, 0.03)
        s.albedo *= (0.4 + 1.2 * each)[:, None]
        s.heat += 0.045 * (each - 0.5) + 0.02 * (n[:, 1] < 0)
        return s

    return material


def _post(x: float, z: float, height: float, arm: float, material: Material) -> Marched:
    a, b = np.asarray([x, 0, z], np.float32), np.asarray([x, height, z], np.float32)
    c = np.asarray([x + max(arm, 1e-3), height + 0.04, z], np.float32)

    def distance(p: Array) -> Array:
        out = limb_distance(p, a, b, 0.085, 0.045)
        return np.minimum(out, limb_distance(p, b, c, 0.045, 0.035)) if arm else out

    reach = (x - 0.1, 0, z - 0.1), (x + arm + 0.1, height + 0.1, z + 0.1)
    return Marched(*reach, distance, material)


def _trunk(x: float, z: float, lean: float, salt: int) -> Marched:
    a, b = np.asarray([x, 0, z], np.float32), np.asarray([x + lean, 3.4, z], np.float32)
    c, e = b + np.asarray([-1.1, 1.7, 0], np.float32), b + np.asarray([0.9, 1.8, 0], np.float32)

    def distance(p: Array) -> Array:
        out = limb_distance(p, a, b, 0.27, 0.17)
        out = smooth_min(out, limb_distance(p, b, c, 0.13, 0.06), 0.15)
        return smooth_min(out, limb_distance(p, b, e, 0.13, 0.06), 0.15)

    def bark(p: Array, d: Array, n: Array) -> Surface:
        s = Surface.plain(n, (0.07, 0.055, 0.042), 0.285)
        groove = fbm(p[:, 0] * 34, p[:, 1] * 5, salt, 3)
        s.albedo *= (0.35 + 1.3 * groove)[:, None]
        s.heat += 0.02 * (groove - 0.5)
        return s

    return Marched((x - 1.4, 0, z - 0.3), (x + 1.4, 5.4, z + 0.3), distance, bark)


@dataclass(frozen=True)
class _Person:
    """Somebody on foot; heading in radians, 0 away from the eye, the rest in metres and RGB."""

    x: float
    z: float
    heading: float
    height: float
    stride: float
    coat: tuple[float, float, float]
    trousers: tuple[float, float, float]

    def blockers(self) -> list[Blocker]:
        return [Blocker(self.x, self.z, 0.24, self.height)]

    def solid(self, salt: int) -> Marched:
        base = 0.13 if not _ROAD[0] < self.x < _ROAD[1] else 0.0
        scale = self.height / 1.78
        sin, cos = np.float32(np.sin(self.heading)), np.float32(np.cos(self.heading))
        limbs = [
            (kind, np.asarray(a, np.float32), np.asarray(b, np.float32), ra, rb)
            for kind, a, b, ra, rb in self._limbs()
        ]

        def local(p: Array) -> Array:
            x, z = p[:, 0] - np.float32(self.x), p[:, 2] - np.float32(self.z)
            y = p[:, 1] - np.float32(base)
            return np.stack([cos * x - sin * z, y, sin * x + cos * z], axis=1) / np.float32(scale)

        def distance(p: Array) -> Array:
            q = local(p)
            out = None
            for _, a, b, ra, rb in limbs:
                one = limb_distance(q, a, b, ra, rb)
                out = one if out is None else smooth_min(out, one, 0.045)
            return out * np.float32(scale)

        def look(p: Array, d: Array, n: Array) -> Surface:
            q = local(p)
            each = np.stack([limb_distance(q, a, b, ra, rb) for _, a, b, ra, rb in limbs])
            kind = np.asarray([k for k, *_ in limbs])[np.argmin(each, axis=0)]
            s = Surface.plain(n, self.coat, 0.60)
            folds = fbm(q[:, 0] * 9 + q[:, 2] * 7, q[:, 1] * 5, salt, 3) - 0.5
            head = kind == _HEAD
            hair = head & ((q[:, 1] > 1.69) | ((q[:, 2] < -0.005) & (q[:, 1] > 1.585)))
            face = head & ~hair
            s.heat += 0.34 * folds
            weave = value_noise(q[:, 0] * 45 + q[:, 2] * 45, q[:, 1] * 30, salt + 1) - 0.5
            s.albedo *= (1 + 1.7 * folds + 0.5 * weave)[:, None]
            band = (kind == _COAT) & (np.abs(q[:, 1] - 1.22) < 0.035)
            s.albedo[band] = 0.55 * s.albedo[band] + 0.09 * max(self.coat) / 0.2
            hem = (np.abs(q[:, 1] - 0.93) < 0.018) & (kind == _COAT)
            s.paint(hem, albedo=(0.015, 0.014, 0.013))
            s.heat -= 0.05 * hem
            # An open collar, and warmth at the chest, where the coat is thin.
            s.heat += 0.12 * np.exp(-((q[:, 0] / 0.12) ** 2 + ((q[:, 1] - 1.42) / 0.13) ** 2))
            legs = kind == _LEG
            s.paint(legs, albedo=self.trousers, heat=(0.70 + 0.3 * folds)[legs])
            s.paint(face, albedo=(0.30, 0.19, 0.14), heat=0.98)
            s.paint(hair, albedo=(0.02, 0.016, 0.013), heat=0.80)
            s.paint(kind == _HAND, albedo=(0.30, 0.19, 0.14), heat=0.93)
            s.paint(kind == _SHOE, albedo=(0.02, 0.02, 0.02), heat=0.52)
            facing = np.abs(np.einsum("ij,ij->i", n, d)) / np.linalg.norm(d, axis=1)
            s.heat *= 0.86 + 0.14 * facing
            return s

        low = self.x - 0.52, base, self.z - 0.52
        high = self.x + 0.52, base + self.height + 0.05, self.z + 0.52
        return Marched(low, high, distance, look)

    def _limbs(self) -> list[tuple[int, tuple, tuple, float, float]]:
        step = self.stride
        limbs = [
            (_HEAD, (0, 1.59, 0.015), (0, 1.675, -0.01), 0.082, 0.1),
            (_HAND, (0, 1.42, -0.01), (0, 1.56, 0), 0.055, 0.055),
            (_COAT, (-0.1, 1.37, -0.01), (0.1, 1.37, -0.01), 0.105, 0.105),
            (_COAT, (-0.06, 1.3, 0), (-0.055, 1.0, 0), 0.125, 0.12),
            (_COAT, (0.06, 1.3, 0), (0.055, 1.0, 0), 0.125, 0.12),
            (_COAT, (0, 1.0, 0), (0, 0.84, 0.0), 0.16, 0.165),
        ]
        for side in (-1, 1):
            swing = side * step
            knee = (side * 0.095, 0.5, 0.24 * swing + 0.05)
            ankle = (side * 0.09, 0.09 + 0.09 * (swing < -0.3), 0.36 * swing - 0.05)
            toe = (side * 0.1, 0.05 + 0.02 * (swing < -0.3), 0.36 * swing + 0.11)
            elbow = (side * 0.265, 1.1, -0.16 * swing - 0.03)
            hand = (side * 0.25, 0.87, -0.3 * swing + 0.09)
            limbs += [
                (_LEG, (side * 0.085, 0.9, 0), knee, 0.098, 0.066),
                (_LEG, knee, ankle, 0.066, 0.05),
                (_SHOE, ankle, toe, 0.05, 0.042),
                (_COAT, (side * 0.2, 1.37, -0.01), elbow, 0.07, 0.055),
                (_COAT, elbow, hand, 0.052, 0.042),
                (_HAND, hand, (hand[0], hand[1] - 0.07, hand[2] + 0.02), 0.042, 0.035),
            ]
        return limbs


_HEAD, _HAND, _COAT, _LEG, _SHOE = range(5)


_PROFILE = (
    (-2.04, 0.27), (-2.1, 0.5), (-2.06, 0.9), (-1.98, 0.97), (-1.62, 1.40), (-0.9, 1.47),
    (0.05, 1.45), (0.35, 1.37), (1.08, 0.97), (1.85, 0.83), (2.06, 0.7), (2.1, 0.42), (2.02, 0.24),
)  # fmt: skip
_AXLES = (-1.3, 1.32)


@dataclass(frozen=True)
class _Car:
    """A hatchback whose nearest bumper is at depth `z`."""

    x: float
    z: float
    toward_eye: bool
    running: bool
    paint: tuple[float, float, float]

    def blockers(self) -> list[Blocker]:
        return [Blocker(self.x, self.z + dz, 0.8, 1.1) for dz in (1.0, 2.1, 3.2)]

    def _local(self, p: Array) -> Array:
        x, z = p[:, 0] - np.float32(self.x), p[:, 2] - np.float32(self.z + 2.1)
        return np.stack([-x, p[:, 1], -z] if self.toward_eye else [x, p[:, 1], z], axis=1)

    def _half_width(self, y: Array, z: Array) -> Array:
        width = 0.83 - 0.42 * np.maximum(y - 0.9, 0) - 0.1 * np.maximum(0.45 - y, 0)
        return width - 0.28 * np.maximum(np.abs(z) - 1.55, 0) ** 2

    def _distance(self, p: Array) -> Array:
        q = self._local(p)
        x, y, z = np.abs(q[:, 0]), q[:, 1], q[:, 2]
        side = x - self._half_width(y, z)
        body = -smooth_min(-polygon_distance(z, y, _PROFILE), -side, 0.09) - 0.02
        wheels = np.full_like(x, 9)
        for axle in _AXLES:
            r = np.hypot(z - axle, y - 0.31)
            body = np.maximum(body, -np.maximum(r - 0.37, 0.58 - x))
            wheels = np.minimum(wheels, np.maximum(r - 0.31, np.abs(x - 0.7) - 0.1))
        mirrors = (0.85 * (x - 0.89)) ** 2 + (1.4 * (y - 1.0)) ** 2 + (1.6 * (z - 0.62)) ** 2
        mirrors = np.sqrt(mirrors) - 0.1
        return np.minimum(np.minimum(body, wheels), mirrors).astype(np.float32)

    def solid(self, salt: int) -> Marched:
        low, high = (self.x - 1.05, 0, self.z - 0.1), (self.x + 1.05, 1.55, self.z + 4.3)
        return Marched(low, high, self._distance, self._look(salt))

    def _look(self, salt: int) -> Material:
        on = self.running

        def look(p: Array, d: Array, n: Array) -> Surface:
            q = self._local(p)
            x, y, z = np.abs(q[:, 0]), q[:, 1], q[:, 2]
            m = self._local(n + np.asarray([self.x, 0, self.z + 2.1], np.float32))
            s = Surface.plain(n, self.paint, 0.335 if on else 0.265, 0.5)
            seams = (np.abs(z - 0.62) < 0.012) | (np.abs(z + 0.42) < 0.012)
            s.paint(seams & (x > 0.7), albedo=(0.01, 0.01, 0.01))
            low = y < 0.36
            s.paint(low, albedo=(0.02, 0.02, 0.02), gloss=0.1)
            if on:
                bonnet = smoothstep(0.75, 1.35, z) * smoothstep(0.62, 0.8, y)
                s.heat += 0.42 * bonnet * (0.75 + 0.5 * value_noise(q[:, 0] * 2.2, z * 2, salt))
            # Glass: the cold sky mirrors in it, and behind a warm windscreen it still looks cool.
            cabin = (y > 0.99) & (y < 1.385)
            half = self._half_width(y, z)
            screen = cabin & (m[:, 2] > 0.25) & (x < half - 0.075)
            rear = cabin & (m[:, 2] < -0.25) & (x < half - 0.1) & (y > 1.03)
            door = cabin & (np.abs(m[:, 0]) > 0.6) & (z < 0.72 - 0.9 * (y - 1)) & (z > -1.5)
            door &= np.abs(z + 0.42) > 0.045
            inside = 0.29 if on else 0.21
            s.paint(screen | rear | door, albedo=(0.012, 0.013, 0.014), heat=inside, gloss=0.32)
            if on:
                driver = np.exp(-(((q[:, 0] - 0.36) / 0.17) ** 2 + ((y - 1.14) / 0.13) ** 2))
                s.heat += np.where(screen, 0.13 * driver, 0)
            nose = m[:, 2] > 0.3
            grille = nose & (y > 0.56) & (y < 0.7) & (x < 0.42)
            bars = 0.012 + 0.12 * ((y[grille] / 0.035) % 1 < 0.4)
            s.paint(
                grille,
                albedo=np.repeat(bars[:, None], 3, axis=1),
                heat=0.74 if on else 0.27,
                gloss=0.3,
            )
            intake = nose & (y > 0.3) & (y < 0.42) & (x < 0.55)
            s.paint(intake, albedo=(0.012, 0.012, 0.012), heat=0.66 if on else 0.26, gloss=0.1)
            plate = (np.abs(m[:, 2]) > 0.3) & (y > 0.43) & (y < 0.54) & (x < 0.26)
            marks = plate & (np.abs((q[:, 0] / 0.066) % 1 - 0.5) < 0.28)
            marks &= (np.abs(y - 0.485) < 0.034) & (cell01(q[:, 0] / 0.022, y / 0.02, salt) > 0.3)
            s.paint(plate, albedo=(0.5, 0.48, 0.4), gloss=0.1)
            s.paint(marks, albedo=(0.03, 0.03, 0.04))
            lens = nose & (((x - 0.63) / 0.17) ** 2 + ((y - 0.66) / 0.075) ** 2 < 1)
            s.paint(lens, albedo=(0.4, 0.4, 0.4), gloss=0.9)
            tail = (m[:, 2] < -0.2) & (x > 0.5) & (y > 0.72) & (y < 0.92)
            s.paint(tail, albedo=(0.28, 0.01, 0.01), gloss=0.8)
            if on:
                s.paint(lens, glow=(13.0, 12.3, 11.0), heat=0.6)
            for axle in _AXLES:
                r = np.hypot(z - axle, y - 0.31)
                wheel = (r < 0.325) & (x > 0.6) & (x < 0.86) & (y < 0.64)
                s.paint(wheel, albedo=(0.018, 0.018, 0.018), heat=0.60 if on else 0.29, gloss=0.05)
                s.paint(wheel & (r < 0.2), albedo=(0.2, 0.2, 0.2), heat=0.72 if on else 0.26)
            return s

        return look
