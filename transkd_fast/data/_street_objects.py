"""What stands in a procedural street scene: buildings, trees, poles and signs.

Each function draws one object onto a canvas. Lengths are metres; x is the object's middle, z its nearest point.
"""

from __future__ import annotations

import math

import numpy as np

from transkd_fast.data._street_canvas import CLOTHES, TURN, Canvas, Colour, Facade, Kind, Label, pick, scaled

_WALLS: tuple[Colour, ...] = (
    (0.62, 0.33, 0.25),
    (0.72, 0.6, 0.45),
    (0.82, 0.78, 0.7),
    (0.58, 0.55, 0.52),
    (0.88, 0.86, 0.84),
    (0.5, 0.42, 0.36),
    (0.72, 0.47, 0.34),
    (0.45, 0.49, 0.54),
    (0.8, 0.7, 0.5),
    (0.66, 0.7, 0.66),
)
_LEAVES: tuple[Colour, ...] = (
    (0.24, 0.42, 0.14),
    (0.32, 0.46, 0.16),
    (0.17, 0.33, 0.14),
    (0.42, 0.48, 0.18),
    (0.6, 0.42, 0.14),
    (0.2, 0.38, 0.22),
)


def building(
    canvas: Canvas, rng: np.random.Generator, near: tuple[float, float], far: tuple[float, float], height: float
) -> None:
    """A building beside the road.

    Args:
        canvas: drawing.
        rng: source of its looks.
        near: (x, z) of the near end of the wall along the road.
        far: (x, z) of its far end.
        height: height of the wall.
    """
    (x0, z0), (x1, z1) = near, far
    side = 1.0 if x0 > 0 else -1.0
    wall = pick(rng, _WALLS)
    depth = float(rng.uniform(8, 14))
    slope = (x1 - x0) / (z1 - z0)
    start = x0 - slope * z0
    bay = float(rng.uniform(1.7, 3.4))
    floor = float(rng.uniform(2.8, 3.5))
    pane = float(rng.choice((0.2, 0.26, 0.32, 0.46), p=(0.35, 0.35, 0.2, 0.1)))
    shop = bool(height > 6 and rng.random() < 0.45)
    accent = pick(rng, CLOTHES)
    dark = float(rng.uniform(0.1, 0.28))
    horizon = canvas.light.horizon
    glass = (dark + 0.2 * horizon[0], dark + 0.22 * horizon[1], dark * 1.1 + 0.25 * horizon[2])
    grain = float(rng.uniform(0.03, 0.09))

    if height < 12 and rng.random() < 0.65:
        rise = float(rng.uniform(2.0, 3.5))
        tile = canvas.surface(
            Label.BUILDING,
            pick(rng, ((0.42, 0.22, 0.17), (0.3, 0.3, 0.32), (0.36, 0.26, 0.2))),
            z0,
            (-0.5 * side, 0.8, -0.2),
        )
        middle = x0 + side * depth / 2
        eaves_near, eaves_far = (x0 - 0.2 * side, height, z0), (x1 - 0.2 * side, height, z1)
        ridge_near, ridge_far = (middle, height + rise, z0), (x1 + side * depth / 2, height + rise, z1)
        canvas.polygon((eaves_near, eaves_far, ridge_far, ridge_near), tile)
        gable = canvas.surface(Label.BUILDING, wall, z0)
        canvas.polygon(((x0, height, z0), ridge_near, (x0 + side * depth, height, z0)), gable)
        if rng.random() < 0.6:
            stack = canvas.surface(Label.BUILDING, scaled(wall, 0.8), z0)
            canvas.box(middle, z0, -0.4, height + rise - 0.8, 0.4, height + rise + 1.0, stack)
    front = canvas.surface(Label.BUILDING, wall, z0, (0.0, 0.0, -1.0), Kind.FACADE, grain)
    canvas.facades[front] = Facade(True, z0, 0.0, height, bay * 1.3, floor, pane * 0.8, False, accent, glass)
    outer = x0 + side * depth
    canvas.polygon(((x0, 0.0, z0), (outer, 0.0, z0), (outer, height, z0), (x0, height, z0)), front)
    length = canvas.surface(Label.BUILDING, wall, z0, (-side, 0.0, 0.0), Kind.FACADE, grain)
    canvas.facades[length] = Facade(False, start, slope, height, bay, floor, pane, shop, accent, glass)
    corners = ((x0, 0.0, z0), (x1, 0.0, z1), (x1, height, z1), (x0, height, z0))
    canvas.polygon(corners, length)
    top = ((x0, height, z0), (x1, height, z1), (x1 + side * depth, height, z1), (outer, height, z0))
    strength = canvas.light.shadow
    # With the sun on the street's side the shadow falls behind the building.
    if strength == 0 or canvas.light.sun[0] * side < 0:
        return
    shade = canvas.cast(top)
    canvas.shadow((corners[0], corners[1], shade[1], shade[0]), strength)
    canvas.shadow(shade, strength)
    canvas.shadow(((x1, 0.0, z1), (x1 + side * depth, 0.0, z1), shade[2], shade[1]), strength)


def tree(canvas: Canvas, rng: np.random.Generator, x: float, z: float, height: float) -> None:
    """A tree: a broad crown of leaf clumps or a conifer, lit from the sun's side."""
    leaves = pick(rng, _LEAVES, 0.2)
    bark = canvas.surface(Label.TREE, pick(rng, ((0.3, 0.23, 0.17), (0.4, 0.35, 0.3))), z, grain=0.15, scale=20)
    girth = 0.025 * height
    sun_x = canvas.light.sun[0]
    tones = [
        canvas.surface(Label.TREE, scaled(leaves, tone), z, (0.5 * sun_x, 0.8, -0.4), grain=0.24, scale=22)
        for tone in (0.5, 0.72, 0.95, 1.2)
    ]
    lean = 0.04 * height * float(rng.standard_normal())
    canvas.flat(
        x, z, ((-girth, 0), (girth, 0), (lean + girth / 2, 0.6 * height), (lean - girth / 2, 0.6 * height)), bark
    )
    if rng.random() < 0.2:
        for k in range(5):
            low, high = height * (0.12 + 0.17 * k), height * (0.42 + 0.145 * k)
            half = 0.23 * height * (1 - 0.18 * k)
            canvas.flat(x, z, ((-half, low), (0.3 * half, low - 0.03 * height), (half, low), (0, high)), tones[k % 3])
    else:
        width = float(rng.uniform(0.24, 0.36)) * height
        clumps = int(min(18, max(6, canvas.camera.focal * height / z / 8)))
        angles, radii = rng.uniform(0, math.tau, clumps), np.sqrt(rng.random(clumps))
        du = radii * np.cos(angles)
        dv = radii * np.sin(angles)
        light = 0.55 * dv + 0.5 * math.copysign(min(1.0, abs(sun_x)), sun_x) * du + rng.normal(0, 0.25, clumps)
        ragged = rng.uniform(0.75, 1.25, (clumps, 10))
        # Dark clumps first: they are the inside of the crown.
        for k in np.argsort(light).tolist():
            size = width * 0.5
            middle_x, middle_y = lean + width * 0.8 * du[k], height * (0.66 + 0.22 * dv[k])
            outline = [
                (middle_x + size * r * cos, middle_y + size * r * sin)
                for (cos, sin), r in zip(TURN, ragged[k].tolist(), strict=True)
            ]
            canvas.flat(x, z, outline, tones[int(np.clip(2 + 1.6 * light[k], 0, 3))])
    (crown,) = canvas.cast([(x + lean, 0.7 * height, z)])
    spread = 0.28 * height
    canvas.shadow([(crown[0] + spread * cos, 0.0, crown[2] + spread * sin) for cos, sin in TURN], canvas.light.shadow)
    canvas.shadow(((x - girth, 0, z), (x + girth, 0, z), (crown[0], 0, crown[2])), canvas.light.shadow)


def hedge(canvas: Canvas, rng: np.random.Generator, near: tuple[float, float], far: tuple[float, float]) -> None:
    """A hedge along the road between two (x, z) points."""
    (x0, z0), (x1, z1) = near, far
    height = float(rng.uniform(0.7, 1.6))
    side = 1.0 if x0 > 0 else -1.0
    leaves = pick(rng, _LEAVES[:4])
    face = canvas.surface(Label.TREE, leaves, z0, (-side, 0.2, 0.0), grain=0.22, scale=32)
    top = canvas.surface(Label.TREE, scaled(leaves, 1.1), z0, (0.0, 1.0, 0.0), grain=0.22, scale=32)
    outer = x0 + 0.8 * side, x1 + 0.8 * side
    canvas.polygon(((x0, height, z0), (x1, height, z1), (outer[1], height, z1), (outer[0], height, z0)), top)
    canvas.polygon(((x0, 0, z0), (outer[0], 0, z0), (outer[0], height, z0), (x0, height, z0)), face)
    canvas.polygon(((x0, 0, z0), (x1, 0, z1), (x1, height, z1), (x0, height, z0)), face)


def lamp_post(canvas: Canvas, rng: np.random.Generator, x: float, z: float, height: float) -> None:
    """A street lamp whose arm reaches over the road; lit at night."""
    metal = canvas.surface(
        Label.POLE, pick(rng, ((0.45, 0.46, 0.47), (0.22, 0.24, 0.23), (0.6, 0.6, 0.58))), z, (-0.6, 0, -0.6)
    )
    over = -1.0 if x > 0 else 1.0
    arm = over * float(rng.uniform(0.6, 1.8))
    canvas.box(x, z, -0.11, 0, 0.11, 1.0, metal)
    canvas.box(x, z, -0.075, 1.0, 0.075, height, metal)
    canvas.flat(x, z, ((0, height - 0.12), (arm, height + 0.22), (arm, height + 0.34), (0, height + 0.06)), metal)
    head = canvas.surface(Label.POLE, (0.8, 0.8, 0.76), z, glow=1.4 if canvas.light.night else 0.0)
    canvas.flat(
        x + arm, z, ((-0.38, height + 0.16), (0.38, height + 0.16), (0.3, height + 0.36), (-0.3, height + 0.36)), head
    )
    if canvas.light.night:
        canvas.lamp(x + arm, height + 0.2, z, 0.75, (1.0, 0.82, 0.52))
    _pole_shadow(canvas, x, z, height)


def _pole_shadow(canvas: Canvas, x: float, z: float, height: float) -> None:
    (tip,) = canvas.cast([(x, height, z)])
    canvas.shadow(
        ((x - 0.09, 0, z), (x + 0.09, 0, z), (tip[0] + 0.09, 0, tip[2]), (tip[0] - 0.09, 0, tip[2])),
        canvas.light.shadow,
    )


def traffic_light(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A traffic light on its pole; the head counts as a sign."""
    metal = canvas.surface(Label.POLE, (0.3, 0.31, 0.32), z, (-0.6, 0, -0.6))
    canvas.box(x, z, -0.07, 0, 0.07, 2.6, metal)
    case = canvas.surface(Label.SIGN, (0.07, 0.08, 0.08), z, grain=0.02)
    canvas.box(x, z, -0.28, 2.3, 0.28, 3.5, case)
    lit = int(rng.integers(3))
    colours: tuple[Colour, ...] = ((0.2, 0.9, 0.45), (1.0, 0.7, 0.1), (1.0, 0.15, 0.1))
    for k, colour in enumerate(colours):
        lens = canvas.surface(
            Label.SIGN, colour if k == lit else scaled(colour, 0.22), z, glow=0.8 if k == lit else 0.0
        )
        canvas.disc(x, 2.55 + 0.36 * k, z, 0.14, lens)
        if k == lit:
            canvas.lamp(x, 2.55 + 0.36 * k, z, 0.5 if canvas.light.night else 0.15, colour)
    _pole_shadow(canvas, x, z, 3.4)


def road_sign(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A traffic sign on its pole: round, triangular, or a board."""
    metal = canvas.surface(Label.POLE, (0.52, 0.53, 0.54), z, (-0.6, 0, -0.6))
    y = float(rng.uniform(2.2, 3.0))
    canvas.box(x, z, -0.05, 0, 0.05, y + 0.5, metal)
    facing = (0.0, 0.2, -0.9)

    def paint(colour: Colour) -> int:
        return canvas.surface(Label.SIGN, colour, z, facing, grain=0.02, glow=0.12)

    red, white, blue = (0.8, 0.08, 0.1), (0.93, 0.93, 0.9), (0.08, 0.22, 0.65)
    form = int(rng.integers(5))
    if form == 0:
        canvas.disc(x, y, z, 0.5, paint(red))
        canvas.disc(x, y, z, 0.36, paint(white))
        digits = paint((0.12, 0.12, 0.12))
        canvas.box(x, z, -0.2, y - 0.14, -0.04, y + 0.14, digits)
        canvas.box(x, z, 0.04, y - 0.14, 0.2, y + 0.14, digits)
    elif form == 1:
        canvas.flat(x, z, ((-0.56, -0.4), (0.56, -0.4), (0, 0.58)), paint(red), y)
        canvas.flat(x, z, ((-0.36, -0.28), (0.36, -0.28), (0, 0.34)), paint(white), y)
        canvas.box(x, z, -0.05, y - 0.2, 0.05, y + 0.12, paint((0.12, 0.12, 0.12)))
    elif form == 2:
        canvas.box(x, z, -0.5, y - 0.5, 0.5, y + 0.5, paint(white))
        canvas.box(x, z, -0.45, y - 0.45, 0.45, y + 0.45, paint(blue))
        canvas.flat(
            x,
            z,
            ((-0.06, -0.3), (0.06, -0.3), (0.06, 0.05), (0.25, 0.05), (0, 0.35), (-0.25, 0.05), (-0.06, 0.05)),
            paint(white),
            y,
        )
    elif form == 3:
        canvas.disc(x, y, z, 0.5, paint(red))
        canvas.box(x, z, -0.36, y - 0.09, 0.36, y + 0.09, paint(white))
    else:
        colour = (blue, (0.1, 0.42, 0.22), (0.9, 0.7, 0.12))[int(rng.integers(3))]
        canvas.box(x, z, -0.95, y - 0.45, 0.95, y + 0.45, paint(white))
        canvas.box(x, z, -0.9, y - 0.4, 0.9, y + 0.4, paint(colour))
        text = paint(white if colour[0] < 0.5 else (0.1, 0.1, 0.1))
        for row in (0.1, -0.2):
            canvas.box(x, z, -0.7, y + row, float(rng.uniform(0.0, 0.7)), y + row + 0.12, text)
    _pole_shadow(canvas, x, z, y)
