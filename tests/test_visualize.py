"""Pictures of a data set: the right ones, of the right size, showing what they say."""
import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest

import dataset as data
from tools import visualize_dataset as tool
from tools.lib import draw
from tools.lib.cli import UserError
from tools.lib.pictures import read_image


def has(picture, colour, tolerance=25):
    return (np.abs(picture.astype(int) - colour).max(-1) <= tolerance).any()


def test_sheets(sample, script, tmp_path):
    ann = sample.ann_root / "train.json"
    out = tmp_path / "looks"
    result = script("tools/visualize_dataset.py", ann, "--data-root", sample.data_root, "--out", out,
                    "--number", 5)
    assert result.returncode == 0, result.stderr
    repaired = [a for a in json.loads(ann.read_text())["annotations"] if "box" in a.get("repaired", [])]
    assert repaired and "40 faces in 40 pictures, 46 landmarks" in result.stdout
    assert f"{len(repaired)} boxes repaired" in result.stdout
    sheets = {path.name: read_image(path) for path in out.iterdir()}
    assert sorted(sheets) == ["landmarks.png", "raw.jpg", "repaired.jpg", "trainer.jpg"]
    assert sheets["raw.jpg"].shape == (2 * 342, 4 * 320, 3) and sheets["trainer.jpg"].shape == (5 * 342,
                                                                                                4 * 320, 3)
    assert sheets["repaired.jpg"].shape == (342 * -(-min(5, len(repaired)) // 4), 320 * min(4, len(repaired)),
                                            3)
    assert has(sheets["repaired.jpg"], (60, 200, 60))


def test_original_boxes_red_and_new_ones_green(sample, tmp_path):
    content = json.loads((sample.ann_root / "val.json").read_text())
    for annotation in content["annotations"]:
        annotation.pop("repaired", None)
    for annotation, box in zip(content["annotations"][:4],
                               (["5", "5", "60", "70"], [""] * 4, None, [0, 0, 1e9, 9]), strict=True):
        annotation |= {"repaired": ["box", "landmarks"], "original_bbox": box}
    content["annotations"][5]["repaired"] = ["landmarks"]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    path = tmp_path / "ann.json"
    faces, boxes = data.load_coco(path, sample.data_root), tool.original_boxes(path)
    ids = [a["id"] for a in content["annotations"][:4]]
    assert list(boxes) == ids and [b is None for b in boxes.values()] == [False, True, True, False]
    red = [has(tile[:320], (230, 40, 40), 3) for tile in tool.raw_tiles(faces, range(4), boxes)]
    green = [has(tile[:320], (60, 200, 60), 3) for tile in tool.raw_tiles(faces, range(4), boxes)]
    assert red == [True, False, False, True] and green == [True] * 4


@pytest.mark.parametrize("k", [1, 2, 46, 301])
def test_the_map_takes_any_number_of_landmarks(tmp_path, k):
    """No label lies on another: there are as many separate lines of text as labels in the column."""
    rng = np.random.default_rng(k)
    triples = np.column_stack([rng.uniform(20, 180, (k, 2)), np.full(k, 2)]).ravel().tolist()
    (tmp_path / "ann.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 180, 180],
                         "keypoints": triples}],
        "categories": [{"id": 1, "keypoints": [f"{i:03}" + "M" * 8 for i in range(k)]}]}))
    picture = tool.landmark_map(data.load_coco(tmp_path / "ann.json", tmp_path))
    dark = (picture < 60).all(-1)
    # inside the left column's names, away from the dots on the face
    margin = int(np.flatnonzero(dark.any(0))[0]) + 100
    for side in (dark[:, :margin], dark[:, -margin:]):
        rows = side.any(1)
        assert (rows[1:] & ~rows[:-1]).sum() in (k // 2, -(-k // 2))


def test_all_faces_of_a_picture_and_landmarks_of_no_region(tmp_path, capsys, monkeypatch):
    """Two faces in one picture; of the landmarks one has no region and one is never labelled."""
    cv2.imwrite(str(tmp_path / "a.png"), np.full((200, 200, 3), 255, np.uint8))
    faces = [[x, 60, 2, x + 50, 60, 2, x + 25, 90, 2, 0, 0, 0] for x in (20, 110)]
    (tmp_path / "ann.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, "keypoints": k} for i, k in enumerate(faces)],
        "categories": [{"id": 1, "keypoints": ["l", "r", "nose", "Schnauzenrücken"], "regions": {"eye": [0, 1]}}]}))
    tool.main([str(tmp_path / "ann.json"), "--data-root", str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "never labelled: 3 Schnauzenrücken" in said and "landmarks: 0 l, 1 r, 2 nose" in said
    read = data.load_coco(tmp_path / "ann.json", tmp_path)
    tile = next(tool.raw_tiles(read, [0], {}))[:320]
    boxes = [((tile[:, half].astype(int) - (60, 200, 60)) ** 2).sum(-1) < 500 for half in (slice(0, 160), slice(160, 320))]
    assert 0 < boxes[1].sum() < boxes[0].sum()  # the other face's is thinner
    _, matrix = data.cut_crop(np.zeros((200, 200, 3), np.uint8), (0, 0, 200, 200), 320, 1.02)
    x, y, w, h = read.boxes[0]
    rows, columns = np.nonzero(boxes[0])
    corners = data.apply_matrix(matrix, np.array([[x, y], [x + w, y + h]]))
    assert np.abs(np.array([[columns.min(), rows.min()], [columns.max(), rows.max()]]) - corners).max() < 2.5
    (px, py), *_ = data.apply_matrix(matrix, read.points[0]).round().astype(int)
    assert np.ptp(tile[py, px].astype(int)) > 60  # the left eye is filled
    named = []
    with monkeypatch.context() as patch:
        patch.setattr(tool, "label_slots", lambda marks, slots: [(i, i) for i in range(len(marks))])
        patch.setattr(tool.ImageDraw.ImageDraw, "text", lambda self, place, text, *rest, **more: named.append(text))
        tool.landmark_map(replace(read, visible=read.visible * [0, 1, 1, 0]))
    assert named == ["1  r", "2  nose"]  # the numbers are the scheme's
    targets = list(tool.trainer_tiles(read, 256, 1.25, 0))[3][:320].astype(int)
    assert (np.ptp(targets, axis=-1) > 100).any() and (targets.min(-1) > 200).any()  # eyes blue, the nose white


def test_left_landmarks_are_filled_and_right_ones_are_rings():
    scheme = data.Scheme(["l", "r"], [[0, 1]], {}, [], [])
    drawn = draw.draw_landmarks(np.zeros((400, 400, 3), np.uint8), np.array([[50.0, 200], [350, 200]]), scheme)
    assert drawn[200, 50].any() and not drawn[200, 350].any() and drawn[200, 353].any()


def test_a_sheet_shows_what_the_trainer_sees(sample, monkeypatch):
    """Targets where they are; predictions in the crop's pixels, beside the truth."""
    faces, drawn = data.load_coco(sample.ann_root / "val.json", sample.data_root), []
    monkeypatch.setattr(draw, "draw_landmarks", lambda crop, points, *_, truth=None, **more: (drawn.append((points, truth)), crop)[1])
    dataset = data.DogFLWDataset(faces, 64, augment=data.Augmentation(flip=0))
    expected = dataset.batch(range(len(faces)))["keypoints"].numpy()
    draw.face_sheet(dataset)
    draw.face_sheet(dataset, faces.points)
    for i, points in enumerate(expected):
        np.testing.assert_allclose(drawn[i][0], points, atol=1e-3)
        np.testing.assert_allclose(drawn[len(faces) + i], (points, points), atol=1e-3)
        assert drawn[i][1] is None


def test_refuses_in_one_line(sample, tmp_path):
    ann, root = str(sample.ann_root / "val.json"), ["--data-root", str(sample.data_root)]
    out = ["--out", str(tmp_path / "out")]
    moved = tmp_path / "moved"
    shutil.copytree(sample.data_root, moved)
    for picture in moved.glob("test/images/*"):
        picture.write_bytes(b"no picture")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/raw.jpg").write_bytes(b"mine")
    for args, message in (
            ([], "--help"), ([ann, *root], "--out"),
        ([str(tmp_path / "no.json"), *root, *out], "no such file"),
            ([ann, "--data-root", str(tmp_path / "no"), *out], "no such folder"),
            ([ann, *root, *out, "--number", "0"], "--number 0: must be from 1 to 100"),
        ([ann, *root, *out, "--padding", "9"], "--padding 9.0: must be from 0.5 to 4"),
            ([ann, "--data-root", str(moved), *out], "cannot be read as a picture"),
            ([ann, *root, "--out", str(tmp_path / "full")], "raw.jpg: exists.*--force"),
            ([ann, *root, "--out", ann], "is a file; name a folder"),
            ([str(moved / "test/labels" / next((moved / "test/labels").iterdir()).name), *root, *out],
             "not a COCO file")):
        with pytest.raises(UserError, match=message) as e:
            tool.main(args)
        assert "\n" not in str(e.value)
    assert (tmp_path / "full/raw.jpg").read_bytes() == b"mine" and not (tmp_path / "out").exists()
