"""Checkpoints: written whole, read without running code, old formats upgraded, models ready to use."""

import argparse
import hashlib
import io
import math
import time
from dataclasses import asdict, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import torch

from tools.lib.cli import UserError, as_plain, changed_settings, from_stored, problems_of, single_line
from tools.lib.coco import checked_scheme, shared_pictures
from tools.lib.files import LFS, atomic_write, check_fetched, load_json
from tools.lib.pictures import MEAN, STD
from tools.lib.runtime import choose_amp, is_out_of_memory, versions

FORMAT = 2  # 1 had no lateral for the stem, and ImageNet's normalisation for every backbone
PATHS = "data_root", "ann_root", "background", "cache", "weights", "work_dir"  # settings that are paths


class Unread:
    """Stands in for other programs' objects in a file: numpy's class would take their bytes for pointers."""

    def __init__(self, *_):
        """Accept and ignore whatever the file gives."""

    __setstate__ = __init__

    def __repr__(self):
        return "another program's value, not read"


# What other programs store beside tensors: their settings, numbers of numpy (under its old name, too), and
# what MMPose logs.
PLAIN = [argparse.Namespace, *((Unread, name) for name in (
    "mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", "numpy.ndarray", "numpy.dtype",
    *(f"numpy.{core}.multiarray.{made}" for core in ("core", "_core")
      for made in ("_reconstruct", "scalar"))))]
SEEN = ", which it was trained on"  # added to the selection set's name if it shares pictures with train


def save_checkpoint(path: Path, checkpoint: dict):
    """Write plain types and tensors, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    atomic_write(path, [buffer.getbuffer()])


def lightened(checkpoint: dict) -> dict:
    """A checkpoint to hand on: 16-bit weights, no folders of the machine that made it. Loads like any other.

    Vectors (biases, batch norm) stay in 32 bits: they are few, and the statistics need the range.
    """
    light, args = dict(checkpoint["model"]), dict(checkpoint["args"])
    light |= {k: v.half() for k, v in light.items() if v.ndim > 1 and v.is_floating_point()}
    args |= {k: PureWindowsPath(v).name for k, v in args.items() if k in PATHS and isinstance(v, str)}
    names = ("format", "epoch", "scheme", "size", "metrics", "versions", "room")
    kept = {k: checkpoint[k] for k in names if k in checkpoint}
    return kept | {"model": light, "args": args}


class Saver:
    """Writes the checkpoints of a run: best_model.pth, epoch_N.pth every so often, last.pth."""

    def __init__(self, run, metrics: list, *faces):
        self.config, self.metrics, self.next = run.config, metrics, 0.0
        self.versions = versions(run.processes.device, run.amp)
        self.labels, self.seen = digest_of(faces), SEEN if shared_pictures(*faces) else ""
        self.room = faces[0].room
        values = [row.get(metrics[0], math.nan) for row in run.progress["rows"]]
        if min((v for v in values if math.isfinite(v)), default=math.inf) != run.progress["best"] < math.inf:
            raise UserError(f"--resume: another metric than {metrics[0]}, now the first of METRICS, has "
                            "chosen best_model.pth; put that one first again, or name another --work-dir")

    def contents(self, run, metrics: dict, whole: bool = False) -> dict:
        """What inference needs of a run, and what made it; with `whole`, all that resuming needs, too."""
        epoch = run.progress["epoch"]
        needed = {"format": FORMAT, "epoch": epoch, "size": run.plan.size(epoch - 1),
                  "model": run.ema.state_dict(), "scheme": asdict(run.scheme), "args": as_plain(self.config),
                  "metrics": metrics, "versions": self.versions, "faces": run.plan.faces,
                  "labels": self.labels, "room": self.room}
        if whole:
            needed |= {name: part.state_dict() for name, part in run.stateful.items()} | run.progress
        return needed

    def save(self, run, row: dict, chosen_on: str) -> bool:
        """Write what the epoch of `row` calls for. True if it is the best so far, by the first metric.

        last.pth comes last, so that after a kill the next try writes what is missing. Writing it may take at
        most a twentieth of the time: on a fast GPU an epoch takes little longer than that.
        """
        folder, epoch, progress = self.config.work_dir, row["epoch"], run.progress
        if not (folder / ".lock").exists():  # without this, the next write would make an empty folder anew
            raise UserError(f"--work-dir {folder}: was moved or deleted, and the checkpoints with it")
        value, ends = row[self.metrics[0]], epoch == self.config.epochs
        metrics = {name: row[name] for name in ("train_loss", "val_loss", *self.metrics)}
        metrics["chosen_on"] = chosen_on + self.seen
        best = value < progress["best"] or ends and progress["best"] == math.inf
        if best:
            progress["best"] = value
            save_checkpoint(folder / "best_model.pth", self.contents(run, metrics))
        if epoch % self.config.save_every == 0:
            save_checkpoint(folder / f"epoch_{epoch}.pth", self.contents(run, metrics))
        if ends or time.perf_counter() >= self.next:
            begin = time.perf_counter()
            save_checkpoint(folder / "last.pth", self.contents(run, metrics, whole=True))
            now = time.perf_counter()
            self.next = now + 19 * (now - begin)
        return best


def load_file_safely(path: Path | str):
    """Tensors and plain types of a .pth or .safetensors file. Runs no code from it. Raises UserError."""
    from safetensors.torch import load_file  # timm brings it

    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; mend its permissions") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a checkpoint in it") from None
    except Exception as e:  # reading damaged or hostile bytes can raise almost anything
        with open(path, "rb") as file:
            begin = file.read(len(LFS))
        check_fetched(path, begin)
        # A zip or a pickle, not a web page, a photo, an ONNX file.
        hostile = "weights_only" in str(e).lower() and begin.startswith((b"PK", b"\x80"))
        reason = "it holds more than tensors and plain values" if hostile else "damaged, or no checkpoint"
        raise UserError(f"{path}: not loaded: {reason}. Nothing in it was run; take another "
                        "checkpoint, or one of its state_dict alone") from None


def tested_once(checkpoint: Path) -> dict:
    """The test.json beside a best_model.pth: errors on faces that did not choose its epoch; else {}."""
    path = checkpoint.with_name("test.json")
    return load_json(path) if checkpoint.name == "best_model.pth" and path.is_file() else {}


def load_checkpoint(path: Path | str) -> dict:
    """A checkpoint of this project: model, scheme, args, metrics, epoch, size. UserError for other files."""
    kinds = {"model": dict, "scheme": dict, "args": dict, "metrics": dict, "epoch": int, "size": int}
    checkpoint = load_file_safely(path)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("args"), dict):
        checkpoint = {"size": checkpoint["args"].get("input_size"), **checkpoint}
        if checkpoint.get("format") not in (None, 1, FORMAT):
            raise UserError(f"{path}: is of a newer version of this trainer; update your copy")
    if (not isinstance(checkpoint, dict) or checkpoint.get("format") not in (1, FORMAT)
            or not all(isinstance(checkpoint.get(k), kind) for k, kind in kinds.items())):
        raise UserError(f"{path}: not a checkpoint of this trainer; give best_model.pth or epoch_N.pth of a "
                        "run")
    return checkpoint


def digest_of(sets: tuple) -> str:
    """A digest of the labels of several Faces, without those that have none (--background)."""
    digest = hashlib.sha256()
    for faces in sets:
        rows = np.flatnonzero(faces.visible.any(1))
        # The names without folders: --data-root may have changed.
        digest.update(repr([Path(faces.files[i]).name for i in rows]).encode(errors="backslashreplace"))
        for values in (faces.points, faces.visible, faces.boxes):
            digest.update(values[rows].round(1).astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def load_resumable(path: Path, config, faces, chooser) -> dict | None:
    """last.pth for --resume, or None for a new run. UserError if the run had other settings or other data.

    faces, chooser: the Faces to train on and to select a model on, which must be the run's. A run's results
    are never lost: best_model.pth without last.pth is refused, unless this run will make the same one again.
    """
    best = path.with_name("best_model.pth")
    from_best = (f"start from it with --weights {best} and another --work-dir" if best.exists() else
                 "begin anew with another --work-dir")
    if not config.resume:
        return None
    if not path.exists():
        first = [p for p in (best, path.with_name("epoch_1.pth")) if p.exists()]  # before the first last.pth
        left = load_checkpoint(first[0]) if first else None
        if left and (left["epoch"] > 1 or changed_settings(config, left["args"])):
            raise UserError(f"--resume {path}: is missing, although {first[0].name} is there; {from_best}")
        others = [path.with_name(f"{name}.json") for name in ("train", "val", "test")]
        others += {*path.parent.glob("epoch_*.pth")} - {*first}
        if there := [file.name for file in others if file.exists()]:
            raise UserError(f"--resume {path}: is missing, although {there[0]} is there; name another "
                            "--work-dir")
        print(f"--resume: no {path}, so this is a new run", flush=True)
        return None
    try:
        resumed = load_checkpoint(path)
    except UserError as e:
        beside = "of best_model.pth beside it: " if best.exists() else ""
        raise UserError(f"--resume {e}; {beside}{from_best}") from None
    if "raw" not in resumed or resumed["format"] != FORMAT:
        raise UserError(f"--resume {path}: is no last.pth of this version; start from it with --weights")
    ours = asdict(faces.scheme) | {"skeleton": resumed["scheme"]["skeleton"]}  # nothing trains on it
    if changed := [name for name in ours if resumed["scheme"][name] != ours[name]]:
        raise UserError(f"--resume {path}: the category's {', '.join(changed)} in {config.ann_root} are not "
                        "that run's; name another --work-dir")
    changed = changed_settings(config, resumed["args"])
    if changed and resumed["epoch"] == resumed["args"]["epochs"]:
        raise UserError(f"--resume {path}: {changed[0]}, and that run is finished; to train on, {from_best}")
    if changed:
        raise UserError(f"--resume {path}: {changed[0]}; repeat the first command, or name another "
                        "--work-dir")
    if resumed.get("faces", len(faces)) != len(faces):
        raise UserError(f"--resume {path}: that run had {resumed['faces']} faces, --ann-root and "
                        f"--background now give {len(faces)}; name another --work-dir")
    if resumed.get("labels") not in (None, digest_of((faces, chooser))):
        raise UserError(f"--resume {path}: the labels in --ann-root have changed since best_model.pth; "
                        f"{from_best}")
    if resumed["best"] < math.inf and not best.exists():
        raise UserError(f"--resume {path}: best_model.pth is missing beside it; put it back, or start from "
                        f"last.pth with --weights {path} and another --work-dir")
    for group in resumed["optimizer"]["param_groups"]:
        group["fused"] = group.get("fused") or not torch.backends.mps.is_available()  # of a Mac's run
    return resumed


def in_short(error: Exception) -> str:
    """PyTorch's list of what does not fit, as far as a line holds it."""
    return single_line(" ".join(str(error).split()), 160)


def restore(parts: dict, resumed: dict):
    """Give a run's model, optimizer, ... their states from last.pth. UserError if they do not fit."""
    try:
        for name in filter(resumed.get, parts):  # without float16 the scaler's state is empty
            parts[name].load_state_dict(resumed[name])
        optimizer = parts["optimizer"]
        for group in optimizer.param_groups:
            if lacks := optimizer.defaults.keys() - group.keys():
                raise ValueError(f"last.pth's optimizer has no {', '.join(sorted(lacks))}")
    except (RuntimeError, ValueError, LookupError) as e:
        if is_out_of_memory(e):
            raise
        raise UserError(f"--resume: last.pth does not fit this code's model or optimizer ({in_short(e)}); go "
                        "on with the code that wrote it, or begin from it with --weights") from None


def upgraded(state: dict) -> dict:
    """Weights of either format as today's: the stem, which had no lateral, gets one that changes nothing."""
    if "mean" in state:
        return state
    width = state["laterals.0.0.weight"].shape[0]
    ones, zeros = torch.ones(width), torch.zeros(width)
    lateral = {"0.weight": torch.eye(width)[..., None, None], "1.weight": ones, "1.running_var": ones - 1e-5,
               "1.bias": zeros, "1.running_mean": zeros, "1.num_batches_tracked": torch.tensor(0)}
    moved = {}
    for name, tensor in state.items():
        part, _, rest = name.partition("laterals.")
        moved[f"laterals.{int(rest[0]) + 1}{rest[1:]}" if rest[:1].isdigit() else name] = tensor
    moved |= {f"laterals.0.{k}": v for k, v in lateral.items()}
    return moved | {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}


def stored_scheme(stored: dict, where: Path | str) -> dict:
    """The scheme of a checkpoint as a Scheme's arguments, checked as a COCO category is. Raises UserError."""
    skeleton = [[i + 1, j + 1] for i, j in stored["skeleton"]]  # COCO counts from 1
    return checked_scheme({**stored, "keypoints": stored["names"], "skeleton": skeleton}, where)


# ---------------------------------------------------------------- ready to use

class TrainedModel:
    """What a checkpoint holds: model (in eval mode), scheme, config, size of its crops in pixels, metrics,
    epoch; `whole` where it looks at whole pictures (`--crop image`).

    Files hold only plain types; a subclass provides the rest: the classes Config and Scheme, and
    build_model(config, scheme), crop(image, box, size, padding, rotation) and predict_crops(model, crops,
    matrices, config, flip_index, amp). Raises UserError for a file whose parts do not fit together.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu", batch_size: int = 32):
        checkpoint = load_checkpoint(path)
        self.device, self.batch_size = torch.device(device), batch_size
        self.size, self.epoch, self.metrics = (checkpoint[name] for name in ("size", "epoch", "metrics"))
        try:
            self.scheme = self.Scheme(**stored_scheme(checkpoint["scheme"], path))
            self.config = from_stored(self.Config, checkpoint["args"])
            self.room = [float(v) for v in checkpoint.get("room", [])]  # older: like DogFLW's
            if len(self.room) not in (0, 2, 4) or not np.isfinite(self.room).all():
                raise ValueError("room")
            if problems := problems_of(replace(self.config, input_size=self.size)):
                raise ValueError(problems[0])
            untrained = replace(self.config, pretrained=False, weights=None)
            with torch.random.fork_rng(devices=[]):  # drawing weights, replaced at once, costs no seed
                try:
                    self.model = self.build_model(untrained, self.scheme)
                except UserError:
                    raise UserError(f"{path}: this timm cannot make its backbone {self.config.backbone}; "
                                    "update timm") from None
            self.model.load_state_dict(upgraded(checkpoint["model"]))
        except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as e:
            raise UserError(f"{path}: weights, scheme and settings do not fit together ({in_short(e)}); a "
                            "checkpoint of edited code needs that code") from None
        self.model.eval().to(device, torch.float32, memory_format=torch.channels_last)
        self.amp, self.whole = choose_amp(self.device, self.config.amp), self.config.crop == "image"

    def flip_index(self, wanted: bool = True) -> torch.Tensor | None:
        """The partners' permutation as a tensor for mirrored averaging, or None."""
        mirrors = wanted and self.scheme.flip_pairs
        return torch.tensor(self.scheme.flip_index, device=self.device) if mirrors else None

    def look(self, jobs: list[tuple], flip: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """[(image, box), ...] -> points (N, K, 2) in the picture's pixels, scores (N, K).

        A third value in a job turns its crop by so many degrees.
        """
        found, flip_index = [], self.flip_index(flip)
        for start in range(0, len(jobs), self.batch_size):
            cut = [self.crop(image, box, self.size, self.config.padding, *turn)
                   for image, box, *turn in jobs[start:start + self.batch_size]]
            crops, matrices = map(np.stack, zip(*cut))
            _, points, scores = self.predict_crops(self.model, torch.from_numpy(crops), matrices, self.config,
                                                   flip_index, self.amp)
            found.append((points, scores))
        return tuple(map(np.concatenate, zip(*found)))
