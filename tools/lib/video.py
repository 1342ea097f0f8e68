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
from tools.lib.cli import UserError, as_argument, check_name
from tools.lib.files import put_in_place
from tools.lib.find import MIN_SCORE, OVERLAP, Predictor

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # we report what cannot be read, in one line
FIND_EVERY = 10  # frames of a video between searches for new faces; between them known ones are followed
SOUGHT = 1.0  # seconds after a face was lost in which every frame is searched
MOST_DAMAGED = 30  # so many unreadable frames in a row are the end of the video
# One-euro filter (Casiez, Roussel, Vogel, CHI 2012), with speeds in face sizes per second. A still face is
# smoothed at MIN_CUTOFF Hz. BETA opens the filter as it moves, so the overlay lags by under 2 % of the face.
MIN_CUTOFF, BETA, SPEED_CUTOFF = 1.0, 10.0, 1.0
LONGEST_GAP = 600.0  # seconds; a longer gap between two frames means that the clock has jumped
FASTEST = 60.0  # frames per second: the highest rate chosen for a video of variable rate
PLAYED = ("aac", "mp3", "opus")  # sound in an mp4 that browsers play
# ffmpeg runs in a session of its own: Ctrl-C reaches only us, and ffmpeg ends properly when its input does.
ALONE = {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
HANG_UP = getattr(signal, "SIGHUP", None)  # a terminal that went away; Windows has none
INSTALL = "install ffmpeg (apt, brew or winget install ffmpeg)"


# ---------------------------------------------------------------- reading

class Video:
    """Frames of a video file, of a camera (by its number) or of a stream (rtsp://...), with their times.

    source: a Path, an int, or an address as text. `rate` is the rate to write it at, in frames per second;
    `length` is in frames, 0 if unknown. `live` is true of a source that does not wait for its reader: the
    newest frame comes next, and missed ones are dropped. `cut` says at the end what could not be read.
    `stretch` is the width / height of the source's pixels; frames are returned with square ones. Raises
    UserError naming the source if it cannot be opened or holds no frame.
    """

    def __init__(self, source: Path | int | str):
        self.source, self.name = source, name_of(source)
        self.capture = open_capture(source)
        self.length, self.cut = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))), None
        self.damaged = 0  # unreadable frames that were followed by readable ones
        self.stretch = pixel_aspect(self.capture)
        codec = max(0, int(self.capture.get(cv2.CAP_PROP_FOURCC)))  # four letters, such as AV01
        self.codec = codec.to_bytes(8, "little")[:4].decode("latin-1")
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
        """Yield (seconds since the first frame, RGB (H, W, 3) uint8) until `stopped` is set or it ends."""
        count, first, before = 0, 0.0, 0.0
        for seconds, frame in self._live(stopped) if self.live else self._recorded(stopped):
            first = seconds if not count else first
            moment = seconds - first
            if count and not 0 < moment - before < LONGEST_GAP:  # no clock, or one that jumped
                moment = before + 1 / self.rate
                first = seconds - moment
            count, before = count + 1, moment
            yield moment, self._with_square_pixels(frame[..., ::-1])
        if not count and not stopped.is_set():
            local = isinstance(self.source, Path)
            mend = "copy it again" if local else "if it is a picture, download it and name its file"
            if local and self.length and self.codec.isprintable():
                mend += (f", or convert it if OpenCV cannot decode {self.codec}: ffmpeg -i "
                         f"{as_argument(self.source)} converted.mp4")
            raise UserError(f"{self.name}: cannot be read as a video; {mend}")
        seen, whole = before + 1 / self.rate, self.duration
        if seen < 0.9 * whole - 0.2 and not stopped.is_set():  # both are approximate
            self.cut = f"{seen:.1f} of about {whole:.1f} s could be read; the rest is missing or damaged"
        elif self.damaged:
            self.cut = f"frames that are damaged, and left out: {self.damaged}"
        elif self.live and not stopped.is_set():
            self.cut = f"ended by itself after {seen:.1f} s; start again to go on, unless it is a recording"

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

        def pull():  # the only thread that reads the capture, so it closes it, too
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
                with contextlib.suppress(queue.Empty):  # to check `stopped` while no frame comes
                    item = newest.get(timeout=0.2)
                    if item is None:
                        return
                    yield item
        finally:
            ended.set()
            thread.join(5)


def name_of(source: Path | int | str) -> str:
    """A source's name in messages and file names; an address is given without its password and query."""
    if isinstance(source, int):
        return f"camera {source}"
    if isinstance(source, Path):
        return str(source)
    bare = re.sub(r"//.*@", "//", source.split("?")[0])  # a password may hold / and @
    return re.sub(r"(?i)(user|pass\w*|pwd|token|key)=[^&_/;]*", r"\1=", bare)


def open_capture(source: Path | int | str) -> cv2.VideoCapture:
    """OpenCV's reader for a source, which turns a phone's videos upright."""
    if isinstance(source, Path):
        check_name(source)  # OpenCV 5 crashes on some names
    capture = cv2.VideoCapture(str(source) if isinstance(source, Path) else source)
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)  # only OpenCV 4.11 leaves it off by default
    return capture


def pixel_aspect(capture: cv2.VideoCapture) -> float:
    """Width / height of a pixel as shown: 1 except for video of old cameras and discs (DV, DVD)."""
    wide, high = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
    aspect = wide / high if wide > 0 and high > 0 else 1.0
    if abs(aspect - 1) < 0.01 or not 0.1 < aspect < 10:  # 1280:1281 comes from rounded sizes
        return 1.0
    return 1 / aspect if capture.get(cv2.CAP_PROP_ORIENTATION_META) % 180 == 90 else aspect


def probe(source: Path, entries: str, stream: str = "v:0") -> tuple[dict, dict]:
    """What ffprobe says of a file's stream (the first video or, with a:0, sound), and of the file."""
    command = ["ffprobe", "-v", "error", "-select_streams", stream, "-of", "json", "-show_entries", entries,
               str(source.absolute())]
    said = json.loads(subprocess.run(command, capture_output=True).stdout or "{}")
    return (said.get("streams") or [{}])[0], said.get("format", {})


def duration(source: Path | int | str, otherwise: float) -> float:
    """A video's length in seconds by ffprobe, which knows cuts made without re-encoding; else `otherwise`."""
    if not isinstance(source, Path) or not shutil.which("ffprobe"):
        return otherwise
    stream, file = probe(source, "stream=duration,start_time:stream_tags=DURATION:format=duration,start_time")
    written = stream.get("tags", {}).get("DURATION", "")  # of Matroska and WebM
    clock = re.fullmatch(r"(\d{1,6}):(\d\d?):(\d+(?:\.\d+)?)", written)
    tag = clock and 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3]) - float(
        stream.get("start_time") or file.get("start_time") or 0)  # the tag counts from 0, not the first frame
    return float(stream.get("duration") or tag or file.get("duration") or otherwise)


def writing_rate(path: Path, mean: float) -> float:
    """Frames per second to write a video at: the mean rate if it is constant, else one that loses no frame.

    Judged by the first 64 frames, which are decoded twice for this; at most FASTEST, or the mean if higher.
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
    if steps.max() < 1.5 * steps.min():  # constant, but not the rate in the file
        return float(1 / steps.mean())
    return float(min(max(mean, 1 / steps.min()), max(mean, FASTEST)))


# ---------------------------------------------------------------- following

class OneEuroFilter:
    """The one-euro filter: smooths points (K, 2) over time, each landmark by its own speed."""

    def __init__(self):
        self.points, self.speed = None, 0.0

    def __call__(self, points: np.ndarray, size: float, seconds: float) -> np.ndarray:
        """The next frame's points, smoothed. size: the face's in pixels, which makes speeds comparable.

        seconds: since the previous frame.
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
    """Follows faces: looks at each where it was last, and searches for new ones every FIND_EVERY frames, and
    in every frame for SOUGHT seconds after one was lost.

    boxes: the faces' boxes (N, 4) in the first frame, or None to search for them.
    """

    def __init__(self, predictor: Predictor, boxes: np.ndarray | list | None = None,
                 min_score: float = MIN_SCORE):
        self.predictor, self.min_score = predictor, min_score
        self.given, self.tracks = None if boxes is None or not len(boxes) else boxes, []
        self.count, self.frames, self.seconds, self.until = 0, 0, 0.0, 0.0

    def __call__(self, frame: np.ndarray, seconds: float) -> list[dict]:
        """The faces of the next RGB frame (H, W, 3), at its time in seconds.

        "id" is a face's number. "points" are this frame's own, for measuring; "steady" are smoothed, to show.
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
            if len(room) == 2:  # one landmark tells no size, but a new detection does
                self.tracks[same[0]]["box"] = tight
            return
        if "id" not in track:
            track["id"], track["filter"], self.count = self.count, OneEuroFilter(), self.count + 1
        track["steady"] = track["filter"](track["points"], tight[2:].max(), step)
        track["box"] = tight
        self.tracks.append(track)


@contextlib.contextmanager
def until_stopped() -> Iterator[threading.Event]:
    """Yield an Event that the first Ctrl-C, SIGTERM or SIGHUP only sets, so that a frame can be finished."""
    stopped, before = threading.Event(), {}

    def stop(number, _):
        if stopped.is_set() and number != HANG_UP:  # the shell and the system may both send SIGHUP
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

    It is H.264, which browsers play, if ffmpeg is installed or OpenCV can use the system's encoder; else
    MPEG-4 part 2. The rate is constant: frames are repeated or dropped to match their times. Use as a context
    manager; leaving it without `finish` leaves no file behind.
    """

    def __init__(self, target: Path | str, rate: float, size: tuple[int, int]):
        self.target, self.rate, self.size, self.count, self.last = Path(target), rate, size, 0, None
        self.temporary = self.target.with_name(f".{self.target.stem[-50:]}.tmp.mp4")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.process = self.writer = None
        if has_h264():
            # No colour tags: this reverses OpenCV's conversion on reading and so restores the source's YUV
            # values. An odd side gets a black line.
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
                with contextlib.suppress(OSError):  # closing flushes what ffmpeg no longer takes
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
        """Close the file and move it to `target`, with the sound of the video file `sound`, if given.

        Returns a short remark for the user, or "". Raises UserError if the file is not whole.
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
            # OpenCV itself reports no error.
            if cv2.VideoCapture(str(self.temporary)).get(cv2.CAP_PROP_FRAME_COUNT) != self.count:
                raise UserError(f"{self.target}: could not be written whole; is the disk full?")
            word = f"without sound; for it {INSTALL}" if self.codec == "avc1" else (
                f"without sound, and as MPEG-4 part 2, which browsers do not play; for H.264 {INSTALL}")
        put_in_place(self.temporary, self.target)
        return word


def add_sound(video: Path, source: Path, seconds: float) -> str:
    """Give an mp4 the first sound track of another file, up to `seconds`; copied if browsers play its codec.

    Returns a short remark on what went wrong, or "" if the file has the sound or the source has none.
    """
    codec, late = "unknown", 0.0
    with contextlib.suppress(OSError):  # ffmpeg without ffprobe
        codec = probe(source, "stream=codec_name", "a:0")[0].get("codec_name", "")
        stream, file = probe(source, "stream=start_time:format=start_time")
        starts = [float(part.get("start_time") or 0) for part in (stream, file)]
        late = max(0.0, starts[0] - starts[1])  # seconds of sound before the first picture
    if not codec:
        return ""
    mixed = video.with_name(f"{video.stem}.sound.mp4")
    try:
        done = subprocess.run(
            ["ffmpeg", "-v", "error", "-y", "-i", f"file:{video}", "-ss", f"{late:.3f}",
             "-t", f"{seconds:.3f}", "-i", f"file:{source}", "-map", "0:v", "-map", "1:a:0", "-c:v", "copy",
             "-c:a", "copy" if codec in PLAYED else "aac",
             "-movflags", "+faststart", f"file:{mixed}"], capture_output=True, stdin=subprocess.DEVNULL,
            **ALONE)
        if done.returncode:
            return "without its sound, which ffmpeg could not copy"
        put_in_place(mixed, video)
        return ""
    finally:
        mixed.unlink(missing_ok=True)
