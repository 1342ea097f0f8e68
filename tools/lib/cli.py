"""The edge of every script: one kind of error for what the user can mend, and flags made from a dataclass."""

import argparse
import contextlib
import dataclasses
import errno
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

# Read when cv2 is imported: we report what OpenCV cannot read ourselves, in one line.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
# Errors of local and network disks; no system defines all of these names.
MENDABLE = {getattr(errno, name, None) for name in (
    "ENOSPC", "EROFS", "EACCES", "EPERM", "ENOENT", "EDQUOT", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG",
    "EFBIG", "EIO", "ENOMEM", "EMFILE", "EBUSY", "ENOTCONN", "ETIMEDOUT", "ESTALE", "EREMOTEIO", "EINVAL",
    "EILSEQ")} - {None}
ROOM = "make room (data/cache may go, if no run uses it), or name another folder; "
ADVICE = {errno.ENOSPC: ROOM, getattr(errno, "EDQUOT", None): ROOM,
          errno.EROFS: "name another folder (--out, --work-dir, --cache); ",
          errno.EACCES: "mend its permissions, or name another (--out, --work-dir, --cache); ",
          errno.EEXIST: "it is a file where a folder must be; name another; ",
          errno.ENOTDIR: "a part of it is a file; name another; ",
          errno.EINVAL: "this disk may not take its name; rename it, or name another folder; ",
          errno.EILSEQ: "this disk does not take its name; rename it, or name another folder; ",
          errno.EMFILE: "raise `ulimit -n`, or lower --num-workers; "}


class UserError(Exception):
    """Something the user can mend. The message names the file or flag, what is wrong and what to do."""


def printable(text: object) -> str:
    """Text from a file as the terminal may show it: one line without control codes."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def is_text(text: str) -> bool:
    """Whether a text is one printable line; joiners and all spaces count (macOS' screenshots have U+202F)."""
    return all(c.isprintable() or unicodedata.category(c) == "Zs" or c in "\u200c\u200d" for c in text)


def as_argument(value: object) -> str:
    """A value quoted for this system's shell."""
    return subprocess.list2cmdline([str(value)]) if os.name == "nt" else shlex.quote(str(value))


def check_name(path: Path | str):
    """Raises UserError for a file whose name holds characters that are no text."""
    if not is_text(str(path)):
        raise UserError(f"{printable(path)}: its name holds characters that are no text; rename it")


def single_line(error: Exception | str, length: int = 100) -> str:
    """The first line of an error's text, cut to `length`."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])[:length]


def place_in_job() -> tuple[int, int]:
    """This process's rank and the number of processes in its job, from torchrun's RANK and WORLD_SIZE.

    (0, 1) without WORLD_SIZE, whatever else a cluster has set. Raises UserError for what torchrun never sets.
    """
    names = "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"
    given = {name: os.environ.get(name) for name in names}
    world = given["WORLD_SIZE"] or "1"
    if world == "1":
        return 0, 1
    if lacking := [name for name in names if not given[name]]:
        raise UserError(f"WORLD_SIZE is {world}, but {lacking[0]} is not set; start with torchrun, or unset "
                        "WORLD_SIZE")
    if not (world + given["RANK"]).isdecimal() or int(given["RANK"]) >= int(world):
        raise UserError(f"RANK {given['RANK']} of WORLD_SIZE {world} cannot be; start with torchrun, or "
                        "unset both")
    return int(given["RANK"]), int(world)


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad command line as one line (UserError), and shows the docstring as it is."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_known_args(self, args: list | None = None, namespace=None):
        """argparse's method, on what precedes a #: macOS' shell and cmd.exe pass on a pasted comment.

        ~ is the home folder in `--out=~/found`, too, which shells leave as it is. The name of an existing
        file may begin with a dash.
        """
        args = map(str, sys.argv[1:] if args is None else args)
        args = itertools.takewhile(lambda text: text != "#", args)
        args = (f"./{text}" if re.match("-[^-].", text) and os.path.isfile(text) else text for text in args)
        parts = (re.fullmatch(r"(--[\w-]+=)?(.*)", text, re.DOTALL).groups("") for text in args)
        return super().parse_known_args([flag + os.path.expanduser(path) for flag, path in parts], namespace)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def run_script(main: Callable):
    """Run a script's main(): a user's error becomes one line and exit code 2, a signal 128 + its number."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None: closed by the shell's >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    with contextlib.suppress(AttributeError, OSError):  # what its encoding lacks is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
        sys.stdout.flush()  # a closed pipe shows here at the latest
        sys.exit(code)
    except UserError as e:
        # From a DataLoader's worker the message comes wrapped in the worker's traceback.
        message = str(e).split("UserError: ")[-1].strip()
        print("error:", "\n".join(map(printable, message.split("\n"))), file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has gone (`| head`); Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: standard output was closed; what was written to files is whole", file=sys.stderr)
    except OSError as e:
        if e.errno not in MENDABLE:
            raise
        advice = ADVICE.get(e.errno, "")
        print(f"error: {e.filename or 'writing'}: {e.strerror}; {advice}earlier files are intact",
              file=sys.stderr)
    except KeyboardInterrupt as e:  # with the number of a signal, or Ctrl-C's
        print("stopped", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))
    sys.exit(2)


class Progress:
    """A bar in a terminal; elsewhere (a log, a notebook's cell) a line every `interval` seconds."""

    def __init__(self, total: int, title: str, quiet: bool = False, interval: float = 20.0):
        self.total, self.title, self.done, self.spoken = total, title, 0, time.perf_counter()
        self.quiet, self.interval = quiet, interval
        self.bar = tqdm(total=total, desc=title, leave=False, disable=True if quiet else None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, **values):
        """Show these beside the bar from now on."""
        self.bar.set_postfix(values, refresh=False)

    def update(self, done: int):
        """Show that `done` of the total are finished."""
        self.bar.update(done - self.done)
        self.done = done
        if self.bar.disable and not self.quiet and time.perf_counter() - self.spoken >= self.interval:
            self.spoken = time.perf_counter()
            print(f"{self.title}: {done} of {self.total}", flush=True)


# ---------------------------------------------------------------- settings: one line of a dataclass each

def setting(default, help: str, within: str | None = None, *, group: str | None = None,
            choices: list | None = None, multiple: int | None = None, free: bool = False):
    """A field (int, float, str, bool or Path, perhaps None) of a settings dataclass that is also a flag.

    within: an interval such as "[0, 1)" that a number must lie in. multiple: it must be a multiple of this.
    group: the heading in --help from here on. free: a resumed run may have another value. A default of None
    is worked out later, or means none. With a checkpoint that is older than the setting it stays None, so a
    model must know what that means.
    """
    about = dict(help=help, within=within, group=group, choices=choices, multiple=multiple, free=free)
    return dataclasses.field(default=default, metadata=about)


def in_words(interval: str) -> str:
    """What an interval asks for: "[0, 1)" -> "from 0 to below 1"."""
    low, high = re.split(", *", interval[1:-1])
    if high == "inf":
        return f"{'at least' if interval[0] == '[' else 'above'} {low}"
    start, end = "from" if interval[0] == "[" else "above", "to" if interval[-1] == "]" else "to below"
    return f"{start} {low} {end} {high}"


def is_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


def range_problems(name: str, value: float | None, interval: str) -> list[str]:
    """One message if a flag's number lies outside an interval, else none; None passes."""
    wrong = value is not None and not is_within(value, interval)
    return [f"{flag_of(name)} {value}: must be {in_words(interval)}"] if wrong else []


def check_ranges(args: argparse.Namespace, **intervals: str):
    """Raises UserError naming each argument outside its interval, as size="[16, 4096]"; None passes."""
    if problems := [problem for name, interval in intervals.items()
                    for problem in range_problems(name, getattr(args, name), interval)]:
        raise UserError("; ".join(problems))


def kind_of(field: dataclasses.Field) -> type:
    """The type of a setting: of `Path | None` it is Path; any other type is returned as it is."""
    kinds = [k for k in typing.get_args(field.type) if k is not types.NoneType]
    return kinds[0] if isinstance(field.type, types.UnionType) and len(kinds) == 1 else field.type


def path_or_none(text: str) -> Path | None:
    """The path in a flag that may be left out; the word none means that there is none."""
    return None if text == "none" else Path(text)


def flag_of(name: str) -> str:
    """A setting's flag: "work_dir" -> "--work-dir"."""
    return f"--{name.replace('_', '-')}"


def add_settings(parser: argparse.ArgumentParser, settings: type):
    """Give a parser a flag for every setting of a dataclass."""
    group = parser
    for field in dataclasses.fields(settings):
        about, kind, default = field.metadata, kind_of(field), field.default
        if about["group"]:
            group = parser.add_argument_group(about["group"])
        if kind not in (int, float, str, bool, Path):
            raise TypeError(f"{field.name}: a setting is an int, a float, a str, a bool or a Path, or None")
        flag, text = flag_of(field.name), about["help"]
        shown = "on" if default is True else default
        text += f"; a multiple of {about['multiple']}" if about["multiple"] else ""
        text += "" if default is None or default is False or "(default" in text else f" (default: {shown})"
        text = text.replace("%", "%%")  # argparse's own sign
        if kind is bool:
            action = argparse.BooleanOptionalAction if default else "store_true"
            group.add_argument(flag, action=action, default=default, help=text)
        else:
            metavar = None if about["choices"] else {int: "N", float: "X", str: "NAME"}.get(kind, "PATH")
            read = path_or_none if field.type == Path | None else kind
            group.add_argument(flag, type=read, default=default, choices=about["choices"], metavar=metavar,
                               help=text)


def problems_of(settings) -> list[str]:
    """What is wrong with the numbers in a settings object: one message per problem."""
    found = []
    for field in dataclasses.fields(settings):
        value, about = getattr(settings, field.name), field.metadata
        if value is None or kind_of(field) not in (int, float):
            continue
        if about["within"]:
            found += range_problems(field.name, value, about["within"])
        if about["multiple"] and value % about["multiple"]:
            found.append(f"{flag_of(field.name)} {value}: must be a multiple of {about['multiple']}")
    return found


def without_truth(settings: type, argv: list) -> list:
    """A command line with `--resume True` or `--resume False` (cloud jobs pass these) made plain flags."""
    switches = {flag_of(f.name): f.default for f in dataclasses.fields(settings) if kind_of(f) is bool}
    plain, words = [], {"true": True, "false": False}
    for text in argv:
        on = words.get(str(text).lower()) if plain and plain[-1] in switches else None
        if on is False:
            flag = plain.pop()
            plain += [flag.replace("--", "--no-", 1)] if switches[flag] else []
        elif on is None:
            plain.append(text)
    return plain


def parse_settings(settings: type, description: str | None, argv: list | None = None,
                   presets: dict | None = None):
    """The command line as an object of the dataclass `settings`. Raises UserError with every problem.

    presets: {"sample": {name: value}}: what the flag --sample changes in the defaults.
    """
    parser = Parser(description=description)
    add_settings(parser, settings)
    argv = without_truth(settings, sys.argv[1:] if argv is None else argv)
    for name, values in (presets or {}).items():
        if getattr(parser.parse_known_args(argv)[0], name):
            parser.set_defaults(**values)
    given = settings(**vars(parser.parse_args(argv)))
    if problems := problems_of(given):
        raise UserError("; ".join(problems))
    return given


def as_plain(settings) -> dict:
    """Settings as JSON and checkpoints can hold them: {name: value}."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}


def from_stored(settings: type, stored: dict):
    """Settings from what `as_plain` made, the rest at their defaults. Raises ValueError if out of range."""
    known = [f for f in dataclasses.fields(settings) if f.name in stored]
    paths = {f.name: Path(stored[f.name]) for f in known if kind_of(f) is Path and stored[f.name]}
    config = settings(**{f.name: stored[f.name] for f in known} | paths)
    if problems := problems_of(config):
        raise ValueError(problems[0])
    return config


def changed_settings(settings, stored: dict) -> list[str]:
    """The settings, of those that are not free, that differ from a stored run's: one message each."""
    now = as_plain(settings)
    fields = [f for f in dataclasses.fields(settings) if not f.metadata["free"]]
    # A run of older code lacks new settings: it had their defaults; those worked out later are unknown.
    before = {f.name: stored.get(f.name, now[f.name] if f.default is None else f.default) for f in fields}
    return [f"{flag_of(name)} was {value}, now {now[name]}"
            for name, value in before.items() if value != now[name]]


def as_text(values: dict, names: Iterable[str]) -> str:
    """Some of a dict's numbers in a line, NaN left out: "nme 0.0271, nme_iod 0.0980"."""
    known = {name: v for name in names if (v := values.get(name)) is not None and v == v}
    return ", ".join(f"{name} {value:.4f}" for name, value in known.items())


# ---------------------------------------------------------------- the bundled model, or --checkpoint

def add_checkpoint(parser: argparse.ArgumentParser,
                   about: str = "best_model.pth, or another checkpoint of a run", positional: bool = True):
    """Give a parser --checkpoint and, as before, the same as a positional argument."""
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help=f"{about} (default: the bundled model)")
    if positional:
        parser.add_argument("positional", type=Path, nargs="?", help=argparse.SUPPRESS)


def take_checkpoint(args: argparse.Namespace):
    """Set args.checkpoint to what was given in either way, else None. Raises UserError if both were given."""
    positional = vars(args).pop("positional")
    if args.checkpoint and positional:
        raise UserError(f"--checkpoint {args.checkpoint} and {positional}: give one checkpoint")
    args.checkpoint = args.checkpoint or positional
