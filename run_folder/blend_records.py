"""Records of a blend: members, calibration, what was tried, and `ensemble.json` as a whole.

`foldrace.run_folder.ensemble_folder` reads and writes them.
"""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from foldrace.core.metrics import MetricScore
from foldrace.run_folder.records import (
    Count,
    Fraction,
    Logloss,
    PlainName,
    Seconds,
    StoredRecord,
)

Milliseconds = Annotated[float, Field(ge=0, le=1e9)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Most sum to 1 over the members; those of `geometric` and `stacking` need not."""
LogWeight = Annotated[float, Field(ge=-100, le=100)]
SINGLE = "single"
"""In place of a blend method: the best member alone, chosen by the user's own metric."""
_IN_FOLDER = "[A-Za-z0-9][A-Za-z0-9._-]*"
BlendFile = Annotated[str, Field(pattern=f"^({_IN_FOLDER}|added/{_IN_FOLDER}/added[.]json)$")]
"""Name of a file in `ensemble/`."""


class MemberRecord(StoredRecord):
    """One member of a blend. `temperature` 1 means uncalibrated."""

    candidate: PlainName
    variant: PlainName
    weight: Weight
    temperature: Temperature = 1.0
    run: Annotated[str, Field(max_length=4096)] = ""
    """Run folder that holds it; empty for this one."""
    added: bool = False
    """True for predictions made elsewhere (`ensemble --add`): `ensemble/added/<candidate>/`."""
    oof_logloss: Logloss | None = None
    """OOF log loss of the member alone, uncalibrated; None in records of an older version."""
    gain: Logloss | None = None
    """Rise of the OOF log loss without it, in nats. Where the method fits the weights: the
    least loss that a mixture of the members can have. Where it gives all the same (`uniform`,
    `top-k`, `soft-vote`, `snapshot`): the loss of their mean, which may fall. None where the blend
    is no mixture, and beyond the 50 heaviest members."""
    ms_per_image: Milliseconds | None = None
    """Milliseconds of all its fold models together; None where it was not measured."""
    weight_bytes: Count | None = None


class ReliabilityBin(StoredRecord):
    """Rows whose highest probability lies in one of equally wide bins of [0, 1]."""

    rows: Count
    confidence: Fraction
    """Mean of the highest probability."""
    accuracy: Fraction


class Reliability(StoredRecord):
    """Honesty of the confidence of cross-fitted predictions."""

    ece: Fraction
    """Expected calibration error: mean over rows of |confidence - accuracy| of their bin."""
    bins: tuple[ReliabilityBin, ...]


class CalibrationTrial(StoredRecord):
    """Cross-fitted score of one way to calibrate."""

    members: bool
    blend: bool
    crossfit_logloss: Logloss
    crossfit_se: Logloss


class Calibration(StoredRecord):
    """Choice of temperatures, with the scores of all ways that were tried."""

    members: bool
    blend: bool
    tried: tuple[CalibrationTrial, ...]
    before: Reliability
    """Reliability without any temperature."""
    after: Reliability
    """Reliability with the temperatures that were kept."""


class MethodTrial(StoredRecord):
    """Score of one method that `ensemble.method: auto` tried, with temperatures that suit it.

    A figure to choose by, and a little optimistic.
    """

    method: str
    crossfit_logloss: Logloss
    crossfit_se: Logloss


class DecisionRule(StoredRecord):
    """The way from probabilities to a class, where that is not the most probable one."""

    log_weights: Annotated[tuple[LogWeight, ...], Field(max_length=100_000)] = ()
    """(C,) the class is that of the greatest log-probability + log weight."""
    thresholds: Annotated[tuple[float, ...], Field(max_length=100_000)] = ()
    """(C - 1,) the class is the number of these that the expected class number exceeds."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if bool(self.log_weights) == bool(self.thresholds):
            raise ValueError("a decision rule has either log_weights or thresholds")
        if any(a > b for a, b in pairwise(self.thresholds)):
            raise ValueError("the thresholds of a decision rule must ascend")
        return self


class MetricTrial(StoredRecord):
    """Cross-fitted score of one blend that stood to choose from, by the user's metric."""

    method: str
    """A blend method, or SINGLE."""
    members: bool
    """With a temperature for each member."""
    value: float
    se: float | None
    behind: float
    """How far it is behind the best of them; 0 for that one."""
    behind_se: float | None
    """Standard error of the difference on the same rows."""


class MetricChoice(StoredRecord):
    """The last selection by the user's own metric, `ensemble.metric`."""

    metric: str
    greater_is_better: bool
    value: float
    """Cross-fitted, with the decision rule where one is kept."""
    se: float | None
    tried: tuple[MetricTrial, ...]
    """The blend of the least log loss first."""
    kept: Count
    """Place in `tried` of what was kept."""
    rule: DecisionRule | None = None
    rule_gain: float | None = None
    """Cross-fitted gain by a decision rule, kept or not; None where none was tried."""
    rule_gain_se: float | None = None

    @property
    def score(self) -> MetricScore:
        """The cross-fitted value."""
        return MetricScore(self.metric, self.value, self.greater_is_better, self.se)


class BeatenBy(StoredRecord):
    """A metric in which a member is better than the blend by more than a standard error."""

    metric: str
    member: str
    value: float
    blend_value: float
    se: float
    """Standard error of the difference on the same rows."""


class CurvePoint(StoredRecord):
    """The best blend found within a limit of time."""

    ms_per_image: Milliseconds
    oof_logloss: Logloss
    members: Count


class NearDuplicates(StoredRecord):
    """Rows that resemble an image of another fold or of the test set."""

    rows: Count
    oof_logloss_without: Logloss | None
    """OOF log loss of the blend on the other rows; None where there are none."""


class UnvalidatedRecord(StoredRecord):
    """Test predictions without OOF rows: averaged into the submission, backed by no score."""

    name: PlainName
    weight: Fraction


class HeldOutScore(StoredRecord):
    """Score of the blend on rows that no trial and no choice has seen (`folds.test_fraction`)."""

    rows: Count
    logloss: Logloss
    accuracy: Fraction
    metrics: tuple[MetricScore, ...] = ()
    decided: MetricScore | None = None
    """The user's own metric with the decision rule; None without a rule."""

    def metric(self, name: str) -> MetricScore | None:
        """The score by one of `metrics`."""
        return next((score for score in self.metrics if score.name == name), None)


class EnsembleRecord(StoredRecord):
    """The blend and its figures, as in `ensemble.json`."""

    method: str
    members: Annotated[tuple[MemberRecord, ...], Field(min_length=1)]
    oof_logloss: Logloss
    crossfit_logloss: Logloss
    """Log loss of one fold's models on rows that had no say in anything of the blend."""
    crossfit_se: Logloss
    certificate: Logloss | None
    """Upper bound on `mixture_logloss` minus the least loss that any weights could have; None where
    the blend is no weighted mean of probabilities."""
    best_single_oof_logloss: Logloss
    best_single: str
    best_single_calibrated_logloss: Logloss | None = None
    """Least OOF loss of one member at a temperature of its own, to tell what of the blend's gain is
    calibration; None without calibration."""
    single_crossfit_logloss: Logloss
    """Cross-fitted loss of the best single member, chosen on the other folds too."""
    gain_over_single_se: Logloss = 0.0
    """Standard error of the difference between the two cross-fitted losses, row by row."""
    oof_accuracy: Fraction
    k: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of folds whose models the submission is the mean of."""
    members_considered: Count
    candidates_considered: Count
    members_without_weights: Count = 0
    """Number of members left out, since their weights were removed (`ensemble.keep: blend`)."""
    folds_hash: str
    metrics: tuple[MetricScore, ...] = ()
    """Every metric of the table, of the blend's OOF probabilities."""
    choice: MetricChoice | None = None
    """Last selection by `ensemble.metric`; None where the log loss alone decided."""
    beaten: tuple[BeatenBy, ...] = ()
    """Metrics that a member is better in, by its OOF probabilities."""
    held_out: HeldOutScore | None = None
    pooling: str = "arithmetic"
    """Way in which members are combined: `arithmetic`, `geometric`, `votes` or `stacking`."""
    mixture_logloss: Logloss | None = None
    """OOF log loss before the temperature of the blend."""
    blend_temperature: Temperature = 1.0
    calibration: Calibration | None = None
    methods_tried: tuple[MethodTrial, ...] = ()
    """Methods that `ensemble.method: auto` tried, of which `method` is one."""
    ms_per_image: Milliseconds | None = None
    """Milliseconds of all fold models; None where a member's was not measured."""
    device: str = ""
    """Device that `ms_per_image` was measured on."""
    weight_bytes: Count | None = None
    curve: tuple[CurvePoint, ...] = ()
    """Loss against time, where there is a limit of time."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Members with the same probabilities: only the first of each was considered."""
    near_duplicates: NearDuplicates | None = None
    unvalidated: tuple[UnvalidatedRecord, ...] = ()
    combiner: Annotated[str, Field(pattern="^(combiner[A-Za-z0-9-]*[.]safetensors)?$")] = (
        "combiner.safetensors"
    )
    """File in `ensemble/` with the combiner's numbers beyond the weights; empty for none."""
    digests: dict[BlendFile, str] = Field(default_factory=dict)
    """File in `ensemble/` -> blake2b of its bytes: only a file that has it is of this blend. Empty
    in records of an older version."""

    @model_validator(mode="after")
    def _weighs_something(self) -> Self:
        if not any(member.weight for member in self.members):
            raise ValueError("no member has a weight")
        if sum(file.weight for file in self.unvalidated) > 1 + 1e-9:
            raise ValueError("the files without a score weigh more than 1 together")
        return self

    @property
    def gain_over_single(self) -> float:
        """How far the blend's cross-fitted loss is below that of the best single member."""
        return self.single_crossfit_logloss - self.crossfit_logloss

    @property
    def rule(self) -> DecisionRule | None:
        """The decision rule for labels; None: the most probable class."""
        return None if self.choice is None else self.choice.rule

    def is_better_than(self, other: EnsembleRecord) -> bool:
        """Say whether its cross-fitted score is better: by the own metric, where both have it."""
        mine, theirs = self.choice, other.choice
        if mine is None or theirs is None or mine.metric != theirs.metric:
            return self.crossfit_logloss < other.crossfit_logloss
        ahead = mine.value - theirs.value
        return (ahead if mine.greater_is_better else -ahead) > 0

    def metric(self, name: str) -> MetricScore | None:
        """The score by one of `metrics`."""
        return next((score for score in self.metrics if score.name == name), None)

    @property
    def fair_single_logloss(self) -> float:
        """OOF loss of the best single member, calibrated where the blend is."""
        calibrated = self.best_single_calibrated_logloss
        return self.best_single_oof_logloss if calibrated is None else calibrated


class SubmissionNote(StoredRecord):
    """What the receipt of `submission.csv` says of it to people."""

    created: datetime
    crossfit_logloss: Logloss
    """Cross-fitted log loss of the blend that it was made by: what one fold's models have."""
    submitted_logloss: Logloss | None = None
    """Log loss that the mean of all folds' models is expected to have; None: `submitted_note`."""
    submitted_se: Logloss | None = None
    submitted_note: str = ""
    """Why there is no such figure."""
    without_image: tuple[str, ...] = ()
    """Ids whose rows are class frequencies, since their images cannot be read."""
    crossfit_se: Logloss | None = None
    chosen_metric: MetricScore | None = None
    """The user's own metric, cross-fitted; None where the log loss decided."""


class ResultUpdate(StoredRecord):
    """The last time that a sweep under way wrote its blend and its submission."""

    seconds: Seconds
    """Seconds that it took in a slot."""
    blend_logloss: Logloss
    """Log loss of the race's blend of the candidates that were complete by then."""
