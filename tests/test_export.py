"""tools/export_onnx.py: the file as another program uses it, and the safetensors folder."""
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import dataset as data
import train_simple as trainer
from tools import export_onnx as tool
from tools.lib.cli import UserError
from tools.lib.pictures import read_image

onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
TOOL = "tools/export_onnx.py"


@pytest.fixture(scope="module")
def exported(run, script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    result = script(TOOL, run.work_dir / "best_model.pth", "--out", folder / "dog.onnx", "--safetensors",
                    folder / "hub",
                    check=True)
    assert result.stderr == ""
    return folder, result.stdout


@pytest.fixture(scope="module")
def crops(run):
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    return data.DogFLWDataset(faces, 64).batch(list(range(7)))["image"]


def test_any_batch_of_real_crops_equals_pytorch(run, exported, crops):
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    index, config = torch.tensor(trained.scheme.flip_index), trained.config
    session = runtime.InferenceSession(exported[0] / "dog.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 2, 7):
        points, scores = session.run(["landmarks", "scores"], {"image": crops[:n].numpy()})
        heatmaps = trainer.predict_heatmaps(trained.model, crops[:n], index)
        expected = data.decode_heatmaps(heatmaps, config.decode_power, config.score_radius)
        assert points.shape == (n, 46, 2) and np.abs(points - expected[0].numpy()).max() < 0.05
        assert scores.shape == (n, 46) and np.abs(scores - expected[1].numpy()).max() < 1e-3


def test_a_cast_is_the_only_use_of_the_bytes(exported):
    """TensorRT refuses every other node that takes or gives uint8."""
    nodes = onnx.load(exported[0] / "dog.onnx").graph.node
    assert [node.op_type for node in nodes if "image" in node.input] == ["Cast"]


def test_any_batch_through_a_backbone_of_attention_windows(run, crops):
    """Its blocks ask for the batch's size, which the trace must not have fixed before."""
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    trained.model = trainer.LandmarkNet("tiny_vit_5m_224", 46).eval()
    content = tool.trace(trained, None)
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for n in (1, 3):
        points, _ = session.run(None, {"image": crops[:n].numpy()})
        heatmaps = trainer.predict_heatmaps(trained.model, crops[:n])
        expected, _ = data.decode_heatmaps(heatmaps, trained.config.decode_power, 0.05)
        assert np.abs(points - expected.numpy()).max() < 0.05


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
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    card = (hub / "README.md").read_text()
    loads = re.search(r"\n\n((?:    .*\n)+)$", card).group(1).replace("\n    ", "\n").strip()
    space = {"crops": torch.rand(2, 3, 64, 64)}
    exec(loads.replace("model.safetensors", str(hub / "model.safetensors")), space)  # as the card says
    back, state = space["model"].state_dict(), trained.model.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    config = json.loads((hub / "config.json").read_text())
    decoding = config["decode_power"], config["score_radius"]
    assert decoding == (trained.config.decode_power, trained.config.score_radius)
    expected, _ = data.decode_heatmaps(trained.model(space["crops"]), *decoding)
    torch.testing.assert_close(space["points"], expected, rtol=0, atol=1e-3)
    assert config["backbone"] == trained.config.backbone
    assert config["num_landmarks"] == len(config["names"]) == 46
    np.testing.assert_allclose(config["mean"], trained.model.mean)
    np.testing.assert_allclose(config["std"], trained.model.std)
    yaml = pytest.importorskip("yaml")
    _, header, body = card.split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["license"] == "cc-by-nc-4.0" and card["library_name"] and card["tags"]
    assert "`left_` in a name means the left of the picture" in body  # the hub's readers have no other README
    assert "nme" in [m["type"] for m in card["model-index"][0]["results"][0]["metrics"]]
    assert "non-commercial use only" in body and "trained on DogFLW" not in body


@pytest.mark.parametrize("changes, known, wanted, absent", [
    ({"interocular": []}, {}, "license: unknown", "DogFLW"),
    ({}, {"sample": True, "weights": None, "pretrained": False}, "drawn sample", "DogFLW"),
    ({"interocular": []}, {"sample": True, "weights": tool.Path("faces.pth")}, "license: unknown", "drawn sample")])
def test_only_dogflw_is_called_dogflw(run, tmp_path, changes, known, wanted, absent):
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    trained.scheme, trained.config = replace(trained.scheme, **changes), replace(trained.config, **known)
    trained.whole = not changes
    tool.write_safetensors(trained, tmp_path, {})
    assert ("longer side of the\nwhole picture." in (tmp_path / "README.md").read_text()) == (not changes)
    card = (tmp_path / "README.md").read_text()
    assert wanted in card and absent.lower() not in card.lower() and "ommercial" not in card
    assert ("`left_`" in card) == ("license: mit" in card)  # own names say what they mean themselves


def test_what_onnx_cannot_hold_is_one_line(run, monkeypatch):
    class Fourier(torch.nn.Module):
        def __init__(self, *_):
            super().__init__()

        def forward(self, image):
            return torch.fft.fft(image.float()).real.sum((1, 2)), image.float().sum((1, 2))
    logged = []
    monkeypatch.setattr(torch._C, "_jit_onnx_log", lambda *_: logged.append(1), raising=False)
    monkeypatch.setattr(tool, "Exported", Fourier)
    with pytest.raises(UserError, match="ONNX cannot hold") as error:
        tool.trace(trainer.Trained(run.work_dir / "best_model.pth"), None)
    assert "\n" not in str(error.value) and not logged  # without PyTorch's listing of the graph


def test_errors_on_faces_that_trained_are_no_results(run, tmp_path):
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    trained.metrics = {**trained.metrics, "chosen_on": "val.json" + tool.SEEN}
    tool.write_safetensors(trained, tmp_path, {})
    assert "model-index" not in (tmp_path / "README.md").read_text()  # not one without a metric


def test_the_error_that_chose_nothing_is_the_cards(run, tmp_path):
    folder = shutil.copytree(run.work_dir, tmp_path / "run")
    (folder / "test.json").write_text(json.dumps({"faces": 12, "chosen_on": "x", "nme": 0.4321, "nme_iod": None}))
    tool.main(["--checkpoint", str(folder), "--safetensors", str(tmp_path / "hub")])
    card = (tmp_path / "hub/README.md").read_text()
    assert '"metrics": [{"type": "nme", "name": "nme", "value": 0.4321}]' in card
    assert card.index("on 12 faces that did not choose this epoch") < card.index("on the faces that chose this epoch")


def test_a_file_that_differs_is_not_left(run, tmp_path, monkeypatch):
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    monkeypatch.setattr(tool, "predict_heatmaps", lambda *a: trainer.predict_heatmaps(*a).flip(3))
    with pytest.raises(UserError, match="not written"):
        tool.export_onnx(trained, True, tmp_path / "dog.onnx")
    monkeypatch.setattr(tool, "predict_heatmaps", trainer.predict_heatmaps)
    content, decode = tool.trace(trained, trained.flip_index()), tool.decode_heatmaps
    monkeypatch.setattr(tool, "trace", lambda *_: content)
    monkeypatch.setattr(tool, "decode_heatmaps", lambda *given: (decode(*given)[0] + 0.06, decode(*given)[1]))
    with pytest.raises(UserError, match="not written"):  # a twentieth of a crop pixel is the most
        tool.export_onnx(trained, True, tmp_path / "dog.onnx")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tool, "decode_heatmaps", lambda *given: (decode(*given)[0] + 0.03, decode(*given)[1]))
    tool.export_onnx(trained, True, tmp_path / "dog.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["dog.onnx"]


def test_normalisation_and_decoding_are_the_checkpoints_own(run, crops, tmp_path, monkeypatch):
    """A model of other colours, power and radius, exported as the bundled model."""
    checkpoint = torch.load(run.work_dir / "best_model.pth", weights_only=True)
    checkpoint["model"]["mean"], checkpoint["model"]["std"] = torch.tensor([0.5, 0.4,
                                                                            0.6]), torch.tensor([0.3, 0.5,
                                                                                                 0.2])
    checkpoint["args"] |= {"decode_power": 2.5, "score_radius": 0.2, "padding": 1.6, "input_size": 128}  # its crops stay 64
    torch.save(checkpoint, tmp_path / "best_model.pth")
    monkeypatch.setattr("tools.lib.find.BUNDLED", tmp_path / "best_model.pth")
    monkeypatch.chdir(tmp_path)
    tool.main(["--no-flip"])
    session = runtime.InferenceSession(tmp_path / "dog_face.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert (about["padding"], about["input_size"]) == ("1.6", "64")
    points, scores = session.run(None, {"image": crops[:3].numpy()})
    model = trainer.Trained(run.work_dir / "best_model.pth").model
    images = (crops[:3].permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.6])[:, None, None])
    with torch.no_grad():
        heatmaps = model(images / torch.tensor([0.3, 0.5, 0.2])[:, None, None])
    expected, expected_scores = data.decode_heatmaps(heatmaps, 2.5, 0.2)
    assert np.abs(points - expected.numpy()).max() < 0.05 and np.abs(scores
                                                                     - expected_scores.numpy()).max() < 1e-3


def test_the_readmes_lines_find_the_same_landmarks(run, exported, tmp_path, monkeypatch, capsys):
    """A photo in onnxruntime, without this project."""
    monkeypatch.chdir(tmp_path)
    text = (trainer.ROOT / "tools/README.md").read_text()
    code = re.search(r"```python\n(import json\n.*?)```", text, re.S).group(1)
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    (tmp_path / "dog_face.onnx").write_bytes((exported[0] / "dog.onnx").read_bytes())
    (tmp_path / "photo.jpg").write_bytes((run.data_root / faces.files[0]).read_bytes())
    box = ", ".join(f"{v:.1f}" for v in faces.boxes[0])
    code, found = re.subn(r"(x, y, w, h) = .*", rf"\1 = {box}", code)
    space = {}
    exec(code, space)
    trained = trainer.Trained(run.work_dir / "best_model.pth")
    image = read_image(run.data_root / faces.files[0])
    points, _ = trained.look([(image, faces.boxes[0].round(1))])
    assert found == 1 and np.abs(space["landmarks"] - points[0]).max() < 0.05 * faces.boxes[0, 2:].max()


def test_bad_input_is_refused(run, exported, tmp_path):
    checkpoint, (folder, _) = run.work_dir / "best_model.pth", exported
    before = (folder / "dog.onnx").read_bytes()
    for wanted, args in {
        "dog.onnx: exists; write over it with --force, or name another --out": (checkpoint, "--out", folder / "dog.onnx"),
        "not empty": (checkpoint, "--out", tmp_path / "a.onnx", "--safetensors", folder / "hub"),
        "no such file": ("--checkpoint", tmp_path / "no.pth"),
        "give one": (checkpoint, "--checkpoint", checkpoint),
        "--light: writes a checkpoint alone": (checkpoint, "--light", tmp_path / "l.pth", "--no-flip"),
        "dog.onnx: exists; write over it with --force, or name another --light": (checkpoint, "--light", folder / "dog.onnx"),
    }.items():
        with pytest.raises(UserError, match=wanted):
            tool.main([*map(str, args)])
    assert (folder / "dog.onnx").read_bytes() == before and not list(tmp_path.iterdir())
