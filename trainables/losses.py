"""Training losses by name, the class weights in them, and how their logits become probabilities.

Takes (B, C) logits and (B, C) target probabilities, gives a scalar mean over the batch. Class
weights are 1 on average over the training rows: the loss keeps its scale, and with it the learning
rate its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams
from foldrace.core.plugins import NO_PARTS, Parts, Table


@dataclass(frozen=True)
class Activation:
    """One row of the table; both functions of (B, C) logits."""

    name: str
    doc: str
    log_probs: Callable[[Tensor], Tensor]
    """Natural logarithms of probabilities that sum to 1 in each row."""
    trained: Callable[[Tensor], Tensor]
    """The probabilities that losses train: one distribution, or two outcomes for each class."""


def _softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=1)


def _sigmoid(logits: Tensor) -> Tensor:
    """p_c = sigmoid(z_c) / sum_j sigmoid(z_j): binary cross-entropy trains each class by itself."""
    return torch.log_softmax(functional.logsigmoid(logits), dim=1)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(
            "softmax", "classes compete: cross-entropy and its kin",
            _softmax, lambda logits: torch.softmax(logits, dim=1),
        ),
        Activation(
            "sigmoid", "one sigmoid a class, normalised: binary cross-entropy",
            _sigmoid, torch.sigmoid,
        ),
    )
}  # fmt: skip


def log_probs(logits: Tensor, activation: str) -> Tensor:
    """(B, C) logits of any float type -> (B, C) natural-log probabilities in float32."""
    return ACTIVATIONS[activation].log_probs(logits.float())


@dataclass(frozen=True)
class ClassWeights:
    """One row of the table."""

    name: str
    doc: str
    source: str
    function: Callable[[NDArray[np.float64], float], NDArray[np.float64]]
    """(P,) positive row counts and `class_weight_beta` -> (P,) weights of any scale."""


def _effective(counts: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """(1 - beta) / (1 - beta^n); beta 0 weighs all classes equally."""
    with np.errstate(divide="ignore"):
        covered: NDArray[np.float64] = -np.expm1(counts * np.log(beta))  # 1 - beta^n
    return (1.0 - beta) / covered


CLASS_WEIGHTS = Table(
    ClassWeights,
    "class weights",
    (
        ClassWeights(
            "none", "every image counts 1", "", lambda counts, beta: np.ones_like(counts)
        ),
        ClassWeights(
            "balanced", "every class counts equally: by inverse frequency",
            "King and Zeng, Logistic Regression in Rare Events Data, Political Analysis 2001",
            lambda counts, beta: 1.0 / counts,
        ),
        ClassWeights(
            "effective", "by the inverse effective number of images; see class_weight_beta",
            "Cui, Jia, Lin, Song and Belongie, Class-Balanced Loss Based on Effective Number of "
            "Samples, CVPR 2019",
            _effective,
        ),
    ),
)  # fmt: skip


def class_weights(
    name: str, class_counts: NDArray[np.int64], beta: float, parts: Parts = NO_PARTS
) -> NDArray[np.float64]:
    """(C,) training rows of each class -> (C,) weights with sum_c n_c w_c = sum_c n_c.

    A class without a training row weighs 1: only smoothed targets ever reach it.
    """
    weights = np.ones(len(class_counts))
    present = class_counts > 0
    counts = class_counts[present].astype(np.float64)
    found = parts[CLASS_WEIGHTS][name].function(counts, beta)
    weights[present] = found * counts.sum() / (found * counts).sum()
    return weights


_LDAM_SCALE = 30.0  # of the logits in the paper
_LDAM_MARGIN = 0.5  # of the rarest class, before the scale


@dataclass(frozen=True)
class LossSettings:
    """Settings that a loss may depend on besides logits and targets."""

    gamma: float
    alpha: float
    class_counts: Tensor  # (C,) float32, training rows


@dataclass(frozen=True)
class Loss:
    """One row of the table."""

    name: str
    doc: str
    source: str
    function: Callable[[Tensor, Tensor, LossSettings], Tensor]
    """(B, C) float32 logits, (B, C) targets, settings -> (B,) losses of the images, not below 0."""
    hard: bool = False
    """True: it takes one-hot targets only, so no mixing and no label smoothing."""
    activation: str = "softmax"
    """A row of `ACTIVATIONS`: how the logits that this trains become probabilities."""


def _cross_entropy(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """-sum_c t_c log p_c."""
    return functional.cross_entropy(logits, targets, reduction="none")


def _focal(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """sum_c alpha (1 - p_c)^gamma (-t_c log p_c)."""
    log_prob = functional.log_softmax(logits, 1)
    # 1 - p without cancellation; at 0 the slope of a power below 1 would be infinite.
    rest = (-torch.expm1(log_prob)).clamp_min(torch.finfo(torch.float32).tiny)
    return -settings.alpha * (rest**settings.gamma * targets * log_prob).sum(1)


def _bce(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """sum_c -t_c log s_c - (1 - t_c) log(1 - s_c), s = sigmoid(logits)."""
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def _kl(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """sum_c t_c (log t_c - log p_c), 0 log 0 = 0: cross-entropy less what no model can learn."""
    return functional.kl_div(functional.log_softmax(logits, 1), targets, reduction="none").sum(1)


def _ldam(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """Cross-entropy after a margin ~ n_c^(-1/4) was taken from the true class's logit.

    The paper's scale is in the margin, not on the logits: softmax(logits) are the probabilities.
    """
    rarity = settings.class_counts.clamp_min(1.0) ** -0.25
    margins = _LDAM_SCALE * _LDAM_MARGIN * rarity / rarity.max()
    return functional.cross_entropy(logits - margins * targets, targets, reduction="none")


LOSSES = Table(
    Loss,
    "loss",
    (
        Loss(
            "cross_entropy", "softmax cross-entropy with soft targets",
            "Good, Rational Decisions, Journal of the Royal Statistical Society B 1952",
            _cross_entropy,
        ),
        Loss(
            "focal", "cross-entropy that counts easy images less: focal_gamma, focal_alpha",
            "Lin, Goyal, Girshick, He and Dollar, Focal Loss for Dense Object Detection, ICCV 2017",
            _focal,
        ),
        Loss(
            "bce", "binary cross-entropy of each class against all others, summed",
            "Wightman, Touvron and Jegou, ResNet strikes back, NeurIPS workshop ImageNet PPF 2021",
            _bce, activation="sigmoid",
        ),
        Loss(
            "kl", "divergence from soft targets, for distillation; its least value is 0",
            "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, NeurIPS "
            "workshop on deep learning 2014",
            _kl,
        ),
        Loss(
            "ldam", "cross-entropy with larger margins for rarer classes",
            "Cao, Wei, Gaidon, Arechiga and Ma, Learning Imbalanced Datasets with Label-"
            "Distribution-Aware Margin Loss, NeurIPS 2019",
            _ldam, hard=True,
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Distillation:
    """What a student's loss has of its teacher.

    (1 - alpha) loss(labels) + alpha T^2 KL(teacher_T || student_T): the square keeps the size of
    the gradients whatever the temperature T. Hinton, Vinyals and Dean, Distilling the Knowledge in
    a Neural Network, NeurIPS workshop on deep learning 2014.
    """

    alpha: float
    temperature: float
    activation: str
    """The loss's own row of `ACTIVATIONS`."""

    def divergence(self, logits: Tensor, taught: Tensor) -> Tensor:
        """T^2 KL, the mean over (B, C) logits and the teacher's probabilities at T, (B, C)."""
        log_prob = log_probs(logits, self.activation) / self.temperature
        found = functional.kl_div(torch.log_softmax(log_prob, 1), taught, reduction="batchmean")
        return self.temperature**2 * found

    def beside(
        self, criterion: Callable[[Tensor, Tensor], Tensor], taught: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The whole loss of (B, C) logits and targets; or of several passes of the same images."""

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            passes = len(logits) // len(taught)
            learnt = self.divergence(logits, taught.repeat(passes, 1))
            return (1 - self.alpha) * criterion(logits, targets) + self.alpha * learnt

        return loss


def build_loss(
    params: TrialParams,
    class_counts: NDArray[np.int64],
    device: torch.device | str = "cpu",
    parts: Parts = NO_PARTS,
) -> Callable[[Tensor, Tensor], Tensor]:
    """(B, C) logits and (B, C) targets on `device` -> mean over the batch, in float32.

    `class_counts` (C,): training rows of each class. An image's loss is multiplied with the class
    weight that its target expects, sum_c t_c w_c, and the sum is divided by B. So the means of
    micro-batches add up to the batch's; torch's weighted mean divides by the sum of the batch's
    weights instead, and they would not. The weights are 1 on average over the training rows.
    """
    function = parts[LOSSES][params.loss].function
    counts = torch.as_tensor(class_counts, dtype=torch.float32, device=device)
    settings = LossSettings(params.focal_gamma, params.focal_alpha, counts)
    if params.class_weights == "none":
        return lambda logits, targets: function(logits.float(), targets, settings).mean()
    found = class_weights(params.class_weights, class_counts, params.class_weight_beta, parts)
    weights = torch.as_tensor(found, dtype=torch.float32, device=device)

    def weighted(logits: Tensor, targets: Tensor) -> Tensor:
        return (function(logits.float(), targets, settings) * (targets * weights).sum(1)).mean()

    return weighted
