"""Pools of made-up members for the tests of the blend methods."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foldrace.ensemble.pool import Member, Pool, default_members


def made_up(members: int, rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (M, N, C) float32 of members of different skill and confidence that err
    together in part, and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    shared = rng.normal(0, 1.2, (rows, classes))
    shared[np.arange(rows), labels] += 2
    noise = rng.normal(0, 1, (members, rows, classes)) * rng.uniform(0.5, 2, (members, 1, 1))
    biased = rng.normal(0, 0.3, (members, 1, classes))
    logits = (shared + noise + biased) * rng.uniform(0.5, 1.5, (members, 1, 1))
    logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return logits.astype(np.float32), labels


def pool_of(
    log_probs: np.ndarray, labels: np.ndarray, members: Sequence[Member] | None = None
) -> Pool:
    """All of log_probs (M, N, C) on labels (N,)."""
    true = np.exp(log_probs[:, np.arange(len(labels)), labels])
    return Pool(
        members=default_members(len(log_probs)) if members is None else tuple(members),
        true_prob=np.clip(true, 0, 1),
        labels=labels,
        n_classes=log_probs.shape[2],
        log_prob=lambda member: log_probs[member],
    )


def of_variants(candidates: int, variants: Sequence[str]) -> list[Member]:
    """Every candidate with all these variants."""
    return [Member(f"c{i:04d}", variant) for i in range(candidates) for variant in variants]
