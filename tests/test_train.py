"""train_simple.py: loss, metrics, plan, and whole runs as processes."""
import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
import typing
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial, partialmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LIGHT, ROOT, SMALL, assert_same_run, ended, rows, wait_for, weights, workers_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset as data
import train_simple as trainer
from dataset import DogFLWDataset
from tools import evaluate
from tools.lib import checkpoints, draw, runtime
from tools.lib.batches import epoch_batches
from tools.lib.cli import UserError
from tools.lib.draw import encode_picture
from tools.lib.files import file_lock
from tools.lib.pictures import read_image
from tools.lib.windows import apply_matrix, invert_matrix
from train_simple import Plan

ALONE = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1, sum=lambda tensor: tensor)  # runtime.Processes


def config_of(*args):
    return trainer.parse_args(list(map(str, args)))


# ---------------------------------------------------------------- the loss

def maps_and_points(seed=0, sharpness=1):
    """Random maps of 32 x 32 cells in float64, and points, some outside the crop."""
    torch.manual_seed(seed)
    logits = (sharpness * torch.randn(3, 5, 1024, dtype=torch.float64)).requires_grad_()
    return logits, logits.softmax(2).view(3, 5, 32, 32), torch.rand(3, 5, 2, dtype=torch.float64) * 70 - 4


def losses(maps, points, visible=None, **parts):
    """heatmap_losses with the parts that are named, and no other."""
    config = replace(config_of(), **{"mse_weight": 0.0, "crps_weight": 0.0, "kl_weight": 0.0, **parts})
    return trainer.heatmap_losses(maps, points, torch.ones(maps.shape[:2]) if visible is None else visible, 1.2, config)


def test_loss_counts_labelled_landmarks_alone():
    points, visible = torch.rand(2, 5, 2) * 60, torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0.0]])
    maps = torch.rand(2, 5, 32, 32)
    loss = trainer.heatmap_losses(maps, points, visible, 1.2, config_of())
    assert ((loss > 0) == (visible > 0)).all()
    changed = maps.clone()
    changed[visible == 0] += 5
    assert torch.equal(trainer.heatmap_losses(changed, points, visible, 1.2, config_of()), loss)


def test_loss_is_the_weighted_sum_of_its_parts():
    _, maps, points = maps_and_points()
    parts = [losses(maps, points, **{f"{name}_weight": 1}) for name in ("mse", "crps", "kl")]
    config = config_of("--mse-weight", 2, "--crps-weight", 0.5, "--kl-weight", 4)
    whole = trainer.heatmap_losses(maps, points, torch.ones(3, 5), 1.2, config)
    torch.testing.assert_close(whole, 2 * parts[0] + 0.5 * parts[1] + 4 * parts[2])
    assert all(part.min() > 0 for part in parts) and not losses(maps, points).any()


def test_loss_is_the_mse_of_maps_written_out():
    """The loss never makes its targets; here they are made, and maps and Gaussians subtracted cell by cell."""
    logits, maps, points = maps_and_points()
    fast = losses(maps, points, mse_weight=1)
    targets = data.encode_heatmaps(points, 32, 1.2)
    plain = (maps * 2 * math.pi * 1.44 - targets).square().sum((2, 3)) / (math.pi * 1.44)
    torch.testing.assert_close(fast, plain)
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (fast, plain)]
    torch.testing.assert_close(*gradients)


def test_loss_has_the_divergence_from_the_target():
    """PyTorch's own, of the whole target made as a map, some cut by the border; a map that is the target has none."""
    logits, maps, points = maps_and_points(sharpness=4)
    points = points.clamp(-0.5, 63.5)
    targets = data.encode_heatmaps(points, 32, 1.2)
    targets = targets / targets.sum((2, 3), keepdim=True)
    fast = losses(maps, points, kl_weight=1)
    plain = torch.nn.functional.kl_div((maps + 1e-9).log(), targets, reduction="none").sum((2, 3))
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (fast, plain)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses(targets, points, kl_weight=1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-5, rtol=0)


def test_loss_is_a_proper_score_of_places():
    """A certain map costs its distance in fractions of the crop, and of all maps the honest one costs least."""
    def cost(cells, truth):
        """Of a map with mass at some (x, y) cells of 32, where the truth is a cell's place."""
        maps = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
        for (x, y), mass in cells.items():
            maps[0, 0, y, x] = mass
        point = (torch.tensor(truth, dtype=torch.float64) + 0.5) * data.STRIDE - 0.5
        return losses(maps, point.view(1, 1, 2), crps_weight=1).item()

    assert cost({(9, 9): 1}, (9, 9)) == pytest.approx(0, abs=1e-9)
    assert cost({(9, 9): 0.75, (10, 9): 0.25}, (9.25, 9)) == pytest.approx(0, abs=1e-9)  # between cells, to no side
    assert cost({(9, 9): 1}, (12, 5)) == pytest.approx(7 / 32)
    share = [0.75 * cost({(9, 9): p, (19, 9): 1 - p}, (9, 9)) + 0.25 * cost({(9, 9): p, (19, 9): 1 - p}, (19, 9))
             for p in (0.6, 0.75, 0.9, 1)]
    assert min(share) == share[1]  # three times of four it is at one place: so say three quarters


# ---------------------------------------------------------------- metrics

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
    return data.Faces(scheme, Path(), [""] * n, np.full((n, 2), 500), boxes, points, visible, np.arange(n), np.arange(n), [""] * n)


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
    moved = replace(faces, points=apply_matrix(matrix, faces.points))
    assert trainer.mean_metrics(apply_matrix(matrix, points), moved, 1.25)["nme_iod"] == pytest.approx(
        trainer.mean_metrics(points, faces, 1.25)["nme_iod"], rel=1e-9, nan_ok=True)


# ---------------------------------------------------------------- prediction

@pytest.fixture(scope="module")
def trained(run):
    return trainer.Trained(run.work_dir / "best_model.pth")


@pytest.fixture(scope="module")
def val(run):
    return data.load_coco(run.ann_root / "val.json", run.data_root)


@pytest.fixture(scope="module")
def predict(trained):
    """predict(faces, ...) with the trained model: points, scores, loss."""
    def predict(faces, config=trained.config, processes=ALONE, **options):
        return trainer.predict(trained.model, DogFLWDataset(faces, trained.size, config.padding), config, processes, **options)
    return predict


def test_mirrored_averaging_is_equivariant(trained):
    """The prediction for the mirrored picture is the mirrored prediction, partners swapped."""
    flip = trained.flip_index()
    crops = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    plain, mirrored = (trainer.predict_heatmaps(trained.model, c, flip) for c in (crops, crops.flip(2)))
    torch.testing.assert_close(mirrored, plain.flip(3)[:, flip], atol=1e-4, rtol=1e-4)
    one, other = (trainer.predict_heatmaps(trained.model, c) for c in (crops, crops.flip(2)))
    torch.testing.assert_close(plain, (one + other.flip(3)[:, flip]) / 2, atol=1e-5, rtol=1e-4)


def test_the_mirrored_validation_set_gives_the_mirrored_predictions(predict, trained, val, tmp_path):
    """Pictures, boxes and landmarks mirrored, partners swapped: the same errors, but for the rounding of pixels."""
    for file in val.files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(encode_picture(read_image(val.root / file)[:, ::-1]))
    last, swap = val.sizes[:, :1] - 1, val.scheme.flip_index

    def mirror(points):
        return np.stack([last - points[..., 0], points[..., 1]], -1)[:, swap]
    x, y, w, h = val.boxes.T
    mirrored = replace(val, root=tmp_path, boxes=np.stack([last[:, 0] - x - w, y, w, h], 1), points=mirror(val.points),
                       visible=val.visible[:, swap])
    plain, turned = (predict(faces)[0] for faces in (val, mirrored))
    pixel = trainer.crop_side(val, trained.config.padding) / trained.size  # of the crop, in picture pixels: (N,)
    assert (np.linalg.norm(mirror(turned) - plain, axis=-1).mean(1) / pixel).mean() < 0.1
    errors = [trainer.mean_metrics(p, f, 1.25)["nme"] for p, f in ((plain, val), (turned, mirrored))]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_batches_and_threads_do_not_change_a_prediction(predict, val):
    single = predict(val, batch_size=1, sigma=1.2)
    for batch_size, threads in ((12, 1), (5, 1), (12, 2)):
        torch.set_num_threads(threads)
        try:
            other = predict(val, batch_size=batch_size, sigma=1.2)
        finally:
            torch.set_num_threads(1)
        for a, b, tolerance in zip(single, other, (0.01, 1e-4, 1e-5)):  # picture pixels, score, loss
            np.testing.assert_allclose(b, a, atol=tolerance)


def test_sharded_validation_is_exact(predict, val):
    """Each of 3 processes fills its rows of one table; their sum is the table of one process, bit for bit."""
    whole, tables = predict(val, batch_size=1, sigma=1.2), []
    for rank in range(3):
        predict(val, batch_size=1, sigma=1.2, processes=SimpleNamespace(
            device=ALONE.device, rank=rank, world=3, sum=lambda table: tables.append(table.clone()) or table))
    table = sum(tables).numpy()
    assert all(((t != 0).sum() > 0) for t in tables) and np.array_equal(table[..., :2], whole[0])
    assert np.array_equal(table[..., 2], whole[1]) and table[..., 3].mean() == whole[2]


def test_decoding_and_losses_follow_the_settings(predict, val, trained):
    """What the settings say is what a face's maps are decoded by and its loss made of."""
    config = replace(trained.config, decode_power=3.0, score_radius=0.2, mse_weight=2.0, crps_weight=0.0, kl_weight=0.0)
    points, scores, loss = predict(val, config, sigma=1.2, flip=False)
    batch = DogFLWDataset(val, trained.size).batch(range(len(val)))
    heatmaps = trainer.predict_heatmaps(trained.model, batch["image"])
    expected, confidence = data.decode_heatmaps(heatmaps, 3.0, 0.2)
    inverse = invert_matrix(batch["matrix"].numpy())
    np.testing.assert_allclose(points, apply_matrix(inverse, expected.double().numpy()), atol=0.01)
    np.testing.assert_allclose(scores, confidence, atol=1e-4)
    each = trainer.heatmap_losses(heatmaps, batch["keypoints"], batch["visibility"], 1.2, config)
    assert loss == pytest.approx(each.mean().item(), rel=1e-4)
    assert np.abs(points - predict(val, flip=False)[0]).max() > 0.1 and math.isnan(predict(val)[2])


def test_16_bits_predict_about_the_same(trained):
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    full, half = (trainer.predict_heatmaps(trained.model, crops, amp=amp) for amp in (None, torch.bfloat16))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half.sum((2, 3)), torch.ones(2, 46))
    points = [data.decode_heatmaps(h, 1.5, 0.05)[0] for h in (full, half)]
    assert (points[0] - points[1]).abs().max() < 2  # crop pixels


@pytest.mark.parametrize("unit, dtype", [("amx_tile", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("none", None)])
def test_a_cpu_computes_in_16_bits_where_it_has_a_unit_for_it(monkeypatch, unit, dtype):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == unit, raising=False)
    assert runtime.choose_amp(torch.device("cpu")) == dtype
    assert runtime.choose_amp(torch.device("cpu"), wanted=False) is None


# ---------------------------------------------------------------- the plan

def test_targets_narrow_over_the_run():
    plan = Plan(config_of("--batch-size", 1, "--epochs", 10), 10)
    sigmas = [plan.sigma(step, 256) for step in range(plan.total + 1)]
    assert sigmas[0] == 3.0 and sigmas[-1] == 1.5 and sigmas == sorted(sigmas, reverse=True)
    assert sigmas[50] ** 2 == pytest.approx(sigmas[0] * sigmas[100])
    assert plan.sigma(50, 128) == sigmas[50] / 2
    plan = Plan(config_of("--batch-size", 1, "--epochs", 10, "--sigma", 2, "--sigma-ratio", 1), 10)
    assert {plan.sigma(step, 256) for step in range(plan.total)} == {2.0}


def test_learning_rate():
    plan = Plan(config_of("--batch-size", 1, "--epochs", 10, "--lr", 0.5), 10)
    rates = [plan.lr(step) for step in range(100)]
    assert rates[0] == 0.05 and rates[9] == 0.5 and rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25) and 0 < rates[99] < 1e-3
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    for warmup in (0, 0.03, 0.25, 20):
        plan = Plan(config_of("--batch-size", 1, "--epochs", 10, "--lr", 0.5, "--warmup-epochs", warmup), 10)
        assert max(plan.lr(step) for step in range(100)) <= 0.5 and plan.lr(0) > 0


def test_small_crops_and_validations_over_the_epochs():
    plans = {s: Plan(config_of("--epochs", 7, "--input-size", s, "--val-every", 3), 40) for s in (64, 128, 192, 256, 320, 512)}
    sizes = {s: [plan.size(e) for e in range(7)] for s, plan in plans.items()}
    assert {s: v[:2] for s, v in sizes.items()} == {64: [64] * 2, 128: [128] * 2, 192: [128] * 2, 256: [128] * 2, 320: [160] * 2, 512: [256] * 2}
    assert all(v[2:] == [s] * 5 and sorted(set(v)) == plans[s].sizes for s, v in sizes.items())
    assert [e for e in range(7) if plans[64].validates(e)] == [2, 5, 6]


def test_processes_share_the_batch_exactly():
    def batches(*args, faces=37, first=1, world=1):
        plan = Plan(config_of("--epochs", 3, "--input-size", 160, "--progressive", 0.7, *args), faces, world)
        parts = [list(epoch_batches(plan, first, r, world)) for r in range(world)]
        return [sorted(sum((part[i] for part in parts), [])) for i in range(len(parts[0]))]
    whole = batches("--batch-size", 8)
    assert len(whole) == 8 and all(len(b) == 8 for b in whole)
    assert batches("--batch-size", 8, world=2) == whole and batches("--batch-size", 8, world=4) == whole
    assert len({i for b in whole[:4] for _, i, _ in b}) == 32
    assert [[i for _, i, _ in b] for b in whole[:4]] != [[i for _, i, _ in b] for b in whole[4:]]  # each epoch has its order
    assert [{(epoch, size) for epoch, _, size in b} for b in whole] == [{(1, 128)}] * 4 + [{(2, 160)}] * 4
    assert batches("--batch-size", 8, first=0)[4:] == whole  # a resumed run sees what an uncut one sees
    few = batches("--batch-size", 32, "--accumulate", 4, faces=11)
    assert [len(b) for b in few] == [2] * 8  # of fewer faces than a batch, micro-batches of one size all the same
    assert batches("--batch-size", 8, "--seed", 1) != whole
    for wrong in (("--batch-size", 8, "--accumulate", 3), ("--batch-size", 64, "--accumulate", 64)):
        with pytest.raises(UserError, match="--batch-size .*: must be a multiple of --accumulate x processes, (3|64), and that must"):
            batches(*wrong)


@pytest.mark.parametrize("backbone", ["hrnet_w18_small", "tiny_vit_5m_224"])
def test_decay_is_of_no_bias_and_no_norm(backbone):
    model = trainer.LandmarkNet(backbone, 5)
    optimizer = trainer.build_optimizer(model, config_of("--weight-decay", 0.2, "--beta1", 0.8, "--beta2", 0.95))
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    norms = torch.nn.BatchNorm2d, torch.nn.LayerNorm
    expected = {p: 0.0 if isinstance(m, norms) or name == "bias" else 0.2
                for m in model.modules() for name, p in m.named_parameters(recurse=False)}
    assert decay == expected and {*decay.values()} == {0.0, 0.2}
    assert all(g["betas"] == (0.8, 0.95) for g in optimizer.param_groups)


def test_a_backbone_may_learn_at_a_part_of_the_rate(flags, tmp_path, monkeypatch):
    """--backbone-lr-mult is of the backbone alone; metrics.csv has the head's rate, the plan's; a resumed run goes on."""
    build, seen = trainer.build_optimizer, []

    def kept(model, config):
        seen.append((model, build(model, config)))
        return seen[-1][1]

    def losses(maps, points, visible, sigma, config, real=trainer.heatmap_losses):
        sigmas.extend([sigma] * maps.requires_grad)
        return real(maps, points, visible, sigma, config)
    sigmas = []
    monkeypatch.setattr(trainer, "build_optimizer", kept)
    monkeypatch.setattr(trainer, "heatmap_losses", losses)
    command = [*map(str, [*flags, *LIGHT, "--work-dir", tmp_path / "w", "--epochs", 2])]
    trainer.main([*command, "--backbone-lr-mult", "0.25"])
    last = torch.load(tmp_path / "w/last.pth", weights_only=True)
    trainer.main([*command, "--backbone-lr-mult", "0.25", "--resume"])
    rates = [float(row["lr"]) for row in rows(tmp_path / "w")]
    plan = Plan(config_of(*command), 40)
    assert len(seen) == 2 and rates == pytest.approx([plan.lr(4), plan.lr(9)], rel=1e-4)  # of the last step of each epoch
    assert sigmas == [plan.sigma(step, 64) for step in range(10)]
    for model, optimizer in seen:
        rate = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rate) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            assert rate[p] == pytest.approx((rates[-1] * (0.25 if name.startswith("backbone.") else 1), 0.1 * (p.ndim > 1)))
    assert {group["scale"] for group in last["optimizer"]["param_groups"]} == {0.25, 1}
    with pytest.raises(UserError, match="--backbone-lr-mult"):
        trainer.main([*command, "--resume"])
    plain = build(seen[0][0], config_of())  # weights, then vectors: the groups of runs before there was this setting
    assert [(group["scale"], group["weight_decay"]) for group in plain.param_groups] == [(1, 0.1), (1, 0)]


def test_the_average_follows_the_weights():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = deepcopy(model)
    expected = [v.clone() for v in model.state_dict().values()]
    follow = runtime.WeightAverage(model, average, 0.7)
    for step in range(40):
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape)) if value.is_floating_point() else value.add_(1)
        follow.update(step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * v if v.is_floating_point() else e for e, v in zip(expected, model.state_dict().values())]
    torch.testing.assert_close(list(average.state_dict().values()), expected)


def test_one_batch_is_learnt(sample):
    faces = data.load_coco(sample.ann_root / "train.json", sample.data_root).take(range(8))
    batch = DogFLWDataset(faces, 64).batch(list(range(len(faces))))
    torch.manual_seed(0)
    model = trainer.LandmarkNet(LIGHT[1], 46)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    images, errors = data.normalize(batch["image"], model.mean, model.std), []
    while len(errors) < 120 and min(errors, default=1) > 0.015:
        heatmaps = model(images)
        optimizer.zero_grad()
        trainer.heatmap_losses(heatmaps, batch["keypoints"], batch["visibility"], 1.2, config_of()).mean().backward()
        optimizer.step()
        points, _ = data.decode_heatmaps(heatmaps.detach(), 1.5, 0.05)
        distance = (points - batch["keypoints"]).norm(dim=-1) * batch["visibility"]
        errors.append((distance.sum(1) / batch["visibility"].sum(1) / 64).mean().item())
    assert errors[-1] < 0.015 < errors[0], errors


# ---------------------------------------------------------------- whole runs

def test_a_run_and_what_it_leaves(run, trained, val, predict):
    names = {p.name for p in run.work_dir.iterdir()}
    assert names == {".lock", "args.json", "metrics.csv", "best_model.pth", "last.pth", "train_batch.jpg", "val_predictions.jpg",
                     "curves.png"}
    table = rows(run.work_dir)
    assert [r["epoch"] for r in table] == ["1", "2"] and tuple(table[0])[0] == "epoch"
    assert math.isnan(float(table[0]["nme"])) and float(table[1]["nme"]) == pytest.approx(trained.metrics["nme"], rel=1e-5)
    points, scores, _ = predict(val)
    assert trainer.mean_metrics(points, val, 1.25) == pytest.approx({k: trained.metrics[k] for k in trainer.METRICS}, abs=1e-6)
    assert trained.metrics["chosen_on"] == "val.json" and trained.epoch == 2
    seen = trained.look([(read_image(val.root / file), box) for file, box in zip(val.files, val.boxes)])  # as every tool looks
    np.testing.assert_allclose(seen[0], points, atol=0.01)
    np.testing.assert_allclose(seen[1], scores, atol=1e-4)
    last = checkpoints.load_checkpoint(run.work_dir / "last.pth")  # its model is the average; the raw weights went on
    assert all(torch.equal(last["model"][k], v) for k, v in trained.model.state_dict().items())
    assert not torch.equal(last["model"]["head.3.weight"], last["raw"]["head.3.weight"])


def test_small_crops_come_first_and_val_is_scored_once(sample, flags, script, start, tmp_path):
    """The first epochs see half the size; each checkpoint says which it is for, and scores as it said; cut or not.

    With another padding than the default, which training and every tool must take from the settings.
    """
    (ann := tmp_path / "ann").mkdir()
    for name, count in (("train", 20), ("val", 4)):  # fewer faces
        coco = json.loads((sample.ann_root / f"{name}.json").read_text())
        kept = {image["id"] for image in coco["images"][:count]}
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
        (ann / f"{name}.json").write_text(json.dumps({**coco, "images": coco["images"][:count]}))
    options = [*flags, *LIGHT, "--ann-root", ann, "--input-size", 160, "--progressive", 0.5, "--padding", 1.5, "--holdout", 0.2, "--val-every", 1,
               "--work-dir"]
    process = start("train_simple.py", *options, tmp_path / "cut")
    wait_for(process, "epoch   1/2  128 px")
    process.kill()
    process.join()
    shutil.copytree(tmp_path / "cut", tmp_path / "first")
    script("train_simple.py", *options, tmp_path / "cut", "--resume", check=True)
    said = script("train_simple.py", *options, tmp_path / "uncut", check=True).stdout
    faces = data.load_coco(ann / "train.json", sample.data_root).split(0.2)[1]

    def score(checkpoint, faces):
        trained = trainer.Trained(tmp_path / checkpoint)
        points = trainer.predict(trained.model, DogFLWDataset(faces, trained.size, 1.5), trained.config, ALONE)[0]
        seen, _ = trained.look([(read_image(faces.root / file), box) for file, box in zip(faces.files, faces.boxes)])
        np.testing.assert_allclose(seen, points, atol=0.05)
        return trained, trainer.mean_metrics(points, faces, 1.5)
    for name, size in (("first", 128), ("uncut", 160)):
        trained, metrics = score(f"{name}/last.pth", faces)
        assert trained.size == size and trained.config.input_size == 160 and trained.metrics["chosen_on"] == "faces held out of train"
        assert metrics == pytest.approx({k: trained.metrics[k] for k in metrics}, abs=1e-6)
    test = json.loads((tmp_path / "uncut/test.json").read_text())
    val = data.load_coco(ann / "val.json", sample.data_root)
    for checkpoint in ("first/last.pth", "uncut/best_model.pth"):
        once = score(checkpoint, val)[1]
        evaluate.main([str(tmp_path / checkpoint), "--ann", str(ann / "val.json"), "--device", "cpu",
                       "--out", str(tmp_path / "report"), "--force"])
        report = json.loads((tmp_path / "report/report.json").read_text())
        assert {k: report["metrics"][k] for k in once} == pytest.approx(once, abs=1e-6)
    assert test == {"chosen_on": "faces held out of train", "faces": 4, **{k: pytest.approx(v, abs=1e-6) for k, v in once.items()}}
    assert "on the faces that chose it" in said and "4 faces that did not choose it" in said
    assert_same_run(tmp_path / "cut", tmp_path / "uncut")


def test_the_best_epoch_is_kept_by_the_first_metric_and_scored_once(flags, tmp_path, monkeypatch):
    """Of errors 0.3, 0.1, 0.2 the second, although the run was cut after it, and although another metric's best is the first."""
    def validate(run, dataset, real=trainer.validate):
        epoch, weights = run.progress["epoch"], run.ema.head[-1].weight.clone()
        points, loss, metrics = real(run, dataset)
        if len(dataset) == 12:  # val.json's, at the end
            scored.append(weights)
            return points, loss, metrics
        chosen.append(weights)
        if len(chosen) == 3:
            raise KeyboardInterrupt
        return points, loss, metrics | {"nme": [0.3, 0.1, 0.2][epoch - 1], "nme_iod": epoch}

    def save(saver, *args, real=trainer.Saver.save):
        saver.next = 0  # last.pth of every epoch, however fast they are
        return real(saver, *args)
    chosen, scored = [], []
    monkeypatch.setattr(trainer, "validate", validate)
    monkeypatch.setattr(trainer.Saver, "save", save)
    command = [*map(str, [*flags, *LIGHT, "--epochs", 3, "--val-every", 1, "--holdout", 0.2, "--work-dir", tmp_path / "w"])]
    with pytest.raises(SystemExit):
        trainer.main(command)
    trainer.main([*command, "--resume"])
    best = checkpoints.load_checkpoint(tmp_path / "w/best_model.pth")
    assert len(chosen) == 4 and (best["epoch"], best["metrics"]["nme"], best["metrics"]["nme_iod"]) == (2, 0.1, 2)
    assert len(scored) == 1 and torch.equal(scored[0], chosen[1]) and not torch.equal(scored[0], chosen[3])


def test_the_seed_is_of_augmentation_and_new_weights_not_of_the_holdout(flags, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def stop(dataset, *_):
        seen[-1] += [dataset.seed, dataset.faces.files]
        raise Enough

    def kept(*args, real=trainer.build_model):
        model = real(*args)
        seen.append([model.head[-1].weight])
        return model
    seen = []
    monkeypatch.setattr(trainer, "build_model", kept)
    monkeypatch.setattr(trainer, "batches_of", stop)
    for seed in (0, 1):
        with pytest.raises(Enough):
            trainer.main([*map(str, [*flags, *LIGHT, "--holdout", 0.2, "--seed", seed, "--work-dir", tmp_path / str(seed)])])
    (first, *others), (second, *theirs) = seen
    assert not torch.equal(first, second) and (others[0], theirs[0]) == (0, 1) and others[1] == theirs[1]


def test_a_file_of_weights_comes_before_imagenets(run, trained, monkeypatch):
    monkeypatch.setattr(trainer, "take_imagenet", lambda *_: pytest.fail("asked for"))
    config = config_of("--backbone", "hrnet_w18_small", "--weights", run.work_dir / "best_model.pth")
    model = trainer.build_model(config, trained.scheme, lambda line: None)
    assert config.pretrained and all(torch.equal(v, trained.model.state_dict()[k]) for k, v in model.named_parameters())


def test_a_run_that_goes_on_writes_over_no_other_files(refused, flags, tmp_path):
    (tmp_path / "epoch_3.pth").touch()
    assert "epoch_3.pth is there; name another" in refused(*flags, *LIGHT, "--work-dir", tmp_path, "--resume")
    shutil.copytree(flags[flags.index("--ann-root") + 1], tmp_path / "ann")
    assert "train.json is there; name another" in refused(*flags, *LIGHT, "--work-dir", tmp_path / "ann", "--resume")
    (tmp_path / "ann/val.json").unlink()
    before = (tmp_path / "ann/train.json").read_bytes()
    line = refused("--sample", "--device", "cpu", "--data-root", flags[1], "--ann-root", tmp_path / "ann", "--work-dir", tmp_path / "w")
    assert "holds a train.json that is not the sample's" in line and (tmp_path / "ann/train.json").read_bytes() == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own/dog.jpg").touch()
    assert "own holds other pictures; leave --sample out" in refused("--sample", "--data-root", tmp_path / "own", "--ann-root", tmp_path / "new", "--work-dir", tmp_path / "w")
    line = refused("--sample", "--device", "cpu", "--data-root", flags[1], "--work-dir", tmp_path / "w")
    assert "--data-root and --ann-root belong together" in line


def test_a_table_that_another_program_has_open_ends_no_run(flags, tmp_path, monkeypatch, capsys):
    """Excel locks it, on Windows."""
    real, locked = draw.atomic_write, [True]

    def write(path, parts):
        if path.name == "metrics.csv" and locked:
            locked.clear()
            raise PermissionError(13, "Permission denied", str(path))
        real(path, parts)
    monkeypatch.setattr(draw, "atomic_write", write)
    trainer.main([*map(str, [*flags, *LIGHT, "--epochs", 2, "--val-every", 1, "--work-dir", tmp_path / "w"])])
    assert "metrics.csv: is open in another program" in capsys.readouterr().out
    assert len((tmp_path / "w/metrics.csv").read_text().splitlines()) == 3 and (tmp_path / "w/best_model.pth").exists()


def test_what_cannot_be_together_is_said_at_once():
    with pytest.raises(UserError, match="--empty, --background: need --crop image.*; --graphs: not together.*; --freeze: would keep"):
        trainer.parse_args(["--empty", "0.3", "--graphs", "--compile", "--freeze", "--no-pretrained"])


def test_args_json_tells_how_a_run_went_on(flags, tmp_path):
    options = [*map(str, [*flags, *LIGHT, "--epochs", 1, "--work-dir", tmp_path / "w"])]
    trainer.main(options)
    path = tmp_path / "w/args.json"
    first = json.loads(path.read_text())
    path.write_text(json.dumps({**first, "versions": first["versions"] | {"git": "older"}}))
    for _ in range(2):
        trainer.main([*options, "--resume", "--accumulate", "2"])
    now = json.loads(path.read_text())
    assert now["accumulate"] == 2 and now["versions"] == first["versions"]
    assert now["former_versions"] == [first["versions"] | {"git": "older"}]


def test_a_picture_that_is_trained_on_and_chooses_is_said(sample, flags, tmp_path, capsys):
    for name in ("train", "val"):
        shutil.copy(sample.ann_root / "val.json", tmp_path / f"{name}.json")
    trainer.main([*map(str, [*flags, *LIGHT, "--ann-root", tmp_path, "--epochs", 1, "--work-dir", tmp_path / "w"])])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'val.json'}: 12 of its pictures are in {tmp_path / 'train.json'}, too" in said
    chosen = checkpoints.load_checkpoint(tmp_path / "w/best_model.pth")["metrics"]["chosen_on"]
    assert chosen == "val.json, which it was trained on"


def test_a_checkpoint_knows_how_boxes_lie_around_landmarks(sample, flags, tmp_path):
    """Two eyes and a nose, in boxes of faces; the light copy knows it too, and damage is refused."""
    coco, mine = json.loads((sample.ann_root / "val.json").read_text()), [18, 19, 25]
    coco["categories"] = [{"id": 1, "name": "dog", "keypoints": ["left_eye", "right_eye", "nose"]}]
    for a in coco["annotations"]:
        a["keypoints"] = np.reshape(a["keypoints"], (-1, 3))[mine].ravel().tolist()
    (tmp_path / "mine.json").write_text(json.dumps(coco))
    options = [*flags, *LIGHT, "--ann-root", tmp_path / "mine.json", "--holdout", 0.3, "--epochs", 1, "--work-dir", tmp_path / "w"]
    trainer.main([*map(str, options)])
    stored = checkpoints.load_checkpoint(tmp_path / "w/best_model.pth")
    assert len(stored["room"]) == 4 and all(0.2 < v < 2 for v in stored["room"])
    folders = {f.name for f in fields(trainer.Config) if Path in (f.type, *typing.get_args(f.type))}
    assert folders == set(checkpoints.PATHS)
    light = checkpoints.lightened({**stored, "args": stored["args"] | {"weights": "a/b.pth", "cache": r"C:\me\c"}})
    assert light["args"]["weights"] == "b.pth" and light["args"]["cache"] == "c" and not any("/" in str(light["args"][name]) for name in folders)
    for name, value in light["model"].items():  # vectors stay: a variance may be beyond 16 bits
        assert value.dtype == (torch.float16 if value.ndim > 1 else stored["model"][name].dtype), name
        torch.testing.assert_close(value.to(stored["model"][name].dtype), stored["model"][name], rtol=1e-3, atol=1e-4)
    checkpoints.save_checkpoint(tmp_path / "light.pth", light)
    assert trainer.Trained(tmp_path / "light.pth").room == stored["room"] == data.load_coco(tmp_path / "mine.json", sample.data_root).room
    for room in ([1.0], ["x"] * 4, [math.nan] * 2, 3):
        checkpoints.save_checkpoint(tmp_path / "bad.pth", {**stored, "room": room})
        with pytest.raises(UserError, match="do not fit together"):
            trainer.Trained(tmp_path / "bad.pth")


def test_the_plain_recipe_trains_and_chooses_without_a_val_json(sample, refused, flags, tmp_path, capsys):
    """MSE alone, no average, no progression, one sigma: the specification's; the loss falls. All is held out of train."""
    (tmp_path / "ann").mkdir()
    shutil.copy(sample.ann_root / "train.json", tmp_path / "ann")
    options = [*flags, *LIGHT, "--ann-root", tmp_path / "ann", "--crps-weight", 0, "--kl-weight", 0, "--ema", 0, "--progressive", 0, "--sigma-ratio", 1, "--sigma", 1.5,
               "--epochs", 5, "--lr", 0.01, "--work-dir", tmp_path / "w"]
    assert "no val.json" in (line := refused(*options)) and "--holdout" in line
    trainer.main([*map(str, options), "--holdout", "0.2", "--resume"])
    said, losses = capsys.readouterr().out, [float(row["train_loss"]) for row in rows(tmp_path / "w")]
    assert losses[-1] < 0.95 * losses[0] and losses == sorted(losses, reverse=True), losses
    rest, held = data.load_coco(sample.ann_root / "train.json", sample.data_root).split(0.2)
    assert f"{len(rest)} faces to train on, {len(held)} to choose on (faces held out of train)" in said
    assert not (tmp_path / "w/test.json").exists()
    last = checkpoints.load_checkpoint(tmp_path / "w/last.pth")
    assert all(torch.equal(last["model"][k], last["raw"][k]) for k in last["raw"])


def test_a_frozen_backbone_keeps_its_weights(run, refused, flags, tmp_path):
    for more in (), ("--resume",):  # with nothing to resume
        assert "--weights" in refused(*flags, "--freeze", *more, "--work-dir", tmp_path / "random")
    start = run.work_dir / "best_model.pth"
    trainer.main([*map(str, [*flags, "--weights", start, "--freeze", "--epochs", 1, "--work-dir", tmp_path / "w"])])
    before, after = (checkpoints.load_checkpoint(p)["model"] for p in (start, tmp_path / "w/best_model.pth"))
    parameters = dict(trainer.LandmarkNet("hrnet_w18_small", 46).named_parameters())
    same = {name: torch.equal(before[name], after[name]) for name in parameters}
    assert all(equal == name.startswith("backbone.") for name, equal in same.items()), same


def test_a_locator_is_trained_with_pictures_of_the_background(flags, tmp_path, capsys):
    (tmp_path / "bg").mkdir()
    for n in range(6):
        Image.new("RGB", (50 + n, 40), (40 * n, 90, 200)).save(tmp_path / f"bg/{n}.png")
    locator = ("--crop", "image", "--padding", 1, "--scale", 1.5, "--empty", 0.3, "--background", tmp_path / "bg")
    trainer.main([*map(str, [*flags, *LIGHT, *locator, "--holdout", 0.3, "--epochs", 1, "--work-dir", tmp_path / "w"])])
    said = capsys.readouterr().out
    assert "bg: 6 pictures without a face" in said and (tmp_path / "w/train_batch.jpg").exists()
    chosen = checkpoints.load_checkpoint(tmp_path / "w/best_model.pth")
    assert chosen["metrics"]["nme"] > 0 and chosen["args"]["background"] == str(tmp_path / "bg")
    faces = sum(map(int, re.search(r"(\d+) faces to train on, (\d+) to choose", said).groups()))
    assert faces == 40 + 6
    config = trainer.parse_args([*map(str, [*flags, *locator, "--holdout", 0.3])])
    sets = trainer.load_sets(config, runtime.Processes("cpu"))[:3]
    assert all((faces.boxes == np.column_stack([0 * faces.sizes, faces.sizes - 1])).all() for faces in sets)
    evaluate.main([str(tmp_path / "w/best_model.pth"), "--device", "cpu", "--out", str(tmp_path / "report")])
    ours, its = (json.loads((tmp_path / name).read_text()) for name in ("w/test.json", "report/report.json"))
    assert {k: its["metrics"][k] for k in trainer.METRICS} == pytest.approx({k: ours[k] for k in trainer.METRICS}, abs=1e-6)


def test_workers_and_the_cache_do_not_change_a_run(light, train, tmp_path):
    train(tmp_path / "w", *LIGHT, "--num-workers", 2, "--cache", "none", check=True)  # the run itself has none, and a cache
    assert_same_run(tmp_path / "w", light.work_dir)


RUN = """
import pathlib
import train_simple
from tools.lib.cli import run_script
if __name__ == "__main__":
    try:
        run_script(train_simple.main)
    finally:  # what is left of the group when the interpreter ends may abort the process
        if any("gloo" in file.read_text() for file in pathlib.Path("/proc/self/task").glob("*/comm")):
            os._exit(70)
"""
FROZEN_BN = """
import os
import torch
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)  # batch statistics aside
# Adam's first steps are the signs of the gradients, which rounding may turn; plain steps show the gradients themselves.
torch.optim.AdamW = lambda parameters, lr, **others: torch.optim.SGD(parameters, lr=lr)
""" + RUN


@pytest.fixture
def job(start, tmp_path):
    """Run processes as torchrun starts them: one a folder, all of one node or each of its own; what they printed."""
    def run(code, one_node, *folders, flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        processes = []
        for rank, folder in enumerate(folders):
            environment = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank * one_node)}
            (tmp_path / f"{rank}.py").write_text(f"import os\nos.environ |= {environment}\n{code}")
            processes.append(start(tmp_path / f"{rank}.py", *flags, "--work-dir", folder))
        for process in processes:
            process.join(120)
            assert process.exitcode == 0, process.err.read_text()
        return [process.out.read_text() for process in processes]
    return run


def test_two_processes_or_micro_batches_train_as_one(script, job, flags, tmp_path):
    """2 x 8 faces give the gradients of 1 x 16 within float tolerance, and the same metrics."""
    (tmp_path / "frozen.py").write_text(FROZEN_BN)
    flags = [*flags, *LIGHT, "--epochs", 1, "--batch-size", 16]
    script(tmp_path / "frozen.py", *flags, "--work-dir", tmp_path / "whole", check=True)
    script(tmp_path / "frozen.py", *flags, "--work-dir", tmp_path / "parts", "--accumulate", 2, check=True)
    said = job(FROZEN_BN, True, *[tmp_path / "processes"] * 2, flags=flags)
    assert "2 x cpu" in said[0] and not said[1]
    whole, (row,) = weights(tmp_path / "whole" / "last.pth"), rows(tmp_path / "whole")
    torch.manual_seed(0)
    start = trainer.LandmarkNet(LIGHT[1], 46).state_dict()
    assert sum(not torch.allclose(v, whole[f"raw.{k}"]) for k, v in start.items() if v.is_floating_point()) > 50
    for name in ("parts", "processes"):
        other, (its,) = weights(tmp_path / name / "last.pth"), rows(tmp_path / name)
        assert all(torch.allclose(whole[k].float(), other[k].float(), atol=1e-6, rtol=1e-4) for k in whole), name
        assert float(row["train_loss"]) == pytest.approx(float(its["train_loss"]), rel=1e-4), name
        assert float(row["nme"]) == pytest.approx(float(its["nme"]), rel=1e-3), name


def test_two_processes_resume_bit_for_bit(job, flags, tmp_path):
    """Each saw other faces, so their batch norm statistics differ; all go on from their mean, cut or not."""
    flags = [*flags, *LIGHT, "--epochs", 2, "--batch-size", 8, "--no-amp"]
    stop = "import train_simple\nreal = train_simple.train_one_epoch\ndef once(run, *rest):\n    if run.progress['epoch']:\n        " \
           "os._exit(0)\n    return real(run, *rest)\ntrain_simple.train_one_epoch = once\n"
    job(RUN, True, *[tmp_path / "uncut"] * 2, flags=flags)
    job(stop + RUN, True, *[tmp_path / "cut"] * 2, flags=flags)
    job(RUN, True, *[tmp_path / "cut"] * 2, flags=[*flags, "--resume"])
    assert_same_run(tmp_path / "cut", tmp_path / "uncut")


def test_two_nodes_without_a_shared_disk_resume_as_one(job, light, flags, tmp_path):
    """The second node has no last.pth and no best_model.pth: both come from the first."""
    shutil.copytree(light.work_dir, tmp_path / "0")
    said = job(RUN, False, tmp_path / "0", tmp_path / "1", flags=[*flags, *LIGHT, "--resume"])
    assert "2 x cpu" in said[0] and "best: epoch 2" in said[0] and "train loss" not in said[0] and not said[1]
    assert not (tmp_path / "1").exists()
    assert_same_run(tmp_path / "0", light.work_dir)


# ---------------------------------------------------------------- signals and locks

@pytest.mark.parametrize("number,code,group", [(signal.SIGTERM, 143, False), (signal.SIGTERM, 143, True), (signal.SIGINT, 130, True)])
def test_signals_end_a_run_with_a_word(start, flags, tmp_path, number, code, group):
    process = start("train_simple.py", *flags, *LIGHT, "--work-dir", tmp_path / "w", "--num-workers", 2, "--epochs", 500)
    wait_for(process, "epoch   1")
    time.sleep(0.2)
    for pid in [*workers_of(process.pid), process.pid] if group else [process.pid]:  # `timeout` and a terminal reach all of them
        os.kill(pid, number)
    assert "stopped" in (line := ended(process, code)) and "--resume" in line


def test_pressing_ctrl_c_again_and_again_gives_one_line(start, flags, tmp_path):
    process = start("train_simple.py", *flags, *LIGHT, "--work-dir", tmp_path / "w", "--num-workers", 2, "--epochs", 500)
    wait_for(process, "epoch   1")
    while process.is_alive():
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.02)
    assert "stopped" in (line := ended(process, 130)) and "--resume" in line


def test_one_run_in_a_folder_and_a_killed_one_leaves_no_lock_behind(start, flags, tmp_path, refused):
    flags = [*flags, *LIGHT, "--work-dir", tmp_path / "w", "--epochs", 500, "--num-workers", 2]
    process = start("train_simple.py", *flags)
    try:
        wait_for(process, "epoch   1")
        assert "another run" in refused(*flags, "--resume")
    finally:
        process.kill()
        process.join()
    with file_lock(tmp_path / "w/.lock", "its workers still hold it"):
        pass


# ---------------------------------------------------------------- what the user gets wrong, or the data

class Payload:
    def __reduce__(self):
        return os.system, ("touch {}".format(os.environ["PAYLOAD_MARK"]),)


def test_a_malicious_checkpoint_runs_nothing(tmp_path, monkeypatch, refused, flags):
    monkeypatch.setenv("PAYLOAD_MARK", str(tmp_path / "ran"))
    torch.save({"format": 1, "model": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "evil2.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UserError, match=name):
            checkpoints.load_checkpoint(tmp_path / name)
        assert name in refused(*flags, "--weights", tmp_path / name, "--work-dir", tmp_path / name[:5])
    assert not (tmp_path / "ran").exists()


class Forged:
    def __reduce__(self):
        return np.ndarray, ((1,), "O", bytearray(8))


def test_what_mmpose_saves_is_read(tmp_path, monkeypatch):
    """Beside its weights lies what it logged, of a class that is not here."""
    module = ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    log = module.HistoryBuffer()
    module.HistoryBuffer.min = lambda self: 0
    module.HistoryBuffer.min.__module__, module.HistoryBuffer.min.__qualname__ = module.__name__, "HistoryBuffer.min"
    log.__dict__ |= {"statistics_methods": {"min": module.HistoryBuffer.min}, "max_length": 10, "_log_history": np.arange(3.0), "_count_history": np.ones(3)}
    with monkeypatch.context() as theirs:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            theirs.setitem(sys.modules, name, module)
        torch.save({"state_dict": {"backbone.conv1.weight": torch.ones(3)}, "message_hub": {"log_scalars": {"loss": log}}}, tmp_path / "epoch_210.pth")
    read = checkpoints.load_file_safely(tmp_path / "epoch_210.pth")
    assert read["state_dict"]["backbone.conv1.weight"].sum() == 3 and isinstance(read["message_hub"]["log_scalars"]["loss"], checkpoints.Unread)


def test_a_file_gives_numpy_no_pointers(run, tmp_path):
    checkpoint = torch.load(run.work_dir / "best_model.pth", weights_only=True)
    checkpoint["args"]["seed"] = checkpoint["epoch_of_another"] = Forged()
    torch.save(checkpoint, tmp_path / "forged.pth")
    assert not isinstance(checkpoints.load_checkpoint(tmp_path / "forged.pth")["epoch_of_another"], np.ndarray)
    with pytest.raises(UserError, match="do not fit together"):
        trainer.Trained(tmp_path / "forged.pth")


def test_mistakes_are_one_line(run, refused, tmp_path, sample):
    w = ("--work-dir", tmp_path / "w", "--no-pretrained", "--cache", "none")
    here = ("--data-root", sample.data_root, "--ann-root", sample.ann_root)
    assert "--batch-size 0" in refused("--batch-size", 0)
    assert "--crop image" in refused("--background", tmp_path, "--empty", 0.2)
    assert "--empty" in refused("--background", tmp_path, "--crop", "image")
    assert "no picture there" in refused(*w, *here, "--background", tmp_path / "none", "--crop", "image", "--empty", 0.2)
    assert "--crop image" in refused("--empty", 0.2) and "--kl-weight" in refused("--empty", 0.2, "--crop", "image", "--kl-weight", 0)
    assert "--graphs" in refused("--graphs", "--compile") and "--graphs" in refused("--graphs", "--accumulate", 2)
    assert "--epochs 0" in (line := refused("--epochs", 0, "--lr", -1)) and "--lr" in line
    assert "--data-root" in refused("--data-root", tmp_path / "nowhere", *w)
    assert "--sample" in refused(*w, HOME=str(tmp_path), KAGGLEHUB_CACHE=str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    assert "train.json" in refused("--data-root", sample.data_root, "--ann-root", tmp_path / "empty", *w)
    assert "--accumulate" in refused(*here, *w, "--batch-size", 64, "--accumulate", 64)
    assert "--holdout" in refused(*here, *w, "--holdout", 0.001)
    assert "--device" in refused(*here, *w, "--device", "cuda:99")
    assert "nothing would be learnt" in refused(*here, *SMALL, *w, "--mse-weight", 0, "--crps-weight", 0, "--kl-weight", 0)
    (tmp_path / "file").touch()
    assert "is a file" in refused(*here, *SMALL, "--work-dir", tmp_path / "file")
    assert "--bogus" in refused("--bogus") and "sync-bn" in refused("--sync-bn") and "--cache" in refused(*here, *SMALL, *w, "--cache")
    assert "no such picture (40 of 40 missing)" in refused("--data-root", tmp_path / "empty", "--ann-root", sample.ann_root, *w)
    first = next((sample.data_root / "train/images").iterdir())
    named = json.loads((sample.ann_root / "train.json").read_text())["images"][0]["file_name"]
    (alike := (tmp_path / "empty" / named).with_suffix(".tif")).parent.mkdir(parents=True)
    shutil.copy(first, alike)
    assert f"there is {alike.name}, so mend the names" in refused("--data-root", tmp_path / "empty", "--ann-root", sample.ann_root, *w)
    assert "not empty" in refused(*here, "--work-dir", run.work_dir)


def test_a_run_goes_on_by_its_own_command_alone(run, refused, flags, tmp_path, monkeypatch):
    """A finished one by --weights; one of other settings, landmarks or contents not at all."""
    resume = [*flags, "--work-dir", run.work_dir, "--resume"]
    line = refused(*resume, "--epochs", 3)
    assert "--epochs was 2, now 3" in line and f"--weights {run.work_dir / 'best_model.pth'}" in line
    last = torch.load(run.work_dir / "last.pth", weights_only=True)
    torch.save({**last, "epoch": 1}, tmp_path / "last.pth")
    line = refused(*flags, "--work-dir", tmp_path, "--resume", "--seed", 1)
    assert "--seed was 0, now 1" in line and "repeat the first command" in line
    line = refused(*flags, "--work-dir", tmp_path, "--resume", "--holdout", 0.4)  # which has other faces, too
    assert "--holdout was 0.0, now 0.4" in line
    shutil.copy(run.work_dir / "best_model.pth", tmp_path / "last.pth")
    assert "--weights" in refused(*flags, "--work-dir", tmp_path, "--resume")
    coco = json.loads((run.ann_root / "train.json").read_text())
    coco["categories"][0] |= {"keypoints": coco["categories"][0]["keypoints"][:20], "flip_pairs": [], "skeleton": [], "regions": {},
                              "interocular": []}
    for a in coco["annotations"]:
        a["keypoints"] = a["keypoints"][:60]
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps(coco))
    line = refused(*resume, "--ann-root", tmp_path)
    assert "names, flip_pairs, regions, interocular in" in line and "--work-dir" in line
    shutil.copy(run.ann_root / "val.json", tmp_path)
    assert "val.json" in (line := refused(*flags, "--ann-root", tmp_path, "--work-dir", tmp_path / "w")) and "category differs" in line
    coco = json.loads((run.ann_root / "train.json").read_text())
    coco["annotations"][3]["keypoints"][0] += 2  # as many faces, another label
    (tmp_path / "train.json").write_text(json.dumps(coco))
    assert "the labels in --ann-root have changed since" in refused(*resume, "--ann-root", tmp_path)
    shutil.copy(run.ann_root / "train.json", tmp_path)
    coco = json.loads((run.ann_root / "val.json").read_text())
    coco["annotations"][3]["keypoints"][0] += 2  # the best epoch was chosen on it
    (tmp_path / "val.json").write_text(json.dumps(coco))
    assert "the labels in --ann-root have changed since" in refused(*resume, "--ann-root", tmp_path)


@pytest.mark.parametrize("damage, says", [
    (lambda w: (w / "last.pth").unlink(), "is missing, although best_model.pth"),
    (lambda w: (w / "last.pth").write_bytes((w / "last.pth").read_bytes()[:50_000]), "not loaded"),
    (lambda w: (w / "best_model.pth").unlink(), "best_model.pth is missing")])
def test_resuming_a_folder_that_lacks_a_part_loses_nothing(run, refused, flags, tmp_path, damage, says):
    """The model that is left is named as a start, and not written over."""
    shutil.copytree(run.work_dir, work_dir := tmp_path / "w")
    damage(work_dir)
    before = {p.name: p.read_bytes() for p in work_dir.iterdir()}
    line = refused(*flags, "--work-dir", work_dir, "--resume")
    left = "last.pth" if "best_model.pth is" in says else "best_model.pth"
    assert says in line and f"--weights {work_dir / left}" in line and "another --work-dir" in line
    assert {p.name: p.read_bytes() for p in work_dir.iterdir()} == before


def test_a_run_of_other_code_is_refused_in_one_line(run, refused, flags, tmp_path, monkeypatch):
    """The head, or the optimizer, was edited since."""
    last = torch.load(run.work_dir / "last.pth", weights_only=True)
    (tmp_path / "w").mkdir()
    shutil.copy(run.work_dir / "best_model.pth", tmp_path / "w")
    torch.save({**last, "epoch": 1}, tmp_path / "w/last.pth")
    resume, build = [*flags, "--work-dir", tmp_path / "w", "--resume"], trainer.build_optimizer
    for optimizer, lacks in ((lambda model, config: torch.optim.SGD(model.parameters()), "different number of parameter groups"),
                             (lambda model, config: torch.optim.SGD(build(model, config).param_groups, 0.1), "dampening, momentum")):
        monkeypatch.setattr(trainer, "build_optimizer", optimizer)
        line = refused(*resume)
        assert "--resume: last.pth does not fit this code's" in line and lacks in line and "--weights" in line
    monkeypatch.setattr(trainer, "build_optimizer", build)
    monkeypatch.setattr(trainer.LandmarkNet, "__init__", partialmethod(trainer.LandmarkNet.__init__, width=32))
    assert "does not fit this code's model" in (line := refused(*resume)) and "size mismatch" in line
    with pytest.raises(UserError, match="do not fit together .*size mismatch.*needs that code"):
        trainer.Trained(run.work_dir / "best_model.pth")


def test_a_first_epoch_whose_last_file_a_kill_cut_is_made_again(refused, flags, tmp_path):
    options = [*map(str, [*flags, *LIGHT, "--epochs", 2, "--save-every", 1, "--val-every", 2, "--work-dir", tmp_path / "w"])]
    trainer.main(options)
    for file in ("last.pth", "best_model.pth", "epoch_2.pth"):
        (tmp_path / "w" / file).unlink()
    assert "is missing, although epoch_1.pth" in refused(*options, "--resume", "--lr", 1)
    trainer.main([*options, "--resume"])
    assert (tmp_path / "w/best_model.pth").exists() and len(rows(tmp_path / "w")) == 2


def test_a_run_that_began_where_nothing_is_fused_goes_on_fused(flags, tmp_path):
    """As a Mac's did: GradScaler on another machine would meet an optimizer that knows no scale."""
    options = [*map(str, [*flags, *LIGHT, "--epochs", 2, "--work-dir", tmp_path / "w"])]
    trainer.main(options)
    last = torch.load(tmp_path / "w/last.pth", weights_only=True)
    for group in last["optimizer"]["param_groups"]:
        group["fused"] = False
    torch.save(last, tmp_path / "w/last.pth")
    config = trainer.parse_args([*options, "--resume"])
    faces, chooser, *_ = trainer.load_sets(config, runtime.Processes("cpu"))
    resumed = checkpoints.load_resumable(tmp_path / "w/last.pth", config, faces, chooser)
    assert all(group["fused"] for group in resumed["optimizer"]["param_groups"])


def test_resuming_where_nothing_is_says_so(flags, tmp_path, capsys):
    trainer.main([*map(str, [*flags, *LIGHT]), "--epochs", "1", "--work-dir", str(tmp_path / "w"), "--resume"])
    assert "last.pth, so this is a new run" in capsys.readouterr().out


def test_versions_where_there_is_no_git(monkeypatch, tmp_path):
    made = runtime.versions(torch.device("cpu"), torch.bfloat16)
    assert made["git"] not in ("", "unknown") or not (ROOT / ".git").exists()
    assert (made["device"], made["precision"]) == ("1 x cpu", "bfloat16")
    monkeypatch.setattr(runtime, "ROOT", ROOT / "tests")  # an unpacked archive in another repository
    assert runtime.versions(torch.device("cpu"), None)["git"] == "unknown"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    made = runtime.versions(torch.device("cpu"), None)
    assert made["git"] == "unknown" and made["precision"] == "float32"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_picture_shows_at_the_start(sample, tmp_path, refused, flags, split):
    """Of those that are scored once, at the end, too."""
    shutil.copytree(sample.data_root, tmp_path / "d")
    victim = next((tmp_path / f"d/{split}/images").iterdir())
    victim.unlink()
    line = refused(*flags, "--data-root", tmp_path / "d", "--holdout", 0.2, "--work-dir", tmp_path / "w")
    assert victim.name in line and "missing); fetch it, or take it and its annotations out of the file" in line
    assert not (tmp_path / "w/args.json").exists()


def test_a_damaged_picture_names_itself(sample, tmp_path, refused, script, flags):
    shutil.copytree(sample.data_root, tmp_path / "d")
    victim = sorted((tmp_path / "d/train/images").iterdir())[7]
    victim.write_bytes(victim.read_bytes()[:3000])
    flags = [*flags, "--data-root", tmp_path / "d", "--epochs", 1]
    assert victim.name in refused(*flags, "--work-dir", tmp_path / "start", "--cache", tmp_path / "cache")
    result = script("train_simple.py", *flags, "--work-dir", tmp_path / "worker", "--cache", "none", "--num-workers", 2)
    assert result.returncode == 2 and victim.name in result.stderr and result.stderr.count("\n") == 1


def test_a_mistake_of_ours_inside_a_worker_keeps_its_traceback(monkeypatch, tmp_path):
    def train(*_):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    monkeypatch.setattr(trainer, "train", train)
    with pytest.raises(RuntimeError):
        trainer.main(["--work-dir", str(tmp_path / "w")])


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB", "FIND was unable to find an engine to execute this"])
def test_out_of_memory_says_what_helps(refused, tmp_path, monkeypatch, message):
    def train(*_):
        raise RuntimeError(message)
    monkeypatch.setattr(trainer, "train", train)
    said = refused("--work-dir", tmp_path / "w")
    assert "--accumulate" in said and ("cuDNN" in said) == ("engine" in message)


def no_memory():
    torch.empty(2**50)


def no_process():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")  # of os.fork


def no_files():
    raise RuntimeError("received 0 items of ancdata")  # of a queue, in Python's words


def no_thread():
    raise RuntimeError("can't start new thread")  # where a container limits processes


def alone():
    torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


def compiled():
    def backend(*_):
        raise RuntimeError("no C++ compiler")
    torch.compile(torch.nn.Linear(1, 1), backend=backend)(torch.zeros(1, 1))


@pytest.mark.parametrize("what, says", [
    (no_memory, "out of memory"), (no_process, "lower --num-workers"), (no_files, "lower --num-workers"), (no_thread, "lower --num-workers"), (alone, "two faces in every part"), (compiled, "--compile")])
def test_what_pytorch_has_no_type_for_is_one_line(refused, tmp_path, monkeypatch, what, says):
    monkeypatch.setattr(trainer, "train", lambda *_: what())
    assert says in refused("--work-dir", tmp_path / "w")


def test_dropout_is_the_same_after_a_resume(flags, tmp_path, monkeypatch, capsys):
    """Of backbones that have it: its generator starts anew with every epoch, and loading draws nothing of it."""
    drawn, train_step, save = {}, trainer.train_step, trainer.Saver.save

    def step(run, batches, number):
        result = train_step(run, batches, number)
        drawn.setdefault(number, []).append(float(torch.rand(())))
        return result

    def cut(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(trainer, "train_step", step)
    options = [*map(str, [*flags, *LIGHT, "--epochs", 2, "--work-dir"])]
    trainer.main([*options, str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer.Saver, "save", cut)
        trainer.main([*options, str(tmp_path / "cut")])
    trainer.main([*options, str(tmp_path / "cut"), "--resume"])
    assert "1 epochs done" in capsys.readouterr().out
    assert all(whole == resumed for whole, resumed in drawn.values()) and len(set(map(tuple, drawn.values()))) > 1


def test_last_pth_takes_little_of_a_fast_run(flags, tmp_path, monkeypatch):
    """Where writing takes long beside an epoch it is left out, at the end never."""
    def save(path, checkpoint, real=checkpoints.save_checkpoint):
        real(path, checkpoint)
        if path.name == "last.pth":
            written.append(checkpoint["epoch"])
            time.sleep(1)

    written = []
    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    trainer.main([*map(str, flags), *LIGHT, "--epochs", "3", "--work-dir", str(tmp_path / "w")])
    assert written == [1, 3]


# ---------------------------------------------------------------- numbers that are none

@pytest.fixture
def spoilt(monkeypatch):
    """The loss is finite, its gradient is not."""
    def losses(*args, real=trainer.heatmap_losses, **weights):
        loss = real(*args, **weights)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss
    monkeypatch.setattr(trainer, "heatmap_losses", losses)


def named(line, epoch=1):
    """How many faces a line names, as the end of a run that lost its numbers."""
    assert f"epoch {epoch}/" in line and "not finite at or before the batch of" in line and "--lr" in line
    return line.count(".png")


def test_a_loss_that_is_not_finite_names_its_faces(refused, flags, tmp_path):
    line = refused(*flags, *LIGHT, "--work-dir", tmp_path / "w", "--lr", 1e30, "--warmup-epochs", 0)
    assert named(line) == 8 and not (tmp_path / "w/last.pth").exists()


def test_weights_that_are_not_finite_at_an_epochs_end_end_the_run(spoilt, refused, flags, tmp_path):
    """The only step of the epoch had a finite loss; without the look at the weights they would be saved."""
    line = refused(*flags, *LIGHT, "--work-dir", tmp_path / "w", "--batch-size", 40)
    assert named(line) == 8 and ", ..." in line and not (tmp_path / "w/last.pth").exists()


def test_float16_that_never_finds_a_scale_ends_the_run(spoilt, refused, flags, tmp_path, monkeypatch):
    """In float32, because a CPU takes minutes for float16's gradients."""
    monkeypatch.setattr(runtime, "choose_amp", lambda *_: torch.float16)
    monkeypatch.setattr(runtime, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0))
    assert named(refused(*flags, *LIGHT, "--work-dir", tmp_path / "w"))


def test_where_there_is_nothing_the_best_map_is_flat():
    flat = torch.full((1, 1, 32, 32), 1 / 32**2)
    peaked = data.encode_heatmaps(torch.tensor([[[20.0, 30.0]]]), 32, 1.2)
    peaked = peaked / peaked.sum()
    nowhere, nothing = torch.zeros(1, 1, 2), torch.full((1, 1), -1.0)
    half = trainer.heatmap_losses((flat + peaked) / 2, nowhere, nothing, 1.2, config_of()).item()
    assert trainer.heatmap_losses(flat, nowhere, nothing, 1.2, config_of()).item() == pytest.approx(0, abs=1e-5)
    assert 0 < half < trainer.heatmap_losses(peaked, nowhere, nothing, 1.2, config_of()).item()


def test_the_logs_script_teaches(run, flags, script, tmp_path):
    """The distillation that made the bundled model, from work_dirs/README.md: by checkpoints, and by the run's own average."""
    taught = re.search(r"```python\n(\"\"\"python taught.py.*?)```", (ROOT / "work_dirs/README.md").read_text(), re.S)[1]
    (tmp_path / "taught.py").write_text(taught)
    for name, teachers in (("own", []), ("taught", [run.work_dir / "best_model.pth"] * 2)):
        script(tmp_path / "taught.py", *teachers, "--", *flags, *LIGHT, "--epochs", 1, "--work-dir", tmp_path / name, check=True)
    own, taught = (float(rows(tmp_path / name)[0]["train_loss"]) for name in ("own", "taught"))
    assert own + 0.3 < taught < math.inf  # its average teaches with a weight that grows from 0; checkpoints with 1


def test_a_resumed_run_keeps_the_metric_that_chooses(run, refused, flags, tmp_path, monkeypatch):
    """best_model.pth and later epochs would otherwise be compared by numbers of different meaning."""
    shutil.copytree(run.work_dir, tmp_path / "w")
    monkeypatch.setattr(trainer, "METRICS", dict(reversed(trainer.METRICS.items())))
    assert "first of METRICS, has chosen" in refused(*flags, "--work-dir", tmp_path / "w", "--resume")
