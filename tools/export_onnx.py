"""Export a model to one ONNX file, or to safetensors with a model card.

    uv run tools/export_onnx.py --out dog_face.onnx                       # the bundled model
    uv run tools/export_onnx.py --checkpoint work_dirs/hrnet_w32/best_model.pth --safetensors hub/
    uv run tools/export_onnx.py --checkpoint best_model.pth --out dog.onnx --no-flip
    uv run tools/export_onnx.py --checkpoint best_model.pth --light small.pth

The ONNX file holds everything from pixels to landmarks, with the checkpoint's normalisation and decoding. Its
input is uint8 RGB crops `image` (N, S, S, 3), N >= 1; its outputs are `landmarks` (N, K, 2) in crop pixels
and `scores` (N, K). Its metadata hold names, flip_pairs, input_size, padding, what is known of the licence,
and more. The crop is a square of `padding` times the face box's longer side. The file is written only if it
gives PyTorch's landmarks for a photo in onnxruntime; the time per face is printed. With pip it needs:
pip install onnx onnxruntime.

--safetensors also writes a folder like a Hugging Face repository: model.safetensors, config.json, README.md.
--light writes only a copy of the checkpoint to hand on: 16-bit weights, no paths of this machine.
"""
import argparse
import io
import json
import math
import statistics
import timeit
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from skimage.data import astronaut
from torch import nn

from dataset import cut_crop, decode_heatmaps, normalize
from tools.lib.checkpoints import SEEN, lightened, load_checkpoint, save_checkpoint, tested_once
from tools.lib.cli import (
    Parser,
    UserError,
    add_checkpoint,
    printable,
    run_script,
    single_line,
    take_checkpoint,
)
from tools.lib.files import atomic_write, check_free, check_new
from tools.lib.find import checkpoint_file
from train_simple import METRICS, Trained, predict_heatmaps

TOLERANCE = 0.05  # crop pixels
OPSET = 17
RUNS = 20


class Exported(nn.Module):
    """uint8 crops -> landmarks, scores, by the trainer's own functions; `flip_index` None: one pass."""

    def __init__(self, trained: Trained, flip_index: torch.Tensor | None):
        super().__init__()
        self.model, config = trained.model, trained.config
        self.decoding = config.decode_power, config.score_radius
        self.register_buffer("flip_index", flip_index)
        self.register_buffer("colour", torch.eye(3, 4)[None])

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = image.float()  # the first node: TensorRT accepts uint8 only as the input of a cast
        # Leaves colours unchanged. Made here, because a trace would fix the batch size of the default.
        colour = self.colour.expand(image.shape[0], 3, 4)
        image = normalize(image, self.model.mean, self.model.std, colour)
        heatmaps = self.model(image)
        if self.flip_index is not None:
            heatmaps = (heatmaps + self.model(image.flip(3)).flip(3)[:, self.flip_index]) / 2
        return decode_heatmaps(heatmaps, *self.decoding)


def photographs(size: int, n: int) -> np.ndarray:
    """Cut-outs of the portrait that scikit-image ships, to compare on: (N, S, S, 3) uint8."""
    return np.stack([cut_crop(astronaut(), (20 * i, 10 * i, 300, 300), size, 1.0)[0] for i in range(n)])


def latency(function: Callable) -> float:
    """Median milliseconds of a call, the first left out."""
    return statistics.median(timeit.repeat(function, number=1, repeat=RUNS + 1)[1:]) * 1e3


def licence(trained: Trained) -> tuple[str, str, str]:
    """(the training data's name, the hub's identifier of their licence, what it means for the weights)."""
    scheme, config = trained.scheme, trained.config
    if config.sample and not config.weights and not config.pretrained:
        return "drawn sample", "mit", (
            "The weights were trained on the trainer's own drawn sample, no photograph among it. They are "
            "MIT, as the code is, and not meant for real dogs.")
    if len(scheme.names) == 46 and scheme.interocular == [18, 19]:
        return "faces with DogFLW's landmarks", "cc-by-nc-4.0", (
            "**Non-commercial.** The landmarks are those of DogFLW, which is CC-BY-NC-4.0: its authors allow "
            "non-commercial use only, of weights trained on it too. If neither DogFLW nor what a model "
            "trained on it predicted was among the training data, state here what applies instead.")
    return "own data", "unknown", (
        "The licence of the training data applies to the weights, and so does that of the weights they "
        "began with: those bundled with the trainer are CC-BY-NC-4.0. State here what applies before you "
        "publish them.")


def metadata(trained: Trained, flip: bool) -> dict[str, str]:
    """What the ONNX file says of itself: {key: text}."""
    scheme, config = trained.scheme, trained.config
    values = {"names": scheme.names, "flip_pairs": scheme.flip_pairs, "regions": scheme.regions,
              "skeleton": scheme.skeleton, "input_size": trained.size, "padding": config.padding,
              "license": licence(trained)[2], "flip_test": flip, "crop": config.crop,
              "score_radius": config.score_radius}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def trace(trained: Trained, flip_index: torch.Tensor | None) -> bytes:
    """The ONNX file's bytes. Raises UserError if onnx is missing, or ONNX cannot hold the model."""
    try:
        import onnx
    except ImportError:
        raise UserError("onnx is missing: pip install onnx onnxruntime") from None
    file, names = io.BytesIO(), ("image", "landmarks", "scores")
    example = (torch.from_numpy(photographs(trained.size, 2)),)
    # The tracing exporter needs no further package. It warns about values that become constants here.
    # On a failure PyTorch would log the whole graph, thousands of lines, whatever `verbose` says.
    with warnings.catch_warnings(), mock.patch.object(torch._C, "_jit_onnx_log", mock.Mock(), create=True):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(Exported(trained, flip_index).eval(), example, file, opset_version=OPSET,
                              input_names=list(names[:1]), output_names=list(names[1:]),
                              dynamic_axes={n: {0: "N"} for n in names}, dynamo=False)
        except torch.onnx.errors.OnnxExporterError as e:
            raise UserError(f"ONNX cannot hold {trained.config.backbone} ({single_line(e)}); take the "
                            "weights by --safetensors") from None
    content = onnx.load_from_string(file.getvalue())
    for key, value in metadata(trained, flip_index is not None).items():
        content.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(content)
    return content.SerializeToString()


def export_onnx(trained: Trained, flip: bool, path: Path) -> None:
    """Write the file if it agrees with PyTorch on a photo. If not, raises UserError and writes nothing."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is missing: pip install onnx onnxruntime") from None
    config, size, flip_index = trained.config, trained.size, trained.flip_index(flip)
    content = trace(trained, flip_index)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    crops = photographs(size, 5)  # not the batch size of the trace

    def by_torch(crops: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        heatmaps = predict_heatmaps(trained.model, torch.from_numpy(crops), flip_index)
        return decode_heatmaps(heatmaps, config.decode_power, config.score_radius)

    points, scores = session.run(None, {"image": crops})
    expected, expected_scores = (t.numpy() for t in by_torch(crops))
    error, score_error = np.abs(points - expected).max(), np.abs(scores - expected_scores).max()
    if not (error < TOLERANCE and score_error < 0.01):
        raise UserError(f"{path}: not written: onnxruntime is {error:.3f} pixels from PyTorch, "
                        f"{score_error:.3f} in score; update onnxruntime, or try --no-flip")
    atomic_write(path, [content])
    one, how = crops[:1], "one pass" if flip_index is None else "averaged with the mirrored one"
    ours, theirs = latency(lambda: session.run(None, {"image": one})), latency(lambda: by_torch(one))
    print(f"{path}: {len(content) / 1e6:.1f} MB, {len(trained.scheme.names)} landmarks, {size} x {size}; on "
          f"a photo at most {error:.1e} pixels from PyTorch\n"
          f"a face on the CPU, {how}, median of {RUNS}: onnxruntime {ours:.1f} ms, PyTorch {theirs:.1f} ms")


CARD = """---
license: {licence}
library_name: pytorch
pipeline_tag: keypoint-detection
tags: [animal, face, landmarks, keypoint-detection, timm]
{index}---
# Facial landmarks, {backbone}

{k} landmarks of a face from a {size} x {size} RGB crop: a square of {padding} times the longer side of the
{box}. {backbone} (timm) with heatmaps at half the resolution; the weights of epoch {epoch}.

{metrics}

## Licence

{terms} The code that made them is MIT.

## Use

`model.safetensors` holds the tensors, `config.json` the landmarks' names, partners, the crop and decoding.
{sides}In the repository of the trainer, start from these weights with

    python train_simple.py --backbone {backbone} --input-size {size} --padding {padding} \\
        --crop {crop} --weights model.safetensors

or load them as they are, for RGB crops (B, 3, {size}, {size}) scaled to 0..1, minus config.json's mean,
divided by its std:

    from safetensors.torch import load_file
    from dataset import decode_heatmaps
    from train_simple import LandmarkNet
    model = LandmarkNet("{backbone}", {k})
    model.load_state_dict(load_file("model.safetensors"))
    points, scores = decode_heatmaps(model.eval()(crops), {power}, {radius})    # points in crop pixels
"""

SIDES = """`left_` in a name means the left of the picture: the right side of a dog that looks at you.
"""


def write_safetensors(trained: Trained, folder: Path, tested: dict) -> None:
    """model.safetensors + config.json + README.md, the form of a Hugging Face repository.

    tested: the run's test.json, or {}; if there is one, its errors are the hub's results.
    """
    from safetensors.torch import save  # timm brings it
    model, scheme, settings = trained.model, trained.scheme, trained.config
    metrics = {k: v for k, v in trained.metrics.items() if isinstance(v, float) and math.isfinite(v)}
    chosen = printable(trained.metrics.get("chosen_on", "an unnamed split"))
    data_name, identifier, terms = licence(trained)
    config = {"architectures": ["LandmarkNet"], "backbone": settings.backbone,
              "num_landmarks": len(scheme.names), "input_size": trained.size, "padding": settings.padding,
              "crop": settings.crop, "decode_power": settings.decode_power,
              "score_radius": settings.score_radius, **asdict(scheme), "mean": model.mean.tolist(),
              "std": model.std.tolist(), "license": terms}
    # Errors on faces it trained on are no results. The hub reads them out of this block; JSON is YAML.
    results = tested or ({} if chosen.endswith(SEEN) else metrics)
    errors = [{"type": k, "name": k, "value": round(results[k], 5)} for k in METRICS if results.get(k)]
    index = [{"name": f"face-landmarks-{settings.backbone}", "results": [{
        "task": {"type": "keypoint-detection"}, "dataset": {"name": data_name, "type": data_name},
        "metrics": errors}]}] if errors else []
    tables = {f"on the faces that chose this epoch ({chosen})": metrics}
    if tested:
        tables = {f"on {tested['faces']} faces that did not choose this epoch": tested} | tables
    listed = [f"| {title} | |\n|---|---|\n" + "\n".join(
        f"| {k} | {v:.4f} |" for k, v in values.items() if isinstance(v, float) and k != "train_loss")
        for title, values in tables.items()]
    card = CARD.format(
        backbone=settings.backbone, k=len(scheme.names), size=trained.size, padding=settings.padding,
        crop=settings.crop, power=settings.decode_power, radius=settings.score_radius,
        box="whole picture" if trained.whole else "face's box",
        sides="" if identifier == "unknown" else SIDES,
        epoch=trained.epoch, index=f"model-index: {json.dumps(index)}\n" if index else "",
        licence=identifier, terms=terms, metrics="\n\n".join(listed))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}  # the model is on the CPU
    for name, content in (("model.safetensors", save(state, {"format": "pt"})), ("README.md", card.encode()),
                          ("config.json", json.dumps(config, indent=1).encode())):
        atomic_write(folder / name, [content])
    print(f"{folder}: model.safetensors, config.json, README.md")


def write_light(checkpoint: Path, path: Path, force: bool) -> None:
    """A checkpoint of 16-bit weights that loads like any other."""
    check_new("--light", force, path)
    save_checkpoint(path, lightened(load_checkpoint(checkpoint)))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--out", type=Path, metavar="FILE",
        help="the ONNX file (default: the checkpoint's name with .onnx; for the bundled model dog_face.onnx)")
    add("--safetensors", type=Path, metavar="DIR", help="also write safetensors and a model card here")
    add("--light", type=Path, metavar="FILE", help="write only a checkpoint of half the size, here")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="average with the mirrored crop: takes twice the time, a little more accurate (default: on)")
    add("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args(argv)
    take_checkpoint(args)
    checkpoint = checkpoint_file(args.checkpoint)
    if args.light and (args.out or args.safetensors or not args.flip):
        raise UserError("--light: writes a checkpoint alone; leave out --out, --safetensors and --no-flip")
    if args.light:
        return write_light(checkpoint, args.light, args.force)
    path = args.out or (checkpoint.with_suffix(".onnx") if args.checkpoint else Path("dog_face.onnx"))
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file")
    check_new("--out", args.force, path)
    if args.safetensors:
        check_free("--safetensors", args.safetensors, args.force)
    trained = Trained(checkpoint)
    trained.model.requires_grad_(False)
    export_onnx(trained, args.flip, path)
    if args.safetensors:
        write_safetensors(trained, args.safetensors, tested_once(checkpoint))


if __name__ == "__main__":
    run_script(main)
