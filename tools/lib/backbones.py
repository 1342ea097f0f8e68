"""Backbones of timm as levels of feature maps, and weights for them from wherever they come."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from tools.lib.checkpoints import load_file_safely, upgraded
from tools.lib.cli import UserError, printable, single_line
from tools.lib.pictures import MEAN, STD


def feature_maps(backbone: str) -> nn.Module:
    """timm's network without its classifier, as levels of feature maps, with random weights.

    Raises UserError if timm has none of that name, or if it is unsuitable: with a fixed input size, say, or
    only one level.
    """
    # An HRNet's branches, before the classifier's part.
    hrnet = {"feature_location": ""} if backbone.startswith("hrnet") else {}
    try:
        if not timm.is_model(backbone):  # timm would also open hf-hub:... and local-dir:... of a checkpoint
            raise ValueError("no such model")
        about = timm.get_pretrained_cfg(backbone)
        if about and about.fixed_input_size:
            raise ValueError(f"its input is fixed to {about.input_size[-1]} pixels")
        model = timm.create_model(backbone, features_only=True, **hrnet).eval()
        channels, strides = model.feature_info.channels(), model.feature_info.reduction()
        with torch.no_grad():
            shapes = [x.shape[1:] for x in model(torch.zeros(1, 3, 128, 128))]
        if shapes != [(c, 128 // s, 128 // s) for c, s in zip(channels, strides)]:
            raise ValueError("its levels are no maps of channels, height and width")
        if len(set(strides)) < len(shapes) or len(shapes) < 2 or not {2, 4} & set(strides):
            raise ValueError(f"its levels have strides {strides}")
    except Exception as e:  # timm's models refuse in many ways
        raise UserError(f"--backbone {backbone}: cannot serve ({single_line(e)}); try hrnet_w32, resnet50 or "
                        "tf_efficientnet_lite2") from None
    return model.train()


def normalization(backbone: str) -> tuple[tuple, tuple]:
    """Mean and deviation (of RGB from 0 to 1) that a backbone's weights expect, else ImageNet's."""
    about = timm.get_pretrained_cfg(backbone)
    return (about.mean, about.std) if about else (MEAN, STD)


def without_counters(state: dict) -> dict:
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def matched(own: dict, source: dict, what: str, say: Callable) -> dict:
    """Tensors of `source` under the names of `own`: by name, else by order, as another library has them.

    Other parts of `source` (a classifier) are ignored. UserError if tensors are missing, or left over.
    """
    own, source = without_counters(own), without_counters(source)
    named = source | {f"model.{k}": v for k, v in source.items()}  # timm wraps some feature maps, as `model`
    by_name = {k: named[k] for k in own if k in named and named[k].shape == own[k].shape}
    by_order = dict(zip(own, source.values()))
    if len(by_name) < len(own) == len(by_order) and all(own[k].shape == v.shape for k, v in by_order.items()):
        say(f"{what}: names of another library; its {len(own)} tensors fit in their order")
        return by_order
    lacks = [k for k in own if k not in by_name]
    parts = {k.removeprefix("model.").split(".")[0] for k in own}  # layer1, ...: deeper ones hold more
    more = [k for k in source if not {k, f"model.{k}"} & own.keys() and k.split(".")[0] in parts]
    for verb, wrong in ("lacks", lacks), ("has", more):
        if wrong:
            raise UserError(f"{what}: {verb} {len(wrong)} tensors ({wrong[0]}, ...); is it of another "
                            "backbone?")
    return by_name


def take_imagenet(model: nn.Module, backbone: str, say: Callable):
    """Load timm's ImageNet weights into feature maps. Raises UserError where they cannot be had."""
    say(f"ImageNet weights of {backbone}: from the hub, or its cache (--no-pretrained does without)")
    try:
        source = timm.create_model(backbone, pretrained=True).state_dict()
    except Exception as e:  # whatever the hub's client raises: its own types change from version to version
        raise UserError(f"ImageNet weights of {backbone} could not be fetched ({type(e).__name__}); train "
                        "from scratch with --no-pretrained, or give a file with --weights FILE (pip has "
                        "some: README, Train)") from None
    fits = matched(model.state_dict(), source, f"--backbone {backbone}", lambda *_: None)
    model.load_state_dict(fits, strict=False)


def weights_in(stored: object) -> dict:
    """The {name: tensor} that a program stored, without the prefixes of all names; {} if there are none."""
    def tensors(value):
        return {str(k): v for k, v in value.items() if torch.is_tensor(v)} if isinstance(value, dict) else {}
    if not isinstance(stored, dict):
        return {}
    usual = (tensors(stored.get(key)) for key in ("model", "state_dict", "model_state_dict", "net"))
    state = next(filter(None, usual), {}) or max(map(tensors, (stored, *stored.values())), key=len)
    prefixes = "module.", "model.", "_orig_mod."  # of DataParallel, of Lightning, of torch.compile
    while prefix := next((p for p in prefixes if state and all(k.startswith(p) for k in state)), ""):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def take_weights(model: nn.Module, path: Path, backbone: str, names: list, say: Callable):
    """Load a file into a LandmarkNet: a checkpoint of ours, or the bare backbone of any library.

    names: the landmarks' names. From a checkpoint for others, all but the last layer is taken. Raises
    UserError.
    """
    stored = load_file_safely(path)
    ours = isinstance(stored, dict) and isinstance(stored.get("scheme"), dict)
    theirs = stored["args"].get("backbone") if ours and isinstance(stored.get("args"), dict) else None
    if theirs not in (None, backbone):
        raise UserError(f"--weights {path}: is of another backbone; add --backbone {printable(theirs)}")
    state = weights_in(stored)
    if not state:
        raise UserError(f"--weights {path}: holds no weights; name a .pth or .safetensors file of a model")
    # Ours have laterals or, with an edited head, `mean` and `std` beside `backbone`; else it is a backbone,
    # bare or beside a head.
    whole = {"mean", "std"} <= state.keys() and any(k.startswith("backbone.") for k in state)
    if not (whole or "laterals.0.0.weight" in state):
        inside = ("backbone.", "image_encoder.")  # of MMPose and many others; of SAM and MobileSAM
        inner = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(inside)}
        fits = matched(model.backbone.state_dict(), inner or state, f"--weights {path}", say)
        model.backbone.load_state_dict(fits, strict=False)
        return
    state = upgraded(state)
    own = model.state_dict()
    matched({k: v for k, v in own.items() if k.startswith("backbone.")}, state, f"--weights {path}", say)
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    last = list(own)[-1].rpartition(".")[0] + "."  # the one layer that knows which landmarks there are
    if ours and stored["scheme"].get("names", names) != names:
        fits = {k: v for k, v in fits.items() if not k.startswith(last)}
    fresh = [k for k in without_counters(own) if k not in fits]
    if fresh and all(k.startswith(last) for k in fresh):
        say(f"--weights {path}: made for other landmarks; the last layer starts fresh, all else is taken")
    elif fresh:
        say(f"--weights {path}: its head is another one; {len(fresh)} tensors start fresh ({fresh[0]}, ...)")
    model.load_state_dict(fits, strict=False)
