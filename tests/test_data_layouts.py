"""Datasets of files in their official layouts, each on a small copy of it that this file writes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TinyNet
from torchvision.datasets import Cityscapes as OfficialCityscapes

from transkd_fast import data
from transkd_fast.data import ACDC, VOC2012, Cityscapes, DataError, Folder, NYUv2, NYUv2Folder
from transkd_fast.train import ConfigError, build, load_config
from transkd_fast.train.loop import evaluate

HEIGHT, WIDTH = 32, 64


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def values_of(seed, values):
    """A label map with every one of the values."""
    flat = np.resize(np.array(values, dtype=np.uint8), HEIGHT * WIDTH)
    return np.random.default_rng(seed).permutation(flat).reshape(HEIGHT, WIDTH)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def same_frame(dataset, index, image, labels):
    got_image, got_labels = dataset.load(index)
    np.testing.assert_array_equal(got_image, image)
    np.testing.assert_array_equal(got_labels, labels)
    assert got_labels.dtype == np.uint8


# Cityscapes and ACDC


TRAIN_IDS = [*range(19), 255]


def cityscapes(root, kind="labelTrainIds", values=TRAIN_IDS, labels="gtFine", split="train"):
    for seed, frame in enumerate(["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_1"]):
        name = f"{frame.partition('_')[0]}/{frame}"
        write(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png", picture(seed))
        write(root / labels / split / f"{name}_{labels}_{kind}.png", values_of(seed, values))
    return root


def test_cityscapes_train_ids(tmp_path):
    dataset = Cityscapes(cityscapes(tmp_path))
    assert len(dataset) == 3 and dataset.num_classes == 19
    assert [dataset.name(i) for i in range(3)] == [
        *("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "ulm/ulm_000000_1")
    ]
    for index in range(3):
        same_frame(dataset, index, picture(index), values_of(index, TRAIN_IDS))
    assert dataset.classes[0] == "road" and dataset.classes[18] == "bicycle"
    assert dataset.palette[0].tolist() == [128, 64, 128] and dataset.palette.shape == (19, 3)
    assert len(dataset.published_class_weights) == 19 and dataset.orphans == (0, 0)


def test_cityscapes_ids_become_train_ids(tmp_path):
    ids = list(range(34))
    dataset = Cityscapes(cityscapes(tmp_path, "labelIds", ids))
    to_class = {c.id: c.train_id if 0 <= c.train_id < 19 else 255 for c in OfficialCityscapes.classes if c.id >= 0}
    truth = np.vectorize(to_class.get)(values_of(1, ids))
    same_frame(dataset, 1, picture(1), truth)
    assert sorted(np.unique(truth)) == TRAIN_IDS


def test_cityscapes_coarse(tmp_path):
    cityscapes(tmp_path, labels="gtCoarse", split="train_extra")
    assert len(Cityscapes(tmp_path, "train_extra", coarse=True)) == 3
    with pytest.raises(ValueError, match="coarse=True"):
        Cityscapes(tmp_path, "train_extra")
    with pytest.raises(DataError, match=r"gtFine.val.*does not exist|leftImg8bit.val"):
        Cityscapes(tmp_path, "val")


def acdc(root, split="val"):
    for seed, condition in enumerate([*ACDC.conditions, "night"]):
        name = f"{condition}/{split}/GOPR04{seed}/GOPR04{seed}_frame_000001"
        write(root / "rgb_anon" / f"{name}_rgb_anon.png", picture(seed))
        write(root / "gt" / f"{name}_gt_labelTrainIds.png", values_of(seed, TRAIN_IDS))
    return root


def test_acdc_knows_each_frames_condition(tmp_path):
    dataset = ACDC(acdc(tmp_path), "val")
    assert [dataset.group(i) for i in range(5)] == ["fog", "night", "night", "rain", "snow"]
    for index, seed in enumerate([0, 1, 4, 2, 3]):
        same_frame(dataset, index, picture(seed), values_of(seed, TRAIN_IDS))
    some = ACDC(tmp_path, "val", conditions=("snow", "fog"))
    assert some.published_class_weights is None
    assert [some.group(i) for i in range(len(some))] == ["fog", "snow"]
    with pytest.raises(ValueError, match="fog, night, rain, snow, got"):
        ACDC(tmp_path, "val", conditions=("sun",))
    with pytest.raises(DataError, match=r"rgb_anon.fog.train"):
        ACDC(tmp_path, "train")


# VOC


def voc(root):
    folder = root / "VOCdevkit" / "VOC2012"
    for seed, name in enumerate(["2007_000032", "2007_000039", "2008_000002"]):
        (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed)).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        labels = Image.fromarray(values_of(seed, [0, 1, 20, 255]), mode="P")
        labels.putpalette(VOC2012.palette.flatten().tolist())
        (folder / "SegmentationClass").mkdir(exist_ok=True)
        labels.save(folder / "SegmentationClass" / f"{name}.png")
        write(folder / "SegmentationClassAug" / f"{name}.png", values_of(seed + 10, [0, 5, 255]))
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2007_000039\n")
    (lists / "val.txt").write_text("2008_000002\n")
    (lists / "trainaug.txt").write_text("2007_000032\n2007_000039\n2008_000002\n")
    return folder


def test_voc_takes_the_listed_frames_from_any_folder_above(tmp_path):
    folder = voc(tmp_path)
    for root in (tmp_path, folder.parent, folder):
        dataset = VOC2012(root)
        assert [dataset.name(i) for i in range(len(dataset))] == ["2007_000032", "2007_000039"]
    np.testing.assert_array_equal(dataset.load(1)[1], values_of(1, [0, 1, 20, 255]))
    with Image.open(folder / "JPEGImages" / "2007_000039.jpg") as image:
        np.testing.assert_array_equal(dataset.load(1)[0], np.asarray(image))
    aug = VOC2012(tmp_path, "trainaug")
    assert len(aug) == 3
    np.testing.assert_array_equal(aug.load(2)[1], values_of(12, [0, 5, 255]))
    assert VOC2012.classes[1] == "aeroplane" and len(VOC2012.classes) == 21


def test_voc_colours_are_those_of_its_files():
    known = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 8: [64, 0, 0], 15: [192, 128, 128], 20: [0, 64, 128]}
    assert {k: VOC2012.palette[k].tolist() for k in known} == known


def test_voc_listed_frames_must_be_there(tmp_path):
    folder = voc(tmp_path)
    (folder / "SegmentationClass" / "2007_000039.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 lack one: 2007_000039.*allow_orphans"):
        VOC2012(tmp_path)
    dataset = VOC2012(tmp_path, allow_orphans=True)
    assert len(dataset) == 1 and dataset.orphans == (1, 0)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("a\na\n")
    with pytest.raises(DataError, match="every frame once"):
        VOC2012(tmp_path, "val")
    with pytest.raises(DataError, match="found none"):
        VOC2012(tmp_path, "trainval")
    with pytest.raises(DataError, match="VOCdevkit/VOC2012"):
        VOC2012(tmp_path / "elsewhere")


# NYUv2


CLASSES_894 = 7  # as many in the small copy
TO_40 = np.array([40, 1, 1, 17, 3, 40, 2])


def nyuv2(root, count=4):
    """The three files in the forms that MATLAB gives them."""
    import h5py
    from scipy.io import savemat

    images = np.stack([picture(k) for k in range(count)])
    labels = np.stack([values_of(k, range(CLASSES_894 + 1)) for k in range(count)]).astype(np.uint16)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)  # MATLAB's [H, W, 3, N]
        file["labels"] = labels.transpose(0, 2, 1)
    savemat(root / "splits.mat", {"trainNdxs": np.array([[3], [1]]), "testNdxs": np.array([[2], [4]])})
    savemat(root / "classMapping40.mat", {"mapClass": TO_40[None].astype(np.uint8)})
    return images, labels


def test_nyuv2_from_the_official_file(tmp_path):
    images, labels = nyuv2(tmp_path)
    train, val = NYUv2(tmp_path, "train"), NYUv2(tmp_path, "val")
    assert [train.name(i) for i in range(2)] == ["0001", "0003"] and [val.name(i) for i in range(2)] == ["0002", "0004"]
    truth = np.concatenate([[255], TO_40 - 1])[labels]
    for dataset, frames in ((train, (0, 2)), (val, (1, 3))):
        for index, frame in enumerate(frames):
            same_frame(dataset, index, images[frame], truth[frame])
    assert train.num_classes == 40 and train.classes[0] == "wall" and (truth == 255).any()
    # A worker of a loader gets a copy, which opens the file itself.
    same_frame(pickle.loads(pickle.dumps(train)), 1, images[2], truth[2])


def test_nyuv2_files_that_are_missing_broken_or_of_another_form(tmp_path):
    from scipy.io import savemat

    nyuv2(tmp_path)
    with pytest.raises(ValueError, match="train, val"):
        NYUv2(tmp_path, "test")
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[5]])})
    with pytest.raises(DataError, match="from 1 to 4"):
        NYUv2(tmp_path)
    with pytest.raises(DataError, match="variable testNdxs"):
        NYUv2(tmp_path, "val")
    nyuv2(tmp_path)
    savemat(tmp_path / "classMapping40.mat", {"mapClass": np.array([[0, 41]])})
    with pytest.raises(DataError, match="classes from 1 to 40"):
        NYUv2(tmp_path)
    nyuv2(tmp_path)
    savemat(tmp_path / "classMapping40.mat", {"mapClass": TO_40[None, :5].astype(np.uint8)})
    with pytest.raises(DataError, match=r"frame 1: expected label values out of .*got 6, 7"):
        NYUv2(tmp_path).load(0)
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="MATLAB file of version"):
        NYUv2(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"expected this file of NYUv2.*labels40"):
        NYUv2(tmp_path)


def test_nyuv2_as_files_keeps_void_apart_from_class_1(tmp_path):
    for seed, name in enumerate(["a", "b", "c"]):
        write(tmp_path / "images" / f"{name}.png", picture(seed))
        write(tmp_path / "labels40" / f"{name}.png", values_of(seed, range(41)))
    (tmp_path / "train.txt").write_text("a\nc\n")
    (tmp_path / "test.txt").write_text("b\nd\n")
    dataset = NYUv2Folder(tmp_path)
    values = values_of(2, range(41)).astype(int)
    same_frame(dataset, 1, picture(2), np.where(values == 0, 255, values - 1))
    with pytest.raises(DataError, match=r"test\.txt, but 1 lack one: d"):
        NYUv2Folder(tmp_path, "val")
    assert len(NYUv2Folder(tmp_path, "val", allow_orphans=True)) == 1
    write(tmp_path / "labels40" / "a.png", values_of(0, [0, 41]))
    with pytest.raises(DataError, match="got 41"):
        dataset.load(0)


# A plain folder


def folder(root, classes="classes: [ground, sky, thing]\nvoid: [9]\n"):
    for seed, name in enumerate(["x", "y"]):
        write(root / "images" / "train" / f"{name}.jpg", picture(seed))
        write(root / "labels" / "train" / f"{name}.png", values_of(seed, [0, 1, 2, 9, 255]))
    (root / "classes.yaml").write_text(classes)
    return root


def test_a_folder_of_ones_own(tmp_path):
    dataset = Folder(folder(tmp_path))
    values = values_of(0, [0, 1, 2, 9, 255])
    np.testing.assert_array_equal(dataset.load(0)[1], np.where(values > 2, 255, values))
    assert dataset.classes == ("ground", "sky", "thing")
    assert len({tuple(colour) for colour in dataset.palette.tolist()}) == 3
    (tmp_path / "classes.yaml").write_text(
        "classes: [a, b, c]\npalette: [[1, 2, 3], [4, 5, 6], [7, 8, 9]]\nvoid: [9]\n"
    )
    assert Folder(tmp_path).palette.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    (tmp_path / "classes.yaml").unlink()
    (tmp_path / "classes.txt").write_text("ground\nsky\n\nthing\n")
    dataset = Folder(tmp_path)
    assert dataset.classes == ("ground", "sky", "thing")
    with pytest.raises(DataError, match=r"x\.png.*got 9"):
        dataset.load(0)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[a, b]", "expected a mapping with classes"),
        ("classes: [a, b]\ncolours: []", "expected a mapping with classes"),
        ("classes: [a]", "2 to 255 different class names"),
        ("classes: [a, a]", "different class names"),
        ("classes: [a, b]\nvoid: [1]", "label values from 2 to 255"),
        ("classes: [a, b]\npalette: [[1, 2, 3]]", "one .r, g, b. of 0 to 255 per class"),
        ("classes: [a, b", "expected YAML"),
    ],
)
def test_class_files_of_another_form_are_refused(tmp_path, classes, message):
    with pytest.raises(DataError, match=message):
        Folder(folder(tmp_path, classes))


# What all of them promise


BROKEN = {
    "cityscapes": (cityscapes, Cityscapes, "leftImg8bit/train/ulm/ulm_000000_1_leftImg8bit.png", {}),
    "cityscapes labels": (cityscapes, Cityscapes, "gtFine/train/ulm/ulm_000000_1_gtFine_labelTrainIds.png", {}),
    "acdc": (acdc, ACDC, "gt/night/val/GOPR041/GOPR041_frame_000001_gt_labelTrainIds.png", {"split": "val"}),
    "folder": (folder, Folder, "images/train/y.jpg", {}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_without_its_partner_is_an_error_or_left_out_and_counted(tmp_path, case):
    make, dataset, file, options = BROKEN[case]
    (make(tmp_path) / file).unlink()
    with pytest.raises(DataError, match=r"1 (image.s. without a label|label.s. without an image)"):
        dataset(tmp_path, **options)
    rest = dataset(tmp_path, **options, allow_orphans=True)
    assert sum(rest.orphans) == 1
    rest.check()


@pytest.mark.parametrize("case", BROKEN)
def test_a_truncated_file_is_named(tmp_path, case):
    make, dataset, file, options = BROKEN[case]
    path = make(tmp_path) / file
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=path.name):
        dataset(tmp_path, **options).check()


def test_a_wrong_label_value_and_a_wrong_size_are_named(tmp_path):
    root = cityscapes(tmp_path)
    path = root / "gtFine/train/ulm/ulm_000000_1_gtFine_labelTrainIds.png"
    write(path, values_of(0, [0, 19]))
    with pytest.raises(DataError, match=rf"{path.name}: expected label values out of .* got 19 in \d+ pixels"):
        Cityscapes(root).check()
    write(path, values_of(0, TRAIN_IDS)[:-1])
    with pytest.raises(DataError, match="expected the size of its image"):
        Cityscapes(root).check()


def test_create_makes_all_of_them_and_refuses_what_they_lack(tmp_path):
    for name, make in (("cityscapes", cityscapes), ("folder", folder), ("voc2012", voc), ("nyuv2", nyuv2)):
        root = tmp_path / name
        root.mkdir()
        make(root)
        assert len(data.create(name, "train", root)) > 1
    with pytest.raises(ValueError, match="expected options out of allow_orphans, got coarse"):
        data.create("voc2012", "train", tmp_path / "voc2012", coarse=True)
    with pytest.raises(ValueError, match="nyuv2: expected options out of none, got allow_orphans"):
        data.create("nyuv2", "train", tmp_path / "nyuv2", allow_orphans=True)
    with pytest.raises(ValueError, match="cityscapes: expected root"):
        data.create("cityscapes", "train")
    with pytest.raises(ValueError, match="acdc, camvid, cityscapes"):
        data.create("kitti", "train")


def test_class_weights_of_counted_pixels(tmp_path):
    dataset = Folder(folder(tmp_path))
    counts, ignored = data.count_pixels(dataset)
    labels = np.concatenate([dataset.load(index)[1].ravel() for index in range(2)])
    assert counts.tolist() == [int((labels == k).sum()) for k in range(3)] and ignored == int((labels > 2).sum())
    assert data.class_weights_of(torch.tensor([3, 0, 1])) == pytest.approx(
        [1 / np.log(1.77), 1 / np.log(1.02), 1 / np.log(1.27)]
    )
    with pytest.raises(DataError, match="labelled pixels"):
        data.class_weights_of(torch.zeros(3, dtype=torch.int64))


def test_the_configuration_reaches_the_datasets(tmp_path):
    """Splits, orphans and class weights as a run takes them."""
    lines = []
    folder = voc(tmp_path / "voc")
    (folder / "SegmentationClassAug" / "2007_000039.png").unlink()
    options = ["data.name=voc2012", f"data.root={tmp_path / 'voc'}", "data.train_split=trainaug"]
    config = load_config(None, [*options, "data.allow_orphans=true", "fit.class_weights=computed"])
    dataset = build.build_dataset(config, "train")
    assert len(dataset) == 2 and dataset.orphans == (1, 0)
    assert len(build.build_dataset(config, "val")) == 1
    build.resolve_class_weights(config, dataset, lines.append)
    assert config.fit.class_weights == data.class_weights_of(data.count_pixels(dataset)[0])
    assert config.teacher.fit.class_weights is None and "background" in lines[0] and "labelled pixels" in lines[0]

    cityscapes(tmp_path / "cityscapes")
    options = ["data.name=cityscapes", f"data.root={tmp_path / 'cityscapes'}", "teacher.fit.class_weights=dataset"]
    config = load_config(None, [*options, "teacher.num_classes=20"])
    build.resolve_class_weights(config, build.build_dataset(config, "train"), lines.append)
    assert config.teacher.fit.class_weights == [*Cityscapes.published_class_weights, 0.0]
    config = load_config(None, ["data.name=street_scenes", "fit.class_weights=dataset"])
    with pytest.raises(ConfigError, match=r"fit\.class_weights: street_scenes has no published weights"):
        build.resolve_class_weights(config, build.build_dataset(config, "train"), lines.append)
    with pytest.raises(ConfigError, match=r"fit\.class_weights: expected null, 'dataset' or 'computed', or a list"):
        load_config(None, ["fit.class_weights=counted"])


def test_scores_of_every_condition(tmp_path):
    acdc(tmp_path)
    config = load_config(None, ["data.name=acdc", f"data.root={tmp_path}", "data.size=[32,64]"])
    dataset = build.build_dataset(config, "val")
    network = TinyNet(19).eval()

    def score(frames, groups=()):
        loader = data.make_loader(torch.utils.data.Subset(dataset, frames), 2, False)
        return evaluate(network, loader, 19, torch.device("cpu"), "fp32", groups=groups)

    names = [dataset.group(index) for index in range(5)]
    scores = score(range(5), names)
    assert list(scores.groups) == ["fog", "night", "rain", "snow"]
    for name, part in scores.groups.items():
        alone = score([index for index in range(5) if names[index] == name])
        assert part.miou == pytest.approx(alone.miou, rel=1e-12) and part.pixels == alone.pixels
    assert scores._replace(groups={}).pixels == score(range(5)).pixels == sum(p.pixels for p in scores.groups.values())
