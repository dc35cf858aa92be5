"""The submission file: form, checks, receipt."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.errors import RunFailure
from foldrace.core.files import LocalFiles
from foldrace.core.metrics import MetricScore
from foldrace.dataset.submission_form import SubmissionForm
from foldrace.dataset.test_set import ImageSet
from foldrace.inference.submission import (
    check_submission,
    submission_csv,
    submitted_loss,
    write_submission,
)
from foldrace.inference.submission_log import LOG, keep_edited, keep_submission, log_submission
from foldrace.run_folder.blend_records import (
    DecisionRule,
    EnsembleRecord,
    MemberRecord,
    MetricChoice,
    UnvalidatedRecord,
)

CLASSES = ("고양이", "강아지", 'a "b", c')
IDS = ("t 10", "t 2", "0001")


def image_set(columns: tuple[str, ...] = CLASSES, ids: tuple[str, ...] = IDS) -> ImageSet:
    return ImageSet(
        image_root=Path("/nowhere"),
        image_paths=tuple(f"{i}.png" for i in ids),
        ids=ids,
        id_column="ID",
        form=SubmissionForm(header=("ID", *columns), class_columns=columns),
    )


def probabilities(rows: int = 3, classes: int = 3) -> NDArray[np.float64]:
    return np.random.default_rng(0).dirichlet(np.full(classes, 0.2), size=rows)


def record() -> EnsembleRecord:
    return EnsembleRecord(
        method="greedy",
        members=(MemberRecord(candidate="c0001", variant="ema", weight=1.0),),
        oof_logloss=0.5, crossfit_logloss=0.6, crossfit_se=0.01, certificate=1e-3,
        best_single_oof_logloss=0.7, best_single="c0001 ema", oof_accuracy=0.9,
        single_crossfit_logloss=0.7, members_considered=2, candidates_considered=1,
        folds_hash="abc",
    )  # fmt: skip


def test_names_that_a_spreadsheet_takes_for_formulas_stay_as_they_are() -> None:
    """A submission has the exact names; SECURITY.md tells what that means for spreadsheets."""
    classes, ids = ("=cmd|' /C calc'!A0", "@SUM(A1)", "+1"), ("=1+1", "-x", "\t=2")
    images = image_set(classes, ids)
    text = submission_csv(images, classes, probabilities())
    header, *rows = list(csv.reader(io.StringIO(text)))
    assert header == ["ID", *classes] and [row[0] for row in rows] == list(ids)
    assert check_submission(text, images)


def test_columns_follow_the_sample_and_rows_its_ids() -> None:
    prob = probabilities()
    permuted = (CLASSES[2], CLASSES[0], CLASSES[1])
    text = submission_csv(image_set(permuted), CLASSES, prob)
    header, *rows = list(csv.reader(io.StringIO(text)))
    assert header == ["ID", *permuted]
    assert [row[0] for row in rows] == list(IDS)
    values = np.array([[float(cell) for cell in row[1:]] for row in rows])
    np.testing.assert_allclose(values, prob[:, [2, 0, 1]], rtol=1e-8)
    assert len(check_submission(text, image_set(permuted))) == 6


def test_header_is_written_exactly_as_the_sample_has_it() -> None:
    """Spaces and Unicode form too, which are not compared."""
    test = ImageSet(
        image_root=Path("/nowhere"), image_paths=("a",), ids=("a",), id_column="ID",
        form=SubmissionForm(
            header=(" ID", f"{CLASSES[0]} ", *CLASSES[1:]), class_columns=CLASSES
        ),
    )  # fmt: skip
    text = submission_csv(test, CLASSES, probabilities(1))
    assert next(csv.reader(io.StringIO(text))) == [" ID", f"{CLASSES[0]} ", *CLASSES[1:]]


def test_rows_of_many_classes_still_sum_to_one() -> None:
    columns = tuple(f"k{i}" for i in range(2000))
    text = submission_csv(image_set(columns), columns, probabilities(3, 2000))
    assert check_submission(text, image_set(columns))


def edited(change: dict[tuple[int, int], str]) -> str:
    """A valid file with some cells changed; row 0 is the header."""
    lines = list(csv.reader(io.StringIO(submission_csv(image_set(), CLASSES, probabilities()))))
    for (row, column), cell in change.items():
        lines[row][column] = cell
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def without_line(number: int) -> str:
    lines = edited({}).splitlines(keepends=True)
    return "".join(lines[:number] + lines[number + 1 :])


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        (edited({(0, 0): "id"}), "columns equal"),
        (edited({(0, 1): CLASSES[1], (0, 2): CLASSES[0]}), "columns equal"),
        (edited({(1, 0): IDS[1], (2, 0): IDS[0]}), "ids equal"),
        (edited({(3, 0): "1"}), "ids equal"),
        (without_line(2), "ids equal"),
        (edited({}) + edited({}).splitlines()[-1] + "\n", "ids equal"),
        (edited({(1, 1): "nan"}), "not finite"),
        (edited({(1, 1): "inf"}), "not finite"),
        (edited({(1, 1): ""}), "not finite"),
        (edited({(1, 1): "much"}), "not finite"),
        (edited({(1, 1): "1.5", (1, 2): "-0.5", (1, 3): "0"}), r"lies in \[0, 1\]"),
        (edited({(1, 1): "0.5", (1, 2): "0.5", (1, 3): "0.00001"}), "sums to 1"),
        (edited({(1, 1): "0", (1, 2): "0", (1, 3): "0"}), "sums to 1"),
        (without_line(0), "columns equal"),
        (edited({}).replace("\n0001,", "\n0001,0.5,"), "one cell per column"),
        (edited({}).splitlines()[0] + "\n", "ids equal"),
        ("", "columns equal"),
    ],
)
def test_every_violation_is_found(text: str, failed: str) -> None:
    with pytest.raises(RunFailure, match=failed):
        check_submission(text, image_set())


def test_several_violations_are_all_named() -> None:
    with pytest.raises(RunFailure, match=r"columns equal.*ids equal.*\[0, 1\].*sums to 1"):
        check_submission(edited({(0, 0): "x", (1, 0): "y", (1, 1): "7"}), image_set())


def test_the_receipt_is_of_the_file(tmp_path: Path) -> None:
    receipt = write_submission(
        LocalFiles(tmp_path), "sub mission.csv", image_set(), CLASSES, probabilities(), record()
    )
    data = (tmp_path / "sub mission.csv").read_bytes()
    stored = json.loads((tmp_path / "sub mission.receipt.json").read_text(encoding="utf-8"))
    assert stored["sha256"] == receipt.sha256 == hashlib.sha256(data).hexdigest()
    assert stored["rows"] == 3 and stored["columns"] == ["ID", *CLASSES]
    assert stored["folds_hash"] == "abc" and stored["oof_logloss"] == 0.5
    assert stored["members"][0]["candidate"] == "c0001"
    assert list(stored["checks"]) == list(check_submission(data.decode(), image_set()))


LOG_Z = np.array([-0.3, -0.1, -0.2])


def expected(tmp_path: Path, tta: str = "none", **changes: object) -> tuple[object, object, str]:
    """What the receipt says of the submission's loss, for a blend with these changes."""
    blend = record().model_copy(update={"k": 3} | changes)
    write_submission(
        LocalFiles(tmp_path),
        "s.csv",
        image_set(),
        CLASSES,
        probabilities(),
        blend,
        tta,
        log_z=LOG_Z,
    )
    stored = json.loads((tmp_path / "s.receipt.json").read_text(encoding="utf-8"))
    assert (stored["crossfit_logloss"], stored["crossfit_se"]) == (0.6, 0.01)
    return stored["submitted_logloss"], stored["submitted_se"], stored["submitted_note"]


def test_the_receipt_has_the_loss_of_the_mean_of_the_folds(tmp_path: Path) -> None:
    loss, se, note = expected(tmp_path)
    assert (loss, note) == (pytest.approx(0.4), "")
    assert se == pytest.approx((0.01**2 + LOG_Z.var(ddof=1) / 3) ** 0.5)


@pytest.mark.parametrize(
    ("tta", "changes", "why"),
    [
        ("flip", {}, "without the views of --tta flip"),
        ("none", {"unvalidated": (UnvalidatedRecord(name="snow", weight=0.25),)}, "elsewhere"),
        ("none", {"members": (MemberRecord(candidate="resnet", variant="added", weight=1.0,
                                           added=True),)}, "elsewhere"),
    ],
)  # fmt: skip
def test_the_receipt_says_why_there_is_no_such_loss(
    tmp_path: Path, tta: str, changes: dict[str, object], why: str
) -> None:
    loss, se, note = expected(tmp_path, tta, **changes)
    assert loss is se is None and why in note


def test_of_one_fold_both_figures_are_one() -> None:
    assert submitted_loss(record(), "none", None) == (0.6, 0.01, "")
    many = record().model_copy(update={"k": 3})
    assert submitted_loss(many, "none", LOG_Z[:1]) == (
        None,
        None,
        "it takes two test images at least",
    )


def test_the_receipt_says_what_backs_the_scores(tmp_path: Path) -> None:
    members = (
        MemberRecord(candidate="c0001", variant="ema", weight=0.6, temperature=1.3, run="/runs/b"),
        MemberRecord(candidate="resnet", variant="added", weight=0.4, added=True),
    )
    ensemble = record().model_copy(
        update={
            "members": members, "pooling": "geometric", "blend_temperature": 0.9,
            "certificate": None, "unvalidated": (UnvalidatedRecord(name="snow", weight=0.25),),
        }
    )  # fmt: skip
    write_submission(LocalFiles(tmp_path), "s.csv", image_set(), CLASSES, probabilities(), ensemble)
    stored = json.loads((tmp_path / "s.receipt.json").read_text(encoding="utf-8"))
    assert (stored["pooling"], stored["blend_temperature"]) == ("geometric", 0.9)
    assert stored["certificate"] is None
    keys = ("candidate", "weight", "temperature", "run", "added")
    assert [[m[key] for key in keys] for m in stored["members"]] == [
        ["c0001", 0.6, 1.3, "/runs/b", False],
        ["resnet", 0.4, 1.0, "", True],
    ]
    [file] = stored["unvalidated"]
    assert (file["name"], file["share"]) == ("snow", 0.25)
    assert "no score" in file["warning"]


def test_an_invalid_submission_leaves_no_file(tmp_path: Path) -> None:
    prob = probabilities()
    prob[1] *= 2
    with pytest.raises(RunFailure, match="sums to 1"):
        write_submission(LocalFiles(tmp_path), "s.csv", image_set(), CLASSES, prob, record())
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_submission_leaves_the_earlier_one(tmp_path: Path) -> None:
    files, prob = LocalFiles(tmp_path), probabilities()
    write_submission(files, "s.csv", image_set(), CLASSES, prob, record())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFailure, match="sums to 1"):
        write_submission(files, "s.csv", image_set(), CLASSES, 2 * prob, record())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_never_sees_half_a_submission(tmp_path: Path) -> None:
    """It is written again and again, long and short, while others read."""
    files = LocalFiles(tmp_path)
    sets = [image_set(ids=tuple(f"t {i}" for i in range(rows))) for rows in (2000, 3)]
    whole = {submission_csv(test, CLASSES, probabilities(len(test))) for test in sets}

    def write(times: int) -> None:
        for turn in range(times):
            test = sets[turn % 2]
            write_submission(files, "s.csv", test, CLASSES, probabilities(len(test)), record())

    write(1)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(write, 30)
        reads = 0
        while not writing.done() or reads < 30:
            assert (tmp_path / "s.csv").read_text(encoding="utf-8") in whole
            rows = json.loads((tmp_path / "s.receipt.json").read_text(encoding="utf-8"))["rows"]
            assert rows in (2000, 3)
            reads += 1
        writing.result()


def written(folder: Path, seed: int, name: str = "submission.csv") -> str:
    """Write a submission of its own and keep it; gives the copy's name."""
    prob = np.random.default_rng(seed).dirichlet(np.ones(3), size=3)
    receipt = write_submission(LocalFiles(folder), name, image_set(), CLASSES, prob, record())
    return keep_submission(LocalFiles(folder), receipt)


def logged(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / LOG).read_text(encoding="utf-8"))))


def test_each_submission_is_kept_under_its_number(tmp_path: Path) -> None:
    names = [written(tmp_path, seed) for seed in (1, 2, 1, 3)]
    assert names == [f"submissions/000{i}.csv" for i in (1, 2, 1, 3)]
    copies = [(tmp_path / name).read_bytes() for name in names]
    assert copies[3] == (tmp_path / "submission.csv").read_bytes()
    assert len(set(copies)) == 3
    for row, data in zip(logged(tmp_path), (copies[0], copies[1], copies[3]), strict=True):
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        receipt = (tmp_path / row["file"]).with_suffix(".receipt.json").read_text(encoding="utf-8")
        assert json.loads(receipt)["sha256"] == row["sha256"]
        assert (row["crossfit_logloss"], row["blend"]) == ("0.600000", "c0001 ema 1")
        assert row["public_score"] == "" and row["time"].startswith("20")


def test_what_people_write_into_the_log_stays(tmp_path: Path) -> None:
    written(tmp_path, 1)
    text = (tmp_path / LOG).read_text(encoding="utf-8")
    scored = text.rstrip("\n") + "0.98765"  # no line end, as some editors leave it
    (tmp_path / LOG).write_text(scored, encoding="utf-8")
    written(tmp_path, 2)
    assert [row["public_score"] for row in logged(tmp_path)] == ["0.98765", ""]
    (tmp_path / LOG).write_bytes(b"\xff what; is; this\n")
    assert written(tmp_path, 3) == "submissions/0003.csv"
    assert (tmp_path / LOG).read_bytes().startswith(b"\xff what; is; this\n")


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    """Also where copies were removed, or lie elsewhere."""
    written(tmp_path, 1)
    (tmp_path / "submissions" / "0001.csv").unlink()
    receipt = write_submission(
        LocalFiles(tmp_path), "b.csv", image_set(), CLASSES, probabilities(), record()
    )
    log_submission(LocalFiles(tmp_path), receipt, "/home/b.csv")
    assert written(tmp_path, 2) == "submissions/0003.csv"
    assert [row["file"] for row in logged(tmp_path)][1] == "/home/b.csv"


def test_a_submission_that_was_changed_by_hand_is_kept(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    assert keep_edited(files, "submission.csv") is None
    written(tmp_path, 1)
    assert keep_edited(files, "submission.csv") is None
    (tmp_path / "submission.csv").write_text("mine", encoding="utf-8")
    copy = keep_edited(files, "submission.csv")
    assert copy == "submissions/0002-edited.csv"
    assert (tmp_path / copy).read_text(encoding="utf-8") == "mine"


def test_the_copies_of_a_smoke_run_say_so(tmp_path: Path) -> None:
    assert written(tmp_path, 1, "submission.smoke.csv") == "submissions/0001.smoke.csv"
    assert (tmp_path / "submissions" / "0001.smoke.receipt.json").exists()


def of_labels() -> ImageSet:
    form = SubmissionForm("labels", header=("ID", "target"), class_columns=CLASSES)
    images = image_set()
    return replace(images, form=form)


def test_labels_are_those_that_a_rule_decides_for(tmp_path: Path) -> None:
    """Of probabilities nothing changes."""
    prob, decided = probabilities(), np.array([2, 0, 2])
    rows = [*csv.reader(io.StringIO(submission_csv(of_labels(), CLASSES, prob, decided)))][1:]
    assert [row[1] for row in rows] == [CLASSES[2], CLASSES[0], CLASSES[2]]
    plain = [*csv.reader(io.StringIO(submission_csv(of_labels(), CLASSES, prob)))][1:]
    assert [row[1] for row in plain] == [CLASSES[i] for i in prob.argmax(axis=1)]
    same = submission_csv(image_set(), CLASSES, prob, decided)
    assert same == submission_csv(image_set(), CLASSES, prob)


def test_the_receipt_tells_the_rule_and_the_metric(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    score = MetricScore("macro_f1", 0.8, True, 0.02)
    choice = MetricChoice(
        metric="macro_f1", greater_is_better=True, value=0.81, se=0.03, tried=(), kept=0,
        rule=DecisionRule(log_weights=(0.0, 1.0, 2.0)),
    )  # fmt: skip
    blend = record().model_copy(update={"choice": choice, "metrics": (score,)})
    decided = np.array([2, 0, 2])
    for images, rule in ((of_labels(), choice.rule), (image_set(), None)):
        write_submission(files, "s.csv", images, CLASSES, probabilities(), blend, decided=decided)
        receipt = json.loads(files.read("s.receipt.json"))
        assert receipt["metrics"] == [
            {"name": "macro_f1", "value": 0.8, "greater_is_better": True, "se": 0.02}
        ]
        own = receipt["chosen_metric"]
        assert (own["name"], own["value"], own["se"]) == ("macro_f1", 0.81, 0.03)
        assert receipt["crossfit_se"] == 0.01
        expected = None if rule is None else json.loads(rule.model_dump_json())
        assert receipt["rule"] == expected
