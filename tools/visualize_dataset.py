"""Look at a COCO keypoint file: the first thing to do when something is odd.

    uv run tools/visualize_dataset.py data/dogflw/annotations/train.json --data-root DogFLW --out looks

Prints what was repaired or left out when the file was read, and writes into --out
    raw.jpg           whole pictures with boxes (green) and landmarks (left ones filled, right ones rings)
    trainer.jpg       what the trainer sees, a row per face: the plain crop, augmented ones, target heatmaps
    landmarks.png     every landmark's number and name on the mean face
    repaired.jpg      boxes that the converter rebuilt: the original in red, the new one in green
"""
import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment  # scikit-image brings scipy

import dataset as data
from dataset import MEAN, STD, Augmentation, DogFLWDataset
from tools.lib.cli import Parser, check_ranges, printable, run_script
from tools.lib.draw import (
    all_regions,
    caption,
    contact_sheet,
    draw_landmarks,
    encode_picture,
    font_of,
    mean_face,
    region_colours,
)
from tools.lib.files import atomic_write, check_free, check_new, data_root, load_json
from tools.lib.windows import read_described

TILE, GREEN, RED, INK = 320, (60, 200, 60), (230, 40, 40), (30, 30, 30)


def draw_box(tile: np.ndarray, matrix: np.ndarray, box: np.ndarray | tuple,
             colour: tuple[int, int, int], width: int) -> None:
    """Draw a picture's box on a tile that shows the picture through `matrix`."""
    (x, y, w, h) = box
    corners = data.apply_matrix(matrix, np.array([[x, y], [x + w, y + h]]))
    low, high = (tuple(int(v) for v in np.round(c)) for c in corners)
    cv2.rectangle(tile, low, high, colour, width)


def raw_tiles(faces: data.Faces, chosen: np.ndarray, originals: dict) -> Iterator[np.ndarray]:
    """Whole pictures of the `chosen` faces: landmarks, and boxes in green, thinner for the other faces there.

    If `originals` has a face's box from before the repair, it is drawn in red.
    """
    for i in chosen:
        name, size, old = faces.files[i], faces.sizes[i], originals.get(faces.ids[i])
        corners = np.array([[0, 0], size])
        if old is not None:  # it can lie anywhere; what is more than a picture's size away is cut off
            old = np.clip(old, -size, 2 * size)
            corners = np.concatenate([corners, old])
        view = (*corners.min(0), *np.ptp(corners, axis=0))
        tile, matrix = data.cut_crop(read_described(faces.root / name, size), view, TILE, 1.02)
        if old is not None:
            draw_box(tile, matrix, (*old[0], *(old[1] - old[0])), RED, 2)
        for j in (j for j, file in enumerate(faces.files) if file == name):
            points = data.apply_matrix(matrix, faces.points[j])
            side = faces.boxes[j, 2:].max() * matrix[0, 0]
            tile = draw_landmarks(tile, points, faces.scheme, faces.visible[j] > 0, side=side)
            draw_box(tile, matrix, faces.boxes[j], GREEN, 2 if j == i else 1)
        note = " (had no box)" if old is None and faces.ids[i] in originals else ""
        yield caption(tile, f"{faces.ids[i]}  {Path(name).name}{note}")


def trainer_tiles(faces: data.Faces, size: int, padding: float, seed: int) -> Iterator[np.ndarray]:
    """Four tiles per face: the plain crop, two augmented ones, and the targets of the last one over it."""
    options = {"input_size": size, "padding": padding, "seed": seed}
    plain = DogFLWDataset(faces, **options)
    augmented = DogFLWDataset(faces, augment=Augmentation(), **options)
    regions, colours = all_regions(faces.scheme).values(), region_colours(faces.scheme)
    for i in range(len(faces)):
        samples = {"crop": plain[i], "augmented": augmented[(0, i)], "augmented again": augmented[(1, i)]}
        for what, sample in samples.items():
            picture = sample["image"].permute(1, 2, 0).numpy() * STD + MEAN
            picture = (picture * 255).clip(0, 255).round().astype(np.uint8)
            tile = cv2.resize(picture, (TILE, TILE), interpolation=cv2.INTER_CUBIC)
            points = (sample["keypoints"].numpy() + 0.5) * TILE / size - 0.5
            seen = sample["visibility"].numpy() > 0
            yield caption(draw_landmarks(tile, points, faces.scheme, seen, side=TILE / padding), what)
        maps, tile = sample["heatmaps"], tile * 0.5
        for region in regions:
            heat = cv2.resize(maps[region].amax(0).numpy(), (TILE, TILE))[..., None]
            tile = tile * (1 - heat) + np.array(colours[region[0]]) * heat
        yield caption(tile.clip(0, 255).astype(np.uint8), "its targets")


def label_slots(marks: np.ndarray, slots: np.ndarray) -> list[tuple[int, int]]:
    """Which slot (M, 2) names which landmark (N, 2): [(landmark, slot), ...].

    Straight lines of the least total length never cross. A line that runs through another landmark counts as
    200 pixels longer, so that a detour is preferred.
    """
    cost = np.linalg.norm(marks[:, None] - slots, axis=-1)
    for i, mark in enumerate(marks):
        way, others = (slots - mark)[:, None], np.delete(marks, i, axis=0) - mark
        along = np.clip((way * others).sum(-1, keepdims=True) / (way ** 2).sum(-1, keepdims=True), 0, 1)
        cost[i] += 200 * (np.linalg.norm(along * way - others, axis=-1) < 10).sum(-1)
    return list(zip(*linear_sum_assignment(cost)))


def landmark_map(faces: data.Faces) -> np.ndarray:
    """Numbers and names around the mean face, each joined to its landmark by a line."""
    scheme, mean = faces.scheme, mean_face(faces)
    shown = np.flatnonzero(np.isfinite(mean[:, 0]))
    mean = mean[shown]
    font, rows = font_of(17), math.ceil(len(shown) / 2)
    texts = [f"{i}  {scheme.names[i][:40]}" for i in shown]
    margin, height = int(max(map(font.getlength, texts))) + 30, max(900, 34 * rows + 40)
    face = min(height - 60, 1000)
    width, low, high = 2 * margin + face + 200, mean.min(0), mean.max(0)
    at = np.full((len(scheme.names), 2), np.nan)
    at[shown] = (mean - (low + high) / 2) / ((high - low).max() or 1) * face + np.array([width, height]) / 2
    y, marks = (np.arange(rows) + 0.5) * height / rows, at[shown]  # the names stand in two columns
    slots = np.concatenate([np.column_stack([np.full(rows, x), y]) for x in (margin, width - margin)])
    pairs = label_slots(marks, slots)
    canvas = draw_landmarks(np.full((height, width, 3), 255, np.uint8), at, scheme)
    for i, slot in pairs:
        start, end = (tuple(int(v) for v in np.round(p * 16)) for p in (marks[i], slots[slot]))
        cv2.line(canvas, start, end, (120, 120, 120), 1, cv2.LINE_AA, 4)
        cv2.circle(canvas, start, 4 * 16, INK, -1, cv2.LINE_AA, 4)
    canvas = Image.fromarray(canvas)
    for i, slot in pairs:
        x, anchor = (margin - 8, "rm") if slot < rows else (width - margin + 8, "lm")
        ImageDraw.Draw(canvas).text((x, slots[slot][1]), texts[i], INK, font, anchor=anchor)
    return np.asarray(canvas)


def original_boxes(path: Path) -> dict:
    """{annotation id: the corners its box had before the converter rebuilt it, or None when it had none}."""
    boxes = {}
    for annotation in load_json(path)["annotations"]:
        repaired = annotation.get("repaired")
        if isinstance(repaired, list) and "box" in repaired:
            try:
                corners = np.array([float(v) for v in annotation.get("original_bbox")]).reshape(2, 2)
                boxes[annotation.get("id")] = corners if np.isfinite(corners).all() else None
            except (TypeError, ValueError, OverflowError):
                boxes[annotation.get("id")] = None
    return boxes


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line. Raises UserError."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("ann", type=Path, metavar="ANN", help="a COCO keypoint file")
    add("--data-root", type=Path, metavar="DIR",
        help="folder its file names are relative to (default: kagglehub's cache)")
    add("--category", metavar="NAME", help="category to show, if several have different landmarks")
    add("--out", type=Path, metavar="DIR", required=True, help="folder for the pictures")
    add("--number", type=int, default=12, metavar="N", help="faces per sheet, chosen at random (default: 12)")
    add("--seed", type=int, default=0, help="another seed shows other faces and augmentations (default: 0)")
    add("--input-size", type=int, default=data.SIZE, metavar="S",
        help=f"the trainer's crop in pixels (default: {data.SIZE})")
    add("--padding", type=float, default=data.PADDING,
        help=f"crop side / the box's longer side (default: {data.PADDING})")
    add("--force", action="store_true", help="write over the pictures in --out")
    args = parser.parse_args(argv)
    check_free("--out", args.out, force=True)
    check_ranges(args, number="[1, 100]", seed="[0, inf)", input_size="[32, 1024]", padding="[0.5, 4]")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    faces = data.load_coco(args.ann, data_root(args.data_root), args.category)
    originals = original_boxes(args.ann)
    repaired = np.flatnonzero([i in originals for i in faces.ids.tolist()])
    some = np.random.default_rng(args.seed).permutation(len(faces))[:args.number]
    crops = args.input_size, args.padding, args.seed
    sheets = {"raw.jpg": lambda: raw_tiles(faces, some, {}),
              "trainer.jpg": lambda: trainer_tiles(faces.take(some), *crops), "landmarks.png": None,
              "repaired.jpg": lambda: raw_tiles(faces, repaired[:args.number], originals)}
    if not len(repaired):
        del sheets["repaired.jpg"]
    check_new("--out", args.force, *(args.out / name for name in sheets))
    if args.force:
        (args.out / "repaired.jpg").unlink(missing_ok=True)  # of another data set
    for note in faces.notes:
        print(note)
    print(f"{len(faces)} faces in {len(set(faces.files))} pictures, {len(faces.scheme.names)} landmarks "
          f"({(faces.visible > 0).mean():.1%} labelled), {len({*faces.breeds} - {''})} breeds, "
          f"{len(repaired)} boxes repaired by the converter")
    never = [f"{i} {name}" for i, name in enumerate(faces.scheme.names) if not faces.visible[:, i].any()]
    if never:
        print(f"never labelled: {printable(', '.join(never))}")
    if not "".join(faces.scheme.names).isascii():  # no font here has the letters of all languages
        print(f"landmarks: {printable(', '.join(f'{i} {n}' for i, n in enumerate(faces.scheme.names)))}")
    for name, make in sheets.items():
        tiles = list(make()) if make else []
        picture = contact_sheet(tiles, min(len(tiles), 4)) if tiles else landmark_map(faces)
        atomic_write(args.out / name, [encode_picture(picture, Path(name).suffix)])
        print(f"{args.out / name}: {picture.shape[1]} x {picture.shape[0]}")


if __name__ == "__main__":
    run_script(main)
