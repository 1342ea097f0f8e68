"""Files that appear whole or not at all, locks, paths that stay in the data root, JSON, CSV, a face cache."""

import contextlib
import csv
import errno
import io
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tools.lib.cli import Progress, UserError, is_text, place_in_job

LFS = b"version https://git-lfs"  # how a pointer to a file begins that was not fetched
TABLES = ".csv", ".txt", ".yaml", ".yml", ".ndjson", ".xml", ".pts"  # suffixes of files that are hardly JSON
CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use
ROOT = Path(__file__).resolve().parents[2]  # the folder of this repository
# Files by which the output folders of predict.py and align_faces.py are recognised.
PREDICTIONS, TRANSFORMS = "predictions.json", "transforms.json"


def atomic_write(path: Path | str, parts: Iterable[bytes | memoryview], writer: str = ""):
    """Write pieces of bytes to a file, which appears under `path` whole or not at all.

    writer: a name for this process, if several may write the file at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name per file: what a killed process leaves is overwritten by the next try and never piles up.
    temporary = path.with_name(f".{path.name[-50:]}{writer}.tmp")  # shorter than any name may be
    try:
        temporary.unlink(missing_ok=True)  # a link there, from someone's archive, would lead elsewhere
        with open(temporary, "xb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        put_in_place(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        with contextlib.suppress(OSError):  # of a read-only disk: the first error names the path
            temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path):
    """os.replace; on Windows, tried for a while if another program has the file (a table, say) open."""
    for wait in (0.1, 0.5, 2.0, None) if os.name == "nt" else (None,):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if wait is None:
                raise
            time.sleep(wait)


def is_free(folder: Path) -> bool:
    """Whether a folder is missing, or empty except for a lock, logs, and what file browsers leave."""
    return not folder.exists() or folder.is_dir() and all(
        p.is_file() and (p.name in (".lock", ".DS_Store", "Thumbs.db", "desktop.ini")
                         or p.suffix in (".log", ".out", ".err")) for p in folder.iterdir())


@contextlib.contextmanager
def output_folder(given: Path | None, name: str, force: bool) -> Iterator[Path]:
    """The folder of --out, locked for this process; by default `name`, or the first free one of name_2, ...

    Raises UserError as `check_free` does, or if another process is writing there. A new folder that stays
    empty is removed.
    """
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    with contextlib.ExitStack() as stack:
        for folder in [given] if given else map(Path, names):
            new, busy = not folder.exists(), f"--out {folder}: another run is writing there; name another"
            try:
                check_free("--out", folder, force)
                stack.enter_context(file_lock(folder / ".lock", busy))
                check_free("--out", folder, force)  # another run may just have ended there
                break
            except (UserError, OSError) as e:  # PermissionError: it is another user's
                stack.close()
                if given or force or isinstance(e, OSError) and new:
                    raise
        try:
            yield folder
        finally:
            if os.name == "nt":
                stack.close()  # an open file cannot be deleted there
            with contextlib.suppress(OSError):  # a folder that is full stays
                (folder / ".lock").unlink()
                if new:
                    folder.rmdir()


def check_free(flag: str, folder: Path, force: bool, way: str = "write into it with --force"):
    """Raises UserError if an output folder is a file, or, without `force`, if it is not empty.

    way: the message's advice on how to use the folder all the same.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {folder}: is a file; name a folder")
    if not force and not is_free(folder):
        raise UserError(f"{flag} {folder}: not empty; name another folder, or {way}")


def check_new(flag: str, force: bool, *files: Path):
    """Raises UserError naming the first of the files to write that exists, unless `force` is given."""
    if there := [file for file in files if file.exists() and not force]:
        raise UserError(f"{there[0]}: exists; write over it with --force, or name another {flag}")


@contextlib.contextmanager
def file_lock(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a file's lock, at most until the process ends. If it is taken, wait, or raise UserError(busy)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:  # "w" would empty what a link leads to
        try:
            import fcntl

            # Not flock, which a killed run's data workers would hold on to until they notice.
            fcntl.lockf(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except ImportError:
            pass  # Windows has no such lock
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as e:
            # Some network file systems have none either; 524 is Linux's own ENOTSUPP.
            if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, 524):
                raise
        yield


def check_fetched(path: Path | str, content: bytes):
    """Raises UserError if a file, which begins with `content`, is only a pointer of Git LFS."""
    if content.startswith(LFS):
        raise UserError(f"{path}: a pointer of Git LFS; run git lfs pull")


def load_json(path: Path | str):
    """Parse a JSON file. Raises UserError where it is missing or no JSON."""
    try:
        content = Path(path).read_bytes()
        if content.startswith((b"\x89HDF", b"\x80", b"PAR1", b"MATLAB")):
            raise UserError(f"{path}: is no JSON (a file of SLEAP or DeepLabCut, a pickle?); data/README.md "
                            "has ways to COCO")
        if content.startswith((b"PK\3\4", b"\x1f\x8b")):
            raise UserError(f"{path}: a packed file; unpack it, and name the folder or the JSON file in it")
        check_fetched(path, content)
        return json.loads(content)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a JSON file in it") from None
    except PermissionError:
        what = "is a folder; name a JSON file in it" if Path(path).is_dir() else (  # on Windows
            "may not be read; mend its permissions")
        raise UserError(f"{path}: {what}") from None
    except (ValueError, RecursionError) as e:
        mend = ("name a JSON file" if Path(path).suffix.lower() in TABLES else
                "save it as UTF-8" if isinstance(e, UnicodeError) else "export or download it again")
        raise UserError(f"{path}: not a JSON file ({str(e)[:80]}); {mend}") from None


def picture_path(root: Path | str, name: str, where: str = "") -> Path:
    """The path of a picture named in a file. Raises UserError if it leaves the data root or is no text."""
    if not is_text(name):
        raise UserError(f"{where}file_name {name!r} holds characters that are no text; rename the picture")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{where}file_name {name!a} does not exist in this system's encoding; set "
                        "PYTHONUTF8=1") from None
    path = Path(root, name)
    # Other systems' absolute names count, too: a file must not mean one place here and another on Windows.
    absolute = Path(name).is_absolute() or re.match(r"[A-Za-z]:[/\\]|\\|\w+://", name)
    if absolute or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{where}file_name {name!r} leaves the data root {root}; names must be relative "
                        "to it")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{where}file_name {name!r} is a link that leaves the data root {root}; copy what it "
                        "leads to, or name the folder that holds the real files")
    return path


class RecordFile:
    """Byte arrays, one after the other, in a file that is made once and then read: `records[i]` is number i.

    lengths: their sizes in bytes. make: called if the file is missing or incomplete; yields the arrays in
    order. If another process is making the same file, waits for it. Raises UserError if the file is cut off.
    """

    def __init__(self, path: Path | str, lengths: list, make: Callable):
        self.path, self.offsets = Path(path), np.cumsum([0, *lengths], dtype=np.int64)
        if not self._is_whole():
            with file_lock(self.path.with_suffix(".lock")):  # one per file: another user's might not open
                if not self._is_whole():
                    # On some shared disks, locks do not reach other machines; some have none.
                    writer = f".{platform.node()[:50]}.{place_in_job()[0]}"
                    atomic_write(self.path, (record.tobytes() for record in make()), writer)

    def _is_whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.offsets[-1]

    def __getitem__(self, i: int) -> np.ndarray:
        # A plain read: mapped pages would count as this process's memory, in every worker.
        length = self.offsets[i + 1] - self.offsets[i]
        try:
            record = np.fromfile(self.path, np.uint8, length, offset=self.offsets[i])
        except OSError:
            record = ()
        if len(record) < length:
            raise UserError(f"{self.path}: the face cache is gone or cut off; start again to build it anew")
        return record


def quota() -> float:
    """How many cores' time a container leaves this process, rounded up; infinity without a limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # no container; "max" and -1: no quota
            share, period = map(int, " ".join((CGROUP / file).read_text() for file in files).split())
            if share > 0:
                return math.ceil(share / period)
    return math.inf


def cores() -> int:
    """How many cores this process may use: a cluster, `taskset` or a container may give it fewer than all."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, quota())


def in_threads(function: Callable, count: int, title: str) -> Iterator:
    """Yield function(0), function(1), ... in order, run by as many threads as cores, with a progress bar."""
    with ThreadPoolExecutor(cores()) as pool, Progress(count, title) as progress:
        done = 0
        for start in range(0, count, 256):  # in chunks, so that finished ones do not pile up
            for result in pool.map(function, range(start, min(start + 256, count))):
                yield result
                done += 1
                progress.update(done)


def one_ahead(function: Callable, items: list, title: str) -> Iterator:
    """Yield function(item) for every item, with a bar; a thread makes each while the previous is in use."""
    quiet = place_in_job()[0] > 0
    with ThreadPoolExecutor(1) as thread, Progress(len(items), title, quiet) as progress:
        results = (thread.submit(function, item) for item in items)
        ahead = next(results, None)
        for done in range(len(items)):
            ready, ahead = ahead, next(results, None)
            progress.update(done)
            yield ready.result()


def as_json(value: dict) -> bytes:
    """The bytes of a JSON file; null for NaN and infinity, which JSON does not know."""
    text = json.dumps(value)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1).encode()


def as_csv(columns: list | tuple, rows: list[dict]) -> bytes:
    """Rows {column: value} as the bytes of a CSV file; other columns are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def data_root(given: Path | str | None, flag: str = "--data-root") -> Path:
    """The folder of the pictures: the one that was given with a flag, or DogFLW's. Raises UserError."""
    root = Path(given) if given else find_dogflw()
    if root is None or not root.is_dir():
        what = f" {given}: no such folder" if given else ": DogFLW was not found on this machine"
        raise UserError(f"{flag}{what}; name the folder of the pictures, fetch DogFLW by "
                        "tools/convert_dogflw_to_coco.py --download, or try train_simple.py --sample")
    return root


def find_dogflw(*folders) -> Path | None:
    """The folder that holds train/images, at or below `folders`, or None.

    The default is kagglehub's cache (newest version first), then where Kaggle and Colab put the data.
    """
    if not folders:
        # Unlike Path.home, expanduser does not fail without a home.
        cache = Path(os.environ.get("KAGGLEHUB_CACHE") or os.path.expanduser("~/.cache/kagglehub"))
        kept = cache / "datasets/georgemartvel/dogflw/versions"
        versions = kept.glob("*") if os.access(kept, os.R_OK) else ()
        folders = [*sorted(versions, key=lambda p: (len(p.name), p.name), reverse=True),  # 10 is newer than 9
                   Path("/kaggle/input/dogflw"), Path("/kaggle/input/datasets/georgemartvel/dogflw")]
    found = (images for folder in folders for images in sorted(folder.glob("**/train/images")))
    return next((images.parent.parent for images in found), None)


def make_sample(data_root: Path, ann_root: Path):
    """Draw and convert the sample data set if missing. UserError if a folder is wrong or a tool fails."""
    ours = [path.is_relative_to(ROOT / "data/sample") for path in (data_root, ann_root)]
    if ours[0] != ours[1]:
        raise UserError("--sample: --data-root and --ann-root belong together; give both, or neither")
    if (ann_root / "train.json").exists() and not (ann_root / "val.json").exists():
        raise UserError(f"--ann-root {ann_root}: holds a train.json that is not the sample's; leave it out")
    if not is_free(data_root) and not any(data_root.glob("train/images/s0[0-9]*_*.png")):
        raise UserError(f"--sample: --data-root {data_root} holds other pictures; leave --sample out")
    with file_lock(ann_root.parent / ".sample.lock"):  # every process of a job comes here
        for made, tool, *flags in (
                (data_root, "make_sample_dataset.py", "--out", data_root),
                (ann_root / "val.json", "convert_dogflw_to_coco.py", "--dogflw_root", data_root,
                 "--out_dir", ann_root)):
            if is_free(made) and subprocess.run([sys.executable, ROOT / "tools" / tool, *flags]).returncode:
                raise UserError(f"--sample: tools/{tool} failed; its message is above")


def run_directory(work_dir: Path, resume: bool) -> contextlib.AbstractContextManager:
    """A context that locks a run's folder. UserError if it is in use or, without `resume`, not empty."""
    if place_in_job()[0] > 0:
        return contextlib.nullcontext()
    check_free("--work-dir", work_dir, resume, "go on with --resume")
    busy = f"--work-dir {work_dir}: another run is writing there; wait for it or name another"
    return file_lock(work_dir / ".lock", busy)
