"""Show what is in a checkpoint, or what differs between several. Runs no code from the files.

    uv run tools/inspect_checkpoint.py                                      # the bundled model
    uv run tools/inspect_checkpoint.py --checkpoint work_dirs/hrnet_w32
    uv run tools/inspect_checkpoint.py --checkpoint work_dirs/a work_dirs/b/epoch_20.pth --plot c.png

A run's folder stands for its best_model.pth. Curves come from the metrics.csv beside a checkpoint; "test"
errors, on faces that did not choose the epoch, come from the test.json beside it.
"""
import argparse
import csv
from dataclasses import asdict
from pathlib import Path

from tools.lib.checkpoints import load_checkpoint, tested_once
from tools.lib.cli import Parser, UserError, printable, run_script
from tools.lib.draw import all_regions, plot_curves
from tools.lib.files import check_new
from tools.lib.find import checkpoint_file
from train_simple import METRICS, Trained

CURVES = ("train_loss", "val_loss", *METRICS)


def show(value: object) -> str:
    """A value of a checkpoint as a short text for one line, whatever someone has put there."""
    text = f"{value:.4g}" if isinstance(value, float) else printable(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_run(path: Path) -> dict:
    """What there is to say about one checkpoint or run's folder."""
    file = checkpoint_file(path)
    trained = Trained(file)  # also proves that weights, scheme and settings fit together
    stored, metrics, size = load_checkpoint(file), trained.metrics, file.stat().st_size
    versions = stored.get("versions")
    parameters = sum(p.numel() for p in trained.model.parameters())
    values = {k: show(metrics.get(k, "-")) for k in (*METRICS, "val_loss", "train_loss", "chosen_on")}
    values |= {f"test {k}": show(v) for k, v in tested_once(file).items() if k in METRICS and v is not None}
    return {"path": file, "scheme": trained.scheme, "args": stored["args"],
            "versions": versions if isinstance(versions, dict) else {}, "summary": {
                "epoch": f"{show(trained.epoch)} of {show(stored['args'].get('epochs'))}", **values,
                "backbone": show(trained.config.backbone), "input": show(trained.size),
                "landmarks": str(len(trained.scheme.names)), "parameters": f"{parameters / 1e6:.2f} M",
                "file": f"{size / 1e6:.1f} MB"}}


def read_curves(checkpoint: Path) -> list[dict]:
    """The rows of metrics.csv beside a checkpoint."""
    path = checkpoint.with_name("metrics.csv")
    try:
        with open(path, newline="", encoding="utf-8") as f:
            return [{k: float(row[k] or "nan") for k in ("epoch", *CURVES) if k == "epoch" or k in row}
                    for row in csv.DictReader(f)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --plot draws the curves in it") from None
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(f"{path}: not a run's metrics.csv ({show(str(e))}); leave --plot out") from None


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their longest cell."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())


def print_one(run: dict) -> None:
    """Print everything that one checkpoint holds, except the weights."""
    names = run["scheme"].names
    print(run["path"])
    for title, values in (("", run["summary"]), ("settings", run["args"]), ("versions", run["versions"])):
        if title:
            print(f"\n{title}")
        for name, value in values.items():
            print(f"  {show(name):<16} {show(value)}")
    print("\nlandmarks by region")
    for name, index in all_regions(run["scheme"]).items():
        print(f"  {show(name):<16} {', '.join(f'{i} {show(names[i])}' for i in index)}")


def print_several(names: list[str], runs: list[dict]) -> None:
    """A table of the runs, and what differs between their settings, versions and landmarks."""
    columns = list(dict.fromkeys(name for run in runs for name in run["summary"]))
    print_table(["run", *columns], [[show(n), *(run["summary"].get(name, "-") for name in columns)]
                                    for n, run in zip(names, runs)])
    different = []
    for kind in ("args", "versions"):
        for key in dict.fromkeys(k for run in runs for k in run[kind]):
            if len({repr(run[kind].get(key)) for run in runs}) > 1:
                different.append([show(key), *(show(run[kind].get(key, "-")) for run in runs)])
    if len({repr(asdict(run["scheme"])) for run in runs}) > 1:
        different.append(["landmarks", *(show(" ".join(run["scheme"].names)) for run in runs)])
    print(f"\n{'what differs' if different else 'all settings, versions and landmarks are the same'}")
    if different:
        print_table(["", *map(show, names)], different)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line; args.paths are the checkpoints. Raises UserError."""
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], metavar="FILE",
                        help="one or several checkpoints, or runs' folders (default: the bundled model)")
    parser.add_argument("paths", type=Path, nargs="*", help=argparse.SUPPRESS)  # the same without the flag
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="draw the curves of all runs into one picture")
    parser.add_argument("--force", action="store_true", help="write over FILE.png")
    args = parser.parse_args(argv)
    if args.plot and args.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {args.plot}: must end in .png")
    if args.plot:
        check_new("--plot", args.force, args.plot)
    args.paths = [*args.checkpoint, *args.paths] or [checkpoint_file(None)]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    runs = [read_run(path) for path in args.paths]
    names = [p.resolve().name if p.is_dir() else f"{p.resolve().parent.name}/{p.name}" for p in args.paths]
    if len(set(names)) < len(names):
        names = [str(p) for p in args.paths]
    if len(runs) == 1:
        print_one(runs[0])
    else:
        print_several(names, runs)
    if args.plot:
        curves = {name: read_curves(run["path"]) for name, run in zip(names, runs)}
        if not plot_curves(args.plot, curves, METRICS):
            raise UserError("--plot: needs matplotlib; pip install matplotlib")
        print(f"\ncurves: {args.plot}")


if __name__ == "__main__":
    run_script(main)
