"""tools/lib/coco.py: COCO files as labelling tools and data sets of the field write them, each kind read as it is meant."""
import json
import os
import random
import re
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import load_coco
from tools.convert_dogflw_to_coco import category as dogflw_category
from tools.lib import coco
from tools.lib.cli import UserError
from tools.lib.coco import checked_scheme, find_annotations, named_pairs, read_coco

WIDTH, HEIGHT = 160, 120


def plain(n=6, k=5, names=None, name="pic_{}.jpg", faces=1, first_id=1):
    """A COCO file of n pictures with one face of k landmarks each, or several, in a box that fits."""
    rng, images, annotations = np.random.default_rng(k), [], []
    for i in range(n):
        images.append({"id": first_id + i, "file_name": name.format(i), "width": WIDTH, "height": HEIGHT})
        for j in range(faces):
            middle, radius = rng.uniform([50, 40], [110, 80]), rng.uniform(20, 30)
            angle = 2 * np.pi * np.arange(k) / k
            points = middle + radius * np.stack([np.cos(angle), np.sin(angle)], 1)
            x, y, side = *(middle - 1.2 * radius), 2.4 * radius
            annotations.append({"id": first_id + i * faces + j, "image_id": first_id + i, "category_id": 1, "iscrowd": 0,
                                "bbox": [x, y, side, side], "area": side * side, "num_keypoints": k,
                                "keypoints": [float(v) for p in points for v in (*p, 2)]})
    names = names or [f"p{i}" for i in range(k)]
    return {"images": images, "annotations": annotations, "categories": [
        {"id": 1, "name": "face", "supercategory": "animal", "keypoints": list(names), "skeleton": [[1, 2], [2, 3]]}]}


@pytest.fixture
def read(tmp_path):
    """Write a COCO dict and read it: the faces."""
    def read(data, path="train.json", root=tmp_path, **options):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(data))
        scheme, columns = read_coco(tmp_path / path, root, **options)
        return SimpleNamespace(**scheme, **columns)
    return read


def draw(path, size=(WIDTH, HEIGHT), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)


def refused(read, data, *words, **options):
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as e:
        read(data, **options)
    line = str(e.value)
    assert "\n" not in line and line.isprintable() and all(w in line for w in words), line
    return line


def test_ids_of_any_size_stay_as_they_are(read):
    data = plain(3)
    for i, (image, a) in enumerate(zip(data["images"], data["annotations"])):
        image["id"] = a["image_id"] = a["id"] = [5, 2**63 + 1, "a-b"][i]
    faces = read(data)
    assert faces.ids.tolist() == faces.image_ids.tolist() == [5, 2**63 + 1, "a-b"]


def test_a_single_landmark_has_the_whole_picture_for_a_box(read):
    data = plain(2)
    data["annotations"][0].update(bbox=None, keypoints=[*data["annotations"][0]["keypoints"][:3], *[0] * 12])
    faces = read(data)
    assert faces.boxes[0].tolist() == [0, 0, WIDTH, HEIGHT]
    assert faces.notes == ["boxes set to the whole picture: 1 with a single landmark, which gives no size; add a bbox (annotation 1)"]


def test_a_plain_file_is_read_as_it_is(read):
    data = plain()
    faces = read(data)
    assert faces.notes == [] and faces.names == [f"p{i}" for i in range(5)] and faces.skeleton == [[0, 1], [1, 2]]
    assert faces.files == [i["file_name"] for i in data["images"]] and set(faces.breeds) == {""}
    assert faces.boxes.tolist() == [a["bbox"] for a in data["annotations"]]
    np.testing.assert_array_equal(np.dstack([faces.points, faces.visible]).reshape(6, -1),
                                  [a["keypoints"] for a in data["annotations"]])
    assert faces.points.dtype == faces.boxes.dtype == np.float64 and faces.visible.dtype == np.uint8
    assert faces.sizes.tolist() == [[WIDTH, HEIGHT]] * 6 and faces.ids.tolist() == faces.image_ids.tolist()


# ---------------------------------------------------------------- kinds of files: change, what is said, what is read

def categories(*changes):
    return lambda d: d.update(categories=[{**d["categories"][0], **change} for change in changes])


def annotation(**change):
    return lambda d: d["annotations"][1].update(change)


def each(change):
    return lambda d: [change(a) for a in d["annotations"]]


def images(**change):
    return lambda d: [i.update(change) for i in d["images"]]


def v_of(values):
    """Replace v of the second annotation's landmarks; None leaves it."""
    def change(d):
        points = d["annotations"][1]["keypoints"]
        points[2::3] = [old if new is None else new for old, new in zip(points[2::3], values, strict=True)]
    return change


def boxes_beside(d):
    """Label Studio's, CVAT's: a rectangle of another category beside every skeleton."""
    d["categories"].append({"id": 7, "name": "dog"})
    d["annotations"] += [{**{k: v for k, v in a.items() if k != "keypoints"}, "id": 100 + a["id"], "category_id": 7}
                         for a in d["annotations"]]


def roboflow(d):
    """Category 0 groups the others; ids from 0."""
    d["categories"].insert(0, {"id": 0, "name": "dogs", "supercategory": "none"})
    d["categories"][1]["supercategory"] = "dogs"


def species(d):
    """AP-10K: 54 categories with the same landmarks, most without an annotation, two used."""
    d["categories"] = [{**d["categories"][0], "id": i, "name": f"species {i}"} for i in range(1, 55)]
    for i, a in enumerate(d["annotations"]):
        a["category_id"] = 3 + i % 2


def fractions(d):
    for a in d["annotations"]:
        a["keypoints"] = [v / s for v, s in zip(a["keypoints"], [WIDTH, HEIGHT, 1] * 5, strict=True)]


# Landmarks below a picture of WIDTH x HEIGHT, and in one of HEIGHT x WIDTH.
BELOW = [v for x, y in ((30, 130), (60, 130), (60, 150), (40, 150), (50, 140)) for v in (x, y, 2)]
SIDES = ["left_eye", "right_eye", "nose", "left_ear", "right_ear"]
KINDS = {  # what changes the plain file of 6 faces, (in one note, faces read)
    "names missing (300W, WFLW)": (categories({"keypoints": []}), "point_0 to point_4", 6),
    "no key for names": (lambda d: d["categories"][0].pop("keypoints"), "point_0 to point_4", 6),
    "no skeleton": (lambda d: d["categories"][0].pop("skeleton"), None, 6),
    "skeleton from 0": (categories({"skeleton": [[0, 1], [3, 4], [4, 0]]}), None, 6),
    "skeleton of another scheme": (categories({"skeleton": [[1, 2], [4, 17]]}), "skeleton does not fit", 6),
    "skeleton of names": (categories({"skeleton": [["p0", "p1"]]}), "skeleton does not fit", 6),
    "skeleton no list": (categories({"skeleton": "x"}), "skeleton does not fit", 6),
    "names are numbers": (categories({"keypoints": [1, 2, 3, 4, 5]}), None, 6),
    "a box category beside": (boxes_beside, "left out: 6 without landmarks (annotation 101)", 6),
    "Roboflow's group": (roboflow, None, 6),
    "landmarks as lists of three": (each(lambda a: a.update(keypoints=np.reshape(a["keypoints"], (-1, 3)).tolist())), None, 6),
    "iscrowd as text": (lambda d: [a.update(iscrowd="01"[i == 1]) for i, a in enumerate(d["annotations"])],
                        "1 marked iscrowd (annotation 2)", 5),
    "a face beside its picture": (annotation(keypoints=[500, 500, 2] * 5), "1 with no landmark in their picture (annotation 2)", 5),
    "below a wide picture": (annotation(keypoints=[50, 125, 1, 70, 140, 1, 60, 155, 1, 55, 150, 1, 65, 150, 1], bbox=[45, 120, 30, 40]),
                             "1 with no landmark in their picture (annotation 2)", 5),
    "at the picture's edge": (annotation(keypoints=[0, 60, 2, 50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 0, 2], bbox=[0, 0, 75, 75]), None, 6),
    "above and left of its picture": (annotation(keypoints=[-300, -40, 2] * 5), "1 with no landmark in their picture", 5),
    "AP-10K's species": (species, None, 6),
    "an unused category with other landmarks": (categories({}, {"id": 2, "keypoints": ["a", "b"]}), None, 6),
    "no category_id": (each(lambda a: a.pop("category_id")), None, 6),
    "ids are floats": (each(lambda a: a.update(image_id=float(a["image_id"]), category_id=1.0)), None, 6),
    "ids are texts": (lambda d: [x.update({k: str(x[k]) for k in ("id", "image_id") if k in x})
                                 for x in d["images"] + d["annotations"]], None, 6),
    "no ids": (each(lambda a: a.pop("id")), None, 6),
    "an outside skeleton (CVAT)": (annotation(keypoints=[], bbox=[0, 0, 0, 0], num_keypoints=0),
                                   "1 without landmarks (annotation 2)", 5),
    "boxes of another category with zeros for landmarks": (
        lambda d: [d["categories"].append({"id": 2, "name": "dog"}), d["annotations"][1].update(category_id=2, keypoints=[0] * 51)],
        "1 of another category", 5),
    "keypoints null": (annotation(keypoints=None), "1 without landmarks", 5),
    "no landmark labelled": (annotation(keypoints=[0] * 15, bbox=[0, 0, 0, 0]), "1 with no landmark labelled", 5),
    "a crowd": (annotation(iscrowd=1, segmentation={"counts": [], "size": [1, 1]}), "1 marked iscrowd", 5),
    "null where v is 0": (annotation(keypoints=[None, None, 0] + [50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2],
                                     bbox=[45, 45, 30, 30]), None, 6),
    "NaN where v is 0": (annotation(keypoints=[float("nan")] * 2 + [0] + [50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2],
                                    bbox=[45, 45, 30, 30]), None, 6),
    "NaN where v is 2": (annotation(keypoints=[float("nan"), 3, 2] + [50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2],
                                    bbox=[45, 45, 30, 30]), "1 landmarks without a place", 6),
    "-1, -1, -1 for not labelled (DeepLabCut's SuperAnimal)": (
        annotation(keypoints=[-1.0, -1.0, -1.0, 50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2], bbox=[45, 45, 30, 30]),
        "1 landmarks without a place (NaN, -1, 0, far away)", 6),
    **{f"{x}, {y}, 2 for not labelled": (
        annotation(keypoints=[x, y, 2, 50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2], bbox=[45, 45, 30, 30]),
        "1 landmarks without a place (NaN, -1, 0, far away)", 6) for x, y in ((0, 0), (-1, -1), (-999, -999), (9000, 50))},
    "visible beside the picture": (annotation(keypoints=[200, 60, 2, 50, 50, 2, 70, 60, 2, 60, 70, 2, 165, 125, 2], bbox=[45, 40, 160, 40]),
                                   "1 landmarks marked as visible, but outside of their picture", 6),
    "hidden beside the picture": (annotation(keypoints=[200, 60, 1, 50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2], bbox=[45, 40, 160, 40]), None, 6),
    "image_id as a text": (each(lambda a: a.update(image_id=str(a["image_id"]))), None, 6),
    "box reaching to 0, 0 (Supervisely)": (
        annotation(keypoints=[0, 0, 0, 50, 50, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2], bbox=[0, 0, 70, 70]),
        "1 that reach to 0, 0 for landmarks not labelled (annotation 2)", 6),
    "a tight box in the corner": (
        annotation(keypoints=[0, 0, 0, 0.5, 0.5, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2], bbox=[0, 0, 70, 70]), None, 6),
    "a box of all landmarks from 0, 0": (
        annotation(keypoints=[50, 50, 2, 50, 70, 2, 70, 60, 2, 60, 70, 2, 70, 70, 2], bbox=[0, 0, 70, 70]), None, 6),
    "a box that is the picture": (
        annotation(keypoints=[0, 0, 0, 50, 50, 2, 160, 60, 2, 60, 70, 2, 70, 120, 2], bbox=[0, 0, 160, 120]), None, 6),
    "null everywhere": (annotation(keypoints=[None] * 15), "1 with no landmark labelled", 5),
    "triples in lists": (each(lambda a: a.update(keypoints=np.reshape(a["keypoints"], (-1, 3)).tolist())), None, 6),
    "confidences": (v_of([0.9, 0.2, 1, 0, 0.55]), "1 faces' v as confidences", 6),
    "v of 2 beside confidences (COCO-WholeBody)": (v_of([2, 0.37, None, 0, None]), "1 faces' v as confidences", 6),
    "an image once more for another annotation": (lambda d: d["images"].append(dict(d["images"][0])), None, 6),
    "a category once more": (categories({}, {}), None, 6),
    "ids null": (each(lambda a: a.update(id=None)), None, 6),
    "sizes are floats": (images(width=160.0, height=120.0), None, 6),
    "sizes are texts": (images(width="160", height="120"), None, 6),
    "no box": (lambda d: d["annotations"][1].pop("bbox"), "landmarks: 1 missing, flat or malformed (annotation 2)", 6),
    "box null": (annotation(bbox=None), "1 missing, flat", 6),
    "box empty": (annotation(bbox=[]), "1 missing, flat", 6),
    "box flat": (annotation(bbox=[10, 10, 0, 40]), "1 missing, flat", 6),
    "box of NaN": (annotation(bbox=[float("nan")] * 4), "1 missing, flat", 6),
    "box of words": (annotation(bbox=["a", "b", "c", "d"]), "1 missing, flat", 6),
    "box elsewhere": (annotation(bbox=[0, 0, 9, 9]), "1 away from them (annotation 2)", 6),
    "all boxes as fractions": (each(lambda a: a.update(bbox=[0.3, 0.3, 0.4, 0.4])), "6 away from them", 6),
    "landmarks as fractions": (fractions, "6 faces' landmarks as fractions", 6),
    "landmarks as fractions, one of them outside": (lambda d: [
        fractions(d), d["annotations"][1]["keypoints"].__setitem__(slice(0, 3), [1.04, 0.5, 1]),
        d["annotations"][1].update(bbox=[40, 30, 126, 70])], "6 faces' landmarks as fractions", 6),
    "flip_pairs missing, names with sides": (categories({"keypoints": SIDES}), "no flip_pairs; 2 taken", 6),
    "flip_pairs from 1": (categories({"keypoints": SIDES, "flip_pairs": [[1, 2], [4, 5]]}), "counts from 1", 6),
    "flip_pairs from 1, no sides": (categories({"flip_pairs": [[1, 2], [4, 5]]}), "counts from 1", 6),
    "flip_pairs missing, a side misspelt": (categories({"keypoints": [*SIDES[:4], "rigth_ear"]}), "no landmark is named as the other side of left_ear", 6),
    "flip_pairs against the names": (categories({"keypoints": SIDES, "flip_pairs": [[0, 3], [1, 4]]}),
                                     "does not pair left_eye with right_eye", 6),
    "flip_pairs lacks one": (categories({"keypoints": SIDES, "flip_pairs": [[0, 1]]}),
                             "does not pair left_ear with right_ear", 6),
    "flip_pairs right first": (categories({"keypoints": SIDES, "flip_pairs": [[1, 0], [3, 4]]}), None, 6),
    "flip_pairs as the names have them": (categories({"keypoints": SIDES, "flip_pairs": [[4, 3], [0, 1]]}), None, 6),
    "sides in another field": (categories({"keypoints": SIDES, "interocular": [0, 1], "regions": {"eye": [0, 1]},
                                           "flip_pairs": [[0, 1], [3, 4]]}), None, 6),
    "flip_pairs of names": (categories({"keypoints": SIDES, "flip_pairs": [["left_eye", "right_eye"], ["right_ear", "left_ear"]]}), None, 6),
    "flip_idx (YOLO)": (categories({"flip_idx": [1, 0, 2, 4, 3]}), None, 6),
    "names twice": (categories({"keypoints": ["eye", "eye", "nose", "ear", "ear"]}), "4 landmarks share a name, as eye; they are numbered", 6),
    "a category that is not in the file": (lambda d: d["annotations"][1].update(category_id=9), "category 9 is not in the file", 6),
    "categories counted from 0 by the annotations": (each(lambda a: a.update(category_id=0)),
                                                     "category 0 is not in the file; it is read as the one with 5 landmarks (1 such in all)", 6),
    "an id twice": (annotation(id=1), "1 duplicate annotation ids, with a number appended (annotation 1)", 6),
    "an annotation twice": (lambda d: d["annotations"].append(dict(d["annotations"][1])), "left out: 1 given twice (annotation 2)", 6),
    "a picture without an annotation": (lambda d: d["images"].append({"id": 99, "file_name": "bare.jpg", "width": 9, "height": 9}),
                                        "beside the faces: 1 pictures without an annotation (bare.jpg)", 6),
    "x and y alone": (each(lambda a: a.update(keypoints=[v for i, v in enumerate(a["keypoints"]) if i % 3 < 2])),
                      "6 faces' landmarks as x and y alone (annotation 1)", 6),
    "the program's own fields": (lambda d: d.update(info={"year": 2025}, licenses=[{"id": 1}], tags=None), None, 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_file_is_read_as_it_is_meant(read, kind):
    change, note, number = KINDS[kind]
    data, before = plain(), read(plain())
    change(data)
    faces = read(data)
    assert len(faces.files) == number and len(faces.notes) == (note is not None), faces.notes
    assert len(faces.ids) == len(faces.image_ids) == len(faces.breeds) == len(faces.sizes) == number
    assert [str(i) for i in faces.image_ids] == [str(i + 1) for i in range(6) if number == 6 or i != 1]  # the left out face's alone is gone
    assert note is None or note in faces.notes[0] and "\n" not in faces.notes[0] and faces.notes[0].isprintable(), faces.notes
    assert (faces.visible > 0).any(1).all() and (faces.boxes[:, 2:] > 0).all() and np.isfinite(faces.points).all()
    same = [i for i in range(6) if number == 6 or i != 1]
    others = [i for i, j in enumerate(same) if j != 1 or kind in ("landmarks as fractions", "confidences")]
    assert kind != "confidences" or faces.visible[1].tolist() == [2, 2, 2, 0, 2]
    assert kind != "at the picture's edge" or (faces.visible[1] == 2).all()
    np.testing.assert_allclose(faces.points[others], before.points[same][others] * (faces.visible[others] > 0)[..., None])
    assert (faces.sizes == (WIDTH, HEIGHT)).all()
    for field in ("flip_pairs", "skeleton"):
        assert all(0 <= i < 5 for pair in getattr(faces, field) for i in pair)
    if "misspelt" in kind:
        assert faces.flip_pairs == []
    elif "flip_pairs" in kind:
        assert sorted(faces.flip_pairs) == [[0, 1], [3, 4]]


def test_counts_stand_in_one_line_a_group(read):
    data = plain(12)
    boxes_beside(data)
    data["annotations"][2]["iscrowd"] = 1
    data["annotations"][3]["keypoints"] = [0] * 15
    data["annotations"][4]["bbox"] = None
    data["annotations"][5]["bbox"] = [0, 0, 3, 3]
    faces = read(data)
    assert len(faces.files) == 10 and faces.notes == [
        "left out: 12 without landmarks (annotation 101), 1 marked iscrowd (annotation 3), "
        "1 with no landmark labelled (annotation 4)",
        "boxes rebuilt from the landmarks: 1 missing, flat or malformed (annotation 5), 1 away from them (annotation 6)"]


def test_landmarks_numbered_as_the_converter_does(read):
    for k in (1, 21, 68, 98):
        data = plain(3, k)
        data["categories"] = [{"id": 1, "name": "face"}]
        faces = read(data)
        assert faces.names == dogflw_category(k)["keypoints"] and faces.points.shape == (3, k, 2)


# ---------------------------------------------------------------- categories

def two(same):
    """Dogs and cats in one file: with the same landmarks or not. Images of names that say nothing."""
    data, other = plain(4, name="{}.jpg"), plain(4, 5 if same else 7, name="cat{}.jpg", first_id=50)
    other["categories"][0].update(id=2, name="cat")
    for a in other["annotations"]:
        a["category_id"] = 2
    data["categories"][0]["name"] = "dog"
    return {key: data[key] + other[key] for key in data}


def test_categories_with_the_same_landmarks_all_train_and_are_the_strata(read):
    faces = read(two(same=True))
    assert faces.breeds == ["dog"] * 4 + ["cat"] * 4 and faces.notes == []
    data = two(same=True)
    data["categories"][1]["flip_pairs"] = [[0, 1]]  # what one says holds for all
    data["images"][0]["breed"] = "n1"
    assert read(data).flip_pairs == [[0, 1]] and read(data).breeds == ["n1"] + [""] * 7


def test_a_landmark_that_nobody_labelled_is_named(tmp_path):
    data = plain()
    for a in data["annotations"]:
        a["keypoints"][6:9] = [0, 0, 0]
    (tmp_path / "train.json").write_text(json.dumps(data))
    faces = load_coco(tmp_path / "train.json", tmp_path)
    assert any("labelled in no face: p2 (1 in all);" in note for note in coco.notes_of(faces, None, (Path("train.json"), None)))


def test_an_absolute_name_in_the_data_root_is_that_picture(read, tmp_path):
    for place in ("pic_0.jpg", "thumbs/pic_0.jpg"):
        draw(tmp_path / "own" / place)
    assert read(plain(1, name=str(tmp_path / "own" / "pic_0.jpg")), root=tmp_path / "own").files == ["pic_0.jpg"]


def test_what_trains_without_mirroring_says_so(tmp_path):
    for pairs, said in (([], 1), ([[0, 4], [1, 3]], 0)):
        data = plain(2)
        data["categories"][0]["flip_pairs"] = pairs
        (tmp_path / "train.json").write_text(json.dumps(data))
        faces = load_coco(tmp_path / "train.json", tmp_path)
        assert len(coco.notes_of(faces, faces, (Path("train.json"), Path("val.json")))) == said + 1
        assert coco.notes_of(faces, None, (Path("train.json"), None)) == [
            "train.json: has no flip_pairs, so it trains without mirroring"] * said
    data["categories"][0].update(flip_pairs=[], keypoints=[*SIDES[:4], "rigth_ear"])
    (tmp_path / "train.json").write_text(json.dumps(data))
    notes = coco.notes_of(load_coco(tmp_path / "train.json", tmp_path), None, (Path("train.json"), None))
    assert len(notes) == 2 and "no landmark is named as the other side of left_ear; rename it" in notes[0] and "mirroring" in notes[1]


def test_pairs_in_another_order_are_the_same(tmp_path):
    sets = []
    for pairs in ([[0, 4], [1, 3]], [[3, 1], [0, 4]], [[0, 3], [1, 4]]):
        data = plain(2, name=f"{{}}{len(sets)}.jpg")
        data["categories"][0]["flip_pairs"] = pairs
        (tmp_path / "a.json").write_text(json.dumps(data))
        sets.append(load_coco(tmp_path / "a.json", tmp_path))
    assert coco.notes_of(*sets[:2], (Path("a"), Path("b"))) == []
    with pytest.raises(UserError, match="b: its category differs from that of a in flip_pairs"):
        coco.notes_of(*sets[1:], (Path("a"), Path("b")))


def test_categories_without_names_are_said_to_be_the_same(read):
    data = two(same=True)
    for category in data["categories"]:
        category["keypoints"] = []
    assert "and are the same in all 2 categories" in read(data).notes[0]


def test_a_category_beside_the_chosen_may_be_anything(read):
    """Encord's points beside a skeleton: "keypoints": "keypoint"."""
    data = plain(3)
    data["categories"].append({"id": 2, "name": "tag", "keypoints": "keypoint"})
    data["annotations"].append({"id": 99, "image_id": 1, "category_id": 2, "keypoints": [5, 5, 2]})
    refused(read, data, "category 2", "no list of names")
    assert len(read(data, category="face").files) == 3


def test_a_category_can_be_chosen(read):
    line = refused(read, two(same=False), "train.json", "dog (5)", "cat (7)", "--category")
    named = re.search(r"--category '(.*)'", line)[1]
    assert len(read(two(same=False), category=named).files) == 4
    for same, name, k in ((False, "cat", 7), (False, "dog", 5), (False, 2, 7), (True, "cat", 5)):
        faces = read(two(same), category=name)
        assert faces.points.shape == (4, k, 2) and faces.notes[0].startswith("left out: 4 of another category")
    refused(read, two(same=False), "--category cow", "dog (5), cat (7)", category="cow")
    turned = two(same=True)
    turned["categories"][1]["keypoints"] = turned["categories"][1]["keypoints"][::-1]  # as many, in another order
    refused(read, turned, "--category", "dog (5), cat (5)")


# ---------------------------------------------------------------- boxes

def test_a_rebuilt_box_is_the_converters(read):
    data = plain()
    for a in data["annotations"]:
        a["bbox"] = [0, 0, 0, 0]
    faces = read(data)
    low, high = faces.points.min(1), faces.points.max(1)
    grown = np.clip(np.stack([low - 0.1 * (high - low), high + 0.1 * (high - low)], 1), 0, (WIDTH, HEIGHT))
    np.testing.assert_allclose(np.stack([faces.boxes[:, :2], faces.boxes[:, :2] + faces.boxes[:, 2:]], 1), grown)


@pytest.mark.parametrize("scale", [0.3, 0.5, 2, 3])
def test_a_box_of_another_scale_is_rebuilt(read, scale):
    data = plain()
    data["annotations"][1]["bbox"] = [v * scale for v in data["annotations"][1]["bbox"]]
    faces, before = read(data), read(plain())
    assert "1 away from them (annotation 2)" in faces.notes[0]
    np.testing.assert_array_equal(np.delete(faces.boxes, 1, 0), np.delete(before.boxes, 1, 0))
    assert coco.overlaps(faces.boxes[[1]], before.boxes[[1]]) > 0.6


def test_a_box_that_is_no_bodys_covers_seven_tenths_of_the_landmarks():
    """Where its IoU is below 0.3; grown by what landmarks may lie outside."""
    hull = np.array([0.0, 0, 100, 100])
    assert coco.box_problem([0, 0, 50, 50], hull) == "mismatched" and coco.box_problem([70, -100, 300, 300], hull) == "mismatched"
    assert coco.box_problem([55, -100, 300, 300], hull) is None


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 60))
def test_a_right_box_is_never_touched(draw, k):
    """Tight, wide, of a whole body or picture, out of it, a little inside its landmarks; with any part labelled."""
    rng = np.random.default_rng(draw.draw(st.integers(0, 10**6)))
    points = rng.uniform([40, 30], [100, 90], (draw.draw(st.integers(1, k)), 2))
    hull, wide = coco.hull_of(points), draw.draw(st.tuples(*[st.floats(-0.05, 3)] * 4))
    low, high = hull[:2] - np.multiply(wide[:2], hull[2:]), hull[:2] + hull[2:] * (1 + np.array(wide[2:]))
    assert coco.box_problem([*low, *(high - low)], hull) is None


def corner_boxes(data):
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x, y, x + w, y + h]
    return data


def test_boxes_as_corners_are_read_as_such(read):
    faces, before = read(corner_boxes(plain(20))), read(plain(20))
    np.testing.assert_allclose(faces.boxes, before.boxes)
    assert faces.notes == ["read otherwise: 20 boxes as x1 y1 x2 y2 (annotation 1)"]
    data = corner_boxes(plain(20))
    data["annotations"][3]["bbox"] = [100, 80, 50, 60]  # no corners
    assert "20 boxes as x1" in read(data).notes[1] and "1 missing, flat or malformed" in read(data).notes[0]
    data["annotations"][3]["bbox"] = None
    assert "19 boxes as x1" in read(data).notes[1] and "1 missing" in read(data).notes[0]


@pytest.mark.parametrize("scale", [0.3, 0.75, 1.5, 2, 4])
def test_boxes_in_another_scale_are_rebuilt(read, scale):
    data = plain(20)
    for a in data["annotations"]:
        a["bbox"] = [scale * side for side in a["bbox"]]
    faces, whole = read(data), read(plain(20))
    assert (np.diagonal(coco.overlaps(faces.boxes, whole.boxes)) > 0.6).all() and len(faces.notes) == 1
    assert faces.notes[0].endswith("landmarks: 20 in another scale (annotation 1)")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 1), st.booleans())
@example(69, 1, 1.0, False)
def test_right_boxes_are_never_taken_for_corners_or_scaled(seed, n, wide, cut):
    """Faces of any size anywhere in the picture, boxes up to twice as wide, cut to the picture or not."""
    rng, size = np.random.default_rng(seed), np.array([WIDTH, HEIGHT])
    low = rng.uniform(0, 0.8 * size, (n, 2))
    hulls = np.concatenate([low, rng.uniform(0.15, 1, (n, 2)) * (size - low)], 1)
    a, b = low - wide / 2 * hulls[:, 2:], low + (1 + wide / 2) * hulls[:, 2:]
    a, b = (np.clip(a, 0, size), np.clip(b, 0, size)) if cut else (a, b)
    for otherwise in (coco.are_corners, coco.are_scaled):
        assert not otherwise(np.concatenate([a, b - a], 1), hulls, np.tile(size, (n, 1)))


# ---------------------------------------------------------------- pictures: where they are, their sizes, EXIF

def test_sizes_that_the_file_lacks_come_from_the_pictures(read, tmp_path):
    data = plain()
    for image, change in zip(data["images"], ({"width": None}, {"width": 0, "height": 0}, {"height": ""}, {}, {"width": -1, "height": -1}, {})):
        image.update(change)
        draw(tmp_path / image["file_name"])
    del data["images"][3]["width"]
    faces = read(data)
    assert (faces.sizes == (WIDTH, HEIGHT)).all()
    assert faces.notes == ["read otherwise: 5 sizes from the pictures themselves (pic_0.jpg)"]
    data["images"] = {str(image["id"]): image["file_name"] for image in data["images"]}  # Animal Pose's
    assert read(data).files == faces.files
    data["images"] = {key: {"id": int(key), "file_name": name} for key, name in data["images"].items()}
    assert read(data).files == faces.files
    (tmp_path / "pic_1.jpg").write_bytes(b"no picture")
    refused(read, data, "pic_1.jpg", "cannot be read as a picture")
    (tmp_path / "pic_1.jpg").unlink()
    refused(read, data, "pic_1.jpg", "no such picture")


LAYOUTS = {  # (the file's place, the pictures' names in it, where the pictures are, what is read)
    "below the data root": ("ann/train.json", "pic_{}.jpg", "root/pic_{}.jpg", "pic_{}.jpg"),
    "names with a folder": ("ann/train.json", "a/b/pic_{}.jpg", "root/a/b/pic_{}.jpg", "a/b/pic_{}.jpg"),
    "Roboflow": ("root/train/_annotations.coco.json", "pic_{}.jpg", "root/train/pic_{}.jpg", "train/pic_{}.jpg"),
    "COCO": ("root/annotations/person_keypoints_train2017.json", "0{}.jpg", "root/train2017/0{}.jpg", "train2017/0{}.jpg"),
    "CVAT": ("root/annotations/person_keypoints_default.json", "pic_{}.jpg", "root/images/default/pic_{}.jpg",
             "images/default/pic_{}.jpg"),
    "COCO Annotator": ("ann/dogs.json", "pic_{}.jpg", "root/dogs/pic_{}.jpg", "dogs/pic_{}.jpg"),
    "Windows": ("root/result.json", "images\\pic_{}.jpg", "root/images/pic_{}.jpg", "images/pic_{}.jpg"),
    "nowhere": ("root/train.json", "pic_{}.jpg", "elsewhere/pic_{}.jpg", "pic_{}.jpg"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_found(read, tmp_path, layout):
    place, name, pictures, expected = LAYOUTS[layout]
    (tmp_path / "root/other").mkdir(parents=True)
    for i in range(6):
        draw(tmp_path / pictures.format(i))
    draw(tmp_path / "root/other" / "pic_0.jpg" if layout not in ("COCO", "nowhere") else tmp_path / "root/other/0.jpg")
    faces = read(plain(name=name), place, tmp_path / "root")
    assert faces.files == [expected.format(i) for i in range(6)] and faces.notes == []


def test_a_linked_annotation_file_counts_where_it_lies(tmp_path):
    """Roboflow's zip, used by links named train.json and val.json."""
    for split in ("train", "valid"):
        (tmp_path / "zip" / split).mkdir(parents=True)
        (tmp_path / "zip" / split / "_annotations.coco.json").write_text(json.dumps(plain()))
        for i in range(6):
            draw(tmp_path / "zip" / split / f"pic_{i}.jpg")
    (tmp_path / "val.json").symlink_to("zip/valid/_annotations.coco.json")
    assert read_coco(tmp_path / "val.json", tmp_path / "zip")[1]["files"] == [f"valid/pic_{i}.jpg" for i in range(6)]


def test_names_that_lead_out_count_by_how_they_end(read, tmp_path):
    """Label Studio's "COCO with images": the names are the server's, the pictures are in images/."""
    data = plain()
    for i, image in enumerate(data["images"]):
        draw(tmp_path / "root/images" / image["file_name"])
        image["file_name"] = ["/data/upload/4/", "..\\..\\media\\upload\\4\\", "../media/upload/4/"][i % 3] + image["file_name"]
    faces = read(data, "root/result.json", tmp_path / "root")
    assert faces.files == [f"images/pic_{i}.jpg" for i in range(6)]
    assert faces.notes == ["read otherwise: 6 names outside the data root, by the end of their paths "
                           "(/data/upload/4/pic_0.jpg)"]
    (tmp_path / "root/images/pic_3.jpg").unlink()
    refused(read, data, "leaves the data root", path="root/result.json", root=tmp_path / "root")


def sessions(tmp_path, name="/home/me/data/session{}/{}", counts=(5, 3)):
    """Frames of two sessions with equal names, in a folder each; the file of another machine."""
    first, second = plain(counts[0], 5), plain(counts[1], 5, first_id=101)
    for number, data in enumerate((first, second), 1):
        for image in data["images"]:
            draw(tmp_path / f"root/session{number}" / image["file_name"])
            image["path"] = f"/datasets/dogs/session{number}/{image['file_name']}"
            image["file_name"] = name.format(number, image["file_name"])
    return {**first, **{key: first[key] + second[key] for key in ("images", "annotations")}}


SESSIONS = [f"session1/pic_{i}.jpg" for i in range(5)] + [f"session2/pic_{i}.jpg" for i in range(3)]


@pytest.mark.parametrize("name", ["/home/me/data/session{}/{}", "D:\\dogs\\session{}\\{}", "../session{}/{}",
                                  "https://host/dogs/session{}/{}?signature=a/b", "s3://bucket/session{}/{}"])
def test_names_that_lead_out_keep_their_session(read, tmp_path, name):
    data = sessions(tmp_path, name)
    faces = read(data, root=tmp_path / "root")
    assert faces.files == SESSIONS and "8 names outside the data root" in faces.notes[0]
    (tmp_path / "root/session2/pic_1.jpg").unlink()  # then one picture would be two of the file
    refused(read, data, "session1", "session2", "both session1/pic_1.jpg", root=tmp_path / "root")


def named(*names):
    data = plain(len(names))
    for image, name in zip(data["images"], names):
        image["file_name"] = name
    return data


@pytest.mark.parametrize("there, names, files", [
    ("a.jpg", ("b/a.jpg", "c/a.jpg"), None), ("a.jpg", ("a.jpg", "b/a.jpg"), None),
    ("images/A.jpg", ("images/a.jpg", "a.jpg"), ["images/A.jpg", "a.jpg"]),  # the nearer one has it
    ("A.jpg", ("./a.jpg", "a.jpg"), ["A.jpg", "A.jpg"])])  # both are one name
def test_a_picture_that_two_names_could_mean_is_given_to_neither(read, tmp_path, there, names, files):
    draw(tmp_path / "root" / there)
    faces = read(named(*names), root=tmp_path / "root")
    assert faces.files == (files or [*names]) and any("in spelling" in note for note in faces.notes) == bool(files)


def test_nor_to_a_name_that_leads_out(read, tmp_path):
    draw(tmp_path / "root/a.jpg")
    refused(read, named("/srv/x/a.jpg", "b/a.jpg", "c/a.jpg"), "b/a.jpg and /srv/x/a.jpg are both a.jpg", root=tmp_path / "root")


def test_names_that_lead_out_are_not_guessed(read, tmp_path):
    data = sessions(tmp_path, "/upload/{1}", (5, 0))
    draw(tmp_path / "root/session2/pic_2.jpg")
    refused(read, data, "/upload/pic_2.jpg is session1/pic_2.jpg or session2/pic_2.jpg", root=tmp_path / "root")


def test_names_without_folders_that_are_in_two_are_refused(read, tmp_path):
    """sleap-io writes the pictures of all videos by their last names alone."""
    refused(read, {k: v for k, v in sessions(tmp_path, "{1}").items() if k != "images"} | {"images": [
        {k: v for k, v in image.items() if k != "path"} for image in sessions(tmp_path, "{1}")["images"]]},
        "stands for several images", "session1", "session2", root=tmp_path / "root")


def test_a_name_of_several_images_is_no_riddle_where_a_folder_is_meant(read, tmp_path):
    """An image for every face, in train.json; the same names in images/val."""
    data = plain(2)
    data["images"][1]["file_name"] = data["images"][0]["file_name"]
    for split in ("train", "val"):
        draw(tmp_path / "root/images" / split / "pic_0.jpg")
    assert read(data, "root/ann/train.json", tmp_path / "root").files == ["images/train/pic_0.jpg"] * 2


def test_the_annotation_files_own_folder_comes_first(read, tmp_path):
    """FiftyOne's val/labels.json and val/data, with names that are in train/data as well; one picture missing."""
    for i in range(4):
        draw(tmp_path / f"train/data/pic_{i}.jpg")
        if i:
            draw(tmp_path / f"val/data/pic_{i}.jpg")
    assert read(plain(4), "val/labels.json").files == [f"val/data/pic_{i}.jpg" for i in range(4)]


def test_a_name_that_comes_back_into_the_data_root_is_plain(read, tmp_path):
    """labelme's with labels in a folder of their own: s1/labels/../pictures/a.jpg."""
    data = plain(2)
    for image, way in zip(data["images"], ("s1/labels/../pictures/", "s1\\labels\\..\\pictures\\")):
        draw(tmp_path / "s1/pictures" / image["file_name"])
        image["file_name"] = way + image["file_name"]
    faces = read(data)
    assert faces.files == ["s1/pictures/pic_0.jpg", "s1/pictures/pic_1.jpg"] and not faces.notes
    for image in data["images"]:  # as seen from a folder above the data root
        image["file_name"] = "project/" + image["file_name"]
    assert read(data).files == faces.files


def test_label_studios_local_files_are_found(read, tmp_path):
    data = plain(2)
    for image, folder in zip(data["images"], ("", "a/")):
        draw(tmp_path / folder / image["file_name"])
        image["file_name"] = "/data/local-files/?d=" + folder + image["file_name"]
    assert read(data).files == ["pic_0.jpg", "a/pic_1.jpg"]
    data["images"][0]["file_name"] = "https://host/pic_0.jpg?d=2024"
    assert read(data).files == ["pic_0.jpg", "a/pic_1.jpg"]


def test_coco_annotators_names_count_with_their_path(read, tmp_path):
    assert read(sessions(tmp_path, "{1}"), root=tmp_path / "root").files == SESSIONS


def test_a_missing_picture_does_not_send_a_file_to_another_folder(read, tmp_path):
    for folder, number in (("A", 5), ("B", 6)):
        for i in range(number):
            draw(tmp_path / "root" / folder / f"pic_{i}.jpg")
    (tmp_path / "root/A/pic_3.jpg").unlink()
    assert read(plain(5), "root/A/ann.json", tmp_path / "root").files == [f"A/pic_{i}.jpg" for i in range(5)]


def test_subsets_are_told_by_their_names(read, tmp_path):
    """CVAT: the frames of two videos, whose names are equal, as the subsets Train and Validation."""
    for subset, number in (("Train", 5), ("Validation", 3)):
        for i in range(number):
            draw(tmp_path / "root/images" / subset / f"pic_{i}.jpg")
    (tmp_path / "root/images/Validation/pic_2.jpg").unlink()  # what is missing is not sought in the other
    for subset in ("Train", "Validation"):
        faces = read(plain(3), f"root/annotations/person_keypoints_{subset}.json", tmp_path / "root")
        assert faces.files == [f"images/{subset}/pic_{i}.jpg" for i in range(3)]


@pytest.mark.parametrize("file,folder", [("Train_2", "Train_2"), ("train-hard", "train-hard"), ("Val_night", "Val_night"), ("test_1", "test_1"),
                                         ("clip-1", "clip-1"), ("My Subset", "My Subset"), ("Train", "Train")])
def test_a_subset_of_any_name_is_told_by_the_end_of_the_files(read, tmp_path, file, folder):
    for other in {"Train", "Validation", "Test", "clip-2", "1", folder}:
        for i in range(3):
            draw(tmp_path / "root/images" / other / f"pic_{i}.jpg")
    faces = read(plain(3), f"root/annotations/person_keypoints_{file}.json", tmp_path / "root")
    assert faces.files == [f"images/{folder}/pic_{i}.jpg" for i in range(3)]


@pytest.mark.parametrize("gone", [None, 0])
def test_the_pictures_around_the_file_come_before_others(read, tmp_path, gone):
    """Supervisely: train/annotations/instances.json beside train/images, and frames of equal names under val."""
    for split in ("train", "val"):
        for i in range(4):
            draw(tmp_path / split / f"images/pic_{i}.jpg")
    if gone is not None:
        (tmp_path / f"train/images/pic_{gone}.jpg").unlink()
    for split in ("train", "val"):
        faces = read(plain(4), f"{split}/annotations/instances.json")
        assert faces.files == [f"{split}/images/pic_{i}.jpg" for i in range(4)] and faces.notes == []


def test_pictures_of_another_split_are_said(read, tmp_path):
    for i in range(3):
        draw(tmp_path / f"root/images/Train/pic_{i}.jpg")
    faces = read(plain(3), "root/annotations/person_keypoints_Test.json", tmp_path / "root")
    assert faces.files[0] == "images/Train/pic_0.jpg" and "person_keypoints_Test.json is of another split" in faces.notes[0]
    assert read(plain(3), "root/annotations/person_keypoints_Train.json", tmp_path / "root").notes == []


@pytest.mark.parametrize("grouped", [range(6), range(3), ()])
def test_names_of_a_skeleton_under_another_category_are_its_own(read, grouped):
    """CVAT: a skeleton grouped with a rectangle has the rectangle's category; Dataloop: its label's."""
    data = plain(names=["left_eye", "right_eye", "nose", "left_ear", "right_ear"])
    data["categories"].append({"id": 2, "name": "face_box", "keypoints": [], "skeleton": []})
    for i in grouped:
        data["annotations"][i]["category_id"] = 2
    faces = read(data)
    assert faces.names == data["categories"][0]["keypoints"] and faces.flip_pairs == [[0, 1], [3, 4]] and len(faces.files) == 6


@pytest.mark.parametrize("train,val", [("train2017", "val2017"), ("images/train", "images/valid"), ("train/images", "val/images"),
                                       ("images/Train", "images/Validation")])
def test_split_folders_are_told_by_the_files_names(read, tmp_path, train, val):
    for folder in (train, val):
        for i in range(3):
            draw(tmp_path / "root" / folder / f"pic_{i}.jpg")
    for file, folder in (("train.json", train), ("dogs_validation.json", val)):
        assert read(plain(3), file, tmp_path / "root").files[0] == f"{folder}/pic_0.jpg"


@pytest.mark.parametrize("written,there", [("A B.JPG", "a b.jpg"), ("a%20b.jpg", "a b.jpg"), ("Bjo\u0308rn.jpg", "Bj\u00f6rn.jpg"),
                                           ("Dogs/a.jpg", "dogs/a.jpg"), ("pics/a.jpg", "a.jpg")])
def test_names_may_be_spelt_otherwise(read, tmp_path, written, there):
    draw(tmp_path / "root" / there)
    faces = read(plain(1, name=written), root=tmp_path / "root")
    assert faces.files == [there] and faces.notes == [f"read otherwise: 1 names that differ from the files' in spelling, or by a missing or extra folder ({written})"]
    draw(tmp_path / "root" / there.upper())  # two of them: neither is meant for certain
    if written != there.upper():
        assert read(plain(1, name=written), root=tmp_path / "root").files == [written]


def test_copies_of_a_picture_have_one_original():
    files = ["dog1_jpg.rf.0a1b.jpg", "dog1_jpg.rf.99ff.jpg", "dog2_jpg.rf.0a1b.jpg", "dog3.jpg"]
    assert coco.originals(files) == ["dog1_jpg", "dog1_jpg", "dog2_jpg", "dog3.jpg"]
    assert coco.read_breeds(files[:3], [""] * 3, [""] * 3) == [""] * 3  # a picture is no breed


@pytest.mark.parametrize("first", [5, 4])
def test_pictures_spread_over_folders_are_found(read, tmp_path, first):
    """A folder a breed, and a file of base names; not where a name of the file is in two of them."""
    there = [f"{'poodle' if i < first else 'beagle'}/pic_{i}.jpg" for i in range(8)]
    for name in there:
        draw(tmp_path / "root" / name)
    faces = read(plain(8), root=tmp_path / "root")
    assert faces.files == there and f"{8 - first} names" in faces.notes[0] and "missing or extra folder" in faces.notes[0]
    draw(tmp_path / "root/setter/pic_0.jpg")
    assert read(plain(8), root=tmp_path / "root").files != there


def test_names_lack_their_folder_and_are_spelt_otherwise(read, tmp_path):
    for i in range(3):
        draw(tmp_path / f"root/images/default/\u00e9 {i}.jpg")
    faces = read(plain(3, name="e\u0301 {}.JPG"), root=tmp_path / "root")
    assert faces.files == [f"images/default/\u00e9 {i}.jpg" for i in range(3)]


def test_a_name_may_hold_spaces_of_any_kind(read, tmp_path):
    """macOS writes U+202F before AM and PM, and U+00A0 in some languages; Japanese has U+3000."""
    name = "Screenshot at 3.04.05\u202fPM\u00a0\u3000{}.png"
    for i in range(2):
        draw(tmp_path / "root" / name.format(i))
    faces = read(plain(2, 2, ["left\u00a0eye", "right\u00a0eye"], name), root=tmp_path / "root")
    assert faces.files == [name.format(i) for i in range(2)] and faces.names == ["left\u00a0eye", "right\u00a0eye"]
    refused(read, plain(1, name="line\u2028break.png"), "no text", root=tmp_path / "root")


def test_pictures_in_two_folders_are_not_guessed(read, tmp_path):
    for folder in ("a", "b"):
        for i in range(6):
            draw(tmp_path / "root" / folder / f"pic_{i}.jpg")
    refused(read, plain(), "pic_0.jpg", "--data-root", "in a ", "in b ", root=tmp_path / "root")
    (tmp_path / "root/a/pic_5.jpg").unlink()
    faces = read(plain(), root=tmp_path / "root")  # the one that has more of them
    assert faces.files[0] == "b/pic_0.jpg" and "taken from b, though a has some" in faces.notes[0]
    for i in range(3, 6):
        draw(tmp_path / f"root/train/pic_{i}.jpg")  # a small set of a split is not meant
    assert read(plain(), root=tmp_path / "root").files[0] == "b/pic_0.jpg"


@pytest.mark.parametrize("name", ["../pic.jpg", "/etc/passwd", "C:\\x.jpg", "a\\..\\..\\x.jpg", "\\\\host\\x.jpg", "a\0.jpg",
                                  "sub/out.jpg", "out.jpg"])
def test_no_name_leaves_the_data_root(read, tmp_path, name):
    (tmp_path / "root/sub/sub").mkdir(parents=True)
    draw(tmp_path / "secret.jpg")
    for link in ("root/sub/out.jpg", "root/sub/sub/out.jpg"):
        (tmp_path / link).symlink_to(tmp_path / "secret.jpg")
    data = plain(1, name="x.jpg")
    data["images"][0]["file_name"] = name
    with pytest.raises(UserError, match="leaves the data root|no text|are in sub"):
        read(data, root=tmp_path / "root")


def test_a_linked_folder_that_holds_the_pictures_is_named(read, tmp_path):
    (tmp_path / "root").mkdir()
    for i in range(6):
        draw(tmp_path / f"elsewhere/pic_{i}.jpg")
    (tmp_path / "root/train").symlink_to(tmp_path / "elsewhere")
    refused(read, plain(), "train/pic_0.jpg", "is a link that leaves the data root", root=tmp_path / "root")
    assert len(read(plain(), root=tmp_path / "root/train").files) == 6  # as the message says


def test_links_are_sought_only_where_a_picture_stays_lost(read, tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    for i in range(6):
        draw(tmp_path / f"root/pic_{i}.jpg")
        draw(tmp_path / f"elsewhere/pic_{i}.jpg")
    (tmp_path / "root/deeper").mkdir()
    (tmp_path / "root/deeper/old").symlink_to(tmp_path / "elsewhere")
    with monkeypatch.context() as patch:  # a data root may be huge, slow, or closed to listing
        patch.setattr(Path, "iterdir", lambda _: pytest.fail("the data root is listed"))
        patch.setattr(os, "walk", lambda _: pytest.fail("the data root is searched"))
        assert read(plain(), root=tmp_path / "root").files[0] == "pic_0.jpg"
    (tmp_path / "root/pic_0.jpg").rename(tmp_path / "root/PIC_0.JPG")
    assert read(plain(), root=tmp_path / "root").files[0].lower() == "pic_0.jpg"  # not the copy behind the link
    (tmp_path / "root/PIC_0.JPG").unlink()
    (tmp_path / "root/pic_3.jpg").unlink()
    (tmp_path / "elsewhere/pic_0.jpg").unlink()  # lost everywhere; pic_3.jpg is behind the link
    refused(read, plain(), "deeper/old/pic_3.jpg", "is a link that leaves the data root", root=tmp_path / "root")


def test_a_data_root_that_is_missing_is_no_crash(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(plain()))
    assert len(load_coco(tmp_path / "mine.json", tmp_path / "nowhere").files) == 6


def test_zeros_behind_a_faces_landmarks_are_left_out(read):
    """Some programs make all arrays as long as the longest of all categories."""
    data, usual = plain(), read(plain())
    for annotation in data["annotations"]:
        annotation["keypoints"] += [0] * 36
    faces = read(data)
    assert np.array_equal(faces.points, usual.points) and np.array_equal(faces.visible, usual.visible)
    assert any("6 faces with zeros behind their landmarks" in note for note in faces.notes)
    data["annotations"][2]["keypoints"][-2] = 7
    refused(read, data, "annotation 3", "15 numbers, not 51")


@pytest.mark.parametrize("scale", [1, 500])
def test_zeros_behind_x_and_y_alone_are_a_landmark(read, scale):
    """Five landmarks without names or v, the last not labelled: 10 numbers, which are not three triples and a 0."""
    data = plain()
    del data["categories"][0]["keypoints"]
    for annotation in data["annotations"]:
        annotation["keypoints"] = [v / scale for v in (20, 30, 40, 30, 30, 40, 25, 50)] + [0, 0]
    refused(read, data, "9 numbers, not 10", "x and y alone")


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png"])
@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_landmarks_of_a_picture_as_stored_turn_with_it(read, tmp_path, turn, suffix):
    """A dot painted at every landmark of the stored picture is there in the picture as it is seen."""
    from tools.lib.pictures import read_image
    data, exif = plain(3, 5), Image.Exif()
    exif[0x112] = turn
    for image, a in zip(data["images"], data["annotations"]):
        image["file_name"] = f"{Path(image['file_name']).stem}.{suffix}"
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        points = np.round(np.reshape(a["keypoints"], (5, 3))).astype(int)
        points[2] = 0
        a["keypoints"] = points.ravel().tolist()
        pixels[points[:, 1], points[:, 0]] = 255 * (points[:, 2:] > 0)
        finest = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
        Image.fromarray(pixels).save(tmp_path / image["file_name"], exif=exif, **finest)
        assert coco.header(tmp_path / image["file_name"]) == ((WIDTH, HEIGHT), turn)
    faces = read(data)
    assert (faces.sizes == (HEIGHT, WIDTH)).all() and faces.notes == [
        f"read otherwise: 3 faces of pictures that EXIF turns, turned with them (pic_0.{suffix})"]
    for i, name in enumerate(faces.files):
        seen, points = read_image(tmp_path / name), faces.points[i].astype(int)
        assert seen.shape[:2] == (WIDTH, HEIGHT)
        assert [tuple(p) for p in points] == [(0, 0) if j == 2 else tuple(p) for j, p in enumerate(points)]
        bright = seen[points[:, 1], points[:, 0]].mean(1)
        assert (np.delete(bright, 2) > 150).all() and coco.box_problem(faces.boxes[i], coco.hull_of(points[[0, 1, 3, 4]])) is None
        assert not np.delete(points, 2, 0).min() < faces.boxes[i][:2].min() - 1


def test_a_png_may_say_at_its_end_how_it_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    draw(tmp_path / "a.png")
    assert coco.header(tmp_path / "a.png") == ((WIDTH, HEIGHT), 0)
    part, data = b"eXIf" + exif.tobytes()[6:], (tmp_path / "a.png").read_bytes()
    chunk = (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert coco.header(tmp_path / "a.png") == ((WIDTH, HEIGHT), 6)


@pytest.mark.parametrize("turn,size", [(2, (WIDTH, HEIGHT)), (3, (WIDTH, HEIGHT)), (4, (WIDTH, HEIGHT)), (6, (160, 160))])
def test_what_an_oblong_picture_tells_holds_for_the_others(read, tmp_path, turn, size):
    """Pictures upside down, mirrored or square say nothing by their size; one of the file's does."""
    from tools.lib.pictures import read_image
    data = plain(3, 5)
    for i, (image, a) in enumerate(zip(data["images"], data["annotations"])):
        exif, (w, h) = Image.Exif(), (WIDTH, HEIGHT) if i == 0 else size
        exif[0x112] = 6 if i == 0 else turn
        pixels, points = np.zeros((h, w, 3), np.uint8), np.round(np.reshape(a["keypoints"], (5, 3))).astype(int)
        a["keypoints"] = points.ravel().tolist()
        pixels[points[:, 1], points[:, 0]] = 255
        image.update(width=w, height=h)
        Image.fromarray(pixels).save(tmp_path / image["file_name"], quality=100, subsampling=0, exif=exif)
    faces = read(data)
    assert "3 faces of pictures that EXIF turns" in faces.notes[0]
    for i, name in enumerate(faces.files):
        seen, points = read_image(tmp_path / name), faces.points[i].astype(int)
        assert seen.shape[1::-1] == tuple(faces.sizes[i]) and seen[points[:, 1], points[:, 0]].min() > 100
    data["annotations"][0]["keypoints"][:3] = [WIDTH + 3, 60, 1]  # one outside does not make them upright
    assert "3 faces of pictures that EXIF turns" in read(data).notes[1] and "nothing tells" in read(data).notes[0]
    data["images"][0].update(width=HEIGHT, height=WIDTH)  # a program that knows how pictures are seen
    assert not any("EXIF" in note for note in read(data).notes)
    data["images"], data["annotations"] = data["images"][1:], data["annotations"][1:]  # none that tells
    assert sum("nothing tells" in note for note in read(data).notes) == 1


def test_a_face_beside_a_picture_of_a_wrong_size_stays_for_what_tells_of_it(read, tmp_path):
    data = plain(2)
    data["annotations"][0].update(keypoints=BELOW, bbox=[25, 125, 40, 30])
    draw(tmp_path / "pic_0.jpg", (WIDTH, WIDTH))
    draw(tmp_path / "pic_1.jpg")
    faces = read(data)
    assert len(faces.files) == 2 and "outside of their picture" in faces.notes[0]


def test_width_and_height_that_are_exchanged_are_the_pictures(read, tmp_path):
    data = plain(3)
    for i, image in enumerate(data["images"]):
        draw(tmp_path / image["file_name"], (HEIGHT, WIDTH) if i else (WIDTH, HEIGHT))
        image.update(width=WIDTH, height=HEIGHT)
    data["annotations"][1]["keypoints"][0] = HEIGHT + 15.0  # inside the size that the file says
    faces = read(data)
    assert faces.sizes.tolist() == [[WIDTH, HEIGHT], [WIDTH, HEIGHT], [HEIGHT, WIDTH]]
    assert faces.notes[0] == "read otherwise: 1 sizes from the pictures themselves (pic_2.jpg)"
    shares = read(data).points / [WIDTH, HEIGHT]  # as fractions of the sides
    for a, share in zip(data["annotations"], shares):
        a["keypoints"] = [v for xy in share.tolist() for v in (*xy, 2)]
        a.pop("bbox")
    faces = read(data)
    np.testing.assert_allclose(faces.points[2], shares[2] * [HEIGHT, WIDTH])
    assert faces.sizes.tolist() == [[WIDTH, HEIGHT], [HEIGHT, WIDTH], [HEIGHT, WIDTH]]


def test_two_faces_of_a_picture_have_one_size(read, tmp_path):
    data = plain(1, faces=2)
    draw(tmp_path / "pic_0.jpg", (HEIGHT, WIDTH))
    for a in data["annotations"]:  # inside both sizes
        a["keypoints"][::3] = [0.7 * x for x in a["keypoints"][::3]]
    assert read(data).sizes.tolist() == [[HEIGHT, WIDTH]] * 2
    assert "read otherwise: 1 sizes from the pictures themselves (pic_0.jpg)" in read(data).notes
    data["annotations"][1]["keypoints"][0] = HEIGHT + 15.0
    assert read(data).sizes.tolist() == [[WIDTH, HEIGHT]] * 2


def test_upright_landmarks_only_get_the_right_size(read, tmp_path):
    data, exif = plain(3), Image.Exif()
    exif[0x112] = 6
    for image in data["images"]:
        draw(tmp_path / image["file_name"], (HEIGHT, WIDTH), exif=exif)  # seen as WIDTH x HEIGHT
        image.update(width=HEIGHT, height=WIDTH)
    for a in data["annotations"]:
        a["keypoints"][0] = HEIGHT + 15.0
        a["bbox"] = None
    faces = read(data)
    assert (faces.sizes == (WIDTH, HEIGHT)).all() and "upright already" in faces.notes[-1]
    assert (faces.boxes[:, 0] + faces.boxes[:, 2] > HEIGHT + 15).all()
    assert (faces.points[:, 0, 0] == HEIGHT + 15).all()
    for a in data["annotations"]:  # where no landmark tells
        a["keypoints"] = [v for x, y in ((30, 30), (60, 30), (60, 70), (40, 70), (50, 50)) for v in (x, y, 2)]
    assert "nothing tells whether" in read(data).notes[0] and read(data).points[0, 0].tolist() != [30, 30]
    data["info"] = {"contributor": "Label Studio"}  # it shows them upright
    assert "upright already" in read(data).notes[-1] and read(data).points[0, 0].tolist() == [30, 30]
    for image in data["images"]:  # a file that knows how pictures are seen needs nothing
        image.update(width=WIDTH, height=HEIGHT)
    assert read(data).notes == faces.notes[:-1]
    for image in data["images"]:  # an upright one whose file has its stored size: all lie below that
        draw(tmp_path / image["file_name"], (WIDTH, HEIGHT), exif=exif)
    for a in data["annotations"]:
        a["keypoints"] = BELOW
    assert (read(data).sizes == (HEIGHT, WIDTH)).all() and len(read(data).files) == 3


@pytest.mark.parametrize("x,turned", [(HEIGHT + 15.0, False), (None, None), (30.0, True)])
def test_landmarks_tell_where_the_file_gives_no_sizes(read, tmp_path, x, turned):
    """A picture of HEIGHT x WIDTH that is seen as WIDTH x HEIGHT; the landmarks fit only one of both, or both."""
    data, exif = plain(3), Image.Exif()
    exif[0x112] = 6
    for image in data["images"]:
        draw(tmp_path / image["file_name"], (HEIGHT, WIDTH), exif=exif)
        del image["width"], image["height"]
    for a in data["annotations"]:
        places = (x or 30, 50), (60, 30), (60, 70), (40, 70), (50, WIDTH - 8 if turned else 50)
        a.update(keypoints=[v for place in places for v in (*place, 2)], bbox=None)
    faces = read(data)
    assert (faces.sizes == (WIDTH, HEIGHT)).all()
    assert (faces.points[0, 1].tolist() == [60, 30]) == (not turned)
    assert any("nothing tells whether pic_0.jpg" in note for note in faces.notes) == (turned is None)
    assert any("turned with them" in note for note in faces.notes) == bool(turned)


# ---------------------------------------------------------------- strata

@pytest.mark.parametrize("names,breeds", [
    (["n02085620_1.jpg", "n02085620_2.jpg", "n02099712_1.jpg", "n02099712_4.jpg"], ["n02085620"] * 2 + ["n02099712"] * 2),
    (["a/pug_1.jpg", "b/pug_2.jpg", "b/chow_1.jpg", "b/chow_2.jpg"], ["pug", "pug", "chow", "chow"]),
    (["1.jpg", "2.jpg", "3.jpg", "4.jpg"], [""] * 4),
    (["IMG_1.jpg", "IMG_2.jpg", "IMG_3.jpg", "IMG_4.jpg"], [""] * 4),
    (["ab_1.jpg", "cd_2.jpg", "ef_3.jpg", "ef_4.jpg"], [""] * 4),
    (["ab_1.jpg", "ab_2.jpg", "cd_1.jpg", "cd.jpg"], [""] * 4),
])
def test_names_give_strata_only_where_they_group_pictures(read, names, breeds):
    data = plain(4, faces=2)
    for image, name in zip(data["images"], names):
        image["file_name"] = name
    assert read(data).breeds == [b for b in breeds for _ in range(2)]


# ---------------------------------------------------------------- the scheme

@pytest.mark.parametrize("names,pairs", [
    (["left_eye", "right_eye", "nose"], [[0, 1]]), (["Right Eye", "Left Eye"], [[1, 0]]), (["R_Eye", "L_Eye"], [[1, 0]]),
    (["L_F_Paw", "R_F_Paw", "L_B_Paw", "R_B_Paw"], [[0, 1], [2, 3]]), (["eye.l", "eye.r"], [[0, 1]]),
    (["LeftEyeLeftCorner", "RightEyeRightCorner"], [[0, 1]]), (["LEye", "REye", "LIP"], [[0, 1]]), (["earL", "earR"], [[0, 1]]),
    (["left collar", "right collar"], [[0, 1]]), (["lower", "rower", "bright", "bleft_"], []), (["left_eye", "nose"], []),
    (["lefteye", "righteye"], [[0, 1]]), (["left", "left", "right"], []), (["p0", "p1"], []), ([*"ABLMRZ"], []), (["FL_paw", "FR_paw", "HL", "HR"], [[0, 1], [2, 3]]), (["rf_paw", "lf_paw"], [[1, 0]]), (["lt_eye", "rt_eye"], [[0, 1]]), (["", "l", "r"], [[1, 2]]),
    (dogflw_category(46)["keypoints"], dogflw_category(46)["flip_pairs"]),
])
def test_pairs_that_names_tell(names, pairs):
    assert named_pairs(names) == pairs


@pytest.mark.parametrize("lone,sided", [
    ("upright", 0), ("bright_spot", 0), ("LIP", 0), ("Rhinarium", 0), ("L1", 0), ("l3", 0), ("C7", 0), ("mid_left_right", 0),
    ("lower_lip", 0), ("left_ear", 1), ("rightear", 1), ("LEFTEAR", 1), ("EarL", 1), ("LTail", 1), ("r_hip", 1), ("FL", 1)])
def test_a_landmark_without_its_other_side_ends_mirroring(read, lone, sided):
    faces = read(plain(names=["left_eye", "right_eye", "nose", "chin", lone]))
    assert faces.flip_pairs == ([] if sided else [[0, 1]]) and (f"other side of {lone};" in faces.notes[0]) == sided


@pytest.mark.parametrize("pair", [("lear", "rear"), ("EarL2", "EarR2"), ("lobe_lft", "lobe_rgt")])
def test_sides_that_only_a_letter_tells_end_mirroring(read, pair):
    faces = read(plain(names=["left_eye", "right_eye", "nose", *pair]))
    assert faces.flip_pairs in ([], [[0, 1], [3, 4]]) and (faces.flip_pairs or f"other side of {pair[0]};" in faces.notes[0])


def dlib(n, pairs):
    """Faces of a jaw's outline, brows numbered from the picture's left to its right, and a nose."""
    names = [*(f"jaw_{i}" for i in range(5)), *(f"left_brow_{i}" for i in range(3)), *(f"right_brow_{i}" for i in range(3)), "nose"]
    x = [0, 10, 20, 30, 40, 5, 10, 15, 25, 30, 35, 20]
    y = [10, 30, 40, 30, 10, 5, 3, 5, 5, 3, 5, 20]
    data = plain(n, 12, names)
    for i, a in enumerate(data["annotations"]):
        a["keypoints"] = [v for place in zip(np.add(x, 30 + i), np.add(y, 30)) for v in (*map(float, place), 2)]
        a.pop("bbox")
    data["categories"][0]["flip_pairs"] = pairs
    return data


def test_partners_may_be_numbered_along_the_face(read):
    """Given, they are believed; where they are guessed, from names, or wrong, the places tell so."""
    true = [[0, 4], [1, 3], [5, 10], [6, 9], [7, 8]]
    for pairs in (true, [p[::-1] for p in true], [[i + 1, j + 1] for i, j in true]):
        faces = read(dlib(12, pairs))
        assert [*map(sorted, faces.flip_pairs)] == true and not any("mirrored" in note for note in faces.notes), faces.notes
    faces = read(dlib(12, []))
    assert faces.flip_pairs == [[5, 8], [6, 9], [7, 10]]
    assert "without a partner: jaw_0 (6 in all)" in faces.notes[0]
    assert any("mirrored, jaw_0 would be in the wrong place in nine of ten faces (4 in all)" in note for note in faces.notes), faces.notes
    assert not any("nine of ten" in note for note in read(dlib(9, [])).notes)  # too few to tell
    faces = read(dlib(12, [*true[:2], [5, 2]]))
    assert faces.flip_pairs == [[0, 4], [1, 3], [5, 8], [6, 9], [7, 10]] and "does not pair left_brow_0" in faces.notes[0]
    faces = read(dlib(12, [[7, 8]]))  # of the brows one pair
    assert faces.flip_pairs == [[6, 9], [7, 8]]
    assert "does not pair left_brow_1" in faces.notes[0] and "leaves left_brow_0 without a partner (2 in all)" in faces.notes[1]
    assert named_pairs(["left_eye ", "right_eye"]) == [[0, 1]]
    ones = plain(8, names=["left_eye_1", "right_eye_1", "left_eye_2", "right_eye_2", "nose"])
    ones["categories"][0]["flip_pairs"] = [[1, 2], [3, 4]]
    faces = read(ones)
    assert faces.flip_pairs == [[0, 1], [2, 3]] and "counts from 1" in faces.notes[0]


def test_faces_that_look_to_either_side_say_nothing_of_pairs():
    eyes_nose = np.array([[0.0, 0], [10, 0], [5, 8]])
    turned = np.stack([eyes_nose + [[0, 0], [0, 0], [turn, 0]] for turn in (-4, 4) * 8])
    assert coco.lopsided(turned, np.ones((16, 3)), [[0, 1]]).tolist() == []
    assert coco.lopsided(turned[1::2].repeat(2, 0), np.ones((16, 3)), [[0, 1]]).tolist() == [2]
    assert coco.lopsided(turned * np.nan, np.ones((16, 3)), [[0, 1]]).tolist() == []


def test_landmarks_with_a_place_but_v_0_and_orphans_are_counted(read):
    data = plain(4)
    data["annotations"][2]["image_id"] = 99
    data["annotations"][1]["keypoints"][2::3] = [0, 0, 2, 2, 2]
    assert read(data).notes == ["left out: 1 of an image that is not in the file (annotation 3)",
                                "beside the faces: 1 pictures without an annotation (pic_2.jpg)"]
    for a in data["annotations"]:
        a["keypoints"][2::3] = [min(v, 1) for v in a["keypoints"][2::3]]
    faces = read(data)
    assert faces.visible.sum() == 13 and len(faces.ids) == 3
    assert faces.notes == ["left out: 1 of an image that is not in the file (annotation 3)",
                           "beside the faces: 1 pictures without an annotation (pic_2.jpg)",
                           "read as they are: 2 landmarks with a place, but v 0, as not labelled (annotation 2)"]


def test_letters_are_no_sides(read):
    assert read(plain(names=["left_eye", "right_eye", "L", "M", "R"])).flip_pairs == [[0, 1]]


def test_a_scheme_of_our_own_comes_back_as_it_is():
    category = dogflw_category(46)
    scheme = checked_scheme(category, "x")
    assert scheme == {"names": category["keypoints"], "flip_pairs": category["flip_pairs"], "regions": category["regions"],
                      "interocular": [18, 19], "skeleton": [[i - 1, j - 1] for i, j in category["skeleton"]]}
    assert checked_scheme({"keypoints": SIDES}, "x")["flip_pairs"] == []  # a stored scheme is never completed


@pytest.mark.parametrize("field,value", [
    ("keypoints", []), ("keypoints", "abc"), ("keypoints", [1]), ("keypoints", ["\x1b[2J"]), ("keypoints", ["a"] * 1001),
    ("flip_pairs", [[0, 1], [1, 2]]), ("flip_pairs", [[0, 99]]), ("flip_pairs", [[0]]), ("flip_pairs", [[0, 0]]),
    ("flip_pairs", [0, 1]), ("flip_pairs", {"a": 1}), ("flip_pairs", [[-1, 0]]), ("flip_pairs", [[True, 0]]), ("flip_pairs", [[0, 5]]),
    ("regions", {"ear": ["x"]}), ("regions", [1]), ("regions", {"ear": [7]}), ("interocular", [1]), ("interocular", [1, 1]),
    ("interocular", "ab"),
])
def test_a_scheme_that_cannot_be_is_refused(read, field, value):
    with pytest.raises(UserError, match=f"^here: .*{'printable' if field == 'keypoints' else field}"):
        checked_scheme({"keypoints": SIDES, field: value}, "here")
    if field != "keypoints":
        for names in (None, SIDES):
            data = plain(names=names)
            data["categories"][0][field] = value
            refused(read, data, "train.json", field)


# ---------------------------------------------------------------- what is refused, in one line

def first(**change):
    return lambda d: d["annotations"][0].update(change)


REFUSED = {
    "a list": (lambda d: [], "not a COCO file"),
    "labelme": (lambda d: {"version": "5", "shapes": [], "imagePath": "a.jpg"}, "labelme", "data/README.md"),
    "Label Studio": (lambda d: [{"id": 1, "data": {"image": "a"}, "annotations": []}], "Label Studio", "data/README.md"),
    "results": (lambda d: d["annotations"], "predictions"),
    "VIA": (lambda d: {"_via_img_metadata": {}}, "VIA"),
    "no images": (lambda d: d.pop("images"), "images must be a list"),
    "no annotations": (lambda d: d.update(annotations=[]), "no annotations"),
    "no categories": (lambda d: d.update(categories=[]), "no categories"),
    "boxes alone": (each(lambda a: a.pop("keypoints")), "no annotation has keypoints with a labelled"),
    "nothing labelled": (each(lambda a: a.update(keypoints=[0] * 15)), "no annotation has keypoints with a labelled"),
    "nothing labelled but in a crowd": (lambda d: [a.update(keypoints=[0] * 15) if i else a.update(iscrowd=1) for i, a in
                                                   enumerate(d["annotations"])], "no face in it can be used (left out: 1 marked iscrowd"),
    "a category for every landmark (CVAT's points)": (
        lambda d: [d.update(categories=[{"id": i, "name": f"part {i}", "keypoints": []} for i in (1, 2)]),
                   [a.update(category_id=1 + a["id"] % 2, keypoints=a["keypoints"][:3]) for a in d["annotations"]]],
        "each of its 2 categories is one landmark (part"),
    "names no list": (categories({"keypoints": {"nose": 0}}), "category 1", "no list of names"),
    "unknown category": (first(category_id=9, keypoints=[1, 2, 2] * 4), "category 9", "not in the file; add it to categories"),
    "too few numbers": (first(keypoints=[1, 2, 2]), "annotation 1", "15 numbers, not 3"),
    "too few landmarks": (lambda d: [categories({"keypoints": [*"abcdef"]})(d), first(keypoints=[10, 20, 2, 30, 40, 2] * 2)(d)],
                          "18 numbers, not 12"),
    "words": (first(keypoints=["a"] * 15), "annotation 1", "keypoints"),
    "an object": (first(keypoints={"a": 1}), "annotation 1", "keypoints"),
    "other names than numbers": (categories({"keypoints": ["a", "b"]}), "6 numbers, not 15"),
    "v above 1 among confidences": (first(keypoints=[1, 2, 0.9, 3, 4, 1.0003] + [5, 6, 0.5] * 3), "annotation 1", "v cannot be 1.0003"),
    "v of 3": (first(keypoints=[1, 2, 3] * 5), "annotation 1", "v cannot be 3"),
    "v below 0": (first(keypoints=[1, 2, -1] * 5), "annotation 1", "v cannot be -1"),
    "v between": (first(keypoints=[1, 2, 1.5] * 5), "annotation 1", "v cannot be 1.5"),
    "v NaN": (first(keypoints=[1, 2, float("nan")] * 5), "annotation 1", "v cannot be nan"),
    "far away": (first(keypoints=[1e9, 2, 2] * 5), "annotation 1", "a landmark cannot be at 1e+09"),
    "endless": (first(keypoints=[float("inf"), 2, 2] * 5), "annotation 1", "a landmark cannot be at inf"),
    "image a list": (first(image_id=[1]), "annotation 1", "names no image"),
    "all images gone": (each(lambda a: a.update(image_id=99)), "no face in it can be used (left out: 6 of an image that is not"),
    "a category's id twice": (lambda d: d["categories"].append(dict(d["categories"][0], name="cat")), "two of its categories"),
    "an id a list": (first(id=[1]), "annotation 0 of the list has the id [1], neither number nor text"),
    "an image's id twice": (lambda d: d["images"][1].update(id=1), "image 1 (pic_1.jpg)", "id"),
    "an image without name": (lambda d: d["images"][1].pop("file_name"), "image 1", "file_name"),
    "a width below 0": (lambda d: d["images"][1].update(width=-1), "image 1 (pic_1.jpg)", "width and height cannot be (-1, 120)"),
    "a width of words": (lambda d: d["images"][1].update(width="wide"), "width and height cannot be"),
    "a broken width": (lambda d: d["images"][1].update(width=160.5), "width and height cannot be"),
    "an image no object": (lambda d: d["images"].__setitem__(1, 7), "image 1", "file_name"),
    "an annotation no object": (lambda d: d["annotations"].__setitem__(1, None), "annotation 1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_clear_is_refused_in_one_line(read, kind):
    change, *words = REFUSED[kind]
    data = plain()
    changed = change(data)
    refused(read, changed if isinstance(changed, (list, dict)) and kind in (
        "a list", "labelme", "Label Studio", "results", "VIA") else data, "train.json", *words)


def test_a_category_that_cannot_be_chosen_is_one_line(read):
    data = plain()
    first(category_id=9, keypoints=[1, 2, 2] * 4)(data)
    refused(read, data, "--category cat", "no landmarks of it, but of 9 (4), face (5)", category="cat")
    categories({}, {"id": 2, "keypoints": [*"abcd"]})(data)  # both are called face
    first(category_id=2)(data)
    refused(read, data, "different landmarks: 2 (4), 1 (5)", "choose one with --category '2'", category="face")
    assert len(read(data, category=1).files) == 5


def test_pairs_in_lists_of_their_own_need_no_names(read):
    """So mmpose's UBody."""
    data = plain()
    data["categories"][0].pop("keypoints")
    for a in data["annotations"]:
        a["keypoints"] = [a["keypoints"][i:i + 2] for i in range(0, 15, 3)]
    faces = read(data)
    np.testing.assert_array_equal(faces.points, read(plain()).points)
    assert (faces.visible == 2).all() and "6 faces' landmarks as x and y alone (annotation 1)" in faces.notes[1]


def test_categories_whose_landmarks_only_differ_in_order_say_so(read):
    data = plain(names=SIDES)
    categories({}, {"id": 2, "name": "cat", "keypoints": SIDES[::-1]})(data)
    first(category_id=2)(data)
    refused(read, data, "the same landmarks in another order: cat (5), face (5)", "choose one with --category 'cat'")


def test_regions_and_the_eyes_may_be_names(read):
    """As flip_pairs may."""
    data, named = plain(names=SIDES), plain(names=SIDES)
    categories({"interocular": [1, 0], "regions": {"eye": [0, 1], "rest": []}})(data)
    categories({"interocular": [SIDES[1], SIDES[0]], "regions": {"eye": SIDES[:2], "rest": []}})(named)
    ours, theirs = read(data), read(named)
    assert ours.interocular == theirs.interocular == [1, 0] and ours.regions == theirs.regions == {"eye": [0, 1], "rest": []}
    categories({"interocular": [SIDES[1], "nobody"]})(named)
    refused(read, named, "interocular must hold 2 different landmark numbers")


def test_pairs_from_other_fields_are_those_of_the_category(read):
    data = plain()
    categories({"flip_idx": [1, 0, 2, 4, 3]})(data)
    assert read(data).flip_pairs == [[0, 1], [3, 4]]
    categories({"flip_pairs": [["p1", "p0"]]})(data)
    assert read(data).flip_pairs == [[1, 0]]
    categories({"keypoints": ["eye", "eye", "nose", "ear", "ear"], "flip_pairs": None, "flip_idx": None})(data)
    assert read(data).names == ["eye_1", "eye_2", "nose", "ear_1", "ear_2"]
    categories({"keypoints": ["left_eye", "left_eye", "right_eye", "right_eye", "nose"]})(data)
    assert read(data).flip_pairs == []  # the numbers were made up
    categories({"keypoints": SIDES, "flip_idx": [1, 2, 0, 3, 4]})(data)
    assert read(data).flip_pairs == [[0, 1], [3, 4]]  # of the names


def test_categories_that_are_not_listed_are_that_of_as_many_landmarks(read):
    data = plain(60)
    for a in data["annotations"]:
        a["category_id"] = 7 + a["id"]
    faces = read(data, category="face")
    assert faces.notes == ["category 10 is not in the file; it is read as the one with 5 landmarks (60 such in all)"]


def test_equal_ids_stay_different_faces(read):
    data = plain()
    annotation(id=1)(data)
    faces = read(data)
    assert [*faces.ids] == [1, "1_1", 3, 4, 5, 6]


def junk(rng, depth=0):
    """Any JSON value."""
    if depth < 3 and rng.random() < 0.3:
        values = [junk(rng, depth + 1) for _ in range(rng.randrange(5))]
        return values if rng.random() < 0.7 else {rng.choice(["id", "name", "", "x"]): v for v in values}
    return rng.choice([None, True, False, 0, 1, 2, -1, 5, 0.5, 1.0, 1e-9, 1e9, -1e300, 10**400, 10**18, float("nan"), float("inf"),
                       "", "1", "left", "a b", "\x1b[2J", "\ud800", "../x", "/etc", "\n", "0" * 5000])


@pytest.mark.parametrize("seed", range(4))
def test_any_value_anywhere_is_read_or_refused_in_one_line(read, tmp_path, seed):
    rng, accepted = random.Random(seed), 0
    for _ in range(150):
        data = plain(3, names=rng.choice([None, SIDES]))
        data["categories"][0] |= {"flip_pairs": [[0, 1]], "regions": {"eye": [0, 1]}, "interocular": [0, 1]}
        for _ in range(rng.randint(1, 2)):
            section = rng.choice(["images", "annotations", "categories"])
            entries = data[section] if isinstance(data[section], list) else []
            entry = rng.choice([e for e in entries if isinstance(e, dict)] or [{}])
            key = rng.choice([None, *entry])
            if key is None and rng.random() < 0.3:
                data[section] = junk(rng)
            elif isinstance(entry.get(key), list) and entry[key] and rng.random() < 0.6:
                entry[key] = [*entry[key]]
                entry[key][rng.randrange(len(entry[key]))] = junk(rng)
            elif key:
                entry[key] = junk(rng)
        try:
            faces = read(data)
        except UserError as e:
            assert str(e).isprintable(), str(e)
            continue
        accepted += 1
        assert (faces.boxes[:, 2:] > 0).all() and np.isfinite(faces.boxes).all() and np.isfinite(faces.points).all()
        assert (faces.visible > 0).any(1).all() and set(np.unique(faces.visible)) <= {0, 1, 2}
        assert all(note.isprintable() for note in faces.notes)
        assert all(0 <= i < len(faces.names) for pair in faces.flip_pairs + faces.skeleton for i in pair)
    assert 15 < accepted < 135  # both ways were taken often


# ---------------------------------------------------------------- the files of an export

@pytest.mark.parametrize("files,train,val", [
    (["train.json", "val.json"], "train.json", "val.json"),
    (["train.json", "val.json", "test.json", "other.json"], "train.json", "val.json"),
    (["train.json", "dogs_val.json", "captions.json"], "train.json", "dogs_val.json"),
    (["train.json", "train_val.json"], "train.json", None), (["train.json", "test_predictions.json"], "train.json", None),
    (["coco.json"], "coco.json", None), (["mine_train.json", "training_log.json", "val.json"], "mine_train.json", "val.json"),
    (["training.json", "validation.json"], "training.json", "validation.json"),
    (["train/annotations.json", "val/annotations.json"], "train/annotations.json", "val/annotations.json"),
    (["train.json"], "train.json", None), (["train.json", "test.json"], "train.json", "test.json"),
    (["train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"],
     "train/_annotations.coco.json", "valid/_annotations.coco.json"),
    (["train/_annotations.coco.json", "test/_annotations.coco.json"], "train/_annotations.coco.json", "test/_annotations.coco.json"),
    (["train/_annotations.coco.json"], "train/_annotations.coco.json", None),
    (["train/labels.json", "val/labels.json"], "train/labels.json", "val/labels.json"),
    (["annotations/person_keypoints_train2017.json", "annotations/person_keypoints_val2017.json",
      "annotations/instances_train2017.json", "annotations/captions_val2017.json"],
     "annotations/person_keypoints_train2017.json", "annotations/person_keypoints_val2017.json"),
    (["annotations/person_keypoints_default.json"], "annotations/person_keypoints_default.json", None),
    (["annotations/train.json", "annotations/val.json"], "annotations/train.json", "annotations/val.json"),
    (["face_landmarks_wflw_train.json", "face_landmarks_wflw_test.json"], "face_landmarks_wflw_train.json",
     "face_landmarks_wflw_test.json"),
    (["face_landmarks_wflw_train.json", "face_landmarks_wflw_test.json", "face_landmarks_wflw_test_blur.json",
      "face_landmarks_wflw_test_pose.json"], "face_landmarks_wflw_train.json", "face_landmarks_wflw_test.json"),
    (["face_landmarks_300w_train.json", "face_landmarks_300w_valid.json", "face_landmarks_300w_valid_common.json",
      "face_landmarks_300w_test.json"], "face_landmarks_300w_train.json", "face_landmarks_300w_valid.json"),
    (["ap10k-train-split1.json", "ap10k-val-split1.json", "ap10k-test-split1.json"], "ap10k-train-split1.json",
     "ap10k-val-split1.json"),
    (["annotations/person_keypoints_Train.json", "annotations/person_keypoints_Validation.json",
      "annotations/person_keypoints_Test.json"], "annotations/person_keypoints_Train.json",
     "annotations/person_keypoints_Validation.json"),
    (["result.json", ".hidden.json", "images/x.json"], "result.json", None),
    (["mine_train.json", "mine_val.json", "train/labels.json"], "mine_train.json", "mine_val.json"),
    (["train/annotations/instances.json", "val/annotations/instances.json"], "train/annotations/instances.json",
     "val/annotations/instances.json"),  # Supervisely
    (["train/annotations/person_keypoints_default.json", "train/annotations/instances_default.json",
      "val/annotations/person_keypoints_default.json"], "train/annotations/person_keypoints_default.json",
     "val/annotations/person_keypoints_default.json"),  # two exports of CVAT
    (["train/coco.json", "valid/coco.json"], "train/coco.json", "valid/coco.json"),
    (["mine_train_val.json"], "mine_train_val.json", None),
    (["training_humanart.json", "validation_humanart.json"], "training_humanart.json", "validation_humanart.json"),
    (["project-1/result.json", "project-1/images/x.jpg"], "project-1/result.json", None),
    (["project-1/result.json", "__MACOSX/x.txt"], "project-1/result.json", None),
    (["export/annotations/person_keypoints_default.json"], "export/annotations/person_keypoints_default.json", None),
])
def test_the_files_of_an_export_are_found(tmp_path, files, train, val):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    found = find_annotations(tmp_path)
    assert found == (tmp_path / train, val and tmp_path / val)
    assert find_annotations(tmp_path / train) == (tmp_path / train, None)


def test_an_export_that_is_not_clear_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ann-root .*train.json.*there are none.*data/README.md"):
        find_annotations(tmp_path)
    for name, says in (("data.yaml", "is no JSON; data/README.md shows the form"), ("data.json", "not a JSON file .*download it again")):
        (tmp_path / name).write_text("names: [dog]")
        with pytest.raises(UserError, match=f"{name}: {says}"):
            read_coco(tmp_path / name, tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="--ann-root .*nowhere: no such file or folder"):
        find_annotations(tmp_path / "nowhere")
    for name in ("ap10k-train-split1.json", "ap10k-train-split2.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="there are 2 .ap10k-train-split1.json.*name one file"):
        find_annotations(tmp_path)


def test_tasks_of_no_subset_are_not_left_out(tmp_path):
    """CVAT writes a project's tasks without a subset to default.json, and others under any name."""
    for subset in ("Train", "Validation"):
        (tmp_path / f"person_keypoints_{subset}.json").write_text("{}")
    for subset in ("default", "Batch3", "Train_2"):
        (more := tmp_path / f"person_keypoints_{subset}.json").write_text("{}")
        with pytest.raises(UserError, match=f"person_keypoints_{subset}.json: is of no split, beside person_keypoints_Train.json"):
            find_annotations(tmp_path)
        more.unlink()
    assert find_annotations(tmp_path)[1].name == "person_keypoints_Validation.json"


@pytest.mark.parametrize("folder", ["Annotations", "labels", "ann"])
def test_a_folder_of_annotations_of_another_name(tmp_path, folder):
    for name in ("train.json", "val.json"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_annotations(tmp_path)] == [f"{folder}/train.json", f"{folder}/val.json"]


def test_files_of_several_tasks_or_splits_are_named(tmp_path):
    for name in ("a/annotations/person_keypoints_default.json", "b/annotations/person_keypoints_default.json"):
        (tmp_path / "tasks" / name).parent.mkdir(parents=True)
        (tmp_path / "tasks" / name).touch()
    with pytest.raises(UserError, match=r"none, but deeper in it \(a/annotations/person_keypoints_default.json, b/.*json\)"):
        find_annotations(tmp_path / "tasks")
    for i, split in ((i, split) for i in (1, 2) for split in ("train", "val")):  # AP-10K
        (tmp_path / "ap10k/annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ap10k/annotations/ap10k-{split}-split{i}.json").touch()
    with pytest.raises(UserError, match="4 .ap10k-train-split1.json.*copy one as train.json"):
        find_annotations(tmp_path / "ap10k")


@pytest.mark.parametrize("begin", [b"PK\3\4", b"\x1f\x8b"])
def test_a_packed_file_is_to_be_unpacked(tmp_path, begin):
    (tmp_path / "export.zip").write_bytes(begin + b"\xff")
    with pytest.raises(UserError, match="export.zip: a packed file; unpack it"):
        read_coco(tmp_path / "export.zip", tmp_path)


# ---------------------------------------------------------------- data/README.md

def snippet(heading, arguments, monkeypatch, capsys):
    """Run the Python of a section of data/README.md, and return the COCO file that it prints."""
    text = (Path(__file__).parent.parent / "data/README.md").read_text()
    code = re.search(rf"### {heading}\n.*?```python\n(.*?)```", text, re.S)[1]
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    capsys.readouterr()
    exec(compile(code, heading, "exec"), {})
    return json.loads(capsys.readouterr().out)


def test_the_way_from_labelme(read, tmp_path, monkeypatch, capsys):
    for i in range(4):
        draw(tmp_path / f"a/pic_{i}.jpg")
        shapes = [{"label": name, "points": [[40 + 9 * j + 50 * g, 50 + 7 * j]], "shape_type": "point", "group_id": g}
                  for g in range(2) for j, name in enumerate(("left_eye", "nose", "right_eye")) if (i, j) != (2, 1)]
        shapes.append({"label": "dog", "points": [[1, 1], [90, 90]], "shape_type": "rectangle", "group_id": None})
        (tmp_path / f"a/pic_{i}.json").write_text(json.dumps({"shapes": shapes, "imagePath": f"pic_{i}.jpg"}))
    faces = read(snippet("labelme", [tmp_path], monkeypatch, capsys), "mine.json")
    assert faces.names == ["left_eye", "nose", "right_eye"] and faces.flip_pairs == [[0, 2]]
    assert faces.files == [f"a/pic_{i}.jpg" for i in range(4) for _ in range(2)] and len(faces.notes) == 3
    assert faces.points[3].tolist() == [[90, 50], [99, 57], [108, 64]] and faces.visible[4].tolist() == [2, 0, 2]
    (tmp_path / "a/pic_0.json").write_text(json.dumps({"shapes": [{**s, "group_id": None} for s in shapes], "imagePath": "pic_0.jpg"}))
    with pytest.raises(SystemExit, match="pic_0.json: a label is twice in one group"):
        snippet("labelme", [tmp_path], monkeypatch, capsys)


@pytest.mark.parametrize("animals", [0, 2])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("arena", [False, True])
def test_the_way_from_deeplabcut(read, tmp_path, monkeypatch, capsys, animals, columns, arena):
    parts, lead = ["nose", "left_ear", "right_ear"], [""] * (columns - 1)
    folder, who = tmp_path / "labeled-data/clip", [f"dog{i}" for i in range(animals)] or [""]
    rows = [["scorer", *lead, *["me"] * 6 * len(who)], ["individuals", *lead, *[w for w in who for _ in range(6)]],
            ["bodyparts", *lead, *[p for p in parts for _ in "xy"] * len(who)], ["coords", *lead, *"xy" * 3 * len(who)]]
    for i in range(3):
        draw(folder / f"img{i}.png")
        place = ["labeled-data", "clip", f"img{i}.png"]
        values = [str(v) for g in range(len(who)) for j in range(3) for v in (40 + 9 * j + 50 * g, 50 + 20 * j % 30)]
        values[2:4] = ["", ""] if i == 1 else values[2:4]
        rows.append([*(place if columns == 3 else ["\\".join(place)]), *values, *["5", "9"] * (arena and animals > 0)])
    if arena and animals:  # unique body parts, which DeepLabCut gives to "single"
        for row, text in zip(rows, (["me"] * 2, ["single"] * 2, ["corner"] * 2, ["x", "y"])):
            row += text
    (folder / "CollectedData_me.csv").write_text("\n".join(",".join(row) for row in rows if animals or row[0] != "individuals"))
    faces = read(snippet("DeepLabCut", [tmp_path], monkeypatch, capsys), "mine.json")
    assert faces.names == parts and faces.flip_pairs == [[1, 2]] and len(faces.files) == 3 * len(who)
    assert faces.files[0] == "labeled-data/clip/img0.png" and faces.points[-1, :, 0].tolist() == [
        v + 50 * (len(who) - 1) for v in (40, 49, 58)]
    assert faces.visible[len(who)].tolist() == [2, 0, 2] and (faces.sizes == (WIDTH, HEIGHT)).all()
    shutil.copy(folder / "CollectedData_me.csv", folder / "CollectedData_mewindows.csv")  # DeepLabCut's backup
    assert len(read(snippet("DeepLabCut", [tmp_path], monkeypatch, capsys), "mine.json").files) == 3 * len(who)
    later = (folder / "CollectedData_me.csv").read_text().replace("right_ear", "tail").replace("clip", "later")
    (tmp_path / "labeled-data/later").mkdir()  # a video with a body part that the first has not
    (tmp_path / "labeled-data/later/CollectedData_me.csv").write_text(later)
    shutil.copytree(folder, tmp_path / "labeled-data/later", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.csv"))
    faces = read(snippet("DeepLabCut", [tmp_path], monkeypatch, capsys), "mine.json")
    assert faces.names == [*parts, "tail"] and (faces.visible[-1] > 0).tolist() == [True, True, False, True]


def test_the_way_from_yolo(read, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.yaml").write_text("kpt_shape: [3, 3]\nflip_idx: [1, 0, 2]\nnames: {0: dog, 1: cat}\nkpt_names:\n"
                                        "  0: [left_eye, right_eye, nose]\n  1: [left_eye, right_eye, nose]\n")
    lines = ["0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.4 1 0.5 0.6 2", "1 0.3 0.5 0.4 0.4 0.2 0.4 2 0.4 0.4 2 0 0 0"]
    draw(tmp_path / "images/train/a/pic.jpg")
    exif = Image.Exif()
    exif[0x112] = 6
    draw(tmp_path / "images/train/turned.jpg", exif=exif)
    (tmp_path / "labels/train/a").mkdir(parents=True)
    (tmp_path / "labels/train/a/pic.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "labels/train/turned.txt").write_text(lines[0])
    ways = [tmp_path / "data.yaml", tmp_path / "images/train", tmp_path / "labels/train"]
    faces = read(snippet("YOLO", ways, monkeypatch, capsys), root=ways[1])
    assert faces.files == ["a/pic.jpg", "a/pic.jpg", "turned.jpg"] and faces.flip_pairs == [[0, 1]] and faces.breeds == ["dog", "cat", "dog"]
    assert faces.names == ["left_eye", "right_eye", "nose"] and faces.visible.tolist() == [[2, 1, 2], [2, 2, 0], [2, 1, 2]]
    assert np.allclose(faces.points[0], [[64, 48], [96, 48], [80, 72]]) and np.allclose(faces.boxes[0], [48, 36, 64, 48])
    assert np.allclose(faces.points[2], [[48, 64], [72, 64], [60, 96]]) and faces.notes == []
    (tmp_path / "data.yaml").write_text("kpt_shape: [3, 2]\nnames: [dog]\n")
    (tmp_path / "labels/train/turned.txt").write_text("0 0.5 0.5 0.4 0.4 0.4 0.4 0.6 0.4 0 0")
    with pytest.raises(SystemExit, match=r"pic.txt: a line does not hold 5 \+ 3 x 2 numbers"):
        snippet("YOLO", ways, monkeypatch, capsys)
    (tmp_path / "labels/train/a/pic.txt").unlink()
    assert read(snippet("YOLO", ways, monkeypatch, capsys), root=ways[1]).visible.tolist() == [[2, 2, 0]]
    (tmp_path / "labels/train/classes.txt").write_text("dog")
    (tmp_path / "images/train/turned.npy").touch()
    assert len(snippet("YOLO", ways, monkeypatch, capsys)["annotations"]) == 1
    (tmp_path / "labels/train/other.txt").touch()
    with pytest.raises(SystemExit, match="other.txt: no such picture"):
        snippet("YOLO", ways, monkeypatch, capsys)


@pytest.mark.parametrize("heading", ["labelme", "DeepLabCut", "YOLO"])
def test_a_way_from_nothing_ends_with_a_word(heading, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.yaml").write_text("kpt_shape: [3, 2]\nnames: [dog]\n")
    with pytest.raises(SystemExit, match="^no "):
        snippet(heading, [tmp_path / "data.yaml", tmp_path, tmp_path] if heading == "YOLO" else [tmp_path], monkeypatch, capsys)


def test_the_smallest_file_of_the_readme(read, tmp_path):
    text = (Path(__file__).parent.parent / "data/README.md").read_text()
    draw(tmp_path / "dogs/rex.jpg", (300, 200))
    faces = read(json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1]))
    assert faces.flip_pairs == [[0, 1]] and faces.sizes.tolist() == [[300, 200]] and faces.visible.tolist() == [[2, 2, 0]]
