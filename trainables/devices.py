"""The device and the generators of a trial: the same trial draws the same numbers on any process.

Takes a `FoldTrial`, gives a fresh Accelerator.
"""

from __future__ import annotations

import gc
import random

import cv2
import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.distributed import broadcast

from foldrace.core.random_streams import Stream, generator, sequence
from foldrace.trainables.models.layers import freezes
from foldrace.trainables.predict import resolve_precision
from foldrace.trainables.spec import FoldTrial


def fresh_accelerator(trial: FoldTrial) -> Accelerator:
    """A new Accelerator, as in a new process.

    A reused process keeps Accelerate's global state, and changing its precision raises. With mixed
    precision it also keeps the last trial's model, in reference cycles, and its device memory, as
    it does when compiled; else the model is gone already, and looking through all objects would
    take 0.2 s.
    """
    # Private: Accelerate offers no other way to another precision in the same process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    device = PartialState(cpu=not trial.spec.use_gpu).device
    precision = precision_of(trial, device)
    if trial.params.compile:
        _forget_compiled()
    if device.type == "cuda" or precision != "fp32" or trial.params.compile:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Accelerator(
        cpu=not trial.spec.use_gpu,
        mixed_precision="no" if precision == "fp32" else precision,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=freezes(trial.params))
        ],
    )


def _forget_compiled() -> None:
    """Let the process compile as if it had not compiled yet, and more often.

    What it has compiled counts against a limit for the same lines of code, whichever trial they ran
    in; beyond it they run uncompiled without a word. One trial alone needs more than the usual 8:
    for each image size, frozen layer and pass of SAM, in training and in scoring.
    """
    from torch import _dynamo  # heavy; private: `torch.compiler` has no such limit to set

    torch.compiler.reset()
    _dynamo.config.recompile_limit = 64


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Bring rank 0's batch statistics to every device of the trial.

    Each has updated its own from its share of the batches, and the weights are one model only
    together with one set of them.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer, 0)


def precision_of(trial: FoldTrial, device: torch.device) -> str:
    """The precision that the trial trains and is scored in."""
    return resolve_precision(device, trial.params.precision, trial.params.sam_rho)


def seed_trial(trial: FoldTrial) -> None:
    """Seed the initial weights, which are the same on every device of the trial."""
    _seed_generators(sequence(trial.seed, Stream.WEIGHTS))
    torch.set_num_threads(trial.spec.cpus)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    cv2.setNumThreads(0)


def seed_epoch(trial: FoldTrial, epoch: int, rank: int) -> np.random.Generator:
    """Seed the global generators (dropout and the like); gives the generator that mixes batches.

    Every epoch has its own, so that a resumed trial needs no generator's state.
    """
    _seed_generators(sequence(trial.seed, Stream.EPOCH, epoch, rank))
    return generator(trial.seed, Stream.MIXING, epoch, rank)


def _seed_generators(source: np.random.SeedSequence) -> None:
    """Seed each with another number: NumPy's and torch's are one algorithm."""
    of_python, of_numpy, of_torch = source.generate_state(3).tolist()
    random.seed(of_python)
    np.random.seed(of_numpy)
    torch.manual_seed(of_torch)
