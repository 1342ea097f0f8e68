"""Shared by the tests: scripts run as users run them, on a small drawn sample and a checkpoint trained on it."""
import csv
import gc
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_simple as trainer
from tools.lib.checkpoints import load_checkpoint
from tools.lib.cli import run_script
from tools.lib.files import atomic_write, file_lock

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that the tests start
torch.set_num_threads(1)  # they need the other cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's "&" takes away
ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--no-pretrained", "--backbone", "hrnet_w18_small", "--input-size", 64, "--num-workers", 0,
         "--device", "cpu", "--no-amp")
LIGHT = ("--backbone", "mobilenetv3_small_050")  # beside SMALL, where the network does not matter: a fifth of the time
# Processes are forked from one that has imported the slow libraries: a cold start takes longer than most run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "train_simple", "matplotlib.figure", "matplotlib.backends.backend_agg"])


def pytest_collection_finish():
    """What is imported by now stays: each gc.collect() would take half a second to look through it."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else some libraries report leaks at the end


def as_script(name, argv, out, err):
    """In the forked process: what `python NAME ARGV >out 2>err` does."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    multiprocessing.set_start_method(None, force=True)  # the platform's own for workers, as in a fresh process
    sys.argv = [name, *argv]
    runpy.run_path(str(ROOT / name), run_name="__main__")


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start a script of the project as a process of its own, with its output in the files .out and .err."""
    def start(name, *args):
        log = tmp_path_factory.mktemp("log")
        files = [log / "out", log / "err"]
        for path in files:
            path.touch()
        process = FORKS.Process(target=as_script, args=(name, list(map(str, args)), *files))
        process.start()
        process.out, process.err = files
        return process
    return start


@pytest.fixture(scope="session")
def script(start):
    """Run a script of the project to its end; its exit code and output as text."""
    def run(name, *args, check=False):
        process = start(name, *args)
        process.join(300)
        process.kill()
        process.join()
        out, err = process.out.read_text(), process.err.read_text()
        assert "Traceback" not in err and process.exitcode >= 0, err
        assert not check or process.exitcode == 0, err
        return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)
    return run


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process leaves its answers to signals behind; here they go."""
    before = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run train_simple.py, which must end with one line of error and exit code 2; returns the line.

    In this process: importing torch and timm anew would cost several seconds a mistake.
    """
    def check(*args, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_script(lambda: trainer.main(list(map(str, args))))
        code, lines = end.value.code, capsys.readouterr().err.strip().splitlines()
        del end
        gc.collect()  # the traceback holds the run's lock
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return check


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): what make(folder) returns, made by the first of pytest-xdist's workers for all of them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make):
        folder = base / f"shared_{name}"
        with file_lock(base / f"{name}.lock"):
            if not (folder / "made").exists():
                folder.mkdir()
                atomic_write(folder / "made", [pickle.dumps(make(folder))])
        return pickle.loads((folder / "made").read_bytes())
    return once


@pytest.fixture(scope="session")
def sample(script, once):
    """40 + 12 drawn faces, converted: .data_root, .ann_root."""
    def make(folder):
        script("tools/make_sample_dataset.py", "--out", folder / "dogflw", "--train", 40, "--test", 12, check=True)
        script("tools/convert_dogflw_to_coco.py", "--dogflw_root", folder / "dogflw", "--out_dir", folder / "ann", check=True)
        return SimpleNamespace(data_root=folder / "dogflw", ann_root=folder / "ann")
    return once("sample", make)


@pytest.fixture(scope="session")
def flags(sample):
    """train_simple.py's arguments for a small run on the sample, the work dir aside; more may follow."""
    return ["--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL,
            "--cache", sample.data_root.parent / "cache", "--epochs", 2, "--batch-size", 8]


@pytest.fixture(scope="session")
def train(script, flags):
    """Run train_simple.py with small settings; more flags may follow."""
    def run(work_dir, *args, check=False):
        return script("train_simple.py", *flags, "--work-dir", work_dir, *args, check=check)
    return run


@pytest.fixture(scope="session")
def finished(sample, train, once):
    def finished(name, *args):
        def make(folder):
            begin = time.perf_counter()
            train(folder / "small", *args, check=True)
            return SimpleNamespace(work_dir=folder / "small", seconds=time.perf_counter() - begin, **vars(sample))
        return once(name, make)
    return finished


@pytest.fixture(scope="session")
def run(finished):
    """A finished two-epoch run: .work_dir with best_model.pth, .data_root, .ann_root, .seconds it took."""
    return finished("run")


@pytest.fixture(scope="session")
def light(finished):
    """The same of the LIGHT network."""
    return finished("light", *LIGHT)


def rows(work_dir):
    """metrics.csv less what a clock decides."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")}
            for row in csv.DictReader((work_dir / "metrics.csv").read_text().splitlines())]


def weights(path):
    """The tensors of a checkpoint: the model's, and, in last.pth, the raw ones and the optimizer's."""
    checkpoint = load_checkpoint(path)
    moments = checkpoint.get("optimizer", {"state": {}})["state"]
    return {**checkpoint["model"], **{f"raw.{k}": v for k, v in checkpoint.get("raw", {}).items()},
            **{f"{name}.{i}": v for i, state in moments.items() for name, v in state.items() if v is not None}}


def assert_same_run(a, b):
    """Two runs ended with the same weights, moments and metrics, bit for bit."""
    assert rows(a) == rows(b)
    for name in ("last.pth", "best_model.pth"):
        ours, theirs = weights(a / name), weights(b / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), name


def wait_for(process, text):
    """Wait until a process has printed something."""
    while text not in process.out.read_text():
        assert process.is_alive(), process.err.read_text()
        time.sleep(0.01)


def workers_of(pid):
    """The ids of the processes that work for a process: its children, or since Python 3.14 those of its fork server."""
    below = [int(p) for file in Path(f"/proc/{pid}/task").glob("*/children") for p in file.read_text().split()]
    ends = [end for p in below for end in (workers_of(p) or [p])]
    return [p for p in ends if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes()]


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
