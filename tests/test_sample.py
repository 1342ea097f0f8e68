"""The drawn sample: DogFLW's layout, its defects, and the same bytes whatever the number of processes."""
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import workers_of
from PIL import Image

from tools import make_sample_dataset as tool
from tools.lib import files
from tools.lib.cli import UserError

TRAIN, TEST = 30, 4


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "dogflw"
    tool.make_sample(out, TRAIN, TEST, seed=3, workers=1)
    return out


def labels(sample, split):
    """[(picture size, landmarks (46, 2), box or None)] of one split."""
    rows = []
    for file in sorted(sample.glob(f"{split}/labels/*.json")):
        label = json.loads(file.read_text())
        assert sorted(label) == ["bounding_boxes", "landmarks"]
        box = label["bounding_boxes"]
        assert len(box) == 4 and all(isinstance(v, str) for v in box)
        with Image.open(sample / split / "images" / f"{file.stem}.png") as picture:
            size = np.array(picture.size)
        rows.append((size, np.array(label["landmarks"], float), None if "" in box else np.array(box, float)))
    return rows


def iou(points, box):
    return tool.overlap(np.concatenate([points.min(0), points.max(0)]), box)


def test_landmarks_are_where_they_are_drawn():
    """The nostrils are dark, and beside them the face is not."""
    dark, beside = [], []
    for i in range(12):
        _, picture, label = tool.draw_sample(3, i)
        for x, y in np.round(np.array(label["landmarks"], float)[[33, 34]]).astype(int):
            dark.append(picture[y, x].max())
            beside.append(picture[y + 6, x].max())
    assert np.median(dark) < 20 < np.median(beside), (dark, beside)


def test_layout(sample):
    assert sorted(p.name for p in sample.iterdir()) == ["test", "train"]
    assert [p.name for p in sample.parent.iterdir()] == ["dogflw"]  # nothing temporary is left
    for split, count in (("train", TRAIN), ("test", TEST)):
        stems = [sorted(p.stem for p in (sample / split / kind).iterdir()) for kind in ("images", "labels")]
        assert stems[0] == stems[1] and len(stems[0]) == count
        assert all(stem.split("_")[0][0] == "s" and len(stem.split("_")[0]) == 9 for stem in stems[0])


def test_landmarks_are_in_the_picture_and_left_is_left(sample):
    for size, points, _ in labels(sample, "train") + labels(sample, "test"):
        assert points.shape == (46, 2)
        points = points[np.isfinite(points).all(1)]
        assert len(points) >= 44
        assert (points > -2).all() and (points < size + 1).all()
    finite = [p for _, p, _ in labels(sample, "train") if np.isfinite(p).all()]
    for left in (0, 6, 12, 16, 18, 26, 39):
        assert all(p[left, 0] < p[left + 1, 0] for p in finite)


def test_every_defect_is_there(sample):
    train, test = labels(sample, "train"), labels(sample, "test")
    whole = [np.isfinite(points).all() for _, points, _ in train]
    assert whole.count(False) == 2 and all(np.isfinite(points).all() for _, points, _ in test)
    assert [sum(box is None for *_, box in rows) for rows in (train, test)] == [2, 1]
    assert sum(((p < 0) | (p > size - 1)).any() for size, p, _ in train) == 2
    fits = [iou(p, box) for _, p, box in train if box is not None and np.isfinite(p).all()]
    assert sum(fit == 0 for fit in fits) == 1 and sum(0 < fit < 0.3 for fit in fits) == 1
    assert all(iou(p, box) > 0.75 for _, p, box in test if box is not None)
    assert sum(fit > 0.75 for fit in fits) == len(fits) - 2
    spoilt = list(tool.plan_defects(np.random.default_rng(0), 600, 100).values())  # the default size, as in DogFLW
    assert [spoilt.count(d) for d in ("empty", "nan", "mismatch", "apart", "outside")] == [3, 2, 19, 4, 4]


def test_same_bytes_with_other_workers(script, tmp_path):
    tool.make_sample(tmp_path / "one", 6, 2, seed=3, workers=1)
    flags = ["--out", tmp_path / "three", "--train", 6, "--test", 2, "--seed", 3, "--workers", 3]
    done = script("tools/make_sample_dataset.py", *flags, check=True)
    assert len(done.stdout.splitlines()) == 1 and not done.stderr
    one, three = ({p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*.*")} for out in ("one", "three"))
    assert one == three and len(one) == 16


def test_faces_differ(sample):
    faces = [p for _, p, _ in labels(sample, "train") if np.isfinite(p).all()]
    span = [math.dist(p[18], p[19]) for p in faces]
    ears = np.array([(p[[6, 7]] - p[[18, 19]]) / s for p, s in zip(faces, span)])
    assert ears.std(0).min() > 0.1 and np.corrcoef(ears[:, 0, 1], ears[:, 1, 1])[0, 1] < 0.97


@pytest.mark.parametrize("flags", [["--train 0: must be from 1 to 1000000", "--train", "0"], ["--test -1: must be from 0", "--test", "-1"],
                                   ["--workers 0: must be from 1", "--workers", "0"], ["--seed", "--seed", "x"]])
def test_bad_flags(monkeypatch, tmp_path, flags):
    wanted, *flags = flags
    monkeypatch.setattr(sys, "argv", ["make_sample_dataset.py", "--out", str(tmp_path / "new"), *flags])
    with pytest.raises(UserError, match=wanted):
        tool.main()
    assert not (tmp_path / "new").exists()


def test_force_replaces_a_sample_and_nothing_else(monkeypatch, tmp_path):
    out = tmp_path / "dogflw"
    argv = ["make_sample_dataset.py", "--out", str(out), "--train", "1", "--test", "0", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    tool.main()
    with pytest.raises(UserError, match="not empty"):
        tool.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--force"])
    tool.main()
    for mine in ("train/images/n02085620_1073.png", "train/images/shiba_1.png", "notes.txt", "train/images/mine/s02000001_1.png"):
        (out / mine).parent.mkdir(exist_ok=True)
        (out / mine).write_text("keep me")
        with pytest.raises(UserError, match="more than a drawn sample"):
            tool.main()
        (out / mine).unlink()


def test_there_are_no_more_threads_and_processes_than_cores_for_this_one(monkeypatch, tmp_path):
    """A cluster or taskset gives a process fewer than the machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 99)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    pools, pool = [], files.ThreadPoolExecutor
    monkeypatch.setattr(files, "ThreadPoolExecutor", lambda number: pools.append(number) or pool(number))
    assert list(files.in_threads(str, 3, "numbers")) == ["0", "1", "2"] and pools == [1]
    monkeypatch.setattr(tool.multiprocessing, "Pool", lambda *_: pytest.fail("more than one process"))
    tool.make_sample(tmp_path / "two", 1, 1)
    monkeypatch.setattr(sys, "argv", ["make_sample_dataset.py", "--out", str(tmp_path / "three"), "--train", "2", "--test", "1"])
    tool.main()
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    assert files.cores() == 99
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert files.cores() == 1


def test_interrupted_run_leaves_nothing(monkeypatch, tmp_path):
    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "write_sample", stop)
    with pytest.raises(KeyboardInterrupt):
        tool.make_sample(tmp_path / "dogflw", 2, 0, workers=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_drawing_that_is_stopped_says_one_word_and_leaves_nothing(start, tmp_path, number):
    """Ctrl-C reaches the workers, too; a parent that is killed leaves them to end by themselves."""
    process = start("tools/make_sample_dataset.py", "--out", tmp_path / "dogs", "--train", 2000, "--workers", 2)
    while not [*tmp_path.glob(".dogs.*/train/images/*.png")]:
        assert process.is_alive(), process.err.read_text()
        time.sleep(0.01)
    workers = workers_of(process.pid)
    for pid in [*workers, process.pid] if number == signal.SIGINT else [process.pid]:
        os.kill(pid, number)
    process.join(60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.err.read_text() == ("stopped\n" if number == signal.SIGINT else "")
    assert process.exitcode == (130 if number == signal.SIGINT else -signal.SIGKILL) and not (tmp_path / "dogs").exists()
    assert number == signal.SIGKILL or not [*tmp_path.iterdir()]
