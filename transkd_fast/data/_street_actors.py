"""Who moves in a procedural street scene: cars and people.

Each function draws one object onto a canvas. Lengths are metres; x is the object's middle, z its nearest point.
"""

from __future__ import annotations

import numpy as np

from transkd_fast.data._street_canvas import CLOTHES, TURN, Canvas, Colour, Label, pick, scaled

_PAINTS: tuple[Colour, ...] = (
    (0.85, 0.86, 0.88),
    (0.92, 0.92, 0.92),
    (0.14, 0.14, 0.16),
    (0.42, 0.44, 0.47),
    (0.66, 0.08, 0.08),
    (0.1, 0.2, 0.5),
    (0.16, 0.33, 0.22),
    (0.3, 0.55, 0.72),
    (0.8, 0.65, 0.2),
    (0.5, 0.4, 0.3),
)
_SKIN: tuple[Colour, ...] = ((0.85, 0.66, 0.54), (0.66, 0.46, 0.34), (0.42, 0.28, 0.2))
# Rear to front: (distance along the car / length, height / height of the roof), and what the edge to the next is.
_PROFILES = {
    "hatchback": (
        ((0.0, 0.2), "body"),
        ((0.0, 0.62), "glass"),
        ((0.09, 0.97), "body"),
        ((0.3, 1.0), "body"),
        ((0.56, 0.96), "glass"),
        ((0.74, 0.63), "body"),
        ((0.97, 0.5), "body"),
        ((1.0, 0.2), "body"),
    ),
    "saloon": (
        ((0.0, 0.2), "body"),
        ((0.0, 0.6), "body"),
        ((0.15, 0.65), "glass"),
        ((0.29, 0.97), "body"),
        ((0.5, 1.0), "body"),
        ((0.58, 0.96), "glass"),
        ((0.73, 0.63), "body"),
        ((0.98, 0.5), "body"),
        ((1.0, 0.2), "body"),
    ),
    "van": (
        ((0.0, 0.15), "body"),
        ((0.0, 0.55), "glass"),
        ((0.02, 0.97), "body"),
        ((0.4, 1.0), "body"),
        ((0.78, 0.97), "glass"),
        ((0.9, 0.57), "body"),
        ((1.0, 0.45), "body"),
        ((1.0, 0.15), "body"),
    ),
}
_CAR_SIZES = {"hatchback": (3.9, 1.72, 1.5), "saloon": (4.5, 1.78, 1.44), "van": (5.2, 1.95, 2.1)}


def car(canvas: Canvas, rng: np.random.Generator, x: float, z: float, oncoming: bool, driving: bool) -> None:
    """A car that stands along the road: its profile drawn out to the car's width, far edges first.

    Args:
        canvas: drawing.
        rng: source of its looks.
        x: middle of the end that faces the camera.
        z: distance of that end.
        oncoming: it shows its front.
        driving: its lights are on at night.
    """
    light = canvas.light
    shape = ("hatchback", "saloon", "van")[int(rng.choice(3, p=(0.45, 0.38, 0.17)))]
    length, width, height = _CAR_SIZES[shape]
    height *= float(rng.uniform(0.96, 1.06))
    half = width / 2
    paint = pick(rng, _PAINTS)
    # Body, glass and tyres by the direction that they face.
    end = canvas.surface(Label.CAR, paint, z, (0, 0.2, -0.95), grain=0.02)
    flank_side = -1.0 if x > 0 else 1.0
    flank = canvas.surface(Label.CAR, scaled(paint, 0.92), z, (flank_side, 0.1, 0), grain=0.02)
    top = canvas.surface(Label.CAR, scaled(paint, 1.05), z, (0, 1, 0), grain=0.02)
    sky = light.horizon
    pane = canvas.surface(
        Label.CAR, (0.12 + 0.22 * sky[0], 0.14 + 0.22 * sky[1], 0.17 + 0.22 * sky[2]), z, (0, 0.7, -0.7)
    )
    side_pane = canvas.surface(
        Label.CAR, (0.1 + 0.1 * sky[0], 0.11 + 0.1 * sky[1], 0.13 + 0.1 * sky[2]), z, (flank_side, 0, 0)
    )
    black = canvas.surface(Label.CAR, (0.06, 0.06, 0.065), z, grain=0.02)

    profile = _PROFILES[shape]
    points: list[tuple[float, float]] = [((1 - s if oncoming else s) * length + z, y * height) for (s, y), _ in profile]
    under = ((-1.1, z + 0.1), (1.1, z + 0.1), (1.1, z + length), (-1.1, z + length))
    canvas.shadow([(x + side * half, 0.0, s) for side, s in under], 0.65)
    roof = [(x - half, height, z + 0.2 * length), (x + half, height, z + 0.2 * length)]
    roof += [(x + half, height, z + 0.8 * length), (x - half, height, z + 0.8 * length)]
    canvas.shadow(canvas.cast(roof), light.shadow)
    wheels = (z + 0.17 * length, z + 0.81 * length)
    for wheel in wheels[::-1]:
        for side in (-1, 1):
            left = x + side * (half - 0.12)
            canvas.polygon(
                (
                    (left - 0.11, 0, wheel),
                    (left + 0.11, 0, wheel),
                    (left + 0.11, 0.5, wheel),
                    (left - 0.11, 0.5, wheel),
                ),
                black,
            )
    belly = 0.17 * height
    canvas.polygon(
        (
            (x - half, belly * 0.7, z),
            (x + half, belly * 0.7, z),
            (x + half, 0.5 * height, z),
            (x - half, 0.5 * height, z),
        ),
        black,
    )

    edges = sorted(
        (
            (min(za, zb), (za, ya), (zb, yb), what)
            for (za, ya), (zb, yb), (_, what) in zip(points, points[1:], profile, strict=False)
        ),
        key=lambda edge: -edge[0],
    )
    inset = 0.12 * half
    for _, (za, ya), (zb, yb), what in edges:
        steep = abs(yb - ya) > abs(zb - za) * 0.9
        surface = pane if what == "glass" else end if steep else top
        wa, wb = (half - inset * (max(0.0, y / height - 0.6) / 0.4) for y in (ya, yb))
        canvas.polygon(((x - wa, ya, za), (x + wa, ya, za), (x + wb, yb, zb), (x - wb, yb, zb)), surface)
    # Far away the flank is a few pixels wide.
    if abs(x) > half and z < 50:
        face = x - half if x > 0 else x + half

        def lean(y: float) -> float:
            return face + (inset if x > 0 else -inset) * max(0.0, y / height - 0.6) / 0.4

        canvas.polygon([(lean(y), y, s) for s, y in points], flank)
        glass = [(s, y) for s, y in points if y > 0.55 * height]
        lowest, first, last = 0.64 * height, min(s for s, _ in glass), max(s for s, _ in glass)
        roof_start = min(s for s, y in glass if y > 0.9 * height)
        roof_end = max(s for s, y in glass if y > 0.9 * height)
        middle = (first + last) / 2
        high = 0.91 * height
        for a, b, c, d in (
            (first + 0.12 * length, roof_start + 0.04 * length, middle - 0.06, middle - 0.06),
            (middle + 0.06, middle + 0.06, roof_end - 0.02 * length, last - 0.1 * length),
        ):
            if d - a > 0.3:
                outline = ((a, lowest), (b, high), (c, high), (d, lowest))
                canvas.polygon([(lean(y), y, s) for s, y in outline], side_pane)
        hub = canvas.surface(Label.CAR, (0.5, 0.5, 0.52), z, (flank_side, 0, 0))
        for wheel in wheels:
            canvas.polygon([(face, 0.31 + 0.32 * sin, wheel + 0.32 * cos) for cos, sin in TURN], black)
            canvas.polygon([(face, 0.31 + 0.17 * sin, wheel + 0.17 * cos) for cos, sin in TURN], hub)
    _car_lights(canvas, x, z, half, height, oncoming, driving and light.night)


def _car_lights(canvas: Canvas, x: float, z: float, half: float, height: float, oncoming: bool, lit: bool) -> None:
    plate = canvas.surface(Label.CAR, (0.9, 0.9, 0.88) if oncoming else (0.92, 0.8, 0.25), z)
    canvas.box(x, z, -0.26, 0.25 * height, 0.26, 0.25 * height + 0.12, plate)
    colour: Colour = (0.96, 0.95, 0.9) if oncoming else (0.75, 0.07, 0.06)
    lens = canvas.surface(Label.CAR, colour, z, glow=0.9 if lit else 0.1)
    y = (0.4 if oncoming else 0.5) * height
    for side in (-1, 1):
        inner, outer = sorted((side * (half - 0.38), side * (half - 0.06)))
        canvas.box(x, z, inner, y - 0.09, outer, y + 0.09, lens)
        if lit:
            power, tint = (0.9, (1.0, 0.95, 0.8)) if oncoming else (0.5, (1.0, 0.12, 0.08))
            canvas.lamp(x + side * (half - 0.2), y, z, power, tint)
    if oncoming:
        grille = canvas.surface(Label.CAR, (0.09, 0.09, 0.1), z)
        canvas.box(x, z, -0.42 * half, y - 0.1, 0.42 * half, y + 0.04, grille)


def person(canvas: Canvas, rng: np.random.Generator, x: float, z: float, height: float) -> None:
    """A person who stands or walks."""
    h = height
    coat, trousers = pick(rng, CLOTHES, 0.25), pick(rng, CLOTHES[:3] + CLOTHES[6:7], 0.25)
    cloth = canvas.surface(Label.PEDESTRIAN, coat, z, (0, 0.3, -0.9), grain=0.1, scale=60)
    sleeve = canvas.surface(Label.PEDESTRIAN, scaled(coat, 0.8), z, grain=0.1, scale=60)
    leg = canvas.surface(Label.PEDESTRIAN, trousers, z, grain=0.06)
    dark_leg = canvas.surface(Label.PEDESTRIAN, scaled(trousers, 0.75), z, grain=0.06)
    skin = canvas.surface(Label.PEDESTRIAN, pick(rng, _SKIN), z, (0, 0.3, -0.9), grain=0.03)
    hair = canvas.surface(
        Label.PEDESTRIAN, pick(rng, ((0.1, 0.08, 0.07), (0.3, 0.2, 0.12), (0.6, 0.5, 0.3), (0.55, 0.54, 0.52))), z
    )
    stride = h * float(rng.uniform(-0.16, 0.16))
    wide = h * float(rng.uniform(0.11, 0.145))
    for foot, surface in ((stride, dark_leg), (-stride, leg)):
        hip = 0.4 * wide if foot > 0 else -0.4 * wide
        canvas.flat(
            x,
            z,
            ((foot - 0.035 * h, 0), (foot + 0.05 * h, 0), (hip + 0.055 * h, 0.5 * h), (hip - 0.055 * h, 0.5 * h)),
            surface,
        )
    hem = 0.34 * h if rng.random() < 0.35 else 0.46 * h
    canvas.flat(
        x,
        z,
        (
            (-0.85 * wide, hem),
            (0.85 * wide, hem),
            (wide, 0.78 * h),
            (0.5 * wide, 0.84 * h),
            (-0.5 * wide, 0.84 * h),
            (-wide, 0.78 * h),
        ),
        cloth,
    )
    for side in (-1, 1):
        hand = side * wide * 1.05 - stride * 0.6 * side
        shoulder = side * wide * 0.92
        canvas.flat(
            x,
            z,
            (
                (shoulder - 0.035 * h, 0.8 * h),
                (shoulder + 0.035 * h, 0.8 * h),
                (hand + 0.03 * h, 0.45 * h),
                (hand - 0.03 * h, 0.45 * h),
            ),
            sleeve,
        )
    if rng.random() < 0.3:
        bag = canvas.surface(Label.PEDESTRIAN, pick(rng, CLOTHES), z)
        canvas.box(x + wide, z, -0.02 * h, 0.34 * h, 0.14 * h, 0.5 * h, bag)
    canvas.disc(x, 0.925 * h, z, 0.07 * h, hair)
    canvas.disc(x + 0.01 * h, 0.905 * h, z, 0.058 * h, skin)
    crown = canvas.cast([(x - 0.12, h, z), (x + 0.12, h, z)])
    canvas.shadow(((x - 0.2, 0, z), (x + 0.2, 0, z), crown[1], crown[0]), canvas.light.shadow)
