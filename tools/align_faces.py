"""Turn faces upright and to one size, by a similarity transform on eyes and nose.

    uv run python tools/align_faces.py --ann data/dogflw/annotations/train.json --data-root DogFLW --out aligned
    uv run python tools/align_faces.py --predictions predictions/predictions.json --checkpoint best_model.pth \\
        --data-root photos --out aligned

What classifiers of expression or breed build on: --out gets one picture a face, and transforms.json with, for every
face, `file`, `face` (annotation id, or number in the picture), `picture`, `matrix` (2 x 3, pixels of the file -> of
the picture), `landmarks` (in the picture, null where unlabelled) and `residual` (how far eyes and nose are from the
template, in eye distances: large in profile). Faces without both eyes and a nose are named there as `left_out`.
"""
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from skimage.transform import SimilarityTransform
from tqdm import tqdm

import dataset as data
from dataset import Parser, UserError, atomic_write, run_script
from train_simple import load_model

# Where the middles of left eye, right eye and nose go, in eye distances from the point between the eyes. Measured
# over 3,400 DogFLW faces with all their landmarks (medians), as is the middle of the landmarks' hull and its half side.
TEMPLATE = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.71]])
CENTRE, HALF_SIDE = np.array([0.0, 0.19]), 1.35


def parts(scheme):
    """Indices of left eye, right eye and nose. Raises UserError for a scheme that does not name them."""
    eye, nose = (scheme.regions.get(name, []) for name in ("eye", "nose"))
    left, right = ([pair[side] for pair in scheme.flip_pairs if set(pair) <= set(eye)] for side in (0, 1))
    if not (left and nose):
        raise UserError("the landmarks have no regions 'eye' and 'nose' with flip_pairs, so no face can be turned upright")
    return left, right, nose


def middles(points, visible, indices):
    """Middles of eyes and nose (3, 2), or None where less than half of one is labelled."""
    if any(visible[i].mean() < 0.5 for i in indices):
        return None
    return np.stack([points[i][visible[i]].mean(0) for i in indices])


def fit(source, target):
    """The similarity transform source -> target as a 2 x 3 matrix, or None where there is none."""
    if hasattr(SimilarityTransform, "from_estimate"):  # scikit-image 0.26 and later; `estimate` is on its way out
        transform = SimilarityTransform.from_estimate(source, target)
    else:
        transform = SimilarityTransform()
        transform = transform if transform.estimate(source, target) else None
    matrix = transform.params[:2] if transform else np.full((2, 3), np.nan)
    return matrix if np.isfinite(matrix).all() and np.linalg.det(matrix[:, :2]) > 1e-9 else None


def align(image, matrix, size):
    """The (size, size, 3) picture that `matrix` maps to; large faces are shrunk by area first, so they do not alias."""
    corners = data.apply_matrix(data.invert_matrix(matrix), np.array([[0, 0], [size, 0], [0, size], [size, size]]) - 0.5)
    box = (*corners.min(0), *np.ptp(corners, axis=0))
    scale = np.sqrt(np.linalg.det(matrix[:, :2]))
    window, kept = data.face_window(box, image.shape[1::-1], max(box[2:]) * scale, 1.0, 1.0)
    return data.warp(data.cut_window(image, window, kept), data.window_matrix(window, kept), matrix, size)


def read_predictions(path, k):
    """[(file, face, points (K, 2), visible (K,))] of a predictions.json, in its order."""
    content, faces, number = data.load_json(path), [], Counter()
    try:
        for entry in content:
            name, points = str(entry["file_name"]), np.array(entry["keypoints"], dtype=float).reshape(k, 3)[:, :2]
            if not np.isfinite(points).all() or np.abs(points).max() > 1e6:
                raise ValueError("a coordinate that cannot be")
            faces.append((name, number[name], points, np.ones(k, dtype=bool)))
            number[name] += 1
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path}: no predictions of {k} landmarks ({type(e).__name__}: {str(e)[:60]}); "
                        "make them with tools/predict.py and the same checkpoint") from None
    return faces


def read_faces(args):
    """(scheme, [(file, face, points, visible)]) from annotations or predictions."""
    if args.ann:
        faces = data.load_coco(args.ann, args.data_root)
        return faces.scheme, list(zip(faces.files, faces.ids.tolist(), faces.points, faces.visible > 0, strict=True))
    _, scheme, _, _ = load_model(args.checkpoint)
    return scheme, read_predictions(args.predictions, len(scheme.names))


def parse_args(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ann", type=Path, metavar="FILE", help="COCO keypoint file")
    source.add_argument("--predictions", type=Path, metavar="FILE", help="predictions.json of tools/predict.py")
    add("--checkpoint", type=Path, metavar="FILE", help="what made the predictions: it names the landmarks")
    add("--data-root", type=Path, required=True, metavar="DIR", help="folder that file names are relative to")
    add("--out", type=Path, default=Path("aligned"), metavar="DIR", help="(default: aligned)")
    add("--size", type=int, default=224, metavar="S", help="pixels of the square pictures (default: 224)")
    add("--margin", type=float, default=0.6, metavar="F",
        help="room around a typical face, in parts of it (default: 0.6, which cuts no ear of 4 faces in 5)")
    add("--force", action="store_true", help="write into a folder that is not empty")
    args = parser.parse_args(argv)
    if not 16 <= args.size <= 4096 or not 0 <= args.margin <= 4:
        raise UserError("--size must be from 16 to 4096, and --margin from 0 to 4")
    if args.predictions and not args.checkpoint:
        raise UserError("--predictions: give --checkpoint too, the one that made them")
    data.data_root(args.data_root)
    if args.out.resolve() == args.data_root.resolve():
        raise UserError(f"--out {args.out}: is the folder of the pictures; name another")
    data.check_free("--out", args.out, args.force)
    return args


def main(argv=None):
    args = parse_args(argv)
    scheme, faces = read_faces(args)
    indices = parts(scheme)
    scale = args.size / (2 * HALF_SIDE * (1 + args.margin))  # pixels an eye distance
    target = (TEMPLATE - CENTRE) * scale + (args.size - 1) / 2
    by_file, aligned, left_out, unread, used = {}, [], [], [], Counter()
    for face in faces:
        by_file.setdefault(face[0], []).append(face)
    for file, group in tqdm(by_file.items(), unit="file", disable=None):
        try:
            image = data.read_image(data.picture_path(args.data_root, file))
        except UserError as e:
            unread.append(file)
            tqdm.write(f"error: {data.printable(e)}", file=sys.stderr)
            continue
        for _, face, points, visible in group:
            source = middles(points, visible, indices)
            matrix = None if source is None else fit(source, target)
            if matrix is None:
                left_out.append({"file": file, "face": face, "reason": "an eye or the nose is not labelled" if source is None
                                 else "eyes and nose lie on one spot"})
                continue
            stem = Path(file).with_suffix("").as_posix()
            picture, used[stem] = f"{stem}_{used[stem]}.png", used[stem] + 1
            landmarks = data.apply_matrix(matrix, points)
            residual = np.linalg.norm(data.apply_matrix(matrix, source) - target, axis=1).mean() / scale
            aligned.append({"file": file, "face": face, "picture": picture, "matrix": matrix.tolist(),
                            "landmarks": [p.round(3).tolist() if v else None for p, v in zip(landmarks, visible, strict=True)],
                            "residual": round(float(residual), 4)})
            atomic_write(args.out / picture, [data.encode_picture(align(image, matrix, args.size))])
    atomic_write(args.out / "transforms.json", [json.dumps({
        "size": args.size, "names": scheme.names, "template": target.tolist(), "faces": aligned, "left_out": left_out}).encode()])
    print(f"{len(aligned)} faces -> {args.out}")
    if left_out:
        named = ", ".join(f"{data.printable(face['file'])} ({face['face']}): {face['reason']}" for face in left_out[:10])
        print(f"left out: {len(left_out)} faces, all in transforms.json: {named}{', ...' if len(left_out) > 10 else ''}")
    if unread:
        raise UserError(f"{len(unread)} of {len(by_file)} pictures could not be read; they are named above")


if __name__ == "__main__":
    run_script(main)
