"""Greedy soups of real tiny models, against forward passes of weights that are averaged by hand."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from foldrace.commands.ensemble import blend
from foldrace.config.schema import EnsembleConfig
from foldrace.core.files import LocalFiles
from foldrace.core.metrics import normalise
from foldrace.inference.predictor import Predictor
from foldrace.inference.soup_scoring import averaged
from foldrace.inference.soups import make_soups
from foldrace.run_folder.records import CandidateRecord, Oof, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.tables import leaderboard_csv
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights
from tests.ensemble.temperature_reference import smoothed_temperature

K = 2
SIZE = 32
CARD = ModelConfig("timm/test_resnet", 3, SIZE)
State = dict[str, torch.Tensor]


class SoupRun:
    """A run folder, and members whose OOF rows are made by plain forward passes."""

    def __init__(self, run: Any) -> None:
        self.store: RunStore = run.store
        self.folds, self.labels = self.store.folds(), self.store.labels()
        self.files = [Path(run.images) / path for path in self.folds.image_paths]
        pixels = [cv2.resize(np.asarray(Image.open(path)), (SIZE, SIZE)) for path in self.files]
        self.images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        self._good = [self._fitted(fold) for fold in range(K)]

    def log_prob(self, state: State, fold: int) -> NDArray[np.float32]:
        """(n, C) of the fold's rows."""
        return self.forward(state, np.flatnonzero(self.folds.fold == fold))

    def forward(self, state: State, rows: Sequence[int]) -> NDArray[np.float32]:
        """(n, C) log-probabilities."""
        model = build_classifier(CARD)
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model.eval()(self.images[list(rows)])
        return torch.log_softmax(logits, dim=1).numpy()

    def good(self, fold: int) -> State:
        return {name: tensor.clone() for name, tensor in self._good[fold].items()}

    def _fitted(self, fold: int) -> State:
        """A random body under a head that is fitted to the other folds' rows."""
        torch.manual_seed(fold)
        model = build_classifier(CARD).eval()
        with torch.no_grad():
            features = model.body(model.normalise(self.images))
            mean, rows = features.mean(0), torch.from_numpy(self.folds.fold != fold)
            wanted = torch.eye(3)[self.labels] - 1 / 3
            fitted = torch.linalg.lstsq(
                (features - mean)[rows], wanted[rows], driver="gelsd", rcond=1e-3
            )
            weights, bias = model.head.parameters()
            weights.copy_(5 * fitted.solution.T)
            bias.copy_(-weights @ mean)
        return model.state_dict()

    def near(self, fold: int, scale: float, seed: int = 0) -> State:
        """`good`, moved: as far as `scale` says, in a direction that `seed` says."""
        generator = torch.Generator().manual_seed(seed)
        moved = {}
        for name, tensor in self.good(fold).items():
            if not tensor.is_floating_point():
                moved[name] = tensor + round(100 * scale)
                continue
            step = torch.randn(tensor.shape, generator=generator) * tensor.abs().mean()
            moved[name] = tensor + (0.02 if "body" in name else 1.0) * scale * step
        return {n: t.abs() if n.endswith("running_var") else t for n, t in moved.items()}

    def add(self, candidate: str, **variants: Callable[[int], State]) -> None:
        """A complete candidate."""
        record = CandidateRecord(candidate=candidate, backbone=CARD.backbone, params={})
        self.store.save_candidate(record)
        for fold in range(K):
            states = {name: make(fold) for name, make in variants.items()}
            logs = {name: self.log_prob(state, fold) for name, state in states.items()}
            labels = self.labels[self.folds.fold == fold]
            self.store.save_trial(
                TrialRecord(
                    candidate=candidate, fold=fold, status="finished", backbone=CARD.backbone,
                    params={"image_size": SIZE}, folds_hash=self.folds.hash, seed=0,
                    variants={name: scored(log, labels) for name, log in logs.items()},
                ),
                oof={name: kept(log, labels) for name, log in logs.items()},
                rows=np.flatnonzero(self.folds.fold == fold),
                weights={name: pack_weights(state, CARD) for name, state in states.items()},
            )  # fmt: skip

    def weights(self, candidate: str, fold: int, file: str) -> State:
        return load_file(Path(self.store.root) / f"trials/{candidate}/fold{fold}/{file}")

    def written(self) -> dict[str, int]:
        """When each file of a trial was written."""
        files = Path(self.store.root, "trials").rglob("*.*")
        return {str(file): os.stat(file).st_mtime_ns for file in files}


def scored(log_prob: NDArray[np.float32], labels: NDArray[np.int64]) -> VariantScore:
    return VariantScore(
        rows=len(labels),
        val_logloss=log_loss(labels, normalise(np.exp(log_prob)), labels=range(3)),
        calibrated_logloss=calibrated(log_prob, labels),
        val_acc=float((log_prob.argmax(1) == labels).mean()),
        epoch=4,
    )


def calibrated(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """By scipy: at the fitted temperature, or without one where that is better."""
    scaled = [log_prob, log_softmax(log_prob / smoothed_temperature(log_prob, labels), axis=1)]
    return min(log_loss(labels, normalise(np.exp(x)), labels=range(3)) for x in scaled)


def kept(log_prob: NDArray[np.float32], labels: NDArray[np.int64]) -> Oof:
    true_prob = np.exp(log_prob[np.arange(len(labels)), labels])
    return Oof(log_prob.astype(np.float16), true_prob)


@pytest.fixture
def soup_run(make_tiny_run: Callable[..., Any]) -> SoupRun:
    """c0000's raw and EMA weights lie on two sides of good ones, c0001's far away; c0002 is alone
    with its backbone."""
    soup_run = SoupRun(make_tiny_run("run", k=K))
    soup_run.add(
        "c0000", raw=lambda k: soup_run.near(k, -1.0), ema=lambda k: soup_run.near(k, 0.45)
    )
    soup_run.add("c0001", raw=lambda k: soup_run.near(k, 8.0, seed=1))
    return soup_run


def test_a_soup_that_helps_is_a_further_variant(soup_run: SoupRun) -> None:
    store, told = soup_run.store, list[str]()
    [soup] = make_soups(store, 1, told.append)
    first, second = soup.ingredients
    assert {first, second} == {"c0000 raw", "c0000 ema"}
    assert [(t.member, t.stays) for t in soup.tried] == [
        (first, True), (second, True), ("c0001 raw", False),
    ]  # fmt: skip
    assert (soup.kept, soup.candidate, soup.backbone) == (True, "c0000", "timm/test_resnet")
    assert len(told) == 2 and "c0001 raw is left out" in told[1]
    labels = soup_run.labels[store.scored_rows()]
    by_hand = np.empty((len(labels), 3))
    for fold in range(K):
        raw = soup_run.weights("c0000", fold, "best.safetensors")
        ema = soup_run.weights("c0000", fold, "best_ema.safetensors")
        mean = {
            n: (raw[n] + ema[n]) / 2 if raw[n].is_floating_point() else t
            for n, t in (ema if "ema" in first else raw).items()
        }
        written = soup_run.weights("c0000", fold, "best_soup.safetensors")
        assert written.keys() == mean.keys()
        for name, tensor in mean.items():
            torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-7)
        here = soup_run.folds.fold == fold
        by_hand[here] = np.exp(soup_run.log_prob(mean, fold))
        trial = store.trial("c0000", fold)
        assert trial is not None
        score = trial.variants["soup"]
        assert score.ingredients == soup.ingredients and score.rows == here.sum()
        expected = log_loss(soup_run.labels[here], normalise(by_hand[here]), labels=range(3))
        assert score.val_logloss == pytest.approx(expected, rel=1e-5)
        fitted = calibrated(np.log(by_hand[here]), soup_run.labels[here])
        assert score.calibrated_logloss == pytest.approx(fitted, rel=1e-4)
        assert score.val_acc == (by_hand[here].argmax(1) == soup_run.labels[here]).mean()
    np.testing.assert_allclose(store.oof("c0000", "soup"), by_hand, rtol=4e-3, atol=1e-6)
    true = by_hand[np.arange(len(labels)), labels]
    np.testing.assert_allclose(store.true_prob("c0000", "soup"), true, rtol=1e-4)
    assert soup.oof_logloss == pytest.approx(-np.log(true).mean(), rel=1e-5)
    assert soup.oof_calibrated_logloss < soup.best_single_oof_calibrated_logloss


def test_a_soup_judges_no_candidate(soup_run: SoupRun) -> None:
    before = soup_run.store.summaries()
    [soup] = make_soups(soup_run.store, 1)
    after = soup_run.store.summaries()
    assert "soup" in after[0].variants
    for pooled, loss in (
        (after[0].pooled_logloss("soup"), soup.oof_logloss),
        (after[0].pooled_calibrated("soup"), soup.oof_calibrated_logloss),
    ):
        assert pooled == pytest.approx(loss, rel=1e-9)
    assert [s.best for s in after] == [s.best for s in before]
    assert [t.best for s in after for t in s.trials] == [t.best for s in before for t in s.trials]
    assert leaderboard_csv(after) == leaderboard_csv(before)
    assert soup.best_single_oof_calibrated_logloss == pytest.approx(
        before[0].pooled_calibrated(str(before[0].best)),
        rel=1e-4,  # temperatures to 1e-5
    )


def test_a_soup_is_chosen_and_predicts_like_any_member(soup_run: SoupRun) -> None:
    store = soup_run.store
    make_soups(store, 1)
    config = EnsembleConfig(method="top-k", max_members=1, calibrate=False)
    record = blend(store, config, Console(quiet=True))
    assert [(m.candidate, m.variant) for m in record.members] == [("c0000", "soup")]
    assert record.ms_per_image is not None and record.weight_bytes is not None
    rows = range(0, len(soup_run.labels), 9)
    prob = Predictor(store).probabilities([soup_run.files[row] for row in rows])
    by_fold = [
        soup_run.forward(soup_run.weights("c0000", fold, "best_soup.safetensors"), rows)
        for fold in range(K)
    ]
    product = np.exp(np.mean(by_fold, axis=0))
    np.testing.assert_allclose(prob, product / product.sum(axis=1, keepdims=True), atol=1e-5)


def test_a_second_call_does_nothing_again(soup_run: SoupRun) -> None:
    first, written, told = make_soups(soup_run.store, 1), soup_run.written(), list[str]()
    assert make_soups(soup_run.store, 1, told.append) == first
    assert soup_run.written() == written and told == []


def test_a_lost_file_is_made_again(soup_run: SoupRun) -> None:
    first = make_soups(soup_run.store, 1)
    soup_run.store.remove_weights("c0000", "soup")
    assert make_soups(soup_run.store, 1) == first
    assert soup_run.store.has_weights("c0000", "soup")


def with_further_ingredient(soup_run: SoupRun) -> None:
    """Not the best one, so that c0000 keeps the soup."""
    soup_run.add("c0003", raw=lambda k: soup_run.near(k, 0.85))


def test_a_new_ingredient_replaces_the_soup(soup_run: SoupRun) -> None:
    [old] = make_soups(soup_run.store, 1)
    with_further_ingredient(soup_run)
    [new] = make_soups(soup_run.store, 1)
    assert new.candidate == old.candidate == "c0000" and len(new.tried) == 4
    assert len(new.ingredients) == 3
    assert new.oof_calibrated_logloss < old.oof_calibrated_logloss
    check_whole(soup_run, "c0000")


class Breaking(LocalFiles):
    """A disk that is full after so many files."""

    def __init__(self, path: Path, left: int) -> None:
        super().__init__(path)
        self._left = left

    def write(self, name: str, data: bytes | memoryview) -> None:
        if self._left == 0:
            raise OSError(errno.ENOSPC, "no space left on device")
        self._left -= 1
        super().write(name, data)


def check_whole(soup_run: SoupRun, candidate: str) -> int:
    """In how many folds a soup's record stands: over its own files."""
    found = 0
    for fold in range(K):
        trial = soup_run.store.trial(candidate, fold)
        assert trial is not None
        score = trial.variants.get("soup")
        if score is None:
            continue
        found += 1
        files = [f"best{'_ema' * name.endswith('ema')}" for name in score.ingredients]
        states = [
            soup_run.weights(name.split()[0], fold, f"{file}.safetensors")
            for name, file in zip(score.ingredients, files, strict=True)
        ]
        head = torch.stack([list(state.values())[-1].float() for state in states]).mean(0)
        written = soup_run.weights(candidate, fold, "best_soup.safetensors")
        torch.testing.assert_close(list(written.values())[-1].float(), head)
        folder = Path(soup_run.store.root) / f"trials/{candidate}/fold{fold}"
        true_prob = np.load(folder / "true_prob_soup.npy").astype(np.float64)
        assert -np.log(true_prob).mean() == pytest.approx(score.val_logloss, rel=1e-6)
    return found


@pytest.mark.parametrize("writes", [1, 4, 6])
def test_a_replacement_that_breaks_off_leaves_whole_trials(soup_run: SoupRun, writes: int) -> None:
    """2 records without the soup, then 4 files a fold."""
    make_soups(soup_run.store, 1)
    with_further_ingredient(soup_run)
    files = soup_run.store.files
    soup_run.store.files = Breaking(Path(soup_run.store.root), writes)
    with pytest.raises(OSError, match="no space left"):
        make_soups(soup_run.store, 1)
    soup_run.store.files = files
    expected = {1: 1, 4: 0, 6: 1}
    assert check_whole(soup_run, "c0000") == expected[writes]
    [soup] = make_soups(soup_run.store, 1)
    assert len(soup.ingredients) == 3 and check_whole(soup_run, "c0000") == K


def test_what_only_repeats_the_best_is_no_soup(make_tiny_run: Callable[..., Any]) -> None:
    """The mean of a checkpoint with itself is the checkpoint."""
    soup_run = SoupRun(make_tiny_run("run", k=K))
    soup_run.add("c0000", raw=soup_run.good)
    soup_run.add("c0001", raw=soup_run.good)
    written = soup_run.written()
    [soup] = make_soups(soup_run.store, 1)
    assert not soup.kept and soup.ingredients == ("c0000 raw",)
    assert soup.tried[1].oof_logloss == pytest.approx(soup.oof_logloss, abs=1e-6)
    assert soup_run.written() == written


def test_one_member_alone_is_not_tried(make_tiny_run: Callable[..., Any]) -> None:
    soup_run = SoupRun(make_tiny_run("run", k=K))
    soup_run.add("c0000", raw=soup_run.good)
    assert make_soups(soup_run.store, 1) == ()


def test_a_soup_outlives_its_ingredients(soup_run: SoupRun) -> None:
    """As after `ensemble.keep: blend`: it could not be made again."""
    first = make_soups(soup_run.store, 1)
    soup_run.store.remove_weights("c0000", "ema")
    written = soup_run.written()
    assert make_soups(soup_run.store, 1) == first
    assert soup_run.written() == written


def test_weights_that_give_no_numbers_are_left_out(soup_run: SoupRun) -> None:
    def broken(fold: int) -> State:
        state = soup_run.good(fold)
        state["head.weight" if "head.weight" in state else list(state)[-1]][:] = math.inf
        return state

    store = soup_run.store
    for fold in range(K):
        trial = store.trial("c0001", fold)
        assert trial is not None
        store.save_trial(trial, weights={"raw": pack_weights(broken(fold), CARD)})
    [soup] = make_soups(store, 1)
    worst = soup.tried[-1]
    assert worst.oof_calibrated_logloss is worst.oof_logloss is None and not worst.stays


def test_averaged() -> None:
    """Half precision is summed in single precision; counters are the first one's."""
    first = {"w": torch.tensor([1.0, 2.0]), "h": torch.tensor([61440.0], dtype=torch.float16),
             "n": torch.tensor(7)}  # fmt: skip
    second = {"w": torch.tensor([3.0, 5.0]), "h": torch.tensor([51200.0], dtype=torch.float16),
              "n": torch.tensor(9)}  # fmt: skip
    third = {"w": torch.tensor([5.0, 5.0]), "h": torch.tensor([40960.0], dtype=torch.float16),
             "n": torch.tensor(1)}  # fmt: skip
    mean = averaged([first, second, third])
    assert mean["w"].tolist() == [3.0, 4.0] and mean["n"].item() == 7
    assert mean["h"].dtype == torch.float16 and mean["h"].item() == 51200.0
    assert first["w"].tolist() == [1.0, 2.0]  # as it was
    with pytest.raises(ValueError, match="other names or shapes"):
        averaged([first, {"w": torch.zeros(2)}])
