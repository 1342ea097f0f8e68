"""A page in the browser: drop a photo or use the camera, and see the dogs' landmarks.

    uv run tools/demo.py                                   # http://127.0.0.1:7860
    uv run tools/demo.py --checkpoint work_dirs/mine/best_model.pth --host 0.0.0.0 --port 8000

It needs gradio, which uv run installs (with pip: pip install gradio). The page works offline, and answers
only this machine unless --host or --share says otherwise. It offers the bundled model, --checkpoint and
work_dirs/*/best_model.pth; visitors cannot name any other file. Moving the threshold does not run the network
again. A photo and the files made from it are deleted after an hour, and when the server stops.
tools/README.md explains how to make it a Hugging Face Space.
"""
import atexit
import contextlib
import functools
import html
import json
import math
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset import Scheme
from tools.lib.cli import Parser, UserError, check_ranges, run_script
from tools.lib.coco import seen_size
from tools.lib.draw import draw_faces, encode_picture, region_colours, resized
from tools.lib.files import ROOT
from tools.lib.find import FAINT, MIN_SCORE, as_result, checkpoint_file
from tools.lib.pictures import read_image
from train_simple import load_predictor

OLDEST = 6, 18  # the oldest gradio that this page works with, as in pyproject.toml
MAX_BYTES, MAX_PIXELS = 20 * 2 ** 20, 50_000_000  # of a photo
SHOWN = 1280  # longer side of the picture on the page; the download is as large as the photo
TITLE, WELCOME = "Dog face landmarks", "Drop a photo, paste one, or use the camera."
CSS = """
.gradio-container {max-width: 1440px !important; margin: auto; width: 100%}
#message .html-container {padding: 0}
.message {padding: 10px 14px; min-height: 66px; border: 1px solid #9996; border-radius: 8px}
.message.error {border-color: #e02424}
.legend {margin-top: 4px; font-size: 90%} .legend span {margin-right: 12px; white-space: nowrap}
#table span {font: 12.5px system-ui, sans-serif} #table .cell-wrap {padding: 6px 5px}
"""


def import_gradio() -> ModuleType:
    """Import gradio, set to send nothing anywhere, keep no history, and use a folder of this process only.

    Raises UserError if it is missing or too old.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")  # read at its import
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):  # it asks its own page, which no proxy reaches
            del os.environ[name]
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="dogflw_demo_")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    try:
        import gradio
    except ImportError as e:
        raise UserError(f"{e}: pip install gradio, or start with uv run") from None
    if tuple(map(int, gradio.__version__.split(".")[:2])) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise UserError(f"gradio {gradio.__version__} is too old: pip install -U 'gradio>={least}'")
    return gradio


def read_photo(path: str) -> np.ndarray:
    """An upload as (H, W, 3) uint8 RGB. Raises UserError that names no folder of this machine."""
    if not Path(path).is_file():
        raise UserError("The photo was deleted after an hour; drop it again.")
    try:
        size = seen_size(path)  # None where no header tells it
        image = read_image(path) if not size or math.prod(size) <= MAX_PIXELS else None
    except UserError as e:
        raise UserError(str(e).replace(str(path), Path(path).name)) from None
    size = size or image.shape[1::-1]
    if math.prod(size) > MAX_PIXELS:
        raise UserError(f"{Path(path).name}: has {size[0]} x {size[1]} pixels; the most is {MAX_PIXELS:,}")
    return image


def numbered(image: np.ndarray, faces: list[dict], scheme: Scheme, scale: float = 1.0) -> np.ndarray:
    """The picture, resized, with the landmarks of every face; several faces get their numbers."""
    if scale != 1:
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=how)
    faces = resized(faces, scale)
    picture = Image.fromarray(draw_faces(image, faces, scheme))
    size = max(12, max(picture.size) // 32)
    for number, face in enumerate(faces if len(faces) > 1 else [], 1):
        place, font = np.maximum(face["points"].min(0) - size, size / 4), ImageFont.load_default(size)
        ImageDraw.Draw(picture).text(place, str(number), "white", font, stroke_width=size // 8,
                                     stroke_fill="black")
    return np.asarray(picture)


def in_words(faces: list[dict], found: list[dict], scheme: Scheme) -> str:
    """What was found, as HTML: the scores and the colours of the regions, or why no dog was found."""
    if not found:
        return "<b>No dog found.</b> A face should look at the camera and fill a tenth of the photo."
    if not faces:
        best = found[0]["score"]
        return f"<b>No dog found.</b> The best guess scores {best:.2f}: move the threshold down to see it."
    colours, scores = region_colours(scheme), ", ".join(f"{face['score']:.2f}" for face in faces)
    dot = '<span><b style="color: rgb{}">&#9679;</b> {}</span>'
    legend = " ".join(dot.format(colours[indices[0]], html.escape(region))
                      for region, indices in scheme.regions.items() if indices)
    count = f"{len(faces)} dogs found</b>, scores" if len(faces) > 1 else "1 dog found</b>, score"
    return f"<b>{count} {scores}.<div class=legend>{legend}</div>"


def build(models: dict[str, Path | None], device: str = "auto", locator: Path | None = None) -> object:
    """The page, gradio's Blocks. models: {name: checkpoint, None for the bundled one}, default first."""
    load = functools.lru_cache(4)(lambda model: load_predictor(models[model], locator, device))
    load(next(iter(models)))  # so that its errors are reported at the start
    gr = import_gradio()
    from gradio.processing_utils import save_bytes_to_cache

    @functools.lru_cache(64)  # the path is enough: gradio names a photo's folder after its content
    def look(photo: str, model: str) -> list[dict]:
        return load(model)(read_photo(photo), min_score=FAINT)

    def answer(text: str, kind: str = "", shown: str | None = None, files: tuple | list = (None, None),
               rows: tuple | list = ()) -> tuple:
        buttons = [gr.update(value=file, interactive=bool(file)) for file in files]
        return f'<div class="message {kind}">{text}</div>', shown, *buttons, list(rows)

    def find(photo: str | None, model: str, threshold: float) -> tuple:
        """A photo's path, a model's name, the lowest score -> message, picture, files and table."""
        if not photo:
            return answer(WELCOME)
        try:
            if not Path(os.path.realpath(photo)).is_relative_to(os.path.realpath(page.GRADIO_CACHE)):
                raise UserError("The photo was not uploaded here; drop it again.")
            found, scheme, image = look(photo, model), load(model).scheme, read_photo(photo)
        except UserError as e:
            return answer(html.escape(str(e)), "error")
        faces = [face for face in found if face["score"] >= threshold]
        words = in_words(faces, found, scheme)
        if not faces:
            return answer(words)
        results, rows, name = [], [], Path(photo)
        for number, face in enumerate(faces, 1):
            results.append(as_result(face, image_id=1, file_name=name.name, category_id=1))
            keypoints = np.reshape(results[-1]["keypoints"], (-1, 3))
            rows += [[number, landmark, round(x, 1), round(y, 1), round(score, 2)]
                     for landmark, (x, y, score) in zip(scheme.names, keypoints.tolist())]
        on_page = encode_picture(numbered(image, faces, scheme, SHOWN / max(image.shape)), ".jpg")
        contents = {"shown.jpg": on_page, "landmarks.png": encode_picture(numbered(image, faces, scheme)),
                    "landmarks.json": json.dumps(results).encode()}
        shown, *files = (save_bytes_to_cache(content, f"{name.stem}_{kind}", page.GRADIO_CACHE)
                         for kind, content in contents.items())
        return answer(words, "", shown, files, rows)

    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        lay_out(gr, list(models), find, answer(WELCOME)[0])
    return page


def lay_out(gr: ModuleType, models: list[str], find: Callable, welcome: str) -> None:
    """Fill the page: photo and settings, landmarks, table."""
    gr.Markdown(f"# {TITLE}")
    with gr.Row():
        with gr.Column(scale=5, min_width=240):
            photo = gr.Image(label="Photo", type="filepath", height=320, buttons=[],
                             sources=["upload", "webcam", "clipboard"],
                             webcam_options=gr.WebcamOptions(mirror=False))
            photo.preprocess = lambda upload: upload and upload.path  # only read_photo opens it
            threshold = gr.Slider(FAINT, 1, MIN_SCORE, step=0.01, label="Threshold")
            model = gr.Dropdown(models, value=models[0], label="Model")
        with gr.Column(scale=11, min_width=400):
            message = gr.HTML(welcome, elem_id="message")
            shown = gr.Image(label="Landmarks", interactive=False, height=560, buttons=["fullscreen"])
            with gr.Row():
                files = [gr.DownloadButton(f"Download {kind}", interactive=False, size="md")
                         for kind in ("PNG", "JSON")]
        with gr.Column(scale=8, min_width=360):
            table = gr.Dataframe(
                headers=["dog", "landmark", "x", "y", "score"], label="In the photo's pixels",
                datatype=["number", "str", "number", "number", "number"], interactive=False,
                column_widths=["10%", "48%", "15%", "15%", "12%"], max_height=660, elem_id="table")
    asked, told = [photo, model, threshold], [message, shown, *files, table]
    gr.on([photo.change, model.change], find, asked, told, api_name="find")
    threshold.change(find, asked, told, api_name="threshold", trigger_mode="always_last",
                     show_progress="hidden")


def serve(page: object, host: str | None = None, port: int | None = None, share: bool = False) -> str:
    """Start the page's server in its own threads, and return its address. Raises UserError if it cannot.

    share: make an address that the whole internet reaches, through gradio's servers.
    """
    gr = import_gradio()
    try:  # checked here, because gradio would try a hundred ports, whatever the error
        socket.create_server((host or "127.0.0.1", port or 0)).close()
    except (OSError, OverflowError) as e:
        raise UserError(f"--host {host or '127.0.0.1'} --port {port or 'any'}: cannot listen ({e})") from None
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to fetch
    _, local, public = page.queue(max_size=32).launch(
        server_name=host, server_port=port, max_file_size=MAX_BYTES, share=share, ssr_mode=False, css=CSS,
        theme=gr.themes.Default(primary_hue="blue", **fonts), footer_links=[], quiet=True,
        prevent_thread_lock=True)
    if share and not public:
        print("--share: gradio made no public address, for the reason above; the page has only its own:")
    return public or local


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="model selected at first (default: the bundled one)")
    add("--locator", type=Path, metavar="FILE", help="as in predict.py (default: one that fits each model)")
    add("--host", metavar="NAME", help="address to listen on, 0.0.0.0 for all of them (default: 127.0.0.1)")
    add("--port", type=int, metavar="N", help="port to listen on (default: the first free one from 7860 on)")
    add("--share", action="store_true", help="make a public address, good for days, through gradio's servers")
    add("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    check_ranges(args, port="[1, 65535]")
    models = {"pretrained": None}
    if args.checkpoint:
        args.checkpoint = checkpoint_file(args.checkpoint)
        run, name = args.checkpoint.resolve().parent.name, args.checkpoint.stem
        name = run if name == "best_model" else f"{run}/{name}"
        models = {name: args.checkpoint, **({} if name == "pretrained" else models)}
    here, there = (folder.glob("*/best_model.pth") for folder in (Path("work_dirs"), ROOT / "work_dirs"))
    for path in [*sorted(here), *sorted(there)]:
        models.setdefault(path.parent.name, path)
    with contextlib.suppress(ValueError):  # only the main thread can set handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that photos are deleted
    page = build(models, args.device, args.locator)
    print(f"{serve(page, args.host, args.port, args.share)} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_script(main)
