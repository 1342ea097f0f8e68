"""Draw a small dog-face data set in DogFLW's own layout, defects included.

    uv run tools/make_sample_dataset.py --out data/sample/dogflw

Every face is a little 3-D model: a smooth union of ellipsoids (skull, cheeks, muzzle, jaw) seen along z, two
bent ear sheets, and eyes, nose and mouth laid on that surface. The landmarks are points of the same model, so
they lie on what is drawn. Lengths are in face units, about the distance between the outer eye corners;
x points right, y down, z to the viewer. Face i depends only on (seed, i), its defect also on the number of
faces. The number of worker processes changes nothing.
"""
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from scipy.interpolate import CubicHermiteSpline  # scikit-image brings scipy
from scipy.spatial.transform import Rotation

from tools.lib.boxes import overlaps
from tools.lib.cli import Parser, UserError, check_ranges, run_script
from tools.lib.draw import encode_picture
from tools.lib.files import ROOT, check_free, cores

Rng = np.random.Generator
SS = 2  # supersampling: a picture is drawn at twice its size

CREAM, GOLD, RED, BROWN, BLACK, GREY, WHITE, TAN = np.float32(
    [(224, 200, 164), (208, 154, 94), (164, 92, 48), (98, 64, 46), (50, 46, 48), (136, 138, 146),
     (228, 222, 212), (196, 138, 84)])
HANGING, FOLDED = 0, 1  # and 2: erect
# chances of the three kinds of ears; coats (pattern, main, second); muzzle length, face width, ear length
BREEDS = (
    ((0.0, 0.1, 0.9), (("points", BLACK, TAN), ("mask", TAN, BLACK)), 0.65, 0.95, 0.85),
    ((1, 0, 0), (("plain", GOLD, CREAM), ("plain", BLACK, BROWN), ("plain", BROWN, TAN)), 0.50, 1.05, 1.25),
    ((0.9, 0.1, 0.0), (("blaze", RED, WHITE), ("blaze", TAN, WHITE)), 0.55, 1.00, 1.60),
    ((0, 0, 1), (("blaze", GREY, WHITE), ("blaze", RED, WHITE), ("blaze", BLACK, WHITE)), 0.50, 0.92, 0.65),
    ((0.0, 0.9, 0.1), (("patched", WHITE, RED), ("patched", WHITE, BLACK)), 0.50, 0.90, 0.70),
    ((0.1, 0.5, 0.4), (("brindle", TAN, BLACK), ("mask", GOLD, BLACK)), 0.22, 1.15, 0.62),
    ((1, 0, 0), (("plain", GOLD, CREAM), ("plain", CREAM, WHITE), ("plain", RED, GOLD)), 0.45, 0.98, 1.85),
    ((0.1, 0.7, 0.2), (("blaze", BLACK, WHITE), ("blaze", BROWN, WHITE), ("patched", WHITE, GREY)),
     0.60, 0.92, 0.80),
    ((0.0, 0.2, 0.8), (("plain", CREAM, WHITE), ("plain", WHITE, CREAM)), 0.38, 0.90, 0.60),
    ((0.7, 0.3, 0.0), (("mask", TAN, BLACK), ("brindle", GOLD, BROWN)), 0.42, 1.18, 1.00),
    ((0.9, 0.1, 0.0), (("patched", WHITE, BLACK), ("patched", WHITE, BROWN), ("patched", WHITE, TAN)),
     0.58, 1.0, 1.3),
    ((0.0, 0.5, 0.5), (("points", BLACK, GOLD), ("points", BROWN, TAN), ("plain", GREY, WHITE)),
     0.48, 0.88, 0.80),
)


def ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """The rotation (3, 3) by three angles in radians: turned to the side, nodding, leaning."""
    return Rotation.from_euler("ZXY", (roll, -pitch, yaw)).as_matrix()


def spline(points: np.ndarray | list, closed: bool = True) -> np.ndarray:
    """A Catmull-Rom curve through the points (n, 2), in eight steps from each to the next."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    curve = CubicHermiteSpline(range(len(p)), p, np.gradient(p, axis=0))
    return curve(np.linspace(1, len(p) - 2, 8 * (len(p) - 3) + 1))


@functools.cache
def noise_tiles() -> tuple[np.ndarray, np.ndarray]:
    """Two 512 x 512 textures that tile, mean 0, deviation about 1: strokes along x for fur, and clouds."""
    rng = np.random.default_rng(0)

    def blurred(sx, sy):
        big = np.tile(rng.standard_normal((512, 512), np.float32), (3, 3))
        big = cv2.GaussianBlur(big, (0, 0), sigmaX=sx, sigmaY=sy)[512:1024, 512:1024]
        return (big - big.mean()) / big.std()

    return 0.7 * blurred(7, 0.9) + 0.7 * blurred(14, 2.2), 0.8 * blurred(24, 24) + 0.5 * blurred(9, 9)


def wrapped(tile: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The tile's values at the places u, v, as if the tile were repeated for ever."""
    return cv2.remap(tile, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


# ------------------------------------------------------------------------------------------------ the model

def surface(balls: np.ndarray, turn: np.ndarray, x: np.ndarray,
            y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height z of a smooth union of ellipsoids (cx, cy, cz, rx, ry, rz) turned by `turn`, and about how far
    (x, y) lies inside its outline (negative outside)."""
    k, height, inside = 14.0, 0, 0  # the larger k, the sharper the seams
    for ball in balls:
        cx, cy, cz = (turn @ ball[:3]).tolist()  # Python floats keep the arrays float32
        (xx, xy, xz), (_, yy, yz), (_, _, zz) = ((turn / ball[3:] ** 2) @ turn.T).tolist()
        dx, dy = x - cx, y - cy
        b = xz * dx + yz * dy
        root = b * b - zz * (xx * dx * dx + 2 * xy * dx * dy + yy * dy * dy - 1)
        # Outside it falls steeply, without a jump.
        z = (np.copysign(np.sqrt(np.abs(root)), root) - b) / zz + cz
        height = height + np.exp(k * np.clip(z, -3, 3))
        inside = inside + np.exp(k * np.clip(root * (min(ball[3:5].tolist()) / zz), -4, 4))
    return np.log(height) / k, np.log(inside) / k


def make_ear(rng: Rng, kind: int, side: int, length: float) -> np.ndarray:
    """One ear, a sheet of points (19 from base to tip, 9 from inner to outer edge, xyz)."""
    t, u = np.linspace(0, 1, 19)[:, None], np.linspace(-1, 1, 9)[None]
    swivel = rng.uniform(-0.15, 0.5)  # turns the opening to the front or to the side
    if kind == HANGING:  # up a little, over, and down
        root, swivel = (0.66, -0.42, -0.05), 0.35 + swivel / 2
        lean, base, belly, blunt = rng.uniform((-0.3, 0.13, 0.6, 4), (0.1, 0.18, 1.2, 4.01))
        start = rng.uniform(0.5, 1)
        bend, fold, soft = rng.uniform(2.9, 3.1) - start, 0, 0.3
    else:
        root = (0.52, -0.47, -0.14)
        lean, base, belly, blunt = rng.uniform((0, 0.21, 0, 1.5), (0.55, 0.27, 0.4, 1.6))
        start, bend, fold, soft = -0.1, rng.uniform(0, 0.5), 0.3, 0.7
        if kind == FOLDED:
            lean, bend, fold, soft = lean + 0.1, rng.uniform(2.1, 2.8), rng.uniform(0.32, 0.55), 0.2
    up = np.array([side * np.sin(lean), -np.cos(lean), 0])
    out = np.array([side * np.cos(lean) * np.cos(swivel), np.sin(lean) * np.cos(swivel), -np.sin(swivel)])
    angle = (start + bend * ramp(t, fold, fold + soft))[..., None]
    step = np.cos(angle) * up + np.sin(angle) * np.cross(up, out) * side
    spine = np.cumsum(step, 0) * length * rng.uniform(0.8, 1.2) / len(t) + np.array(root) * (side, 1, 1)
    width = base * (1 + belly * 4 * t ** 0.8 * (1 - t ** 0.8)) * (1 - t ** blunt) ** 0.7
    hollow = rng.uniform(0.2, 0.45) * width * (1 - u * u)
    return spine + (width * u)[..., None] * out - hollow[..., None] * np.cross(step, out) * side


def make_face(rng: Rng, breed: tuple) -> dict:
    """The model of one face: {part: 3-D points}; curves hold pairs (n, left and right, xyz)."""
    chances, _, long, wide, ear_length = breed
    long, wide = long * rng.uniform(0.8, 1.25), wide * rng.uniform(0.93, 1.07)
    ny = 0.50 + 0.22 * long + rng.uniform(-0.06, 0.08)  # y of the nose, from which the muzzle is placed
    gape = rng.uniform(0.12, 0.34) if rng.random() < 0.45 else 0.0
    hang = rng.uniform(0, 0.3) if gape and rng.random() < 0.6 else 0.0
    balls = [(0, -0.12, -0.35, 0.74 * wide ** 0.5, 0.60, 0.72),  # skull
             (0, 0.5 * ny, 0.1 + 0.3 * long, 0.2, 0.4, 0.3 + 0.45 * long),  # bridge
             (0, ny + 0.08, 0.1 + 0.45 * long, 0.32 * wide, 0.28, 0.35 + 0.5 * long),  # muzzle
             (0, ny, 0.35 + 0.8 * long, 0.15, 0.13, 0.16),  # nose
             (0, ny + 0.36 + 0.95 * gape, 0.1 + 0.3 * long, 0.25 * wide, 0.16,
              0.3 + 0.4 * long - 0.2 * gape)]  # jaw
    flew = rng.uniform(0, 0.06)
    for s in (-1, 1):  # brow, cheek, upper lip
        balls += [(s * 0.31, -0.17, 0.19, 0.2, 0.13, 0.15), (s * 0.42 * wide, 0.27, -0.26, 0.38, 0.50, 0.46),
                  (s * 0.19 * wide, ny + 0.2, 0.12 + 0.5 * long, 0.21 * wide, 0.2 + flew, 0.3 + 0.42 * long)]
    balls = np.array(balls)

    def pairs(rows, y0=0.0):
        p = np.array([(s * x, y + y0) for x, y in rows for s in (-1, 1)])
        return np.column_stack([p, surface(balls, np.eye(3), p[:, 0], p[:, 1])[0]]).reshape(-1, 2, 3)

    x, w, h = rng.uniform((0.36, 0.10, 0.065), (0.42, 0.13, 0.10))  # eye
    up, nose, low = rng.uniform(-0.025, 0.02), rng.uniform(0.13, 0.18) * wide ** 0.5, flew * (gape == 0)
    face = {"ny": ny, "gape": gape, "balls": balls,
            "eyes": pairs([(x - w, 0.015), (x - 0.55 * w, -0.72 * h), (x, -h), (x + 0.6 * w, -0.75 * h + up),
                           (x + w, up), (x + 0.5 * w, 0.7 * h + up / 2), (x, h), (x - 0.5 * w, 0.7 * h)]),
            # The outline, the nostrils, and the point between them.
            "nose": pairs([(0, -0.10), (0.75 * nose, -0.085), (nose, 0), (0.75 * nose, 0.085),
                           (0.25 * nose, 0.11), (0, 0.125), (0.6 * nose, 0.045), (0, 0.05)], ny),
            "lip": pairs([(0, 0.32), (0.13, 0.37 + flew), (0.25, 0.355 + flew), (0.36 * wide ** 0.5, 0.28),
                          (0.42 * wide, 0.19)], ny),
            "jaw": pairs([(0, 0.38 + gape), (0.13, 0.385 + 0.97 * gape + low),
                          (0.23, 0.365 + 0.8 * gape + low), (0.36 * wide ** 0.5, 0.28 + 0.4 * gape),
                          (0.42 * wide, 0.19)], ny),
            "tongue": pairs([(0, 0.34 + 0.9 * gape if gape else 0.40)], ny)[0] + (0, hang, 0)}
    kinds = rng.choice(3, 2, p=chances) if rng.random() < 0.15 else [rng.choice(3, p=chances)] * 2
    face["ears"] = ears = np.stack([make_ear(rng, kind, s, ear_length) for kind, s in zip(kinds, (-1, 1))])

    face["marks"] = mark = np.zeros((46, 3))
    mark[0:6] = ears[:, [0, 6, 12], 0].swapaxes(0, 1).reshape(6, 3)
    mark[6:8] = ears[:, 18, 4]
    mark[8:14] = ears[:, [12, 6, 0], 8].swapaxes(0, 1).reshape(6, 3)
    mark[14:16], mark[28:30], mark[30:32], mark[36:38] = pairs(
        [(0.13, -0.35), (0.15, 0.28), (0.42, 0.27), (0.31 * wide, ny + 0.1)])
    mark[16:24] = face["eyes"][[0, 4, 2, 6]].reshape(8, 3)
    midline = [(0, 0.25), (0, ny + 0.235), (0, ny + 0.425 + gape), (0, ny + 0.5 + 0.95 * gape)]
    mark[[24, 35, 41, 42]] = pairs(midline)[:, 0]
    mark[25:28], mark[32:35] = face["nose"].reshape(-1, 3)[[[0, 2, 3], [14, 12, 13]]]
    mark[38], mark[39:41], mark[43:45] = face["lip"][0, 0], face["lip"][4], face["lip"][2]
    mark[45] = face["tongue"][0]
    return face


# ------------------------------------------------------------------------------------------------ the picture

def window(points: np.ndarray, pad: float) -> tuple[tuple, np.ndarray]:
    """The part of a canvas round the points (n, 2), as slices and as the place of its corner."""
    (x0, y0), (x1, y1) = (np.int32(np.maximum(p, 0)) for p in (points.min(0) - pad, points.max(0) + pad))
    return np.s_[y0:y1, x0:x1], np.array([x0, y0])


def paint(canvas: np.ndarray, points: np.ndarray, colour: tuple | np.ndarray, soft: float = 0.0,
          alpha: float = 1.0) -> None:
    """Fill a polygon (n, 2) on the float canvas, softened by `soft` pixels; colour may also be a picture."""
    pad = int(3 * soft) + 2
    where, corner = window(points, pad)
    part = canvas[where]
    if part.size:
        mask = np.zeros(part.shape[:2], np.uint8)
        cv2.fillPoly(mask, [np.int32((points - corner) * 16)], 255, cv2.LINE_AA, 4)
        if soft:
            mask = cv2.GaussianBlur(mask, (0, 0), soft)
        colour = np.float32(colour) if np.ndim(colour) < 3 else colour[where]
        part += (colour - part) * (mask[..., None] * np.float32(alpha / 255))


def oval(centre: np.ndarray, radius: float, squash: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """An ellipse of 24 points (24, 2); squash: its height / its width, angle: in radians."""
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.cos(t), squash * np.sin(t)], 1) @ [[c, s], [-s, c]] * radius + centre


def background(rng: Rng, w: int, h: int) -> np.ndarray:
    """A picture (w x h) of boards, leaves, grass or distant lights on a colour gradient, out of focus."""
    light, dark = (np.float32(rng.uniform(*span) + rng.normal(0, 22, 3)) for span in ((110, 235), (30, 130)))
    y = np.linspace(0, 1, h, dtype=np.float32)[:, None, None] * np.ones((1, w, 1), np.float32)
    img = light + (dark - light) * (y if rng.random() < 0.6 else ramp(y, 0.55, 0.6))
    kind = rng.choice(["boards", "leaves", "grass", "lights"])
    for _ in range(rng.integers(8, 18) if kind == "boards" else rng.integers(25, 60)):
        c, r, a = rng.uniform((0, 0), (w, h)), rng.uniform(3, 20), rng.uniform(0, np.pi)
        colour = np.array([70, 120, 50]) * rng.uniform(0.4, 1.7) + rng.normal(0, 12, 3)
        if kind in ("boards", "lights"):
            colour = rng.uniform(40, 220) + rng.normal(0, 40, 3)
        if kind == "boards":
            shape = c + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (r * 2, rng.uniform(5, 60))
        elif kind == "leaves":  # pointed, so that they could pass for ears
            shape = spline([c + r * f * np.array([np.cos(a + k), np.sin(a + k)])
                            for k, f in ((0, 1.3), (1.4, 0.4), (np.pi, 1), (4.9, 0.4))])
        elif kind == "grass":
            c[1] = h * rng.uniform(0.45, 1.05)
            shape = c + np.array([(0, 0), (2, 0), (rng.uniform(-12, 12), -2 * r)])
        else:
            shape = oval(c, r * 0.7)
        paint(img, shape, np.clip(colour, 0, 255), alpha=rng.uniform(0.4, 0.95))
    return cv2.GaussianBlur(img, (0, 0), rng.uniform(0.4, 2.5))


def coat_colour(coat: tuple, x: np.ndarray, y: np.ndarray, z: np.ndarray, ny: float, shift: np.ndarray,
                body: bool) -> np.ndarray:
    """Colours of the fur at points of the head (or of the body), in the model's own coordinates."""
    pattern, main, second = coat
    cloud = wrapped(noise_tiles()[1], x * 90 + shift[0], y * 90 + shift[1])
    side, edge = np.abs(x), 0.05 * cloud
    if pattern == "patched":
        mix = ramp(cloud, 0.5, 0.65)
    elif pattern == "brindle":
        mix = 0.6 * ramp(np.sin(40 * (y + 0.4 * side) + 3 * cloud) + 0.8 * cloud, -0.2, 1.2)
        mix = mix if body else np.maximum(mix, ramp(z + edge, 0.45, 0.7))
    elif body:
        mix = ramp(0.5 - side + 2 * edge, 0, 0.12) * {"plain": 0.4, "mask": 0.0}.get(pattern, 1.0)
    elif pattern == "mask":
        mix = np.maximum(ramp(y - 0.42 + 0.5 * z + edge, 0, 0.3) * ramp(0.55 - side + edge, 0, 0.15),
                         0.8 * ramp(0.2 - np.hypot(side - 0.38, y), 0, 0.12))
    elif pattern == "blaze":
        mix = np.maximum(ramp(0.14 + 0.1 * y - side + edge, 0, 0.04),
                         ramp(0.5 - np.hypot(side, 0.95 * (y - ny - 0.15)) + edge, 0, 0.06))
    elif pattern == "points":
        mix = np.maximum(ramp(0.09 - np.hypot(side - 0.27, y + 0.19) + edge / 2, 0, 0.04),
                         ramp(y - ny - 0.04 + 1.2 * side + edge, 0, 0.15) * ramp(y, 0.25, 0.35))
    else:
        mix = 0.5 * ramp(y - 0.1 + 0.3 * z + edge, 0, 0.5)
    return main + (second - main) * mix[..., None]


def draw_fur(canvas: np.ndarray, balls: np.ndarray, turn: np.ndarray, scale: float, origin: np.ndarray,
             coat: Callable, light: np.ndarray, fur: np.ndarray, fuzz: float) -> np.ndarray:
    """Draw ellipsoids with their coat; shape and colour at the final size, the hairy outline supersampled.
    Returns their height z on the whole canvas."""
    centre, reach = (balls[:, :3] @ turn.T)[:, :2], balls[:, 3:].max(1, keepdims=True) + 0.05
    x0, y0 = np.int32(np.maximum(((centre - reach).min(0) * scale + origin) / SS, 0))
    x1, y1 = np.int32(((centre + reach).max(0) * scale + origin) / SS)
    part = np.s_[y0 * SS:y1 * SS, x0 * SS:x1 * SS]
    h, w = canvas[part].shape[:2]
    y, x = np.mgrid[y0:y0 + h // SS, x0:x0 + w // SS].astype(np.float32)
    x, y = (((v + 0.5) * SS - 0.5 - o) / scale for v, o in zip((x, y), origin.tolist()))
    z, inside = surface(balls, turn, x, y)
    colour = coat(*(a * x + b * y + c * z for a, b, c in turn.T.tolist()))
    pixel = scale / SS
    smooth = np.maximum(cv2.GaussianBlur(z, (0, 0), 0.018 * pixel), -1)
    zy, zx = np.gradient(smooth, 1 / pixel)
    shade = (light[2] - light[0] * zx - light[1] * zy) / np.sqrt(1 + zx * zx + zy * zy)
    crease = 1.1 * (smooth - cv2.blur(smooth, (int(0.35 * pixel),) * 2))  # what lies deep gets less light
    colour *= ((0.46 + 0.68 * np.clip(shade, -0.25, 1)) * (1 + np.clip(crease, -0.35, 0.12)))[..., None]
    alpha = 0.5 + cv2.resize(inside, (w, h)) * (0.4 * scale / (0.012 * scale + 1)) + fuzz * fur[part]
    colour = cv2.resize(colour, (w, h)) * (1 + 0.085 * fur[part][..., None])
    canvas[part] += (colour - canvas[part]) * np.clip(alpha, 0, 1)[..., None]
    depth = np.full(canvas.shape[:2], -9, np.float32)
    depth[part] = cv2.resize(z, (w, h))
    return depth


def ear_layer(ear: np.ndarray, shape: tuple, scale: float, origin: np.ndarray,
              light: np.ndarray) -> tuple[tuple, np.ndarray]:
    """An ear drawn quad by quad from base to tip: where it lies on the canvas, and there (h, w, 4) its shade,
    how much of the inner side shows, its height z and its cover."""
    px, pad = np.int32(ear[..., :2] * scale + origin), int(0.1 * scale)
    (x0, y0), (x1, y1) = np.maximum(px.min((0, 1)) - pad, 0), np.clip(px.max((0, 1)) + pad, 1, shape[1::-1])
    layer = np.zeros((y1 - y0, x1 - x0, 4), np.float32)
    px -= (x0, y0)
    n = np.cross(ear[1:, 1:] - ear[:-1, :-1], ear[1:, :-1] - ear[:-1, 1:])
    n /= np.linalg.norm(n, axis=-1, keepdims=True) + 1e-9
    inward = n[..., 2] * np.sign(ear[9, 0, 0] - ear[9, 8, 0]) > 0
    n *= np.where(n[..., 2:] < 0, -1, 1)
    along, across = np.linspace(0, 1, 18)[:, None], 1 - np.abs(np.arange(8) - 3.5) / 3.5
    inner = inward * np.minimum(1, 1.25 * across) * np.minimum(1, 0.4 + 2.5 * along)
    shade = (0.48 + 0.64 * np.clip(n @ light, -0.25, 1)) * (1 - 0.25 * inner * (1 - along))
    values = np.stack([shade, inner, ear[1:, 1:, 2], np.ones_like(shade)], -1).tolist()
    for i, j in np.ndindex(shade.shape):
        cv2.fillConvexPoly(layer, px[[i, i, i + 1, i + 1], [j, j + 1, j + 1, j]], values[i][j])
    return np.s_[y0:y1, x0:x1], cv2.GaussianBlur(layer, (0, 0), 0.02 * scale)


def draw_ear(canvas: np.ndarray, where: tuple, layer: np.ndarray, colours: tuple, scale: float,
             fur: np.ndarray, depth: np.ndarray | None = None) -> None:
    """Draw an ear's layer where it lies; with `depth`, only what is in front of that."""
    fur, cover = fur[where], layer[..., 3]
    shade, inner, z = (layer[..., i] / np.maximum(cover, 1e-3) for i in range(3))
    size = (int(0.2 * scale),) * 2
    near = cv2.blur(layer[..., 2], size) / np.maximum(cv2.blur(cover, size), 1e-3)
    shade *= (1 + np.clip(2.5 * (z - near), -0.4, 0.15)) * (1 + 0.09 * fur)  # a folded tip throws a shadow
    alpha = np.clip((cover - 0.5) * 3.5 + 0.5 + 0.12 * fur, 0, 1)
    if depth is not None:
        alpha *= np.clip((z - depth[where]) / 0.1 + 1.5, 0, 1)
    colour = (colours[0] + (colours[1] - colours[0]) * inner[..., None]) * shade[..., None]
    canvas[where] += (colour - canvas[where]) * alpha[..., None]


def draw_mouth(canvas: np.ndarray, face: dict, px: Callable, scale: float) -> None:
    """Lips, and what an open mouth shows; px brings the model's points into the picture."""
    around = lambda p: spline(np.concatenate([p[::-1, 0], p[1:, 1]]), closed=False)  # corner, middle, corner
    lip, jaw, (tip, _) = px(face["lip"]), px(face["jaw"]), px(face["tongue"])
    upper, lower, snout = around(lip), around(jaw), px(face["nose"])[5, 0]
    where, corner = window(np.concatenate([upper, lower, [snout, tip]]), 0.05 * scale)
    ink = np.zeros(canvas[where].shape[:2], np.uint8)

    def line(points, width, value=255):
        points, width = np.int32((points - corner) * 16), max(1, round(width * scale))
        cv2.polylines(ink, [points], False, value, width, cv2.LINE_AA, 4)

    if face["gape"]:
        paint(canvas, np.concatenate([upper, lower[::-1]]), (62, 22, 26), 0.012 * scale)
        root = lip[0, 0] + 0.25 * (jaw[0, 0] - lip[0, 0])
        down = (tip - root) / np.hypot(*(tip - root)) * scale
        across = np.array([-down[1], down[0]]) * (0.15 + 0.1 * face["gape"])
        sides = ((root, 0.8), ((2 * tip + root) / 3, 1), (tip - 0.02 * down, 0.5))
        tongue = spline([p - w * across for p, w in sides] + [tip] + [p + w * across for p, w in sides[::-1]])
        paint(canvas, tongue, (150, 62, 72), 0.012 * scale)
        paint(canvas, (tongue - tip) * (0.86, 0.92) + tip - 0.01 * down, (216, 112, 118), 0.02 * scale)
        line(np.array([root, tip - 0.05 * down]), 0.012, 110)
    line(lower[len(lower) // 5:-len(lower) // 5], 0.025, 90)
    line(upper, 0.026)
    line(np.array([snout, px(face["marks"])[35], lip[0, 0]]), 0.018)
    lines = cv2.GaussianBlur(ink, (0, 0), 0.007 * scale)[..., None]
    canvas[where] *= np.float32(1) - np.float32(0.82 / 255) * lines


def draw_nose(canvas: np.ndarray, face: dict, px: Callable, scale: float, light: np.ndarray,
              skin: np.ndarray) -> None:
    """The nose's skin (a colour), its shine and its nostrils; px as in draw_mouth."""
    nose = px(face["nose"])
    ring = spline(np.concatenate([nose[:6, 1], nose[4:0:-1, 0]]))
    middle = ring.mean(0)
    paint(canvas, (ring - middle) * 1.12 + middle, skin * 0.4, 0.02 * scale, 0.6)
    paint(canvas, ring, skin * 0.8, 0.006 * scale)
    shine = (middle + nose[0, 0]) / 2 + light[:2] * 0.03 * scale
    paint(canvas, oval(shine, 0.10 * scale, 0.4), skin * 1.6 + 30, 0.03 * scale, 0.7)
    paint(canvas, oval(shine, 0.035 * scale, 0.45), (250, 250, 250), 0.012 * scale, 0.7)
    for i in (0, 1):
        x, y = nose[3, i] - nose[6, i]
        paint(canvas, oval(nose[6, i], 0.045 * scale, 0.6, np.arctan2(y, x)), (12, 8, 8), 0.008 * scale)


def draw_eye(canvas: np.ndarray, eye: np.ndarray, look: np.ndarray, scale: float, light: np.ndarray,
             iris: np.ndarray) -> None:
    """One eye from its eight outline points: inner corner, lid, outer corner, lower lid."""
    lids, centre = spline(eye), eye.mean(0)
    span, tall = np.hypot(*(eye[4] - eye[0])), np.hypot(*(eye[6] - eye[2]))
    paint(canvas, (lids - centre) * 1.5 + centre, (20, 15, 14), 0.03 * scale, 0.55)
    paint(canvas, (lids - centre) * (1.18, 1.25) + centre, (18, 13, 13), 0.006 * scale)
    where, corner = window(lids, 2)
    canvas, lids, eye, centre = canvas[where], lids - corner, eye - corner, centre - corner
    ball = canvas.copy()
    at, r = centre + look * (0.25 * span, 0.1 * tall), max(0.36 * span, 0.55 * tall)
    for shape, colour, soft, alpha in (
            (lids, (154, 147, 140), 0.006, 1), (oval(at, r), iris * 0.45, 0.01, 1),
            (oval(at + (0, 0.25 * r), 0.72 * r), iris * 1.25, 0.02, 1),
            (oval(at, 0.48 * r), (10, 8, 8), 0.006, 1),
            (oval(eye[2], 0.6 * span, 0.35), (8, 6, 6), 0.02, 0.7),  # the upper lid's shadow
            (oval(at + light[:2] * 0.5 * r, 0.2 * r), (255, 255, 255), 0.004, 0.95)):
        paint(ball, shape, colour, soft * scale, alpha)
    paint(canvas, lids, ball)


def occlude(canvas: np.ndarray, rng: Rng, centre: np.ndarray, scale: float) -> None:
    """Hide a part of the face behind a ball, a stick or some grass."""
    kind, colour, soft = rng.integers(3), rng.uniform(30, 240, 3), 0.01 * scale
    if kind == 0:
        r = rng.uniform(0.25, 0.4) * scale
        for k in range(5):
            disc = oval(centre - 0.09 * k * r, r - 0.18 * k * r)
            paint(canvas, disc, colour * (0.6 + 0.12 * k), (1 + 3 * k) * soft)
    elif kind == 1:
        end = rng.uniform((1, -0.7), (3, 0.7)) * scale
        for k in (1, 0.6, 0.3):
            wide = np.array([0, 0.05 * k * scale])
            stick = centre + np.array([-end - wide, -end + wide, end + wide, end - wide])
            paint(canvas, stick, np.array((140, 105, 70)) * (1.1 - 0.6 * k), soft)
    else:
        for x in rng.normal(0, 0.5, 25) * scale:
            tip = (x + rng.normal(0, 0.2) * scale, rng.uniform(-0.3, 0.6) * scale)
            blade = np.array([(x - 0.035 * scale, len(canvas)), tip, (x + 0.035 * scale, len(canvas))])
            paint(canvas, blade + centre, np.array([90, 140, 60]) * rng.uniform(0.5, 1.3), soft)


def render(rng: Rng, face: dict, coat: tuple, turn: np.ndarray, size: list[int], scale: float,
           origin: np.ndarray) -> np.ndarray:
    """The picture (h, w, 3) RGB of a face whose origin is at `origin`; a face unit is `scale` pixels long."""
    (w, h), scale, origin = size, scale * SS, (origin + 0.5) * SS - 0.5
    px = lambda p: (p @ turn.T)[..., :2] * scale + origin
    light = np.float32([rng.uniform(-0.7, 0.7), rng.uniform(-0.9, -0.3), 0.9])
    light /= np.linalg.norm(light)
    # The background is blurred, so half the size will do.
    canvas = cv2.resize(background(rng, w // 2, h // 2), (w * SS, h * SS))
    y, x = np.mgrid[0:h, 0:w].astype(np.float32) * SS
    hub = px(face["nose"][2].mean(0)).tolist()  # the fur grows away from the nose
    radius, angle = cv2.cartToPolar(x - hub[0], y - hub[1])
    fur = wrapped(noise_tiles()[0], radius * (150 / scale), angle * (256 / np.pi))
    fur = cv2.resize(fur, (w * SS, h * SS))

    shift, fuzz, ny = np.float32(rng.uniform(0, 512, 2)), rng.uniform(0.25, 0.8), face["ny"]
    # Its colour and its y; 9 units further down it is out of sight.
    collar = np.float32(rng.uniform(20, 230, 3)), rng.uniform(1.45, 1.6) + 9 * (rng.random() < 0.6)

    def body_coat(x, y, z):
        colour = coat_colour(coat, x, y, z, ny, shift, True)
        colour *= (0.55 + 0.4 * ramp(y, 1, 2.2))[..., None]  # the head's shadow
        band = ramp(0.1 - np.abs(y - collar[1] - 0.12 * np.cos(2 * x)), 0, 0.02)
        return colour + (collar[0] - colour) * band[..., None]

    body = np.array([(0, 1, -0.75, 0.62, 0.95, 0.5), (0, 4, -0.95, 0.95, 3.0, 0.7),
                     (-0.75, 3.9, -1.1, 0.55, 2.5, 0.6), (0.75, 3.9, -1.1, 0.55, 2.5, 0.6)])
    lean = rotation(rng.normal(0, 0.2), 0, rng.normal(0, 0.1))
    draw_fur(canvas, body, lean, scale, origin, body_coat, light, fur, fuzz)
    ears = []
    for ear in face["ears"]:
        outer = coat[2 if coat[0] in ("patched", "mask") else 1] * np.float32(rng.uniform(0.65, 0.95))
        inner = np.float32((196, 134, 124)) * np.float32(rng.uniform(0.4, 0.65)) + np.float32(0.3) * outer
        layer = ear_layer(ear @ turn.T, canvas.shape, scale, origin, light)
        ears.append((*layer, (outer, inner), scale, fur))
        draw_ear(canvas, *ears[-1])
    depth = draw_fur(canvas, face["balls"], turn, scale, origin,
                     lambda x, y, z: coat_colour(coat, x, y, z, ny, shift, False), light, fur, fuzz)
    draw_mouth(canvas, face, px, scale)
    skin = np.float32((46, 40, 42) if rng.random() < 0.75 else (104, 66, 56))
    draw_nose(canvas, face, px, scale, light, skin)
    irises = np.float32([(120, 70, 30), (88, 48, 22), (150, 100, 40), (110, 150, 180)])
    iris, look = irises[rng.choice(4, p=(0.4, 0.4, 0.15, 0.05))], rng.uniform(-0.2, 0.2, 2)
    for i in (0, 1):
        draw_eye(canvas, px(face["eyes"][:, i]), look, scale, light, iris)
    for ear in ears:  # again, but only what is in front of the head
        draw_ear(canvas, *ear, depth)
    if rng.random() < 0.12:
        occlude(canvas, rng, origin + rng.uniform((-0.7, 0), (0.7, 1.3)) * scale, scale)
    img = cv2.resize(canvas, (w, h), interpolation=cv2.INTER_AREA)
    img *= np.float32(rng.uniform(0.75, 1.08) * rng.uniform(0.94, 1.06, 3))
    img += rng.standard_normal((h, w, 1), np.float32) * np.float32(rng.uniform(0.5, 3))
    return np.uint8(np.clip(img, 0, 255))


# ----------------------------------------------------------------------------------------------- the data set

def plan_defects(rng: Rng, train: int, test: int) -> dict[int, str]:
    """{index: defect}: each at least once if there are enough faces; in large sets as often as in DogFLW."""
    often = max(2, round(0.038 * train))  # boxes at a wrong scale, a fifth of them away from the face
    apart = max(1, often // 5)
    defects = ["empty", "nan", "apart", "mismatch", "outside", "empty", "nan", "outside"]
    defects += ["apart"] * (apart - 1) + ["mismatch"] * (often - apart - 1) + ["outside"] * (train // 300)
    plan = dict(zip(rng.permutation(train).tolist(), defects))
    if test:
        plan[train + int(rng.integers(test))] = "empty"
    return plan


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    a, b = (np.array([[*box[:2], *(box[2:] - box[:2])]]) for box in (a, b))
    return overlaps(a, b).item()


def make_label(rng: Rng, marks: np.ndarray, size: np.ndarray, defect: str | None) -> dict:
    """A label like DogFLW's. Unless a defect spoils it, the box is the landmarks' hull plus about 10 %."""
    low, high = marks.min(0), marks.max(0)
    pad = (high - low) * rng.uniform(0.03, 0.07, (2, 2))
    box = good = np.round(np.concatenate([np.maximum(low - pad[0], 0), np.minimum(high + pad[1], size - 1)]))
    if defect in ("mismatch", "apart"):  # the box fits another scale of the picture
        most, step, zoom = (0, 1.03, 1) if defect == "apart" else (0.28, rng.choice([0.97, 1.03]), 1)
        while overlap(good, box) > most:
            zoom *= step
            box = np.round(good * zoom)
    marks = np.round(marks, 1)
    if defect == "nan":
        marks[rng.choice(46, 2, replace=False)] = np.nan
    strings = [""] * 4 if defect == "empty" else [str(int(v)) for v in box]
    return {"landmarks": marks.tolist(), "bounding_boxes": strings}


def draw_sample(seed: int, index: int, defect: str | None = None) -> tuple[int, np.ndarray, dict]:
    """Face number `index`: its breed, its picture (h, w, 3) RGB and its label."""
    rng = np.random.default_rng([seed, index])
    breed = int(rng.integers(len(BREEDS)))
    face, coats = make_face(rng, BREEDS[breed]), BREEDS[breed][1]
    turn = rotation(*np.clip(rng.normal(0, (0.25, 0.15, 0.18)), -0.48, 0.48))
    marks = (face["marks"] @ turn.T)[:, :2]
    low, high = marks.min(0), marks.max(0)
    scale = float(min(rng.uniform(85, 230) / (high - low)[0], 370 / (high - low)[1]))
    span = (high - low) * scale
    size = np.int32(np.clip(span * rng.uniform(1.15, 2.2, 2), 240, 420))
    place = (size - 1 - span) * rng.uniform(0.1, 0.9, 2)  # of the hull's upper left corner
    if defect == "apart":  # far enough from x = 0 for a scaled box to miss the face
        size[0], place[0] = span[0] * 1.8 + 60, span[0] * 0.7 + 40
    elif defect == "outside":
        place[0] = rng.choice([-1.5, size[0] + 0.5 - span[0]])
    origin = place - low * scale
    picture = render(rng, face, coats[rng.integers(len(coats))], turn, size.tolist(), scale, origin)
    return breed, picture, make_label(rng, marks * scale + origin, size, defect)


def quiet() -> None:
    """A worker's first act: Ctrl-C is for the parent, and nobody needs to know how a worker ends after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")


def write_sample(job: tuple) -> None:
    """Draw and write one face, (folder, seed, index, split, defect), in a process of its own."""
    out, seed, index, split, defect = job
    cv2.setNumThreads(1)  # the processes share the cores already
    breed, picture, label = draw_sample(seed, index, defect)
    stem = f"s{2000001 + breed:08d}_{index + 1}"
    (out / split / "images" / f"{stem}.png").write_bytes(encode_picture(picture))
    (out / split / "labels" / f"{stem}.json").write_text(json.dumps(label))


def make_sample(out: Path | str, train: int = 600, test: int = 100, seed: int = 0,
                workers: int | None = None) -> None:
    """Write the data set to the folder `out`, in place of what is there; all of it or nothing."""
    out = Path(out).resolve()
    plan = plan_defects(np.random.default_rng(seed), train, test)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed process left
    jobs = [(part, seed, i, "train" if i < train else "test", plan.get(i)) for i in range(train + test)]
    try:
        for split in ("train", "test"):
            (part / split / "images").mkdir(parents=True)
            (part / split / "labels").mkdir()
        workers = min(workers or cores(), len(jobs))
        if workers > 1:
            with multiprocessing.Pool(workers, quiet) as pool:
                pool.map(write_sample, jobs, chunksize=4)
        else:
            for job in jobs:
                write_sample(job)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "data/sample/dogflw",
                        help="output folder (default: %(default)s)")
    parser.add_argument("--train", type=int, default=600, help="training faces (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="test faces (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another draws other dogs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=cores(),
                        help="processes; the result is always the same (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what is in --out")
    args = parser.parse_args()
    check_ranges(args, train="[1, 1000000]", test="[0, 1000000]", seed="[0, 1000000]", workers="[1, 1000000]")
    check_free("--out", args.out, args.force, "replace what is in it with --force")
    drawn = re.compile(r"(train|test)(/(images|labels)(/s\d{8}_\d+\.(png|json))?)?")
    # What this tool did not draw: --out may be the real DogFLW.
    others = [p for p in args.out.rglob("*") if not drawn.fullmatch(p.relative_to(args.out).as_posix())]
    if others:
        raise UserError(f"--out {args.out}: holds more than a drawn sample ({min(others)}), which --force "
                        "will not delete; name another folder")
    start = time.perf_counter()
    make_sample(args.out, args.train, args.test, args.seed, args.workers)
    print(f"{args.train} train + {args.test} test faces in {args.out} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    run_script(main)
