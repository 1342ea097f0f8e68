"""The data: landmark schemes, COCO files, crops and augmentation, heatmaps <-> points.

COCO file -> `load_coco` -> `DogFLWDataset` -> uint8 crops, points -> (on the device) `normalize` -> model ->
`decode_heatmaps`. The loss builds its targets from `gaussians`; `encode_heatmaps` draws them for inspection.

Coordinates: integer (x, y) is the centre of a pixel, in pictures, crops and heatmaps alike. A crop is defined
by one 2 x 3 affine matrix (picture -> crop), which maps both pixels and points. At stride s, crop pixel x is
heatmap cell (x + 0.5) / s - 0.5.
"""
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.lib.cli import UserError, setting
from tools.lib.coco import held_out, read_coco
from tools.lib.pictures import MEAN, STD, read_image  # noqa: F401 - read_image is re-exported
from tools.lib.windows import Windows, apply_matrix, crop_of, inside, scene, warp, whole_box

SIZE, PADDING = 256, 1.25  # crop side in pixels; crop side / longer side of the face's box
STRIDE = 2  # input pixels per heatmap cell; LandmarkNet supports only 2


# ---------------------------------------------------------------- the COCO file

@dataclass(frozen=True)
class Scheme:
    """The landmarks: read from the COCO category, and stored in every checkpoint as plain types."""
    names: list  # K strings
    flip_pairs: list  # [[i, j], ...], zero-based left/right partners; empty disables mirroring
    regions: dict  # region name -> landmark indices
    interocular: list  # indices of the two landmarks whose distance normalises nme_iod; empty: NaN
    skeleton: list  # [[i, j], ...], zero-based edges to draw between landmarks

    @property
    def flip_index(self):
        """The permutation that swaps left/right partners, as a list (K,), or None without pairs."""
        partner = dict(pair for i, j in self.flip_pairs for pair in ((i, j), (j, i)))
        return [partner.get(i, i) for i in range(len(self.names))] if partner else None


@dataclass(frozen=True)
class Faces:
    """N faces of a COCO file, one row per face; the pictures stay on disk."""
    scheme: Scheme
    root: Path  # the data root: the folder of the pictures
    files: list  # N paths relative to root, with forward slashes; --background pictures: absolute paths
    sizes: np.ndarray  # (N, 2) picture width and height in pixels
    boxes: np.ndarray  # (N, 4) x, y, width, height in picture pixels
    points: np.ndarray  # (N, K, 2) x, y in picture pixels
    visible: np.ndarray  # (N, K) COCO v: 0 unlabelled, 1 hidden or outside the picture, 2 visible
    ids: np.ndarray  # (N,) annotation ids as in the file: int or str
    image_ids: np.ndarray  # (N,) image ids as in the file: int or str
    breeds: list  # N strings, for stratified splits and reports; "" if unknown
    notes: list = field(default_factory=list)  # what the reader repaired or left out, one line each
    room: list = field(default_factory=list)  # how boxes fit the landmarks: see room_of in tools/lib/boxes.py

    def __len__(self):
        return len(self.files)

    def take(self, index):
        """The faces selected by `index`, in its order: integers (M,), or a boolean mask (N,)."""
        index = np.arange(len(self))[[*index]]  # takes lists and ranges, too
        return replace(self, files=[self.files[i] for i in index], breeds=[self.breeds[i] for i in index],
                       **{name: getattr(self, name)[index]
                          for name in ("sizes", "boxes", "points", "visible", "ids", "image_ids")})

    def whole_pictures(self):
        """The same faces, boxed by their whole pictures. Raises UserError if a picture has several faces."""
        if len(set(self.files)) < len(self):
            raise UserError("--crop image: some pictures have several faces; a locator needs one per picture")
        return replace(self, boxes=np.stack([whole_box(size) for size in self.sizes]))

    def split(self, fraction: float, seed: int = 0):
        """Hold out a random `fraction` of each breed's pictures (stratified). Returns (rest, held out)."""
        held = held_out(self.files, self.breeds, fraction, seed)
        return self.take(~held), self.take(held)


def load_coco(path: Path, root: Path, category: str | None = None) -> Faces:
    """Read a COCO keypoint file, its pictures in `root`: see read_coco. Raises UserError naming the entry."""
    scheme, columns = read_coco(path, root, category)
    return Faces(Scheme(**scheme), Path(root), **columns)


# ---------------------------------------------------------------- crops

def crop_matrix(box, size: int, padding: float, rotation=0.0, scale=1.0, shift=(0.0, 0.0), mirror=False):
    """The affine matrix (2, 3), float64, picture -> crop: a square, `padding` * the box's longer side wide.

    size: crop side in pixels; rotation: degrees clockwise; scale > 1 shows more; shift (x, y): in crop sides.
    """
    x, y, w, h = box
    side = max(w, h) * padding * scale
    a = np.deg2rad(rotation)
    linear = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) * (size / side)
    linear[0] *= -1 if mirror else 1
    centre = np.multiply(shift, side) + [x + w / 2, y + h / 2]
    return np.column_stack([linear, (size - 1) / 2 - linear @ centre])


def cut_crop(image: np.ndarray, box, size: int, padding: float, rotation=0.0):
    """Cut the validation crop of `box`, turned `rotation` degrees: (size, size, 3) uint8, matrix (2, 3)."""
    matrix = crop_matrix(box, size, padding, rotation)
    return crop_of(image, box, matrix, size, padding), matrix


@dataclass
class Augmentation:
    """Strengths of the training augmentation, each a flag: setting(default, help, allowed range). 0 is off.

    All 0 gives the validation crop. `empty` is for a locator (--crop image), which sees whole pictures.
    """
    flip: float = setting(0.5, "probability of mirroring (swaps left/right)", "[0, 1]", group="augmentation")
    rotation: float = setting(20.0, "rotation in degrees, uniform in [-X, X]", "[0, 180]")
    scale: float = setting(0.2, "factor on the crop's side, log-uniform in [1 / (1 + X), 1 + X]", "[0, 3]")
    shift: float = setting(0.05, "shift in x and y, in crop sides, uniform in [-X, X]", "[0, 1]")
    colour: float = setting(0.25, "contrast e^+-X, saturation e^+-2X, gain 1+-X/4, offset +-128X", "[0, 1]")
    occlusion: float = setting(0.2, "probability of a flat rectangle, sides 0.1 to 0.4 of the crop", "[0, 1]")
    empty: float = setting(0.0, "for locators: probability of a faceless crop; needs --kl-weight", "[0, 0.9]")

    @property
    def reach(self):
        """Side of the area kept for crops / side of a plain crop; corners get half of what rotation needs."""
        return (1 + self.scale) * (1 + 0.5 * np.sin(np.deg2rad(min(self.rotation, 90))) + 2 * self.shift)

    def draw(self, rng, can_mirror):
        """Sample a crop's geometry (keyword arguments of crop_matrix) and colour matrix (3, 4)."""
        # u: 0 rotation, 1 scale, 2:4 shift, 4 contrast, 5 saturation, 6:9 gain, 9 offset, 10:12 shift of a
        # locator's crop, limited so that a larger one contains the plain crop, and a smaller one stays inside
        u = rng.uniform(-1, 1, 12)
        scale = (1 + self.scale) ** u[1]
        shift = self.shift * u[2:4] + (self.empty > 0) * abs(1 - 1 / scale) / 2 * u[10:12]
        geometry = {"rotation": self.rotation * u[0], "scale": scale, "shift": shift,
                    "mirror": can_mirror and rng.random() < self.flip}
        contrast, saturation = np.exp(self.colour * u[4]), np.exp(2 * self.colour * u[5])
        luma, gain = np.array([0.299, 0.587, 0.114]), 1 + self.colour / 4 * u[6:9]
        linear = contrast * gain[:, None] * (saturation * np.eye(3) + (1 - saturation) * luma)
        offset = 128 * (1 - contrast) + 128 * self.colour * u[9]
        return geometry, np.column_stack([linear, np.full(3, offset)])

    def paint(self, crop, rng):
        """Erase part of a crop (S, S, 3) uint8 in place, at random (Zhong et al. 2020, "Random erasing")."""
        half = rng.uniform(0.05, 0.2, 2) * (rng.random() < self.occlusion)  # 0 gives an empty rectangle
        middle = rng.uniform(0, 1, 2)
        (x0, y0), (x1, y1) = (np.stack([middle - half, middle + half]).clip(0) * len(crop)).astype(int)
        crop[y0:y1, x0:x1] = rng.integers(0, 256, 3)


def default_sigma(input_size: int) -> float:
    """Default standard deviation of the targets in heatmap cells: a fixed fraction of the crop."""
    return 1.5 * input_size / 256


class DogFLWDataset(torch.utils.data.Dataset):
    """Faces as training samples. `dataset[i]` is one complete sample, for inspection:

        image     (3, S, S) float, ImageNet mean/std   heatmaps   (K, S/2, S/2) float
        keypoints (K, 2) float, in crop pixels         visibility (K,) float, see below
        matrix    (2, 3) float64, picture -> crop      index      the position in `faces`

    visibility is 1 for a landmark to train on, 0 if it is unlabelled or outside the crop, and -1 if there is
    no face and the map should be flat; for 0 and -1 the heatmap is 0. The trainer calls `batch(items)`
    instead: uint8 crops, `colour` (B, 3, 4) for `normalize`, no heatmaps. An item is i (-1 for the last;
    epoch 0), (epoch, i) or (epoch, i, crop size); augmentation depends only on seed, epoch and i. cache:
    folder for decoded faces, or None. Raises UserError naming a picture that is missing or unreadable.
    """

    def __init__(self, faces: Faces, input_size=SIZE, padding=PADDING, sigma=None, augment=None, seed=0,
                 cache=None):
        self.faces, self.size, self.padding, self.seed = faces, input_size, padding, seed
        self.sigma = sigma or default_sigma(input_size)
        self.augment = augment or Augmentation(*[0] * len(fields(Augmentation)))
        self.flip_index = faces.scheme.flip_index
        finest = 1 + self.augment.scale * (self.augment.empty > 0)  # only a locator's crops zoom in so far
        self.windows = Windows(faces, input_size * finest, padding, self.augment.reach, cache)

    def __len__(self):
        return len(self.faces)

    def __getitem__(self, item):
        batch = self.batch([item])
        size = batch["image"].shape[1]
        batch["image"] = normalize(batch["image"], torch.tensor(MEAN), torch.tensor(STD), batch.pop("colour"))
        heatmaps = encode_heatmaps(batch["keypoints"], size // STRIDE, self.sigma * size / self.size)
        batch["heatmaps"] = heatmaps * (batch["visibility"] > 0)[..., None, None]
        return {name: values[0] for name, values in batch.items()}

    def place(self, i, size, rng):
        """A random crop of face i: matrix (2, 3), points (K, 2) in it, labelled (K,) bool, colour (3, 4)."""
        geometry, colour = self.augment.draw(rng, self.flip_index)
        matrix = crop_matrix(self.faces.boxes[i], size, self.padding, **geometry)
        points, labelled = apply_matrix(matrix, self.faces.points[i]), self.faces.visible[i] > 0
        if geometry["mirror"]:
            points, labelled = points[self.flip_index], labelled[self.flip_index]
        return matrix, points, labelled, colour

    def batch(self, items):
        """Items as a batch, {name: (B, ...)}: image (B, S, S, 3) uint8, colour (B, 3, 4), else as above."""
        items = [item if isinstance(item, tuple) else (0, range(len(self))[item]) for item in items]
        n, k, size = len(items), len(self.faces.scheme.names), items[0][2] if len(items[0]) > 2 else self.size
        crops = np.empty((n, size, size, 3), np.uint8)
        points, visible = np.zeros((n, k, 2), np.float32), np.zeros((n, k), np.float32)
        colour, matrices = np.zeros((n, 3, 4), np.float32), np.zeros((n, 2, 3))
        for row, (epoch, i, *_) in enumerate(items):
            rng = np.random.default_rng((self.seed, epoch, i))
            place = partial(self.place, size=size, rng=rng)
            if self.augment.empty:
                drawn = scene(crops[row], i, place, self.windows, self.augment.empty, rng)  # for a locator
            else:
                drawn = place(i)
                warp(*self.windows[i], drawn[0], size, out=crops[row])  # *: window pixels, their matrix
            matrices[row], points[row], labelled, colour[row] = drawn
            self.augment.paint(crops[row], rng)
            # Landmarks outside the crop cannot be learnt, though validation scores them. `scene` sets -1.
            visible[row] = labelled * (inside(points[row], size) | (labelled < 0))
        arrays = {"image": crops, "keypoints": points, "visibility": visible, "colour": colour,
                  "matrix": matrices, "index": np.array([i for _, i, *_ in items])}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------- on the device, in batches

def normalize(images: Tensor, mean: Tensor, std: Tensor, colour: Tensor | None = None) -> Tensor:
    """uint8 RGB (B, S, S, 3) -> float (B, 3, S, S), channels_last: (images / 255 - mean (3,)) / std (3,).

    colour (B, 3, 4): the colour augmentation, an affine map of RGB in 0..255 without clipping, applied first.
    """
    if colour is None:
        colour = torch.eye(3, 4, device=mean.device, dtype=mean.dtype).expand(len(images), 3, 4)
    matrix = torch.cat([colour[..., :3], colour[..., 3:] - 255 * mean[:, None]], 2) / (255 * std[:, None])
    pixels = images.flatten(1, 2).float()  # (B, S * S, 3)
    pixels = torch.baddbmm(matrix[..., 3].unsqueeze(1), pixels, matrix[..., :3].transpose(1, 2))
    return pixels.view_as(images).permute(0, 3, 1, 2)


def cell_offsets(points: Tensor, size: int) -> Tensor:
    """Signed distances in cells from points (B, K, 2) in crop pixels to columns and rows: (B, K, 2, size)."""
    places = (points + 0.5) / STRIDE - 0.5  # in cells
    return torch.arange(size, device=points.device, dtype=points.dtype) - places.unsqueeze(-1)


def gaussians(offsets: Tensor, sigma: float):
    """1-D Gaussians with peak 1 in x and y: offsets (B, K, 2, size), sigma in cells -> 2 x (B, K, size)."""
    return torch.exp(-0.5 * (offsets / sigma) ** 2).unbind(2)


def encode_heatmaps(points: Tensor, size: int, sigma: float) -> Tensor:
    """Gaussians with peak 1 at real-valued points: (B, K, 2) in crop pixels -> (B, K, size, size).

    sigma is in cells. A Gaussian is the product of two 1-D ones. It is not truncated, nor its centre rounded.
    """
    x, y = gaussians(cell_offsets(points, size), sigma)
    return y.unsqueeze(3) * x.unsqueeze(2)


def decode_heatmaps(heatmaps: Tensor, power: float, radius: float):
    """Non-negative heatmaps (B, K, H, H) of any scale -> points (B, K, 2) in crop pixels, scores (B, K).

    The point is the centre of mass (Sun et al. 2018, "Integral human pose regression", eq. 2) of the map
    raised to `power`: at 1, thin tails across the crop would pull the point towards the crop's centre. The
    score is the share of the original map's mass within `radius` (a fraction of the crop) of the point, in
    both x and y: the map's own probability that neither error exceeds the radius.
    """
    size, relative = heatmaps.shape[-1], heatmaps / heatmaps.amax((2, 3), keepdim=True).clamp(min=1e-30)
    sharp = relative * relative.pow(power - 1)  # at 1.5, pow is a square root: faster than pow(1.5)
    cells = torch.arange(size, device=heatmaps.device, dtype=heatmaps.dtype)
    sums = torch.stack([sharp.sum(2), sharp.sum(3)], 2)  # (B, K, 2, size): column sums and row sums
    centre = (sums * cells).sum(3) / sums.sum(3).clamp(min=1e-12)
    near_x, near_y = (radius * size + 0.5 - (cells - centre.unsqueeze(-1)).abs()).clamp(0, 1).unbind(2)
    near = ((heatmaps @ near_x.unsqueeze(-1)).squeeze(-1) * near_y).sum(-1)
    return (centre + 0.5) * STRIDE - 0.5, near / heatmaps.sum((2, 3)).clamp(min=1e-12)
