"""Find dog faces and their landmarks in pictures, videos and what a camera sees.

    uv run tools/predict.py photo.jpg                              # the bundled model
    uv run tools/predict.py photos/ "more/*.jpg" clip.mp4 --checkpoint work_dirs/mine/best_model.pth
    uv run tools/predict.py face.jpg --box 120 80 200 210
    uv run tools/predict.py val.json --data-root DogFLW --boxes val.json
    uv run tools/predict.py 0                                      # camera 0 until Ctrl-C, or rtsp://...
    uv run tools/predict.py photos/ --coco mine.json               # correct it, then train on it

INPUT is a picture, a folder, a glob, a video, a COCO file (.json, which lists pictures in --data-root), the
number of a camera, or the address of a stream. Pictures and videos are recognised by their content. Without
boxes, the faces are searched for: a locator (trained with `--crop image`), or else the face model itself,
looks at the whole picture and at overlapping squares of it. Each find is looked at again in the box around
its landmarks, and is kept if that box reproduces itself. Writes overlays, predictions.json (COCO keypoint
results in the original picture's pixels; file names are relative to the folder printed at the end) and
predictions.csv into --out. For videos, both files also give the time of each frame in seconds.
"""
import argparse
import contextlib
import csv
import glob
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from tqdm import tqdm

from dataset import Scheme, load_coco
from tools.lib.boxes import intersections
from tools.lib.cli import (
    Parser,
    Progress,
    UserError,
    add_checkpoint,
    as_argument,
    check_name,
    check_ranges,
    printable,
    run_script,
)
from tools.lib.coco import (
    Notes,
    box_of,
    choose_categories,
    mend_exchanged,
    open_coco,
    place_pictures,
    plainly,
    read_file,
    read_images,
    shows_upright,
    stored_turns,
    turn_faces,
)
from tools.lib.draw import draw_faces, encode_picture, resized
from tools.lib.files import (
    PREDICTIONS,
    TRANSFORMS,
    atomic_write,
    check_new,
    data_root,
    output_folder,
    picture_path,
)
from tools.lib.find import BUNDLED, MIN_SCORE, Predictor, as_result
from tools.lib.pictures import SUFFIXES, format_of, read_picture
from tools.lib.runtime import enough_memory
from tools.lib.video import HANG_UP, Tracker, Video, VideoWriter, name_of, until_stopped
from tools.lib.windows import check_size, inside, whole_box
from train_simple import load_predictor

OUT, TABLE = "predictions", "predictions.csv"  # in --out, beside the overlays and PREDICTIONS
MADE = {PREDICTIONS: "earlier predictions", TRANSFORMS: "earlier aligned faces",
        ".lock": "a run is writing there, or was"}
EVERY = 60  # seconds, at least, between two writes of the results so far, in case the run is killed
CHUNK_BYTES = 200_000_000  # decoded pictures held at a time
MOST_PIXELS = 50_000_000  # in a picture; a larger picture is scaled down
MOST_SIDE = 65_500  # pixels, the longest side of a JPEG
WEIGHTS = ".pth", ".pt", ".ckpt", ".safetensors", ".onnx"  # such a first INPUT is taken for a checkpoint
FACE = {"id": 1, "name": "face"}  # the category, unless a COCO file gives another


# ---------------------------------------------------------------- what to predict

@dataclass
class Source:
    """One thing to predict."""
    place: Path | int | str  # a picture's or video's absolute path, a camera's number, a stream's address
    kind: str  # "picture" or "video"; cameras and streams count as videos
    file: str = ""  # its name in the output files
    target: Path | None = None  # where its overlay goes
    image_id: object = None  # its id in a COCO file
    boxes: list | None = None  # the given [(annotation id, box (4,)), ...]; None: the faces are searched for
    size: tuple = (0, 0)  # width and height of the picture that the boxes refer to; 0 where unknown


@dataclass
class Listing:
    """What a COCO file says of its pictures; it needs no keypoints."""
    ids: dict  # file_name -> image id, the first if it has several
    sizes: dict  # file_name -> (width, height), only where both are known
    # file_name -> [(annotation id, box (4,)), ...]; the id is None for a box without keypoints
    boxes: dict
    category: dict  # its id and name
    turned: bool = False  # whether load_coco has already turned the boxes of pictures that EXIF turns
    upright: bool = False  # whether the program that wrote the file shows pictures upright


def check_box(box: object, where: str) -> np.ndarray:
    """A box of four usable numbers as an array (4,) of x, y, width, height. Raises UserError."""
    usable = box_of(box)
    if usable is None or usable[2:].max() < 2:
        raise UserError(f"{where}: box {printable(box)[:60]} must be four numbers in pixels: x, y, width "
                        "and height, both above 0 and one at least 2")
    return usable


def read_listing(path: Path, root: Path | None = None, with_boxes: bool = True) -> Listing:
    """Read the pictures of a COCO file, and their boxes: a Listing. Raises UserError.

    root: the data root, in which the pictures are looked up as the trainer does it; None keeps the names as
    they are. The Listing's category is the first one that names landmarks.
    """
    content, notes, ids, sizes, boxes = read_file(path), Notes(), {}, {}, {}
    if isinstance(content, list):
        raise UserError(f"{path}: is only a list, as detectors write their boxes; put it into a COCO file "
                        'as annotations: {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [...]}')
    try:
        images = read_images(content["images"], path)
        names = [name.replace("\\", "/") for name, _, _ in images.values()]
        if root:
            names = place_pictures(names, path, root, notes)
        names = dict(zip(images, map(normpath, names)))
        written = {str(image_id): name for image_id, name in names.items()}
        for image_id, name in names.items():
            ids.setdefault(name, image_id)
            size = images[image_id][1]
            if 0 not in size and sizes.setdefault(name, size) != size:
                raise UserError(f"{path}: has two sizes of {printable(name)}; give every picture one entry")
        if root and len(ids) < len(images):
            raise UserError(f"{path}: two of its images have the same file_name; give every picture one "
                            "entry")
        for number, annotation in enumerate(content.get("annotations", []) if with_boxes else ()):
            named = annotation.get("id") is not None
            which = printable(annotation["id"]) if named else f"{number} of the list"
            where = f"{path}: annotation {which}"
            own_id = annotation.get("id") if annotation.get("keypoints") else None
            box = check_box(annotation.get("bbox"), where)
            name = names.get(annotation["image_id"]) or written.get(str(annotation["image_id"]))  # "1" for 1
            if name:
                boxes.setdefault(name, []).append((own_id, box))
            else:
                notes.add("orphans", f"annotation {which}")
        category = next((c for c in content.get("categories", []) if c.get("keypoints")), {})
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as e:
        reason = f"{type(e).__name__}: {str(e)[:60]}"
        raise UserError(f"{path}: not a COCO file with images and bbox ({reason})") from None
    for note in notes.lines():
        print(note, file=sys.stderr)
    return Listing(ids, sizes, boxes, {key: category.get(key, value) for key, value in FACE.items()},
                   upright=shows_upright(content))


def read_boxes(path: Path, root: Path, category: str | None = None, above: bool = False) -> Listing:
    """The Listing of --boxes: the faces with landmarks, as the trainer reads them; if it has none, all boxes.

    With `above`, names may be relative to a folder above `root`: the one in which most of them are files.
    """
    content = read_file(path)
    rows = content.get("annotations") if isinstance(content, dict) else None
    rows = rows if isinstance(rows, list) else ()
    landmarks = [row.get("keypoints") for row in rows if isinstance(row, dict)]
    if not any(isinstance(xyv, list) and any(xyv[2::3]) for xyv in landmarks):
        if category:
            raise UserError(f"--category {category}: {path} has no landmarks, so all its boxes count; leave "
                            "it out")
        return read_listing(path)
    listing = read_listing(path, with_boxes=False)
    levels = max((name.count("/") for name in listing.ids), default=0) if above else 0
    root = max((root, *root.parents[:-1][:levels]),
               key=lambda folder: sum(os.path.isfile(folder / name) for name in listing.ids))
    faces = load_coco(path, root, category)
    for note in faces.notes:
        print(note, file=sys.stderr)
    for file, size, image, own, box in zip(faces.files, faces.sizes.tolist(), faces.image_ids, faces.ids,
                                           faces.boxes, strict=True):
        listing.ids.setdefault(file, image)
        listing.sizes[file] = tuple(size)
        listing.boxes.setdefault(file, []).append((own, box))
    chosen, _ = choose_categories(open_coco(path), category, path)
    first = next(iter(chosen.values()))
    listing.category, listing.turned = {key: first.get(key, value) for key, value in FACE.items()}, True
    return listing


def made_before(folder: Path) -> str | None:
    """What a folder holds that these tools have made, or None."""
    return next((what for name, what in MADE.items() if os.access(folder / name, os.F_OK)), None)


def matches_of(text: str, out: Path) -> list[Path]:
    """The paths that a glob matches, without the output folders of these tools; prints which those are."""
    matches, left, output = [], set(), os.path.realpath(out)
    parts, pattern = Path(text).parts, text
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), 0)
    if real := next((i for i in range(len(parts), fixed, -1) if os.path.isdir(Path(*parts[:i]))), 0):
        # The brackets of an existing folder, as in "dogs [2024]", are its name.
        fixed, pattern = real, os.path.join(glob.escape(str(Path(*parts[:real]))), *parts[real:])
        pattern += os.sep if text.endswith(("/", os.sep)) else ""
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        folders = [Path(*path.parts[:n]) for n in range(fixed + 1, len(path.parts) + 1)]
        made = next((f for f in folders if made_before(f) and os.path.realpath(f) != output), None)
        if made and made not in left:
            left.add(made)
            print(f"{printable(made)}: is left out: {made_before(made)}", file=sys.stderr)
        matches += [] if made else [path]
    if Path(text).name == "**":  # what is in its folders matches, too
        matches = [path for path in matches if not path.is_dir()]
    return matches


def files_in(folder: Path, out: Path) -> list[Path]:
    """All files below a folder, in order. Says which of its folders are left out, and why."""
    found, output = [], os.path.realpath(out)

    def unread(error: OSError) -> None:
        print(f"{printable(error.filename)}: is left out: {error.strerror}", file=sys.stderr)
    for at, folders, files in os.walk(folder, onerror=unread):
        for name in [*folders]:
            path = Path(at, name)
            why = "a link to a folder; name it, too" if path.is_symlink() else made_before(path)
            if why and (os.path.realpath(path) != output or why != MADE[".lock"]):  # our own lock
                folders.remove(name)
                if os.path.realpath(path) != output:
                    print(f"{printable(path)}: is left out: {why}", file=sys.stderr)
        found += [Path(at, name) for name in files]
    return sorted(found)


def expand(text: str, out: Path) -> list[Source]:
    """The Sources of an INPUT that is not a COCO file. Prints what else a folder or a glob holds.

    A file that is named by itself is taken for a picture unless it is a video. From folders and globs,
    what lies in `out` is left out. Raises UserError if no picture or video remains.
    """
    if not text:
        raise UserError("an INPUT is empty; name a picture, or . for this folder")
    path = Path(url2pathname(urlparse(text).path) if text.lower().startswith("file://") else text)
    if path == Path(text) and re.match(r"(?i)[a-z][a-z0-9+]+://", text):
        if SUFFIXES.get(Path(urlparse(text).path).suffix[1:].lower(), "video") != "video":
            raise UserError(f"{text}: is a picture on a server; download it, and name its file")
        return [Source(text, "video")]
    if path.is_file():
        return [Source(path, "video" if format_of(path) == "video" else "picture")]
    if camera := re.fullmatch(r"/dev/video(\d+)|(\d+)", text) if not path.is_dir() else None:
        return [Source(int(camera[1] or camera[2]), "video")]
    matches = [path] if path.exists() else matches_of(text, out)
    members = dict.fromkeys(f for m in matches for f in (files_in(m, out) if m.is_dir() else [m]))
    # A broken link is kept: the error that it cannot be read will name it.
    members = [f for f in members if f.is_file() or f.is_symlink() and not os.path.exists(f)]
    files = [f for f in members if not Path(os.path.realpath(f)).is_relative_to(os.path.realpath(out))]
    kinds = {f: "" if f.name.startswith(".") else format_of(f) for f in files}  # ._x are macOS's
    if others := Counter(f.suffix.lower() or f.name for f in files if not kinds[f]):
        named = ", ".join(f"{count} {printable(name)}" for name, count in others.most_common(8))
        print(f"{text}: {others.total()} files in it are neither pictures nor videos ({named})",
              file=sys.stderr)
    if not any(kinds.values()):
        if any(map(format_of, {*members} - {*files})):
            raise UserError(f"--out {out}: the pictures of {text} are in it; name another folder")
        raise UserError(f"{text}: " + ("no pictures in it" if matches else "no such file"))
    return [Source(f, "video" if kind == "video" else "picture") for f, kind in kinds.items() if kind]


def is_listing(text: str) -> bool:
    """Whether an INPUT is a COCO file."""
    return Path(text).suffix.lower() == ".json" and Path(text).is_file()


def list_inputs(inputs: list[str], data_root: Path | None, out: Path) -> tuple[list[Source], dict]:
    """The Sources that the command line names, without repeats, and the category of its last COCO file."""
    sources, ids, category = {}, {}, FACE
    for text in inputs:
        path = Path(text)
        if not is_listing(text):
            found = expand(text, out)
        else:
            listing = read_listing(path, data_root, with_boxes=False)
            known = set(ids.values())
            twice = [name for name, i in listing.ids.items() if i in known and ids.get(name) != i]
            if twice:
                raise UserError(f"{path}: {twice[0]} has the image id of another picture in the COCO file "
                                "before; predict them one by one")
            if not listing.ids:
                raise UserError(f"{path}: no pictures in it")
            ids, category = ids | listing.ids, listing.category
            found = [Source(picture_path(data_root, name), "picture", image_id=i)
                     for name, i in listing.ids.items()]
        for source in found:
            if isinstance(source.place, Path):
                source.place = Path(os.path.abspath(source.place))
            sources.setdefault(source.place, source)
            if sources[source.place].image_id is None:
                sources[source.place].image_id = source.image_id
    return list(sources.values()), category


def take_boxes(sources: list[Source], path: Path, listing: Listing) -> None:
    """Give pictures their boxes and ids from a COCO file, where a name may be any trailing part of a path."""
    names, spelt = {}, defaultdict(list)
    for name in listing.ids:
        spelt[plainly(name)].append(name)
    for source in sources:
        text = source.place.as_posix()
        tails = [text, *(text[i + 1:] for i, c in enumerate(text) if c == "/")]
        alike = next((found for tail in tails if (found := spelt[plainly(tail)])), [])
        name = next((t for t in tails if t in listing.ids), alike[0] if len(alike) == 1 else None)
        source.boxes, source.size = listing.boxes.get(name, []), listing.sizes.get(name, source.size)
        if name and source.image_id is None:
            source.image_id = listing.ids[name]
        if name and names.setdefault(name, source) is not source:
            raise UserError(f"--boxes {path}: {printable(name)} is the name of several of the pictures; "
                            "give their folders in it, too")


def turn_boxes(sources: list[Source], root: Path, upright: bool) -> None:
    """Turn boxes without landmarks as EXIF turns their pictures, in place, where load_coco turns faces."""
    rows, notes = [(source, box) for source in sources for _, box in source.boxes], Notes()
    files, sizes = [source.file for source, _ in rows], np.array([source.size for source, _ in rows])
    boxes, labelled = np.array([box for _, box in rows]), np.ones((len(rows), 2))
    corners = np.array([[box[:2], box[:2] + box[2:]] for box in boxes])
    mend_exchanged(files, sizes, corners, labelled, root, notes)
    turns = stored_turns(files, sizes, corners, labelled, root, notes, upright)
    turn_faces(turns, sizes, boxes, corners, labelled)
    for (source, box), size, turned in zip(rows, sizes.tolist(), boxes):
        source.size, box[:] = tuple(size), turned
    for note in notes.lines():
        print(note, file=sys.stderr)


def plan(args: argparse.Namespace) -> tuple[list[Source], Path, dict]:
    """What is to be predicted, checked before a model is loaded: (Sources, folder of the names, category)."""
    taken = [args.boxes, args.out, args.out / PREDICTIONS, args.out / TABLE, *map(Path, args.input)]
    if args.coco and args.coco.resolve() in [file.resolve() for file in taken if file]:
        raise UserError(f"--coco {args.coco}: is an INPUT, the file of --boxes, or of --out; name another")
    fixed = [(None, check_box(b, "--box")) for b in args.box] if args.box else None
    sources, category = list_inputs(args.input, args.data_root, args.out)
    paths = [s.place for s in sources if isinstance(s.place, Path)]
    try:
        common = args.data_root or (os.path.commonpath([p.parent for p in paths]) if paths else ".")
    except ValueError:  # on Windows, for paths on different drives
        raise UserError("--data-root: is needed for files on several drives") from None
    root = Path(os.path.abspath(common))
    if outside := [p for p in paths if root not in p.parents]:
        raise UserError(f"--data-root {root}: {outside[0]} is not in it; name a folder above all files, or "
                        "predict it in a run of its own")
    for source in sources:
        source.boxes, source.file = fixed, re.sub(r"\W+", "_", name_of(source.place)).strip("_")
        if isinstance(source.place, Path):
            source.file = source.place.relative_to(root).as_posix()
        # Other suffixes stay in the overlay's name, so that a.tif and a.png get different overlays.
        kept = (".mp4",) if source.kind == "video" else (".png", ".jpg", ".jpeg")
        known = Path(source.file).suffix.lower() in kept
        source.target = args.out / (source.file + ("" if known else kept[0]))
    if args.boxes:
        if any(s.kind == "video" for s in sources):
            raise UserError(f"--boxes {args.boxes}: has boxes of pictures; give a video's face with --box")
        if not args.data_root and root == Path(root.anchor):
            raise UserError("--data-root: is needed with --boxes for pictures of unrelated folders")
        listing = read_boxes(args.boxes, root, args.category, above=not args.data_root)
        category = listing.category
        take_boxes(sources, args.boxes, listing)
        if not listing.turned:
            turn_boxes(sources, root, listing.upright)
    if long := [s.file for s in sources if len(os.fsencode(s.target.name)) > 255]:
        raise UserError(f"{printable(long[0])}: its name is too long for the overlay's; rename it")
    targets = Counter(os.path.realpath(s.target) for s in sources)
    clash = [p for p in map(os.path.realpath, paths) if p in targets]
    if clash:
        raise UserError(f"--out {args.out}: {min(clash)} would be overwritten; name another folder")
    if twice := [t for t, n in targets.items() if n > 1]:
        raise UserError(f"--out {args.out}: {min(twice)} would be the overlay of two inputs; rename "
                        "one of them")
    if args.coco and (videos := [s.file for s in sources if s.kind == "video"]):
        raise UserError(f"--coco: a data set is of pictures, and {videos[0]} is a video; save its frames "
                        "first, as by: ffmpeg -i VIDEO -vf fps=1 frames/%05d.jpg")
    return sources, root, category


# ---------------------------------------------------------------- what is written

class Results:
    """Faces as they are found, and the files of all of them."""

    def __init__(self, sources: list[Source], scheme: Scheme, category: dict):
        self.scheme, self.category, self.rows, self.images, self.begun = scheme, category, [], [], False
        self.due, self.empty = time.monotonic() + EVERY, []  # empty: the pictures without a face
        known = [s.image_id for s in sources if isinstance(s.image_id, int)]
        self.new_ids = itertools.count(max(known, default=0) + 1)

    def add(self, source: Source, faces: list[dict], size: tuple[int, int] | None = None,
            frame: int | None = None, seconds: float | None = None) -> None:
        """Keep the faces of a picture of `size` (width, height), or of a frame of a video."""
        self.begun = True
        image_id = next(self.new_ids) if source.image_id is None else source.image_id
        if size:
            self.empty += [] if faces else [source.file]
            width, height = map(int, size)
            self.images.append({"id": image_id, "file_name": source.file, "width": width, "height": height})
        given = [annotation for annotation, _ in source.boxes] if source.boxes and frame is None else []
        for n, (face, annotation) in enumerate(itertools.zip_longest(faces, given[:len(faces)])):
            known = {} if annotation is None else {"annotation_id": annotation}
            row = as_result(face, image_id=image_id, file_name=source.file, category_id=self.category["id"])
            self.rows.append({**row, "face": face.get("id", n), "frame": frame,
                              "time": None if seconds is None else round(seconds, 4), **known})

    def write(self, out: Path, coco: Path | None = None) -> None:
        """predictions.json, a list of COCO keypoint results; predictions.csv; the data set `coco`."""
        begin, text = time.monotonic(), io.StringIO()
        table, first = csv.writer(text, lineterminator="\n"), ("frame", "time", "face", "score")
        table.writerow(["file", *first, "box_x", "box_y", "box_w", "box_h",
                        *(f"{name}_{part}" for name in self.scheme.names for part in ("x", "y", "score"))])
        for r in self.rows:
            table.writerow([r["file_name"], *(r[key] for key in first), *r["bbox"], *r["keypoints"]])
        atomic_write(out / PREDICTIONS, [json.dumps(self.rows).encode()])
        # Names that are not valid text (from an old zip, say) are escaped.
        atomic_write(out / TABLE, [text.getvalue().encode(errors="backslashreplace")])
        if coco:
            atomic_write(coco, [json.dumps(self.as_dataset()).encode()])
        now = time.monotonic()
        self.due = now + max(EVERY, 19 * (now - begin))  # so writing takes a twentieth of the time at most

    def as_dataset(self) -> dict:
        """A COCO keypoint data set for labelling tools and train_simple.py: v is 2 in the picture, else 1."""
        sizes, annotations = {i["id"]: (i["width"], i["height"]) for i in self.images}, []
        for number, row in enumerate(self.rows, 1):
            size = np.array(sizes[row["image_id"]])
            points = np.reshape(row["keypoints"], (-1, 3))[:, :2].round(2)
            v = np.where(inside(points, size), 2, 1)
            x, y, w, h = row["bbox"]
            left, top = np.clip([x, y], 0, size).round(2).tolist()
            right, bottom = np.clip([x + w, y + h], 0, size).round(2).tolist()
            triples = zip(*points.T.tolist(), v.tolist(), strict=True)
            annotations.append({
                "id": number, "image_id": row["image_id"], "category_id": row["category_id"], "iscrowd": 0,
                "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                "area": round((right - left) * (bottom - top), 2), "num_keypoints": len(v),
                "keypoints": [*itertools.chain(*triples)], "score": row["score"]})
        scheme = self.scheme
        category = {**self.category, "supercategory": "animal", "keypoints": scheme.names,
                    "skeleton": [[i + 1, j + 1] for i, j in scheme.skeleton], "flip_pairs": scheme.flip_pairs,
                    "regions": scheme.regions, "interocular": scheme.interocular}
        info = {"description": "landmarks predicted by tools/predict.py, to be corrected"}
        return {"info": info, "licenses": [], "images": self.images, "annotations": annotations,
                "categories": [category]}


# ---------------------------------------------------------------- predicting

class PictureQueue:
    """A queue of pictures: they are read one by one, predicted in full batches, and written."""

    def __init__(self, predictor: Predictor, results: Results, args: argparse.Namespace):
        self.predictor, self.results, self.args, self.waiting = predictor, results, args, []
        self.warned = False  # whether the user was warned of boxes that may be x1, y1, x2, y2

    def add(self, source: Source) -> None:
        """Read a picture; predict those that wait when they fill a batch. Raises UserError naming it."""
        if self.args.coco:
            check_name(source.file)
        image, size = read_picture(source.place, MOST_PIXELS)
        scale, boxes = np.divide(size, image.shape[1::-1]), None
        if source.boxes is not None:
            if not source.boxes:
                raise UserError(f"{source.place}: no box for it in {self.args.boxes}; add one, or leave the "
                                "picture out")
            if 0 not in source.size:
                check_size(source.place, size, source.size)
            boxes = np.stack([box for _, box in source.boxes])
            if not intersections(boxes, whole_box(size)[None]).all():
                raise UserError(f"{source.place}: a box lies outside this picture of {size[0]} x {size[1]} "
                                "pixels")
            corners = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= size)
            out = (boxes[:, :2] + boxes[:, 2:] > 1.05 * np.array(size)).any(1) & corners.all(1)
            if out.any() and not self.warned:
                self.warned = True
                tqdm.write(f"{printable(source.file)}: box {boxes[out][0].tolist()} leaves its picture; if "
                           "it is x1, y1, x2, y2, write x, y, width, height", file=sys.stderr)
            boxes = np.concatenate([(boxes[:, :2] + 0.5) / scale - 0.5, boxes[:, 2:] / scale], axis=1)
        if max(image.shape) > MOST_SIDE:
            raise UserError(f"{source.place}: its {size[0]} x {size[1]} pixels are too long for an overlay; "
                            "cut it into parts")
        if scale.max() > 1:
            tqdm.write(f"{printable(source.file)}: its {size[0]} x {size[1]} pixels are scaled down to "
                       f"{image.shape[1]} x {image.shape[0]} for prediction and overlay; coordinates refer "
                       "to the original",
                       file=sys.stderr)
        self.waiting.append((source, image, size, boxes))
        held = sum(image.size for _, image, _, _ in self.waiting)
        if len(self.waiting) >= self.args.batch_size or held > CHUNK_BYTES:
            self.finish()

    def finish(self) -> None:
        """Predict and write the pictures that wait."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        _, images, _, boxes = map(list, zip(*waiting))
        try:
            found = self.predictor.many(images, boxes, self.args.min_score)
        except UserError as e:
            names = ", ".join(source.file for source, *_ in waiting)[:200]
            raise UserError(f"not predicted: {printable(names)}: {e}") from None
        for (source, image, size, _), faces in zip(waiting, found, strict=True):
            self.results.add(source, resized(faces, np.divide(size, image.shape[1::-1])), size)
            drawn = draw_faces(image, faces, self.predictor.scheme)
            atomic_write(source.target, [encode_picture(drawn, source.target.suffix.lower())])


def predict_video(predictor: Predictor, source: Source, results: Results, min_score: float) -> None:
    """Follow the faces through a video, or through what a camera sees, until its end or Ctrl-C.

    After a signal the video written so far is complete, and KeyboardInterrupt ends the run; only Ctrl-C of a
    live source lets it go on. Raises UserError naming a video that cannot be read or written; the faces found
    so far are kept.
    """
    boxes, sound = source.boxes and [box for _, box in source.boxes], None
    with until_stopped() as stopped, contextlib.ExitStack() as stack:
        video, tracker, writer = Video(source.place), Tracker(predictor, boxes, min_score), None
        if video.live:
            tqdm.write(f"{video.name}: following it until Ctrl-C", file=sys.stderr)
        else:
            sound = source.place if isinstance(source.place, Path) else None
        bar = stack.enter_context(tqdm(desc=video.name[-40:], total=video.length or None, unit="frame",
                                       leave=False, disable=None))
        for number, (seconds, frame) in enumerate(video.frames(stopped)):
            size = frame.shape[1::-1]
            if boxes and not number and not intersections(np.stack(boxes), whole_box(size)[None]).all():
                raise UserError(f"{video.name}: a --box lies outside its {size[0]} x {size[1]} pixels")
            if not number and video.stretch != 1:
                tqdm.write(f"{video.name}: its pixels are not square; coordinates refer to its frames as "
                           f"played, {size[0]} x {size[1]}", file=sys.stderr)
            faces = tracker(frame, seconds)
            if boxes and not number and len(faces) < len(boxes):
                tqdm.write(f"{video.name}: {len(boxes) - len(faces)} of its --box score below --min-score "
                           f"{min_score} and are not followed; lower it", file=sys.stderr)
            results.add(source, faces, frame=number, seconds=seconds)
            writer = writer or stack.enter_context(VideoWriter(source.target, video.rate, size))
            steady = [{**face, "points": face["steady"]} for face in faces]  # to look at, not to measure
            writer.write(draw_faces(frame, steady, predictor.scheme), seconds)
            bar.update()
        if writer and (word := writer.finish(sound)):
            tqdm.write(f"{source.target}: written {word}", file=sys.stderr)
    if stopped.is_set():
        tqdm.write(f"{video.name}: stopped; what was seen until then is written", file=sys.stderr)
        if not video.live or stopped.number != signal.SIGINT:  # Ctrl-C is how a live stream ends
            raise KeyboardInterrupt(stopped.number)
    if video.cut:
        raise UserError(f"{video.name}: {video.cut}")


def predict_all(sources: list[Source], predictor: Predictor, results: Results,
                args: argparse.Namespace) -> int:
    """Predict every source. Prints one line for each that fails, and returns how many did."""
    failed, pictures = 0, PictureQueue(predictor, results, args)
    with Progress(len(sources), "files") as progress:
        for number, source in enumerate(sources, 1):
            try:
                if source.kind == "picture":
                    pictures.add(source)
                else:
                    pictures.finish()  # what waits would be lost if the video is stopped
                    predict_video(predictor, source, results, args.min_score)
            except UserError as e:
                failed += 1
                tqdm.write(f"error: {printable(e)}", file=sys.stderr)
            progress.update(number)
            if results.begun and time.monotonic() >= results.due:
                results.write(args.out)
    pictures.finish()
    return failed


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line. Raises UserError."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("input", nargs="+", metavar="INPUT",
        help="pictures, folders, globs, videos, a COCO file, a camera, a stream")
    add_checkpoint(parser, "best_model.pth of a run; may also be the first INPUT", positional=False)
    add("--data-root", type=Path, metavar="DIR",
        help="folder that file names are relative to (default: kagglehub's DogFLW if an INPUT is a COCO "
             "file, else the common folder of all files)")
    add("--category", metavar="NAME", help="category to use, if those in --boxes have different landmarks")
    boxes = parser.add_mutually_exclusive_group()
    boxes.add_argument("--boxes", type=Path, metavar="FILE", help="a COCO file with a bbox for each face")
    boxes.add_argument("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "W", "H"),
                       help="a face's box, for every picture and for a video's first frame; may be repeated")
    add("--locator", type=Path, metavar="FILE",
        help="a checkpoint trained with --crop image (default: locator.pth beside the checkpoint, or "
             "../locator/best_model.pth; for DogFLW's landmarks the bundled one)")
    add("--min-score", type=float, default=MIN_SCORE, metavar="S",
        help=f"leave out found faces with a lower score (default: {MIN_SCORE})")
    add("--out", type=Path, metavar="DIR", help="output folder (default: predictions, or predictions_2, ...)")
    add("--coco", type=Path, metavar="FILE", help="also write a COCO data set, to correct and to train on")
    add("--force", action="store_true",
        help="write into a folder that is not empty, and over an existing --coco FILE")
    add("--batch-size", type=int, default=32, metavar="N", help="crops a forward pass (default: 32)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    first = Path(args.input[0])
    run = not args.checkpoint and args.input[0] and os.path.isfile(first / "best_model.pth")
    if first.suffix.lower() in WEIGHTS or run:  # the older way to give a checkpoint
        args.input.pop(0)
        if args.checkpoint:
            raise UserError(f"--checkpoint {args.checkpoint} and {first}: give one checkpoint")
        args.checkpoint = first
    if not args.input:
        raise UserError(f"{args.checkpoint}: is a checkpoint; name a picture, folder or video after it")
    check_ranges(args, batch_size="[1, inf)", min_score="[0, 1]")
    if args.data_root or any(map(is_listing, args.input)):
        args.data_root = data_root(args.data_root)
    if args.coco and args.coco.is_dir():
        raise UserError(f"--coco {args.coco}: is a folder; name a file")
    if args.coco:
        check_new("--coco", args.force, args.coco)
        args.coco.parent.mkdir(parents=True, exist_ok=True)  # so that it fails now, not after hours
    if args.category and not args.boxes:
        raise UserError("--category: selects faces in --boxes; give both, or leave it out")
    return args


def run(args: argparse.Namespace) -> None:
    """Find, predict, write. Raises UserError at the end for what could not be predicted."""
    sources, root, category = plan(args)
    predictor = load_predictor(args.checkpoint, args.locator, args.device, args.batch_size)
    if predictor.face.whole and (args.box or args.boxes):
        raise UserError(f"{args.checkpoint}: sees whole pictures (trained with --crop image), so it takes no "
                        "boxes")
    if predictor.face.whole and (videos := [s.place for s in sources if s.kind == "video"]):
        raise UserError(f"{name_of(videos[0])}: a locator (trained with --crop image) cannot follow faces; "
                        "give a face model")
    if not (predictor.locator or predictor.face.whole) and any(s.boxes is None for s in sources):
        print("no locator fits this model, so it searches alone, and finds less; for dogs, this one may do: "
              f"--locator {as_argument(BUNDLED.with_name('locator.pth'))}", file=sys.stderr)
    results, failed = Results(sources, predictor.scheme, category), len(sources)
    try:
        with enough_memory():
            failed = predict_all(sources, predictor, results, args)
    finally:  # a run that is stopped keeps what it has
        if results.begun:  # even without a face, so that later runs recognise the folder
            results.write(args.out, args.coco)
    done = len(sources) - failed
    if done or results.rows:
        print(f"{len(results.rows)} faces in {done} files -> {printable(args.out)}; names are relative to "
              f"{printable(root)}")
    if args.min_score and (some := results.empty[:3]):
        more = ", ..." if len(results.empty) > len(some) else ""
        print(printable(f"no face was found in {len(results.empty)} pictures ({', '.join(some)}{more}); a "
                        f"--min-score below {args.min_score} finds weaker ones"))
    if args.coco and results.rows:
        print(printable(f"{args.coco}: {len(results.images)} pictures to correct; then: python "
                        f"train_simple.py --ann-root {as_argument(args.coco)} --data-root "
                        f"{as_argument(root)} --holdout 0.1; with fewer than a few hundred pictures take "
                        "the command under 'How many pictures do I need' in data/README.md"))
    if failed:
        raise UserError(f"{failed} of {len(sources)} files could not be predicted, or only in part; see the "
                        "errors above")


def stop_once(number: int, _) -> None:
    """Treat a signal as Ctrl-C, so that results are kept, and ignore it while they are written."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with contextlib.suppress(ValueError):  # only the main thread can set handlers
        for number in (signal.SIGTERM, HANG_UP):
            if number and signal.getsignal(number) == signal.SIG_DFL:  # unless it is ignored, as by nohup
                signal.signal(number, stop_once)
    with output_folder(args.out, OUT, args.force) as args.out:
        run(args)


if __name__ == "__main__":
    run_script(main)
