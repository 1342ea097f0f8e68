"""Boxes (N, 4) of x, y, width, height: how they overlap, and how they lie around landmarks."""
import cmath
import math

import numpy as np

# A tight box is the landmarks' hull, wider by 10 % of it on each side: its mean IoU with DogFLW's good boxes
# is 0.83 (16 % would give 0.87).
TIGHT = 0.1
# USUAL: least median IoU with tight boxes at which boxes are taken for such (DogFLW's have 0.8). TINY: a hull
# below this fraction of its box's longer side tells no size.
USUAL, TINY = 0.6, 0.1


def intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Shared area of every box x, y, w, h of a with every box of b: (N, 4), (M, 4) -> (N, M)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    return np.maximum(high - low, 0).prod(-1)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of a with every box of b: (N, 4), (M, 4) -> (N, M)."""
    shared = intersections(a, b)
    return shared / np.maximum(a[:, None, 2:].prod(-1) + b[None, :, 2:].prod(-1) - shared, 1e-9)


def hull_boxes(points: np.ndarray, margin: float) -> np.ndarray:
    """Landmarks (N, K, 2) -> boxes (N, 4): hulls (at least 2 pixels), plus `margin` of them on each side."""
    low, high = points.min(1), points.max(1)
    extent = np.maximum(high - low, 2)
    return np.concatenate([(low + high) / 2 - extent * (0.5 + margin), extent * (1 + 2 * margin)], axis=1)


def room_of(points: np.ndarray, visible: np.ndarray, boxes: np.ndarray) -> list[float]:
    """How boxes (N, 4) lie around their landmarks (N, K, 2), labelled where `visible` (N, K): medians.

    [] if the boxes are tight, as DogFLW's are (TIGHT, USUAL). Else [left, top, right, bottom]: how far they
    reach beyond the hull, in units of its longer side, as when only eyes and nose are marked. Or, if the hull
    is TINY (one landmark tells no size), [x, y]: the hull's middle as fractions of the box.
    """
    some = np.linspace(0, len(boxes) - 1, min(len(boxes), 1000)).astype(int)  # enough for medians
    points, visible, boxes = points[some], visible[some], boxes[some]
    middles, sides = (boxes[:, :2] + boxes[:, 2:] / 2)[:, None], boxes[:, 2:].max(1)[:, None, None]
    labelled = visible.any(0)  # of some face
    points, seen = points[:, labelled], visible[:, labelled, None] > 0
    usual = np.nanmedian(np.where(seen, (points - middles) / sides, np.nan), 0)  # their places in a box
    points = np.where(seen, points, usual * sides + middles)  # a prediction has them all
    low, high = points.min(1), points.max(1)
    hulls = hull_boxes(np.stack([low, high], 1), TIGHT)
    if np.median(np.diagonal(overlaps(hulls, boxes))) >= USUAL:
        return []
    side, ends = (high - low).max(1), boxes[:, :2] + boxes[:, 2:]
    if np.median(side / boxes[:, 2:].max(1)) < TINY:
        return np.median(((low + high) / 2 - boxes[:, :2]) / boxes[:, 2:], 0).tolist()
    room = np.concatenate([low - boxes[:, :2], ends - high], 1)[side > 0] / side[side > 0, None]
    return np.median(room, 0).tolist()


def box_around(points: np.ndarray, box: np.ndarray, margin: float, room: list) -> np.ndarray:
    """The box (4,) of a face around its landmarks (K, 2), with `margin` as in hull_boxes.

    room: from `room_of`. box (4,): the one they were predicted in, whose size is kept where they tell none.
    """
    low, high = points.min(0), points.max(0)
    if len(room) == 2:
        return np.concatenate([(low + high) / 2 - np.multiply(room, box[2:]), box[2:]])
    if not room:
        return hull_boxes(points[None], margin)[0]
    reach = np.reshape(room, (2, 2)) * max((high - low).max(), 2)
    low, high = low - reach[0], np.maximum(high + reach[1], low - reach[0] + 2)
    grow = (margin - TIGHT) * (high - low)
    return np.concatenate([low - grow, high - low + 2 * grow])


def lean(points: np.ndarray, pairs: list) -> float:
    """How far a face (K, 2) leans to the side, in degrees from -90 to 90, by its left-right pairs.

    The mean axis of the pairs, computed with doubled angles, so that the order in a pair does not matter.
    Pairs count by their squared length. 0 without pairs.
    """
    axes = [complex(*(points[j] - points[i])) ** 2 for i, j in pairs]
    return math.degrees(cmath.phase(sum(axes)) / 2)


def upright(points: np.ndarray, pairs: list, box: np.ndarray, margin: float,
            room: list) -> tuple[np.ndarray, float]:
    """The box (4,) of `box_around` for the face turned upright, and the turn in degrees."""
    turn = -lean(points, pairs)
    a = math.radians(turn)
    turned = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    box = box_around(points @ turned.T, box, margin, room)
    box[:2] = (box[:2] + box[2:] / 2) @ turned - box[2:] / 2  # its middle, turned back into the picture
    return box, turn
