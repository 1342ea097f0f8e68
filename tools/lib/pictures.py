"""Pictures of every kind: a file's format by its first bytes, and its pixels as they are seen."""
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin, features

from tools.lib.cli import UserError
from tools.lib.files import LFS, TABLES

# Listed because Pillow goes by content and also opens formats that are programs (EPS runs Ghostscript).
# AVIF comes with Pillow 11.3.
AVIF = ("AVIF",) if "avif" in features.modules and features.check_module("avif") else ()
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM") + AVIF
GREY = (124, 116, 104)  # ImageNet's mean: seen through transparent pixels, and outside a picture in crops
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB from 0 to 1
MOST_SCANS = 2000  # of a JPEG; programs make about ten, and each takes time
LARGEST_JPEG = 500_000_000  # pixels: a progressive one takes three bytes each, however small it is read
# Pillow's remarks about odd but readable files; a program's own filters come first.
warnings.filterwarnings("ignore", module="PIL", append=True)

# What Pillow does not read, and the way on.
UNREAD = {
    "HEIC": "pip install pillow-heif, or convert it to JPEG",
    "AVIF": "pip install --upgrade 'pillow>=11.3', or convert it to JPEG",
    "JPEG XL": "convert it to JPEG",
    "JPEG 2000": "convert it to JPEG",
    "Photoshop": "export it as JPEG or PNG",
    "SVG": "export it as PNG",
    "PDF": "export its pages as PNG",
    "raw camera": "develop it to JPEG first",
}
# Offset in a file, the bytes there, and the format that they mean; the first match counts.
HEADS = [
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG\r\n", "PNG"), (0, b"GIF8", "GIF"), (8, b"WEBP", "WebP"),
    (8, b"CR\x02\x00", "raw camera"), (0, b"FUJIFILMCCD-RAW", "raw camera"), (0, b"IIU\x00", "raw camera"),
    (0, b"IIRO", "raw camera"), (0, b"II*\x00", "TIFF"), (0, b"MM\x00*", "TIFF"), (0, b"II+\x00", "TIFF"),
    (0, b"MM\x00+", "TIFF"), (0, b"8BPS", "Photoshop"), (0, b"%PDF", "PDF"),
    (4, b"jP  \r\n", "JPEG 2000"), (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL \r\n", "JPEG XL"),
    (8, b"AVI ", "video"), (0, b"\x1aE\xdf\xa3", "video"), (0, b"0&\xb2u\x8ef\xcf\x11", "video"),
    (0, b"FLV\x01", "video"), (0, b"\x00\x00\x01\xba", "video"), (0, b"\x00\x00\x01\xb3", "video"),
    (4, b"moov", "video"), (4, b"mdat", "video"), (4, b"wide", "video"),
]
# Where the first bytes say nothing (a damaged or empty file), and for the camera makers' variants of TIFF.
SUFFIXES = {suffix: kind for kind, suffixes in {
    "JPEG": "jpg jpeg jpe jfif jif mpo", "PNG": "png", "WebP": "webp", "GIF": "gif", "BMP": "bmp dib",
    "TIFF": "tif tiff", "PPM": "pbm pgm ppm pnm", "HEIC": "heic heif hif", "AVIF": "avif", "JPEG XL": "jxl",
    "JPEG 2000": "jp2 j2k", "Photoshop": "psd psb", "SVG": "svg", "PDF": "pdf",
    "raw camera": "cr2 cr3 nef nrw arw dng orf rw2 raf pef srw",
    "video": "mp4 mov avi mkv webm m4v wmv asf flv mpg mpeg mts m2ts 3gp ogv vob mxf y4m h264 264 h265 265 "
             "hevc mjpeg mjpg dv m2v f4v divx",
}.items() for suffix in suffixes.split()}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def format_of(path: Path | str) -> str:
    """A picture format's name, "video", or "" for anything else: by a file's content, else by its suffix."""
    suffix = SUFFIXES.get(Path(path).suffix[1:].lower(), "")
    try:
        with open(path, "rb") as file:
            head = file.read(192)
    except OSError:
        return suffix
    if suffix == "raw camera" or Path(path).suffix.lower() in (".mjpeg", ".mjpg"):  # TIFFs; JPEGs in a row
        return suffix
    if head[4:8] == b"ftyp":  # an ISO media file: its brands say whether it is a picture
        end = min(len(head), int.from_bytes(head[:4], "big"))
        brands = {head[8:12], *(head[i:i + 4] for i in range(16, end, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & HEIC_BRANDS:
            return "HEIC"
        return "raw camera" if b"crx " in brands else "" if head[8:11] in (b"M4A", b"M4B") else "video"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace() and suffix != "":
        return "PPM"
    if head[:4] == b"OggS":
        return "video" if b"theora" in head else ""
    if head[:1] == b"G" and head[188:189] == b"G" and head[:4] != b"GIF8":
        return "video"  # an MPEG transport stream: packets of 188 bytes
    return next((name for start, magic, name in HEADS if head[start:start + len(magic)] == magic), suffix)


def read_image(path: Path | str) -> np.ndarray:
    """Decode a picture of any kind: (H, W, 3) uint8 RGB, upright, as one sees it. Raises UserError naming it.

    The rules are `read_picture`'s.
    """
    return read_picture(path)[0]


def read_picture(path: Path | str, at_most: float = math.inf) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a picture: ((h, w, 3) uint8 RGB, its own (width, height)). Raises UserError naming it.

    It is turned upright by its EXIF tag. An animation gives its first frame; transparent pixels show GREY.
    `to_8_bits` maps values of more bits. A picture of more than `at_most` pixels is returned smaller: a JPEG
    is decoded right away at a half, a quarter or an eighth, so that memory stays bounded; others are decoded
    whole first, and refused where Pillow takes them for a decompression bomb (179 megapixels).
    """
    try:
        return decode(path, at_most)
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture, or a broken link; mend it, or check --data-root") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a picture") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; mend its permissions") from None
    except (MemoryError, Image.DecompressionBombError):
        raise UserError(f"{path}: has too many pixels to decode at once; make it smaller, as by: "
                        "magick IN -resize 50% OUT.jpg") from None
    except Exception as e:  # reading damaged or hostile bytes can raise almost anything
        kind = format_of(path)
        if kind == "video":
            raise UserError(f"{path}: is a video, not a picture; tools/predict.py takes it") from None
        if kind in UNREAD and not can_read(kind):
            raise UserError(f"{path}: {kind} is not a format read here; {UNREAD[kind]}") from None
        why, mend = str(e)[:80] or type(e).__name__, "restore it or convert again"
        if isinstance(e, Image.UnidentifiedImageError):
            why, mend = instead_of_picture(path) or ("no picture format known here, or damaged", mend)
        raise UserError(f"{path}: cannot be read as a picture ({why}); {mend}") from None


def instead_of_picture(path: Path | str) -> tuple[str, str] | None:
    """What often lies in a picture's place: (what it is, what to do), or None."""
    with open(path, "rb") as file:
        begin = file.read(64).lower()
    if not begin:
        return "it is empty", "copy it again"
    if begin.startswith(LFS):
        return "it is a pointer of Git LFS", "run git lfs pull"
    if begin.lstrip().startswith((b"<!doctype html", b"<html")):
        return "it is a web page", "download the picture itself"
    if begin.startswith((b"pk\3\4", b"\x1f\x8b")):
        return "it is a packed file", "unpack it"
    if Path(path).suffix.lower() in TABLES:
        return "it is a text file", "name the pictures themselves"
    return None


def can_read(kind: str) -> bool:
    """Whether one of UNREAD is read after all: HEIC by the optional pillow-heif, AVIF by a new Pillow."""
    if kind == "HEIC":
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return False
        register_heif_opener()
        return True
    return kind in FORMATS


def decode(path: Path | str, at_most: float) -> tuple[np.ndarray, tuple[int, int]]:
    """`read_picture` without its error messages."""
    with open(path, "rb") as file:  # given a name, Pillow would map a TIFF into memory and turn it wrongly
        image = open_picture(path, file, at_most)
        colours_of_16_bits, own = ";16" in str(getattr(image, "tile", "")), None
        if math.prod(image.size) > at_most and isinstance(image, JpegImagePlugin.JpegImageFile):
            own = image.size
            step = next((s for s in (2, 4) if math.prod(own) <= at_most * s * s), 8)
            image.draft(None, (own[0] // step, own[1] // step))
        tags = dict(getattr(image, "tag_v2", {}))  # of a TIFF, which drops some while it loads
        if tags.get(284) == 2 and max(tags.get(258, [8])) > 8:  # Pillow takes the bytes for 8 bits each
            raise ValueError("more than 8 bits a colour in separate planes")
        image.load()
        own = own or image.size
        turn = orientation(image)  # now: a TIFF turns itself while it loads, and drops the tag
        if image.mode[0] in "IF":
            values = np.asarray(image)
            if tags.get(262) == 0 and values.dtype.kind == "u":  # 0 is white; Pillow minds it only in 8 bits
                values = np.iinfo(values.dtype).max - values
            image = Image.fromarray(to_8_bits(values))
        elif colours_of_16_bits:
            image = Image.fromarray(decode_deep(path))
        transparent = image.has_transparency_data
        image = image.convert("RGBA" if transparent else "RGB")
        shrink = math.ceil(math.sqrt(math.prod(image.size) / at_most))
        if shrink > 1:  # `reduce` is exact only where `shrink` divides the sides
            image = image.resize([math.ceil(side / shrink) for side in image.size], Image.Resampling.BOX)
        if transparent:
            ground = Image.new("RGB", image.size, GREY)
            ground.paste(image, mask=image.getchannel("A"))
            image = ground
        pixels = np.ascontiguousarray(TURNS.get(turn, TURNS[1])(np.asarray(image)))
        return pixels, own[::-1] if turn in (5, 6, 7, 8) else own


def orientation(image: Image.Image) -> int:
    """EXIF's tag of that name, 1 to 8 as a rule; 1 where there is none, or EXIF is damaged."""
    try:
        return image.getexif().get(0x112, 1)
    except Exception:  # Pillow's parsers raise nearly anything; the pixels may be intact
        return 1


# The EXIF tag Orientation -> what brings the rows and columns upright.
TURNS = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
         7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a)}


def open_picture(path: Path | str, file: BinaryIO, at_most: float) -> Image.Image:
    """The picture as Pillow opens it: its header is read, its pixels are not."""
    kind = format_of(path)
    readable = can_read(kind) if kind in UNREAD else True
    if file.read(2) == b"\xff\xd8" and file.read().count(b"\xff\xda") > MOST_SCANS:
        raise ValueError(f"more than {MOST_SCANS} scans")
    file.seek(0)
    try:
        return Image.open(file, formats=FORMATS + (("HEIF",) if kind == "HEIC" and readable else ()))
    except Image.DecompressionBombError:
        if kind != "JPEG" or at_most == math.inf:
            raise
        file.seek(0)
        image = JpegImagePlugin.JpegImageFile(file)  # is no bomb when it is read smaller
        if math.prod(image.size) > LARGEST_JPEG:
            raise
        return image
    except Image.UnidentifiedImageError:
        if kind != "TIFF":
            raise
        check_tiff(file)
        return Image.fromarray(decode_deep(path))  # colours of 32 bits


def check_tiff(file: BinaryIO):
    """Raises DecompressionBombError where Pillow would: OpenCV's own limit is six times as high."""
    file.seek(0)
    head = file.read(8)
    order = head[:2]
    if 43 in head[2:4]:  # a BigTIFF, which Pillow knows by the third byte, whatever the order
        head = b"II+\0" + head[4:] + file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head, order)
    file.seek(tags.next)
    tags.load(file)
    if tags.get(256, 0) * tags.get(257, 0) > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError


def decode_deep(path: Path | str) -> np.ndarray:
    """A picture of which Pillow would keep only the upper 8 bits: (H, W) or (H, W, 3 or 4) uint8."""
    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("damaged, or a kind that OpenCV does not know")
    if values.ndim == 2:
        return to_8_bits(values)
    full = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    alpha = (values[..., 3:] / full * 255).astype(np.uint8)
    return np.concatenate([to_8_bits(values[..., 2::-1]), alpha], axis=2)


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Numbers of any kind -> uint8 of the same shape.

    A file says how many bits hold a value, not how many of them the camera used. So the largest value
    decides: the whole range is the least power of two with an even exponent that holds it, 2^8, 2^10, 2^12,
    2^14, 2^16 or more, and is mapped to 0..255. Floats that do not exceed 1 count as fractions. Negative,
    NaN and infinite values are black.
    """
    values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
    top = values.max(initial=0)
    if values.dtype.kind == "f" and top <= 1:
        return (values.clip(0) * 255).round().astype(np.uint8)
    bits = max(8, int(top).bit_length() + int(top).bit_length() % 2)
    return (values.clip(0) // 2 ** (bits - 8)).astype(np.uint8)
