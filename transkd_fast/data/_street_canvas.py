"""Camera, light and drawing surface of the procedural street scenes.

A scene is drawn once, with PIL, as a map of surface numbers at twice the final size; colours, depths and class labels
are looked up from the number. So image and labels cannot disagree, and the shading is a few array operations.

World coordinates are metres: x to the right of the camera, y up from the ground, z ahead of the camera.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]
Point = tuple[float, float, float]

NEAR = 0.7
FAR = 400.0
TURN = tuple((math.cos(math.tau * k / 10), math.sin(math.tau * k / 10)) for k in range(10))
CLOTHES: tuple[Colour, ...] = (
    (0.12, 0.13, 0.18),
    (0.2, 0.28, 0.5),
    (0.6, 0.16, 0.16),
    (0.85, 0.85, 0.83),
    (0.28, 0.4, 0.26),
    (0.7, 0.55, 0.2),
    (0.4, 0.36, 0.34),
    (0.55, 0.3, 0.5),
)


class Label(IntEnum):
    """Classes of the scenes; those that CamVid has are numbered as in CamVid."""

    SKY = 0
    BUILDING = 1
    POLE = 2
    ROAD = 3
    PAVEMENT = 4
    TREE = 5
    SIGN = 6
    MARKING = 7
    CAR = 8
    PEDESTRIAN = 9


class Kind(IntEnum):
    """How depth and texture of a surface follow from a pixel."""

    SKY = 0
    GROUND = 1
    FACADE = 2
    UPRIGHT = 3


@dataclass(frozen=True)
class Camera:
    """Pinhole camera above the road.

    Attributes:
        width, height: pixels of the drawing.
        focal: focal length in pixels.
        eye: height above the ground in metres.
        centre: vanishing point (x, y) in pixels; y is the horizon.
        roll: rotation about the vanishing point in radians.
    """

    width: int
    height: int
    focal: float
    eye: float
    centre: tuple[float, float]
    roll: float

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Pixel of a point ahead of the camera."""
        u = self.focal * x / z
        v = self.focal * (self.eye - y) / z
        return self.centre[0] + u - self.roll * v, self.centre[1] + v + self.roll * u

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """Direction (x, y) per unit of z of each pixel, two float32 [height, width] maps: the inverse of `project`."""
        u = np.arange(self.width, dtype=np.float32)[None, :] - np.float32(self.centre[0])
        v = np.arange(self.height, dtype=np.float32)[:, None] - np.float32(self.centre[1])
        scale = np.float32(1 / (self.focal * (1 + self.roll**2)))
        roll = np.float32(self.roll)
        return (u + roll * v) * scale, (roll * u - v) * scale


@dataclass(frozen=True)
class Light:
    """Light and weather of a scene; colours are factors or RGB in [0, 1].

    Attributes:
        night: street lamps, headlights and windows are lit.
        sun: direction to the sun, unit vector.
        sun_colour, ambient: light on a surface that faces the sun, and on every surface.
        zenith, horizon: sky colours.
        clouds: share of the sky that is covered.
        visibility: distance in metres over which contrast falls to 1/e.
        rain: strength of rain in [0, 1]; wet roads reflect.
        shadow: darkness of cast shadows in [0, 1].
    """

    night: bool
    sun: Point
    sun_colour: Colour
    ambient: Colour
    zenith: Colour
    horizon: Colour
    clouds: float
    visibility: float
    rain: float
    shadow: float


class Surface(NamedTuple):
    """A surface of one colour: what a surface number stands for.

    Attributes:
        label: class index.
        colour: albedo, RGB in [0, 1].
        depth: z of an upright surface.
        normal: unit normal, for shading.
        kind: how depth and texture follow from a pixel.
        grain: strength of the texture.
        scale: texture elements per metre.
        glow: emitted light, as a factor of the colour.
    """

    label: int
    colour: Colour
    depth: float = 0.0
    normal: Point = (0.0, 0.0, -1.0)
    kind: int = Kind.UPRIGHT
    grain: float = 0.04
    scale: float = 40.0
    glow: float = 0.0


@dataclass(frozen=True)
class Facade:
    """A wall in the plane x = start + slope * z (`across` False) or z = start, with a grid of windows.

    Attributes:
        across: the wall faces the camera.
        start, slope: the plane.
        height: height of the wall in metres.
        bay, floor: width and height of a window's cell in metres.
        pane: half the share of a cell's width that is glass.
        shop: the ground floor is a shop front.
        accent: colour of the shop's fascia.
        glass: colour of an unlit pane.
    """

    across: bool
    start: float
    slope: float
    height: float
    bay: float
    floor: float
    pane: float
    shop: bool
    accent: Colour
    glass: Colour


class Canvas:
    """Draws surfaces back to front into the map of surface numbers, and shadows into a mask beside it.

    Args:
        camera: projection and size of the drawing.
        light: light that falls on the surfaces.
    """

    def __init__(self, camera: Camera, light: Light) -> None:
        self.camera = camera
        self.light = light
        size = (camera.width, camera.height)
        self.ids = Image.new("I", size, 0)
        self.shadows = Image.new("L", size, 0)
        self._draw = ImageDraw.Draw(self.ids)
        self._draw_shadow = ImageDraw.Draw(self.shadows)
        self.surfaces = [Surface(Label.SKY, (0.0, 0.0, 0.0), depth=1e6, kind=Kind.SKY)]
        self.facades: dict[int, Facade] = {}
        self.lamps: list[tuple[float, float, float, float, Colour]] = []

    def surface(self, *columns: Any, **named: Any) -> int:
        """Adds `Surface(*columns, **named)` and returns its number."""
        self.surfaces.append(Surface(*columns, **named))
        return len(self.surfaces) - 1

    def polygon(self, points: Sequence[Point], surface: int) -> None:
        """Fills a polygon of world points, cut off at the near plane."""
        pixels = self._project(points)
        if len(pixels) > 2:
            self._draw.polygon(pixels, fill=surface)

    def shadow(self, points: Sequence[Point], strength: float) -> None:
        """Darkens a polygon on the ground."""
        if strength <= 0:
            return
        pixels = self._project(points)
        if len(pixels) > 2:
            self._draw_shadow.polygon(pixels, fill=int(255 * strength))

    def cast(self, points: Sequence[Point]) -> list[Point]:
        """Where the shadows of world points fall on the ground, at most 40 m away."""
        sun_x, sun_y, sun_z = self.light.sun
        reach = 1 / max(sun_y, 0.1)
        return [(x - sun_x * y * reach, 0.0, z - sun_z * y * reach) for x, y, z in points]

    def flat(self, x: float, z: float, outline: Sequence[tuple[float, float]], surface: int, y: float = 0.0) -> None:
        """Fills a polygon, given in metres about (x, y), that faces the camera at distance z."""
        (u, v), roll = self.camera.project(x, y, z), self.camera.roll
        unit = self.camera.focal / z
        pixels = [(u + unit * (dx + roll * dy), v + unit * (roll * dx - dy)) for dx, dy in outline]
        self._draw.polygon(pixels, fill=surface)

    def box(self, x: float, z: float, left: float, bottom: float, right: float, top: float, surface: int) -> None:
        """Fills a rectangle, given in metres about (x, 0), that faces the camera at distance z."""
        self.flat(x, z, ((left, bottom), (right, bottom), (right, top), (left, top)), surface)

    def disc(self, x: float, y: float, z: float, radius: float, surface: int) -> None:
        """Fills a circle that faces the camera."""
        u, v = self.camera.project(x, y, z)
        r = self.camera.focal * radius / z
        self._draw.ellipse((u - r, v - r, u + r, v + r), fill=surface)

    def pixels(self, outline: Sequence[tuple[float, float]], surface: int) -> None:
        """Fills a polygon given in pixels."""
        self._draw.polygon(list(outline), fill=surface)

    def sees(self, x: float, z: float, reach: float) -> bool:
        """Whether an object within `reach` metres beside (x, z) can be in the picture."""
        camera = self.camera
        left = camera.centre[0] + camera.focal * (x - reach) / z
        return left < camera.width and left + 2 * camera.focal * reach / z > 0

    def lamp(self, x: float, y: float, z: float, power: float, colour: Colour) -> None:
        """Adds a light that glows in the image."""
        self.lamps.append((x, y, z, power, colour))

    def _project(self, points: Sequence[Point]) -> list[tuple[float, float]]:
        project = self.camera.project
        if min(point[2] for point in points) >= NEAR:
            return [project(x, y, z) for x, y, z in points]
        kept: list[Point] = []
        for (xa, ya, za), (xb, yb, zb) in zip(points, [*points[1:], points[0]], strict=True):
            if za >= NEAR:
                kept.append((xa, ya, za))
            if (za >= NEAR) != (zb >= NEAR):
                t = (NEAR - za) / (zb - za)
                kept.append((xa + t * (xb - xa), ya + t * (yb - ya), NEAR))
        return [project(x, y, z) for x, y, z in kept]


def scaled(colour: Colour, factor: float) -> Colour:
    """A colour made lighter or darker."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 0.12) -> Colour:
    """One of `colours`, made lighter or darker by up to `spread`."""
    return scaled(colours[int(rng.integers(len(colours)))], float(rng.uniform(1 - spread, 1 + spread)))


def unit(azimuth: float, elevation: float) -> Point:
    """Unit vector towards an azimuth (0 ahead, pi/2 to the right) and elevation, both in radians."""
    return (
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
        math.cos(elevation) * math.cos(azimuth),
    )
