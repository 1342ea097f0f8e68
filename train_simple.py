"""Train a facial landmark detector (HRNet heatmaps) on DogFLW, or on any COCO keypoint file.

    uv run train_simple.py --sample                       # drawn faces: a full run in minutes, on a CPU too
    uv run python tools/convert_dogflw_to_coco.py --download
    uv run train_simple.py                                # DogFLW, HRNet-W32, 210 epochs
    uv run torchrun --nproc-per-node 4 train_simple.py --batch-size 64 --lr 2e-3    # the same on four GPUs

A run leaves args.json, metrics.csv, checkpoints and pictures in work_dirs/RUN. `--resume` goes on where it was cut.
"""
import argparse
import copy
import csv
import ctypes
import gc
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import dataset as data
from dataset import PADDING, ROOT, SIGMA, SIZE, Augmentation, DogFLWDataset, Parser, Scheme, UserError, atomic_write, run_script

CRPS_WEIGHT = 1.0  # of the forecast's error in fractions of the crop, beside the relative MSE
KL_WEIGHT = 0.3  # of the divergence in nats, beside the same
WIDE = 2.0  # the targets' deviation at the start of a run, in those at its end
# What a resumed run must share with the run it goes on with, to end where the uncut run ends.
RESUME_MUST_MATCH = ("sample", "holdout", "crop", "backbone", "input_size", "sigma", "padding", "epochs", "batch_size",
                     "lr", "weight_decay", "warmup_epochs", "ema", "progressive", "seed", "amp")

# ---------------------------------------------------------------- the model


class LandmarkNet(nn.Module):
    """HRNet features of the whole network at stride 2, and a small head: (B, 3, S, S) -> (B, K, S/2, S/2).

    Every heatmap is a softmax over its cells: float32, a probability for each place, summing to 1.

    timm's first feature is the *stem*: 64 channels at stride 2 that have seen 7 x 7 pixels. It has the head's shape,
    but a head on it alone learns nothing. Here all four branches are brought to 64 channels by 1 x 1 convolutions
    at their own resolution, where that is cheap, then enlarged and summed; the stem, 64 channels already, is added.
    """

    def __init__(self, backbone, num_landmarks, width=64):
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, feature_location="")
        stem, *branches = self.backbone.feature_info.channels()
        assert stem == width
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)) for channels in branches)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, num_landmarks, 1, bias=False))  # a softmax over cells would cancel a bias

    def forward(self, images):
        stem, *branches = self.backbone(images)  # (B, 64, S/2, S/2), then strides 4, 8, 16, 32
        high, *lower = [lateral(x) for lateral, x in zip(self.laterals, branches)]
        for x in lower:
            high = high + F.interpolate(x, size=high.shape[-2:], mode="bilinear")  # (B, 64, S/4, S/4)
        logits = self.head(F.relu_(stem + F.interpolate(high, scale_factor=2, mode="bilinear")))
        if logits.requires_grad:  # else the softmax's gradient leaves channels_last, and a third more time with it
            logits.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return logits.contiguous().flatten(2).softmax(2, dtype=torch.float32).unflatten(2, logits.shape[2:])


def build_model(backbone, num_landmarks, pretrained=False, weights=None):
    """A LandmarkNet; its backbone from ImageNet (`pretrained`) or everything that fits from the file `weights`.

    Raises UserError for an unknown backbone, weights that cannot be fetched, and a file that does not fit.
    """
    if not (backbone.startswith("hrnet") and timm.is_model(backbone)):
        known = " ".join(n for n in timm.list_models("hrnet*") if "ssld" not in n)
        raise UserError(f"--backbone {backbone}: not an HRNet of timm; choose one of {known}")
    model = LandmarkNet(backbone, num_landmarks)
    if weights:
        state = load_weights(weights)
        if not any(k.startswith("backbone.") for k in state):  # a file of the bare backbone, as timm's are
            state = {f"backbone.{k}": v for k, v in state.items()}
        own = model.state_dict()
        fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        lacks = [k for k in own if k.startswith("backbone.") and k not in fits and not k.endswith("num_batches_tracked")]
        if lacks:
            raise UserError(f"--weights {weights}: lacks {len(lacks)} tensors of {backbone} ({lacks[0]}, ...); "
                            "is it of another backbone?")
        model.load_state_dict(fits, strict=False)
    elif pretrained:
        try:
            source = timm.create_model(backbone, features_only=True, feature_location="", pretrained=True)
        except Exception as e:  # whatever the hub's client raises: its own types change from version to version
            raise UserError(f"ImageNet weights of {backbone} could not be fetched ({type(e).__name__}); train from "
                            "scratch with --no-pretrained, or give a file with --weights FILE") from None
        model.backbone.load_state_dict(source.state_dict())
    return model


# ---------------------------------------------------------------- loss, prediction, metric

def divergence(heatmaps, offsets, sigma):
    """The Kullback-Leibler divergence KL(Gaussian of sum 1 || map) in nats: (B, K, S, S), (B, K, 2, S), cells -> (B, K).

    Kullback & Leibler 1951, "On information and sufficiency". Taken from a window of 5 sigma around the point, beyond
    which the Gaussian is nothing: few passes over whole maps.
    """
    size = heatmaps.shape[-1]
    width = min(size, 2 * math.ceil(5 * sigma) + 1)
    first = (offsets.abs().argmin(3, keepdim=True) - width // 2).clamp(0, size - width)
    window = first + torch.arange(width, device=first.device)  # (B, K, 2, width): columns and rows
    column, row = window.unbind(2)
    near = heatmaps.flatten(2).gather(2, (row.unsqueeze(3) * size + column.unsqueeze(2)).flatten(2)).unflatten(2, (width, width))
    x, y = (v / v.sum(2, keepdim=True).clamp(min=1e-9)  # of a point outside the crop it may be no sum at all
            for v in data.gaussians(offsets.gather(3, window), sigma))
    cross_entropy = -((y.unsqueeze(2) @ (near + 1e-9).log()).squeeze(2) * x).sum(2)
    return cross_entropy - torch.special.entr(x).sum(2) - torch.special.entr(y).sum(2)


def heatmap_losses(heatmaps, points, visibility, sigma):
    """MSE weighted by visibility between maps and Gaussians, plus the maps' errors as forecasts of a place: (B, K).

    heatmaps (B, K, S, S) that sum to 1; points (B, K, 2) in crop pixels; visibility (B, K); sigma in cells. For the MSE
    a map is scaled so that a perfect one peaks at 1, as the Gaussian does; "nothing" costs 1. MSE alone is cheapest at
    "nothing" where a place is uncertain, and learns the ears last; the two other terms are least for the honest
    distribution. They are the `divergence`, whose pull to the truth does not fade where a map is broad or wrong, and the
    continuous ranked probability score of x and of y in fractions of the crop (Gneiting & Raftery 2007, "Strictly proper
    scoring rules", eq. 20), which knows how far away a wrong map is: how far its distribution function is from the step
    at the truth, squared.

    Take the mean over all B * K maps, labelled or not: a constant divisor makes the sum over micro-batches and over
    GPUs exactly the gradient of the whole batch.
    """
    size, height = heatmaps.shape[-1], 2 * math.pi * sigma**2
    offsets = data.cell_offsets(points, size)  # (B, K, 2, S)
    x, y = data.gaussians(offsets, sigma)  # the target is y * x, and never needed as a map
    # |height * map - target|^2 = height^2 |map|^2 - 2 height <map, target> + |target|^2, a third of the passes over maps.
    columns = torch.stack([y, torch.ones_like(y)], 2) @ heatmaps  # (B, K, 2, S): weighted by the target's rows, and plain
    inner = (columns[:, :, 0] * x).sum(2)
    mse = (height**2 * torch.linalg.vector_norm(heatmaps, dim=(2, 3)).square() - 2 * height * inner
           + x.square().sum(2) * y.square().sum(2)) / (math.pi * sigma**2)
    below = torch.stack([columns[:, :, 1], heatmaps.sum(3)], 2).cumsum(3)
    steps = (offsets + 1).clamp(0, 1)  # between two cells, both share it
    crps = (below - steps).square().sum((2, 3)) / size
    return (mse + KL_WEIGHT * divergence(heatmaps, offsets, sigma) + CRPS_WEIGHT * crps) * visibility


def autocast(device, amp):
    """The context of a forward pass; amp is None, torch.bfloat16 or torch.float16."""
    return torch.autocast(device.type, amp) if amp else nullcontext()


def average_mirrored(model, images, flip_index):
    """Heatmaps of images (B, 3, S, S), averaged with the mirrored ones' and partners swapped; flip_index None: plain."""
    heatmaps = model(images)
    return heatmaps if flip_index is None else (heatmaps + model(images.flip(3)).flip(3)[:, flip_index]) / 2


@torch.inference_mode()
def predict_heatmaps(model, images, flip_index=None, amp=None):
    """uint8 crops (B, S, S, 3) -> float32 heatmaps (B, K, S/2, S/2), averaged with the mirrored picture's."""
    images = data.normalize(images)
    with autocast(images.device, amp):
        return average_mirrored(model, images, flip_index)


def nme(points, faces, normalizer):
    """Normalised mean error of every face: (N,) float64, NaN where it has no labelled landmark or normaliser.

    points (N, K, 2) in picture pixels; normaliser (N,) in picture pixels. The mean is over a face's labelled
    landmarks; a landmark that the crop cut off counts. Take the mean over faces by `nan_mean`.
    """
    errors = np.linalg.norm(np.asarray(points, np.float64) - faces.points, axis=-1)
    labelled = faces.visible > 0
    count = labelled.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(labelled, errors, 0).sum(1) / count / normalizer


def normalizers(faces, padding):
    """The lengths, in picture pixels, that NME is divided by: {name: (N,)}, NaN where a face has none."""
    longer = faces.boxes[:, 2:].max(1)
    result = {"nme": longer * padding, "nme_box": np.linalg.norm(faces.boxes[:, 2:], axis=1)}
    if faces.scheme.interocular:
        i, j = faces.scheme.interocular
        length = np.linalg.norm(faces.points[:, i] - faces.points[:, j], axis=1)
        result["nme_iod"] = np.where((faces.visible[:, [i, j]] > 0).all(1) & (length > 0), length, np.nan)
    return result


def nan_mean(values):
    """The mean of what is not NaN; NaN where nothing is left."""
    values = np.asarray(values)[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def mean_metrics(points, faces, padding):
    """{"nme": mean over faces, "nme_iod": ..., "nme_box": ...}; NaN where no face counts, never 0."""
    return {k: nan_mean(nme(points, faces, v)) for k, v in normalizers(faces, padding).items()}


def one_ahead(function, items):
    """function(item) for every item, each result made by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        results = (thread.submit(function, item) for item in items)
        ahead = next(results, None)
        while ahead:
            ready, ahead = ahead, next(results, None)
            yield ready.result()


def predict_batch(env):
    """Faces at once in validation: what fits in training fits here. On a CPU more than 16 cost memory and gain nothing."""
    return min(2 * env.micro_batch, 64 if env.device.type == "cuda" else 16)


@torch.inference_mode()
def predict_table(model, dataset, device, amp=None, batch_size=32, flip=True, sigma=None, rank=0, world=1):
    """Predict a process's share of a dataset: (N, K, 4) float64 of x, y in picture pixels, score, loss; 0 elsewhere."""
    model.eval()
    n, k = len(dataset), len(dataset.faces.scheme.names)
    flip_index = torch.tensor(dataset.flip_index, device=device) if flip and dataset.flip_index else None
    mine, found, matrices = range(rank, n, world), [], []
    shares = [mine[start:start + batch_size] for start in range(0, len(mine), batch_size)]
    for batch in one_ahead(dataset.__getitems__, shares):
        heatmaps = predict_heatmaps(model, batch["image"].to(device), flip_index, amp)
        points, score = data.decode_heatmaps(heatmaps)
        loss = torch.zeros_like(score)
        if sigma is not None:
            loss = heatmap_losses(heatmaps, batch["keypoints"].to(device), batch["visibility"].to(device), sigma)
        found.append(torch.cat([points, score.unsqueeze(-1), loss.unsqueeze(-1)], -1))
        matrices.append(batch["matrix"].numpy())
    table = torch.zeros(n, k, 4, dtype=torch.float64)
    if found:
        inverses = torch.from_numpy(data.invert_matrix(np.concatenate(matrices)))
        table[rank::world] = torch.cat(found).cpu().double()  # the one wait for the device
        table[rank::world, :, :2] = data.apply_matrix(inverses, table[rank::world, :, :2])
    return table


def predict(model, dataset, device, sigma=None, world=1, **options):
    """Predict every face of a dataset. Returns points (N, K, 2) in picture pixels, scores (N, K), mean loss.

    float64 numpy; with several processes each predicts its share, and all get the whole, exactly. The loss is
    NaN unless `sigma` is given. Options: amp, batch_size, flip, rank.
    """
    table = predict_table(model, dataset, device, sigma=sigma, world=world, **options)
    if world > 1:
        table = table.to(device)
        dist.all_reduce(table)  # every entry is nonzero in one process only, so the sum is exact
    table = table.cpu().numpy()
    return table[..., :2], table[..., 2], float(table[..., 3].mean()) if sigma is not None else math.nan


# ---------------------------------------------------------------- checkpoints

FORMAT = 1


def save_checkpoint(path, checkpoint):
    """Write plain types and tensors, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    atomic_write(path, [buffer.getbuffer()])


def load_weights(path):
    """Tensors of a .pth or .safetensors file; of our own checkpoints the model's. Runs no code from the file."""
    state = load_file_safely(path)
    state = state.get("model", state.get("state_dict", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no weights")
    return state


def load_file_safely(path):
    """Tensors and plain types of a .pth or .safetensors file. Runs no code from it. Raises UserError."""
    from safetensors.torch import load_file  # timm brings it
    try:
        return load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a checkpoint in it") from None
    except Exception as e:  # reading damaged or hostile bytes can raise almost anything
        hostile = "weights_only" in str(e).lower()
        reason = "it holds more than tensors and plain values" if hostile else "damaged, or no checkpoint"
        raise UserError(f"{path}: not loaded: {reason}. Nothing in it was run") from None


def load_checkpoint(path):
    """A checkpoint of this project as a dict: model, scheme, args, metrics, epoch. Raises UserError otherwise."""
    checkpoint = load_file_safely(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT or not all(
            isinstance(checkpoint.get(k), dict) for k in ("model", "scheme", "args", "metrics")):
        raise UserError(f"{path}: not a checkpoint of this trainer; give best_model.pth or epoch_N.pth of a run")
    return checkpoint


def read_by_rank_0(path, env):
    """The checkpoint that rank 0 finds under `path` (None: none), for every process: nodes may not share a disk."""
    box = [load_checkpoint(path) if env.rank == 0 and path else None]
    if env.world > 1:
        dist.broadcast_object_list(box, 0, device=env.device)
    return box[0]


def load_model(path, device="cpu"):
    """Everything inference needs from a checkpoint alone: (model in eval mode, Scheme, args dict, checkpoint)."""
    checkpoint = load_checkpoint(path)
    args = checkpoint["args"]
    try:
        stored = checkpoint["scheme"]
        scheme = Scheme.from_category({**stored, "keypoints": stored["names"], "skeleton": [
            [i + 1, j + 1] for i, j in stored["skeleton"]]}, path)
        model = build_model(args["backbone"], len(scheme.names))
        model.load_state_dict(checkpoint["model"])
        size, padding = int(args["input_size"]), float(args["padding"])
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}: weights, scheme and settings do not fit together ({str(e).splitlines()[0][:100]})") from None
    if not (32 <= size <= 2048 and size % 32 == 0 and 0.5 <= padding <= 4):
        raise UserError(f"{path}: its input size {size} or padding {padding} cannot be")
    args = {**args, "input_size": size, "padding": padding}
    return model.eval().to(device, memory_format=torch.channels_last), scheme, args, checkpoint


# ---------------------------------------------------------------- the loop

class EpochBatches:
    """Batches of (epoch, index, crop size) from epoch `first` on: the whole run is one pass through one DataLoader.

    sizes: the crop's side in every epoch of the run.

    So workers start once and fetch ahead across the end of an epoch and during validation. The order is a pure
    function of (seed, epoch). A step's faces are `batch_size`, over all processes and micro-batches together;
    a last, smaller batch is dropped; of fewer faces than a batch, as many make one as divide evenly. Raises UserError
    where none do.
    """

    def __init__(self, n, batch_size, seed, first, sizes, accumulate=1, rank=0, world=1):
        self.n, self.seed, self.epochs, self.sizes = n, seed, range(first, len(sizes)), sizes
        self.batch_size = min(batch_size, n - n % (accumulate * world))
        if not self.batch_size:
            raise UserError(f"--accumulate {accumulate} x {world} processes: more than the {n} faces to train on; lower them")
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.steps = n // self.batch_size  # optimizer steps an epoch

    def __iter__(self):
        for epoch in self.epochs:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            for step in range(self.steps):
                mine = order[step * self.batch_size:(step + 1) * self.batch_size][self.rank::self.world]
                for micro in np.array_split(mine, self.accumulate):
                    yield [(epoch, int(i), self.sizes[epoch]) for i in micro]


def keep(batch):
    return batch  # `__getitems__` has collated already


def stop(signum, _):
    raise KeyboardInterrupt(signum)


def quiet_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # whoever ends the group means no failure of a worker
    sys.excepthook = lambda *_: None  # the thread that hands batches over, when the parent has ended; errors go another way
    torch.set_num_threads(1)


def batches_of(dataset, sampler, workers, pin_memory=False):
    """One pass over a sampler's batches; no more workers than the machine has cores."""
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, num_workers=min(workers, os.cpu_count() or 1), collate_fn=keep,
        worker_init_fn=quiet_worker, pin_memory=pin_memory))


def build_optimizer(model, args, device):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, AdamW), of the convolutions' weights alone."""
    weights, others = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    return torch.optim.AdamW([{"params": weights}, {"params": others, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.99),
                             weight_decay=args.weight_decay, fused=device.type in ("cuda", "cpu"))


def lr_factor(step, total, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine to 0 (Loshchilov & Hutter 2017, eq. 5)."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def crop_sizes(args):
    """The crop's side in every epoch. At first half the input size (from 128 pixels), where a step costs a third.

    Progressive resizing (Tan & Le 2021, "EfficientNetV2", section 4): what the small crops teach holds at the full size.
    """
    small = min(args.input_size, max(128, args.input_size // 64 * 32))
    return [small if epoch < int(args.progressive * args.epochs) else args.input_size for epoch in range(args.epochs)]


def at_size(args, size):
    """The settings of a dataset, or a checkpoint, whose crops have another size: the targets keep their part of the crop."""
    return {"input_size": size, "sigma": args.sigma * size / args.input_size}


def target_sigma(step, total, sigma):
    """The targets' deviation at a step: from WIDE * sigma, where a place is learnt fast, geometrically to sigma, where it is sharp."""
    return sigma * WIDE ** (1 - step / total)


def try_full_size(args, env):
    """One pass at the full size, before epochs at a smaller one: too little memory is to show now, not hours later."""
    n, size, device = env.micro_batch, args.input_size, env.device
    adam = [torch.empty_like(p) for p in env.bare.parameters() for _ in range(2)]  # the room that its moments will take
    images = torch.zeros(n, 3, size, size, device=device).to(memory_format=torch.channels_last)
    with autocast(device, env.amp):
        heatmaps = env.bare.eval()(images)
    ones = torch.ones(*heatmaps.shape[:2], 2, device=device)
    heatmap_losses(heatmaps, ones, ones[..., 0], args.sigma).mean().backward()
    env.bare.zero_grad(set_to_none=True)
    del adam


def is_out_of_memory(error):
    """Whether a RuntimeError means that; where cuDNN finds no room for an algorithm it says that it finds no engine."""
    return any(text in str(error) for text in ("out of memory", "unable to find an engine", "ALLOC_FAILED"))


def train_one_epoch(epoch, model, average, optimizer, scaler, batches, sampler, faces, args, env):
    """One epoch of optimizer steps. Returns the mean loss. Nothing in the loop waits for the device, --sync-bn's layers aside.

    Raises UserError naming the faces of the first batch whose loss or gradient is not finite.
    """
    model.train()
    total, bad = torch.zeros((), device=env.device), torch.full((), -1, device=env.device)
    interval, shown, all_steps = [], 0, args.epochs * sampler.steps
    final_sigma = at_size(args, sampler.sizes[epoch])["sigma"]
    pinned = env.device.type == "cuda"  # elsewhere (mps) memory could be freed under a copy that is still going on
    if average is not None:  # weights and batch norm's statistics
        averaged = [[v for v in m.state_dict().values() if v.is_floating_point()] for m in (average, env.bare)]
    bar = tqdm(total=sampler.steps, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False,
               disable=None if env.rank == 0 else True)
    for step in range(sampler.steps):
        done = epoch * sampler.steps + step
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(done, all_steps, args.warmup_epochs * sampler.steps)
        loss, step_faces = 0, []
        for micro in range(args.accumulate):
            batch = next(batches)
            step_faces += batch["index"].tolist()  # the tensor itself would keep a file open until the interval ends
            moved = {k: batch[k].to(env.device, non_blocking=pinned) for k in ("image", "keypoints", "visibility", "colour")}
            images = data.normalize(moved["image"], moved["colour"])
            last = micro == args.accumulate - 1
            with nullcontext() if last or env.world == 1 else model.no_sync():
                with autocast(env.device, env.amp):
                    heatmaps = model(images)
                losses = heatmap_losses(heatmaps, moved["keypoints"], moved["visibility"], target_sigma(done, all_steps, final_sigma))
                micro_loss = losses.mean() / args.accumulate
                scaler.scale(micro_loss).backward()
            loss = loss + micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        finite = loss.isfinite() if scaler.is_enabled() else loss.isfinite() & norm.isfinite()
        bad = torch.where(finite | (bad >= 0), bad, len(interval))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            torch._foreach_lerp_(*averaged, 1 - min(args.ema, (1 + done) / (10 + done)))  # the decay warms up
        total += loss
        interval.append(step_faces)
        if len(interval) == 50 or step == sampler.steps - 1:
            first = int(bad)  # expensive device-to-host synchronisation, once an interval
            if first >= 0 or scaler.is_enabled() and scaler.get_scale() < 1:  # float16 skips steps, but not without end
                names = [faces.files[i] for i in interval[first]]
                raise UserError(f"epoch {epoch + 1}: loss or gradient is not finite at the batch of {', '.join(names[:8])}"
                                f"{', ...' if len(names) > 8 else ''}; look at these faces, or lower --lr; the "
                                f"epochs before are in {args.work_dir / 'last.pth'}")
            bar.set_postfix(loss=f"{total.item() / (step + 1):.2e}")
            bar.update(step + 1 - shown)
            interval, shown = [], step + 1
    bar.close()
    if env.world > 1:
        dist.all_reduce(total)
    return total.item() / env.world / sampler.steps


# ---------------------------------------------------------------- the run directory

COLUMNS = ("epoch", "seconds", "lr", "train_loss", "val_loss", "nme", "nme_iod", "images_per_s")


def as_csv(columns, rows):
    """Rows {column: value} as the bytes of a CSV file; other columns are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def as_png(figure):
    """The bytes of a matplotlib figure's picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def plot_curves(path, runs):
    """Losses and errors of a run {name: rows} over the epochs, or of several to compare. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, columns in zip(figure.subplots(1, 2), (("train_loss", "val_loss"), ("nme", "nme_iod"))):
        for n, (name, rows) in enumerate(runs.items()):
            for column in columns if len(runs) == 1 else columns[:1]:
                points = [(row["epoch"], row[column]) for row in rows if 0 < row[column] < math.inf]  # not NaN
                # matplotlib reads $ as mathematics, and leaves a label that begins with _ out of the legend
                axes.plot(*zip(*points) if points else ([], []), marker="." if len(points) < 20 else None,
                          linewidth=1.5 + 1.5 * (len(runs) - 1 - n) / len(runs),  # one beneath another stays visible
                          label=f" {name if len(runs) > 1 else column}".replace("$", r"\$"))
        axes.set(xlabel="epoch", ylabel=", ".join(columns) if len(runs) == 1 else columns[0], yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=9)
    atomic_write(path, [as_png(figure)])
    return True


def plain(settings):
    """Settings as JSON and `weights_only` loading can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def versions():
    """What the run was made with, as plain strings."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__,
            "numpy": np.__version__, "git": git or "unknown"}


def run_directory(args):
    """The lock on args.work_dir for this run: empty, or one to resume, and no other process's. Raises UserError."""
    if int(os.environ.get("RANK", 0)) > 0:
        return nullcontext()
    if not args.resume and args.work_dir.is_dir() and any(p.name != ".lock" for p in args.work_dir.iterdir()):
        raise UserError(f"--work-dir {args.work_dir}: not empty; go on with --resume or name another folder")
    return data.file_lock(args.work_dir / ".lock", f"--work-dir {args.work_dir}: another run is writing there; "
                                                   "wait for it or name another")


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    """Read and check the command line; every problem is reported at once (UserError)."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data-root", type=Path, metavar="DIR", help="folder the COCO file names are relative to (default: kagglehub's cache)")
    add("--ann-root", type=Path, metavar="DIR", default=ROOT / "data/dogflw/annotations",
        help="folder of train.json and val.json (default: data/dogflw/annotations)")
    add("--sample", action="store_true", help="train on drawn faces, with settings for a CPU (made when missing)")
    add("--holdout", type=float, default=0.0, metavar="F",
        help="choose the checkpoint on this fraction of train, by breed; val.json is then scored once, at the end")
    add("--crop", choices=["face", "image"], default="face", help="what the model sees: the face's box, or the whole picture (a locator)")
    add("--cache", choices=["disk", "ram", "none"], default="disk", help="where decoded faces are kept (default: disk, data/cache)")
    add("--num-workers", type=int, default=4, metavar="N", help="processes that cut crops (default: 4)")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--backbone", default="hrnet_w32", help="any HRNet of timm (default: hrnet_w32)")
    start = group.add_mutually_exclusive_group().add_argument
    start("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="start from timm's ImageNet weights")
    start("--weights", type=Path, metavar="FILE", help="start from a file instead: a backbone's weights or a checkpoint of ours")
    add("--input-size", type=int, default=SIZE, metavar="S",
        help=f"crop in pixels, a multiple of 32; heatmaps are half of it (default: {SIZE})")
    add("--sigma", type=float, help=f"the targets' final deviation, heatmap cells (default: {SIGMA} at {SIZE} pixels, else in proportion)")
    add("--padding", type=float, default=PADDING, help=f"crop side / the box's longer side (default: {PADDING})")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=210, help="(default: 210)")
    add("--batch-size", type=int, default=16, help="faces an optimizer step, over all GPUs and micro-batches (default: 16)")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step: the same training in less memory (default: 1)")
    add("--lr", type=float, help="Adam's rate at this batch size; scale it by the batch's root (default: 1e-3, 4e-3 with --no-pretrained)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's, of the convolutions' weights (default: 0.1)")
    add("--warmup-epochs", type=float, default=1.0, help="linear warm-up before the cosine (default: 1)")
    add("--ema", type=float, default=0.998, metavar="DECAY", help="average of the weights; 0 switches it off (default: 0.998)")
    add("--progressive", type=float, default=0.3, metavar="F",
        help="fraction of the epochs, the first ones, on crops of half the size, 128 at least: sooner done (default: 0.3)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--work-dir", type=Path, metavar="DIR", help="(default: work_dirs/BACKBONE, or work_dirs/sample)")
    add("--resume", action="store_true", help="go on from last.pth in the work dir")
    add("--val-every", type=int, default=0, metavar="N",
        help="epochs between validations, which cost 5 to 10 %% of one (default: 2, and at most 100 in a run)")
    add("--save-every", type=int, default=10, metavar="N", help="epochs between epoch_N.pth (default: 10)")
    add("--tensorboard", action="store_true", help="also write scalars and the validation picture for TensorBoard")
    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    add("--amp", action=argparse.BooleanOptionalAction, default=True, help="16-bit arithmetic where the device has it")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--sync-bn", action="store_true", help="batch norm over all GPUs together, slower")
    if parser.parse_known_args(argv)[0].sample:
        sample = ROOT / "data" / "sample"
        parser.set_defaults(data_root=sample / "dogflw", ann_root=sample / "annotations", backbone="hrnet_w18_small",
                            input_size=128, epochs=20, pretrained=False, work_dir=ROOT / "work_dirs" / "sample")
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or ROOT / "work_dirs" / args.backbone
    # A checkpoint stores where its data is; absolute, so that the tools find it from any folder.
    args.ann_root, args.data_root = (folder and folder.absolute() for folder in (args.ann_root, args.data_root))
    args.lr = args.lr if args.lr is not None else 1e-3 if args.pretrained or args.weights else 4e-3
    args.sigma = args.sigma if args.sigma is not None else data.default_sigma(args.input_size)
    args.val_every = args.val_every or max(2, math.ceil(args.epochs / 100))
    world = int(os.environ.get("WORLD_SIZE", 1))
    problems = [f"--{name.replace('_', '-')} {getattr(args, name)}: must be {rule}" for name, good, rule in (
        ("epochs", args.epochs > 0, "at least 1"), ("batch_size", args.batch_size > 0, "at least 1"),
        ("accumulate", args.accumulate > 0, "at least 1"), ("lr", 0 < args.lr < math.inf, "above 0"),
        ("num_workers", args.num_workers >= 0, "at least 0"), ("sigma", 0.3 <= args.sigma <= 100, "from 0.3 to 100 cells"),
        ("padding", 0.5 <= args.padding <= 4, "from 0.5 to 4"), ("holdout", 0 <= args.holdout <= 0.9, "from 0 to 0.9"),
        ("warmup_epochs", 0 <= args.warmup_epochs < math.inf, "at least 0"), ("ema", 0 <= args.ema < 1, "from 0 to below 1"),
        ("weight_decay", 0 <= args.weight_decay < 1, "from 0 to below 1"),
        ("val_every", args.val_every > 0, "at least 1"), ("save_every", args.save_every > 0, "at least 1"),
        ("progressive", 0 <= args.progressive <= 0.9, "from 0 to 0.9"), ("seed", args.seed >= 0, "at least 0"),
        ("input_size", 64 <= args.input_size <= 1024 and args.input_size % 32 == 0, "a multiple of 32 from 64 to 1024"),
    ) if not good]
    if not problems and args.batch_size % (args.accumulate * world):
        problems.append(f"--batch-size {args.batch_size}: must divide by --accumulate {args.accumulate} x {world} processes")
    if problems:
        raise UserError("; ".join(problems))
    return args


def choose_device(name):
    """torch.device for --device, with auto = cuda, mps, cpu in this order. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: not usable here ({str(e).splitlines()[0][:80]}); try --device cpu") from None
    return device


def choose_amp(device, wanted=True):
    """bfloat16 where the device computes in it, float16 on older GPUs, else None."""
    if not wanted or device.type == "mps":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    computes = (getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)() for unit in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if any(computes) else None  # elsewhere float32 is faster


def set_up_processes(device_name):
    """Device, rank and world as torchrun gives them; the process group where there are several."""
    env = argparse.Namespace(rank=int(os.environ.get("RANK", 0)), world=int(os.environ.get("WORLD_SIZE", 1)),
                             local_rank=int(os.environ.get("LOCAL_RANK", 0)), device=choose_device(device_name))
    if env.device.type == "cpu" and sys.platform == "linux":
        # glibc hands every large tensor back to the system when it is freed; on the CPU getting the pages again costs
        # a third of a step. M_MMAP_MAX = 0 and a high M_TRIM_THRESHOLD keep them (mallopt(3)).
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
        torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 where a tensor is not in 16 bits
    if env.world > 1:
        dist.init_process_group("nccl" if env.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return env


def load_faces(args):
    """(train, the faces that choose the checkpoint, the faces scored once at the end or None, name of the chooser)."""
    if args.sample:
        with data.file_lock(args.ann_root.parent / ".lock"):  # every process of a job comes here
            make_sample(args)
    root = data.data_root(args.data_root)
    if not args.ann_root.is_dir():
        raise UserError(f"--ann-root {args.ann_root}: no such folder; run tools/convert_dogflw_to_coco.py first")
    train, val = (data.load_coco(args.ann_root / f"{name}.json", root) for name in ("train", "val"))
    if val.scheme != train.scheme:
        raise UserError(f"{args.ann_root}: train.json and val.json have different landmarks; convert again")
    if args.crop == "image":
        train, val = train.whole_pictures(), val.whole_pictures()
    test, chooser = None, "val.json"
    if args.holdout:
        test, (train, val) = val, train.split(args.holdout)
        chooser = f"{len(val)} faces held out of train"
    if not len(val) or not len(train):
        raise UserError(f"--holdout {args.holdout}: leaves {len(train)} faces to train and {len(val)} to choose on")
    return train, val, test, chooser


def make_sample(args):
    """Draw and convert the sample data set where it is missing."""
    for made, command in ((args.data_root, ["make_sample_dataset.py", "--out", args.data_root]),
                          (args.ann_root / "val.json", ["convert_dogflw_to_coco.py", "--dogflw_root", args.data_root,
                                                        "--out_dir", args.ann_root])):
        if not made.exists() and subprocess.run([sys.executable, ROOT / "tools" / command[0], *command[1:]]).returncode:
            raise UserError(f"--sample: tools/{command[0]} failed; its message is above")


def write_pictures(work_dir, stage, dataset, points=None):
    """A contact sheet of the first faces: with training crops and targets, or predictions beside the truth."""
    tiles, batch = [], {k: v.numpy() for k, v in dataset.__getitems__(range(min(16, len(dataset)))).items()}
    for i, (crop, truth) in enumerate(zip(batch["image"], batch["keypoints"])):
        drawn = truth if points is None else data.apply_matrix(batch["matrix"][i], points[i])
        tiles.append(data.draw_landmarks(crop, drawn, dataset.faces.scheme, batch["visibility"][i] > 0,
                                         truth=None if points is None else truth))
    atomic_write(work_dir / f"{stage}.jpg", [data.encode_picture(data.contact_sheet(tiles, 4), ".jpg")])


def main(argv=None):
    """Train, and put what ends a run early into one line. Returns the exit code."""
    args = parse_args(argv)
    try:
        with run_directory(args):
            return train(args)
    except KeyboardInterrupt as e:
        reason, code = "stopped", 128 + (e.args[0] if e.args else signal.SIGINT)
    except RuntimeError as e:
        if "DataLoader worker (pid" in str(e):  # not an error inside one, which keeps its traceback
            reason, code = "a data worker was ended from outside (memory? then lower --num-workers; in a container, raise --shm-size)", 2
        elif is_out_of_memory(e):
            reason, code = "out of memory on the device; raise --accumulate", 2
        elif "gloo" in str(e) or "NCCL" in str(e) or "Connection" in str(e):
            reason, code = f"another process of this job ended, or cannot be reached ({str(e).splitlines()[0][:160]})", 2
        else:
            raise
    last = args.work_dir / "last.pth"
    print(f"error: {reason}. The same command with --resume goes on{f' from {last}' if last.exists() else ''}",
          file=sys.stderr)
    return code


def train(args):
    """The whole run, top to bottom."""
    env = set_up_processes(args.device)
    signal.signal(signal.SIGINT, stop)
    if env.world == 1:  # torchrun ends the other processes by SIGTERM; one that waits for them in C++ runs no handler
        signal.signal(signal.SIGTERM, stop)
    say = print if env.rank == 0 else lambda *a, **k: None
    env.amp = choose_amp(env.device, args.amp)
    env.micro_batch = args.batch_size // args.accumulate // env.world
    torch.manual_seed(args.seed)

    # Data.
    train, val, test, chooser = load_faces(args)
    scheme = train.scheme
    if not scheme.flip_pairs:
        say("no flip_pairs in the COCO file: training without mirroring")
    options = {k: getattr(args, k) for k in ("input_size", "padding", "sigma", "seed", "cache")}
    if env.world > 1 and env.local_rank > 0:
        dist.barrier()  # a node's first process fills the cache, the others read it: not every file system has locks
    train_set = DogFLWDataset(train, augment=Augmentation(), **options)
    sizes = crop_sizes(args)
    val_sets, test_sets = ({size: DogFLWDataset(faces, **options | at_size(args, size)) for size in dict.fromkeys(sizes if faces else ())}
                           for faces in (val, test))  # both now: what is wrong with a picture is to show before the training
    if env.world > 1 and env.local_rank == 0:
        dist.barrier()

    # Model, its average, optimizer; or all of them from last.pth.
    last = args.work_dir / "last.pth"
    resumed = read_by_rank_0(last if args.resume and last.exists() else None, env)
    if resumed:
        if resumed["scheme"] != asdict(scheme):
            raise UserError(f"--resume {last}: its {len(resumed['scheme']['names'])} landmarks are not the "
                            f"{len(scheme.names)} of {args.ann_root}; name another --work-dir")
        if "raw" not in resumed:
            raise UserError(f"--resume {last}: is no last.pth but a copy of another checkpoint; start from it with --weights")
        before = resumed.get("settings", resumed["args"])
        changed = [k for k in RESUME_MUST_MATCH if before.get(k) != plain(vars(args))[k]]
        if changed:
            raise UserError(f"--resume {last}: --{changed[0].replace('_', '-')} was {before.get(changed[0])}, "
                            f"now {getattr(args, changed[0])}; repeat the first command, or name another --work-dir")
    bare = build_model(args.backbone, len(scheme.names), args.pretrained and not resumed, None if resumed else args.weights)
    if args.sync_bn and env.device.type != "cuda":
        raise UserError("--sync-bn: works on GPUs only; leave it out")
    if args.sync_bn and env.world > 1:
        bare = nn.SyncBatchNorm.convert_sync_batchnorm(bare)
    env.bare = bare.to(env.device, memory_format=torch.channels_last)
    average = copy.deepcopy(bare).requires_grad_(False) if args.ema else None
    optimizer = build_optimizer(bare, args, env.device)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.amp is torch.float16)
    first, best, rows = 0, math.inf, []
    if args.resume and not resumed:
        say(f"--resume: there is no {last} yet, starting at the first epoch")
    if resumed:
        bare.load_state_dict(resumed["raw"])
        if average is not None:
            average.load_state_dict(resumed["model"])
        try:
            optimizer.load_state_dict(resumed["optimizer"])
        except ValueError:
            raise UserError(f"--resume {last}: was begun by an earlier version, with another optimizer; go on with that one, or "
                            "start from it with --weights and another --work-dir") from None
        if resumed["scaler"]:  # empty from a run without float16
            scaler.load_state_dict(resumed["scaler"])
        first, best, rows = resumed["epoch"], resumed["best"], resumed["rows"]
    model = torch.compile(bare, dynamic=False) if args.compile else bare  # two sizes, two graphs
    if env.world > 1:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[env.device.index] if env.device.type == "cuda" else None,
                                                    gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # of batch norm's statistics rank 0's count, and `validate` hands them out
    judged = average if average is not None else bare

    sampler = EpochBatches(len(train_set), args.batch_size, args.seed, first, sizes, args.accumulate, env.rank, env.world)
    batches = batches_of(train_set, sampler, args.num_workers, pin_memory=env.device.type == "cuda")
    if env.device.type == "cuda" and first < args.epochs and sizes[first] < args.input_size:
        try_full_size(args, env)

    def snapshot(epoch, metrics):
        own = plain(vars(args)) | at_size(args, sizes[epoch - 1])  # what these weights are for
        return {"format": FORMAT, "epoch": epoch, "model": judged.state_dict(), "scheme": asdict(scheme),
                "args": own, "versions": versions(), "metrics": metrics}

    if env.rank == 0 and not resumed:
        settings = {**plain(vars(args)), "versions": versions()}
        atomic_write(args.work_dir / "args.json", [json.dumps(settings, indent=1).encode()])
        write_pictures(args.work_dir, "train_batch", train_set)
    board = None
    if args.tensorboard and env.rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: needs tensorboard; pip install tensorboard") from None
        board = SummaryWriter(args.work_dir, purge_step=first + 1)
    say(f"{len(train)} faces to train on, checkpoint chosen on {chooser} ({len(val)}), {len(scheme.names)} landmarks; "
        f"{args.backbone} on {env.world} x {env.device}, {str(env.amp or torch.float32)[6:]}; {args.work_dir}")
    if resumed:
        say(f"resuming after epoch {first}")

    def validate(dataset, epoch):
        for buffer in judged.buffers() if env.world > 1 else ():
            dist.broadcast(buffer, 0)  # every process has its own batch norm statistics; rank 0's are saved
        sigma = target_sigma(epoch, args.epochs, dataset.sigma)
        points, _, loss = predict(judged, dataset, env.device, sigma, env.world, rank=env.rank, amp=env.amp,
                                  batch_size=predict_batch(env))
        return points, loss, mean_metrics(points, dataset.faces, args.padding)

    # Train.
    next_save = -math.inf
    for epoch in range(first, args.epochs):
        start = time.perf_counter()
        train_loss = train_one_epoch(epoch, model, average, optimizer, scaler, batches, sampler, train, args, env)
        seconds = time.perf_counter() - start
        row = {"epoch": epoch + 1, "seconds": seconds, "lr": optimizer.param_groups[0]["lr"], "train_loss": train_loss,
               "val_loss": math.nan, "nme": math.nan, "nme_iod": math.nan,
               "images_per_s": sampler.steps * sampler.batch_size / seconds}
        if (epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs:
            points, row["val_loss"], metrics = validate(val_sets[sizes[epoch]], epoch + 1)
            row.update({k: metrics[k] for k in ("nme", "nme_iod") if k in metrics})
            row["seconds"] = time.perf_counter() - start
        rows.append(row)
        if env.rank > 0:
            continue
        if not (args.work_dir / ".lock").exists():  # without this, the next write would make an empty folder anew
            raise UserError(f"--work-dir {args.work_dir}: was moved or deleted during epoch {epoch + 1}, and the checkpoints with it")
        metrics = {k: row[k] for k in ("train_loss", "val_loss", "nme", "nme_iod")} | {"chosen_on": chooser}
        if row["nme"] < best or (epoch + 1 == args.epochs and best == math.inf):
            best = row["nme"]
            save_checkpoint(args.work_dir / "best_model.pth", snapshot(epoch + 1, metrics))
            write_pictures(args.work_dir, "val_predictions", val_sets[sizes[epoch]], points)
        if (epoch + 1) % args.save_every == 0:
            save_checkpoint(args.work_dir / f"epoch_{epoch + 1}.pth", snapshot(epoch + 1, metrics))
            plot_curves(args.work_dir / "curves.png", {"": rows})
        atomic_write(args.work_dir / "metrics.csv", [as_csv(COLUMNS, rows)])
        # Comes after all the others, so that whatever a kill left out is written by the epoch that runs again. On a fast
        # GPU an epoch takes little longer than the writing, which may take a twentieth of a run.
        now = time.perf_counter()
        if now >= next_save or epoch + 1 == args.epochs:
            save_checkpoint(last, snapshot(epoch + 1, metrics) | {
                "raw": bare.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "best": best, "rows": rows, "settings": plain(vars(args))})
            next_save = time.perf_counter() + 19 * (time.perf_counter() - now)
        say(f"epoch {epoch + 1:3d}/{args.epochs}  {sizes[epoch]} px  {row['seconds']:6.1f} s  {row['images_per_s']:6.0f} images/s  "
            f"train loss {train_loss:.2e}" + ("" if math.isnan(row["nme"]) else
                                              f"  val nme {row['nme']:.4f}  nme_iod {row['nme_iod']:.4f}")
            + ("  best" if best == row["nme"] else ""), flush=True)
        if board:
            for name in ("lr", "train_loss", "val_loss", "nme", "nme_iod", "images_per_s"):
                board.add_scalar(name, row[name], epoch + 1)
            if best == row["nme"]:
                board.add_image("val_predictions", data.read_image(args.work_dir / "val_predictions.jpg"), epoch + 1, dataformats="HWC")
    next(batches, None)  # the end of the one pass: its workers go
    if board:
        board.close()
    if env.rank == 0 and not plot_curves(args.work_dir / "curves.png", {"": rows}):
        say("no curves.png: it needs matplotlib; pip install matplotlib (metrics.csv holds the same numbers)")

    # The checkpoint that was chosen; with --holdout, its one look at val.json.
    chosen = read_by_rank_0(args.work_dir / "best_model.pth", env)
    say(f"best_model.pth: epoch {chosen['epoch']}, nme {chosen['metrics']['nme']:.4f}, nme_iod {chosen['metrics']['nme_iod']:.4f}, "
        f"chosen on these same {len(val)} faces ({chooser})")
    if test is not None:
        judged.load_state_dict(chosen["model"])
        _, _, metrics = validate(test_sets[chosen["args"]["input_size"]], args.epochs)
        say(f"val.json ({len(test)} faces, not used for choosing): " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        if env.rank == 0:
            result = {"faces": len(test), "chosen_on": chooser, **metrics}
            atomic_write(args.work_dir / "test.json", [json.dumps(result, indent=1).encode()])
    if env.world > 1:
        # DistributedDataParallel refers to itself and to the group. Were it left to the interpreter's last collection, a thread
        # of gloo that then drops the last broadcast's tensor would abort the process.
        del model
        gc.collect()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_script(main)
