"""train_simple.py: model, loss, metric, and whole runs as processes."""
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_same_run, children, ended, rows, wait_for, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset as data
import train_simple as trainer
from dataset import DogFLWDataset
from tools import benchmark


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trainer.build_model("hrnet_w18_small", 46)


def test_every_parameter_gets_a_gradient_and_far_pixels_count(model):
    """Fails for a head on the stem: then no stage has a gradient, and a pixel counts for its 7 x 7 neighbours only."""
    images = torch.randn(2, 3, 128, 128, requires_grad=True)
    heatmaps = model.train()(images)
    assert heatmaps.shape == (2, 46, 64, 64)
    heatmaps.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert not without, without
    model.eval()
    images.grad = None
    model(images)[0, 0, 4, 4].backward()
    assert images.grad[0, :, 100:, 100:].abs().max() > 0


@pytest.mark.parametrize("backbone", ["hrnet_w18_small", "hrnet_w32"])
def test_shapes(backbone):
    model = trainer.build_model(backbone, 7).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 7, 48, 48)


def test_loss_counts_labelled_landmarks_alone():
    points, visible = torch.rand(2, 5, 2) * 60, torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0.0]])
    maps = torch.rand(2, 5, 32, 32)

    def total(maps, visible=visible):
        return trainer.heatmap_losses(maps, points, visible, 1.2).mean()

    loss = total(maps)
    changed = maps.clone()
    changed[visible == 0] += 5
    assert total(changed) == loss
    changed[0, 0] += 5
    assert total(changed) > loss
    assert total(maps, visible * 0) == 0


def test_loss_is_the_mse_of_maps_written_out(monkeypatch):
    """The loss never makes its targets; here they are made, and maps and Gaussians subtracted cell by cell."""
    monkeypatch.setattr(trainer, "CRPS_WEIGHT", 0)
    monkeypatch.setattr(trainer, "KL_WEIGHT", 0)
    points = torch.rand(3, 5, 2, dtype=torch.float64) * 70 - 4  # some outside, their Gaussians cut by the border
    maps = torch.randn(3, 5, 1024, dtype=torch.float64).softmax(2).view(3, 5, 32, 32).requires_grad_()
    fast = trainer.heatmap_losses(maps, points, torch.ones(3, 5), 1.2)
    targets = data.encode_heatmaps(points, 32, 1.2)
    plain = (maps * 2 * math.pi * 1.44 - targets).square().sum((2, 3)) / (math.pi * 1.44)
    torch.testing.assert_close(fast, plain)
    gradients = [torch.autograd.grad(loss.sum(), maps)[0] for loss in (fast, plain)]
    torch.testing.assert_close(*gradients)


def test_loss_has_the_divergence_from_the_target(monkeypatch):
    """PyTorch's own, of the whole target made as a map, some cut by the border; a map that is the target has none."""
    def divergence(maps):
        def loss(weight):
            monkeypatch.setattr(trainer, "KL_WEIGHT", weight)
            return trainer.heatmap_losses(maps, points, torch.ones(3, 5), 1.2)
        return loss(1) - loss(0)

    points = torch.rand(3, 5, 2, dtype=torch.float64) * 64 - 0.5
    logits = (4 * torch.randn(3, 5, 1024, dtype=torch.float64)).requires_grad_()
    maps = logits.softmax(2).view(3, 5, 32, 32)
    targets = data.encode_heatmaps(points, 32, 1.2)
    targets = targets / targets.sum((2, 3), keepdim=True)
    plain = torch.nn.functional.kl_div((maps + 1e-9).log(), targets, reduction="none").sum((2, 3))
    torch.testing.assert_close(divergence(maps), plain, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (divergence(maps), plain)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(divergence(targets), torch.zeros(3, 5, dtype=torch.float64), atol=1e-5, rtol=0)


def test_loss_is_a_proper_score_of_places(monkeypatch):
    """Beside the MSE: a certain map costs its distance in fractions of the crop, and the honest one costs least."""
    monkeypatch.setattr(trainer, "CRPS_WEIGHT", 1e8)  # the MSE does not count

    def cost(cells, truth):
        """Of a map with mass at some (x, y) cells of 32, where the truth is a cell's place."""
        maps = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
        for (x, y), mass in cells.items():
            maps[0, 0, y, x] = mass
        point = (torch.tensor(truth, dtype=torch.float64) + 0.5) * data.STRIDE - 0.5
        return trainer.heatmap_losses(maps, point.view(1, 1, 2), torch.ones(1, 1), 1.2).item() / 1e8

    assert cost({(9, 9): 1}, (9, 9)) == pytest.approx(0, abs=1e-5)
    assert cost({(9, 9): 0.75, (10, 9): 0.25}, (9.25, 9)) == pytest.approx(0, abs=1e-5)  # between cells, to no side
    assert cost({(9, 9): 1}, (12, 5)) == pytest.approx(7 / 32, abs=1e-5)
    share = [0.75 * cost({(9, 9): p, (19, 9): 1 - p}, (9, 9)) + 0.25 * cost({(9, 9): p, (19, 9): 1 - p}, (19, 9))
             for p in (0.6, 0.75, 0.9, 1)]
    assert min(share) == share[1]  # three times of four it is at one place: so say three quarters


def test_targets_narrow_over_the_run():
    sigmas = [trainer.target_sigma(step, 100, 1.5) for step in range(101)]
    assert sigmas[0] == 1.5 * trainer.WIDE and sigmas[-1] == 1.5 and sigmas == sorted(sigmas, reverse=True)
    assert sigmas[50] ** 2 == pytest.approx(sigmas[0] * sigmas[100])
    defaults = [trainer.parse_args(["--input-size", size]).sigma for size in ("128", "256", "512")]
    assert defaults == [0.75, 1.5, 3] and trainer.parse_args(["--input-size", "512", "--sigma", "3"]).sigma == 3


def test_learning_rate():
    factors = [trainer.lr_factor(s, 100, 10) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1 and factors[10] == 1
    assert factors[55] == pytest.approx(0.5) and 0 < factors[99] < 1e-3
    assert all(a >= b for a, b in zip(factors[9:], factors[10:]))
    assert max(trainer.lr_factor(s, 100, warmup) for s in range(100) for warmup in (0.3, 2.5)) == 1


def test_devices_are_chosen_on_every_torch():
    cpu = trainer.choose_device("cpu")
    assert trainer.choose_amp(cpu) in (None, torch.bfloat16) and trainer.choose_amp(cpu, wanted=False) is None


def reference(points, faces, length):
    """NME by plain loops in float64."""
    total, count = 0.0, 0
    for i in range(len(faces)):
        errors = [math.dist(points[i, k], faces.points[i, k]) for k in range(points.shape[1]) if faces.visible[i, k] > 0]
        if errors and length(i) > 0:
            total, count = total + sum(errors) / len(errors) / length(i), count + 1
    return total / count if count else math.nan


def random_faces(n, k, seed):
    """Faces with landmarks that are not labelled, some with none at all; the first two are the interocular pair."""
    rng = np.random.default_rng(seed)
    scheme = data.Scheme([f"p{i}" for i in range(k)], [[0, 1]], {}, [0, 1], [])
    boxes = np.concatenate([rng.uniform(-50, 200, (n, 2)), rng.uniform(1, 500, (n, 2))], axis=1)
    visible = (rng.integers(0, 3, (n, k)) * rng.integers(0, 2, (n, 1))).astype(np.uint8)
    points = rng.uniform(-50, 700, (n, k, 2)).round(rng.integers(0, 4))
    return data.Faces(scheme, [""] * n, Path(), np.full((n, 2), 500), boxes, points, visible, np.arange(n), np.arange(n), [""] * n)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(2, 9), st.integers(0, 10**6), st.floats(0.5, 4))
def test_metric_against_a_reference(n, k, seed, padding):
    faces = random_faces(n, k, seed)
    box, points = faces.boxes, faces.points + np.random.default_rng(seed).normal(0, 5, faces.points.shape)
    metrics = trainer.mean_metrics(points, faces, padding)
    expected = {"nme": reference(points, faces, lambda i: padding * max(box[i, 2:])),
                "nme_box": reference(points, faces, lambda i: np.hypot(*box[i, 2:])),
                "nme_iod": reference(points, faces, lambda i: math.dist(*faces.points[i, :2]) if faces.visible[i, :2].all() else 0)}
    assert metrics == pytest.approx(expected, rel=1e-12, nan_ok=True)
    # One face at a time, and the mean over those that count: batched equals single.
    single = [trainer.mean_metrics(points[[i]], faces.take([i]), padding)["nme"] for i in range(n)]
    counted = [e for e in single if not math.isnan(e)]
    assert metrics["nme"] == pytest.approx(sum(counted) / len(counted) if counted else math.nan, rel=1e-12, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-180, 180), st.floats(0.3, 3), st.booleans())
def test_metric_is_invariant_under_similarity(seed, rotation, scale, mirror):
    faces = random_faces(4, 5, seed)
    points = faces.points + np.random.default_rng(seed).normal(0, 5, faces.points.shape)
    matrix = data.crop_matrix((10, 20, 300, 200), 512, 1.0, rotation, scale, mirror=mirror)
    moved = data.replace(faces, points=data.apply_matrix(matrix, faces.points))
    assert trainer.mean_metrics(data.apply_matrix(matrix, points), moved, 1.25)["nme_iod"] == pytest.approx(
        trainer.mean_metrics(points, faces, 1.25)["nme_iod"], rel=1e-9, nan_ok=True)


def test_mirrored_averaging_is_equivariant(model):
    """The prediction for the mirrored picture is the mirrored prediction, partners swapped."""
    scheme_flip = torch.arange(46).view(-1, 2).flip(1).flatten()
    crops = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    plain = trainer.predict_heatmaps(model.eval(), crops, scheme_flip)
    mirrored = trainer.predict_heatmaps(model, crops.flip(2), scheme_flip)
    torch.testing.assert_close(mirrored, plain.flip(3)[:, scheme_flip], atol=1e-4, rtol=1e-4)


def test_the_mirrored_validation_set_gives_the_mirrored_predictions(run, tmp_path):
    """Pictures, boxes and landmarks mirrored, partners swapped: the same errors, but for the rounding of pixels."""
    model, scheme, args, _ = trainer.load_model(run.work_dir / "best_model.pth")
    faces, cpu = data.load_coco(run.ann_root / "val.json", run.data_root), torch.device("cpu")
    for file in faces.files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(data.encode_picture(data.read_image(faces.root / file)[:, ::-1]))
    last, swap = faces.sizes[:, :1] - 1, scheme.flip_index

    def mirror(points):
        return np.stack([last - points[..., 0], points[..., 1]], -1)[:, swap]
    x, y, w, h = faces.boxes.T
    mirrored = data.replace(faces, root=tmp_path, boxes=np.stack([last[:, 0] - x - w, y, w, h], 1), points=mirror(faces.points),
                            visible=faces.visible[:, swap])
    plain, turned = (trainer.predict(model, DogFLWDataset(f, args["input_size"], args["padding"]), cpu)[0] for f in (faces, mirrored))
    pixel = trainer.normalizers(faces, args["padding"])["nme"] / args["input_size"]  # of the crop, in picture pixels: (N,)
    assert (np.linalg.norm(mirror(turned) - plain, axis=-1).mean(1) / pixel).mean() < 0.1
    errors = [trainer.mean_metrics(p, f, args["padding"])["nme"] for p, f in ((plain, faces), (turned, mirrored))]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_batches_and_threads_do_not_change_a_prediction(run):
    model, _, args, _ = trainer.load_model(run.work_dir / "best_model.pth")
    faces, cpu = data.load_coco(run.ann_root / "val.json", run.data_root), torch.device("cpu")
    dataset = DogFLWDataset(faces, args["input_size"], args["padding"])
    single = trainer.predict(model, dataset, cpu, batch_size=1, sigma=1.2)
    for batch_size, threads in ((12, 1), (5, 1), (12, 2)):
        torch.set_num_threads(threads)
        try:
            other = trainer.predict(model, dataset, cpu, batch_size=batch_size, sigma=1.2)
        finally:
            torch.set_num_threads(1)
        for a, b, tolerance in zip(single, other, (0.01, 1e-4, 1e-5)):  # picture pixels, score, loss
            np.testing.assert_allclose(b, a, atol=tolerance)


def test_processes_share_the_batch_exactly():
    def faces(world, accumulate=1):
        parts = [list(trainer.EpochBatches(37, 8, 3, 1, [64, 64, 96], accumulate, r, world)) for r in range(world)]
        return [sorted(sum((part[i] for part in parts), [])) for i in range(len(parts[0]))]
    whole = faces(1)
    assert len(whole) == 8 and all(len(b) == 8 for b in whole)
    assert faces(2) == whole and faces(4) == whole
    assert len({i for b in whole[:4] for _, i, _ in b}) == 32
    assert [{(epoch, size) for epoch, _, size in b} for b in whole] == [{(1, 64)}] * 4 + [{(2, 96)}] * 4
    few = list(trainer.EpochBatches(11, 32, 3, 0, [64], accumulate=4))
    assert [len(b) for b in few] == [2] * 4  # of fewer faces than a batch, micro-batches of one size all the same


def test_a_run_and_what_it_leaves(run):
    names = {p.name for p in run.work_dir.iterdir()}
    assert {"args.json", "metrics.csv", "best_model.pth", "last.pth", "train_batch.jpg", "val_predictions.jpg", "curves.png"} <= names
    table = rows(run.work_dir)
    assert [r["epoch"] for r in table] == ["1", "2"] and tuple(table[0])[0] == "epoch"
    settings = json.loads((run.work_dir / "args.json").read_text())
    assert settings["epochs"] == 2 and "torch" in settings["versions"]
    model, scheme, args, checkpoint = trainer.load_model(run.work_dir / "best_model.pth")
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    points, _, _ = trainer.predict(model, DogFLWDataset(faces, args["input_size"], args["padding"]), torch.device("cpu"))
    assert trainer.mean_metrics(points, faces, args["padding"])["nme"] == pytest.approx(checkpoint["metrics"]["nme"], abs=1e-6)


def test_small_crops_come_first(sample, flags, script, start, tmp_path):
    """The first epochs see half the size; each checkpoint says which it is for, and scores as it said."""
    sizes = {s: trainer.crop_sizes(trainer.parse_args(["--epochs", "7", "--input-size", str(s)])) for s in (128, 192, 256, 320, 512)}
    assert {s: v[:2] for s, v in sizes.items()} == {128: [128] * 2, 192: [128] * 2, 256: [128] * 2, 320: [160] * 2, 512: [256] * 2}
    assert all(v[2:] == [s] * 5 for s, v in sizes.items())
    options = [*flags, "--input-size", 160, "--progressive", 0.5, "--holdout", 0.2, "--save-every", 1, "--val-every", 1, "--work-dir"]
    script("train_simple.py", *options, tmp_path / "uncut", check=True)
    faces = data.load_coco(sample.ann_root / "train.json", sample.data_root).split(0.2)[1]
    for epoch, size in ((1, 128), (2, 160)):
        model, _, args, checkpoint = trainer.load_model(tmp_path / "uncut" / f"epoch_{epoch}.pth")
        assert args["input_size"] == size
        points, _, _ = trainer.predict(model, DogFLWDataset(faces, size), torch.device("cpu"))
        assert trainer.mean_metrics(points, faces, 1.25)["nme"] == pytest.approx(checkpoint["metrics"]["nme"], abs=1e-6)
    process = start("train_simple.py", *options, tmp_path / "cut")
    wait_for(process, "epoch   1/2  128 px")
    process.kill()
    process.join()
    script("train_simple.py", *options, tmp_path / "cut", "--resume", check=True)
    assert_same_run(tmp_path / "cut", tmp_path / "uncut")


def test_workers_do_not_change_a_run(run, train, tmp_path):
    for workers in (1, 4):  # 0 is the run itself
        train(tmp_path / str(workers), "--num-workers", workers, "--cache", "disk", check=True)
        assert_same_run(tmp_path / str(workers), run.work_dir)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_with_a_word(start, flags, tmp_path, number, code, group):
    process = start("train_simple.py", *flags, "--work-dir", tmp_path / "w", "--num-workers", 2, "--epochs", 500)
    wait_for(process, "epoch   1")
    time.sleep(0.5)
    for pid in [*children(process.pid), process.pid] if group else [process.pid]:  # `timeout` and a terminal reach all of them
        os.kill(pid, number)
    assert "stopped" in (line := ended(process, code)) and "--resume" in line


def test_a_killed_run_leaves_no_lock_behind(start, flags, tmp_path):
    process = start("train_simple.py", *flags, "--work-dir", tmp_path / "w", "--num-workers", 2, "--epochs", 500)
    wait_for(process, "epoch   1")
    process.kill()
    process.join()
    with data.file_lock(tmp_path / "w/.lock", "its workers still hold it"):
        pass


RUN = """
import train_simple
if __name__ == "__main__":
    train_simple.run_script(train_simple.main)
"""
FROZEN_BN = """
import torch
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)  # batch statistics aside
import atexit, os, pathlib
# What is left of the group when the interpreter ends may abort the process.
atexit.register(lambda: any("gloo" in f.read_text() for f in pathlib.Path("/proc/self/task").glob("*/comm")) and os._exit(70))
# Adam's first steps are the signs of the gradients, which rounding may turn; plain steps show the gradients themselves.
torch.optim.AdamW = lambda parameters, lr, **others: torch.optim.SGD(parameters, lr=lr)
""" + RUN


def test_two_processes_or_micro_batches_train_as_one(script, flags, tmp_path):
    """2 x 8 faces give the gradients of 1 x 16 within float tolerance, and the same metrics."""
    (tmp_path / "frozen.py").write_text(FROZEN_BN)
    flags = [*flags, "--epochs", 1, "--batch-size", 16, "--work-dir"]
    script(tmp_path / "frozen.py", *flags, tmp_path / "whole", check=True)
    script(tmp_path / "frozen.py", *flags, tmp_path / "parts", "--accumulate", 2, check=True)
    subprocess.run(list(map(str, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                                  tmp_path / "frozen.py", *flags, tmp_path / "processes"])), check=True, timeout=300)
    whole, (row,) = weights(tmp_path / "whole" / "last.pth"), rows(tmp_path / "whole")
    for name in ("parts", "processes"):
        other, (its,) = weights(tmp_path / name / "last.pth"), rows(tmp_path / name)
        assert all(torch.allclose(whole[k].float(), other[k].float(), atol=1e-6, rtol=1e-4) for k in whole), name
        assert float(row["train_loss"]) == pytest.approx(float(its["train_loss"]), rel=1e-4), name
        assert float(row["nme"]) == pytest.approx(float(its["nme"]), rel=1e-3), name


def test_two_nodes_without_a_shared_disk_resume_as_one(start, run, flags, tmp_path):
    """The second node has no last.pth and no best_model.pth: both come from the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    shutil.copytree(run.work_dir, tmp_path / "0")
    for rank in "01":
        (tmp_path / f"{rank}.py").write_text(f"import os\nos.environ |= {job | {'RANK': rank}}\n" + RUN)
        processes.append(start(tmp_path / f"{rank}.py", *flags, "--resume", "--work-dir", tmp_path / rank))
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, process.err.read_text()
    assert "resuming after epoch 2" in processes[0].out.read_text() and not (tmp_path / "1").exists()


def test_benchmark_prints_its_table(sample, capsys, monkeypatch):
    monkeypatch.setattr(benchmark.samples_per_second, "__defaults__", (0.1,))
    benchmark.main(list(map(str, ["--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL, "--cache", "none",
                                  "--batch-size", 8, "--accumulate", 2])))
    out = capsys.readouterr().out
    assert all(line in out for line in ("input, 0 workers", "bare step", "  head", "full loop", "data wait", "validation",
                                        "210 epochs of 40"))


def test_benchmark_times_the_wait_for_faces():
    waits = []
    batches = benchmark.timed((time.sleep(0.05 * i) or i for i in range(3)), waits)
    assert [next(batches) for _ in range(3)] == [0, 1, 2] and len(waits) == 3 and waits[1] >= 0.05 and waits[2] >= 0.1


def test_sharded_validation_is_exact(run):
    """Each of 3 processes fills its rows of one table; their sum is the table of one process, bit for bit."""
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    model = trainer.load_model(run.work_dir / "best_model.pth")[0]
    dataset, cpu = DogFLWDataset(faces, 64), torch.device("cpu")
    whole = trainer.predict_table(model, dataset, cpu, batch_size=1)
    parts = [trainer.predict_table(model, dataset, cpu, batch_size=1, rank=r, world=3) for r in range(3)]
    assert torch.equal(sum(parts), whole)


def test_one_batch_is_learnt(sample):
    faces = data.load_coco(sample.ann_root / "train.json", sample.data_root).take(range(8))
    batch = DogFLWDataset(faces, 64).__getitems__(list(range(len(faces))))
    torch.manual_seed(0)
    model = trainer.build_model("hrnet_w18_small", 46)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, errors = data.normalize(batch["image"]), []
    while len(errors) < 120 and min(errors, default=1) > 0.01:
        heatmaps = model(images)
        optimizer.zero_grad()
        trainer.heatmap_losses(heatmaps, batch["keypoints"], batch["visibility"], 1.2).mean().backward()
        optimizer.step()
        points, _ = data.decode_heatmaps(heatmaps.detach())
        distance = (points - batch["keypoints"]).norm(dim=-1) * batch["visibility"]
        errors.append((distance.sum(1) / batch["visibility"].sum(1) / 64).mean().item())
    assert errors[-1] < 0.01 < errors[0], errors


class Payload:
    def __reduce__(self):
        return os.system, ("touch {}".format(os.environ["PAYLOAD_MARK"]),)


def test_a_malicious_checkpoint_runs_nothing(tmp_path, monkeypatch, refused, sample):
    monkeypatch.setenv("PAYLOAD_MARK", str(tmp_path / "ran"))
    torch.save({"format": 1, "model": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "evil2.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(data.UserError, match=name):
            trainer.load_checkpoint(tmp_path / name)
    line = refused("--data-root", sample.data_root, "--ann-root", sample.ann_root, "--weights",
                   tmp_path / "evil.pth", "--work-dir", tmp_path / "w", "--cache", "none")
    assert "evil.pth" in line and not (tmp_path / "ran").exists()


def test_mistakes_are_one_line(run, refused, tmp_path, sample):
    w = ("--work-dir", tmp_path / "w", "--no-pretrained", "--cache", "none")
    here = ("--data-root", sample.data_root, "--ann-root", sample.ann_root)
    assert "--batch-size 0" in refused("--batch-size", 0)
    assert "--epochs 0" in (line := refused("--epochs", 0, "--lr", -1)) and "--lr" in line
    assert "--backbone resnet50" in refused(*here, *w, "--backbone", "resnet50")
    assert "--data-root" in refused("--data-root", tmp_path / "nowhere", *w)
    assert "--sample" in refused(*w, HOME=str(tmp_path), KAGGLEHUB_CACHE=str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    assert "train.json" in refused("--data-root", sample.data_root, "--ann-root", tmp_path / "empty", *w)
    assert "--accumulate" in refused(*here, *w, "--batch-size", 64, "--accumulate", 64)
    assert "--device" in refused(*here, *w, "--device", "cuda:99")
    assert "--bogus" in refused("--bogus")
    assert "not empty" in refused(*here, "--work-dir", run.work_dir)
    assert "--epochs" in refused(*here, *SMALL, "--work-dir", run.work_dir, "--resume", "--epochs", 3, "--batch-size", 8)
    assert "no such picture (40 of 40 missing)" in refused("--data-root", tmp_path / "empty", "--ann-root", sample.ann_root, *w)
    assert "--sync-bn" in refused(*here, *SMALL, *w, "--sync-bn", "--cache", "none")
    (tmp_path / "copy").mkdir()
    shutil.copy(run.work_dir / "best_model.pth", tmp_path / "copy" / "last.pth")
    assert "--weights" in refused(*here, *SMALL, "--work-dir", tmp_path / "copy", "--resume", "--cache", "none")
    coco = json.loads((sample.ann_root / "train.json").read_text())
    category = coco["categories"][0]
    category["keypoints"], category["flip_pairs"], category["skeleton"] = category["keypoints"][:20], [], []
    category["regions"] = {}
    for a in coco["annotations"]:
        a["keypoints"] = a["keypoints"][:60]
    for name in ("train", "val"):
        (tmp_path / "empty" / f"{name}.json").write_text(json.dumps(coco))
    assert "46 landmarks" in refused("--data-root", sample.data_root, "--ann-root", tmp_path / "empty", *SMALL,
                                     "--work-dir", run.work_dir, "--resume")


def test_a_run_of_another_optimizer_is_not_resumed(run, refused, flags, tmp_path):
    """One optimizer's moments have no place in another of other parameter groups; the weights have."""
    last = torch.load(run.work_dir / "last.pth", weights_only=True)
    first, second = last["optimizer"]["param_groups"]
    last["optimizer"]["param_groups"] = [{**first, "params": first["params"] + second["params"]}]
    torch.save(last, tmp_path / "last.pth")
    line = refused(*flags, "--work-dir", tmp_path, "--resume")
    assert "last.pth" in line and "another optimizer" in line and "--weights" in line


def test_decay_is_of_the_convolutions_alone(model):
    args = trainer.parse_args(["--weight-decay", "0.2"])
    decay = {p: g["weight_decay"] for g in trainer.build_optimizer(model, args, torch.device("cpu")).param_groups for p in g["params"]}
    expected = {p: 0.2 if isinstance(m, torch.nn.Conv2d) and p is m.weight else 0.0
                for m in model.modules() for p in m.parameters(recurse=False)}
    assert decay == expected and {*decay.values()} == {0.0, 0.2}


def test_versions_where_there_is_no_git(monkeypatch, tmp_path):
    assert trainer.versions()["git"] != ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trainer.versions()["git"] == "unknown"


def test_a_checkpoint_knows_its_data_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = trainer.parse_args(["--data-root", "faces", "--ann-root", "ann"])
    assert (args.data_root, args.ann_root) == (tmp_path / "faces", tmp_path / "ann")
    assert trainer.parse_args([]).data_root is None


def test_two_runs_in_one_folder(start, flags, tmp_path, refused):
    flags = [*flags, "--work-dir", tmp_path / "w", "--epochs", 500]
    process = start("train_simple.py", *flags)
    try:
        wait_for(process, "epoch   1")
        assert "another run" in refused(*flags, "--resume")
    finally:
        process.kill()
        process.join()


def test_a_damaged_picture_names_itself(sample, tmp_path, refused, script):
    shutil.copytree(sample.data_root, tmp_path / "d")
    victim = sorted((tmp_path / "d/train/images").iterdir())[7]
    victim.write_bytes(victim.read_bytes()[:3000])
    flags = ["--data-root", tmp_path / "d", "--ann-root", sample.ann_root, *SMALL, "--epochs", 1]
    assert victim.name in refused(*flags, "--work-dir", tmp_path / "start", "--cache", "ram")
    result = script("train_simple.py", *flags, "--work-dir", tmp_path / "worker", "--cache", "none", "--num-workers", 2)
    assert result.returncode == 2 and victim.name in result.stderr and result.stderr.count("\n") == 1


def test_a_missing_picture_of_the_last_scoring_shows_at_the_start(sample, tmp_path, refused):
    shutil.copytree(sample.data_root, tmp_path / "d")
    victim = next((tmp_path / "d/test/images").iterdir())
    victim.unlink()
    flags = ["--data-root", tmp_path / "d", "--ann-root", sample.ann_root, *SMALL, "--epochs", 1, "--holdout", 0.2]
    assert victim.name in refused(*flags, "--work-dir", tmp_path / "w")
    assert not (tmp_path / "w/metrics.csv").exists()


def test_a_mistake_of_ours_inside_a_worker_keeps_its_traceback(monkeypatch, tmp_path):
    def train(args):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    monkeypatch.setattr(trainer, "train", train)
    with pytest.raises(RuntimeError):
        trainer.main(["--work-dir", str(tmp_path / "w")])


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB", "FIND was unable to find an engine to execute this"])
def test_out_of_memory_says_what_helps(refused, tmp_path, monkeypatch, message):
    def train(_):
        raise RuntimeError(message)

    monkeypatch.setattr(trainer, "train", train)
    assert "--accumulate" in refused("--work-dir", tmp_path / "w")


def test_last_pth_takes_little_of_a_fast_run(flags, tmp_path, monkeypatch):
    """Where writing takes long beside an epoch it is left out, at the end never."""
    def save(path, checkpoint):
        if path.name == "last.pth":
            written.append(checkpoint["epoch"])
            time.sleep(0.6)

    written = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *args, real=trainer.save_checkpoint: (real(*args), save(*args)))
    trainer.main([*map(str, flags), "--epochs", "3", "--work-dir", str(tmp_path / "w")])
    assert written == [1, 3]


def test_float16_that_never_finds_a_scale_ends_the_run(refused, sample, tmp_path, monkeypatch):
    """The loss is finite, its gradient at no scale; in float32, because a CPU takes minutes for float16's gradients."""
    def losses(*args, real=trainer.heatmap_losses):
        loss = real(*args)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(trainer, "heatmap_losses", losses)
    monkeypatch.setattr(trainer, "choose_amp", lambda *_: torch.float16)
    monkeypatch.setattr(trainer, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0))
    line = refused("--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL, "--work-dir",
                   tmp_path / "w", "--epochs", 1)
    assert "not finite" in line and ".png" in line


def test_a_loss_that_is_not_finite_names_its_faces(run, refused, sample, tmp_path):
    line = refused("--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL, "--work-dir",
                   tmp_path / "w", "--lr", 1e30, "--warmup-epochs", 0, "--epochs", 2)
    assert "not finite" in line and ".png" in line and "--lr" in line
