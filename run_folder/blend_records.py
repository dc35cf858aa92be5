"""Records of a blend: members, calibration, what was tried, and `ensemble.json` as a whole.

`foldrace.run_folder.ensemble_folder` reads and writes them.
"""

from __future__ import annotations

from datetime import datetime
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
    """Score of one method that `ensemble.method: auto` tried, with temperatures that suit it."""

    method: str
    crossfit_logloss: Logloss
    crossfit_se: Logloss


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


class EnsembleRecord(StoredRecord):
    """The blend and its figures, as in `ensemble.json`."""

    method: str
    members: Annotated[tuple[MemberRecord, ...], Field(min_length=1)]
    oof_logloss: Logloss
    crossfit_logloss: Logloss
    crossfit_se: Logloss
    certificate: Logloss | None
    """Upper bound on `mixture_logloss` minus the least loss that any weights could have; None where
    the blend is no weighted mean of probabilities."""
    best_single_oof_logloss: Logloss
    best_single: str
    best_single_calibrated_logloss: Logloss | None = None
    """Least OOF loss of one member at a temperature of its own, to tell what of the blend's gain is
    calibration; None without calibration."""
    oof_accuracy: Fraction
    last_fold_logloss: Logloss
    members_considered: Count
    candidates_considered: Count
    members_without_weights: Count = 0
    """Number of members left out, since their weights were removed (`ensemble.keep: blend`)."""
    folds_hash: str
    metrics: tuple[MetricScore, ...] = ()
    """Every metric of the table, of the blend's OOF probabilities."""
    held_out: HeldOutScore | None = None
    pooling: str = "arithmetic"
    """Way in which members are combined: `arithmetic`, `geometric`, `votes` or `stacking`."""
    mixture_logloss: Logloss | None = None
    """OOF log loss before the temperature of the blend."""
    blend_temperature: Temperature = 1.0
    calibration: Calibration | None = None
    methods_tried: tuple[MethodTrial, ...] = ()
    """Methods that `ensemble.method: auto` tried; `method` is the one with the least loss."""
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
    def fair_single_logloss(self) -> float:
        """OOF loss of the best single member, calibrated where the blend is."""
        calibrated = self.best_single_calibrated_logloss
        return self.best_single_oof_logloss if calibrated is None else calibrated


class SubmissionNote(StoredRecord):
    """What the receipt of `submission.csv` says of it to people."""

    created: datetime
    crossfit_logloss: Logloss
    """Cross-fitted log loss of the blend that it was made by."""
    without_image: tuple[str, ...] = ()
    """Ids whose rows are class frequencies, since their images cannot be read."""


class ResultUpdate(StoredRecord):
    """The last time that a sweep under way wrote its blend and its submission."""

    seconds: Seconds
    """Seconds that it took in a slot."""
    blend_logloss: Logloss
    """Log loss of the race's blend of the candidates that were complete by then."""
