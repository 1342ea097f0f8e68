"""The data: landmark scheme, COCO file, crop and augmentation, heatmaps <-> points.

One way only: COCO file -> `load_coco` -> `DogFLWDataset` -> batches of uint8 crops and points ->
(on the device) `normalize`; `decode_heatmaps` brings predictions back. `encode_heatmaps` makes the targets as maps,
to look at; the loss computes with their one-dimensional `gaussians`.

Coordinates: integer (x, y) is the centre of a pixel, in pictures, crops and heatmaps alike. A crop is one
2 x 3 matrix (picture -> crop) for pixels and points. Heatmap cell h and crop pixel x of stride s:
h = (x + 0.5) / s - 0.5.
"""
import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which timm's weights expect
# Named, because Pillow also knows formats that are programs (EPS runs Ghostscript) and goes by content, not by suffix.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_LANDMARKS = 1000
SIZE, PADDING = 256, 1.25  # the crop in pixels; its side / the longer side of the face's box
STRIDE = 2  # input pixels a heatmap cell
SIGMA = 1.5  # the targets' deviation, heatmap cells; at other sizes the same part of the crop
warnings.filterwarnings("ignore", module="PIL")  # Pillow's remarks about odd but readable files
cv2.setNumThreads(0)  # workers are the parallelism; OpenCV's own threads would fight them


# ---------------------------------------------------------------- scripts: one error type, one atomic write

class UserError(Exception):
    """Something the user can mend. The message names the file or flag, what is wrong and what to do."""


def printable(text):
    """Text from a file as the terminal may show it: one line without control codes."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad command line as one line (UserError), and shows the docstring as it is."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def run_script(main):
    """The edge of every script: what the user can mend becomes one line and exit code 2, Ctrl-C 130."""
    try:
        sys.exit(main())
    except UserError as e:
        # From a DataLoader's worker the message comes wrapped in the worker's traceback.
        message = str(e).split("UserError: ")[-1].strip()
        print("error:", "\n".join(map(printable, message.split("\n"))), file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has gone (`| head`); Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: standard output was closed; what was written to files by then is whole", file=sys.stderr)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EDQUOT,
                           errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise
        print(f"error: {e.filename or 'writing'}: {e.strerror}; nothing that was there before is lost", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)


def atomic_write(path, parts):
    """Write pieces of bytes to a file, which appears under `path` whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name a file: what a kill leaves behind is overwritten by the next try, never piled up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)


def check_free(flag, folder, force):
    """Raises UserError for an output folder that holds something, unless `force`."""
    if folder.exists() and not force and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {folder}: not empty; name another folder, or write into it with --force")


@contextlib.contextmanager
def file_lock(path, busy=None):
    """Hold a file's lock, which goes with the process however that ends. Where another has it: waits, or UserError(busy)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            import fcntl
            # Not flock, which a killed run's data workers would hold on to until they notice.
            fcntl.lockf(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except ImportError:
            pass  # Windows has no such lock
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # some network file systems have none either
                raise
        yield


def find_dogflw(*folders):
    """The folder that holds train/images, at or below `folders`: kagglehub's cache by default (newest version), or where
    Kaggle and Colab put it. None where there is none."""
    if not folders:
        cache = Path(os.environ.get("KAGGLEHUB_CACHE", Path.home() / ".cache" / "kagglehub"))
        versions = (cache / "datasets/georgemartvel/dogflw/versions").glob("*")
        folders = [*sorted(versions, key=lambda p: (len(p.name), p.name), reverse=True),  # 10 is newer than 9
                   Path("/kaggle/input/dogflw"), Path("/kaggle/input/datasets/georgemartvel/dogflw")]
    return next((images.parent.parent for folder in folders for images in sorted(folder.glob("**/train/images"))), None)


def data_root(given, flag="--data-root"):
    """The folder of the pictures: the one that was given with a flag, or DogFLW's. Raises UserError."""
    root = Path(str(given)) if given else find_dogflw()
    if root is None or not root.is_dir():
        raise UserError(f"{flag}{f' {given}' if given else ''}: no such folder; name the one that file names are relative to, "
                        "fetch DogFLW by tools/convert_dogflw_to_coco.py --download, or do without: train_simple.py --sample")
    return root


# ---------------------------------------------------------------- the COCO file

@dataclass(frozen=True)
class Scheme:
    """What the landmarks are; read from the COCO category, stored in every checkpoint as plain types."""
    names: list
    flip_pairs: list  # [[i, j], ...] left/right partners; empty: no mirroring
    regions: dict  # region -> indices
    interocular: list  # the two points whose distance normalises nme_iod; empty: no nme_iod
    skeleton: list  # [[i, j], ...] zero-based lines to draw

    @property
    def flip_index(self):
        """The permutation that swaps partners, or None when the file names no pairs."""
        if not self.flip_pairs:
            return None
        index = list(range(len(self.names)))
        for i, j in self.flip_pairs:
            index[i], index[j] = j, i
        return index

    @property
    def colours(self):
        """A landmark's colour, RGB in 0..255: {index: (r, g, b)}; white for those of no region."""
        return defaultdict(lambda: (255, 255, 255), {
            i: REGION_COLOURS[n % len(REGION_COLOURS)] for n, region in enumerate(self.regions.values()) for i in region})

    @classmethod
    def from_category(cls, category, where):
        """Read and check a COCO category. Raises UserError naming `where`."""
        names = category.get("keypoints")
        if not isinstance(names, list) or not 0 < len(names) <= MAX_LANDMARKS or not all(
                isinstance(n, str) and n.isprintable() for n in names):
            raise UserError(f"{where}: its category needs 1 to {MAX_LANDMARKS} printable keypoint names; convert the data again")

        def field(name, kind=list):
            value = category.get(name) or kind()
            if not isinstance(value, kind):
                raise UserError(f"{where}: {name} must be {'a list' if kind is list else 'an object'}")
            return value

        def indices(value, name, start=0, length=None):
            if (not isinstance(value, list) or not all(type(i) is int and 0 <= i - start < len(names) for i in value)
                    or len(set(value)) < len(value) or length and len(value) != length):
                raise UserError(f"{where}: {name} must hold {length or ''} different landmark numbers, not {str(value)[:60]}")
            return [i - start for i in value]

        pairs = [indices(p, "flip_pairs", length=2) for p in field("flip_pairs")]
        skeleton = [indices(p, "skeleton", 1, 2) for p in field("skeleton")]
        indices(sum(pairs, []), "flip_pairs")  # no landmark has two partners
        regions = {printable(k): indices(v, f"regions.{k}") for k, v in field("regions", dict).items()}
        interocular = field("interocular")
        return cls(names, pairs, regions, indices(interocular, "interocular", length=2 if interocular else 0), skeleton)


@dataclass(frozen=True)
class Faces:
    """N faces of a COCO file as arrays; pictures stay on disk."""
    scheme: Scheme
    files: list  # N paths relative to the data root
    root: Path
    sizes: np.ndarray  # (N, 2) picture width, height
    boxes: np.ndarray  # (N, 4) x, y, w, h
    points: np.ndarray  # (N, K, 2) picture pixels
    visible: np.ndarray  # (N, K) COCO v: 0 not labelled, 1 outside the picture, 2 labelled
    ids: np.ndarray  # (N,) annotation ids
    image_ids: np.ndarray  # (N,)
    breeds: list  # N strings, for stratified splits and reports

    def __len__(self):
        return len(self.files)

    def take(self, index):
        """The faces of `index`, in its order."""
        index = np.asarray(index, dtype=int)
        return replace(self, files=[self.files[i] for i in index], breeds=[self.breeds[i] for i in index],
                       **{k: getattr(self, k)[index] for k in ("sizes", "boxes", "points", "visible", "ids", "image_ids")})

    def mean_face(self):
        """Every landmark's mean place in sides of the face's box (K, 2), its middle at 0; NaN where never labelled."""
        seen = (self.visible > 0)[..., None]
        in_box = apply_matrix(np.stack([crop_matrix(box, 1, 1.0) for box in self.boxes]), self.points)
        with np.errstate(invalid="ignore"):
            return np.where(seen, in_box, 0).sum(0) / seen.sum(0)

    def whole_pictures(self):
        """The same faces, each looked for in its whole picture (`--crop image`)."""
        return replace(self, boxes=np.stack([whole_box(size) for size in self.sizes]))

    def split(self, fraction, seed=0):
        """Hold out `fraction` of every breed, at random (stratified). Returns (rest, held out)."""
        rng, breeds = np.random.default_rng([seed, 7919]), np.array(self.breeds)
        held = [rng.permutation(np.flatnonzero(breeds == b)) for b in sorted(set(self.breeds))]
        # + rng.random() rounds up as often as down, so small breeds neither all give nor all keep their faces
        held = np.sort(np.concatenate([h[:int(len(h) * fraction + rng.random())] for h in held]))
        return self.take(np.setdiff1d(np.arange(len(self)), held)), self.take(held)


def load_json(path):
    """Parse a JSON file. Raises UserError where it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a JSON file ({str(e)[:80]})") from None


def picture_path(root, name, where=""):
    """The path of a picture that a file names relative to the data root. Raises UserError where it leads out of it."""
    if not name.isprintable():
        raise UserError(f"{where}file_name {name!r} holds characters that are no text; rename the picture")
    path = Path(root, name)
    # The names of other systems too: a file written on Windows must not mean another place there than here.
    if (Path(name).is_absolute() or re.match(r"[A-Za-z]:|\\", name) or ".." in re.split(r"[/\\]", name)
            or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))):
        raise UserError(f"{where}file_name {name!r} leaves the data root {root}; names must be relative to it, links stay in it")
    return path


def load_coco(path, root):
    """Read a COCO keypoint file, checked whole. Raises UserError naming the file and the entry.

    Faces without a labelled landmark are left out: they can neither train nor be scored.
    """
    data = load_json(path)
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations", "categories")):
        raise UserError(f"{path}: not a COCO file (images, annotations and categories must be lists)")
    if not data["annotations"]:
        raise UserError(f"{path}: no annotations in it; convert the data again")
    categories = [c for c in data["categories"] if isinstance(c, dict) and c.get("keypoints")]
    if len(categories) != 1:
        raise UserError(f"{path}: {len(categories)} categories with keypoints; exactly one is needed")
    category, = categories
    scheme = Scheme.from_category(category, path)
    k, images = len(scheme.names), {}
    for number, image in enumerate(data["images"]):
        image = image if isinstance(image, dict) else {}
        name, key, size = image.get("file_name"), image.get("id"), (image.get("width"), image.get("height"))
        if not (isinstance(name, str) and name and all(type(s) is int and 0 < s < 1 << 16 for s in size)
                and isinstance(key, (int, str)) and key not in images):
            raise UserError(f"{path}: image {number} ({name!r}) needs a file_name, a width and height, and an id of its own")
        picture_path(root, name, f"{path}: ")
        images[key] = (name, size, printable(image.get("breed", Path(name).stem.split("_")[0])))
    rows, ids = [], set()
    for number, annotation in enumerate(data["annotations"]):
        annotation = annotation if isinstance(annotation, dict) else {}
        key, picture = annotation.get("id", number), annotation.get("image_id")
        where = f"{path}: annotation {key}"
        if not isinstance(key, (int, str)) or key in ids:
            raise UserError(f"{where} has the id of another, or one that is neither number nor text")
        if annotation.get("category_id", category.get("id")) != category.get("id"):
            raise UserError(f"{where} is not of the category with keypoints")
        if not isinstance(picture, (int, str)) or picture not in images:
            raise UserError(f"{where} names an image that is not in the file")
        ids.add(key)
        try:
            triples = np.array(annotation["keypoints"], dtype=np.float64).reshape(k, 3)
            box = np.array(annotation["bbox"], dtype=np.float64).reshape(4)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{where} needs keypoints ({k} x 3 numbers) and bbox (4 numbers)") from None
        labelled = triples[:, 2].any()
        if not (np.abs([*triples.flat, *box]).max() < 1e6 and np.isin(triples[:, 2], (0, 1, 2)).all()  # NaN is below nothing
                and (box[2:].min() > 0 or not labelled)):
            raise UserError(f"{where} has numbers that cannot be: NaN, huge, v not in 0 1 2, or an empty bbox")
        if labelled:
            name, size, breed = images[picture]
            rows.append((name, size, box, triples, key, picture, breed))
    if not rows:
        raise UserError(f"{path}: no annotation has a labelled landmark; convert the data again")
    files, sizes, boxes, triples, ids, image_ids, breeds = zip(*rows)
    triples = np.stack(triples)
    return Faces(scheme, list(files), Path(root), np.array(sizes), np.stack(boxes), triples[..., :2].copy(),
                 triples[..., 2].astype(np.uint8), np.array(ids), np.array(image_ids), list(breeds))


# ---------------------------------------------------------------- pictures and crops

def read_image(path):
    """Decode a picture of any kind: (H, W, 3) uint8 RGB, upright by its EXIF tag. Raises UserError naming it."""
    try:
        with Image.open(str(path), formats=FORMATS) as image:  # some Pillows resolve a Path, and a loop is no OSError then
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it to white
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture; check --data-root") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: cannot be read as a picture ({str(e)[:80]}); restore it or convert again") from None


def whole_box(size):
    """The box x, y, w, h of a whole picture of `size` (width, height)."""
    return np.array([0, 0, *np.maximum(1.0, np.asarray(size) - 1.0)])


def intersections(a, b):
    """Shared area of every box x, y, w, h of a with every box of b: (N, 4), (M, 4) -> (N, M)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    return np.maximum(high - low, 0).prod(-1)


def overlaps(a, b):
    """Intersection over union of every box of a with every box of b: (N, 4), (M, 4) -> (N, M)."""
    shared = intersections(a, b)
    return shared / np.maximum(a[:, None, 2:].prod(-1) + b[None, :, 2:].prod(-1) - shared, 1e-9)


def crop_matrix(box, size, padding, rotation=0.0, scale=1.0, shift=(0.0, 0.0), mirror=False):
    """The 2 x 3 matrix picture -> crop of `size` pixels: a square of side `padding` * the box's longer side.

    rotation in degrees, scale > 1 shows more of the picture, shift in sides of the square. Float64.
    """
    x, y, w, h = box
    side = max(w, h) * padding * scale
    a = np.deg2rad(rotation)
    linear = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) * (size / side)
    if mirror:
        linear[0] *= -1
    centre = np.array([x + w / 2, y + h / 2]) + np.asarray(shift) * side
    return np.column_stack([linear, (size - 1) / 2 - linear @ centre])


def invert_matrix(matrix):
    """The inverse of 2 x 3 matrices (..., 2, 3)."""
    inverse = np.linalg.inv(matrix[..., :2])
    return np.concatenate([inverse, -inverse @ matrix[..., 2:]], axis=-1)


def apply_matrix(matrix, points):
    """Map points (..., N, 2) by 2 x 3 matrices (..., 2, 3); numpy or torch."""
    return points @ matrix[..., :2].swapaxes(-1, -2) + matrix[..., None, :, 2]


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the training augmentation; all 0 is the validation crop."""
    flip: float = 0.5  # probability of mirroring, partners swapped
    rotation: float = 20.0  # degrees, uniform in +-
    scale: float = 0.2  # log-uniform in 1 / (1 + s) .. 1 + s
    shift: float = 0.05  # of the crop's side, uniform in +-
    colour: float = 0.25  # strength of contrast, brightness, saturation and channel gain
    occlusion: float = 0.2  # probability of one flat rectangle over the crop

    @property
    def reach(self):
        """How much wider than the plain crop the augmented ones can reach, corners of rotated ones left out."""
        return (1 + self.scale) * (1 + 0.5 * np.sin(np.deg2rad(self.rotation))) + 2 * self.shift


def face_window(box, picture_size, size, padding, reach):
    """Which part of the picture a crop of this face can need, and at what resolution it is kept.

    Returns (x, y, w, h) in the picture and (w, h) as kept: faces larger than the crop are shrunk once, by area,
    so that sampling them bilinearly does not alias.
    """
    (x, y, w, h), side = box, max(box[2], box[3]) * padding
    half = side * reach / 2 + 1
    low = np.clip(np.floor([x + w / 2 - half, y + h / 2 - half]), 0, np.array(picture_size) - 1).astype(int)
    high = np.clip(np.ceil([x + w / 2 + half, y + h / 2 + half]), low, np.array(picture_size) - 1).astype(int)
    extent = high - low + 1
    shrink = min(1.0, size / side)
    kept = np.maximum(1, np.round(extent * shrink)).astype(int)
    return (*low, *extent), (*kept,)


def cut_window(image, window, kept):
    """Cut and shrink (H, W, 3) -> (kept h, kept w, 3)."""
    x, y, w, h = window
    part = image[y:y + h, x:x + w]
    return part if (w, h) == tuple(kept) else cv2.resize(part, kept, interpolation=cv2.INTER_AREA)


def window_matrix(window, kept):
    """The 2 x 3 matrix kept window -> picture."""
    x, y, w, h = window
    sx, sy = w / kept[0], h / kept[1]
    return np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])


def warp(pixels, to_picture, matrix, size, out=None):
    """Sample a (size, size, 3) crop bilinearly, outside is mid-grey. `to_picture` maps pixels -> picture, `matrix` on to the crop."""
    to_crop = matrix @ np.vstack([to_picture, [0, 0, 1]])
    return cv2.warpAffine(pixels, to_crop, (size, size), dst=out, flags=cv2.INTER_LINEAR, borderValue=(124, 116, 104))


def predict_crop(image, box, size, padding):
    """A picture and a box -> (crop uint8 (size, size, 3), matrix picture -> crop), exactly as in validation."""
    window, kept = face_window(box, image.shape[1::-1], size, padding, 1.0)
    matrix = crop_matrix(box, size, padding)
    return warp(cut_window(image, window, kept), window_matrix(window, kept), matrix, size), matrix


class Windows:
    """The faces' windows, decoded once: in a file (cache="disk"), in shared memory ("ram"), or each time ("none").

    The file's name holds a hash of all it depends on (names, sizes and times of the pictures, geometry), so a
    stale one is never read. Windows are raw uint8 one after the other; their places follow from the geometry.
    Raises UserError naming the first picture that is missing or cannot be read.
    """

    def __init__(self, faces, size, padding, reach, cache="none", folder=ROOT / "data" / "cache"):
        self.paths, self.sizes, self.cache = [faces.root / f for f in faces.files], faces.sizes, cache
        self.geometry = [face_window(b, s, size, padding, reach) for b, s in zip(faces.boxes, faces.sizes)]
        self.offsets = np.cumsum([0] + [3 * w * h for _, (w, h) in self.geometry])
        missing = [path for path in self.paths if not path.exists()]
        if missing:
            raise UserError(f"{missing[0]}: no such picture ({len(missing)} of {len(self.paths)} missing); "
                            "check --data-root, or convert again")
        if cache == "ram":
            # Linux hands out more shared memory than there is, and kills who touches it.
            free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
            if self.offsets[-1] > free:
                raise UserError(f"--cache ram: the faces take {self.offsets[-1] >> 20} MiB of shared memory, /dev/shm has {free >> 20} "
                                "free; take --cache disk, or give a container more (docker run --shm-size 2g)")
            self.memory = torch.empty(int(self.offsets[-1]), dtype=torch.uint8).share_memory_()
            for i, window in enumerate(self._decode_all()):
                self.memory[self.offsets[i]:self.offsets[i + 1]] = torch.from_numpy(window.reshape(-1))
        elif cache == "disk":
            stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
            key = hashlib.sha256(repr((stats, self.geometry)).encode()).hexdigest()[:16]
            self.file = Path(folder) / f"{key}.bin"
            if not self._is_whole():
                with file_lock(self.file.with_name(".lock")):  # another run, or rank, may be at it
                    if not self._is_whole():
                        atomic_write(self.file, (window.tobytes() for window in self._decode_all()))

    def _is_whole(self):
        return self.file.is_file() and self.file.stat().st_size == self.offsets[-1]

    def _decode(self, i):
        image = read_image(self.paths[i])
        if image.shape[1::-1] != tuple(self.sizes[i]):
            raise UserError(f"{self.paths[i]}: is {image.shape[1]} x {image.shape[0]} pixels, the COCO file says "
                            f"{self.sizes[i][0]} x {self.sizes[i][1]}; convert again")
        return cut_window(image, *self.geometry[i])

    def _decode_all(self):
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(
                total=len(self.paths), desc="decoding", unit="face", leave=False, disable=None) as bar:
            for start in range(0, len(self.paths), 256):  # in chunks, so that finished windows do not pile up
                for window in pool.map(self._decode, range(start, min(start + 256, len(self.paths)))):
                    yield window
                    bar.update()

    def __getitem__(self, i):
        """(pixels (h, w, 3) uint8, matrix pixels -> picture)."""
        window, (w, h) = self.geometry[i]
        if self.cache == "none":
            pixels = self._decode(i)
        elif self.cache == "ram":
            pixels = self.memory[self.offsets[i]:self.offsets[i + 1]].numpy().reshape(h, w, 3)
        else:  # a plain read: mapped pages would count as this process's memory, in every worker
            try:
                pixels = np.fromfile(self.file, np.uint8, 3 * w * h, offset=self.offsets[i]).reshape(h, w, 3)
            except (OSError, ValueError):
                raise UserError(f"{self.file}: the face cache is gone or cut off; start again, which builds it anew") from None
        return pixels, window_matrix(window, (w, h))


def default_sigma(input_size):
    """The targets' deviation in cells for crops of this size."""
    return SIGMA * input_size / SIZE


class DogFLWDataset(torch.utils.data.Dataset):
    """Faces as training samples. `dataset[i]` is one sample in full, ready to look at:

        image     (3, S, S) float, normalised     heatmaps   (K, S/2, S/2) float
        keypoints (K, 2) float, crop pixels       visibility (K,) 1 where the landmark trains, else 0
        matrix    (2, 3) float64 picture -> crop  index      the face's place in `faces`

    A DataLoader calls `__getitems__` instead: whole batches of uint8 crops, from which the device makes images
    and heatmaps. An item is i, (epoch, i) or (epoch, i, crop size): augmentation is a pure function of (seed, epoch, i).
    """

    def __init__(self, faces, input_size=SIZE, padding=PADDING, sigma=None, augment=None, seed=0, cache="none"):
        self.faces, self.size, self.padding, self.seed = faces, input_size, padding, seed
        self.sigma = sigma or default_sigma(input_size)
        self.augment = augment or Augmentation(0, 0, 0, 0, 0, 0)
        self.flip_index = faces.scheme.flip_index
        self.windows = Windows(faces, input_size, padding, self.augment.reach, cache)

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, item):
        batch = self.__getitems__([item])
        size = batch["image"].shape[1]
        images, heatmaps = normalize(batch["image"], batch["colour"]), encode_heatmaps(
            batch["keypoints"], size // STRIDE, self.sigma * size / self.size)
        return {"image": images[0], "heatmaps": heatmaps[0],
                **{k: batch[k][0] for k in ("keypoints", "visibility", "matrix", "index")}}

    def __getitems__(self, items):
        items = [(*item, self.size)[:3] if isinstance(item, tuple) else (0, item, self.size) for item in items]
        n, size, k = len(items), items[0][2], len(self.faces.scheme.names)
        crops = np.empty((n, size, size, 3), np.uint8)
        points, visible = np.zeros((n, k, 2)), np.zeros((n, k), np.float32)
        colour, matrices, index = np.zeros((n, 3, 4), np.float32), np.zeros((n, 2, 3)), np.zeros(n, np.int64)
        for row, (epoch, i, _) in enumerate(items):
            geometry, colour[row], (left, top, right, bottom), fill = self._draw(epoch, i)
            pixels, to_picture = self.windows[i]
            matrices[row] = crop_matrix(self.faces.boxes[i], size, self.padding, **geometry)
            warp(pixels, to_picture, matrices[row], size, out=crops[row])
            crops[row, int(top * size):int(bottom * size), int(left * size):int(right * size)] = fill
            points[row], labelled = apply_matrix(matrices[row], self.faces.points[i]), self.faces.visible[i] > 0
            if geometry["mirror"]:
                points[row], labelled = points[row][self.flip_index], labelled[self.flip_index]
            # What the crop cut off cannot be learnt from a heatmap; validation scores it all the same.
            visible[row] = labelled & (points[row] > -0.5).all(-1) & (points[row] < size - 0.5).all(-1)
            index[row] = i
        return {"image": torch.from_numpy(crops), "keypoints": torch.from_numpy(points.astype(np.float32)),
                "visibility": torch.from_numpy(visible), "colour": torch.from_numpy(colour),
                "matrix": torch.from_numpy(matrices), "index": torch.from_numpy(index)}

    def _draw(self, epoch, i):
        """One draw of the augmentation: crop_matrix's arguments, colour matrix (3, 4), rectangle in sides, its fill."""
        a, rng = self.augment, np.random.default_rng((self.seed, epoch, i))
        u = rng.uniform(-1, 1, 12)  # always the same number of draws, whatever is switched on
        geometry = {"rotation": a.rotation * u[0], "scale": (1 + a.scale) ** u[1], "shift": a.shift * u[2:4],
                    "mirror": bool(self.flip_index and rng.random() < a.flip)}
        contrast, saturation, gain = np.exp(a.colour * u[4]), np.exp(2 * a.colour * u[5]), 1 + a.colour / 4 * u[6:9]
        luma = np.array([0.299, 0.587, 0.114])
        linear = contrast * gain[:, None] * (saturation * np.eye(3) + (1 - saturation) * luma)
        offset = 128 * (1 - contrast) + 128 * a.colour * u[9]
        half, middle = rng.uniform(0.05, 0.2, 2) * (rng.random() < a.occlusion), rng.uniform(0, 1, 2)
        rectangle = *np.maximum(0, middle - half), *middle + half  # empty without occlusion
        return geometry, np.column_stack([linear, np.full(3, offset)]), rectangle, rng.integers(0, 256, 3)


# ---------------------------------------------------------------- on the device, in batches

def normalize(images, colour=None):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in channels_last, by ImageNet's mean and deviation.

    colour (B, 3, 4): an affine map of RGB in 0..255, the colour augmentation; folded into the normalisation.
    """
    if colour is None:
        colour = torch.eye(3, 4, device=images.device).expand(len(images), 3, 4)
    matrix = torch.stack([torch.cat([row[:, :3], row[:, 3:] - 255 * mean], 1) / (255 * std)  # numbers: a tensor made here would
                          for row, mean, std in zip(colour.unbind(1), MEAN, STD, strict=True)], 1)  # make the device wait
    pixels = images.flatten(1, 2).float()  # (B, S * S, 3)
    pixels = torch.baddbmm(matrix[..., 3].unsqueeze(1), pixels, matrix[..., :3].transpose(1, 2))
    return pixels.unflatten(1, images.shape[1:3]).permute(0, 3, 1, 2)


def cell_offsets(points, size):
    """From every point (B, K, 2) in crop pixels to every column and row, in cells: (B, K, 2, size)."""
    places = (points + 0.5) / STRIDE - 0.5  # in cells
    return torch.arange(size, device=points.device, dtype=points.dtype) - places.unsqueeze(-1)


def gaussians(offsets, sigma):
    """One-dimensional Gaussians of height 1 of offsets (B, K, 2, size) in cells, sigma in cells: x and y, (B, K, size) each."""
    return torch.exp(-0.5 * (offsets / sigma) ** 2).unbind(2)


def encode_heatmaps(points, size, sigma):
    """Gaussians of height 1 around real-valued points: (B, K, 2) crop pixels -> (B, K, size, size).

    sigma in cells. The Gaussian is a product of two one-dimensional ones, never cut off, never rounded.
    """
    x, y = gaussians(cell_offsets(points, size), sigma)
    return y.unsqueeze(3) * x.unsqueeze(2)


def decode_heatmaps(heatmaps, radius=0.05):
    """Non-negative maps of any height (B, K, S, S) -> points (B, K, 2) in crop pixels, scores (B, K).

    Sub-pixel: a centre of mass (Sun et al. 2018, "Integral human pose regression", eq. 2), right for sharp and for broad
    maps; of the maps to the power 1.5, because thin tails over the whole crop draw the plain one to its middle (2 % less
    error on held-out faces). The score is the share of the map's mass within `radius` of the point, as a fraction of the
    crop (in x and in y): the map's own probability of that error.
    """
    size, sharp = heatmaps.shape[-1], heatmaps * heatmaps.sqrt()
    cells = torch.arange(size, device=heatmaps.device, dtype=heatmaps.dtype)
    sums = torch.stack([sharp.sum(2), sharp.sum(3)], 2)  # (B, K, 2, size), of columns and of rows
    centre = (sums @ cells) / sums.sum(3).clamp(min=1e-12)
    near_x, near_y = (radius * size + 0.5 - (cells - centre.unsqueeze(-1)).abs()).clamp(0, 1).unbind(2)  # (B, K, size) each
    near = ((heatmaps @ near_x.unsqueeze(-1)).squeeze(-1) * near_y).sum(-1)
    return (centre + 0.5) * STRIDE - 0.5, near / heatmaps.sum((2, 3)).clamp(min=1e-12)


# ---------------------------------------------------------------- pictures to look at

REGION_COLOURS = ((66, 133, 244), (15, 157, 88), (244, 180, 0), (219, 68, 55), (171, 71, 188), (0, 172, 193), (255, 112, 67))


def draw_landmarks(image, points, scheme, visible=None, truth=None):
    """A copy of an (H, W, 3) uint8 RGB picture with (K, 2) landmarks: a colour a region, left filled, right a ring.

    Sizes fit the face. `truth` (K, 2) is drawn as thin white lines from prediction to truth.
    """
    image = np.ascontiguousarray(image).copy()
    shown = np.flatnonzero(np.isfinite(points).all(1) & (True if visible is None else visible))
    if not len(shown):
        return image
    extent = np.ptp(points[shown], axis=0).max()
    radius, width = max(1, round(extent / 90)), max(1, round(extent / 250))
    colour = scheme.colours
    right = {j for _, j in scheme.flip_pairs}

    def at(p):  # cv2 draws with 4 fractional bits
        return tuple(np.round(np.clip(p, -1e4, 1e5) * 16).astype(int).tolist())
    for i, j in scheme.skeleton:
        if i in shown and j in shown:
            cv2.line(image, at(points[i]), at(points[j]), colour[i], width, cv2.LINE_AA, 4)
    for i in shown:
        if truth is not None:
            cv2.line(image, at(points[i]), at(truth[i]), (255, 255, 255), width, cv2.LINE_AA, 4)
        cv2.circle(image, at(points[i]), radius * 16, colour[i], width if i in right else -1, cv2.LINE_AA, 4)
    return image


def caption(tile, text):
    """The picture with a line of text below it."""
    strip = Image.new("RGB", (tile.shape[1], 22), (30, 30, 30))
    ImageDraw.Draw(strip).text((4, 3), text, (255, 255, 255), ImageFont.load_default(13))
    return np.vstack([tile, np.asarray(strip)])


def contact_sheet(tiles, columns):
    """Equal-sized pictures in rows; the last row is filled with black."""
    tiles = list(tiles)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i:i + columns]) for i in range(0, len(tiles), columns)])


def encode_picture(image, suffix=".png"):
    """RGB uint8 -> the bytes of a picture file."""
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()
