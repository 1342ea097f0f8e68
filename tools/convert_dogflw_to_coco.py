"""Convert DogFLW to COCO keypoint files: OUT/train.json and OUT/val.json (val is DogFLW's `test`).

    uv run tools/convert_dogflw_to_coco.py --download
    uv run tools/convert_dogflw_to_coco.py --dogflw_root DogFLW --out_dir data/dogflw/annotations

Reads ROOT/{train,test}/{images/*.png,labels/*.json}, with any number of landmarks; the pictures' sizes come
from their headers. CatFLW's ROOT/{images,labels} has no split: it becomes OUT/train.json only. Faces are
repaired, not dropped: a wrong box is rebuilt from the landmarks, a missing landmark gets v = 0; `repaired` in
the annotation says so. What cannot be repaired is listed; nothing is written unless --skip-bad leaves it out.
"""
import json
import math
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from tools.lib.cli import Parser, UserError, as_argument, is_text, run_script
from tools.lib.coco import MAX_LANDMARKS, MAX_NUMBER, MAX_SIDE, box_problem, hull_of, rebuilt_box, seen_size
from tools.lib.files import ROOT, atomic_write, data_root, find_dogflw, load_json
from tools.lib.pictures import read_picture
from tools.lib.windows import inside

DATASET, EXPECTED = "georgemartvel/dogflw", (3855, 480)
OUT = ROOT / "data/dogflw/annotations"
SUFFIXES = {"images": (".png", ".jpg", ".jpeg", ".webp", ".bmp"), "labels": (".json",)}
MAX_LABEL_BYTES, LISTED = 10_000_000, 20
SPLITS = {"train": "train.json", "test": "val.json"}

# DogFLW's 46 landmarks in order; "/" marks a pair, left first: left in the picture, the dog's right side.
# The authors published no names. upper_lip_side (43, 44) belongs to the upper lip: in an open mouth it stays
# close to 38, away from 41.
PARTS = """ear_inner_base/ ear_inner_edge_upper/ ear_inner_edge_lower/ ear_tip/ ear_outer_edge_lower/
    ear_outer_edge_upper/ ear_outer_base/ head_top/ eye_inner_corner/ eye_outer_corner/ eye_upper_lid/
    eye_lower_lid/ nose_bridge nose_top nose_upper_edge/ muzzle_side/ cheek/ nose_between_nostrils nostril/
    philtrum whisker_pad/ upper_lip_center mouth_corner/ lower_lip_outer chin upper_lip_side/
    lower_lip_inner""".split()
NAMES = [side + part.strip("/") for part in PARTS for side in (("left_", "right_") if "/" in part else ("",))]
FLIP_PAIRS = [[i, i + 1] for i, name in enumerate(NAMES) if name.startswith("left_")]
REGIONS = {"ear": [*range(14)], "head": [14, 15, 30, 31], "eye": [*range(16, 24)],
           "nose": [24, 25, 26, 27, 32, 33, 34], "muzzle": [28, 29, 35, 36, 37], "mouth": [*range(38, 46)]}
LINES = [[0, 2, 4, 6, 8, 10, 12, 0], [1, 3, 5, 7, 9, 11, 13, 1], [0, 14, 15, 1], [18, 20, 16, 22, 18],
         [19, 21, 17, 23, 19], [30, 28, 24, 29, 31], [24, 25], [25, 26, 33, 32, 34, 27, 25], [32, 35, 38],
         [36, 35, 37], [39, 43, 38, 44, 40, 41, 39], [45, 41, 42]]


def category(k: int) -> dict:
    """The COCO category: for 46 landmarks DogFLW's scheme, else numbered points without pairs or regions."""
    base = {"id": 1, "name": "dog_face" if k == 46 else "face", "supercategory": "animal"}
    if k != 46:
        return {**base, "keypoints": [f"point_{i}" for i in range(k)], "skeleton": []}
    skeleton = [[a + 1, b + 1] for line in LINES for a, b in pairwise(line)]  # one-based, as COCO has it
    return {**base, "keypoints": NAMES, "skeleton": skeleton, "flip_pairs": FLIP_PAIRS, "regions": REGIONS,
            "interocular": [18, 19]}


# ---------------------------------------------------------------- one face; ValueError says what is bad

def number(value: object) -> float:
    """A label's number, which may be a string; NaN where it is missing or not finite."""
    if value in (None, ""):
        return math.nan
    try:
        x = float(value) if type(value) in (int, float, str) else None
    except (ValueError, OverflowError):
        x = None
    if x is None or math.isfinite(x) and abs(x) > MAX_NUMBER:
        raise ValueError(f"holds {ascii(value)[:24]}, which is no coordinate")
    return x if math.isfinite(x) else math.nan


def once(pairs: list) -> dict:
    """A JSON object, if no key occurs twice; Python would silently keep the last value."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("uses a key twice")
    return dict(pairs)


def parse_label(raw: bytes) -> tuple[np.ndarray, list | None, list | None]:
    """bytes -> points (K, 2), NaN where not labelled; box x, y, width, height or None; the box as written."""
    try:
        label = json.loads(raw, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("is not JSON") from None
    points = label.get("landmarks", label.get("labels")) if isinstance(label, dict) else None
    if not isinstance(points, list) or not 0 < len(points) <= MAX_LANDMARKS:
        raise ValueError("has no list of landmarks")
    points = [p or [None, None] for p in points]
    if not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise ValueError("has a landmark that is not a pair of numbers")
    points = np.array([[number(v) for v in p] for p in points])
    points[np.isnan(points).any(axis=1)] = np.nan
    written = label.get("bounding_boxes")
    flat = isinstance(written, list) and not any(isinstance(v, (list, dict)) for v in written)
    try:
        x1, y1, x2, y2 = (number(v) for v in written)
        box = [x1, y1, x2 - x1, y2 - y1] if x1 < x2 and y1 < y2 else None  # NaN fails too; 0 is a value
    except (TypeError, ValueError):
        box = None
    return points, box, [str(v)[:40] for v in written[:8]] if flat else None


def convert_face(points: np.ndarray, box: list | None, width: int,
                 height: int) -> tuple[list, np.ndarray, str | None]:
    """bbox, v (K,), and why the box was rebuilt: "empty" (or malformed), "mismatched", or None."""
    labelled, size = ~np.isnan(points[:, 0]), np.array([width, height])
    found = points[labelled]
    if (found < -size).any() or (found > 2 * size).any():
        raise ValueError(f"has landmarks far outside its {width} x {height} picture")
    shown = inside(found, size)
    if not shown.any():
        raise ValueError("has no landmark in the picture")
    v = np.zeros(len(points), dtype=int)
    v[labelled] = 1 + shown
    hull = hull_of(found)
    problem = box_problem(box, hull, spans=len(points) == 46 and len(found) > 23)
    return [round(float(n), 3) for n in (rebuilt_box(hull, size) if problem else box)], v, problem


def is_whole(path: Path) -> bool:
    """Whether a file is a complete PNG or JPEG, as far as that can be told without decoding it."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            image.verify()  # checks a PNG's chunks and their checksums, but nothing of a JPEG
            return image.format == "PNG" or path.read_bytes()[-2:] == b"\xff\xd9"
    except Exception:  # Pillow's parsers raise nearly anything on damaged files
        return False


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) as read_image gives them; decodes only what is not a complete PNG or JPEG."""
    size = seen_size(path) or (0, 0)
    if max(size) >= MAX_SIDE:
        raise ValueError(f"{size[0]} x {size[1]} pixels is too large")
    if 0 not in size and is_whole(path):
        return size
    try:
        return read_picture(path)[1]
    except UserError as e:
        raise ValueError(" ".join(str(e).removeprefix(f"{path}: ").split())) from None


# ---------------------------------------------------------------- the data set

def listing(folder: Path, root: Path, bad: list) -> dict[str, Path]:
    """{stem: path} of a folder's pictures or labels. Files that cannot be used go to `bad`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; DogFLW has train and test, each with images and labels, "
                        "CatFLW images and labels alone")
    root = os.path.realpath(root)
    if not Path(os.path.realpath(folder)).is_relative_to(root):
        raise UserError(f"{folder}: is a link that leaves {root}, which the trainer does not follow; "
                        "copy it there")
    paths = sorted(p for p in folder.iterdir()  # ._x.png: what macOS leaves on foreign disks
                   if p.suffix.lower() in SUFFIXES[folder.name] and not p.name.startswith("._"))
    files, stems = {}, Counter(path.stem for path in paths)
    for path in paths:
        if not is_text(path.name) or "\\" in path.name:
            bad.append((path, "has a name that other systems cannot read"))
        elif path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            bad.append((path, "is a link that leaves the data set"))
        elif not os.path.isfile(path):
            bad.append((path, "is not a file"))
        elif stems[path.stem] > 1:
            bad.append((path, "shares its stem with another file"))
        else:
            files[path.stem] = path
    return files


def read_split(folder: Path, root: Path, bad: list) -> list:
    """[(picture, label, (width, height), points, box, written box)]; what is unreadable goes to `bad`."""
    faces, odd = [], []
    images, labels = listing(folder / "images", root, odd), listing(folder / "labels", root, odd)
    named = {path.stem for path, _ in odd}  # one line a face is enough
    odd += [(images[stem], "has no label") for stem in images.keys() - labels.keys() - named]
    odd += [(labels[stem], "has no picture") for stem in labels.keys() - images.keys() - named]
    for stem in sorted(images.keys() & labels.keys()):
        path = labels[stem]
        try:
            if path.stat().st_size > MAX_LABEL_BYTES:
                raise ValueError("is larger than 10 MB")
            label = parse_label(path.read_bytes())
            path = images[stem]
            faces.append((path, labels[stem], picture_size(path), *label))
        except (ValueError, OSError) as e:
            odd.append((path, f"cannot be read ({e.strerror})" if isinstance(e, OSError) else str(e)))
    bad += odd
    return faces


def build(faces: list, k: int, root: Path, bad: list, repairs: dict[str, list]) -> dict:
    """The COCO file of one split. Adds unusable labels to `bad`, repaired ones' stems to `repairs`."""
    images, annotations = [], []
    for picture, label, (width, height), points, box, written in faces:
        try:
            if len(points) != k:
                raise ValueError(f"has {len(points)} landmarks, most have {k}")
            bbox, v, problem = convert_face(points, box, width, height)
        except ValueError as e:
            bad.append((label, str(e)))
            continue
        face_id, stem = len(images) + 1, picture.stem
        images.append({"id": face_id, "file_name": picture.relative_to(root).as_posix(), "width": width,
                       "height": height})
        if "_" in stem and picture.parent.parent != root:
            images[-1]["breed"] = stem.split("_")[0]  # Stanford Dogs' n02085620_1073
        triples = [[*xy, seen] if seen else [0, 0, 0]
                   for xy, seen in zip(points.tolist(), v.tolist(), strict=True)]
        face = {"id": face_id, "image_id": face_id, "category_id": 1, "bbox": bbox,
                "area": round(bbox[2] * bbox[3], 3), "iscrowd": 0, "keypoints": sum(triples, []),
                "num_keypoints": int((v > 0).sum())}
        if problem:
            face |= {"repaired": ["box"], "original_bbox": written}  # the label's corners, or null
            repairs[problem].append(stem)
        if not v.all():
            face["repaired"] = [*face.get("repaired", []), "landmarks"]
            repairs["landmarks"].append(stem)
        annotations.append(face)
    return {"images": images, "annotations": annotations, "categories": [category(k)]}


def first(items: list[str], limit: int, separator: str) -> str:
    """The first items, and how many more there are."""
    more = [f"... and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def download() -> Path:
    """Fetch DogFLW with kagglehub, check that it came whole, and return its folder."""
    try:
        import kagglehub

        folder = Path(kagglehub.dataset_download(DATASET))
    except Exception as e:  # whatever the network, Kaggle or the disk says
        raise UserError(f"{DATASET} could not be downloaded ({' '.join(str(e).split())[:150]}); try again, "
                        f"or fetch https://kaggle.com/datasets/{DATASET} and pass --dogflw_root") from None
    root = find_dogflw(folder) or folder
    train, test, labels = (len([*root.glob(f"{p}/[!.]*.*")])
                           for p in ("train/images", "test/images", "t*/labels"))
    if not train or not test or train + test != labels:
        raise UserError(f"{root}: the download is incomplete ({train} + {test} pictures, {labels} labels); "
                        "delete that folder and try again")
    if (train, test) != EXPECTED:
        print(f"note: {train} + {test} faces were downloaded; DogFLW had {EXPECTED[0]} + {EXPECTED[1]} when "
              "this was written")
    return root


def is_ours(path: Path) -> bool:
    """Whether a file is one that this converter wrote."""
    try:
        content, ours = load_json(path), [category(1), category(46)]
        made = content["categories"][0]
        return (content.keys() == {"images", "annotations", "categories"}  # predict.py's have "info", too
                and (made["name"], made["supercategory"]) in [(c["name"], c["supercategory"]) for c in ours])
    except (UserError, LookupError, TypeError):
        return False


def write(cocos: dict[str, dict], out: Path, k: int, repairs: dict[str, list]) -> None:
    """Write the files of {split: COCO} and say what is in them and what was repaired."""
    if len(cocos) == 1 and (out / SPLITS["test"]).exists():
        raise UserError(f"--out_dir {out}: its {SPLITS['test']} is of another data set; name another folder")
    for name in SPLITS.values():
        if (out / name).exists() and not is_ours(out / name):
            raise UserError(f"--out_dir {out}: its {name} is not this converter's; name another folder")
    for split, coco in cocos.items():
        path = out / SPLITS[split]
        atomic_write(path, [json.dumps(coco, allow_nan=False).encode()])
        print(f"{split}: {len(coco['images'])} faces of {k} landmarks -> {path}")
    for kind, what in {"empty": "empty or malformed boxes, rebuilt from the landmarks",
                       "mismatched": "boxes away from their landmarks, rebuilt from them",
                       "landmarks": "faces with missing landmarks, which now have v = 0"}.items():
        if repairs[kind]:
            print(f"repaired: {len(repairs[kind])} {what} ({first(repairs[kind], 3, ', ')})")


def convert(root: Path, out: Path, skip_bad: bool) -> None:
    """Convert the data set in `root`, and say what was done. Raises UserError; then nothing is written."""
    bad, repairs = [], {"empty": [], "mismatched": [], "landmarks": []}
    flat = (root / "images").is_dir() and not (root / "train").exists()
    whole = root.resolve().parent
    if flat and all((whole / split / "images").is_dir() for split in SPLITS):
        raise UserError(f"--dogflw_root {root}: is a part of {whole}; name that folder")
    folders = {"train": root} if flat else {split: root / split for split in SPLITS}
    splits = {split: read_split(folder, root, bad) for split, folder in folders.items()}
    counts = Counter(len(face[3]) for faces in splits.values() for face in faces)
    k = max(counts, key=lambda n: (counts[n], n == 46, n), default=46)
    cocos = {split: build(faces, k, root, bad, repairs) for split, faces in splits.items()}
    named = [f"{ascii(str(path))[1:-1]} {why}" for path, why in sorted(bad)]
    lines = f"{len(bad)} bad files:\n  " + first(named, LISTED, "\n  ")
    if bad and not skip_bad:
        raise UserError(f"nothing was written; repair these, or leave them out with --skip-bad. {lines}")
    for split, coco in cocos.items():
        if not coco["images"]:
            raise UserError(f"{folders[split]}: no usable face" + (f"; {lines}" if bad else ""))
    write(cocos, out, k, repairs)
    if bad:
        print(f"left out: {lines}")
    hints = (("--data-root", root, root != find_dogflw()), ("--ann-root", out, out != OUT),
             ("--holdout", 0.1, flat))
    if needed := [f" {flag} {as_argument(value)}" for flag, value, needs in hints if needs]:
        print(f"train with: python train_simple.py{''.join(needed)}")


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--dogflw_root", "--dogflw-root", type=Path, metavar="DIR",
        help="folder that holds train and test, or images and labels (default: kagglehub's cache)")
    add("--out_dir", "--out-dir", "--out", type=Path, metavar="DIR", default=OUT,
        help="where train.json and val.json go, in place of older ones (default: data/dogflw/annotations)")
    add("--download", action="store_true", help="fetch DogFLW with kagglehub first, into its cache")
    add("--skip-bad", action="store_true", help="leave out what cannot be mended, instead of stopping")
    args = parser.parse_args()
    if args.download and args.dogflw_root:
        parser.error("--download puts DogFLW into kagglehub's cache; leave out --dogflw_root")
    root = download() if args.download else data_root(args.dogflw_root, "--dogflw_root")
    convert(root, args.out_dir, args.skip_bad)


if __name__ == "__main__":
    run_script(main)
