"""Out of memory: a step or a scoring made again in smaller parts gives what smaller parts would
have given from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldrace.config.hyperparameters import TrialParams
from foldrace.core.errors import RunFailure
from foldrace.core.plugin_files import PluginFile
from foldrace.trainables import state as state_module
from foldrace.trainables.data import trial_data
from foldrace.trainables.devices import fresh_accelerator, seed_epoch
from foldrace.trainables.memory import is_out_of_memory
from foldrace.trainables.schedules import build_schedule
from foldrace.trainables.spec import EpochReport, TrialSpec
from foldrace.trainables.state import TrainState
from foldrace.trainables.step import Examples, train_step
from foldrace.trainables.trial import run_trial
from tests.trainables.written_trials import another, read, written_trial

Limit = Callable[[int], None]


class Silent:
    def report(self, epoch: EpochReport) -> None: ...

    def stop_requested(self) -> bool:
        return False


@pytest.fixture
def device_of(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """From then on models raise where they are given more images, when all layers have run: batch
    norms have seen the images, dropout has drawn."""
    build = state_module.build_classifier

    def limit(images: int) -> None:
        def full(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if len(inputs[0]) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        def limited(*arguments: Any, **options: Any) -> nn.Module:
            model: nn.Module = build(*arguments, **options)
            model.register_forward_hook(full)
            return model

        monkeypatch.setattr(state_module, "build_classifier", limited)

    return limit


def spec_for(
    run: Any, candidate: str, micro_batch: int = 0, backbone: str = "timm/test_resnet"
) -> TrialSpec:
    params = {
        "epochs": 2, "image_size": 32, "batch_size": 14, "dropout": 0.3, "drop_path": 0.1,
        "policy": "light", "precision": "fp32", "pretrained": False,
    }  # fmt: skip
    return written_trial(run, candidate, backbone, params, use_gpu=False, micro_batch=micro_batch)


def result_files(spec: TrialSpec) -> dict[str, bytes]:
    folder = Path(spec.run) / "trials" / spec.candidate / "fold0"
    kept = [p for p in folder.iterdir() if p.suffix in (".npy", ".safetensors")]
    return {p.name: p.read_bytes() for p in kept}


def test_a_trial_out_of_memory_equals_one_of_small_micro_batches(
    tiny_run: Any,
    device_of: Limit,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both are scored in batches of one size: rounding may depend on it, as processors do.
    monkeypatch.setattr(trial_data, "first_micro_batch", lambda spec, devices: 4)
    device_of(5)
    whole, small = spec_for(tiny_run, "c0000"), spec_for(tiny_run, "c0001", micro_batch=4)
    record = run_trial(whole, Silent())
    assert tiny_run.store.trial("c0000", 0).micro_batch == record.micro_batch == 4  # 14, 7, 4
    halvings = [r.getMessage() for r in caplog.records if "micro-batches" in r.getMessage()]
    assert [line.split()[-1] for line in halvings] == ["7", "4"]
    run_trial(small, Silent())
    assert result_files(whole) == result_files(small)


@pytest.mark.parametrize(("backbone", "least"), [("timm/test_vit", 1), ("timm/test_resnet", 2)])
def test_an_image_that_does_not_fit_is_a_clear_failure(
    tiny_run: Any, device_of: Limit, backbone: str, least: int
) -> None:
    """Batch norms need two."""
    device_of(0)
    with pytest.raises(RunFailure) as caught:
        run_trial(spec_for(tiny_run, "c0000", backbone=backbone), Silent())
    message = str(caught.value)
    assert f"{least} of a batch of 14 images" in message and "32 x 32 pixels" in message
    assert "smaller image_size" in message and "gradient_checkpointing" in message
    assert "\n" not in message


def test_a_plugins_loss_without_memory_gets_smaller_micro_batches(make_tiny_run: Any) -> None:
    source = (
        "import torch\nfrom foldrace.trainables.losses import Loss\n"
        "def f(logits, targets, settings):\n    if logits.requires_grad and len(logits) > 5:\n"
        "        raise RuntimeError('CUDA error: out of memory')\n"
        "    return torch.nn.functional.cross_entropy(logits, targets, reduction='none')\n"
        "PARTS = [Loss('own', '', '', f)]\n"
    )
    run = make_tiny_run(plugins=(PluginFile("own_loss", source.encode(), "/gone/own_loss.py"),))
    spec = spec_for(run, "c0000")
    record = run_trial(another(spec, "c0000", loss="own"), Silent())
    assert (record.status, record.micro_batch) == ("finished", 4)


def test_other_errors_are_not_swallowed(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = state_module.build_classifier

    def broken(*arguments: Any, **options: Any) -> nn.Module:
        model: nn.Module = build(*arguments, **options)

        def fail(module: nn.Module, inputs: object) -> None:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        model.register_forward_pre_hook(fail)
        return model

    monkeypatch.setattr(state_module, "build_classifier", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_trial(spec_for(tiny_run, "c0000"), Silent())


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 52, dtype=torch.uint8)  # more than a CPU can address
    assert is_out_of_memory(caught.value)
    yes = (
        torch.OutOfMemoryError("anything"),
        torch.cuda.OutOfMemoryError("anything"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    )
    assert all(is_out_of_memory(error) for error in yes)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


# -- one step that fails in its middle


class FailsOnce(nn.Module):
    """Raises at one call, in the forward or in the backward pass, after everything else."""

    def __init__(self, call: int, backward: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(),
            nn.Linear(4 * 36, 3),
        )  # fmt: skip
        self._calls_left, self._backward = call, backward

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        self._calls_left -= 1
        logits: Tensor = self.layers(images)
        if self._calls_left == 0 and not self._backward:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self._calls_left == 0:
            logits.register_hook(self._fail)
        return logits

    @staticmethod
    def _fail(gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def batches() -> Iterator[Examples]:
    rng = torch.Generator().manual_seed(3)
    for _ in range(3):
        images = torch.rand(8, 3, 8, 8, generator=rng)
        targets = nn.functional.one_hot(torch.randint(3, (8,), generator=rng), 3).float()
        yield Examples(images, torch.empty(8, 0), targets, torch.empty(8, 0))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("sharp", "call"), [(False, 4), (True, 6), (True, 8)])
def test_a_step_that_fails_in_its_middle_leaves_no_trace(
    tiny_run: Any, backward: bool, sharp: bool, call: int
) -> None:
    """The second micro-batch of the second step fails: the first one's gradients, statistics and
    dropout masks are taken back; with SAM in the first or the second pass, and the weights too."""
    disturbed = state_of(tiny_run, FailsOnce(call, backward), sharp)
    calm = state_of(tiny_run, FailsOnce(0, backward), sharp)
    results: list[list[Tensor]] = []
    for state in (disturbed, calm):
        seed_epoch(read(spec_for(tiny_run, "c0000")), 0, 0)
        found = []
        for step, examples in enumerate(batches()):
            if state is calm and step == 1:
                state.micro_batch = 2
            found += train_step(state, examples, 8)
        results.append(found)
    assert disturbed.micro_batch == calm.micro_batch == 2
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    states = (state.bare.state_dict() for state in (disturbed, calm))
    for one, two in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(one, two)


def state_of(run: Any, model: nn.Module, sharp: bool) -> TrainState:
    """Four of a batch's eight images at once."""
    accelerator = fresh_accelerator(read(spec_for(run, "c0000")))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    wrapped, optimizer = accelerator.prepare(model, inner)
    return TrainState(
        accelerator=accelerator,
        model=wrapped,
        bare=model,
        ema=None,
        criterion=nn.functional.cross_entropy,
        optimizer=optimizer,
        schedule=build_schedule(inner, TrialParams(), 3, 1),
        sam_rho=0.05 if sharp else 0.0,
        rdrop_alpha=0.0,
        activation="softmax",
        layer_ids=None,
        clip_grad=1.0,
        micro_batch=4,
    )
