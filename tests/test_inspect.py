"""What is in checkpoints; no code of theirs runs."""
import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch

from tools import inspect_checkpoint as tool
from tools.lib.cli import UserError
from tools.lib.pictures import read_image


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """The run again, with other settings, versions and metrics."""
    folder = tmp_path_factory.mktemp("others") / "_second $run"
    folder.mkdir()
    table = (run.work_dir / "metrics.csv").read_text().splitlines()
    table[1] = ",".join([*table[1].split(",")[:-2], "", ""])  # as where a metric was added in the middle of a run
    (folder / "metrics.csv").write_text("\n".join(table))
    checkpoint = torch.load(run.work_dir / "best_model.pth", weights_only=True)
    checkpoint["args"] |= {"seed": 41, "note": "line\n\x1b[31mred"}
    checkpoint["versions"]["torch"] = "0.0.1"
    checkpoint["metrics"]["nme"] = 0.0123
    torch.save(checkpoint, folder / "best_model.pth")
    return folder


def test_one(run, script):
    result = script("tools/inspect_checkpoint.py", run.work_dir)
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(None, 1) for line in result.stdout.splitlines() if len(line.split(None, 1)) == 2)
    checkpoint = torch.load(run.work_dir / "best_model.pth", weights_only=True)
    assert facts["nme"] == f"{checkpoint['metrics']['nme']:.4g}" and facts["chosen_on"] == "val.json"
    assert re.search(r"^ *landmarks +46$", result.stdout, re.M)
    buffers = ("_mean", "_var", "_tracked")
    parameters = sum(v.numel() for k, v in checkpoint["model"].items() if k not in ("mean", "std") and
                     not k.endswith(buffers))
    assert facts["parameters"] == f"{parameters / 1e6:.2f} M"
    assert facts["batch_size"] == "8" and facts["input_size"] == "64"
    assert facts["torch"] == checkpoint["versions"]["torch"]
    names = checkpoint["scheme"]["names"]
    assert facts["eye"] == ", ".join(f"{i} {names[i]}" for i in range(16, 24))


def test_several_and_their_curves(run, other, tmp_path, capsys):
    plot = tmp_path / "curves.png"
    several = [str(run.work_dir), str(other), str(run.work_dir / "last.pth")]
    tool.main(["--checkpoint", *several, "--plot", str(plot)])
    text = capsys.readouterr().out
    table, differing = text.split("what differs")
    assert "0.0123" in table and "small/last.pth" in table and "_second $run" in table
    lines = [line.split() for line in differing.splitlines()]
    assert ["seed", "0", "41", "0"] in lines and sum(line[:1] == ["lr"] for line in lines) == 0
    assert next(line for line in lines if line[:1] == ["torch"])[2] == "0.0.1"
    note = next(line for line in lines if line[:1] == ["note"])
    assert note == ["note", "-", "line??[31mred", "-"]  # no control codes
    assert read_image(plot).shape[1] > 1000
    with pytest.raises(UserError, match="exists; write over it with --force, or name another --plot"):
        tool.main([str(run.work_dir), "--plot", str(plot)])
    tool.main([str(run.work_dir), str(run.work_dir), "--plot", str(plot), "--force"])
    assert "are the same" in capsys.readouterr().out


def test_errors_on_faces_that_chose_nothing_are_told_apart(run, other, tmp_path, capsys):
    shutil.copytree(run.work_dir, held := tmp_path / "held")
    (held / "test.json").write_text(json.dumps({"faces": 12, "chosen_on": "faces held out of train", "nme": 0.0456, "nme_iod": None}))
    tool.main([str(held)])
    assert re.search(r"^ *test nme +0.0456$", text := capsys.readouterr().out, re.M) and "test nme_iod" not in text
    tool.main([str(other), str(held), str(held / "last.pth")])
    head, _, first, second, last, *_ = capsys.readouterr().out.splitlines()
    at = head.index("test nme")
    assert [line[at:].split()[0] for line in (first, second, last)] == ["-", "0.0456", "-"]


def test_without_arguments_the_model_in_the_box(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.lib.find.BUNDLED", run.work_dir / "best_model.pth")
    tool.main([])
    assert capsys.readouterr().out.startswith(str(run.work_dir / "best_model.pth"))
    monkeypatch.setattr("tools.lib.find.BUNDLED", tmp_path / "no.pth")
    with pytest.raises(UserError, match="no bundled model"):
        tool.main([])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_plot_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="^--plot: needs matplotlib; pip install matplotlib$"):
        tool.main([str(run.work_dir), "--plot", str(tmp_path / "x.png")])


def test_runs_no_code_and_refuses_in_one_line(run, other, tmp_path):
    hostile, broken, empty = tmp_path / "hostile.pth", tmp_path / "broken.pth", tmp_path / "empty"
    torch.save({"format": 1, "model": Payload(tmp_path / "owned")}, hostile)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    broken.write_bytes((run.work_dir / "best_model.pth").read_bytes()[:5000])
    empty.mkdir()
    alone = tmp_path / "alone.pth"
    shutil.copy(other / "best_model.pth", alone)
    for args, message in (
            ([hostile], "holds more than tensors.*Nothing in it was run"), ([tmp_path / "plain.pth"], "Nothing in it was run"),
            ([broken], "broken.pth: not loaded"), ([empty], "no best_model.pth in it"),
            ([tmp_path / "no"], "no such file"),
            ([run.work_dir / "metrics.csv"], "damaged, or no checkpoint"), ([run.work_dir / "train_batch.jpg"], "damaged, or no checkpoint"), ([run.work_dir, hostile], "Nothing"),
            (["--bogus"], "--help"),
            ([run.work_dir, "--plot", tmp_path / "x.txt"], "must end in .png"),
            ([alone, "--plot", tmp_path / "x.png"], "metrics.csv: no such file")):
        with pytest.raises(UserError, match=message) as e:
            tool.main([str(a) for a in args])
        assert "\n" not in str(e.value)
    assert not (tmp_path / "owned").exists() and not (tmp_path / "x.png").exists()
