"""Reading COCO keypoint files from any program: what is read, repaired and left out, and how often.

`find_annotations` finds an export's files, `read_coco` reads one, `checked_scheme` checks a category.
Deviations whose meaning is clear are read as they are meant, counted by kind (KINDS) and reported, one line
per group. Anything unclear is refused with a single UserError that names the file, the entry and what is
wrong.
"""
import os
import posixpath
import re
import struct
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain, compress, count, islice, product
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from tools.lib.boxes import TIGHT, intersections, overlaps, room_of
from tools.lib.cli import UserError, is_text, printable
from tools.lib.files import TABLES, load_json, picture_path
from tools.lib.pictures import FORMATS, orientation, read_picture

MAX_LANDMARKS, MAX_NUMBER, MAX_SIDE = 1000, 1e6, 1 << 16  # of a category; a coordinate, a side in pixels
# A box is taken for wrong if its IoU with the landmarks' hull is below 0.3. This holds for 145 of the 3,806
# boxes in DogFLW's official train split: 112 stick out of their picture by more than a pixel (no other box
# does); the other 33 were inspected and lie beside the face. The histogram of the IoU has its valley there:
# 23 10 17 | 16 49 130 in bins of 0.05 from 0.15 to 0.45.
MIN_IOU = 0.3
# Where the landmarks may not span the face, a box is also right if it covers this share of their hull,
# however large it is. This rule still finds 92 of DogFLW's 145 wrong boxes, and takes none of the 3,661
# right ones for wrong.
COVERED = 0.7

# Other programs' JSON that is easily mistaken for COCO: the keys that mark it, what it is, and what to do.
FOREIGN = (
    ({"shapes", "imagePath"}, "a file of labelme; data/README.md has the way from there"),
    ({"data", "annotations"}, "Label Studio's own JSON; data/README.md has the way from there"),
    ({"image_id", "keypoints"}, "a list of predictions; name the file whose pictures they are of"),
    ({"_via_img_metadata"}, "a project of VIA; write the form that data/README.md shows from it"))
# What a file may hold besides plain faces: (group, description). Each is counted, with one example.
KINDS = {
    "boxes": ("left out", "without landmarks"),
    "others": ("left out", "of another category"),
    "crowds": ("left out", "marked iscrowd"),
    "unlabelled": ("left out", "with no landmark labelled"),
    "away": ("left out", "with no landmark in their picture"),
    "orphans": ("left out", "of an image that is not in the file"),
    "copies": ("left out", "given twice"),
    "unannotated": ("beside the faces", "pictures without an annotation"),
    "empty": ("boxes rebuilt from the landmarks", "missing, flat or malformed"),
    "alone": ("boxes set to the whole picture", "with a single landmark, which gives no size; add a bbox"),
    "mismatched": ("boxes rebuilt from the landmarks", "away from them"),
    "scaled": ("boxes rebuilt from the landmarks", "in another scale"),
    "stretched": ("boxes rebuilt from the landmarks", "that reach to 0, 0 for landmarks not labelled"),
    "corners": ("read otherwise", "boxes as x1 y1 x2 y2"),
    "nowhere": ("read otherwise", "landmarks without a place (NaN, -1, 0, far away) as not labelled"),
    "padded": ("read otherwise", "faces with zeros behind their landmarks"),
    "pairs": ("read otherwise", "faces' landmarks as x and y alone"),
    "renumbered": ("read otherwise", "duplicate annotation ids, with a number appended"),
    "zeros": ("read as they are", "landmarks with a place, but v 0, as not labelled"),
    "confidences": ("read otherwise", "faces' v as confidences, labelled where above 0"),
    "fractions": ("read otherwise", "faces' landmarks as fractions of the picture's sides"),
    "outside": ("read otherwise", "names outside the data root, by the end of their paths"),
    "spelt": ("read otherwise", "names that differ from the files' in spelling, or by a missing or extra "
              "folder"),
    "sizes": ("read otherwise", "sizes from the pictures themselves"),
    "turned": ("read otherwise", "faces of pictures that EXIF turns, turned with them"),
    "upright": ("read otherwise", "sizes of pictures that EXIF turns; the landmarks are upright already"),
    "beyond": ("look at them with tools/visualize_dataset.py", "landmarks marked as visible, but outside of "
               "their picture; were the pictures resized, and not the labels?"),
}


class Notes:
    """Deviations found in a file: sentences (`said`), and counts of KINDS with the first example of each."""

    def __init__(self):
        self.said, self.counts, self.examples = [], Counter(), {}

    def add(self, kind: str, example: str, number: int = 1):
        """Count `number` things of a kind."""
        self.counts[kind] += number
        self.examples.setdefault(kind, printable(example)[:60])

    def lines(self) -> list[str]:
        """All notes: one line per sentence, and one per group."""
        groups = defaultdict(list)
        for kind, (group, text) in KINDS.items():
            if number := self.counts[kind]:
                groups[group].append(f"{number} {text} ({self.examples[kind]})")
        return [*self.said, *(f"{group}: {', '.join(parts)}" for group, parts in groups.items())]

    def nothing_left(self, path: Path) -> UserError:
        """The error for a file in which no usable face is left; it lists all that was left out."""
        return UserError(f"{path}: no face in it can be used ({'; '.join(self.lines())}); export it again")


def read_coco(path: Path | str, root: Path | str, category: str | int | None = None) -> tuple[dict, dict]:
    """Read a COCO keypoint file with pictures in `root`. Returns fields of Scheme and of Faces (dataset.py).

    category: name or id of the category to train on, needed only where several have different landmarks.
    Coordinates are in pixels of the pictures as they are seen (EXIF applied). Raises UserError naming the
    file, the entry and what is wrong.
    """
    path, root, notes = Path(path), Path(root), Notes()
    data = open_coco(path)
    chosen, k = choose_categories(data, category, path)
    if unlisted := sorted(chosen.keys() - {str(identity(c.get("id"))) for c in data["categories"]}):
        notes.said.append(f"category {printable(unlisted[0])} is not in the file; it is read as the one "
                          f"with {k} landmarks ({len(unlisted)} such in all)")
    scheme = read_scheme(chosen, k, path, notes)
    images = read_images(data["images"], path)
    entries, ids, image_ids, triples = read_annotations(data["annotations"], images, chosen, k, path, notes)
    names, sizes, breeds = zip(*(images[key] for key in image_ids), strict=True)
    counts = Counter(name for name, _, _ in images.values())
    files = place_pictures(names, path, root, notes, {name for name in counts if counts[name] > 1})
    sizes, read = read_sizes(files, sizes, root, notes)
    mend_exchanged(files, sizes, triples[..., :2], triples[..., 2], root, notes)
    if triples[..., :2].min() >= -0.5 and triples[..., :2].max() <= 1.5:  # no face is two pixels wide
        triples[..., :2] *= sizes[:, None]
        notes.add("fractions", files[0], len(files))
    inside = in_pictures(triples[..., :2], triples[..., 2], sizes.max(1, keepdims=True))
    ids, entries, image_ids, files, breeds, sizes, triples = those_inside(
        inside, path, notes, ids, entries, image_ids, files, breeds, sizes, triples)
    limits = sizes.max(1)[:, None, None] + 1  # EXIF may still swap the sides
    lost = (triples[..., 2] > 0) & (abs(triples[..., :2] - limits / 2) > 1.5 * limits).any(2)
    for i in np.flatnonzero(lost.any(1)):  # over a side's length outside: a program's -999, or a typo
        notes.add("nowhere", f"annotation {ids[i]}", int(lost[i].sum()))
    triples[lost] = 0
    points, visible = triples[..., :2].copy(), triples[..., 2].astype(np.uint8)
    turns = stored_turns(files, sizes, points, visible, root, notes, shows_upright(data), read)
    boxes = read_boxes(entries, ids, points, visible, sizes, notes)
    turn_faces(turns, sizes, boxes, points, visible)
    inside = in_pictures(points, visible, sizes)  # now each side is known
    for i in np.flatnonzero(~inside):  # a wrong size is reported as such when the picture is read
        inside[i] = seen_size(os.path.join(root, files[i])) not in (None, tuple(sizes[i]))
    ids, entries, image_ids, files, breeds, sizes, boxes, points, visible = those_inside(
        inside, path, notes, ids, entries, image_ids, files, breeds, sizes, boxes, points, visible)
    slack = sizes[:, None] / 20
    beyond = (visible == 2) & ((points < -slack) | (points > sizes[:, None] + slack)).any(2)
    for i in np.flatnonzero(beyond.any(1)):
        notes.add("beyond", f"annotation {ids[i]}", int(beyond[i].sum()))
    wrong = lopsided(points, visible, scheme["flip_pairs"]) if scheme["flip_pairs"] else ()
    if len(wrong):
        notes.said.append(f"flip_pairs: mirrored, {printable(scheme['names'][wrong[0]])} would be in the "
                          f"wrong place in nine of ten faces ({len(wrong)} in all); are all partners right, "
                          "or do all faces look to one side?")
    kinds = [printable(chosen[str(e["category_id"])].get("name")) if len(chosen) > 1 else "" for e in entries]
    return scheme, {"files": files, "sizes": sizes, "boxes": boxes, "points": points, "visible": visible,
                    "ids": np.array(ids, object), "image_ids": np.array(image_ids, object),
                    "breeds": read_breeds(files, breeds, kinds), "notes": notes.lines(),
                    "room": room_of(points, visible, boxes)}


def in_pictures(points: np.ndarray, visible: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which faces (N,) have a labelled landmark in their picture, within a pixel; `sizes` (N, 1 or 2)."""
    return (((points >= -1) & (points <= sizes[:, None] + 1)).all(2) & (visible > 0)).any(1)


def those_inside(inside: np.ndarray, path: Path, notes: Notes, ids: list, *columns) -> list:
    """Keep ids and columns of the faces `inside` (N,), count the rest. Raises UserError if none is left."""
    for annotation in compress(ids, ~inside):
        notes.add("away", f"annotation {annotation}")
    if not inside.any():
        raise notes.nothing_left(path)
    return [column[inside] if isinstance(column, np.ndarray) else [*compress(column, inside)]
            for column in (ids, *columns)]


# ---------------------------------------------------------------- the file and its categories

def read_file(path: Path):
    """The content of a JSON file; images as {id: name} (Animal Pose) or {id: {...}} become a list.

    Raises UserError.
    """
    if path.suffix.lower() in TABLES:
        raise UserError(f"{path}: is no JSON; data/README.md shows the form that is needed, and ways to it")
    data = load_json(path)
    if isinstance(data, dict) and isinstance(data.get("images"), dict):
        data["images"] = [{"id": key, **(name if isinstance(name, dict) else {"file_name": name})}
                          for key, name in data["images"].items()]
    return data


def open_coco(path: Path) -> dict:
    """A COCO file's content: a dict with the lists images, annotations, categories. Raises UserError."""
    data = read_file(path)
    first = data[0] if isinstance(data, list) and data else data
    for mark, program in FOREIGN:
        if isinstance(first, dict) and mark <= first.keys() and "images" not in first:
            raise UserError(f"{path}: not a COCO file but {program}")
    for name in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(name), list):
            raise UserError(f"{path}: not a COCO file ({name} must be a list); export COCO keypoints, or "
                            "convert it (data/README.md)")
        if not data[name]:
            raise UserError(f"{path}: no {name} in it; export or convert the data again")
        data[name] = [entry if isinstance(entry, dict) else {} for entry in data[name]]
    return data


def choose_categories(data: dict, wanted: str | int | None, path: Path) -> tuple[dict, int]:
    """The categories to train on, {id as text: category}, and their number of landmarks K. Raises UserError.

    These are all categories whose annotations have labelled landmarks, if they share the same ones; or only
    the `wanted` one. An annotation without category_id gets that of the only category with landmarks.
    """
    categories, lengths = {str(identity(c.get("id"))): c for c in data["categories"]}, defaultdict(Counter)
    if any(categories[str(identity(c.get("id")))] != c for c in data["categories"]):
        raise UserError(f"{path}: two of its categories have the same id; give each its own")
    named = [key for key, c in categories.items() if c.get("keypoints")] or [*categories]
    for annotation in data["annotations"]:
        own = identity(annotation.get("category_id"))
        annotation["category_id"] = named[0] if own is None and len(named) == 1 else own
        landmarks = annotation.get("keypoints")
        if not isinstance(landmarks, list):
            continue
        number = len(landmarks) // 3
        if landmarks and all(isinstance(place, list) for place in landmarks):  # [[x, y], ...], or with v
            number, landmarks = len(landmarks), [*chain.from_iterable(landmarks)]
            annotation["keypoints"] = landmarks
        if any(v not in (0, -1) for v in landmarks[2::3]):
            lengths[str(annotation["category_id"])][number] += 1
    groups, number = defaultdict(dict), {key: max(lengths[key], key=lengths[key].get) for key in lengths}
    lend_names(categories, number)
    for key in lengths:
        names = categories.get(key, {}).get("keypoints") or []
        if wanted is not None and str(wanted) not in (key, str(categories.get(key, {}).get("name"))):
            continue
        if key not in categories or not isinstance(names, list):
            what = ("no list of names; write keypoints as one" if key in categories else
                    "is not in the file; add it to categories, or mend the category_id")
            raise UserError(f"{path}: category {printable(key)} has annotations with landmarks, but {what}")
        groups[len(names) or number[key], *map(str, names)][key] = categories[key]
    if len(groups) == 1:
        (k, *names), chosen = groups.popitem()
        if k == 1 and not names and len(chosen) > 1:  # CVAT's and Segments.ai's single points
            first = printable(next(iter(chosen.values())).get("name"))
            raise UserError(f"{path}: each of its {len(chosen)} categories is one landmark ({first}); label "
                            "a face's landmarks as one skeleton, or write the form of data/README.md; else "
                            "choose one with --category, or, if it is the same in all, give it a name")
        return chosen, k
    if not lengths:
        raise UserError(f"{path}: no annotation has keypoints with a labelled landmark (v above 0); export "
                        "the landmarks, too, not boxes alone, and which of them are labelled")
    named = [printable(categories.get(key, {}).get("name", key)) for key in lengths]
    counts = Counter(named)
    named = [key if counts[name] > 1 else name for key, name in zip(lengths, named, strict=True)]
    found = ", ".join(f"{name} ({k})" for name, k in zip(named, number.values(), strict=True))[:200]
    if wanted is not None and not groups:
        raise UserError(f"--category {wanted}: {path} has no landmarks of it, but of {found}")
    order = len({(k, *sorted(names)) for k, *names in groups}) == 1
    differ = "the same landmarks in another order" if order else "different landmarks"
    raise UserError(f"{path}: its categories have {differ}: {found}; choose one with --category {named[0]!r}")


def lend_names(categories: dict, number: dict):
    """Give categories without landmark names, in place, those of the one category with as many names.

    number: {category id: its annotations' landmarks}. CVAT files a skeleton grouped with a box under the
    box's category, Dataloop under its label's; some count category_id from 0, but categories from 1.
    """
    named = defaultdict(dict)
    for category in categories.values():
        if isinstance(category.get("keypoints"), list):
            named[len(category["keypoints"])].setdefault(str(category["keypoints"]), category)
    for key, k in number.items():
        own, fitting = categories.get(key), [*named[k].values()]
        if k > 1 and len(fitting) == 1 and not (own and own.get("keypoints")):
            categories[key] = fitting[0] | ({n: own.get(n) for n in ("id", "name")} if own else {})


# ---------------------------------------------------------------- the scheme

def checked_scheme(category: dict, where: Path | str) -> dict:
    """A COCO category's names, flip_pairs, regions, interocular and skeleton, checked: a dict of plain types.

    Landmark numbers count from 0; the skeleton's from 1, as in COCO, or from 0. Nothing trains on a skeleton,
    so one that does not fit is left out. Accepts untrusted input. Raises UserError naming `where`.
    """
    names = category.get("keypoints")
    if not isinstance(names, list) or not 0 < len(names) <= MAX_LANDMARKS or not all(
            isinstance(n, str) and is_text(n) for n in names):
        raise UserError(f"{where}: its category needs 1 to {MAX_LANDMARKS} printable keypoint names")

    def content(name: str, kind: type = list):
        value = category.get(name) or kind()
        if not isinstance(value, kind):
            raise UserError(f"{where}: {name} must be {'a list' if kind is list else 'an object'}")
        return value

    def indices(value, name: str, length: int | None = None) -> list:
        if not are_indices(value, len(names)) or length is not None and len(value) != length:
            number = "" if length is None else f"{length} "
            raise UserError(f"{where}: {name} must hold {number}different landmark numbers, not "
                            f"{printable(value)[:60]}")
        return value

    pairs = [indices(pair, "flip_pairs", 2) for pair in content("flip_pairs")]
    indices([*chain.from_iterable(pairs)], "flip_pairs")  # no landmark has two partners
    regions = {printable(key): v for key, v in content("regions", dict).items()}
    regions = {key: indices(v, f"regions.{key}") for key, v in regions.items()}
    interocular = indices(content("interocular"), "interocular", 2 if category.get("interocular") else 0)
    return {"names": names, "flip_pairs": pairs, "regions": regions, "interocular": interocular,
            "skeleton": fitting_lines(category.get("skeleton"), len(names)) or []}


def are_indices(value: object, k: int) -> bool:
    """Whether a value is a list of different whole numbers from 0 to below k."""
    return (isinstance(value, list) and all(type(i) is int and 0 <= i < k for i in value)
            and len(set(value)) == len(value))


def fitting_lines(lines: object, k: int) -> list | None:
    """A skeleton's lines, zero-based; None if they do not fit k landmarks. Without a 0 it counts from 1."""
    lines = lines or []
    if not isinstance(lines, list) or not all(are_indices(line, k + 1) and len(line) == 2 for line in lines):
        return None
    start = 0 if any(0 in line for line in lines) else 1
    lines = [[i - start for i in line] for line in lines]
    return lines if all(are_indices(line, k) for line in lines) else None


def read_scheme(chosen: dict, k: int, path: Path, notes: Notes) -> dict:
    """The scheme of categories with the same K landmarks, as checked_scheme gives it, corrected."""
    fields = "keypoints", "flip_pairs", "flip_idx", "regions", "interocular", "skeleton"
    category = {f: next((c[f] for c in chosen.values() if c.get(f)), None) for f in fields}
    names = [str(n) if type(n) is int else n for n in category["keypoints"] or ()]
    if not names:
        names = [f"point_{i}" for i in range(k)]
        several = f", and are the same in all {len(chosen)} categories" if len(chosen) > 1 else ""
        notes.said.append(f"no names of landmarks; they are called point_0 to point_{k - 1}{several}")
    if all(isinstance(n, str) for n in names):
        plain, counts, numbers = names, Counter(names), defaultdict(lambda: count(1))
        if twice := [n for n in names if counts[n] > 1]:
            notes.said.append(f"{len(twice)} landmarks share a name, as {printable(twice[0])}; they are "
                              "numbered")
            names = [f"{n}_{next(numbers[n])}" if counts[n] > 1 else n for n in names]
        pairs, flip = category["flip_pairs"], category["flip_idx"]
        if not pairs and are_indices(flip, k) and len(flip) == k and [flip[i] for i in flip] == [*range(k)]:
            # YOLO's flip_idx: each landmark's partner, or itself
            pairs = [[i, j] for i, j in enumerate(flip) if i < j]
        # The numbers added to equal names say nothing about partners.
        category["flip_pairs"] = read_flip_pairs(pairs, names if pairs else plain, notes)
        regions = category["regions"]
        category["interocular"] = numbers_of(category["interocular"], names)
        if isinstance(regions, dict):
            category["regions"] = {key: numbers_of(value, names) for key, value in regions.items()}
    category["keypoints"] = names
    if fitting_lines(category["skeleton"], k) is None:
        notes.said.append(f"the skeleton does not fit {k} landmarks and is left out: no lines are drawn, and "
                          "evaluate.py has no outlines")
    return checked_scheme(category, path)


def numbers_of(value: object, names: list) -> object:
    """A list of landmarks' names as their numbers; anything else as it is, for checked_scheme."""
    known = isinstance(value, list) and all(isinstance(n, str) and n in names for n in value)
    return [names.index(n) for n in value] if known else value


# left and right in a name; l and r as words of their own, or nearly: L_Eye, eye.r, LEye; earL, FL_paw, lf_paw
LETTER = (r"(?<=[a-z])[LR](?![A-Za-z])|(?<=(?<![A-Za-z])[FHB])[LR](?![A-Za-z])"
          r"|(?<![A-Za-z])[lr](?=[fhb](?![A-Za-z]))")
SIDE = re.compile(rf"(?i:left|right)|(?i:(?<![a-z])[lr]t(?![a-z]))|(?<![A-Za-z])[LRlr](?![a-z])|{LETTER}")
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
# Matches only what certainly means a side: nothing in upright, LIP, Rhinarium or the vertebra L1.
SURE_SIDE = re.compile(rf"(?i:(?<![a-z])(?:left|right|[lr](?![a-z0-9])))|(?<=[a-z])(?:Left|Right)|{LETTER}"
                       r"|(?<![A-Za-z])[LRlr](?=[A-Z][a-z])")


def is_letter(name: str, names: list) -> bool:
    """Whether a name is a letter in a series such as A, B, C, ..., where L and R mean no sides."""
    return len(name) == 1 and any(len(n) == 1 and n not in "LRlr" for n in names)


def is_sided(name: str, names: list) -> bool:
    """Whether a landmark's name puts it on one side; a name with both (mid_left_right) does not."""
    sides = [side[0][0].lower() for side in SURE_SIDE.finditer(name)]
    return sides.count("l") != sides.count("r") and not is_letter(name, names)


def has_other_letter(name: str, names: list) -> bool:
    """Whether replacing one l by r, or lft by rgt, gives another of the names, as with lear and rear."""
    sides, others = {"l": "r", "lft": "rgt"}, {n.lower() for n in names}
    return not is_letter(name, names) and any(
        name[:m.start()].lower() + sides[m[0].lower()] + name[m.end():].lower() in others
        for m in re.finditer("(?i)lft|l", name))


def named_pairs(names: list) -> list:
    """[[left, right], ...] of the landmarks whose names differ only in their side."""
    index, pairs = {name.strip().lower(): i for i, name in enumerate(names)}, []
    for i, name in enumerate(names):
        side = None if is_letter(name, names) else SIDE.search(name)
        partner = index.get(SIDE.sub(lambda m: OTHER_SIDE[m[0].lower()], name).strip().lower(), i)
        if side and side[0][0] in "lL" and partner != i:
            pairs.append([i, partner])
    return pairs if len(index) == len(names) else []  # equal names say nothing


def left_first(pair: list, names: list) -> list | None:
    """[left, right] for two landmarks whose names differ only in side, and perhaps in digits; else None.

    Outlines may be numbered across the face: left_brow_1 is then right_brow_5's partner.
    """
    sides = "".join(m[0][0].lower() for m in (SIDE.search(names[i]) for i in pair) if m)
    parts = {re.sub(r"\d", "", SIDE.sub("", names[i])).strip().lower() for i in pair}
    return {"lr": pair, "rl": pair[::-1]}.get(sides) if len(parts) == 1 else None


def read_flip_pairs(given: object, names: list, notes: Notes):
    """flip_pairs as they are meant: zero-based, and never contradicting left and right in the names.

    Anything but a list of pairs of different landmarks is returned unchanged, for checked_scheme to refuse.
    """
    named, k = named_pairs(names), len(names)
    sided = {i for pair in named for i in pair}
    if not given:
        rest = [n for i, n in enumerate(names) if named and i not in sided]
        lone = [n for n in rest if is_sided(n, names) or has_other_letter(n, rest)]
        if lone:  # mirrored, it would teach the wrong side
            notes.said.append(f"no flip_pairs, and no landmark is named as the other side of {lone[0]}; "
                              "rename it, or give flip_pairs")
            return []
        if named:
            own = f"; without a partner: {rest[0]} ({len(rest)} in all)" if rest else ""
            notes.said.append(f"no flip_pairs; {len(named)} taken from left and right in the names, as "
                              f"{names[named[0][0]]} and {names[named[0][1]]}{own}")
        return named
    if not isinstance(given, list) or not all(isinstance(p, list) and len(p) == 2 for p in given):
        return given
    index = {name: i for i, name in enumerate(names)}
    if all(isinstance(n, str) and n in index for p in given for n in p):
        given = [[index[n] for n in p] for p in given]
    if not are_indices([*chain.from_iterable(given)], k + 1):  # k itself: they may count from 1
        return given

    def missed(pairs):
        return [p for p in named if p not in pairs and p[::-1] not in pairs]

    def lacking(pairs):
        believed = {i for p in pairs if left_first(p, names) for i in p}
        return [p for p in missed(pairs) if not believed & {*p}]
    lowered = [[i - 1, j - 1] for i, j in given]
    beyond, fits = any(k in p for p in given), min(map(min, lowered)) >= 0
    if fits and (beyond or any(rule(given) and not rule(lowered) for rule in (missed, lacking))):
        notes.said.append(f"flip_pairs counts from 1; read so that {given[0]} is {names[lowered[0][0]]} and "
                          f"{names[lowered[0][1]]}")
        given = lowered
    elif beyond:
        return given
    if wrong := lacking(given):
        notes.said.append(f"flip_pairs does not pair {names[wrong[0][0]]} with {names[wrong[0][1]]}; "
                          f"{len(wrong)} taken from left and right in the names")
        given = sorted([p for p in given if left_first(p, names) or not sided & {*p}] + wrong)
    if alone := sorted(sided - {*chain.from_iterable(given)}):
        notes.said.append(f"flip_pairs leaves {names[alone[0]]} without a partner ({len(alone)} in all)")
    return [left_first(p, names) or p for p in given]  # align_faces.py needs to know


def lopsided(points: np.ndarray, visible: np.ndarray, pairs: list) -> np.ndarray:
    """Landmarks (indices) that mirroring would misplace, alone or with their partner: signs of wrong pairs.

    points (N, K, 2), visible (N, K). In nine of ten faces or more, of ten at least, the midpoint of such a
    landmark and its partner is off centre, to the same side, by over a quarter of the left-right distance.
    """
    (a, b), partner = np.transpose(pairs), np.arange(points.shape[1])
    partner[a], partner[b] = b, a
    places = np.where(visible[..., None] > 0, points, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about means over no values
        across = np.nanmean(places[:, b] - places[:, a], axis=1)[:, None]
        centre = np.nanmean((places[:, a] + places[:, b]) / 2, axis=1)[:, None]
        off = (((places + places[:, partner]) / 2 - centre) * across).sum(2) / (across**2).sum(2)
    number = np.isfinite(off).sum(0)
    aside = np.maximum((off > 0.25).sum(0), (off < -0.25).sum(0))
    return np.flatnonzero((number >= 10) & (aside >= 0.9 * number))


# ---------------------------------------------------------------- images

def identity(value: object) -> int | str | None:
    """An id as files give it, a number or a text; None for anything else."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if isinstance(value, (int, str)) else None


def side_of(value) -> int:
    """A picture's side in pixels, written 160, 160.0 or "160"; 0 where it is not known. Raises ValueError."""
    number = float(value or 0)
    if not (number.is_integer() and 0 <= number < MAX_SIDE):
        raise ValueError
    return int(number)


def read_images(entries: list, path: Path) -> dict:
    """{id: (name, (width, height), breed)} of all images; a side that is not known is 0. Raises UserError."""
    images, given = {}, {}
    written, ids = ({str(image.get(field)) for image in entries} for field in ("file_name", "id"))
    for number, image in enumerate(entries):
        name, key = image.get("file_name"), identity(image.get("id"))
        sides = image.get("width"), image.get("height")
        where = f"{path}: image {number} ({printable(name)[:80]})"
        if not isinstance(name, str) or not name:
            raise UserError(f"{where} has no file_name; give it one")
        if key is None:
            raise UserError(f"{where} has no id that is a number or a text; give it one")
        if given.setdefault(key, image) != image:
            raise UserError(f"{where} has the id of another; give each its own")
        if sides == (-1, -1):
            sides = 0, 0  # VIA's way to write that they are unknown
        try:
            size = side_of(sides[0]), side_of(sides[1])
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{where}: width and height cannot be {printable(sides)[:60]}; mend them, or "
                            "leave them out") from None
        if len(written) < len(ids) and str(image.get("path")).endswith(f"/{name}"):
            name = image["path"]  # COCO Annotator's, with the folders
        images[key] = name, size, "" if image.get("breed") is None else printable(image["breed"])
    return images


def plainly(name: str) -> str:
    """A name without differences in spelling between programs: case, %20, an accent as two characters."""
    return unicodedata.normalize("NFC", unquote(name)).casefold()


def split_of(words: Iterable) -> str | None:
    """The split that a name's words tell, the last word first: train for train2017, val for images/valid."""
    words = [word.lower().rstrip("0123456789") for word in words]
    return next((split[0] for word in words[::-1] for split in SPLITS if word in split), None)


def ends_in(stem: str, name: str) -> bool:
    """Whether a file's stem ends in a folder's name, as x_Train_2 in train_2."""
    return bool(re.search(rf"(^|[\W_]){re.escape(name)}$", stem, re.IGNORECASE))


def holding_folder(names: list, path: Path, root: Path, repeated: set, notes: Notes) -> str:
    """The folder, relative to the data root, that picture names start from. UserError if a name has two.

    It is the data root, or the annotation file's real folder, if that lies in the root. If neither holds half
    of the pictures, it is the folder below the root that holds most, sought first at the file's folder, then
    ever further around it. Of folders that hold as many, the one named like the file counts (Train_2 for
    x_Train_2.json, else train2017 for train.json); if all are of another split than the file, one of its own
    split that holds at least half as many. A name has two if two such folders hold its picture, or, if
    several images share the name (`repeated`), if any two do.
    """
    real = os.path.realpath(root)

    def held(folder, *others):
        return sum(all(os.path.isfile(os.path.join(real, f, name)) for f in (folder, *others))
                   for name in names)

    def refuse_two(names, folders, what, mend):
        for name in names:
            holding = [f for f in folders if os.path.isfile(os.path.join(real, f, name))]
            if len(holding) > 1:
                a, b = map(printable, holding[:2])
                raise UserError(f"{path}: {what.format(printable(name))} in {a} and in {b} of {root}; {mend}")
    beside = Path(os.path.realpath(path)).parent
    inner = [beside.relative_to(real).as_posix()] if beside.is_relative_to(real) else []
    best = max(["", *inner], key=held)
    if (most := held(best)) * 2 >= len(names):
        return best
    missing = [*islice((n for n in names if not os.path.isfile(os.path.join(real, best, n))), 20)]
    below = (Path(os.path.relpath(folder, real)).as_posix() for folder, _, _ in os.walk(real))
    counts = {f: held(f) for f in below if any(os.path.isfile(os.path.join(real, f, n)) for n in missing)}
    for around in [Path(inner[0]), *Path(inner[0]).parents] if inner else ():
        own = {f: count for f, count in counts.items() if Path(f).is_relative_to(around)}
        if max(own.values(), default=0) * 2 >= len(names):
            counts = own
            break
    words = re.split(r"[\W_]+", path.stem.lower())
    own, splits = split_of(words), {f: split_of(Path(f).parts) for f in counts}
    near = [f for f, count in counts.items() if count > most and 2 * count >= max(counts.values())]
    fitting = [f for f in near if counts[f] == max(counts.values())]
    foreign = own and all(splits[f] not in (None, own) for f in fitting)
    known = near if foreign else fitting
    meant = [f for f in known if own and splits[f] == own or Path(f).name.lower() in words]
    ends = [f for f in known if ends_in(path.stem, Path(f).name)]
    longest = max((len(Path(f).name) for f in ends), default=0)
    meant = [f for f in ends if len(Path(f).name) == longest] or meant
    refuse_two(() if meant else repeated, counts, "{} stands for several images, and is",
               "write names with their folders, or name one by --data-root")
    fitting = meant or fitting
    refuse_two(names, fitting, "pictures ({}) are", "name the right one with --data-root")
    best = fitting[0] if fitting else best
    if own and splits.get(best) not in (None, own) and "train" in (own, splits[best]):
        notes.said.append(f"the pictures are taken from {printable(best)}, though {printable(path.name)} is "
                          "of another split; if that is wrong, name the right folder with --data-root")
    for other in (f for f in near if f != best and splits[f] in (None, own) and held(f, best)):
        notes.said.append(f"the pictures are taken from {printable(best)}, though {printable(other)} has "
                          "some of these names, too; if that is wrong, name the right one with --data-root")
    return best


def refuse_links(links: list, lost: list, path: Path, root: Path):
    """Raises UserError where a linked folder in the data root, which is not searched, has a lost picture."""
    for link, name in product(links, lost[:20]):
        if os.path.isfile(os.path.join(link, name)):
            picture_path(root, Path(os.path.relpath(link, root), name).as_posix(), f"{path}: ")


def place_pictures(names: tuple, path: Path, root: Path, notes: Notes, repeated: Iterable = ()) -> list[str]:
    """The pictures' paths relative to the data root. Raises UserError where two fit or one leads out of it.

    Names start from the folder that holds them (holding_folder); Windows' \\ is read as /. In place of a
    missing picture, one counts that is only spelt differently (a.JPG, %20, an accent as two characters), or
    lies in another folder, if none of the file's pictures is there twice. A picture that two names can mean
    is neither's, unless only one names its folder, too. A name that leads out of the data root (another
    machine's, a server's) means the picture with the longest common ending. Missing pictures keep their name.
    """
    placed, outside, known, base = {}, {}, defaultdict(list), Path(os.path.abspath(root))
    for name in dict.fromkeys(names):
        plain = posixpath.normpath(name.replace("\\", "/"))  # labels/../a.jpg is a.jpg
        whole = Path(os.path.abspath(base / plain))
        if whole.is_relative_to(base):
            plain = whole.relative_to(base).as_posix()  # as ../images/a.jpg may be, too
        inner = plain if os.path.isfile(os.path.join(root, plain)) else name
        try:
            there = os.path.isfile(picture_path(root, inner, f"{path}: "))
            placed[name] = inner if there else plain
        except UserError as e:
            if not Path(name).is_absolute() and os.path.lexists(os.path.join(root, name)):
                raise  # a link that leads out
            outside[name] = e
    several = {placed[n] for n in repeated if n in placed}
    folder = holding_folder([*placed.values()], path, root, several, notes)
    placed = {name: posixpath.join(folder, place) for name, place in placed.items()}
    owners = {place: place for place in placed.values()}  # {picture: whose it is}
    lost = [place for place in owners if not os.path.isfile(os.path.join(root, place))]
    links = []
    for at, folders, files in os.walk(root) if lost or outside else ():
        links += [link for link in (os.path.join(at, folder) for folder in folders) if os.path.islink(link)]
        for file in files:
            known[plainly(file)].append(Path(at, file).relative_to(root).as_posix())
    claims = spelt_otherwise(lost, [*owners], folder, known)
    meant = {place: picture for picture, (place, *others) in claims.items()
             if owners.setdefault(picture, place) == place and not others}
    refuse_links(links, [place for place in lost if place not in meant], path, root)
    for name, place in placed.items():
        if place in meant:
            notes.add("spelt", name)
            placed[name] = meant[place]
    for name, error in outside.items():
        local = name.split("local-files/?d=")[-1]  # Label Studio's
        parts = re.split(r"[/\\]", plainly(local.split("?")[0] if "://" in local else local))[::-1]
        shared = {p: len(os.path.commonprefix([plainly(p).split("/")[::-1], parts])) for p in known[parts[0]]}
        best = sorted(p for p in shared if shared[p] == max(shared.values()))
        if not best:
            raise error
        if len(best) > 1:
            raise UserError(f"{path}: {name} is {best[0]} or {best[1]} of {root}; write names relative to it")
        if (owner := owners.setdefault(best[0], name)) != name:
            raise UserError(f"{path}: {owner} and {name} are both {best[0]} of {root}; write names relative "
                            "to it")
        notes.add("outside", name)
        placed[name] = best[0]
    for place in placed.values():
        picture_path(root, place, f"{path}: ")
    return [placed[name] for name in names]


def spelt_otherwise(lost: list, places: Iterable, folder: str, known: dict) -> dict[str, list]:
    """{picture: the lost places that can mean only it}; just one of them if only that names its folder, too.

    known: {file name, as `plainly` has it: pictures}. A lost picture may lie in another folder only if none
    of the file's `places` has a name that is there twice.
    """
    lone = all(len(known[posixpath.basename(plainly(place))]) < 2 for place in places)
    claims = defaultdict(list)
    for place in lost:
        plain = plainly(place)
        end = "/" + plain.removeprefix(plainly(f"{folder}/"))
        same = [p for p in known[posixpath.basename(plain)]
                if plainly(p) == plain or lone and (
                    f"/{plainly(p)}".endswith(end) or end.endswith(f"/{plainly(p)}"))]
        if len(same) == 1:
            claims[same[0]].append(place)
    exact = {picture: [place for place in claim if plainly(place) == plainly(picture)]
             for picture, claim in claims.items()}
    return claims | {picture: nearest for picture, nearest in exact.items() if len(nearest) == 1}


def shows_upright(data: dict) -> bool:
    """Whether a COCO file's program shows pictures upright. Label Studio does, but writes stored sizes."""
    return any(program in str(data.get("info")) for program in ("Label Studio", "tools/predict.py"))


def may_be_turned(path: Path | str) -> bool:
    """Whether a PNG has a chunk that can hold an orientation. To find out, Pillow would decode it whole."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(part := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", part)
            if kind in (b"eXIf", b"zTXt", b"iTXt", b"tEXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


def header(path: Path | str) -> tuple[tuple, int] | None:
    """A picture's stored (width, height), EXIF orientation 2 to 8, or 0 if upright; None if unreadable."""
    try:
        with Image.open(str(path), formats=FORMATS) as image:
            plain = image.format == "PNG" and not may_be_turned(path)
            turn = 1 if plain else orientation(image)
            tags = getattr(image, "tag_v2", {})  # newer versions of Pillow open a TIFF with its turned size
            size = (int(tags.get(256, image.width)), int(tags.get(257, image.height)))
            return size, turn if turn in range(2, 9) else 0
    except Exception:  # Pillow's parsers raise nearly anything on damaged files; read_picture says what it is
        return None


def seen_size(path: Path | str) -> tuple | None:
    """A picture's width and height as it is seen, by its header; None if unreadable."""
    size, turn = header(path) or (None, 0)
    return size[::-1] if turn > 4 else size


def read_sizes(files: list, sizes: tuple, root: Path, notes: Notes) -> tuple[np.ndarray, set]:
    """The pictures' sizes (N, 2), and the names of those whose size is missing from the file (0).

    A missing size is read from the picture as it is seen. Raises UserError for a picture that cannot be read.
    """
    read = {}
    for name, size in zip(files, sizes, strict=True):
        if 0 in size and name not in read:
            path = picture_path(root, name)
            read[name] = seen_size(path) or read_picture(path)[1]
            notes.add("sizes", name)
    return np.array([read.get(name, size) for name, size in zip(files, sizes, strict=True)]), {*read}


def mend_exchanged(files: list, sizes: np.ndarray, points: np.ndarray, visible: np.ndarray, root: Path,
                   notes: Notes):
    """Exchange the sizes (N, 2), in place, of pictures whose file says their width and height the other way.

    Pictures that EXIF turns are left to stored_turns. So are sizes that more of a picture's landmarks
    contradict after the exchange than before; check_size reports them when the picture is read.
    """
    faces = defaultdict(list)
    for i, name in enumerate(files):
        faces[name].append(i)
    for name, own in faces.items():
        size, turn = header(os.path.join(root, name)) or ((), 0)
        placed, said = points[own][visible[own] > 0], tuple(sizes[own[0]])
        if not turn and said != size == said[::-1] and (placed > size).sum() <= (placed > said).sum():
            notes.add("sizes", name)
            sizes[own] = size


def stored_turns(files: list, sizes: np.ndarray, points: np.ndarray, visible: np.ndarray, root: Path,
                 notes: Notes, upright: bool, read: Iterable = ()) -> dict[int, int]:
    """{face: EXIF orientation, 2 to 8} of faces whose landmarks lie on the picture as stored, not as seen.

    The evidence is oblong pictures that EXIF turns by a quarter (5 to 8) and whose size in the file is the
    stored one: their program ignored EXIF, so all that EXIF turns are meant, square or upside-down ones too.
    But if more of their landmarks lie outside as stored than as seen, or as many and the program shows
    pictures upright (`upright`), only the sizes are wrong; they are corrected in place. For the pictures in
    `read`, whose size the file did not give, only the landmarks tell.
    """
    def outside(faces, step):
        return sum((points[i][visible[i] > 0] > sizes[i][::step]).sum() for i in faces)
    headers = {name: header(os.path.join(root, name)) or ((), 0) for name in set(files)}
    unknown = [i for i, name in enumerate(files) if name in read and headers[name][1] > 4]
    if (gap := outside(unknown, 1) - outside(unknown, -1)) > 0:
        for i in unknown:
            sizes[i] = sizes[i][::-1]  # as stored
    turns = {i: headers[name][1] for i, name in enumerate(files)
             if headers[name][1] and tuple(sizes[i]) == headers[name][0]}
    oblong = [i for i, turn in turns.items() if turn > 4 and sizes[i][0] != sizes[i][1]]
    stored, seen = outside(oblong, 1), outside(oblong, -1)
    if not oblong or stored > seen or upright and stored == seen:
        for i in oblong:
            notes.add("upright", files[i])
            sizes[i] = sizes[i][::-1]
        # A size of the picture as seen shows that the program knows EXIF.
        known = [(size, *headers[name]) for name, size in zip(files, sizes) if name not in read]
        upright |= any(turn > 4 and tuple(size[::-1]) == raw != tuple(size) for size, raw, turn in known)
        undecided = () if oblong or upright else (*turns, *(() if gap else unknown))
        meant = {}
    else:
        for i in turns:
            notes.add("turned", files[i])
        undecided, meant = oblong if stored == seen else (), turns
    if undecided:
        notes.said.append(f"nothing tells whether {files[undecided[0]]}, which EXIF turns, was labelled "
                          "upright; draw it with tools/visualize_dataset.py or tools/predict.py, and look")
    return meant


def turn_faces(turns: dict, sizes: np.ndarray, boxes: np.ndarray, points: np.ndarray, visible: np.ndarray):
    """Turn the faces of `turns` with their pictures, in place."""
    for i, turn in turns.items():
        step = -1 if turn > 4 else 1  # 5 swaps x and y; 6 to 8 mirror after that, 2 to 4 only mirror
        sizes[i] = sizes[i][::step]
        corners = np.array([boxes[i][:2], boxes[i][:2] + boxes[i][2:]])
        for place in points[i], corners:
            swapped = place[:, ::step].copy()
            place[:] = np.where([turn in (2, 3, 6, 7), turn in (3, 4, 7, 8)], sizes[i] - 1 - swapped, swapped)
        boxes[i] = *corners.min(0), *np.ptp(corners, axis=0)
        points[i][visible[i] == 0] = 0


def rounded(shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shares (N,) rounded up or down at random to integers (N,) whose sum is theirs, rounded.

    Sequential Poisson sampling (Ohlsson 1998) chooses those to round up, almost in proportion to their
    fractions. Rounding each to the nearest would take a picture of every small breed, or of none.
    """
    below = shares.astype(int)
    order = np.argsort((1 - rng.random(len(shares))) / np.maximum(shares - below, 1e-9))
    below[order[:round(shares.sum()) - below.sum()]] += 1
    return below


def originals(files: list) -> list[str]:
    """The picture that each file shows. Roboflow writes several changed copies of one: NAME.rf.HASH.jpg."""
    return [re.sub(r"\.rf\.[^/]*$", "", file) for file in files]


def held_out(files: list, breeds: list, fraction: float, seed: int) -> np.ndarray:
    """Which faces to hold out, (N,) bool: those of a random `fraction` of each breed's pictures.

    All faces of a picture and of its augmented copies stay together; the first face decides the breed.
    """
    rng = np.random.default_rng([seed, 7919])
    _, first, picture = np.unique(originals(files), return_index=True, return_inverse=True)
    strata, order = np.array(breeds)[first], np.argsort(first)  # order: of first appearance
    groups = [rng.permutation(order[strata[order] == stratum]) for stratum in sorted(set(strata))]
    counts = rounded(fraction * np.array([len(group) for group in groups]), rng)
    return np.isin(picture, np.concatenate([group[:count] for group, count in zip(groups, counts)]))


def notes_of(train, val, paths: tuple) -> list[str]:
    """The notes on the Faces to train on and on the validation Faces (or None), each line once.

    Adds notes on landmarks that no face has, on training without mirroring, and on pictures in both sets.
    Raises UserError if their categories differ in more than the skeleton.
    """
    notes = train.notes + (val.notes if val else [])
    if never := list(compress(train.scheme.names, ~train.visible.any(0))):
        named = ", ".join(map(printable, never[:4])) + (", ..." if len(never) > 4 else "")
        notes.append(f"{paths[0]}: labelled in no face: {named} ({len(never)} in all); what a model says of "
                     "it means nothing")
    if not train.scheme.flip_pairs:
        notes.append(f"{paths[0]}: has no flip_pairs, so it trains without mirroring")
    if val:
        ours, theirs = ({**asdict(faces.scheme), "flip_pairs": {*map(frozenset, faces.scheme.flip_pairs)}}
                        for faces in (train, val))
        if differ := [name for name in ours if ours[name] != theirs[name] and name != "skeleton"]:
            raise UserError(f"{paths[1]}: its category differs from that of {paths[0]} in "
                            f"{', '.join(differ)}; make them the same")
    if val and (shared := len(shared_pictures(train, val))):
        notes.append(f"{paths[1]}: {shared} of its pictures are in {paths[0]}, too; errors measured on it "
                     "come out too small")
    return [*dict.fromkeys(notes)]


def shared_pictures(*sets) -> set[str]:
    """The pictures that all of these Faces hold."""
    return set.intersection(*({*originals(faces.files)} for faces in sets))


def read_breeds(files: list, breeds: tuple, categories: list) -> list[str]:
    """The faces' strata: their images' breed, else their category if several train, else how names begin.

    The part of a name before the first "_", as in n02085620_1073, counts if all names have one, two pictures
    or more share it on average, and it is not the same for all. Otherwise there are no strata: all are "".
    """
    if any(breeds) or any(categories):
        return list(breeds if any(breeds) else categories)
    stems = {name: Path(name).stem.split("_") for name in originals(files)}
    parts = {stem[0] for stem in stems.values()}
    fit = all(len(stem) > 1 for stem in stems.values()) and 1 < len(parts) <= len(stems) / 2
    return [stems[name][0] if fit else "" for name in originals(files)]


# ---------------------------------------------------------------- annotations

def read_annotations(entries: list, images: dict, categories: dict, k: int, path: Path,
                     notes: Notes) -> tuple[tuple, tuple, tuple, np.ndarray]:
    """The N faces with a labelled landmark: entries, ids, image ids, triples (N, K, 3). Raises UserError."""
    rows, ids, shown, written = [], {}, set(), {str(key): key for key in images}
    for number, entry in enumerate(entries):
        key = identity(number if entry.get("id") is None else entry["id"])
        picture = identity(entry.get("image_id"))
        where = f"{path}: annotation {printable(key)}"
        if key is None:
            raise UserError(f"{path}: annotation {number} of the list has the id "
                            f"{printable(entry['id'])[:60]}, neither number nor text; give it one")
        if ids.setdefault(key, entry) is not entry:
            notes.add("copies" if ids[key] == entry else "renumbered", f"annotation {key}")
            if ids[key] == entry:
                continue
            ids[key := f"{key}_{number}"] = entry
        if picture is None:
            raise UserError(f"{where} names no image; give it the image_id of one")
        picture = picture if picture in images else written.get(str(picture))  # "1" for 1
        shown.add(picture)
        reason = ("orphans" if picture is None else "crowds" if entry.get("iscrowd") in (1, "1") else
                  "boxes" if not entry.get("keypoints") else
                  "others" if str(entry["category_id"]) not in categories else None)
        triples = None if reason else read_triples(entry["keypoints"], k, where, notes)
        if reason or not triples[:, 2].any():
            notes.add(reason or "unlabelled", f"annotation {key}")
        else:
            rows.append((entry, key, picture, triples))
    names = {images[key][0] for key in shown if key is not None}
    if bare := [name for name, *_ in images.values() if name not in names]:
        notes.add("unannotated", bare[0], len(bare))
    if not rows:
        raise notes.nothing_left(path)
    if any((triples[:, 2] == 2).any() for *_, triples in rows):
        notes.counts["zeros"] = 0  # where some have a 2, 0 surely means not labelled
    entries, ids, image_ids, triples = zip(*rows, strict=True)
    return entries, ids, image_ids, np.stack(triples)


def read_triples(values: object, k: int, where: str, notes: Notes) -> np.ndarray:
    """keypoints -> (K, 3) float64 x, y, v with v in 0, 1, 2; x and y are 0 where v is. Raises UserError."""
    try:
        triples = np.array(values, dtype=np.float64)
        if triples.size > 3 * k and triples.size % 3 == 0 and triples.ndim == 1 and not triples[3 * k:].any():
            triples = triples[:3 * k]  # as long as those of another category
            notes.add("padded", where.split(": ")[-1])
        whole = triples.size % 3 == 0 and np.isin(triples.ravel()[2::3], (-1, 0, 1, 2)).all()
        if triples.size == 2 * k and not whole:  # not triples of too few landmarks
            triples = np.insert(triples.reshape(k, 2), 2, 2, axis=1)
            notes.add("pairs", where.split(": ")[-1])
        triples = triples.reshape(k, 3)
    except (TypeError, ValueError, OverflowError):
        given = f", not {len(values)}" if isinstance(values, list) and len(values) != 3 * k else ""
        bare = given and len(values) in (3 * k + 1, 3 * k + 2)  # without names, k is len(values) // 3
        advice = "; if they are x and y alone, write a 2 behind each two" if bare else ""
        raise UserError(f"{where}: keypoints must be {3 * k} numbers{given}: {k} times x, y, v{advice}"
                        ) from None
    v, example = triples[:, 2], where.split(": ")[-1]  # v is a view
    nowhere = np.isnan(triples[:, :2]).any(axis=1) | np.isin(triples[:, :2], (0, -1)).all(axis=1)
    if (lost := nowhere & (abs(v) > 0)).any():
        notes.add("nowhere", example, int(lost.sum()))
    zeros = int((~nowhere & (v == 0)).sum())
    v[nowhere] = 0
    if (odd := v[~np.isin(v, (0, 1, 2))]).size:  # COCO-WholeBody has a 2 among confidences
        if (wrong := odd[~((odd >= 0) & (odd <= 1))]).size:
            raise UserError(f"{where}: v cannot be {wrong[0]:.9g}; it is 0, 1 or 2, or a confidence "
                            "from 0 to 1; if there are x and y alone, write a 2 behind each two")
        notes.add("confidences", example)
        v[v > 0] = 2
    elif zeros:
        notes.add("zeros", example, zeros)
    triples[v == 0] = 0
    if (far := np.abs(triples) >= MAX_NUMBER).any():
        raise UserError(f"{where}: a landmark cannot be at {triples[far][0]:g}; mend or remove it")
    return triples


# ---------------------------------------------------------------- boxes

def hull_of(points: np.ndarray) -> np.ndarray:
    """The box x, y, width, height around landmarks (L, 2), at least a pixel wide and high."""
    low, high = points.min(axis=0), points.max(axis=0)
    grow = np.maximum(1 - (high - low), 0) / 2  # a single point, or a line, has a hull too
    return np.concatenate([low - grow, (high + grow) - (low - grow)])


def box_problem(box: list | np.ndarray | None, hull: np.ndarray, spans: bool = False) -> str | None:
    """Why x, y, width, height cannot be the box of a face with this hull: "empty", "mismatched", or None.

    A box is right if its IoU with the hull is at least MIN_IOU. As landmarks need not span the face, a box is
    also right if it covers COVERED of the hull, however large it is. For this it is first widened by TIGHT on
    each side, because landmarks may lie slightly outside tight boxes. Where the landmarks are known to span
    the face (`spans`: more than half of DogFLW's), only the IoU counts.
    """
    if box is None:
        return "empty"
    box, hull = np.asarray(box, dtype=np.float64)[None], hull[None]
    if overlaps(box, hull)[0, 0] >= MIN_IOU:
        return None
    grow = np.maximum(TIGHT * box[:, 2:], 1)
    wide = np.concatenate([box[:, :2] - grow, box[:, 2:] + 2 * grow], axis=1)
    covered = intersections(wide, hull)[0, 0] / hull[0, 2:].prod()
    return None if covered >= COVERED and not spans else "mismatched"


def is_stretched(box: np.ndarray, hull: np.ndarray, size: np.ndarray) -> bool:
    """Whether a box is the hull of the landmarks and 0, 0, where Supervisely puts landmarks not labelled.

    box (4,), hull (4,), size (2,) in pixels.
    """
    least = np.array([0, 0, *hull[:2] + hull[2:]])
    return hull[:2].max() > 1 and np.abs(box - least).max() <= 1 and (box[2:] < size - 1).any()


def rebuilt_box(hull: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A face's box x, y, width, height from its hull: TIGHT wider on each side, cut to the picture.

    A single landmark says nothing about the face's size, so its box is the whole picture.
    """
    if hull[2:].max() <= 1:
        return np.array([0, 0, *size], dtype=np.float64)
    low, high = hull[:2], hull[:2] + hull[2:]
    margin = np.maximum(TIGHT * (high - low), 1)  # a pixel at least, so that clipping leaves something
    low, high = low - margin, high + margin
    if (low < size).all() and (high > 0).all():  # else all of the face is outside
        low, high = np.maximum(low, 0), np.minimum(high, size)
    return np.concatenate([low, high - low])


def box_of(value: object) -> np.ndarray | None:
    """A bbox as an array x, y, width, height with positive sides, or None if it is anything else."""
    try:
        box = np.array(value, dtype=np.float64).reshape(4)
    except (TypeError, ValueError, OverflowError):
        return None
    return box if (np.abs(box) < MAX_NUMBER).all() and (box[2:] > 0).all() else None  # false for NaN


def are_corners(boxes: np.ndarray, hulls: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether a file's boxes (N, 4) are x1, y1, x2, y2.

    They are if nine in ten, read so, lie in their picture and fit their landmarks no worse than as x, y,
    width, height, and if one in ten, read as the latter, ends over a twentieth of a side outside its picture
    and fits worse. In each of 900 draws, ten or more of DogFLW's boxes were judged rightly. One right box in
    70 fits better as corners by chance; fewer than four must do so by an IoU of 0.2: none of 60,000 did.
    """
    least = 0.2 if len(boxes) < 4 else 0
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    possible = ((boxes[:, :2] > -1) & (corners[:, 2:] > 0) & (boxes[:, 2:] < sizes + 1)).all(axis=1)
    outside = (boxes[:, :2] + boxes[:, 2:] > 1.05 * sizes).any(axis=1)
    if possible.mean() < 0.9 or outside.mean() < 0.1:
        return False
    gain = np.array([overlaps(hull[None], np.stack([corner, box]))[0] @ [1, -1]
                     for corner, box, hull in zip(corners, boxes, hulls, strict=True)])
    return (possible & (gain >= 0)).mean() >= 0.9 and (possible & outside & (gain > least)).mean() >= 0.1


def are_scaled(boxes: np.ndarray, hulls: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether a file's boxes (N, 4) are in another scale than its landmarks, as after resizing pictures.

    The scale is the median over the faces of box centre / hull centre. They are if, at that scale, nine in
    ten have an IoU of MIN_IOU with their hulls and fit better, and if one in ten fits better by 0.1 and, as
    it is, ends over a twentieth of a side outside its picture or cannot be right (box_problem).
    """
    middles, centres = boxes[:, :2] + boxes[:, 2:] / 2, hulls[:, :2] + hulls[:, 2:] / 2
    scale = np.median((middles * centres).sum(1) / np.maximum((centres**2).sum(1), 1))
    if not scale > 0 or abs(np.log(scale)) < np.log(1.2):
        return False
    plain, scaled = np.array([overlaps(hull[None], np.stack([box, box / scale]))[0]
                              for hull, box in zip(hulls, boxes, strict=True)]).T
    wrong = (boxes[:, :2] + boxes[:, 2:] > 1.05 * sizes).any(axis=1)
    wrong |= [box_problem(box, hull) is not None for box, hull in zip(boxes, hulls, strict=True)]
    return (((scaled >= MIN_IOU) & (scaled > plain)).mean() >= 0.9
            and (wrong & (scaled > plain + 0.1)).mean() >= 0.1)


def read_boxes(entries: tuple, ids: tuple, points: np.ndarray, visible: np.ndarray, sizes: np.ndarray,
               notes: Notes) -> np.ndarray:
    """The faces' boxes (N, 4): the file's where they are right (box_problem), else rebuilt from landmarks."""
    boxes = [box_of(entry.get("bbox")) for entry in entries]
    hulls = np.stack([hull_of(p[v > 0]) for p, v in zip(points, visible, strict=True)])
    given = [i for i, box in enumerate(boxes) if box is not None]
    if given and are_corners(np.stack([boxes[i] for i in given]), hulls[given], sizes[given]):
        notes.add("corners", f"annotation {ids[given[0]]}", len(given))
        for i in given:
            boxes[i] = box_of([*boxes[i][:2], *(boxes[i][2:] - boxes[i][:2])])
        given = [i for i in given if boxes[i] is not None]
    scaled = given and are_scaled(np.stack([boxes[i] for i in given]), hulls[given], sizes[given])
    for i, box in enumerate(boxes):
        problem = "scaled" if scaled and box is not None else box_problem(box, hulls[i])
        if not problem and not visible[i].all() and is_stretched(box, hulls[i], sizes[i]):
            problem = "stretched"
        if problem:
            notes.add("alone" if hulls[i][2:].max() <= 1 else problem, f"annotation {ids[i]}")
            boxes[i] = rebuilt_box(hulls[i], sizes[i])
    return np.stack(boxes)


# ---------------------------------------------------------------- the files of an export

SPLITS = ("train", "training"), ("val", "valid", "validation"), ("test",)
BESIDE = "annotations", "annotation", "labels", "ann"  # folders of annotation files, in any case


def unpacked(folder: Path) -> Path:
    """The folder, or the one in it (and so on inward) if it holds nothing else, as after unpacking."""
    inner = [path for path in folder.glob("[!.]*") if path.name != "__MACOSX"]
    alone = len(inner) == 1 and inner[0].is_dir() and inner[0].name.lower() not in chain(*SPLITS)
    return unpacked(inner[0]) if alone else folder


def with_word(files: list[Path], word: str) -> list[Path]:
    """The files whose names contain a word; only the shortest if it begins the others (test, test_blur)."""
    found = [p for p in files if re.search(rf"(?<![a-z]){word}(?![a-z])", p.stem.lower())]
    short = min((p.stem for p in found), key=len, default="")
    whole = all(re.match(re.escape(short) + "([_-]|$)", p.stem) for p in found)
    return [p for p in found if p.stem == short] if whole else found


def find_annotations(ann_root: Path | str) -> tuple[Path, Path | None]:
    """An export's files (train, val); val is None if it has none. Raises UserError saying what was sought.

    ann_root: a file, or a folder with train.json and val.json; train/ and valid/, each with
    _annotations.coco.json (Roboflow), or another single JSON file (FiftyOne, CVAT); names with
    train and val (COCO's annotations/person_keypoints_train2017.json); or one JSON file.
    """
    ann_root = Path(ann_root)
    if ann_root.is_file():
        return ann_root, None
    if not ann_root.exists():
        raise UserError(f"--ann-root {ann_root}: no such file or folder; name an unpacked export or its JSON "
                        "file, or convert DogFLW by tools/convert_dogflw_to_coco.py")
    given, ann_root = ann_root, unpacked(ann_root)

    def named(split, name):
        places = [p for s in split for p in (ann_root / f"{s}.json", ann_root / s / name)]
        return next(filter(Path.is_file, places), None)
    for_train, for_val = SPLITS[0], SPLITS[1] + SPLITS[2]

    def in_folder(*folders):
        files = [p for folder in folders for p in sorted(folder.glob("[!.]*.json"))]
        return [p for p in files if "keypoint" in p.name] or files  # COCO also has instances and captions
    files = in_folder(ann_root, ann_root / "annotations")
    # "training" counts only as a file's whole name: training_log.json is no annotation file.
    trains, vals = (next(filter(None, (with_word(files, word) for word in split)), [])
                    for split in (for_train[:1], for_val))
    # But beside a file of "validation" alone it is (HumanArt).
    alone = len(files) == 2 and with_word(files, "validation")
    trains = trains or (with_word(files, "training") if alone else [])
    if train := named(for_train, "_annotations.coco.json"):
        val = named(for_val, "_annotations.coco.json")
        beside = [p for p in vals if re.search(rf"(?<![a-z])({'|'.join(for_val)})\d*$", p.stem.lower())
                  and "train" not in p.stem.lower()]  # no report, and not train_val.json
        return train, val or (beside[0] if train in files and len(beside) == 1 else None)
    rest = [p for p in files if re.search("(?i)(?<![a-z])default$", p.stem)
            or p.stem.startswith("person_keypoints_") and not split_of(re.split(r"[\W_]+", p.stem)[-1:])]
    if trains and rest:
        raise UserError(f"{rest[0]}: is of no split, beside {trains[0].name}; give every task of CVAT the "
                        "subset Train, Validation or Test and export again, or move the file away to do "
                        "without it")
    if len(trains) == 1 and len(vals) <= 1:
        return trains[0], vals[0] if vals and vals != trains else None  # not train_val.json
    if len(files) == 1:
        return files[0], None
    for name in ("labels.json", "annotations/instances.json", "annotations.json", "result.json"):
        if not files and (train := named(for_train, name)):
            return train, named(for_val, name)

    def only(split):
        folders = [folder for s in split for folder in (ann_root / s, ann_root / s / "annotations")]
        found = next(filter(None, map(in_folder, folders)), [])
        return found[0] if len(found) == 1 else None
    if not files and (train := only(for_train)):
        return train, only(for_val)
    inner = [p for p in sorted(ann_root.iterdir()) if p.name.lower() in BESIDE and in_folder(p)]
    if not files and len(inner) == 1:
        return find_annotations(inner[0])
    raise not_found(given, ann_root, files)


def not_found(given: Path, ann_root: Path, files: list[Path]) -> UserError:
    """The error for a folder whose files for train and val are not clear; it names some of its JSON files."""
    deeper = [] if files else [*islice(ann_root.glob("*/**/[!.]*.json"), 4)]
    names = [p.name for p in files[:4]] or sorted(p.relative_to(ann_root).as_posix() for p in deeper)
    named = ", ".join(map(printable, names))
    found = f"{len(files)} ({named})" if files else f"none, but deeper in it ({named})" if deeper else "none"
    return UserError(f"--ann-root {given}: sought train.json, train/_annotations.coco.json, a name with "
                     "train, or a single JSON file, in it or in its folder annotations; of JSON files there "
                     f"are {found}; name one file, copy one as train.json and one as val.json to a folder of "
                     "their own, or convert the data (data/README.md)")
