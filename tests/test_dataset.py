"""dataset.py: crops, mirroring, heatmaps, the cache, and COCO files written by others."""
import errno
import json
import pickle
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import FORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset as data
from dataset import Augmentation, DogFLWDataset, UserError

numbers = st.floats(-300, 300)
boxes = st.tuples(numbers, numbers, st.floats(5, 400), st.floats(5, 400))
settings.register_profile("ours", max_examples=60, deadline=None)
settings.load_profile("ours")


@given(boxes, st.floats(-60, 60), st.floats(0.6, 1.7), st.floats(-0.2, 0.2), st.booleans())
def test_crop_inverse_and_aspect(box, rotation, scale, shift, mirror):
    matrix = data.crop_matrix(box, 256, 1.25, rotation, scale, (shift, -shift), mirror)
    points = np.random.default_rng(0).uniform(-200, 200, (46, 2))
    back = data.apply_matrix(data.invert_matrix(matrix), data.apply_matrix(matrix, points))
    np.testing.assert_allclose(back, points, atol=1e-8)
    a = matrix[:, :2]  # a similarity: never a stretch
    np.testing.assert_allclose(a @ a.T, np.eye(2) * abs(np.linalg.det(a)), atol=1e-9)
    assert (np.linalg.det(a) < 0) == mirror


@given(boxes)
def test_the_mirrored_crop_is_the_crop_mirrored(box):
    points = np.random.default_rng(1).uniform(-200, 200, (46, 2))
    plain, mirrored = (data.apply_matrix(data.crop_matrix(box, 256, 1.25, mirror=m), points) for m in (False, True))
    np.testing.assert_allclose(mirrored, [255, 0] + plain * [-1, 1], atol=1e-8)


@given(st.integers(32, 130), st.floats(0.8, 1.2), st.integers(0, 10**6))
def test_heatmap_round_trip(size, sigma, seed):
    """Under 0.05 input pixels wherever the point lies at least 3 cells from the border."""
    cells = torch.from_numpy(np.random.default_rng(seed).uniform(3, size - 4, (2, 7, 2)).astype(np.float32))
    points = (cells + 0.5) * 2 - 0.5
    decoded, scores = data.decode_heatmaps(data.encode_heatmaps(points, size, sigma))
    assert (decoded - points).abs().max() < 0.05
    assert scores.min() > 0.5
    single = torch.cat([data.decode_heatmaps(data.encode_heatmaps(p[None], size, sigma))[0] for p in points])
    torch.testing.assert_close(single, decoded)  # batched equals single


def test_encode_is_the_gaussian_of_the_real_valued_point():
    point = torch.tensor([[[21.3, 40.9]]])
    x, y = ((point[0, 0].double() + 0.5) / 2 - 0.5).tolist()
    grid = np.arange(32)
    expected = np.exp(-((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2) / (2 * 1.5**2))
    np.testing.assert_allclose(data.encode_heatmaps(point, 32, 1.5)[0, 0].numpy(), expected, atol=1e-6)


def test_mirroring_heatmaps_is_mirroring_points():
    points = torch.rand(3, 46, 2) * 128
    mirrored = torch.tensor([127, 0]) + points * torch.tensor([-1, 1])
    torch.testing.assert_close(data.encode_heatmaps(mirrored, 64, 2.0), data.encode_heatmaps(points, 64, 2.0).flip(3),
                               atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def faces(sample):
    return data.load_coco(sample.ann_root / "train.json", sample.data_root)


def test_a_sample_in_full(faces):
    item = DogFLWDataset(faces, 64, sigma=1.5)[3]
    assert item["image"].shape == (3, 64, 64) and item["heatmaps"].shape == (46, 32, 32)
    assert item["keypoints"].shape == (46, 2) and item["visibility"].shape == (46,)
    back = data.apply_matrix(data.invert_matrix(item["matrix"].numpy()), item["keypoints"].double().numpy())
    np.testing.assert_allclose(back, faces.points[3], atol=1e-4)
    peak = item["heatmaps"].flatten(1).argmax(1)
    cells = (item["keypoints"] + 0.5) / 2 - 0.5
    inside = item["visibility"] > 0
    assert ((torch.stack([peak % 32, peak // 32], 1) - cells).abs().amax(1)[inside] <= 0.5001).all()


def test_augmentation_moves_pixels_and_points_alike(faces):
    """Dots painted at the landmarks are found again at the augmented landmarks, partners swapped by mirroring."""
    flips = 0
    for i in range(6):
        size = faces.sizes[i]
        for epoch in range(4):
            one = DogFLWDataset(faces, 128, augment=Augmentation(colour=0, occlusion=0), seed=5)
            k = (7 * i + epoch) % 14  # an ear's landmark
            painted = np.zeros((size[1], size[0], 3), np.uint8)
            x, y = faces.points[i, k]
            cv2.circle(painted, (round(x * 16), round(y * 16)), 40, (255, 255, 255), -1, cv2.LINE_AA, 4)
            one.windows._decode = lambda j, p=painted, w=one.windows: data.cut_window(p, *w.geometry[j])
            batch = one.__getitems__([(epoch, i)])
            mirrored = np.linalg.det(batch["matrix"][0, :, :2].numpy()) < 0
            flips += mirrored
            j = faces.scheme.flip_index[k] if mirrored else k
            if batch["visibility"][0, j] and 4 < batch["keypoints"][0, j].min() and batch["keypoints"][0, j].max() < 123:
                bright = np.abs(batch["image"][0].numpy().astype(float) - [124, 116, 104]).sum(-1)
                bright[batch["image"][0].numpy().max(-1) < 150] = 0
                ys, xs = np.nonzero(bright)
                centre = np.average(xs, weights=bright[ys, xs]), np.average(ys, weights=bright[ys, xs])
                assert np.abs(centre - batch["keypoints"][0, j].numpy()).max() < 1.0
    assert 0 < flips < 24


def test_augmentation_is_a_function_of_seed_epoch_index(faces):
    first, again, other = (DogFLWDataset(faces, 64, augment=Augmentation(), seed=s) for s in (0, 0, 1))
    batch = first.__getitems__([(2, 5), (2, 6), (3, 5)])
    for key, value in again.__getitems__([(3, 5), (2, 6), (2, 5)]).items():
        torch.testing.assert_close(value[[2, 1, 0]], batch[key], rtol=0, atol=0)
    assert not torch.equal(other.__getitems__([(2, 5)])["image"], batch["image"][:1])
    assert not torch.equal(batch["image"][0], batch["image"][2])


def test_smaller_crops_show_the_same(faces):
    """An item of half the size is the whole item shrunk: picture, landmarks, colour and occlusion."""
    ds, items = DogFLWDataset(faces, 128, augment=Augmentation(occlusion=1)), range(len(faces))
    full, half = (ds.__getitems__([(1, i, size) for i in items]) for size in (128, 64))
    torch.testing.assert_close((half["keypoints"] + 0.5) * 2 - 0.5, full["keypoints"], rtol=0, atol=1e-3)
    torch.testing.assert_close(half["colour"], full["colour"], rtol=0, atol=0)
    shrunk = full["image"].float().unflatten(1, (64, 2)).unflatten(3, (64, 2)).mean((2, 4))
    assert (half["image"] - shrunk).abs().mean() < 4  # grey levels


@pytest.mark.parametrize("cache", ["disk", "ram"])
def test_the_cache_gives_the_plain_crops(faces, cache, tmp_path, monkeypatch):
    plain = DogFLWDataset(faces, 96, augment=Augmentation())
    windows = data.Windows(faces, 96, 1.25, Augmentation().reach, cache, tmp_path)
    items = [(4, i) for i in range(len(faces))]
    expected = plain.__getitems__(items)
    plain.windows = pickle.loads(pickle.dumps(windows))  # as a spawned worker gets it
    for key, value in plain.__getitems__(items).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    if cache == "disk":
        monkeypatch.setattr(data.Windows, "_decode", None)  # the second time nothing is decoded
        data.Windows(faces, 96, 1.25, Augmentation().reach, cache, tmp_path)
        assert len(list(tmp_path.glob("*.bin"))) == 1


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
def test_a_cache_that_is_damaged_while_in_use_is_named(faces, tmp_path, damage):
    windows = data.Windows(faces, 96, 1.25, 1.0, "disk", tmp_path)
    damage(windows.file)
    with pytest.raises(UserError, match="face cache"):
        windows[3]


def fill_cache(faces, folder, go):
    """In a process of its own, once all have come: build the cache. Returns the faces decoded here, and one window."""
    decoded, plain = [], data.Windows._decode
    data.Windows._decode = lambda self, i: decoded.append(i) or plain(self, i)
    go.wait()
    return decoded, data.Windows(faces, 96, 1.25, 1.0, "disk", folder)[3][0]


def test_two_runs_at_once_fill_the_cache_once(faces, tmp_path):
    with FORKS.Manager() as manager, FORKS.Pool(2) as pool:
        go = manager.Barrier(2, timeout=60)
        (decoded, window), (others, same) = pool.starmap(fill_cache, [(faces, tmp_path, go)] * 2, chunksize=1)
    assert sorted(decoded + others) == list(range(len(faces)))
    np.testing.assert_array_equal(window, same)


def test_prediction_crop_is_the_validation_crop(faces):
    ds = DogFLWDataset(faces, 96)
    batch = ds.__getitems__(list(range(8)))
    for i in range(8):
        crop, matrix = data.predict_crop(data.read_image(faces.root / faces.files[i]), faces.boxes[i], 96, 1.25)
        np.testing.assert_array_equal(crop, batch["image"][i].numpy())
        np.testing.assert_array_equal(matrix, batch["matrix"][i].numpy())


def test_a_large_face_is_shrunk_without_aliasing():
    stripes = np.tile(np.array([0, 255], np.uint8), (1200, 600))[..., None].repeat(3, 2)  # one-pixel stripes
    crop, _ = data.predict_crop(stripes, (100, 100, 1000, 1000), 64, 1.0)
    assert np.abs(crop.astype(int) - 127).max() < 20


def test_normalize_folds_the_colour_matrix():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    colour = torch.rand(2, 3, 4)
    moved = torch.einsum("bij,bhwj->bhwi", colour[..., :3], images.float()) + colour[:, None, None, :, 3]
    expected = ((moved / 255 - torch.tensor(data.MEAN)) / torch.tensor(data.STD)).permute(0, 3, 1, 2)
    torch.testing.assert_close(data.normalize(images, colour), expected, rtol=1e-4, atol=1e-4)
    assert data.normalize(images).is_contiguous(memory_format=torch.channels_last)


def test_split_is_stratified_and_disjoint(faces):
    rest, held = faces.split(0.25)
    assert sorted(rest.files + held.files) == sorted(faces.files) and not set(rest.files) & set(held.files)
    assert abs(len(held) - 0.25 * len(faces)) <= 6
    assert faces.split(0.25)[1].files == held.files


def kinds(folder):
    """One picture in many kinds of file; (path, tolerance against the RGB original)."""
    rng = np.random.default_rng(0)
    rgb = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
    image = Image.fromarray(rgb)
    grey = np.asarray(image.convert("L"))
    image.save(folder / "a.png")
    image.save(folder / "a.jpg", quality=95)
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("L").save(folder / "grey.png")
    image.quantize(256).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.save(folder / "a.webp", quality=95)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey16.png")
    cv2.imwrite(str(folder / "rgb16.png"), rgb[..., ::-1].astype(np.uint16) * 257)
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored a quarter anticlockwise
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "exif.jpg", quality=95, exif=exif)
    return rgb, np.repeat(grey[..., None], 3, 2)


def test_every_kind_of_picture(tmp_path):
    rgb, grey = kinds(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        read = data.read_image(path)
        assert read.dtype == np.uint8 and read.shape == rgb.shape, path
        assert np.abs(read.astype(int) - (grey if "grey" in path.name else rgb)).mean() < 12, path


@pytest.mark.parametrize("content", [b"", b"no picture", None, "bomb"])
def test_a_bad_picture_is_named(tmp_path, content):
    path = tmp_path / "bad.png"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:-2000]
    elif content == "bomb":
        Image.new("1", (30000, 30000)).save(path)
        content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.png"):
        data.read_image(path)


def breakages():
    def change(**kwargs):
        return lambda d: d["annotations"][0].update(kwargs)
    yield "no annotations", lambda d: d.update(annotations=[])
    yield "not a COCO file", lambda d: d.pop("images")
    yield "categories", lambda d: d.update(categories=[])
    yield "keypoints", change(keypoints=[1, 2, 2])
    yield "bbox", change(bbox=None)
    yield "cannot be", change(bbox=[0, 0, 0, 5])
    yield "cannot be", change(keypoints=[1e9] * 138)
    yield "cannot be", change(keypoints=[float("nan")] * 138)
    yield "not in the file", change(image_id=10**9)
    yield "leaves the data root", lambda d: d["images"][0].update(file_name="../../etc/passwd")
    yield "leaves the data root", lambda d: d["images"][0].update(file_name="/etc/passwd")
    yield "file_name", lambda d: d["images"][0].update(file_name=7)
    yield "width and height", lambda d: d["images"][0].update(width=-1)
    yield "id", lambda d: d["images"][1].update(id=d["images"][0]["id"])
    yield "id", lambda d: d["images"][1].update(id=[1])
    yield "id", lambda d: d["annotations"][1].update(id=d["annotations"][0]["id"])
    yield "id", change(id=[1])
    yield "not in the file", change(image_id=[1])
    yield "printable", lambda d: d["categories"][0]["keypoints"].__setitem__(3, "\x1b[2J")
    yield "flip_pairs", lambda d: d["categories"][0].update(flip_pairs=[[0, 1], [1, 2]])
    yield "flip_pairs", lambda d: d["categories"][0].update(flip_pairs=[[0, 99]])
    yield "regions", lambda d: d["categories"][0].update(regions={"ear": ["x"]})
    yield "interocular", lambda d: d["categories"][0].update(interocular=[1])
    yield "labelled", lambda d: [a.update(keypoints=[0] * 138) for a in d["annotations"]]


@pytest.mark.parametrize("message,breakage", list(breakages()))
def test_a_broken_coco_file_is_named(sample, tmp_path, message, breakage):
    coco = json.loads((sample.ann_root / "train.json").read_text())
    breakage(coco)
    (tmp_path / "broken.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match=f"broken.json.*{message}"):
        data.load_coco(tmp_path / "broken.json", sample.data_root)


def test_an_unlabelled_face_is_left_out_whatever_its_box(sample, tmp_path):
    coco = json.loads((sample.ann_root / "train.json").read_text())
    coco["annotations"][3].update(keypoints=[0] * 138, bbox=[0, 0, 0, 0])
    (tmp_path / "ann.json").write_text(json.dumps(coco))
    assert len(data.load_coco(tmp_path / "ann.json", sample.data_root)) == len(coco["annotations"]) - 1


@pytest.mark.parametrize("number,passes", [(errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, number, passes):
    def lockf(*_):
        raise OSError(number, "no")
    monkeypatch.setattr(pytest.importorskip("fcntl"), "lockf", lockf)
    with nullcontext() if passes else pytest.raises(OSError), data.file_lock(tmp_path / "a" / ".lock", busy="held"):
        assert (tmp_path / "a" / ".lock").exists()


@pytest.fixture
def hostile(sample, tmp_path):
    """A data root with links in it, and a COCO file of one picture with the given name: hostile(name) -> its path."""
    root = tmp_path / "root"
    root.mkdir()
    picture = next((sample.data_root / "test/images").iterdir())
    shutil.copy(picture, root / "good.png")
    (root / "inside.png").symlink_to("good.png")
    (root / "out").symlink_to(sample.data_root)
    (root / "out.png").symlink_to(picture)
    (root / "loop.png").symlink_to("loop.png")
    coco = json.loads((sample.ann_root / "val.json").read_text())
    coco["images"] = [next(i for i in coco["images"] if i["file_name"].endswith(picture.name))]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] == coco["images"][0]["id"]]

    def make(name):
        coco["images"][0]["file_name"] = name
        (tmp_path / "hostile.json").write_text(json.dumps(coco))
        return tmp_path / "hostile.json"
    make.root, make.picture = root, picture
    return make


def readers(path, root, tmp_path):
    """Every way in which a picture that a file names is read."""
    from tools import align_faces, evaluate, predict, visualize_dataset
    results = tmp_path / "results.json"
    coco = json.loads(path.read_text())
    results.write_text(json.dumps([{"image_id": a["image_id"], "keypoints": a["keypoints"], "score": 1, "file_name": i["file_name"]}
                                   for i, a in zip(coco["images"], coco["annotations"])]))
    yield lambda: DogFLWDataset(data.load_coco(path, root), 64).__getitems__([0])
    for main, *args in ((evaluate.main, "--results", results, "--ann", path), (visualize_dataset.main, path, "--number", 1),
                        (align_faces.main, "--ann", path)):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        yield lambda main=main, args=args, out=out: main(list(map(str, [*args, "--data-root", root, "--out", out])))
    yield lambda: [data.read_image(p) for p in predict.list_inputs(SimpleNamespace(input=[str(path)], data_root=root, out=tmp_path))[0]]


@pytest.mark.parametrize("name", [
    "../secret.png", "a/../../secret.png", "/etc/passwd", "out/{}", "out.png", "C:\\x.png", "\\\\host\\x.png", "a\\..\\..\\x.png",
    "x\0.png", "x\n.png", "\x1b[31m.png", "\ud800.png", "loop.png", "good.png", "inside.png"])
def test_no_name_leads_out_of_the_data_root(hostile, tmp_path, name, capsys):
    """In training, evaluation, contact sheets, alignment and prediction alike; links that stay inside are followed."""
    path = hostile(name.format(f"test/images/{hostile.picture.name}"))
    for read in readers(path, hostile.root, tmp_path):
        if name in ("good.png", "inside.png"):
            read()
            continue
        with pytest.raises(UserError) as e:
            read()
        message = str(e.value) + capsys.readouterr().err  # alignment names the pictures as it goes
        assert data.printable(message.replace("\n", "")) == message.replace("\n", "")
        assert any(word in message for word in ("leaves the data root", "no text", "loop.png")), message


def test_errors_show_no_control_codes(capsys):
    def main():
        raise UserError("name\x1b[2J.png\r\n  second line")
    with pytest.raises(SystemExit) as end:
        data.run_script(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: name?[2J.png?\n  second line\n"
