"""train_simple.py: model, loss, metric, and whole runs as processes."""
import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import dataset as data
import train_simple as trainer
from dataset import DogFLWDataset


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


def test_learning_rate():
    factors = [trainer.lr_factor(s, 100, 10) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1 and factors[10] == 1
    assert factors[55] == pytest.approx(0.5) and 0 < factors[99] < 1e-3
    assert all(a >= b for a, b in zip(factors[9:], factors[10:]))


def test_devices_are_chosen_on_every_torch():
    cpu = trainer.choose_device("cpu")
    assert trainer.choose_amp(cpu) in (None, torch.bfloat16) and trainer.choose_amp(cpu, wanted=False) is None


def reference(points, faces, length):
    """NME by plain loops in float64."""
    total, count = 0.0, 0
    for i in range(len(faces)):
        errors = [float(np.hypot(*(points[i, k] - faces.points[i, k]))) for k in range(46) if faces.visible[i, k] > 0]
        if errors and length(i) > 0:
            total, count = total + sum(errors) / len(errors) / length(i), count + 1
    return total / count if count else float("nan")


def test_metric_against_a_reference(sample):
    faces = data.load_coco(sample.ann_root / "train.json", sample.data_root)
    points = faces.points + np.random.default_rng(0).normal(0, 5, faces.points.shape)
    metrics = trainer.mean_metrics(points, faces, 1.25)
    box = faces.boxes
    assert metrics["nme"] == pytest.approx(reference(points, faces, lambda i: 1.25 * max(box[i, 2:])), abs=1e-12)
    assert metrics["nme_box"] == pytest.approx(reference(points, faces, lambda i: np.hypot(*box[i, 2:])), abs=1e-12)
    assert metrics["nme_iod"] == pytest.approx(reference(points, faces, lambda i: np.linalg.norm(
        faces.points[i, 18] - faces.points[i, 19]) if faces.visible[i, 18] and faces.visible[i, 19] else 0), abs=1e-12)
    nothing = trainer.mean_metrics(points[:0], faces.take([]), 1.25)
    assert all(np.isnan(v) for v in nothing.values())


def test_metric_is_invariant_under_similarity(sample):
    faces = data.load_coco(sample.ann_root / "train.json", sample.data_root)
    points = faces.points + np.random.default_rng(0).normal(0, 5, faces.points.shape)
    matrix = data.crop_matrix((10, 20, 300, 200), 512, 1.0, rotation=33)
    moved = data.replace(faces, points=data.apply_matrix(matrix, faces.points))
    assert trainer.mean_metrics(data.apply_matrix(matrix, points), moved, 1.25)["nme_iod"] == pytest.approx(
        trainer.mean_metrics(points, faces, 1.25)["nme_iod"], rel=1e-9)


def test_mirrored_averaging_is_equivariant(model):
    """The prediction for the mirrored picture is the mirrored prediction, partners swapped."""
    scheme_flip = torch.arange(46).view(-1, 2).flip(1).flatten()
    crops = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    plain = trainer.predict_heatmaps(model.eval(), crops, scheme_flip)
    mirrored = trainer.predict_heatmaps(model, crops.flip(2), scheme_flip)
    torch.testing.assert_close(mirrored, plain.flip(3)[:, scheme_flip], atol=1e-4, rtol=1e-4)


def test_processes_share_the_batch_exactly():
    def faces(world, accumulate=1):
        parts = [list(trainer.EpochBatches(37, 8, 3, 1, 3, accumulate, r, world)) for r in range(world)]
        return [sorted(sum((part[i] for part in parts), [])) for i in range(len(parts[0]))]
    whole = faces(1)
    assert len(whole) == 8 and all(len(b) == 8 for b in whole)
    assert faces(2) == whole and faces(4) == whole
    assert len({i for b in whole[:4] for _, i in b}) == 32


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


def test_workers_do_not_change_a_run(run, train, tmp_path):
    for workers in (1, 4):  # 0 is the run itself
        train(tmp_path / str(workers), "--epochs", 2, "--batch-size", 8, "--num-workers", workers, "--cache", "disk", check=True)
        assert_same_run(tmp_path / str(workers), run.work_dir)


def test_killed_and_resumed_is_the_same_run(run, train, tmp_path, sample):
    """SIGKILL at several moments, then --resume, until it is through."""
    work_dir, kills = tmp_path / "cut", 0
    command = [sys.executable, ROOT / "train_simple.py", "--data-root", sample.data_root, "--ann-root", sample.ann_root,
               "--work-dir", work_dir, *SMALL, "--cache", "ram", "--epochs", 2, "--batch-size", 8]
    for moment in (4.5, 6.0, 7.0):
        process = subprocess.Popen([*map(str, command), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        assert b"Traceback" not in process.communicate()[1]
    train(work_dir, "--epochs", 2, "--batch-size", 8, "--resume", check=True)
    assert kills and not [p for p in work_dir.iterdir() if p.suffix == ".tmp"]
    assert_same_run(work_dir, run.work_dir)


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_with_a_word(sample, tmp_path, number, code):
    process = subprocess.Popen(list(map(str, [
        sys.executable, ROOT / "train_simple.py", "--data-root", sample.data_root, "--ann-root", sample.ann_root,
        "--work-dir", tmp_path / "w", *SMALL, "--num-workers", 2, "--epochs", 500])), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "epoch" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and "--resume" in errors and "Traceback" not in errors, errors


FROZEN_BN = """
import torch
import train_simple
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)  # batch statistics aside
# Adam's first steps are the signs of the gradients, which rounding may turn; plain steps show the gradients themselves.
torch.optim.Adam = lambda parameters, lr, weight_decay, fused: torch.optim.SGD(parameters, lr=lr)
if __name__ == "__main__":
    train_simple.run_script(train_simple.main)
"""


@pytest.mark.parametrize("processes,accumulate", [(2, 1), (1, 2)])
def test_two_processes_or_micro_batches_train_as_one(sample, tmp_path, processes, accumulate):
    """2 x 8 faces give the gradients of 1 x 16 within float tolerance, and the same metrics."""
    (tmp_path / "frozen.py").write_text(FROZEN_BN)
    flags = ["--epochs", 1, "--batch-size", 16, "--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", 29541]
    for name, command in (("one", []), ("two", [*(torchrun if processes > 1 else []), tmp_path / "frozen.py", "--accumulate", accumulate])):
        command = command or [tmp_path / "frozen.py"]
        result = subprocess.run(list(map(str, [sys.executable, *command, *flags, "--work-dir", tmp_path / name])), text=True,
                                capture_output=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    one, two = weights(tmp_path / "one" / "last.pth"), weights(tmp_path / "two" / "last.pth")
    assert all(torch.allclose(one[k].float(), two[k].float(), atol=1e-6, rtol=1e-4) for k in one)
    (a,), (b,) = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
    assert float(a["nme"]) == pytest.approx(float(b["nme"]), rel=1e-3)


def test_sharded_validation_is_exact(run):
    """Each of 3 processes fills its rows of one table; their sum is the table of one process, bit for bit."""
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    model = trainer.load_model(run.work_dir / "best_model.pth")[0]
    dataset, cpu = DogFLWDataset(faces, 64), torch.device("cpu")
    whole = trainer.predict_table(model, dataset, cpu, batch_size=1)
    parts = [trainer.predict_table(model, dataset, cpu, batch_size=1, rank=r, world=3) for r in range(3)]
    assert torch.equal(sum(parts), whole)


def test_one_batch_is_learnt(sample, train, tmp_path):
    coco = json.loads((sample.ann_root / "train.json").read_text())
    coco["annotations"] = coco["annotations"][:16]
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps(coco))
    faces = data.load_coco(tmp_path / "train.json", sample.data_root)
    dataset = DogFLWDataset(faces, 96)
    batch = dataset.__getitems__(list(range(len(faces))))
    torch.manual_seed(0)
    model = trainer.build_model("hrnet_w18_small", 46)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images = data.normalize(batch["image"])
    for _ in range(80):
        loss = trainer.heatmap_losses(model(images), batch["keypoints"], batch["visibility"], 1.2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points, _ = data.decode_heatmaps(model(images).detach())
    error = ((points - batch["keypoints"]).norm(dim=-1) * batch["visibility"]).sum(1) / batch["visibility"].sum(1) / 96
    assert error.mean() < 0.01


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
    assert "--device" in refused(*here, *w, "--device", "cuda:99")
    assert "--bogus" in refused("--bogus")
    assert "not empty" in refused(*here, "--work-dir", run.work_dir)
    assert "--epochs" in refused(*here, *SMALL, "--work-dir", run.work_dir, "--resume", "--epochs", 3, "--batch-size", 8)
    assert "no such picture" in refused("--data-root", tmp_path / "empty", "--ann-root", sample.ann_root, *w)
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


def test_two_runs_in_one_folder(sample, tmp_path, refused):
    flags = list(map(str, ["--data-root", sample.data_root, "--ann-root", sample.ann_root, "--work-dir", tmp_path / "w", *SMALL,
                           "--epochs", 500]))
    process = subprocess.Popen([sys.executable, str(ROOT / "train_simple.py"), *flags], stdout=subprocess.PIPE, text=True)
    try:
        while "epoch" not in process.stdout.readline():
            assert process.poll() is None
        assert "another run" in refused(*flags, "--resume")
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_picture_names_itself(sample, tmp_path, refused, script):
    shutil.copytree(sample.data_root, tmp_path / "d")
    victim = sorted((tmp_path / "d/train/images").iterdir())[7]
    victim.write_bytes(victim.read_bytes()[:3000])
    flags = ["--data-root", tmp_path / "d", "--ann-root", sample.ann_root, *SMALL, "--epochs", 1]
    assert victim.name in refused(*flags, "--work-dir", tmp_path / "start", "--cache", "ram")
    result = script("train_simple.py", *flags, "--work-dir", tmp_path / "worker", "--cache", "none", "--num-workers", 2)
    assert result.returncode == 2 and victim.name in result.stderr and result.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_names_its_faces(run, refused, sample, tmp_path):
    line = refused("--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL, "--work-dir",
                   tmp_path / "w", "--lr", 1e30, "--warmup-epochs", 0, "--epochs", 2)
    assert "not finite" in line and ".png" in line and "--lr" in line
