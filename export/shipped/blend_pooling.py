"""The members' log-probabilities to the blend's probabilities, as a torch module.

Takes (M, F, B, C) of M members' F fold models, gives (B, C): the mean over repeats, temperatures,
the members' combination, the geometric mean over folds at the blend's temperature. Needs torch
alone; it is a part of an ONNX graph too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLIP = 1e-15
"""The least probability, as in the score."""


class Pooling(nn.Module):
    """One blend's combination of its fold models; numbers in the dtype of what it is given."""

    def __init__(
        self, pooling: str, members: Sequence[Mapping[str, Any]], arrays: Mapping[str, Tensor],
        repeats: int, blend_temperature: float,
    ) -> None:  # fmt: skip
        """`members` have weight and temperature, `arrays` is what the combiner knows beyond."""
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}; allowed: {', '.join(POOLINGS)}")
        self._combine = POOLINGS[pooling]
        self._repeats, self._final = repeats, blend_temperature
        self._temperatures = [float(member["temperature"]) for member in members]
        self._arrays = {name: tensor.double() for name, tensor in arrays.items()}
        self._arrays["weights"] = torch.tensor([float(m["weight"]) for m in members]).double()

    def forward(self, log_probs: Tensor) -> Tensor:
        """(B, C) probabilities of (M, F, B, C) log-probabilities, fold models by repeat."""
        arrays = {name: tensor.to(log_probs) for name, tensor in self._arrays.items()}
        calibrated = [
            self._calibrated(self._mean(log_prob), temperature)
            for log_prob, temperature in zip(log_probs.unbind(0), self._temperatures, strict=True)
        ]
        pooled = self._combine(torch.stack(calibrated), arrays)
        mean = (_logs(pooled) / self._final).mean(dim=0)
        return torch.softmax(mean, dim=-1)

    def _mean(self, log_prob: Tensor) -> Tensor:
        """(K, B, C) of (R * K, B, C): a fold's probabilities are the mean over its repeats."""
        if self._repeats == 1:
            return log_prob
        each = torch.stack(log_prob.chunk(self._repeats, dim=0))
        return torch.logsumexp(each, dim=0) - math.log(self._repeats)

    def _calibrated(self, log_prob: Tensor, temperature: float) -> Tensor:
        """P ** (1 / T), renormalised, as logarithms."""
        least = math.log(CLIP)
        scaled = torch.clamp(log_prob, min=least) / temperature
        return torch.clamp(torch.log_softmax(scaled, dim=-1), min=least)


def _logs(prob: Tensor) -> Tensor:
    return torch.log(torch.clamp(prob / prob.sum(dim=-1, keepdim=True), CLIP, 1.0))


def _arithmetic(log_probs: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    """The weighted mean of (M, K, B, C) over the members."""
    return (log_probs.exp() * _each(arrays["weights"])).sum(dim=0)


def _votes(log_probs: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    classes, constant = log_probs.shape[-1], arrays["constant"][0]
    votes = functional.one_hot(log_probs.argmax(dim=-1), classes).to(log_probs)
    shares = (votes * _each(arrays["weights"])).sum(dim=0)
    return (1.0 - constant) * shares / shares.sum(dim=-1, keepdim=True) + constant / classes


def _geometric(log_probs: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    return torch.softmax((_centred(log_probs) * _each(arrays["weights"])).sum(dim=0), dim=-1)


def _stacking(log_probs: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
    logs = _centred(log_probs)
    total = (logs * _each(arrays["scales"])).sum(dim=0)
    for matrix, owner in zip(arrays["matrices"], arrays["owners"].tolist(), strict=True):
        total = total + logs[int(owner)] @ matrix
    return torch.softmax(total + arrays["intercept"], dim=-1)


def _each(numbers: Tensor) -> Tensor:
    """(M,) -> (M, 1, 1, 1)."""
    return numbers[:, None, None, None]


def _centred(log_probs: Tensor) -> Tensor:
    return log_probs - log_probs.mean(dim=-1, keepdim=True)


POOLINGS = {
    "arithmetic": _arithmetic,
    "votes": _votes,
    "geometric": _geometric,
    "stacking": _stacking,
}
