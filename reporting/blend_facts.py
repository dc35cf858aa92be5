"""What is known about the blend, in words: its guarantee, how members are combined, what it costs.

Takes the `EnsembleRecord`, gives names with their values and sentences.
"""

from __future__ import annotations

from experiment.records import EnsembleRecord
from reporting.markup import difference, file_size, milliseconds, number

_POOLINGS = {
    "arithmetic": (
        "weighted mean of the probabilities",
        "Weights sum to 1: each is the member's share of the blended probability.",
    ),
    "geometric": (
        "weighted mean of the log-probabilities, renormalised",
        "Weights are exponents and need not sum to 1: a sum above 1 sharpens the blend like a "
        "temperature below 1, a sum below 1 flattens it.",
    ),
    "votes": (
        "shares of votes for the most probable class",
        "A weight is a member's share of the votes, not of the probability.",
    ),
    "stacking": (
        "logistic regression on the members' log-probabilities",
        "A weight sums up the size of a member's coefficients, which differ from class to class; "
        "weights need not sum to 1.",
    ),
}

_GROUPS = 5
"""Of duplicates, that are named."""


def bound(record: EnsembleRecord) -> float | None:
    """The OOF log loss that no weights can go below, before a temperature of the blend; None
    without a certificate."""
    loss = record.mixture_logloss
    if loss is None and record.blend_temperature == 1.0:
        loss = record.oof_logloss
    return None if record.certificate is None or loss is None else loss - record.certificate


def certificate_in_words(record: EnsembleRecord) -> str:
    """How far from the best possible weights the blend is."""
    if record.certificate is None:
        return "none: it bounds weighted means of probabilities, and this blend is not one"
    least = bound(record)
    known = "" if least is None else f": none has an OOF log loss below {number(least)}"
    before = ", before the temperature of the blend" if record.blend_temperature != 1.0 else ""
    return (
        "no weights of the members considered are better by more than "
        f"{record.certificate:.1e}{known}{before}"
    )


def meaning_of_weights(record: EnsembleRecord) -> str:
    """What the numbers in the column `weight` are."""
    known = _POOLINGS.get(record.pooling)
    return known[1] if known else f"Weights are those of the pooling `{record.pooling}`."


def facts(record: EnsembleRecord, scored_rows: int) -> list[tuple[str, str]]:
    """(name, value); what was not measured is left out."""
    known = _POOLINGS.get(record.pooling)
    return [
        ("Members are combined by", known[0] if known else record.pooling),
        ("Certificate", certificate_in_words(record)),
        *_temperature(record),
        *_cost(record),
        *_duplicates(record),
        *_near_duplicates(record, scored_rows),
        *_unvalidated(record),
    ]


def _temperature(record: EnsembleRecord) -> list[tuple[str, str]]:
    if record.blend_temperature == 1.0:
        return []
    before = record.mixture_logloss
    change = "" if before is None else f" (OOF log loss {number(before)} before it)"
    return [("Temperature of the blend", f"{number(record.blend_temperature)}{change}")]


def _cost(record: EnsembleRecord) -> list[tuple[str, str]]:
    found = []
    if record.ms_per_image is not None:
        where = f" on {record.device}" if record.device else ""
        found.append(("Time per image, all fold models", milliseconds(record.ms_per_image) + where))
    if record.weight_bytes is not None:
        found.append(("Weight files, all fold models", file_size(record.weight_bytes)))
    return found


def _duplicates(record: EnsembleRecord) -> list[tuple[str, str]]:
    groups = [f"{group[0]} = {', '.join(group[1:])}" for group in record.duplicates]
    if not groups:
        return []
    more = len(groups) - _GROUPS
    shown = [*groups[:_GROUPS], *([f"and {more} more"] if more > 0 else [])]
    return [("Same probabilities, only the first was considered", "; ".join(shown))]


def _near_duplicates(record: EnsembleRecord, scored_rows: int) -> list[tuple[str, str]]:
    near = record.near_duplicates
    if near is None:
        return []
    if near.rows == 0:
        return [("Near-duplicate images", "none across folds or with the test set")]
    without = near.oof_logloss_without
    change = "" if without is None else f" ({difference(without - record.oof_logloss)})"
    return [
        (
            "Near-duplicate images",
            f"{near.rows:,} of {scored_rows:,} rows resemble an image of another fold or of the "
            f"test set; OOF log loss {number(record.oof_logloss)} with them, "
            f"{number(without)} without{change}",
        )
    ]


def _unvalidated(record: EnsembleRecord) -> list[tuple[str, str]]:
    shares = ", ".join(f"{u.name} {number(u.weight)}" for u in record.unvalidated)
    return [("Unvalidated predictions in the submission", shares)] if shares else []
