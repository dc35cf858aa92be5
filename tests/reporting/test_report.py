"""The report against the arrays that went into the run folder, and against scikit-learn."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fontTools.ttLib import TTFont  # type: ignore[import-untyped,unused-ignore]
from sklearn.metrics import (  # type: ignore[import-untyped,unused-ignore]
    confusion_matrix,
    precision_recall_fscore_support,
)

from foldrace.reporting import fonts
from foldrace.reporting.charts.candidates import Curve, shared_mean
from foldrace.reporting.charts.style import palette, short
from foldrace.reporting.content import Note, Table
from foldrace.reporting.context import ReportContext
from foldrace.reporting.formats import difference, duration, file_size, milliseconds, number
from foldrace.reporting.page import page
from foldrace.reporting.report import SECTIONS, Section, write_report
from foldrace.reporting.sections.calibration import log_prob_correlation, similar_side_by_side
from foldrace.reporting.sections.classes import classes as classes_section
from foldrace.reporting.sections.overview import summary, warnings
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.tables import leaderboard_csv
from tests.reporting.pages import Page, html_of, table_of

pytestmark = pytest.mark.usefixtures("quick_charts")
Run = Any  # the record that conftest.py makes
MakeRun = Callable[..., Run]

_RUNS: dict[str, dict[str, object]] = {
    "full": {},
    "nothing complete": {"complete": 0, "blend": False},
    "no candidate": {"complete": 0, "blend": False, "broken": False},
    "complete but not blended": {"blend": False},
    "one candidate, k: 1": {"complete": 1, "k": 1, "broken": False},
}


def _write(run: Run) -> str:
    return str(run.store.files.read(write_report(run.store)).decode())


@pytest.fixture(scope="module")
def document(full_run: Run) -> str:
    return _write(full_run)


@pytest.mark.parametrize("kind", _RUNS)
@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.id)
def test_every_section_gives_balanced_html_or_nothing(
    section: Section, kind: str, make_run: MakeRun, runs: dict[str, Run]
) -> None:
    if kind not in runs:
        runs[kind] = make_run(rows=60, epochs=2, **_RUNS[kind])
    parts = section.build(ReportContext(runs[kind].store))
    assert not parts or Page(html_of(parts)).words
    assert parts or kind != "full" or section.id == "calibration"


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {}


def test_section_ids_are_unique_and_fit_for_links() -> None:
    ids = [s.id for s in SECTIONS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z]+", i) for i in ids)


def test_page_loads_nothing_from_outside(document: str) -> None:
    parsed = Page(document)
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in parsed.loads)
    styles = re.findall(r"url\(([^)]*)\)", document)
    assert styles
    assert all(s.startswith("data:font/woff;base64,") for s in styles)
    assert "@import" not in document
    assert "default-src 'none'" in document


def test_the_pages_own_script_is_the_one_that_its_policy_allows(document: str) -> None:
    script = document.partition("<script>")[2].partition("</script>")[0]
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in document


def test_page_fits_phones_and_names_its_language(document: str) -> None:
    assert '<html lang="en">' in document
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in document


def test_names_from_the_run_are_never_markup(document: str) -> None:
    parsed = Page(document)
    assert parsed.scripts == 1
    assert "<script>alert" not in document
    assert "<b>" not in document
    assert "<script>alert('x')</script>" in [row[0] for t in parsed.tables for row in t]
    assert "고양이 <b>sweep</b>" in parsed.words


def test_leaderboard_shows_the_numbers_of_leaderboard_csv(full_run: Run, document: str) -> None:
    rows = list(csv.DictReader(io.StringIO(leaderboard_csv(full_run.store.summaries()))))
    shown = table_of(document, "oof_logloss")
    assert [row["candidate"] for row in shown] == [row["candidate"] for row in rows]
    for mine, row in zip(shown, rows, strict=True):
        assert mine["status"] == row["status"]
        for column in ("oof_logloss", "oof_calibrated_logloss", "oof_accuracy", "hp.lr"):
            _same(mine[column], row[column])
        assert mine["hp.loss"] == (row["hp.loss"] or "-")
    assert [row["in blend"] for row in shown] == ["0.200"] * 5 + [""] * 3


def test_blend_table_shows_each_members_own_loss(full_run: Run, document: str) -> None:
    for row in table_of(document, "own OOF log loss, uncalibrated"):
        prob = full_run.prob[row["candidate"]]
        true = prob[np.arange(len(prob)), full_run.labels]
        assert float(row["own OOF log loss, uncalibrated"]) == pytest.approx(
            -np.log(true).mean(), abs=6e-5
        )
        assert row["weight"] == "0.2000"


def test_class_table_agrees_with_scikit_learn(full_run: Run, document: str) -> None:
    predicted = full_run.blend.argmax(axis=1)
    expected = precision_recall_fscore_support(full_run.labels, predicted, zero_division=0)
    rows = table_of(document, "precision")
    columns = ("precision", "recall", "F1", "rows")
    for name, values in zip(columns, expected, strict=True):
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), abs=6e-5)


def test_mistakes_agree_with_scikit_learn(full_run: Run, document: str) -> None:
    counts = confusion_matrix(full_run.labels, full_run.blend.argmax(axis=1))
    names = full_run.store.classes()
    shown = {
        (row["label"], row["predicted as"]): int(row["rows"])
        for row in table_of(document, "predicted as")
    }
    expected = {
        (names[a], names[b]): int(n) for (a, b), n in np.ndenumerate(counts) if a != b and n
    }
    assert shown == expected


def test_summary_gives_the_blends_figures(full_run: Run, document: str) -> None:
    words = Page(html_of(summary(ReportContext(full_run.store)))).words
    record = full_run.store.blend.record()
    for value in (record.oof_logloss, record.crossfit_logloss, record.single_crossfit_logloss):
        assert f"{value:.4f}" in words
    assert f"{-record.gain_over_single:+.4f}" in words
    assert "8 (5 complete, 1 unfinished, 1 diverged, 1 failed)" in words
    assert "17 (15 finished, 1 diverged, 1 failed)" in words
    assert any(word.startswith("± 0.0123") for word in words)


def test_warnings_name_what_failed_and_what_to_do(full_run: Run) -> None:
    found = "\n".join(warnings(ReportContext(full_run.store)))
    assert "c0005 failed: fold 0, OutOfMemoryError: <b>no</b> memory\n" in found
    assert "c0006 diverged" in found
    assert "1 candidate(s) have folds left" in found
    assert f"foldrace resume {full_run.store.root}" in found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nothing complete", "No candidate is complete yet"),
        ("complete but not blended", "There is no blend yet of the 5 complete candidate(s)"),
    ],
)
def test_without_a_blend_the_report_says_why(kind: str, expected: str, make_run: MakeRun) -> None:
    assert expected in _write(make_run(rows=60, **_RUNS[kind]))


def test_a_blend_on_other_folds_is_not_shown(make_run: MakeRun) -> None:
    run = make_run(rows=60)
    record = run.store.blend.record().model_copy(update={"folds_hash": "other"})
    run.store.blend.save(record, "", np.zeros((1, 1), np.float16))
    ctx = ReportContext(run.store)
    assert classes_section(ctx) == []
    assert "chosen on other folds" in warnings(ctx)[0]


def test_a_blend_of_fewer_candidates_than_are_complete_is_named(make_run: MakeRun) -> None:
    run = make_run(rows=60)
    record = run.store.blend.record().model_copy(update={"candidates_considered": 3})
    run.store.files.write("ensemble/ensemble.json", record.model_dump_json().encode())
    assert "among 3 candidate(s), but 5 are complete" in warnings(ReportContext(run.store))[0]


def test_a_damaged_array_costs_its_section_only(make_run: MakeRun) -> None:
    run = make_run(rows=60)
    run.store.files.write("trials/c0001/fold0/true_prob.npy", b"torn")
    html = _write(run)
    assert "This section cannot be shown" in html
    assert "correlation.png" not in run.store.files.names("report")
    assert "precision" in html


def test_charts_lie_beside_the_page_and_old_ones_go(make_run: MakeRun) -> None:
    run = make_run(rows=60)
    run.store.files.write("report/old.png", b"")
    html = _write(run)
    names = [n for n in run.store.files.names("report") if n.endswith(".png")]
    assert names == [
        "accuracy.png", "confusion.png", "correlation.png", "learning_curves.png",
        "selection_path.png", "weights.png",
    ]  # fmt: skip
    embedded = {b64decode(d) for d in re.findall(r"data:image/png;base64,([^\"]+)", html)}
    assert embedded == {run.store.files.read(f"report/{n}") for n in names}
    assert all(png.startswith(b"\x89PNG") for png in embedded)


class _Memory:
    """An object store: whole objects by name, no folders, no paths."""

    def __init__(self, files: Any) -> None:
        self.root, self._files, self.written = "s3://bucket/run", files, dict[str, bytes]()

    def read(self, name: str) -> bytes:
        return self.written[name] if name in self.written else bytes(self._files.read(name))

    def write(self, name: str, data: bytes) -> None:
        self.written[name] = data

    def exists(self, name: str) -> bool:
        return name in self.written or bool(self._files.exists(name))

    def names(self, folder: str = "") -> list[str]:
        mine = [n.removeprefix(f"{folder}/") for n in self.written if n.startswith(f"{folder}/")]
        return sorted({*mine, *self._files.names(folder)})

    def delete(self, name: str) -> None:
        self.written.pop(name, None)


def test_report_of_a_run_in_an_object_store(make_run: MakeRun) -> None:
    run = make_run(rows=60, complete=1, epochs=1)
    store, memory = RunStore(run.store.root), _Memory(run.store.files)
    store.files, store.root = memory, memory.root
    assert write_report(store) == "report/index.html"
    assert "foldrace resume s3://bucket/run" in memory.written["report/index.html"].decode()
    assert not run.store.files.names("report")


def test_many_classes_have_tables_but_no_matrix(make_run: MakeRun) -> None:
    names = tuple(f"현대_{i}세대" for i in range(396))
    run = make_run(classes=names, rows=800, complete=2, epochs=2, broken=False)
    html = _write(run)
    assert len(table_of(html, "precision")) == 396
    assert len(table_of(html, "predicted as")) == 20
    assert "confusion.png" not in run.store.files.names("report")


def test_correlation_is_numpys_of_log_probabilities() -> None:
    true_prob = np.random.default_rng(0).random((6, 500)).astype(np.float32)
    true_prob[0, 0] = 0.0
    logs = np.log(np.maximum(true_prob.astype(np.float64), 1e-15))
    assert log_prob_correlation(true_prob) == pytest.approx(np.corrcoef(logs), abs=1e-12)


def test_a_constant_member_correlates_with_none() -> None:
    true_prob = np.vstack([np.full(50, 0.25), np.random.default_rng(0).random((2, 50))])
    matrix = log_prob_correlation(true_prob)
    assert matrix[0].tolist() == [1.0, 0.0, 0.0]
    assert sorted(similar_side_by_side(matrix)) == [0, 1, 2]


def test_alike_members_stand_side_by_side() -> None:
    matrix = np.full((4, 4), 0.1)
    matrix[0, 2] = matrix[2, 0] = matrix[1, 3] = matrix[3, 1] = 0.9
    np.fill_diagonal(matrix, 1.0)
    order = similar_side_by_side(matrix)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_mean_curve_ends_where_the_first_fold_ends() -> None:
    long = Curve(np.arange(3.0), np.array([3.0, 2.0, 1.0]), np.zeros(3))
    brief = Curve(np.arange(2.0), np.array([5.0, 4.0]), np.zeros(2))
    epochs, mean = shared_mean([long, brief], "val_calibrated_logloss")
    assert (epochs.tolist(), mean.tolist()) == ([0.0, 1.0], [4.0, 3.0])


def test_page_carries_the_hangul_that_it_uses_and_no_more(document: str) -> None:
    found = re.search(r"url\(data:font/woff;base64,([^)]*)\)", document)
    assert found is not None
    characters = set(TTFont(io.BytesIO(b64decode(found[1]))).getBestCmap())
    assert characters == {ord(c) for c in "".join(Page(document).words) if "가" <= c <= "힣"}
    assert {ord(c) for c in "고양이강아지"} <= characters


def test_page_without_hangul_has_no_font() -> None:
    assert "@font-face" not in page("cars", "", [])


def test_report_without_the_font_package(
    monkeypatch: pytest.MonkeyPatch, make_run: MakeRun
) -> None:
    monkeypatch.setattr(fonts, "font_file", lambda: None)
    fonts.chart_families.cache_clear()
    try:
        assert "@font-face" not in _write(make_run(rows=60, complete=1))
    finally:
        fonts.chart_families.cache_clear()


def test_decomposed_hangul_is_composed() -> None:
    assert html_of([Note(unicodedata.normalize("NFD", "고양이"))]) == "<p>고양이</p>"
    assert short(unicodedata.normalize("NFD", "고양이")) == "고양이"


def test_labels_keep_both_ends() -> None:
    assert short("torchvision/convnext_tiny", 11) == "torch…_tiny"
    assert short("a\nb") == "a b"


def test_hangul_takes_more_room_than_latin() -> None:
    assert short("가나다라마바사", 11) == "가나다라마바사"
    assert short("가나다라마바사아", 11) == "가나다…바사아"
    assert short("현대_그랜저_2016", 30) == "현대_그랜저_2016"


def test_colours_and_markers_tell_36_names_apart() -> None:
    assert len(set(palette(map(str, range(36))).values())) == 36


def test_numbers() -> None:
    assert [number(None), number(float("nan")), number(0.12345)] == ["-", "-", "0.1235"]
    assert [duration(s) for s in (0, 59.6, 61, 3600, 90061)] == [
        "0s", "1m00s", "1m01s", "1h00m", "1d01h",
    ]  # fmt: skip
    assert [difference(v) for v in (None, 0.0, 0.5, -0.0012, 0.00099, -3e-8)] == [
        "-", "0", "+0.5000", "-0.0012", "+9.9e-04", "-3.0e-08",
    ]  # fmt: skip
    assert [file_size(n) for n in (0, 999, 1000, 12_345_678, 999_600, 1_230_000_000)] == [
        "0 B", "999 B", "1 kB", "12.3 MB", "1 MB", "1.23 GB",
    ]  # fmt: skip
    assert [milliseconds(v) for v in (0.0421, 12.34, 999.6, 1234.5)] == [
        "0.0421 ms", "12.3 ms", "1,000 ms", "1,234 ms",
    ]  # fmt: skip


def test_table_without_rows() -> None:
    assert Page(html_of([Table(("a",), (), "empty")])).tables == [[["a"]]]


def _same(shown: str, exact: str) -> None:
    if exact == "":
        assert shown in ("", "-")
    else:
        assert float(shown) == pytest.approx(float(exact), abs=5.1e-5)
