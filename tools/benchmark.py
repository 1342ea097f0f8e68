"""Measure this machine: how fast faces come, how fast a step is, what limits, and how long a run will take.

    uv run python tools/benchmark.py --sample
    uv run python tools/benchmark.py --data-root DogFLW --backbone hrnet_w32 --no-pretrained

Takes the flags of train_simple.py. Without --batch-size it also looks for the largest batch that fits on a GPU.
"""
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import dataset as data
import train_simple as trainer
from dataset import Augmentation, DogFLWDataset, UserError, run_script


def samples_per_second(dataset, args, workers, seconds=4.0):
    """Faces a second that `workers` processes deliver (0: this process), augmentation on, start-up left out."""
    sampler = trainer.EpochBatches(len(dataset), args.batch_size, 0, 0, [dataset.size] * 10**5)
    batches = trainer.batches_of(dataset, sampler, workers)
    for _ in range(2 + 2 * workers):  # what was fetched ahead while nobody timed
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches)["index"])
    return count / (time.perf_counter() - start)


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def timed(batches, waits):
    """The same batches; the seconds that each was waited for go to the list `waits`."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - start)
        yield batch


def step_seconds(model, optimizer, batch, args, env, repeat):
    """Seconds of a bare step: forward, backward and optimizer on a batch that is on the device already."""
    batch = {k: batch[k].to(env.device) for k in ("image", "keypoints", "visibility", "colour")}
    for step in range(repeat + 2):
        if step == 2:
            synchronize(env.device)
            start = time.perf_counter()
        images = data.normalize(batch["image"], batch["colour"])
        with trainer.autocast(env.device, env.amp):
            heatmaps = model(images)
        trainer.heatmap_losses(heatmaps, batch["keypoints"], batch["visibility"], args.sigma).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(env.device)
    return (time.perf_counter() - start) / repeat


def profile_parts(model, batch, args, env):
    """Where a forward pass's time and a training step's memory go: {part: (seconds, bytes kept for backward)}."""
    parts, open_parts = {}, []

    def enter(part):
        synchronize(env.device)
        open_parts.append((part, time.perf_counter()))

    def leave():
        synchronize(env.device)
        part, start = open_parts.pop()
        spent = time.perf_counter() - start
        parts.setdefault(part, [0.0, 0])[0] += spent
        if open_parts:  # an outer part's time is without its inner parts'
            parts.setdefault(open_parts[-1][0], [0.0, 0])[0] -= spent

    def keep(tensor):
        own = tensor.untyped_storage().data_ptr() not in seen
        seen.add(tensor.untyped_storage().data_ptr())
        parts.setdefault(open_parts[-1][0], [0.0, 0])[1] += own * tensor.untyped_storage().nbytes()
        return tensor.detach()  # itself would be a cycle, which holds the whole graph beyond the pass

    seen, hooks = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
    for owner, prefix in ((model.backbone, "backbone."), (model, "")):
        for name, child in owner.named_children():
            part = "backbone.stem" if prefix and name[:-1] in ("conv", "bn", "act") else prefix + name
            for module in child if isinstance(child, torch.nn.ModuleList) else [child]:
                if module is not model.backbone:
                    hooks += [module.register_forward_pre_hook(lambda *_, part=part: enter(part)),
                              module.register_forward_hook(lambda *_: leave())]
    images = data.normalize(batch["image"].to(env.device))

    def forward():
        parts.clear(), enter("fusion, softmax")
        with trainer.autocast(env.device, env.amp):
            model(images)
        leave()
        return {part: tuple(numbers) for part, numbers in parts.items()}

    forward()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):  # called for every tensor: not in the pass that is timed
        kept = forward()
    timed = forward()
    for hook in hooks:
        hook.remove()
    return {part: (timed[part][0], kept[part][1]) for part in timed}


def largest_batch(measure):
    """Double the batch until the device's memory is full: {batch size: seconds}; measure(batch size) -> seconds a step."""
    found, size = {}, 16
    while size <= 2048:
        try:
            found[size] = measure(size)
        except RuntimeError as e:
            if not trainer.is_out_of_memory(e):
                raise
            break
        size *= 2
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    args = trainer.parse_args(argv)
    env = trainer.set_up_processes(args.device)
    if env.world > 1:
        raise UserError("benchmark.py measures one process; start it without torchrun")
    env.amp = trainer.choose_amp(env.device, args.amp)
    train, val, _, _ = trainer.load_faces(args)
    options = {"input_size": args.input_size, "padding": args.padding, "cache": args.cache}
    train_set = DogFLWDataset(train, augment=Augmentation(), **options)
    env.bare = trainer.build_model(args.backbone, len(train.scheme.names)).to(env.device, memory_format=torch.channels_last)
    model = torch.compile(env.bare, dynamic=False) if args.compile else env.bare
    optimizer = trainer.build_optimizer(model, args, env.device)
    cuda = env.device.type == "cuda"
    name = torch.cuda.get_device_name(env.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; {args.backbone}, {args.input_size} px, batch {args.batch_size}, "
          f"{str(env.amp or torch.float32)[6:]}; {len(train)} + {len(val)} faces")

    workers = sorted({0, 1, 2, 4, args.num_workers})
    rates = {w: samples_per_second(train_set, args, w) for w in workers if w <= (os.cpu_count() or 1)}
    for count, rate in rates.items():
        print(f"input, {count} workers          {rate:9.0f} faces/s" + ("  (in this process)" if not count else ""))

    def batch_of(n, crop):
        return train_set.__getitems__([(0, i % len(train), crop) for i in range(n)])

    def measure(n, crop, repeat=20 if cuda else 8):
        return step_seconds(model, optimizer, batch_of(n, crop), args, env, repeat)

    env.micro_batch = args.batch_size // args.accumulate
    size, crops, full = min(env.micro_batch, len(train)), trainer.crop_sizes(args), args.input_size
    bare = measure(size, full)
    print(f"bare step                 {size / bare:9.0f} faces/s  {bare * 1e3:8.1f} ms")
    small, share = bare, sum(crop < full for crop in crops) / len(crops)
    if share:
        small = measure(size, crops[0])
        print(f"bare step, {crops[0]} px         {size / small:9.0f} faces/s  {small * 1e3:8.1f} ms")
    parts = profile_parts(env.bare, batch_of(size, full), args, env)
    forward = sum(seconds for seconds, _ in parts.values())
    print(f"forward pass by part      {size / forward:9.0f} faces/s, of a step {100 * forward / bare:.0f} % of the time")
    for part, (seconds, kept) in parts.items():
        print(f"  {part:22s}  {100 * seconds / forward:8.1f} %  {kept / size / 2**20:8.1f} MiB kept a face")
    if cuda and not any(flag.startswith("--batch") for flag in argv):
        for batch, seconds in largest_batch(lambda n: measure(n, full, 3)).items():
            print(f"bare step, batch {batch:<5d}    {batch / seconds:9.0f} faces/s  {seconds * 1e3:8.1f} ms")
        optimizer.zero_grad(set_to_none=True)  # what a pass that failed has left
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    # Two epochs of the real loop, on as many faces as a CPU manages in a minute; the second has its workers started.
    used = train.take(range(len(train) if cuda else min(len(train), 16 * max(2, int(10 / bare)))))
    train_set = DogFLWDataset(used, augment=Augmentation(), **options)
    sampler = trainer.EpochBatches(len(used), args.batch_size, args.seed, 0, [args.input_size] * 2, args.accumulate)
    waits = []
    batches = timed(trainer.batches_of(train_set, sampler, args.num_workers, cuda), waits)
    average = copy.deepcopy(env.bare) if args.ema else None
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.amp is torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        args.work_dir = Path(folder)
        for epoch in range(2):
            waits.clear()
            start = time.perf_counter()
            trainer.train_one_epoch(epoch, model, average, optimizer, scaler, batches, sampler, used, args, env)
            synchronize(env.device)
            epoch_seconds = time.perf_counter() - start
    loop = epoch_seconds / sampler.steps / args.accumulate
    bare = (bare + measure(size, full)) / 2  # before and after the loop: a machine's speed drifts
    print(f"full loop                 {size / loop:9.0f} faces/s  {loop / bare:8.2f} x the bare step")
    waited = 100 * sum(waits) / epoch_seconds
    print(f"data wait                 {1e3 * sum(waits) / len(waits):9.1f} ms a batch {waited:6.1f} % of the loop")
    some = DogFLWDataset(val.take(range(len(val) if cuda else min(len(val), 64))), **options)
    for _ in range(2):  # the second has its kernels chosen
        start = time.perf_counter()
        trainer.predict(env.bare, some, env.device, args.sigma, amp=env.amp, batch_size=trainer.predict_batch(env))
    validation = (time.perf_counter() - start) / len(some) * len(val)
    epoch_seconds = loop * args.accumulate * max(1, len(train) // args.batch_size)
    percent = 100 * validation / epoch_seconds
    print(f"validation                {len(val) / validation:9.0f} faces/s  {percent:8.1f} % of an epoch, "
          f"every {args.val_every} of {args.epochs}: {percent / args.val_every:.1f} %")
    memory = torch.cuda.max_memory_allocated(env.device) / 2**30 if cuda else 0
    if os.name == "posix":
        import resource
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        print(f"peak memory               {host:9.2f} GiB host, without workers" + (f", {memory:.2f} GiB GPU" if cuda else ""))
    extra = 100 * (loop / bare - 1)
    limit = "the device's arithmetic limits"
    if extra > 5:
        limit = "the input limits, try more --num-workers" if waited > extra / 2 else "the loop's own work limits"
        limit += f" ({extra:.0f} % over the bare step)"
    elif share and small > 0.7 * bare:  # a quarter of the pixels
        limit = "a step's overhead limits, not arithmetic; try a larger --batch-size, or --compile"
    saved = share * (1 - small / bare)  # of the arithmetic, by epochs on smaller crops
    hours = (args.epochs * epoch_seconds * (1 - saved * bare / loop)
             + args.epochs // args.val_every * validation * (1 - saved)) / 3600
    part = f", {share:.0%} of them at {crops[0]} px" if share else ""
    print(f"{args.epochs} epochs of {len(train)} faces: {hours:.1f} h{part}; {limit}")
    return 0


if __name__ == "__main__":
    run_script(main)
