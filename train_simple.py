"""Train a facial landmark detector (heatmaps from any timm backbone) on DogFLW, or on any COCO keypoint file.

    uv run train_simple.py --sample                       # drawn faces: a full run in minutes, on a CPU too
    uv run tools/convert_dogflw_to_coco.py --download
    uv run train_simple.py                                # DogFLW, HRNet-W32, 210 epochs
    uv run torchrun --nproc-per-node 4 train_simple.py --batch-size 64 --lr 4e-3    # faster, on four GPUs

A run leaves args.json, metrics.csv, checkpoints and pictures in work_dirs/RUN. `--resume` goes on with it.

TinyViT, 20 epochs on 3,238 faces of DogFLW's train split: error / eye distance (nme_iod) on 401 others of it
0.0736 and 0.0742 (two seeds), in 53 minutes on 2 CPU cores, and 87 on slower ones. Commands: README.md.
"""
import copy
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dataset as data
from dataset import PADDING, SIZE, Augmentation, DogFLWDataset, Faces, Scheme
from tools.lib import runtime
from tools.lib.backbones import feature_maps, normalization, take_imagenet, take_weights
from tools.lib.batches import batches_of, epoch_batches, faces_a_step
from tools.lib.checkpoints import Saver, TrainedModel, load_checkpoint, load_resumable, restore
from tools.lib.cli import Progress, UserError, as_plain, as_text, parse_settings, run_script, setting
from tools.lib.coco import find_annotations, notes_of
from tools.lib.draw import Log
from tools.lib.files import ROOT, as_json, atomic_write, data_root, make_sample, one_ahead, run_directory
from tools.lib.find import predictor_of
from tools.lib.windows import apply_matrix, invert_matrix, with_background

SAMPLE = {"data_root": ROOT / "data/sample/dogflw", "ann_root": ROOT / "data/sample/annotations",
          "work_dir": ROOT / "work_dirs/sample", "backbone": "hrnet_w18_small", "pretrained": False,
          "epochs": 5, "input_size": 128}


@dataclass
class Config(Augmentation):
    """Every setting, once, after Augmentation's. Only those with free=True may change at --resume."""
    data_root: Path | None = setting(None, "pictures (default: kagglehub's cache)", group="data", free=True)
    ann_root: Path = setting(ROOT / "data/dogflw/annotations", "an export, or its train.json", free=True)
    category: str | None = setting(None, "the category to train on, if several have different landmarks")
    sample: bool = setting(False, "train on drawn faces (made when missing), with settings for a CPU")
    holdout: float = setting(0.0, "fraction of train, by breed and picture, that chooses the checkpoint; "
                             "val.json, where there is one, is then scored once, at the end", "[0, 0.9]")
    crop: str = setting("face", "train on faces, or on whole pictures (a locator)", choices=["face", "image"])
    background: Path | None = setting(None, "folder of pictures without a face, for a locator", free=True)
    cache: Path | None = setting(ROOT / "data/cache", "folder for decoded faces, or none", free=True)
    num_workers: int = setting(4, "processes that cut crops", "[0, inf)", free=True)
    backbone: str = setting("hrnet_w32", "any timm model with feature maps", group="model")
    pretrained: bool = setting(True, "start from timm's ImageNet weights", free=True)
    weights: Path | None = setting(None, "start from a file: of a backbone, or a checkpoint", free=True)
    freeze: bool = setting(False, "keep the backbone's weights; its batch norm's statistics still change")
    input_size: int = setting(SIZE, "crop in pixels; heatmaps are half of it", "[64, 1024]", multiple=32)
    padding: float = setting(PADDING, "crop side / the box's longer side", "[0.5, 4]")
    sigma: float | None = setting(None, "of the targets, at the end, in cells (1.5 at 256 px)", "[0.3, 100]")
    decode_power: float = setting(1.5, "power of the maps whose centre of mass is the landmark", "[1, 8]")
    score_radius: float = setting(0.05, "a score: the chance that x and y err by <= X of a crop", "(0, 1]")
    epochs: int = setting(210, "passes over the faces", "[1, inf)", group="optimisation")
    batch_size: int = setting(16, "faces an optimizer step, over all GPUs and micro-batches", "[1, inf)")
    accumulate: int = setting(1, "micro-batches a step, for less memory", "[1, inf)", free=True)
    lr: float | None = setting(None, "learning rate (default 2e-3, --weights 1e-3, scratch 4e-3)", "(0, inf)")
    backbone_lr_mult: float = setting(1.0, "the backbone's rate / --lr (sam2_hiera_tiny: 0.025)", "(0, 1]")
    weight_decay: float = setting(0.1, "AdamW's, of all but vectors: biases, norms", "[0, 1)")
    beta1: float = setting(0.9, "decay of Adam's running mean of the gradients", "[0, 1)")
    beta2: float = setting(0.99, "decay of Adam's running mean of their squares", "[0, 1)")
    warmup_epochs: float = setting(1.0, "linear warm-up before the cosine", "[0, inf)")
    mse_weight: float = setting(1.0, "weight of the maps' squared error", "[0, inf)")
    crps_weight: float = setting(1.0, "weight of the CRPS (ranked probability score) of x and y", "[0, inf)")
    kl_weight: float = setting(0.3, "weight of the Kullback-Leibler divergence from the target", "[0, inf)")
    sigma_ratio: float = setting(2.0, "sigma at the first step / at the last, in parts of a crop", "[1, 16]")
    ema: float = setting(0.998, "decay of the average of the weights; 0 switches it off", "[0, 1)")
    progressive: float = setting(0.3, "share of epochs, at first, on crops half as wide, >= 128", "[0, 0.9]")
    seed: int = setting(0, "seed of order, augmentation and new weights, not of --holdout", "[0, 9e18]")
    work_dir: Path | None = setting(None, "of the run (default: work_dirs/BACKBONE)", group="run", free=True)
    resume: bool = setting(False, "go on from last.pth in the work dir", free=True)
    val_every: int | None = setting(None, "epochs between validations (default: --epochs / 100, >= 2)",
                                    "[1, inf)", free=True)
    save_every: int = setting(10, "epochs between epoch_N.pth", "[1, inf)", free=True)
    tensorboard: bool = setting(False, "also write scalars and a picture for TensorBoard", free=True)
    device: str = setting("auto", "cuda, mps or cpu", free=True)
    amp: bool = setting(True, "16-bit arithmetic where the device has it")
    graphs: bool = setting(False, "replay steps as CUDA graphs (not measured here)", free=True)
    compile: bool = setting(False, "torch.compile the model (slow on a CPU)", free=True)


def parse_args(argv=None) -> Config:
    """Read and check the command line: a Config. Raises UserError naming all values that cannot be."""
    config = parse_settings(Config, __doc__, argv, {"sample": SAMPLE})
    config.work_dir = config.work_dir or ROOT / "work_dirs" / config.backbone
    if problems := runtime.contradictions(config):
        raise UserError("; ".join(problems))
    # A checkpoint stores where its data is; absolute, so that the tools find it from any folder.
    config.ann_root = config.ann_root.absolute()
    config.data_root = config.data_root and config.data_root.absolute()
    config.lr = config.lr or (1e-3 if config.weights else 2e-3 if config.pretrained else 4e-3)
    config.sigma = config.sigma or data.default_sigma(config.input_size)
    config.val_every = config.val_every or max(2, math.ceil(config.epochs / 100))
    return config


# ---------------------------------------------------------------- the model

class LandmarkNet(nn.Module):
    """Features of the whole backbone at stride 2, and a small head: (B, 3, S, S) -> (B, K, S/2, S/2).

    Every heatmap is a softmax over its cells: float32, a probability for each place, summing to 1. Each level
    of the backbone gets `width` channels by a 1 x 1 convolution. The coarse ones are enlarged to stride 4 and
    added; their sum joins the finest at stride 2: a feature pyramid (Lin et al. 2017) without its cascade.
    timm's first level of an HRNet is the *stem*: a head on it alone would see 7 x 7 pixels, and learn
    nothing. Raises UserError where timm has no such levels.
    """

    def __init__(self, backbone: str, num_landmarks: int, width: int = 64):
        super().__init__()
        self.backbone = feature_maps(backbone)
        info = self.backbone.feature_info
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
            for channels, stride in zip(info.channels(), info.reduction()) if stride > 1)
        self.head = nn.Sequential(  # take_weights knows it by its last layer
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, num_landmarks, 1, bias=False))  # a softmax over cells would cancel a bias
        for name, value in zip(("mean", "std"), normalization(backbone)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images):
        features = self.backbone(images)[-len(self.laterals):]  # without VGG's of stride 1
        levels = [lateral(x) for lateral, x in zip(self.laterals, features)]
        half = [side // data.STRIDE for side in images.shape[-2:]]
        fine = levels.pop(0) if levels[0].shape[-1] >= half[1] else 0  # 0: no level of stride 2
        fused = levels[0]  # of stride 4, where the others meet: that is cheap
        for x in levels[1:]:
            fused = fused + F.interpolate(x, size=fused.shape[-2:], mode="bilinear")
        logits = self.head(F.relu(fine + F.interpolate(fused, size=half, mode="bilinear")))
        if logits.requires_grad:  # without it the softmax's gradient is not channels_last: a third more time
            logits.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return logits.contiguous().flatten(2).softmax(2, dtype=torch.float32).view_as(logits)


def build_model(config: Config, scheme: Scheme, say=print) -> LandmarkNet:
    """A LandmarkNet with ImageNet's backbone, what fits of a file, or random weights, as the settings ask."""
    model = LandmarkNet(config.backbone, len(scheme.names))
    if config.weights:
        take_weights(model, config.weights, config.backbone, scheme.names, say)
    elif config.pretrained:
        take_imagenet(model.backbone, config.backbone, say)
    model.backbone.requires_grad_(not config.freeze)
    return model


# ---------------------------------------------------------------- losses, errors, predictions

def divergence(heatmaps, offsets, sigma):
    """KL(Gaussian of sum 1 || map) in nats: maps (B, K, H, H), offsets (B, K, 2, H) in cells -> (B, K).

    Kullback & Leibler 1951, "On information and sufficiency". From a window of 5 sigma around the point,
    beyond which the Gaussian is nothing: few passes over whole maps.
    """
    size = heatmaps.shape[-1]
    width = min(size, 2 * math.ceil(5 * sigma) + 1)
    first = (offsets.abs().argmin(3, keepdim=True) - width // 2).clamp(0, size - width)
    window = first + torch.arange(width, device=first.device)  # (B, K, 2, width): columns and rows
    column, row = window.unbind(2)
    near = heatmaps.flatten(2).gather(2, (row.unsqueeze(3) * size + column.unsqueeze(2)).flatten(2))
    x, y = (v / v.sum(2, keepdim=True).clamp(min=1e-9)  # it may be 0 for a point outside the crop
            for v in data.gaussians(offsets.gather(3, window), sigma))
    log_near = (near + 1e-9).log().unflatten(2, (width, width))
    cross_entropy = -((y.unsqueeze(3) * log_near).sum(2) * x).sum(2)  # on CUDA @'s gradient may ask for gcc
    return cross_entropy + torch.xlogy(x, x).sum(2) + torch.xlogy(y, y).sum(2)


def heatmap_losses(heatmaps, points, visibility, sigma: float, config: Config):
    """The loss of every heatmap (B, K): MSE + CRPS + divergence, each with its weight of the config.

    heatmaps (B, K, H, H) that sum to 1; points (B, K, 2) in crop pixels; sigma in cells; visibility (B, K):
    1 trains, 0 costs nothing, -1 asks for a flat map.

    MSE: between the target Gaussian and the map, scaled so that a perfect one peaks at 1; a flat map costs
    about 1. Alone it prefers the flat map wherever a place is uncertain, and learns the ears last.
    CRPS: the continuous ranked probability score of x and of y, in fractions of the crop (Gneiting & Raftery
    2007, "Strictly proper scoring rules", eq. 20). It knows how far away a wrong map is.
    """
    size, mass = heatmaps.shape[-1], 2 * math.pi * sigma**2  # a whole target's sum; the map's is 1
    offsets = data.cell_offsets(points, size)  # (B, K, 2, H)
    x, y = data.gaussians(offsets, sigma)  # the target is y * x, and never needed as a map
    # |mass * map - target|^2 = mass^2 |map|^2 - 2 mass <map, target> + |target|^2: fewer passes
    weighted, columns = (torch.stack([y, torch.ones_like(y)], 2) @ heatmaps).unbind(2)  # (B, K, H)
    inner = (weighted * x).sum(2)
    square = torch.linalg.vector_norm(heatmaps, dim=(2, 3)).square()
    mse = mass**2 * square - 2 * mass * inner + x.square().sum(2) * y.square().sum(2)
    losses = config.mse_weight * mse / (math.pi * sigma**2)
    if config.crps_weight:
        below = torch.stack([columns, heatmaps.sum(3)], 2).cumsum(3)
        truth = (offsets + 1).clamp(0, 1)  # of a point that the two cells beside it share
        losses += config.crps_weight * (below - truth).square().sum((2, 3)) / size
    if config.kl_weight:
        losses += config.kl_weight * divergence(heatmaps, offsets, sigma)
    from_flat = config.kl_weight * (square * size**2).log()  # Rényi's divergence of order 2 from a flat map
    return torch.where(visibility < 0, from_flat, losses * visibility)


def crop_side(faces: Faces, padding: float):
    """The side of every face's crop in picture pixels (N,)."""
    return faces.boxes[:, 2:].max(1) * padding


def box_diagonal(faces, _):
    """The diagonal of every face's box in picture pixels (N,)."""
    return np.linalg.norm(faces.boxes[:, 2:], axis=1)


def eye_distance(faces, _):
    """The distance of the interocular landmarks in picture pixels (N,); NaN where it is 0 or unknown."""
    if not faces.scheme.interocular:
        return np.full(len(faces), np.nan)
    i, j = faces.scheme.interocular
    length = np.linalg.norm(faces.points[:, i] - faces.points[:, j], axis=1)
    return np.where(faces.visible[:, [i, j]].all(1) & (length > 0), length, np.nan)


def nme(points, faces: Faces, padding: float, some=True, *, normalizer):
    """Normalised mean error of every face: (N,) float64, NaN where it has no labelled landmark or normalizer.

    points (N, K, 2) in picture pixels; normalizer(faces, padding) -> (N,) pixels. The mean is over a face's
    labelled landmarks, or those in the mask `some` (N, K); landmarks that the crop cut off count.
    """
    errors = np.linalg.norm(points - faces.points, axis=2)
    labelled = (faces.visible > 0) & some
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(labelled, errors, 0).sum(1) / labelled.sum(1) / normalizer(faces, padding)


NORMALIZERS = {"nme": crop_side, "nme_iod": eye_distance, "nme_box": box_diagonal}
# Reported: name -> function(points, faces, padding, some), as nme is. The first chooses; the least is best.
METRICS = {name: partial(nme, normalizer=normalizer) for name, normalizer in NORMALIZERS.items()}
COLUMNS = ("epoch", "size", "seconds", "lr", "train_loss", "val_loss", *METRICS, "images_per_s")


def nan_mean(values):
    """The mean of what is not NaN; NaN where nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def mean_metrics(points, faces, padding):
    """Every metric's mean over the faces: {"nme": ..., ...}; NaN where no face counts, never 0."""
    return {name: nan_mean(metric(points, faces, padding)) for name, metric in METRICS.items()}


@torch.inference_mode()
def predict_heatmaps(model, images, flip_index=None, amp=None):
    """uint8 crops (B, S, S, 3) -> float32 heatmaps (B, K, S/2, S/2), averaged with the mirrored picture's."""
    images = data.normalize(images, model.mean, model.std)
    with runtime.autocast(images.device, amp):
        if flip_index is None:
            return model(images)
        plain, mirrored = model(torch.cat([images, images.flip(3)])).chunk(2)
    return (plain + mirrored.flip(3)[:, flip_index]) / 2


def predict_crops(model, crops, matrices, config, flip_index=None, amp=None):
    """uint8 crops (B, S, S, 3), their matrices -> heatmaps, points (B, K, 2) in the pictures, scores."""
    heatmaps = predict_heatmaps(model, crops.to(model.mean.device), flip_index, amp)
    points, scores = (found.cpu().double().numpy() for found in data.decode_heatmaps(
        heatmaps, config.decode_power, config.score_radius))
    return heatmaps, apply_matrix(invert_matrix(matrices), points), scores


def predict(model, dataset, config, processes, amp=None, batch_size=16, flip=True, sigma=None):
    """Predict every face: points (N, K, 2) in picture pixels, scores (N, K), mean loss (NaN without `sigma`).

    float64 numpy. Of several processes each predicts its share, and all get the whole, exactly.
    """
    model.train().eval()  # TinyViT's attention keeps eval mode's table of biases until train()
    device, scheme, n = processes.device, dataset.faces.scheme, len(dataset)
    flip_index = torch.tensor(scheme.flip_index, device=device) if flip and scheme.flip_pairs else None
    table = np.zeros((n, len(scheme.names), 4))  # x, y, score, loss; 0 for other processes' faces
    mine = range(processes.rank, n, processes.world)
    batches = [mine[start:start + batch_size] for start in range(0, len(mine), batch_size)]
    for rows, batch in zip(batches, one_ahead(dataset.batch, batches)):
        heatmaps, table[rows, :, :2], table[rows, :, 2] = predict_crops(
            model, batch["image"], batch["matrix"].numpy(), config, flip_index, amp)
        if sigma:
            targets = (batch[name].to(device) for name in ("keypoints", "visibility"))
            table[rows, :, 3] = heatmap_losses(heatmaps, *targets, sigma, config).cpu()
    # Every entry is nonzero in one process only, so the sum is exact.
    table = processes.sum(torch.from_numpy(table)).cpu().numpy()
    return table[..., :2], table[..., 2], float(table[..., 3].mean()) if sigma else math.nan


class Trained(TrainedModel):
    """A checkpoint ready to use: Trained(path, device).look([(image, box), ...]) -> points, scores."""
    Config, Scheme, build_model = Config, Scheme, staticmethod(build_model)
    crop, predict_crops = staticmethod(data.cut_crop), staticmethod(predict_crops)


def load_predictor(checkpoint=None, locator=None, device="auto", batch_size=32):
    """A Predictor (tools/lib/find.py); by default of the bundled model, and with the locator that fits."""
    return predictor_of(Trained, checkpoint, locator, device, batch_size)


# ---------------------------------------------------------------- the loop

class Plan:
    """Crop size, sigma and learning rate over a run. Raises UserError for a batch that cannot be split."""

    def __init__(self, config: Config, faces: int, world: int = 1):
        self.config, self.faces, self.batch_size = config, faces, faces_a_step(config, faces, world)
        self.steps = faces // self.batch_size  # optimizer steps an epoch
        self.total = config.epochs * self.steps
        self.sizes = sorted({self.size(0), config.input_size})  # of all crops in the run

    def validates(self, epoch: int) -> bool:
        """Whether an epoch ends with a validation; the last one does."""
        return (epoch + 1) % self.config.val_every == 0 or epoch + 1 == self.config.epochs

    def size(self, epoch: int) -> int:
        """Side of the crops, at first about half (Tan & Le 2021, "EfficientNetV2": progressive learning)."""
        full = self.config.input_size
        small = min(full, max(128, full // 64 * 32))
        return small if epoch < int(self.config.progressive * self.config.epochs) else full

    def sigma(self, step: int, size: int) -> float:
        """The targets' standard deviation in cells: first wide, to learn places fast, then sharper."""
        narrowing = self.config.sigma_ratio ** (1 - step / self.total)
        return self.config.sigma * size / self.config.input_size * narrowing

    def lr(self, step: int) -> float:
        """Linear warm-up, then half a cosine to 0 (Loshchilov & Hutter 2017, "SGDR", eq. 5)."""
        warmup = self.config.warmup_epochs * self.steps
        if step < warmup:
            return self.config.lr * min(1.0, (step + 1) / warmup)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total - warmup)))


def build_optimizer(model: nn.Module, config: Config):
    """AdamW (Loshchilov & Hutter 2019): no decay of vectors (biases, norms); the backbone at its own rate."""
    groups = {}
    for name, p in model.named_parameters():
        scale = config.backbone_lr_mult if name.startswith("backbone.") else 1.0
        groups.setdefault((scale, p.ndim > 1), []).append(p)
    groups = [{"params": members, "scale": scale, "weight_decay": config.weight_decay * matrices}
              for (scale, matrices), members in sorted(groups.items(), reverse=True)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2),
                             fused=next(model.parameters()).device.type in ("cuda", "cpu"))


class Run:
    """What training changes: model, its average, optimizer, progress; new, or as last.pth has them."""

    def __init__(self, config: Config, scheme: Scheme, plan: Plan, processes, resumed=None):
        self.config, self.scheme, self.plan, self.processes = config, scheme, plan, processes
        device, self.amp = processes.device, runtime.choose_amp(processes.device, config.amp)
        start = replace(config, pretrained=False, weights=None) if resumed else config
        self.model = build_model(start, scheme, processes.say).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.ema else self.model
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        # Their names in the file: "model" is what to use, "raw" what goes on training.
        self.stateful = dict(model=self.ema, raw=self.model, optimizer=self.optimizer, scaler=self.scaler)
        self.progress = {"epoch": 0, "best": math.inf, "rows": []}
        if resumed:
            self.progress = {name: resumed[name] for name in self.progress}
            restore(self.stateful, resumed)
        self.average = runtime.WeightAverage(self.model, self.ema, config.ema) if config.ema else None
        self.wrapped = runtime.for_training(self.model, config, plan, processes, self.amp)


def train_step(run: Run, batches, step: int):
    """One optimizer step over its micro-batches: its loss, its faces' indices. Never waits for the device."""
    config, device, total, indices = run.config, run.processes.device, 0, []
    for left in reversed(range(config.accumulate)):  # micro-batches after this one
        batch = next(batches)
        indices += batch["index"].tolist()
        crops, points, visibility, colour = (batch[k].to(device, non_blocking=device.type == "cuda")
                                             for k in ("image", "keypoints", "visibility", "colour"))
        images = data.normalize(crops, run.model.mean, run.model.std, colour)
        with run.processes.without_sync(run.wrapped, left):
            with runtime.autocast(device, run.amp):
                heatmaps = run.wrapped(images)
            sigma = run.plan.sigma(step, crops.shape[1])
            # Over all maps, labelled or not: so micro-batches and GPUs add up to the whole batch's gradient.
            loss = heatmap_losses(heatmaps, points, visibility, sigma, config).mean() / config.accumulate
            run.scaler.scale(loss).backward()
        total += loss.detach()
    for group in run.optimizer.param_groups:
        group["lr"] = run.plan.lr(step) * group.get("scale", 1)  # an older last.pth has no scale
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.average:
        run.average.update(step)
    return total, indices


def train_one_epoch(run: Run, batches, files: list) -> float:
    """Train for one more epoch; returns the mean loss. Raises UserError naming the faces that spoilt it."""
    run.wrapped.train()
    steps, epoch, total = run.plan.steps, run.progress["epoch"], 0
    title = f"epoch {epoch + 1}/{run.config.epochs}"
    watch = runtime.FiniteWatch(run.processes.device, files, title, run.config.work_dir / "last.pth")
    with Progress(steps, title, quiet=not run.processes.first) as bar:
        for step in range(steps):
            loss, indices = train_step(run, batches, epoch * steps + step)
            total += loss
            watch.add(loss, indices)
            if step % 50 == 49 or step == steps - 1:  # rarely: reading the loss waits for the device
                watch.check(run.scaler, run.model if step == steps - 1 else None)
                bar.show(loss=float(total) / (step + 1))
            bar.update(step + 1)
    run.progress["epoch"] += 1
    run.processes.average_buffers(run.ema, run.model)
    return float(run.processes.sum(total)) / run.processes.world / steps


def validate(run: Run, dataset: DogFLWDataset):
    """The averaged weights' points (N, K, 2) in picture pixels, mean loss, and the mean of every metric."""
    sigma = run.plan.sigma(run.progress["epoch"] * run.plan.steps, dataset.size)
    points, _, loss = predict(run.ema, dataset, run.config, run.processes, run.amp,
                              run.processes.predict_batch, sigma=sigma)
    return points, loss, mean_metrics(points, dataset.faces, run.config.padding)


# ---------------------------------------------------------------- a run, top to bottom

def load_sets(config: Config, processes):
    """Faces to train on, to choose on, to score once (or None); the second's name. Raises UserError."""
    if config.sample:
        make_sample(config.data_root, config.ann_root)
    root, paths = data_root(config.data_root), find_annotations(config.ann_root)
    train, val = (data.load_coco(path, root, config.category) if path else None for path in paths)
    for note in notes_of(train, val, paths):
        processes.say(note)
    if config.crop == "image":
        train, val = train.whole_pictures(), val and val.whole_pictures()
    if not config.holdout:
        if not val:
            raise UserError(f"--ann-root {config.ann_root}: no val.json to choose on; take --holdout 0.1")
        return train, val, None, paths[1].name
    rest, held = train.split(config.holdout)
    if not held or not rest:
        raise UserError(f"--holdout {config.holdout}: leaves one side without a face; try another "
                        "or add pictures: the faces of one stay together")
    return rest, held, val, "held out of train"


def test_once(run: Run, datasets: dict, chosen_on: str):
    """Say which epoch was chosen; score it once where there are faces that chose nothing: test.json."""
    path, say = run.config.work_dir / "best_model.pth", run.processes.say
    chosen = run.processes.from_first(lambda: load_checkpoint(path))
    say(f"best: epoch {chosen['epoch']}, {as_text(chosen['metrics'], METRICS)} on the faces that chose it")
    if datasets:
        run.ema.load_state_dict(chosen["model"])
        dataset = datasets[chosen["size"]]
        *_, metrics = validate(run, dataset)
        say(f"on {len(dataset)} faces that chose nothing: {as_text(metrics, METRICS)}")
        if run.processes.first:
            result = as_json({"faces": len(dataset), "chosen_on": chosen_on, **metrics})
            atomic_write(path.with_name("test.json"), [result])


def train(config: Config, processes):
    """The whole run, top to bottom."""
    torch.manual_seed(config.seed)
    faces, select, test, chosen_on = load_sets(config, processes)
    faces = with_background(faces, config.background, processes.say, select, test)
    plan, last = Plan(config, len(faces), processes.world), config.work_dir / "last.pth"
    run = Run(config, faces.scheme, plan, processes,
              processes.from_first(lambda: load_resumable(last, config, faces, select)))
    done = run.progress["epoch"]
    saver = Saver(run, list(METRICS), faces, select)
    log = Log(config, COLUMNS, METRICS, run.progress["rows"], quiet=not processes.first)
    cut = partial(DogFLWDataset, padding=config.padding, seed=config.seed, cache=config.cache)
    train_set = cut(faces, config.input_size, augment=config)  # a Config is an Augmentation
    select_sets, test_sets = ({size: cut(some, size) for size in plan.sizes if some}
                              for some in (select, test))
    sampler = epoch_batches(plan, done, processes.rank, processes.world)
    batches = batches_of(train_set, sampler, config.num_workers, processes.device)
    log.begin(train_set, as_plain(config) | {"versions": saver.versions})
    processes.say(f"{len(faces)} faces to train on, {len(select)} to choose on ({chosen_on}); "
                  f"{config.backbone} on {processes}; {done} epochs done")
    for epoch in range(done, config.epochs):
        begin, size, points = time.perf_counter(), plan.size(epoch), None
        torch.manual_seed(config.seed + config.epochs * processes.rank + epoch)  # dropout's, at --resume too
        row = dict.fromkeys(COLUMNS, math.nan) | {"epoch": epoch + 1, "size": size}
        row["train_loss"] = train_one_epoch(run, batches, faces.files)
        row["images_per_s"] = plan.steps * plan.batch_size / (time.perf_counter() - begin)
        if plan.validates(epoch):
            points, row["val_loss"], metrics = validate(run, select_sets[size])
            row |= metrics
        row |= {"lr": plan.lr((epoch + 1) * plan.steps - 1), "seconds": time.perf_counter() - begin}
        run.progress["rows"].append(row)
        if processes.first:
            best = saver.save(run, row, chosen_on)
            log.epoch(best, select_sets[size], points)
    next(batches, None)  # ends the pass, and its workers
    log.close()
    test_once(run, test_sets, chosen_on)


def main(argv=None):
    """Train, in a folder that no other run has; what ends a run early becomes one line."""
    config = parse_args(argv)
    with (run_directory(config.work_dir, config.resume), runtime.explained_ends(config.work_dir / "last.pth"),
          runtime.Processes(config.device) as processes):
        train(config, processes)


if __name__ == "__main__":
    run_script(main)
