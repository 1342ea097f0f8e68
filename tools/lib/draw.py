"""Landmarks on pictures, contact sheets, curves, the log of a run."""

import contextlib
import io
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.lib.cli import UserError, as_text
from tools.lib.files import as_csv, atomic_write, load_json
from tools.lib.windows import apply_matrix

REGION_COLOURS = ((66, 133, 244), (15, 157, 88), (244, 180, 0), (219, 68, 55), (171, 71, 188), (0, 172, 193),
                  (255, 112, 67))


def region_colours(scheme) -> dict[int, tuple]:
    """Landmarks' colours, {index: (r, g, b)}; white for those of no region, orange if there is none."""
    known = {i: REGION_COLOURS[n % len(REGION_COLOURS)]
             for n, region in enumerate(scheme.regions.values()) for i in region}
    return defaultdict(lambda: (255, 255, 255) if known else REGION_COLOURS[-1], known)


def all_regions(scheme) -> dict[str, list]:
    """The regions that have landmarks, and "-" for the landmarks of no region."""
    rest = set(range(len(scheme.names))).difference(*scheme.regions.values())
    return {name: list(index) for name, index in {**scheme.regions, "-": sorted(rest)}.items() if index}


def font_of(size: int):
    """A font for captions: matplotlib's, which knows Latin, Greek and Cyrillic letters, or Pillow's own."""
    try:
        from matplotlib import get_data_path

        return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def draw_landmarks(image: np.ndarray, points: np.ndarray, scheme, visible: np.ndarray | None = None,
                   truth: np.ndarray | None = None, side: float = 0.0) -> np.ndarray:
    """A copy of an (H, W, 3) uint8 RGB picture with (K, 2) landmarks.

    Each region has a colour; right landmarks are rings, others are filled. Sizes fit the landmarks' extent
    or, if larger, 0.6 of `side`, the box's in pixels. White lines lead from the points to `truth` (K, 2).
    """
    image = np.ascontiguousarray(image).copy()
    shown = np.flatnonzero(np.isfinite(points).all(1) & (True if visible is None else visible))
    if not len(shown):
        return image
    extent, least = max(np.ptp(points[shown], axis=0).max(), 0.6 * side), 1 if len(points) > 20 else 2
    radius, width = max(least, round(extent / 90)), max(1, round(extent / 250))
    colour = region_colours(scheme)
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


def draw_faces(image: np.ndarray, faces: list[dict], scheme) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8 with every face's landmarks; itself if there are none."""
    for face in faces:
        image = draw_landmarks(image, face["points"], scheme, side=face["box"][2:].max())
    return image


def resized(faces: list[dict], scale: np.ndarray | float) -> list[dict]:
    """Faces in a picture `scale` times as large: a number, or (2,) for width and height."""
    def place(points: np.ndarray) -> np.ndarray:
        return (points + 0.5) * scale - 0.5
    return [{**face, "points": place(face["points"]),
             "box": np.concatenate([place(face["box"][:2]), face["box"][2:] * scale])} for face in faces]


def caption(tile: np.ndarray, text: str) -> np.ndarray:
    """The picture with a line of text below it."""
    strip = Image.new("RGB", (tile.shape[1], 22), (30, 30, 30))
    ImageDraw.Draw(strip).text((4, 3), text, (255, 255, 255), font_of(12))
    return np.vstack([tile, np.asarray(strip)])


def contact_sheet(tiles: Iterable[np.ndarray], columns: int) -> np.ndarray:
    """Equal-sized pictures in rows; the last row is filled with black."""
    tiles = list(tiles)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i:i + columns]) for i in range(0, len(tiles), columns)])


def encode_picture(image: np.ndarray, suffix: str = ".png") -> bytes:
    """RGB uint8 -> the bytes of a picture file."""
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def as_png(figure) -> bytes:
    """The bytes of a matplotlib figure's picture."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it draws a box
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def plot_curves(path: Path, runs: dict, metrics: Iterable[str]) -> bool:
    """Plot a run's losses and metrics over the epochs; of several runs {name: rows}, the first ones only.

    False without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, columns in zip(figure.subplots(1, 2), (("train_loss", "val_loss"), [*metrics])):
        for n, (name, rows) in enumerate(runs.items()):
            for column in columns if len(runs) == 1 else columns[:1]:
                # neither NaN nor missing
                points = [(row["epoch"], row[column]) for row in rows if 0 < row.get(column, 0) < math.inf]
                # matplotlib reads $ as mathematics, and leaves a label that begins with _ out of the legend
                label = f" {name if len(runs) > 1 else column}".replace("$", r"\$")
                width = 1.5 + 1.5 * (len(runs) - 1 - n) / len(runs)  # one beneath another stays visible
                axes.plot(*zip(*points) if points else ([], []), marker="." if len(points) < 20 else None,
                          linewidth=width, label=label)
        axes.set(xlabel="epoch", ylabel=", ".join(columns) if len(runs) == 1 else columns[0], yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=9)
    atomic_write(path, [as_png(figure)])
    return True


def mean_face(faces) -> np.ndarray:
    """Every landmark's mean place (K, 2) from the box's middle, in units of its longer side; else NaN."""
    seen, boxes = (faces.visible > 0)[..., None], faces.boxes
    places = (faces.points - (boxes[:, :2] + boxes[:, 2:] / 2)[:, None]) / boxes[:, 2:].max(1)[:, None, None]
    with np.errstate(invalid="ignore"):
        return np.where(seen, places, 0).sum(0) / seen.sum(0)


def face_sheet(dataset, points: np.ndarray | None = None) -> np.ndarray:
    """A dataset's first faces: crops and targets, or predictions (N, K, 2) and white lines to the truth."""
    tiles, batch = [], {k: v.numpy() for k, v in dataset.batch(range(min(16, len(dataset)))).items()}
    for i, (crop, truth) in enumerate(zip(batch["image"], batch["keypoints"])):
        drawn = truth if points is None else apply_matrix(batch["matrix"][i], points[i])
        tiles.append(draw_landmarks(crop, drawn, dataset.faces.scheme, batch["visibility"][i] > 0,
                                    truth=None if points is None else truth, side=len(crop) / 1.5))
    return contact_sheet(tiles, 4)


class Log:
    """What a run shows: a line an epoch, metrics.csv, curves.png, two contact sheets, TensorBoard's events.

    rows: the epochs so far, {column: value}; the caller adds to them. metrics: the columns to print.
    """

    def __init__(self, config, columns: tuple, metrics: Iterable[str], rows: list[dict], quiet: bool):
        self.config, self.columns, self.metrics, self.rows = config, columns, list(metrics), rows
        self.quiet, self.board = quiet, None
        if config.tensorboard and not quiet:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: needs tensorboard; pip install tensorboard") from None
            self.board = SummaryWriter(config.work_dir, purge_step=len(rows) + 1)

    def begin(self, dataset, settings: dict):
        """Write args.json, a new run's train_batch.jpg, and, on resuming, what a kill left unwritten."""
        if self.quiet:
            return
        folder, path = self.config.work_dir, self.config.work_dir / "args.json"
        if self.rows and path.is_file():  # the versions that made the epochs so far
            with contextlib.suppress(UserError, AttributeError, TypeError):  # it may have been edited
                before = load_json(path)
                former = [*before.get("former_versions", []), before.get("versions")]
                former = [made for made in former if made and made != settings["versions"]]
                settings["former_versions"] = former
        atomic_write(path, [json.dumps(settings, indent=1).encode()])
        if self.rows:
            for half_written in folder.glob(".*.tmp"):
                half_written.unlink()
            atomic_write(folder / "metrics.csv", [as_csv(self.columns, self.rows)])
            self.curves()
        else:
            atomic_write(folder / "train_batch.jpg", [encode_picture(face_sheet(dataset), ".jpg")])

    def epoch(self, best: bool, dataset, points: np.ndarray | None):
        """Write and print the last row. points: predictions for the dataset; None without validation."""
        row, folder = self.rows[-1], self.config.work_dir
        sheet = face_sheet(dataset, points) if best else None
        try:
            atomic_write(folder / "metrics.csv", [as_csv(self.columns, self.rows)])
            if best:
                atomic_write(folder / "val_predictions.jpg", [encode_picture(sheet, ".jpg")])
            if row["epoch"] % self.config.save_every == 0 or row["epoch"] == self.config.epochs:
                self.curves()
        except PermissionError as e:  # of a table that is open, on Windows; the checkpoints are written
            print(f"{e.filename}: is open in another program; written after a later epoch, or by --resume")
        scores = "" if points is None else f"  val {as_text(row, self.metrics)}" + "  best" * best
        print(f"epoch {row['epoch']:3d}/{self.config.epochs}  {row['size']} px  {row['seconds']:6.1f} s  "
              f"{row['images_per_s']:6.0f} images/s  train loss {row['train_loss']:.2e}{scores}", flush=True)
        if self.board:
            for name in self.columns:
                self.board.add_scalar(name, row[name], row["epoch"])
            if best:
                self.board.add_image("val_predictions", sheet, row["epoch"], dataformats="HWC")

    def curves(self):
        """Draw curves.png, or say once, at the end, what it needs."""
        drawn = plot_curves(self.config.work_dir / "curves.png", {"": self.rows}, self.metrics)
        if not drawn and self.rows[-1]["epoch"] == self.config.epochs:
            print("no curves.png: it needs matplotlib; metrics.csv holds the same numbers")

    def close(self):
        if self.board:
            self.board.close()
