"""R-Drop: two passes of the same images, that drop other units, must agree.

Takes the logits of one doubled batch, gives the loss. Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang
and Liu, R-Drop: Regularized Dropout for Neural Networks, NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trainables.activations import ACTIVATIONS


def rdrop_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    activation: str = "softmax",
) -> Tensor:
    """Mean of the two passes' losses + alpha / 2 (KL(p||q) + KL(q||p)), mean over the batch.

    `logits` (2B, C): those of the B images, then those of the same images again; `targets` (B, C);
    `criterion` is a mean over its batch. `activation` is the loss's own: p and q are softmaxes,
    or C independent sigmoids whose divergences are summed.
    """
    first, second = logits.float().chunk(2)
    fit = criterion(logits, targets.repeat(2, 1))
    probabilities = ACTIVATIONS[activation].trained
    # For both activations the symmetric divergence is sum_c (p_c - q_c) (logit p_c - logit q_c).
    p, q = probabilities(first), probabilities(second)
    divergence = ((p - q) * (first - second)).sum(1).mean()
    return fit + alpha / 2 * divergence
