"""What a GPU would find, without one: the trainer's own step on fake CUDA tensors, and a machine's ways to have none.

On fake tensors (torch's FakeTensorMode) every operator checks devices, types and shapes and computes nothing.
"""
import copy
import functools
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchgen
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dataset as data
import train_simple as trainer
from tools.lib import backbones, batches, runtime
from tools.lib.cli import UserError

CUDA, CPU, K = torch.device("cuda", 0), torch.device("cpu"), 6
SCHEME = data.Scheme([str(i) for i in range(K)], [[0, 1]], {}, [2, 3], [])
WAIT = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique2", "unique_dim"}
VIEWS = {"detach", "view", "_unsafe_view", "expand", "select", "slice", "transpose", "unsqueeze", "squeeze", "unbind", "split",
         "split_with_sizes", "permute", "alias", "empty", "empty_strided", "new_empty_strided", "empty_like", "t"}


class Walk(TorchDispatchMode):
    """Sees every operator: counts them, and notes those that would wait for a GPU, copy, or use float64 on it."""

    def __init__(self):
        super().__init__()
        self.count, self.waits, self.copies, self.convolutions, self.float64 = Counter(), [], [], [], []
        self.outer = []  # products of (n, 1) and (1, m), for which torch 2.14 compiles a kernel on CUDA

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        name = operator.__name__.split(".")[0]
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim}  # a number may come as a tensor of the CPU
        self.count[str(operator)] += operator.namespace == "aten" and name not in VIEWS
        masks = name == "index" and [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        if name in WAIT or masks:
            self.waits.append(str(operator))
        if name == "bmm" and args[0].shape[2] == 1:
            self.outer.append([tuple(t.shape) for t in args])
        if len(devices) > 1:
            to = out.device.type
            self.copies.append((to, bool((kwargs or {}).get("non_blocking"))))
        if name in ("convolution", "conv2d"):
            self.convolutions.append((args[0].dtype, args[0].is_contiguous(memory_format=torch.channels_last)))
        self.float64 += [str(operator) for t in tensors if t.dtype == torch.float64 and t.device.type == "cuda"]
        return out

    @property
    def launches(self):
        return self.count.total()


def processes_on(device):
    """One process that believes it has this device."""
    processes = object.__new__(runtime.Processes)
    processes.rank, processes.world, processes.device = 0, 1, device
    return processes


@functools.cache
def network():
    """A small HRNet, laid out as training lays it out."""
    return trainer.LandmarkNet("hrnet_w18_small", K).to(memory_format=torch.channels_last)


def on(device, model):
    """A copy of a model whose parameters and buffers are made anew, of the same layout, on a device."""
    with unset_fake_temporarily():
        model = copy.deepcopy(model)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in ((name, old) for name, old in table.items() if old is not None):
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                table[name] = torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new
    model.to = lambda *_, **__: model  # a fake cannot be moved in place
    return model


def run_on(device, *flags, backbone="hrnet_w18_small", size=64):
    """The trainer's run and a batch of two faces in main memory; for CUDA inside of FakeTensorMode."""
    config = trainer.parse_args(["--backbone", backbone, "--no-pretrained", "--input-size", str(size), "--batch-size", "2",
                                 *map(str, flags)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_model", lambda *_: on(device, network()))
        twin = SimpleNamespace(deepcopy=lambda _: on(device, network()))  # that of a fake belongs to another mode
        patch.setattr(trainer, "copy", twin)
        run = trainer.Run(config, SCHEME, trainer.Plan(config, 8), processes_on(device))
    n = 2 // config.accumulate
    batch = {"image": torch.zeros(n, size, size, 3, dtype=torch.uint8), "keypoints": torch.zeros(n, K, 2),
             "visibility": torch.ones(n, K), "colour": torch.ones(n, 3, 4),
             "index": SimpleNamespace(tolist=lambda: list(range(n)))}
    return run, batch


@pytest.fixture
def cuda(monkeypatch):
    """Let the trainer believe in a GPU; its tensors are fakes. float16, which needs the scaler too."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(runtime, "choose_amp", lambda device, wanted=True: torch.float16)
    network()
    with FakeTensorMode():
        try:
            assert torch.zeros(1, device=CUDA)[:, None].is_cuda
        except RuntimeError:
            pytest.skip("this torch wants a driver to slice fakes of CUDA tensors")
        yield CUDA


# ---------------------------------------------------------------- a step

def step_of(run, batch, number):
    """A step; autograd needs a driver for CUDA tensors, so on those the gradients are there already."""
    if run.processes.device.type == "cuda":
        for parameter in run.model.parameters():
            parameter.grad = torch.empty_like(parameter)
    return trainer.train_step(run, iter([batch] * run.config.accumulate), number)


def test_a_step_on_cuda_mixes_no_devices_and_copies_nothing_back(cuda, monkeypatch):
    """All but the backward pass: four copies to the GPU a batch, that do not wait, and none back; 16 bits; channels last."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    run, batch = run_on(cuda, "--accumulate", 2)
    watch = runtime.FiniteWatch(cuda, ["a", "b"], "epoch 1", Path("last.pth"))
    run.wrapped.train()
    step_of(run, batch, 0)  # the optimizer makes its averages
    with Walk() as walk:
        loss, faces = step_of(run, batch, 1)
        watch.add(loss, faces)
    assert faces == [0, 0] and loss.device == cuda and loss.dtype == torch.float32 and loss.shape == ()
    assert walk.waits == [] and walk.copies == [("cuda", True)] * 8
    assert walk.float64 == []  # MPS has none
    assert len(walk.convolutions) > 150 and set(walk.convolutions) == {(torch.float16, True)}
    assert {(p.device, p.dtype) for p in [*run.model.parameters(), *run.ema.parameters()]} == {(cuda, torch.float32)}


@pytest.fixture(scope="module")
def walked():
    """A whole step and a prediction on the CPU, seen operator by operator."""
    run, batch = run_on(CPU, "--no-amp")
    run.wrapped.train()
    step_of(run, batch, 0)
    with Walk() as step:
        loss, faces = step_of(run, batch, 1)
        runtime.FiniteWatch(CPU, ["a", "b"], "epoch 1", Path("last.pth")).add(loss, faces)
    run.ema.eval()
    with Walk() as prediction:
        data.decode_heatmaps(trainer.predict_heatmaps(run.ema, batch["image"], torch.tensor(SCHEME.flip_index)), 1.5, 0.05)
    return step, prediction


def test_a_step_never_asks_for_a_number(walked):
    """`.item()`, `float(tensor)`, `if tensor`, a mask as index: each would wait for the GPU, in the backward pass too."""
    assert walked[0].waits == [] and walked[0].outer == []
    with Walk() as walk:
        float(torch.ones(1))
        torch.ones(3)[torch.ones(3) > 0]
        torch.ones(2, 3, 1) @ torch.ones(2, 1, 4)
    assert walk.outer == [[(2, 3, 1), (2, 1, 4)]]
    assert walk.waits == ["aten._local_scalar_dense.default", "aten.index.Tensor"]  # the test can fail


def test_the_launches_of_a_step_stay_few(walked):
    """About 3 a layer forward and backward; the optimizer and the average are a few launches for all tensors."""
    layers = sum(isinstance(m, torch.nn.Conv2d) for m in network().modules())
    print(f"hrnet_w18_small: {layers} convolutions, {walked[0].launches} operators a step")
    assert walked[0].launches < 9 * layers + 250


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_batches_for_cuda_come_from_pinned_memory(monkeypatch, device):
    options = {}
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, **given: options.update(given) or [1, 2])
    assert list(batches.batches_of([], [], 0, device)) == [1, 2] and options["pin_memory"] == (device == CUDA)


def test_prediction_on_cuda_mixes_no_devices(cuda, monkeypatch):
    """Normalise, mirror, decode, score, loss: with no float64 on the device, which MPS does not have."""
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: self)  # a fake has no numbers
    for module in (trainer, data):
        monkeypatch.setattr(module, "invert_matrix", lambda matrices: matrices, raising=False)
        monkeypatch.setattr(module, "apply_matrix", lambda matrices, points: points, raising=False)
    run, batch = run_on(cuda)
    run.ema.eval()
    index = torch.tensor(SCHEME.flip_index, device=cuda)
    with Walk() as walk:
        heatmaps, points, scores = trainer.predict_crops(run.ema, batch["image"], None, run.config, index, torch.float16)
        targets = batch["keypoints"].to(cuda), batch["visibility"].to(cuda)
        losses = trainer.heatmap_losses(heatmaps, *targets, 1.0, run.config)
    assert heatmaps.shape == (2, K, 32, 32) and points.shape == (2, K, 2) and scores.shape == losses.shape == (2, K)
    assert heatmaps.dtype == losses.dtype == torch.float32 and heatmaps.device == losses.device == cuda
    assert walk.waits == [] and walk.float64 == []


def test_mirrored_averaging_is_one_pass_of_twice_the_batch():
    (run, batch), shapes = run_on(CPU, "--no-amp"), []
    run.ema.eval().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    trainer.predict_heatmaps(run.ema, batch["image"], torch.tensor(SCHEME.flip_index))
    assert shapes == [(4, 3, 64, 64)]


def declared(path):
    """The devices that have a kernel for every operator, by torch's own declaration: {"aten.add.Tensor": {"CUDA", ...}}."""
    entries = {e["func"].split("(")[0]: e for e in yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))}

    def devices(entry):
        base = entries.get(entry.get("structured_delegate"), {})
        keys = {k.strip() for e in (entry, base) for names in (e.get("dispatch") or {"CompositeImplicit": 0} if e else ())
                for k in names.split(",")}
        either = any(k.startswith("Composite") for k in (entry.get("dispatch") or {"Composite": 0})) and not base
        return keys | ({"CUDA", "MPS"} if either else set()) | ({"CUDA"} if base.get("ufunc_inner_loop") else set())
    return {f"aten.{name}{'' if '.' in name else '.default'}": devices(entry) for name, entry in entries.items()}


def test_every_operator_of_a_step_exists_on_cuda_and_on_mps(walked):
    """By the declarations of the torch that is installed."""
    table = declared(Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml")
    names = set(walked[0].count) | set(walked[1].count)
    missing = {name: lacks for name in names & set(table) if (lacks := {"CUDA", "MPS"} - table[name])}
    assert len(names & set(table)) > 60 and not missing
    assert any("MPS" not in devices for devices in table.values())  # the test can fail


@pytest.mark.parametrize("backbone", [*timm.list_models("hrnet*"), "resnet18", "convnext_atto", "tf_efficientnet_lite0",
                                      "mobilenetv3_small_050", "regnetx_002"])
def test_backbones_forward_and_backward(backbone):
    """Shapes alone, on torch's meta device: every HRNet of timm, and five other families."""
    with torch.device("cpu" if backbone == "convnext_atto" else "meta"):  # timm 1.0.9 reads numbers off it
        model = trainer.LandmarkNet(backbone, K).to("meta")
    heatmaps = model(torch.zeros(2, 3, 64, 64, device="meta"))
    heatmaps.sum().backward()
    assert heatmaps.shape == (2, K, 32, 32) and heatmaps.dtype == torch.float32
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------- devices

@pytest.fixture
def machine(monkeypatch):
    """A machine with an NVIDIA GPU whose driver is too old for this PyTorch."""
    def no(*_):
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
        return False

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
                           "downloading and installing a new version\nAlternatively, go to: https://pytorch.org")
    monkeypatch.setattr(torch.cuda, "is_available", no)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "nvidia_gpu_here", lambda: True)
    return monkeypatch


def test_a_driver_that_is_too_old_ends_training_with_its_reason(machine, capsys):
    with pytest.raises(UserError) as error:
        runtime.Processes("auto")
    text = str(error.value)
    assert "too old (found version 11040)" in text and "Troubles" in text and "--device cpu" in text and "\n" not in text
    assert runtime.choose_device("auto") == CPU  # one picture takes a second there: a note is enough
    note = capsys.readouterr().err
    assert note.startswith("note: ") and "too old" in note and note.count("\n") == 1
    assert runtime.Processes("cpu").device == CPU and capsys.readouterr().err == ""


@pytest.mark.parametrize("error, reason", [
    ("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that might have "
     "already set an error? Error 802: system not yet initialized", "Error 802: system not yet initialized"),
    ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from ...",
     "Found no NVIDIA driver on your system"),
    ("CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable\nmore",
     "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable")])
def test_the_reason_for_no_cuda_is_kept(machine, error, reason):
    def init():
        raise RuntimeError(error)
    machine.setattr(torch.cuda, "init", init)
    assert runtime.why_no_cuda() == reason


def test_a_build_without_cuda_ends_training_beside_a_gpu(machine):
    machine.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(UserError, match="a build without CUDA.*Troubles.*--device cpu"):
        runtime.Processes("auto")


def test_a_gpu_that_the_build_has_no_kernels_for(machine):
    """V100 and P100 with newer builds: CUDA starts, the first kernel fails."""
    def zeros(*_, device):
        warnings.warn("Tesla P100 with CUDA capability sm_60 is not compatible", UserWarning, stacklevel=1)
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ...")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    machine.setattr(torch, "zeros", zeros)
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"no kernel image is available.*Troubles.*--device cpu") as error:
            runtime.choose_device(name)
        assert "\n" not in str(error.value)
    for reason in ("CUDA out of memory. Tried to allocate 2 MiB", "CUDA error: CUDA-capable device(s) is/are busy or unavailable"):
        def busy(*_, device, reason=reason):
            raise RuntimeError(reason)
        machine.setattr(torch, "zeros", busy)
        for name in ("cuda", "cuda:0"):  # not --device cuda:1, which is not there, or does nothing under torchrun
            with pytest.raises(UserError, match="Other programs use it.*CUDA_VISIBLE_DEVICES to another"):
                runtime.choose_device(name)
    machine.setenv("LOCAL_RANK", "3")
    with pytest.raises(UserError, match="no GPU number 3, this machine has 1"):
        runtime.choose_device("cuda")
    machine.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    machine.setenv("LOCAL_RANK", "0")  # left by another job
    assert runtime.choose_device("cuda:1").index == 1 and runtime.choose_device("cuda").index == 0


def test_whether_an_nvidia_gpu_is_here(monkeypatch, tmp_path):
    """A device file or nvidia-smi's list; not what CUDA_VISIBLE_DEVICES hides."""
    monkeypatch.setattr(runtime, "Path", lambda _: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not runtime.nvidia_gpu_here()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    smi.chmod(0o755)
    assert not runtime.nvidia_gpu_here()
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    assert runtime.nvidia_gpu_here()
    smi.unlink()
    with monkeypatch.context() as patch:  # on WSL CUDA itself may be all that sees it
        patch.setattr(runtime, "why_no_cuda", lambda: "The NVIDIA driver on your system is too old (found version 11040)")
        assert runtime.nvidia_gpu_here()
    (tmp_path / "nvidiactl").touch()  # the driver's own, without a GPU
    assert not runtime.nvidia_gpu_here()
    (tmp_path / "nvidia0").touch()
    assert runtime.nvidia_gpu_here()
    for given in ("0", "1,2", "GPU-8932f937", "MIG-a1", "cuda:0", "gpu0"):  # the last two would train on the CPU for days
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert runtime.nvidia_gpu_here()
    for hidden in ("", "-1", "-1,0", "NoDevFiles", "none"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not runtime.nvidia_gpu_here()


@pytest.mark.parametrize("name, capability, amp", [
    ("NVIDIA H100 80GB HBM3", (9, 0), torch.bfloat16), ("NVIDIA GeForce RTX 3060", (8, 6), torch.bfloat16), ("Tesla T4", (7, 5), torch.float16),
    ("Tesla V100-SXM2-16GB", (7, 0), torch.float16), ("NVIDIA GeForce RTX 2080 Ti", (7, 5), torch.float16), ("Quadro RTX 4000", (7, 5), torch.float16),
    ("NVIDIA GeForce GTX 1660 Ti", (7, 5), None), ("NVIDIA T1000", (7, 5), None), ("NVIDIA GeForce MX450", (7, 5), None), ("Tesla P100", (6, 0), None)])
def test_precision_by_the_gpu(monkeypatch, name, capability, amp):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert runtime.choose_amp(CUDA) is amp and runtime.choose_amp(CUDA, wanted=False) is None


def test_a_macs_gpu_takes_one_process(monkeypatch):
    monkeypatch.setattr(runtime, "place_in_job", lambda: (0, 2))
    monkeypatch.setattr(runtime, "choose_device", lambda *_: torch.device("mps"))
    with pytest.raises(UserError, match="one process.*--device cpu"):
        runtime.Processes("auto")


# ---------------------------------------------------------------- CUDA graphs, processes, weights

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    def forward(self, images):
        return self.body(images)


@pytest.fixture
def capture(monkeypatch):
    """torch.cuda.make_graphed_callables as it treats a module, less the graph: warm-up passes, then a function. Its calls."""
    calls = []

    def make(module, arguments, allow_unused_input):
        (images,) = arguments
        assert module.training and allow_unused_input and images.is_contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            module(images + 7)  # moves batch norm's statistics
        calls.append(tuple(images.shape))
        plain = module.forward
        module.forward = lambda images: calls.append("replay") or plain(images)
        return module
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **options: zeros(*shape, **options))
    return calls


def test_graphs_leave_the_model_as_it_was_and_serve_training_alone(capture):
    model, said = Small(), []
    before = copy.deepcopy(model.state_dict())
    graphed = runtime.graphed(model, [8, 16], 2, CUDA, None, said.append)
    assert capture == [(2, 3, 8, 8), (2, 3, 16, 16)] and len(said) == 1
    assert model.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [id(p) for p in graphed.parameters()] == [id(p) for p in model.parameters()]
    capture.clear()
    images = torch.rand(2, 3, 8, 8)
    graphed.train()
    graphed(images)
    assert capture == ["replay"]
    graphed(torch.rand(1, 3, 8, 8)), model(images), graphed.eval()(images)
    assert capture == ["replay"] and not model.training


def test_graphs_that_cannot_be_captured_end_with_a_word(capture, monkeypatch):
    def make(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    with pytest.raises(UserError, match=r"--graphs: .*2 faces at 8 pixels cannot .*out of memory"):
        runtime.graphed(Small(), [8], 2, CUDA, torch.bfloat16, print)


def test_graphs_without_cuda_are_a_word_and_the_model_itself():
    model, said = Small(), []
    assert runtime.graphed(model, [8], 2, CPU, None, said.append) is model and "needs CUDA" in said[0]
    assert set(model.state_dict()["body.1.running_mean"].tolist()) == {0.0}


def test_a_captured_pass_has_autocast_without_its_cache(monkeypatch):
    """make_graphed_callables refuses the cache; and its backward pass is outside of autocast, as a step's is."""
    seen = []
    model = lambda images: seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    runtime.WithAutocast(model, CPU, torch.bfloat16)(None)
    runtime.WithAutocast(model, CPU, None)(None)
    assert seen == [(True, False), (False, False)] and torch.is_autocast_cache_enabled()


def test_a_run_in_bfloat16_goes_on_in_float16(monkeypatch):
    """From a new card to a T4: the saved scaler has no state, and the new one starts as ever."""
    run, _ = run_on(CPU)
    saved = {name: copy.deepcopy(part.state_dict()) for name, part in run.stateful.items()}
    assert saved["scaler"] == {}
    monkeypatch.setattr(runtime, "choose_amp", lambda device, wanted=True: torch.float16)
    monkeypatch.setattr(trainer, "build_model", lambda *_: on(CPU, network()))
    resumed = trainer.Run(run.config, SCHEME, run.plan, run.processes, {**saved, "epoch": 1, "best": 2.0, "rows": []})
    assert resumed.scaler.is_enabled() and resumed.scaler.get_scale() == 65536 and resumed.progress["epoch"] == 1
    torch.testing.assert_close(dict(resumed.model.state_dict()), dict(saved["raw"]), rtol=0, atol=0, equal_nan=True)


def test_processes_average_their_statistics_in_one_call(monkeypatch):
    model, calls = Small(), []
    processes = processes_on(CPU)
    processes.average_buffers(model)  # one process: nothing to do, and no group

    def all_reduce(tensor):
        calls.append(tensor.numel())
        tensor += torch.cat([torch.full((4,), 3.0), torch.full((4,), 5.0)])  # what the other process has
    monkeypatch.setattr(runtime.dist, "all_reduce", all_reduce)
    processes.world = 2
    processes.average_buffers(model)
    norm = model.body[1]
    assert calls == [8] and norm.running_mean.tolist() == [1.5] * 4 and norm.running_var.tolist() == [3.0] * 4
    table = torch.zeros(2, dtype=torch.float64)
    processes.world = 1
    assert processes.sum(table) is table  # which MPS could not hold


def test_a_tag_that_does_not_exist_and_a_file_without_a_stage_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="--backbone hrnet_w18.foo"):
        backbones.feature_maps("hrnet_w18.foo")
    source, model = timm.create_model("hrnet_w18_small"), backbones.feature_maps("hrnet_w18_small")
    del source.stage4
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: source)
    with pytest.raises(UserError, match="lacks .*stage4"):
        backbones.take_imagenet(model, "hrnet_w18_small", lambda _: None)
