"""Light and weather of the procedural street scenes, and the shading of a drawn canvas."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from transkd_fast.data._street_canvas import FAR, Camera, Canvas, Colour, Facade, Kind, Light, unit

_TILE = 256


@lru_cache(maxsize=2)
def _noise(exponent: float) -> np.ndarray:
    """Periodic noise tile, float32 [256, 256], mean 0 and deviation 1, whose amplitude falls as frequency^-exponent."""
    rng = np.random.default_rng(20220213)
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE))) * frequency**-exponent
    tile = np.fft.irfft2(spectrum, s=(_TILE, _TILE))
    return np.asarray(tile / tile.std(), dtype=np.float32)


def _sample(tile: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # int32 arithmetic wraps by the mask, so negative coordinates need no care.
    return tile.ravel()[((v.astype(np.int32) & (_TILE - 1)) << 8) | (u.astype(np.int32) & (_TILE - 1))]


def _rgb(colour: Colour) -> np.ndarray:
    return np.array(colour, dtype=np.float32)


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    red, green, blue = (x + t * (y - x) for x, y in zip(a, b, strict=True))
    return red, green, blue


def draw_light(rng: np.random.Generator) -> Light:
    """Draws time of day and weather: 60 % day, 22 % dusk, 18 % night; clear, overcast, rain or fog."""
    hour = rng.choice(3, p=(0.6, 0.22, 0.18))
    weather = rng.choice(4, p=(0.5, 0.2, 0.17, 0.13))
    rain = float(rng.uniform(0.3, 1.0)) if weather == 2 else 0.0
    visibility = (
        float(rng.uniform(35, 110))
        if weather == 3
        else float(rng.uniform(150, 320) if rain else rng.uniform(500, 1200))
    )
    clouds = float(rng.uniform(0.0, 0.6)) if weather == 0 else 1.0
    azimuth = float(rng.uniform(-math.pi, math.pi))
    grey = 0.0 if weather == 0 else float(rng.uniform(0.7, 1.0))
    if hour == 0:
        elevation = float(rng.uniform(0.45, 1.1))
        sun: Colour = (0.72, 0.66, 0.56)
        ambient: Colour = (0.5, 0.54, 0.6)
        zenith, horizon = (0.28, 0.48, 0.82), (0.74, 0.84, 0.94)
        overcast = (0.72, 0.74, 0.77)
    elif hour == 1:
        elevation = float(rng.uniform(0.12, 0.35))
        sun = (0.85, 0.5, 0.24)
        ambient = (0.42, 0.37, 0.42)
        zenith, horizon = (0.28, 0.32, 0.56), (0.97, 0.66, 0.42)
        overcast = (0.58, 0.5, 0.5)
    else:
        elevation = 0.6
        sun = (0.05, 0.06, 0.09)
        ambient = (0.17, 0.18, 0.25)
        zenith, horizon = (0.03, 0.04, 0.1), (0.13, 0.12, 0.17)
        overcast = (0.13, 0.12, 0.14)
    red, green, blue = (s * (1 - grey) for s in sun)
    return Light(
        night=bool(hour == 2),
        sun=unit(azimuth, elevation),
        sun_colour=(red, green, blue),
        ambient=_mix(ambient, tuple(a + 0.45 * s for a, s in zip(ambient, sun, strict=True)), 0.6 * grey),  # type: ignore[arg-type]
        zenith=_mix(zenith, overcast, grey),
        horizon=_mix(horizon, overcast, 0.9 * grey),
        clouds=clouds,
        visibility=visibility,
        rain=rain,
        shadow=0.0 if hour == 2 else 0.62 * (1 - grey),
    )


def _shade_sky(light: Light, ray_x: np.ndarray, ray_y: np.ndarray, offset: tuple[int, int]) -> np.ndarray:
    """Colours [n, 3] of sky pixels from their ray directions [n]."""
    up = np.maximum(ray_y, 0.0)
    zenith, horizon = _rgb(light.zenith), _rgb(light.horizon)
    sky = zenith + (horizon - zenith) * np.exp(-3.2 * up)[:, None]
    distance = 1.0 / (up + 0.12)
    cloud = _sample(_noise(1.7), 28 * ray_x * distance + offset[0], 40 * distance + offset[1])
    cover = np.clip(0.35 * (cloud + 3.0 * light.clouds - 1.6), 0, 0.9 if light.clouds < 1 else 0.35)
    bright = horizon * (1.06 + 0.07 * cloud[:, None]) if light.clouds < 1 else horizon * (0.86 + 0.1 * cloud[:, None])
    sky += (bright - sky) * cover[:, None]
    glow = light.sun[2] + light.sun[0] * ray_x + light.sun[1] * ray_y
    glow /= np.sqrt(1 + ray_x**2 + ray_y**2)
    sky += (np.exp(14 * (glow - 1)) * (1 - 0.6 * light.clouds))[:, None] * _rgb(light.sun_colour) * 0.7
    return sky


def _shade_facades(
    canvas: Canvas,
    ids: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    depth: np.ndarray,
    colour: np.ndarray,
    cells: np.ndarray,
) -> None:
    """Puts windows, shop fronts and cornices into `colour` [n, 3] of wall pixels at (u, v) metres, in place."""
    light = canvas.light
    first = min(canvas.facades)
    table = np.zeros((5, max(canvas.facades) - first + 1), dtype=np.float32)
    accents, glasses = np.zeros((2, table.shape[1], 3), dtype=np.float32)
    for key, wall in canvas.facades.items():
        table[:, key - first] = (wall.bay, wall.floor, wall.height, wall.pane, wall.shop)
        accents[key - first], glasses[key - first] = wall.accent, wall.glass
    wall_index = ids - first
    bay, floor, height, pane, shop = (column.take(wall_index) for column in table)
    along, up = u / bay, v / floor
    storey, column = np.floor(up), np.floor(along)
    fu, fv = np.abs(along - column - 0.5), up - storey
    ground = (storey == 0) & (shop > 0)
    half = np.where(ground, np.float32(0.44), pane)
    inside = (np.abs(fv - np.where(ground, np.float32(0.43), np.float32(0.55))) < 0.26) & (v < height - 0.35 * floor)
    glass = np.flatnonzero(inside & (fu < half))
    band = np.flatnonzero(ground & (fv > 0.76) & (fv < 0.97))
    trim = np.where(inside & (fu < half + 0.05), np.float32(1.12), np.float32(1.0))
    trim[(v > height - 0.5) | ((storey == 0) & (v < 0.4))] = 0.86
    colour *= trim[:, None]
    colour[band] = accents.take(wall_index[band], 0) * _rgb(light.ambient) * (3.0 if light.night else 1.5)
    # Each pane of the grid has its own tone, and at night its own lamp.
    cell = column[glass].astype(np.int32) * 37 + storey[glass].astype(np.int32) * 101 + wall_index[glass] * 59
    tone = cells.take(cell & (len(cells) - 1))
    panes = glasses.take(wall_index[glass], 0) * (0.5 + tone)[:, None]
    if light.night:
        lit = tone > np.where(ground[glass], 0.35, 0.72)
        panes[lit] = _rgb((0.98, 0.8, 0.48)) * (0.55 + 0.5 * tone[lit])[:, None]
    else:
        panes *= _rgb(light.ambient) + 0.4 * _rgb(light.sun_colour)
    fade = np.clip(40.0 / depth[glass], 0.3, 1.0)[:, None]
    plain = colour.take(glass, 0)
    colour[glass] = plain + (panes - plain) * fade


def _ground_light(canvas: Canvas, x: np.ndarray, z: np.ndarray, ray_x: np.ndarray) -> np.ndarray:
    """Light [n, 3] that headlights and street lamps throw on ground points at night."""
    beam = 0.75 * np.exp(-(((z - 9.0) / 11.0) ** 2)) * np.exp(-((ray_x / 0.4) ** 2))
    total = beam[:, None] * _rgb((1.0, 0.95, 0.82))
    for lamp_x, lamp_y, lamp_z, power, colour in canvas.lamps:
        if lamp_y > 3:
            pool = power * np.exp(-((x - lamp_x) ** 2 + (z - lamp_z) ** 2) / 40.0)
            total += pool[:, None] * _rgb(colour)
    return total


def _add_glow(canvas: Canvas, image: np.ndarray) -> None:
    """Adds halos around lamps to `image` [H, W, 3], in place."""
    camera = canvas.camera
    height, width = image.shape[:2]
    for x, y, z, power, colour in canvas.lamps:
        u, v = camera.project(x, y, z)
        radius = min(max(camera.focal * (0.5 if y > 3 else 0.32) / z, 2.0), 0.08 * width)
        reach = int(3 * radius)
        top, bottom = max(0, int(v) - reach), min(height, int(v) + reach + 1)
        left, right = max(0, int(u) - reach), min(width, int(u) + reach + 1)
        if top >= bottom or left >= right:
            continue
        dv = (np.arange(top, bottom, dtype=np.float32) - v)[:, None]
        du = (np.arange(left, right, dtype=np.float32) - u)[None, :]
        halo = power * math.exp(-z / canvas.light.visibility) * np.exp(-(dv**2 + du**2) / (2 * radius**2 / 2.2))
        image[top:bottom, left:right] += halo[..., None] * _rgb(colour)


def _add_rain(image: np.ndarray, light: Light, rng: np.random.Generator) -> None:
    height, width = image.shape[:2]
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    count = int(light.rain * 260)
    slant = float(rng.uniform(-0.25, 0.25))
    starts = rng.random((count, 2)) * (width, height)
    lengths = rng.uniform(0.03, 0.12, count) * height
    for (u, v), length in zip(starts.tolist(), lengths.tolist(), strict=True):
        draw.line((u, v, u + slant * length, v + length), fill=int(20 + 60 * length / (0.12 * height)))
    streaks = np.asarray(mask, dtype=np.float32)[..., None] * np.float32(0.7 / 255)
    image += streaks * (_rgb(light.horizon) * 1.2 + 0.1 - image)


def _reflect(canvas: Canvas, image: np.ndarray, ground: np.ndarray) -> None:
    """Mirrors what stands above the horizon in a wet road, in place."""
    height = image.shape[0]
    rows = np.clip(2 * int(canvas.camera.centre[1]) - np.arange(height), 0, height - 1)
    mirrored = image[rows]
    # A rough surface smears reflections vertically.
    mirrored = (mirrored + np.roll(mirrored, 3, 0) + np.roll(mirrored, -3, 0) + np.roll(mirrored, 6, 0)) / 4
    strength = np.float32(0.3 * canvas.light.rain) * ground[..., None]
    image += strength * (mirrored - image)


def _light_surfaces(canvas: Canvas) -> np.ndarray:
    """Colours float32 [surfaces, 3] under the canvas's light: albedo times (ambient + sun by angle + own glow)."""
    light = canvas.light
    normals = np.array([surface.normal for surface in canvas.surfaces])
    glow = np.array([surface.glow for surface in canvas.surfaces])
    facing = np.maximum(normals @ np.array(light.sun), 0.0)
    received = np.array(light.ambient) + facing[:, None] * np.array(light.sun_colour) + glow[:, None]
    return (np.array([surface.colour for surface in canvas.surfaces]) * received).astype(np.float32)


def shade(canvas: Canvas, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours of a drawn canvas.

    Args:
        canvas: everything drawn.
        rng: source of texture offsets and rain.

    Returns:
        image float32 [H, W, 3], about [0, 1] but not clipped, and surface numbers [H, W].
    """
    camera, light = canvas.camera, canvas.light
    shape = (camera.height, camera.width)
    ids = np.asarray(canvas.ids).astype(np.intp).ravel()
    columns = ((surface.kind, surface.depth, surface.scale, surface.grain) for surface in canvas.surfaces)
    kind, depths, scales, grains = np.array(list(columns), dtype=np.float32).T
    kinds = kind.astype(np.int8).take(ids)
    sky, ground, walls = (np.flatnonzero(kinds == kind) for kind in (Kind.SKY, Kind.GROUND, Kind.FACADE))
    ray_x, ray_y = (ray.ravel() for ray in camera.rays())
    depth = depths.take(ids)
    depth[ground] = np.minimum(np.float32(camera.eye) / np.maximum(-ray_y[ground], np.float32(1e-3)), FAR)
    lengthwise = _wall_depth(canvas.facades, ids, ray_x, walls, depth)
    x, y = ray_x * depth, ray_y * depth + np.float32(camera.eye)
    # Texture coordinates follow the surface: the road lies in (x, z), a wall along it in (z, y).
    u, v = x.copy(), y.copy()
    u[lengthwise] = depth[lengthwise]
    v[ground] = depth[ground]

    offset = (int(rng.integers(_TILE)), int(rng.integers(_TILE)))
    scale = scales.take(ids)
    texture = _sample(_noise(0.6), u * scale + offset[0], v * scale + offset[1])
    texture *= np.minimum(np.float32(1.0), np.float32(18.0) / depth)
    texture += np.float32(0.7) * _sample(_noise(1.7), u * 6 + offset[1], v * 3 + offset[0])
    texture *= grains.take(ids)
    texture += 1
    texture[ground] *= _unshadowed(canvas)[ground]
    image = _light_surfaces(canvas).take(ids, 0)
    image *= texture[:, None]

    if canvas.facades:
        colours = image.take(walls, 0)
        cells = rng.random(64, dtype=np.float32)
        _shade_facades(canvas, ids[walls], u[walls], v[walls], depth[walls], colours, cells)
        image[walls] = colours
    if light.night:
        lamps = _ground_light(canvas, x[ground], depth[ground], ray_x[ground])
        image[ground] *= 1 + lamps / _rgb(light.ambient) * np.float32(0.75)
    if light.rain:
        _reflect(canvas, image.reshape(*shape, 3), (kinds == Kind.GROUND).reshape(shape))

    haze = _rgb(light.horizon)
    image -= haze
    image *= np.exp(depth * np.float32(-1 / light.visibility))[:, None]
    image += haze
    colours = _shade_sky(light, ray_x[sky], ray_y[sky], offset)
    clear = 1 - np.exp(-np.maximum(ray_y[sky], 0) * np.float32(light.visibility / 60))[:, None]
    image[sky] = haze + (colours - haze) * clear
    image = image.reshape(*shape, 3)
    _add_glow(canvas, image)
    if light.rain:
        _add_rain(image, light, rng)
    return image, ids.reshape(shape)


def _unshadowed(canvas: Canvas) -> np.ndarray:
    """Share of light that the drawn shadows leave, float32 [H*W]; their edges are soft."""
    shadows = np.asarray(canvas.shadows.filter(ImageFilter.BoxBlur(1)), dtype=np.float32).ravel()
    return 1 - shadows * np.float32(1 / 255)


def _wall_depth(
    facades: dict[int, Facade], ids: np.ndarray, ray_x: np.ndarray, walls: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    """Sets `depth` of wall pixels to where their rays meet the wall's plane; returns the pixels of walls along z."""
    if not facades:
        return walls
    first = min(facades)
    start, slope, across = np.zeros((3, max(facades) - first + 1), dtype=np.float32)
    for key, wall in facades.items():
        start[key - first], slope[key - first], across[key - first] = wall.start, wall.slope, wall.across
    along = walls[across.take(ids[walls] - first) == 0]
    index = ids[along] - first
    run = ray_x[along] - slope.take(index)
    run[np.abs(run) < 1e-4] = 1e-4
    depth[along] = np.clip(start.take(index) / run, 0.5, FAR)
    return along


def finish(image: np.ndarray, light: Light, factor: int, rng: np.random.Generator) -> np.ndarray:
    """What the lens and the sensor make of a shaded image.

    Args:
        image: float32 [factor*H, factor*W, 3].
        light: the scene's light; the dark is noisier.
        factor: oversampling of the drawing, averaged away.
        rng: source of blur, exposure and noise.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = image.shape[0] // factor, image.shape[1] // factor
    # Automatic exposure meets a middle grey half way, and leaves the night dark.
    target = 0.24 if light.night else 0.44
    exposure = float(np.clip((target / max(float(image[::4, ::4].mean()), 1e-3)) ** 0.6, 0.7, 1.7))
    gain = exposure * rng.uniform(0.88, 1.14) * rng.uniform(0.95, 1.05, 3)
    corners = [image[i::factor, j::factor] for i in range(factor) for j in range(factor)]
    image = sum(corners[1:], corners[0]) * (gain / factor**2).astype(np.float32)
    radius = float(rng.uniform(0.0, 0.7))
    pixels = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    if radius > 0.25:
        pixels = pixels.filter(ImageFilter.GaussianBlur(radius))
    level = rng.uniform(1.0, 4.0) + (5.0 if light.night else 0.0)
    noise = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(level)
    return np.clip(np.asarray(pixels, dtype=np.float32) + noise + 0.5, 0, 255).astype(np.uint8)


def draw_camera(rng: np.random.Generator, height: int, width: int) -> Camera:
    """Draws a car-borne camera: height, pitch (horizon), vanishing point, focal length and a slight roll."""
    return Camera(
        width=width,
        height=height,
        focal=float(width * rng.uniform(0.6, 0.95)),
        eye=float(rng.uniform(1.2, 2.1)),
        centre=(float(width * rng.uniform(0.36, 0.64)), float(height * rng.uniform(0.38, 0.54))),
        roll=float(rng.normal(0, 0.012)),
    )
