"""Export a checkpoint to one ONNX file, or to safetensors with a model card.

    uv run python tools/export_onnx.py work_dirs/hrnet_w32/best_model.pth
    uv run python tools/export_onnx.py best_model.pth --out dog.onnx --no-flip --safetensors hub/

The ONNX file holds everything between pixels and landmarks: uint8 RGB crops `image` (N, S, S, 3) in, `landmarks`
(N, K, 2) in crop pixels and `scores` (N, K) out, any N. Its metadata hold names, flip_pairs, input_size, padding and
what is known of the licence; the crop is a square of `padding` times the face box's longer side. The file is left
only if onnxruntime gives PyTorch's landmarks. Needs: pip install onnx onnxruntime.

--safetensors writes a folder in the form of a Hugging Face repository: model.safetensors, config.json, README.md.
"""
import json
import math
import statistics
import timeit
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from skimage.data import astronaut
from torch import nn

from dataset import MEAN, STD, Parser, UserError, atomic_write, check_free, decode_heatmaps, normalize, predict_crop, run_script
from train_simple import average_mirrored, load_model, predict_heatmaps

TOLERANCE = 0.05  # crop pixels
OPSET = 17
RUNS = 20


class Exported(nn.Module):
    """uint8 crops -> landmarks and scores, by the trainer's own functions; `flip_index` None: one pass, not two."""

    def __init__(self, model, flip_index):
        super().__init__()
        self.model = model
        self.register_buffer("flip_index", None if flip_index is None else torch.tensor(flip_index))
        self.register_buffer("colour", torch.eye(3, 4)[None])

    def forward(self, image):
        # Colours as they are, but of the batch's size: a trace would keep the size that `normalize` makes up itself.
        image = normalize(image, self.colour.expand(image.shape[0], 3, 4))
        return decode_heatmaps(average_mirrored(self.model, image, self.flip_index))


def photographs(size, n):
    """Cut-outs of the portrait that scikit-image ships, to compare on: (N, S, S, 3) uint8."""
    return np.stack([predict_crop(astronaut(), (20 * i, 10 * i, 300, 300), size, 1.0)[0] for i in range(n)])


def latency(function):
    """Median milliseconds of a call, the first left out."""
    return statistics.median(timeit.repeat(function, number=1, repeat=RUNS + 1)[1:]) * 1e3


def licence(scheme, args):
    """(name of the training data, identifier of the hub, what it means for the weights), as far as the checkpoint shows."""
    if args.get("sample"):
        return "drawn sample", "mit", ("The weights were trained on the trainer's own drawn sample, no photograph among it. "
                                       "They are MIT, as the code is, and not meant for real dogs.")
    if len(scheme.names) == 46 and scheme.interocular == [18, 19]:
        return "DogFLW", "cc-by-nc-4.0", ("**Non-commercial.** The weights were trained on DogFLW, which is CC-BY-NC-4.0: its authors "
                                          "allow non-commercial use only, and so of the weights.")
    return "own data", "unknown", ("The licence of the training data applies to the weights; the exporter does not know it. State it "
                                   "here before you publish them.")


def export_onnx(model, scheme, args, flip, path):
    """Write the file, checked against PyTorch. Raises UserError, leaving nothing, where they differ."""
    try:
        import onnx
        import onnxruntime
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install onnx onnxruntime") from None
    size, index = args["input_size"], scheme.flip_index if flip else None
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_name(f".{path.name}.tmp")
    names = ("image", "landmarks", "scores")
    try:
        # The exporter that traces: it needs no further package. Its remarks are about values that are constant here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Exported(model, index).eval(), (torch.from_numpy(photographs(size, 2)),), str(raw),
                              opset_version=OPSET, input_names=list(names[:1]), output_names=list(names[1:]),
                              dynamic_axes={n: {0: "N"} for n in names}, dynamo=False)
        content = onnx.load(raw)
    finally:
        raw.unlink(missing_ok=True)
    for key, value in {"names": scheme.names, "flip_pairs": scheme.flip_pairs, "regions": scheme.regions,
                       "skeleton": scheme.skeleton, "input_size": size, "padding": args["padding"], "license": licence(scheme, args)[2],
                       "flip_test": index is not None, "crop": args.get("crop", "face")}.items():
        content.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(content)
    content = content.SerializeToString()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    crops = photographs(size, 5)  # not the batch size of the trace
    flip_index = None if index is None else torch.tensor(index)

    def by_torch(crops):
        return decode_heatmaps(predict_heatmaps(model, torch.from_numpy(crops), flip_index))

    points, scores = session.run(None, {"image": crops})
    expected, expected_scores = (t.numpy() for t in by_torch(crops))
    error, score_error = np.abs(points - expected).max(), np.abs(scores - expected_scores).max()
    if not (error < TOLERANCE and score_error < 0.01):
        raise UserError(f"{path}: not written: onnxruntime is {error:.3f} pixels from PyTorch, {score_error:.3f} in score")
    atomic_write(path, [content])
    one = crops[:1]
    print(f"{path}: {len(content) / 1e6:.1f} MB, {len(scheme.names)} landmarks, input {size} x {size}, at most "
          f"{error:.1e} pixels from PyTorch\n"
          f"batch 1 on the CPU, median of {RUNS}: PyTorch {latency(lambda: by_torch(one)):.1f} ms, "
          f"onnxruntime {latency(lambda: session.run(None, {'image': one})):.1f} ms")


CARD = """---
license: {licence}
library_name: pytorch
pipeline_tag: keypoint-detection
tags: [animal, face, landmarks, keypoint-detection, hrnet, timm]
{index}---
# Facial landmarks, {backbone}

{k} landmarks of a face from a {size} x {size} RGB crop: a square of {padding} times the longer side of the face's box.
{backbone} (timm) with heatmaps at half the resolution, trained for {epoch} epochs.

{metrics}

## Licence

{terms} The code that made them is MIT.

## Use

`model.safetensors` holds the tensors, `config.json` the landmarks' names, partners and the crop. In the repository of the
trainer, start from these weights with

    python train_simple.py --backbone {backbone} --weights model.safetensors

or load them as they are:

    from safetensors.torch import load_file
    from train_simple import build_model
    model = build_model("{backbone}", {k})
    model.load_state_dict(load_file("model.safetensors"))
"""


def write_safetensors(model, scheme, args, checkpoint, folder):
    """model.safetensors + config.json + README.md, the form of a Hugging Face repository."""
    from safetensors.torch import save  # timm brings it
    metrics = {k: v for k, v in checkpoint["metrics"].items() if isinstance(v, float) and math.isfinite(v)}
    chosen = checkpoint["metrics"].get("chosen_on", "an unnamed split")
    data_name, identifier, terms = licence(scheme, args)
    config = {"architectures": ["LandmarkNet"], "backbone": args["backbone"], "num_landmarks": len(scheme.names),
              "input_size": args["input_size"], "padding": args["padding"], "crop": args.get("crop", "face"), **asdict(scheme),
              "mean": MEAN, "std": STD, "license": terms}
    # The hub reads results out of this block; JSON is YAML.
    hub_name = "georgemartvel/dogflw" if data_name == "DogFLW" else data_name
    index = [{"name": f"face-landmarks-{args['backbone']}", "results": [{
        "task": {"type": "keypoint-detection"}, "dataset": {"name": data_name, "type": hub_name},
        "metrics": [{"type": k, "name": k, "value": round(v, 5)} for k, v in metrics.items() if k.startswith("nme")]}]}]
    index = f"model-index: {json.dumps(index)}\n" + (f"datasets: [{hub_name}]\n" if data_name == "DogFLW" else "")
    rows = "\n".join(f"| {k} | {v:.4f} |" for k, v in metrics.items() if k != "train_loss")
    card = CARD.format(
        backbone=args["backbone"], k=len(scheme.names), size=args["input_size"], padding=args["padding"],
        epoch=checkpoint["epoch"], index=index, licence=identifier, terms=terms,
        metrics=f"| metric, on the faces that chose this epoch ({chosen}) | |\n|---|---|\n{rows}")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    for name, content in (("model.safetensors", save(state, {"format": "pt"})), ("README.md", card.encode()),
                          ("config.json", json.dumps(config, indent=1).encode())):
        atomic_write(folder / name, [content])
    print(f"{folder}: model.safetensors, config.json, README.md")


def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="best_model.pth of a run")
    add("--out", type=Path, metavar="FILE", help="the ONNX file (default: CHECKPOINT with the suffix .onnx)")
    add("--safetensors", type=Path, metavar="DIR", help="also write safetensors weights and a model card here")
    add("--no-flip", action="store_true", help="do not average with the mirrored crop: twice as fast, a little less exact")
    add("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args(argv)
    path = args.out or args.checkpoint.with_suffix(".onnx")
    if path.exists() and (path.is_dir() or not args.force):
        raise UserError(f"--out {path}: exists; name another file, or overwrite it with --force")
    if args.safetensors:
        check_free("--safetensors", args.safetensors, args.force)
    model, scheme, settings, checkpoint = load_model(args.checkpoint)
    model.requires_grad_(False)
    export_onnx(model, scheme, settings, not args.no_flip, path)
    if args.safetensors:
        write_safetensors(model, scheme, settings, checkpoint, args.safetensors)


if __name__ == "__main__":
    run_script(main)
