"""Score a model, or the results of any other program, on the faces of a COCO file.

    uv run tools/evaluate.py --ann val.json --data-root DogFLW                 # the bundled model
    uv run tools/evaluate.py --checkpoint work_dirs/hrnet_w32/best_model.pth   # its val.json
    uv run tools/evaluate.py --results theirs.json --ann val.json --data-root DogFLW --out report
    uv run tools/evaluate.py --checkpoint best_model.pth --results predictions/predictions.json --match

Writes report.html (one self-contained page), report.json, report.csv and the pictures into --out: errors by
region, kind of ear, pose, landmark, breed and face, the worst faces, and how far the scores can be trusted.
A results file is COCO's, [{"image_id", "keypoints": [x, y, score, ...], "score"}], with "annotation_id" where
a picture has several faces. If a face has several results, the one with the highest score counts. --match is
for programs that find the faces themselves, as tools/predict.py does without boxes: a face takes the result
that overlaps it best, and the report says how many faces were found. With --checkpoint, it also compares the
error with the checkpoint's own in the true boxes.

Beware: some published errors are measured in a crop stretched to a square, where the same predictions
have another error (8.57 there was 8.04 in the picture). Here all errors are in the picture's pixels.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import numpy as np

import dataset as data
from dataset import DogFLWDataset, Faces
from tools.lib.boxes import TINY, box_around, overlaps
from tools.lib.checkpoints import SEEN
from tools.lib.cli import (
    Parser,
    UserError,
    add_checkpoint,
    check_ranges,
    printable,
    run_script,
    take_checkpoint,
)
from tools.lib.coco import MAX_NUMBER, find_annotations, identity, open_coco
from tools.lib.draw import caption, contact_sheet, draw_landmarks, encode_picture
from tools.lib.files import as_json, atomic_write, check_free, check_new, data_root, file_lock, load_json
from tools.lib.find import checkpoint_file
from tools.lib.kinds import ear_kinds, poses
from tools.lib.pictures import GREY, read_image
from tools.lib.report import as_html, as_table, plots, print_report
from tools.lib.runtime import Processes, enough_memory, versions
from train_simple import METRICS, NORMALIZERS, Config, Trained, crop_side, nan_mean, predict

LIMIT = 0.10  # a face with a larger error counts as failed; the area under the error curve ends here
RADIUS = Config.score_radius  # for other programs' scores, as a fraction of the crop's side
BINS = 10  # of scores from 0 to 1
WRITES = ("report.html", "report.json", "report.csv", "worst.jpg", "error_curve.png", "landmarks.png",
          "mean_face.png")
# A result is of a face if the boxes around their landmarks have at least this IoU. Landmarks on a line, or a
# single one, have a box of no size; then the face's own box stands around their middles.
SAME_FACE = 0.5
DEFINITIONS = {
    "nme": "mean over faces of the mean error of a face's labelled landmarks / the side of the crop",
    "nme_iod": "the same / the distance between the two interocular landmarks, where both are labelled",
    "nme_box": "the same / the diagonal of the face's box",
    "beware": "all errors are in the picture's pixels; some public figures are measured in a crop that was "
              "stretched to a square, where the same predictions have another error (8.57 there was 8.04)",
    "found": "with --match, the number of faces that have a result whose landmarks' bounding box overlaps "
             "that of the true ones with an IoU of 0.5 or more (where theirs has no size, the face's own box "
             "around them counts); share: the same / all faces; others: the results that belong to no face; "
             "error_ratio: the mean nme of the faces found / that of the same faces in their labelled boxes, "
             "by the checkpoint. With nme_iod it is another number",
    "faces": "of a group, those with a labelled landmark in it; faces_by_main: those behind MAIN",
    "pck": "share of the labelled landmarks, in faces that have MAIN, whose error is at most 0.05 (0.10) of "
           "MAIN's length",
    "failure_rate": "share of the faces that have MAIN in which it is above 0.10",
    "standard_error": "of MAIN's mean over the faces: their standard deviation / the root of their number. "
                      "Of the difference of two models take it over the faces' differences: it is smaller",
    "along, across": "mean error / MAIN's length in the outline's direction and square to it, of landmarks "
                     "with two drawn neighbours",
    "auc": "area under the curve 'share of the faces that have MAIN in which it is at most e', e from 0 to "
           "0.10, divided by 0.10",
    "ear": "kinds by the true landmarks, each ear for itself: the tip of an erect ear stands up, no part of "
           "a hanging ear rises far above its base, a folded ear rises and bends or stands out to "
           "the side; as in every group, errors are means over faces: a face counts once, whether one of its "
           "ears is of the kind or both, so the kinds do not average to the region's error",
    "pose": "turned: along the line through the eyes, the nose is at least a quarter of their distance away "
            "from their middle",
    "reliability": "landmarks by their score: the mean score, and the share that is within RADIUS of the "
                   "crop's side of the truth, in x and in y, which is what the score predicts; the "
                   "calibration error is the mean difference of the two over all landmarks",
}


def definitions(main: str, radius: float) -> dict[str, str]:
    """What every number of a report means: {name: text}."""
    known = dict.fromkeys(METRICS, "see METRICS in train_simple.py") | DEFINITIONS
    return {k: v.replace("MAIN", main).replace("RADIUS", str(radius)) for k, v in known.items()}


# ---------------------------------------------------------------- the numbers

def pck(points: np.ndarray, faces: Faces, length: np.ndarray, threshold: float) -> float:
    """The share of labelled landmarks with error <= threshold * length; NaN lengths do not count.

    points (N, K, 2), length (N,).
    """
    error = np.linalg.norm(points - faces.points, axis=-1)  # (N, K)
    counts = (faces.visible > 0) & np.isfinite(error) & np.isfinite(length)[:, None]
    return nan_mean((error <= threshold * length[:, None])[counts].astype(float))


def failure_rate(errors: np.ndarray) -> float:
    """The share of the faces' errors (N,) that are above LIMIT; NaN do not count."""
    return nan_mean(np.where(np.isnan(errors), np.nan, np.asarray(errors) > LIMIT))


def area_under_curve(errors: np.ndarray) -> float:
    """The area under the cumulative distribution of the errors (N,) from 0 to LIMIT, divided by LIMIT."""
    return nan_mean(np.maximum(0, 1 - np.asarray(errors) / LIMIT))


def along_and_across(points: np.ndarray, faces: Faces, length: np.ndarray) -> np.ndarray:
    """Mean error / length (N,) along the outline and at right angles to it: (K, 2).

    The outline's direction at a landmark points from one of its two neighbours in the skeleton to the other,
    in the true landmarks. NaN for landmarks that do not have exactly two neighbours.
    """
    result, neighbours = np.full((len(faces.scheme.names), 2), np.nan), defaultdict(set)
    for i, j in faces.scheme.skeleton:
        neighbours[i].add(j)
        neighbours[j].add(i)
    for i, ends in neighbours.items():
        if len(ends) == 2:
            a, b = ends
            span = np.linalg.norm(faces.points[:, b] - faces.points[:, a], axis=1)
            use = (faces.visible[:, [i, a, b]] > 0).all(1) & np.isfinite(length) & (span > 0)
            use &= np.isfinite(points[:, i, 0])
            direction = (faces.points[use, b] - faces.points[use, a]) / span[use, None]
            error = (points[use, i] - faces.points[use, i]) / length[use, None]
            across = error[:, 0] * direction[:, 1] - error[:, 1] * direction[:, 0]
            result[i] = nan_mean(np.abs((error * direction).sum(1))), nan_mean(np.abs(across))
    return result


def reliability(points: np.ndarray, scores: np.ndarray, faces: Faces, padding: float, radius: float) -> dict:
    """How true the scores (N, K) are: {"radius", "landmarks", "calibration_error", "bins": [...]}.

    A score claims to be the probability that the error is at most `radius` sides of the crop, in x and in y.
    Empty bins are left out. The expected calibration error is the mean over landmarks of their bin's
    |mean score - share within| (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities").
    """
    seen = faces.visible > 0
    error = np.abs(points - faces.points).max(-1) / crop_side(faces, padding)[:, None]
    score, within, bins = scores[seen], error[seen] <= radius, []
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    for n in np.unique(place):
        of = place == n
        bins.append({"from": n.item() / BINS, "to": (n.item() + 1) / BINS, "landmarks": int(of.sum()),
                     "score": float(score[of].mean()), "within": float(within[of].mean())})
    gap = sum(row["landmarks"] * abs(row["score"] - row["within"]) for row in bins)
    return {"radius": radius, "landmarks": len(score),
            "calibration_error": gap / len(score) if bins else math.nan,
            "bins": bins}


def score(points: np.ndarray, faces: Faces, padding: float, scores: np.ndarray | None = None,
          radius: float = RADIUS) -> tuple[dict, np.ndarray]:
    """All numbers of a report, as plain types; and every face's error (N,) under the main normaliser.

    points (N, K, 2) in the pictures, NaN where another annotator labelled none; scores (N, K).
    """
    if taken := METRICS.keys() & {"pck_0.05", "pck_0.10", "failure_rate", "auc", "standard_error", "faces",
                                  "faces_by_main", "labelled", "along", "across", "id", "file"}:
        raise UserError(f"METRICS in train_simple.py: {taken.pop()} is a number of this report; rename it")
    scored = np.isfinite(points[..., 0])
    numbers = np.nan_to_num(points)  # for metrics: NaN times a mask of 0 is NaN
    errors = {name: metric(numbers, faces, padding, scored) for name, metric in METRICS.items()}
    errors = {name: e for name, e in errors.items() if np.isfinite(e).any()}
    main = next(name for name in ("nme_iod", "nme_box", "nme") if name in errors)
    length = NORMALIZERS[main](faces, padding)

    def part(some: np.ndarray | bool = True, rows: np.ndarray | slice = slice(None)) -> dict:
        """The scores of some landmarks (N, K) of some faces."""
        labelled = ((faces.visible > 0) & scored & some)[rows]
        values = {name: (e if some is True else METRICS[name](numbers, faces, padding, scored & some))[rows]
                  for name, e in errors.items()}
        return {"faces": int(labelled.any(1).sum()), "faces_by_main": int(np.isfinite(values[main]).sum()),
                "labelled": int(labelled.sum()), **{name: nan_mean(e) for name, e in values.items()}}

    names, breeds = faces.scheme.names, np.array(faces.breeds)
    k, directions = np.arange(len(names)), along_and_across(points, faces, length)

    def landmarks(index: list[int]) -> dict:
        """The scores of some landmarks of all faces."""
        along, across = map(nan_mean, directions[index].T)
        return {**part(np.isin(k, index)), "along": along, "across": across}

    counted = errors[main][np.isfinite(errors[main])]
    report = {
        "main": main, "errors": list(errors), "faces": len(faces), "faces_by_main": len(counted),
        "standard_error": counted.std(ddof=1).item() / math.sqrt(len(counted)) if counted[1:].size else None,
        "metrics": {**{name: nan_mean(e) for name, e in errors.items()},
                    "pck_0.05": pck(points, faces, length, 0.05),
                    "pck_0.10": pck(points, faces, length, 0.10),
                    "failure_rate": failure_rate(errors[main]), "auc": area_under_curve(errors[main])},
        "region": {name: landmarks(index) for name, index in faces.scheme.regions.items()},
        "ear": {kind: part(mask) for kind, mask in ear_kinds(faces).items()},
        "pose": {pose: part(rows=rows) for pose, rows in poses(faces).items()},
        "landmark": {f"{i} {name}": landmarks([i]) for i, name in enumerate(names)},
        "breed": {name: part(rows=breeds == name) for name in sorted({*faces.breeds} - {""})},
        "face": [{"id": faces.ids[i], "file": faces.files[i],
                  "labelled": int(((faces.visible[i] > 0) & scored[i]).sum()),
                  **{name: float(e[i]) for name, e in errors.items()}} for i in range(len(faces))],
        "reliability": {} if scores is None else reliability(points, scores, faces, padding, radius),
    }
    return report, errors[main]


# ---------------------------------------------------------------- other programs' results

def parse_result(path: Path, number: int, row: dict, k: int) -> tuple:
    """A result: keypoints (K, 3), score, annotation_id or None, image_id, file_name. Raises UserError."""
    try:
        triples = np.array(row["keypoints"], np.float64).reshape(k, 3)
        certainty, named = float(row.get("score") or 0), row.get("annotation_id")
        if (image := identity(row["image_id"])) is None:
            raise ValueError
        picture = PurePosixPath((row.get("file_name") or "").replace("\\", "/")).parts  # predict.py gives it
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise UserError(f"{path}: result {number} needs image_id, keypoints ({k} x 3 numbers) and "
                        "score") from None
    if not (np.abs(triples[:, :2]).max() < MAX_NUMBER and math.isfinite(certainty)):  # `<` fails for NaN
        raise UserError(f"{path}: result {number} has numbers that are not finite, or a landmark beyond "
                        f"{MAX_NUMBER:g}")
    return triples, certainty, None if named is None else str(identity(named)), str(image), picture


def faces_of_result(where: str, triples: np.ndarray, certainty: float, picture: tuple, faces: Faces,
                    candidates: list[int], match: bool) -> list[tuple[float, int]]:
    """[(how well it fits, index), ...]: which of the candidate faces a result is of. Raises UserError.

    A landmark that is NaN in triples (K, 3) is one that another annotator did not label.
    """
    for theirs in (PurePosixPath(faces.files[i]).parts for i in candidates):
        if any(a != b for a, b in zip(reversed(picture), reversed(theirs))):
            raise UserError(f"{where} is of {'/'.join(picture)}, but its id is that of {'/'.join(theirs)} in "
                            "the COCO file; predict with that file, as INPUT or with --boxes")
    def overlap(i):
        both = (faces.visible[i] > 0) & np.isfinite(triples[:, 0])
        if not both.any():
            return 0
        ours, truth, box = triples[both, :2], faces.points[i, both], faces.boxes[i]
        flat = box_around(truth, box, 0, faces.room)[2:].min() < TINY * box[2:].max()  # a point, a line
        room = [0.5, 0.5] if flat else faces.room
        return overlaps(*(box_around(p, box, 0, room)[None] for p in (ours, truth))).item()
    if match:
        return [(fit, i) for i in candidates if (fit := overlap(i)) >= SAME_FACE]
    if len(candidates) > 1:
        raise UserError(f"{where}: its picture has {len(candidates)} faces; name one by annotation_id, or "
                        "let them be matched with --match")
    return [(certainty, i) for i in candidates]


def faceless(ann: Path) -> set[str]:
    """Ids, as texts, of a COCO file's pictures without an annotation: what is found in them is no face."""
    content = open_coco(ann)
    taken = {str(identity(annotation.get("image_id"))) for annotation in content["annotations"]}
    return {i for image in content["images"] if (i := str(identity(image.get("id")))) not in taken}


def other_annotation(path: Path, faces: Faces, category: str | None = None) -> Faces | None:
    """The faces of another annotator's data set, landmarks in our order; None for results. Raises UserError.

    Results may also come as a data set; then their annotations have a score or an annotation_id.
    """
    content = load_json(path)
    if not (isinstance(content, dict) and content.get("images") and content.get("categories")):
        return None
    rows = content.get("annotations")
    scored = {"score", "annotation_id"}
    if not isinstance(rows, list) or any(isinstance(row, dict) and scored & row.keys() for row in rows):
        return None
    theirs, ours = data.load_coco(path, faces.root, category), faces.scheme.names
    for note in theirs.notes:
        print(note)
    if sorted(theirs.scheme.names) != sorted(ours):
        raise UserError(f"{path}: is a data set with other landmarks; rename them as in the COCO file")
    order = [theirs.scheme.names.index(name) for name in ours]
    return replace(theirs, points=theirs.points[:, order], visible=theirs.visible[:, order])


def pictures_called(path: Path, rows: list, faces: Faces, empty: Collection, other: Faces | None) -> list:
    """What the results call each face's picture: its id, its file, or that without folder, suffix, zeros."""
    files = [PurePosixPath(file) for file in faces.files]
    by_file = [file.name for file in files], [file.stem for file in files]
    numbers = [str(int(stem)) if re.fullmatch(r"\d{1,18}", stem) else stem for stem in by_file[1]]
    ways = [*map(str, faces.image_ids)], faces.files, *by_file, numbers  # 0007.jpg is 7 to Ultralytics
    wanted = {str(identity(row.get("image_id"))) for row in rows if isinstance(row, dict)}
    knows = [len(wanted & {*way}) for way in ways]
    # Beside results of other pictures, numbers in names meet ids by chance, and ids meet such numbers.
    most = ways[0] if 2 * knows[0] >= max(knows) else ways[knows.index(max(knows))]
    by_name = next(filter(wanted.issubset, ways), most)
    known = ways[0] if wanted & {*empty} else by_name
    unnamed = not any(isinstance(row, dict) and row.get("file_name") for row in rows)
    if known is ways[0] and ways[0] != numbers and 0 < knows[0] <= knows[-1] and unnamed and not other:
        print(f"{path}: its image_ids are read as ids of the COCO file; if they are file names, write "
              "them with their suffixes")
    return known


def read_results(path: Path, faces: Faces, match: bool = False, empty: Collection = (),
                 other: Faces | None = None) -> tuple[dict[int, np.ndarray], int]:
    """Read COCO keypoint results: {index of a face: x, y, score (K, 3)}, and how many results in the faces'
    pictures, and in the `empty` ones, belong to no face. Raises UserError.

    other: what `other_annotation` read from the file; NaN then marks landmarks that it does not label.

    Every face takes its result with the highest score, and must have one; with `match`, the result that
    overlaps it best. A result's image_id is the picture's, or its file name, with or without the suffix.
    """
    if other:
        rows = [{"image_id": i, "keypoints": np.column_stack([xy, v])}
                for i, xy, v in zip(other.image_ids, other.points, other.visible, strict=True)]
    else:
        rows = load_json(path)
        rows = rows.get("annotations") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise UserError(f"{path}: not COCO keypoint results (a list of {{image_id, keypoints, score}})")
    k, by_id, by_image = len(faces.scheme.names), {str(a): [i] for i, a in enumerate(faces.ids)}, {}
    for i, image in enumerate(pictures_called(path, rows, faces, empty, other)):
        by_image.setdefault(image, []).append(i)
    found, elsewhere = [], 0  # (how well it fits, -number of the result, face, keypoints)
    for number, row in enumerate(rows):
        triples, certainty, named, image, picture = parse_result(path, number, row, k)
        if other:
            triples[triples[:, 2] == 0] = math.nan
        candidates = by_image.get(image, []) if named is None else by_id.get(named, [])
        where = f"{path}: result {number}"
        fits = faces_of_result(where, triples, certainty, picture, faces, candidates, match)
        found += [(fit, -number, i, triples) for fit, i in fits]
        elsewhere += not candidates and image not in empty
    best, used = {}, set()
    for _, number, i, triples in sorted(found, key=lambda row: row[:2], reverse=True):
        if i not in best and number not in used:
            best[i] = triples
            used.add(number)
    missing = [i for i in range(len(faces)) if i not in best]
    if rows and elsewhere == len(rows):
        raise UserError(f"{path}: none of its {len(rows)} results is of a picture of the COCO file, as "
                        f"image_id {rows[0]['image_id']!r}")
    if match and not best:
        raise UserError(f"{path}: none of its {len(rows)} results is of a face of the COCO file")
    if missing and not match:
        first = f"annotation {faces.ids[missing[0]]} of {faces.files[missing[0]]}"
        raise UserError(f"{path}: no result for {len(missing)} of {len(faces)} faces, the first is {first}; "
                        "every face must have one")
    if elsewhere:
        print(f"{elsewhere} results of other pictures left out")
    return best, len(rows) - elsewhere - len(used)


# ---------------------------------------------------------------- what is scored

def worst_faces(points: np.ndarray, faces: Faces, errors: np.ndarray, padding: float) -> bytes:
    """A sheet of the faces with the largest errors (N,): points (N, K, 2), and white lines to the truth."""
    tiles, size = [], 240
    for i in np.argsort(-errors)[:min(20, np.isfinite(errors).sum())]:  # NaN comes last
        there = os.path.isfile(path := faces.root / faces.files[i])  # results can be scored without pictures
        image = read_image(path) if there else np.full((1, 1, 3), GREY, np.uint8)
        crop, matrix = data.cut_crop(image, faces.boxes[i], size, padding)
        ours, truth = (data.apply_matrix(matrix, p[i]) for p in (points, faces.points))
        seen = (faces.visible[i] > 0) & np.isfinite(ours[:, 0])
        crop = draw_landmarks(crop, np.nan_to_num(ours), faces.scheme, seen, truth, size / padding)
        tiles.append(caption(crop, f"{100 * errors[i]:.1f} %  {Path(faces.files[i]).name}"))
    return encode_picture(contact_sheet(tiles, min(len(tiles), 5)), ".jpg")


def annotations_of(args: argparse.Namespace, trained: Trained | None) -> Path:
    """The COCO file to score on: --ann, or the val split of the checkpoint's own run. Raises UserError."""
    if args.ann:
        return args.ann
    if not trained or args.bundled:
        raise UserError("--ann: name the COCO file to score on, and its pictures' folder with --data-root")
    folder = trained.config.ann_root
    if not folder.is_absolute():  # a --light one keeps a folder's name alone
        raise UserError(f"{args.checkpoint}: does not say where its data are; name a COCO file with --ann")
    if not os.path.exists(folder):  # also False for another user's private folder
        raise UserError(f"{folder}: the data of {args.checkpoint} are not here; name a COCO file with --ann")
    try:
        _, val = find_annotations(folder)
    except UserError:
        val = None
    if not val:
        raise UserError(f"{folder}: has no split to score on; name a COCO file of other faces with --ann")
    return val


def is_file_of(folder: Path, ann: Path, place: int) -> bool:
    """Whether a run with --ann-root `folder` trained on this file (place 0), or has it as val.json (1)."""
    try:
        file = find_annotations(folder)[place]
        return bool(file) and file.read_bytes() == ann.read_bytes()  # a copy, too
    except (UserError, OSError):  # the run's data are not here, or another user's
        return False


def read_faces(args: argparse.Namespace, trained: Trained | None) -> tuple[Faces, Path]:
    """The faces to score on, in their own boxes, and their file. Raises UserError."""
    ann, stored = annotations_of(args, trained), trained and not args.bundled and trained.config.data_root
    if not ann.is_file():
        raise UserError(f"--ann {ann}: is no file; name the COCO file to score on")
    root = data_root(args.data_root or (stored if stored and stored.is_absolute() else None))
    own = trained and trained.config.category
    try:
        faces = data.load_coco(ann, root, args.category or own)
    except UserError:
        if args.category or not own:
            raise
        faces = data.load_coco(ann, root)  # where the category has another name
    for note in faces.notes:
        print(note)
    if trained and not args.bundled and is_file_of(trained.config.ann_root, ann, 0):
        print(f"{ann}: {args.checkpoint} was trained on faces of this file; on others its errors are larger")
    if trained and (ours := faces.scheme.names) != (theirs := trained.scheme.names):
        pairs = enumerate(itertools.zip_longest(ours, theirs))
        i, first = next((i, " and ".join(n or "none" for n in pair)) for i, pair in pairs if len({*pair}) > 1)
        raise UserError(f"{ann}: its {len(ours)} landmarks are not the {len(theirs)} of {args.checkpoint}: "
                        f"number {i} is {printable(first)}; name a file with the same ones, in their order")
    if trained:  # the model's scheme, but the file's regions and interocular where it has them
        said = {n: said for n in ("regions", "interocular") if (said := getattr(faces.scheme, n))}
        if differ := [n for n in said if said[n] != getattr(trained.scheme, n)]:
            print(f"{ann}: its {' and '.join(differ)} are used; those of {args.checkpoint} differ")
        faces = replace(faces, scheme=replace(trained.scheme, **said))
    return faces, ann


def as_seen(trained: Trained | None, faces: Faces) -> Faces:
    """The faces in the boxes that the model is to see them in. Raises UserError."""
    return faces.whole_pictures() if trained and trained.whole else faces


def predict_faces(args: argparse.Namespace, trained: Trained, faces: Faces,
                  processes: Processes) -> tuple[np.ndarray, np.ndarray]:
    """The checkpoint's points (N, K, 2) and scores (N, K) in the true boxes."""
    dataset = DogFLWDataset(faces, trained.size, trained.config.padding)
    options = trained.amp, args.batch_size, args.flip
    return predict(trained.model, dataset, trained.config, processes, *options)[:2]


def by_checkpoint(args: argparse.Namespace, trained: Trained, faces: Faces, ann: Path,
                  processes: Processes) -> tuple[np.ndarray, np.ndarray, str]:
    """Points, scores and where they come from."""
    points, scores = predict_faces(args, trained, faces, processes)
    chosen = printable(trained.metrics.get("chosen_on", "an unnamed split"))
    twice = args.flip and trained.scheme.flip_pairs
    origin = "trained on a part of DogFLW's train split" if args.bundled else f"chosen on {chosen}"
    source = (f"{args.checkpoint}: epoch {printable(trained.epoch)}, {origin}; in the true boxes, "
              f"{'averaged with the mirrored picture' if twice else 'not mirrored'}")
    if chosen.removesuffix(SEEN).split("/")[-1] == ann.name and is_file_of(trained.config.ann_root, ann, 1):
        source += "; its epoch was chosen on these very faces, so the errors come out too small"
    return points, scores, source


def by_results(args: argparse.Namespace, trained: Trained | None, faces: Faces, ann: Path,
               processes: Processes) -> tuple[Faces, np.ndarray, np.ndarray | None, str, dict]:
    """The faces that have a result; their points, scores or None, where they come from, how well found."""
    empty, total, finding = faceless(ann) if args.match else (), len(faces), {}
    seen = as_seen(trained, faces)
    if other := other_annotation(args.results, faces, args.category):
        if not args.match and len({*other.files}) < len(other):
            raise UserError(f"{args.results}: some of its pictures have several faces; add --match")
        ids = {image.get("file_name"): image.get("id") for image in open_coco(ann)["images"]}
        ids |= dict(zip(faces.files, faces.image_ids))
        other = replace(other, image_ids=[ids.get(file, file) for file in other.files])
    found, others = read_results(args.results, faces, args.match, empty, other)
    index = sorted(found)
    faces, triples = seen.take(index), np.stack([found[i] for i in index])
    points, scores, source = triples[..., :2], triples[..., 2], f"results of {args.results}"
    if other:
        labelled = np.isfinite(scores)
        source, scores = f"labels of {args.results}, where both have one", np.full_like(scores, math.nan)
        if not (labelled & (faces.visible > 0)).any():
            raise UserError(f"{args.results}: labels none of the landmarks that {ann} labels on these faces")
    if args.match:
        finding = {"faces": total, "found": len(faces), "share": len(faces) / total, "others": others}
        source += (f", which found {len(faces)} of {total} faces ({finding['share']:.1%}), and {others} "
                   f"others, in these pictures and in {len(empty)} without a face; the errors are those of "
                   "the faces found")
    if args.match and trained:
        in_boxes, _ = predict_faces(args, trained, faces, processes)
        scored = np.isfinite(points[..., 0])
        ours, boxed = (METRICS["nme"](p, faces, trained.config.padding, scored) for p in (points, in_boxes))
        finding |= {"nme_true_boxes": nan_mean(boxed), "error_ratio": nan_mean(ours) / nan_mean(boxed),
                    "share_within_1.15": float((ours <= 1.15 * boxed).sum() / total)}
        source += (f", {finding['error_ratio']:.3f} times their nme in the labelled boxes; "
                   f"{finding['share_within_1.15']:.1%} of all faces are found with an error of at most 1.15 "
                   "times that in the labelled box")
    in_range = ((scores >= 0) & (scores <= 1)).all()  # else they are no probabilities
    return faces, points, scores if in_range else None, source, finding


# ---------------------------------------------------------------- command line

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line; args.bundled: the bundled model is scored. Raises UserError."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--ann", type=Path, metavar="FILE",
        help="COCO keypoint file (default: val.json of the checkpoint's run; needed without --checkpoint)")
    add("--data-root", type=Path, metavar="DIR",
        help="folder that its file names are relative to (default: the run's, else kagglehub's DogFLW)")
    add("--category", metavar="NAME",
        help="category to score, if the file has several with different landmarks")
    add("--out", type=Path, metavar="DIR",
        help="folder for the report (default: evaluation, beside --results or --checkpoint; for the "
             "bundled model, in the current folder)")
    add("--results", type=Path, metavar="FILE",
        help="score these COCO keypoint results, or another annotator's data set; --checkpoint then gives "
             "the defaults and, with --match, the errors to compare with")
    add("--match", action="store_true", help="the results come from a program that found the faces itself")
    add("--padding", type=float,
        help="for --results without --checkpoint: nme divides by this many times the box's longer side "
             f"(default: {data.PADDING})")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="average with the mirrored picture's prediction (default: on)")
    add("--batch-size", type=int, default=16, metavar="N", help="faces at once (default: 16)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    add("--force", action="store_true", help="write over a report in --out")
    args = parser.parse_args(argv)
    take_checkpoint(args)
    if args.match and not args.results:
        raise UserError("--match: goes with --results")
    if (args.checkpoint or not args.results) and args.padding is not None:
        raise UserError("--padding: comes from the checkpoint; leave it out")
    if args.results and not args.flip and not (args.checkpoint and args.match):
        raise UserError("--no-flip: is for a checkpoint; results are as they are")
    check_ranges(args, batch_size="[1, inf)", padding="[0.5, 4]")
    if args.checkpoint:
        args.checkpoint = checkpoint_file(args.checkpoint)
    beside = args.results or args.checkpoint
    args.out = args.out or (beside.parent if beside else Path()) / "evaluation"
    check_free("--out", args.out, force=True)  # other files may be in it
    check_new("--out", args.force, *(args.out / name for name in WRITES))
    args.bundled = not beside
    if args.bundled:
        args.checkpoint = checkpoint_file(None)
    return args


def write_report(args: argparse.Namespace, report: dict, faces: Faces, points: np.ndarray,
                 errors: np.ndarray) -> None:
    """Print what was scored, and write the report's files."""
    content, padding = as_json(report), report["padding"]
    report = json.loads(content)  # None for NaN
    files = {**plots(report, faces, errors, LIMIT), "worst.jpg": worst_faces(points, faces, errors, padding)}
    files |= {"report.csv": as_table(report), "report.html": as_html(report, files),
              "report.json": content}
    try:
        print(f"{len(faces)} faces of {report['ann']}; {report['source']}")
        print_report(report)
    finally:  # a closed pipe loses only the printed lines, a full disk only the files
        for name, content in files.items():
            atomic_write(args.out / name, [content])
        for name in {*WRITES} - {*files}:  # of an earlier report
            (args.out / name).unlink(missing_ok=True)
    print(f"report: {args.out / 'report.html'}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with contextlib.ExitStack() as stack:
        with Processes(args.device, training=False) as processes, enough_memory():
            trained = Trained(args.checkpoint, processes.device) if args.checkpoint else None
            faces, ann = read_faces(args, trained)
            if processes.first:
                busy = f"--out {args.out}: another report is being written there; name another folder"
                lock = args.out / ".report.lock"  # an unwritable folder is reported now
                stack.enter_context(file_lock(lock, busy))
                if os.name != "nt":  # Windows does not delete an open file
                    stack.callback(lock.unlink, missing_ok=True)
                # Another run may just have written its report.
                check_new("--out", args.force, *(args.out / name for name in WRITES))
            padding, radius, finding = args.padding or data.PADDING, RADIUS, {}
            if trained:
                padding, radius = trained.config.padding, trained.config.score_radius
            if args.results:
                faces, points, scores, source, finding = by_results(args, trained, faces, ann, processes)
            else:
                faces = as_seen(trained, faces)
                points, scores, source = by_checkpoint(args, trained, faces, ann, processes)
        if not processes.first:
            return
        report, errors = score(points, faces, padding, scores, radius)
        report = {"source": source, "finding": finding, "ann": str(ann), "padding": padding,
                  "versions": versions(processes.device, trained.amp) if trained else {},
                  "scheme": asdict(faces.scheme), **report,
                  "definitions": definitions(report["main"], radius)}
        write_report(args, report, faces, points, errors)


if __name__ == "__main__":
    run_script(main)
