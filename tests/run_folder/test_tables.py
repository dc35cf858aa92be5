"""leaderboard.csv and trials.csv: columns of the contract, scores over pooled rows."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss

from foldrace.run_folder.records import (
    CandidateRecord,
    VariantScore,
)
from foldrace.run_folder.store import RunStore
from tests.run_folder.stored_runs import (
    PARAMS,
    exact,
    save_fold,
    sharpened,
    trial_record,
)


def table(text: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.decode())))


def test_leaderboard_is_the_contract_s_and_scores_pooled_rows(
    complete: RunStore, prob: NDArray[np.float32]
) -> None:
    complete.save_candidate(
        CandidateRecord(candidate="c0001", backbone="x", params={"dropout": 0.25})
    )
    complete.write_tables(complete.summaries())
    text = complete.files.read("leaderboard.csv")
    assert text.splitlines()[0].decode() == (
        "candidate,backbone,status,folds_done,variant,oof_logloss,oof_calibrated_logloss,"
        "oof_accuracy,gain,gain_se,epochs_trained,seconds,teacher,hp.batch_size,hp.dropout,hp.lr"
    )
    first, second = table(text)
    labels = complete.labels()
    expected = {
        v: log_loss(labels, exact(p), labels=[0, 1, 2])
        for v, p in (("raw", prob), ("ema", sharpened(prob)))
    }
    better = min(expected, key=lambda v: expected[v])
    assert (first["candidate"], first["status"], first["folds_done"]) == ("c0000", "complete", "3")
    assert first["variant"] == better
    assert float(first["oof_logloss"]) == pytest.approx(expected[better], rel=1e-5)
    accuracy = accuracy_score(labels, prob.argmax(1))
    assert float(first["oof_accuracy"]) == pytest.approx(accuracy, rel=1e-5)
    assert (first["epochs_trained"], first["seconds"]) == ("12", "4.50")
    assert (first["hp.lr"], first["hp.batch_size"], first["hp.dropout"]) == ("0.001", "32", "")
    assert (second["candidate"], second["status"]) == ("c0001", "unfinished")
    assert second["oof_logloss"] == second["variant"] == ""


def test_trials_table_is_the_contract_s(complete: RunStore) -> None:
    complete.save_trial(
        trial_record(complete, 1, status="failed", error="x", node="n1", device="cpu")
    )
    complete.write_tables(complete.summaries())
    text = complete.files.read("trials.csv")
    assert text.splitlines()[0] == (
        b"candidate,fold,status,variant,val_logloss,val_calibrated_logloss,epoch,"
        b"epochs_trained,seconds,node,device"
    )
    rows = table(text)
    assert [(r["fold"], r["status"]) for r in rows] == [
        ("0", "finished"),
        ("1", "failed"),
        ("2", "finished"),
    ]
    assert (rows[1]["variant"], rows[1]["val_logloss"], rows[1]["node"]) == ("", "", "n1")
    record = complete.trial("c0000", 2)
    assert record is not None and record.best is not None
    assert rows[2]["variant"] == record.best
    assert float(rows[2]["val_logloss"]) == pytest.approx(
        record.variants[record.best].val_logloss, rel=1e-5
    )
    assert rows[2]["epoch"] == "2"


def test_ties_go_to_the_raw_variant(store: RunStore) -> None:
    score = VariantScore(rows=10, val_logloss=1.0, calibrated_logloss=1.0, val_acc=0.5, epoch=0)
    variants = dict.fromkeys(("snap3", "ema", "raw"), score)
    assert trial_record(store, 0, variants=variants).best == "raw"


def test_leaderboard_puts_complete_candidates_first_and_the_best_of_them(
    complete: RunStore, prob: NDArray[np.float32]
) -> None:
    for candidate, p in (("c0001", None), ("c0002", sharpened(sharpened(prob)))):
        complete.save_candidate(CandidateRecord(candidate=candidate, backbone="b", params=PARAMS))
        for k in range(3 if p is not None else 0):
            save_fold(complete, k, prob if p is None else p, candidate)
    complete.write_tables(complete.summaries())
    rows = table(complete.files.read("leaderboard.csv"))
    losses = [float(r["oof_logloss"]) for r in rows if r["oof_logloss"]]
    assert losses == sorted(losses)
    assert rows[-1]["candidate"] == "c0001"


def test_the_calibrated_loss_ranks_candidates_and_variants(store: RunStore) -> None:
    """The better of everything is the one whose uncalibrated loss is worse."""
    losses = {  # candidate -> variant -> (uncalibrated, calibrated) by fold, of 10, 20 and 30 rows
        "c0000": {"raw": [(0.4, 0.35), (0.5, 0.45), (0.6, 0.5)]},
        "c0001": {
            "raw": [(0.7, 0.4), (0.8, 0.5), (0.9, 0.6)],
            "ema": [(0.9, 0.3), (0.8, 0.4), (1.0, 0.45)],
        },
    }
    for candidate, variants in losses.items():
        store.save_candidate(CandidateRecord(candidate=candidate, backbone="b", params=PARAMS))
        for fold in range(3):
            scores = {
                name: VariantScore(
                    rows=10 * (fold + 1),
                    val_logloss=by_fold[fold][0],
                    calibrated_logloss=by_fold[fold][1],
                    val_acc=0.5,
                    epoch=0,
                )
                for name, by_fold in variants.items()
            }
            record = trial_record(store, fold, candidate=candidate, variants=scores)
            assert record.best == ("ema" if candidate == "c0001" else "raw")
            store.save_trial(record)
    store.write_tables(store.summaries())
    first, second = table(store.files.read("leaderboard.csv"))
    assert (first["candidate"], first["variant"], second["candidate"]) == ("c0001", "ema", "c0000")
    pooled = [(10 * x[0] + 20 * x[1] + 30 * x[2]) / 60 for x in ((0.9, 0.8, 1.0), (0.3, 0.4, 0.45))]
    assert float(first["oof_logloss"]) == pytest.approx(pooled[0], rel=1e-5)
    assert float(first["oof_calibrated_logloss"]) == pytest.approx(pooled[1], rel=1e-5)
    assert float(second["oof_logloss"]) < float(first["oof_logloss"])
    last = table(store.files.read("trials.csv"))[-1]
    assert (last["variant"], last["val_logloss"]) == ("ema", "1")
    assert last["val_calibrated_logloss"] == "0.45"
