"""tools/align_faces.py: faces end upright and at one place, from annotations and from predictions."""
import json

import numpy as np
import pytest
from PIL import Image

import dataset as data
from tools import align_faces as tool
from tools.lib.cli import UserError
from tools.lib.pictures import read_image
from tools.lib.windows import invert_matrix

TOOL = "tools/align_faces.py"


def align(*args):
    """The tool's main in this process."""
    return tool.main([*map(str, args)])


@pytest.fixture(scope="module")
def aligned(run, script, tmp_path_factory):
    out = tmp_path_factory.mktemp("align") / "out"
    result = script(TOOL, "--ann", run.ann_root / "val.json", "--data-root", run.data_root, "--out", out,
                    "--size", 96,
                    check=True)
    return out, json.loads((out / "transforms.json").read_bytes()), result.stdout


def test_faces_are_upright_and_of_one_size(run, aligned):
    out, report, _ = aligned
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    assert len(report["faces"]) + len(report["left_out"]) == len(faces)
    left, right, nose = tool.parts(faces.scheme)
    row = {int(i): n for n, i in enumerate(faces.ids)}
    for face in report["faces"]:
        n, matrix = row[face["face"]], np.array(face["matrix"])
        a, b = matrix[:, 0], matrix[:, 1]
        assert np.isclose(a @ b, 0, atol=1e-9) and np.isclose(a @ a,
                                                              b @ b) and np.linalg.det(matrix[:, :2]) > 0
        landmarks = np.array([[np.nan] * 2 if p is None else p for p in face["landmarks"]], float)
        seen = faces.visible[n] > 0
        assert np.array_equal(np.isfinite(landmarks[:, 0]), seen) and face["file"] == faces.files[n]
        assert np.abs(landmarks[seen] - data.apply_matrix(matrix, faces.points[n])[seen]).max() < 0.01
        middle = [np.nanmean(landmarks[i], axis=0) for i in (left, right, nose)]
        assert np.abs(np.mean(middle, 0) - np.mean(report["template"], 0)).max() < 1e-2
        # The least squares' angle and length: around the middle no turn and no scale brings the parts nearer.
        ours, wanted = (np.array(three) - np.mean(three, 0) for three in (middle, report["template"]))
        assert abs((ours[:, 0] * wanted[:, 1] - ours[:, 1] * wanted[:, 0]).sum()) < 1e-3 * (wanted**2).sum()
        assert (ours * wanted).sum() == pytest.approx((ours**2).sum(), rel=1e-3)
        eyes = np.linalg.norm(wanted[0] - wanted[1])
        assert face["residual"] == pytest.approx(np.linalg.norm(ours - wanted, axis=1).mean() / eyes, abs=1e-3)
        assert read_image(out / face["picture"]).shape == (96, 96, 3)
    assert len({face["picture"] for face in report["faces"]}) == len(report["faces"])
    (left, top), (right, level), (middle, below) = report["template"]  # by the default margin
    assert top == level < below and middle == pytest.approx((left + right) / 2)
    assert right - left == pytest.approx(96 / (2 * 1.35 * 1.6), rel=1e-3)


def test_left_may_be_the_animals(run):
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    rows = [*zip(faces.files, faces.ids, faces.points, faces.visible > 0)]
    left, right, nose = indices = tool.parts(faces.scheme)
    assert tool.sides(rows, indices) == tool.sides(rows, (right, left, nose)) == indices


@pytest.mark.parametrize("angle, scale", [(0, 1), (40, 2.5), (180, 0.4)])
def test_the_aligned_picture_shows_what_the_matrix_says(angle, scale):
    """A picture that is smooth in x and y: its aligned pixel tells where it came from."""
    y, x = np.mgrid[:300, :300]
    image = np.stack([x * 0.8, y * 0.8, 0 * x], -1).astype(np.float32)
    turn = np.deg2rad(angle)
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = np.column_stack([linear, np.array([39.5, 39.5]) - linear @ [150, 150]])
    pixels = tool.align(image, matrix, 80)
    at = np.array([[40.0, 40.0], [50.0, 30.0], [28.0, 47.0], [3, 3], [76, 3], [3, 76], [76, 76]])  # and near its corners
    source = data.apply_matrix(invert_matrix(matrix), at)
    for (u, v), want in zip(at.astype(int), source * 0.8):
        assert np.abs(pixels[v, u, :2] - want).max() < 0.1


def test_faces_without_eyes_are_named(run, tmp_path, capsys):
    content = json.loads((run.ann_root / "val.json").read_bytes())
    eyes = content["categories"][0]["regions"]["eye"]
    blind = content["annotations"][2]
    for i in eyes:
        blind["keypoints"][3 * i:3 * i + 3] = 0, 0, 0
    (tmp_path / "blind.json").write_text(json.dumps(content))
    align("--ann", tmp_path / "blind.json", "--data-root", run.data_root, "--out", tmp_path / "out")
    output = capsys.readouterr().out
    left_out = json.loads((tmp_path / "out" / "transforms.json").read_bytes())["left_out"]
    assert blind["id"] in [face["face"] for face in left_out]
    assert f"left out: {len(left_out)} faces" in output and f"({blind['id']}): an eye or the nose" in output


def test_ctrl_c_keeps_what_is_done(run, tmp_path, monkeypatch):
    add = tool.Aligner.add

    def add_two(self, *face):
        if len(self.aligned) == 2:
            raise KeyboardInterrupt
        add(self, *face)
    monkeypatch.setattr(tool.Aligner, "add", add_two)
    with pytest.raises(KeyboardInterrupt):
        align("--ann", run.ann_root / "val.json", "--data-root", run.data_root, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/transforms.json").read_bytes())
    assert len(report["faces"]) == 2 and all((tmp_path / "out" / f["picture"]).exists() for f in report["faces"])


def test_pictures_of_another_size_than_the_file_says_are_named(run, tmp_path, capsys):
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    for name in faces.files[:3]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(run.data_root / name).reduce(2).save(tmp_path / name)
    with pytest.raises(UserError, match="12 of 12 pictures could not be read"):
        align("--ann", run.ann_root / "val.json", "--data-root", tmp_path, "--out", tmp_path / "out")
    assert capsys.readouterr().err.count("the COCO file says") == 3


def test_predictions_align_too(run, tmp_path, capsys):
    faces = data.load_coco(run.ann_root / "val.json", run.data_root)
    entries = [{"file_name": name, "keypoints": np.column_stack([p, np.ones(len(p))]).ravel().tolist()}
               for name, p in list(zip(faces.files, faces.points))[:3]]
    entries += [entries[0], {**entries[1], "file_name": "gone.png"}]
    (tmp_path / "predictions.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="1 of 4 pictures"):
        align("--predictions", tmp_path / "predictions.json", "--checkpoint", run.work_dir / "best_model.pth",
              "--data-root", run.data_root, "--out", tmp_path / "out")
    assert "gone.png: no such picture" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "transforms.json").read_bytes())
    assert sorted((f["file"], f["face"]) for f in report["faces"]) == sorted(
        [(faces.files[0], 0), (faces.files[0], 1), (faces.files[1], 0), (faces.files[2], 0)])


def test_bad_input_is_refused(run, aligned, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.lib.find.BUNDLED", tmp_path / "no.pth")
    ann, root = ("--ann", run.ann_root / "val.json"), ("--data-root", run.data_root)
    checkpoint = ("--checkpoint", run.work_dir / "best_model.pth")
    (tmp_path / "wrong.json").write_text('[{"file_name": "a.png", "keypoints": [1, 2, 3]}]')
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "video.json").write_text('[{"file_name": "a.mp4", "frame": 0, "keypoints": []}]')
    for wanted, args in {
        "--force": (*ann, *root, "--out", aligned[0]),
        "holds none of the": (*ann, "--data-root", tmp_path, "--out", tmp_path / "out"),
        "no such folder": (*ann, "--data-root", tmp_path / "none", "--out", tmp_path / "out"),
        "no bundled model": ("--predictions", tmp_path / "wrong.json", *root, "--out", tmp_path / "out"),
        "no predictions of 46": ("--predictions", tmp_path / "wrong.json", *checkpoint, *root, "--out",
                                 tmp_path / "out"),
        "none.json: no faces in it": ("--predictions", tmp_path / "none.json", *checkpoint, *root, "--out", tmp_path / "out"),
        "a.mp4 is a video; save its frames": ("--predictions", tmp_path / "video.json", *checkpoint, *root, "--out", tmp_path / "out"),
        "wrong.json: is a file": (*ann, *root, "--out", tmp_path / "wrong.json", "--force"),
        "--checkpoint goes with --predictions": (*ann, *checkpoint, *root),
        "--category with --ann": ("--predictions", tmp_path / "wrong.json", "--category", "dog", *root),
        "^--size 3: must be from 16 to 4096; --margin 5.0: must be from 0 to 4$": (*ann, *root, "--size", 3, "--margin", 5),
        "val.json: is a data set, not predictions; give it by --ann": ("--predictions", ann[1], *checkpoint, *root, "--out", tmp_path / "out"),
        "is the folder of the pictures": (*ann, *root, "--out", run.data_root, "--force"),
    }.items():
        with pytest.raises(UserError, match=wanted):
            align(*args)
    assert not (tmp_path / "out").exists()


def test_a_scheme_without_eyes_is_refused():
    with pytest.raises(UserError, match="eye"):
        tool.parts(data.Scheme(["a", "b"], [[0, 1]], {}, [], []))
