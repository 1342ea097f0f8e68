"""The evaluation: numbers against an independent implementation, results of other programs, the report."""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dataset as data
import train_simple as trainer
from dataset import Scheme
from tools import evaluate as tool
from tools.lib.checkpoints import lightened, load_checkpoint, save_checkpoint
from tools.lib.cli import UserError
from tools.lib.files import ROOT, as_json
from tools.lib.kinds import ear_kinds, ears_of, face_frame, poses
from tools.lib.pictures import read_image
from tools.lib.report import STYLE, as_html, as_table, draw_bars, html_table


def coco(rng, faces_of_pictures, k=7, interocular=(2, 4)):
    """A COCO file with random faces; some landmarks are not labelled, once an interocular one."""
    images, annotations = [], []
    for number, count in enumerate(faces_of_pictures):
        images.append({"id": 100 + number, "file_name": f"b{number % 3}_{number}.png", "width": 300,
                       "height": 200})
        for _ in range(count):
            v = np.where(rng.random(k) < 0.2, 0, 2)
            v[[0, 2, 4]] = 2, 2, 0 if len(annotations) == 1 else 2
            triples = np.column_stack([rng.uniform(20, 180, (k, 2)), v]) * (v > 0)[:, None]
            seen = triples[v > 0, :2]
            box = [*seen.min(0) - rng.uniform(0, 9, 2), *np.ptp(seen, axis=0) + rng.uniform(10, 30, 2)]
            annotations.append({"id": 7 + 3 * len(annotations), "image_id": 100 + number, "category_id": 1,
                                "bbox": box, "keypoints": triples.ravel().tolist()})
    category = {"id": 1, "name": "x", "keypoints": [f"p{i}" for i in range(k)],
                "regions": {"low": [0, 1, 2], "high": [5, 6]},
                "interocular": list(interocular)}
    return {"images": images, "annotations": annotations, "categories": [category]}


def results_of(content, points):
    return [{"image_id": a["image_id"], "category_id": 1, "annotation_id": a["id"], "score": 0.5,
             "keypoints": np.column_stack([p, np.ones(len(p))]).ravel().tolist()}
            for a, p in zip(content["annotations"], points, strict=True)]


def reference(content, points, padding, landmarks, select=lambda annotation: True):
    """Every score by plain loops over the JSON, in double precision."""
    faces = {"nme": [], "nme_iod": [], "nme_box": []}
    near = {0.05: [], 0.10: []}
    a, b = content["categories"][0]["interocular"]
    for annotation, predicted in zip(content["annotations"], points, strict=True):
        if not select(annotation):
            continue
        values, (_, _, w, h) = annotation["keypoints"], annotation["bbox"]
        lengths = {"nme": max(w, h) * padding, "nme_box": math.sqrt(w * w + h * h)}
        if values[3 * a + 2] > 0 and values[3 * b + 2] > 0:
            lengths["nme_iod"] = math.hypot(values[3 * a] - values[3 * b],
                                            values[3 * a + 1] - values[3 * b + 1])
        errors = []
        for i in landmarks:
            if values[3 * i + 2] > 0:
                errors.append(math.hypot(predicted[i][0] - values[3 * i],
                                         predicted[i][1] - values[3 * i + 1]))
        for name, length in lengths.items():
            if errors:
                faces[name].append(sum(errors) / len(errors) / length)
        for threshold, hits in near.items():
            if "nme_iod" in lengths:
                hits += [e <= threshold * lengths["nme_iod"] for e in errors]
    scores = {name: sum(e) / len(e) if e else None for name, e in faces.items()}
    area, curve = 0.0, sorted(faces["nme_iod"])
    for n, error in enumerate(curve):  # from this error to the next one, n + 1 faces lie below
        following = curve[n + 1] if n + 1 < len(curve) else 0.1
        area += (n + 1) * (min(following, 0.1) - min(error, 0.1))
    extra = {f"pck_{t:.2f}": sum(hits) / len(hits) for t, hits in near.items() if hits}
    extra |= {"failure_rate": sum(e > 0.1 for e in curve) / len(curve),
              "auc": area / len(curve) / 0.1} if curve else {}
    return scores, extra


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_an_independent_implementation(tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = coco(rng, [1, 2, 1, 1, 3, 1])
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    points = faces.points + rng.normal(0, rng.choice([1, 5, 12], (len(faces), 1, 1)), faces.points.shape)
    (tmp_path / "theirs.json").write_text(json.dumps(results_of(content, points)))
    found, _ = tool.read_results(tmp_path / "theirs.json", faces)
    read = np.stack([found[i][:, :2] for i in range(len(faces))])
    assert np.array_equal(read, points) and all((triples[:, 2] == 1).all() for triples in found.values())
    report, _ = tool.score(read, faces, 1.4)
    scores, extra = reference(content, points, 1.4, range(7))
    assert report["metrics"] == pytest.approx({**scores, **extra}, rel=1e-12) and report["main"] == "nme_iod"
    assert report["faces"] == 9 and report["faces_by_main"] == 8
    errors = np.array([row["nme_iod"] for row in report["face"]])
    assert report["standard_error"] == pytest.approx(np.nanstd(errors, ddof=1) / math.sqrt(8))
    table = {row["name"]: row for row in csv.DictReader(as_table(report).decode().splitlines())}
    assert table["all"]["faces"] == "9" and table["all"]["faces_by_main"] == "8" and table["all"]["standard_error"]
    assert sum(int(table[f"b{b}"]["faces_by_main"]) for b in range(3)) == 8  # one lacks an interocular landmark

    def same(row, scores):
        for name, value in scores.items():
            assert math.isnan(row[name]) if value is None else row[name] == pytest.approx(value, rel=1e-12)
    for name, index in (("low", [0, 1, 2]), ("high", [5, 6])):
        same(report["region"][name], reference(content, points, 1.4, index)[0])
    for i in range(7):
        same(report["landmark"][f"{i} p{i}"], reference(content, points, 1.4, [i])[0])
    for b in range(3):
        ours = reference(content, points, 1.4, range(7), lambda annotation,
                         b=b: annotation["image_id"] % 100 % 3 == b)
        same(report["breed"][f"b{b}"], ours[0])


def test_curve_by_hand():
    assert tool.area_under_curve([0.0]) == 1 and tool.area_under_curve([0.2, math.nan]) == 0
    assert tool.area_under_curve([0.05, 0.15]) == pytest.approx(0.25)  # from 0.05 on, half of the faces
    assert tool.area_under_curve([0.02, 0.06, 0.1, 0.3]) == pytest.approx((0.04 * 0.25 + 0.04 * 0.5) / 0.1)
    assert tool.failure_rate([0.05, 0.1, 0.100001, 3.0, math.nan]) == 0.5
    assert math.isnan(tool.failure_rate([math.nan])) and math.isnan(tool.area_under_curve([math.nan]))


def test_pck_by_hand(tmp_path):
    content = coco(np.random.default_rng(0), [1], k=5)
    content["annotations"][0]["keypoints"] = [10, 10, 2, 20, 10, 2, 50, 50, 2, 0, 0, 0, 150, 50,
                                              2]  # interocular: 100
    (tmp_path / "ann.json").write_text(json.dumps({**content,
                                                   "categories": [{**content["categories"][0],
                                                                   "regions": {}}]}))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    points = faces.points + np.array([[5, 0], [0, 5.01], [0, 10], [900, 900], [8, 6.01]])
    assert tool.pck(points, faces, np.array([100.0]), 0.05) == 1 / 4
    assert tool.pck(points, faces, np.array([100.0]), 0.10) == 3 / 4
    assert math.isnan(tool.pck(points, faces, np.array([math.nan]), 0.10))


@pytest.mark.parametrize("degrees", [0, 30, -140])
def test_errors_along_and_across_an_outline_by_hand(tmp_path, degrees):
    a = math.radians(degrees)
    turn = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    line = np.array([[-40, 0], [0, 0], [60, 0], [90, 30],
                     [90, 60]]) @ turn.T + 200  # 0 - 1 - 2 - 3, and 4 apart
    content = coco(np.random.default_rng(0), [1, 1, 1], k=5)
    for annotation, v in zip(content["annotations"], ([2] * 5, [2] * 5, [2, 2, 0, 2, 2]), strict=True):
        annotation["keypoints"] = np.column_stack([line, v]).ravel().tolist()
    content["categories"][0] |= {"skeleton": [[1, 2], [2, 3], [4, 3]],
                                 "regions": {"line": [0, 1, 2], "rest": [3, 4]}}
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    points = faces.points.copy()
    points[0, 1] += turn @ [3, -1]
    points[1, 1] += turn @ [-5, 2]
    points[2, 1] += 70  # its neighbour is not labelled
    points[:, 2] += turn @ [9, 3]  # towards its other neighbour
    along = tool.along_and_across(points, faces, np.array([100.0, 50, 100]))
    np.testing.assert_allclose(along[1], [(0.03 + 0.1) / 2, (0.01 + 0.04) / 2])
    assert np.isnan(along[[0, 3, 4]]).all()
    twice = data.replace(faces.scheme, skeleton=[*faces.scheme.skeleton, *(line[::-1] for line in faces.scheme.skeleton)])
    again = tool.along_and_across(points, data.replace(faces, scheme=twice), np.array([100.0, 50, 100]))
    np.testing.assert_allclose(again, along)
    report, _ = tool.score(points, faces, 1.25)
    one, two = report["landmark"]["1 p1"], report["landmark"]["2 p2"]
    assert two["along"] == pytest.approx(two["nme_iod"]) and two["across"] == pytest.approx(0, abs=1e-12)
    assert report["region"]["line"]["along"] == pytest.approx((one["along"] + two["along"]) / 2)
    assert math.isnan(report["region"]["rest"]["along"])


def drawn_face(ears, nose=(0, 60)):
    """A face with eyes at (-50, 0) and (50, 0): faces of one picture, ears [(base, edge, tip) each], y up."""
    parts = "ear_base", "ear_edge", "ear_tip", "eye"
    names = [f"{side}_{part}" for part in parts for side in ("left", "right")]
    names.append("nose")
    points = [p for pair in zip(*ears) for p in pair] + [(-50, 0), (50, 0), (nose[0], -nose[1])]
    pairs = [[i, i + 1] for i in range(0, 8, 2)]
    scheme = Scheme(names, pairs, {"ear": list(range(6)), "eye": [6, 7], "nose": [8]}, [6, 7], [])
    points = np.array(points, float)[None] * (1, -1) + 300
    return data.Faces(scheme, None, ["a.png"], np.array([[600, 600]]), np.array([[200, 200, 200, 200.0]]),
                      points,
                      np.full((1, 9), 2), np.array([1]), np.array([1]), ["a"])


def test_a_new_metric_reaches_every_report(tmp_path, monkeypatch):
    """One line of METRICS is all it takes, in the groups of the report too."""
    def largest(points, faces, padding, some=True):
        return np.where((faces.visible > 0) & some, np.linalg.norm(points - faces.points, axis=2), 0).max(1)
    monkeypatch.setitem(tool.METRICS, "largest", largest)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco(np.random.default_rng(0), [1] * 5)))
    faces = data.load_coco(path, tmp_path)
    points = faces.points.copy()
    points[:, 1] += [3, 4]
    report, _ = tool.score(points, faces, 1.25)
    assert report["metrics"]["largest"] == pytest.approx(5)
    low, high = (report["region"][name]["largest"] for name in ("low", "high"))
    assert high == 0 and low > 0 and b"largest" in as_table(report)
    assert tool.METRICS.keys() <= tool.definitions("nme_iod", 0.05).keys()
    monkeypatch.setitem(tool.METRICS, "auc", largest)
    with pytest.raises(UserError, match="auc is a number of this report"):
        tool.score(points, faces, 1.25)
    monkeypatch.setattr(tool, "METRICS", {"nme": tool.METRICS["nme"], "largest": largest})
    assert tool.score(points, faces, 1.25)[0]["main"] == "nme"


def test_bars_are_the_landmarks_errors_in_percent():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    draw_bars(axes, np.array([1.0, 2, math.nan]), Scheme(["a", "b", "c"], [], {}, [], []), "nme")
    assert [bar.get_width() for bar in axes.patches] == [1, 2, 0] and axes.yaxis_inverted()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a  0", "b  1", "c (no label)  2"]
    assert [bar.get_y() + bar.get_height() / 2 for bar in axes.patches] == pytest.approx([0, 1, 2]) == [*axes.get_yticks()]


def test_what_json_does_not_know_is_null():
    assert json.loads(as_json({"nme": 0.5, "nme_iod": math.nan})) == {"nme": 0.5, "nme_iod": None}


LEFT, RIGHT = (-60, 60), (60, 60)  # where the ears begin
UP, DOWN = [(-15, 45), (0, 90)], [(5, -30), (-10, -95)]
BENT, OUT = [(0, 50), (-20, 10)], [(-40, 10), (-80, 10)]
# Close to the limits that tools/README.md tells, on either side of each.
TIPPED, HELD, FALLEN = [(0, 100), (-20, 45)], [(-10, 95), (-10, 80)], [(0, 100), (-20, 55)]
LOW, SIDEWAYS, RISEN, FLAT = [(-50, -10), (-95, -30)], [(-50, -5), (-98, -20)], [(10, 30), (-10, -90)], [(10, 20), (-10, -90)]


@pytest.mark.parametrize("left,right,kinds", [
    (UP, UP, ("erect", "erect")), (DOWN, DOWN, ("hanging", "hanging")), (BENT, OUT, ("folded", "folded")),
    (UP, DOWN, ("erect", "hanging")), (BENT, UP, ("folded", "erect")), (TIPPED, HELD, ("folded", "erect")), (FALLEN, LOW, ("folded", "hanging")),
    (SIDEWAYS, SIDEWAYS, ("folded", "folded")), (RISEN, FLAT, ("folded", "hanging"))])
@pytest.mark.parametrize("degrees,scale", [(0, 1), (50, 0.1), (-170, 3)])
def test_kinds_of_ears_by_hand(left, right, kinds, degrees, scale):
    ears = [[np.add(LEFT, d) for d in [(0, 0), *left]],
            [np.add(RIGHT, np.multiply(d, (-1, 1))) for d in [(0, 0), *right]]]
    faces = drawn_face(ears)
    a = math.radians(degrees)
    turn = scale * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    faces.points[:] = (faces.points - 300) @ turn.T + 40
    masks = ear_kinds(faces)
    assert set(masks) == set(kinds)
    for side, kind in enumerate(kinds):
        assert masks[kind][0, side:6:2].all() and not masks[kind][0, 6:].any()
    assert sum(mask.sum() for mask in masks.values()) == 6


def test_an_ear_that_cannot_be_judged_is_of_no_kind():
    ears = [[np.add(LEFT, d) for d in [(0, 0), *UP]], [np.add(RIGHT, d) for d in [(0, 0), *UP]]]
    faces = drawn_face(ears)
    faces.visible[0, 4] = 0  # the left tip
    faces.points[0, 4] = 0
    assert {kind: mask[0].nonzero()[0].tolist() for kind,
            mask in ear_kinds(faces).items()} == {"erect": [1, 3, 5]}
    faces.visible[0, 8] = 0  # the nose, which tells what is up
    assert not ear_kinds(faces) and not poses(faces)
    faces.visible[0, [6, 8]] = 0, 2  # an eye: no frame
    assert not ear_kinds(faces) and not poses(faces)


@pytest.mark.parametrize("offset,pose", [(0, "frontal"), (24, "frontal"), (-26, "turned"), (60, "turned")])
def test_poses_by_hand(offset, pose):
    faces = drawn_face([[LEFT] * 3, [RIGHT] * 3], nose=(offset, 70))
    assert {name: rows.tolist() for name, rows in poses(faces).items()} == {pose: [True]}
    up, nose = face_frame(faces)
    np.testing.assert_allclose(np.abs(nose), abs(offset) / 100, atol=1e-9)
    np.testing.assert_allclose(up, [[0, -1]], atol=1e-9)


def test_schemes_without_ears_or_eyes_have_no_such_groups(tmp_path):
    (tmp_path / "ann.json").write_text(json.dumps(coco(np.random.default_rng(2), [1, 2])))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    report, _ = tool.score(faces.points + 1, faces, 1.25)
    assert report["ear"] == report["pose"] == report["reliability"] == {} and not ears_of(faces.scheme)


def test_reliability_by_hand(tmp_path):
    content = coco(np.random.default_rng(0), [1], k=5, interocular=())
    content["categories"][0]["regions"] = {}
    content["annotations"][0] |= {"bbox": [0, 0, 100, 80], "keypoints": [
        50, 50, 2, 50, 50, 2, 50, 50, 1, 0, 0, 0, 50, 50, 2]}
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    points = faces.points + np.array([[6, -6], [6.3, 0], [0, 6], [0, 0], [0, 7]])  # the crop's side is 125
    scores = np.array([[0.31, 0.39, 0.9, 0.5, 1.0]])
    result = tool.reliability(points, scores, faces, 1.25, 0.05)
    low, high = result["bins"]
    assert (low["from"], low["to"], low["landmarks"], low["within"]) == (0.3, 0.4, 2, 0.5)
    assert (high["from"], high["to"], high["landmarks"], high["within"]) == (0.9, 1.0, 2, 0.5)
    assert low["score"] == pytest.approx(0.35) and high["score"] == pytest.approx(0.95)
    assert result["calibration_error"] == pytest.approx((0.15 + 0.45) / 2) and result["landmarks"] == 4


def test_without_interocular_the_box_is_the_measure(tmp_path):
    content = coco(np.random.default_rng(1), [1, 1], interocular=())
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    report, errors = tool.score(faces.points + 3, faces, 1.25)
    assert report["main"] == "nme_box" and "nme_iod" not in report["metrics"] and np.isfinite(errors).all()


def test_a_face_whose_eyes_are_in_one_place_counts_where_it_can(tmp_path):
    content = coco(np.random.default_rng(4), [1, 1, 1])
    content["annotations"][2]["keypoints"][6:8] = content["annotations"][2]["keypoints"][12:14]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    report, errors = tool.score(faces.points + 1, faces, 1.25)
    alone, _ = tool.score(faces.points[:1] + 1, faces.take([0]), 1.25)  # the second lacks an eye
    assert np.isnan(errors).tolist() == [False, True, True] and np.isfinite(report["metrics"]["nme"])
    for name in ("nme_iod", "pck_0.05", "pck_0.10"):
        assert report["metrics"][name] == alone["metrics"][name]


def test_which_result_counts(tmp_path):
    content = coco(np.random.default_rng(2), [1, 2])
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    rows, path = results_of(content, faces.points), tmp_path / "theirs.json"

    def read(results):
        path.write_text(json.dumps(results))
        found, _ = tool.read_results(path, faces)
        return np.stack([found[i][:, :2] for i in range(len(faces))])
    plain = {k: v for k, v in rows[0].items() if k != "annotation_id"}  # alone in its picture: needs no id
    worse, better = ({**plain, "score": s, "keypoints": [c] * 21} for s, c in ((0.4, 1.0), (0.6, 2.0)))
    other = {**plain, "image_id": 12345}
    assert np.array_equal(read([worse, plain, *rows[1:], other]), faces.points)
    assert np.array_equal(read([{**plain, "file_name": "/elsewhere/b0_0.png"}, *rows[1:]]), faces.points)
    assert (read([better, plain, *rows[1:]])[0] == 2).all()
    for name in (lambda i: str(i["id"]), lambda i: i["file_name"], lambda i: i["file_name"][:-4], lambda i: float(i["id"])):
        known = {image["id"]: name(image) for image in content["images"]}  # as AlphaPose, Ultralytics and others write it
        written = [{**row, "image_id": known[row["image_id"]], "annotation_id": str(row["annotation_id"]), "score": None,
                    "file_name": "C:\\x\\" + next(i["file_name"] for i in content["images"] if i["id"] == row["image_id"])} for row in rows]
        assert np.array_equal(read({"annotations": written}), faces.points)
    crowd = {k: v for k, v in rows[1].items() if k != "annotation_id"}
    for results, message in (
            ([plain, rows[2]], "no result for 1 of 3 faces, the first is annotation 10 of b1_1.png"),
            ([plain, {**crowd, "image_id": "b1_1"}], "no result for 2 of 3"),  # the first says that ids are meant
            ([plain, crowd, crowd], "result 1: its picture has 2 faces; name one by annotation_id"),
            ([{**plain, "keypoints": [1, 2, 3]}], "result 0 needs image_id, keypoints \\(7 x 3"),
            ([{**plain, "keypoints": [math.nan] * 21}], "not finite"), ([{**plain, "keypoints": [1e7] * 21}], "beyond 1e.06"),
            ([{**plain, "image_id": "99"}, other], "none of its 2 results is of a picture of the COCO file, as image_id '99'"),
            ([{**plain, "image_id": []}], "needs image_id"),
            ([{**plain, "file_name": "a/c0_0.png"}], "is of a/c0_0.png, but its id is that of b0_0.png"),
            ([7], "needs image_id"), ({"annotations": []}, "no result for 3 of 3 faces"), ({"annotations": 3}, "not COCO keypoint results")):
        with pytest.raises(UserError, match=message):
            read(results)


def test_results_of_a_face_finder_are_matched_by_place(tmp_path):
    content = coco(np.random.default_rng(4), [1, 2, 1])
    for image in content["images"]:
        image["width"] = 900
    for annotation in content["annotations"][2:3]:  # the second of its picture stands elsewhere
        annotation["keypoints"] = (np.reshape(annotation["keypoints"], (-1, 3)) + (500, 0,
                                                                                   0)).ravel().tolist()
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces, path = data.load_coco(tmp_path / "ann.json", tmp_path), tmp_path / "theirs.json"
    shifts = [(0, 0), (0, 9), (2, 1), (1, 2), (2, 3),
              (3, 900)]  # (face, pixels): 0 has a worse second, 3 is missed
    path.write_text(json.dumps([{"image_id": faces.image_ids[i], "score": 0.1 * n,
                                 "keypoints": np.column_stack(
        [faces.points[i] + d, np.ones(7)]).ravel().tolist()} for n, (i, d) in enumerate(shifts)]))
    found, others = tool.read_results(path, faces, match=True)
    away = {i: np.unique(p[:, :2] - faces.points[i]).round(6).tolist() for i, p in found.items()}
    assert away == {0: [0], 1: [2], 2: [1]} and others == 3  # the worse seconds, and what is no face
    faces.visible[3, 1:] = 0  # one landmark has a box of no size
    path.write_text(json.dumps([{"image_id": faces.image_ids[3], "score": 1, "keypoints": np.column_stack(
        [faces.points[3], np.ones(7)]).ravel().tolist()}]))
    assert list(tool.read_results(path, faces, match=True)[0]) == [3]


@pytest.mark.parametrize("faces_of_pictures", [[1, 1, 1, 1], [1, 2, 1, 3]])
def test_a_second_annotators_data_set_is_scored_where_both_have_labels(tmp_path, faces_of_pictures, capsys):
    """Its own ids, its landmarks in another order, some of them missing, a face left out; its v are no scores."""
    ours, rng = coco(np.random.default_rng(6), faces_of_pictures), np.random.default_rng(7)
    theirs, order, common, several = json.loads(json.dumps(ours)), rng.permutation(7), [], max(faces_of_pictures) > 1
    theirs["categories"][0]["keypoints"] = [f"p{i}" for i in order]
    for category in ours["categories"] + theirs["categories"]:
        category["regions"] = {}
    theirs["categories"][0]["interocular"] = []
    theirs["images"] = theirs["images"][1:] + theirs["images"][:1]
    for number, image in enumerate(theirs["images"]):
        Image.new("RGB", (300, 200)).save(tmp_path / image["file_name"])
        for a in theirs["annotations"]:
            if ours["images"][(number + 1) % 4]["id"] == ours["annotations"][theirs["annotations"].index(a)]["image_id"]:
                a["image_id"] = number
        image["id"] = number
    for n, (a, b) in enumerate(zip(ours["annotations"], theirs["annotations"])):
        mine, triples = np.reshape(a["keypoints"], (-1, 3)), np.reshape(b["keypoints"], (-1, 3))
        triples[:, :2] += np.array([3, 4]) * (triples[:, 2:] > 0)
        triples[[n % 7, (n + 3) % 7]] = 0
        common.append(int(((mine[:, 2] > 0) & (triples[:, 2] > 0)).sum()))
        b["keypoints"] = triples[order].ravel().tolist()
        x, y, w, h = b["bbox"]
        b["bbox"] = [x - 5, y - 5, w + 20, h + 20]
    if several:
        del theirs["annotations"][1], common[1]
    for name, content in (("a", ours), ("b", theirs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    command = ["--results", str(tmp_path / "b.json"), "--ann", str(tmp_path / "a.json"), "--data-root", str(tmp_path)]
    if several:
        with pytest.raises(UserError, match="several faces; add --match"):
            tool.main(command)
    tool.main([*command, *["--match"] * several])
    report = json.loads((tmp_path / "evaluation/report.json").read_text())
    faces = data.load_coco(tmp_path / "a.json", tmp_path)
    kept = [i for i in range(len(faces)) if not several or i != 1]
    assert [row["labelled"] for row in report["face"]] == common and report["reliability"] == {}
    assert report["metrics"]["nme_box"] == pytest.approx(np.mean(5 / np.linalg.norm(faces.boxes[kept, 2:], axis=1)), rel=1e-3)
    assert "where both have one" in capsys.readouterr().out
    assert report["versions"] == {}  # no model ran
    for a in theirs["annotations"]:
        x, y, w, h = a["bbox"]
        a["keypoints"] = [0] * 18 + [x + w / 2, y + h / 2, 2]
    for a in ours["annotations"]:  # what is common was labelled by one of the two alone
        a["keypoints"][3 * order[6]:3 * order[6] + 3] = [0] * 3
    for name, content in (("a", ours), ("b", theirs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="labels none of the landmarks|none of its .* results is of a face"):
        tool.main([*command, "--force", *["--match"] * several])
    for wrong in (3, [7], [{**theirs["annotations"][0], "image_id": 99}]):
        (tmp_path / "b.json").write_text(json.dumps({**theirs, "annotations": wrong}))
        with pytest.raises(UserError, match="b.json") as e:
            tool.main([*command, "--force", *["--match"] * several])
        assert "\n" not in str(e.value)
    theirs["categories"][0]["keypoints"][0] = "other"
    (tmp_path / "b.json").write_text(json.dumps(theirs))
    with pytest.raises(UserError, match="data set with other landmarks"):
        tool.main([*command, "--force"])


def test_lengths_kinds_and_poses_are_the_truths_whatever_a_second_annotator_left_out(tmp_path, monkeypatch):
    """An eye that only the other one did not label still gives the distance that divides the errors."""
    names = ["left_eye", "right_eye", "nose", "left_ear_base", "right_ear_base", "left_ear_tip", "right_ear_tip"]
    category = {"id": 1, "name": "dog", "keypoints": names, "flip_pairs": [[0, 1], [3, 4], [5, 6]], "interocular": [0, 1],
                "regions": {"eye": [0, 1], "nose": [2], "ear": [3, 4, 5, 6]}, "skeleton": [[1, 3], [3, 2]]}
    truth = np.array([[60, 80, 2], [120, 80, 2], [90, 120, 2], [50, 60, 2], [130, 60, 2], [45, 30, 2], [135, 30, 2.]])
    theirs = truth + [3, 0, 0]
    theirs[0] = 0
    for name, keypoints in (("ours", truth), ("theirs", theirs)):
        (tmp_path / f"{name}.json").write_text(json.dumps({
            "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}], "categories": [category],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [40, 20, 100, 120],
                             "keypoints": keypoints.ravel().tolist()}]}))
    def worst(points, faces, padding, some=True):  # a metric of one's own, masked by a product
        errors = np.linalg.norm(points - faces.points, axis=2) / trainer.crop_side(faces, padding)[:, None]
        return (errors * ((faces.visible > 0) & some)).max(1)
    monkeypatch.setitem(tool.METRICS, "worst", worst)
    tool.main(["--results", str(tmp_path / "theirs.json"), "--ann", str(tmp_path / "ours.json"), "--data-root", str(tmp_path)])
    report = json.loads((tmp_path / "evaluation/report.json").read_text())
    assert report["main"] == "nme_iod" and report["metrics"]["nme_iod"] == pytest.approx(3 / 60)
    assert report["metrics"]["worst"] == pytest.approx(3 / (120 * 1.25))
    assert report["metrics"]["pck_0.10"] == 1 and report["face"][0]["labelled"] == 6
    assert report["region"]["eye"]["labelled"] == 1 and report["region"]["nose"]["along"] == pytest.approx(3 / 60)
    assert [*report["ear"]] == ["erect"] and [*report["pose"]] == ["frontal"]


def test_a_full_disk_loses_no_numbers(run, tmp_path, monkeypatch, capsys):
    def full(path, parts):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(tool, "atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        tool.main([str(run.work_dir / "best_model.pth"), "--out", str(tmp_path / "out")])
    assert "12 faces of" in (said := capsys.readouterr().out) and "nme_iod" in said


def test_one_report_a_folder(run, tmp_path, monkeypatch):
    """Two at once, and what an earlier one drew, would be mixed."""
    best, out = str(run.work_dir / "best_model.pth"), tmp_path / "out"
    holds = "import sys, time; from tools.lib.files import file_lock\nwith file_lock(__import__('pathlib').Path(sys.argv[1])): print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", holds, out / ".report.lock"], stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match="--out .*another report is being written there"):
            tool.main([best, "--out", str(out)])
        other.kill()
    (out / "error_curve.png").touch()
    with pytest.raises(UserError, match="error_curve.png: exists; write over it with --force"):
        tool.main([best, "--out", str(out)])
    monkeypatch.setattr(tool, "plots", lambda *_: {})  # without matplotlib
    tool.main([best, "--out", str(out), "--force"])
    assert not (out / "error_curve.png").exists() and (out / "report.html").exists()


def test_names_that_could_be_ids_are_said(tmp_path, capsys):
    content = coco(np.random.default_rng(4), [1, 1, 1])
    for image, stem in zip(content["images"], (101, 102, 100)):
        image["file_name"] = f"{stem}.png"
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces, path = data.load_coco(tmp_path / "ann.json", tmp_path), tmp_path / "theirs.json"
    for suffix, said in (("", True), (".png", False)):
        path.write_text(json.dumps([{"image_id": image["file_name"].removesuffix(".png") + suffix, "score": 1, "keypoints": [9] * 21}
                                    for image in content["images"]]))
        tool.read_results(path, faces)
        assert ("read as ids of the COCO file" in capsys.readouterr().out) == said


def test_numbers_that_are_names_of_pictures(tmp_path):
    """Ultralytics turns 0001.jpg into 1, which may be the id of another picture."""
    content = coco(np.random.default_rng(4), [1, 1, 1])
    for i, image in enumerate(content["images"]):
        content["annotations"][i]["image_id"] = image["id"] = i
        image["file_name"] = f"{i + 1:04d}.png"
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces, path = data.load_coco(tmp_path / "ann.json", tmp_path), tmp_path / "theirs.json"
    path.write_text(json.dumps([{"image_id": i + 1, "score": 1, "keypoints": [10 + i] * 21} for i in range(3)]))
    found, _ = tool.read_results(path, faces)
    assert [found[i][0, 0] for i in range(3)] == [10, 11, 12]


@pytest.mark.parametrize("missed, match", [(1, True), (3, True), (3, False)])
def test_ids_stay_ids_beside_results_of_other_pictures(tmp_path, missed, match):
    """A part of an export, 0002.png with id 1 and so on, and results on all its pictures but one."""
    content = coco(np.random.default_rng(4), [1, 1])
    for number, image, annotation in zip((1, 3), content["images"], content["annotations"]):
        annotation["image_id"] = image["id"] = number
        image["file_name"] = f"{number + 1:04d}.png"
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces, path = data.load_coco(tmp_path / "ann.json", tmp_path), tmp_path / "theirs.json"
    places = {1: content["annotations"][0]["keypoints"], 3: content["annotations"][1]["keypoints"]}
    path.write_text(json.dumps([{"image_id": i, "score": 1, "keypoints": places.get(i, [5] * 21)} for i in range(6) if i != missed]))
    if not match:
        with pytest.raises(UserError, match="no result for 1 of 2 faces"):
            tool.read_results(path, faces)
        return
    found, _ = tool.read_results(path, faces, match)
    there = 0 if missed == 3 else 1
    assert found.keys() == {there} and np.array_equal(found[there][:, :2], faces.points[there])


@pytest.mark.parametrize("named", [False, True])
def test_names_stay_names_beside_results_of_other_pictures(tmp_path, named):
    """As of Ultralytics, whose image_id is the number in a name: on a folder of which the COCO file has a part."""
    content, stems = coco(np.random.default_rng(4), [1] * 6), [2, 31, 40, 57, 63, 88]
    for number, image, annotation in zip(range(1, 7), content["images"], content["annotations"]):
        annotation["image_id"] = image["id"] = number
        image["file_name"] = f"{stems[number - 1]:04d}.png"
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces, path = data.load_coco(tmp_path / "ann.json", tmp_path), tmp_path / "theirs.json"
    places = {stem: a["keypoints"] for stem, a in zip(stems, content["annotations"])}
    path.write_text(json.dumps([
        {"image_id": i, "score": 1, "keypoints": places.get(i, [5] * 21)} | ({"file_name": f"{i:04d}.png"} if named else {})
        for i in (2, 3, 31, 40, 41, 57, 63, 70, 88)]))
    for match in (False, True):
        found, others = tool.read_results(path, faces, match)
        assert others == 0 and all(np.array_equal(found[i][:, :2], faces.points[i]) for i in range(6))


def test_one_landmark_is_matched_in_its_faces_box(tmp_path):
    content = coco(np.random.default_rng(4), [1, 1])
    content["categories"] = [{"id": 1, "name": "dog", "keypoints": ["nose"]}]
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["keypoints"] = [x + w / 2, y + h / 2, 2]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces, path = data.load_coco(tmp_path / "ann.json", tmp_path), tmp_path / "theirs.json"
    aside = np.array([[0.1, 0], [0.8, 0]]) * faces.boxes[:, 2:]  # the first is near, the second is elsewhere
    path.write_text(json.dumps([{"image_id": image, "score": 1, "keypoints": [*(faces.points[i, 0] + aside[i]), 1]}
                                for i, image in enumerate(faces.image_ids)]))
    assert list(tool.read_results(path, faces, match=True)[0]) == [0]
    path.write_text(json.dumps([{"image_id": faces.image_ids[1], "score": 1, "keypoints": [*(faces.points[1, 0] + aside[1]), 1]}]))
    with pytest.raises(UserError, match="none of its 1 results is of a face"):
        tool.read_results(path, faces, match=True)


@pytest.mark.parametrize("labelled", [[2], [0, 1], [0, 1, 2]])
def test_landmarks_without_an_area_are_matched_in_their_faces_box(tmp_path, labelled):
    """A nose, or both eyes, or all three of them, of a file in which other faces have more labels."""
    points, box = np.array([[60, 80], [120, 80], [90, 120], [45, 30], [135, 30.]]), [40, 20, 100, 120]
    seen = np.zeros(5, int)
    seen[labelled] = 2
    faces = [np.column_stack([points, v]) * (v > 0)[:, None] for v in (np.full(5, 2), np.full(5, 2), seen)]
    (tmp_path / "ann.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(3)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": box, "keypoints": face.ravel().tolist()}
                        for i, face in enumerate(faces)],
        "categories": [{"id": 1, "name": "dog", "keypoints": ["left_eye", "right_eye", "nose", "left_ear", "right_ear"]}]}))
    faces, path = data.load_coco(tmp_path / "ann.json", tmp_path), tmp_path / "theirs.json"
    for aside, found in ((4, [0, 1, 2]), (70, [])):
        shifted = np.column_stack([points + aside, np.ones(5)]).ravel().tolist()
        path.write_text(json.dumps([{"image_id": i, "score": 1, "keypoints": shifted} for i in range(3)]))
        if found:
            assert sorted(tool.read_results(path, faces, match=True)[0]) == found
        else:
            with pytest.raises(UserError, match="none of its 3 results is of a face"):
                tool.read_results(path, faces, match=True)


def test_with_a_locator_faces_are_still_matched_by_themselves(tmp_path, monkeypatch):
    """A face that is small in its picture is not flat; the box that a locator sees is the whole picture."""
    shape = np.array([[100, 100], [160, 100], [130, 140], [90, 80], [170, 80.]])
    (tmp_path / "ann.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": 1200, "height": 900} for i in range(2)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [80, 75, 100, 70],
                         "keypoints": np.column_stack([shape, np.full(5, 2)]).ravel().tolist()} for i in range(2)],
        "categories": [{"id": 1, "name": "dog", "keypoints": list("abcde")}]}))
    (tmp_path / "theirs.json").write_text(json.dumps([
        {"image_id": i, "score": 1, "keypoints": np.column_stack([shape + aside, np.ones(5)]).ravel().tolist()}
        for i, aside in enumerate(([3, 0], [250, 0]))]))
    args = tool.parse_args(["--results", str(tmp_path / "theirs.json"), "--ann", str(tmp_path / "ann.json"), "--match",
                            "--data-root", str(tmp_path)])
    config = SimpleNamespace(padding=1, category=None, data_root=tmp_path, ann_root=tmp_path / "none")
    locator = SimpleNamespace(whole=True, config=config, scheme=data.load_coco(args.ann, tmp_path).scheme)
    monkeypatch.setattr(tool, "predict_faces", lambda _, __, seen, ___: (seen.points + 1, None))
    found, *_, finding = tool.by_results(args, locator, *tool.read_faces(args, locator), None)
    assert found.files == ["0.png"] and finding["others"] == 1
    assert found.boxes[0, 2:].max() == 1199  # what its errors are divided by


def test_numbers_are_right_aligned_and_names_left():
    page = html_table("Worst", [{"id": 7, "file": "a.png", "nme": 0.5}, {"id": 8, "file": "b.png", "nme": None}])
    assert '<td>7</td><td class="text">a.png</td><td>0.5000</td>' in page and '<th class="text">file</th>' in page
    assert ".text {text-align: left}" in STYLE and "first-child" not in STYLE


def test_page_escapes_what_comes_from_outside(tmp_path):
    content, evil = coco(np.random.default_rng(3), [1, 1]), "<img src=x onerror=alert(1)>"
    for image in content["images"]:
        image |= {"file_name": f"{image['id']}\"'{evil}.png", "breed": evil}
    content["categories"][0] |= {"regions": {evil: [0]}, "keypoints": [f"{i}{evil}" for i in range(7)]}
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", tmp_path)
    report, _ = tool.score(faces.points + 1, faces, 1.25)
    page = as_html({**report, "ann": evil, "source": evil, "definitions": {"nme": evil}}, {}).decode()
    assert "<img" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;") > 10


@pytest.fixture(scope="module")
def report(run, script, tmp_path_factory):
    """The script on a real checkpoint, everything by default but the folder."""
    out = tmp_path_factory.mktemp("report")
    result = script("tools/evaluate.py", run.work_dir / "best_model.pth", "--out", out, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_checkpoint(run, report, tmp_path, capsys):
    out, text = report
    content = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    checkpoint = torch.load(run.work_dir / "best_model.pth", weights_only=True)
    for name in ("nme", "nme_iod"):  # the trainer's own validation, of the same faces
        assert content["metrics"][name] == pytest.approx(checkpoint["metrics"][name], rel=1e-4)
    assert f"nme {content['metrics']['nme']:.4f}" in text and "chosen on val.json" in text
    assert "errors come out too small" in text and "stretched" in content["definitions"]["beware"]
    for split, word in (("val", "its epoch was chosen on these very faces"), ("train", "was trained on faces of this file")):
        shutil.copy(run.ann_root / f"{split}.json", tmp_path)  # a copy elsewhere is the same file, too
        tool.main([str(run.work_dir / "best_model.pth"), "--ann", str(tmp_path / f"{split}.json"), "--data-root", str(run.data_root),
                   "--out", str(tmp_path / split), "--device", "cpu"])
        assert word in capsys.readouterr().out
    rows = (out / "report.csv").read_text().splitlines()
    assert len(content["face"]) == 12
    assert len(rows) == 2 + sum(len(content[k]) for k in ("region", "ear", "pose", "landmark", "breed",
                                                          "face"))
    assert sum(row["labelled"] for row in content["ear"].values()) == content["region"]["ear"]["labelled"]
    total = sum(row["labelled"] for row in content["face"])
    assert sum(row["labelled"] for row in content["pose"].values()) == total
    certain = content["reliability"]
    assert certain["landmarks"] == total == sum(row["landmarks"] for row in certain["bins"])
    assert f"calibration error {certain['calibration_error']:.4f}" in text
    pictures = {"error_curve.png": None, "landmarks.png": None, "mean_face.png": None,
                "worst.jpg": (5 * 240, 3 * 262)}
    for name, size in pictures.items():
        assert size in (None, read_image(out / name).shape[1::-1])
    page = (out / "report.html").read_text()
    assert all(title in page for title in ("By ear", "By pose", "Scores, expected calibration error"))
    assert page.count("src=") == 4 == len(re.findall(r'src="data:image/(?:png|jpeg);base64,', page))
    assert "http" not in page and "href" not in page
    assert {p.name for p in out.iterdir()} == {*tool.WRITES}


def test_text_of_a_checkpoint_reaches_the_terminal_without_control_codes(run, tmp_path, capsys):
    checkpoint = torch.load(run.work_dir / "best_model.pth", weights_only=True)
    checkpoint["metrics"]["chosen_on"] = "\x1b[2J\x07"
    checkpoint["scheme"]["regions"]["\x1b[31m"] = [0]
    torch.save(checkpoint, tmp_path / "evil.pth")
    content = json.loads((run.ann_root / "val.json").read_text())
    del content["categories"][0]["regions"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    tool.main([str(tmp_path / "evil.pth"), "--device", "cpu", "--ann", str(tmp_path / "val.json")])
    text = capsys.readouterr().out
    assert "?[2J" in text and "?[31m" in text and text.replace("\n", "").isprintable()


def test_interocular_and_regions_are_the_files_where_it_names_them(run, tmp_path, capsys):
    content, out = json.loads((run.ann_root / "val.json").read_text()), ["--out", str(tmp_path / "out"), "--force", "--device", "cpu"]
    seen = {}
    for name, change in {"same": {}, "inner": {"interocular": [16, 17], "regions": {"nose": [25]}}, "none": {"interocular": [], "regions": {}}}.items():
        content["categories"][0].update(change)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        tool.main([str(run.work_dir / "best_model.pth"), "--ann", str(tmp_path / f"{name}.json"), *out])
        seen[name], said = json.loads((tmp_path / "out/report.json").read_text()), capsys.readouterr().out
        assert ("its regions and interocular are used; those of" in said) == (name == "inner") and "(the last four by nme_iod; standard error of nme_iod 0." in said
    assert seen["inner"]["metrics"]["nme_iod"] > 1.2 * seen["same"]["metrics"]["nme_iod"]  # the inner corners are closer together
    assert [*seen["inner"]["region"]] == ["nose"] and seen["none"]["metrics"] == seen["same"]["metrics"] == {
        **seen["inner"]["metrics"], **{n: v for n, v in seen["same"]["metrics"].items() if n not in ("nme", "nme_box")}}


def test_what_is_found_in_pictures_without_a_face_counts(run, tmp_path):
    content = json.loads((run.ann_root / "val.json").read_text())
    lone = content["annotations"][0]
    lone["keypoints"] = [0] * len(lone["keypoints"])  # a face that nobody labelled is one
    content["annotations"] = [a for a in content["annotations"] if a is lone or a["image_id"] not in (content["images"][1]["id"], lone["image_id"])]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    faces = data.load_coco(tmp_path / "ann.json", run.data_root)
    here = [*faces.image_ids.tolist(), content["images"][1]["id"], content["images"][1]["id"], lone["image_id"], "elsewhere"]
    points = [*faces.points, *[faces.points[0]] * 4]
    (tmp_path / "theirs.json").write_text(json.dumps([{"image_id": i, "score": 1, "keypoints": np.column_stack(
        [p, np.ones(46)]).ravel().tolist()} for i, p in zip(here, points)]))
    tool.main(["--results", str(tmp_path / "theirs.json"), "--match", "--ann", str(tmp_path / "ann.json"), "--data-root", str(run.data_root)])
    finding = json.loads((tmp_path / "evaluation/report.json").read_text())["finding"]
    assert finding == {"faces": 10, "found": 10, "share": 1.0, "others": 2}


def test_own_results_score_the_same(run, report, tmp_path, capsys):
    out, _ = report
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    content = json.loads((run.ann_root / "val.json").read_text())
    points = faces.points + 2.5
    (tmp_path / "theirs.json").write_text(json.dumps(results_of(content, points)))
    where = ["--ann", str(run.ann_root / "val.json"), "--data-root", str(run.data_root)]
    tool.main(["--results", str(tmp_path / "theirs.json"), *where, "--padding", "1.5"])
    scored = json.loads((tmp_path / "evaluation/report.json").read_text())
    assert [row["score"]
                for row in scored["reliability"]["bins"]] == [1.0]  # what the file says of each landmark
    assert scored["metrics"]["nme"] == pytest.approx(np.mean(2.5
                                                             * math.sqrt(2) / faces.boxes[:,
                                                                                          2:].max(1) / 1.5))
    assert "results of" in capsys.readouterr().out
    boxed = {face["id"]: face["nme"] for face in json.loads((out / "report.json").read_text())["face"]}  # the checkpoint's own
    boxed = np.array([boxed[i] for i in faces.ids])
    errors = boxed * np.resize([1.1, 1.2, 1.2], 12)
    points = faces.points + (errors * faces.boxes[:, 2:].max(1) * 1.25)[:, None, None] * [1, 0]
    (tmp_path / "theirs.json").write_text(json.dumps(results_of(content, points)[2:]))
    best = str(run.work_dir / "best_model.pth")
    tool.main(["--checkpoint", best, "--results", str(tmp_path / "theirs.json"), "--match", "--force"])
    matched = json.loads((tmp_path / "evaluation/report.json").read_text())
    finding = matched["finding"]
    assert "times their nme in the labelled boxes" in matched["source"] and "found" in matched["definitions"]
    assert (finding["faces"], finding["found"]) == (12, 10)
    assert finding["error_ratio"] == pytest.approx(errors[2:].mean() / boxed[2:].mean(), rel=1e-3)
    assert finding["nme_true_boxes"] == pytest.approx(boxed[2:].mean(), rel=1e-3)
    assert finding["share_within_1.15"] == pytest.approx(3 / 12)  # of all faces, not of those found


def test_a_light_checkpoint_knows_folders_by_name_alone(run, report, tmp_path, monkeypatch):
    """So its data are looked for where they are by default, and not below the current folder."""
    light = lightened(load_checkpoint(run.work_dir / "best_model.pth"))
    save_checkpoint(tmp_path / "light.pth", light)
    for name in (light["args"]["data_root"], light["args"]["ann_root"]):
        (tmp_path / name).mkdir()
    versions = tmp_path / "cache/datasets/georgemartvel/dogflw/versions"
    versions.mkdir(parents=True)
    (versions / "1").symlink_to(run.data_root)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="light.pth: does not say where its data are; name a COCO file with --ann"):
        tool.main(["light.pth"])
    tool.main(["light.pth", "--ann", str(run.ann_root / "val.json"), "--device", "cpu"])
    ours, theirs = (json.loads((folder / "report.json").read_text())["metrics"] for folder in (tmp_path / "evaluation", report[0]))
    assert {k: ours[k] for k in tool.METRICS} == pytest.approx({k: theirs[k] for k in tool.METRICS}, rel=1e-3)


def test_the_worst_faces_come_first(run, report, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(tool, "caption", lambda crop, text, real=tool.caption: (written.append(float(text.split()[0])), real(crop, text))[1])
    tool.main([str(run.work_dir / "best_model.pth"), "--device", "cpu", "--out", str(tmp_path / "out")])
    faces = sorted(json.loads((tmp_path / "out/report.json").read_text())["face"], key=lambda face: -face["nme_iod"])
    assert written == pytest.approx([100 * face["nme_iod"] for face in faces], abs=0.06)
    gone = replace(data.load_coco(run.ann_root / "val.json", run.data_root), root=tmp_path / "gone")  # results need no pictures
    assert tool.worst_faces(gone.points, gone, np.ones(len(gone)), 1.25)[:2] == b"\xff\xd8"
    table = (tmp_path / "out/report.html").read_text().split("Worst faces")[1]
    assert table.index(faces[0]["file"]) < table.index(faces[1]["file"]) < table.index(faces[-1]["file"])


def test_faces_that_it_was_trained_on_are_no_test(run, tmp_path, monkeypatch):
    train = run.ann_root / "train.json"
    assert tool.is_file_of(run.ann_root, train, 0) and not tool.is_file_of(run.ann_root, run.ann_root / "val.json", 0)
    assert not tool.is_file_of(tmp_path / "gone", train, 0) and tool.is_file_of(train, train, 0)  # --ann-root FILE
    assert tool.is_file_of(run.ann_root, run.ann_root / "val.json", 1) and not tool.is_file_of(train, train, 1)

    def closed(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(tool, "find_annotations", closed)  # of another user's folder
    assert not tool.is_file_of(run.ann_root, train, 0)


def test_the_model_in_the_box_is_the_default(run, report, tmp_path, monkeypatch, capsys):
    where = ["--ann", str(run.ann_root / "val.json"), "--data-root", str(run.data_root), "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.lib.find.BUNDLED", tmp_path / "no.pth")
    with pytest.raises(UserError, match="no.pth: no such file.*--checkpoint"):
        tool.main(where)
    monkeypatch.setattr("tools.lib.find.BUNDLED", run.work_dir / "best_model.pth")
    with pytest.raises(UserError, match="--ann: name the COCO file to score on.*--data-root"):
        tool.main([])
    tool.main([*where, "--no-flip"])
    capsys.readouterr()
    ours, theirs = (json.loads((out / "report.json").read_text()) for out in (tmp_path / "evaluation",
                                                                              report[0]))
    assert "not mirrored" in ours["source"] and ours["metrics"] != theirs["metrics"]
    assert "trained on a part of DogFLW's train split" in ours["source"] and "chosen on val" not in ours["source"]
    assert ours["metrics"]["nme"] == pytest.approx(theirs["metrics"]["nme"], rel=0.3)


def test_refuses_in_one_line(run, report, tmp_path):
    best, ann = str(run.work_dir / "best_model.pth"), run.ann_root / "val.json"
    content = json.loads(ann.read_text())
    content["categories"][0]["keypoints"][0] = "another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    (tmp_path / "looks").mkdir()
    (tmp_path / "looks/landmarks.png").touch()  # visualize_dataset.py's
    for args, message in (
            ([best, "--out", str(tmp_path / "looks")], "landmarks.png: exists; write over it with --force"),
            (["--nonsense"], "--help"), ([best, "--out", str(ann)], "is a file"),
            (["--results", str(ann), "--ann", str(ann), "--no-flip"], "--no-flip: is for a checkpoint"), (["--checkpoint", str(tmp_path / "no.pth")], "no such file"),
            ([best, "--checkpoint", best], "give one checkpoint"),
        ([best, "--category", "cat"], "--category cat"),
            ([best, "--out", str(report[0])], "--force"), ([best, "--padding", "2"], "comes from the "
                                                                                     "checkpoint"),
            ([best, "--batch-size", "0"], "--batch-size 0: must be at least 1"),
            (["--results", str(ann), "--ann", str(ann), "--padding", "0"], "--padding 0.0: must be from 0.5 to 4"),
            ([best, "--ann", str(tmp_path / "no.json")], "is no file"),
            ([best, "--data-root", str(tmp_path / "no")], "no such folder"),
        ([best, "--device", "gpu"], "--device gpu: must be auto, cuda, mps or cpu"),
            (["--results", str(ann), "--ann", str(ann), "--checkpoint", best, "--no-flip"], "--no-flip: is for"),
            ([best, "--ann", str(tmp_path / "other.json")], "landmarks"), (["--results", str(ann)], "--ann")):
        with pytest.raises(UserError, match=message) as e:
            tool.main([*args, *([] if "--out" in args else ["--out", str(tmp_path / "out")])])
        assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
