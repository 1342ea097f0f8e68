"""Shared by the tests: scripts run as users run them, on a small drawn sample and a checkpoint trained on it."""
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)  # the scripts that the tests start need the other cores
ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--no-pretrained", "--backbone", "hrnet_w18_small", "--input-size", 64, "--num-workers", 0, "--device", "cpu", "--no-amp")


def run_script(name, *args, check=False, **environment):
    """Run a script of the project as a process of its own; its output as text."""
    result = subprocess.run([sys.executable, ROOT / name, *map(str, args)], capture_output=True, text=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "", **environment})
    assert "Traceback" not in result.stderr, result.stderr
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def script():
    return run_script


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run train_simple.py, which must end with one line of error and exit code 2; returns the line.

    In this process: importing torch and timm anew would cost several seconds a mistake.
    """
    import train_simple
    from dataset import run_script as edge

    def check(*args, **environment):
        handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            edge(lambda: train_simple.main(list(map(str, args))))
        for number, handler in handlers:
            signal.signal(number, handler)
        code, lines = end.value.code, capsys.readouterr().err.strip().splitlines()
        del end
        gc.collect()  # the traceback holds the run's lock
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return check


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """40 + 12 drawn faces, converted: .data_root, .ann_root."""
    folder = tmp_path_factory.mktemp("sample")
    run_script("tools/make_sample_dataset.py", "--out", folder / "dogflw", "--train", 40, "--test", 12, check=True)
    run_script("tools/convert_dogflw_to_coco.py", "--dogflw_root", folder / "dogflw", "--out_dir", folder / "ann", check=True)
    return SimpleNamespace(data_root=folder / "dogflw", ann_root=folder / "ann")


@pytest.fixture(scope="session")
def train(sample):
    """Run train_simple.py on the sample with small settings; more flags may follow."""
    def run(work_dir, *args, **kwargs):
        return run_script("train_simple.py", "--data-root", sample.data_root, "--ann-root", sample.ann_root,
                          "--work-dir", work_dir, *SMALL, "--cache", "ram", *args, **kwargs)
    return run


@pytest.fixture(scope="session")
def run(sample, train, tmp_path_factory):
    """A finished two-epoch run: .work_dir with best_model.pth, .data_root, .ann_root."""
    work_dir = tmp_path_factory.mktemp("runs") / "small"
    train(work_dir, "--epochs", 2, "--batch-size", 8, check=True)
    return SimpleNamespace(work_dir=work_dir, **vars(sample))
