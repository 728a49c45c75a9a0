"""Datasets of files, joint transforms and loaders."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import tv_tensors

from transkd_fast import data
from transkd_fast.data import CamVid, DataError, StreetScenes, make_loader, write_folder
from transkd_fast.data.files import read_label

# A variable that names no folder is an error of the tests below, not a reason to skip them.
CAMVID_ROOT = Path(os.environ.get("TRANSKD_CAMVID", ""))
needs_camvid = pytest.mark.skipif(not os.environ.get("TRANSKD_CAMVID"), reason="CamVid is not at hand")
CAMVID_CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
HEIGHT, WIDTH = 60, 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training frames in CamVid's layout."""
    write_folder(StreetScenes(3, (48, 64)), tmp_path, "train")
    return tmp_path


def ramps() -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose red, like the mask, tells a pixel's column and whose green tells its row; both start at 40."""
    columns = (torch.arange(WIDTH) + 40).expand(HEIGHT, WIDTH)
    rows = (torch.arange(HEIGHT)[:, None] + 40).expand(HEIGHT, WIDTH)
    image = torch.stack([columns, rows, torch.full_like(rows, 200)]).to(torch.uint8)
    return tv_tensors.Image(image), tv_tensors.Mask(columns.to(torch.uint8).clone())


def row_mask() -> tv_tensors.Mask:
    return tv_tensors.Mask((torch.arange(HEIGHT)[:, None] + 40).expand(HEIGHT, WIDTH).to(torch.uint8).clone())


@pytest.mark.parametrize(
    ("transform", "magnification"),
    [
        (data.train_transforms((HEIGHT, WIDTH), (0.75, 1.5)), 1.5),
        (data.train_transforms((30, 50), (0.5, 0.9)), 0.5),
        (data.train_transforms((2 * HEIGHT, 2 * WIDTH), (0.6, 1.4), flip=1.0), 2.0),
        (data.published_transforms((HEIGHT, WIDTH)), 1.0),
        (data.published_transforms((37, 53)), 0.6),
    ],
)
def test_mask_moves_with_image(transform, magnification):
    for seed in range(20):
        image, mask = ramps()
        torch.manual_seed(seed)
        out, across, down = transform(image, mask, row_mask())
        assert out.dtype == torch.float32 and across.dtype == torch.uint8
        inside = across != 255
        assert torch.equal(inside, down != 255)
        for channel, labels in ((out[0], across), (out[1], down)):
            error = (channel * 255 - labels.float())[inside]
            # Nearest and bilinear differ by at most half a source pixel, uint8 rounding included one; a shift of half
            # an output pixel would show in the mean.
            assert error.abs().max() <= 1.01 + 0.5 / min(magnification, 1.0)
            assert error.mean().abs() < 0.12 / min(magnification, 1.0)


def test_fill_is_black_and_ignored():
    transform = data.train_transforms((HEIGHT, WIDTH), (0.5, 0.5), flip=0.0)
    out, mask = transform(*ramps())
    ignored = mask == data.IGNORE_INDEX
    assert int((~ignored).sum()) == (HEIGHT // 2) * (WIDTH // 2)
    assert out[:, ignored].max() == 0
    assert out[2, ~ignored].min() > 0.75


def test_published_shift_is_uniform_and_flips_half():
    transform = data.published_transforms((HEIGHT, WIDTH))
    shifts, flips = [], 0
    torch.manual_seed(0)
    for _ in range(300):
        _, mask = transform(*ramps())
        column = mask[HEIGHT // 2, WIDTH // 2 - 10 : WIDTH // 2 + 10].int()
        flipped = bool(column[0] > column[-1])
        flips += flipped
        expected = (WIDTH - 1 - (WIDTH // 2 - 10) if flipped else WIDTH // 2 - 10) + 40
        shifts.append((int(column[0]) - expected) * (-1 if flipped else 1))
    counts = [shifts.count(shift) for shift in range(-2, 3)]
    assert sum(counts) == 300 and min(counts) > 35
    assert 115 < flips < 185


def test_eval_resizes_the_image_alone():
    image, mask = ramps()
    out, kept = data.eval_transforms((30, 40))(image, mask)
    assert out.shape == (3, 30, 40) and out.dtype == torch.float32
    assert torch.equal(kept, mask)
    truth = torch.nn.functional.interpolate(image[None].float() / 255, (30, 40), mode="bilinear", antialias=True)[0]
    assert (out - truth).abs().max() <= 0.51 / 255


def test_jitter_changes_the_image_alone():
    image, mask = ramps()
    plain, strong = (data.train_transforms((HEIGHT, WIDTH), (1, 1), 0.0, jitter) for jitter in (0.0, 0.5))
    out, kept = strong(image, mask)
    assert torch.equal(kept, plain(image, mask)[1])
    assert (out - plain(image, mask)[0]).abs().mean() > 0.01
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 10),), r"size as \(height, width\)"),
        (((10,),), r"size as \(height, width\)"),
        (((8.0, 8),), r"size as \(height, width\)"),
        (((8, 8), (1.5, 0.5)), "0 < low <= high"),
        (((8, 8), (0.0, 1.0)), "0 < low <= high"),
        (((8, 8), (1, 1), 1.5), "flip to be a probability"),
        (((8, 8), (1, 1), 0.5, 2.0), "jitter in"),
    ],
)
def test_transforms_reject(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.train_transforms(*arguments)


def test_collate_names_the_sizes():
    first, second = torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)
    images, masks = data.collate([(first, torch.ones(4, 5)), (first, torch.ones(4, 5))])
    assert images.shape == (2, 3, 8, 8) and masks.shape == (2, 4, 5)
    with pytest.raises(ValueError, match=r"masks.*4x5, 4x6; use batch_size=1"):
        data.collate([(first, torch.ones(4, 5)), (first, torch.ones(4, 6))])
    with pytest.raises(ValueError, match=r"images.*8x8, 8x9; resize"):
        data.collate([(first, torch.ones(4, 5)), (second, torch.ones(4, 5))])


def test_folder_round_trip(folder: Path):
    scenes, files = StreetScenes(3, (48, 64)), CamVid(folder, "train")
    assert len(files) == 3 and [files.name(i) for i in range(3)] == [scenes.name(i) for i in range(3)]
    files.check()
    for (drawn, labels), (read, values) in zip(
        (scenes[i] for i in range(3)), (files[i] for i in range(3)), strict=True
    ):
        assert isinstance(read, tv_tensors.Image) and isinstance(values, tv_tensors.Mask)
        assert read.dtype == values.dtype == torch.uint8 and read.shape == (3, 48, 64)
        assert torch.equal(labels, values)
        assert (drawn.float() - read.float()).abs().mean() < 12
    assert torch.equal(files[-1][1], files[2][1])
    with pytest.raises(IndexError, match="out of range for 3 frames"):
        files[3]


def test_void_becomes_ignored(folder: Path):
    path = sorted((folder / "labels/train").iterdir())[0]
    values = np.array(Image.open(path))
    values[:5, :7] = 11
    Image.fromarray(values).save(path)
    label = CamVid(folder, "train")[0][1]
    assert torch.equal(label == 255, torch.from_numpy(values == 11))


def rewrite(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAKAGES = {
    "truncated image": (lambda i, la: truncate(i), r"{image}: expected a readable 8-bit image.*fetch the file again"),
    "truncated label": (lambda i, la: truncate(la), r"{label}: expected a readable label map"),
    "not an image": (lambda i, la: i.write_text("hello"), r"{image}: expected a readable 8-bit image"),
    "empty image": (lambda i, la: i.write_bytes(b""), r"{image}: expected a readable 8-bit image"),
    "label value 12": (
        lambda i, la: rewrite(la, np.full((48, 64), 12, np.uint8)),
        r"{label}: expected label values out of \(0, 1.*, 11\), got 12 in 3072 pixels",
    ),
    "label value 255": (lambda i, la: rewrite(la, np.full((48, 64), 255, np.uint8)), r"{label}: .*got 255 in"),
    "label of another size": (
        lambda i, la: rewrite(la, np.zeros((48, 63), np.uint8)),
        r"{label}: expected the size of its image .*48x64 \(height x width\), got 48x63",
    ),
    "colour label": (
        lambda i, la: rewrite(la, np.zeros((48, 64, 3), np.uint8)),
        r"{label}: expected a label map.*got mode RGB",
    ),
    "16-bit label": (lambda i, la: rewrite(la, np.zeros((48, 64), np.uint16)), r"{label}: .*got mode I;16"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_check_finds_bad_files(folder: Path, breakage: str, monkeypatch):
    # Other code in the process may have asked Pillow to swallow truncated files.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image, label = folder / "images/train/train_0_00002.jpg", folder / "labels/train/train_0_00002.png"
    damage, message = BREAKAGES[breakage]
    damage(image, label)
    dataset = CamVid(folder, "train")
    dataset.check(full=False)
    with pytest.raises(DataError, match=message.format(image=re.escape(str(image)), label=re.escape(str(label)))):
        dataset.check()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_pairs_by_name_and_lists_what_is_alone(folder: Path):
    (folder / "labels/train/train_0_00001.png").unlink()
    with pytest.raises(DataError, match=r"1 image\(s\) without a label: train_0_00001;"):
        CamVid(folder, "train")
    for k in range(7):
        (folder / f"labels/train/extra{k}.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"7 label\(s\) without an image: extra0, extra1, extra2, extra3, extra4, \.\.\.;"
    ):
        CamVid(folder, "train")


def test_same_name_twice(folder: Path):
    (folder / "images/train/train_0_00001.png").write_bytes(b"")
    with pytest.raises(DataError, match="one file per frame name"):
        CamVid(folder, "train")


def test_missing_and_empty_folders(folder: Path):
    with pytest.raises(DataError, match=r"nowhere: expected a folder with images/train.*does not exist"):
        CamVid(folder / "nowhere", "train")
    with pytest.raises(DataError, match=r"images/val: expected a folder with \*\.jpg.*does not exist"):
        CamVid(folder, "val")
    (folder / "images/val").mkdir()
    with pytest.raises(DataError, match=r"images/val: expected \*\.jpg or \*\.jpeg or \*\.png files, found none"):
        CamVid(folder, "val")
    with pytest.raises(ValueError, match="split out of train, val, got 'test'"):
        CamVid(folder, "test")


def test_palette_label_keeps_indices(tmp_path: Path):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette([7, 8, 9] * 256)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_label(tmp_path / "a.png", np.arange(256, dtype=np.int16)), values)


def test_create(folder: Path):
    assert isinstance(data.create("camvid", "train", root=folder), CamVid)
    scenes = data.create("street_scenes", "val", size=(40, 48), length=7, seed=3)
    assert len(scenes) == 7 and scenes[0][0].shape == (3, 40, 48)
    assert len(data.create("street_scenes", "train")) == 400
    for name in ("camvid", "street_scenes"):
        with pytest.raises(ValueError, match="split out of train, val"):
            data.create(name, "dev", root=folder if name == "camvid" else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cityscape", "split": "train"}, "cityscapes, .*, street_scenes, got 'cityscape'"),
        ({"name": "camvid", "split": "train"}, "camvid: expected root"),
        ({"name": "camvid", "split": "train", "root": ".", "length": 3}, "camvid: expected no length"),
        ({"name": "street_scenes", "split": "train", "root": "."}, "street_scenes: expected no root"),
    ],
)
def test_create_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.create(**arguments)


def batches(workers: int, epochs: tuple[int, ...], seed: int = 5, skip: int = 0) -> list[torch.Tensor]:
    dataset = StreetScenes(10, (32, 48), transforms=data.train_transforms((32, 48), jitter=0.2))
    loader = make_loader(dataset, 2, shuffle=True, seed=seed, workers=workers, drop_last=True)
    found = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch, skip)
        found += [torch.cat([images.flatten(), masks.float().flatten()]) for images, masks in loader]
    return found


def test_epoch_depends_on_seed_and_number_alone():
    whole = batches(0, (0, 1))
    assert len(whole) == 10
    for other in (batches(2, (0, 1)), batches(1, (1,)), batches(0, (1,)), batches(0, (1,), skip=4)):
        assert all(torch.equal(a, b) for a, b in zip(whole[-len(other) :], other, strict=True))
    assert len(batches(0, (1,), skip=4)) == 3
    assert not torch.equal(whole[0], whole[5])
    assert not torch.equal(whole[0], batches(0, (0,), seed=6)[0])


def test_every_frame_once_and_new_crops_each_epoch():
    sampler = data.EpochSampler(50, shuffle=True, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    dataset = StreetScenes(1, (32, 48), transforms=data.train_transforms((32, 48)))
    loader = make_loader(dataset, 1)
    crops = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        crops += [images for images, _ in loader]
    assert not torch.equal(*crops)


def test_loader_leaves_the_global_generator_alone():
    loader = make_loader(StreetScenes(2, (32, 48), transforms=data.train_transforms((32, 48))), 1, shuffle=True)
    iterator = iter(loader)
    state = torch.get_rng_state()
    list(iterator)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"batch_size": 1, "workers": -1}, "workers >= 0"),
        ({"batch_size": 1, "seed": -1}, "seed >= 0"),
        ({"batch_size": 4, "drop_last": True}, "one batch of 4, got a dataset of 3"),
    ],
)
def test_loader_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loader(StreetScenes(3, (32, 32)), **arguments)


@needs_camvid
def test_camvid_counts_and_classes():
    train, val = CamVid(CAMVID_ROOT, "train"), CamVid(CAMVID_ROOT, "val")
    assert (len(train), len(val)) == (367, 101)
    assert train.classes == tuple(CAMVID_CLASSES.split())
    assert train.palette.shape == (11, 3) and len(set(map(tuple, train.palette.tolist()))) == 11
    image, label = val[0]
    assert image.shape == (3, 360, 480) and label.shape == (360, 480)


@needs_camvid
def test_camvid_reads_as_it_lies():
    dataset = CamVid(CAMVID_ROOT, "val")
    dataset.check()
    histogram = np.zeros(256, dtype=np.int64)
    truth = np.zeros(256, dtype=np.int64)
    for index in range(0, len(dataset), 10):
        histogram += np.bincount(dataset[index][1].numpy().ravel(), minlength=256)
        with Image.open(CAMVID_ROOT / "labels/val" / f"{dataset.name(index)}.png") as file:
            truth += np.asarray(file.histogram())[:256]
    assert np.array_equal(histogram[:11], truth[:11]) and histogram[255] == truth[11]
    assert (histogram[:11] > 0).all() and histogram[11:255].sum() == 0
