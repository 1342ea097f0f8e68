"""What ends a run early: kills at any moment, full and vanished disks, dead workers. Real processes, real file systems."""
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import LIGHT, ROOT, assert_same_run, ended, wait_for, workers_of

from dataset import DogFLWDataset, load_coco
from tools.lib import files, runtime
from tools.lib.batches import batches_of
from tools.lib.checkpoints import load_checkpoint, load_file_safely
from tools.lib.cli import UserError, place_in_job
from tools.lib.files import RecordFile, file_lock
from tools.lib.pictures import read_image
from tools.lib.runtime import explained_ends, reason_of

KILLS = int(os.environ.get("KILLS", 5))
WRITTEN = (".last.pth.tmp", ".best_model.pth.tmp", ".metrics.csv.tmp", ".curves.png.tmp")  # every epoch, or most


# ---------------------------------------------------------------- kills

def test_killed_anywhere_and_resumed_is_the_same_run(run, start, flags, tmp_path):
    """SIGKILL at random moments, each followed by --resume, leaves the weights and metrics of a run never killed.

    Half of the moments are drawn from the run's whole length, half lie in or soon after the writing of a file: a
    checkpoint, the face cache, metrics.csv. A run that comes through is compared, and the next one begins. In full:

        KILLS=30 python -m pytest -s tests/test_faults.py -k anywhere
    """
    rng, kills, runs, hit = np.random.default_rng(KILLS), 0, 0, Counter()

    def unfinished(*folders):
        """Temporary files, each with the time of its last change."""
        return {(p.name[1:17], p.stat().st_mtime_ns) for f in folders if f.is_dir() for p in f.iterdir() if p.name.endswith(".tmp")}

    while kills < KILLS or runs == 0:
        work_dir, cache, done = tmp_path / f"run{runs}", tmp_path / f"cache{runs}", 0
        while True:
            before = unfinished(work_dir, cache)
            process = start("train_simple.py", *flags, "--cache", cache, "--save-every", 1, "--work-dir", work_dir, "--resume")
            if kills < KILLS:
                deadline = time.monotonic() + rng.uniform(0, run.seconds)
                wanted = [*(work_dir / name for name in WRITTEN), *([] if cache.exists() else [cache])]
                target = wanted[rng.integers(len(wanted))] if kills % 2 else None
                while process.is_alive() and (time.monotonic() < deadline if target is None else not target.exists()):
                    time.sleep(0.001)
                process.join(0 if target is None else rng.exponential(rng.choice([0.005, 0.3])))
                process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL) and process.err.read_text() == "", process.err.read_text()
            if process.exitcode == 0:
                break
            kills += 1
            hit.update(name for name, _ in unfinished(work_dir, cache) - before)
            done += process.out.read_text().count("train loss")
            if done or (work_dir / "last.pth").exists():  # no finished epoch is ever lost
                assert load_checkpoint(work_dir / "last.pth")["epoch"] >= done
        runs += 1
        assert_same_run(work_dir, run.work_dir)
        assert [load_checkpoint(work_dir / f"epoch_{epoch}.pth")["epoch"] for epoch in (1, 2)] == [1, 2]
        assert not unfinished(work_dir, cache)
    print(f"{kills} kills, {hit.total()} while a file was being written {dict(hit)}; {runs} runs ended like the one never killed")


def test_a_kill_behind_the_last_epoch_is_mended(light, train, tmp_path):
    """last.pth comes first: a kill right after it leaves no curves, and half a picture, of a run that has nothing left to do."""
    folder = shutil.copytree(light.work_dir, tmp_path / "run")
    (folder / "curves.png").rename(folder / ".curves.png.tmp")
    (folder / ".val_predictions.jpg.tmp").write_bytes(b"half")
    train(folder, *LIGHT, "--resume", check=True)
    assert {p.name for p in folder.iterdir()} == {p.name for p in light.work_dir.iterdir()}
    assert (folder / "curves.png").read_bytes() == (light.work_dir / "curves.png").read_bytes()


def test_clocks_that_go_backwards(light, start, flags, tmp_path):
    """All that a cut run left, the face cache too, comes from the future when it is resumed."""
    command = ("train_simple.py", *flags, *LIGHT, "--cache", tmp_path / "cache", "--work-dir", tmp_path / "run", "--resume")
    process = start(*command)
    wait_for(process, "epoch   1")
    process.kill()
    process.join()
    done = load_checkpoint(tmp_path / "run/last.pth")["epoch"]
    for path in (*(tmp_path / "run").iterdir(), *(tmp_path / "cache").iterdir(), tmp_path / "run", tmp_path / "cache"):
        os.utime(path, (4e9, 4e9))
    process = start(*command)
    process.join()
    assert process.exitcode == 0 and process.out.read_text().count("train loss") == 2 - done
    assert_same_run(tmp_path / "run", light.work_dir)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
def test_a_killed_worker_is_reported_as_that(start, flags, tmp_path):
    """And a machine with fewer cores than --num-workers starts no more workers than it has cores."""
    process = start("train_simple.py", *flags, *LIGHT, "--work-dir", tmp_path / "w", "--num-workers", 500, "--epochs", 500)
    wait_for(process, "epoch   1")
    workers = workers_of(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    line = ended(process)
    assert len(workers) == len(os.sched_getaffinity(0)) and "data worker" in line and "--resume" in line


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
def test_no_worker_outlives_a_killed_run(start, flags, tmp_path):
    """Whatever Python starts processes by: since 3.14 a fork server, which its workers would keep alive, and it them."""
    (tmp_path / "own.py").write_text("import multiprocessing, sys\nimport train_simple\nif __name__ == '__main__':\n"
                                     "    multiprocessing.set_start_method('forkserver', force=True)\n    train_simple.main(sys.argv[1:])\n")
    process = start(tmp_path / "own.py", *flags, *LIGHT, "--work-dir", tmp_path / "w", "--num-workers", 2, "--epochs", 500)
    wait_for(process, "epoch   1")
    workers = workers_of(process.pid)
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while left := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert workers


class Unsendable:
    def batch(self, items):
        return [threading.Lock()]


def test_a_batch_that_cannot_be_handed_over_ends_the_run(capfd):
    """As where /dev/shm is full: the queue's thread would drop it, and the parent would wait for ever."""
    batches = batches_of(Unsendable(), [[0]], 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="DataLoader worker .pid"):
        next(batches)
    said, deadline = "", time.monotonic() + 20  # the parent may notice the end before the line has arrived
    while "a data worker: cannot pickle" not in said and time.monotonic() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.05)
    assert "a data worker: cannot pickle" in said


def test_a_run_in_a_thread_has_no_signals(tmp_path):
    """As in a web page's program."""
    ends = []

    def run():
        try:
            with explained_ends(tmp_path / "last.pth"):
                ends.append("done")
        except ValueError as e:
            ends.append(e)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ends == ["done"]


@pytest.mark.parametrize("given,place", [
    ({}, (0, 1)), ({"RANK": "3"}, (0, 1)), ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)), ({"RANK": "5", "WORLD_SIZE": "1"}, (0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 4)),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set; start with torchrun"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is not set"),
    ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK 4 of WORLD_SIZE 4 cannot be"),
    ({"RANK": "x", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK x of")])
def test_only_torchrun_makes_a_job_of_several(monkeypatch, given, place):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, given[name]) if name in given else monkeypatch.delenv(name, raising=False)
    if isinstance(place, tuple):
        assert place_in_job() == place
    else:
        with pytest.raises(UserError, match=place):
            place_in_job()


@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_a_batch_that_its_killed_worker_never_sent_is_that_too(error):
    """The kill may come after a batch is announced; then its memory cannot be fetched any more."""
    def dead(_):
        raise error("no one there")
    batches = batches_of(SimpleNamespace(batch=dead), [[0]], 0, torch.device("cpu"))
    with pytest.raises(RuntimeError) as e:
        next(batches)
    assert "data worker" in reason_of(e.value)


# ---------------------------------------------------------------- disks

@pytest.fixture
def disk(tmp_path):
    """A disk of 80 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # with what is mounted in it


def fill(folder, left=2**20):
    """Leave a disk so many bytes."""
    space = os.statvfs(folder)
    with open(folder / "filler", "wb") as f:
        os.posix_fallocate(f.fileno(), 0, space.f_bavail * space.f_frsize - left)


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def test_a_disk_that_is_full_or_read_only_keeps_the_checkpoint(start, flags, disk):
    work_dir = disk / "run"
    run = ("train_simple.py", *flags, *LIGHT, "--epochs", 200, "--work-dir", work_dir, "--resume")
    process = start(*run)
    wait_for(process, "epoch   1")
    fill(disk)
    line = ended(process)
    assert str(work_dir) in line and "No space left" in line
    done = process.out.read_text().count("train loss")
    assert load_checkpoint(work_dir / "last.pth")["epoch"] == done  # the one before, whole
    assert not [p for p in work_dir.iterdir() if p.name.endswith(".tmp")]
    (disk / "filler").unlink()
    remount(disk, "ro")
    line = ended(start(*run))
    assert str(work_dir) in line and "Read-only" in line
    remount(disk, "rw")
    process = start(*run)
    wait_for(process, f"epoch {done + 1:3d}")  # with room again it goes on
    process.kill()
    process.join()


def test_a_full_disk_for_the_face_cache(start, flags, disk, tmp_path):
    fill(disk)
    line = ended(start("train_simple.py", *flags, "--cache", disk, "--input-size", 512, "--work-dir", tmp_path / "w"))
    assert str(disk) in line and "No space left" in line and "data/cache may go" in line and not list(disk.glob("*.bin*"))


@pytest.mark.parametrize("what", ["run", "cache"])
def test_a_folder_that_vanishes_ends_the_run_with_a_word(start, flags, tmp_path, what):
    process = start("train_simple.py", *flags, *LIGHT, "--epochs", 500, "--cache", tmp_path / "cache", "--num-workers", 1,
                    "--work-dir", tmp_path / "run")
    wait_for(process, "epoch   1")
    (tmp_path / what).rename(tmp_path / "moved")
    line = ended(process)
    assert str(tmp_path / what) in line
    assert load_checkpoint((tmp_path / "moved" if what == "run" else tmp_path / "run") / "last.pth")["epoch"] >= 1
    assert not (tmp_path / what).exists()


def test_a_folder_that_turns_read_only_ends_the_run_with_a_word(start, flags, disk):
    work_dir = disk / "run"
    process = start("train_simple.py", *flags, *LIGHT, "--epochs", 500, "--work-dir", work_dir)
    wait_for(process, "epoch   1")
    subprocess.run(["mount", "--bind", work_dir, work_dir], check=True)  # a second door to it, which can be closed
    remount(work_dir, "bind,ro")
    line = ended(process)
    assert str(work_dir) in line and "Read-only" in line
    assert load_checkpoint(work_dir / "last.pth")["epoch"] == process.out.read_text().count("train loss")


@pytest.mark.parametrize("number,passes", [(errno.ENOLCK, True), (errno.ENOSYS, True), (524, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, number, passes):
    def lockf(*_):
        raise OSError(number, "no")
    monkeypatch.setattr(pytest.importorskip("fcntl"), "lockf", lockf)
    with nullcontext() if passes else pytest.raises(OSError), file_lock(tmp_path / "a" / ".lock", busy="held"):
        assert (tmp_path / "a" / ".lock").exists()


def test_logs_and_what_file_browsers_leave_do_not_fill_a_folder(tmp_path):
    for name in (".lock", ".DS_Store", "Thumbs.db", "desktop.ini", "train.log", "nohup.out", "slurm-7.err"):
        (tmp_path / name).touch()
    assert files.is_free(tmp_path)
    (tmp_path / "first.out").mkdir()  # an output folder
    assert not files.is_free(tmp_path)
    (tmp_path / "first.out").rmdir()
    (tmp_path / "last.pth").touch()
    assert not files.is_free(tmp_path)


@pytest.mark.parametrize("given,count", [({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "max 100000\n"}, 8), ({}, 8), ({"cpu.max": "1000 100000"}, 1),
                                         ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
                                         ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8)])
def test_a_containers_share_of_the_cores(tmp_path, monkeypatch, given, count):
    (tmp_path / "cpu").mkdir()
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(files, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    runtime.prepare(torch.device("cpu"))
    assert files.cores() == count and threads == [count] * (count < 8)


def test_a_bound_main_thread_leaves_the_others_their_cores(tmp_path, monkeypatch):
    """With OMP_PROC_BIND or KMP_AFFINITY, OpenMP binds every thread to a core of its own."""
    monkeypatch.setattr(files, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail(f"{n} threads"))
    runtime.prepare(torch.device("cpu"))


def test_a_pointer_of_git_lfs_is_called_so(tmp_path):
    for name, read in (("train.json", files.load_json), ("best_model.pth", load_file_safely), ("model.safetensors", load_file_safely)):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(UserError, match=f"{name}: .*git lfs pull"):
            read(tmp_path / name)


def test_all_pictures_that_cannot_be_used_are_named_at_once(sample, tmp_path):
    for name in ("train", "val"):
        shutil.copy(sample.ann_root / f"{name}.json", tmp_path)
    faces = load_coco(tmp_path / "train.json", sample.data_root)
    root = tmp_path / "root"
    for file in faces.files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample.data_root / file, root / file)
    bad = sorted(faces.files)[3:6]
    for file in bad:
        os.truncate(root / file, 900)
    with pytest.raises(UserError) as error:
        DogFLWDataset(replace(faces, root=root), cache=tmp_path / "cache")
    line = str(error.value)
    assert "perhaps more" not in line
    assert line.startswith(str(root / bad[0])) and all(str(root / file) in line for file in bad) and "\n" not in line
    assert not [*(tmp_path / "cache").glob("*.bin*")]
    for file in faces.files:
        os.truncate(root / file, 900)
    with pytest.raises(UserError) as error:
        DogFLWDataset(replace(faces, root=root), cache=tmp_path / "cache")
    assert 20 <= str(error.value).count(str(root)) <= 21  # the first twice, not thousands
    assert str(error.value).endswith(", and perhaps more")


def test_links_of_someones_archive_lead_nothing_elsewhere(tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    for link in (".report.csv.tmp", ".lock"):
        (tmp_path / link).symlink_to("mine")
    files.atomic_write(tmp_path / "report.csv", [b"theirs"])
    assert (tmp_path / "report.csv").read_bytes() == b"theirs" and not (tmp_path / "report.csv").is_symlink()
    with file_lock(tmp_path / ".lock", "held"):
        assert (tmp_path / "mine").read_bytes() == b"precious"


def test_a_read_only_disk_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    """Such a disk refuses even to remove what is not there."""
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    monkeypatch.setattr(files.Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as e:
        files.atomic_write(tmp_path / "report.csv", [b"mine"])
    assert e.value.filename == str(tmp_path / "report.csv")


def test_writers_of_a_cache_whom_no_lock_parts_each_write_it_whole(tmp_path, monkeypatch):
    """Two machines on a disk whose locks end at the machine."""
    monkeypatch.setattr(files, "file_lock", lambda _: nullcontext())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    def make(first):
        for i in range(3):
            if i == 1 and first:
                monkeypatch.setenv("RANK", "1")
                files.RecordFile(tmp_path / "c.bin", [5] * 3, lambda: make(False))
            yield np.full(5, i, np.uint8)
    cache = files.RecordFile(tmp_path / "c.bin", [5] * 3, lambda: make(True))
    assert [cache[i].tolist() for i in range(3)] == [[i] * 5 for i in range(3)] and [p.name for p in tmp_path.iterdir()] == ["c.bin"]


def test_what_compile_cannot_do_is_one_line(monkeypatch):
    dynamo = SimpleNamespace(exc=SimpleNamespace(BackendCompilerFailed=KeyError, ShortenTraceback=LookupError))
    monkeypatch.setitem(sys.modules, "torch._dynamo", dynamo)
    assert reason_of(IndexError("no Triton here")) == "--compile: this machine cannot (no Triton here); leave it out"
    del dynamo.exc.ShortenTraceback  # as in older versions
    assert reason_of(IndexError("another")) is None and "--compile" in reason_of(KeyError("x"))


def test_a_cache_in_a_runs_folder_leaves_the_runs_lock(tmp_path):
    """A process's locks on a file end when it closes any handle of that file."""
    other = f"import fcntl; fcntl.lockf(open({str(tmp_path / '.lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with file_lock(tmp_path / ".lock", "held"):
        assert RecordFile(tmp_path / "faces.bin", [3], lambda: [np.arange(3, dtype=np.uint8)])[0].tolist() == [0, 1, 2]
        assert b"BlockingIOError" in subprocess.run([sys.executable, "-c", other], capture_output=True).stderr
    assert subprocess.run([sys.executable, "-c", other]).returncode == 0


def test_a_file_that_windows_holds_open_is_tried_again(tmp_path, monkeypatch):
    tries, held = [], []  # held: how often it is found open

    def replace(*places):
        tries.append(places)
        if len(tries) <= held[-1]:
            raise PermissionError(13, "in use")
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", replace=replace))
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=lambda _: None))
    for often, passes in ((2, True), (9, False)):
        held.append(often)
        tries.clear()
        with nullcontext() if passes else pytest.raises(PermissionError):
            files.put_in_place("a.tmp", "a")
    assert tries == [("a.tmp", "a")] * 4


CLOSED = f"""
import os, runpy, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
sys.stdout.reconfigure(line_buffering=True)
runpy.run_path({str(ROOT / "tools/inspect_checkpoint.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize("eager", ["True", "False"])  # short output is only written at the end
def test_output_that_nobody_reads_any_more(run, script, tmp_path, eager):
    (tmp_path / "closed.py").write_text(CLOSED.replace("line_buffering=True", f"line_buffering={eager}"))
    result = script(tmp_path / "closed.py", run.work_dir)
    assert result.returncode == 2
    assert result.stderr == "error: standard output was closed; what was written to files is whole\n"


def test_nobody_reads_the_output_but_the_files_are_written(sample, script, tmp_path):
    """As in `... | head -1`: few lines reach the pipe before the end, where the work is done."""
    code = CLOSED.replace("sys.stdout.reconfigure(line_buffering=True)", 'sys.stdout = open(1, "w", closefd=False)')
    (tmp_path / "closed.py").write_text(code.replace("inspect_checkpoint", "convert_dogflw_to_coco"))
    result = script(tmp_path / "closed.py", "--dogflw_root", sample.data_root, "--out_dir", tmp_path / "ann")
    assert result.returncode == 2 and "what was written to files is whole" in result.stderr
    assert sorted(path.name for path in (tmp_path / "ann").glob("*.json")) == ["train.json", "val.json"]


def test_a_video_on_a_full_disk(light, script, disk, tmp_path):
    picture = read_image(next(light.data_root.rglob("*.png")))
    size = 4 * picture.shape[1], 4 * picture.shape[0]
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, size)
    for _ in range(3):
        writer.write(cv2.resize(picture, size) + np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3), np.uint8))
    writer.release()
    assert (tmp_path / "clip.mp4").stat().st_size > 2 * 2**18
    fill(disk, 2**18)
    result = script("tools/predict.py", light.work_dir / "best_model.pth", tmp_path / "clip.mp4", "--box", 0, 0, *size,
                    "--out", disk / "out", "--device", "cpu")
    assert result.returncode == 2 and f"{disk / 'out' / 'clip.mp4'}: could not be written whole" in result.stderr, result.stderr
    assert not list((disk / "out").glob("*.mp4")) and not list((disk / "out").glob(".*"))


def test_tools_on_a_full_disk_keep_what_was_there(light, script, disk, tmp_path):
    shutil.copytree(light.ann_root, disk / "ann")
    before = {p: p.read_bytes() for p in (disk / "ann").iterdir()}
    fill(disk)
    with open(disk / "rest", "wb") as f, pytest.raises(OSError):
        while True:
            os.write(f.fileno(), bytes(4096))
    checkpoint, ann = light.work_dir / "best_model.pth", ("--data-root", light.data_root)
    for command in (("tools/convert_dogflw_to_coco.py", "--dogflw_root", light.data_root, "--out_dir", disk / "ann"),
                    ("tools/evaluate.py", checkpoint, "--out", disk / "ann", "--device", "cpu"),
                    ("tools/predict.py", checkpoint, light.ann_root / "val.json", *ann, "--boxes", light.ann_root / "val.json",
                     "--out", disk / "ann", "--force", "--device", "cpu"),
                    ("tools/export_onnx.py", "--checkpoint", checkpoint, "--out", disk / "ann/dog.onnx")):
        result = script(*command)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and "No space left" in result.stderr, result.stderr
        assert str(disk) in result.stderr  # the file is named
    assert {p: p.read_bytes() for p in (disk / "ann").iterdir() if p.is_file()} == before
