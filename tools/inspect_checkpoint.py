"""What is in a checkpoint, and what differs between several. Runs no code out of a file.

    python tools/inspect_checkpoint.py work_dirs/hrnet_w32
    python tools/inspect_checkpoint.py work_dirs/first work_dirs/second/epoch_20.pth --plot curves.png

A PATH is a checkpoint, or a run's folder, which stands for its best_model.pth. Curves come from metrics.csv beside it.
"""
import csv
from pathlib import Path

from dataset import Parser, UserError, printable, run_script
from train_simple import COLUMNS, load_model, plot_curves


def show(value):
    """A value of a checkpoint as one short piece of a line, whatever a stranger put there."""
    text = f"{value:.4g}" if isinstance(value, float) else printable(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_run(path):
    """What there is to say about one PATH."""
    file = path / "best_model.pth" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(f"{path}: no best_model.pth in it; name a run's folder or a checkpoint")
    model, scheme, args, checkpoint = load_model(file)  # also proves that weights, scheme and settings fit together
    versions = checkpoint.get("versions")
    return {"path": file, "scheme": scheme, "args": args, "versions": versions if isinstance(versions, dict) else {},
            "metrics": checkpoint["metrics"], "summary": {
                "epoch": f"{show(checkpoint.get('epoch'))} of {show(args.get('epochs'))}",
                **{k: show(checkpoint["metrics"].get(k, "-")) for k in ("nme", "nme_iod", "val_loss", "train_loss", "chosen_on")},
                "backbone": show(args["backbone"]), "input": show(args["input_size"]), "landmarks": str(len(scheme.names)),
                "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                "file": f"{file.stat().st_size / 1e6:.1f} MB"}}


def read_curves(checkpoint):
    """The rows of metrics.csv beside a checkpoint."""
    path = checkpoint.with_name("metrics.csv")
    try:
        with open(path, newline="", encoding="utf-8") as f:
            return [{k: float(row[k]) for k in COLUMNS} for row in csv.DictReader(f)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --plot draws the curves in it") from None
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(f"{path}: not a run's metrics.csv ({show(str(e))})") from None


def print_table(header, rows):
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def print_one(run):
    for title, values in (("", run["summary"]), ("settings", run["args"]), ("versions", run["versions"]),
                          ("landmarks by region", {name: " ".join(map(str, index)) or "-" for name, index in
                                                   run["scheme"].regions.items()})):
        print(f"\n{title}" if title else run["path"])
        for name, value in values.items():
            print(f"  {show(name):<16} {show(value)}")


def print_several(names, runs):
    columns = list(runs[0]["summary"])
    print_table(["run", *columns], [[show(n), *run["summary"].values()] for n, run in zip(names, runs, strict=True)])
    different = []
    for kind in ("args", "versions"):
        for key in dict.fromkeys(k for run in runs for k in run[kind]):
            values = [show(run[kind].get(key, "-")) for run in runs]
            if len({repr(run[kind].get(key)) for run in runs}) > 1:
                different.append([show(key), *values])
    if len({tuple(run["scheme"].names) for run in runs}) > 1:
        different.append(["landmarks' names", *(show(" ".join(run["scheme"].names)) for run in runs)])
    print(f"\n{'what differs' if different else 'all settings, versions and landmarks are the same'}")
    if different:
        print_table(["", *map(show, names)], different)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a checkpoint, or a run's folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves of all runs into one picture")
    parser.add_argument("--force", action="store_true", help="write over FILE.png")
    args = parser.parse_args(argv)
    if args.plot and args.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {args.plot}: must end in .png")
    if args.plot and args.plot.exists() and not args.force:
        raise UserError(f"--plot {args.plot}: exists; write over it with --force")
    runs = [read_run(path) for path in args.paths]
    names = [p.resolve().name if p.is_dir() else f"{p.resolve().parent.name}/{p.name}" for p in args.paths]
    if len(set(names)) < len(names):
        names = [str(p) for p in args.paths]
    if len(runs) == 1:
        print_one(runs[0])
    else:
        print_several(names, runs)
    if args.plot:
        if not plot_curves(args.plot, {name: read_curves(run["path"]) for name, run in zip(names, runs)}):
            raise UserError("--plot: needs matplotlib; pip install matplotlib")
        print(f"\ncurves: {args.plot}")


if __name__ == "__main__":
    run_script(main)
