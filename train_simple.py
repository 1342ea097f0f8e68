"""Train a facial landmark detector (heatmaps from any timm backbone) on DogFLW, or on any COCO keypoint file.

    uv run train_simple.py --sample                       # drawn faces: a full run in minutes, even on a CPU
    uv run tools/convert_dogflw_to_coco.py --download
    uv run train_simple.py                                # DogFLW, HRNet-W32, 210 epochs
    uv run torchrun --nproc-per-node 4 train_simple.py --batch-size 64 --lr 4e-3    # on four GPUs

A run writes args.json, metrics.csv, checkpoints and pictures to its --work-dir; `--resume` continues it.

TinyViT from MobileSAM's weights, after 20 epochs on 3,238 faces of DogFLW: nme_iod (error / eye distance)
0.0736 and 0.0742 (two seeds) on 401 others, in 53 minutes on 2 CPU cores, 87 on slower ones. See README.md.
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
from torch import Tensor, nn

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
    """All settings, added to Augmentation's. Only those marked free=True may change with --resume."""
    data_root: Path | None = setting(None, "pictures (default: kagglehub's cache)", group="data", free=True)
    ann_root: Path = setting(ROOT / "data/dogflw/annotations", "folder of COCO files, or one file", free=True)
    category: str | None = setting(None, "category name or id to train on, if categories differ in landmarks")
    sample: bool = setting(False, "train on drawn faces (made if missing), with settings for a CPU")
    holdout: float = setting(0.0, "fraction of each breed's pictures held out to select the checkpoint; "
                             "val.json, if there is one, is then scored only once, at the end", "[0, 0.9]")
    crop: str = setting("face", "train on faces, or on whole pictures (a locator)", choices=["face", "image"])
    background: Path | None = setting(None, "folder of pictures without faces, for a locator", free=True)
    cache: Path | None = setting(ROOT / "data/cache", "folder for decoded faces, or 'none'", free=True)
    num_workers: int = setting(4, "data loading processes, at most one per core", "[0, inf)", free=True)
    backbone: str = setting("hrnet_w32", "any timm model with feature maps", group="model")
    pretrained: bool = setting(True, "start from timm's ImageNet weights", free=True)
    weights: Path | None = setting(None, "start from a file: backbone weights or a checkpoint", free=True)
    freeze: bool = setting(False, "freeze the backbone's weights; its batch norm statistics still change")
    input_size: int = setting(SIZE, "crop side in pixels; heatmaps have half that", "[64, 1024]", multiple=32)
    padding: float = setting(PADDING, "crop side / longer side of the box", "[0.5, 4]")
    sigma: float | None = setting(None, "final sigma of the targets, in cells (1.5 at 256 px)", "[0.3, 100]")
    decode_power: float = setting(1.5, "exponent applied to maps before taking the centre of mass", "[1, 8]")
    score_radius: float = setting(0.05, "score: probability that x and y err by <= X of the crop", "(0, 1]")
    epochs: int = setting(210, "passes over the training faces", "[1, inf)", group="optimisation")
    batch_size: int = setting(16, "faces per optimizer step, over all GPUs and micro-batches", "[1, inf)")
    accumulate: int = setting(1, "micro-batches per step, to save memory", "[1, inf)", free=True)
    lr: float | None = setting(None, "learning rate (default 2e-3, --weights 1e-3, scratch 4e-3)", "(0, inf)")
    backbone_lr_mult: float = setting(1.0, "backbone learning rate / --lr (sam2_hiera_tiny: 0.025)", "(0, 1]")
    weight_decay: float = setting(0.1, "AdamW's weight decay; none for vectors (biases, norms)", "[0, 1)")
    beta1: float = setting(0.9, "decay of Adam's running mean of the gradients", "[0, 1)")
    beta2: float = setting(0.99, "decay of Adam's running mean of the squared gradients", "[0, 1)")
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up before the cosine decay", "[0, inf)")
    mse_weight: float = setting(1.0, "weight of the heatmaps' squared error", "[0, inf)")
    crps_weight: float = setting(1.0, "weight of the CRPS (ranked probability score) of x and y", "[0, inf)")
    kl_weight: float = setting(0.3, "weight of the Kullback-Leibler divergence KL(target || map)", "[0, inf)")
    sigma_ratio: float = setting(2.0, "initial / final sigma, both as fractions of the crop", "[1, 16]")
    ema: float = setting(0.998, "decay of the weights' exponential moving average; 0 disables it", "[0, 1)")
    progressive: float = setting(0.3, "initial share of epochs on half-width crops (>= 128 px)", "[0, 0.9]")
    seed: int = setting(0, "seed for data order, augmentation and new weights, not --holdout", "[0, 9e18]")
    work_dir: Path | None = setting(None, "run folder (default: work_dirs/BACKBONE)", group="run", free=True)
    resume: bool = setting(False, "continue from last.pth in the work dir", free=True)
    val_every: int | None = setting(None, "epochs between validations (default: --epochs / 100, at least 2)",
                                    "[1, inf)", free=True)
    save_every: int = setting(10, "epochs between checkpoints epoch_N.pth", "[1, inf)", free=True)
    tensorboard: bool = setting(False, "also log scalars and a picture to TensorBoard", free=True)
    device: str = setting("auto", "auto, cuda, mps or cpu", free=True)
    amp: bool = setting(True, "16-bit mixed precision where the hardware has it (not on mps)")
    graphs: bool = setting(False, "replay training steps as CUDA graphs (speed not measured)", free=True)
    compile: bool = setting(False, "torch.compile the model (slow on a CPU)", free=True)


def parse_args(argv=None) -> Config:
    """Parse and check the command line. Raises UserError naming every invalid value."""
    config = parse_settings(Config, __doc__, argv, {"sample": SAMPLE})
    config.work_dir = config.work_dir or ROOT / "work_dirs" / config.backbone
    if problems := runtime.contradictions(config):
        raise UserError("; ".join(problems))
    # Checkpoints store these paths. They are absolute so that the tools find the data from any folder.
    config.ann_root = config.ann_root.absolute()
    config.data_root = config.data_root and config.data_root.absolute()
    config.lr = config.lr or (1e-3 if config.weights else 2e-3 if config.pretrained else 4e-3)
    config.sigma = config.sigma or data.default_sigma(config.input_size)
    config.val_every = config.val_every or max(2, math.ceil(config.epochs / 100))
    return config


# ---------------------------------------------------------------- the model

class LandmarkNet(nn.Module):
    """A timm backbone and a small head: normalised images (B, 3, S, S) -> heatmaps (B, K, S/2, S/2).

    Each heatmap is a softmax over its cells: float32 probabilities that sum to 1. A 1 x 1 convolution brings
    each backbone level to `width` channels. The coarser levels are upsampled to stride 4 and summed; the sum
    is added to the level of stride 2, if any: a feature pyramid (Lin et al. 2017) without the top-down
    cascade. timm's first level of an HRNet is its *stem*: a head that saw only this level would see 7 x 7
    pixels, and learn nothing. Raises UserError if timm has no suitable levels for the backbone.
    """

    def __init__(self, backbone: str, num_landmarks: int, width: int = 64):
        super().__init__()
        self.backbone = feature_maps(backbone)
        info = self.backbone.feature_info
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
            for channels, stride in zip(info.channels(), info.reduction()) if stride > 1)
        self.head = nn.Sequential(  # take_weights expects the model's last layer here
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, num_landmarks, 1, bias=False))  # no bias: the softmax would cancel it
        for name, value in zip(("mean", "std"), normalization(backbone)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)[-len(self.laterals):]  # drops VGG's level of stride 1
        levels = [lateral(x) for lateral, x in zip(self.laterals, features)]
        half = [side // data.STRIDE for side in images.shape[-2:]]
        fine = levels.pop(0) if levels[0].shape[-1] >= half[1] else 0  # 0 without a level of stride 2
        fused, *coarser = levels  # the first has stride 4, where it is cheap to sum the others
        for x in coarser:
            fused = fused + F.interpolate(x, size=fused.shape[-2:], mode="bilinear")
        logits = self.head(F.relu(fine + F.interpolate(fused, size=half, mode="bilinear")))
        if logits.requires_grad:  # without the hook its gradient is not channels_last: takes a third longer
            logits.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return logits.contiguous().flatten(2).softmax(2, dtype=torch.float32).view_as(logits)


def build_model(config: Config, scheme: Scheme, say=print) -> LandmarkNet:
    """Build a LandmarkNet; weights from a file (what fits), from ImageNet (backbone only), or random."""
    model = LandmarkNet(config.backbone, len(scheme.names))
    if config.weights:
        take_weights(model, config.weights, config.backbone, scheme.names, say)
    elif config.pretrained:
        take_imagenet(model.backbone, config.backbone, say)
    model.backbone.requires_grad_(not config.freeze)
    return model


# ---------------------------------------------------------------- losses, errors, predictions

def divergence(heatmaps: Tensor, offsets: Tensor, sigma: float) -> Tensor:
    """KL(target || map) in nats: maps (B, K, H, H), offsets (B, K, 2, H) and sigma in cells -> (B, K).

    Kullback & Leibler 1951, "On information and sufficiency". The target is a Gaussian that sums to 1. Only a
    window of +-5 sigma around the point is read, as the rest is negligible: fewer passes over whole maps.
    """
    size = heatmaps.shape[-1]
    width = min(size, 2 * math.ceil(5 * sigma) + 1)
    first = (offsets.abs().argmin(3, keepdim=True) - width // 2).clamp(0, size - width)
    window = first + torch.arange(width, device=first.device)  # (B, K, 2, width): columns and rows
    column, row = window.unbind(2)
    near = heatmaps.flatten(2).gather(2, (row.unsqueeze(3) * size + column.unsqueeze(2)).flatten(2))
    x, y = (v / v.sum(2, keepdim=True).clamp(min=1e-9)  # the sum may be 0 if the point is outside the crop
            for v in data.gaussians(offsets.gather(3, window), sigma))
    log_near = (near + 1e-9).log().unflatten(2, (width, width))
    cross_entropy = -((y.unsqueeze(3) * log_near).sum(2) * x).sum(2)  # not @: its CUDA gradient may need gcc
    return cross_entropy + torch.xlogy(x, x).sum(2) + torch.xlogy(y, y).sum(2)


def heatmap_losses(heatmaps: Tensor, points: Tensor, visibility: Tensor, sigma: float,
                   config: Config) -> Tensor:
    """The loss of each heatmap (B, K): MSE + CRPS + KL divergence, with the weights in `config`.

    heatmaps (B, K, H, H), each summing to 1; points (B, K, 2) in crop pixels; sigma in cells; visibility
    (B, K): 1 trains towards the target, 0 gives no loss, -1 trains towards a flat map (with --kl-weight).

    MSE: squared error between target Gaussian and map, scaled so that a perfect map peaks at 1; a flat map
    costs about 1. On its own, it favours flat maps where a position is uncertain: ears are learnt last.
    CRPS: continuous ranked probability score, x plus y, in fractions of the crop (Gneiting & Raftery 2007,
    "Strictly proper scoring rules", eq. 20, negated). It grows with the distance of an error.
    """
    size, mass = heatmaps.shape[-1], 2 * math.pi * sigma**2  # sum of a full target; a map sums to 1
    offsets = data.cell_offsets(points, size)  # (B, K, 2, H)
    x, y = data.gaussians(offsets, sigma)  # the target is their outer product, which is never built
    # |mass map - target|^2 = mass^2 |map|^2 - 2 mass <map, target> + |target|^2: fewer passes.
    # One product sums each column twice: weighted by y, for <map, target>, and plain, for the CRPS.
    weighted, columns = (torch.stack([y, torch.ones_like(y)], 2) @ heatmaps).unbind(2)  # (B, K, H)
    inner = (weighted * x).sum(2)
    square = torch.linalg.vector_norm(heatmaps, dim=(2, 3)).square()  # |map|^2
    mse = mass**2 * square - 2 * mass * inner + x.square().sum(2) * y.square().sum(2)
    losses = config.mse_weight * mse / (math.pi * sigma**2)  # |full target|^2
    if config.crps_weight:
        below = torch.stack([columns, heatmaps.sum(3)], 2).cumsum(3)
        truth = (offsets + 1).clamp(0, 1)  # CDF of a point split linearly between the two nearest cells
        losses += config.crps_weight * (below - truth).square().sum((2, 3)) / size
    if config.kl_weight:
        losses += config.kl_weight * divergence(heatmaps, offsets, sigma)
    from_flat = config.kl_weight * (square * size**2).log()  # 0 if flat: Rényi's divergence, order 2
    return torch.where(visibility < 0, from_flat, losses * visibility)


def crop_side(faces: Faces, padding: float):
    """The side of every face's crop in picture pixels (N,)."""
    return faces.boxes[:, 2:].max(1) * padding


def box_diagonal(faces: Faces, _):
    """The diagonal of every face's box in picture pixels (N,)."""
    return np.linalg.norm(faces.boxes[:, 2:], axis=1)


def eye_distance(faces: Faces, _):
    """The distance between the interocular landmarks in picture pixels (N,); NaN where 0 or unknown."""
    if not faces.scheme.interocular:
        return np.full(len(faces), np.nan)
    i, j = faces.scheme.interocular
    length = np.linalg.norm(faces.points[:, i] - faces.points[:, j], axis=1)
    return np.where(faces.visible[:, [i, j]].all(1) & (length > 0), length, np.nan)


def nme(points: np.ndarray, faces: Faces, padding: float, some=True, *, normalizer) -> np.ndarray:
    """Normalised mean error of every face: (N,) float64, NaN without labelled landmarks or a normalizer.

    points (N, K, 2) in picture pixels; normalizer(faces, padding) -> (N,) pixels. The mean is over a face's
    labelled landmarks, or those of them in the mask `some` (N, K); landmarks outside the crop count, too.
    """
    errors = np.linalg.norm(points - faces.points, axis=2)
    labelled = (faces.visible > 0) & some
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(labelled, errors, 0).sum(1) / labelled.sum(1) / normalizer(faces, padding)


NORMALIZERS = {"nme": crop_side, "nme_iod": eye_distance, "nme_box": box_diagonal}
# name -> function(points, faces, padding, some), like nme. Lower is better; the first selects the epoch.
METRICS = {name: partial(nme, normalizer=normalizer) for name, normalizer in NORMALIZERS.items()}
COLUMNS = ("epoch", "size", "seconds", "lr", "train_loss", "val_loss", *METRICS, "images_per_s")


def nan_mean(values: np.ndarray) -> float:
    """The mean of the values (N,) that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def mean_metrics(points: np.ndarray, faces: Faces, padding: float) -> dict:
    """Every metric's mean over the faces: {"nme": ..., ...}; NaN, not 0, if no face has a value."""
    return {name: nan_mean(metric(points, faces, padding)) for name, metric in METRICS.items()}


@torch.inference_mode()
def predict_heatmaps(model: LandmarkNet, images: Tensor, flip_index=None, amp=None) -> Tensor:
    """uint8 crops (B, S, S, 3) -> float32 heatmaps (B, K, S/2, S/2), flip-averaged if flip_index is given."""
    images = data.normalize(images, model.mean, model.std)
    with runtime.autocast(images.device, amp):
        if flip_index is None:
            return model(images)
        plain, mirrored = model(torch.cat([images, images.flip(3)])).chunk(2)
    return (plain + mirrored.flip(3)[:, flip_index]) / 2


def predict_crops(model: LandmarkNet, crops: Tensor, matrices, config: Config, flip_index=None, amp=None):
    """uint8 crops (B, S, S, 3), matrices (B, 2, 3) -> heatmaps, picture points (B, K, 2), scores (B, K)."""
    heatmaps = predict_heatmaps(model, crops.to(model.mean.device), flip_index, amp)
    points, scores = (found.cpu().double().numpy() for found in data.decode_heatmaps(
        heatmaps, config.decode_power, config.score_radius))
    return heatmaps, apply_matrix(invert_matrix(matrices), points), scores


def predict(model: LandmarkNet, dataset: DogFLWDataset, config: Config,
            processes: runtime.Processes, amp=None, batch_size=16, flip=True, sigma=None):
    """Predict every face: points (N, K, 2) in picture pixels, scores (N, K), mean loss (NaN without `sigma`).

    Arrays are float64 numpy; sigma is in cells. `processes`, say runtime.Processes("cpu"), split the faces;
    each gets the full, exact result.
    """
    model.train().eval()  # train() clears the biases that TinyViT's attention caches in eval mode
    device, scheme, n = processes.device, dataset.faces.scheme, len(dataset)
    flip_index = torch.tensor(scheme.flip_index, device=device) if flip and scheme.flip_pairs else None
    table = np.zeros((n, len(scheme.names), 4))  # x, y, score, loss; 0 for other processes' faces
    mine = range(processes.rank, n, processes.world)
    batches = [mine[start:start + batch_size] for start in range(0, len(mine), batch_size)]
    for rows, batch in zip(batches, one_ahead(dataset.batch, batches, "predicting")):
        heatmaps, table[rows, :, :2], table[rows, :, 2] = predict_crops(
            model, batch["image"], batch["matrix"].numpy(), config, flip_index, amp)
        if sigma:
            targets = (batch[name].to(device) for name in ("keypoints", "visibility"))
            table[rows, :, 3] = heatmap_losses(heatmaps, *targets, sigma, config).cpu()
    # Every entry is nonzero in at most one process, so the sum is exact.
    table = processes.sum(torch.from_numpy(table)).cpu().numpy()
    return table[..., :2], table[..., 2], float(table[..., 3].mean()) if sigma else math.nan


class Trained(TrainedModel):
    """A checkpoint for inference: Trained(path, device).look([(image, box), ...]) -> points, scores.

    Its methods are in tools/lib/checkpoints.py.
    """
    Config, Scheme, build_model = Config, Scheme, staticmethod(build_model)
    crop, predict_crops = staticmethod(data.cut_crop), staticmethod(predict_crops)


def load_predictor(checkpoint=None, locator=None, device="auto", batch_size=32):
    """A Predictor (tools/lib/find.py); by default, the bundled model with a matching locator."""
    return predictor_of(Trained, checkpoint, locator, device, batch_size)


# ---------------------------------------------------------------- the loop

class Plan:
    """Schedules of crop size, sigma and learning rate. Raises UserError if a batch cannot be split evenly."""

    def __init__(self, config: Config, faces: int, world: int = 1):
        self.config, self.faces, self.batch_size = config, faces, faces_a_step(config, faces, world)
        self.steps = faces // self.batch_size  # optimizer steps per epoch
        self.total = config.epochs * self.steps
        self.sizes = sorted({self.size(0), config.input_size})  # all crop sizes of the run, in pixels

    def validates(self, epoch: int) -> bool:
        """Whether an epoch, counted from 0, ends with a validation; the last one always does."""
        return (epoch + 1) % self.config.val_every == 0 or epoch + 1 == self.config.epochs

    def size(self, epoch: int) -> int:
        """Crop side in pixels; small at first (Tan & Le 2021, "EfficientNetV2": progressive learning)."""
        full = self.config.input_size
        small = min(full, max(128, full // 64 * 32))
        return small if epoch < int(self.config.progressive * self.config.epochs) else full

    def sigma(self, step: int, size: int) -> float:
        """The targets' standard deviation in cells: wide at first, to learn positions fast, then narrower."""
        narrowing = self.config.sigma_ratio ** (1 - step / self.total)
        return self.config.sigma * size / self.config.input_size * narrowing

    def lr(self, step: int) -> float:
        """Learning rate: linear warm-up, then cosine decay to 0 (Loshchilov & Hutter 2017, "SGDR", eq. 5)."""
        warmup = self.config.warmup_epochs * self.steps
        if step < warmup:
            return self.config.lr * min(1.0, (step + 1) / warmup)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total - warmup)))


def build_optimizer(model: nn.Module, config: Config):
    """AdamW (Loshchilov & Hutter 2019): no weight decay for vectors; a separate rate for the backbone."""
    groups = {}
    for name, p in model.named_parameters():
        scale = config.backbone_lr_mult if name.startswith("backbone.") else 1.0
        groups.setdefault((scale, p.ndim > 1), []).append(p)
    groups = [{"params": members, "scale": scale, "weight_decay": config.weight_decay * matrices}
              for (scale, matrices), members in sorted(groups.items(), reverse=True)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2),
                             fused=next(model.parameters()).device.type in ("cuda", "cpu"))


class Run:
    """The state of training (model, its average, optimizer, progress): new, or restored from last.pth."""

    def __init__(self, config: Config, scheme: Scheme, plan: Plan, processes, resumed=None):
        self.config, self.scheme, self.plan, self.processes = config, scheme, plan, processes
        device, self.amp = processes.device, runtime.choose_amp(processes.device, config.amp)
        start = replace(config, pretrained=False, weights=None) if resumed else config
        self.model = build_model(start, scheme, processes.say).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.ema else self.model
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        # In a checkpoint "model" is the averaged model, for inference; "raw" is the one that trains on.
        self.stateful = dict(model=self.ema, raw=self.model, optimizer=self.optimizer, scaler=self.scaler)
        self.progress = {"epoch": 0, "best": math.inf, "rows": []}
        if resumed:
            self.progress = {name: resumed[name] for name in self.progress}
            restore(self.stateful, resumed)
        self.average = runtime.WeightAverage(self.model, self.ema, config.ema) if config.ema else None
        self.wrapped = runtime.for_training(self.model, config, plan, processes, self.amp)


def train_step(run: Run, batches, step: int):
    """One optimizer step. Returns its mean loss, a tensor, and face indices; never waits for the device."""
    config, device, total, indices = run.config, run.processes.device, 0, []
    for left in reversed(range(config.accumulate)):  # how many micro-batches follow
        batch = next(batches)
        indices += batch["index"].tolist()
        crops, points, visibility, colour = (batch[k].to(device, non_blocking=device.type == "cuda")
                                             for k in ("image", "keypoints", "visibility", "colour"))
        images = data.normalize(crops, run.model.mean, run.model.std, colour)
        with run.processes.without_sync(run.wrapped, left):
            with runtime.autocast(device, run.amp):
                heatmaps = run.wrapped(images)
            sigma = run.plan.sigma(step, crops.shape[1])
            # Mean over all maps, labelled or not: micro-batches and GPUs give the whole batch's gradient.
            loss = heatmap_losses(heatmaps, points, visibility, sigma, config).mean() / config.accumulate
            run.scaler.scale(loss).backward()
        total += loss.detach()
    for group in run.optimizer.param_groups:
        group["lr"] = run.plan.lr(step) * group.get("scale", 1)  # no scale in an older last.pth
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.average:
        run.average.update(step)
    return total, indices


def train_one_epoch(run: Run, batches, files: list) -> float:
    """Train for one epoch; returns the mean loss. Raises UserError naming the faces if it is not finite."""
    run.wrapped.train()
    steps, epoch, total = run.plan.steps, run.progress["epoch"], 0
    title = f"epoch {epoch + 1}/{run.config.epochs}"
    watch = runtime.FiniteWatch(run.processes.device, files, title, run.config.work_dir / "last.pth")
    with Progress(steps, title, quiet=not run.processes.first) as bar:
        for step in range(steps):
            loss, indices = train_step(run, batches, epoch * steps + step)
            total += loss
            watch.add(loss, indices)
            if step % 50 == 49 or step == steps - 1:  # rarely, as reading the loss waits for the device
                watch.check(run.scaler, run.model if step == steps - 1 else None)
                bar.show(loss=float(total) / (step + 1))
            bar.update(step + 1)
    run.progress["epoch"] += 1
    run.processes.average_buffers(run.ema, run.model)
    return float(run.processes.sum(total)) / run.processes.world / steps


def validate(run: Run, dataset: DogFLWDataset):
    """Validate the averaged weights: points (N, K, 2) in picture pixels, mean loss, {metric: mean}."""
    sigma = run.plan.sigma(run.progress["epoch"] * run.plan.steps, dataset.size)
    points, _, loss = predict(run.ema, dataset, run.config, run.processes, run.amp,
                              run.processes.predict_batch, sigma=sigma)
    return points, loss, mean_metrics(points, dataset.faces, run.config.padding)


# ---------------------------------------------------------------- a run, top to bottom

def load_sets(config: Config, processes: runtime.Processes):
    """Faces to train on, select on and test on (or None); the selection set's name. Raises UserError."""
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
            raise UserError(f"--ann-root {config.ann_root}: gives no val.json to choose on; name a folder "
                            "that has one, or take --holdout 0.1")
        return train, val, None, paths[1].relative_to(config.ann_root).as_posix()
    rest, held = train.split(config.holdout)
    if not held or not rest:
        raise UserError(f"--holdout {config.holdout}: leaves one part without a face; try another fraction, "
                        "or add pictures (the faces of one picture stay together)")
    return rest, held, val, "faces held out of train"


def test_once(run: Run, datasets: dict, chosen_on: str):
    """Report the selected epoch. If there is a test set, score it once and write test.json."""
    path, say = run.config.work_dir / "best_model.pth", run.processes.say
    chosen = run.processes.from_first(lambda: load_checkpoint(path))
    say(f"best: epoch {chosen['epoch']}, {as_text(chosen['metrics'], METRICS)} on the faces that chose it")
    if datasets:
        run.ema.load_state_dict(chosen["model"])
        dataset = datasets[chosen["size"]]
        *_, metrics = validate(run, dataset)
        say(f"on {len(dataset)} faces that did not choose it: {as_text(metrics, METRICS)}")
        if run.processes.first:
            result = as_json({"faces": len(dataset), "chosen_on": chosen_on, **metrics})
            atomic_write(path.with_name("test.json"), [result])


def train(config: Config, processes: runtime.Processes):
    """A whole run: load the data, train, validate, save checkpoints, test once."""
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
        torch.manual_seed(config.seed + config.epochs * processes.rank + epoch)  # same dropout at --resume
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
    next(batches, None)  # exhausts the loader, which ends its workers
    log.close()
    test_once(run, test_sets, chosen_on)


def main(argv=None):
    """Train in a folder locked against other runs; report known causes of an early end in one line."""
    config = parse_args(argv)
    with (run_directory(config.work_dir, config.resume), runtime.explained_ends(config.work_dir / "last.pth"),
          runtime.Processes(config.device) as processes):
        train(config, processes)


if __name__ == "__main__":
    run_script(main)
