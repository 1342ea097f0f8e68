"""Score a checkpoint, or the results of any other program, on the faces of a COCO file.

    python tools/evaluate.py work_dirs/hrnet_w32/best_model.pth
    python tools/evaluate.py best_model.pth --ann val.json --data-root DogFLW --out report
    python tools/evaluate.py --results theirs.json --ann val.json --data-root DogFLW --out report
    python tools/evaluate.py best_model.pth --results predictions/predictions.json --match

Writes report.html (one page, everything inside), report.json, report.csv and the pictures into --out. A results file
is COCO's, [{"image_id", "keypoints": [x, y, score, ...], "score"}], with "annotation_id" where a picture has several
faces; of several results for one face the one with the highest score counts. --match is for programs that find the
faces themselves, as tools/predict.py does without boxes: a face takes the result that overlaps it best, and faces
without one are counted; with a CHECKPOINT the error is compared with the one in the true boxes.
"""
import base64
import json
import math
from collections import defaultdict
from dataclasses import asdict, replace
from html import escape
from pathlib import Path, PurePosixPath

import numpy as np

import dataset as data
from dataset import DogFLWDataset, Parser, UserError, atomic_write, run_script
from train_simple import as_csv, as_png, choose_amp, choose_device, load_model, nan_mean, nme, normalizers, predict

LIMIT = 0.10  # beyond it a face counts as failed, and the error curve's area ends
WRITES = ("report.html", "report.json", "report.csv", "worst.jpg", "error_curve.png", "landmarks.png", "mean_face.png")
SAME_FACE = 0.5  # IoU of the landmarks' hulls from which on a result is of that face
DEFINITIONS = {
    "nme": "mean over faces of the mean error of a face's labelled landmarks / the side of the crop",
    "nme_iod": "the same / the distance between the two interocular landmarks, where both are labelled",
    "nme_box": "the same / the diagonal of the face's box",
    "pck": "share of all labelled landmarks whose error is at most 0.05 (0.10) of MAIN's length",
    "failure_rate": "share of faces whose MAIN is above 0.10",
    "along, across": "mean error / MAIN's length in the outline's direction and square to it, of landmarks with two drawn neighbours",
    "auc": "area under the curve 'share of faces whose MAIN is at most e', e from 0 to 0.10, divided by 0.10",
}


# ---------------------------------------------------------------- the numbers

def pck(points, faces, length, threshold):
    """The share of labelled landmarks whose error is at most threshold * length (N,); NaN lengths count nowhere."""
    error = np.linalg.norm(points - faces.points, axis=-1)  # (N, K)
    counts = (faces.visible > 0) & np.isfinite(length)[:, None]
    return nan_mean((error <= threshold * length[:, None])[counts].astype(float))


def failure_rate(errors, limit=LIMIT):
    """The share of faces above the limit."""
    return nan_mean(np.where(np.isnan(errors), np.nan, np.asarray(errors) > limit))


def area_under_curve(errors, limit=LIMIT):
    """The area under the empirical distribution of errors up to `limit`, / limit. Exact: a face adds what is right of it."""
    return nan_mean(np.maximum(0, 1 - np.asarray(errors) / limit))


def along_and_across(points, faces, length):
    """Mean error / length (N,) along the outline and square to it: (K, 2), NaN for landmarks that are not between two others.

    The outline's direction at a landmark is the one from one of its two neighbours in the skeleton to the other, in the truth.
    """
    result, neighbours = np.full((len(faces.scheme.names), 2), np.nan), defaultdict(list)
    for i, j in faces.scheme.skeleton:
        neighbours[i].append(j)
        neighbours[j].append(i)
    for i, ends in neighbours.items():
        if len(ends) == 2:
            use = (faces.visible[:, [i, *ends]] > 0).all(1) & np.isfinite(length)
            direction = faces.points[use, ends[1]] - faces.points[use, ends[0]]
            direction = direction / np.linalg.norm(direction, axis=1, keepdims=True).clip(1e-9)
            error = (points[use, i] - faces.points[use, i]) / length[use, None]
            across = error[:, 0] * direction[:, 1] - error[:, 1] * direction[:, 0]
            result[i] = nan_mean(np.abs((error * direction).sum(1))), nan_mean(np.abs(across))
    return result


def score(points, faces, padding):
    """All numbers of a report, as plain types; and every face's error under the main normaliser."""
    lengths = normalizers(faces, padding)
    main = "nme_iod" if np.isfinite(lengths.get("nme_iod", math.nan)).any() else "nme_box"
    errors = {name: nme(points, faces, length) for name, length in lengths.items()}

    def part(visible, rows=slice(None)):
        """The scores of some landmarks of some faces."""
        some = replace(faces, visible=visible)
        return {"labelled": int((visible[rows] > 0).sum()),
                **{name: nan_mean(nme(points, some, length)[rows]) for name, length in lengths.items()}}

    names, breeds = faces.scheme.names, np.array(faces.breeds)
    k, directions = np.arange(len(names)), along_and_across(points, faces, lengths[main])

    def landmarks(index):
        """The scores of some landmarks of all faces."""
        along, across = map(nan_mean, directions[index].T)
        return {**part(faces.visible * np.isin(k, index)), "along": along, "across": across}

    report = {
        "main": main, "faces": len(faces), "faces_by_main": int(np.isfinite(errors[main]).sum()),
        "metrics": {**{name: nan_mean(e) for name, e in errors.items()},
                    "pck_0.05": pck(points, faces, lengths[main], 0.05), "pck_0.10": pck(points, faces, lengths[main], 0.10),
                    "failure_rate": failure_rate(errors[main]), "auc": area_under_curve(errors[main])},
        "region": {name: landmarks(index) for name, index in faces.scheme.regions.items()},
        "landmark": {f"{i} {name}": landmarks([i]) for i, name in enumerate(names)},
        "breed": {name: part(faces.visible, breeds == name) for name in sorted(set(faces.breeds))},
        "face": [{"id": faces.ids[i].item(), "file": faces.files[i], "labelled": int((faces.visible[i] > 0).sum()),
                  **{name: float(e[i]) for name, e in errors.items()}} for i in range(len(faces))],
    }
    return report, errors[main]


# ---------------------------------------------------------------- what is scored

def hull(points):
    """The box x, y, w, h around points (n, 2)."""
    return np.concatenate([points.min(0), np.ptp(points, axis=0)])[None]


def read_results(path, faces, match=False):
    """{index of a face: points (K, 2)} of a COCO keypoint-results file. Raises UserError.

    The best-scored result of every face, all of which must have one; or, to `match`, the one that overlaps it best.
    """
    rows, k = data.load_json(path), len(faces.scheme.names)
    if not isinstance(rows, list):
        raise UserError(f"{path}: not COCO keypoint results (a list of {{image_id, keypoints, score}})")
    by_id, by_image = {a: [i] for i, a in enumerate(faces.ids.tolist())}, {}
    for i, image in enumerate(faces.image_ids.tolist()):
        by_image.setdefault(image, []).append(i)
    found, elsewhere = [], 0  # (how well it fits, number of the result, face, points)
    for number, row in enumerate(rows):
        try:
            triples = np.array(row["keypoints"], np.float64).reshape(k, 3)
            certainty, named, image = float(row.get("score", 0)), row.get("annotation_id"), row["image_id"]
            candidates = by_image.get(image, []) if named is None else by_id.get(named, [])
            picture = PurePosixPath(row["file_name"]).parts if "file_name" in row else ()  # ours have it
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            raise UserError(f"{path}: result {number} needs image_id, keypoints ({k} x 3 numbers) and score") from None
        points = triples[:, :2]
        if not (np.isfinite(points).all() and math.isfinite(certainty)):
            raise UserError(f"{path}: result {number} has numbers that are not finite")
        for theirs in (PurePosixPath(faces.files[i]).parts for i in candidates):
            if any(a != b for a, b in zip(reversed(picture), reversed(theirs))):
                raise UserError(f"{path}: result {number} is of {row['file_name']}, but its id is that of {'/'.join(theirs)} in the "
                                "COCO file; predict with that file, as INPUT or with --boxes")
        if match:
            seen = [faces.visible[i] > 0 for i in candidates]
            fits = [data.overlaps(hull(points[v]), hull(faces.points[i][v])).item() for i, v in zip(candidates, seen)]
            found += [(fit, -number, i, points) for i, fit in zip(candidates, fits) if fit >= SAME_FACE]
        elif len(candidates) > 1:
            raise UserError(f"{path}: result {number}: its picture has {len(candidates)} faces; name one by annotation_id, "
                            "or let them be matched with --match")
        else:
            found += [(certainty, -number, i, points) for i in candidates]
        elsewhere += not candidates
    best, used = {}, set()
    for _, number, i, points in sorted(found, key=lambda row: row[:2], reverse=True):
        if i not in best and number not in used:
            best[i] = points
            used.add(number)
    missing = [i for i in range(len(faces)) if i not in best]
    if missing and not (match and best):
        raise UserError(f"{path}: no result for {len(missing)} of {len(faces)} faces, the first is annotation "
                        f"{faces.ids[missing[0]]} of {faces.files[missing[0]]}; every face must have one")
    if elsewhere:
        print(f"{elsewhere} results of other pictures left out")
    return best


# ---------------------------------------------------------------- pictures

def worst_faces(points, faces, errors, padding, number=20, size=240):
    """A sheet of the faces with the largest error: prediction, and white lines to the truth."""
    tiles = []
    for i in np.argsort(-np.nan_to_num(errors, nan=-1))[:min(number, int(np.isfinite(errors).sum()))]:
        crop, matrix = data.predict_crop(data.read_image(faces.root / faces.files[i]), faces.boxes[i], size, padding)
        ours, truth = (data.apply_matrix(matrix, p[i]) for p in (points, faces.points))
        crop = data.draw_landmarks(crop, ours, faces.scheme, faces.visible[i] > 0, truth)
        tiles.append(data.caption(crop, f"{100 * errors[i]:.1f} %  {Path(faces.files[i]).name}"))
    return data.encode_picture(data.contact_sheet(tiles, min(len(tiles), 5)), ".jpg")


def plots(report, faces, errors):
    """{file name: PNG bytes}: error curve, bars of the landmarks, errors on the mean face. Empty without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: they need matplotlib; pip install matplotlib")
        return {}
    scheme, main, curve = faces.scheme, report["main"], np.sort(errors[~np.isnan(errors)])
    colours = [np.divide(scheme.colours.get(i, (128, 128, 128)), 255) for i in range(len(scheme.names))]
    values = 100 * np.array([row[main] for row in report["landmark"].values()], float)
    figures = {}

    figure = figures["error_curve.png"] = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    right = max(2 * LIMIT, 1.1 * np.quantile(curve, 0.95))
    axes.step([0, *curve, max(right, curve[-1])], [0, *(np.arange(len(curve)) + 1) / len(curve), 1], where="post")
    axes.axvspan(0, LIMIT, alpha=0.08)
    axes.set(xlabel=main, ylabel="share of faces with at most this error", ylim=(0, 1.02), xlim=(0, right),
             title=f"failures {report['metrics']['failure_rate']:.1%}, area up to {LIMIT:.2f}: {report['metrics']['auc']:.3f}")
    axes.grid(True, alpha=0.3)

    figure = figures["landmarks.png"] = Figure(figsize=(7, 1.2 + 0.2 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(values)), np.nan_to_num(values), color=colours)
    labels = [f"{name[:40]}  {i}".replace("$", r"\$") for i, name in enumerate(scheme.names)]  # $ would be mathematics
    axes.set_yticks(range(len(values)), labels, fontsize=8)
    axes.set(xlabel=f"{main}, %", ylim=(len(values) - 0.4, -0.6))
    for name, index in scheme.regions.items():
        axes.barh([0], [0], color=[colours[i] for i in index[:1]] or "grey", label=" " + name[:40].replace("$", r"\$"))
    if scheme.regions:
        axes.legend(loc="best", fontsize=8)

    figure = figures["mean_face.png"] = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    face = faces.mean_face()
    for i, j in scheme.skeleton:
        axes.plot(*face[[i, j]].T, color="0.8", linewidth=1, zorder=1)
    shown = np.flatnonzero(np.isfinite(values))
    dots = axes.scatter(*face[shown].T, c=values[shown], s=90, cmap="viridis_r", zorder=2)
    for i in shown:
        axes.annotate(str(i), face[i], xytext=(6, 5), textcoords="offset points", fontsize=7)
    axes.set(aspect="equal", title="mean error of every landmark, on the mean face")
    axes.invert_yaxis()
    axes.axis("off")
    figure.colorbar(dots, label=f"{main}, %", shrink=0.8)

    return {name: as_png(figure) for name, figure in figures.items()}


# ---------------------------------------------------------------- the report

def show(value):
    """A cell of a table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def as_table(report):
    """report.csv: one row for all faces, every region, landmark, breed and face."""
    total = sum(row["labelled"] for row in report["face"])
    rows = [{"group": "all", "name": "all", "labelled": total, **report["metrics"]}]
    for group in ("region", "landmark", "breed"):
        rows += [{"group": group, "name": name, **row} for name, row in report[group].items()]
    rows += [{"group": "face", "name": row["file"], **row} for row in report["face"]]
    lengths = [k for k in ("nme", "nme_iod", "nme_box") if k in report["metrics"]]
    return as_csv(["group", "name", "labelled", *lengths, "along", "across"], rows)


def as_html(report, pictures):
    """One page that needs no other file; every text from outside is escaped."""
    def table(title, rows):
        head = "".join(f"<th>{escape(c)}</th>" for c in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(show(v))}</td>" for c, v in row.items()) + "</tr>" for row in rows)
        return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"

    main = report["main"]
    parts = [f"<h1>{len(report['face'])} faces of {escape(report['ann'])}</h1><p>{escape(report['source'])}</p>",
             table("All faces", [{**report["metrics"], f"faces with {main}": report["faces_by_main"]}]), "<dl>"]
    parts += [f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in report["definitions"].items()] + ["</dl>"]
    for name, content in pictures.items():
        kind = "jpeg" if name.endswith(".jpg") else "png"
        wide = ' class="wide"' if name == "worst.jpg" else ""
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        parts.append(f'<figure{wide}><img alt="{name}" src="{source}"></figure>')
    worst = sorted((r for r in report["face"] if r[main] is not None), key=lambda r: -r[main])[:20]
    parts += [table(title, rows) for title, rows in (
        ("Worst faces", worst), *((f"By {group}", [{group: k, **v} for k, v in report[group].items()])
                                  for group in ("region", "landmark", "breed"))) if rows]
    style = ("body{font:15px/1.45 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}"
             "table{border-collapse:collapse;margin:.5em 0}th,td{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
             "th:first-child,td:first-child{text-align:left}dt{font-weight:600}figure{display:inline-block;margin:.5em;"
             "vertical-align:top;max-width:46%}figure.wide{max-width:100%}img{max-width:100%}")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{style}</style>'
            + "".join(parts) + "</html>").encode()


def print_report(report):
    main, metrics = report["main"], report["metrics"]
    print("  ".join(f"{k} {show(v)}" for k, v in metrics.items()))
    if report["faces_by_main"] < report["faces"]:
        print(f"{main} counts {report['faces_by_main']} of {report['faces']} faces: the others lack an interocular landmark, "
              "or have both in one place")
    for name, row in report["region"].items():
        print(f"  {name:<12} {main} {show(row[main])}  ({row['labelled']} landmarks)" + (
            f"  along outlines {show(row['along'])}, across {show(row['across'])}" if row["along"] is not None else ""))


# ---------------------------------------------------------------- command line

def parse_args(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="best_model.pth or another checkpoint of a run")
    add("--ann", type=Path, metavar="FILE", help="COCO keypoint file (default: the checkpoint's val.json)")
    add("--data-root", type=Path, metavar="DIR", help="folder its file names are relative to (default: the checkpoint's)")
    add("--out", type=Path, metavar="DIR", help="folder for the report (default: evaluation, beside the checkpoint or FILE)")
    add("--results", type=Path, metavar="FILE", help="score these COCO keypoint results; a checkpoint then only lends defaults")
    add("--match", action="store_true", help="the results are of a program that found the faces itself")
    add("--padding", type=float,
        help=f"without a checkpoint: the side that nme divides by / the box's longer one (default: {data.PADDING})")
    add("--no-flip", dest="flip", action="store_false", help="do not average with the mirrored picture's prediction")
    add("--batch-size", type=int, default=16, metavar="N", help="faces at once (default: 16)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    add("--force", action="store_true", help="write over a report in --out")
    args = parser.parse_args(argv)
    if not (args.checkpoint or args.results):
        raise UserError("name a CHECKPOINT, or a file with --results (see --help)")
    if args.match and not args.results:
        raise UserError("--match: goes with --results")
    if args.checkpoint and args.padding is not None:
        raise UserError("--padding: comes from the checkpoint; leave it out")
    if args.batch_size < 1 or not 0.5 <= (args.padding or data.PADDING) <= 4:
        raise UserError("--batch-size must be at least 1, --padding from 0.5 to 4")
    args.out = args.out or (args.results or args.checkpoint).parent / "evaluation"
    there = [name for name in WRITES if (args.out / name).exists()]
    if there and not args.force:
        raise UserError(f"--out {args.out}: holds {there[0]} already; write over it with --force, or name another folder")
    return args


def main(argv=None):
    args = parse_args(argv)
    model, scheme, settings, checkpoint = None, None, {}, {}
    device = choose_device(args.device)
    if args.checkpoint:
        model, scheme, settings, checkpoint = load_model(args.checkpoint, device)
    ann = args.ann or (Path(str(settings["ann_root"])) / "val.json" if settings.get("ann_root") else None)
    if ann is None or not ann.is_file():
        raise UserError(f"--ann {ann or ''}: no such file; name the COCO file to score on")
    faces = data.load_coco(ann, data.data_root(args.data_root or settings.get("data_root")))
    if scheme and faces.scheme.names != scheme.names:
        raise UserError(f"{ann}: its {len(faces.scheme.names)} landmarks are not the {len(scheme.names)} of {args.checkpoint}")
    if scheme:  # partners and regions as trained: a file of another program may name none
        faces = replace(faces, scheme=scheme)
    if settings.get("crop") == "image":
        faces = faces.whole_pictures()
    padding = settings.get("padding", args.padding or data.PADDING)

    def by_checkpoint():
        dataset = DogFLWDataset(faces, settings["input_size"], padding)
        amp = choose_amp(device, settings.get("amp", True))
        return predict(model, dataset, device, amp=amp, batch_size=args.batch_size, flip=args.flip)[0]

    finding = {}
    if args.results:
        found, source, total = read_results(args.results, faces, args.match), f"results of {args.results}", len(faces)
        index = sorted(found)
        faces, points = faces.take(index), np.stack([found[i] for i in index])
        if args.match:
            finding = {"faces": total, "found": len(faces), "share": len(faces) / total}
            source += f", which found {len(faces)} of {total} faces ({finding['share']:.1%}); the errors are of these"
        if args.match and model:
            ours, boxed = (nme(p, faces, normalizers(faces, padding)["nme"]) for p in (points, by_checkpoint()))
            finding |= {"nme_true_boxes": nan_mean(boxed), "error_ratio": nan_mean(ours) / nan_mean(boxed),
                        "share_within_1.15": float((ours <= 1.15 * boxed).sum() / total)}
            source += (f", {finding['error_ratio']:.3f} times the error in the true boxes; of all faces "
                       f"{finding['share_within_1.15']:.1%} are found with at most 1.15 times their own")
    else:
        points = by_checkpoint()
        chosen = data.printable(checkpoint["metrics"].get("chosen_on"))
        source = (f"{args.checkpoint}: epoch {data.printable(checkpoint.get('epoch'))}, chosen on {chosen}; "
                  f"{'averaged with the mirrored picture' if args.flip and scheme.flip_pairs else 'not mirrored'}")
        if chosen == "val.json" and ann.resolve() == (Path(str(settings.get("ann_root"))) / chosen).resolve():
            source += "; these very faces chose it, so the numbers flatter it"
    report, errors = score(points, faces, padding)
    report = {"source": source, "finding": finding, "ann": str(ann), "padding": padding, "scheme": asdict(faces.scheme),
              "definitions": {k: v.replace("MAIN", report["main"]) for k, v in DEFINITIONS.items()}, **report}
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # null for NaN, which JSON does not know
    pictures = {**plots(report, faces, errors), "worst.jpg": worst_faces(points, faces, errors, padding)}
    for name, content in {**pictures, "report.csv": as_table(report), "report.html": as_html(report, pictures),
                          "report.json": json.dumps(report, indent=1).encode()}.items():
        atomic_write(args.out / name, [content])
    print(f"{len(faces)} faces of {ann}; {source}")
    print_report(report)
    print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
