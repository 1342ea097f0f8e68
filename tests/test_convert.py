"""The converter, on generated faces: each defect is repaired and counted, each bad file named in one line."""
import json
import os
import shlex
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from dataset import load_coco
from tools import convert_dogflw_to_coco as convert
from tools.lib.checkpoints import load_checkpoint
from tools.lib.cli import run_script
from tools.lib.files import find_dogflw
from tools.lib.find import BUNDLED

WIDTH, HEIGHT, FACES = 120, 90, {"train": 6, "test": 3}


def make(root, k=46):
    """A clean little data set in DogFLW's layout. Stems are n0_0, n0_1, ... and n1_0, ..."""
    rng = np.random.default_rng(k)
    for number, (split, count) in enumerate(FACES.items()):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            points = rng.uniform([30, 20], [90, 70], size=(k, 2)).round(2)
            box = np.concatenate([points.min(axis=0) - 6, points.max(axis=0) + 6]).round(2)
            label = {"landmarks": points.tolist(), "bounding_boxes": [str(v) for v in box]}
            write(root, split, f"n{number}_{i}", label)
            pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"n{number}_{i}.png")
    return root


def write(root, split, stem, label):
    raw = label if isinstance(label, bytes) else json.dumps(label).encode()
    (root / split / "labels" / f"{stem}.json").write_bytes(raw)


def read(root, stem="n0_2"):
    return json.loads((root / "train/labels" / f"{stem}.json").read_bytes())


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "DogFLW")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the script's edge in this process: exit code, stdout, stderr."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_dogflw_to_coco.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            run_script(convert.main)
        return (e.value.code or 0, *capsys.readouterr())
    return run


@pytest.fixture
def converted(run, root, tmp_path):
    """Convert `root`, which must work; returns {stem: (image, annotation)}, the category and stdout."""
    def converted(*flags):
        code, out, err = run("--dogflw_root", root, "--out_dir", tmp_path / "out", *flags)
        assert code == 0 and err == "", err
        faces = {}
        for name in ("train.json", "val.json"):
            coco = json.loads((tmp_path / "out" / name).read_text())
            pairs = zip(coco["images"], coco["annotations"], strict=True)
            faces |= {Path(i["file_name"]).stem: (i, a) for i, a in pairs}
            assert load_coco(tmp_path / "out" / name, root).notes == []  # training takes it as it is
        return faces, coco["categories"][0], out
    return converted


# ---------------------------------------------------------------- a clean set

def test_process_writes_valid_coco_twice_the_same(run, script, root, tmp_path):
    done = script("tools/convert_dogflw_to_coco.py", "--dogflw_root", root, "--out_dir", tmp_path / "a", check=True)
    assert done.stderr == ""
    assert "train: 6 faces of 46" in done.stdout and "test: 3 faces" in done.stdout
    assert "repaired" not in done.stdout
    hint = shlex.split(done.stdout.splitlines()[-1].split("train_simple.py")[1])
    assert hint == ["--data-root", str(root), "--ann-root", str(tmp_path / "a")]
    assert sorted(os.listdir(tmp_path / "a")) == ["train.json", "val.json"]
    assert run("--dogflw-root", root, "--out-dir", tmp_path / "b")[0] == 0  # in another process
    for name in ("train.json", "val.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    coco = COCO(tmp_path / "a/train.json")
    assert coco.getImgIds() == coco.getAnnIds() == [1, 2, 3, 4, 5, 6]
    assert coco.loadImgs([1]) == [
        {"id": 1, "file_name": "train/images/n0_0.png", "width": WIDTH, "height": HEIGHT, "breed": "n0"}]
    annotation, label = coco.loadAnns([3])[0], read(root)
    x1, y1, x2, y2 = map(float, label["bounding_boxes"])
    assert annotation["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])
    assert annotation["area"] == pytest.approx((x2 - x1) * (y2 - y1), abs=1e-2)
    triples = np.reshape(annotation["keypoints"], (46, 3))
    np.testing.assert_array_equal(triples[:, :2], label["landmarks"])
    assert (triples[:, 2] == 2).all() and annotation["num_keypoints"] == 46 and annotation["iscrowd"] == 0
    assert not {"repaired", "original_bbox"} & set(annotation)
    predictions = [{"image_id": a["image_id"], "category_id": 1, "keypoints": a["keypoints"], "score": 1.0}
                   for a in coco.loadAnns(coco.getAnnIds())]
    assert len(coco.loadRes(predictions).getAnnIds()) == 6


def test_scheme(converted):
    _, category, _ = converted()
    names, pairs = category["keypoints"], category["flip_pairs"]
    assert len(names) == len(set(names)) == 46 and category["interocular"] == [18, 19]
    assert pairs == [[i, i + 1] for i in [*range(0, 23, 2), 26, 28, 30, 33, 36, 39, 43]]
    for i, j in pairs:
        assert names[i].startswith("left_") and names[j] == names[i].replace("left_", "right_")
    assert names[18] == "left_eye_outer_corner" and names[25] == "nose_top" and names[42] == "chin"
    assert sorted(sum(category["regions"].values(), [])) == [*range(46)]
    partner = {a: b for i, j in pairs for a, b in ((i, j), (j, i))}
    for region in category["regions"].values():  # mirroring keeps regions, and the skeleton
        assert {partner.get(i, i) for i in region} == set(region)
    edges = {frozenset(e) for e in category["skeleton"]}
    assert {frozenset(partner.get(i - 1, i - 1) + 1 for i in e) for e in edges} == edges
    assert {i for e in edges for i in e} == set(range(1, 47)) and len(edges) == len(category["skeleton"])


def test_landmarks_are_those_of_the_model_in_the_box(converted):
    scheme, (_, category, _) = load_checkpoint(BUNDLED)["scheme"], converted()
    assert category["keypoints"] == scheme["names"] and all(category[key] == scheme[key] for key in ("regions", "flip_pairs"))


@pytest.mark.parametrize("k", [1, 5, 68])
def test_other_landmark_counts(run, tmp_path, k):
    root = make(tmp_path / "other", k)
    label = read(root)
    label["bounding_boxes"] = ["0", "0", "120", "90"]  # a few landmarks say little about the size of the face
    write(root, "train", "n0_2", label)
    code, out, _ = run("--dogflw_root", root, "--out_dir", tmp_path / "out")
    faces = load_coco(tmp_path / "out/train.json", root)
    assert code == 0 and f"6 faces of {k} landmarks" in out and "repaired" not in out
    assert faces.scheme.names[0] == "point_0" and faces.scheme.flip_pairs == [] and faces.scheme.regions == {}
    assert faces.points.shape == (6, k, 2) and faces.boxes[2].tolist() == [0, 0, 120, 90]


def test_catflws_flat_folders_become_train_alone(run, tmp_path):
    root = make(tmp_path / "CatFLW", 48)
    for kind in ("images", "labels"):
        (root / "train" / kind).rename(root / kind)
    shutil.rmtree(root / "test")
    (root / "train").rmdir()
    for path in (root / "labels").iterdir():
        label = json.loads(path.read_text())
        path.write_text(json.dumps({"labels": label["landmarks"], "bounding_boxes": label["bounding_boxes"]}))
    code, out, err = run("--dogflw_root", root, "--out_dir", tmp_path / "out")
    assert code == 0 and err == "" and "train: 6 faces of 48 landmarks" in out and "--holdout 0.1" in out.splitlines()[-1]
    assert os.listdir(tmp_path / "out") == ["train.json"]
    faces = load_coco(tmp_path / "out/train.json", root)
    assert faces.files[0] == "images/n0_0.png" and faces.breeds == [""] * 6 and faces.points.shape == (6, 48, 2)
    (tmp_path / "out/val.json").write_text("{}")
    one_line(*run("--dogflw_root", root, "--out_dir", tmp_path / "out"), "val.json", "--out_dir")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/train.json").write_text('{"categories": [{"name": "dog"}]}')
    one_line(*run("--dogflw_root", root, "--out_dir", tmp_path / "theirs"), "its train.json is not this converter's")
    corrected = {"info": {"description": "landmarks predicted by tools/predict.py"}, "images": [], "annotations": [],
                 "categories": [{"name": "face", "supercategory": "animal"}]}
    (tmp_path / "theirs/train.json").write_text(json.dumps(corrected))  # hours of work, in predict.py's file
    one_line(*run("--dogflw_root", root, "--out_dir", tmp_path / "theirs"), "its train.json is not this converter's")
    for split in ("train", "test"):
        (tmp_path / "whole" / split).mkdir(parents=True)
        os.symlink(root / "images", tmp_path / "whole" / split / "images")
    one_line(*run("--dogflw_root", tmp_path / "whole/train", "--out_dir", tmp_path / "out2"), "is a part of", "whole")
    for split in ("train", "test"):
        os.symlink(root / "labels", tmp_path / "whole" / split / "labels")
    one_line(*run("--dogflw_root", tmp_path / "whole", "--out_dir", tmp_path / "out2"), "images: is a link that leaves")
    (root / "images/n0_0.png").rename(tmp_path / "outside.png")
    (root / "images/n0_0.png").symlink_to(tmp_path / "outside.png")
    code, out, err = run("--dogflw_root", root, "--out_dir", tmp_path / "other")
    assert code == 2 and "is a link that leaves the data set" in err


# ---------------------------------------------------------------- defects that are mended

@pytest.mark.parametrize("box", [
    ["", "", "", ""], [], None, ["1", "2", "3"], ["50", "20", "40", "60"], ["5", "5", "5", "60"], ["a", "b", "c", "d"],
    ["nan", "0", "9", "9"], [float("nan"), 0, 9, 9], [float("inf")] * 4, [[1, 2], [3, 4]], {"x": 1}, "1 2 3 4", 7,
    [10**400, 0, 1, 1], [-1e30, -1e30, 1e30, 1e30], [True, False, True, True], ["1"] * 5000, ["9" * 5000] * 4,
    ["0", "0", "9", "9"], ["-900", "-900", "-800", "-800"], ["-500", "-500", "900", "900"],
], ids=lambda box: ascii(box)[:24])
def test_wrong_boxes_are_rebuilt(converted, root, box):
    label = read(root)
    label["bounding_boxes"] = box
    if box is None:
        del label["bounding_boxes"]
    write(root, "train", "n0_2", label)
    faces, _, out = converted()
    assert len(faces) == 9 and "repaired: 1 " in out and "n0_2" in out
    annotation = faces["n0_2"][1]
    low, high = np.min(label["landmarks"], axis=0), np.max(label["landmarks"], axis=0)
    grown = np.concatenate([np.maximum(low - 0.1 * (high - low), 0),
                            np.minimum(high + 0.1 * (high - low), [WIDTH, HEIGHT])])
    x, y, w, h = annotation["bbox"]
    assert [x, y, x + w, y + h] == pytest.approx(grown, abs=2e-3) and annotation["repaired"] == ["box"]
    if isinstance(box, list) and len(box) == 4 and all(isinstance(v, str) and len(v) < 9 for v in box):
        assert annotation["original_bbox"] == box


def test_good_boxes_stay(converted, root):
    label, (low, high) = read(root), ([1, 1], [WIDTH, HEIGHT])
    boxes = {"n0_1": [0, 0, 100, 80], "n0_2": ["0", "0", "120", "90"], "n0_3": [-0.4, 0, 120.7, 90.2]}
    for stem, box in boxes.items():
        label["landmarks"] = np.linspace(low, np.multiply(high, 0.9), 46).tolist()
        write(root, "train", stem, {**label, "bounding_boxes": box})
    faces, _, out = converted()
    assert "repaired" not in out
    for stem, box in boxes.items():
        x1, y1, x2, y2 = map(float, box)
        assert faces[stem][1]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])


def test_overlap_of_three_tenths_divides(converted, root):
    points = np.linspace([20, 10], [40, 30], 46).tolist()
    for stem, width in (("n0_1", 20 / 0.31), ("n0_2", 20 / 0.29)):
        write(root, "train", stem, {"landmarks": points, "bounding_boxes": [20, 10, 20 + width, 30]})
    faces, _, _ = converted()
    assert "repaired" not in faces["n0_1"][1] and faces["n0_2"][1]["repaired"] == ["box"]


def test_missing_landmarks_get_v_0_and_outside_ones_v_1(converted, root):
    label = read(root)
    missing = [[float("nan"), 3], None, [], ["", ""], [None, None], ["nan", "5"], [float("inf"), 1]]
    label["landmarks"][10:10 + len(missing)] = missing
    label["landmarks"][40:43] = [[-3, 20], [60, HEIGHT - 0.4], [WIDTH - 0.6, 20]]
    label["landmarks"][43] = ["61.5", "40"]
    label["labels"] = label.pop("landmarks")  # the name in the data set's README
    label["bounding_boxes"] = ["-4", "10", "118", "90"]
    write(root, "train", "n0_2", label)
    faces, _, out = converted()
    annotation = faces["n0_2"][1]
    triples = np.reshape(annotation["keypoints"], (46, 3))
    assert (triples[10:17] == 0).all() and (triples[:, 2] == 0).sum() == 7 and annotation["num_keypoints"] == 39
    assert triples[40:44].tolist() == [[-3, 20, 1], [60, HEIGHT - 0.4, 1], [WIDTH - 0.6, 20, 2], [61.5, 40, 2]]
    assert annotation["repaired"] == ["landmarks"] and "1 faces with missing landmarks" in out


def test_few_landmarks_keep_a_wide_box_but_not_one_elsewhere(converted, root):
    label = read(root)
    label["landmarks"] = [None] * 44 + [[60, 40], [64, 42]]
    write(root, "train", "n0_1", {**label, "bounding_boxes": [20, 10, 90, 80]})
    write(root, "train", "n0_2", {**label, "bounding_boxes": [1, 1, 9, 9]})
    write(root, "train", "n0_3", {"landmarks": [None] * 45 + [[-0.4, HEIGHT - 0.6]]})  # a box in the picture's corner
    faces, _, _ = converted()
    assert faces["n0_1"][1]["repaired"] == ["landmarks"] and faces["n0_1"][1]["bbox"] == [20, 10, 70, 70]
    assert faces["n0_2"][1]["repaired"] == ["box", "landmarks"]
    x, y, w, h = faces["n0_3"][1]["bbox"]
    assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= WIDTH and y + h <= HEIGHT


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_are_read(converted, root, encoding):
    write(root, "train", "n0_2", json.dumps(read(root)).encode(encoding))
    assert len(converted()[0]) == 9


def test_odd_but_good_pictures(converted, root):
    images, picture = root / "train/images", Image.new("RGB", (WIDTH, HEIGHT))
    exif = Image.Exif()
    exif[0x112] = 6
    turned = Image.new("RGB", (HEIGHT, WIDTH))
    turned.save(images / "n0_0.png", exif=exif)
    turned.save(images / "n0_1.png", format="JPEG", exif=exif)  # content counts, not the suffix
    picture.convert("CMYK").save(images / "n0_2.jpg")
    (images / "n0_2.png").unlink()
    picture.save(images / "n0_3.png", save_all=True, append_images=[picture.copy()])  # animated
    (images / "n0_4.png").write_bytes((images / "n0_4.png").read_bytes() + b"trailing")
    picture.convert("P").save(images / "n0_5.png")
    (images / ".DS_Store").write_bytes(b"x")
    (images / "._n0_5.png").write_bytes(b"x")
    faces, _, _ = converted()
    assert len(faces) == 9 and {(i["width"], i["height"]) for i, _ in faces.values()} == {(WIDTH, HEIGHT)}
    assert faces["n0_2"][0]["file_name"] == "train/images/n0_2.jpg"


# ---------------------------------------------------------------- bad files: named, exit 2, left out by --skip-bad

def png(width, height, *chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


def label_with(**changes):
    return lambda root: write(root, "train", "n0_2", {**read(root), **changes})


def label_raw(raw):
    return lambda root: write(root, "train", "n0_2", raw)


def label_from(change):
    return lambda root: write(root, "train", "n0_2", change((root / "train/labels/n0_2.json").read_bytes()))


def image_raw(change):
    def defect(root):
        path = root / "train/images/n0_2.png"
        path.write_bytes(change(path.read_bytes()))
    return defect


def link(target, kind="labels/n0_2.json"):
    def defect(root):
        path = root / "train" / kind
        path.unlink()
        path.symlink_to(target if target != "outside" else make(root.parent / "outside") / "train" / kind)
    return defect


def huge_label(root):
    with open(root / "train/labels/n0_2.json", "r+b") as f:
        f.truncate(100_000_000)  # sparse: takes no disk


def folder_for(name):
    def defect(root):
        (root / "train" / name).unlink()
        (root / "train" / name).mkdir()
    return defect


def pipe(root):
    (root / "train/labels/n0_2.json").unlink()
    os.mkfifo(root / "train/labels/n0_2.json")


def no_utf8(root):
    try:
        Path(os.fsdecode(os.fsencode(root) + b"/train/images/\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")


def jpeg_cut(root):
    path = root / "train/images/n0_2.png"
    Image.open(path).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-400])


POINTS = [[50.0, 40.0]] * 46
BAD = {
    "no label": (lambda root: (root / "train/labels/n0_2.json").unlink(), "n0_2.png has no label"),
    "no picture": (lambda root: (root / "train/images/n0_2.png").unlink(), "n0_2.json has no picture"),
    "empty label": (label_raw(b""), "is not JSON"),
    "cut label": (label_from(lambda raw: raw[:100]), "is not JSON"),
    "latin-1": (label_raw(b'{"landmarks": "\xe9"}'), "is not JSON"),
    "binary": (label_raw(bytes(range(256))), "is not JSON"),
    "list": (label_raw(b"[]"), "has no list of landmarks"),
    "null": (label_raw(b"null"), "has no list of landmarks"),
    "nested": (label_raw(b"[" * 200_000), "is nested too deeply"),
    "key twice": (label_from(lambda raw: b'{"landmarks": [], ' + raw[1:]), "uses a key twice"),
    "100 MB": (huge_label, "is larger than 10 MB"),
    "long number": (label_raw(b'{"landmarks": [[' + b"9" * 5000 + b", 1]]}"), "integer string conversion"),
    "too few": (label_with(landmarks=POINTS[:45]), "has 45 landmarks, most have 46"),
    "too many": (label_with(landmarks=POINTS * 30), "has no list of landmarks"),
    "none": (label_with(landmarks=[]), "has no list of landmarks"),
    "flat": (label_with(landmarks=[1.0] * 92), "is not a pair"),
    "triples": (label_with(landmarks=[[1, 2, 3]] * 46), "is not a pair"),
    "word": (label_with(landmarks=[["a", 1]] * 46), "holds 'a'"),
    "true": (label_with(landmarks=[[True, 1]] * 46), "holds True"),
    "object": (label_with(landmarks=[[{}, 1]] * 46), "holds {}"),
    "overflow": (label_with(landmarks=[[10**400, 1]] * 46), "no coordinate"),
    "absurd": (label_with(landmarks=POINTS[:45] + [[1e7, 1]]), "holds 10000000.0"),
    "far": (label_with(landmarks=POINTS[:45] + [[2.1 * WIDTH, 1]]), "far outside"),
    "all missing": (label_with(landmarks=[[None, None]] * 46), "has no landmark in the picture"),
    "all outside": (label_with(landmarks=[[-5, -5]] * 46), "has no landmark in the picture"),
    "cut png": (image_raw(lambda raw: raw[:-100]), "cannot be read as a picture"),
    "half png": (image_raw(lambda raw: raw[:len(raw) // 2]), "cannot be read as a picture"),
    "png header": (image_raw(lambda raw: raw[:33]), "cannot be read as a picture"),
    "cut jpeg": (jpeg_cut, "cannot be read as a picture"),
    "empty picture": (image_raw(lambda raw: b""), "cannot be read as a picture"),
    "text picture": (image_raw(lambda raw: b"not a picture at all"), "cannot be read as a picture"),
    "zeros": (image_raw(lambda raw: bytes(100_000)), "cannot be read as a picture"),
    "postscript": (image_raw(lambda raw: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot be read"),
    "bomb": (image_raw(lambda raw: png(30_000, 30_000, (b"IDAT", b""))), "has too many pixels to decode at once"),
    "small bomb": (image_raw(lambda raw: png(65_536, 2, (b"IDAT", b""))), "65536 x 2 pixels is too large"),
    "1 x 1": (image_raw(lambda raw: png(1, 1, (b"IDAT", zlib.compress(bytes(4))))), "far outside its 1 x 1 picture"),
    "link out": (link("outside"), "is a link that leaves the data set"),
    "picture link out": (link("outside", "images/n0_2.png"), "is a link that leaves the data set"),
    "link up": (link("../../../../../../etc/passwd"), "is a link that leaves the data set"),
    "link loop": (link("n0_2.json"), "is not a file"),
    "dangling link": (link("nowhere.json"), "is not a file"),
    "folder": (folder_for("images/n0_2.png"), "is not a file"),
    "label folder": (folder_for("labels/n0_2.json"), "is not a file"),
    "pipe": (pipe, "is not a file"),
    "climbing name": (lambda root: (root / "train/images/..\\..\\x.png").write_bytes(b"x"),
                      "other systems cannot read"),
    "line break": (lambda root: (root / "train/labels/a\nb.json").write_bytes(b"x"), "other systems cannot read"),
    "no utf-8": (no_utf8, "other systems cannot read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(run, root, tmp_path, case):
    defect, why = BAD[case]
    defect(root)
    before = sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    code, out, err = run("--dogflw_root", root, "--out_dir", tmp_path / "out")
    lines = err.splitlines()
    assert code == 2 and out == "" and len(lines) == 2 and "1 bad files" in lines[0] and "--skip-bad" in lines[0], err
    assert why in lines[1] and lines[1].isprintable() and len(lines[1]) < 300, err
    assert sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before  # nothing written
    code, out, err = run("--dogflw_root", root, "--out_dir", tmp_path / "out", "--skip-bad")
    assert code == 0 and err == "" and "left out: 1 bad files" in out and why in out
    stems = [Path(f).stem for f in load_coco(tmp_path / "out/train.json", root).files]
    kept = case in ("climbing name", "line break", "no utf-8")  # a file too many, not a face that is bad
    assert stems == [f"n0_{i}" for i in range(6) if kept or i != 2]


def test_two_pictures_for_one_label(run, root, tmp_path):
    (root / "train/images/n0_2.jpg").write_bytes((root / "train/images/n0_2.png").read_bytes())
    code, out, _ = run("--dogflw_root", root, "--out_dir", tmp_path / "out", "--skip-bad")
    assert code == 0 and out.count("n0_2") == out.count("shares its stem") == 2 and "train: 5 faces" in out


def test_long_lists_are_cut(run, root, tmp_path):
    for i in range(30):
        (root / "test/images" / f"extra_{i:02}.png").write_bytes(b"")
    code, _, err = run("--dogflw_root", root, "--out_dir", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 22 and "30 bad files" in err and err.endswith("... and 10 more\n")


def test_no_face_left(run, root, tmp_path):
    for path in (root / "test/labels").iterdir():
        path.write_bytes(b"{}")
    code, out, err = run("--dogflw_root", root, "--out_dir", tmp_path / "out", "--skip-bad")
    assert code == 2 and "no usable face; 3 bad files" in err and out == "" and not (tmp_path / "out").exists()


def test_empty_folders(run, tmp_path):
    for name in ("train/images", "train/labels", "test/images", "test/labels"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    code, _, err = run("--dogflw_root", tmp_path / "empty", "--out_dir", tmp_path / "out")
    assert code == 2 and "train: no usable face" in err and err.count("\n") == 1


# ---------------------------------------------------------------- the command line

def one_line(code, out, err, *words):
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(w in err for w in words), err


def test_command_line_errors(run, root, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    out = ("--out_dir", tmp_path / "out")
    one_line(*run(), "--download", "--dogflw_root", "--sample")
    one_line(*run("--dogflw_root", tmp_path / "nowhere", *out), "nowhere", "--download", "--dogflw_root", "--sample")
    one_line(*run("--dogflw_root", root, "--download"), "--download", "--dogflw_root")
    one_line(*run("--no-such-flag"), "--no-such-flag")
    one_line(*run("--dogflw_root", tmp_path, *out), "train/images")
    (tmp_path / "file").write_text("")
    one_line(*run("--dogflw_root", root, "--out_dir", tmp_path / "file"), "file")
    one_line(*run("--dogflw_root", root, "--out_dir", "/proc/nowhere"), "/proc/nowhere")
    (root / "test").rename(root / "other")
    one_line(*run("--dogflw_root", root, *out), "test/images", "no such folder")


def test_the_cache_is_the_default(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    versions = tmp_path / "datasets/georgemartvel/dogflw/versions"
    (versions / "2/DogFLW/train/images").mkdir(parents=True)
    make(versions / "10/DogFLW")
    code, out, _ = run("--out_dir", tmp_path / "out")
    assert code == 0 and "6 faces" in out


def test_without_a_home_there_is_no_cache(monkeypatch):
    for name in ("HOME", "USERPROFILE", "KAGGLEHUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # as a container's user without a name
    assert find_dogflw() is None


def test_download(run, root, tmp_path, monkeypatch):
    class Hub:
        def dataset_download(self, handle):
            assert handle == "georgemartvel/dogflw"
            return str(root.parent)
    monkeypatch.setitem(sys.modules, "kagglehub", Hub())
    code, out, _ = run("--download", "--out_dir", tmp_path / "out")
    assert code == 0 and "6 + 3 faces were downloaded" in out and "3855 + 480" in out and "train: 6 faces" in out
    (root / "test/labels/n1_0.json").unlink()
    one_line(*run("--download", "--out_dir", tmp_path / "out"), "incomplete", "6 + 3 pictures, 8 labels")
    monkeypatch.setattr(Hub, "dataset_download", lambda *_: 1 / 0)
    one_line(*run("--download", "--out_dir", tmp_path / "out"), "could not be downloaded", "division", "--dogflw_root")
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    one_line(*run("--download", "--out_dir", tmp_path / "out"), "kagglehub", "pass --dogflw_root")


# ---------------------------------------------------------------- fuzz

NUMBERS = st.one_of(st.floats(), st.floats(-300, 300), st.integers(), st.integers(-50, 250), st.just(10**400),
                    st.sampled_from(["", "nan", "12.5", "-inf", "1e999", "x", None, True, [], {}, "\ud800"]))
POINT = st.one_of(st.tuples(st.floats(0, 119), st.floats(0, 89)), st.lists(NUMBERS, max_size=3), NUMBERS)
JSON = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner))
LABELS = st.fixed_dictionaries({}, optional={
    "landmarks": st.lists(POINT, max_size=6) | JSON, "labels": st.lists(POINT, max_size=6) | JSON,
    "bounding_boxes": st.lists(NUMBERS, max_size=5) | JSON})


def survive(raw):
    """Bytes are refused with one short printable line, or become a face (True) that training accepts."""
    try:
        points, box, written = convert.parse_label(raw)
        assert points.ndim == 2 and points.shape[1] == 2 and (box is None or np.isfinite(box).all())
        (x, y, w, h), v, problem = convert.convert_face(points, box, WIDTH, HEIGHT)
    except ValueError as e:
        assert len(str(e)) < 250 and str(e).isprintable()
        return False
    assert w > 0 and h > 0 and np.isfinite([x, y, w, h]).all() and (v == 2).any()
    assert (np.isnan(points).any(axis=1) == (v == 0)).all()
    if problem:
        assert x >= 0 and y >= 0 and x + w <= WIDTH + 1e-6 and y + h <= HEIGHT + 1e-6
    json.dumps([points[v > 0].tolist(), written], allow_nan=False)
    return True


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(LABELS | JSON)
def test_fuzz_structures(label):
    survive(json.dumps(label).encode())


def test_fuzz_bytes():
    rng = np.random.default_rng(0)
    wholes = [json.dumps({"landmarks": rng.uniform(20, 80, (k, 2)).round(1).tolist(),
                          "bounding_boxes": ["15", "15", "85.5", "85"]}).encode() for k in (2, 46)]
    snippets = [b"NaN", b"Infinity", b"-1e9", b"1e999", b"null", b"true", b"[", b"]", b"}", b'"', b",", b"\xff",
                b"\\ud800", b"", b"9", b"-", b"0.", b'""']
    faces = 0
    for i in range(10_000):
        raw = bytearray(wholes[i % 2])
        for at in rng.integers(0, len(raw), rng.integers(1, 4)):
            raw[at:at + rng.integers(6)] = snippets[rng.integers(len(snippets))] * rng.integers(1, 3)
        faces += survive(bytes(raw[:rng.integers(len(raw))] if rng.random() < 0.1 else raw))
    assert 500 < faces < 9000  # both ways were taken often


@pytest.mark.parametrize("name", ["turned.tif", "turned.jpg", "turned.png"])
def test_the_size_of_a_turned_picture_is_the_one_seen(tmp_path, name):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (12, 9)).save(tmp_path / name, exif=exif)
    assert convert.picture_size(tmp_path / name) == (9, 12)


def test_fuzz_pictures(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.png"
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path, format=kind)
        whole = path.read_bytes()
        assert convert.picture_size(path) == (12, 9)
        for _ in range(100):
            raw = bytearray(whole)
            for at in rng.integers(0, len(raw), rng.integers(1, 5)):
                raw[at] = rng.integers(256)
            path.write_bytes(raw[:rng.integers(len(raw))] if rng.random() < 0.3 else raw)
            try:
                width, height = convert.picture_size(path)
                assert width > 0 and height > 0
            except ValueError as e:
                assert str(e).count("\n") == 0 and len(str(e)) < 120
