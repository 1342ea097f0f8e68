"""Find dog faces and their landmarks in pictures and videos.

    uv run python tools/predict.py work_dirs/hrnet_w32/best_model.pth photos/ "more/*.jpg" clip.mp4
    uv run python tools/predict.py best_model.pth face.jpg --box 120 80 200 210
    uv run python tools/predict.py best_model.pth val.json --data-root DogFLW --boxes val.json

INPUT is a picture, a folder, a glob, a video, or a COCO file's list of pictures (.json, with --data-root). Without
boxes the faces are found: a locator (the same trainer with `--crop image`), or else the face model itself, looks at
the whole picture and at overlapping squares of it; each finding is looked at again in the box around its landmarks,
and stays if that box reproduces itself. Writes overlays, predictions.json (COCO keypoint results, in the original
picture's pixels, file names relative to the folder printed at the end) and predictions.csv into --out.

In a notebook:

    from tools.predict import load_predictor
    predictor = load_predictor("best_model.pth")
    faces = predictor(image_rgb)  # [{"box": (4,), "points": (K, 2), "scores": (K,), "score": float}, ...]
"""
import csv
import glob
import io
import itertools
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import torch
from tqdm import tqdm

import dataset as data
from dataset import Parser, UserError, atomic_write, run_script
from train_simple import choose_amp, choose_device, load_model, predict_heatmaps

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a video that cannot be read is named by us, in one line
CHUNK_BYTES = 200_000_000  # decoded pictures held at a time
MIN_SCORE = 0.5  # mean of the landmarks' scores, which are probabilities of being about right; chosen on held-out train faces
FAINT = 0.1  # what scores less is dropped before its second look already
# Box = landmarks' hull + 20 % on each side. DogFLW's boxes have 10 %, but predicted landmarks reach less far than true
# ones, and a box that is too small loses hanging ears for good, while one too large mends itself at the next look.
MARGIN = 0.2
# The squares looked at first: sides as parts of the picture's longer side, each overlapping the next by half. A
# locator was trained on faces of all sizes, so it needs fewer.
FACE_SIDES, LOCATOR_SIDES = (3 / 4, 1 / 2, 1 / 3, 1 / 4), (3 / 4, 1 / 2)
STABLE = 0.5  # IoU of the second look's box and the one its landmarks give: a face reproduces its box, background drifts
SAME = 0.7  # IoU of two findings from which on they are one at first; which of several is the face shows later
OVERLAP = 0.5  # of the smaller box: at last two findings with more are one face; IoU would keep an eye inside a face
FIND_EVERY = 10  # frames of a video between searches for new faces; between them known ones are followed
# One-euro filter (Casiez, Roussel, Vogel, CHI 2012), speeds in face sizes a second: a still face is smoothed at
# MIN_CUTOFF Hz, and BETA opens the filter as it moves, which keeps the lag under a frame.
MIN_CUTOFF, BETA, SPEED_CUTOFF = 1.0, 10.0, 1.0


# ---------------------------------------------------------------- boxes (N, 4) x, y, w, h

def hull_boxes(points):
    """Landmarks (N, K, 2) -> the boxes around them (N, 4), at least two pixels wide."""
    low, high = points.min(1), points.max(1)
    extent = np.maximum(high - low, 2)
    return np.concatenate([(low + high) / 2 - extent * (0.5 + MARGIN), extent * (1 + 2 * MARGIN)], axis=1)


def suppress(boxes, scores, nested=True):
    """Non-maximum suppression: indices of the best-scored boxes, none of which are one face.

    That is: with `nested`, share more than OVERLAP of the smaller; else have an IoU of more than SAME.
    """
    area, limit = boxes[:, 2:].prod(1), OVERLAP if nested else SAME
    shared = data.intersections(boxes, boxes) / np.minimum(area[:, None], area) if nested else data.overlaps(boxes, boxes)
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if not kept or shared[i, kept].max() <= limit:
            kept.append(i)
    return np.array(kept, dtype=int)


def windows(image, sides):
    """The whole picture and squares that cover it, each overlapping its neighbours by half or more: (N, 4)."""
    height, width = image.shape[:2]
    boxes = [data.whole_box((width, height))]
    for part in sides:
        side = max(2.0, max(width, height) * part)
        xs, ys = (np.linspace(0, n - side, math.ceil(2 * (n - side) / side) + 1) if n > side else [(n - side) / 2]
                  for n in (width, height))
        boxes += [(x, y, side - 1, side - 1) for y in ys for x in xs]
    return np.array(boxes)


# ---------------------------------------------------------------- the predictor

class Network:
    """A checkpoint that looks at boxes of pictures."""

    def __init__(self, checkpoint, device, batch_size):
        self.model, self.scheme, args, _ = load_model(checkpoint, device)
        self.size, self.padding, self.whole = args["input_size"], args["padding"], args.get("crop") == "image"
        self.device, self.amp, self.batch_size = device, choose_amp(device, args.get("amp", True)), batch_size
        index = self.scheme.flip_index
        self.flip_index = torch.tensor(index, device=device) if index else None

    def look(self, jobs, flip=True):
        """[(image, box), ...] -> points (N, K, 2) in the picture's pixels, scores (N, K)."""
        k = len(self.scheme.names)
        points, scores = np.empty((len(jobs), k, 2)), np.empty((len(jobs), k))
        for start in range(0, len(jobs), self.batch_size):
            part = slice(start, start + self.batch_size)
            cut = [data.predict_crop(image, box, self.size, self.padding) for image, box in jobs[part]]
            crops, matrices = torch.from_numpy(np.stack([c for c, _ in cut])).to(self.device), np.stack([m for _, m in cut])
            heatmaps = predict_heatmaps(self.model, crops, self.flip_index if flip else None, self.amp)
            decoded, peaks = data.decode_heatmaps(heatmaps)
            points[part] = data.apply_matrix(data.invert_matrix(matrices), decoded.cpu().double().numpy())
            scores[part] = peaks.cpu().numpy()
        return points, scores


class Predictor:
    """Landmarks of the faces in a picture; made by `load_predictor`."""

    def __init__(self, face, locator=None):
        self.face, self.locator, self.scheme = face, locator, face.scheme

    def __call__(self, image, boxes=None, min_score=MIN_SCORE):
        """One RGB picture (H, W, 3) uint8 -> a list of faces, best first where they were found.

        A face is {"box": (4,) x y w h, "points": (K, 2) x y in the picture, "scores": (K,) of 0..1,
        "score": their mean}. With boxes (N, 4) exactly these are looked at; without, faces are found, and those
        with a score below min_score are left out.
        """
        return self.many([image], [boxes], min_score)[0]

    def many(self, images, boxes, min_score=MIN_SCORE):
        """The same for several pictures at once, in full batches; boxes holds an array or None for each."""
        sought = [i for i, b in enumerate(boxes) if b is None and not self.face.whole]
        given = [(i, box) for i, b in enumerate(boxes) if i not in sought
                 for box in (np.reshape(b, (-1, 4)) if b is not None else [data.whole_box(images[i].shape[1::-1])])]
        faces = [[] for _ in images]
        for picture, box, points, scores in (*self._look(images, given), *self._find(images, sought, min_score)):
            faces[picture].append({"box": box, "points": points, "scores": scores, "score": float(scores.mean())})
        return faces

    def _look(self, images, boxes, net=None, flip=True):
        """[(picture, box)] -> [(picture, box, points, scores)]."""
        points, scores = (net or self.face).look([(images[i], box) for i, box in boxes], flip)
        return [(i, box, p, s) for (i, box), p, s in zip(boxes, points, scores, strict=True)]

    def _find(self, images, sought, min_score):
        """Look at windows, then with the face model at the boxes of what was found; what is not stable then is no face.

        A part of a face can score higher than all of it, so what overlaps is kept until the face model has looked; then
        the box that best reproduces itself stays, the larger of similar ones. More looks would not help: boxes inside
        a face shrink from look to look, and displace it (measured on held-out faces).
        """
        net, sides = (self.locator, LOCATOR_SIDES) if self.locator else (self.face, FACE_SIDES)
        boxes = [(i, box) for i in sought for box in windows(images[i], sides)]
        for again in (False, True):
            looks, found = self._look(images, boxes, self.face if again else net, flip=again), []
            for i in sought:
                mine = [look for look in looks if look[0] == i and look[3].mean() >= min(FAINT, min_score)]
                if mine:
                    tight, seen = hull_boxes(np.stack([look[2] for look in mine])), np.stack([look[1] for look in mine])
                    stable = np.diagonal(data.overlaps(seen, tight)) if again else 1.0
                    scores = stable * np.array([look[3].mean() for look in mine]) * np.sqrt(tight[:, 2:].max(1))
                    found += [(i, tight[n], *mine[n][1:]) for n in suppress(tight, scores, nested=again)]
            boxes = [(i, tight) for i, tight, *_ in found]
        return [(i, tight, points, scores) for i, tight, seen, points, scores in sorted(found, key=lambda f: -f[4].mean())
                if scores.mean() >= min_score and data.overlaps(seen[None], tight[None]) >= STABLE]


def load_predictor(checkpoint, locator=None, device="auto", batch_size=32):
    """A Predictor from a face checkpoint.

    locator: a checkpoint trained with `--crop image`; None takes locator.pth beside the checkpoint, or
    ../locator/best_model.pth of a neighbouring run, where there is one; False does without.
    """
    device, checkpoint = choose_device(device), Path(checkpoint)
    beside = (checkpoint.parent / "locator.pth", checkpoint.parent.parent / "locator" / "best_model.pth")
    if locator is None:
        locator = next((p for p in beside if p.is_file() and p.resolve() != checkpoint.resolve()), None)
    face = Network(checkpoint, device, batch_size)
    locator = Network(locator, device, batch_size) if locator and not face.whole else None
    if locator and not locator.whole:
        raise UserError("the locator was trained on faces; train one with: train_simple.py --crop image")
    return Predictor(face, locator)


# ---------------------------------------------------------------- video

class OneEuroFilter:
    """Steadies (K, 2) points over time; landmark by landmark, all at once."""

    def __init__(self, rate):
        self.rate, self.points, self.speed = rate, None, 0.0

    def _weight(self, cutoff):
        return 1 / (1 + self.rate / (2 * math.pi * cutoff))

    def __call__(self, points, size):
        """The points of the next frame, steadied; `size` of the face in pixels makes speeds comparable."""
        if self.points is not None:
            speed = (points - self.points) * self.rate
            self.speed = self.speed + self._weight(SPEED_CUTOFF) * (speed - self.speed)
            cutoff = MIN_CUTOFF + BETA * np.linalg.norm(self.speed, axis=1, keepdims=True) / size
            points = self.points + self._weight(cutoff) * (points - self.points)
        self.points = points
        return points


def read_frames(path):
    """Yield the RGB frames of a video; its rate and length come with the first. Raises UserError without frames."""
    capture, number = cv2.VideoCapture(str(path)), 0
    rate, length = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    while True:
        good, frame = capture.read()
        if not good:
            break
        number += 1
        yield (rate if 0 < rate < 600 else 25.0), max(0, length), frame[..., ::-1]
    capture.release()
    if not number:
        raise UserError(f"{path}: cannot be read as a video")


def predict_video(predictor, path, target, boxes, min_score):
    """Follow the faces through a video, write it with landmarks to `target`, and yield (frame, faces)."""
    temporary, writer, tracks, count = target.with_name(f".{target.stem}.tmp.mp4"), None, [], 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tqdm(desc=path.name, unit="frame", leave=False, disable=None) as bar:
            for number, (rate, length, frame) in enumerate(read_frames(path)):
                if predictor.face.whole:
                    raise UserError(f"{path}: a locator (trained with --crop image) cannot follow faces; give a face model")
                if writer is None:
                    bar.total = length or None
                    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), round(rate, 2), frame.shape[1::-1])
                    if not writer.isOpened():
                        raise UserError(f"{target}: OpenCV cannot write an mp4 of {frame.shape[1]} x {frame.shape[0]} here")
                    tracks = [{"box": box} for box in ([] if boxes is None else boxes)]
                faces = predictor(frame, [t["box"] for t in tracks]) if tracks else []
                followed = [{**t, **f} for t, f in zip(tracks, faces, strict=True) if f["score"] >= min_score]
                if number % FIND_EVERY == 0 and (number or not tracks) or len(followed) < len(tracks):
                    followed += predictor(frame, min_score=min_score)
                tracks = []
                for track in followed:
                    tight = hull_boxes(track["points"][None])
                    if tracks and (data.intersections(tight, np.stack([t["box"] for t in tracks])).max()
                                   > OVERLAP * tight[:, 2:].prod()):
                        continue
                    if "id" not in track:
                        track["id"], track["filter"], count = count, OneEuroFilter(rate), count + 1
                    track["points"] = track["filter"](track["points"], tight[0, 2:].max())
                    track["box"] = hull_boxes(track["points"][None])[0]
                    tracks.append(track)
                writer.write(np.ascontiguousarray(draw_faces(frame, tracks, predictor.scheme)[..., ::-1]))
                bar.update()
                yield number, tracks
        writer.release()
        if cv2.VideoCapture(str(temporary)).get(cv2.CAP_PROP_FRAME_COUNT) != number + 1:  # OpenCV itself says nothing
            raise UserError(f"{target}: could not be written whole; is the disk full?")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- inputs and outputs

def draw_faces(image, faces, scheme):
    """A copy of the picture with every face's landmarks."""
    for face in faces:
        image = data.draw_landmarks(image, face["points"], scheme)
    return image


def check_box(box, where):
    """A box of four usable numbers as an array, or UserError."""
    box = np.array(box, dtype=float).reshape(4)
    if not (np.isfinite(box).all() and np.abs(box).max() < 1e6 and box[2:].min() > 0):
        raise UserError(f"{where}: box {box.tolist()} needs a finite x and y, and a width and height above 0")
    return box


def read_coco(path, with_boxes=True):
    """A COCO file, whose keypoints are not needed: {file_name: image id}, {file_name: [(annotation id, box), ...]}, category id.

    The annotation id is None where it has no keypoints: the box is a detector's then, and its id too. Raises UserError.
    """
    content, ids, boxes = data.load_json(path), {}, {}
    try:
        names = {image["id"]: PurePosixPath(image["file_name"]).as_posix() for image in content["images"]}
        for image_id, name in names.items():
            if name in ids or len(names) < len(content["images"]):
                raise UserError(f"{path}: two of its images have the same file_name or id; give every picture one entry")
            ids[name] = image_id
        for annotation in content.get("annotations", []) if with_boxes else ():
            where = f"{path}: annotation {annotation.get('id')}"
            boxes.setdefault(names[annotation["image_id"]], []).append(
                (annotation.get("id") if annotation.get("keypoints") else None, check_box(annotation["bbox"], where)))
        category = next((c.get("id", 1) for c in content.get("categories", []) if c.get("keypoints")), 1)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as e:
        raise UserError(f"{path}: not a COCO file with images and bbox ({type(e).__name__}: {str(e)[:60]})") from None
    return ids, boxes, category


def list_inputs(args):
    """Absolute paths of pictures and videos, without repeats; {file_name: image id} and category id of COCO files among them."""
    paths, ids, category = [], {}, 1
    for text in args.input:
        path = Path(text)
        if path.suffix.lower() == ".json" and path.is_file():
            if not args.data_root:
                raise UserError(f"{path}: a COCO file needs --data-root, the folder its names are relative to")
            names, _, category = read_coco(path, with_boxes=False)
            found = [data.picture_path(args.data_root, name) for name in names]
            known = set(ids.values())
            twice = [name for name, i in names.items() if i in known and ids.get(name) != i]
            if twice:
                raise UserError(f"{path}: {twice[0]} has the image id of another picture in the COCO file before; predict them one by one")
            ids |= names
        else:
            found = []
            for match in [path] if path.exists() else sorted(map(Path, glob.glob(text, recursive=True))):
                found += [match] if not match.is_dir() else sorted(
                    f for f in match.rglob("*") if f.suffix.lower() in PICTURES | VIDEOS and f.name[:2] != "._"  # macOS's
                    and args.out.resolve() not in f.resolve().parents)
        if not found:
            raise UserError(f"{text}: " + ("no pictures in it" if path.exists() else "no such file"))
        paths += found
    return [Path(p) for p in dict.fromkeys(os.path.abspath(p) for p in paths)], ids, category


def write_results(out, rows, scheme, category):
    """predictions.json, a plain list of COCO keypoint results, and predictions.csv with the landmarks' names."""
    results = [{"image_id": r["image_id"], "file_name": r["file"], "category_id": category, "bbox": r["box"].round(2).tolist(),
                "keypoints": np.column_stack([r["points"], r["scores"]]).round(3).ravel().tolist(),
                "score": round(r["score"], 4), "face": r["face"], "frame": r["frame"],
                **({} if r["annotation_id"] is None else {"annotation_id": r["annotation_id"]})} for r in rows]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "frame", "face", "score", "box_x", "box_y", "box_w", "box_h"]
                   + [f"{name}_{part}" for name in scheme.names for part in ("x", "y", "score")])
    table.writerows([r["file_name"], r["frame"], r["face"], r["score"], *r["bbox"], *r["keypoints"]] for r in results)
    for name, content in (("predictions.json", json.dumps(results)), ("predictions.csv", text.getvalue())):
        atomic_write(out / name, [content.encode()])


def parse_args(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="best_model.pth of a run")
    add("input", nargs="+", metavar="INPUT", help="pictures, folders, globs, videos, or a COCO file")
    add("--data-root", type=Path, metavar="DIR", help="folder that a COCO file's names are relative to")
    boxes = parser.add_mutually_exclusive_group()
    boxes.add_argument("--boxes", type=Path, metavar="FILE", help="a COCO file with a bbox for each face")
    boxes.add_argument("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "W", "H"),
                       help="a face's box, the same in every picture; may be repeated; in a video, where it starts")
    add("--locator", type=Path, metavar="FILE",
        help="a checkpoint trained with --crop image (default: locator.pth beside CHECKPOINT, or ../locator/best_model.pth)")
    add("--min-score", type=float, default=MIN_SCORE, metavar="S",
        help=f"faces found below it are left out (default: {MIN_SCORE})")
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="(default: predictions)")
    add("--force", action="store_true", help="write into a folder that is not empty")
    add("--batch-size", type=int, default=32, metavar="N", help="crops a forward pass (default: 32)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or not 0 <= args.min_score <= 1:
        raise UserError("--batch-size must be at least 1, and --min-score from 0 to 1")
    data.check_free("--out", args.out, args.force)
    return args


def main(argv=None):
    args = parse_args(argv)
    fixed = [check_box(b, "--box") for b in args.box] if args.box else None
    paths, listed, category = list_inputs(args)
    ids, boxes, category = read_coco(args.boxes) if args.boxes else ({}, None, category)
    ids |= listed
    root = Path(os.path.abspath(args.data_root or os.path.commonpath([p.parent for p in paths])))
    if boxes is not None and any(p.suffix.lower() in VIDEOS for p in paths):
        raise UserError(f"--boxes {args.boxes}: a COCO file has boxes of pictures; give a video's face with --box")
    outside = [p for p in paths if root not in p.parents]
    if outside:
        raise UserError(f"--data-root {root}: {outside[0]} is not in it")
    # Other suffixes are kept in the overlay's name, so that a.tif and a.png do not meet.
    targets = {p: args.out / p.relative_to(root).with_name(p.name + (
        "" if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".mp4") else ".mp4" if p.suffix.lower() in VIDEOS else ".png"))
        for p in paths}
    # A picture's name in --boxes is any tail of its path.
    names = {p: t for p in paths for i in reversed(range(len(p.parts))) if (t := "/".join(p.parts[i:])) in (boxes or {})}
    if len(set(names.values())) < len(names):
        name, *_ = [n for n, count in Counter(names.values()).items() if count > 1]
        raise UserError(f"--boxes {args.boxes}: {name} is the name of several of the pictures; give their folders in it, too")
    clash = {p.resolve() for p in paths} & {t.resolve() for t in targets.values()}
    if clash:
        raise UserError(f"--out {args.out}: {min(clash)} would be overwritten; name another folder")
    predictor = load_predictor(args.checkpoint, args.locator, args.device, args.batch_size)
    if predictor.face.whole and (fixed or boxes is not None):
        raise UserError(f"{args.checkpoint}: sees whole pictures (trained with --crop image), so it takes no boxes")
    rows, failed, new_ids = [], [], itertools.count(max((i for i in ids.values() if isinstance(i, int)), default=0) + 1)

    def keep(path, faces, frame=None):
        file = path.relative_to(root).as_posix()
        name = None if frame is not None else file if file in ids else names.get(path)
        image_id = next(new_ids) if name is None else ids[name]
        annotations = [annotation for annotation, _ in boxes[names[path]]] if boxes else itertools.repeat(None)
        for n, (face, annotation) in enumerate(zip(faces, annotations)):
            rows.append({"file": file, "image_id": image_id, "annotation_id": annotation, "frame": frame,
                         "face": face.get("id", n), **face})

    def boxes_of(path, image):
        given = fixed if boxes is None else [box for _, box in boxes.get(names.get(path), ())]
        if boxes is not None and not given:
            raise UserError(f"{path}: no box for it in {args.boxes}")
        if given and not data.intersections(np.stack(given), data.whole_box(image.shape[1::-1])[None]).all():
            raise UserError(f"{path}: a box lies outside this picture of {image.shape[1]} x {image.shape[0]} pixels")
        return given

    def finish(chunk):
        """Predict the pictures that are decoded by now."""
        for (path, image, _), faces in zip(chunk, predictor.many(
                [c[1] for c in chunk], [c[2] for c in chunk], args.min_score), strict=True):
            keep(path, faces)
            drawn = draw_faces(image, faces, predictor.scheme)
            atomic_write(targets[path], [data.encode_picture(drawn, targets[path].suffix.lower())])
        chunk.clear()

    chunk = []
    try:
        for path in tqdm(paths, unit="file", disable=None):
            try:
                if path.suffix.lower() in VIDEOS:
                    found = list(predict_video(predictor, path, targets[path], fixed, args.min_score))  # all of it or nothing
                    for frame, faces in found:
                        keep(path, faces, frame)
                    continue
                image = data.read_image(path)
                chunk.append((path, image, boxes_of(path, image)))
            except UserError as e:
                failed.append(path)
                tqdm.write(f"error: {data.printable(e)}", file=sys.stderr)
            if len(chunk) == args.batch_size or sum(image.size for _, image, _ in chunk) > CHUNK_BYTES:
                finish(chunk)
        finish(chunk)
    finally:  # a run that is stopped keeps what it has
        if len(failed) < len(paths):
            write_results(args.out, rows, predictor.scheme, category)
    print(f"{len(rows)} faces in {len(paths) - len(failed)} files -> {args.out}; names are relative to {root}")
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} files could not be predicted; they are named above")


if __name__ == "__main__":
    run_script(main)
