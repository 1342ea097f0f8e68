"""dataset.py: crops, mirroring, augmentation, heatmaps, the face cache, splits."""
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import FORKS, ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset as data
from dataset import Augmentation, DogFLWDataset
from tools.lib.cli import UserError
from tools.lib.pictures import read_image
from tools.lib.windows import Windows, apply_matrix, cut_window, face_window, invert_matrix, with_background
from train_simple import METRICS, parse_args

numbers = st.floats(-300, 300)
boxes = st.tuples(numbers, numbers, st.floats(5, 400), st.floats(5, 400))
settings.register_profile("ours", max_examples=60, deadline=None)
settings.load_profile("ours")


@given(boxes, st.floats(-60, 60), st.floats(0.6, 1.7), st.floats(-0.2, 0.2), st.booleans())
def test_crop_inverse_and_aspect(box, rotation, scale, shift, mirror):
    matrix = data.crop_matrix(box, 256, 1.25, rotation, scale, (shift, -shift), mirror)
    points = np.random.default_rng(0).uniform(-200, 200, (46, 2))
    back = apply_matrix(invert_matrix(matrix), apply_matrix(matrix, points))
    np.testing.assert_allclose(back, points, atol=1e-8)
    a = matrix[:, :2]  # a similarity: never a stretch
    np.testing.assert_allclose(a @ a.T, np.eye(2) * abs(np.linalg.det(a)), atol=1e-9)
    assert (np.linalg.det(a) < 0) == mirror


@given(boxes)
def test_the_mirrored_crop_is_the_crop_mirrored(box):
    points = np.random.default_rng(1).uniform(-200, 200, (46, 2))
    plain, mirrored = (apply_matrix(data.crop_matrix(box, 256, 1.25, mirror=m), points) for m in (False, True))
    np.testing.assert_allclose(mirrored, [255, 0] + plain * [-1, 1], atol=1e-8)


@given(st.integers(32, 130), st.floats(0.8, 1.2), st.integers(0, 10**6))
def test_heatmap_round_trip(size, sigma, seed):
    """Under 0.05 input pixels wherever the point lies at least 3 cells from the border."""
    cells = torch.from_numpy(np.random.default_rng(seed).uniform(3, size - 4, (2, 7, 2)).astype(np.float32))
    points = (cells + 0.5) * 2 - 0.5
    decoded, scores = data.decode_heatmaps(data.encode_heatmaps(points, size, sigma), 1.5, 0.05)
    assert (decoded - points).abs().max() < 0.05
    assert scores.min() > 0.5
    single = torch.cat([data.decode_heatmaps(data.encode_heatmaps(p[None], size, sigma), 1.5, 0.05)[0] for p in points])
    torch.testing.assert_close(single, decoded)  # batched equals single


def test_encode_is_the_gaussian_of_the_real_valued_point():
    point = torch.tensor([[[21.3, 40.9]]])
    x, y = ((point[0, 0].double() + 0.5) / 2 - 0.5).tolist()
    grid = np.arange(32)
    expected = np.exp(-((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2) / (2 * 1.5**2))
    np.testing.assert_allclose(data.encode_heatmaps(point, 32, 1.5)[0, 0].numpy(), expected, atol=1e-6)


def test_a_broad_low_map_is_read_by_any_power():
    point = torch.tensor([[[180.0, 60.0]]])
    for sigma in (3, 6, 10):
        maps = data.encode_heatmaps(point, 128, sigma)
        for power in (1, 1.5, 8):
            decoded, _ = data.decode_heatmaps(maps / maps.sum(), power, 0.05)
            torch.testing.assert_close(decoded, point, atol=0.05 if power > 1 else 1, rtol=0)
    assert not data.decode_heatmaps(torch.zeros(1, 1, 32, 32), 1.5, 0.05)[1].any()


def test_a_score_is_the_maps_mass_around_the_point():
    """Within the radius in x and in y, of the crop's side on both sides of the point."""
    for radius in (0.05, 0.1):
        _, score = data.decode_heatmaps(torch.ones(1, 1, 64, 64), 1.5, radius)
        assert score.item() == pytest.approx((2 * radius) ** 2, rel=0.02)
    two = torch.zeros(1, 1, 64, 64)
    two[0, 0, 20, 30], two[0, 0, 50, 30] = 0.9, 0.1
    point, score = data.decode_heatmaps(two, 8, 0.05)
    torch.testing.assert_close(point[0, 0], torch.tensor([60.5, 40.5]), atol=0.01, rtol=0)
    assert score.item() == pytest.approx(0.9)


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
    back = apply_matrix(invert_matrix(item["matrix"].numpy()), item["keypoints"].double().numpy())
    np.testing.assert_allclose(back, faces.points[3], atol=1e-4)
    peak = item["heatmaps"].flatten(1).argmax(1)
    cells = (item["keypoints"] + 0.5) / 2 - 0.5
    inside = item["visibility"] > 0
    assert ((torch.stack([peak % 32, peak // 32], 1) - cells).abs().amax(1)[inside] <= 0.5001).all()
    unlabelled = replace(faces, visible=faces.visible * (np.arange(46) != 7))
    item = DogFLWDataset(unlabelled, 64)[3]
    assert item["visibility"][7] == 0 == item["heatmaps"][7].max() and item["heatmaps"][8].max() > 0.1


def test_augmentation_moves_pixels_and_points_alike(faces):
    """Dots painted at the landmarks are found again at the augmented landmarks, partners swapped by mirroring."""
    flips = compared = 0
    for i in range(6):
        size = faces.sizes[i]
        for epoch in range(4):
            one = DogFLWDataset(faces, 128, augment=Augmentation(colour=0, occlusion=0), seed=5)
            k = (7 * i + epoch) % 14  # an ear's landmark
            painted = np.zeros((size[1], size[0], 3), np.uint8)
            x, y = faces.points[i, k]
            cv2.circle(painted, (round(x * 16), round(y * 16)), 40, (255, 255, 255), -1, cv2.LINE_AA, 4)
            one.windows._decode = lambda j, p=painted, w=one.windows: cut_window(p, *w.geometry[j])
            batch = one.batch([(epoch, i)])
            mirrored = np.linalg.det(batch["matrix"][0, :, :2].numpy()) < 0
            flips += mirrored
            j = faces.scheme.flip_index[k] if mirrored else k
            if batch["visibility"][0, j] and 4 < batch["keypoints"][0, j].min() and batch["keypoints"][0, j].max() < 123:
                bright = np.abs(batch["image"][0].numpy().astype(float) - [124, 116, 104]).sum(-1)
                bright[batch["image"][0].numpy().max(-1) < 150] = 0
                ys, xs = np.nonzero(bright)
                centre = np.average(xs, weights=bright[ys, xs]), np.average(ys, weights=bright[ys, xs])
                assert np.abs(centre - batch["keypoints"][0, j].numpy()).max() < 1.0
                compared += 1
    assert 0 < flips < 24 and compared > 12


def test_augmentation_is_a_function_of_seed_epoch_index(faces):
    first, again, other = (DogFLWDataset(faces, 64, augment=Augmentation(), seed=s) for s in (0, 0, 1))
    batch = first.batch([(2, 5), (2, 6), (3, 5)])
    for key, value in again.batch([(3, 5), (2, 6), (2, 5)]).items():
        torch.testing.assert_close(value[[2, 1, 0]], batch[key], rtol=0, atol=0)
    assert not torch.equal(other.batch([(2, 5)])["image"], batch["image"][:1])
    assert not torch.equal(batch["image"][0], batch["image"][2])


def test_augmentation_is_what_the_flags_say(faces):
    """Nothing at 0, and each range alone changes what it names: points, colours or pixels."""
    off = [text for name in ("flip", "rotation", "scale", "shift", "colour", "occlusion") for text in (f"--{name}", "0")]

    def batch(*flags):
        return DogFLWDataset(faces, 64, augment=parse_args([*off, *flags])).batch([(1, i) for i in range(12)])
    plain = DogFLWDataset(faces, 64).batch([(1, i) for i in range(12)])
    for key, value in batch().items():
        assert torch.equal(value, plain[key]), key
    for flag, value, changed in (("flip", 1, "points"), ("rotation", 30, "points"), ("scale", 0.5, "points"), ("shift", 0.1, "points"),
                                 ("colour", 0.3, "colour"), ("occlusion", 1, "image")):
        got = batch(f"--{flag}", str(value))
        linear, still = got["matrix"][:, :, :2].numpy(), plain["matrix"][:, :, :2].numpy()
        zoom = np.sqrt(np.abs(np.linalg.det(linear) / np.linalg.det(still)))
        angle = np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 1, 1]))
        assert torch.equal(got["keypoints"], plain["keypoints"]) == (changed != "points"), flag
        assert torch.equal(got["colour"], plain["colour"]) == (changed != "colour"), flag
        assert torch.equal(got["image"], plain["image"]) == (changed == "colour"), flag  # the device applies the colours
        assert (np.linalg.det(linear) < 0).all() == (flag == "flip")
        assert (1 < np.abs(angle).max() <= 30) if flag == "rotation" else np.allclose(angle, 0)
        assert (1.1 < max(zoom.max(), 1 / zoom.min()) <= 1.5) if flag == "scale" else np.allclose(zoom, 1)


def test_ranges_of_the_augmentation_are_used_whole_and_to_both_sides():
    augment, rng = Augmentation(), np.random.default_rng(0)
    geometry, colour = zip(*(augment.draw(rng, True) for _ in range(2000)))
    for name, low, high in (("rotation", -20, 20), ("scale", 1 / 1.2, 1.2), ("shift", -0.05, 0.05)):
        drawn = np.array([g[name] for g in geometry])
        assert (drawn.min(0) >= low).all() and (drawn.max(0) <= high).all(), name
        assert (drawn.min(0) < low + 0.05 * (high - low)).all() and (drawn.max(0) > high - 0.05 * (high - low)).all(), name
    colour = np.array(colour)
    grey = 128 * colour[:, :, :3].sum(2) + colour[:, :, 3]  # contrast and saturation leave mid-grey; brightness and gain do not
    assert np.abs(grey - 128).max() < 45 and abs(grey.mean() - 128) < 3


def square_face(tmp_path, visible, flip_pairs):
    """One face of four landmarks in a white picture: two partners, the middle, and one far to the right."""
    Image.fromarray(np.full((200, 200, 3), 255, np.uint8)).save(tmp_path / "a.png")
    scheme = data.Scheme(["l", "r", "middle", "far"], flip_pairs, {}, [], [])
    points = np.array([[[80.0, 80], [120, 80], [100, 100], [190, 100]]])
    return data.Faces(scheme, tmp_path, ["a.png"], np.array([[200, 200]]), np.array([[60.0, 60, 80, 80]]), points,
                      np.array([visible]), np.array([1]), np.array([1]), [""])


def test_visibility_goes_with_its_landmark_and_ends_at_the_crop(tmp_path):
    """Hidden landmarks (1) train as visible ones (2) do; not those that have no label, or that the crop cut off."""
    face = square_face(tmp_path, [0, 1, 2, 2], [[0, 1]])
    for flip, expected in ((0, [0, 1, 1, 0]), (1, [1, 0, 1, 0])):
        augment = Augmentation(flip, *[0] * 6)
        assert DogFLWDataset(face, 64, augment=augment)[0]["visibility"].tolist() == expected


def test_without_partners_nothing_is_mirrored(tmp_path):
    for flip_pairs, mirrored in (([], False), ([[0, 1]], True)):
        ds = DogFLWDataset(square_face(tmp_path, [2] * 4, flip_pairs), 64, augment=Augmentation(flip=1))
        matrices = ds.batch([(epoch, 0) for epoch in range(4)])["matrix"]
        assert ((np.linalg.det(matrices[:, :, :2].numpy()) < 0) == mirrored).all()


def test_an_augmented_crop_shows_the_picture_and_no_border_where_it_goes_on(tmp_path):
    ds = DogFLWDataset(square_face(tmp_path, [2] * 4, []), 64, augment=Augmentation(0, colour=0, occlusion=0))
    images = ds.batch([(epoch, 0) for epoch in range(50)])["image"]
    assert (images[:, [1, 62, 32, 32], [32, 32, 1, 62]] == 255).all()
    with_corners, _ = data.cut_crop(np.full((200, 200, 3), 255, np.uint8), (60, 60, 80, 80), 64, 1.25, rotation=45)
    assert (with_corners == 255).all()


@given(st.floats(0, 180), st.floats(0, 1), st.floats(0, 0.3), st.integers(0, 10**6))
def test_an_augmented_crop_stays_in_its_window(rotation, scale, shift, seed):
    """The middles of its sides lie in the part of the picture that is kept; the corners of rotated ones may not."""
    augment = Augmentation(0.5, rotation, scale, shift)
    box, size = (400, 300, 200, 120), (1000, 800)
    (x, y, w, h), _ = face_window(box, size, 128, 1.25, augment.reach)
    geometry = augment.draw(np.random.default_rng(seed), True)[0]
    middles = np.array([[63.5, -0.5], [63.5, 127.5], [-0.5, 63.5], [127.5, 63.5]])
    seen = apply_matrix(invert_matrix(data.crop_matrix(box, 128, 1.25, **geometry)), middles)
    inside = (seen >= [x - 1, y - 1]) & (seen <= [x + w, y + h])
    at_edge = np.array([[x == 0, y == 0]]) | np.array([[x + w == size[0], y + h == size[1]]])
    assert (inside | at_edge).all()


def test_smaller_crops_show_the_same(faces):
    """An item of half the size is the whole item shrunk: picture, landmarks, colour and occlusion."""
    ds, items = DogFLWDataset(faces, 128, augment=Augmentation(occlusion=1)), range(len(faces))
    full, half = (ds.batch([(1, i, size) for i in items]) for size in (128, 64))
    torch.testing.assert_close((half["keypoints"] + 0.5) * 2 - 0.5, full["keypoints"], rtol=0, atol=1e-3)
    torch.testing.assert_close(half["colour"], full["colour"], rtol=0, atol=0)
    shrunk = full["image"].float().unflatten(1, (64, 2)).unflatten(3, (64, 2)).mean((2, 4))
    assert (half["image"] - shrunk).abs().mean() < 4  # grey levels


def test_the_cache_gives_the_plain_crops(faces, tmp_path, monkeypatch):
    items, options = [(4, i) for i in range(len(faces))], {"input_size": 96, "augment": Augmentation()}
    expected = DogFLWDataset(faces, **options).batch(items)
    DogFLWDataset(faces, cache=tmp_path / "new" / "cache", **options)
    monkeypatch.setattr(Windows, "_decode", None)  # the second time nothing is decoded, nor by a spawned worker
    cached = pickle.loads(pickle.dumps(DogFLWDataset(faces, cache=tmp_path / "new" / "cache", **options)))
    for key, value in cached.batch(items).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    assert [p.suffix for p in (tmp_path / "new/cache").iterdir() if p.suffix != ".lock"] == [".bin"]


def test_a_cache_of_other_faces_or_crops_is_never_read(faces, tmp_path):
    """Every change makes a file of its own: crop size, padding, reach, faces, a picture that was written again."""
    def files(faces, *geometry):
        Windows(faces, *geometry, tmp_path / "cache")
        return len(list((tmp_path / "cache").glob("*.bin")))
    path = tmp_path / faces.files[0]
    path.parent.mkdir(parents=True)
    one = replace(faces.take([0]), root=tmp_path)
    path.write_bytes((faces.root / faces.files[0]).read_bytes())
    assert [files(one, 96, 1.25, 1.0), files(one, 96, 1.25, 1.0), files(one, 64, 1.25, 1.0), files(one, 96, 1.5, 1.0),
            files(one, 96, 1.25, 1.3), files(faces.take([0, 1]), 96, 1.25, 1.0)] == [1, 1, 2, 3, 4, 5]
    path.write_bytes((faces.root / faces.files[0]).read_bytes())
    assert files(one, 96, 1.25, 1.0) == 6


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
def test_a_cache_that_is_damaged_while_in_use_is_named(faces, tmp_path, damage):
    windows = Windows(faces, 96, 1.25, 1.0, tmp_path)
    damage(windows.records.path)
    with pytest.raises(UserError, match="face cache"):
        windows[3]


def fill_cache(faces, folder, go):
    """In a process of its own, once all have come: build the cache. Returns the faces decoded here, and one window."""
    decoded, plain = [], Windows._decode
    Windows._decode = lambda self, i: decoded.append(i) or plain(self, i)
    go.wait()
    return decoded, Windows(faces, 96, 1.25, 1.0, folder)[3][0]


def test_two_runs_at_once_fill_the_cache_once(faces, tmp_path):
    with FORKS.Manager() as manager, FORKS.Pool(2) as pool:
        go = manager.Barrier(2, timeout=60)
        (decoded, window), (others, same) = pool.starmap(fill_cache, [(faces, tmp_path, go)] * 2, chunksize=1)
    assert sorted(decoded + others) == list(range(len(faces)))
    np.testing.assert_array_equal(window, same)


def test_a_picture_of_another_size_than_the_file_says_is_named(faces, tmp_path):
    wrong = replace(faces.take([0]), sizes=faces.sizes[:1] + 1)
    with pytest.raises(UserError, match=f"{faces.files[0]}: is .* pixels, the COCO file says"):
        DogFLWDataset(wrong, 64, cache=tmp_path)


def test_prediction_crop_is_the_validation_crop(faces):
    ds = DogFLWDataset(faces, 96)
    batch = ds.batch(list(range(8)))
    for i in range(8):
        crop, matrix = data.cut_crop(read_image(faces.root / faces.files[i]), faces.boxes[i], 96, 1.25)
        np.testing.assert_array_equal(crop, batch["image"][i].numpy())
        np.testing.assert_array_equal(matrix, batch["matrix"][i].numpy())


def test_a_crop_that_is_turned_is_the_crop_of_the_turned_picture():
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    x, y, w, h = 150, 100, 90, 70
    turned, _ = data.cut_crop(image, (x, y, w, h), 64, 1.25, rotation=90)
    upright, _ = data.cut_crop(np.ascontiguousarray(np.rot90(image, -1)), (299 - y - h, x, h, w), 64, 1.25)
    assert np.abs(turned.astype(int) - upright).mean() < 1  # OpenCV rounds places, to 1/32 of a pixel in older versions


def test_the_dataset_is_a_sequence(faces):
    ds = DogFLWDataset(faces.take(range(3)), 64)
    assert ds[-1]["index"] == 2 and [int(face["index"]) for face in ds] == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_data_loader_gives_the_samples(faces, workers):
    ds = DogFLWDataset(faces, 64)
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(ds, [3, 0, 5]), batch_size=2, num_workers=workers)
    for batch, wanted in zip(loader, ([3, 0], [5]), strict=True):
        for row, i in enumerate(wanted):
            for name, value in ds[i].items():
                assert torch.equal(batch[name][row], value), name


def test_faces_are_taken_by_number_or_mask(faces):
    ids = np.array(faces.ids)
    mask = np.arange(len(faces)) % 3 == 1
    for index, wanted in ((mask, ids[mask]), (mask.tolist(), ids[mask]), ([-1, 0], ids[[-1, 0]]), (range(2), ids[:2]), ((0, 1), ids[:2]), ([], ids[:0]), (np.array([]), ids[:0]), (torch.tensor([2, 0]), ids[[2, 0]])):
        some = faces.take(index)
        assert [*some.ids] == [*wanted] and len(some.files) == len(some.points) == len(some.breeds) == len(wanted)
    assert faces.take(mask).files == [file for file, taken in zip(faces.files, mask) if taken]


def test_paths_may_be_texts(faces, sample):
    again = data.load_coco(str(sample.ann_root / "train.json"), str(sample.data_root / "train"))  # names are found by their ends
    assert len(again) > 0 and (again.points == data.load_coco(sample.ann_root / "train.json", sample.data_root).points).all()


def test_a_programs_own_warnings_come_first():
    loud = ("import warnings; warnings.simplefilter('error', UserWarning); import dataset\n"
            "try: warnings.warn_explicit('odd', UserWarning, 'PIL/x.py', 1, module='PIL.x')\n"
            "except UserWarning: print('raised')")
    silent = "import warnings, dataset; warnings.warn_explicit('odd', UserWarning, 'PIL/x.py', 1, module='PIL.x')"
    for code, said in ((loud, "raised\n"), (silent, "")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.stdout == said and not done.stderr


def test_a_large_face_is_shrunk_without_aliasing():
    stripes = np.tile(np.array([0, 255], np.uint8), (1200, 600))[..., None].repeat(3, 2)  # one-pixel stripes
    crop, _ = data.cut_crop(stripes, (100, 100, 1000, 1000), 64, 1.0)
    assert np.abs(crop.astype(int) - 127).max() < 20


def test_normalize_folds_the_colour_matrix():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    colour, mean, std = torch.rand(2, 3, 4), torch.rand(3), torch.rand(3) + 0.5
    moved = torch.einsum("bij,bhwj->bhwi", colour[..., :3], images.float()) + colour[:, None, None, :, 3]
    expected = ((moved / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(data.normalize(images, mean, std, colour), expected, rtol=1e-4, atol=1e-4)
    plain = data.normalize(images, mean, std)
    torch.testing.assert_close(plain, ((images / 255 - mean) / std).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    assert plain.is_contiguous(memory_format=torch.channels_last)


def test_a_decompression_bomb_is_named(tmp_path):
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")  # 110 kB, 2.7 GB of pixels
    with pytest.raises(UserError, match="bomb.png: has too many pixels"):
        read_image(tmp_path / "bomb.png")


# ---------------------------------------------------------------- splits

def pictures(faces, counts, breeds):
    """Faces in pictures of so many faces each; the pictures' breeds."""
    picture = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng(len(picture))
    picture = rng.permutation(picture)
    many = faces.take(np.arange(len(picture)) % len(faces))
    return replace(many, files=[f"{i}.png" for i in picture], breeds=[breeds[i] for i in picture], ids=np.arange(len(picture)))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.integers(1, 4), st.floats(0, 0.9), st.integers(0, 99))
@example([1] * 45, 3, 0.7, 0)  # 0.7 * 45 is below 31.5
def test_split_holds_out_whole_pictures_of_every_breed(faces, counts, kinds, fraction, seed):
    """Of all pictures, as many as were asked for; of each breed, to within one."""
    breeds = [f"b{i * 7 % kinds}" if kinds > 1 else "" for i in range(len(counts))]
    many = pictures(faces, counts, breeds)
    rest, held = many.split(fraction, seed)
    assert sorted([*rest.ids, *held.ids]) == list(range(len(many))) and not set(rest.files) & set(held.files)
    assert abs(len(set(held.files)) - fraction * len(counts)) < 0.5 + 1e-9
    for breed in set(breeds):
        of_breed = breeds.count(breed)
        held_out = len({file for file, b in zip(held.files, held.breeds) if b == breed})
        assert abs(held_out - fraction * of_breed) < 1, breed
    assert [*many.split(fraction, seed)[1].ids] == [*held.ids]


def test_split_differs_by_seed_and_is_fair_to_small_breeds(faces):
    """Of breeds of two pictures, at a quarter, half give one: neither all nor none, each as often as the others."""
    many = pictures(faces, [1] * 200, [f"b{i // 2}" for i in range(200)])
    held = [many.split(0.25, seed)[1] for seed in range(40)]
    assert held[0].files != held[1].files and all(len({*h.breeds}) == len(h) == 50 for h in held)
    often = np.unique([breed for h in held for breed in h.breeds], return_counts=True)[1]
    assert len(often) == 100 and 6 < often.min() and often.max() < 34


def test_a_picture_can_teach_one_face_only_as_a_whole(faces):
    whole = faces.whole_pictures()
    np.testing.assert_array_equal(whole.boxes, np.column_stack([np.zeros((len(faces), 2)), faces.sizes - 1]))
    with pytest.raises(UserError, match="--crop image"):
        replace(faces, files=[faces.files[0]] * len(faces)).whole_pictures()


def test_a_locators_crops_lie_anywhere_and_some_show_no_face(sample):
    faces = data.load_coco(sample.ann_root / "train.json", sample.data_root).whole_pictures()
    faces = faces.take(np.flatnonzero((faces.visible > 0).all(1))[:20])
    dataset = DogFLWDataset(faces, 64, 1.0, augment=Augmentation(scale=1.5, empty=0.4))
    batch = dataset.batch([(epoch, i) for epoch in range(10) for i in range(20)])
    visible, points = batch["visibility"].numpy(), batch["keypoints"].numpy()
    nothing = (visible < 0).any(1)
    assert 0.3 < nothing.mean() < 0.7
    assert len(faces) == 20 and (visible[nothing] == -1).all()
    assert ((visible[~nothing] > 0).mean(1) > 0.2).all()
    sides = np.ptp(points[~nothing], axis=1).max(1) / 64
    assert sides.min() < 0.3 and sides.max() > 0.8
    again = dataset.batch([(epoch, i) for epoch in range(10) for i in range(20)])
    assert torch.equal(batch["image"], again["image"])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_a_locators_flat_crops_hide_is_hidden(k, tmp_path):
    """One landmark spans no area, and two level eyes no height; still nothing of the face may show."""
    Image.fromarray(np.full((200, 200, 3), 10, np.uint8)).save(tmp_path / "a.png")
    picture = np.full((200, 200, 3), 10, np.uint8)
    points = np.stack([np.linspace(80, 120, k) if k > 1 else np.full(1, 100.0), np.full(k, 100.0)], 1)
    points[3::4, 1] += 30
    for x, y in points.astype(int):
        picture[y - 5:y + 6, x - 5:x + 6] = 250
    Image.fromarray(picture).save(tmp_path / "a.png")
    scheme = data.Scheme([f"p{i}" for i in range(k)], [], {}, [], [])
    one = data.Faces(scheme, tmp_path, ["a.png"], np.array([[200, 200]]), np.array([[0, 0, 199, 199.0]]), points[None],
                np.full((1, k), 2), np.array([1]), np.array([1]), [""])
    dataset = DogFLWDataset(one, 64, 1.0, augment=Augmentation(empty=0.9, colour=0, occlusion=0, rotation=0, scale=0.5, shift=0.6))
    batch = dataset.batch([(epoch, 0) for epoch in range(200)])
    flat = batch["image"][(batch["visibility"] == -1).all(1)]
    assert len(flat) > 10 and (flat.numpy() > 150).mean() < 7e-4  # the rims of dots that the crop cut


def test_a_locator_learns_that_pictures_of_the_background_show_no_face(faces, tmp_path):
    whole, colours = faces.whole_pictures(), [(250, 10, 10), (10, 250, 10)]
    for name, size, colour in zip(("a.png", "deep/er/b.jpg"), ((90, 60), (40, 120)), colours):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"left by a Mac")
    (tmp_path / "notes.txt").write_text("no picture")
    said = []
    both = with_background(whole, tmp_path, said.append)
    assert len(both) == len(whole) + 2 and both.sizes[-2:].tolist() == [[90, 60], [40, 120]]
    assert "2 pictures without a face" in said[0] and len(set(both.ids)) == len(both)
    assert with_background(whole, None) is whole
    assert np.isnan(METRICS["nme"](both.points, both, 1.0)[-2:]).all()  # they count in no metric
    dataset = DogFLWDataset(both, 64, 1.0, augment=Augmentation(scale=1.5, empty=0.1))
    last = [len(both) - 2, len(both) - 1] * 20
    batch = dataset.batch([(epoch, i) for epoch, i in enumerate(last)])
    assert (batch["visibility"] == -1).all()  # flat maps are asked for, of every landmark
    shown = [np.abs(crop.astype(int) - colours[n % 2]).max(-1).min() for n, crop in enumerate(batch["image"].numpy())]
    assert np.median(shown) < 80  # colours are the device's, so the picture's own are there
    plain = DogFLWDataset(both, 64, 1.0).batch(last[:2])
    assert (plain["visibility"] == 0).all()
    with pytest.raises(UserError, match="shows a face of --ann-root"):
        with_background(whole, faces.root)
    train, held = whole.take([0, 1]), replace(whole.take([2, 3]), root=tmp_path, files=["a.png", "c.png"])
    with pytest.raises(UserError, match="a.png shows a face of --ann-root"):  # one that chooses, or is scored
        with_background(train, tmp_path, said.append, None, held)
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(UserError, match="c.png"):
        with_background(whole, tmp_path)
