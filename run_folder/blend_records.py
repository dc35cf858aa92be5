"""Records of a blend: members, calibration, what was tried, and `ensemble.json` as a whole.

`foldrace.run_folder.ensemble_folder` reads and writes them.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from foldrace.core.metrics import MetricScore
from foldrace.run_folder.records import StoredRecord


class MemberRecord(StoredRecord):
    """One member of a blend. `temperature` 1 means uncalibrated."""

    candidate: str
    variant: str
    weight: float
    temperature: float = 1.0
    run: str = ""
    """Run folder that holds it; empty for this one."""
    added: bool = False
    """True for predictions made elsewhere (`ensemble --add`): `ensemble/added/<candidate>/`."""
    oof_logloss: float | None = None
    """OOF log loss of the member alone, uncalibrated; None in records of an older version."""
    gain: float | None = None
    """Rise of the OOF log loss without it, in nats. Where the method fits the weights: the
    least loss that a mixture of the members can have. Where it gives all the same (`uniform`,
    `top-k`, `soft-vote`, `snapshot`): the loss of their mean, which may fall. None where the blend
    is no mixture, and beyond the 50 heaviest members."""
    ms_per_image: float | None = None
    """Milliseconds of all its fold models together; None where it was not measured."""
    weight_bytes: int | None = None


class ReliabilityBin(StoredRecord):
    """Rows whose highest probability lies in one of equally wide bins of [0, 1]."""

    rows: int
    confidence: float
    """Mean of the highest probability."""
    accuracy: float


class Reliability(StoredRecord):
    """Honesty of the confidence of cross-fitted predictions."""

    ece: float
    """Expected calibration error: mean over rows of |confidence - accuracy| of their bin."""
    bins: tuple[ReliabilityBin, ...]


class CalibrationTrial(StoredRecord):
    """Cross-fitted score of one way to calibrate."""

    members: bool
    blend: bool
    crossfit_logloss: float
    crossfit_se: float


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
    crossfit_logloss: float
    crossfit_se: float


class CurvePoint(StoredRecord):
    """The best blend found within a limit of time."""

    ms_per_image: float
    oof_logloss: float
    members: int


class NearDuplicates(StoredRecord):
    """Rows that resemble an image of another fold or of the test set."""

    rows: int
    oof_logloss_without: float | None
    """OOF log loss of the blend on the other rows; None where there are none."""


class UnvalidatedRecord(StoredRecord):
    """Test predictions without OOF rows: averaged into the submission, backed by no score."""

    name: str
    weight: float


class HeldOutScore(StoredRecord):
    """Score of the blend on rows that no trial and no choice has seen (`folds.test_fraction`)."""

    rows: int
    logloss: float
    accuracy: float
    metrics: tuple[MetricScore, ...] = ()


class EnsembleRecord(StoredRecord):
    """The blend and its figures, as in `ensemble.json`."""

    method: str
    members: tuple[MemberRecord, ...]
    oof_logloss: float
    crossfit_logloss: float
    crossfit_se: float
    certificate: float | None
    """Upper bound on `mixture_logloss` minus the least loss that any weights could have; None where
    the blend is no weighted mean of probabilities."""
    best_single_oof_logloss: float
    best_single: str
    best_single_calibrated_logloss: float | None = None
    """Least OOF loss of one member at a temperature of its own, to tell what of the blend's gain is
    calibration; None without calibration."""
    oof_accuracy: float
    last_fold_logloss: float
    members_considered: int
    candidates_considered: int
    members_without_weights: int = 0
    """Number of members left out, since their weights were removed (`ensemble.keep: blend`)."""
    folds_hash: str
    metrics: tuple[MetricScore, ...] = ()
    """Every metric of the table, of the blend's OOF probabilities."""
    held_out: HeldOutScore | None = None
    pooling: str = "arithmetic"
    """Way in which members are combined: `arithmetic`, `geometric`, `votes` or `stacking`."""
    mixture_logloss: float | None = None
    """OOF log loss before the temperature of the blend."""
    blend_temperature: float = 1.0
    calibration: Calibration | None = None
    methods_tried: tuple[MethodTrial, ...] = ()
    """Methods that `ensemble.method: auto` tried; `method` is the one with the least loss."""
    ms_per_image: float | None = None
    """Milliseconds of all fold models; None where a member's was not measured."""
    device: str = ""
    """Device that `ms_per_image` was measured on."""
    weight_bytes: int | None = None
    curve: tuple[CurvePoint, ...] = ()
    """Loss against time, where there is a limit of time."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Members with the same probabilities: only the first of each was considered."""
    near_duplicates: NearDuplicates | None = None
    unvalidated: tuple[UnvalidatedRecord, ...] = ()
    combiner: str = "combiner.safetensors"
    """File in `ensemble/` with the combiner's numbers beyond the weights; empty for none."""
    digests: dict[str, str] = Field(default_factory=dict)
    """File in `ensemble/` -> blake2b of its bytes: only a file that has it is of this blend. Empty
    in records of an older version."""

    @property
    def fair_single_logloss(self) -> float:
        """OOF loss of the best single member, calibrated where the blend is."""
        calibrated = self.best_single_calibrated_logloss
        return self.best_single_oof_logloss if calibrated is None else calibrated


class SubmissionNote(StoredRecord):
    """What the receipt of `submission.csv` says of it to people."""

    created: datetime
    crossfit_logloss: float
    """Cross-fitted log loss of the blend that it was made by."""
    without_image: tuple[str, ...] = ()
    """Ids whose rows are class frequencies, since their images cannot be read."""


class ResultUpdate(StoredRecord):
    """The last time that a sweep under way wrote its blend and its submission."""

    seconds: float
    """Seconds that it took in a slot."""
    blend_logloss: float
    """Log loss of the race's blend of the candidates that were complete by then."""
