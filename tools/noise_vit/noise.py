"""Procedural noise: dead leaves, 1/f spectra and oriented textures, without any photo.

Such images suffice to train useful visual features (Baradad et al. 2021, "Learning to see by
looking at noise"). Dead leaves are shapes that cover one another, with sizes that follow a power
law (Lee, Mumford and Huang 2001).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw

SIZE = 96
"""Height and width of an image in pixels; training crops smaller views from it."""

KINDS = ("leaves", "textured leaves", "spectrum", "oriented")
SHARES = (0.3, 0.4, 0.15, 0.15)

_LARGEST_INDEX = 255
_SMALLEST, _LARGEST = 2.5, 40.0


def noise_image(seed: int, number: int) -> UInt8[np.ndarray, "96 96 3"]:
    """Render image `number` of a seed; the same pair gives the same image.

    Args:
        seed: which collection.
        number: which image of the collection.
    """
    rng = np.random.default_rng([seed, number])
    kind = KINDS[int(np.searchsorted(np.cumsum(SHARES), rng.random(), side="right"))]
    if kind == "spectrum":
        pixels = _coloured(rng, _texture(rng, oriented=False, channels=3))
    elif kind == "oriented":
        pixels = _coloured(rng, _texture(rng, oriented=True, channels=3))
    else:
        pixels = dead_leaves(rng, textured=kind == "textured leaves")
    image: UInt8[np.ndarray, "96 96 3"] = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image


def dead_leaves(rng: np.random.Generator, *, textured: bool) -> Float32[np.ndarray, "96 96 3"]:
    """Draw up to 255 shapes on top of one another; radii have the density r⁻³.

    Args:
        rng: source of randomness.
        textured: give each shape a texture of its own strength instead of a flat colour.
    """
    count = int(rng.integers(20, _LARGEST_INDEX))
    # Inverse transform of the density r⁻³ between the smallest and the largest radius.
    low, high = _SMALLEST**-2, _LARGEST**-2
    radii = (low - rng.random(count) * (low - high)) ** -0.5
    page = Image.new("L", (SIZE, SIZE), 0)
    draw = ImageDraw.Draw(page)
    corners = int(rng.integers(0, 4))
    for index, radius in enumerate(radii, start=1):
        x, y = rng.uniform(-0.1, 1.1, 2) * SIZE
        _draw_shape(draw, rng, corners, float(x), float(y), float(radius), index)
    shape_of = np.asarray(page)
    colours = _palette(rng, count + 1)
    pixels = colours[shape_of]
    if textured:
        textures = np.stack([_texture(rng, oriented=bool(i % 2), channels=1) for i in range(3)])
        own = rng.integers(0, 3, count + 1)[shape_of]
        strength = rng.uniform(0, 0.25, count + 1).astype(np.float32)[shape_of]
        rows, columns = np.indices(shape_of.shape)
        pixels = pixels + strength[..., None] * textures[own, rows, columns]
    leaves: Float32[np.ndarray, "96 96 3"] = pixels
    return leaves


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    corners: int,
    x: float,
    y: float,
    radius: float,
    index: int,
) -> None:
    """Draw an ellipse, or a rotated polygon of 3 to 6 corners; `corners` 3 mixes them."""
    wanted = int(rng.integers(0, 3)) if corners == 3 else corners
    squeeze, angle = rng.uniform(0.4, 1.0), rng.uniform(0, 2 * math.pi)
    number = {0: 24, 1: 4, 2: int(rng.integers(3, 7))}[wanted]
    around = 2 * math.pi * np.arange(number) / number
    along, across = radius * np.cos(around), radius * squeeze * np.sin(around)
    cos, sin = math.cos(angle), math.sin(angle)
    xs, ys = x + cos * along - sin * across, y + sin * along + cos * across
    draw.polygon(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=index)


def _texture(
    rng: np.random.Generator, *, oriented: bool, channels: int
) -> Float32[np.ndarray, "96 96 channels"]:
    """Return noise of zero mean and unit variance with the amplitude spectrum 1/f^a.

    Args:
        rng: source of randomness; it draws a from 0.5 to 2.
        oriented: keep the frequencies of one orientation and one octave.
        channels: number of independent channels.
    """
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :]
    frequency = np.maximum(np.hypot(fx, fy), 1 / SIZE)
    amplitude = frequency ** -rng.uniform(0.5, 2.0)
    if oriented:
        turn, centre = rng.uniform(0, math.pi), 2 ** rng.uniform(-5, -1.5)
        away = np.sin(np.arctan2(fy, fx) - turn)
        octaves = np.log2(frequency / centre)
        amplitude = amplitude * np.exp(-((away / 0.2) ** 2)) * np.exp(-(octaves**2) / 0.5)
    amplitude[0, 0] = 0
    noise = rng.standard_normal((channels, *amplitude.shape, 2)).astype(np.float32)
    waves = np.fft.irfft2(amplitude * (noise[..., 0] + 1j * noise[..., 1]), s=(SIZE, SIZE))
    waves -= waves.mean(axis=(1, 2), keepdims=True)
    waves /= waves.std(axis=(1, 2), keepdims=True) + 1e-12
    return np.moveaxis(waves, 0, -1).astype(np.float32)


def _coloured(
    rng: np.random.Generator, waves: Float32[np.ndarray, "96 96 3"]
) -> Float32[np.ndarray, "96 96 3"]:
    """Mix three independent channels into correlated colours around a random mean."""
    grey, chroma = rng.uniform(0.05, 0.25), rng.uniform(0, 0.15)
    mean = rng.uniform(0.15, 0.85, 3)
    mixed = mean + grey * waves[..., :1] + chroma * waves
    return mixed.astype(np.float32)


def _palette(rng: np.random.Generator, count: int) -> Float32[np.ndarray, "count 3"]:
    """Draw colours around a few centres, as the surfaces of one scene would have."""
    centres = rng.uniform(0, 1, (int(rng.integers(2, 7)), 3))
    spread = rng.uniform(0.02, 0.25)
    chosen = centres[rng.integers(0, len(centres), count)]
    return np.clip(chosen + spread * rng.standard_normal((count, 3)), 0, 1).astype(np.float32)
