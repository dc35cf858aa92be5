"""The peer of `run_trial`: the training loop that a PyTorch user would write for one fold.

Images are a float tensor in memory, already decoded and normalised; a batch is augmented at once
with one affine map an image; timm gives the backbone and the average of the weights. Weights and
images are channels-last, which is the faster layout for most of these backbones. It keeps the best
weights in memory and writes nothing.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import timm
import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    backbone: str
    epochs: int
    lr: float
    weight_decay: float
    warmup: float
    batch_size: int
    dropout: float
    mixup_alpha: float
    mixup_prob: float
    ema_decay: float
    clip_grad: float
    rotate: float  # degrees
    zoom: float
    shift: float  # fraction of the side
    threads: int


@dataclass
class Seconds:
    """Where the time went."""

    setup: float = 0.0
    data: float = 0.0
    step: float = 0.0
    evaluate: float = 0.0


def train(
    images: Tensor, labels: Tensor, train_rows: Tensor, val_rows: Tensor, settings: Settings
) -> tuple[dict[str, float], Seconds]:
    """(n, 3, H, W) normalised float images -> the best validation log loss of raw and EMA."""
    seconds = Seconds()
    mark = time.perf_counter()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(settings.threads)
    classes = int(labels.max()) + 1
    model = timm.create_model(
        settings.backbone, num_classes=classes, drop_rate=settings.dropout
    ).to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
    groups = param_groups_weight_decay(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    steps = len(train_rows) // settings.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=settings.lr,
        total_steps=settings.epochs * steps,
        pct_start=settings.warmup,
        cycle_momentum=False,
    )
    targets = F.one_hot(labels, classes).float()
    best: dict[str, tuple[float, dict[str, Tensor]]] = {}
    seconds.setup = time.perf_counter() - mark

    for _epoch in range(settings.epochs):
        model.train()
        order = train_rows[torch.randperm(len(train_rows))]
        loss_sum, hits = torch.zeros(()), torch.zeros(())
        for rows in order[: steps * settings.batch_size].split(settings.batch_size):
            mark = time.perf_counter()
            x = augment(images[rows], settings)
            y = targets[rows]
            seconds.data += time.perf_counter() - mark

            mark = time.perf_counter()
            if random.random() < settings.mixup_prob:
                weight = random.betavariate(settings.mixup_alpha, settings.mixup_alpha)
                other = torch.randperm(len(x))
                x = weight * x + (1 - weight) * x[other]
                y = weight * y + (1 - weight) * y[other]
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            ema.update(model, schedule.last_epoch)
            loss_sum += loss.detach() * len(x)
            hits += (logits.argmax(1) == y.argmax(1)).sum()
            seconds.step += time.perf_counter() - mark

        mark = time.perf_counter()
        for name, scored in (("raw", model), ("ema", ema.module)):
            score = log_loss(scored, images[val_rows], labels[val_rows], 2 * settings.batch_size)
            if name not in best or score < best[name][0]:
                best[name] = score, {k: v.clone() for k, v in scored.state_dict().items()}
        seconds.evaluate += time.perf_counter() - mark
    return {name: score for name, (score, _) in best.items()}, seconds


def augment(images: Tensor, settings: Settings) -> Tensor:
    """Each image turned, zoomed and shifted by its own draw, in one interpolation."""
    n = len(images)
    u = torch.rand(4, n) * 2 - 1
    angle, scale = u[0] * math.radians(settings.rotate), 1 / (1 + u[1] * settings.zoom)
    shift = u[2:] * 2 * settings.shift
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def log_loss(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    model.eval()
    logits = torch.cat([model(x) for x in images.split(batch_size)])
    return float(F.cross_entropy(logits, labels))
