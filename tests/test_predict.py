"""tools/predict.py: as a process on real files of every kind; the rest in this process, where torch is loaded already."""
import csv
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dataset as data
import train_simple as trainer
from tools import predict as tool

TOOL = "tools/predict.py"


@pytest.fixture(scope="module")
def faces(run):
    return data.load_coco(run.ann_root / "val.json", run.data_root)


@pytest.fixture(scope="module")
def picture(faces):
    """A sample picture and its face's box."""
    return data.read_image(faces.root / faces.files[0]), faces.boxes[0]


def predict(*args):
    """The tool's main in this process."""
    return tool.main([*map(str, args), "--device", "cpu"])


def read(out):
    """predictions.json and the rows of predictions.csv."""
    with open(out / "predictions.csv", newline="") as f:
        return json.loads((out / "predictions.json").read_bytes()), list(csv.DictReader(f))


def points(result):
    return np.reshape(result["keypoints"], (-1, 3))[:, :2]


def test_given_boxes_predict_what_the_trainer_validates(run, faces, tmp_path):
    checkpoint = run.work_dir / "best_model.pth"
    predict(checkpoint, run.ann_root / "val.json", "--data-root", run.data_root, "--boxes", run.ann_root / "val.json",
            "--out", tmp_path / "out", "--batch-size", 5)
    results, rows = read(tmp_path / "out")
    model, scheme, args, _ = trainer.load_model(checkpoint)
    batch = data.DogFLWDataset(faces, args["input_size"], args["padding"]).__getitems__(list(range(len(faces))))
    amp = trainer.choose_amp(torch.device("cpu"), args["amp"])
    heatmaps = trainer.predict_heatmaps(model, batch["image"], torch.tensor(scheme.flip_index), amp)
    expected = data.apply_matrix(data.invert_matrix(batch["matrix"].numpy()), data.decode_heatmaps(heatmaps)[0].numpy())
    assert [r["annotation_id"] for r in results] == faces.ids.tolist()
    assert [r["image_id"] for r in results] == faces.image_ids.tolist() and [r["file_name"] for r in results] == faces.files
    for result, truth, box, row in zip(results, expected, faces.boxes, rows, strict=True):
        assert np.abs(points(result) - truth).max() < 0.05
        assert result["category_id"] == 1 and len(result["keypoints"]) == 3 * len(scheme.names)
        assert np.allclose(result["bbox"], box, atol=0.01)
        assert float(row[f"{scheme.names[3]}_y"]) == result["keypoints"][10] and row["file"] == result["file_name"]
    for name, size in zip(faces.files, faces.sizes, strict=True):
        assert data.read_image(tmp_path / "out" / name).shape[1::-1] == tuple(size)


def test_a_folder_with_boxes_keeps_the_files_ids_and_what_is_done_when_stopped(run, faces, tmp_path, monkeypatch):
    folder = (faces.root / faces.files[0]).parent  # the file names its pictures from two folders above
    calls, many = [], tool.Predictor.many

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return many(*args)
    monkeypatch.setattr(tool.Predictor, "many", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict(run.work_dir / "best_model.pth", folder, "--boxes", run.ann_root / "val.json", "--out", tmp_path / "out",
                "--batch-size", 2)
    ids = dict(zip((name.split("/")[-1] for name in faces.files), faces.image_ids.tolist(), strict=True))
    results, _ = read(tmp_path / "out")
    assert len(results) == 4 and all(r["image_id"] == ids[r["file_name"]] for r in results)


def test_every_kind_of_file(run, picture, script, tmp_path):
    (image, box), folder = picture, tmp_path / "photos"
    folder.mkdir()
    upright, grey = Image.fromarray(image), Image.fromarray(image).convert("L")
    tag = upright.getexif()
    tag[0x112] = 6  # shown turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(folder / "exif.jpg", exif=tag, quality=95)
    upright.save(folder / "plain.png")
    upright.save(folder / "plain.tif")
    upright.convert("RGBA").save(folder / "rgba.png")
    upright.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    upright.quantize(128).save(folder / "palette.png")
    grey.save(folder / "grey.png")
    cv2.imwrite(str(folder / "grey16.png"), np.asarray(grey).astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "rgb16.png"), image[..., ::-1].astype(np.uint16) * 257)
    (folder / "truncated.jpg").write_bytes((folder / "exif.jpg").read_bytes()[:2000])
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    result = script(TOOL, run.work_dir / "best_model.pth", folder, folder / "*.png", "--box", *box, "--out", tmp_path / "out")
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len([line for line in lines if line.startswith("error: ")]) == 4, result.stderr
    for name in ("truncated.jpg", "empty.png", "tiny.png", "3 of 12 files"):
        assert name in result.stderr
    found = {r["file_name"]: points(r) for r in read(tmp_path / "out")[0]}
    assert len(found) == 9
    for name in ("plain.tif", "rgba.png", "rgb16.png"):
        assert np.allclose(found[name], found["plain.png"], atol=0.01), name  # written with 3 digits, from another place in a batch
    assert np.allclose(found["grey16.png"], found["grey.png"], atol=0.01)
    for name in ("exif.jpg", "cmyk.jpg", "palette.png"):
        assert np.abs(found[name] - found["plain.png"]).max() < 0.1 * box[2:].max(), name
    assert data.read_image(tmp_path / "out" / "exif.jpg").shape == image.shape
    assert (tmp_path / "out" / "plain.tif.png").is_file() and (tmp_path / "out" / "plain.png").is_file()


def test_search_runs_without_boxes(run, picture, tmp_path):
    Image.fromarray(picture[0]).save(tmp_path / "dog.png")
    predict(run.work_dir / "best_model.pth", tmp_path / "dog.png", "--min-score", 0, "--out", tmp_path / "out")
    results, _ = read(tmp_path / "out")
    scores = [r["score"] for r in results]
    assert scores == sorted(scores, reverse=True) and all(r["file_name"] == "dog.png" for r in results)


class Eye:
    """Stands for a trained network: sees the true face nearest to a box's middle, clearer the better the box fits."""

    def __init__(self, truth, whole=False):
        self.truth, self.whole, self.scheme = truth, whole, None

    def look(self, jobs, flip=True):
        boxes, true = np.reshape([box for _, box in jobs], (-1, 4)), tool.hull_boxes(self.truth)
        distance = np.linalg.norm((boxes[:, None, :2] + boxes[:, None, 2:] / 2) - (true[:, :2] + true[:, 2:] / 2), axis=-1)
        fit = np.diagonal(data.intersections(boxes, true[distance.argmin(1)])) / boxes[:, 2:].prod(1)
        scores = np.clip(fit + 0.15, 0, 1)[:, None]
        return self.truth[distance.argmin(1)] + (1 - scores[..., None]) * 4, np.repeat(scores, self.truth.shape[1], 1)


@pytest.mark.parametrize("locator", [False, True])
def test_several_dogs_are_found_once_each(locator):
    shape = np.random.default_rng(0).uniform(0, 1, (20, 2))
    truth = np.stack([shape * size + corner for size, corner in ((150, (30, 60)), (120, (300, 40)), (90, (480, 260)))])
    predictor = tool.Predictor(Eye(truth), Eye(truth, whole=True) if locator else None)
    faces = predictor(np.zeros((400, 640, 3), np.uint8))
    assert len(faces) == 3
    for one in truth:
        assert min(np.abs(face["points"] - one).max() for face in faces) < 4
    assert predictor(np.zeros((400, 640, 3), np.uint8), boxes=[[300, 40, 120, 120]])[0]["points"].shape == (20, 2)


def test_windows_cover_every_shape_of_picture():
    for height, width in ((300, 500), (500, 300), (1, 1), (40, 4000), (256, 256)):
        seen = np.zeros((height, width), bool)
        boxes = tool.windows(np.zeros((height, width, 3), np.uint8), tool.FACE_SIDES)
        assert (boxes[:, 2:] > 0).all()
        for x, y, w, h in boxes[1:]:
            seen[max(0, int(y)):int(np.ceil(y + h)) + 1, max(0, int(x)):int(np.ceil(x + w)) + 1] = True
        assert seen.all()


def test_suppression_keeps_the_best_of_nested_boxes():
    boxes = np.array([[0, 0, 100, 100], [30, 30, 20, 20], [5, 5, 100, 100], [200, 0, 50, 50]], float)
    assert tool.suppress(boxes, np.array([0.8, 0.7, 0.9, 0.1])).tolist() == [2, 3]


def test_filter_steadies_a_still_face_and_does_not_lag():
    rng, rate, size = np.random.default_rng(0), 30, 200.0
    still = np.full((46, 2), 100.0)
    steady = tool.OneEuroFilter(rate)
    noisy = [still + rng.normal(0, 1, still.shape) for _ in range(120)]
    steadied = [steady(frame, size) for frame in noisy]
    assert np.std(np.diff(steadied[30:], axis=0)) < np.std(np.diff(noisy[30:], axis=0)) / 3
    moving, speed = tool.OneEuroFilter(rate), size / rate  # a face's width a second
    for t in range(60):
        out = moving(still + speed * t, size)
    assert np.abs(out - (still + speed * 59)).max() < speed  # less than a frame


def write_video(path, frames, codec="mp4v", rate=25):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def test_video(run, picture, tmp_path, capfd):
    image, box = picture
    height, width = (2 * (n // 2) for n in image.shape[:2])
    write_video(tmp_path / "clip.mp4", [np.roll(image, shift, 1)[:height, :width] for shift in range(12)])
    write_video(tmp_path / "slow.avi", [image[:height, :width]], "MJPG", 119.8371)
    predict(run.work_dir / "best_model.pth", tmp_path / "slow.avi", "--box", *box, "--out", tmp_path / "slow")
    assert cv2.VideoCapture(str(tmp_path / "slow" / "slow.avi.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(119.84)
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 50)
    with pytest.raises(data.UserError, match="1 of 2 files"):
        predict(run.work_dir / "best_model.pth", tmp_path / "clip.mp4", tmp_path / "broken.mp4", "--box", *box,
                "--min-score", 0, "--out", tmp_path / "out")
    errors = [line for line in capfd.readouterr().err.splitlines() if "file/s" not in line and "it/s" not in line]
    assert [line for line in errors if line.strip()] == [f"error: {tmp_path / 'broken.mp4'}: cannot be read as a video"]
    results, rows = read(tmp_path / "out")
    first = [r for r in results if r["face"] == 0]
    assert [r["frame"] for r in first] == list(range(12)) == [int(r["frame"]) for r in rows if r["face"] == "0"]
    assert len({r["image_id"] for r in first}) == 12
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FRAME_WIDTH)) == (12, width)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clip.mp4", "predictions.csv", "predictions.json"]


def test_a_face_keeps_its_number_in_a_video(run, tmp_path, monkeypatch):
    class Two:
        """Two faces side by side, of which the left one is gone from the fourth look on."""
        face, scheme, looks = SimpleNamespace(whole=False), trainer.load_model(run.work_dir / "best_model.pth")[1], 0

        def __call__(self, image, boxes=None, min_score=0.5):
            self.looks += boxes is not None
            return [{"box": box, "points": box[:2] + box[2:] * np.random.default_rng(0).random((46, 2)), "scores": np.ones(46),
                     "score": float(box[0] > 50 or self.looks < 4)} for box in ([] if boxes is None else boxes)]

        def many(self, images, boxes, min_score):  # of the pictures, of which there are none
            return []
    monkeypatch.setattr(tool, "load_predictor", lambda *_: Two())
    write_video(tmp_path / "clip.mp4", [np.zeros((160, 320, 3), np.uint8)] * 6)
    predict("any.pth", tmp_path / "clip.mp4", "--box", 10, 10, 90, 90, "--box", 190, 10, 90, 90, "--out", tmp_path / "out")
    seen = [(r["frame"], r["face"]) for r in read(tmp_path / "out")[0]]
    assert seen == [(frame, face) for frame in range(6) for face in (0, 1) if face or frame < 3]


def test_notebook_function(run, picture):
    predictor = tool.load_predictor(run.work_dir / "best_model.pth", device="cpu")
    (face,) = predictor(picture[0], boxes=[picture[1]])
    k = len(predictor.scheme.names)
    assert face["box"].shape == (4,) and face["points"].shape == (k, 2) and face["scores"].shape == (k,)
    assert 0 <= face["score"] <= 1
    twice = predictor.many([picture[0]] * 2, [[picture[1]], [picture[1]]])
    assert all(np.abs(f[0]["points"] - face["points"]).max() < 1e-2 for f in twice)


def test_bad_input_is_refused(run, picture, tmp_path):
    checkpoint, photo = run.work_dir / "best_model.pth", tmp_path / "dog.png"
    Image.fromarray(picture[0]).save(photo)
    coco = tmp_path / "climbing.json"
    coco.write_text(json.dumps({"images": [{"id": 1, "file_name": "../secret.png"}]}))
    (video := tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "ones").mkdir()
    shutil.copy(photo, tmp_path / "ones")
    dog, cat = {"id": 1, "file_name": "dog.png"}, {"id": 1, "file_name": "cat.png"}
    for name, images in (("dog", [dog]), ("cat", [cat]), ("twice", [dog, {**dog, "id": 2}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": images, "annotations": [{"image_id": 1, "bbox": [1, 1, 9, 9]}]}))
    out = ("--out", tmp_path / "out")
    for wanted, args in {
        "not empty": (checkpoint, photo, "--out", tmp_path / "full"),
        "no such file": (checkpoint, tmp_path / "missing.png", *out),
        "no pictures": (checkpoint, tmp_path / "full", *out),
        "height above 0": (checkpoint, photo, "--box", 0, 0, 0, 5, *out),
        "needs --data-root": (checkpoint, coco, *out),
        "leaves the data root": (checkpoint, coco, "--data-root", tmp_path / "full", *out),
        "trained on faces": (checkpoint, photo, "--locator", checkpoint, *out),
        "give a video's face": (checkpoint, video, "--boxes", run.ann_root / "val.json", *out),
        "would be overwritten": (checkpoint, photo, "--out", tmp_path, "--force"),
        "no such file ": (tmp_path / "no.pth", photo, *out),
    }.items():
        with pytest.raises(data.UserError, match=wanted.strip()):
            predict(*args)
    shutil.copytree(tmp_path / "ones", tmp_path / "two/ones")
    for wanted, args in {
        "1 of 1 files": (photo, "--box", 5000, 0, 9, 9),
        "is the name of several": (tmp_path / "ones", tmp_path / "two", "--boxes", tmp_path / "dog.json"),
        "image id of another picture": (tmp_path / "dog.json", tmp_path / "cat.json", "--data-root", tmp_path / "ones"),
        "same file_name or id": (tmp_path / "twice.json", "--data-root", tmp_path / "ones"),
    }.items():
        with pytest.raises(data.UserError, match=wanted):
            predict(checkpoint, *args, *out)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_coco_file_needs_no_keypoints(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": "a.png"}], "annotations": [
        {"image_id": 7, "bbox": [1, 2, 3, 4]}, {"image_id": 7, "bbox": [5, 6, 7, 8]}]}))
    ids, boxes, category = tool.read_coco(path)
    assert (ids, category) == ({"a.png": 7}, 1) and [a for a, _ in boxes["a.png"]] == [None, None]
    assert np.array_equal([box for _, box in boxes["a.png"]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    path.write_text(json.dumps({"images": [{"id": "x", "file_name": "./a.png"}], "categories": [{"id": 7, "keypoints": ["eye"]}],
                                "annotations": [{"id": 5, "image_id": "x", "bbox": [0] * 4, "keypoints": [0] * 3}]}))
    assert tool.read_coco(path, with_boxes=False) == ({"a.png": "x"}, {}, 7)
    with pytest.raises(data.UserError, match="annotation 5: box"):
        tool.read_coco(path)
    args = SimpleNamespace(input=[str(path)], data_root=tmp_path, out=tmp_path / "out")
    assert tool.list_inputs(args) == ([tmp_path / "a.png"], {"a.png": "x"}, 7)
