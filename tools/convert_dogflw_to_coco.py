"""Convert DogFLW to COCO keypoint files: OUT/train.json and OUT/val.json (val is DogFLW's `test`).

    uv run python tools/convert_dogflw_to_coco.py --download
    uv run python tools/convert_dogflw_to_coco.py --dogflw_root DogFLW --out_dir data/dogflw/annotations

Reads ROOT/{train,test}/{images/*.png,labels/*.json}, any number of landmarks; pictures are not decoded. Every face
comes through: a wrong box is rebuilt from the landmarks, a missing landmark gets v = 0, and `repaired` in the
annotation says so. What cannot be mended is listed, and nothing is written unless --skip-bad leaves it out.
"""
import json
import math
import os
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import MAX_PIXELS, ROOT, Parser, UserError, atomic_write, find_dogflw, run_script

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Named, because Pillow knows formats that are programs (EPS runs Ghostscript), and trusts content, not the suffix.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
DATASET, EXPECTED = "georgemartvel/dogflw", 4335
MAX_LABEL_BYTES, MAX_NUMBER, MAX_LANDMARKS, LISTED = 10_000_000, 1e6, 1000, 20

# A box is wrong when its IoU with the landmarks' hull is below 0.3. Of 3,806 boxes in the official train split 145
# are: 112 stick out of their picture by more than a pixel (no other box does), the other 33 were looked at and lie
# beside the face. The histogram has its valley there: 23 10 17 | 16 49 130 in steps of 0.05 from 0.15 to 0.45.
MIN_IOU = 0.3
# A rebuilt box is the hull and 10 % of it on each side: mean IoU 0.83 with the good boxes (16 % would give 0.87).
MARGIN = 0.1

# ---------------------------------------------------------------- DogFLW's 46 landmarks

# left and right are the picture's, so the left ear is the dog's right one. Even index = left, with few exceptions.
# The authors published no names. 43/44 are on the upper lip: in an open mouth they stay with 38, away from 41.
EAR = ["inner_base", "inner_edge_upper", "inner_edge_lower", "tip", "outer_edge_lower", "outer_edge_upper", "outer_base"]
PAIRED = {0: [f"ear_{part}" for part in EAR] + ["head_top", "eye_inner_corner", "eye_outer_corner", "eye_upper_lid",
                                                "eye_lower_lid"],
          26: ["nose_upper_edge", "muzzle_side", "cheek"], 33: ["nostril"], 36: ["whisker_pad"], 39: ["mouth_corner"],
          43: ["upper_lip_side"]}
MIDLINE = {24: "nose_bridge", 25: "nose_top", 32: "nose_between_nostrils", 35: "philtrum", 38: "upper_lip_center",
           41: "lower_lip_outer", 42: "chin", 45: "lower_lip_inner"}
FLIP_PAIRS = [[start + 2 * n, start + 2 * n + 1] for start, parts in PAIRED.items() for n in range(len(parts))]
REGIONS = {"ear": [*range(14)], "head": [14, 15, 30, 31], "eye": [*range(16, 24)],
           "nose": [24, 25, 26, 27, 32, 33, 34], "muzzle": [28, 29, 35, 36, 37], "mouth": [*range(38, 46)]}
OUTLINES = [[0, 2, 4, 6, 8, 10, 12, 0], [1, 3, 5, 7, 9, 11, 13, 1], [0, 14, 15, 1], [18, 20, 16, 22, 18],
            [19, 21, 17, 23, 19], [30, 28, 24, 29, 31], [24, 25], [25, 26, 33, 32, 34, 27, 25], [32, 35, 38],
            [36, 35, 37], [39, 43, 38, 44, 40, 41, 39], [45, 41, 42]]


def category(k):
    """The COCO category: DogFLW's scheme when there are 46 landmarks, else numbered points and nothing claimed."""
    if k != 46:
        return {"id": 1, "name": "dog_face", "supercategory": "animal", "skeleton": [],
                "keypoints": [f"point_{i}" for i in range(k)]}
    sides = {start + 2 * n + s: f"{side}_{part}" for start, parts in PAIRED.items() for n, part in enumerate(parts)
             for s, side in enumerate(("left", "right"))}
    edges = [[a + 1, b + 1] for line in OUTLINES for a, b in zip(line, line[1:])]  # one-based, as COCO has it
    return {"id": 1, "name": "dog_face", "supercategory": "animal", "skeleton": edges,
            "keypoints": [name for _, name in sorted({**sides, **MIDLINE}.items())],
            "flip_pairs": FLIP_PAIRS, "regions": REGIONS, "interocular": [18, 19]}


# ---------------------------------------------------------------- reading one file; ValueError says what is bad

def number(value):
    """A label's number, which may be a string; NaN where it is missing or not finite."""
    if value is None or value == "":
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("holds something that is not a number")
    try:
        value = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"holds {str(value)[:20]!r}, not a usable number") from None
    if abs(value) > MAX_NUMBER and math.isfinite(value):
        raise ValueError(f"holds {value:g}, which is no coordinate")
    return value if math.isfinite(value) else math.nan


def once(pairs):
    """A JSON object whose keys differ; Python would silently take the last of two."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("uses a key twice")
    return dict(pairs)


def parse_label(raw):
    """bytes -> points (K, 2) with NaN where not labelled, box [x1, y1, x2, y2] or None, the box as it was written."""
    try:
        label = json.loads(raw, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("is not JSON") from None
    points = label.get("landmarks", label.get("labels")) if isinstance(label, dict) else None
    if not isinstance(points, list) or not 0 < len(points) <= MAX_LANDMARKS:
        raise ValueError("has no list of landmarks")
    points = [[None, None] if p in (None, []) else p for p in points]
    if not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise ValueError("has a landmark that is not a pair of numbers")
    points = np.array([[number(x), number(y)] for x, y in points])
    points[np.isnan(points).any(axis=1)] = np.nan
    box = written = label.get("bounding_boxes")
    try:
        x1, y1, x2, y2 = box = [number(v) for v in box]
        box = box if x1 < x2 and y1 < y2 else None  # a NaN fails too; 0 is a value like any other
    except (TypeError, ValueError):
        box = None
    flat = isinstance(written, list) and len(written) <= 8 and not any(isinstance(v, (list, dict)) for v in written)
    return points, box, [str(v)[:40] for v in written] if flat else None


def png_chunks(f):
    """The chunk types of a PNG up to its end, or None when it has no end (cut off, or not a PNG)."""
    types, at, size = set(), 8, f.seek(0, os.SEEK_END)
    while at + 12 <= size:
        f.seek(at)
        length, kind = struct.unpack(">I4s", f.read(8))
        types.add(kind)
        at += 12 + length
        if kind == b"IEND":
            return types if at <= size else None
    return None


def picture_size(path):
    """(width, height) as shown: turned by the EXIF tag, as dataset.read_image does. From the header where possible."""
    with warnings.catch_warnings(), open(path, "rb", buffering=0) as f:
        warnings.simplefilter("ignore")  # Pillow's remarks about odd but readable files
        chunks = png_chunks(f)
        f.seek(-2, os.SEEK_END) if f.tell() > 2 else None
        ends = f.read(2) == b"\xff\xd9"
        f.seek(0)
        try:
            with Image.open(f, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS or max(width, height) >= 1 << 16:
                    raise ValueError(f"{width} x {height} pixels is too large")
                if not (chunks if image.format == "PNG" else ends and image.format in ("JPEG", "MPO")):
                    image.load()  # no end where it should be: only decoding tells
                if chunks and not chunks & {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}:
                    return width, height  # getexif() would decode a PNG
                return (height, width) if image.getexif().get(0x112, 1) in (5, 6, 7, 8) else (width, height)
        except Exception as e:  # Pillow's parsers raise nearly anything on damaged files
            raise ValueError(f"cannot be read as a picture ({' '.join(str(e).split())[:70]})") from None


def convert_face(points, box, width, height):
    """Points and box -> annotation fields, and why the box was rebuilt ("empty", "mismatched") or None."""
    labelled = ~np.isnan(points[:, 0])
    found = points[labelled]
    size = np.array([width, height])
    if (found < -size).any() or (found > 2 * size).any():
        raise ValueError(f"has landmarks far outside its {width} x {height} picture")
    # integer (x, y) is a pixel's centre, so the picture reaches from -0.5 to size - 0.5
    inside = ((found >= -0.5) & (found < size - 0.5)).all(axis=1)
    if not inside.any():
        raise ValueError("has no landmark in the picture")
    low, high = found.min(axis=0), found.max(axis=0)
    grow = np.maximum(1 - (high - low), 0) / 2  # a single point or a line still has a hull
    low, high, problem = low - grow, high + grow, None if box else "empty"
    if box:
        hull, shared = (high - low).prod(), np.maximum(np.minimum(high, box[2:]) - np.maximum(low, box[:2]), 0).prod()
        # With few landmarks the hull is smaller than the face: then the box must cover it, and may be larger.
        whole = len(points) == 46 and 2 * len(found) > 46
        union = hull + (box[2] - box[0]) * (box[3] - box[1]) - shared if whole else hull
        problem = "mismatched" if shared < MIN_IOU * union else None
    if problem:
        margin = MARGIN * (high - low)
        box = [*np.maximum(low - margin, 0), *np.minimum(high + margin, size)]
    x, y, w, h = (round(float(v), 3) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1]))
    v = np.zeros(len(points), dtype=int)
    v[labelled] = np.where(inside, 2, 1)
    triples = [[float(px), float(py), int(pv)] if pv else [0, 0, 0] for (px, py), pv in zip(points, v)]
    return {"bbox": [x, y, w, h], "area": round(w * h, 3), "iscrowd": 0, "keypoints": sum(triples, []),
            "num_keypoints": int(labelled.sum())}, problem


# ---------------------------------------------------------------- the data set

def listing(folder, suffixes, bad):
    """{stem: path} of a folder's files. Names and links that leave the folder, and twins, go to `bad`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; DogFLW has train and test, each with images and labels")
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        real = Path(os.path.realpath(path))  # unlike resolve(), survives a loop of links
        if not path.name.isprintable() or "\\" in path.name:
            bad.append((path, "has a name that other systems cannot read"))
        elif path.is_symlink() and not real.is_relative_to(os.path.realpath(folder.parent.parent)):
            bad.append((path, "is a link that leaves the data set"))
        elif not os.path.isfile(real):
            bad.append((path, "is not a file"))
        elif path.stem in files:
            bad.append((path, f"has the same stem as {files[path.stem].name}"))
        else:
            files[path.stem] = path
    return files


def read_split(root, split, bad):
    """[(stem, picture path, width, height, points, box, written box)]; what cannot be read goes to `bad`."""
    images, labels = (listing(root / split / kind, suffixes, bad) for kind, suffixes in
                      (("images", PICTURES), ("labels", (".json",))))
    named = {path.stem for path, _ in bad}  # one line a face
    bad += [(images[s], "has no label") for s in images.keys() - labels.keys() - named]
    bad += [(labels[s], "has no picture") for s in labels.keys() - images.keys() - named]
    faces = []
    for stem in sorted(images.keys() & labels.keys()):
        path = labels[stem]
        try:
            if path.stat().st_size > MAX_LABEL_BYTES:
                raise ValueError("is larger than 10 MB")
            label = parse_label(path.read_bytes())
            path = images[stem]
            faces.append((stem, path, *picture_size(path), *label))
        except ValueError as e:
            bad.append((path, str(e)))
        except OSError as e:
            bad.append((path, f"cannot be read ({e.strerror})"))
    return faces


def build(faces, k, root, split, bad, repairs):
    """One COCO dictionary. Adds to `repairs` {kind: [stem, ...]} and to `bad`."""
    images, annotations = [], []
    for stem, path, width, height, points, box, written in faces:
        label = root / split / "labels" / f"{stem}.json"
        if len(points) != k:
            bad.append((label, f"has {len(points)} landmarks, most have {k}"))
            continue
        try:
            fields, problem = convert_face(points, box, width, height)
        except ValueError as e:
            bad.append((label, str(e)))
            continue
        number = len(images) + 1
        images.append({"id": number, "file_name": f"{split}/images/{path.name}", "width": width, "height": height,
                       **({"breed": stem.split("_")[0]} if "_" in stem else {})})  # Stanford Dogs' n02085620_1073
        marks = (["box"] if problem else []) + (["landmarks"] if fields["num_keypoints"] < k else [])
        annotations.append({"id": number, "image_id": number, "category_id": 1, **fields,
                            **({"repaired": marks} if marks else {}),
                            **({"original_bbox": written} if problem else {})})  # corners, as the label had them
        for kind in ([problem] if problem else []) + marks[bool(problem):]:
            repairs.setdefault(kind, []).append(stem)
    return {"images": images, "annotations": annotations, "categories": [category(k)]}


def shorten(items, limit, separator):
    """The first items and how many more there are."""
    more = [f"... and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def download():
    """Fetch DogFLW with kagglehub, check that it came whole, and return its root."""
    try:
        import kagglehub
    except ImportError:
        raise UserError("--download needs kagglehub: uv pip install kagglehub") from None
    try:
        folder = Path(kagglehub.dataset_download(DATASET))
    except Exception as e:  # whatever the network, Kaggle or the disk says
        raise UserError(f"the download of {DATASET} failed ({' '.join(str(e).split())[:150]}); try again, or fetch it "
                        f"from kaggle.com/datasets/{DATASET} and pass --dogflw_root") from None
    root = next((p.parent.parent for p in sorted(folder.glob("**/train/images"))), folder)
    images, labels = (sum(1 for s in ("train", "test") for _ in (root / s / kind).glob("*.*"))
                      for kind in ("images", "labels"))
    if images != labels or not images:
        raise UserError(f"{root}: the download is incomplete ({images} pictures, {labels} labels); delete it, try again")
    if images != EXPECTED:
        print(f"note: {images} pictures; DogFLW had {EXPECTED} when this was written")
    return root


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--dogflw_root", "--dogflw-root", type=Path, metavar="DIR",
                        help="folder that holds train and test (default: kagglehub's cache)")
    parser.add_argument("--out_dir", "--out-dir", type=Path, metavar="DIR", default=ROOT / "data/dogflw/annotations",
                        help="where train.json and val.json go (default: data/dogflw/annotations)")
    parser.add_argument("--download", action="store_true", help="fetch DogFLW with kagglehub first (into its cache)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be mended, instead of stopping")
    args = parser.parse_args()
    if args.download and args.dogflw_root:
        parser.error("--download puts DogFLW into kagglehub's cache; leave out --dogflw_root")
    root = download() if args.download else args.dogflw_root or find_dogflw()
    if root is None or not root.is_dir():
        raise UserError(f"{root or 'DogFLW'} not found; fetch it with --download, name its folder with --dogflw_root, "
                        "or do without: train_simple.py --sample")
    bad, repairs = [], {}
    splits = {split: read_split(root, split, bad) for split in ("train", "test")}
    counts = Counter(len(face[4]) for faces in splits.values() for face in faces)
    k = max(counts, key=lambda n: (counts[n], n == 46, n), default=46)
    cocos = {split: build(faces, k, root, split, bad, repairs) for split, faces in splits.items()}
    lines = shorten([f"{ascii(str(p))[1:-1]} {why}" for p, why in sorted(bad)], LISTED, "\n  ")
    if bad and not args.skip_bad:
        raise UserError(f"{len(bad)} bad files; mend them, or leave them out with --skip-bad:\n  {lines}")
    for split, coco in cocos.items():
        if not coco["images"]:
            raise UserError(f"{root / split}: no usable face" + (f"; bad files:\n  {lines}" if bad else ""))
    for (split, coco), name in zip(cocos.items(), ("train.json", "val.json")):
        with atomic_write(args.out_dir / name) as f:
            f.write(json.dumps(coco, allow_nan=False).encode())
        print(f"{split}: {len(coco['images'])} faces of {k} landmarks -> {args.out_dir / name}")
    for kind, what in (("empty", "boxes that were empty or malformed, rebuilt from the landmarks"),
                       ("mismatched", f"boxes with IoU < {MIN_IOU} to the landmarks, rebuilt from them"),
                       ("landmarks", "faces with missing landmarks, which now have v = 0")):
        if kind in repairs:
            print(f"repaired {len(repairs[kind])} {what}: {shorten(repairs[kind], 4, ', ')}")
    if bad:
        print(f"left out {len(bad)} bad files:\n  {lines}")


if __name__ == "__main__":
    run_script(main)
