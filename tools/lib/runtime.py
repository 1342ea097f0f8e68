"""What a run needs of the machine: device, precision, processes, CUDA graphs, signals, averaged weights."""
import builtins
import contextlib
import ctypes
import errno
import gc
import multiprocessing.queues
import os
import platform
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tools.lib.cli import UserError, flag_of, place_in_job, single_line
from tools.lib.files import ROOT, quota

# ---------------------------------------------------------------- device and precision

WAYS_OUT = "Install a build of PyTorch that can (see 'Troubles' in README.md), or take --device cpu"


def choose_device(name: str, training: bool = False) -> torch.device:
    """torch.device for --device; auto is the first available of cuda, mps, cpu. Raises UserError if it fails.

    With auto, an NVIDIA GPU that this PyTorch cannot use is an error for `training`, which would take days on
    the CPU; otherwise a note is printed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about drivers and old GPUs: the errors below explain them
        if name == "auto":
            cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
            name = "cuda" if cuda else "mps" if mps else "cpu"
            if not cuda and nvidia_gpu_here():
                problem = f"there is an NVIDIA GPU, but this PyTorch cannot use it ({why_no_cuda()})"
                if training:
                    raise UserError(f"--device auto: {problem}. {WAYS_OUT}")
                print(f"note: {problem}; using the CPU instead", file=sys.stderr)
        if str(name).partition(":")[0] not in ("cuda", "mps", "cpu"):
            raise UserError(f"--device {name}: must be auto, cuda, mps or cpu")
        try:
            device = torch.device(name)
            if device.type == "cuda":
                own = os.environ.get("LOCAL_RANK") if place_in_job()[1] > 1 or device.index is None else None
                index = int(own or device.index or 0)
                count = torch.cuda.device_count()
                device = torch.device("cuda", index)
                if 0 < count <= index:
                    raise UserError(f"--device {name}: no GPU number {index}, this machine has {count}")
            torch.zeros(1, device=device).add_(1).item()  # a kernel: this build may have none for an old GPU
        except (RuntimeError, AssertionError) as e:
            taken = is_out_of_memory(e) or "busy or unavailable" in str(e)
            way = "Other programs use it; wait, or set CUDA_VISIBLE_DEVICES to another" if taken else WAYS_OUT
            raise UserError(f"--device {name}: does not work here ({single_line(e)}). {way}") from None
    return device


def nvidia_gpu_here() -> bool:
    """Whether this process was given an NVIDIA GPU, by a device file, nvidia-smi or CUDA's error message.

    /proc/driver/nvidia would not do: in a container that was given no GPU it shows the host's.
    """
    if re.fullmatch("|-.*|NoDevFiles|none", os.environ.get("CUDA_VISIBLE_DEVICES", "0"), re.IGNORECASE):
        return False  # hidden on purpose, NoDevFiles by Slurm; cuda:0 and the like are mistakes
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:  # Windows, and Linux on it, have no device file
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    return listed.startswith("GPU ") or "driver on your system is too old" in why_no_cuda()


def why_no_cuda() -> str:
    """PyTorch's own reason for not starting CUDA, in one line."""
    if not torch.backends.cuda.is_built():
        return "a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        text = single_line(e, 600)
        return text[max(0, text.find("Error ")):].split(". Please ")[0][:300]
    return "no device found"


def choose_amp(device: torch.device, wanted: bool = True) -> torch.dtype | None:
    """bfloat16 if the device computes in it, float16 if its tensor cores support only that, else None."""
    if not wanted or device.type == "mps":
        return None
    if device.type == "cuda":
        generation, name = torch.cuda.get_device_capability(device)[0], torch.cuda.get_device_name(device)
        # GTX 16.., T1000, MX450 and the like: no tensor cores, and NaN in half precision (pytorch #77955)
        half = generation == 7 and not re.search(r"GTX 16|\b(T|MX)[1-9]\d{2,3}\b", name)
        return torch.bfloat16 if generation >= 8 else torch.float16 if half else None
    computes = (getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("amx_tile", "avx512_bf16"))
    return torch.bfloat16 if any(ask and ask() for ask in computes) else None  # else float32 is faster


def autocast(device: torch.device, amp: torch.dtype | None) -> contextlib.AbstractContextManager:
    """The context of a forward pass; amp is None, torch.bfloat16 or torch.float16."""
    return torch.autocast(device.type, amp) if amp else contextlib.nullcontext()


def prepare(device: torch.device):
    """Set up this process so that steps on the device are fast."""
    cv2.setNumThreads(0)  # data workers are the parallelism; OpenCV's own threads would fight them
    # Beyond a container's quota, threads would wait for each other. PyTorch minds only the cores themselves;
    # do not ask for these here, as OMP_PROC_BIND has bound this thread, but not the others, to one.
    if torch.get_num_threads() > quota():
        torch.set_num_threads(quota())
    if device.type == "cpu" and sys.platform == "linux":
        # glibc returns a large tensor's memory to the system when it is freed; getting the pages again costs
        # a third of a step on the CPU. M_MMAP_MAX = 0 and a high M_TRIM_THRESHOLD keep them (mallopt(3)).
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)
            libc.mallopt(-1, 2**31 - 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 for float32 matrix products


if hasattr(os, "register_at_fork"):  # a fork has none of the threads, and would wait for them for ever
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


# ---------------------------------------------------------------- one process or many

class Processes:
    """The processes of a job as torchrun starts them. With one process nothing is exchanged.

    Use as a context manager: the process group is closed at its end, unless an error ends it.
    """

    def __init__(self, device_name: str, training: bool = True):
        self.rank, self.world = place_in_job()
        self.device = choose_device(device_name, training)
        self.predict_batch = 16  # faces that are validated together
        if self.world > 1 and self.device.type == "mps":
            raise UserError("a Mac's GPU takes one process; start without torchrun, or with --device cpu")
        prepare(self.device)
        if self.world > 1:
            cuda = self.device.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30),
                                    device_id=self.device if cuda else None)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type | None, *_):
        if self.world > 1 and kind is None:
            # DistributedDataParallel is a reference cycle that holds the group. If it were left to exit, a
            # gloo thread that then frees the last broadcast's tensor would abort the process.
            gc.collect()
            dist.destroy_process_group()

    def __str__(self) -> str:
        return f"{self.world} x {self.device}"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def say(self, *text):
        """Print, in the first process only."""
        if self.first:
            print(*text, flush=True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the processes."""
        if self.world == 1:
            return model
        wrapped = nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # `average_buffers` averages them instead, before their use
        return wrapped

    def without_sync(self, model: nn.Module, left: int) -> contextlib.AbstractContextManager:
        """The context of a micro-batch: if others are `left`, its gradients add up without an exchange."""
        return model.no_sync() if left and self.world > 1 else contextlib.nullcontext()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's sum over the processes, on their device; with one process the tensor itself."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def average_buffers(self, *models: nn.Module):
        """Average batch norm statistics over the processes, which saw different faces, in one exchange."""
        buffers = [b for model in models for name, b in model.named_buffers() if ".running_" in name]
        if buffers and self.world > 1:
            flat = self.sum(torch.cat([b.flatten() for b in buffers])) / self.world
            for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers])):
                buffer.copy_(mean.view_as(buffer))

    def from_first(self, make: Callable):
        """What make() returns in the first process, sent to all, because nodes may not share a disk."""
        box = [make() if self.first else None]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]


# ---------------------------------------------------------------- what settings ask for

def contradictions(config) -> list[str]:
    """The contradictions in a run's settings: one message each."""
    losses = {flag_of(name): value for name, value in vars(config).items() if name.endswith("_weight")}
    resumed = config.resume and (config.work_dir / "last.pth").exists()
    locator = config.crop == "image" and config.empty and config.kl_weight
    return [text for wrong, text in (
        ((config.empty or config.background) and not locator,
         "--empty, --background: need --crop image, and --empty and --kl-weight above 0"),
        (config.graphs and (config.compile or config.accumulate > 1),
         "--graphs: not together with --compile or --accumulate; leave one of them out"),
        (not any(losses.values()), f"{', '.join(losses)}: all are 0; nothing would be learnt"),
        (config.freeze and not (config.weights or config.pretrained or resumed),
         "--freeze: would keep random weights; give --weights FILE")) if wrong]


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d without its batch counter, which only a momentum of None needs: a kernel less per layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)


def for_training(model: nn.Module, config, plan, processes: Processes, amp: torch.dtype | None) -> nn.Module:
    """The model as steps call it: graphed or compiled where wanted, its gradients averaged over processes."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.momentum is not None:
            module.__class__ = BatchNorm
    if config.graphs:
        faces = plan.batch_size // processes.world
        model = graphed(model, plan.sizes, faces, processes.device, amp, processes.say)
    elif config.compile:
        model = torch.compile(model, dynamic=False)
    if processes.device.type == "cuda":
        # Small batches are bound by kernel launches. Without gradients, twice the faces need no more memory.
        processes.predict_batch = min(64, 2 * plan.batch_size // (processes.world * config.accumulate))
    return processes.wrap(model)


class Graphed(nn.Module):
    """A model whose training passes are replayed as CUDA graphs; other shapes, and eval mode, run normally.

    captured: {shape of a batch: function}.
    """

    def __init__(self, model: nn.Module, captured: dict):
        super().__init__()
        self.model, self.captured = model, captured

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        captured = self.captured.get(tuple(images.shape)) if self.training else None
        return (captured or self.model)(images)


class WithAutocast(nn.Module):
    """A model with autocast inside its forward pass, so that backward is captured outside autocast."""

    def __init__(self, model: nn.Module, device: torch.device, amp: torch.dtype | None):
        super().__init__()
        self.model, self.device, self.amp = model, device, amp

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Cached casts of weights would be captured once, and replayed with the weights of that moment.
        dtype, wanted = self.amp or torch.bfloat16, bool(self.amp)
        with torch.autocast(self.device.type, dtype, enabled=wanted, cache_enabled=False):
            return self.model(images)


def graphed(model: nn.Module, sizes: list[int], faces: int, device: torch.device, amp: torch.dtype | None,
            say: Callable) -> nn.Module:
    """Capture training passes of `faces` crops of each of `sizes` pixels: two launches instead of thousands.

    It runs the same kernels on the same numbers (torch.cuda.make_graphed_callables). Gradients lie in the
    graph's buffers, which the next backward pass overwrites, so they cannot accumulate. Without CUDA, it says
    so and returns the model. Call it before DistributedDataParallel wraps the model and other threads use
    CUDA. Raises UserError if capture fails, because CUDA's state cannot be trusted after that.
    """
    if device.type != "cuda":
        say(f"--graphs: needs CUDA; on {device.type} steps run as usual")
        return model
    # Gradients remember the first capture's stream: neither wait for it nor warn. Only newer torch has these.
    getattr(torch.autograd.graph, "set_override_stale_capture_stream", bool)(True)
    getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", bool)(False)
    before, captured = [b.clone() for b in model.buffers()], {}
    model.train()
    for size in sizes:
        images = torch.zeros(faces, 3, size, size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        try:
            captured[tuple(images.shape)] = torch.cuda.make_graphed_callables(
                WithAutocast(model, device, amp), (images,), allow_unused_input=True)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--graphs: a step of {faces} faces at {size} pixels cannot be captured "
                            f"({single_line(e)}); do without, or take a smaller --batch-size") from None
    for buffer, value in zip(model.buffers(), before):
        buffer.copy_(value)  # the warm-up passes changed batch norm's statistics
    say(f"--graphs: steps of {faces} faces at {' and '.join(map(str, sizes))} pixels captured")
    return Graphed(model, captured)


# ---------------------------------------------------------------- how a run ends

NO_ENGINE = "unable to find an engine"  # cuDNN
NO_WORKER = ("a data worker was killed, or could not start or pass on its batch (if memory or open files ran "
             "out, lower --num-workers; in a container, raise --shm-size)")


def stop(signum: int, _):
    signal.signal(signum, signal.SIG_IGN)  # an impatient second one would only break off the ending
    raise KeyboardInterrupt(signum)


@contextlib.contextmanager
def explained_ends(last: Path) -> Iterator[None]:
    """Turn what ends a run early into one line and an exit code: a signal, a lost process, no memory left."""
    with contextlib.suppress(ValueError):  # in a thread (of a web page) there are no handlers
        signal.signal(signal.SIGINT, stop)
        if place_in_job()[1] == 1:
            signal.signal(signal.SIGTERM, stop)  # in a job they may wait in C++, where no handler runs
    try:
        yield
        return
    except KeyboardInterrupt as e:
        reason, code = "stopped", 128 + (e.args[0] if e.args else signal.SIGINT)
    except OSError as e:
        if e.errno not in (errno.ENOMEM, errno.EAGAIN) or e.filename:
            raise
        reason, code = NO_WORKER, 2  # no room for one more process
    except (RuntimeError, ValueError, MemoryError) as e:
        reason, code = reason_of(e), 2
        if not reason:
            raise
    where = f", from {last}" if last.exists() else ""
    print(f"error: {reason}. Continue with --resume{where}", file=sys.stderr)
    if reason == "stopped" and hasattr(builtins, "__IPYTHON__"):  # a notebook goes on, a script ends now
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(code)


def reason_of(error: Exception) -> str | None:
    """What an error means to the user, or None: PyTorch has no types for most of these."""
    text, dynamo = str(error), sys.modules.get("torch._dynamo")
    # Newer versions have a broader type, which covers a missing Triton, too.
    failed = dynamo and getattr(dynamo.exc, "ShortenTraceback", dynamo.exc.BackendCompilerFailed)
    if failed and isinstance(error, failed):
        return f"--compile: this machine cannot ({single_line(text)}); leave it out"
    if "more than 1 value per channel" in text:
        return ("this backbone needs two faces in every part of a batch; raise --batch-size, or lower "
                "--accumulate")
    # Not an error inside a worker, which keeps its traceback.
    if any(part in text for part in ("DataLoader worker (pid", "Pin memory thread", "Too many open files. C",
                                     "items of ancdata", "can't start new thread")):
        return NO_WORKER
    if is_out_of_memory(error):
        other = ", or cuDNN's libraries do not fit this PyTorch" if NO_ENGINE in text else ""
        return f"out of memory on the device; raise --accumulate, without --graphs{other}"
    if isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "Connection")):
        return f"another process of this job ended, or cannot be reached ({single_line(text, 160)})"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means out of memory; cuDNN without room for any algorithm says it finds no engine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in ("out of memory", NO_ENGINE, "ALLOC_FAILED", "DefaultCPUAllocator"))


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Raises UserError if a batch does not fit into the device's memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise UserError("out of memory on the device; lower --batch-size") from None


def end_worker(error: Exception, _):
    """End a data worker that cannot hand a batch over, and say why."""
    print(f"a data worker: {single_line(error)}", file=sys.stderr, flush=True)
    os._exit(1)


def quiet_worker(_: int):
    """Set up a data worker: it leaves signals to the parent, which ends its workers, and has one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # ending the whole group is no failure
    sys.excepthook = lambda *_: None  # of the thread that hands batches over, when the parent has ended
    # Where that thread finds no room in /dev/shm it would drop the batch, and the parent would wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


# ---------------------------------------------------------------- weights over time

class WeightAverage:
    """An exponential moving average of a model's weights and batch norm statistics.

    After Polyak & Juditsky 1992, who weigh all steps alike. The decay warms up with the steps, so that the
    first ones are soon forgotten.
    """

    def __init__(self, model: nn.Module, average: nn.Module, decay: float):
        self.decay = decay
        self.pair = [[v for v in m.state_dict().values() if v.is_floating_point()] for m in (average, model)]

    def update(self, step: int):
        torch._foreach_lerp_(*self.pair, 1 - min(self.decay, (1 + step) / (10 + step)))


class FiniteWatch:
    """Remembers on the device, without waiting for it, after how many steps the loss was first not finite."""

    def __init__(self, device: torch.device, files: list[str], title: str, last: Path):
        self.first, self.recent = torch.full((), -1, device=device), []
        self.files, self.title, self.last = files, title, last

    def add(self, loss: torch.Tensor, faces: list[int]):
        """Add a step's loss, and the indices of the faces in it."""
        self.first = torch.where(loss.isfinite() | (self.first >= 0), self.first, len(self.recent))
        self.recent.append(faces)

    def check(self, scaler: torch.amp.GradScaler, model: nn.Module | None):
        """Look at the steps since the last check; waits for the device. With `model`, at its weights too.

        With float16, steps whose gradients overflow are skipped, but not for ever. UserError names the faces.
        """
        first, recent, self.recent = int(self.first), self.recent, []
        if first < 0 and model is not None and not nn.utils.get_total_norm(model.parameters()).isfinite():
            first = len(recent) - 1  # the last step's own gradient
        if first >= 0 or scaler.is_enabled() and scaler.get_scale() < 1:
            names = [self.files[i] for i in recent[first]]  # -1, the last: float16 gave up on gradients
            named = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            earlier = f"; earlier epochs are in {self.last}" if self.last.exists() else ""
            raise UserError(f"{self.title}: the loss or its gradient is not finite at or before the batch of "
                            f"{named}; look at these faces, lower --lr, or try --no-amp{earlier}")


def versions(device: torch.device, amp: torch.dtype | None) -> dict[str, str]:
    """What a run was made with, as plain strings; rounding depends on the device and the precision, too."""
    try:
        # Named explicitly: no repository around this one counts, but another user's checkout does, too.
        command = ["git", "--git-dir", ROOT / ".git", "--work-tree", ROOT, "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"python": platform.python_version(), "torch": str(torch.__version__), "timm": timm.__version__,
            "numpy": np.__version__, "git": git or "unknown",
            "device": f"{place_in_job()[1]} x {name}", "precision": str(amp or torch.float32).split(".")[1]}
