"""Procedural street scenes."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from transkd_fast.data import StreetScenes, write_folder
from transkd_fast.data import _street_actors as actors
from transkd_fast.data import _street_objects as objects
from transkd_fast.data._street_canvas import Camera, Canvas, Label
from transkd_fast.data._street_shading import draw_camera, draw_light, shade

SIZE = (96, 192)


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, np.ndarray]:
    """Eighty scenes: images [80, H, W, 3] and labels [80, H, W]."""
    dataset = StreetScenes(80, SIZE)
    images, labels = zip(*(dataset.load(index) for index in range(80)), strict=True)
    return np.stack(images), np.stack(labels)


def digest(dataset: StreetScenes, index: int) -> str:
    image, label = dataset.load(index)
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


def test_frame_depends_on_seed_split_and_index_alone():
    dataset = StreetScenes(6, (48, 64), seed=3)
    forwards = [digest(dataset, index) for index in range(6)]
    assert forwards == [digest(dataset, index) for index in reversed(range(6))][::-1]
    assert len(set(forwards)) == 6
    assert digest(StreetScenes(60, (48, 64), seed=3), 5) == forwards[5]
    assert digest(StreetScenes(6, (48, 64), seed=4), 5) != forwards[5]
    assert digest(StreetScenes(6, (48, 64), seed=3, split="val"), 5) != forwards[5]


def test_another_process_draws_the_same():
    code = (
        "import hashlib\n"
        "from transkd_fast.data import StreetScenes\n"
        "image, label = StreetScenes(9, (48, 64), seed=3).load(7)\n"
        "print(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest())"
    )
    # Hash randomisation and an unlike access order must not matter.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest(StreetScenes(9, (48, 64), seed=3), 7)


def test_drawing_leaves_global_generators_alone():
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    StreetScenes(1, (48, 64)).load(0)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(legacy, np.random.get_state()[1])


def test_cache_gives_equal_and_separate_frames():
    plain, cached = StreetScenes(3, (48, 64)), StreetScenes(3, (48, 64), cache=True)
    first = cached.load(1)
    assert digest(cached, 1) == digest(plain, 1)
    first[0][:] = 0
    first[1][:] = 0
    assert digest(cached, 1) == digest(plain, 1)


@pytest.mark.parametrize("size", [(32, 32), (97, 131), (64, 256), (180, 60)])
def test_any_size(size):
    image, label = StreetScenes(1, size)[0]
    assert image.shape == (3, *size) and label.shape == size
    assert image.dtype == label.dtype == torch.uint8


def test_every_class_is_common_and_none_dominates(scenes):
    labels = scenes[1]
    assert set(np.unique(labels)) == {*range(10), 255}
    for k, name in enumerate(StreetScenes.classes):
        present = ((labels == k).sum((1, 2)) >= 20).mean()
        assert present >= 0.5, (name, present)
        assert 0.002 < (labels == k).mean() < 0.45, name
    ignored = (labels == 255).mean((1, 2))
    assert 0.1 < (ignored > 0).mean() < 0.5 and ignored.max() < 0.15


def test_classes_match_labels_and_palette():
    assert StreetScenes.classes == tuple(label.name.lower() for label in Label)
    assert StreetScenes.palette.shape == (10, 3) and len(set(map(tuple, StreetScenes.palette.tolist()))) == 10


def test_light_varies(scenes):
    brightness = scenes[0].mean((1, 2, 3))
    warmth = scenes[0][..., 0].mean((1, 2)) - scenes[0][..., 2].mean((1, 2))
    assert brightness.min() < 50 and brightness.max() > 110
    assert warmth.std() > 8


def test_colour_alone_does_not_tell_the_class(scenes):
    images, labels = (part[..., ::2, ::2, :] if part.ndim == 4 else part[..., ::2, ::2] for part in scenes)
    train, test = images[:40].reshape(-1, 3) // 32, images[40:].reshape(-1, 3) // 32
    truth, asked = labels[:40].ravel(), labels[40:].ravel()
    # The best possible rule on 8 x 8 x 8 colours: the commonest class of each colour.
    votes = np.zeros((512, 256), dtype=np.int64)
    np.add.at(votes, (train @ (64, 8, 1), truth), 1)
    answer = votes.argmax(1)[test @ (64, 8, 1)]
    scored = asked != 255
    intersection = np.array([((answer == k) & (asked == k) & scored).sum() for k in range(10)])
    union = np.array([(((answer == k) | (asked == k)) & scored).sum() for k in range(10)])
    assert (intersection / union).mean() < 0.3


def test_labels_lie_on_the_image(scenes):
    images, labels = scenes
    grey = images.astype(np.float32).mean(-1)
    # A few scenes are foggy or dark; contrast relative to each scene's own makes them count alike.
    step = np.abs(np.diff(grey, axis=2))
    step /= step.mean((1, 2), keepdims=True)

    def contrast(shift: int) -> float:
        edges = np.diff(np.roll(labels.astype(np.int16), shift, axis=2), axis=2) != 0
        return float(step[:, :, 8:-8][edges[:, :, 8:-8]].mean())

    here = contrast(0)
    assert here > 2.0
    assert all(contrast(shift) < 0.8 * here for shift in (-4, -3, -2, 2, 3, 4))


def canvas(eye: float = 1.5) -> Canvas:
    camera = Camera(width=400, height=300, focal=300.0, eye=eye, centre=(200.0, 140.0), roll=0.0)
    return Canvas(camera, draw_light(np.random.default_rng(0)))


def drawn(scene: Canvas, label: Label) -> np.ndarray:
    table = np.array([surface.label for surface in scene.surfaces])
    return np.argwhere(table[np.asarray(scene.ids)] == label) if len(table) > 1 else np.empty((0, 2))


@pytest.mark.parametrize("far", [20.0, 30.0])
def test_perspective(far):
    sizes = []
    for z in (10.0, far):
        scene = canvas()
        scene.surfaces[0] = scene.surfaces[0]._replace(label=99)
        actors.person(scene, np.random.default_rng(1), 0.0, z, 1.8)
        rows = drawn(scene, Label.PEDESTRIAN)[:, 0]
        # Feet stand on the ground, at horizon + focal * eye / z.
        assert rows.max() == pytest.approx(140 + 300 * 1.5 / z, abs=1.5)
        assert rows.min() == pytest.approx(140 - 300 * (0.995 * 1.8 - 1.5) / z, abs=1.5)
        sizes.append(len(rows))
    assert sizes[0] / sizes[1] == pytest.approx((far / 10) ** 2, rel=0.25)


def test_wall_depth_follows_its_plane():
    scene = canvas()
    objects.building(scene, np.random.default_rng(2), (4.0, 5.0), (6.0, 30.0), 14.0)
    wall = next(k for k, facade in scene.facades.items() if not facade.across)
    facade = scene.facades[wall]
    assert facade.start + facade.slope * 5.0 == pytest.approx(4.0)
    assert facade.start + facade.slope * 30.0 == pytest.approx(6.0)
    pixels = np.argwhere(np.asarray(scene.ids) == wall)
    left = pixels[:, 1].min()
    # Its far end is at x / z = 0.2, that is 60 pixels from the middle.
    assert left == pytest.approx(260, abs=1.5)
    image, ids = shade(scene, np.random.default_rng(0))
    assert np.isfinite(image).all() and np.array_equal(ids, np.asarray(scene.ids))


@pytest.mark.parametrize("seed", range(5))
def test_rays_invert_projection(seed):
    rng = np.random.default_rng(seed)
    camera = draw_camera(rng, 120, 200)
    ray_x, ray_y = camera.rays()
    for _ in range(20):
        x, y, z = rng.uniform(-3, 3), rng.uniform(0, 4), rng.uniform(4, 50)
        u, v = camera.project(x, y, z)
        if 0 <= round(u) < 200 and 0 <= round(v) < 120:
            assert ray_x[round(v), round(u)] == pytest.approx(x / z, abs=0.7 / camera.focal)
            assert ray_y[round(v), round(u)] == pytest.approx((y - camera.eye) / z, abs=0.7 / camera.focal)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length >= 1, got 0"),
        ({"length": 1, "size": (16, 64)}, r"integers >= 32, got \(16, 64\)"),
        ({"length": 1, "size": (64.0, 64)}, "integers >= 32"),
        ({"length": 1, "seed": -1}, "seed >= 0, got -1"),
        ({"length": 1, "split": "test"}, "split out of train, val, got 'test'"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreetScenes(**arguments)


def test_write_folder_rejects_too_many_classes(tmp_path):
    dataset = StreetScenes(1, (32, 32))
    dataset.classes = tuple(map(str, range(12)))
    with pytest.raises(ValueError, match="at most 11 classes"):
        write_folder(dataset, tmp_path, "train")
