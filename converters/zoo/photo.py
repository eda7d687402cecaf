"""Photo-like pictures of small gray scans: a sheet of paper, a pen and a phone camera.

A ``Scene`` holds every random choice in units of the photo's shorter side, so one scene
rasterizes at any resolution: full size for the photos people upload, a fraction of it for
training. Order of the imaging steps, as in a camera: ink and clutter on paper, uneven
light and color cast, optical blur, sensor noise, JPEG.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["Scene", "draw_scene", "encode_jpeg", "rasterize"]

_CELLS = 12
"""Cells across the ink patch: the 8 of a scan and a margin of 2 on each side."""
_SCENE_STREAM, _NOISE_STREAM = 0, 1
_LIGHT_GRID = 24


@dataclass(frozen=True, slots=True)
class Stroke:
    """A clutter stroke: a polyline in units of the shorter side."""

    points: tuple[tuple[float, float], ...]
    width: float
    opacity: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One photo's random choices. Lengths are shares of the shorter side."""

    seed: int
    aspect: float
    """Width over height."""
    shorter_side_px: int
    """Of the photo at full size."""
    corners: tuple[tuple[float, float], ...]
    """Where the ink patch's corners fall: top left, top right, bottom right, bottom left."""
    strokes: tuple[Stroke, ...]
    desk: tuple[float, float, float] | None
    """Edge of the paper, ``nx * x + ny * y > d`` is desk; None: paper fills the photo."""
    desk_color: tuple[float, float, float]
    paper_color: tuple[float, float, float]
    ink_color: tuple[float, float, float]
    ink_gain: float
    cast: tuple[float, float, float]
    """White-balance error: a factor a channel."""
    light: tuple[float, float, float]
    """Brightness in the middle, and its slope along x and y."""
    shadow: tuple[float, float, float, float, float]
    """A soft-edged shadow: normal x, normal y, offset, softness, depth."""
    blur: float
    luma_noise: float
    chroma_noise: float
    """Standard deviations at full size, of 255."""
    jpeg_quality: int


def draw_scene(seed: int) -> Scene:
    """Draw every random choice of a photo from ``seed`` alone."""
    rng = np.random.default_rng([seed, _SCENE_STREAM])

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    aspect = float(rng.choice([4 / 3, 1.0, 3 / 4]))
    shorter_side_px = int(rng.integers(272, 321))
    width, height = (aspect, 1.0) if aspect >= 1 else (1.0, 1 / aspect)
    center = (width / 2 + between(-0.16, 0.16), height / 2 + between(-0.16, 0.16))
    size = between(0.26, 0.46) * _CELLS / 8
    paper = between(0.72, 0.97)
    tint = between(-0.06, 0.05)
    ink = rng.choice([(0.10, 0.10, 0.12), (0.10, 0.16, 0.45), (0.42, 0.12, 0.12), (0.3, 0.3, 0.3)])
    angle = between(0, 2 * math.pi)
    desk_angle = between(0, 2 * math.pi)
    return Scene(
        seed=seed,
        aspect=aspect,
        shorter_side_px=shorter_side_px,
        corners=_corners(rng, center, size),
        strokes=_clutter(rng, center, 0.5 * size * 8 / _CELLS, width, height),
        desk=(
            (math.cos(desk_angle), math.sin(desk_angle), between(0.42, 0.6))
            if rng.random() < 0.35
            else None
        ),
        desk_color=(between(0.1, 0.5), between(0.1, 0.4), between(0.08, 0.35)),
        paper_color=(paper, paper + 0.3 * tint, paper + tint),
        ink_color=(float(ink[0]), float(ink[1]), float(ink[2])),
        ink_gain=between(0.55, 1.0),
        cast=(between(0.86, 1.1), between(0.94, 1.04), between(0.82, 1.12)),
        light=(between(0.55, 1.0), between(-0.35, 0.35), between(-0.35, 0.35)),
        shadow=(
            math.cos(angle),
            math.sin(angle),
            between(-0.3, 0.3),
            between(0.02, 0.25),
            between(0.0, 0.55),
        ),
        blur=between(0.001, 0.011),
        luma_noise=between(5.0, 11.0),
        chroma_noise=between(2.0, 7.0),
        jpeg_quality=int(rng.integers(85, 91)),
    )


def _corners(
    rng: np.random.Generator, center: tuple[float, float], size: float
) -> tuple[tuple[float, float], ...]:
    """Rotate, shear, stretch and tilt the square patch."""
    angle = math.radians(float(rng.uniform(-24, 24)))
    shear = float(rng.uniform(-0.22, 0.22))
    stretch = float(rng.uniform(0.82, 1.18))
    cos, sin = math.cos(angle), math.sin(angle)
    corners = []
    for x, y in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)):
        u = (x + shear * y) * stretch + float(rng.uniform(-0.07, 0.07))
        v = y / stretch + float(rng.uniform(-0.07, 0.07))
        corners.append(
            (center[0] + size * (cos * u - sin * v), center[1] + size * (sin * u + cos * v))
        )
    return tuple(corners)


def _clutter(
    rng: np.random.Generator,
    center: tuple[float, float],
    clearance: float,
    width: float,
    height: float,
) -> tuple[Stroke, ...]:
    """Ruled lines, stray pen strokes and specks. Strokes start clear of the digit."""
    strokes: list[Stroke] = []
    if rng.random() < 0.45:
        pitch = float(rng.uniform(0.12, 0.24))
        tilt = float(rng.uniform(-0.12, 0.12))
        opacity = float(rng.uniform(0.08, 0.28))
        offset = float(rng.uniform(0, pitch))
        for row in range(int((height + 0.4) / pitch)):
            y = offset + row * pitch - 0.2
            strokes.append(Stroke(((0.0, y), (width, y + tilt)), 0.006, opacity))
    for _ in range(int(rng.integers(2, 8))):
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        away = math.hypot(x - center[0], y - center[1])
        if away < clearance * 1.15:
            continue
        points = [(x, y)]
        heading = float(rng.uniform(0, 2 * math.pi))
        for _ in range(int(rng.integers(1, 6))):
            heading += float(rng.normal(0, 0.7))
            step = float(rng.uniform(0.02, 0.09))
            x, y = x + step * math.cos(heading), y + step * math.sin(heading)
            if math.hypot(x - center[0], y - center[1]) < clearance * 0.95:
                break
            points.append((x, y))
        if len(points) > 1:
            stroke_width = float(rng.uniform(0.008, 0.03))
            strokes.append(Stroke(tuple(points), stroke_width, float(rng.uniform(0.3, 0.9))))
    return tuple(strokes)


def rasterize(
    scene: Scene, scan: NDArray[np.uint8], shorter_side_px: int | None = None
) -> NDArray[np.uint8]:
    """The photo as uint8 RGB ``[H, W, 3]``.

    ``scan``: uint8 ``[8, 8]``, 0 (paper) to 16 (ink). ``shorter_side_px`` defaults to the
    scene's own; at a smaller one the noise is as weak as averaging would leave it.
    """
    side = shorter_side_px or scene.shorter_side_px
    width = round(side * max(scene.aspect, 1.0))
    height = round(side * max(1 / scene.aspect, 1.0))
    rng = np.random.default_rng([scene.seed, _NOISE_STREAM])
    shrink = side / scene.shorter_side_px

    ink = np.maximum(_ink(scene, scan, width, height, side), _strokes(scene, width, height, side))
    paper = _field(rng, 10, width, height) * 0.022 + _field(rng, 90, width, height) * 0.018
    light = _light(scene, width, height)
    photo = np.empty((height, width, 3), np.float32)
    coverage = ink * (scene.ink_gain / 255.0)
    desk = _desk(scene, width, height)
    for channel in range(3):
        base = scene.paper_color[channel] + paper
        plane = base + coverage * (scene.ink_color[channel] - base)
        if desk is not None:
            plane += desk * (scene.desk_color[channel] - plane)
        photo[:, :, channel] = plane * light * scene.cast[channel]
    np.clip(photo, 0.0, 1.0, out=photo)
    # A tone curve close to sRGB's keeps shadows readable, as cameras do.
    np.sqrt(photo, out=photo)
    blurred = Image.fromarray((photo * 255.0 + 0.5).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(scene.blur * side)
    )
    return _add_noise(rng, np.asarray(blurred), scene, shrink)


def _ink(
    scene: Scene, scan: NDArray[np.uint8], width: int, height: int, side: int
) -> NDArray[np.float32]:
    """Opacity of the digit's ink, 0 to 255, warped onto the photo."""
    padded = np.zeros((_CELLS, _CELLS), np.uint8)
    padded[2:10, 2:10] = np.minimum(scan.astype(np.uint16) * 16, 255)
    (x0, y0), (x1, y1) = scene.corners[0], scene.corners[2]
    patch = max(_CELLS, round(math.hypot(x1 - x0, y1 - y0) * side / math.sqrt(2)))
    smooth = Image.fromarray(padded).resize((patch, patch), Image.Resampling.BICUBIC)
    target = [(x * side, y * side) for x, y in scene.corners]
    warped = smooth.transform(
        (width, height),
        Image.Transform.PERSPECTIVE,
        _homography(target, patch),
        Image.Resampling.BILINEAR,
    )
    # A pen's line is darker and has a harder edge than the scan's gray levels.
    return np.clip((np.asarray(warped, np.float32) - 40.0) * 1.5, 0.0, 255.0)


def _homography(corners: list[tuple[float, float]], patch: int) -> tuple[float, ...]:
    """Coefficients that map photo pixels back to the patch, for ``Image.transform``.

    Solves ``u = (a x + b y + c) / (g x + h y + 1)``, ``v = (d x + e y + f) / (...)`` for
    the four corner pairs.
    """
    rows: list[list[float]] = []
    values: list[float] = []
    square = ((0.0, 0.0), (patch, 0.0), (patch, patch), (0.0, patch))
    for (x, y), (u, v) in zip(corners, square, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
        values += [u, v]
    solved = np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64))
    return tuple(float(value) for value in solved)


def _strokes(scene: Scene, width: int, height: int, side: int) -> NDArray[np.float32]:
    """Opacity of the clutter, 0 to 255."""
    layer = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(layer)
    for stroke in scene.strokes:
        thickness = stroke.width * side
        # A line thinner than a pixel covers only a part of it.
        opacity = stroke.opacity * min(1.0, thickness)
        points = [(x * side, y * side) for x, y in stroke.points]
        draw.line(points, fill=round(255 * opacity), width=max(1, round(thickness)), joint="curve")
    return np.asarray(layer, np.float32)


def _field(rng: np.random.Generator, cells: int, width: int, height: int) -> NDArray[np.float32]:
    """Smooth unit-variance noise, ``cells`` grid points across, float32 ``[H, W]``."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(smooth, np.float32)


def _light(scene: Scene, width: int, height: int) -> NDArray[np.float32]:
    """Brightness over the photo: a slope, a soft shadow and the lens's vignette."""
    y, x = np.mgrid[-0.5 : 0.5 : _LIGHT_GRID * 1j, -0.5 : 0.5 : _LIGHT_GRID * 1j]
    level, slope_x, slope_y = scene.light
    normal_x, normal_y, offset, softness, depth = scene.shadow
    shade = 1.0 / (1.0 + np.exp(-(normal_x * x + normal_y * y - offset) / softness))
    grid = (level + slope_x * x + slope_y * y) * (1 - depth * shade) * (1 - 0.5 * (x * x + y * y))
    smooth = Image.fromarray(np.maximum(grid, 0.08).astype(np.float32))
    return np.asarray(smooth.resize((width, height), Image.Resampling.BILINEAR), np.float32)


def _desk(scene: Scene, width: int, height: int) -> NDArray[np.float32] | None:
    """Coverage of the desk beyond the paper's edge, 0 to 1."""
    if scene.desk is None:
        return None
    normal_x, normal_y, distance = scene.desk
    side = min(width, height)
    x = (np.arange(width, dtype=np.float32) - width / 2) / side * normal_x
    y = (np.arange(height, dtype=np.float32) - height / 2) / side * normal_y
    return np.clip((x[None, :] + y[:, None] - distance) * side + 0.5, 0.0, 1.0)


def _add_noise(
    rng: np.random.Generator, rgb: NDArray[np.uint8], scene: Scene, shrink: float
) -> NDArray[np.uint8]:
    """Sensor noise: white in luma, coarser by two in chroma, as demosaicing leaves it."""
    height, width = rgb.shape[:2]
    luma = rng.standard_normal((height, width), dtype=np.float32) * (scene.luma_noise * shrink)
    half = ((height + 1) // 2, (width + 1) // 2, 2)
    chroma = rng.standard_normal(half, dtype=np.float32) * (scene.chroma_noise * shrink)
    wide = chroma.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    noisy = rgb.astype(np.float32)
    noisy += luma[:, :, None]
    noisy[:, :, 0] += wide[:, :, 0]
    noisy[:, :, 2] += wide[:, :, 1]
    np.clip(noisy, 0.0, 255.0, out=noisy)
    return (noisy + 0.5).astype(np.uint8)


def encode_jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """Baseline JPEG with 4:2:0 chroma, no metadata."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
