"""Shared by the tests: scripts run as users run them, on a small drawn sample and a checkpoint trained on it."""
import csv
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dataset as data
import train_simple as trainer

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that the tests start
torch.set_num_threads(1)  # they need the other cores
ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--no-pretrained", "--backbone", "hrnet_w18_small", "--input-size", 64, "--num-workers", 0, "--device", "cpu", "--no-amp")
# Processes are forked from one that has imported the slow libraries: a cold start takes longer than most of them run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "train_simple", "matplotlib.figure", "matplotlib.backends.backend_agg"])


def as_script(name, argv, out, err, cache):
    """In the forked process: what `python NAME ARGV >out 2>err` does, with another folder for the face cache."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    data.Windows.__init__.__defaults__ = ("none", cache)
    multiprocessing.set_start_method(None, force=True)  # the platform's own for workers, as in a fresh process
    sys.argv = [name, *argv]
    runpy.run_path(str(ROOT / name), run_name="__main__")


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start a script of the project as a process of its own, with its output in the files .out and .err."""
    shared = tmp_path_factory.mktemp("cache")

    def start(name, *args, cache=shared):
        log = tmp_path_factory.mktemp("log")
        files = [log / "out", log / "err"]
        for path in files:
            path.touch()
        process = FORKS.Process(target=as_script, args=(name, list(map(str, args)), *files, cache))
        process.start()
        process.out, process.err = files
        return process
    return start


@pytest.fixture(scope="session")
def script(start):
    """Run a script of the project to its end; its exit code and output as text."""
    def run(name, *args, check=False, **options):
        process = start(name, *args, **options)
        process.join(300)
        process.kill()
        process.join()
        out, err = process.out.read_text(), process.err.read_text()
        assert "Traceback" not in err and process.exitcode >= 0, err
        assert not check or process.exitcode == 0, err
        return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)
    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run train_simple.py, which must end with one line of error and exit code 2; returns the line.

    In this process: importing torch and timm anew would cost several seconds a mistake.
    """
    def check(*args, **environment):
        handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            data.run_script(lambda: trainer.main(list(map(str, args))))
        for number, handler in handlers:
            signal.signal(number, handler)
        code, lines = end.value.code, capsys.readouterr().err.strip().splitlines()
        del end
        gc.collect()  # the traceback holds the run's lock
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return check


@pytest.fixture(scope="session")
def sample(script, tmp_path_factory):
    """40 + 12 drawn faces, converted: .data_root, .ann_root."""
    folder = tmp_path_factory.mktemp("sample")
    script("tools/make_sample_dataset.py", "--out", folder / "dogflw", "--train", 40, "--test", 12, check=True)
    script("tools/convert_dogflw_to_coco.py", "--dogflw_root", folder / "dogflw", "--out_dir", folder / "ann", check=True)
    return SimpleNamespace(data_root=folder / "dogflw", ann_root=folder / "ann")


@pytest.fixture(scope="session")
def flags(sample):
    """train_simple.py's arguments for a small run on the sample, the work dir aside; more may follow."""
    return ["--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL, "--cache", "ram", "--epochs", 2,
            "--batch-size", 8]


@pytest.fixture(scope="session")
def train(script, flags):
    """Run train_simple.py with small settings; more flags may follow."""
    def run(work_dir, *args, **options):
        return script("train_simple.py", *flags, "--work-dir", work_dir, *args, **options)
    return run


@pytest.fixture(scope="session")
def run(sample, train, tmp_path_factory):
    """A finished two-epoch run: .work_dir with best_model.pth, .data_root, .ann_root, .seconds it took."""
    work_dir, begin = tmp_path_factory.mktemp("runs") / "small", time.perf_counter()
    train(work_dir, check=True)
    return SimpleNamespace(work_dir=work_dir, seconds=time.perf_counter() - begin, **vars(sample))


def rows(work_dir):
    """metrics.csv less what a clock decides."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")}
            for row in csv.DictReader((work_dir / "metrics.csv").read_text().splitlines())]


def weights(path):
    checkpoint = trainer.load_checkpoint(path)
    return {**checkpoint["model"], **checkpoint.get("raw", {})}


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    for name in ("last.pth", "best_model.pth"):
        ours, theirs = weights(a / name), weights(b / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), name


def wait_for(process, text):
    """Wait until a process has printed something."""
    while text not in process.out.read_text():
        assert process.is_alive(), process.err.read_text()
        time.sleep(0.01)


def children(pid):
    """The process ids of a process's children."""
    return [int(p) for file in Path(f"/proc/{pid}/task").glob("*/children") for p in file.read_text().split()]


def ended(process, code=2):
    """The one line of error with which a process ends."""
    try:
        process.join(60)
    finally:
        process.kill()
        process.join()
    lines = process.err.read_text().splitlines()
    assert process.exitcode == code and len(lines) == 1 and lines[0].startswith("error: "), (process.exitcode, lines)
    return lines[0]
