"""Videos and cameras: frames with their times, faces followed from frame to frame, H.264 and sound out."""
import contextlib
import functools
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from tools.lib.boxes import TIGHT, box_around, intersections
from tools.lib.cli import UserError, check_name
from tools.lib.files import put_in_place
from tools.lib.find import MIN_SCORE, OVERLAP, Predictor

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what cannot be read is named by us, in one line
FIND_EVERY = 10  # frames of a video between searches for new faces; between them known ones are followed
SOUGHT = 1.0  # seconds after one was lost in which every frame is searched
MOST_DAMAGED = 30  # frames in a row that cannot be read; more are the end
# One-euro filter (Casiez, Roussel, Vogel, CHI 2012), speeds in face sizes a second: a still face is smoothed
# at MIN_CUTOFF Hz, and BETA opens the filter as it moves: the overlay lags by less than 2 % of the face then.
MIN_CUTOFF, BETA, SPEED_CUTOFF = 1.0, 10.0, 1.0
LONGEST_GAP = 600.0  # seconds between two frames; more is a clock that jumped
FASTEST = 60.0  # frames a second that a video of a variable rate is written with at most
PLAYED = ("aac", "mp3", "opus")  # sound in an mp4 that browsers play
# In a session of its own: Ctrl-C is for us, and ffmpeg ends whole when its input does.
ALONE = {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
HANG_UP = getattr(signal, "SIGHUP", None)  # a terminal that went away; Windows has none
INSTALL = "install ffmpeg (apt, brew or winget install ffmpeg)"


# ---------------------------------------------------------------- reading

class Video:
    """Frames of a video file, of a camera (by its number) or of a stream (rtsp://...), with their times.

    source: a Path, an int, or the text of an address. `rate` is what to write it with, in frames a second;
    `length` in frames, 0 where it is not known; `live` is true of what does not wait to be read: of it the
    newest frame comes next, and those missed do not. Raises UserError naming the source where it cannot be
    opened, or holds no frame. `cut` says at the end what of it could not be read; `stretch` is the width of
    its pixels / their height, and frames come with square ones.
    """
    stretch = 1.0

    def __init__(self, source: Path | int | str):
        self.source, self.name = source, name_of(source)
        self.capture = open_capture(source)
        self.length, self.cut = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))), None
        self.damaged = 0  # frames that could not be read, with others behind them
        self.stretch = pixel_aspect(self.capture)
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else 25.0
        self.live = not isinstance(source, Path) and not self.length
        if not self.capture.isOpened():
            raise UserError(f"{self.name}: cannot be " + (
                "read as a video; copy it again" if isinstance(source, Path) else
                "opened; is it there, and does nothing else use it?"))
        self.duration = duration(source, self.length / self.rate)
        if isinstance(source, Path):
            self.rate = writing_rate(source, self.rate)

    def frames(self, stopped: threading.Event) -> Iterator[tuple[float, np.ndarray]]:
        """Yield (seconds since the first frame, RGB (H, W, 3) uint8), until an Event is set or it ends."""
        count, first, before = 0, 0.0, 0.0
        for seconds, frame in self._live(stopped) if self.live else self._recorded(stopped):
            first = seconds if not count else first
            moment = seconds - first
            if count and not 0 < moment - before < LONGEST_GAP:  # no clock, or one that jumped
                first -= before + 1 / self.rate - moment
                moment = before + 1 / self.rate
            count, before = count + 1, moment
            yield moment, self._with_square_pixels(frame[..., ::-1])
        if not count and not stopped.is_set():
            local = isinstance(self.source, Path)
            mend = "copy it again" if local else "if it is a picture, download it and name its file"
            raise UserError(f"{self.name}: cannot be read as a video; {mend}")
        seen, whole = before + 1 / self.rate, self.duration
        if seen < 0.9 * whole - 0.2 and not stopped.is_set():  # both are rough
            self.cut = f"{seen:.1f} of about {whole:.1f} s could be read; the rest is missing or damaged"
        elif self.damaged:
            self.cut = f"frames that are damaged, and left out: {self.damaged}"

    def _with_square_pixels(self, frame: np.ndarray) -> np.ndarray:
        (height, width), wide = frame.shape[:2], self.stretch
        size = round(width * max(1, wide)), round(height * max(1, 1 / wide))
        return frame if wide == 1 else cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)

    def _recorded(self, stopped: threading.Event) -> Iterator[tuple[float, np.ndarray]]:
        failed = 0
        while failed < MOST_DAMAGED and not stopped.is_set():
            good, frame = self.capture.read()
            if good:
                self.damaged, failed = self.damaged + failed, 0
                yield self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, frame
            else:
                failed += 1
        self.capture.release()

    def _live(self, stopped: threading.Event) -> Iterator[tuple[float, np.ndarray]]:
        newest, ended = queue.Queue(1), threading.Event()

        def pull():  # the one that uses the capture, and so closes it
            good = True
            while good and not ended.is_set():
                good, frame = self.capture.read()
                with contextlib.suppress(queue.Empty):
                    newest.get_nowait()
                newest.put((time.monotonic(), frame) if good else None)
            self.capture.release()
        thread = threading.Thread(target=pull, daemon=True)
        thread.start()
        try:
            while not stopped.is_set():
                with contextlib.suppress(queue.Empty):  # to look at `stopped` while nothing comes
                    item = newest.get(timeout=0.2)
                    if item is None:
                        return
                    yield item
        finally:
            ended.set()
            thread.join(5)


def name_of(source: Path | int | str) -> str:
    """What a source is called in messages and files' names; an address without its password and its query."""
    if isinstance(source, int):
        return f"camera {source}"
    if isinstance(source, Path):
        return str(source)
    bare = re.sub(r"//.*@", "//", source.split("?")[0])  # a password may hold / and @
    return re.sub(r"(?i)(user|pass\w*|pwd|token|key)=[^&_/;]*", r"\1=", bare)


def open_capture(source: Path | int | str) -> cv2.VideoCapture:
    """OpenCV's reader of a source; videos of a phone come upright from it."""
    if isinstance(source, Path):
        check_name(source)  # OpenCV 5 crashes
    capture = cv2.VideoCapture(str(source) if isinstance(source, Path) else source)
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)  # which OpenCV 4.11 alone leaves off
    return capture


def pixel_aspect(capture: cv2.VideoCapture) -> float:
    """Width / height of a pixel as it is shown: 1 but for old cameras' and discs' video (DV, DVD)."""
    wide, high = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
    aspect = wide / high if wide > 0 and high > 0 else 1.0
    if abs(aspect - 1) < 0.01 or not 0.1 < aspect < 10:  # 1280:1281 comes of rounded sizes
        return 1.0
    return 1 / aspect if capture.get(cv2.CAP_PROP_ORIENTATION_META) % 180 == 90 else aspect


def duration(source: Path | int | str, otherwise: float) -> float:
    """Seconds that a video lasts by ffprobe, which knows of cuts without a new encoding; else `otherwise`."""
    if not isinstance(source, Path) or not shutil.which("ffprobe"):
        return otherwise
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-of", "json", "-show_entries",
               "stream=duration:stream_tags=DURATION:format=duration,start_time", str(source.absolute())]
    said = json.loads(subprocess.run(command, capture_output=True).stdout or "{}")
    stream = (said.get("streams") or [{}])[0]
    written = stream.get("tags", {}).get("DURATION", "")  # of Matroska and WebM
    clock = re.fullmatch(r"(\d{1,6}):(\d\d?):(\d+(?:\.\d+)?)", written)
    file = said.get("format", {})
    tag = clock and 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3]) - float(
        file.get("start_time") or 0)  # it counts from 0, however late the first frame is
    return float(stream.get("duration") or tag or file.get("duration") or otherwise)


def writing_rate(path: Path, mean: float) -> float:
    """Frames a second to write a video with: the mean rate if it is constant, else one that loses no frame.

    Judged by the first 64 frames, which are decoded once more for it; at most FASTEST.
    """
    capture, times = open_capture(path), []
    while len(times) < 64 and capture.grab():
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    capture.release()
    steps = np.diff(times)
    if len(steps) < 2 or steps.min() <= 0:  # too short to tell, or without a clock
        return mean
    drift = np.array(times) - times[0] - np.arange(len(times)) / mean
    if np.abs(drift).max() < 0.5 / mean:
        return mean
    if steps.max() < 1.5 * steps.min():  # constant, and the file says another
        return float(1 / steps.mean())
    return float(min(max(mean, 1 / steps.min()), max(mean, FASTEST)))


# ---------------------------------------------------------------- following

class OneEuroFilter:
    """Steadies (K, 2) points over time; landmark by landmark, all at once."""

    def __init__(self):
        self.points, self.speed = None, 0.0

    def __call__(self, points: np.ndarray, size: float, seconds: float) -> np.ndarray:
        """The points of the next frame, steadied; `size` of the face in pixels makes speeds comparable.

        seconds: since the frame before.
        """
        def weight(cutoff):
            return 1 / (1 + 1 / (2 * math.pi * cutoff * seconds))
        if self.points is not None:
            speed = (points - self.points) / seconds
            self.speed = self.speed + weight(SPEED_CUTOFF) * (speed - self.speed)
            cutoff = MIN_CUTOFF + BETA * np.linalg.norm(self.speed, axis=1, keepdims=True) / size
            points = self.points + weight(cutoff) * (points - self.points)
        self.points = points
        return points


class Tracker:
    """Follows faces: each is looked at where it was; every FIND_EVERY frames new ones are sought, and in each
    frame for SOUGHT seconds after one was lost.

    boxes: where faces are in the first frame (N, 4), or None: they are found.
    """

    def __init__(self, predictor: Predictor, boxes: np.ndarray | list | None = None,
                 min_score: float = MIN_SCORE):
        self.predictor, self.min_score = predictor, min_score
        self.given, self.tracks = None if boxes is None or not len(boxes) else boxes, []
        self.count, self.frames, self.seconds, self.until = 0, 0, 0.0, 0.0

    def __call__(self, frame: np.ndarray, seconds: float) -> list[dict]:
        """The faces of the next RGB frame (H, W, 3), at its time in seconds.

        "id" is a face's number. "points" are the frame's own, to measure; "steady" are steadied, to look at.
        """
        step, given, self.given = max(seconds - self.seconds, 1e-3), self.given, None
        tracks = self.predictor.follow(frame, self.tracks)
        tracks = [{**t, **f} for t, f in zip(self.tracks, tracks, strict=True)]
        tracks += [] if given is None else self.predictor(frame, given)
        followed = [t for t in tracks if t["score"] >= self.min_score]
        if len(followed) < len(tracks):
            self.until = seconds + SOUGHT
        if self.frames % FIND_EVERY == 0 and given is None or seconds < self.until:
            followed += self.predictor(frame, min_score=self.min_score)
        self.tracks, self.seconds, self.frames = [], seconds, self.frames + 1
        for track in followed:
            self._keep(track, step)
        return self.tracks

    def _keep(self, track: dict, step: float):
        """Add a face, unless it is one of those that are kept already."""
        room = self.predictor.face.room
        tight = box_around(track["points"], track["box"], TIGHT, room)
        known = np.reshape([t["box"] for t in self.tracks], (-1, 4))
        shared = intersections(tight[None], known)[0]
        same = np.flatnonzero(shared > OVERLAP * np.minimum(tight[2:].prod(), known[:, 2:].prod(1)))
        if len(same):
            if len(room) == 2:  # one landmark tells no size, a new finding does
                self.tracks[same[0]]["box"] = tight
            return
        if "id" not in track:
            track["id"], track["filter"], self.count = self.count, OneEuroFilter(), self.count + 1
        track["steady"] = track["filter"](track["points"], tight[2:].max(), step)
        track["box"] = tight
        self.tracks.append(track)


@contextlib.contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """The first Ctrl-C, SIGTERM or SIGHUP only sets the Event that this yields: so a frame is done whole."""
    stopped, before = threading.Event(), {}

    def stop(number, _):
        if stopped.is_set() and number != HANG_UP:  # a shell and the system may both say that
            raise KeyboardInterrupt
        stopped.number = number
        stopped.set()
    if threading.current_thread() is threading.main_thread():
        numbers = signal.SIGINT, signal.SIGTERM, HANG_UP
        heard = [n for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- writing

@functools.cache
def has_h264() -> bool:
    """Whether there is an ffmpeg that writes H.264."""
    if not shutil.which("ffmpeg"):
        return False
    return b"libx264" in subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True).stdout


class VideoWriter:
    """Writes frames to an mp4 that appears under `target` whole or not at all: `finish` makes it appear.

    H.264, which browsers play, where ffmpeg is installed, or the system's own can be had by OpenCV; else
    MPEG-4 part 2. The rate is constant: frames are repeated to last as long as their times say. A context
    manager; leaving it without `finish` leaves nothing behind.
    """

    def __init__(self, target: Path | str, rate: float, size: tuple[int, int]):
        self.target, self.rate, self.size, self.count, self.last = Path(target), rate, size, 0, None
        self.temporary = self.target.with_name(f".{self.target.stem[-50:]}.tmp.mp4")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.process = self.writer = None
        if has_h264():
            # No colour tags: as OpenCV reads, so the source's YUV values come back. An odd side gets a black
            # line.
            command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
                       "-s", f"{size[0]}x{size[1]}", "-r", f"{rate:.6f}", "-i", "-",
                       "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-c:v", "libx264", "-preset", "veryfast",
                       "-crf", "20", "-pix_fmt", "yuv420p", "-movflags", "+faststart",
                       f"file:{self.temporary}"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, **ALONE)
        else:
            for codec in ("mp4v",) if sys.platform == "linux" else ("avc1", "mp4v"):
                fourcc = cv2.VideoWriter_fourcc(*codec)
                self.writer = cv2.VideoWriter(str(self.temporary), fourcc, round(rate, 2), size)
                if self.writer.isOpened():
                    self.codec = codec
                    break
            else:
                raise UserError(f"{target}: OpenCV cannot write an mp4 of {size[0]} x {size[1]} here; "
                                f"{INSTALL}")

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stderr, self.process.stdin):
                with contextlib.suppress(OSError):  # of what it did not take any more
                    pipe.close()
        if self.writer:
            self.writer.release()
        self.temporary.unlink(missing_ok=True)

    def write(self, frame: np.ndarray, seconds: float):
        """Show an RGB frame from `seconds` on. Raises UserError where it cannot be written."""
        if frame.shape[1::-1] != self.size:  # some streams change theirs
            frame = cv2.resize(frame, self.size)
        place = round(seconds * self.rate)
        if self.last is not None:
            for _ in range(place - self.count):
                self._put(self.last)
        self.last = np.ascontiguousarray(frame)
        if place >= self.count:
            self._put(self.last)

    def _put(self, frame: np.ndarray):
        self.count += 1
        if self.writer:
            return self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        try:
            self.process.stdin.write(frame.data)
        except OSError:
            raise UserError(self._complaint()) from None

    def _complaint(self) -> str:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        said = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        said = f" (ffmpeg: {said[-1][:120]})" if said else ""
        return f"{self.target}: could not be written whole; is the disk full?{said}"

    def finish(self, sound: Path | None = None) -> str:
        """Close the file and let it appear, with the sound of the video file `sound`.

        Returns what is to be said about it, in a few words, or "". Raises UserError where it is not whole.
        """
        if self.process:
            try:
                self.process.stdin.close()
            except OSError:
                raise UserError(self._complaint()) from None
            if self.process.wait() or not self.temporary.is_file():
                raise UserError(self._complaint())
            word = add_sound(self.temporary, sound, self.count / self.rate) if sound else ""
        else:
            self.writer.release()
            # OpenCV itself says nothing.
            if cv2.VideoCapture(str(self.temporary)).get(cv2.CAP_PROP_FRAME_COUNT) != self.count:
                raise UserError(f"{self.target}: could not be written whole; is the disk full?")
            word = f"without sound; for it {INSTALL}" if self.codec == "avc1" else (
                f"without sound, and as MPEG-4 part 2, which browsers do not play; for H.264 {INSTALL}")
        put_in_place(self.temporary, self.target)
        return word


def add_sound(video: Path, source: Path, seconds: float) -> str:
    """Give an mp4 the first sound track of another file, up to `seconds`; copied if browsers know its kind.

    Returns what went wrong in a few words, or "": then the file has the sound, or the source has none.
    """
    probe = ["ffprobe", "-v", "error", "-select_streams", "a:0", "-show_entries", "stream=codec_name",
             "-of", "csv=p=0", f"file:{source}"]
    try:
        codec = subprocess.run(probe, capture_output=True, text=True, errors="replace").stdout.strip()
    except OSError:
        codec = "unknown"
    if not codec:
        return ""
    mixed = video.with_name(f"{video.stem}.sound.mp4")
    try:
        done = subprocess.run(
            ["ffmpeg", "-v", "error", "-y", "-i", f"file:{video}", "-t", f"{seconds:.3f}",
             "-i", f"file:{source}", "-map", "0:v", "-map", "1:a:0", "-c:v", "copy",
             "-c:a", "copy" if codec in PLAYED else "aac",
             "-movflags", "+faststart", f"file:{mixed}"], capture_output=True, stdin=subprocess.DEVNULL,
            **ALONE)
        if done.returncode:
            return "without its sound, which ffmpeg could not copy"
        put_in_place(mixed, video)
        return ""
    finally:
        mixed.unlink(missing_ok=True)
