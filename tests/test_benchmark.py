"""tools/benchmark.py: its table on drawn faces, and what it makes of the numbers."""
import os
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import LIGHT, SMALL

import train_simple as trainer
from tools import benchmark
from tools.lib import runtime

CPU = torch.device("cpu")


def test_the_table(sample, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "INPUT_SECONDS", 0.1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    benchmark.main(list(map(str, ["--data-root", sample.data_root, "--ann-root", sample.ann_root, *SMALL, *LIGHT, "--cache", "none",
                                  "--batch-size", 8, "--accumulate", 2, "--epochs", 20])))
    out = capsys.readouterr().out
    assert all(line in out for line in ("input, 0 workers", "bare step", "forward pass by part", "  head", "data wait", "full loop",
                                        "validation", "peak memory", "20 epochs of 40 faces: ", " min; ")), out
    assert "input, 1 workers" in out and "input, 2 workers" not in out  # it has one core
    assert "enqueue" not in out and "GPU" not in out  # a CPU computes where it is called


def test_the_wait_for_faces_is_timed():
    waits = []
    batches = benchmark.timed((time.sleep(0.05 * i) or i for i in range(3)), waits)
    assert [next(batches) for _ in range(3)] == [0, 1, 2] and len(waits) == 3 and waits[1] >= 0.05 and waits[2] >= 0.1


def test_a_step_is_the_trainers_own_and_its_enqueueing_is_timed_apart(monkeypatch):
    """On a device that takes 20 ms for what the process enqueues in 2; two micro-batches a step."""
    clock, calls = SimpleNamespace(now=0.0, done=0.0), []

    def train_step(run, batches, step):
        calls.append(next(batches)["size"])
        clock.now += 0.002
        clock.done = max(clock.done, clock.now) + 0.02
    monkeypatch.setattr(trainer, "train_step", train_step)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(benchmark, "synchronize", lambda _: setattr(clock, "now", max(clock.now, clock.done)))
    monkeypatch.setattr(benchmark, "resident", lambda bench, faces, size: {"size": (faces, size)})
    bench = SimpleNamespace(run=SimpleNamespace(wrapped=torch.nn.Identity()), device=CPU, repeat=5, micro_batch=16,
                            config=SimpleNamespace(accumulate=2, input_size=256))
    assert benchmark.step_seconds(bench, {"size": None}) == pytest.approx(0.0102) and len(calls) == 7  # of a micro-batch
    calls.clear()
    assert benchmark.enqueue_seconds(bench) == pytest.approx(0.001) and set(calls) == {(2, 64)}
    bench.run.wrapped = runtime.Graphed(torch.nn.Identity(), {})
    calls.clear()
    benchmark.enqueue_seconds(bench)
    assert set(calls) == {(16, 256)}  # the shape that is captured


def test_the_loop_takes_about_ten_seconds_on_a_cpu(monkeypatch):
    """Half a second a micro-batch, four of them a step: five steps of eight faces."""
    chosen = []
    monkeypatch.setattr(benchmark, "epoch_batches", lambda *_: None)
    monkeypatch.setattr(benchmark, "batches_of", lambda *_: iter(()))
    monkeypatch.setattr(trainer, "train_one_epoch", lambda run, batches, files: next(batches))
    run = SimpleNamespace(plan=SimpleNamespace(batch_size=8), progress={"epoch": 0})
    bench = SimpleNamespace(run=run, device=CPU, dataset=None, faces=type("Faces", (list,), {"files": ()})(range(999)),
                            config=SimpleNamespace(accumulate=4, num_workers=0),
                            plan=lambda faces: chosen.append(faces) or SimpleNamespace(steps=5))
    benchmark.measure_loop(bench, 0.5)
    assert chosen == [5 * 8]


def test_the_largest_batch_is_where_memory_ends():
    def measure(size):
        if size > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size / 100
    assert dict(benchmark.growing_batches(measure)) == {16: 0.16, 32: 0.32, 64: 0.64}
    with pytest.raises(RuntimeError, match="shape"):
        dict(benchmark.growing_batches(lambda _: (_ for _ in ()).throw(RuntimeError("shape"))))


@pytest.mark.parametrize("loop, waited, enqueue, flags, words", [
    (1.02, 0.0, None, {}, ["arithmetic"]), (1.02, 0.0, 0.5, {}, ["arithmetic"]), (1.3, 0.25, 0.9, {}, ["input", "30 %"]),
    (1.3, 0.01, 0.9, {}, ["loop's own work"]),
    (1.02, 0.0, 0.9, {}, ["launches limit", "90 %", "--graphs", "--batch-size 64 --lr 0.002", "0.1082", "0.0866"]),
    (1.02, 0.0, 0.9, {"graphs": True, "batch_size": 64}, ["launches limit"])])
def test_what_limits(loop, waited, enqueue, flags, words):
    config = SimpleNamespace(**{"graphs": False, "compile": False, "accumulate": 1, "batch_size": 16, "lr": 1e-3} | flags)
    text = benchmark.verdict(1.0, loop, waited, enqueue, config)
    assert all(word in text for word in words) and ("try" in text) == (len(words) > 2 or "input" in words)


def test_hours_count_small_crops_and_validations():
    config = trainer.parse_args(["--epochs", "10", "--progressive", "0.5", "--val-every", "5", "--batch-size", "4"])
    bench = SimpleNamespace(config=config, faces=range(40))
    full = 10 * 2.0 + 0  # ten steps of 2 s; validations of 6 s after epochs 5 (small) and 10
    assert benchmark.projected_hours(bench, 2.0, 0.5, 6.0) * 3600 == pytest.approx(5 * full * 0.5 + 3 + 5 * full + 6)


def test_several_processes_are_refused():
    with pytest.raises(benchmark.UserError, match="without torchrun"):
        benchmark.set_up(None, SimpleNamespace(world=2))
