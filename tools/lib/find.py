"""Finding faces by looking at windows of a picture; boxes (N, 4) are x, y, width, height."""
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tools.lib.boxes import TIGHT, box_around, intersections, overlaps, upright
from tools.lib.cli import UserError, single_line
from tools.lib.coco import MAX_NUMBER
from tools.lib.files import ROOT
from tools.lib.runtime import choose_device
from tools.lib.windows import whole_box

BUNDLED = ROOT / "work_dirs/pretrained/best_model.pth"  # the bundled model

# Least score of a face (Look.score). Any value from 0.5 to 0.63 gives the same on 170 held-out faces: 166 are
# found, and one detection lies beside them.
MIN_SCORE = 0.57
FAINT = 0.15  # what scores less is dropped even before its next look
# Box = landmarks' hull + 20 % on each side. DogFLW's boxes have 10 %, but predicted landmarks reach less far
# than true ones. A box that is too small loses hanging ears for good, while one too large is corrected
# by the next look. The last look is as tight as DogFLW's boxes (TIGHT): on held-out faces its error is 1.00
# times that in the true boxes; with 20 % it would be 1.05 times.
MARGIN = 0.2
# Sides of the first search squares, as fractions of the picture's longer side; neighbours overlap by half.
# A locator was trained on faces that fill from a quarter to all of a window, so it needs fewer sizes.
FACE_SIDES, LOCATOR_SIDES = (3 / 4, 1 / 2, 1 / 3, 1 / 4), (3 / 4, 1 / 2, 1 / 4)
CLOSER = 2.0  # side of the locator's closer look / the longer side of the landmarks' hull
# Least IoU of the second look's box with its landmarks' box: a face reproduces its box, background drifts.
STABLE = 0.5
SAME = 0.7  # detections with a higher IoU are one at the first look; OVERLAP decides at the second
# Two detections that share more of the smaller box are one face; IoU would keep an eye inside a face.
OVERLAP = 0.5


def checkpoint_file(given: Path | str | None) -> Path:
    """A checkpoint's path: for a run's folder its best_model.pth, for None the bundled model.

    Raises UserError if a folder has no best_model.pth, or this copy no bundled model.
    """
    path = BUNDLED if given is None else Path(given).expanduser()
    if path == BUNDLED and not path.is_file():
        raise UserError(f"{BUNDLED}: no such file, so this copy has no bundled model; name a checkpoint with "
                        "--checkpoint, or install a clone by: pip install -e .")
    if path.is_dir():
        path = path / "best_model.pth"
        if not path.is_file():
            raise UserError(f"{path.parent}: no best_model.pth in it; name a run's folder or a checkpoint")
    return path


# ---------------------------------------------------------------- the looks' boxes

def closer_square(box: np.ndarray) -> np.ndarray:
    """The square (4,) for the locator's closer look at a face, from its box (4,) with MARGIN."""
    side = max(box[2:]) / (1 + 2 * MARGIN) * CLOSER
    return np.array([*(box[:2] + box[2:] / 2 - side / 2), side, side])


def suppress(boxes: np.ndarray, scores: np.ndarray, nested: bool = True) -> np.ndarray:
    """Non-maximum suppression: indices of the best-scoring boxes, no two of which show the same face.

    Those that do share more than OVERLAP of the smaller one (`nested`), or have an IoU above SAME (else).
    """
    if nested:
        area, limit = boxes[:, 2:].prod(1), OVERLAP
        shared = intersections(boxes, boxes) / np.minimum(area[:, None], area)
    else:
        shared, limit = overlaps(boxes, boxes), SAME
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if not kept or shared[i, kept].max() <= limit:
            kept.append(i)
    return np.array(kept, dtype=int)


def search_squares(image: np.ndarray, sides: tuple) -> np.ndarray:
    """The whole picture and squares that cover it, each overlapping the next by half or more: (N, 4)."""
    height, width = image.shape[:2]

    def starts(length: int, side: float) -> list | np.ndarray:
        """Where squares start along a side of the picture; one larger than the side is centred on it."""
        if length <= side:
            return [(length - side) / 2]
        return np.linspace(0, length - side, math.ceil(2 * (length - side) / side) + 1)
    boxes = [whole_box((width, height))]
    for side in (max(2.0, max(width, height) * part) for part in sides):
        boxes += [(x, y, side - 1, side - 1) for y in starts(height, side) for x in starts(width, side)]
    return np.array(boxes)


# ---------------------------------------------------------------- the predictor

@dataclass
class Look:
    """What a network saw in a box of a picture."""
    picture: int  # index of the picture
    box: np.ndarray  # (4,), the box that was looked at
    points: np.ndarray  # (K, 2) in the picture
    scores: np.ndarray  # (K,) in 0..1, probabilities that the points are about right
    network: object  # the network that looked
    located: float | None = None  # the score of the locator's closer look, where it found the box

    @cached_property
    def score(self) -> float:
        """The mean m of the landmarks' scores; where a locator found the box, (m * m * located) ** (1 / 3).

        The locator has learnt what is no face, which the face model never saw; that model sees more pixels.
        """
        mean = float(self.scores.mean())
        return mean if self.located is None else (mean**2 * self.located) ** (1 / 3)

    def around(self, margin: float) -> np.ndarray:
        """The box (4,) around the landmarks, wider by `margin` (box_around)."""
        return box_around(self.points, self.box, margin, self.network.room)

    @cached_property
    def next_box(self) -> np.ndarray:
        """The box (4,) for the next look, with MARGIN: roomier than a face's own."""
        return self.around(MARGIN)

    def upright(self, margin: float) -> tuple[np.ndarray, float]:
        """The box of the face turned upright, and the turn in degrees."""
        pairs = self.network.scheme.flip_pairs
        return upright(self.points, pairs, self.box, margin, self.network.room)

    @cached_property
    def stability(self) -> float:
        """How well the box reproduced itself: its IoU with the box around the landmarks."""
        return float(overlaps(self.box[None], self.next_box[None])[0, 0])

    def as_face(self, box: np.ndarray) -> dict:
        """The dict that a Predictor returns for this face."""
        return {"box": box, "points": self.points, "scores": self.scores, "score": self.score,
                "located": self.located}


def as_result(face: dict, **picture) -> dict:
    """A found face as a COCO keypoint result: its picture's fields, bbox, keypoints (x, y, score), score."""
    keypoints = np.column_stack([face["points"], face["scores"]]).round(3).ravel().tolist()
    return {**picture, "bbox": face["box"].round(2).tolist(), "keypoints": keypoints,
            "score": round(face["score"], 4)}


class Predictor:
    """Landmarks of the faces in a picture; made by `load_predictor`.

    face, locator: objects with look([(image, box, turn), ...], flip) -> points (N, K, 2), scores (N, K), and
    with `whole`, `scheme` and `room` (from room_of).
    """

    def __init__(self, face, locator=None):
        self.face, self.locator, self.scheme = face, locator, face.scheme

    def __call__(self, image: np.ndarray, boxes: np.ndarray | list | None = None,
                 min_score: float = MIN_SCORE) -> list[dict]:
        """One RGB picture (H, W, 3) uint8 -> a list of faces, best first if they were searched for.

        A face is {"box": (4,) x y w h, "points": (K, 2) x y in the picture, "scores": (K,) in 0..1, "score",
        "located": as in Look}. With boxes (N, 4), exactly these are looked at; without, faces are searched
        for, and those that score below min_score left out. Raises UserError for an invalid picture or box.
        """
        return self.many([image], [boxes], min_score)[0]

    def many(self, images: list, boxes: list, min_score: float = MIN_SCORE) -> list[list[dict]]:
        """The same for several pictures at once, in full batches; boxes holds an array or None for each."""
        faces, given, whole, sought = [[] for _ in images], [], [], []
        for i, (image, wanted) in enumerate(zip(images, boxes, strict=True)):
            checked = checked_boxes(image, wanted)
            if wanted is not None:
                given += [(i, box) for box in checked]
            elif self.face.whole:
                whole.append((i, whole_box(image.shape[1::-1])))
            else:
                sought.append(i)
        looks = see(self.face, images, given)
        looks += [look for look in see(self.face, images, whole) if look.score >= min_score]
        for look in looks:
            faces[look.picture].append(look.as_face(look.box))
        for look in self._find(images, sought, min_score):
            faces[look.picture].append(look.as_face(look.around(TIGHT)))
        return faces

    def follow(self, image: np.ndarray, faces: list[dict]) -> list[dict]:
        """The previous frame's faces in the next frame `image`, in the same order, each looked at upright."""
        pairs, room = self.scheme.flip_pairs, self.face.room
        boxes = [(0, *upright(f["points"], pairs, f["box"], MARGIN, room)) for f in faces]
        looks = see(self.face, [image], boxes)
        for look, face in zip(looks, faces, strict=True):
            look.located = face["located"]
        return [look.as_face(look.around(TIGHT)) for look in looks]

    def _find(self, images: list, sought: list[int], min_score: float) -> list[Look]:
        """Search windows, then look with the face model at what was found: Looks, the best first.

        A locator, if there is one, first looks at each detection again, upright, in a square that it half
        fills. A part of a face can score higher than the whole, so overlapping detections are kept until the
        face model has looked. Then the box that best reproduces itself stays, and the larger of similar ones;
        what is not stable is no face. What stays is looked at once more, in the box of its own landmarks,
        upright, and mirrored too: the first box may have cut off an ear.
        """
        network, sides = (self.locator, LOCATOR_SIDES) if self.locator else (self.face, FACE_SIDES)
        faint = min(FAINT, min_score)
        boxes = [(i, box) for i in sought for box in search_squares(images[i], sides)]
        found = best_of(see(network, images, boxes, flip=False), faint)
        if self.locator:
            turned = [(look.picture, *look.upright(MARGIN)) for look in found]
            closer = [(i, closer_square(box), turn) for i, box, turn in turned]
            found = [look for look in see(network, images, closer, flip=False) if look.score >= faint]
            if self.locator.scheme.names != self.face.scheme.names:  # so other boxes: one look between
                boxes = [(look.picture, look.next_box) for look in found]
                found = self._again(images, found, boxes, flip=False)
        boxes = [(look.picture, look.next_box) for look in found]
        second = best_of(self._again(images, found, boxes, flip=False), faint, again=True)
        stable = [look for look in second if look.score >= 0.8 * min_score and look.stability >= STABLE]
        boxes = [(look.picture, *look.upright(TIGHT)) for look in stable]
        last = self._again(images, stable, boxes)
        faces = [look for look in last if look.score >= min_score]
        return sorted(faces, key=lambda look: -look.score)

    def _again(self, images: list, looks: list[Look], boxes: list, flip: bool = True) -> list[Look]:
        """The face model's looks at `boxes`, one for each of `looks`, whose locator scores they take over."""
        again = see(self.face, images, boxes, flip)
        for look, before in zip(again, looks, strict=True):
            look.located = before.score if self.locator and before.located is None else before.located
        return again


def checked_boxes(image: np.ndarray, boxes: np.ndarray | list | None) -> np.ndarray:
    """The boxes as (N, 4) float64; (0, 4) for None.

    Raises UserError if `image` is no RGB picture (H, W, 3) uint8, or a box has no size or lies outside it.
    """
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)
            and image.size):
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"a picture must be an array (H, W, 3) of uint8, RGB, not {what}")
    try:
        rows = np.asarray([] if boxes is None else boxes, dtype=float)
        rows = rows.reshape(-1, 4) if rows.ndim < 3 and rows.shape[-1] in (0, 4) else np.zeros((1, 4))
    except (TypeError, ValueError, IndexError, RuntimeError):  # the last: a tensor that requires grad
        rows = np.zeros((1, 4))
    if not ((abs(rows) < MAX_NUMBER).all() and (rows[:, 2:] > 0).all()):  # false for NaN
        raise UserError("boxes must be numbers (N, 4): x, y, width, height with positive sides, not "
                        f"{single_line(str(boxes))}")
    if not intersections(rows, whole_box(image.shape[1::-1])[None]).all():
        width, height = image.shape[1::-1]
        raise UserError(f"a box lies outside the picture of {width} x {height} pixels: "
                        f"{single_line(str(boxes))}")
    return rows


def see(network, images: list, boxes: list, flip: bool = True) -> list[Look]:
    """Looks, in full batches, at boxes [(picture's index, box[, turn of the crop in degrees]), ...]."""
    if not boxes:
        return []
    points, scores = network.look([(images[i], *box) for i, *box in boxes], flip)
    return [Look(i, box, p, s, network) for (i, box, *_), p, s in zip(boxes, points, scores, strict=True)]


def best_of(looks: list[Look], faint: float, again: bool = False) -> list[Look]:
    """The looks that score `faint` or more, without those that show the same face as a better one.

    Looks are ranked by score times the root of their size, at the second look (`again`) also times their
    stability; then, of nested boxes, only one stays.
    """
    found = []
    for picture in dict.fromkeys(look.picture for look in looks):
        mine = [look for look in looks if look.picture == picture and look.score >= faint]
        if mine:
            ranks = np.array([look.score * math.sqrt(look.next_box[2:].max()) for look in mine])
            if again:
                ranks *= [look.stability for look in mine]
            found += [mine[n] for n in suppress(np.stack([look.next_box for look in mine]), ranks, again)]
    return found


def predictor_of(open_checkpoint: Callable, checkpoint: Path | str | None, locator: Path | str | bool | None,
                 device: str, batch_size: int = 32) -> Predictor:
    """A Predictor from a face checkpoint, or from the bundled one for None. Raises UserError.

    open_checkpoint(path, device, batch_size) opens a checkpoint.
    locator: a checkpoint trained with `--crop image`. None (or True) takes locator.pth beside the checkpoint,
    else ../locator/best_model.pth of a neighbouring run, else the bundled one if its landmarks are the same.
    False uses no locator.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    device, checkpoint = choose_device(device), checkpoint_file(checkpoint)
    locator = None if locator is True else locator
    face, path = open_checkpoint(checkpoint, device, batch_size), locator
    neighbour = checkpoint.absolute().parent.parent / "locator/best_model.pth"
    beside = checkpoint.with_name("locator.pth"), neighbour
    if locator is None:
        places = (*beside, BUNDLED.with_name("locator.pth"))
        path = next((p for p in places if p.is_file() and p.resolve() != checkpoint.resolve()), None)
    finder = None
    if path and not face.whole:
        try:
            finder = open_checkpoint(checkpoint_file(path), device, batch_size)
        except UserError as e:  # with edited code the bundled one may not fit
            if locator is not None or path in beside:
                raise
            print(f"{e}; faces are looked for without it", file=sys.stderr)
    if finder and not finder.whole:
        raise UserError(f"{path}: was trained on faces; train a locator with: train_simple.py --crop image")
    if finder and locator is None and path not in beside and finder.scheme.names != face.scheme.names:
        finder = None  # the bundled one knows dogs, and these may be other animals
    return Predictor(face, finder)
