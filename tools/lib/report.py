"""The report of tools/evaluate.py as people read it: plots, an HTML page, a table, lines in the terminal."""
import base64
from html import escape

import numpy as np

from tools.lib.cli import printable
from tools.lib.draw import as_png, mean_face, region_colours
from tools.lib.files import as_csv

GROUPS = ("region", "ear", "pose", "landmark", "breed")
STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse; margin: .5em 0}
th, td {padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd}
.text {text-align: left}
dt {font-weight: 600}
figure {display: inline-block; margin: .5em; vertical-align: top; max-width: 46%}
figure.wide {max-width: 100%}
img {max-width: 100%}
"""


def show(value: object) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- plots

def plots(report: dict, faces, errors: np.ndarray, limit: float) -> dict[str, bytes]:
    """{file name: PNG bytes}: error curve, bars of the landmarks, errors on the mean face.

    Empty without matplotlib. errors: every face's main error (N,). limit: where the curve's area ends.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: they need matplotlib; pip install matplotlib")
        return {}
    main = report["main"]
    values = 100 * np.array([row[main] for row in report["landmark"].values()], float)
    sizes = (6, 4), (7, 1.2 + 0.2 * len(values)), (7, 6)
    curve, bars, mean = (Figure(figsize=size, layout="constrained") for size in sizes)
    draw_curve(curve.subplots(), report["metrics"], errors[~np.isnan(errors)], main, limit)
    draw_bars(bars.subplots(), values, faces.scheme, main)
    draw_mean_face(mean, values, faces, main)
    figures = {"error_curve.png": curve, "landmarks.png": bars, "mean_face.png": mean}
    return {name: as_png(figure) for name, figure in figures.items()}


def draw_curve(axes, metrics: dict, errors: np.ndarray, main: str, limit: float):
    """The share of faces with at most an error, over the error."""
    errors = np.sort(errors)
    right = max(2 * limit, 1.1 * np.quantile(errors, 0.95))
    shares = (np.arange(len(errors)) + 1) / len(errors)
    axes.step([0, *errors, max(right, errors[-1])], [0, *shares, 1], where="post")
    axes.axvspan(0, limit, alpha=0.08)
    axes.set(xlabel=main, ylabel="share of faces with at most this error", ylim=(0, 1.02), xlim=(0, right),
             title=f"failures {metrics['failure_rate']:.1%}, area up to {limit:.2f}: {metrics['auc']:.3f}")
    axes.grid(True, alpha=0.3)


def draw_bars(axes, values: np.ndarray, scheme, main: str):
    """Every landmark's error in percent, in its region's colour."""
    known = region_colours(scheme)
    colours = [np.divide(known[i] if i in known else (128, 128, 128), 255) for i in range(len(values))]
    axes.barh(range(len(values)), np.nan_to_num(values), color=colours)
    # matplotlib would read $ as mathematics
    labels = [f"{name[:40]}{' (no label)' * bool(np.isnan(value))}  {i}".replace("$", r"\$")
              for i, (name, value) in enumerate(zip(scheme.names, values))]
    axes.set_yticks(range(len(values)), labels, fontsize=8)
    axes.set(xlabel=f"{main}, %", ylim=(len(values) - 0.4, -0.6))
    for name, index in scheme.regions.items():
        colour = colours[index[0]] if index else "grey"
        axes.barh([0], [0], color=colour, label=" " + name[:40].replace("$", r"\$"))
    if scheme.regions:
        axes.legend(loc="best", fontsize=8)


def draw_mean_face(figure, values: np.ndarray, faces, main: str):
    """Every landmark's error in percent, as the colour of its dot on the mean face."""
    axes, face = figure.subplots(), mean_face(faces)
    for i, j in faces.scheme.skeleton:
        axes.plot(*face[[i, j]].T, color="0.8", linewidth=1, zorder=1)
    shown = np.flatnonzero(np.isfinite(values))
    dots = axes.scatter(*face[shown].T, c=values[shown], s=90, cmap="viridis_r", zorder=2)
    for i in shown:
        axes.annotate(str(i), face[i], xytext=(6, 5), textcoords="offset points", fontsize=7)
    axes.set(aspect="equal", title="mean error of every landmark, on the mean face")
    axes.invert_yaxis()
    axes.axis("off")
    figure.colorbar(dots, label=f"{main}, %", shrink=0.8)


# ---------------------------------------------------------------- tables

def as_table(report: dict) -> bytes:
    """report.csv: one row for all faces, every region, kind of ear, pose, landmark, breed and face."""
    total = sum(row["labelled"] for row in report["face"])
    whole = {name: report[name] for name in ("faces", "faces_by_main", "standard_error")}
    rows = [{"group": "all", "name": "all", "labelled": total, **whole, **report["metrics"]}]
    for group in GROUPS:
        rows += [{"group": group, "name": name, **row} for name, row in report[group].items()]
    rows += [{"group": "face", "name": row["file"], **row} for row in report["face"]]
    columns = ["faces", "faces_by_main", "labelled", *report["metrics"], "standard_error", "along", "across"]
    return as_csv(["group", "name", *columns, "id"], rows)


def html_table(title: str, rows: list[dict]) -> str:
    """A table of [{column: value}, ...] with its heading."""
    text = {c: ' class="text"' if any(isinstance(row[c], str) for row in rows) else "" for c in rows[0]}
    head = "".join(f"<th{text[c]}>{escape(str(c))}</th>" for c in rows[0])
    body = "".join("<tr>" + "".join(f"<td{text[c]}>{escape(show(v))}</td>" for c, v in row.items()) + "</tr>"
                   for row in rows)
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def as_html(report: dict, pictures: dict[str, bytes]) -> bytes:
    """One page that needs no other file; every text from outside is escaped."""
    main = report["main"]
    metrics = {**report["metrics"], "standard_error": report["standard_error"],
               f"faces with {main}": report["faces_by_main"]}
    parts = [f"<h1>{len(report['face'])} faces of {escape(report['ann'])}</h1>",
             f"<p>{escape(report['source'])}</p>", html_table("All faces", [metrics]), "<dl>"]
    parts += [f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in report["definitions"].items()] + ["</dl>"]
    for name, content in pictures.items():
        kind = "jpeg" if name.endswith(".jpg") else "png"
        wide = ' class="wide"' if name == "worst.jpg" else ""
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        parts.append(f'<figure{wide}><img alt="{name}" src="{source}"></figure>')
    worst = sorted((r for r in report["face"] if r[main] is not None), key=lambda r: -r[main])[:20]
    tables = [("Worst faces", worst)]
    tables += [(f"By {g}", [{g: k, **v} for k, v in report[g].items()]) for g in GROUPS]
    if certain := report["reliability"]:
        title = f"Scores, expected calibration error {show(certain['calibration_error'])}"
        tables.insert(4, (title, certain["bins"]))
    parts += [html_table(title, rows) for title, rows in tables if rows]
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(parts)}</html>'.encode()


def print_report(report: dict):
    """The report in the terminal: all faces, regions, kinds of ear, poses, scores."""
    main, metrics = report["main"], report["metrics"]
    print("  ".join(f"{k} {show(v)}" for k, v in metrics.items()), f" (the last four by {main}; "
          f"standard error of {main} {show(report['standard_error'])})")
    if report["faces_by_main"] < report["faces"]:
        print(f"{main} counts {report['faces_by_main']} of {report['faces']} faces: the others lack the "
              "labels that it needs, or have both interocular landmarks in one place")
    for group in ("region", "ear", "pose"):
        for name, row in report[group].items():
            outline = "" if row.get("along") is None else (
                f"  along outlines {show(row['along'])}, across {show(row['across'])}")
            what = f"{printable(name)} ears" if group == "ear" else printable(name)
            print(f"  {what:<12} {main} {show(row[main])}  ({row['labelled']} landmarks){outline}")
    if certain := report["reliability"]:
        print(f"scores, expected calibration error {show(certain['calibration_error'])}; landmarks within "
              f"{certain['radius']} of the crop:")
        for row in certain["bins"]:
            print(f"  {row['from']:.1f} to {row['to']:.1f}  mean score {row['score']:.3f}, within "
                  f"{row['within']:.3f}  ({row['landmarks']} landmarks)")
