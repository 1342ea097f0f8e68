"""Turn faces upright and scale them to one size, by a similarity transform of eyes and nose.

    uv run tools/align_faces.py --ann val.json --data-root DogFLW --out aligned
    uv run tools/align_faces.py --predictions predictions/predictions.json --data-root photos

Classifiers of expression or breed start from such faces. --out gets one picture per face and transforms.json,
which holds for every face its `file`, `face` (annotation id, or number in the file), `picture` (the aligned
one), `matrix` (2 x 3, pixels of the file -> of the picture), `landmarks` (in the picture, null if unlabelled)
and `residual` (how far eyes and nose are from the template, in eye distances: large in profile). Faces that
lack an eye or the nose are listed there under `left_out`.
"""
import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from skimage.transform import SimilarityTransform
from tqdm import tqdm

import dataset as data
from tools.lib.cli import Parser, UserError, add_checkpoint, check_ranges, printable, run_script
from tools.lib.coco import MAX_NUMBER
from tools.lib.draw import encode_picture
from tools.lib.files import TRANSFORMS, atomic_write, data_root, load_json, output_folder, picture_path
from tools.lib.find import checkpoint_file
from tools.lib.pictures import read_image
from tools.lib.windows import apply_matrix, crop_of, invert_matrix, read_described
from train_simple import Trained

# Where the centres of left eye, right eye and nose go, in eye distances from the midpoint of the eyes. These
# are medians over 3,400 DogFLW faces with all their landmarks, as are the centre of the landmarks' hull and
# half its side.
TEMPLATE = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.71]])
CENTRE, HALF_SIDE = np.array([0.0, 0.19]), 1.35


def parts(scheme: data.Scheme) -> tuple[list, list, list]:
    """Indices of left eye, right eye and nose. Raises UserError for a scheme that does not name them."""
    eye, nose = (scheme.regions.get(name, []) for name in ("eye", "nose"))
    left, right = ([pair[side] for pair in scheme.flip_pairs if set(pair) <= set(eye)] for side in (0, 1))
    if not (left and nose):
        raise UserError("the landmarks have no regions 'eye' and 'nose' with flip_pairs, so no face can be "
                        "turned upright; add regions to the COCO file's category, as data/README.md says")
    return left, right, nose


def middles(points: np.ndarray, visible: np.ndarray, indices: tuple) -> np.ndarray | None:
    """Middles of eyes and nose (3, 2), or None where less than half of one is labelled."""
    if any(visible[i].mean() < 0.5 for i in indices):
        return None
    return np.stack([points[i][visible[i]].mean(0) for i in indices])


def sides(faces: list, indices: tuple) -> tuple:
    """The indices with left and right swapped where the faces' left is the animal's, not the picture's.

    Then the nose of most faces lies on the other side of the line from left to right than in the template.
    """
    found = [m for *_, points, visible in faces if (m := middles(points, visible, indices)) is not None]
    left, right, nose = indices
    mirrored = found and np.median([np.linalg.det(m[1:] - m[0]) for m in found]) < 0
    return (right, left, nose) if mirrored else indices


def fit(source: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """The similarity transform source -> target as a 2 x 3 matrix, or None where there is none."""
    if hasattr(SimilarityTransform, "from_estimate"):  # scikit-image 0.26 and later: `estimate` is deprecated
        transform = SimilarityTransform.from_estimate(source, target)
    else:
        transform = SimilarityTransform()
        transform = transform if transform.estimate(source, target) else None
    matrix = transform.params[:2] if transform else np.full((2, 3), np.nan)
    return matrix if np.isfinite(matrix).all() and np.linalg.det(matrix[:, :2]) > 1e-9 else None


def align(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The (size, size, 3) picture that `matrix` maps to; large faces are first shrunk by area."""
    side = size / np.sqrt(np.linalg.det(matrix[:, :2]))
    middle = apply_matrix(invert_matrix(matrix), np.full((1, 2), (size - 1) / 2))[0]
    return crop_of(image, (*(middle - side / 2), side, side), matrix, size, 1.0)


def read_predictions(path: Path, k: int) -> list:
    """[(file, face, points (K, 2), visible (K,))] of a predictions.json, in its order."""
    content, faces, number = load_json(path), [], Counter()
    if isinstance(content, dict) and "images" in content:
        raise UserError(f"{path}: is a data set, not predictions; give it by --ann")
    try:
        for entry in content:
            name = str(entry["file_name"])
            if entry.get("frame") is not None:
                raise UserError(f"{path}: {name} is a video; save its frames, as by: ffmpeg -i VIDEO -vf "
                                "fps=1 frames/%05d.jpg, and predict those")
            points = np.array(entry["keypoints"], dtype=float).reshape(k, 3)[:, :2]
            if not np.isfinite(points).all() or np.abs(points).max() > MAX_NUMBER:
                raise ValueError("a coordinate that cannot be")
            faces.append((name, number[name], points, np.ones(k, dtype=bool)))
            number[name] += 1
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as e:
        raise UserError(f"{path}: no predictions of {k} landmarks ({type(e).__name__}: {str(e)[:60]}); "
                        "make them with tools/predict.py and the same checkpoint") from None
    return faces


def read_faces(args: argparse.Namespace) -> tuple[data.Scheme, list, dict]:
    """(scheme, [(file, face, points, visible)], {file: size}) from annotations, or predictions: no sizes."""
    if args.ann:
        faces = data.load_coco(args.ann, args.data_root, args.category)
        for note in faces.notes:
            print(note)
        rows = list(zip(faces.files, faces.ids.tolist(), faces.points, faces.visible > 0))
        return faces.scheme, rows, dict(zip(faces.files, faces.sizes))
    scheme = Trained(checkpoint_file(args.checkpoint)).scheme
    return scheme, read_predictions(args.predictions, len(scheme.names)), {}


class Aligner:
    """Writes faces, and remembers them: `aligned` and `left_out`, rows of transforms.json."""

    def __init__(self, scheme: data.Scheme, faces: list, out: Path, size: int, margin: float):
        self.indices, self.out, self.size = sides(faces, parts(scheme)), out, size
        self.scale = size / (2 * HALF_SIDE * (1 + margin))  # pixels per eye distance
        self.target = (TEMPLATE - CENTRE) * self.scale + (size - 1) / 2
        self.aligned, self.left_out, self.used = [], [], Counter()

    def add(self, image: np.ndarray, file: str, face: int | str, points: np.ndarray,
            visible: np.ndarray) -> None:
        """Write a face of a picture, or say in `left_out` why not."""
        source = middles(points, visible, self.indices)
        matrix = None if source is None else fit(source, self.target)
        if matrix is None:
            missing = "an eye or the nose is not labelled"
            reason = missing if source is None else "eyes and nose lie on one spot"
            self.left_out.append({"file": file, "face": face, "reason": reason})
            return
        stem = Path(file).with_suffix("").as_posix()
        picture, self.used[stem] = f"{stem}_{self.used[stem]}.png", self.used[stem] + 1
        away = np.linalg.norm(apply_matrix(matrix, source) - self.target, axis=1).mean() / self.scale
        moved = apply_matrix(matrix, points).round(3).tolist()
        landmarks = [p if v else None for p, v in zip(moved, visible)]
        atomic_write(self.out / picture, [encode_picture(align(image, matrix, self.size))])
        self.aligned.append({"file": file, "face": face, "picture": picture, "matrix": matrix.tolist(),
                             "landmarks": landmarks, "residual": round(float(away), 4)})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line. Raises UserError."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ann", type=Path, metavar="FILE", help="COCO keypoint file")
    source.add_argument("--predictions", type=Path, metavar="FILE", help="predictions.json of predict.py")
    add_checkpoint(parser, "the model that made --predictions; it names the landmarks", positional=False)
    add("--category", metavar="NAME", help="category of --ann to use, if several have different landmarks")
    add("--data-root", type=Path, metavar="DIR", help="folder of the pictures (default: kagglehub's DogFLW)")
    add("--out", type=Path, metavar="DIR", help="output folder (default: aligned, then aligned_2, ...)")
    add("--size", type=int, default=224, metavar="S", help="side of the pictures in pixels (default: 224)")
    add("--margin", type=float, default=0.6, metavar="F",
        help="room around a typical face, as a fraction of it (default: 0.6; it cuts no ear in 4 of 5 faces)")
    add("--force", action="store_true", help="write into a folder that is not empty")
    args = parser.parse_args(argv)
    if args.ann and args.checkpoint or args.predictions and args.category:
        raise UserError("--checkpoint goes with --predictions, and --category with --ann")
    check_ranges(args, size="[16, 4096]", margin="[0, 4]")
    args.data_root = data_root(args.data_root)
    if args.out and args.out.resolve() == args.data_root.resolve():
        raise UserError(f"--out {args.out}: is the folder of the pictures; name another")
    return args


def align_all(args: argparse.Namespace) -> None:
    """Write what can be aligned, and what became of each face. Raises UserError for unread pictures."""
    scheme, faces, sizes = read_faces(args)
    aligner, by_file, unread = Aligner(scheme, faces, args.out, args.size, args.margin), {}, []
    for face in faces:
        by_file.setdefault(face[0], []).append(face)
    if not faces:
        raise UserError(f"{args.predictions}: no faces in it")
    if not any(os.path.isfile(args.data_root / file) for file in by_file):
        raise UserError(f"--data-root {args.data_root}: holds none of the {len(by_file)} pictures, as "
                        f"{next(iter(by_file))}")
    try:
        for file, group in tqdm(by_file.items(), unit="file", disable=None):
            try:
                path = picture_path(args.data_root, file)
                if len(os.fsencode(path.stem)) > 240:
                    raise UserError(f"{file}: its name is too long for the aligned face's; rename it")
                image = read_described(path, sizes[file]) if sizes else read_image(path)
            except UserError as e:
                unread.append(file)
                tqdm.write(f"error: {printable(e)}", file=sys.stderr)
                continue
            for face in group:
                aligner.add(image, *face)
    finally:  # Ctrl-C keeps what is done
        content = {"size": args.size, "names": scheme.names, "template": aligner.target.tolist(),
                   "faces": aligner.aligned, "left_out": aligner.left_out}
        atomic_write(args.out / TRANSFORMS, [json.dumps(content).encode()])
    print(f"{len(aligner.aligned)} faces -> {args.out}")
    if left_out := aligner.left_out:
        named = [f"{printable(face['file'])} ({face['face']}): {face['reason']}" for face in left_out[:10]]
        named = ", ".join(named + ["..."] * (len(left_out) > 10))
        print(f"left out: {len(left_out)} faces, all in transforms.json: {named}")
    if unread:
        raise UserError(f"{len(unread)} of {len(by_file)} pictures could not be read; they are named above")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with output_folder(args.out, "aligned", args.force) as args.out:
        align_all(args)


if __name__ == "__main__":
    run_script(main)
