"""tools/demo.py: its server in a process of its own, asked over HTTP as the page in the browser asks it."""
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import FORKS, ROOT, wait_for
from PIL import Image

from tools import demo as tool
from tools.lib.cli import UserError
from tools.lib.pictures import read_image


class Dogs:
    """A predictor that finds a dog for each of these scores, and writes a line to a file at each turn."""

    def __init__(self, scheme, turns, scores):
        self.scheme, self.turns, self.scores = scheme, turns, scores

    def __call__(self, image, boxes=None, min_score=0.5):
        with open(self.turns, "a") as file:
            print("turn", file=file)
        count = len(self.scheme.names)
        points = 20 + 15 * np.column_stack([np.cos(np.arange(count)), np.sin(np.arange(count))])
        return [{"box": np.array([30.0 * n, 0, 40, 40]), "points": points + [30 * n, 0], "score": score,
                 "scores": np.full(count, score)}
                for n, score in enumerate(self.scores) if score >= min_score]


def serve(folder, trained, pipe):
    """In a process: the page with three models and a broken one; its address and more go into the pipe."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")  # the process ends without its clean-up
    load = tool.load_predictor
    scheme = load(trained, device="cpu").scheme
    two, none = Dogs(scheme, folder / "turns", [0.9, 0.6, 0.3, 0.05]), Dogs(scheme, folder / "turns", [])
    tool.load_predictor = lambda model, locator, device: model if type(model) is Dogs else load(model, locator, device)
    page = tool.build({"two": two, "none": none, "trained": trained, "broken": folder / "broken.pth"}, "cpu")
    url = tool.serve(page)
    try:
        busy = tool.serve(tool.build({"none": none}), port=int(url.split(":")[-1].strip("/")))
    except UserError as e:
        busy = str(e)
    pipe.send({"url": url, "names": scheme.names, "busy": busy, "private": (page.share, page.delete_cache)})
    pipe.recv()


@pytest.mark.parametrize("public", ["https://a.gradio.live", None])
def test_a_public_address_only_where_asked_for(capsys, public):
    asked = []

    class Page:
        def queue(self, **_):
            return self

        def launch(self, share, **_):
            asked.append(share)
            return None, "http://127.0.0.1:7860/", public if share else None
    assert tool.serve(Page()) == "http://127.0.0.1:7860/" and capsys.readouterr().out == ""
    assert tool.serve(Page(), share=True) == (public or "http://127.0.0.1:7860/") and asked == [False, True]
    said = capsys.readouterr().out
    assert ("no public address" in said) == (public is None) and "only this machine" not in said  # --host may be 0.0.0.0
    assert "--share" in tool.__doc__


def answer_of(url, photo, model, threshold):
    """Upload a photo and ask for its landmarks, in gradio's HTTP interface."""
    def post(path, body, kind):
        request = urllib.request.Request(f"{url}gradio_api/{path}", body, {"Content-Type": kind})
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
    file = photo if isinstance(photo, dict) else None
    if photo and not file:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{photo.name}"\r\n\r\n'
        body = head.encode() + photo.read_bytes() + b"\r\n--x--\r\n"
        path, = post("upload", body, "multipart/form-data; boundary=x")
        file = {"path": path, "orig_name": photo.name, "meta": {"_type": "gradio.FileData"}}
    asked = {"data": [file, model, threshold]}
    event = post("call/find", json.dumps(asked).encode(), "application/json")["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/find/{event}") as stream:
        kind, data = re.findall(r"event: (complete|error)\ndata: (.*)", stream.read().decode())[-1]
    if kind == "error":
        return SimpleNamespace(error=data)
    message, shown, png, predictions, table = json.loads(data)
    buttons = [button["value"] and fetch(button["value"]["url"]) for button in (png, predictions)]
    return SimpleNamespace(
        text=re.sub(r"<div class=legend.*|<[^>]*>", "", message), shown=shown and fetch(shown["url"]),
        png=buttons[0], json=buttons[1], on=png["interactive"], rows=table["data"])


def fetch(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def pixels(folder, content):
    (folder / "fetched").write_bytes(content)
    return read_image(folder / "fetched")


@pytest.fixture(scope="module")
def demo(run, tmp_path_factory):
    """The page: .url, .find(photo, model, threshold), .names of landmarks, .photo, .turns, an error .busy."""
    folder, (ours, theirs) = tmp_path_factory.mktemp("demo"), FORKS.Pipe()
    (folder / "broken.pth").write_bytes(b"no checkpoint")
    photo = next((run.data_root / "test" / "images").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "cache"))
        args = folder, run.work_dir / "best_model.pth", theirs
        process = FORKS.Process(target=serve, args=args, daemon=True)
        process.start()
        theirs.close()
    assert ours.poll(150)
    told = ours.recv()
    yield SimpleNamespace(**told, photo=photo, turns=folder / "turns",
                          find=lambda *asked: answer_of(told["url"], *asked))
    ours.send("enough")
    process.join(10)
    process.kill()


def test_photo_gives_landmarks_scores_table_and_downloads(demo, tmp_path):
    answer = demo.find(demo.photo, "two", 0.5)
    assert answer.text == "2 dogs found, scores 0.90, 0.60."
    photo, overlay = read_image(demo.photo), pixels(tmp_path, answer.png)
    assert overlay.shape == photo.shape and (overlay != photo).any()
    assert max(pixels(tmp_path, answer.shown).shape) == tool.SHOWN
    results = json.loads(answer.json)
    assert [r["score"] for r in results] == [0.9, 0.6] and results[0]["file_name"] == demo.photo.name
    keypoints, count = np.reshape(results[1]["keypoints"], (-1, 3)), len(demo.names)
    assert answer.rows[0][:2] == [1, demo.names[0]] and len(answer.rows) == 2 * count
    assert np.allclose([row[2:] for row in answer.rows[count:]], keypoints, atol=0.051)
    at = 20 + 15 * np.column_stack([np.cos(np.arange(count)), np.sin(np.arange(count))])  # Dogs' landmarks
    assert np.allclose(keypoints[:, :2], at + [30, 0], atol=1e-3) and results[1]["bbox"] == [30, 0, 40, 40]
    only = pixels(tmp_path, demo.find(demo.photo, "two", 0.7).shown).astype(int)
    scale = tool.SHOWN / max(photo.shape)
    plain = cv2.resize(photo, only.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    drawn = np.argwhere(np.abs(only - plain).max(-1) > 80)[:, ::-1]
    assert len(drawn) > 50 and np.abs(np.median(drawn, 0) - 20 * scale).max() < 12


def test_threshold_filters_without_another_look(demo):
    demo.find(demo.photo, "two", 0.5)
    turns = demo.turns.read_text()
    assert demo.find(demo.photo, "two", 0.2).text.startswith("3 dogs found")  # below predict.py's least score
    assert demo.find(demo.photo, "two", 0.7).text == "1 dog found, score 0.90."
    hidden = demo.find(demo.photo, "two", 0.95)
    assert hidden.text == "No dog found. The best guess scores 0.90: move the threshold down to see it."
    assert hidden.shown is None and hidden.rows == [] and not hidden.on
    assert demo.turns.read_text() == turns


def test_photo_without_a_dog_says_so(demo):
    answer = demo.find(demo.photo, "none", 0.5)
    assert answer.text.startswith("No dog found. A face should") and answer.png is None and answer.rows == []
    assert demo.find(None, "none", 0.5).text == tool.WELCOME


def test_trained_checkpoint_looks_at_the_photo(demo):
    assert re.match(r"(No|\d+) dogs? found", demo.find(demo.photo, "trained", 0.2).text)


def test_what_is_no_picture_is_refused_in_one_sentence(demo, tmp_path):
    cut = demo.photo.read_bytes()[:300]
    for name, content in (("notes.png", b"hello"), ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0"), ("cut.png", cut),
                          ("icon.svg", b"<svg/>"), ("empty.jpg", b""), ("<b>.png", b"")):
        (tmp_path / name).write_bytes(content)
        answer = demo.find(tmp_path / name, "two", 0.5)
        assert "\n" not in answer.text and "/" not in answer.text and answer.rows == [], answer.text
        assert re.match(r"\S+: (cannot be read|SVG is not a format read here)", answer.text), answer.text
    Image.new("1", (8000, 7000)).save(tmp_path / "large.png")
    answer = demo.find(tmp_path / "large.png", "two", 0.5)
    assert answer.text == "large.png: has 8000 x 7000 pixels; the most is 50,000,000"


def test_upload_is_bounded(demo, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(tool.MAX_BYTES + 1))
    with pytest.raises(urllib.error.HTTPError, match="413") as e:
        demo.find(tmp_path / "large.png", "two", 0.5)
    e.value.close()


def test_a_visitor_chooses_among_the_models_only(demo, run):
    for model in ("/etc/passwd", "../broken.pth", str(run.work_dir / "best_model.pth")):
        turns = demo.turns.read_text()
        assert demo.find(demo.photo, model, 0.5).error and demo.turns.read_text() == turns
    turns = demo.turns.read_text()
    for path in ("/etc/passwd", str(demo.photo), "/no/such.png"):  # not even whether it is there
        answer = demo.find({"path": path}, "two", 0.5)
        assert answer.error if hasattr(answer, "error") else answer.text == "The photo was not uploaded here; drop it again."
    assert demo.turns.read_text() == turns
    answer = demo.find(demo.photo, "broken", 0.5)
    assert "broken.pth: not loaded" in answer.text and answer.png is None


def test_page_is_local(demo):
    page, style, config = (fetch(demo.url + name).decode() for name in ("", "theme.css", "config"))
    fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']([^\"']*)", page)
    fetched += re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]*)", style)
    assert [a for a in fetched if re.match("(https?:)?//", a) and not a.startswith(demo.url)] == []
    assert demo.private == (False, (600, 3600))  # no tunnel to it; photos are deleted after an hour
    assert json.loads(config)["analytics_enabled"] is False and demo.url.startswith("http://127.0.0.1:")


def test_models_are_the_one_in_the_box_and_those_of_work_dirs(tmp_path, monkeypatch):
    for name in ("b", "a", "pretrained"):
        (tmp_path / "work_dirs" / name).mkdir(parents=True)
        (tmp_path / "work_dirs" / name / "best_model.pth").touch()
    monkeypatch.chdir(tmp_path)
    (alone := tmp_path / "clone").mkdir()
    monkeypatch.setattr(tool, "ROOT", alone)  # the runs in this clone are its user's
    seen, models, page = [], {}, SimpleNamespace(block_thread=lambda: None)
    locators = []
    monkeypatch.setattr(tool, "build", lambda found, device, locator: models.update(found) or seen.append(list(found)) or
                        locators.append(locator) or page)
    monkeypatch.setattr(tool, "serve", lambda *_: "http://127.0.0.1")
    tool.main([])
    tool.main(["--checkpoint", "work_dirs/b/best_model.pth", "--locator", "mine.pth"])
    assert locators == [None, tool.Path("mine.pth")]
    tool.main(["--checkpoint", "work_dirs/b/epoch_10.pth"])
    tool.main(["--checkpoint", "work_dirs/pretrained/best_model.pth"])  # a retrained one: not the bundled one
    box = ["pretrained", "a", "b"]
    assert seen == [box, ["b", "pretrained", "a"], ["b/epoch_10", *box], box]
    assert models["pretrained"] == tool.Path("work_dirs/pretrained/best_model.pth")


def test_photos_are_deleted_when_the_page_ends(start, run, tmp_path):
    (tmp_path / "page.py").write_text(f"""
import atexit, os, runpy, tempfile
os.environ.pop("GRADIO_TEMP_DIR", None)
tempfile.tempdir = {str(tmp_path)!r}
try:
    runpy.run_path({str(ROOT / "tools/demo.py")!r}, run_name="__main__")
finally:
    atexit._run_exitfuncs()  # which an interpreter's end would do, but not a forked process's
""")
    process = start(tmp_path / "page.py", "--checkpoint", run.work_dir / "best_model.pth", "--device", "cpu")
    try:
        wait_for(process, "Ctrl-C ends it")
        kept = [*tmp_path.glob("dogflw_demo_*")]
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert kept and not process.is_alive() and not kept[0].exists()
    finally:
        process.kill()
        process.join()


def test_what_a_user_can_mend_is_one_line(demo, script, monkeypatch):
    result = script("tools/demo.py", "--checkpoint", "none.pth", "--device", "cpu")
    assert result.returncode == 2 and result.stderr == "error: none.pth: no such file\n"
    assert "cannot listen" in demo.busy and "\n" not in demo.busy
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="gradio.*: pip install gradio"):
        tool.import_gradio()
