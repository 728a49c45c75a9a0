"""Predictions of images and videos: what the files hold, beside a prediction written out, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from tiny_run import quiet, tiny_config
from torch.nn import functional as F
from torchvision.transforms import v2

from transkd_fast import cli, data, models
from transkd_fast.data import DataError, StreetScenes, pictures
from transkd_fast.data.video import VideoReader, VideoWriter
from transkd_fast.train import ConfigError, predict, train

SIZE = (64, 64)  # of the tiny run
CLASSES = len(StreetScenes.classes)
CODES = StreetScenes.palette.numpy()


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    for name, network in tiny_run.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, network in tiny_run.MODELS.items():
            patch.setitem(models.MODELS, name, network)
        train(tiny_config(folder, fit__epochs=1), quiet)
    return folder


def picture(seed, height=50, width=70):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def save(path, pixels, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **more)
    return path


def expected(run, who, pixels, size=SIZE):
    """Classes at the image's size, from the checkpoint's weights and torch alone."""
    state = torch.load(run / who / "last.pt", weights_only=True)["model"]
    network = {"student": tiny_run.TinyNet, "teacher": tiny_run.TinyTeacher}[who](CLASSES).eval()
    prefix = "student." if who == "student" else ""
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    image = v2.functional.resize(image, list(size), antialias=True).float() / 255
    with torch.no_grad():
        logits = network(image[None]).logits
    return F.interpolate(logits, pixels.shape[:2], mode="bilinear", align_corners=False).argmax(1)[0].numpy()


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def transkd(*arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def written(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def run_predict(run, given, out, **more):
    options = {key: more.pop(key) for key in ("size", "teacher") if key in more}
    predictor = predict.Predictor(run, ["device=cpu"], log=quiet, **options)
    return predict.predict(predictor, given, out, log=quiet, **more)


@pytest.mark.parametrize(("size", "used"), [("run", SIZE), ("keep", (51, 70)), ((32, 96), (32, 96))])
def test_an_image_of_any_size_gets_classes_at_its_own(run, tmp_path, size, used):
    pixels = picture(1, 51, 70)
    report = run_predict(run, save(tmp_path / "a.png", pixels), tmp_path / "out", size=size)
    assert (report.images, report.videos, report.failed, report.pixels) == (1, 0, {}, 51 * 70)
    assert written(tmp_path / "out") == ["colours/a.png", "index/a.png", "overlay/a.png"]
    classes = expected(run, "student", pixels, used)
    assert len(np.unique(classes)) > 1
    index = read(tmp_path / "out" / "index" / "a.png")
    assert index.shape == (51, 70) and (index != classes).mean() < 0.002  # rounding may turn ties
    with Image.open(tmp_path / "out" / "colours" / "a.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), index) and np.array_equal(np.array(image.convert("RGB")), CODES[index])
    overlay = read(tmp_path / "out" / "overlay" / "a.png").astype(float)
    assert np.abs(overlay - (pixels.astype(float) + CODES[index]) / 2).max() <= 0.5


def test_folders_keep_their_names_and_the_rest_goes_on_past_broken_files(run, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "images" / "out"
    for name in ("a.png", "a.jpg", "deep/er/b.png", "c.bmp", ".hidden.png"):
        save(images / name, picture(2))
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:500])
    (images / "notes.txt").write_text("no image")
    assert transkd("predict", run, images, "--out", out, "device=cpu") == 1
    told = capsys.readouterr()
    assert "4 images and 0 videos" in told.out and "1 files could not be predicted" in told.out
    assert "broken.png: not predicted: expected a readable 8-bit image" in told.out + told.err
    assert "left out 1 files that are neither" in told.out + told.err
    names = ("a.jpg.png", "a.png.png", "c.png", "deep/er/b.png")
    assert written(out) == sorted(f"{kind}/{name}" for kind in predict.KINDS for name in names)
    before = tiny_run.snapshot(out)
    assert transkd("predict", run, images, "--out", out, "device=cpu") == 3
    assert "12 files are there already" in capsys.readouterr().err and tiny_run.snapshot(out) == before
    (images / "broken.png").unlink()
    assert transkd("predict", run, images, "--out", out, "--force", "device=cpu") == 0
    after = tiny_run.snapshot(out)
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()} and after != before


def test_names_never_meet():
    paths = [Path(name) for name in ("a.jpg", "a.png", "a.jpg.png", "b.png", "x/a.jpg")]
    names = predict._different_names(paths)
    assert len(set(names)) == len(paths) and names[3:] == [Path("b"), Path("x/a")]


def test_the_teacher_beside(run, tmp_path, capsys):
    pixels = picture(3, 60, 80)
    given, out = save(tmp_path / "a.png", pixels), tmp_path / "out"
    report = run_predict(run, given, out, teacher=True)
    different = expected(run, "student", pixels) != expected(run, "teacher", pixels)
    assert 0 < different.mean() < 1 and abs(report.different - different.sum()) <= 10
    panel = read(out / "panels" / "a.png")
    height, width = panel.shape[:2]
    assert width == 3 * 80 + 8 and height > 60
    views = [panel[height - 60 :, i * 84 : i * 84 + 80].astype(float) for i in range(3)]
    for view, who in zip(views, ("teacher", "student"), strict=False):
        overlay = (pixels + CODES[expected(run, who, pixels)].astype(float)) / 2
        assert (np.abs(view - overlay).max(2) > 0.5).mean() < 0.01
    assert ((views[2] == pictures.DIFFERENT_COLOUR).all(2) != different).mean() < 0.01
    assert transkd("predict", run, given, "--out", tmp_path / "again", "--teacher", "device=cpu") == 0
    assert f"differ in {100 * report.different / 4800:.2f} % of the pixels" in capsys.readouterr().out


def test_scores_against_labels(run, tmp_path, capsys):
    for name in ("a", "sub/b", "c"):
        pixels = picture(4)
        save(tmp_path / "images" / f"{name}.png", pixels)
        labels = expected(run, "student", pixels).astype(np.uint8)
        labels[:5] = 255
        labels[5:10] = (labels[5:10] + 1) % CLASSES
        if name != "c":
            save(tmp_path / "labels" / f"{name}.png", labels)
    report = run_predict(run, tmp_path / "images", tmp_path / "out", labels=tmp_path / "labels")
    assert (report.images, report.unlabelled, report.failed) == (3, 1, {})
    assert report.scores.pixels == 2 * 45 * 70 and report.scores.ignored == 2 * 5 * 70
    assert report.scores.pixel_accuracy == pytest.approx(40 / 45, abs=0.002)
    save(tmp_path / "labels" / "a.png", np.full((50, 70), CLASSES, np.uint8))
    code = transkd("predict", run, tmp_path / "images", "--out", tmp_path / "o2", "--labels", tmp_path / "labels")
    told = capsys.readouterr().out
    assert code == 1 and "labels/a.png: expected label values out of" in told and "1 images without a label" in told
    assert "a.png" not in written(tmp_path / "o2" / "index")
    with pytest.raises(DataError, match=r"under the images' names, such as .*nowhere/a\.png, found none"):
        (tmp_path / "nowhere").mkdir()
        run_predict(run, tmp_path / "images", tmp_path / "o3", labels=tmp_path / "nowhere")


def test_a_photo_is_turned_as_its_camera_noted(tmp_path):
    pixels = picture(5, 40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture is to be turned clockwise
    path = save(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(pictures.read_upright(path), np.rot90(pixels, -1))
    assert np.array_equal(pictures.read_upright(save(tmp_path / "b.png", pixels)), pixels)


def film(path, times, base, height=48, width=64):
    """A lossless video of noise, written by PyAV alone, and its frames."""
    blocks = [picture(10 + number, height // 8, width // 8) for number in range(len(times))]
    frames = [np.kron(block, np.ones((8, 8, 1), np.uint8)) for block in blocks]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        stream.time_base = stream.codec_context.time_base = base
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return frames


def decoded(path, form):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        return [frame.to_ndarray(format=form) for frame in frames], [frame.time for frame in frames], stream


def test_a_video_keeps_its_size_its_frames_and_their_times(run, tmp_path):
    times = [0, 50, 100, 250, 300]  # ms; one frame stands longer
    frames = film(tmp_path / "a.mkv", times, Fraction(1, 1000))
    report = run_predict(run, tmp_path / "a.mkv", tmp_path / "out", teacher=True)
    assert (report.videos, report.frames, report.failed) == (1, 5, {}) and report.pixels == 5 * 48 * 64
    assert written(tmp_path / "out") == ["colours/a.mp4", "index/a.mkv", "overlay/a.mp4", "panels/a.mp4"]
    for name, form in (("index/a.mkv", "gray"), ("colours/a.mp4", "rgb24"), ("overlay/a.mp4", "rgb24")):
        got, at, stream = decoded(tmp_path / "out" / name, form)
        assert at == pytest.approx([time / 1000 for time in times], abs=1e-3)
        assert (stream.height, stream.width) == (48, 64)
        for pixels, shown in zip(frames, got, strict=True):
            classes = expected(run, "student", pixels)
            if form == "gray":
                assert (shown != classes).mean() < 0.002
            else:
                colours = CODES[classes].astype(float)
                meant = colours if "colours" in name else (pixels + colours) / 2
                assert np.median(np.abs(shown - meant)) < 10  # compressed, colours at half the resolution


def test_a_steady_frame_rate_is_kept(tmp_path):
    base = Fraction(1001, 30000)
    with VideoWriter(tmp_path / "a.mp4", base, 1 / base) as writer:
        for number in range(6):
            writer.write(picture(number, 33, 47), number)
    got, at, stream = decoded(tmp_path / "a.mp4", "rgb24")
    assert stream.average_rate == Fraction(30000, 1001) and at == pytest.approx([n * float(base) for n in range(6)])
    assert got[0].shape == (34, 48, 3)  # both edges even
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert [frame.time * reader.time_base for frame in reader] == [number * base for number in range(6)]


def test_a_broken_video_leaves_nothing_half_written(run, tmp_path):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "b.mkv", [0, 50], Fraction(1, 1000))
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video at all" * 50)
    save(tmp_path / "videos" / "c.png", picture(6, 20, 20))
    report = run_predict(run, tmp_path / "videos", tmp_path / "out")
    assert [path.name for path in report.failed] == ["a.mp4"] and (report.videos, report.images) == (1, 1)
    assert [p for p in (tmp_path / "out").rglob("*a*") if p.is_file()] == []
    small = picture(7)
    with (
        pytest.raises(DataError, match="expected frames of one size"),
        VideoWriter(tmp_path / "x.mp4", Fraction(1, 10), Fraction(10)) as writer,
    ):
        writer.write(small, 0)
        writer.write(small[:-8], 1)
    assert [path.name for path in tmp_path.iterdir() if "x" in path.name] == []


def test_what_is_refused_before_any_work(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(DataError, match="expected images or videos"):
        run_predict(run, tmp_path / "a.txt", out)
    image = save(tmp_path / "a.png", picture(8))
    with pytest.raises(DataError, match="expected an image, a video or a folder"):
        run_predict(run, tmp_path / "none", out)
    with pytest.raises(ConfigError, match="leave out --teacher"):
        predict.Predictor(run, ["distill.enabled=false"], teacher=True, log=quiet)
    assert transkd("predict", run, image, "--out", out, "--size", "huge") == 3
    assert "expected 'run', 'keep' or HxW" in capsys.readouterr().err
    (tmp_path / "v.mp4").write_bytes(b"")
    monkeypatch.setattr(predict.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"transkd_fast\[video\]"):
        run_predict(run, tmp_path / "v.mp4", out)
    assert not out.exists()


def test_colours_and_void_values_need_no_frames(tmp_path):
    assert data.palette_of("camvid")[0].tolist() == [128, 128, 128] and data.void_of("camvid") == (11,)
    assert data.palette_of("voc2012").shape == (21, 3) and data.void_of("street_scenes") == ()
    (tmp_path / "classes.yaml").write_text("classes: [a, b]\npalette: [[1, 2, 3], [4, 5, 6]]\nvoid: [9]\n")
    assert data.palette_of("folder", tmp_path).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert data.void_of("folder", tmp_path) == (9,)
    with pytest.raises(DataError, match=r"expected classes\.yaml or classes\.txt"):
        data.palette_of("folder", tmp_path / "none")
