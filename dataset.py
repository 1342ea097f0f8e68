"""What a face is: landmark scheme, COCO file, crop and augmentation, heatmaps <-> points.

COCO file -> `load_coco` -> `DogFLWDataset` -> uint8 crops, points -> (on the device) `normalize` -> model ->
`decode_heatmaps`. The loss makes its targets of `gaussians`; `encode_heatmaps` draws them, to look at.

Coordinates: integer (x, y) is the centre of a pixel, in pictures, crops and heatmaps alike. A crop is one
2 x 3 matrix (picture -> crop) for pixels and points. Heatmap cell h and crop pixel x of stride s:
h = (x + 0.5) / s - 0.5.
"""
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tools.lib.cli import UserError, setting
from tools.lib.coco import originals, read_coco
from tools.lib.pictures import MEAN, STD, read_image  # noqa: F401 - read_image is imported from here
from tools.lib.windows import Windows, apply_matrix, crop_of, inside, scene, warp, whole_box

SIZE, PADDING = 256, 1.25  # the crop in pixels; its side / the longer side of the face's box
STRIDE = 2  # input pixels a heatmap cell; LandmarkNet is built for this one


# ---------------------------------------------------------------- the COCO file

@dataclass(frozen=True)
class Scheme:
    """What the landmarks are; read from the COCO category, stored in every checkpoint as plain types."""
    names: list
    flip_pairs: list  # [[i, j], ...] left/right partners, zero-based; empty: no mirroring
    regions: dict  # region -> indices
    interocular: list  # the two points whose distance normalises nme_iod; empty: no nme_iod
    skeleton: list  # [[i, j], ...] zero-based lines to draw

    @property
    def flip_index(self):
        """The permutation that swaps partners, or None when there are no pairs."""
        partner = dict(pair for i, j in self.flip_pairs for pair in ((i, j), (j, i)))
        return [partner.get(i, i) for i in range(len(self.names))] if partner else None


@dataclass(frozen=True)
class Faces:
    """N faces of a COCO file as arrays; pictures stay on disk."""
    scheme: Scheme
    root: Path
    files: list  # N paths relative to the data root, with /; those of --background are absolute
    sizes: np.ndarray  # (N, 2) picture width, height
    boxes: np.ndarray  # (N, 4) x, y, w, h
    points: np.ndarray  # (N, K, 2) picture pixels
    visible: np.ndarray  # (N, K) COCO v: 0 not labelled, 1 hidden or outside the picture, 2 visible
    ids: np.ndarray  # (N,) annotation ids, as the file has them: int or str
    image_ids: np.ndarray  # (N,)
    breeds: list  # N strings, for stratified splits and reports
    notes: list = field(default_factory=list)  # what the reader repaired or left out, a line each
    room: list = field(default_factory=list)  # how boxes lie around landmarks: room_of in tools/lib/boxes.py

    def __len__(self):
        return len(self.files)

    def take(self, index):
        """The faces of `index`, in its order: numbers, or a mask (N,) of bool."""
        index = np.arange(len(self))[[*index]]
        return replace(self, files=[self.files[i] for i in index], breeds=[self.breeds[i] for i in index],
                       **{name: getattr(self, name)[index]
                          for name in ("sizes", "boxes", "points", "visible", "ids", "image_ids")})

    def whole_pictures(self):
        """The same faces, each looked for in its whole picture. Raises UserError for several in one."""
        if len(set(self.files)) < len(self):
            raise UserError("--crop image: some pictures have several faces; a locator takes one in each")
        return replace(self, boxes=np.stack([whole_box(size) for size in self.sizes]))

    def split(self, fraction: float, seed: int = 0):
        """Hold out `fraction` of every breed's pictures, at random (stratified). Returns (rest, held out).

        The faces of one picture, and its copies, stay together, with the breed of the first of them.
        """
        rng = np.random.default_rng([seed, 7919])
        _, first, picture = np.unique(originals(self.files), return_index=True, return_inverse=True)
        breeds = np.array(self.breeds)[first]
        order = np.argsort(first)  # in the file's order: names do not matter
        held = [rng.permutation(order[breeds[order] == b]) for b in sorted(set(breeds))]
        # + rng.random() rounds at random, right on average: small breeds neither all give nor all keep faces
        held = np.concatenate([h[:int(len(h) * fraction + rng.random())] for h in held])
        is_held = np.isin(picture, held)
        return self.take(np.flatnonzero(~is_held)), self.take(np.flatnonzero(is_held))


def load_coco(path: Path, root: Path, category: str | None = None) -> Faces:
    """The faces of a COCO keypoint file, read by tools/lib/coco.py. Raises UserError naming the entry."""
    scheme, columns = read_coco(path, root, category)
    return Faces(Scheme(**scheme), Path(root), **columns)


# ---------------------------------------------------------------- crops

def crop_matrix(box, size, padding, rotation=0.0, scale=1.0, shift=(0.0, 0.0), mirror=False):
    """The 2 x 3 matrix picture -> crop of `size` pixels: a square of side `padding` * the box's longer side.

    rotation in degrees, clockwise; scale > 1 shows more; shift in sides of the square. Float64.
    """
    x, y, w, h = box
    side = max(w, h) * padding * scale
    a = np.deg2rad(rotation)
    linear = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) * (size / side)
    linear[0] *= -1 if mirror else 1
    centre = np.multiply(shift, side) + [x + w / 2, y + h / 2]
    return np.column_stack([linear, (size - 1) / 2 - linear @ centre])


def cut_crop(image, box, size, padding, rotation=0.0):
    """RGB picture, box -> crop (size, size, 3) uint8 and its matrix: validation's, turned by `rotation`."""
    matrix = crop_matrix(box, size, padding, rotation)
    return crop_of(image, box, matrix, size, padding), matrix


@dataclass
class Augmentation:
    """Ranges of the training augmentation, each a flag: setting(default, help, what is allowed). 0 is off.

    All 0 is the validation crop. `empty` is for a locator (--crop image): its crops roam over whole pictures.
    """
    flip: float = setting(0.5, "chance of mirroring, partners swapped", "[0, 1]", group="augmentation")
    rotation: float = setting(20.0, "degrees, uniform in +-", "[0, 180]")
    scale: float = setting(0.2, "the crop's side, log-uniform in 1 / (1 + X) .. 1 + X", "[0, 3]")
    shift: float = setting(0.05, "of the crop's side, uniform in +-", "[0, 1]")
    colour: float = setting(0.25, "contrast e^+-X, saturation e^+-2X, gain 1+-X/4, light +-128X", "[0, 1]")
    occlusion: float = setting(0.2, "chance of one flat rectangle, 0.1 to 0.4 of the crop a side", "[0, 1]")
    empty: float = setting(0.0, "a locator's chance of a crop without a face; needs --kl-weight", "[0, 0.9]")

    @property
    def reach(self):
        """Side of what crops can show / the plain crop's; rotated corners get half the room they need."""
        return (1 + self.scale) * (1 + 0.5 * np.sin(np.deg2rad(min(self.rotation, 90))) + 2 * self.shift)

    def draw(self, rng, can_mirror):
        """Draw a crop's geometry (crop_matrix's arguments) and colour matrix (3, 4)."""
        # rotation, scale, shift (2), contrast, saturation, gain (3), brightness; a locator's shift (2): so
        # far that a larger crop still holds the plain one, and a smaller one stays inside it
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
        """Change the pixels of a crop (S, S, 3) uint8 in place at random: a flat rectangle hides a part."""
        half = rng.uniform(0.05, 0.2, 2) * (rng.random() < self.occlusion)  # 0: an empty rectangle
        middle = rng.uniform(0, 1, 2)
        (x0, y0), (x1, y1) = (np.stack([middle - half, middle + half]).clip(0) * len(crop)).astype(int)
        crop[y0:y1, x0:x1] = rng.integers(0, 256, 3)


def default_sigma(input_size: int) -> float:
    """The targets' standard deviation in cells: the same part of the crop at every size of it."""
    return 1.5 * input_size / 256


class DogFLWDataset(torch.utils.data.Dataset):
    """Faces as training samples. `dataset[i]` is one sample in full, ready to look at:

        image     (3, S, S), by ImageNet's mean   heatmaps   (K, S/2, S/2) float
        keypoints (K, 2) float, crop pixels       visibility (K,) float, see below
        matrix    (2, 3) float64 picture -> crop  index      the face's place in `faces`

    visibility is 1 where a landmark trains, 0 where it is not labelled or cut off, and -1 where there is no
    face and its map is to be flat; without a 1 the heatmap is 0. The trainer calls `batch(items)`: whole
    batches of uint8 crops, with colour (B, 3, 4) for `normalize`, no heatmaps. An item is i (-1 is the last;
    epoch 0), (epoch, i) or (epoch, i, crop size): the crop depends on seed, epoch and i alone. cache: a
    folder for decoded faces, or None. Raises UserError naming a picture that is missing or cannot be read.
    """

    def __init__(self, faces, input_size=SIZE, padding=PADDING, sigma=None, augment=None, seed=0, cache=None):
        self.faces, self.size, self.padding, self.seed = faces, input_size, padding, seed
        self.sigma = sigma or default_sigma(input_size)
        self.augment = augment or Augmentation(*[0] * len(fields(Augmentation)))
        self.flip_index = faces.scheme.flip_index
        finest = 1 + self.augment.scale * (self.augment.empty > 0)  # how far a locator's crops zoom in
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
        """A random crop of face i: matrix, points (K, 2), labelled (K,), colour."""
        geometry, colour = self.augment.draw(rng, self.flip_index)
        matrix = crop_matrix(self.faces.boxes[i], size, self.padding, **geometry)
        points, labelled = apply_matrix(matrix, self.faces.points[i]), self.faces.visible[i] > 0
        if geometry["mirror"]:
            points, labelled = points[self.flip_index], labelled[self.flip_index]
        return matrix, points, labelled, colour

    def batch(self, items):
        """Several items at once, {name: (B, ...)}; image (B, S, S, 3) uint8, colour, the rest as above."""
        items = [item if isinstance(item, tuple) else (0, range(len(self))[item]) for item in items]
        n, k, size = len(items), len(self.faces.scheme.names), items[0][2] if len(items[0]) > 2 else self.size
        crops = np.empty((n, size, size, 3), np.uint8)
        points, visible = np.zeros((n, k, 2), np.float32), np.zeros((n, k), np.float32)
        colour, matrices = np.zeros((n, 3, 4), np.float32), np.zeros((n, 2, 3))
        for row, (epoch, i, *_) in enumerate(items):
            rng = np.random.default_rng((self.seed, epoch, i))
            place = partial(self.place, size=size, rng=rng)
            if self.augment.empty:
                drawn = scene(crops[row], i, place, self.windows, self.augment.empty, rng)  # a locator's
            else:
                drawn = place(i)
                warp(*self.windows[i], drawn[0], size, out=crops[row])  # *: a picture's part, its matrix
            matrices[row], points[row], labelled, colour[row] = drawn
            self.augment.paint(crops[row], rng)
            # What the crop cut off cannot be learnt from a heatmap; validation scores it. -1 is `scene`'s.
            visible[row] = labelled * (inside(points[row], size) | (labelled < 0))
        arrays = {"image": crops, "keypoints": points, "visibility": visible, "colour": colour,
                  "matrix": matrices, "index": np.array([i for _, i, *_ in items])}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------- on the device, in batches

def normalize(images, mean, std, colour=None):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in channels_last: (image / 255 - mean (3,)) / std (3,).

    colour (B, 3, 4): an affine map of RGB in 0..255, the colour augmentation; folded into the normalisation.
    """
    if colour is None:
        colour = torch.eye(3, 4, device=mean.device, dtype=mean.dtype).expand(len(images), 3, 4)
    matrix = torch.cat([colour[..., :3], colour[..., 3:] - 255 * mean[:, None]], 2) / (255 * std[:, None])
    pixels = images.flatten(1, 2).float()  # (B, S * S, 3)
    pixels = torch.baddbmm(matrix[..., 3].unsqueeze(1), pixels, matrix[..., :3].transpose(1, 2))
    return pixels.view_as(images).permute(0, 3, 1, 2)


def cell_offsets(points, size):
    """How far `size` columns and rows lie from points (B, K, 2) in crop pixels: (B, K, 2, size) cells."""
    places = (points + 0.5) / STRIDE - 0.5  # in cells
    return torch.arange(size, device=points.device, dtype=points.dtype) - places.unsqueeze(-1)


def gaussians(offsets, sigma):
    """Gaussians of height 1 along x and y: offsets (B, K, 2, size), sigma in cells -> (B, K, size) each."""
    return torch.exp(-0.5 * (offsets / sigma) ** 2).unbind(2)


def encode_heatmaps(points, size, sigma):
    """Gaussians of height 1 around real-valued points: (B, K, 2) crop pixels -> (B, K, size, size).

    sigma in cells. The Gaussian is a product of two one-dimensional ones, never cut off, never rounded.
    """
    x, y = gaussians(cell_offsets(points, size), sigma)
    return y.unsqueeze(3) * x.unsqueeze(2)


def decode_heatmaps(heatmaps, power, radius):
    """Non-negative maps of any height (B, K, H, H) -> points (B, K, 2) in crop pixels, scores (B, K).

    The point is the centre of mass (Sun et al. 2018, "Integral human pose regression", eq. 2) of the map to
    the `power`: at 1, thin tails over the whole crop would draw it to the middle. The score is the share of
    the map's mass within `radius` (a fraction of the crop) of the point, in x and in y: the probability, by
    the map itself, that the error is no larger.
    """
    size, relative = heatmaps.shape[-1], heatmaps / heatmaps.amax((2, 3), keepdim=True).clamp(min=1e-30)
    sharp = relative * relative.pow(power - 1)  # at power 1.5 a square root, faster than pow(1.5)
    cells = torch.arange(size, device=heatmaps.device, dtype=heatmaps.dtype)
    sums = torch.stack([sharp.sum(2), sharp.sum(3)], 2)  # (B, K, 2, size), of columns and of rows
    centre = (sums * cells).sum(3) / sums.sum(3).clamp(min=1e-12)
    near_x, near_y = (radius * size + 0.5 - (cells - centre.unsqueeze(-1)).abs()).clamp(0, 1).unbind(2)
    near = ((heatmaps @ near_x.unsqueeze(-1)).squeeze(-1) * near_y).sum(-1)
    return (centre + 0.5) * STRIDE - 0.5, near / heatmaps.sum((2, 3)).clamp(min=1e-12)
