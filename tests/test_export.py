"""tools/export_onnx.py: the file as another program uses it, and the safetensors folder."""
import dataclasses
import json

import numpy as np
import pytest
import torch

import dataset as data
import train_simple as trainer
from tools import export_onnx as tool

onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
TOOL = "tools/export_onnx.py"


@pytest.fixture(scope="module")
def exported(run, script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    result = script(TOOL, run.work_dir / "best_model.pth", "--out", folder / "dog.onnx", "--safetensors", folder / "hub",
                    check=True)
    assert result.stderr == ""
    return folder, result.stdout


@pytest.fixture(scope="module")
def crops(run):
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    return data.DogFLWDataset(faces, 64).__getitems__(list(range(7)))["image"]


def test_any_batch_of_real_crops_equals_pytorch(run, exported, crops):
    model, scheme, _, _ = trainer.load_model(run.work_dir / "best_model.pth")
    session = runtime.InferenceSession(exported[0] / "dog.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 2, 7):
        points, scores = session.run(["landmarks", "scores"], {"image": crops[:n].numpy()})
        expected = data.decode_heatmaps(trainer.predict_heatmaps(model, crops[:n], torch.tensor(scheme.flip_index)))
        assert points.shape == (n, 46, 2) and np.abs(points - expected[0].numpy()).max() < 0.05
        assert scores.shape == (n, 46) and np.abs(scores - expected[1].numpy()).max() < 1e-3


def test_metadata_and_the_report(exported):
    folder, output = exported
    meta = {p.key: p.value for p in onnx.load(folder / "dog.onnx").metadata_props}
    assert len(json.loads(meta["names"])) == 46 and len(json.loads(meta["flip_pairs"])) == 19
    assert (meta["input_size"], meta["padding"]) == ("64", "1.25") and "non-commercial" in meta["license"]
    assert "PyTorch" in output and output.count(" ms") == 2
    assert sorted(p.name for p in folder.iterdir()) == ["dog.onnx", "hub"]


def test_safetensors_folder_loads_back(run, exported):
    hub = exported[0] / "hub"
    assert sorted(p.name for p in hub.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    state = trainer.load_model(run.work_dir / "best_model.pth")[0].state_dict()
    back = trainer.build_model("hrnet_w18_small", 46, weights=hub / "model.safetensors").state_dict()
    assert all(torch.equal(back[k], v) for k, v in state.items())
    config = json.loads((hub / "config.json").read_text())
    assert config["backbone"] == "hrnet_w18_small" and config["num_landmarks"] == len(config["names"]) == 46
    yaml = pytest.importorskip("yaml")
    _, header, body = (hub / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["license"] == "cc-by-nc-4.0" and card["library_name"] and card["tags"]
    assert "nme" in [m["type"] for m in card["model-index"][0]["results"][0]["metrics"]]
    assert "non-commercial use only" in body and card["datasets"] == ["georgemartvel/dogflw"]


@pytest.mark.parametrize("changes, known, wanted, absent", [
    ({"interocular": []}, {}, "license: unknown", "DogFLW"), ({}, {"sample": True}, "drawn sample", "DogFLW")])
def test_only_dogflw_is_called_dogflw(run, tmp_path, changes, known, wanted, absent):
    model, scheme, args, checkpoint = trainer.load_model(run.work_dir / "best_model.pth")
    tool.write_safetensors(model, dataclasses.replace(scheme, **changes), {**args, **known}, checkpoint, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert wanted in card and absent.lower() not in card.lower() and "ommercial" not in card


def test_a_file_that_differs_is_not_left(run, tmp_path, monkeypatch):
    loaded = trainer.load_model(run.work_dir / "best_model.pth")
    monkeypatch.setattr(tool, "predict_heatmaps", lambda *a: trainer.predict_heatmaps(*a).flip(3))
    with pytest.raises(data.UserError, match="not written"):
        tool.export_onnx(*loaded[:3], True, tmp_path / "dog.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused(run, exported, tmp_path):
    checkpoint, (folder, _) = run.work_dir / "best_model.pth", exported
    before = (folder / "dog.onnx").read_bytes()
    for wanted, args in {
        "--force": (checkpoint, "--out", folder / "dog.onnx"),
        "not empty": (checkpoint, "--out", tmp_path / "a.onnx", "--safetensors", folder / "hub"),
        "no such file": (tmp_path / "no.pth",),
    }.items():
        with pytest.raises(data.UserError, match=wanted):
            tool.main([*map(str, args)])
    assert (folder / "dog.onnx").read_bytes() == before and not list(tmp_path.iterdir())
