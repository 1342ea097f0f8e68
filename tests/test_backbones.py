"""Backbones of timm under one head, and weights for them from anywhere."""
import argparse

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import load_checkpoint

import dataset as data
import train_simple as trainer
from tools.lib.backbones import take_imagenet, take_weights
from tools.lib.checkpoints import save_checkpoint, upgraded
from tools.lib.cli import UserError, as_plain
from tools.lib.runtime import Processes
from train_simple import LandmarkNet

NAMES = [f"p{i}" for i in range(5)]
SCHEME = {"names": NAMES, "flip_pairs": [[0, 1]], "regions": {}, "interocular": [], "skeleton": []}


def network(backbone, k=5, seed=0):
    """A LandmarkNet as after some training: no layer does nothing, as the last of a residual block may at first."""
    torch.manual_seed(seed)
    model = LandmarkNet(backbone, k)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.momentum = 1.0
    model.train()(torch.randn(2, 3, 64, 64))  # for batch norm's statistics
    return model.eval()


# Levels of stride 2 and more, or from 4 on; the last two levels may share a stride; a tag names one of several weights.
@pytest.mark.parametrize("backbone", ["hrnet_w18_small.ms_in1k", "resnet18", "convnext_atto", "mobilenetv3_small_050",
                                      "tf_efficientnet_lite0", "vgg11"])
def test_a_head_sees_the_whole_backbone(backbone):
    """Fails for a head on HRNet's stem: no stage has a gradient then, and a pixel counts for its neighbours only."""
    model = network(backbone)
    images = torch.randn(2, 3, 96, 64, requires_grad=True)
    heatmaps = model.train()(images)
    assert heatmaps.shape == (2, 5, 48, 32) and heatmaps.dtype == torch.float32
    torch.testing.assert_close(heatmaps.sum((2, 3)), torch.ones(2, 5))
    (heatmaps * torch.randn_like(heatmaps)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert not without, without
    images.grad, logits = None, []
    model.head.register_forward_hook(lambda *passed: logits.append(passed[2]))  # a softmax would couple all cells
    model.eval()(images)
    logits[0][0, 0, 4, 4].backward()
    assert images.grad[0, :, 60:, 40:].abs().max() > 0


def test_what_is_predicted_is_of_the_weights_of_now(sample):
    """timm's attention keeps a table that it made of its weights, older versions until `train()` is called."""
    faces = data.load_coco(sample.ann_root / "val.json", sample.data_root).take([0, 1])
    model, fresh = (LandmarkNet("tiny_vit_5m_224", len(faces.scheme.names)) for _ in range(2))

    def points(model):
        return trainer.predict(model, data.DogFLWDataset(faces, 64), trainer.Config(), Processes("cpu"))[0]
    before = points(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(5 * torch.randn_like(p) * ("attention_biases" in name))
    fresh.load_state_dict(model.state_dict())
    assert (points(model) == points(fresh)).all() and (points(model) != before).any()


def test_the_default_backbone_fits():
    with torch.inference_mode():
        assert LandmarkNet(trainer.Config.backbone, 7).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7, 32, 32)


@pytest.mark.parametrize("backbone,reason", [
    ("resnet_18", "no such model"), ("hf-hub:timm/resnet18.a1_in1k", "no such model"), ("local-dir:/tmp", "no such model"),
    ("resnet18.no_such_tag", "tag"), ("vit_tiny_patch16_224", "fixed to 224"),
    ("swin_tiny_patch4_window7_224", "fixed to 224"), ("inception_v3", "no maps"), ("", "no such model")])
def test_what_cannot_serve_is_refused_in_one_line(refused, flags, tmp_path, backbone, reason):
    line = refused(*flags, "--work-dir", tmp_path / "w", "--backbone", backbone)
    assert line.startswith(f"error: --backbone {backbone}: ") and reason in line and "hrnet_w32" in line


# ---------------------------------------------------------------- normalisation

def test_normalisation_is_the_backbones_own_and_stored(sample, flags, tmp_path, monkeypatch):
    """tf_efficientnet expects another mean than ImageNet's: in training, validation, the checkpoint, and where it is used."""
    means, coloured = set(), set()

    def normalize(images, mean, std, colour=None, real=data.normalize):
        means.add(tuple(mean.tolist()))
        coloured.add(colour is not None)  # in training, not in validation
        return real(images, mean, std, colour)
    monkeypatch.setattr(data, "normalize", normalize)
    work_dir = tmp_path / "w"
    trainer.main([*map(str, flags), "--backbone", "tf_efficientnet_lite0", "--epochs", "1", "--work-dir", str(work_dir)])
    assert means == {(0.5, 0.5, 0.5)} and coloured == {True, False}
    checkpoint = load_checkpoint(work_dir / "best_model.pth")
    assert checkpoint["model"]["mean"].tolist() == [0.5] * 3 == checkpoint["model"]["std"].tolist()
    checkpoint["model"]["mean"] = torch.tensor([0.1, 0.2, 0.3])
    save_checkpoint(tmp_path / "other.pth", checkpoint)
    trained = trainer.Trained(tmp_path / "other.pth")
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    images = (crops / 255 - torch.tensor([0.1, 0.2, 0.3])) / 0.5
    with torch.inference_mode():
        torch.testing.assert_close(trainer.predict_heatmaps(trained.model, crops), trained.model(images.permute(0, 3, 1, 2)))


# ---------------------------------------------------------------- weights

def same(model, other):
    state, theirs = model.state_dict(), other.state_dict() if isinstance(other, torch.nn.Module) else other
    return [k for k in state if not torch.equal(state[k], theirs[k])]


def test_a_backbones_file_fits_by_name_or_by_order(tmp_path):
    """timm's own model; the same under the names of another library, alone or beside its head; what says so."""
    source = timm.create_model("resnet18")
    images, said = torch.randn(1, 3, 64, 64), []
    with torch.inference_mode():
        wanted = timm.create_model("resnet18", features_only=True).eval()
        wanted.load_state_dict(source.state_dict(), strict=False)
        wanted = wanted(images)
    renamed = {k.replace("layer", "stage").replace("conv", "c").replace("bn", "norm"): v for k, v in source.state_dict().items()}
    beside = {f"backbone.{k}": v for k, v in renamed.items()} | {"keypoint_head.weight": torch.zeros(3)}
    sam = {f"image_encoder.{k}": v for k, v in renamed.items()} | {"image_encoder.neck.0.weight": torch.zeros(3)}
    wrapped, lightning = ({f"{prefix}.{k}": v for k, v in source.state_dict().items()} for prefix in ("module", "model"))
    cases = [(source.state_dict(), 0), (renamed, 1), ({"state_dict": beside}, 1), ({"model_state_dict": wrapped}, 0), ({"net": lightning}, 0), (sam, 1),
             ({"state_dict_ema": source.state_dict(), "epoch": 3}, 0), ({"model": None, "ema": wrapped, "optimizer": {"state": {}}}, 0),
             (source.state_dict() | {"epoch": 3}, 0), ({"model": {f"_orig_mod.{k}": v for k, v in wrapped.items()}}, 0),
             ({"state_dict": source.state_dict(), "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "sigmas": np.ones(3, np.float32)}, 0)]
    for number, (state, by_order) in enumerate(cases):
        torch.save(state, tmp_path / f"{number}.pth")
        model = LandmarkNet("resnet18", 5).eval()
        take_weights(model, tmp_path / f"{number}.pth", "resnet18", NAMES, said.append)
        with torch.inference_mode():
            assert all(torch.equal(a, b) for a, b in zip(model.backbone(images), wanted, strict=True)), number
        assert len(said) == by_order and all("in their order" in text for text in said)
        said.clear()


def test_a_file_fits_by_name_where_timm_wraps_the_feature_maps(tmp_path):
    """timm's maps of a Hiera are named model.x for its x; the order in a file, here reversed, says nothing."""
    source = timm.create_model("sam2_hiera_tiny").state_dict()
    for state in (dict(reversed(source.items())), {f"model.{k}": v for k, v in reversed(source.items())}):
        torch.save(state, tmp_path / "file.pth")
        model, said = LandmarkNet("sam2_hiera_tiny", 5), []
        take_weights(model, tmp_path / "file.pth", "sam2_hiera_tiny", NAMES, said.append)
        assert not same(model.backbone, {f"model.{k}": v for k, v in source.items()}) and not said


def test_a_file_that_lacks_a_stage_or_holds_no_weights_is_refused(tmp_path):
    model, source = LandmarkNet("resnet18", 5), timm.create_model("resnet18").state_dict()
    part, deeper = {k: v for k, v in source.items() if not k.startswith("layer4")}, timm.create_model("resnet34").state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for state, reason in ((part, "lacks"), (deeper, "has 80 tensors .layer1.2.conv1.weight, .* another backbone"), ({f"x.{k}": v for k, v in part.items()}, "lacks"), ({}, "no weights"),
                          (timm.create_model("resnet26").state_dict(), "another backbone"), ({"a": 1}, "no weights"), ({0: torch.zeros(1)}, "another backbone"),
                          ([torch.zeros(1)], "no weights"), ({"backbone.x": torch.zeros(1)}, "lacks"),
                          ({"laterals.0.0.weight": torch.zeros(4, 4), "laterals.x.y": torch.zeros(1)}, "lacks"),
                          ({"scheme": [1], "model": {"laterals.0.0.weight": torch.zeros(4, 4)}}, "lacks")):
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(UserError, match=f"--weights .*file.pth: .*{reason}") as e:
            take_weights(model, tmp_path / "file.pth", "resnet18", NAMES, print)
        assert "\n" not in str(e.value) and not same(model, before)


def test_a_checkpoint_of_other_landmarks_gives_all_but_the_last_layer(run, tmp_path):
    stored, said = load_checkpoint(run.work_dir / "best_model.pth"), []
    names = stored["scheme"]["names"]
    for wanted, fresh in ((names, False), (names[::-1], True), (names[:7], True)):
        said.clear()
        model = LandmarkNet("hrnet_w18_small", len(wanted))
        head = model.head[-1].weight.detach().clone()
        take_weights(model, run.work_dir / "best_model.pth", "hrnet_w18_small", wanted, said.append)
        assert torch.equal(model.head[-1].weight, head) == fresh
        assert len(said) == fresh and all("other landmarks" in text and "starts fresh" in text for text in said)
        with_bias = LandmarkNet("hrnet_w18_small", len(wanted))  # an edited head: all of its last layer counts
        with_bias.head[-1] = torch.nn.Conv2d(64, len(wanted), 1)
        head = with_bias.head[-1].weight.detach().clone()
        take_weights(with_bias, run.work_dir / "best_model.pth", "hrnet_w18_small", wanted, said.append)
        assert torch.equal(with_bias.head[-1].weight, head) == fresh and "the last layer starts fresh" in said[-1]
        stored["model"]["head.3.weight"] = model.head[-1].weight
        assert not same(model, stored["model"])
    with pytest.raises(UserError, match="add --backbone hrnet_w18_small"):
        take_weights(LandmarkNet("resnet18", 7), run.work_dir / "best_model.pth", "resnet18", names[:7], print)


def test_an_edited_head_starts_fresh_where_it_differs(run):
    """README: "the head: LandmarkNet". Any module may stand there, and a file's head is told from other landmarks."""
    class Head(torch.nn.Module):
        def __init__(self, k):
            super().__init__()
            self.wide, self.last = torch.nn.Conv2d(64, 80, 1), torch.nn.Conv2d(80, k, 1, bias=False)

        def forward(self, x):
            return self.last(self.wide(x))
    path, said = run.work_dir / "best_model.pth", []
    scheme = trainer.Trained(path).scheme
    model = LandmarkNet("hrnet_w18_small", len(scheme.names))
    model.head = Head(len(scheme.names))
    take_weights(model, path, "hrnet_w18_small", scheme.names, said.append)
    assert said == [f"--weights {path}: its head is another one; 3 tensors start fresh (head.wide.weight, ...)"]
    stored = load_checkpoint(path)["model"]
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items() if not k.startswith("head."))


def test_a_setting_of_the_network_reaches_every_tool(run, monkeypatch):
    """README: "a setting: one line of Config". What `build_model` makes of it is what a checkpoint is loaded into."""
    made, build = [], trainer.build_model
    monkeypatch.setattr(trainer.Trained, "build_model", staticmethod(lambda *given: made.append(given) or build(*given)))
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    (config, scheme), = made
    assert scheme == trained.scheme and config.input_size == 64 and not config.pretrained and config.weights is None


def test_imagenet_weights_are_taken_whole_or_refused(monkeypatch):
    source, create = timm.create_model("hrnet_w18_small"), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **o: source if pretrained else create(name, **o))
    model = LandmarkNet("hrnet_w18_small", 5)
    take_imagenet(model.backbone, "hrnet_w18_small", lambda _: None)
    assert not same(model.backbone, source)

    def offline(*_, **__):
        raise ConnectionError("no network")
    monkeypatch.setattr(timm, "create_model", offline)
    said = []  # before the hub is asked, which may take a minute to fail
    with pytest.raises(UserError, match="ImageNet weights of hrnet_w18_small .*ConnectionError.*with --no-pretrained"):
        take_imagenet(model.backbone, "hrnet_w18_small", said.append)
    assert said == ["ImageNet weights of hrnet_w18_small: from the hub, or its cache (--no-pretrained does without)"]


# ---------------------------------------------------------------- checkpoints of before the redesign

@pytest.fixture
def old(tmp_path):
    """A checkpoint of the first format, made from a new model: no lateral for the stem, no mean; and the model."""
    model = network("hrnet_w18_small")
    state = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition("laterals.")
        if name not in ("mean", "std") and not rest.startswith("0."):
            state[f"laterals.{int(rest[0]) - 1}{rest[1:]}" if rest else name] = tensor
    args = {"backbone": "hrnet_w18_small", "input_size": 64, "padding": 1.25, "sigma": 1.5, "crop": "face", "amp": False,
            "cache": "ram", "sync_bn": False, "val_every": 2, "lr": 1e-3, "pretrained": False, "sample": False, "work_dir": "w",
            "data_root": None, "ann_root": "ann", "epochs": 2, "weights": None}
    content = {"format": 1, "epoch": 2, "model": state, "scheme": SCHEME, "args": args, "metrics": {"nme": 0.1}}
    save_checkpoint(tmp_path / "old.pth", content)
    return tmp_path / "old.pth", model


def test_an_old_checkpoint_predicts_what_it_did(old):
    path, new = old
    trained, images = trainer.Trained(path), torch.randn(2, 3, 64, 64)
    model = trained.model
    assert same(model, new) and all(k.startswith("laterals.0.") for k in same(model, new))
    with torch.inference_mode():
        stem, *branches = model.backbone(images)  # as LandmarkNet.forward was until the first format ended
        high, *lower = [lateral(x) for lateral, x in zip(model.laterals[1:], branches, strict=True)]
        for x in lower:
            high = high + F.interpolate(x, size=high.shape[-2:], mode="bilinear")
        logits = model.head(F.relu(stem + F.interpolate(high, scale_factor=2, mode="bilinear")))
        expected = logits.flatten(2).softmax(2).unflatten(2, logits.shape[2:])
        assert torch.equal(model(images), expected) and not torch.allclose(new(images), expected, rtol=1e-3)
    assert (trained.size, trained.epoch, trained.scheme.names) == (64, 2, NAMES)
    assert trained.model.mean.tolist() == pytest.approx(data.MEAN) and trained.model.std.tolist() == pytest.approx(data.STD)


def test_an_old_checkpoint_starts_a_run_but_resumes_none(old, refused, flags, tmp_path):
    path, model = old
    fresh, said = LandmarkNet("hrnet_w18_small", 5), []
    take_weights(fresh, path, "hrnet_w18_small", NAMES, said.append)
    assert not said and not same(fresh, upgraded(load_checkpoint(path)["model"]))
    path.rename(tmp_path / "last.pth")
    line = refused(*flags, "--work-dir", tmp_path, "--resume")
    assert "last.pth" in line and "--weights" in line


@pytest.mark.parametrize("break_it", [
    lambda c: c["model"].pop("head.0.weight"), lambda c: c["scheme"].update(flip_pairs=[[0, 99]]),
    lambda c: c["args"].update(backbone="resnet18"), lambda c: c["args"].update(decode_power=0.0),
    lambda c: c["args"].update(backbone=7), lambda c: c["scheme"].pop("names"), lambda c: c.update(format=99),
    lambda c: c.update(model=[1]), lambda c: c.pop("epoch"), lambda c: c.update(size="x"), lambda c: c.update(size=0), lambda c: c.update(size=10**6)])
def test_a_checkpoint_that_does_not_fit_together_is_refused_in_one_line(tmp_path, break_it):
    config = trainer.parse_args(["--backbone", "hrnet_w18_small", "--input-size", "64"])
    content = {"format": 2, "epoch": 1, "size": 64, "model": LandmarkNet("hrnet_w18_small", 5).state_dict(),
               "scheme": {**SCHEME}, "args": as_plain(config), "metrics": {}}
    save_checkpoint(tmp_path / "c.pth", content)
    assert trainer.Trained(tmp_path / "c.pth").config.backbone == "hrnet_w18_small"
    break_it(content)
    save_checkpoint(tmp_path / "c.pth", content)
    with pytest.raises(UserError) as e:
        trainer.Trained(tmp_path / "c.pth")
    assert "\n" not in str(e.value)


def test_a_checkpoint_of_an_edited_head_is_taken_whole(tmp_path):
    """A head of one's own may have no laterals, by which a backbone's bare file is told from ours."""
    def edited():
        model = LandmarkNet("hrnet_w18_small", 3)
        model.head, model.laterals = torch.nn.Conv2d(64, 3, 1, bias=False), torch.nn.ModuleList()
        return model

    old, new, said, path = edited(), edited(), [], tmp_path / "best_model.pth"
    torch.save({"model": old.state_dict(), "scheme": {"names": list("abc")}, "args": {"backbone": "hrnet_w18_small"}}, path)
    take_weights(new, path, "hrnet_w18_small", list("abc"), said.append)
    assert torch.equal(new.head.weight, old.head.weight) and not said
    safetensors.torch.save_file(old.state_dict(), tmp_path / "model.safetensors")  # as of export_onnx.py --safetensors
    take_weights(new := edited(), tmp_path / "model.safetensors", "hrnet_w18_small", list("abc"), said.append)
    assert torch.equal(new.head.weight, old.head.weight) and not said
    take_weights(new := edited(), path, "hrnet_w18_small", list("xyz"), said.append)
    assert not torch.equal(new.head.weight, old.head.weight) and "the last layer starts fresh" in said[0]
