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
        "candidate,backbone,status,folds_done,variant,oof_logloss,oof_accuracy,last_fold_logloss,"
        "gain,gain_se,epochs_trained,seconds,hp.batch_size,hp.dropout,hp.lr"
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
    last = complete.folds().fold == 2
    best_prob = prob if better == "raw" else sharpened(prob)
    last_loss = log_loss(labels[last], exact(best_prob)[last], labels=[0, 1, 2])
    assert float(first["last_fold_logloss"]) == pytest.approx(last_loss, rel=1e-5)
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
        b"candidate,fold,status,variant,val_logloss,best_epoch,epochs_trained,seconds,node,device"
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
    assert rows[2]["best_epoch"] == "2"


def test_ties_go_to_the_raw_variant(store: RunStore) -> None:
    score = VariantScore(rows=10, val_logloss=1.0, val_acc=0.5, best_epoch=0)
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
