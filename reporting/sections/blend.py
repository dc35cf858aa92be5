"""Report section: the blend's members, weights, guarantee and cost, and how it was chosen."""

from __future__ import annotations

from foldrace.reporting.charts import blend as blend_charts
from foldrace.reporting.content import (
    Cell,
    Chart,
    Collapsible,
    Facts,
    Note,
    Number,
    Part,
    Table,
    count,
    score,
    signed,
)
from foldrace.reporting.context import ReportContext, Step
from foldrace.reporting.formats import UNKNOWN, difference, file_size, milliseconds, number
from foldrace.reporting.members import BlendMember
from foldrace.reporting.sentences import gain_of_other_weights, last_selection
from foldrace.run_folder.blend_records import EnsembleRecord

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
"""Groups of duplicates that are named."""
_BARS = 40
"""Members that the chart of weights has room for."""


def bound(record: EnsembleRecord) -> float | None:
    """OOF log loss that no weights can go below, before a temperature of the blend.

    None without a certificate.
    """
    loss = record.mixture_logloss
    if loss is None and record.blend_temperature == 1.0:
        loss = record.oof_logloss
    return (
        None if record.certificate is None or loss is None else max(0.0, loss - record.certificate)
    )


def certificate_in_words(record: EnsembleRecord) -> str:
    """Say how far from the best possible weights the blend is."""
    if record.certificate is None:
        return gain_of_other_weights(record)
    least = bound(record)
    known = "" if least is None else f": none has an OOF log loss below {number(least)}"
    before = ", before the temperature of the blend" if record.blend_temperature != 1.0 else ""
    gain = gain_of_other_weights(record)
    return f"other weights of the members considered {gain}{known}{before}"


def meaning_of_weights(record: EnsembleRecord) -> str:
    """Say what the numbers in the column `weight` mean."""
    known = _POOLINGS.get(record.pooling)
    return known[1] if known else f"Weights are those of the pooling `{record.pooling}`."


def facts(record: EnsembleRecord, scored_rows: int) -> list[tuple[str, str]]:
    """Facts of the blend by name; those that were not measured are left out."""
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


def blend(ctx: ReportContext) -> list[Part]:
    """Show members, weights and gains, the guarantee, and how the blend was chosen."""
    record = ctx.ensemble
    if record is None or not record.members:
        return []
    return [
        Facts(tuple(facts(record, len(ctx.scored_labels)))),
        Note(meaning_of_weights(record)),
        *_methods(record),
        *_last_selection(record),
        _members_table(ctx.members),
        _weights_chart(ctx),
        *_path(ctx, record),
        *_curve(ctx, record),
    ]


def _methods(record: EnsembleRecord) -> list[Part]:
    """The methods that `ensemble.method: auto` tried."""
    tried = record.methods_tried
    if not tried:
        return []
    by_loss = record.choice is None or record.choice.kept == 0
    chosen = frozenset(i for i, t in enumerate(tried) if t.method == record.method)
    rows = tuple(
        (
            t.method, score(t.crossfit_logloss), score(t.crossfit_se),
            "chosen" if i in chosen else "",
        )
        for i, t in enumerate(tried)
    )  # fmt: skip
    headers = ("method", "cross-fitted log loss", "standard error", "")
    return [
        *([Note("The method with the lowest cross-fitted loss was chosen.")] if by_loss else []),
        Table(headers, rows, "Methods that were tried", chosen),
    ]


def _last_selection(record: EnsembleRecord) -> list[Part]:
    """The blends that the user's own metric chose from."""
    choice = record.choice
    if choice is None:
        return []
    rows = tuple(
        (
            t.method, "one a member" if t.members else "none or the blend's", score(t.value),
            score(t.se), signed(t.behind), score(t.behind_se), "kept" if i == choice.kept else "",
        )
        for i, t in enumerate(choice.tried)
    )  # fmt: skip
    headers = (
        "method", "temperatures", f"cross-fitted {choice.metric}", "standard error",
        "behind the best", "standard error of that", "",
    )  # fmt: skip
    return [
        *(Note(text) for text in last_selection(record)),
        Table(headers, rows, f"Chosen by {choice.metric}", frozenset((choice.kept,))),
    ]


def _members_table(members: tuple[BlendMember, ...]) -> Table:
    """Columns in which nothing is known are left out; members from elsewhere are shaded."""
    columns: dict[str, list[Cell]] = {
        "candidate": [m.record.candidate for m in members],
        "run": [m.run_name for m in members],
        "variant": ["" if m.record.added else m.record.variant for m in members],
        "weight": [score(m.record.weight) for m in members],
        "loss rise without it": [signed(m.gain) for m in members],
        "own OOF log loss, uncalibrated": [score(m.own_logloss) for m in members],
        "temperature": [score(m.record.temperature) for m in members],
        "time per image": [_time(m.record.ms_per_image) for m in members],
        "weight files": [_size(m.record.weight_bytes) for m in members],
        "backbone": [m.backbone for m in members],
        "from": [m.origin for m in members],
    }
    elsewhere = frozenset(i for i, m in enumerate(members) if m.record.added or m.record.run)
    if not elsewhere:
        del columns["run"], columns["from"]
    shown = {name: cells for name, cells in columns.items() if any(map(_is_known, cells))}
    rows = tuple(zip(*shown.values(), strict=True))
    return Table(tuple(shown), rows, "Members of the blend", elsewhere)


def _time(ms: float | None) -> Number:
    return Number(UNKNOWN if ms is None else milliseconds(ms), ms)


def _size(n_bytes: int | None) -> Number:
    return Number(UNKNOWN, None) if n_bytes is None else Number(file_size(n_bytes), float(n_bytes))


def _is_known(cell: Cell) -> bool:
    return not isinstance(cell, Number) or cell.value is not None


def _weights_chart(ctx: ReportContext) -> Chart:
    shown = ctx.members[:_BARS]
    bars = [blend_charts.Bar(m.label, m.backbone, m.record.weight, m.gain) for m in shown]
    which = f"The {_BARS} heaviest of {len(ctx.members)}" if len(ctx.members) > _BARS else "All"
    gains = (
        " Beside each weight: how much the OOF log loss rises without the member, the others' "
        "weights refitted; near 0, the others make up for it."
        if any(bar.gain is not None for bar in bars)
        else ""
    )
    return ctx.chart(
        "weights",
        blend_charts.weights(bars, ctx.palette),
        f"Weights of {len(bars)} members of the blend",
        f"{which} members, coloured by backbone.{gains}",
    )


def _path(ctx: ReportContext, record: EnsembleRecord) -> list[Part]:
    """The OOF log loss after each round, and who was picked."""
    steps = ctx.trajectory()
    if len(steps) < 2:
        return []
    rounds, losses = [s.round for s in steps], [s.oof_logloss for s in steps]
    least = bound(record)
    calibrated = record.calibration is not None and record.calibration.members
    single = record.fair_single_logloss if calibrated else record.best_single_oof_logloss
    guarantee = " No weights reach below the dotted line." if least is not None else ""
    return [
        ctx.chart(
            "selection_path",
            blend_charts.trajectory(rounds, losses, single, least),
            f"OOF log loss of the blend against round, {len(steps)} rounds",
            f"How the blend was chosen: its OOF log loss after each round.{guarantee}",
        ),
        _rounds(steps),
    ]


def _rounds(steps: list[Step]) -> Collapsible:
    rows = tuple((count(s.round), s.picked, score(s.oof_logloss, 6)) for s in steps)
    return Collapsible(
        f"Members picked in each of the {len(steps)} rounds",
        (
            Note("Rounds after the best one are dropped, and name no member."),
            Table(("round", "picked", "OOF log loss after it"), rows, "Rounds"),
        ),
    )


def _curve(ctx: ReportContext, record: EnsembleRecord) -> list[Chart]:
    """The least loss within each limit of time; empty without such a limit."""
    if not record.curve:
        return []
    ms = record.ms_per_image
    chosen = None if ms is None else (ms, record.oof_logloss)
    return [
        ctx.chart(
            "loss_against_time",
            blend_charts.loss_against_time(record.curve, chosen),
            f"OOF log loss against milliseconds per image, {len(record.curve)} blends",
            "The least OOF log loss of a blend within each limit of time"
            f"{f', measured on {record.device}' if record.device else ''}; a number is the members "
            "of the blend there.",
        )
    ]
