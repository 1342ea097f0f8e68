"""tools/lib/pictures.py: pictures of every kind come as one sees them, and what cannot be read is called by its name."""
import struct
import sys
import types

import cv2
import numpy as np
import pytest
from PIL import Image

from tools.lib import pictures
from tools.lib.cli import UserError
from tools.lib.coco import header
from tools.lib.pictures import AVIF, GREY, format_of, read_image, read_picture, to_8_bits

ISO = bytes.fromhex("00000018667479706865696300000000") + b"mif1heic" + bytes(2000)  # as every iPhone photo begins


@pytest.fixture(scope="module")
def image():
    """A light disc on a colour gradient, RGB (48, 64, 3)."""
    y, x = np.mgrid[:48, :64]
    disc = ((x - 40) ** 2 + (y - 20) ** 2 < 150) * 60
    return np.dstack([100 + x + disc, 120 + y + disc, 90 + x // 2 + disc]).astype(np.uint8)


def near(read, image, tolerance=0):
    return read.shape == image.shape and np.abs(read.astype(int) - image).max() <= tolerance


def test_every_mode_and_depth(image, tmp_path):
    grey, deep, upright = image[..., 0], image.astype(np.uint16) * 257, Image.fromarray(image)
    as_grey = np.dstack([grey] * 3)
    for name, values in {"rgb16.png": deep, "rgb16.tif": deep, "rgb12.png": deep // 16, "rgb12.tif": deep // 16,
                         "rgb32.tif": image.astype(np.float32) / 255, "half.tif": image.astype(np.float32)}.items():
        cv2.imwrite(str(tmp_path / name), values[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 1])  # older ones lose by theirs
        assert near(read_image(tmp_path / name), image, 1), name
    opaque = np.full_like(deep[..., :1], 65535)
    cv2.imwrite(str(tmp_path / "rgba16.png"), np.concatenate([deep[..., ::-1], opaque], 2))
    assert near(read_image(tmp_path / "rgba16.png"), image)
    for name, values in {"grey16.png": deep[..., 0], "grey12.png": deep[..., 0] // 16, "grey16.tif": deep[..., 0],
                         "float.tif": grey.astype(np.float32), "fractions.tif": grey / np.float32(255)}.items():
        cv2.imwrite(str(tmp_path / name), values)
        assert near(read_image(tmp_path / name), as_grey, 1), name
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "int32.tif")
    Image.fromarray(grey.astype(np.int32) * 2**20).save(tmp_path / "full32.tif")
    for name in ("int32.tif", "full32.tif"):
        assert near(read_image(tmp_path / name), as_grey), name
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    upright.save(tmp_path / "plain.ppm")
    upright.save(tmp_path / "plain.bmp")
    upright.save(tmp_path / "moving.webp", save_all=True, append_images=[upright.rotate(90)], lossless=True)
    upright.quantize(128).save(tmp_path / "moving.gif", save_all=True, append_images=[upright.rotate(90).quantize(128)])
    upright.save(tmp_path / "portrait_mode.jpg", format="MPO", save_all=True, append_images=[upright], quality=95)
    for name in ("cmyk.jpg", "plain.ppm", "plain.bmp", "moving.webp", "moving.gif", "portrait_mode.jpg"):
        assert np.abs(read_image(tmp_path / name).astype(int) - image).mean() < 4, name


def test_the_largest_value_says_how_many_bits_there_are():
    for top, bits in ((1, 8), (255, 8), (256, 10), (1023, 10), (4095, 12), (16383, 14), (65535, 16)):
        assert to_8_bits(np.array([0, top], np.uint16)).tolist() == [0, top >> (bits - 8)]
    assert to_8_bits(np.array([-5, 1 << 30], np.int32)).tolist() == [0, 64]
    assert to_8_bits(np.array([np.nan, -1, 0.5, 1])).tolist() == [0, 0, 128, 255]
    assert to_8_bits(np.array([-np.inf, np.inf, 4095.0])).tolist() == [0, 0, 255]
    assert to_8_bits(np.zeros((0, 3))).shape == (0, 3)


def test_what_is_transparent_is_grey(image, tmp_path):
    alpha = np.zeros(image.shape[:2], np.uint8)
    alpha[:, 32:] = 255
    cut_out = Image.fromarray(np.dstack([image, alpha]))
    cut_out.save(tmp_path / "rgba.png")
    cut_out.save(tmp_path / "rgba.webp", lossless=True)
    for name in ("rgba.png", "rgba.webp"):
        read = read_image(tmp_path / name)
        assert near(read[:, 32:], image[:, 32:]) and (read[:, :32] == GREY).all(), name
    palette = Image.fromarray(np.repeat([[0, 1]], 8, 0).astype(np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert (read_image(tmp_path / "palette.gif") == [GREY, (200, 100, 50)]).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_upright_by_exif_in_every_format(image, turn, tmp_path):
    def tagged():
        exif = Image.Exif()
        exif[0x112] = turn
        return exif  # a new one a file: saving AVIF takes the tag out of it
    expected = pictures.TURNS[turn](image)
    for name, options in (("a.png", {}), ("a.tif", {}), ("a.webp", {"lossless": True}), ("a.jpg", {"quality": 95}),
                          *((("a.avif", {"quality": 95}),) if AVIF else ())):
        Image.fromarray(image).save(tmp_path / name, exif=tagged(), **options)
        read, size = read_picture(tmp_path / name)
        assert size == expected.shape[1::-1] and near(read, expected, 0 if name in ("a.png", "a.tif", "a.webp") else 40), name
    for mode, values in (("L", image[..., 0]), ("I;16", image[..., 0] * np.uint16(257))):  # Pillow maps these into memory
        Image.fromarray(values).save(tmp_path / "grey.tif", exif=tagged())
        assert near(read_image(tmp_path / "grey.tif")[..., 0], pictures.TURNS[turn](image[..., 0])), mode


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("damaged", [b"", b"II", b"no TIFF header at all", b"II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_turns_nothing(image, name, damaged, tmp_path):
    Image.fromarray(image).save(tmp_path / name, exif=b"Exif\0\0" + damaged, dpi=(72, 72), lossless=True, quality=95)
    assert near(read_image(tmp_path / name), image, 0 if "jpg" not in name else 40) and header(tmp_path / name) == ((64, 48), 0)


def test_a_large_picture_is_read_smaller(image, tmp_path, monkeypatch):
    large = cv2.resize(image, (640, 480))
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(large).save(tmp_path / "large.jpg", quality=95, exif=exif)
    Image.fromarray(large).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.jpg").shape == (640, 480, 3)
    for most, side in ((640 * 480, 640), (640 * 480 - 1, 320), (160 * 120, 160), (160 * 120 - 1, 80), (999, 27)):
        pixels, size = read_picture(tmp_path / "large.jpg", most)
        assert size == (480, 640) and pixels.shape[0] == side, most
    pixels, size = read_picture(tmp_path / "large.png", 100_000)
    assert size == (640, 480) and pixels.shape == (240, 320, 3)
    odd = np.zeros((7, 1003, 3), np.uint8)  # 1003 is no multiple of 4
    odd[:, 981:1000] = 255
    Image.fromarray(odd).save(tmp_path / "odd.png")
    pixels, size = read_picture(tmp_path / "odd.png", 7 * 1003 / 16)
    place = (np.arange(pixels.shape[1]) * pixels[0, :, 0]).sum() / pixels[0, :, 0].sum()
    assert (place + 0.5) * size[0] / pixels.shape[1] - 0.5 == pytest.approx(990, abs=0.4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 480 // 3)  # twice as many are refused
    assert read_picture(tmp_path / "large.jpg", 100_000)[0].shape == (320, 240, 3)
    for name, most in (("large.jpg", np.inf), ("large.png", 100_000)):
        with pytest.raises(UserError, match=f"{name}: has too many pixels.*make it smaller"):
            read_picture(tmp_path / name, most)
    monkeypatch.setattr(pictures, "LARGEST_JPEG", 1000)
    with pytest.raises(UserError, match="too many pixels"):
        read_picture(tmp_path / "large.jpg", 100_000)


def test_a_small_file_of_too_much_work_is_refused(image, tmp_path, monkeypatch):
    """Colours of 32 bits, which OpenCV reads, in a TIFF and a BigTIFF; the scans of a progressive JPEG."""
    cv2.imwrite(str(tmp_path / "deep.tif"), image.astype(np.float32))
    tags = {256: (4, 64), 257: (4, 48)}
    entries = b"".join(struct.pack("<HHQQ", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    (tmp_path / "big.tif").write_bytes(struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)) + entries + bytes(8))
    entries = b"".join(struct.pack(">HHQQ", tag, 16, 1, value) for tag, (_, value) in tags.items())
    (tmp_path / "motorola.tif").write_bytes(struct.pack(">2sHHHQQ", b"MM", 43, 8, 0, 16, len(tags)) + entries + bytes(8))
    assert read_image(tmp_path / "deep.tif").shape == image.shape
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    for name in ("deep.tif", "big.tif", "motorola.tif"):
        with pytest.raises(UserError, match=f"{name}: has too many pixels"):
            read_image(tmp_path / name)
    monkeypatch.undo()
    for name, progressive in (("plain.jpg", False), ("progressive.jpg", True)):
        Image.fromarray(image).save(tmp_path / name, progressive=progressive)
        assert read_image(tmp_path / name).shape == image.shape
    monkeypatch.setattr(pictures, "MOST_SCANS", 5)
    assert read_image(tmp_path / "plain.jpg").shape == image.shape
    head, scan = (tmp_path / "plain.jpg").read_bytes().split(b"\xff\xda")
    (tmp_path / "scans.jpg").write_bytes(head + 9 * (b"\xff\xda" + scan[:-2]) + b"\xff\xd9")  # none of them progressive
    for name, most in (("progressive.jpg", np.inf), ("scans.jpg", np.inf), ("progressive.jpg", 1000)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if most < np.inf else None)
        with pytest.raises(UserError, match="more than 5 scans"):
            read_picture(tmp_path / name, most)


def test_a_file_is_what_its_content_says(image, tmp_path):
    upright = Image.fromarray(image)
    for kind, suffix in (("JPEG", "jfif"), ("JPEG", "HEIC"), ("PNG", "jpg"), ("WebP", "jpg"), ("GIF", "mp4"), ("BMP", ""),
                         ("TIFF", "dat"), ("PPM", "ppm")):
        path = tmp_path / f"{kind}.{suffix}"
        upright.save(path, format=kind)
        assert format_of(path) == kind and np.abs(read_image(path).astype(int) - image).mean() < 3
    for content, name, kind in (
            (ISO, "IMG_0001.HEIC", "HEIC"), (ISO, "renamed.jpg", "HEIC"), (ISO.replace(b"heic", b"avif"), "a.avif", "AVIF"),
            (ISO.replace(b"heic", b"isom").replace(b"mif1", b"mp42"), "clip.jpg", "video"), (b"8BPS\0\1", "a.psd", "Photoshop"),
            (b"%PDF-1.7", "a.pdf", "PDF"), (b"\x1aE\xdf\xa3" + bytes(40), "a.webm", "video"), (b"<svg", "a.svg", "SVG"),
            (b"II*\0" + bytes(20), "a.dng", "raw camera"), (b"RIFF\0\0\0\0AVI LIST", "clip", "video"),
            (b"0&\xb2u\x8ef\xcf\x11" + bytes(9), "clip.dat", "video"), (b"G" + bytes(187) + b"G", "a.ts", "video"),
            (b"GIF89a" + bytes(182) + b"G", "a.gif", "GIF"),
            (b"", "empty.mp4", "video"), (b"", "empty.jpg", "JPEG"), (b"hello", "notes.txt", ""), (b"P1 is", "P1", ""),
            (b"BMW", "car.txt", ""), (b"GREAT", "note", ""), (ISO.replace(b"heic", b"M4A ").replace(b"mif1", b"isom"), "song.m4a", "")):
        (tmp_path / name).write_bytes(content)
        assert format_of(tmp_path / name) == kind, name
    assert format_of(tmp_path / "missing.png") == "PNG" and format_of(tmp_path) == ""


def test_what_cannot_be_read_is_named_with_the_way_on(image, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.fromarray(image).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, content, wanted in (
            ("IMG_0001.HEIC", ISO, "HEIC.*pip install pillow-heif, or convert it to JPEG"), ("a.psd", b"8BPS", "Photoshop.*export"),
            ("a.dng", b"II*\0", "raw camera.*develop"), ("clip.jpg", b"\x1aE\xdf\xa3", "is a video"), ("empty.png", b"", "it is empty"),
            ("cut.jpg", whole[:len(whole) // 2], "(?i:truncated)"), ("a.tif", b"II*\0\xff\xff\xff\x7f", "cannot be read as a picture"),
            ("broken.avif", ISO.replace(b"heic", b"avif"), "cannot be read as a picture|AVIF is not")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*({wanted})") as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
    for path, wanted in ((tmp_path / "no.jpg", "no such picture"), (tmp_path / "no.heic", "no such picture"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=wanted):
            read_image(path)
    monkeypatch.setattr(pictures, "FORMATS", tuple(f for f in pictures.FORMATS if f != "AVIF"))
    with pytest.raises(UserError, match="AVIF is not a format read here; pip install --upgrade"):
        read_image(tmp_path / "broken.avif")


def test_heic_is_read_where_pillow_heif_is_installed(image, tmp_path, monkeypatch):
    """By a stand-in for the package, which is no dependency."""
    def register():
        Image.register_open("HEIF", lambda file, name: Image.fromarray(image), lambda head: head[4:12] == b"ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    (tmp_path / "IMG_0001.HEIC").write_bytes(ISO)
    assert near(read_image(tmp_path / "IMG_0001.HEIC"), image)
    del Image.OPEN["HEIF"]
    Image.ID.remove("HEIF")


def test_what_lies_in_a_pictures_place_is_called_by_its_name(tmp_path):
    for content, why in ((b"", r"it is empty\); copy it"), (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
                         (b"\n<!DOCTYPE html><html>404", r"it is a web page\); download the picture itself"),
                         (b"PK\3\4", r"it is a packed file\); unpack it")):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UserError, match=f"a.jpg: cannot be read as a picture .*{why}"):
            read_image(tmp_path / "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(UserError, match="it is a text file.*name the pictures"):
        read_image(tmp_path / "list.txt")


def test_scans_whose_zero_is_white_and_planes_of_16_bits(image, tmp_path):
    tifffile = pytest.importorskip("tifffile")  # scikit-image brings it
    grey = image[..., 0].astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "white.tif", 65535 - grey, photometric="miniswhite")
    assert near(read_image(tmp_path / "white.tif"), np.dstack([image[..., 0]] * 3), 1)
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(image, 2, 0).astype(np.uint16) * 257, photometric="rgb",
                     planarconfig="separate")
    with pytest.raises(UserError, match="planes.tif: cannot be read .*separate planes"):
        read_image(tmp_path / "planes.tif")
