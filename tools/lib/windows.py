"""The part of a picture that a face's crops can need: cut once, shrunk once, kept in a file."""

import hashlib
from pathlib import Path

import cv2
import numpy as np

from tools.lib.cli import UserError
from tools.lib.files import RecordFile, in_threads
from tools.lib.pictures import read_image

GREY = (124, 116, 104)  # what lies outside the picture
cv2.setNumThreads(0)  # data workers are the parallelism; OpenCV's own threads would fight them


def invert_matrix(matrix):
    """The inverse of 2 x 3 matrices (..., 2, 3)."""
    inverse = np.linalg.inv(matrix[..., :2])
    return np.concatenate([inverse, -inverse @ matrix[..., 2:]], axis=-1)


def apply_matrix(matrix, points):
    """Map points (..., N, 2) by 2 x 3 matrices (..., 2, 3); numpy or torch."""
    return points @ matrix[..., :2].swapaxes(-1, -2) + matrix[..., None, :, 2]


def face_window(box, picture_size, size, padding, reach):
    """Which part of the picture a crop of this face can need, and at what resolution it is kept.

    Returns (x, y, w, h) in the picture and (w, h) as kept: faces larger than the crop are shrunk once, by
    area, so that sampling them bilinearly does not alias.
    """
    (x, y, w, h), side = box, max(box[2], box[3]) * padding
    half = side * reach / 2 + 1
    low = np.clip(np.floor([x + w / 2 - half, y + h / 2 - half]), 0, np.array(picture_size) - 1).astype(int)
    high = np.clip(np.ceil([x + w / 2 + half, y + h / 2 + half]), low, np.array(picture_size) - 1).astype(int)
    extent = high - low + 1
    kept = np.maximum(1, np.round(extent * min(1.0, size / side))).astype(int)
    return (*low, *extent), (*kept,)


def cut_window(image, window, kept):
    """Cut and shrink (H, W, 3) -> (kept h, kept w, 3)."""
    x, y, w, h = window
    part = image[y : y + h, x : x + w]
    return part if (w, h) == tuple(kept) else cv2.resize(part, kept, interpolation=cv2.INTER_AREA)


def window_matrix(window, kept):
    """The 2 x 3 matrix kept window -> picture."""
    x, y, w, h = window
    sx, sy = w / kept[0], h / kept[1]
    return np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])


def warp(pixels, to_picture, matrix, size, out=None):
    """Sample a (size, size, 3) crop bilinearly, outside is mid-grey. `to_picture` maps pixels -> picture,
    `matrix` on to the crop.
    """
    to_crop = matrix @ np.vstack([to_picture, [0, 0, 1]])
    return cv2.warpAffine(pixels, to_crop, (size, size), dst=out, flags=cv2.INTER_LINEAR, borderValue=GREY)


class Windows:
    """The part of its picture that every face needs, decoded once into a file in `folder` (None: each time).

    The file's name holds a hash of all it depends on (names, sizes and times of the pictures, geometry), so a
    stale one is never read. Raises UserError naming the first picture that is missing or cannot be read.
    """

    def __init__(self, faces, size, padding, reach, folder=None):
        self.paths, self.sizes, self.records = [faces.root / f for f in faces.files], faces.sizes, None
        self.geometry = [face_window(b, s, size, padding, reach) for b, s in zip(faces.boxes, faces.sizes)]
        missing = [path for path in self.paths if not path.exists()]
        if missing:
            count = f"{len(missing)} of {len(self.paths)} missing"
            raise UserError(f"{missing[0]}: no such picture ({count}); check --data-root")
        if folder:
            stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
            key = hashlib.sha256(repr((stats, self.geometry)).encode()).hexdigest()[:16]
            self.records = RecordFile(
                Path(folder) / f"{key}.bin",
                [3 * w * h for _, (w, h) in self.geometry],
                lambda: in_threads(self._decode, len(self.paths), "decoding"),
            )

    def _decode(self, i):
        image, size = read_image(self.paths[i]), tuple(self.sizes[i])
        if image.shape[1::-1] != size:
            turned = "; its EXIF tag turns it, so its landmarks were drawn on the picture as stored" * (
                image.shape[:2] == size
            )
            raise UserError(
                f"{self.paths[i]}: is {image.shape[1]} x {image.shape[0]} pixels, the COCO file says "
                f"{size[0]} x {size[1]}{turned}; export the annotations again"
            )
        return cut_window(image, *self.geometry[i])

    def __getitem__(self, i):
        """(pixels (h, w, 3) uint8, matrix pixels -> picture)."""
        window, (w, h) = self.geometry[i]
        pixels = self.records[i].reshape(h, w, 3) if self.records else self._decode(i)
        return pixels, window_matrix(window, (w, h))
