"""Measure this machine: how fast faces load, how fast a step is, what the limit is, how long a run takes.

    uv run tools/benchmark.py --sample
    uv run tools/benchmark.py --data-root DogFLW --backbone hrnet_w32 --no-pretrained

Takes the flags of train_simple.py (its --help lists them), and keeps nothing of what it trains. On a GPU,
without --batch-size, it also looks for the largest batch that fits. All of it uses the trainer's own step and
loop.
"""
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

import train_simple as trainer
from dataset import DogFLWDataset, Faces, normalize
from tools.lib import runtime
from tools.lib.batches import batches_of, epoch_batches
from tools.lib.cli import UserError, run_script
from tools.lib.files import cores
from tools.lib.windows import with_background

PRICE = ("--batch-size 64 --lr {lr:g}; its price, measured for 64 instead of 16 at twice the rate from "
         "scratch at 128 px: nme_iod 0.1082 instead of 0.1040 after 20 epochs, 0.0896, not 0.0866, after 60")
LAUNCH_BOUND = 0.8  # the share of a step's time that enqueueing it takes, above which the device waits
ENDLESS = 10**6  # epochs
INPUT_SECONDS = 4.0  # for which the delivery of faces is timed


@dataclass
class Bench:
    """What is measured: a run that is never saved, and its faces."""
    run: trainer.Run
    faces: Faces
    val: Faces
    dataset: DogFLWDataset

    def __post_init__(self):
        self.config, self.device = self.run.config, self.run.processes.device
        self.crops = self.run.plan.sizes
        self.micro_batch = self.run.plan.batch_size // self.config.accumulate
        self.repeat = 20 if self.device.type == "cuda" else 8

    def plan(self, faces: int) -> trainer.Plan:
        """A plan without end for this many faces, with full-size crops only."""
        return trainer.Plan(replace(self.config, progressive=0.0, epochs=ENDLESS), faces)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def as_rate(faces: float) -> str:
    """So many faces a second, as a cell of the table."""
    return f"{faces:9.{0 if faces >= 10 else 2}f} faces/s"


def print_rate(what: str, faces: int, seconds: float, more: str = "") -> None:
    """One line of the table: faces in so many seconds."""
    print(f"{what:26s}{as_rate(faces / seconds)}  {seconds * 1e3:8.1f} ms{more}")


# ---------------------------------------------------------------- input

def samples_per_second(bench: Bench, workers: int) -> float:
    """Faces a second that `workers` processes deliver (0: this one), augmentation on, start-up left out."""
    sampler = epoch_batches(bench.plan(len(bench.dataset)))
    batches = batches_of(bench.dataset, sampler, workers, torch.device("cpu"))
    for _ in range(2 + 2 * workers):  # batches that were fetched ahead, before the timing begins
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < INPUT_SECONDS:
        count += len(next(batches)["index"])
    return count / (time.perf_counter() - start)


def timed(batches: Iterator, waits: list[float]) -> Iterator:
    """Yield the same batches, and add the seconds spent waiting for each to the list `waits`."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - start)
        yield batch


# ---------------------------------------------------------------- a step

def resident(bench: Bench, faces: int, size: int) -> dict:
    """A batch of so many faces, cut to `size` pixels, that is on the device already."""
    batch = bench.dataset.batch([(0, i % len(bench.dataset), size) for i in range(faces)])
    return {k: v if k in ("index", "matrix") else v.to(bench.device) for k, v in batch.items()}


def step_seconds(bench: Bench, batch: dict, repeat: int | None = None) -> float:
    """Seconds per micro-batch of a bare step: the trainer's own, on a batch that is on the device."""
    repeat = repeat or bench.repeat
    bench.run.wrapped.train()
    batches = itertools.repeat(batch)
    for step in range(repeat + 2):  # the first two choose kernels
        if step == 2:
            synchronize(bench.device)
            start = time.perf_counter()
        trainer.train_step(bench.run, batches, step)
    synchronize(bench.device)
    return (time.perf_counter() - start) / repeat / bench.config.accumulate


def enqueue_seconds(bench: Bench) -> float:
    """Seconds per micro-batch that this process needs to enqueue a step's kernels on an idle device.

    With graphs, the step itself is timed. Else a step of two small faces: the same kernels with little to
    compute, because a device that falls about a thousand kernels behind makes the process wait for it.
    """
    graphs = isinstance(bench.run.wrapped, runtime.Graphed)
    batch = resident(bench, *(bench.micro_batch, bench.config.input_size) if graphs else (2, 64))
    found, search = [], torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = graphs and search  # no long search for these small faces' kernels
    step_seconds(bench, batch, 2)
    for step in range(5):
        start = time.perf_counter()
        trainer.train_step(bench.run, itertools.repeat(batch), step)
        found.append(time.perf_counter() - start)
        synchronize(bench.device)
    torch.backends.cudnn.benchmark = search
    return min(found) / bench.config.accumulate


def growing_batches(measure: Callable[[int], float]) -> Iterator[tuple[int, float]]:
    """Double the batch until the memory is full: yields (size, seconds a step); measure(size) -> seconds."""
    for size in (16 << i for i in range(8)):
        try:
            yield size, measure(size)
        except RuntimeError as e:
            if not runtime.is_out_of_memory(e) and "INT_MAX" not in str(e):  # some kernels count in 32 bits
                raise
            return


# ---------------------------------------------------------------- by part

class Parts:
    """Where a forward pass's time and a step's memory go: {part: [seconds, bytes kept for backward]}."""

    def __init__(self, model: trainer.LandmarkNet, device: torch.device):
        self.device, self.parts, self.open, self.hooks = device, {}, [], []
        self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for owner, prefix in ((model.backbone, "backbone."), (model, "")):
            for name, child in owner.named_children():
                part = "backbone.stem" if prefix and name[:-1] in ("conv", "bn", "act") else prefix + name
                several = isinstance(child, torch.nn.ModuleList | torch.nn.Sequential)  # called one by one
                for module in child if several else [child]:
                    if module is not model.backbone:
                        enter, leave = (lambda *_, part=part: self.enter(part)), (lambda *_: self.leave())
                        self.hooks.append(module.register_forward_pre_hook(enter))
                        self.hooks.append(module.register_forward_hook(leave))

    def of(self, part: str) -> list:
        return self.parts.setdefault(part, [0.0, 0])

    def enter(self, part: str) -> None:
        synchronize(self.device)
        self.open.append((part, time.perf_counter()))

    def leave(self) -> None:
        synchronize(self.device)
        part, start = self.open.pop()
        spent = time.perf_counter() - start
        self.of(part)[0] += spent
        if self.open:  # an outer part's time does not include its inner parts
            self.of(self.open[-1][0])[0] -= spent

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the bytes of a tensor that the backward pass will need, and return it detached."""
        storage = tensor.untyped_storage()
        self.of(self.open[-1][0])[1] += (storage.data_ptr() not in self.seen) * storage.nbytes()
        self.seen.add(storage.data_ptr())
        return tensor.detach()  # else a reference cycle would keep the whole graph after the pass

    def forward(self, bench: Bench, images: torch.Tensor) -> dict[str, list]:
        """One pass by part."""
        self.parts = {}
        self.enter("fusion, softmax")
        with runtime.autocast(self.device, bench.run.amp):
            bench.run.model(images)
        self.leave()
        return self.parts


def profile_parts(bench: Bench, batch: dict) -> dict[str, tuple[float, int]]:
    """{part: (seconds of a forward pass, bytes kept for backward)} of the bare model."""
    model = bench.run.model
    images, parts = normalize(batch["image"], model.mean, model.std), Parts(model, bench.device)
    parts.forward(bench, images)
    with torch.autograd.graph.saved_tensors_hooks(parts.keep, lambda t: t):  # slow: this pass is not timed
        kept = parts.forward(bench, images)
    seconds = parts.forward(bench, images)
    for hook in parts.hooks:
        hook.remove()
    return {part: (seconds[part][0], kept[part][1]) for part in seconds}


# ---------------------------------------------------------------- the loop

def measure_loop(bench: Bench, bare: float) -> tuple[float, float]:
    """Run two epochs of the real loop; of the second: seconds per micro-batch, share spent waiting for faces.

    On the CPU, an epoch has only as many faces as take about ten seconds. bare: seconds of a micro-batch in a
    bare step.
    """
    number, waits = len(bench.faces), []
    if bench.device.type == "cpu":
        steps = max(2, int(10 / (bare * bench.config.accumulate)))
        number = min(number, bench.run.plan.batch_size * steps)
    bench.run.plan = plan = bench.plan(number)
    sampler = epoch_batches(plan, bench.run.progress["epoch"])
    batches = timed(batches_of(bench.dataset, sampler, bench.config.num_workers, bench.device), waits)
    for _ in range(2):  # in the second, the workers are running already
        waits.clear()
        start = time.perf_counter()
        trainer.train_one_epoch(bench.run, batches, bench.faces.files)
        synchronize(bench.device)
        seconds = time.perf_counter() - start
    waited = sum(waits)
    each = 1e3 * waited / len(waits)
    print(f"data wait                 {each:9.1f} ms a batch, {100 * waited / seconds:.1f} % of the loop")
    return seconds / plan.steps / bench.config.accumulate, waited / seconds


def measure_validation(bench: Bench) -> float:
    """Seconds of a validation at full size."""
    some = bench.val.take(range(len(bench.val) if bench.device.type != "cpu" else min(len(bench.val), 64)))
    dataset = dataset_of(some, bench.config)
    for _ in range(2):  # the second has its kernels chosen
        start = time.perf_counter()
        trainer.validate(bench.run, dataset)
        seconds = time.perf_counter() - start
    return seconds / len(some) * len(bench.val)


def print_memory(device: torch.device) -> None:
    """The most that this process has used."""
    if os.name == "posix":
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        print(f"peak memory               {host:9.2f} GiB host, without workers")
    if device.type == "cuda":  # what graphs hold is reserved, not allocated
        used, held = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        print(f"  of the GPU              {used / 2**30:9.2f} GiB in tensors, {held / 2**30:.2f} GiB taken")


# ---------------------------------------------------------------- what it means

def verdict(bare: float, loop: float, waited: float, enqueue: float | None, config: trainer.Config) -> str:
    """What limits a run, in words, and what to try.

    bare, loop, enqueue: seconds of a micro-batch in a bare step, in the loop, and to enqueue it (None on the
    CPU). waited: the share of the loop spent waiting for faces.
    """
    extra = loop / bare - 1
    if extra > 0.05:
        input_limits = waited > extra / 2
        what = "the input; try more --num-workers" if input_limits else "the loop's own work"
        return f"limited by {what} ({100 * extra:.0f} % over the bare step)"
    if enqueue is None or enqueue < LAUNCH_BOUND * bare:
        return "limited by the device's arithmetic"
    ways = ["--graphs"] if not (config.graphs or config.compile or config.accumulate > 1) else []
    if config.batch_size < 64:
        ways.append(PRICE.format(lr=config.lr * (64 / config.batch_size) ** 0.5))
    what = f"launches limit, the device waits for them ({100 * enqueue / bare:.0f} % of a step)"
    return f"{what}; try {', or '.join(ways)}" if ways else what


def projected_hours(bench: Bench, loop: float, small: float, validation: float) -> float:
    """Hours of the whole run, from seconds of a micro-batch in the loop and of a validation at full size.

    small: how long a step on small crops takes, as a fraction of a full one.
    """
    config, plan = bench.config, trainer.Plan(bench.config, len(bench.faces))
    epoch_seconds, total = loop * config.accumulate * plan.steps, 0
    for epoch in range(config.epochs):
        scale = small if plan.size(epoch) < config.input_size else 1
        total += scale * (epoch_seconds + plan.validates(epoch) * validation)
    return total / 3600


def dataset_of(faces: Faces, config: trainer.Config, **more: object) -> DogFLWDataset:
    """Faces as the trainer cuts them."""
    options = {name: getattr(config, name) for name in ("padding", "seed", "cache")}
    return DogFLWDataset(faces, config.input_size, **options, **more)


def set_up(config: trainer.Config, processes: runtime.Processes) -> Bench:
    """The run to measure, as the trainer sets it up."""
    if processes.world > 1:
        raise UserError("benchmark.py measures one process; start it without torchrun")
    faces, val, _, _ = trainer.load_sets(config, processes)
    faces = with_background(faces, config.background, processes.say, val)
    run = trainer.Run(config, faces.scheme, trainer.Plan(config, len(faces)), processes)
    device = processes.device
    cuda, threads = device.type == "cuda", f"{device.type}, {torch.get_num_threads()} threads"
    print(f"{torch.cuda.get_device_name(device) if cuda else threads}; torch {torch.__version__}; "
          f"{config.backbone}, {config.input_size} px, batch {config.batch_size}, "
          f"{str(run.amp or torch.float32).removeprefix('torch.')}; {len(faces)} + {len(val)} faces")
    return Bench(run, faces, val, dataset_of(faces, config, augment=config))


def print_parts(bench: Bench, batch: dict, bare: float) -> None:
    """The forward pass, part by part."""
    parts, faces = profile_parts(bench, batch), len(batch["index"])
    forward = sum(seconds for seconds, _ in parts.values())
    print_rate("forward pass by part", faces, forward, f", {100 * forward / bare:.0f} % of a step")
    for part, (seconds, kept) in parts.items():
        print(f"  {part:22s}  {100 * seconds / forward:8.1f} %  {kept / faces / 2**20:8.1f} MiB kept a face")


def print_batches(bench: Bench) -> None:
    """Print the rate at every batch size that fits. Only the run's own size uses CUDA graphs."""
    size = bench.config.input_size
    for batch, seconds in growing_batches(lambda n: step_seconds(bench, resident(bench, n, size), 3)):
        print_rate(f"bare step, batch {batch}", batch, seconds,
                   ", without graphs" * (bench.config.graphs and batch != bench.micro_batch))
    bench.run.optimizer.zero_grad()  # what a pass that failed has left


def measure(bench: Bench, search: bool) -> None:
    """Print the table, from the input to the verdict."""
    config, n, small = bench.config, bench.micro_batch, 1.0
    for workers in sorted({0, 1, 2, 4, config.num_workers}):
        if workers <= cores():
            print(f"input, {workers} workers          {as_rate(samples_per_second(bench, workers))}")
    batch = resident(bench, n, config.input_size)
    bare, enqueue = step_seconds(bench, batch), None
    print_rate("bare step", n, bare)
    if bench.device.type != "cpu":
        enqueue = enqueue_seconds(bench)
        share = 100 * enqueue / bare
        print(f"  to enqueue it           {1e3 * enqueue:9.1f} ms, {share:.0f} % of the time to finish it")
    if bench.crops[0] < config.input_size:
        seconds = step_seconds(bench, resident(bench, n, bench.crops[0]))
        print_rate(f"bare step, {bench.crops[0]} px", n, seconds)
        small = seconds / bare
    print_parts(bench, batch, bare)
    loop, waited = measure_loop(bench, bare)
    bare = (bare + step_seconds(bench, batch)) / 2  # before and after the loop: a machine's speed drifts
    print(f"full loop                 {as_rate(n / loop)}  {loop / bare:8.2f} times a bare step's time")
    validation = measure_validation(bench)
    epoch_seconds = loop * config.accumulate * trainer.Plan(config, len(bench.faces)).steps
    print_rate("validation", len(bench.val), validation,
               f", {100 * validation / epoch_seconds:.0f} % of an epoch; one every {config.val_every} epochs")
    print_memory(bench.device)
    hours = projected_hours(bench, loop, small, validation)
    duration = f"{hours:.2f} h" if hours >= 0.1 else f"{60 * hours:.1f} min"
    print(f"{config.epochs} epochs of {len(bench.faces)} faces: {duration}; "
          f"{verdict(bare, loop, waited, enqueue, config)}")
    if search:
        print_batches(bench)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    config = trainer.parse_args(argv)
    with contextlib.suppress(AttributeError):  # a notebook's output shows each line anyway
        sys.stdout.reconfigure(line_buffering=True)  # in a log, too, each as soon as it is known
    with runtime.Processes(config.device) as processes, runtime.enough_memory():
        bench = set_up(config, processes)
        measure(bench, bench.device.type == "cuda" and not any(flag.startswith("--batch") for flag in argv))


if __name__ == "__main__":
    run_script(main)
