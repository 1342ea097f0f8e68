"""tools/predict.py: as a process on real files of every kind; the rest in this process, where torch is loaded already."""
import csv
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dataset as data
import train_simple as trainer
from tools import predict as tool
from tools.lib import draw, files, find, video
from tools.lib.boxes import TIGHT, box_around, hull_boxes, intersections, lean, overlaps, room_of, upright
from tools.lib.cli import UserError
from tools.lib.draw import encode_picture
from tools.lib.files import output_folder
from tools.lib.pictures import read_image
from tools.lib.runtime import Processes
from tools.lib.windows import apply_matrix

TOOL = "tools/predict.py"


@pytest.fixture(scope="module")
def faces(run):
    return data.load_coco(run.ann_root / "val.json", run.data_root)


@pytest.fixture(scope="module")
def picture(faces):
    """A sample picture and its face's box."""
    return read_image(faces.root / faces.files[0]), faces.boxes[0]


def predict(*args):
    """The tool's main in this process."""
    return tool.main([*map(str, args), "--device", "cpu"])


def read(out):
    """predictions.json and the rows of predictions.csv."""
    with open(out / "predictions.csv", newline="") as f:
        return json.loads((out / "predictions.json").read_bytes()), list(csv.DictReader(f))


def faceless(predictor, images, *_):
    """In the place of find.Predictor.many, where it does not matter what is found: a search takes seconds."""
    return [[] for _ in images]


def points(result):
    return np.reshape(result["keypoints"], (-1, 3))[:, :2]


def test_given_boxes_predict_what_the_trainer_validates(run, faces, tmp_path):
    checkpoint = run.work_dir / "best_model.pth"
    predict(checkpoint, run.ann_root / "val.json", "--data-root", run.data_root, "--boxes", run.ann_root / "val.json",
            "--out", tmp_path / "out", "--batch-size", 5)
    results, rows = read(tmp_path / "out")
    trained = trainer.Trained(checkpoint)
    scheme, config = trained.scheme, trained.config
    dataset = data.DogFLWDataset(faces, trained.size, config.padding)
    expected, _, _ = trainer.predict(trained.model, dataset, config, Processes("cpu"), trained.amp)
    assert [r["annotation_id"] for r in results] == faces.ids.tolist()
    assert [r["image_id"] for r in results] == faces.image_ids.tolist() and [r["file_name"] for r in results] == faces.files
    for result, truth, box, row in zip(results, expected, faces.boxes, rows, strict=True):
        assert np.abs(points(result) - truth).max() < 0.05
        assert result["category_id"] == 1 and len(result["keypoints"]) == 3 * len(scheme.names)
        assert np.allclose(result["bbox"], box, atol=0.01)
        assert float(row[f"{scheme.names[3]}_y"]) == result["keypoints"][10] and row["file"] == result["file_name"]
    for name, size, landmarks in zip(faces.files, faces.sizes, expected, strict=True):
        overlay, photo = read_image(tmp_path / "out" / name), read_image(faces.root / name)
        assert overlay.shape[1::-1] == tuple(size)
        drawn = np.argwhere(np.abs(overlay.astype(int) - photo).max(2) > 20)[:, ::-1]  # x, y
        near = np.linalg.norm(drawn[:, None] - landmarks, axis=2).min(0)
        assert (near < 4).mean() > 0.9 and (drawn >= landmarks.min(0) - 9).all() and (drawn <= landmarks.max(0) + 9).all(), name


def test_a_folder_with_boxes_keeps_the_files_ids_and_what_is_done_when_stopped(run, faces, tmp_path, monkeypatch):
    folder = (faces.root / faces.files[0]).parent  # the file names its pictures from two folders above
    calls, many = [], find.Predictor.many

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return many(*args)
    monkeypatch.setattr(find.Predictor, "many", stopped)
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
    (folder / "IMG_0001.HEIC").write_bytes(bytes.fromhex("0000001866747970686569630000000068656963") + bytes(99))
    upright.save(folder / "download.jfif", format="JPEG", quality=95)
    upright.save(folder / "no_suffix", format="PNG")
    for name in ("notes.txt", "boxes.json", ".hidden.jpg", "list.TXT"):
        (folder / name).write_text("no picture")
    os.mkfifo(folder / "pipe.jpg")  # which would make a reader wait for ever
    result = script(TOOL, run.work_dir / "best_model.pth", folder, folder / "*.png", "--box", *box, "--out", tmp_path / "out")
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len([line for line in lines if line.startswith("error: ")]) == 5, result.stderr
    for text in ("truncated.jpg", "empty.png", "tiny.png", "IMG_0001.HEIC: ", "4 of 15 files",
                 "4 files in it are neither pictures nor videos (2 .txt, 1 .jpg, 1 .json)"):
        assert text in result.stderr, text
    found = {r["file_name"]: points(r) for r in read(tmp_path / "out")[0]}
    assert len(found) == 11
    for name in ("plain.tif", "rgba.png", "rgb16.png", "no_suffix"):
        assert np.allclose(found[name], found["plain.png"], atol=0.01), name  # written with 3 digits, from another place in a batch
    assert np.allclose(found["grey16.png"], found["grey.png"], atol=0.01)
    for name in ("exif.jpg", "cmyk.jpg", "palette.png", "download.jfif"):
        assert np.abs(found[name] - found["plain.png"]).max() < 0.1 * box[2:].max(), name
    assert read_image(tmp_path / "out" / "exif.jpg").shape == image.shape
    assert (tmp_path / "out" / "plain.tif.png").is_file() and (tmp_path / "out" / "plain.png").is_file()


def test_search_runs_without_boxes(run, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(find, "STABLE", 0)  # a model of a few steps reproduces no box
    Image.fromarray(picture[0]).save(tmp_path / "dog.png")
    predict(run.work_dir / "best_model.pth", tmp_path / "dog.png", "--min-score", 0, "--out", tmp_path / "out")
    results, _ = read(tmp_path / "out")
    scores = [r["score"] for r in results]
    assert results and scores == sorted(scores, reverse=True) and all(r["file_name"] == "dog.png" for r in results)


class Eye:
    """Stands for a trained network: sees the true face nearest to a box's middle, clearer the better the box fits."""

    def __init__(self, truth, whole=False, pair=(0, 1)):
        self.truth, self.whole, self.scheme, self.room = truth, whole, SimpleNamespace(flip_pairs=[pair], names=[]), []

    def look(self, jobs, flip=True):
        boxes, true = np.reshape([box for _, box, *_ in jobs], (-1, 4)), hull_boxes(self.truth, find.MARGIN)
        distance = np.linalg.norm((boxes[:, None, :2] + boxes[:, None, 2:] / 2) - (true[:, :2] + true[:, 2:] / 2), axis=-1)
        fit = np.diagonal(intersections(boxes, true[distance.argmin(1)])) / boxes[:, 2:].prod(1)
        scores = np.clip(fit + 0.15, 0, 1)[:, None]
        return self.truth[distance.argmin(1)] + (1 - scores[..., None]) * 4, np.repeat(scores, self.truth.shape[1], 1)


@pytest.mark.parametrize("locator", [False, True])
def test_several_dogs_are_found_once_each(locator):
    shape = np.random.default_rng(0).uniform(0, 1, (20, 2))
    truth = np.stack([shape * size + corner for size, corner in ((150, (30, 60)), (120, (300, 40)), (90, (480, 260)))])
    predictor = find.Predictor(Eye(truth), Eye(truth, whole=True) if locator else None)
    image = np.zeros((400, 640, 3), np.uint8)
    faces = predictor(image)
    assert len(faces) == 3
    for one in truth:
        assert min(np.abs(face["points"] - one).max() for face in faces) < 4
    for face in faces:
        mean, located = face["scores"].mean(), face["located"]
        assert face["score"] == pytest.approx((mean**2 * located) ** (1 / 3) if locator else mean) and (located is None) != locator
    assert predictor(image, boxes=[[300, 40, 120, 120]])[0]["points"].shape == (20, 2)
    together = predictor.many([image, image, image], [None, [[300, 40, 120, 120]], None])  # each picture for itself
    assert [len(found) for found in together] == [3, 1, 3]


def test_what_does_not_reproduce_its_box_or_scores_low_is_no_face():
    image, truth = np.zeros((300, 400, 3), np.uint8), np.array([[[100.0, 100], [180, 100], [100, 190], [180, 190]]])

    class Drifting(Eye):
        def look(self, jobs, flip=True):
            """Sure of itself, and every time somewhere else than where it looked."""
            boxes = np.reshape([box for _, box, *_ in jobs], (-1, 1, 4))
            return boxes[..., :2] + boxes[..., 2:] * [[0.5, 0.5], [1.2, 0.5], [0.5, 1.2], [1.2, 1.2]], np.full((len(jobs), 4), 0.9)

    class Unsure(Eye):
        def look(self, jobs, flip=True):
            points, scores = super().look(jobs, flip)
            return points, scores * 0 + 0.5
    assert find.Predictor(Drifting(truth))(image) == []
    unsure = find.Predictor(Unsure(truth))
    assert len(unsure(image, min_score=0.5)) == 1 and unsure(image, min_score=0.55) == []


def test_a_locator_looks_closer_upright():
    turns, flips, truth = [], [], np.array([[[100.0, 100], [180, 160], [130, 190], [110, 170]]])  # the pair leans by 37 degrees

    class Turning(Eye):
        def look(self, jobs, flip=True):
            turns.append({turn for _, _, *rest in jobs for turn in rest})
            flips.append(flip)
            return super().look(jobs, flip)
    predictor = find.Predictor(Turning(truth), Turning(truth, whole=True))
    assert len(predictor(np.zeros((300, 300, 3), np.uint8))) == 1
    windows, closer, second, last = turns
    assert flips == [False, False, False, True]  # the mirrored picture for what is returned alone: it costs a second pass
    assert windows == second == set() and len(last) == 1
    assert all(-45 < turn < -25 for turn in closer | last)


INNER = np.array([[[0.3, 0.4], [0.7, 0.4], [0.5, 0.65]], [[0.25, 0.3], [0.8, 0.45], [0.5, 0.7]], [[0.35, 0.4], [0.6, 0.4], [0.5, 0.6]]])


@pytest.mark.parametrize("which, expected", [([0, 1, 2], 4), ([0, 1], 4), ([2], 2)])
def test_boxes_follow_from_landmarks_as_they_did_in_training(which, expected):
    """Eyes and nose lie within a face: hulls alone would show the model a third of what it was trained on."""
    boxes = np.array([[10, 20, 100, 100], [200, 40, 60, 60], [30, 300, 160, 160.0]])
    points = boxes[:, None, :2] + INNER[:, which] * boxes[:, None, 2:]
    room = room_of(points, np.ones(points.shape[:2]), boxes)
    assert len(room) == expected
    shape = boxes[:, None, :2] + np.median(INNER[:, which], 0) * boxes[:, None, 2:]  # the usual face, at each place
    for face, box in zip(shape, boxes):
        assert overlaps(box_around(face, box, TIGHT, room)[None], box[None])[0, 0] > 0.7
        turned, turn = upright((face - box[:2]) @ [[0, 1], [-1, 0]] + box[:2], [[0, 1]] * (len(which) > 1), box,
                               TIGHT, room)
        assert len(which) == 1 or abs(turn) == pytest.approx(90, abs=1) and turned[2] == pytest.approx(box[2], rel=0.2)
    hulls = hull_boxes(points, TIGHT)
    assert room_of(points, np.ones(points.shape[:2]), hulls) == []
    hidden = np.concatenate([points, points * 0], 1)  # what no face has does not count
    assert room_of(hidden, np.repeat([[1, 0]], len(which), 1).repeat(3, 0), boxes) == pytest.approx(room)


def test_boxes_are_learnt_from_faces_in_profile():
    """One eye and the nose are labelled; a prediction has both eyes."""
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(0, 300, (40, 2)), *[rng.uniform(60, 150, 40)] * 2])
    points = boxes[:, None, :2] + (INNER[0] + rng.normal(0, 0.02, (40, 3, 2))) * boxes[:, None, 2:]
    profile = np.ones((40, 3), int)
    profile[np.arange(40), np.arange(40) % 2] = 0
    room = room_of(points, np.ones((40, 3)), boxes)
    assert room_of(points * (profile[..., None] > 0), profile, boxes) == pytest.approx(room, abs=0.05)
    many = room_of(np.tile(points, (2500, 1, 1)), np.ones((100_000, 3)), np.tile(boxes, (2500, 1)))  # a pose data set's
    assert many == pytest.approx(room, abs=0.05)


@pytest.mark.parametrize("which", [[0, 1, 2], [2]])
def test_landmarks_within_a_face_are_found_and_followed_in_boxes_of_the_face(which):
    boxes = np.array([[40, 60, 150, 150], [300, 50, 120, 120.0]])
    truth = boxes[:, None, :2] + INNER[0, which] * boxes[:, None, 2:]

    class Inner(Eye):
        def look(self, jobs, flip=True):
            """Clear where the box fits the face's, not its landmarks'."""
            seen = np.reshape([box for _, box, *_ in jobs], (-1, 4))
            fit = overlaps(seen, boxes)
            return truth[fit.argmax(1)], np.repeat(np.clip(fit.max(1) + 0.3, 0, 1)[:, None], len(which), 1)
    face, locator = Inner(truth), Eye(np.stack([b[:2] + b[2:] * [[0, 0], [1, 0], [0, 1], [1, 1]] for b in boxes]), whole=True)
    face.scheme.flip_pairs = [[0, 1]] * (len(which) > 1)
    face.room = room_of(truth, np.ones(truth.shape[:2]), boxes)
    predictor, image = find.Predictor(face, locator), np.zeros((400, 640, 3), np.uint8)
    faces = predictor(image)
    assert len(faces) == 2 and all(overlaps(f["box"][None], boxes).max() > 0.5 for f in faces)
    tracker = video.Tracker(predictor, boxes)
    for number in range(4):
        (one, two) = tracker(image, number / 25)
        assert overlaps(np.stack([one["box"], two["box"]]), boxes).max(1).min() > 0.5
    assert [one["id"], two["id"]] == [0, 1]


def test_a_face_is_followed_upright_and_is_what_a_photo_of_it_would_be():
    shape, a, turns = np.array([[0, 0], [100, 0], [0, 120], [100, 120.0]]), np.deg2rad(30), []
    truth = (shape @ [[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]] + [180, 140])[None]

    class Leaning(Eye):
        def look(self, jobs, flip=True):
            turns.append([turn for *_, turn in jobs] if len(jobs[0]) > 2 else [])
            return super().look(jobs, flip)
    image = np.zeros((400, 400, 3), np.uint8)
    predictor = find.Predictor(Leaning(truth, pair=(0, 1)), Eye(truth, whole=True))
    (photo,), tracker = predictor(image), video.Tracker(predictor)
    for number in range(3):
        (face,) = tracker(image, number / 25)
        assert overlaps(face["box"][None], photo["box"][None])[0, 0] > 0.95
        assert face["score"] == pytest.approx(photo["score"], abs=0.1) and face["located"] == photo["located"] > 0
        assert turns[-1] == [pytest.approx(-30, abs=2)]


@pytest.mark.parametrize("image,boxes,word", [
    (np.zeros((9, 9), np.uint8), None, "uint8, RGB, not uint8 (9, 9)"), (np.zeros((9, 9, 4), np.uint8), None, "(9, 9, 4)"),
    (np.zeros((9, 9, 3)), None, "not float64"), ("a.jpg", None, "not str"),
    (np.zeros((9, 9, 3), np.uint8), [[0, 0, 0, 5]], "positive sides"), (np.zeros((9, 9, 3), np.uint8), [[0, 0, 5]], "positive"),
    *((np.zeros((9, 9, 3), np.uint8), boxes, "boxes must be numbers (N, 4)") for boxes in (
        0.5, [1, 1, 3, 3] * 2, [[[1, 1], [3, 3]]], [[1, 1], [3, 3]], np.ones((60, 5)))),
    (np.zeros((9, 9, 3), np.uint8), [[0, 0, float("nan"), 5]], "positive"),
    (np.zeros((9, 9, 3), np.uint8), [[2, 2, 5, 5], [50, 50, 5, 5]], "lies outside the picture of 9 x 9"), (np.zeros((9, 9, 3), np.uint8), [[0, 0, 1e9, 1e9]], "positive")])
def test_what_is_no_picture_and_no_box_is_refused(image, boxes, word):
    with pytest.raises(UserError, match=re.escape(word)) as e:
        find.Predictor(Eye(np.zeros((1, 4, 2))))(image, boxes)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


def test_whole_pictures_keep_to_the_least_score():
    predictor = find.Predictor(Eye(np.full((1, 4, 2), 50.0), whole=True))
    image = np.zeros((100, 100, 3), np.uint8)
    assert len(predictor(image, min_score=0)) == 1 and not predictor(image, min_score=0.99)


def test_one_landmark_of_a_dog_that_comes_near_stays_one_face():
    """Its box cannot tell that it grows; what is found anew at the same place does."""
    size = [100.0]

    class Nose:
        face = SimpleNamespace(whole=False, room=[0.5, 0.5])

        def __call__(self, image, boxes=None, min_score=0.5):
            nose, side = np.array([[300.0, 300]]), size[0]
            new = [np.array([300 - side / 2, 300 - side / 2, side, side])]
            return [{"box": np.asarray(box), "points": nose, "scores": np.ones(1), "score": 1.0}
                    for box in (new if boxes is None else boxes)]

        def follow(self, image, faces):
            return self(image, [face["box"] for face in faces])
    tracker = video.Tracker(Nose(), [np.array([250.0, 250, 100, 100])])
    for number in range(31):
        size[0] = 100 * 3 ** (number / 30)
        (only,) = tracker(np.zeros((600, 600, 3), np.uint8), number / 25)
    assert only["id"] == 0 and only["box"][2] == pytest.approx(300, rel=0.01)


def test_a_look_changes_from_the_locators_boxes_to_those_of_the_face_model():
    """Landmarks that came without boxes have boxes of their own, a third of the face's."""
    face = np.array([[[100, 100], [260, 100], [100, 260], [260, 260.0]]])
    own = face[:, :3] / 3 + 120  # eyes and nose, within it

    class Narrow(Eye):
        def look(self, jobs, flip=True):
            seen = np.reshape([box for _, box, *_ in jobs], (-1, 4))
            fit = overlaps(seen, hull_boxes(own, find.MARGIN))[:, :1]
            return np.repeat(own, len(seen), 0), np.repeat(np.clip(fit + 0.4, 0, 1), 3, 1)
    mine, locator = Narrow(own), Eye(face, whole=True)
    mine.scheme.names, locator.scheme.names = ["left", "right", "nose"], ["a", "b", "c", "d"]
    (found,) = find.Predictor(mine, locator)(np.zeros((400, 400, 3), np.uint8))
    assert np.array_equal(found["points"], own[0])
    assert overlaps(found["box"][None], hull_boxes(own, TIGHT))[0, 0] == pytest.approx(1)


def test_a_locator_of_other_landmarks_keeps_its_own_pairs():
    """The bundled one, given to a model of somebody's own landmarks, in another number and order."""
    looks, whole = [], np.array([[[100.0, 100], [180, 160], [130, 190], [110, 170]]])
    own = whole[:, [3, 3, 2, 1, 2, 0]]  # the leaning pair is 5 and 3 here, which the locator does not have

    class Turning(Eye):
        def look(self, jobs, flip=True):
            looks.append((self.whole, {turn for _, _, *rest in jobs for turn in rest}))
            return super().look(jobs, flip)
    predictor = find.Predictor(Turning(own, pair=(5, 3)), Turning(whole, whole=True))
    assert predictor(np.zeros((300, 300, 3), np.uint8))[0]["points"].shape == (6, 2)
    assert [kind for kind, _ in looks] == [True, True, False, False]
    assert all(-45 < turn < -25 for turn in looks[1][1] | looks[3][1])


@given(st.floats(-80, 80), st.booleans(), st.integers(0, 10**6))
def test_a_leaning_face_is_looked_at_upright(degrees, swapped, seed):
    """The box of the turned crop holds the landmarks as tightly as that of the upright face, whatever a pair's order."""
    rng = np.random.default_rng(seed)
    left = rng.uniform([-80, -60], [-20, 60], (5, 2))
    face = np.concatenate([left, left * (-1, 1), [[0, 10]]])
    a, pairs = np.deg2rad(degrees), [[i + 5, i] if swapped and i % 2 else [i, i + 5] for i in range(5)]
    points = face @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + 300
    assert lean(points, pairs) == pytest.approx(degrees, abs=1e-6) and lean(points, []) == 0
    box, turn = upright(points, pairs, None, 0.1, [])
    matrix = data.crop_matrix(box, 256, 1.0, turn)
    expected = data.crop_matrix(hull_boxes(face[None], 0.1)[0], 256, 1.0)
    np.testing.assert_allclose(apply_matrix(matrix, points), apply_matrix(expected, face), atol=1e-6)


def test_which_locator_looks(tmp_path, monkeypatch):
    """The one that is named; else the one beside the checkpoint or of the next run; else the bundled one, for its landmarks alone."""
    monkeypatch.setattr(find, "BUNDLED", tmp_path / "bundled/best_model.pth")
    face, beside, following, bundled = (tmp_path / name for name in (
        "runs/mine/best_model.pth", "runs/mine/locator.pth", "runs/locator/best_model.pth", "bundled/locator.pth"))

    def seen(landmarks="dog", locator=None):
        """The file that was opened as the locator."""
        def open_one(path, *_):
            names = [landmarks if path == face else "dog"]
            return SimpleNamespace(path=path, whole=path != face, scheme=SimpleNamespace(names=names))
        found = find.predictor_of(open_one, face, locator, "cpu").locator
        return found and found.path
    assert seen() is None
    for path in (bundled, following, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert seen() == path and seen(locator=False) is None and seen(locator=bundled) == bundled
        assert seen("cat") == (None if path == bundled else path) and seen("cat", locator=bundled) == bundled


def test_a_bundled_locator_that_edited_code_cannot_load_is_done_without(tmp_path, monkeypatch, capsys):
    """An own one must load."""
    face, bundled = tmp_path / "mine/best_model.pth", tmp_path / "bundled/locator.pth"
    monkeypatch.setattr(find, "BUNDLED", bundled.with_name("best_model.pth"))

    def open_one(path, *_):
        if path != face:
            raise UserError(f"{path}: weights do not fit")
        return SimpleNamespace(whole=False, scheme=None)
    bundled.parent.mkdir()
    bundled.touch()
    assert find.predictor_of(open_one, face, None, "cpu").locator is None
    assert capsys.readouterr().err == f"{bundled}: weights do not fit; faces are looked for without it\n"
    (own := face.with_name("locator.pth")).parent.mkdir()
    own.touch()
    for locator in (bundled, None):
        with pytest.raises(UserError, match="do not fit"):
            find.predictor_of(open_one, face, locator, "cpu")


def test_squares_cover_every_shape_of_picture():
    for height, width in ((300, 500), (500, 300), (1, 1), (40, 4000), (256, 256)):
        seen = np.zeros((height, width), bool)
        boxes = find.search_squares(np.zeros((height, width, 3), np.uint8), find.FACE_SIDES)
        assert (boxes[:, 2:] > 0).all()
        for x, y, w, h in boxes[1:]:
            seen[max(0, int(y)):int(np.ceil(y + h)) + 1, max(0, int(x)):int(np.ceil(x + w)) + 1] = True
        assert seen.all()
    wide = find.search_squares(np.zeros((300, 500, 3), np.uint8), find.FACE_SIDES)
    assert wide[0].tolist() == [0, 0, 499, 299] and {*wide[1:, 2] + 1} == {500 * part for part in find.FACE_SIDES}
    assert find.closer_square(np.array([100.0, 100, 140, 70])).tolist() == [70, 35, 200, 200]  # half filled, around the same middle


def test_suppression_keeps_the_best_of_nested_boxes():
    boxes = np.array([[0, 0, 100, 100], [30, 30, 20, 20], [5, 5, 100, 100], [200, 0, 50, 50]], float)
    assert find.suppress(boxes, np.array([0.8, 0.7, 0.9, 0.1])).tolist() == [2, 3]
    assert find.suppress(boxes, np.array([0.8, 0.7, 0.9, 0.1]), nested=False).tolist() == [2, 1, 3]  # a part is kept at first


def test_a_videos_files_hold_what_each_frame_shows_and_its_overlay_is_steadied(run, tmp_path, monkeypatch):
    told, drawn = [], []

    class Blinking:
        face, locator, scheme = SimpleNamespace(whole=False, room=[]), None, trainer.Trained(run.work_dir / "best_model.pth").scheme

        def __call__(self, image, boxes=None, min_score=0.5):
            return [self.one(box) for box in ([] if boxes is None else boxes)]

        def follow(self, image, faces):
            return [self.one(face["box"]) for face in faces]

        def one(self, box):
            points = np.random.default_rng(0).uniform(20, 100, (46, 2))
            points[20:24, 1] += 8 * (len(told) == 4)  # the lids, in one frame
            told.append(points)
            return {"box": box, "points": points, "scores": np.ones(46), "score": 1.0}

        def many(self, images, boxes, min_score):  # of the pictures, of which there are none
            return []
    monkeypatch.setattr(tool, "load_predictor", lambda *_: Blinking())
    real = draw.draw_landmarks
    monkeypatch.setattr(draw, "draw_landmarks", lambda image, points, *a, **k: drawn.append(points) or real(image, points, *a, **k))
    write_video(tmp_path / "clip.mp4", [np.zeros((128, 128, 3), np.uint8)] * 8)
    predict(tmp_path / "clip.mp4", "--box", 10, 10, 100, 100, "--out", tmp_path / "out")
    results, rows = read(tmp_path / "out")
    assert np.abs([points(r) for r in results] - np.array(told)).max() < 0.001
    name = Blinking.scheme.names[20]
    assert float(rows[4][f"{name}_y"]) - float(rows[3][f"{name}_y"]) == pytest.approx(8, abs=0.01)
    assert 2 < drawn[4][20, 1] - drawn[3][20, 1] < 7.5


def test_what_a_mac_writes_itself_is_h264(tmp_path, monkeypatch):
    real, asked = cv2.VideoWriter, []

    def opened(path, fourcc, *options):  # this OpenCV has no avc1
        asked.append(fourcc)
        return real(path, cv2.VideoWriter_fourcc(*"mp4v"), *options)
    monkeypatch.setattr(video, "has_h264", lambda: False)
    monkeypatch.setattr(cv2, "VideoWriter", opened)
    monkeypatch.setattr(video.sys, "platform", "darwin")
    with video.VideoWriter(tmp_path / "a.mp4", 25, (64, 48)) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8), 0)
        assert writer.finish() == f"without sound; for it {video.INSTALL}" and asked == [cv2.VideoWriter_fourcc(*"avc1")]


def test_filter_steadies_a_still_face_and_does_not_lag():
    rng, rate, size = np.random.default_rng(0), 30, 200.0
    still = np.full((46, 2), 100.0)
    steady = video.OneEuroFilter()
    noisy = [still + rng.normal(0, 1, still.shape) for _ in range(120)]
    steadied = [steady(frame, size, 1 / rate) for frame in noisy]
    assert np.std(np.diff(steadied[30:], axis=0)) < np.std(np.diff(noisy[30:], axis=0)) / 3
    moving, speed = video.OneEuroFilter(), size / rate  # a face's width a second
    for t in range(60):
        out = moving(still + speed * t, size, 1 / rate)
    assert np.abs(out - (still + speed * 59)).max() < speed  # less than a frame


def write_video(path, frames, codec="mp4v", rate=25):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def probe(path, entry, of="v:0"):
    """What ffprobe says of a stream, as text."""
    return subprocess.run(["ffprobe", "-v", "error", "-select_streams", of, "-show_entries", f"stream={entry}", "-of", "csv=p=0",
                           str(path)], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(params=["ffmpeg", "opencv"])
def writer(request, monkeypatch):
    """Both ways to write a video; ffmpeg's where it is installed."""
    if request.param == "ffmpeg" and not video.has_h264():
        pytest.skip("needs an ffmpeg with libx264")
    monkeypatch.setattr(video, "has_h264", lambda: request.param == "ffmpeg")
    return request.param


def test_video(light, picture, tmp_path, capfd, writer):
    image, box = picture
    height, width = (2 * (n // 2) for n in image.shape[:2])
    write_video(tmp_path / "clip.mp4", [np.roll(image, shift, 1)[:height, :width] for shift in range(12)])
    write_video(tmp_path / "slow.avi", [image[:height, :width]], "MJPG", 119.8371)
    predict(light.work_dir / "best_model.pth", tmp_path / "slow.avi", "--box", *box, "--out", tmp_path / "slow")
    assert cv2.VideoCapture(str(tmp_path / "slow" / "slow.avi.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(119.84, abs=0.01)
    predict(light.work_dir / "best_model.pth", tmp_path / "slow.avi", "--box", *box, "--min-score", 1, "--out", tmp_path / "none")
    assert "slow.avi: 1 of its --box score below --min-score 1.0 and are not followed; lower it" in capfd.readouterr().err
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 50)
    with pytest.raises(UserError, match="1 of 2 files"):
        predict(light.work_dir / "best_model.pth", tmp_path / "clip.mp4", tmp_path / "broken.mp4", "--box", *box,
                "--min-score", 0, "--out", tmp_path / "out")
    errors = [line.strip() for line in capfd.readouterr().err.splitlines() if "file/s" not in line and "it/s" not in line]
    word = f"{tmp_path / 'out/clip.mp4'}: written without sound, and as MPEG-4 part 2, which browsers do not play; for H.264 "
    word = [word + video.INSTALL] if writer == "opencv" else []
    assert [line for line in errors if line] == [*word, f"error: {tmp_path / 'broken.mp4'}: cannot be read as a video; copy it again"]
    results, rows = read(tmp_path / "out")
    first = [r for r in results if r["face"] == 0]
    assert [r["frame"] for r in first] == list(range(12)) == [int(r["frame"]) for r in rows if r["face"] == "0"]
    assert np.allclose([r["time"] for r in first], np.arange(12) / 25, atol=1e-3)
    assert np.allclose([float(r["time"]) for r in rows if r["face"] == "0"], np.arange(12) / 25, atol=1e-3)
    assert len({r["image_id"] for r in first}) == 12
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FRAME_WIDTH)) == (12, width)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clip.mp4", "predictions.csv", "predictions.json"]
    for seconds, cut in ((0.48, None), (1.6, "0.5 of about 1.6 s could be read; the rest is missing or damaged")):
        clip = video.Video(tmp_path / "clip.mp4")
        assert clip.length == 12 and clip.duration == pytest.approx(0.48)
        clip.duration = seconds  # what the file's head says
        assert len([*clip.frames(threading.Event())]) == 12 and clip.cut == cut
    (tmp_path / os.fsdecode(b"Bj\xf6rn.mp4")).touch()
    with pytest.raises(UserError, match="no text; rename"):
        video.Video(tmp_path / os.fsdecode(b"Bj\xf6rn.mp4"))


def test_frames_last_as_long_as_their_times_say(tmp_path, writer):
    """Four frames in 0.15 s, then one a second: written at a rate that keeps them all, in time."""
    frames = [np.full((48, 64, 3), (40 * n, 20, 60), np.uint8) for n in range(6)]  # red tells which
    with video.VideoWriter(tmp_path / "out.mp4", 20.0, (64, 48)) as out:
        for frame, seconds in zip(frames, (0, 0.05, 0.1, 0.15, 1.15, 2.15), strict=True):
            out.write(frame, seconds)
        out.finish()
    capture, seen = cv2.VideoCapture(str(tmp_path / "out.mp4")), []
    while (read := capture.read())[0]:
        seen.append(round(read[1][..., 2].mean() / 40))  # OpenCV's order is blue, green, red
    assert seen == [0, 1, 2] + [3] * 20 + [4] * 20 + [5]
    with pytest.raises(ZeroDivisionError), video.VideoWriter(tmp_path / "cut.mp4", 20.0, (64, 48)) as out:
        out.write(frames[0], 0.0)
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="makes the videos with ffmpeg")
def test_raw_streams_and_fast_cameras_are_videos(tmp_path):
    for name, frames, rate in (("a.h264", 25, None), ("a.y4m", 25, 25), ("a.mjpeg", 25, 25), ("fast.mp4", 60, 1000)):
        source = f"testsrc=size=64x48:rate={rate or 25}:duration={frames / (rate or 25)}"
        subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-pix_fmt", "yuvj420p" if "mjpeg" in name else "yuv420p",
                        "-fps_mode", "passthrough", tmp_path / name], check=True)
        (found,) = tool.expand(str(tmp_path / name), tmp_path / "out")
        seen = video.Video(tmp_path / name)
        assert found.kind == "video" and len(list(seen.frames(threading.Event()))) == frames, name
        assert rate is None or seen.rate == pytest.approx(rate, rel=0.02), name


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="makes the videos with ffmpeg")
def test_a_trimmed_video_is_whole_and_a_damaged_one_is_not(light, picture, tmp_path, capfd):
    """Trimming without a new encoding keeps the frames before; only an edit list says that they are not shown."""
    def ffmpeg(*options):
        subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, options)], check=True)
    image, box = picture
    height, width = (2 * (n // 2) for n in image.shape[:2])
    write_video(tmp_path / "raw.mp4", [np.roll(image, shift, 1)[:height, :width] for shift in range(40)])
    ffmpeg("-i", tmp_path / "raw.mp4", "-c:v", "mpeg4", "-g", 30, tmp_path / "long.mp4")
    for name, start in (("trimmed.mp4", 1), ("trimmed.mkv", 1.3)):
        ffmpeg("-ss", start, "-i", tmp_path / "long.mp4", "-c", "copy", tmp_path / name)
    ffmpeg("-i", tmp_path / "long.mp4", "-vf", "select=not(mod(n\\,3))", "-fps_mode", "vfr", "-c:v", "mpeg4", tmp_path / "rate.mkv")
    for name in ("trimmed.mp4", "trimmed.mkv", "rate.mkv"):
        clip = video.Video(tmp_path / name)
        assert len([*clip.frames(threading.Event())]) > 8 and clip.cut is None, name
    ffmpeg("-i", tmp_path / "long.mp4", "-c", "copy", "-movflags", "faststart", tmp_path / "fast.mp4")
    whole = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "damaged.mp4").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="1 of 1 files could not be predicted, or only in part"):
        predict(light.work_dir / "best_model.pth", tmp_path / "damaged.mp4", "--box", *box, "--min-score", 0, "--out",
                tmp_path / "out")
    said = capfd.readouterr()
    assert "of about 1.6 s could be read; the rest is missing or damaged" in said.err and "faces in 0 files" in said.out
    assert len(read(tmp_path / "out")[0]) > 5 and (tmp_path / "out/damaged.mp4").is_file()


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="makes the videos with ffmpeg")
def test_videos_of_a_phone(tmp_path):
    """Turned by a flag, with sound, at a variable rate, of an odd size."""
    def make(name, *options):
        source = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=1", "-f", "lavfi", "-i", "sine=duration=1"]
        subprocess.run(["ffmpeg", "-v", "error", "-y", *source, *options, str(tmp_path / name)], check=True)
        return tmp_path / name

    def through(path):
        """Read and written again."""
        source, stop, times = video.Video(path), threading.Event(), []
        for seconds, frame in source.frames(stop):
            if not times:
                out = video.VideoWriter(tmp_path / f"{path.name}.out.mp4", source.rate, frame.shape[1::-1])
            out.write(frame, seconds)
            times.append(seconds)
        with out:
            return frame, times, out.finish(path), tmp_path / f"{path.name}.out.mp4"
    straight = make("plain.mp4", "-c:v", "mpeg4", "-c:a", "aac")
    turned = tmp_path / "turned.mov"
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(straight), "-c", "copy", "-metadata:s:v:0", "rotate=90", str(turned)], check=True)
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(turned), "-frames:v", "1", str(tmp_path / "upright.png")], check=True)
    first = next(iter(video.Video(turned).frames(threading.Event())))[1]
    assert first.shape == read_image(tmp_path / "upright.png").shape
    assert np.abs(first.astype(int) - read_image(tmp_path / "upright.png")).mean() < 3
    pcm = make("odd.avi", "-vf", "scale=63:47", "-c:v", "mjpeg", "-c:a", "pcm_s16le")
    wmv = make("old.wmv", "-c:v", "wmv2", "-c:a", "wmav2")
    varying = make("vary.mp4", "-vf", "select='lt(n,4)+eq(n,9)'", "-fps_mode", "vfr", "-c:v", "mpeg4", "-an")
    for path in (straight, turned, pcm, wmv):
        frame, times, word, out = through(path)
        assert np.allclose(times, np.arange(10) / 10, atol=2e-3), path.name
        if video.has_h264():
            assert (probe(out, "codec_name"), probe(out, "codec_name", "a:0"), word) == ("h264", "aac", ""), path.name
            assert float(probe(out, "duration", "a:0")) == pytest.approx(1, abs=0.1)
    _, times, _, out = through(varying)
    assert np.allclose(times, [0, 0.1, 0.2, 0.3, 0.9], atol=2e-3)
    assert cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FRAME_COUNT) == 10


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="makes the videos with ffmpeg")
def test_pixels_that_are_no_squares_are_stretched(tmp_path):
    for name, aspect, size in (("wide.mp4", "64/45", (91, 48)), ("high.mp4", "1/2", (64, 96)), ("plain.mp4", "1/1", (64, 48)), ("nearly.mp4", "160/161", (64, 48))):
        subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=0.5", "-vf", f"setsar={aspect}",
                        "-c:v", "mpeg4", tmp_path / name], check=True)
        frames = [frame for _, frame in video.Video(tmp_path / name).frames(threading.Event())]
        assert len(frames) == 5 and frames[0].shape[1::-1] == size, name
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "wide.mp4", "-c", "copy", "-metadata:s:v:0", "rotate=90", tmp_path / "turned.mov"],
                   check=True)
    turned = cv2.VideoCapture(str(tmp_path / "turned.mov")).get(cv2.CAP_PROP_ORIENTATION_META) % 180 == 90  # newer ffmpegs ignore it
    assert next(iter(video.Video(tmp_path / "turned.mov").frames(threading.Event())))[1].shape[1::-1] == ((48, 91) if turned else (91, 48))


def test_a_face_that_was_lost_is_sought_in_every_frame():
    shown, sought = {*range(11), *range(14, 40)}, []

    class Flickering:
        face = SimpleNamespace(whole=False, room=[])

        def __call__(self, image, boxes=None, min_score=0.5):
            sought.append(frame)
            return self.follow(image, [None]) if frame in shown else []

        def follow(self, image, faces):
            points = np.array([[10.0, 10], [60, 60]]) + 3 * frame
            return [{"box": np.array([9.0 + 3 * frame, 9 + 3 * frame, 52, 52]), "points": points, "scores": np.ones(2),
                     "score": float(frame in shown)} for _ in faces]
    tracker, seen = video.Tracker(Flickering()), []
    for frame in range(45):
        for face in tracker(np.zeros((300, 300, 3), np.uint8), frame / 25):
            seen.append(frame)
            assert np.allclose(face["box"], box_around(face["points"], face["box"], TIGHT, []))  # not a steadied one's
            assert frame < 2 or (face["steady"] < face["points"]).all() or frame == 14
    assert seen == sorted(shown) and set(range(11, 36)) <= {*sought} and not {*range(1, 10)} & {*sought}


def test_frames_behind_a_damaged_one_are_read():
    class Capture:
        reads = [True, True, False, True, False, False, True]

        def read(self):
            return (self.reads.pop(0) if self.reads else False), np.zeros((4, 4, 3), np.uint8)

        def get(self, _):
            return 40.0 * (6 - len(self.reads))

        def release(self):
            pass
    clip = object.__new__(video.Video)
    vars(clip).update(source=Path("a.mp4"), name="a.mp4", capture=Capture(), live=False, rate=25.0, duration=0.28, cut=None, damaged=0,
                      stretch=1.0)
    times = [seconds for seconds, _ in clip.frames(threading.Event())]
    assert np.allclose(times, [0, 0.04, 0.12, 0.24]) and clip.cut == "frames that are damaged, and left out: 3"


def test_an_odd_duration_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(video.shutil, "which", lambda name: name)
    for said, seconds in (("00:01:02.500000000", 62.5), ("00:00:00.5.0", 7), ("9" * 5000 + ":00:00", 7)):
        stream = json.dumps({"streams": [{"tags": {"DURATION": said}}]})
        monkeypatch.setattr(video.subprocess, "run", lambda *_, said=stream, **__: SimpleNamespace(stdout=said))
        assert video.duration(tmp_path / "a.mkv", 7) == seconds
    late = json.dumps({"streams": [{"tags": {"DURATION": "00:00:03.7"}}], "format": {"duration": "3.7", "start_time": "2.5"}})
    monkeypatch.setattr(video.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=late))
    assert video.duration(tmp_path / "a.mkv", 7) == pytest.approx(1.2)


def test_a_video_whose_sound_cannot_be_copied_is_written_without(tmp_path, monkeypatch):
    if not video.has_h264():
        pytest.skip("needs an ffmpeg with libx264")
    real = subprocess.run

    def failing(command, **options):
        if command[0] == "ffprobe":
            return SimpleNamespace(stdout='{"streams": [{"codec_name": "aac"}]}')
        return real(["false"], **options)
    monkeypatch.setattr(video.subprocess, "run", failing)
    with video.VideoWriter(tmp_path / "out.mp4", 10.0, (64, 48)) as out:
        out.write(np.zeros((48, 64, 3), np.uint8), 0.0)
        assert out.finish(tmp_path / "any.mp4") == "without its sound, which ffmpeg could not copy"
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_a_video_that_does_not_fit_the_disk_is_named(tmp_path, writer):
    with video.VideoWriter(tmp_path / "out.mp4", 10.0, (64, 48)) as out:
        if out.process:
            out.process.kill()
        else:
            out.count = 5  # of which OpenCV wrote none
        with pytest.raises(UserError, match="out.mp4: could not be written whole; is the disk full"):
            for _ in range(100):
                out.write(np.zeros((48, 64, 3), np.uint8), 0.0)
            out.finish()
    assert not list(tmp_path.iterdir())


def test_clocks_that_stand_or_jump(monkeypatch):
    class Capture:
        def __init__(self, *_):
            self.now, self.times = 0, iter([5000, 5040, 5040, 0, 9e9, 9e9 + 40])

        def read(self):
            self.now = next(self.times, None)
            return self.now is not None, np.zeros((4, 4, 3), np.uint8)

        def get(self, what):
            return {cv2.CAP_PROP_FPS: 25.0, cv2.CAP_PROP_FRAME_COUNT: 6}.get(what) or self.now
        set, isOpened, release, grab = (lambda *_: True for _ in range(4))
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    monkeypatch.setattr(video, "writing_rate", lambda path, rate: rate)
    times = [seconds for seconds, _ in video.Video("http://example.org/clip.mp4").frames(threading.Event())]
    assert np.allclose(times, np.arange(6) / 25)


class Stream(http.server.BaseHTTPRequestHandler):
    """A network camera: JPEGs without an end."""
    jpeg = b""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
                                 % (len(self.jpeg), self.jpeg))
                time.sleep(0.01)
        except OSError:
            pass  # who looked has gone

    def log_message(self, *_):
        pass


def test_a_stream_is_followed_until_ctrl_c(light, picture, start, tmp_path, monkeypatch):
    image, box = picture
    monkeypatch.setattr(Stream, "jpeg", encode_picture(image, ".jpg"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stream)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://me:secret@127.0.0.1:{server.server_port}/live?key=secret"
    for name in ("before.png", "behind.png"):  # a picture that waits for its batch, and one behind the stream
        Image.fromarray(image).save(tmp_path / name)
    process = start(TOOL, tmp_path / "before.png", address, tmp_path / "behind.png", "--checkpoint", light.work_dir / "best_model.pth", "--box", *box, "--min-score", 0,
                    "--out", tmp_path / "out", "--device", "cpu")
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/.*.tmp.mp4")):
            assert process.is_alive() and time.monotonic() < deadline, process.err.read_text()
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 0, process.err.read_text()
    finally:
        process.kill()
        server.shutdown()
        server.server_close()
    name = f"http_127_0_0_1_{server.server_port}_live"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "before.png", "behind.png", f"{name}.mp4", "predictions.csv", "predictions.json"]
    results, _ = read(tmp_path / "out")
    pictures = {r["file_name"]: points(r) for r in results if r["frame"] is None}
    assert np.allclose(pictures["before.png"], pictures["behind.png"], atol=0.01)
    results = [r for r in results if r["frame"] is not None]
    capture = cv2.VideoCapture(str(tmp_path / "out" / f"{name}.mp4"))
    seconds = capture.get(cv2.CAP_PROP_FRAME_COUNT) / capture.get(cv2.CAP_PROP_FPS)
    assert results[-1]["frame"] > 0 and results[-1]["time"] == pytest.approx(seconds, abs=0.1)
    written = process.err.read_text() + process.out.read_text() + (tmp_path / "out" / "predictions.csv").read_text()
    assert "following it until Ctrl-C" in written and "secret" not in written


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="makes the videos with ffmpeg")
def test_sound_before_the_first_picture_is_left_out(tmp_path):
    """A second of sound, then silence, with which the pictures begin."""
    write_video(tmp_path / "clip.mp4", [np.zeros((64, 64, 3), np.uint8)] * 50)
    subprocess.run(["ffmpeg", "-v", "error", "-itsoffset", "1", "-i", tmp_path / "clip.mp4", "-f", "lavfi", "-i",
                    "aevalsrc=0.5*sin(3000*t)*lt(t\\,1):d=3", "-map", "0:v", "-map", "1:a", "-c:v", "copy", tmp_path / "late.mkv"], check=True)
    late = video.Video(tmp_path / "late.mkv")
    assert len(list(late.frames(threading.Event()))) == 50 and late.cut is None
    assert video.add_sound(tmp_path / "clip.mp4", tmp_path / "late.mkv", 2) == ""
    raw = subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "clip.mp4", "-f", "s16le", "-"], capture_output=True, check=True).stdout
    sound = np.frombuffer(raw, np.int16).astype(float)
    assert len(sound) > 44100 and np.abs(sound[len(sound) // 8:]).max() < 500


def test_a_codec_that_opencv_lacks_is_named(tmp_path):
    write_video(tmp_path / "clip.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3)
    clip = video.Video(tmp_path / "clip.mp4")
    clip.capture = SimpleNamespace(read=lambda: (False, None), release=lambda: None)
    with pytest.raises(UserError, match="cannot be read as a video; copy it again, or convert it if OpenCV cannot decode .*: ffmpeg -i .*clip.mp4"):
        next(clip.frames(threading.Event()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_does_not_wait_for_threads_that_it_lacks():
    """As a web server's workers, with a model that was loaded before."""
    code = ("import os, torch\nimport tools.lib.runtime\ntorch.set_num_threads(2)\ntorch.ones(10**6).sum()\nif not (child := os.fork()):\n"
            "    torch.ones(10**6).sum()\n    os._exit(7)\nprint(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))")
    done = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
                            start_new_session=True)
    try:
        assert done.communicate(timeout=60)[0] == b"7\n"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGKILL)


def test_a_stopped_video_is_kept_up_to_there(light, picture, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", [picture[0][:64, :64]] * 12)
    real, calls = video.Tracker.__call__, []

    def slow(self, *args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)
    monkeypatch.setattr(video.Tracker, "__call__", slow)
    with pytest.raises(KeyboardInterrupt):
        predict(light.work_dir / "best_model.pth", tmp_path / "clip.mp4", "--box", 5, 5, 50, 50, "--min-score", 0,
                "--out", tmp_path / "out")
    assert {r["frame"] for r in read(tmp_path / "out")[0]} == set(range(5))
    assert cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 5


@pytest.mark.parametrize("live,number", [(False, signal.SIGINT), (True, signal.SIGTERM), (True, signal.SIGINT)])
def test_a_signal_ends_the_run_but_ctrl_c_only_a_live_stream(run, picture, tmp_path, monkeypatch, capsys, live, number):
    """The recorded video is damaged; a picture follows."""
    class Clip(video.Video):
        def __init__(self, source):
            super().__init__(source)
            self.live, self.damaged, self._live = live, not live, self._recorded
    write_video(tmp_path / "clip.mp4", [picture[0][:64, :64]] * 12)
    Image.fromarray(picture[0]).save(tmp_path / "behind.png")
    real, calls = video.Tracker.__call__, []

    def slow(self, *args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return real(self, *args)
    monkeypatch.setattr(video.Tracker, "__call__", slow)
    monkeypatch.setattr(tool, "Video", Clip)
    goes_on = live and number == signal.SIGINT
    with nullcontext() if goes_on else pytest.raises(KeyboardInterrupt) as end:
        predict(run.work_dir / "best_model.pth", tmp_path / "clip.mp4", tmp_path / "behind.png", "--box", 5, 5, 50, 50, "--min-score", 0,
                "--out", tmp_path / "out")
    assert goes_on or end.value.args == (number,)
    results = read(tmp_path / "out")[0]
    assert {r["frame"] for r in results if r["file_name"] == "clip.mp4"} == set(range(5))
    assert goes_on == any(r["file_name"] == "behind.png" for r in results) == (tmp_path / "out/behind.png").exists()
    assert "clip.mp4: stopped; what was seen until then is written" in (said := capsys.readouterr().err) and "error" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_pictures_are_kept_up_to_where_a_signal_ends_them(light, picture, tmp_path, monkeypatch, number):
    (tmp_path / "photos").mkdir()
    for name in "abc":
        Image.fromarray(picture[0]).save(tmp_path / f"photos/{name}.png")
    real = tool.PictureQueue.add

    def add(self, source):
        if source.file == "c.png":
            os.kill(os.getpid(), number)
        real(self, source)
    monkeypatch.setattr(tool.PictureQueue, "add", add)
    monkeypatch.setattr(find.Predictor, "many", faceless)
    monkeypatch.chdir(tmp_path / "photos")
    with pytest.raises(KeyboardInterrupt):  # without a face: what is there must say that it is of this tool
        predict(light.work_dir / "best_model.pth", ".", "--min-score", 1, "--batch-size", 1)
    assert read(tmp_path / "photos/predictions") == ([], []) and (tmp_path / "photos/predictions/b.png").exists()
    monkeypatch.setattr(tool.PictureQueue, "add", real)
    predict(light.work_dir / "best_model.pth", ".", "--min-score", 1)
    assert sorted(p.name for p in (tmp_path / "photos/predictions_2").iterdir()) == ["a.png", "b.png", "c.png", "predictions.csv", "predictions.json"]


def test_what_was_found_is_written_on_the_way(run, picture, tmp_path, monkeypatch, capsys):
    """A machine that stops, or a disk that fills up, leaves what is older than a minute; a log shows life."""
    for name in "abc":
        Image.fromarray(picture[0]).save(tmp_path / f"{name}.png")
    seen, write = [], tool.Results.write
    monkeypatch.setattr(tool.Results, "write", lambda self, *given: seen.append(len(self.rows)) or write(self, *given))
    for every, counts in ((-1, [1, 2, 3, 3]), (60, [3])):
        monkeypatch.setattr(tool, "EVERY", every)
        monkeypatch.setattr(tool, "time", SimpleNamespace(monotonic=lambda: 0.0))
        predict(tmp_path, "--checkpoint", run.work_dir / "best_model.pth", "--box", *picture[1], "--batch-size", 1, "--out", tmp_path / f"o{every}")
        assert seen == counts
        seen.clear()


def test_the_newest_frame_of_a_camera_comes_next(monkeypatch):
    class Camera:
        number = 0

        def read(self):
            time.sleep(0.005)
            self.number += 1
            return self.number < 60, np.full((4, 4, 3), self.number, np.uint8)
        get, set, isOpened, release = (lambda *_: -1 for _ in range(4))
    monkeypatch.setattr(cv2, "VideoCapture", lambda place: Camera())
    seen, source = [], video.Video(0)
    for seconds, frame in source.frames(threading.Event()):
        seen.append((seconds, int(frame[0, 0, 0])))
        time.sleep(0.05)
    numbers = [n for _, n in seen]
    assert source.live and numbers == sorted(set(numbers)) and 3 <= len(numbers) < 30 and seen[-1][0] > 0.2
    assert "ended by itself after " in source.cut and "unless it is a recording" in source.cut  # .ts, .mpg over HTTP


def test_a_face_keeps_its_number_in_a_video(run, tmp_path, monkeypatch):
    class Two:
        """Two faces side by side, of which the left one is gone from the fourth look on."""
        face, locator, looks, scheme = SimpleNamespace(whole=False, room=[]), None, 0, trainer.Trained(run.work_dir / "best_model.pth").scheme

        def __call__(self, image, boxes=None, min_score=0.5):
            self.looks += boxes is not None
            return [{"box": box, "points": box[:2] + box[2:] * np.random.default_rng(0).random((46, 2)), "scores": np.ones(46),
                     "score": float(box[0] > 50 or self.looks < 4)} for box in ([] if boxes is None else boxes)]

        def follow(self, image, faces):
            return self(image, [face["box"] for face in faces] or None)

        def many(self, images, boxes, min_score):  # of the pictures, of which there are none
            return []
    monkeypatch.setattr(tool, "load_predictor", lambda *_: Two())
    write_video(tmp_path / "clip.mp4", [np.zeros((160, 320, 3), np.uint8)] * 6)
    predict(tmp_path / "clip.mp4", "--box", 10, 10, 90, 90, "--box", 190, 10, 90, 90, "--out", tmp_path / "out")
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
    for boxes in (torch.tensor(np.array([picture[1]])), [[*map(str, picture[1])]]):
        assert (predictor(picture[0], boxes=boxes)[0]["points"] == face["points"]).all()
    for image, boxes in ((picture[0], torch.ones(1, 4, requires_grad=True)), (np.zeros((0, 0, 3), np.uint8), None)):
        with pytest.raises(UserError, match="^boxes must be|^a picture must be"):
            predictor(image, boxes)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for place in (str(run.work_dir), run.work_dir):  # a run's folder; and no one's random numbers are drawn
        again = tool.load_predictor(place, device="cpu")
        assert (again(picture[0], picture[1])[0]["points"] == face["points"]).all()
    assert torch.equal(torch.rand(3), expected)
    torch.set_default_dtype(torch.float64)  # of the program around it
    try:
        for one in (predictor, tool.load_predictor(run.work_dir, device="cpu")):
            assert np.abs(one(picture[0], picture[1])[0]["points"] - face["points"]).max() < 1e-3
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(UserError, match="no best_model.pth in it"):
        tool.load_predictor(run.ann_root, device="cpu")
    with pytest.raises(UserError, match="batch_size 0: must be"):
        tool.load_predictor(run.work_dir / "best_model.pth", device="cpu", batch_size=0)


def test_a_second_run_takes_another_folder_and_a_lacking_locator_is_said(light, picture, tmp_path, monkeypatch, capsys):
    Image.fromarray(picture[0]).save(tmp_path / "dog.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "BUNDLED", tmp_path / "no.pth")
    monkeypatch.setattr(find.Predictor, "many", faceless)
    for name in ("predictions", "predictions_2", "predictions_3"):
        predict(light.work_dir / "best_model.pth", "dog.png")
        said = capsys.readouterr()
        assert f"-> {name};" in said.out and (tmp_path / name / "predictions.json").exists()
        assert "no locator fits this model" in said.err
    predict(light.work_dir / "best_model.pth", "dog.png", "--force", "--box", *picture[1])
    said = capsys.readouterr()
    assert "-> predictions;" in said.out and "locator" not in said.err
    assert not list(tmp_path.glob("*/.lock"))


HOLDER = """
import sys
from pathlib import Path
from tools.lib.files import output_folder
with output_folder(Path(sys.argv[1]) if sys.argv[1] else None, "found", False) as folder:
    print(folder, flush=True)
    sys.stdin.read()
    if sys.argv[2]:
        (folder / "result").touch()
"""


def test_two_runs_at_once_never_share_a_folder(tmp_path, monkeypatch):
    """What two processes find must not end in one predictions.json, of which the later one has the last word."""
    monkeypatch.chdir(tmp_path)

    def holder(out, writes):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, out, writes], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env=os.environ | {"PYTHONPATH": str(find.ROOT)})
        return process, process.stdout.readline().strip()

    def end(process):
        process.communicate("")
        assert process.returncode == 0
    first, folder = holder("", "writes")
    assert folder == "found"
    with output_folder(None, "found", False) as second:
        assert second.name == "found_2"
    assert not second.exists()  # nothing came into it
    for force in (False, True):
        with pytest.raises(UserError, match="--out found: another run is writing there"), output_folder(Path("found"), "", force):
            pass
    end(first)
    assert [p.name for p in Path("found").iterdir()] == ["result"]

    def another_users(path, busy):
        if path.parent.name == "others":
            raise PermissionError(path)
        return lock(path, busy)
    lock = files.file_lock
    monkeypatch.setattr(files, "file_lock", another_users)
    Path("others").mkdir()
    with output_folder(None, "others", False) as second:
        assert second.name == "others_2"
    with pytest.raises(PermissionError), output_folder(Path("others"), "", False):
        pass
    mine = tmp_path / "mine"
    mine.mkdir()
    end(holder("mine", "")[0])
    assert mine.is_dir() and not list(mine.iterdir())  # which it did not make
    (mine / ".lock").touch()  # of a run that was killed
    with output_folder(mine, "", False):
        (mine / "result").touch()
    with pytest.raises(UserError, match="--out .*mine: not empty"), output_folder(mine, "", False):
        pass


def test_pictures_of_a_coco_file_are_those_of_the_fetched_dogflw(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    version = tmp_path / "datasets/georgemartvel/dogflw/versions/1"
    version.parent.mkdir(parents=True)
    version.symlink_to(run.data_root)
    sources, root, _ = tool.plan(tool.parse_args([str(run.ann_root / "val.json"), "--out", str(tmp_path / "out")]))
    assert root == version and len(sources) == 12 and all(s.place.is_file() and s.image_id for s in sources)


def test_bad_input_is_refused(run, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "none"))
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
    for name, images in (("dog", [dog]), ("cat", [cat]), ("twice", [dog, cat])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": images, "annotations": [{"image_id": 1, "bbox": [1, 1, 9, 9]}]}))
    torch.save({}, tmp_path / "dog.pt")
    out = ("--out", tmp_path / "out")
    for wanted, args in {
        "not empty": (checkpoint, photo, "--out", tmp_path / "full"),
        "no such file": (checkpoint, tmp_path / "missing.png", *out),
        "an INPUT is empty": (checkpoint, "", *out),
        "no pictures": (checkpoint, tmp_path / "full", *out),
        "and height, both above 0": (checkpoint, photo, "--box", 0, 0, 0, 5, *out),
        "--data-root: DogFLW was not found on this machine; name the folder of the pictures": (checkpoint, coco, *out),
        "leaves the data root": (checkpoint, coco, "--data-root", tmp_path / "full", *out),
        "not a checkpoint": (tmp_path / "dog.pt", photo, *out),
        "is a checkpoint; name a picture, folder or video": (run.work_dir, *out),
        "--category dog: .*dog.json has no landmarks": (checkpoint, photo, "--boxes", tmp_path / "dog.json", "--category", "dog", *out),
        "--coco .*full: is a folder": (checkpoint, photo, "--coco", tmp_path / "full", *out),
        "--data-root .*ones: .* is not in it; name a folder above all files, or": (checkpoint, photo, "--data-root", tmp_path / "ones", *out),
        "^--batch-size 0: must be at least 1; --min-score 1.5: must be from 0 to 1$": (checkpoint, photo, "--batch-size", 0, "--min-score", 1.5),
        "was trained on faces": (checkpoint, photo, "--locator", checkpoint, *out),
        "give a video's face": (checkpoint, video, "--boxes", run.ann_root / "val.json", *out),
        "would be overwritten": (checkpoint, photo, "--out", tmp_path, "--force"),
        "no such file ": (tmp_path / "no.pth", photo, *out),
    }.items():
        with pytest.raises(UserError, match=wanted.strip()):
            predict(*args)
    monkeypatch.setattr(find, "BUNDLED", tmp_path / "no.pth")
    with pytest.raises(UserError, match="no.pth: no such file, so this copy has no bundled model; name a checkpoint"):
        predict(photo, *out)
    shutil.copytree(tmp_path / "ones", tmp_path / "two/ones")
    for wanted, args in {
        "1 of 1 files": (photo, "--box", 5000, 0, 9, 9),
        "is the name of several": (tmp_path / "ones", tmp_path / "two", "--boxes", tmp_path / "dog.json"),
        "image id of another picture": (tmp_path / "dog.json", tmp_path / "cat.json", "--data-root", tmp_path / "ones"),
        "has the id of another": (tmp_path / "twice.json", "--data-root", tmp_path / "ones"),
    }.items():
        with pytest.raises(UserError, match=wanted):
            predict(checkpoint, *args, *out)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and not (tmp_path / "out").exists()


def test_pictures_without_a_face_are_named(light, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for n in range(5):
        Image.new("RGB", (64, 48), (40 * n, 90, 90)).save(tmp_path / f"in/{n}.png")
    monkeypatch.setattr(find.Predictor, "many", faceless)
    predict(light.work_dir, tmp_path / "in", "--min-score", 1, "--out", tmp_path / "out")
    assert "no face was found in 5 pictures (0.png, 1.png, 2.png, ...); a --min-score below 1.0" in capsys.readouterr().out


def test_a_box_that_fails_late_costs_no_other_picture(run, picture, tmp_path, monkeypatch):
    """What waits with it is named; what comes after it is predicted."""
    image, box = picture
    predictor = trainer.load_predictor(run.work_dir / "best_model.pth", device="cpu")
    queue = tool.PictureQueue(predictor, SimpleNamespace(add=lambda source, faces, size: None), SimpleNamespace(
        coco=None, batch_size=2, min_score=0.0, boxes=None))
    for n in range(3):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    sources = [tool.Source(tmp_path / f"{n}.png", "picture", f"{n}.png", tmp_path / f"out/{n}.png", boxes=[(None, box)]) for n in range(3)]
    queue.add(sources[0])
    with monkeypatch.context() as late:
        late.setattr(predictor, "many", lambda *_: (_ for _ in ()).throw(UserError("a box")))
        with pytest.raises(UserError, match="not predicted: 0.png, 1.png: a box"):
            queue.add(sources[1])
    queue.add(sources[2])
    queue.finish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["2.png"]


def test_boxes_of_a_picture_of_the_same_name_are_not_taken(run, picture, tmp_path):
    (tmp_path / "photos/sub").mkdir(parents=True)
    for name in ("dog.png", "sub/dog.png"):
        Image.fromarray(picture[0]).save(tmp_path / "photos" / name)
    images = [{"id": 7, "file_name": "dog.png"}, {"id": 8, "file_name": "sub/dog.png"}]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": [{"image_id": 7, "bbox": [1, 1, 99, 99]}]}))
    with pytest.raises(UserError, match="1 of 1 files"):
        predict(run.work_dir / "best_model.pth", tmp_path / "photos/sub", "--data-root", tmp_path / "photos", "--boxes",
                tmp_path / "boxes.json", "--out", tmp_path / "out")
    assert not (tmp_path / "out/predictions.json").exists()


def test_files_of_several_drives_need_a_data_root(run, picture, tmp_path, monkeypatch):
    def commonpath(_):
        raise ValueError("Paths don't have the same drive")  # as on Windows
    monkeypatch.setattr(tool.os.path, "commonpath", commonpath)
    Image.fromarray(picture[0]).save(tmp_path / "dog.png")
    with pytest.raises(UserError, match="--data-root: is needed for files on several drives"):
        predict(run.work_dir / "best_model.pth", tmp_path / "dog.png", "--out", tmp_path / "out")


def test_a_coco_file_needs_no_keypoints(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": "a.png"}], "annotations": [
        {"image_id": 7, "bbox": [1, 2, 3, 4]}, {"image_id": 7, "bbox": [5, 6, 7, 8]}]}))
    listing = tool.read_listing(path)
    assert (listing.ids, listing.category) == ({"a.png": 7}, tool.FACE) and [a for a, _ in listing.boxes["a.png"]] == [None, None]
    assert np.array_equal([box for _, box in listing.boxes["a.png"]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    path.write_text(json.dumps({"images": [{"id": "x", "file_name": "./a.png"}], "categories": [
        {"id": 7, "name": "dog", "keypoints": ["eye"]}],
        "annotations": [{"id": 5, "image_id": "x", "bbox": [0] * 4, "keypoints": [0] * 3}]}))
    listing = tool.read_listing(path, with_boxes=False)
    assert (listing.ids, listing.boxes, listing.category) == ({"a.png": "x"}, {}, {"id": 7, "name": "dog"})
    with pytest.raises(UserError, match="annotation 5: box"):
        tool.read_listing(path)
    (source,), category = tool.list_inputs([str(path)], tmp_path, tmp_path / "out")
    assert (source.place, source.kind, source.image_id, category) == (tmp_path / "a.png", "picture", "x", listing.category)
    (tmp_path / "a.png").touch()
    path.write_text('{"images": [{"id": 0, "file_name": "a.png"}]}')  # an id like any other
    (source,), _ = tool.list_inputs([str(tmp_path / "a.png"), str(path)], tmp_path, tmp_path / "out")
    assert source.image_id == 0


def test_a_coco_files_pictures_are_found_as_the_trainer_finds_them(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.jpg", tmp_path / "sub/b c.jpg")
    names = ["/home/me/a.jpg", "sub\\b%20c.jpg", "sub/none.jpg"]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"images": [{"id": i, "file_name": n} for i, n in enumerate(names)]}))
    sources, _ = tool.list_inputs([str(path)], tmp_path, tmp_path / "out")
    assert [s.place.relative_to(tmp_path).as_posix() for s in sources] == ["a.jpg", "sub/b c.jpg", "sub/none.jpg"]


def test_given_boxes_are_those_that_the_trainer_reads(run, faces, tmp_path, capsys):
    """Boxes as x1 y1 x2 y2, a missing one, and a body's box beside every face."""
    content = json.loads((run.ann_root / "val.json").read_text())
    bodies = [{"id": 1000 + a["id"], "image_id": a["image_id"], "category_id": 2, "bbox": [0, 0, 90, 90]} for a in content["annotations"]]
    for a in content["annotations"]:
        a["bbox"] = [*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]
    content["annotations"][0]["bbox"] = None
    content["annotations"] = [*content["annotations"], *bodies]
    content["categories"].append({"id": 2, "name": "body"})
    (tmp_path / "val.json").write_text(json.dumps(content))
    listing, expected = tool.read_boxes(tmp_path / "val.json", run.data_root), data.load_coco(tmp_path / "val.json", run.data_root)
    assert "without landmarks" in capsys.readouterr().err and len(listing.boxes) == len(faces)
    for file, own, box in zip(expected.files, expected.ids, expected.boxes):
        ((found, given),) = listing.boxes[file]
        assert found == own and np.array_equal(box, given)
    np.testing.assert_allclose(expected.boxes[1:], faces.boxes[1:])
    cat = {"id": 9, "name": "cat", "keypoints": ["nose"]}
    first = {"id": 12345, "category_id": 9, "image_id": content["images"][0]["id"], "bbox": [1, 1, 50, 50], "keypoints": [9, 9, 2]}
    content.update(categories=[cat, *content["categories"]], annotations=[first, *content["annotations"]])
    (tmp_path / "two.json").write_text(json.dumps(content))
    for name, number in (("cat", 9), (content["categories"][1]["name"], 1)):  # the one that is written
        assert tool.read_boxes(tmp_path / "two.json", run.data_root, name).category == {"id": number, "name": name}


DOG = {"id": 7, "name": "dog", "keypoints": ["nose"]}


def boxes_file(path, images, faces, landmarks=True):
    """A COCO file of pictures and [(image id, box), ...], each with a nose in its middle, or without."""
    annotations = [{"image_id": i, "bbox": b, "category_id": 7,
                    **({"keypoints": [b[0] + b[2] / 2, b[1] + b[3] / 2, 2]} if landmarks else {})} for i, b in faces]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [DOG]}))
    return path


def planned(*args):
    """What is to be predicted, without a model: each picture is read."""
    args = tool.parse_args([*map(str, args), "--out", "predictions"])
    sources, _, category = tool.plan(args)
    queue = tool.PictureQueue(None, None, args)
    for source in sources:
        queue.add(source)
    return sources, category


@pytest.mark.parametrize("landmarks", [True, False])
def test_boxes_of_pictures_of_another_size_are_refused(tmp_path, landmarks):
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    for sides in ({}, {"width": 80, "height": 60}, {"width": 160, "height": 120}):
        file = boxes_file(tmp_path / "f.json", [{"id": 1, "file_name": "a.png", **sides}], [(1, [5, 5, 40, 40])], landmarks)
        if sides.get("width") != 160:
            planned(tmp_path / "a.png", "--boxes", file)
            continue
        with pytest.raises(UserError, match="a.png: is 80 x 60 pixels, the COCO file says 160 x 120; export the ann"):
            planned(tmp_path / "a.png", "--boxes", file)


@pytest.mark.parametrize("landmarks", [True, False])
@pytest.mark.parametrize("rooted", [True, False])
def test_boxes_are_turned_with_the_pictures_that_exif_turns(tmp_path, landmarks, rooted, capsys):
    """Names with a folder, though all pictures lie in it; a picture upside down is turned by what the others tell."""
    (tmp_path / "train").mkdir()
    for name, turn in (("0.jpg", 6), ("1.jpg", 3)):
        exif = Image.Exif()
        exif[0x112] = turn
        Image.new("RGB", (160, 120)).save(tmp_path / "train" / name, exif=exif)
    images = [{"id": i, "file_name": f"train/{i}.jpg", "width": 160, "height": 120} for i in (0, 1)]
    stored, low = [10, 20, 40, 30], [10, 90, 40, 60]  # as seen, this one is in the picture
    file = boxes_file(tmp_path / "f.json", images, [(0, stored), (1, stored)], landmarks)
    args = tmp_path, "--boxes", file, *(("--data-root", tmp_path) if rooted else ())
    (one, two), _ = planned(*args)
    assert np.array_equal(one.boxes[0][1], [69, 10, 30, 40]) and np.array_equal(two.boxes[0][1], [109, 69, 40, 30])
    said = capsys.readouterr().err
    assert "2 faces of pictures that EXIF turns, turned with them" in said
    assert landmarks or "was labelled upright; draw it with tools/visualize_dataset.py or tools/predict.py, and look" in said
    if not landmarks:
        boxes_file(file, images, [(0, low), (1, stored)], landmarks)
        (one, two), _ = planned(*args)
        assert np.array_equal(one.boxes[0][1], low) and np.array_equal(two.boxes[0][1], stored)
        boxes_file(file, images, [("0", stored), (1, stored)], landmarks)  # an id as a text, too
        file.write_text(json.dumps(json.loads(file.read_text()) | {"info": {"contributor": "Label Studio"}}))
        assert [s.boxes[0][1].tolist() for s in planned(*args)[0]] == [stored, stored]  # it shows them upright
    boxes_file(file, images[1:], [(1, stored)], landmarks)
    (tmp_path / "train/0.jpg").unlink()
    capsys.readouterr()
    planned(*args)
    assert capsys.readouterr().err.count("nothing tells whether") == 1


@pytest.mark.parametrize("landmarks", [True, False])
def test_an_image_entry_for_every_face_is_one_picture(tmp_path, landmarks):
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    images, faces = [{"id": i, "file_name": "a.png"} for i in (3, 4)], [(3, [5, 5, 20, 20]), (4, [30, 30, 20, 20])]
    file = boxes_file(tmp_path / "f.json", images, faces, landmarks)
    (source,), category = planned(tmp_path, "--boxes", file)  # its annotations have no id: their number is it
    assert source.image_id == 3 and category == {"id": 7, "name": "dog"}
    assert [(own, box.tolist()) for own, box in source.boxes] == [
        (i if landmarks else None, box) for i, (_, box) in enumerate(faces)]
    with pytest.raises(UserError, match="same file_name"):  # whose of two ids would a found face have?
        planned(file, "--data-root", tmp_path)
    boxes_file(file, [{**images[0], "width": 80, "height": 60}, {**images[1], "width": 40, "height": 30}], faces, landmarks)
    with pytest.raises(UserError, match="has two sizes of a.png; give every picture one entry"):
        planned(tmp_path, "--boxes", file)


@pytest.mark.parametrize("content,words", [
    ({"images": [], "annotations": 0.5}, "not a COCO file with images and bbox"),
    ({"images": [], "annotations": [{"id": "\n", "bbox": 1}]}, r"annotation \?: box 1 must be four numbers"),
    ({"images": [], "annotations": [{"bbox": 1}]}, "annotation 0 of the list: box 1 must be four numbers"),
    ([{"image_id": 1, "bbox": [1, 1, 9, 9], "score": 0.9}], "is only a list, as detectors write their boxes; put it")])
def test_what_is_no_file_of_boxes_is_refused(tmp_path, content, words):
    (tmp_path / "f.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        tool.read_boxes(tmp_path / "f.json", tmp_path)


def test_folders_in_a_folder(tmp_path, capsys):
    """Links to folders and predictions of before are left out, with a word; the folder to write into without."""
    for folder in ("in/sub", "elsewhere", "in/before/sub", "in/out"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(tmp_path / folder / "a.png")
    (tmp_path / "in/before/predictions.json").touch()
    (tmp_path / "in/now").mkdir()
    for name in ("a.png", ".lock"):  # what a killed run has left
        (tmp_path / "in/now" / name).touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    sources = tool.expand(str(tmp_path / "in"), tmp_path / "in/out")
    assert [s.place.relative_to(tmp_path).as_posix() for s in sources] == ["in/sub/a.png"]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"{tmp_path}/in/before: is left out: earlier predictions",
        f"{tmp_path}/in/link: is left out: a link to a folder; name it, too",
        f"{tmp_path}/in/now: is left out: a run is writing there, or was"]
    for text in (f"{tmp_path}/in", f"{tmp_path}/in/sub", f"{tmp_path}/in/s*/*.png"):
        with pytest.raises(UserError, match="--out .*/in: the pictures of .* are in it; name another folder"):
            tool.expand(text, tmp_path / "in")
    (tmp_path / "in/notes.txt").touch()
    with pytest.raises(UserError, match="notes.*: no pictures in it"):
        tool.expand(f"{tmp_path}/in/notes*", tmp_path / "in")


def test_brackets_of_a_real_folder_are_no_pattern(tmp_path):
    for name in ("dogs [24]/a [1]/x.jpg", "dogs [24]/b/y.jpg", "dogs 2/b/z.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)

    def names(pattern):
        return [source.place.name for source in tool.expand(f"{tmp_path}/{pattern}", tmp_path / "out")]
    assert names("dogs [24]/b/*.jpg") == ["y.jpg"] and names("dogs [24]/**/*.jpg") == ["x.jpg", "y.jpg"]
    assert names("dogs [24]/a [1]/*") == ["x.jpg"] and names("dogs [24]/*/") == ["x.jpg", "y.jpg"]
    assert names("dogs [12]/b/*.jpg") == ["z.jpg"] and names("dogs [[]24]/b/*") == ["y.jpg"]


def test_a_glob_leaves_out_what_was_made_before(tmp_path, capsys):
    for name in ("a.png", "found/a.png", "found/sub/c.png", "sub/c.png", "sub/aligned/c_0.png", "out/a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "in" / name)
    for name in ("found/predictions.json", "sub/aligned/transforms.json", "out/predictions.json", "notes.txt"):
        (tmp_path / "in" / name).touch()
    for text in ("in/**", "i*/**/*.png", "in/*"):
        sources = tool.expand(str(tmp_path / text), tmp_path / "in/out")
        assert [s.place.relative_to(tmp_path / "in").as_posix() for s in sources] == ["a.png", "sub/c.png"]
        said = capsys.readouterr().err.splitlines()
        assert sum("in/found: is left out: earlier predictions" in line for line in said) == 1
        assert sum("in/sub/aligned: is left out: earlier aligned faces" in line for line in said) == 1
        assert [line for line in said if "neither pictures" in line] == [f"{tmp_path / text}: 1 files in it are neither pictures nor videos "
                                                                    "(1 .txt)"] * ("png" not in text)
    named = tool.expand(str(tmp_path / "in/found/*.png"), tmp_path / "in/out")  # what is named is meant
    assert [s.place.name for s in named] == ["a.png"]


def test_boxes_names_may_be_spelt_otherwise(tmp_path):
    """As those of an INPUT and of the trainer: case, %20, an accent of two characters, a place on this machine."""
    there = ["IMG_1.JPG", "a b.jpg", "e\u0301.jpg", "plain.jpg"]
    for name in there:
        Image.new("RGB", (80, 60)).save(tmp_path / name, format="JPEG")
    names = ["img_1.jpg", "a%20b.jpg", "\u00e9.jpg", str(tmp_path / "plain.jpg")]
    file = boxes_file(tmp_path / "f.json", [{"id": i, "file_name": n} for i, n in enumerate(names)], [(i, [5, 5, 20, 20 + i]) for i in range(4)],
                      landmarks=False)
    sources, _ = planned(*(tmp_path / name for name in there), "--boxes", file)
    assert [source.boxes[0][1][3] for source in sources] == [20, 21, 22, 23]


def test_boxes_that_may_be_corners_are_said_once(tmp_path, capfd):
    for name in "ab":
        Image.new("RGB", (320, 320)).save(tmp_path / f"{name}.png")
    for box, said in (([150, 100, 310, 250], 1), ([150, 100, 160, 150], 0), ([200, 200, 90, 230], 0), ([20, 30, 310, 330], 0)):
        file = boxes_file(tmp_path / "f.json", [{"id": n, "file_name": f"{n}.png"} for n in "ab"], [(n, box) for n in "ab"], landmarks=False)
        planned(tmp_path, "--boxes", file)
        assert capfd.readouterr().err.count("if it is x1, y1, x2, y2") == said
    with pytest.raises(UserError, match="both above 0 and one at least 2"):
        planned(tmp_path / "a.png", "--box", 0, 0, 0.94, 0.53)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/secret"))
        yield str(folder), [], ["a.png"]
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(os, "walk", walk)
    assert len(tool.expand(str(tmp_path), tmp_path / "out")) == 1
    assert capsys.readouterr().err == f"{tmp_path}/secret: is left out: Permission denied\n"


@pytest.mark.parametrize("name", ["2024", "0"])
def test_a_folder_of_a_number_is_no_camera(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / name / "a.jpg")
    (tmp_path / name / "b.jpg").symlink_to("/nowhere/b.jpg")  # git-annex's: named when it cannot be read
    (tmp_path / name / "c.jpg").symlink_to("c.jpg")  # and one to itself
    assert [s.place.name for s in tool.expand(name, tmp_path / "out")] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [s.place for text in ("7", "/dev/video7") for s in tool.expand(text, tmp_path / "out")] == [7, 7]


def test_names_of_every_kind_are_written(run, picture, tmp_path):
    """A name that is no text, one as long as names may be, one too long for the overlay's; a picture too long."""
    folder, odd = tmp_path / "photos", os.fsdecode(b"Bj\xf6rn.png")
    folder.mkdir()
    for name in (odd, "d" * 251 + ".png"):
        Image.fromarray(picture[0]).save(folder / "a.png")
        (folder / "a.png").rename(folder / name)
    Image.new("RGB", (66_000, 9)).save(folder / "wide.png")
    args = run.work_dir / "best_model.pth", folder, "--box", *picture[1], "--out", tmp_path / "out"
    with pytest.raises(UserError, match="1 of 3 files"):
        predict(*args)
    assert {len(name) for name in os.listdir(tmp_path / "out")} == {9, 15, 16, 255}  # csv and json, two overlays
    assert "Bj\\udcf6rn.png" in (tmp_path / "out/predictions.csv").read_text()
    (folder / ("d" * 251 + ".png")).rename(folder / ("d" * 250 + ".webp"))
    with pytest.raises(UserError, match="name is too long for the overlay's"):
        predict(*args, "--force")


def test_the_checkpoint_may_come_first_or_by_its_flag():
    args = tool.parse_args(["best.pth", "a.jpg"])
    assert (str(args.checkpoint), args.input) == ("best.pth", ["a.jpg"])
    args = tool.parse_args(["a.jpg", "--checkpoint", "best.pth"])
    assert (str(args.checkpoint), args.input) == ("best.pth", ["a.jpg"])
    assert tool.parse_args(["a.jpg"]).checkpoint is None  # the bundled one
    for wanted, argv in {"one.pth and two.pth: give one checkpoint": ["two.pth", "a.jpg", "--checkpoint", "one.pth"],
                         "name a picture, folder or video after it": ["two.pth"], "arguments are required": []}.items():
        with pytest.raises(UserError, match=wanted):
            tool.parse_args(argv)


def test_a_name_may_begin_with_a_dash_or_be_an_address_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-hund.jpg", "-a b.jpg", ".jpg"):
        Image.new("RGB", (80, 60)).save(name, format="JPEG")
    assert tool.parse_args(["-hund.jpg", "-a b.jpg", "--min-score", "0"]).input == ["./-hund.jpg", "./-a b.jpg"]
    (source,) = tool.expand(f"file://{tmp_path}/-a%20b.jpg", tmp_path / "out")
    assert (source.kind, source.place) == ("picture", tmp_path / "-a b.jpg")
    (source,), _ = planned(".jpg")
    assert source.target.name == ".jpg.png"
    with pytest.raises(UserError, match="http://host/a.PNG: is a picture on a server; download it"):
        tool.expand("http://host/a.PNG", tmp_path / "out")
    with pytest.raises(FileExistsError):  # told before all is predicted
        tool.parse_args(["a.jpg", "--coco", ".jpg/mine.json"])


def test_cameras_and_streams_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").write_bytes(b"a file of that name")
    for text, place in (("0", 0), ("/dev/video12", 12), ("rtsp://a/b", "rtsp://a/b"), ("7", tool.Path("7"))):
        (source,) = tool.expand(text, tmp_path / "out")
        assert source.place == place and source.kind == ("picture" if text == "7" else "video")
    assert video.name_of("rtsp://me:pass@host:554/live?token=1") == "rtsp://host:554/live" and video.name_of(1) == "camera 1"
    for address in ("rtsp://admin:P@ss@host/live", "rtsp://a:P/ss@host/live", "rtsp://host/user=admin_password=Pss_channel=1.sdp"):
        assert "ss" not in video.name_of(address).replace("pass", "") and "host" in video.name_of(address)
    for place, wanted in ((99, "camera 99: cannot be opened"), ("http://u:p@127.0.0.1:9/x", "http://127.0.0.1:9/x: cannot be opened")):
        with pytest.raises(UserError, match=wanted):
            video.Video(place)


def test_predict_correct_train(run, faces, picture, tmp_path, train, capsys):
    """--coco writes a data set that the trainer, pycocotools and our own reader take as it is."""
    folder = tmp_path / "pics"
    (folder / "more").mkdir(parents=True)
    names = ["0.png", "1.png", "more/2.png", "more/turned.jpg"]
    for name, file in zip(names, faces.files):
        shutil.copy(faces.root / file, folder / name)
    upright, exif = Image.open(folder / names[3]).convert("RGB"), Image.Exif()
    exif[0x112] = 6
    upright.rotate(90, expand=True).save(folder / names[3], exif=exif, quality=95)
    width, height = upright.size
    coco = tmp_path / "my set.json"
    predict(folder, "--checkpoint", run.work_dir / "best_model.pth", "--box", width / 4, height / 4, width, height,
            "--coco", coco, "--out", tmp_path / "out")
    assert f"train_simple.py --ann-root '{coco}' --data-root {folder} --holdout" in capsys.readouterr().out
    content = json.loads(coco.read_bytes())
    assert [i["file_name"] for i in content["images"]] == names
    assert (content["images"][3]["width"], content["images"][3]["height"]) == (width, height)
    results, scheme, again = read(tmp_path / "out")[0], faces.scheme, data.load_coco(coco, folder)
    assert again.scheme == scheme and again.files == names and not getattr(again, "notes", None)
    for n, (annotation, result) in enumerate(zip(content["annotations"], results, strict=True)):
        assert np.abs(again.points[n] - points(result)).max() < 0.006
        x, y, w, h = annotation["bbox"]
        size = np.array([content["images"][n]["width"], content["images"][n]["height"]])
        assert np.allclose([x, y], [width / 4, height / 4], atol=0.01)  # the box, cut to the picture
        assert np.allclose([x + w, y + h], np.minimum(size, [width * 5 / 4, height * 5 / 4]), atol=0.02)
        assert annotation["area"] == pytest.approx(w * h, abs=0.1) and annotation["num_keypoints"] == len(scheme.names)
        inside = ((points(result) > -0.5) & (points(result) < size - 0.5)).all(1)
        assert again.visible[n].tolist() == np.where(inside, 2, 1).tolist()
    coco_tool = pytest.importorskip("pycocotools.coco")
    theirs = coco_tool.COCO(coco)
    assert len(theirs.loadRes(str(tmp_path / "out" / "predictions.json")).anns) == len(theirs.anns) == 4
    (tmp_path / "ann").mkdir()
    for name in ("train.json", "val.json"):
        shutil.copy(coco, tmp_path / "ann" / name)
    train(tmp_path / "work", "--data-root", folder, "--ann-root", tmp_path / "ann", "--batch-size", 4, check=True)
    out = ("--checkpoint", run.work_dir / "best_model.pth", "--out", tmp_path / "out2")
    write_video(tmp_path / "clip.mp4", [picture[0][:64, :64]])
    Image.fromarray(picture[0]).save(tmp_path / "new\nline.png")
    for name in ("a.gif", "a.gif.png"):
        Image.fromarray(picture[0]).save(tmp_path / name)
    with pytest.raises(UserError, match="overlay of two inputs; rename one of them"):
        predict(tmp_path / "a.gif", tmp_path / "a.gif.png", *out)
    for wanted, args in {"boxes, or of --out": (folder, "--coco", tmp_path / "out2"), "exists; write over it with --force, or name another --coco": (folder, "--coco", coco), "the file of --boxes": (
            folder, "--coco", coco, "--boxes", coco, "--force"), "clip.mp4 is a video; save its frames": (
            tmp_path / "clip.mp4", "--coco", tmp_path / "new.json"), "or of --out": (
            folder, "--coco", tmp_path / "out2/predictions.json"), "is a folder; name a file": (
            folder, "--coco", folder, "--force"), "is an INPUT": (
            coco, "--data-root", folder, "--coco", coco, "--force"), "--category: selects faces": (
            folder, "--category", "dog"), "has boxes of pictures": (
            tmp_path / "clip.mp4", "--boxes", coco), "1 of 1 files": (
            tmp_path / "clip.mp4", "--box", 9000, 9000, 20, 20), "1 of 1 files could": (
            tmp_path / "new\nline.png", "--coco", tmp_path / "lines.json")}.items():
        with pytest.raises(UserError, match=wanted):
            predict(*args, *out)


def test_a_large_picture_has_coordinates_of_its_own(run, picture, tmp_path, monkeypatch, capfd):
    image, box = picture
    for scale, name in ((1, "small"), (4, "large")):
        larger = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        Image.fromarray(larger).save(tmp_path / f"{name}.jpg", quality=98, subsampling=0)
        monkeypatch.setattr(tool, "MOST_PIXELS", image.shape[0] * image.shape[1])
        corner, side = (box[:2] + 0.5) * scale - 0.5, box[2:] * scale
        predict(tmp_path / f"{name}.jpg", "--checkpoint", run.work_dir / "best_model.pth", "--box", *corner, *side,
                "--out", tmp_path / name)
    said = capfd.readouterr().err
    assert f"large.jpg: its {image.shape[1] * 4} x {image.shape[0] * 4} pixels are scaled down to" in said and "small.jpg" not in said
    (small,), (large,) = (read(tmp_path / name)[0] for name in ("small", "large"))
    assert np.allclose(large["bbox"], [*((box[:2] + 0.5) * 4 - 0.5), *box[2:] * 4], atol=0.1)
    assert np.abs((points(large) + 0.5) / 4 - 0.5 - points(small)).max() < 0.05 * box[2:].max()
    overlay, other = (read_image(tmp_path / name / f"{name}.jpg") for name in ("large", "small"))
    assert overlay.shape == image.shape
    changed = np.abs(other.astype(int) - image).max(2) > 60  # where landmarks are drawn on the small one
    assert changed.sum() > 50 and np.abs(overlay.astype(int) - other)[changed].mean() < 40
