"""The contracts of the design: which file imports which, what a setting is, the edge of every script."""
import argparse
import ast
import errno
import io
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train_simple as trainer
from tools.lib import cli, runtime
from tools.lib.checkpoints import load_checkpoint
from tools.lib.cli import (
    Parser,
    Progress,
    UserError,
    as_argument,
    as_plain,
    changed_settings,
    check_ranges,
    flag_of,
    from_stored,
    is_within,
    kind_of,
    parse_settings,
    run_script,
    setting,
)
from tools.lib.files import one_ahead
from train_simple import Config

FILES = sorted(p.relative_to(ROOT).as_posix() for p in
               (ROOT / "dataset.py", ROOT / "train_simple.py", *ROOT.glob("tools/**/*.py")))
# What pip installs with us: pyproject.toml's dependencies, and what timm and scikit-image bring.
CORE = {"torch", "torchvision", "timm", "numpy", "cv2", "PIL", "tqdm", "kagglehub", "skimage", "safetensors", "scipy"}


# ---------------------------------------------------------------- imports

def imports(source, at_start=False):
    """The modules that a file imports, anywhere or while it is itself imported; `from a import b` is a.b."""
    tree = ast.parse(source)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if at_start and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{name.name}" for name in node.names)


def layer(module):
    """0 for tools.lib, 1 for dataset, 2 for train_simple, 3 for a tool; None for what is not ours."""
    for number, pattern in enumerate((r"tools\.lib\b", r"dataset\b", r"train_simple\b", r"tools\b|\.")):
        if re.match(pattern, module):
            return number
    return None


def wrong_imports(file, source):
    """The imports of a file that go against the rule: tools/lib <- dataset <- train_simple <- a tool."""
    own = layer(file.removesuffix(".py").replace("/", "."))
    layers = {module: layer(module) for module in imports(source)}
    return [m for m, number in layers.items() if number is not None and number >= own and not number == own == 0]


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    assert not wrong_imports(file, (ROOT / file).read_text())


@pytest.mark.parametrize("file,source", [
    ("tools/lib/files.py", "import dataset"), ("tools/lib/files.py", "def f():\n    from train_simple import main"),
    ("tools/lib/files.py", "from tools import predict"), ("dataset.py", "import train_simple as t"),
    ("train_simple.py", "import tools.evaluate"), ("tools/predict.py", "from tools.evaluate import main"),
    ("tools/predict.py", "from tools import evaluate"), ("tools/predict.py", "from . import evaluate")])
def test_an_import_the_other_way_would_be_seen(file, source):
    assert wrong_imports(file, source)


@pytest.mark.parametrize("file", FILES)
def test_what_is_optional_is_imported_where_it_is_used(file):
    ours = {"dataset", "train_simple", "tools"}
    names = {module.split(".")[0] for module in imports((ROOT / file).read_text(), at_start=True)}
    assert names <= CORE | ours | set(sys.stdlib_module_names)


# ---------------------------------------------------------------- small is a feature

def test_the_core_and_the_readme_are_read_over_one_coffee():
    core = [(ROOT / file).read_text() for file in ("dataset.py", "train_simple.py")]
    lines = sum(text.count("\n") for text in core)
    assert lines <= 800, f"{lines} lines: move a part to tools/lib, or raise the limit if yours may be longer"
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200 and len(readme.split()) <= 2000


@pytest.mark.parametrize("file", FILES)
def test_no_function_is_above_60_lines(file):
    functions = [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60]


# ---------------------------------------------------------------- settings

def another(field, value):
    """A valid value for a setting that is not `value`."""
    about, kind = field.metadata, kind_of(field)
    if kind is bool:
        return not value
    if kind in (int, float):
        step = about["multiple"] or 1
        tries = [kind(v) for v in ((value or 0) + step, (value or 0) - step, 0.25, 0.75)]
        return next(v for v in tries if v != value and is_within(v, about["within"]))
    return next(c for c in about["choices"] or ("some/where", "else") if str(c) != str(value))


def given(field, value):
    """A setting as the command line has it."""
    if kind_of(field) is bool:
        return [flag_of(field.name) if value else f"--no-{flag_of(field.name)[2:]}"]
    return [flag_of(field.name), str(value)]


BASE = ["--lr", "1e-3", "--sigma", "1.5", "--val-every", "2", "--work-dir", "w", "--crop", "image"]  # what others would decide


@pytest.mark.parametrize("field", [f for f in fields(Config) if f.name != "sample"], ids=lambda f: f.name)
def test_a_setting_is_a_flag_recorded_and_guarded(field):
    before = [*BASE, *(["--empty", "0.1"] if field.name == "background" else ())]
    base = trainer.parse_args(before)
    wanted = another(field, getattr(base, field.name))
    config = trainer.parse_args([*before, *given(field, wanted)])
    got = getattr(config, field.name)
    assert (str(got).endswith(wanted) if isinstance(wanted, str) else got == wanted) and got != getattr(base, field.name)
    stored = json.loads(json.dumps(as_plain(config)))
    assert stored.keys() == {f.name for f in fields(Config)}
    assert as_plain(from_stored(Config, stored)) == stored
    changed = changed_settings(config, as_plain(base))
    assert [text.split()[0] for text in changed] == ([] if field.metadata["free"] else [flag_of(field.name)])


def test_what_decides_the_numbers_is_guarded_at_resume():
    guarded = {f.name for f in fields(Config) if not f.metadata["free"]}
    assert {"backbone", "input_size", "padding", "sigma", "holdout", "epochs", "batch_size", "lr", "seed", "crps_weight",
            "flip", "colour", "beta2", "ema", "progressive", "amp"} <= guarded
    assert not {"data_root", "cache", "work_dir", "num_workers", "device", "resume"} & guarded


def test_every_value_out_of_range_is_reported_at_once():
    ranged = [f for f in fields(Config) if f.metadata["within"]]
    assert {f.name for f in fields(Config) if kind_of(f) in (int, float)} == {f.name for f in ranged}
    wrong = {f: next(kind_of(f)(v) for v in (-1, 0, 10**9) if not is_within(v, f.metadata["within"])) for f in ranged}
    with pytest.raises(UserError) as e:
        trainer.parse_args([text for f, value in wrong.items() for text in (flag_of(f.name), str(value))])
    assert {p.split()[0] for p in str(e.value).split("; ")} == {flag_of(f.name) for f in ranged}
    for flags, rule in ((["--input-size", "100"], "a multiple of 32"), (["--ema", "1"], "from 0 to below 1"), (["--lr", "nan"], "above 0"),
                        (["--lr", "inf"], "above 0"), (["--epochs", "x"], "--help"), (["--bogus"], "--help")):
        with pytest.raises(UserError, match=f"{flags[0]}.*{rule}"):
            trainer.parse_args(flags)
    with pytest.raises(ValueError, match="--ema"):  # a checkpoint's settings are checked as well
        from_stored(Config, {"ema": 2.0})


def test_a_tools_numbers_are_refused_as_a_settings_are():
    ranges = {"size": "[16, 4096]", "min_score": "[0, 1]", "padding": "[0.5, 4]", "batch_size": "[1, inf)", "port": "[1, 65535]"}
    args = argparse.Namespace(size=8, min_score=float("nan"), padding=4.0, batch_size=0, port=None, out="not a number")
    with pytest.raises(UserError) as e:
        check_ranges(args, **ranges)
    assert str(e.value) == "--size 8: must be from 16 to 4096; --min-score nan: must be from 0 to 1; --batch-size 0: must be at least 1"
    vars(args).update(size=16, min_score=1, batch_size=10**6)
    check_ranges(args, **ranges)


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        trainer.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(re.search(rf"^  {flag_of(f.name)}\b", shown, re.M) for f in fields(Config))


def test_defaults_that_depend_on_others():
    parse = trainer.parse_args
    assert [parse(["--input-size", size]).sigma for size in ("128", "256", "512")] == [0.75, 1.5, 3]
    assert [parse(flags).lr for flags in ([], ["--no-pretrained"], ["--no-pretrained", "--weights", "x"])] == [2e-3, 4e-3, 1e-3]
    assert [parse(["--epochs", n]).val_every for n in ("2", "200", "201")] == [2, 2, 3]
    assert parse(["--cache", "none"]).cache is None and parse(["--backbone", "resnet18"]).work_dir.name == "resnet18"
    sample = parse(["--sample", "--epochs", "3"])
    assert sample.epochs == 3 and not sample.pretrained and sample.work_dir.name == "sample"
    assert "sample" in sample.data_root.parts and sample.lr == 4e-3


def test_switches_may_have_a_value_as_cloud_jobs_pass_them():
    config = trainer.parse_args(["--compile", "True", "--tensorboard", "false", "--pretrained", "False", "--amp", "true", "--epochs", "3"])
    assert config.compile and not config.tensorboard and not config.pretrained and config.amp and config.epochs == 3
    with pytest.raises(UserError, match="unrecognized"):
        trainer.parse_args(["--freeze", "perhaps"])


def test_a_run_from_before_a_setting_had_its_default():
    config = trainer.parse_args([])
    stored = as_plain(config)
    del stored["empty"], stored["kl_weight"]
    assert changed_settings(config, stored) == []
    config.kl_weight = 0.5
    assert changed_settings(config, stored) == ["--kl-weight was 0.3, now 0.5"]
    del stored["lr"]  # as of a setting that is worked out, and was added since
    assert config.lr and changed_settings(config, stored) == ["--kl-weight was 0.3, now 0.5"]


def test_a_new_setting_has_any_help_and_a_plain_type(capsys):
    @dataclass
    class New:
        clip: float = setting(0.0, "share that is clipped, in %", "[0,100]")
    assert parse_settings(New, None, ["--clip", "100"]).clip == 100
    with pytest.raises(UserError, match="--clip 101.0: must be from 0 to 100"):
        parse_settings(New, None, ["--clip", "101"])
    with pytest.raises(SystemExit):
        parse_settings(New, None, ["--help"])
    assert "clipped, in % (default: 0.0)" in capsys.readouterr().out
    for kind in (list[int] | None, list[int], int | str, tuple[float, float]):
        with pytest.raises(TypeError, match="steps: a setting is an int, a float"):
            parse_settings(make_dataclass("Several", [("steps", kind, setting(None, "places"))]), None, [])


def test_a_checkpoint_knows_its_data_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = trainer.parse_args(["--data-root", "faces", "--ann-root", "ann"])
    assert (config.data_root, config.ann_root) == (tmp_path / "faces", tmp_path / "ann")
    assert trainer.parse_args([]).data_root is None


def test_every_setting_is_in_what_a_run_leaves(run, flags):
    names = {f.name for f in fields(Config)}
    config = as_plain(trainer.parse_args([*map(str, flags), "--work-dir", str(run.work_dir)]))
    about = json.loads((run.work_dir / "args.json").read_text())
    assert about.keys() == names | {"versions"} and {"python", "torch", "timm", "git"} <= about["versions"].keys()
    for args in (about, *(load_checkpoint(run.work_dir / name)["args"] for name in ("best_model.pth", "last.pth"))):
        assert {name: args[name] for name in names} == config


# ---------------------------------------------------------------- the edge of every script

def test_errors_show_no_control_codes(capsys):
    def main():
        raise UserError("name\x1b[2J.png\r\n  second line")
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: name?[2J.png?\n  second line\n"


def test_a_name_that_the_terminal_lacks_is_escaped(monkeypatch):
    """Output redirected on Windows has such an encoding; so has a C locale."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    with pytest.raises(SystemExit) as end:
        run_script(lambda: print("\u0416.png", flush=True))
    assert end.value.code is None and sys.stdout.buffer.getvalue().strip() == b"\\u0416.png"


def test_streams_that_the_shell_has_closed_are_no_error(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: print("done"))
    assert end.value.code is None
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are always Unicode")
def test_a_name_that_the_locale_does_not_know_is_one_line():
    code = "from tools.lib.files import picture_path; picture_path('.', 'h\\xfcnd.png', 'a.json: ')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode and "UserError: a.json: file_name 'h\\xfcnd.png' does not exist in this system's encoding" in done.stderr


@pytest.mark.parametrize("number,advice", [
    (errno.EACCES, "mend its permissions, or name another (--out, --work-dir, --cache); "), (errno.EEXIST, "it is a file where a folder must be; name another; "),
    (errno.EMFILE, "raise `ulimit -n`, or lower --num-workers; "), (errno.ESTALE, ""), (errno.ENOTCONN, "")])
def test_what_a_disk_refuses_is_one_line(capsys, number, advice):
    def main():
        raise OSError(number, "no", "/data/best_model.pth")
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2 and capsys.readouterr().err == f"error: /data/best_model.pth: no; {advice}earlier files are intact\n"


def test_a_tilde_is_the_home_folder_in_every_spelling(monkeypatch):
    """A shell leaves it alone behind =, in quotes, and in most configuration files."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    config = trainer.parse_args(["--data-root=~/DogFLW", "--ann-root", "~/own", "--work-dir", "a~b"])
    assert config.data_root == Path("/home/me/DogFLW") and config.ann_root == Path("/home/me/own")
    assert config.work_dir == Path("a~b")


def test_a_comment_that_the_shell_hands_over_is_none_of_the_command():
    """macOS' shell and cmd.exe do, where a command is pasted with what is behind it."""
    words = "--epochs 5 # resumed --epochs 7 in a run".split()
    assert trainer.parse_args(words).epochs == 5 and Parser().parse_args(["#", "-x"]) == argparse.Namespace()


@pytest.mark.parametrize("file", ["README.md", "data/README.md", "tools/README.md", "work_dirs/README.md", "work_dirs/pretrained/README.md"])
def test_comments_behind_commands_have_no_meaning_to_a_shell(file):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    assert blocks and not [line for line in "".join(blocks).splitlines() if re.search(r"\s#.*[][;&|<>()?*'\"$`!{}]", line)]


def test_a_printed_command_is_what_the_systems_shells_take(monkeypatch):
    assert as_argument(Path("my photos")) == "'my photos'" and as_argument(0.1) == "0.1"
    with monkeypatch.context() as windows:
        windows.setattr(cli.os, "name", "nt")
        quoted = [as_argument(text) for text in (r"C:\Users\me\photos", r"C:\my photos")]
    assert quoted == [r"C:\Users\me\photos", r'"C:\my photos"']


def test_memory_that_does_not_hold_a_batch_is_named():
    with pytest.raises(UserError, match="--batch-size"), runtime.enough_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), runtime.enough_memory():
        raise RuntimeError("another")


def test_an_error_of_a_worker_is_its_own_line(capsys):
    """PyTorch raises it again with the worker's traceback as its text."""
    def main():
        raise UserError("Caught UserError in DataLoader worker process 0.\nTraceback ...\ndataset.UserError: a.png: damaged")
    with pytest.raises(SystemExit):
        run_script(main)
    assert capsys.readouterr().err == "error: a.png: damaged\n"


def test_a_long_epoch_shows_life_without_a_terminal(capsys):
    def lines(**options):
        with Progress(50, "epoch 1/2", **options) as progress:
            for step in range(50):
                progress.update(step + 1)
        return capsys.readouterr().out.splitlines()
    assert lines(interval=0) == [f"epoch 1/2: {step} of 50" for step in range(1, 51)]
    assert lines() == [] == lines(interval=0, quiet=True)


def test_so_does_a_long_prediction(capsys, monkeypatch):
    monkeypatch.setattr(cli, "time", SimpleNamespace(perf_counter=itertools.count(0, 30).__next__))
    assert list(one_ahead(str, [5, 6, 7], "predicting")) == ["5", "6", "7"]
    assert capsys.readouterr().out.splitlines() == [f"predicting: {done} of 3" for done in range(3)]
