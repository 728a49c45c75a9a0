"""Street scenes drawn from a seed, with a class label for every pixel."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transkd_fast.data import _street_actors as actors
from transkd_fast.data import _street_objects as objects
from transkd_fast.data._street_canvas import Canvas, Colour, Kind, Label, Point, scaled
from transkd_fast.data._street_shading import draw_camera, draw_light, finish, shade
from transkd_fast.data.base import IGNORE_INDEX, SegmentationDataset, Transforms

_OVERSAMPLING = 2
_VOID_ON_DISK = 11
_HORIZON = 300.0


class _Street:
    """Draws one street onto a canvas: its ground plan first, then everything on it from far to near.

    Args:
        canvas: empty canvas.
        rng: source of everything that is random.
    """

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.rng = rng
        self.lanes = int(rng.choice((2, 3, 4), p=(0.6, 0.2, 0.2)))
        self.lane = float(rng.uniform(2.9, 3.5))
        self.parking = 2.1 if rng.random() < 0.5 else 0.0
        self.half = self.lanes * self.lane / 2 + self.parking
        self.pavement = float(rng.uniform(1.8, 3.8))
        self.drive_right = bool(rng.random() < 0.5)
        # The camera drives in the outermost lane of its own side.
        own = (self.lanes - 1) / 2 * self.lane * (1 if self.drive_right else -1)
        self.offset = -own + float(rng.normal(0, 0.3))
        self.bend = float(rng.normal(0, 0.0012)) if rng.random() < 0.5 else 0.0
        self.crossing = float(rng.uniform(7, 28)) if rng.random() < 0.35 else None
        self.drawings: list[tuple[float, Callable[[], None]]] = []

    def middle(self, z: float) -> float:
        """Lateral position of the middle of the road at distance z."""
        return self.offset + self.bend * z * z

    def draw(self) -> None:
        """Draws the whole street."""
        self._ground()
        self._skyline()
        for side in (-1.0, 1.0):
            self._roadside(side)
        self._traffic()
        # Far to near, so that what is near covers what is far.
        for _, drawing in sorted(self.drawings, key=lambda item: -item[0]):
            drawing()
        if self.rng.random() < 0.3:
            self._bonnet()

    def _place(self, x: float, z: float, function: Callable[..., None], *arguments: object) -> None:
        """Draws an object that stands at (x, z) if it can be seen."""
        if self.canvas.sees(x, z, 5.0):
            self._add(z, function, x, z, *arguments)

    def _add(self, z: float, function: Callable[..., None], *arguments: object) -> None:
        self.drawings.append((z, lambda: function(self.canvas, self.rng, *arguments)))

    def _line(self, lateral: float, near: float = 0.8, far: float = 300.0, steps: int = 0) -> list[Point]:
        steps = steps or (14 if self.bend else 2)
        ratio = (far / near) ** (1 / (steps - 1))
        return [(self.middle(z) + lateral, 0.0, z) for z in (near * ratio**k for k in range(steps))]

    def _paint(self, label: int, colour: Colour, grain: float, scale: float = 30.0) -> int:
        return self.canvas.surface(label, colour, 0.0, (0.0, 1.0, 0.0), Kind.GROUND, grain, scale)

    def _strip(self, surface: int, left: float, right: float, near: float = 0.8, far: float = 300.0) -> None:
        steps = 0 if far - near > 20 else 2
        self.canvas.polygon([*self._line(left, near, far, steps), *self._line(right, near, far, steps)[::-1]], surface)

    def _ground(self) -> None:
        rng, canvas = self.rng, self.canvas
        camera = canvas.camera
        self.green = [bool(rng.random() < 0.45) for _ in range(2)]
        grass = scaled((0.34, 0.45, 0.2), float(rng.uniform(0.8, 1.2)))
        slabs = self._grey(0.42, 0.66)
        asphalt = self._grey(0.24, 0.42)
        far_left, middle, far_right = (camera.project(x, 0.0, _HORIZON) for x in (-_HORIZON, 0.0, _HORIZON))
        for green, (left, right) in zip(self.green, ((far_left, middle), (middle, far_right)), strict=True):
            beyond = (Label.TREE, grass, 0.16) if green else (Label.PAVEMENT, slabs, 0.07)
            canvas.pixels((left, right, (right[0], camera.height), (left[0], camera.height)), self._paint(*beyond))
        edge = self.half + self.pavement
        self._strip(self._paint(Label.PAVEMENT, slabs, 0.08), -edge, edge)
        self._strip(self._paint(Label.PAVEMENT, scaled(slabs, 1.25), 0.04), -self.half - 0.18, self.half + 0.18)
        self._strip(self._paint(Label.ROAD, asphalt, 0.11), -self.half, self.half)
        for _ in range(int(rng.integers(0, 4))):
            near = float(rng.uniform(3, 25))
            left_edge = float(rng.uniform(-self.half, self.half - 2))
            mended = self._paint(Label.ROAD, scaled(asphalt, float(rng.uniform(0.75, 1.2))), 0.1)
            right_edge = left_edge + float(rng.uniform(0.6, 2))
            self._strip(mended, left_edge, right_edge, near, near + float(rng.uniform(1, 6)))
        wear = float(rng.uniform(0.65, 0.95))
        self._markings((wear, wear, 0.97 * wear))

    def _grey(self, low: float, high: float) -> Colour:
        """A slightly tinted grey."""
        red, green, blue = (self.rng.uniform(low, high) * self.rng.uniform(0.95, 1.05, 3)).tolist()
        return red, green, blue

    def _markings(self, white: Colour) -> None:
        rng = self.rng
        paint = self._paint(Label.MARKING, white, 0.16, 12)
        yellow = self._paint(Label.MARKING, (white[0] * 0.95, white[1] * 0.75, 0.2), 0.16, 12)
        inner = self.half - self.parking
        for boundary in range(1, self.lanes):
            lateral = -inner + boundary * self.lane
            central = 2 * boundary == self.lanes
            if central and rng.random() < 0.3:
                colour = yellow if rng.random() < 0.5 else paint
                for shift in (-0.16, 0.16):
                    self._strip(colour, lateral + shift - 0.06, lateral + shift + 0.06)
                continue
            length, gap = float(rng.uniform(1.5, 4)), float(rng.uniform(2, 5))
            z = float(rng.uniform(1, 1 + gap))
            while z < 70:
                if self.crossing is None or abs(z + length / 2 - self.crossing - 1.4) > length / 2 + 2:
                    self._strip(paint, lateral - 0.08, lateral + 0.08, z, z + length)
                z += length + gap
        if self.parking or rng.random() < 0.6:
            colour = yellow if not self.parking and rng.random() < 0.4 else paint
            shift = inner - 0.15 if self.parking else self.half - 0.35
            for side in (-1, 1):
                self._strip(colour, side * shift - 0.07, side * shift + 0.07)
        if self.crossing is not None:
            lateral = -self.half + 0.3
            while lateral < self.half - 0.5:
                self._strip(paint, lateral, lateral + 0.5, self.crossing, self.crossing + 2.8)
                lateral += 1.0

    def _skyline(self) -> None:
        rng = self.rng
        wooded = rng.random() < 0.5
        colour = (0.25, 0.34, 0.2) if wooded else (0.5, 0.48, 0.47)
        surface = self.canvas.surface(Label.TREE if wooded else Label.BUILDING, colour, 220.0, grain=0.12, scale=1.2)
        outline = [(-300.0, 0.0)]
        x, height = -300.0, 10.0
        while x < 300:
            step = float(rng.uniform(4, 9) if wooded else rng.uniform(8, 26))
            height = float(np.clip(height + rng.normal(0, 2), 4, 16)) if wooded else float(rng.uniform(5, 24))
            outline += [(x, height)] if wooded else [(x, height), (x + step, height)]
            x += step
        outline.append((300.0, 0.0))
        self.canvas.flat(0.0, 220.0, outline, surface)

    def _roadside(self, side: float) -> None:
        rng = self.rng
        green = self.green[0 if side < 0 else 1]
        style = rng.choice(3, p=(0.2, 0.45, 0.35) if green else (0.85, 0.15, 0.0))
        edge = self.half + self.pavement
        setback = float(rng.uniform(0.0, 0.8)) if style == 0 else float(rng.uniform(2.5, 7))
        storeys = (3, 8) if style == 0 else (2, 3)
        z = float(rng.uniform(0.8, 4)) if style == 0 else float(rng.uniform(2, 12))
        while z < 120 and style < 2:
            width = float(rng.uniform(7, 20)) if style == 0 else float(rng.uniform(7, 12))
            height = float(rng.integers(*storeys) * 3.1 + rng.uniform(0.3, 1.5))
            near = (self.middle(z) + side * (edge + setback), z)
            far = (self.middle(z + width) + side * (edge + setback), z + width)
            if abs(near[0]) < 120 and near[0] * side > 1:
                self._add(z + width, objects.building, near, far, height)
            z += width + (float(rng.uniform(0, 5)) * (rng.random() < 0.25) if style == 0 else float(rng.uniform(2, 14)))
        self._greenery(side, edge, style)
        self._furniture(side)
        for _ in range(int(rng.poisson(2.6))):
            z = float(4.5 + 32 * rng.random() ** 1.3)
            x = self.middle(z) + side * (self.half + float(rng.uniform(0.5, self.pavement)))
            self._walker(x, z)

    def _walker(self, x: float, z: float) -> None:
        child = self.rng.random() < 0.12
        self._place(x, z, actors.person, float(self.rng.uniform(1.1, 1.4) if child else self.rng.uniform(1.58, 1.92)))

    def _greenery(self, side: float, edge: float, style: int) -> None:
        rng = self.rng
        if style > 0:
            if rng.random() < 0.5:
                z0, z1 = float(rng.uniform(1, 8)), float(rng.uniform(20, 60))
                self._add(
                    z1,
                    objects.hedge,
                    (self.middle(z0) + side * (edge + 0.2), z0),
                    (self.middle(z1) + side * (edge + 0.2), z1),
                )
            for _ in range(int(rng.integers(5, 12)) if style == 2 else int(rng.integers(1, 6))):
                z = float(rng.uniform(5, 75))
                x = self.middle(z) + side * (edge + float(rng.uniform(1, 5 if style == 1 else 14)))
                self._place(x, z, objects.tree, float(rng.uniform(4.5, 11)))
        elif rng.random() < 0.55:
            z, spacing = float(rng.uniform(5, 14)), float(rng.uniform(7, 14))
            while z < 80:
                x = self.middle(z) + side * (self.half + 0.8)
                self._place(x, z, objects.tree, float(rng.uniform(4.5, 7.5)))
                z += spacing * float(rng.uniform(0.8, 1.4))

    def _furniture(self, side: float) -> None:
        rng = self.rng
        z, spacing = float(rng.uniform(4, 20)), float(rng.uniform(16, 28))
        height = float(rng.uniform(5.5, 8))
        lateral = side * (self.half + 0.5)
        if rng.random() < 0.85:
            while z < 90:
                self._place(self.middle(z) + lateral, z, objects.lamp_post, height)
                z += spacing
        for _ in range(int(rng.integers(0, 4))):
            z = float(4.5 + 26 * rng.random())
            self._place(self.middle(z) + lateral * 1.04, z, objects.road_sign)
        if self.crossing is not None and rng.random() < 0.7:
            z = self.crossing - 0.4
            self._place(self.middle(z) + lateral, z, objects.traffic_light)

    def _traffic(self) -> None:
        rng = self.rng
        inner = self.half - self.parking
        towards = 1 if self.drive_right else -1
        for lane in range(self.lanes):
            lateral = -inner + (lane + 0.5) * self.lane
            ahead = lateral * towards > 0 or (abs(lateral) < 0.1 and rng.random() < 0.5)
            z = float(rng.uniform(6, 30))
            while z < 90:
                if rng.random() < 0.6:
                    x = self.middle(z) + lateral + float(rng.normal(0, 0.15))
                    self._place(x, z, actors.car, not ahead, True)
                z += float(rng.uniform(8, 30))
        for side in (-1, 1) if self.parking else ():
            z = float(rng.uniform(3.5, 9))
            while z < 60:
                if rng.random() < 0.7:
                    x = self.middle(z) + side * (self.half - 1.0)
                    self._place(x, z, actors.car, side * towards < 0, False)
                z += float(rng.uniform(5.8, 9))
        if self.crossing is not None and rng.random() < 0.6:
            for _ in range(int(rng.integers(1, 4))):
                z = self.crossing + float(rng.uniform(0.3, 2.5))
                self._walker(self.middle(z) + float(rng.uniform(-self.half, self.half)), z)

    def _bonnet(self) -> None:
        camera, rng = self.canvas.camera, self.rng
        shade_of = float(rng.uniform(0.08, 0.7))
        paint = self.canvas.surface(
            IGNORE_INDEX, (shade_of, shade_of, shade_of * 1.05), 1.5, (0.0, 0.9, 0.3), grain=0.03, scale=8
        )
        rise, middle = camera.height * float(rng.uniform(0.05, 0.11)), camera.width * float(rng.uniform(0.42, 0.58))
        reach = camera.width * float(rng.uniform(0.5, 0.75))
        outline = [
            (middle + reach * t, camera.height - rise * math.sqrt(1 - t * t))
            for t in (math.sin(math.pi / 2 * k / 12) for k in range(-12, 13))
        ]
        self.canvas.pixels([*outline, (middle + reach, camera.height + 9), (middle - reach, camera.height + 9)], paint)


class StreetScenes(SegmentationDataset):
    """Street scenes drawn from a seed: light, weather, camera, street and traffic all vary.

    Frame i depends on (seed, split, i, size) alone: not on the order of access, nor on the process that draws it.
    In some frames the camera car's bonnet is seen; its pixels are labelled 255. The indices of the classes that CamVid
    has are CamVid's.

    Args:
        length: number of frames.
        size: (height, width) of a frame in pixels, at least 32 each.
        seed: seed of all frames, >= 0.
        split: "train" or "val"; the two share no frame.
        transforms: joint transform of image and mask; None for none.
        cache: keep drawn frames in memory (4 bytes per pixel); each loader process has its own.

    Raises:
        ValueError: a number out of range or an unknown split.
    """

    splits = ("train", "val")
    classes = tuple(label.name.lower() for label in Label)
    palette = torch.tensor(
        [
            [70, 130, 180],
            [128, 64, 64],
            [192, 192, 128],
            [128, 64, 128],
            [244, 35, 232],
            [107, 142, 35],
            [220, 220, 0],
            [255, 255, 255],
            [0, 0, 142],
            [220, 20, 60],
        ],
        dtype=torch.uint8,
    )

    def __init__(
        self,
        length: int,
        size: tuple[int, int] = (96, 192),
        seed: int = 0,
        split: str = "train",
        transforms: Transforms | None = None,
        cache: bool = False,
    ) -> None:
        super().__init__(transforms)
        if length < 1:
            raise ValueError(f"StreetScenes: expected length >= 1, got {length}")
        if len(size) != 2 or not all(isinstance(edge, int) and edge >= 32 for edge in size):
            raise ValueError(f"StreetScenes: expected size as (height, width), integers >= 32, got {size}")
        if seed < 0:
            raise ValueError(f"StreetScenes: expected seed >= 0, got {seed}")
        if split not in self.splits:
            raise ValueError(f"StreetScenes: expected split out of {', '.join(self.splits)}, got {split!r}")
        self.length = length
        self.size = (size[0], size[1])
        self.seed = seed
        self.split = split
        self._frames: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        """Number of frames."""
        return self.length

    def name(self, index: int) -> str:
        """Split, seed and number of frame `index`."""
        return f"{self.split}_{self.seed}_{index:05d}"

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws frame `index`: image uint8 [H, W, 3] and label map uint8 [H, W]."""
        if self._frames is None:
            return self._draw(index)
        if index not in self._frames:
            self._frames[index] = self._draw(index)
        image, labels = self._frames[index]
        return image.copy(), labels.copy()

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, self.splits.index(self.split), index))
        light = draw_light(rng)
        camera = draw_camera(rng, self.size[0] * _OVERSAMPLING, self.size[1] * _OVERSAMPLING)
        canvas = Canvas(camera, light)
        _Street(canvas, rng).draw()
        image, surfaces = shade(canvas, rng)
        labels = np.array([surface.label for surface in canvas.surfaces], dtype=np.uint8)
        return finish(image, light, _OVERSAMPLING, rng), labels[surfaces[::_OVERSAMPLING, ::_OVERSAMPLING]]


def write_folder(dataset: SegmentationDataset, root: str | Path, split: str) -> None:
    """Writes a dataset in CamVid's layout: `root/images/<split>/<name>.jpg` and `root/labels/<split>/<name>.png`.

    Args:
        dataset: frames to write, before transforms; at most 11 classes.
        root: folder, made if missing.
        split: name of the split's folders.

    Raises:
        ValueError: the dataset has class indices that collide with CamVid's void value, 11.
    """
    if dataset.num_classes > _VOID_ON_DISK:
        raise ValueError(
            f"write_folder: expected at most {_VOID_ON_DISK} classes (value {_VOID_ON_DISK} marks ignored pixels), "
            f"got {dataset.num_classes}"
        )
    images, labels = Path(root) / "images" / split, Path(root) / "labels" / split
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for index in range(len(dataset)):
        pixels, values = dataset.load(index)
        values = np.where(values == dataset.ignore_index, np.uint8(_VOID_ON_DISK), values)
        Image.fromarray(pixels).save(images / f"{dataset.name(index)}.jpg", quality=92)
        Image.fromarray(values).save(labels / f"{dataset.name(index)}.png")
