"""What a search learns from earlier runs, and what is told of `search` before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from foldrace.checks.search import search_problems, search_warnings
from foldrace.config.hyperparameters import TrialParams
from foldrace.config.load import parse_config
from foldrace.config.schema import SweepConfig
from foldrace.run_folder.records import CandidateRecord, CandidateSummary, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.search.sampler_history import EarlierCandidate, SamplerHistory
from foldrace.scheduling.search.samplers import SAMPLERS
from foldrace.scheduling.search.study import CandidateStudy, open_study
from foldrace.scheduling.search.warm_start import earlier_candidates
from tests.conftest import TinyRun
from tests.scheduling.search.searches import BACKBONES, FEW, decision, ended, space_of, sweep

pytestmark = pytest.mark.usefixtures("nothing_recorded")

A, B = BACKBONES


def record(number: int, backbone: str = A, **knobs: float | str) -> CandidateRecord:
    params = TrialParams.from_dict({"lr": 1e-3 + number * 1e-5} | knobs)
    return CandidateRecord(candidate=f"c{number:04d}", backbone=backbone, params=params.as_dict())


def of_a_newer_version(candidate: CandidateRecord) -> CandidateRecord:
    return candidate.model_copy(update={"params": candidate.params | {"not_known_yet": 1}})


def fill(store: RunStore, candidates: Sequence[tuple[CandidateRecord, Sequence[float]]]) -> None:
    """Write candidates with the losses of their finished folds; nan: a diverged one."""
    for candidate, losses in candidates:
        store.save_candidate(candidate)
        for fold, loss in enumerate(losses):
            diverged = math.isnan(loss)
            scored = {} if diverged else {"raw": loss}
            store.save_trial(
                TrialRecord(
                    candidate=candidate.candidate,
                    fold=fold,
                    status="diverged" if diverged else "finished",
                    backbone=candidate.backbone,
                    params=candidate.params,
                    folds_hash=store.folds().hash,
                    seed=0,
                    variants={
                        name: VariantScore(
                            rows=20, val_logloss=x, calibrated_logloss=x, val_acc=0.5, epoch=0
                        )
                        for name, x in scored.items()
                    },
                )
            )


def shown(earlier: Sequence[EarlierCandidate], backbone: str = A, **search: object) -> list[float]:
    """The values that a sampler without pruning sees, by number."""
    history = SamplerHistory(
        space_of(sweep(space=FEW, **search)), SAMPLERS["gp"], 10, False, earlier
    )
    return [trial.value for trial in history.trials(backbone) if trial.value is not None]


def learn(history: SamplerHistory, summary: CandidateSummary) -> None:
    history.start(summary.candidate)
    history.update(summary)


def earlier(
    number: int, loss: float, run: int = 1, comparable: bool = True, backbone: str = A
) -> EarlierCandidate:
    summary = ended(record(number, backbone), "complete", (loss, loss))
    return EarlierCandidate(summary, run, comparable)


def test_of_the_same_folds_values_are_taken_as_they_are() -> None:
    assert shown([earlier(i, 0.1 * i) for i in range(3)]) == pytest.approx([0.0, 0.1, 0.2])


def test_of_other_folds_each_runs_values_are_put_on_one_level() -> None:
    one = [earlier(i, 0.1 * i, run=1) for i in range(5)]
    two = [earlier(i, 5.0 + i, run=2, comparable=False) for i in range(5)]
    expected = [-1.0, -0.5, 0.0, 0.5, 1.0]  # from the median, in interquartile ranges
    assert shown([*one, *two]) == pytest.approx(expected * 2)


def test_own_candidates_join_the_level_of_their_folds() -> None:
    space = space_of(sweep(space=FEW))
    others = [earlier(i, 5.0 + i, comparable=False) for i in range(5)]
    history = SamplerHistory(space, SAMPLERS["gp"], 10, False, others)
    learn(history, ended(record(0), "complete", (0.3, 0.3)))
    assert [t.value for t in history.trials(A)] == pytest.approx([-1.0, -0.5, 0.0, 0.5, 1.0, 0.0])
    learn(history, ended(record(1), "complete", (0.2, 0.2)))
    last = [t.value for t in history.trials(A)][-2:]
    assert last == pytest.approx([1.0, -1.0])


def test_a_gain_and_an_earlier_log_loss_are_never_compared_as_they_are() -> None:
    space = space_of(sweep(space=FEW))
    others = [earlier(i, 0.1 * i) for i in range(3)]
    history = SamplerHistory(space, SAMPLERS["gp"], 10, True, others)
    for number, gain in enumerate((0.01, -0.01)):
        last = decision(record(number), fold=1, gain=gain)
        learn(history, ended(record(number), "complete", (0.3, 0.3), decisions=[last]))
    assert [t.value for t in history.trials(A)] == pytest.approx([-1.0, 0.0, 1.0, -1.0, 1.0])


def test_folders_are_read(make_tiny_run: Callable[..., TinyRun]) -> None:
    same, other = make_tiny_run("same"), make_tiny_run("other", k=2)
    space = space_of(sweep(space=FEW))
    fill(
        same.store,
        [
            (record(0), (0.3, 0.4, 0.5)),
            (record(1), (0.3, math.nan)),
            (record(2), (0.3,)),  # unfinished
            (record(3, lr=0.9), (0.3, 0.4, 0.5)),  # outside the range
            (record(4, "timm/other"), (0.3, 0.4, 0.5)),
            (of_a_newer_version(record(6)), (0.3, 0.4, 0.5)),
            (record(5, B, dropout=0.4), (0.3, 0.4, 0.5)),  # which is 0.1 here
        ],
    )
    fill(other.store, [(record(0), (0.3, 0.4))])
    roots = [same.store.root, other.store.root]
    found = earlier_candidates(roots, space, same.store.folds().hash)
    assert [(e.summary.candidate.candidate, e.run, e.comparable) for e in found] == [
        ("c0000", 1, True),
        ("c0001", 1, True),
        ("c0005", 1, False),
        ("c0000", 2, False),
    ]


def ask_all(study: CandidateStudy, count: int) -> list[CandidateRecord]:
    """Ask for so many candidates and start them."""
    found = []
    for number in range(count):
        given = study.ask(number)
        assert given is not None
        study.candidate_started(given)
        found.append(given)
    return found


def test_a_search_goes_on_where_the_earlier_one_was(make_tiny_run: Callable[..., TinyRun]) -> None:
    """TPE draws near what was good there, and may run those configurations again."""
    old, new = make_tiny_run("old"), make_tiny_run("new")
    best = 3e-4
    rates = [10 ** (-4 + 1.6 * i / 39) for i in range(40)]
    losses = [abs(math.log10(lr / best)) + 0.1 for lr in rates]
    fill(
        old.store,
        [
            (record(i, A, lr=lr), [x] * 3)
            for i, (lr, x) in enumerate(zip(rates, losses, strict=True))
        ],
    )
    config = sweep(space=FEW, backbones=[A], warm_start=[old.store.root])
    space = space_of(config)

    def distances(config: SweepConfig) -> list[float]:
        asked = ask_all(open_study(new.store, config, space), 12)
        assert asked[0].params == space.default(A).as_dict()
        return [abs(math.log10(float(r.params["lr"]) / best)) for r in asked[1:]]

    warm = distances(config)
    cold = distances(sweep(space=FEW, backbones=[A]))
    assert sum(warm) < 0.5 * sum(cold)


def test_an_earlier_configuration_may_be_run_again() -> None:
    space = FEW | {"lr": 0.001, "epochs": {"choices": [3, 5]}}
    config = sweep(space=space, backbones=[A])
    built = space_of(config)
    summaries: list[CandidateSummary] = []
    for number, epochs in enumerate((3, 5)):
        params = built.configured(A, {"epochs": epochs}).as_dict()
        candidate = CandidateRecord(candidate=f"c000{number}", backbone=A, params=params)
        summaries.append(ended(candidate, "complete", (0.3, 0.3)))
    known = [EarlierCandidate(summary, 1, True) for summary in summaries]
    study = CandidateStudy(built, config.search, 10, known)
    assert {r.params["epochs"] for r in ask_all(study, 2)} == {3, 5}
    assert study.ask(2) is None


# -- what is told before the sweep


def problems(**search: object) -> dict[str, str]:
    config = sweep(**search)
    found = list(search_problems(config, space_of(config)))
    assert len({p.where for p in found}) == len(found)
    return {p.where: p.message for p in found}


def test_nothing_is_wrong_with_what_works() -> None:
    points = [{"backbone": A, "params": {"lr": 0.5, "loss": "focal", "batch_size": 48}}]
    assert problems() == {}
    assert problems(points=points, sampler="list") == {}
    assert problems(sampler="gp", objective="gain", candidates=1) == {}
    assert problems(sampler="grid", candidates=10_000) == {}


def test_every_wrong_point_is_told_with_its_key() -> None:
    found = problems(
        points=[
            {"backbone": A},
            {"backbone": "timm/test_resnt", "params": {"lr": 0.001}},
            {"backbone": A, "params": {"lr": 5, "drop_out": 0.1, "batch_size": 16.5}},
            {"backbone": A, "params": {"loss": "focl", "dropout": "high", "optimizer": 3}},
            {"backbone": A, "params": {"lr": space_of(sweep()).default(A).lr}},
        ]
    )
    where = "search.points[{}].{}".format
    unknown = found.pop(where(1, "backbone"))
    assert "did you mean 'timm/test_resnet'?" in unknown and "search.backbones" in unknown
    assert found.pop(where(2, "params.lr")).startswith("got 5; allowed: 1e-07 to 1 (peak learning")
    assert "did you mean 'dropout'?" in found.pop(where(2, "params.drop_out"))
    assert "got 16.5; allowed: whole numbers 1" in found.pop(where(2, "params.batch_size"))
    assert "did you mean 'focal'?" in found.pop(where(3, "params.loss"))
    assert "got 'high'; allowed: a number, 0 to 0.95" in found.pop(where(3, "params.dropout"))
    assert "got 3; allowed: a name" in found.pop(where(3, "params.optimizer"))
    assert "same configuration as search.points[0]" in found.pop("search.points[4]")
    assert found == {}


def test_a_point_that_cannot_be_trained_is_told() -> None:
    points = [{"backbone": A, "params": {"sam_rho": 0.05, "batch_size": 3}}]
    config = sweep(points=points)
    training = config.training.model_copy(update={"precision": "fp16"})
    resources = config.resources.model_copy(update={"devices_per_trial": 2})
    config = config.model_copy(update={"training": training, "resources": resources})
    found = {p.where: p.message for p in search_problems(config, space_of(config))}
    assert "fp16" in found.pop("search.points[0].params.sam_rho")
    assert "at least 4" in found.pop("search.points[0].params.batch_size")
    assert found == {}


def test_samplers_that_have_nothing_to_do() -> None:
    assert "there are none" in problems(sampler="list")["search.sampler"]
    points = [{"backbone": A, "params": {"lr": 0.001 * i}} for i in range(1, 4)]
    assert (
        "fewer than the 3 search.points"
        in (problems(candidates=2, points=points)["search.candidates"])
    )


def test_wrong_folders_are_told(make_tiny_run: Callable[..., TinyRun], tmp_path: Path) -> None:
    runs = [make_tiny_run(f"run{i}") for i in range(4)]
    fill(runs[1].store, [(record(0, "timm/other"), (0.3, 0.4, 0.5))])
    fill(runs[2].store, [(record(0, lr=0.9), (0.3, 0.4, 0.5))])
    fill(runs[3].store, [(record(0), (0.3, 0.4, 0.5))])
    roots = [str(tmp_path / "gone"), *(run.store.root for run in runs)]
    found = problems(warm_start=roots)
    assert "is no run folder" in found["search.warm_start[0]"]
    assert "--set search.warm_start=[]" in found["search.warm_start[0]"]
    assert "no candidate that ended" in found["search.warm_start[1]"]
    assert "candidates of timm/other alone" in found["search.warm_start[2]"]
    assert "hyperparameter outside" in found["search.warm_start[3]"]
    assert len(found) == 4


def test_a_database_that_does_not_answer_is_told() -> None:
    found = problems(storage="postgresql://me:s3cret@127.0.0.1:1/x")
    assert "does not answer" in found["search.storage"] and "s3cret" not in str(found)


def test_folders_are_relative_to_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "own" / "cars.yaml"
    path.parent.mkdir()
    text = "data: {train: train.csv}\nsearch: {backbones: [timm/x], warm_start: %s}\n"
    path.write_text(text % "[../runs/a, /b, 's3://bucket/run']")
    config = parse_config(path).require()
    assert config.search.warm_start == (str(tmp_path / "runs/a"), "/b", "s3://bucket/run")


def test_a_smoke_run_leaves_the_own_search_alone(tmp_path: Path) -> None:
    path = tmp_path / "cars.yaml"
    path.write_text(
        "data: {train: train.csv}\n"
        "search: {backbones: [timm/x], sampler: list, points: [{backbone: timm/x}], "
        "warm_start: [runs/a], storage: 'postgresql://h/d'}\n"
    )
    search = parse_config(path, smoke=True).require().search
    assert (search.sampler, search.points, search.warm_start, search.storage) == (
        "tpe", (), (), None,
    )  # fmt: skip


@pytest.mark.parametrize("url", ["postgresql://me@host/x", "postgresql://host:5432/x"])
def test_a_database_without_a_password_is_no_warning(url: str) -> None:
    assert list(search_warnings(sweep(storage=url))) == []


def test_a_password_that_the_run_folder_would_hold_is_warned_of() -> None:
    [warning] = search_warnings(sweep(storage="postgresql://me:s3cret@host:5432/x"))
    assert warning.where == "search.storage" and "s3cret" not in warning.message
    assert all(w in warning.message for w in ("://***@host:5432/x", "~/.pgpass", "PGPASSWORD"))
