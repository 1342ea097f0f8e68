"""The part of a picture that a face's crops can need: cut once, shrunk once, kept in a file."""

import glob
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from tools.lib.cli import UserError
from tools.lib.files import RecordFile, in_threads
from tools.lib.pictures import GREY, format_of, read_image

DECODING = 2  # raise it when the kept pixels change, so that older caches are not read


def whole_box(size: tuple | np.ndarray) -> np.ndarray:
    """The box x, y, w, h of a whole picture of `size` (width, height).

    It reaches from the centre of the first pixel to that of the last.
    """
    return np.array([0, 0, *np.maximum(1.0, np.asarray(size) - 1.0)])


def invert_matrix(matrix: np.ndarray) -> np.ndarray:
    """The inverse of 2 x 3 matrices (..., 2, 3)."""
    inverse = np.linalg.inv(matrix[..., :2])
    return np.concatenate([inverse, -inverse @ matrix[..., 2:]], axis=-1)


def apply_matrix(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points (..., N, 2) by 2 x 3 matrices (..., 2, 3)."""
    return points @ matrix[..., :2].swapaxes(-1, -2) + matrix[..., None, :, 2]


def face_window(box: np.ndarray | tuple, picture_size: np.ndarray | tuple, size: float, padding: float,
                reach: float) -> tuple[tuple, tuple]:
    """The part of the picture that a crop of `size` pixels of this face can need, and its size as kept.

    Returns (x, y, w, h) in the picture and (w, h) as kept: faces larger than the crop are shrunk once, by
    area, so that bilinear sampling does not alias. reach: side of what crops can show / the plain crop's.
    """
    (x, y, w, h), side = box, max(box[2], box[3]) * padding
    half = side * reach / 2 + 1
    middle, last = np.array([x + w / 2, y + h / 2]), np.array(picture_size) - 1
    low = np.clip(np.floor(middle - half), 0, last).astype(int)
    high = np.clip(np.ceil(middle + half), low, last).astype(int)
    extent = high - low + 1
    kept = np.maximum(1, np.round(extent * min(1.0, size / side))).astype(int)
    return (*low, *extent), (*kept,)


def cut_window(image: np.ndarray, window: tuple, kept: tuple) -> np.ndarray:
    """Cut and shrink (H, W, 3) -> (kept h, kept w, 3)."""
    x, y, w, h = window
    part = image[y:y + h, x:x + w]
    return part if (w, h) == tuple(kept) else cv2.resize(part, kept, interpolation=cv2.INTER_AREA)


def window_matrix(window: tuple, kept: tuple) -> np.ndarray:
    """The 2 x 3 matrix kept window -> picture."""
    x, y, w, h = window
    sx, sy = w / kept[0], h / kept[1]
    return np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])


def warp(pixels: np.ndarray, to_picture: np.ndarray, matrix: np.ndarray, size: int,
         out: np.ndarray | None = None, over: bool = False) -> np.ndarray:
    """Sample a (size, size, 3) crop bilinearly; outside the pixels it is GREY, or (`over`) what `out` held.

    `to_picture` maps pixels -> picture, `matrix` picture -> crop. With `over`, pixels much finer than the
    crop's are first shrunk by area, so that nothing aliases. Without it, crops at half the windows' scale
    (--progressive's small ones) alias a little, for the sake of speed.
    """
    to_crop = matrix @ np.vstack([to_picture, [0, 0, 1]])
    if over and (shrink := math.sqrt(abs(np.linalg.det(to_crop[:, :2])))) < 0.7:
        whole = (0, 0, *pixels.shape[1::-1])
        kept = tuple(max(1, round(side * shrink)) for side in whole[2:])
        pixels = cut_window(pixels, whole, kept)
        to_crop = to_crop @ np.vstack([window_matrix(whole, kept), [0, 0, 1]])
    border = cv2.BORDER_TRANSPARENT if over else cv2.BORDER_CONSTANT
    return cv2.warpAffine(pixels, to_crop, (size, size), dst=out, flags=cv2.INTER_LINEAR, borderMode=border,
                          borderValue=GREY)


def crop_of(image: np.ndarray, box: np.ndarray | tuple, matrix: np.ndarray, size: int,
            padding: float) -> np.ndarray:
    """The crop (size, size, 3) that `matrix` makes of the face in `box`, shrunk by area first."""
    reach = np.abs(matrix[0, :2]).sum() / math.hypot(*matrix[0, :2])  # above 1 if it rotates
    window, kept = face_window(box, image.shape[1::-1], size, padding, reach)
    return warp(cut_window(image, window, kept), window_matrix(window, kept), matrix, size)


def inside(points: np.ndarray, size: int | np.ndarray) -> np.ndarray:
    """Which points (..., 2) lie in a crop of side `size`, or in a picture of this width and height (2,)."""
    return (points > -0.5).all(-1) & (points < size - 0.5).all(-1)


def scene(crop: np.ndarray, i: int, place: Callable, windows: "Windows", empty: float,
          rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A locator's training sample: fills `crop` with picture i, on grey or on a part of another picture.

    place(i) -> a random matrix, points (K, 2), labelled (K,), colour; the same is returned. With probability
    `empty`, the crop is to show no face: it lies elsewhere, or the background is put in the face's place. If
    it shows no face, or under a quarter of the labelled landmarks, `labelled` is -1 for these; for a picture
    without labels (of `with_background`), it is -1 for all.
    """

    def shows(drawn):
        return (drawn[2] & inside(drawn[1], len(crop))).sum() >= max(1, 0.25 * drawn[2].sum())

    def elsewhere(i):
        return next((drawn for drawn in (place(i) for _ in range(19)) if not shows(drawn)), place(i))

    crop[:] = GREY
    if rng.random() < 0.7:
        j = int(rng.integers(len(windows.paths)))
        warp(*windows[j], elsewhere(j)[0], len(crop), out=crop)
    empty, hidden = rng.random() < empty, rng.random() < 0.5
    drawn = elsewhere(i) if empty and not hidden else place(i)
    matrix, points, labelled, colour = drawn
    behind = crop.copy()
    warp(*windows[i], matrix, len(crop), out=crop, over=True)
    if shows(drawn):
        if not (empty and hidden):
            return drawn
        seen = points[labelled & inside(points, len(crop))]
        margin = 0.2 * np.ptp(seen, axis=0)
        if margin.min() <= margin.max() / 4:  # one landmark, or some in a line: they span no area
            margin = np.full(2, max(2 * margin.max(), len(crop) / 16))
        left, top = (seen.min(0) - margin).clip(0).astype(int)
        right, bottom = (seen.max(0) + margin).clip(0).astype(int)
        crop[top:bottom, left:right] = behind[top:bottom, left:right]
    return matrix, points, -1.0 * (labelled | ~labelled.any()), colour


def with_background(faces, folder: Path | None, say: Callable = print, *others):
    """A locator's `faces`, followed by the pictures in `folder`, which show no face; None adds none.

    From these a locator learns what is no face (see `scene`). As they have no labelled landmark, no metric
    counts them. Raises UserError if the folder has no pictures, if one cannot be read, and if one is also in
    `faces` or in `others`: Faces (or None) for model selection or for testing.
    """
    if folder is None:
        return faces
    paths = sorted(path.absolute() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."
                   and format_of(path) not in ("", "video", "PDF", "SVG"))
    if not paths:
        raise UserError(f"--background {folder}: no picture there; name another, or leave it out")
    used = {(some.root / file).absolute() for some in (faces, *others) if some for file in some.files}
    if shown := used.intersection(paths):
        raise UserError(f"--background {folder}: {min(shown)} shows a face of --ann-root; name another")
    say(f"{folder}: {len(paths)} pictures without a face, beside the faces to train on")
    n, k = len(paths), len(faces.scheme.names)
    sizes = [image.shape[1::-1] for image in in_threads(lambda i: read_image(paths[i]), n, "background")]
    added = {"sizes": sizes, "boxes": [whole_box(size) for size in sizes], "points": np.zeros((n, k, 2)),
             "visible": np.zeros((n, k), np.uint8), "ids": range(-n, 0), "image_ids": range(-n, 0)}
    joined = {name: np.concatenate([getattr(faces, name), array]) for name, array in added.items()}
    return replace(faces, files=[*faces.files, *map(str, paths)], breeds=[*faces.breeds, *[""] * n], **joined)


def check_size(path: Path, size: Iterable[int], described: Iterable[int]):
    """Raises UserError where a picture's width and height are not those of the COCO file."""
    if tuple(size) != tuple(described):
        (w, h), (width, height) = size, described
        raise UserError(f"{path}: is {w} x {h} pixels, the COCO file says {width} x {height}; "
                        "export the annotations again")


def read_described(path: Path, size: Iterable[int]) -> np.ndarray:
    """A picture that a COCO file describes, (H, W, 3) uint8 RGB. Raises UserError for one of another size."""
    image = read_image(path)
    check_size(path, image.shape[1::-1], size)
    return image


class Windows:
    """Each face's part of its picture, decoded once into a file in `folder`, or at each access if it is None.

    The file's name holds a hash of all it depends on (names, sizes and times of the pictures, geometry), so a
    stale one is never read. Raises UserError naming pictures that are missing or cannot be read.
    """

    def __init__(self, faces, size: float, padding: float, reach: float, folder: Path | str | None = None):
        self.paths, self.sizes, self.records = [faces.root / f for f in faces.files], faces.sizes, None
        self.geometry = [face_window(b, s, size, padding, reach) for b, s in zip(faces.boxes, faces.sizes)]
        missing = [path for path in self.paths if not os.path.exists(path)]  # also False for too long a name
        if missing:
            count = f"{len(missing)} of {len(self.paths)} missing"
            some = len(missing) < len(self.paths) / 2
            mend = "fetch it, or take it and its annotations out of the file" if some else "check --data-root"
            beside = missing[0].parent.glob(f"{glob.escape(missing[0].stem)}.*")
            if alike := next((p for p in beside if p.stem == missing[0].stem and format_of(p)), None):
                mend = f"there is {alike.name}, so mend the names in the file"
            raise UserError(f"{missing[0]}: no such picture ({count}); {mend}")
        if folder:
            stats = [(str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path in self.paths
                     for s in [path.stat()]]
            key = hashlib.sha256(repr((DECODING, stats, self.geometry)).encode()).hexdigest()[:16]
            self.records = RecordFile(Path(folder) / f"{key}.bin", [3 * w * h for _, (w, h) in self.geometry],
                                      self._all)

    def _all(self) -> Iterator[np.ndarray]:
        """Every face's pixels, in order. Raises UserError naming up to 20 pictures that cannot be used."""
        problems = {}  # path: why

        def decode(i: int) -> np.ndarray:
            try:
                return self._decode(i)
            except UserError as e:
                problems[self.paths[i]] = e
                return np.empty(0, np.uint8)
        for pixels in in_threads(decode, len(self.paths), "decoding"):
            yield pixels
            if len(problems) >= 20:
                break
        if problems:
            first, *others = sorted(problems)[:20]
            rest = ", and perhaps more" if len(problems) >= 20 else ""
            more = f". Cannot be used either: {', '.join(map(str, others))}{rest}" if others else ""
            raise UserError(f"{problems[first]}{more}")

    def _decode(self, i: int) -> np.ndarray:
        return cut_window(read_described(self.paths[i], self.sizes[i]), *self.geometry[i])

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Face i's pixels (h, w, 3) uint8, and their 2 x 3 matrix pixels -> picture."""
        window, (w, h) = self.geometry[i]
        pixels = self.records[i].reshape(h, w, 3) if self.records else self._decode(i)
        return pixels, window_matrix(window, (w, h))
