"""Predictions of the test set by single fold models, kept beside their trials.

Takes a run folder and what tells its test images apart, gives and takes arrays
`test<variant>-<view>-<state>.npy`. All of it is derived and may be deleted; only members of a blend
have some.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from foldrace.core.files import warn_ignored
from foldrace.run_folder.oof import array_of, npy
from foldrace.run_folder.trials import TrialFiles, suffix, weights_name
from foldrace.run_folder.variants import RAW

_FILE = re.compile(
    r"trials/(?P<candidate>[^/]+)/fold\d+/test(?:_(?P<variant>.+))?-[0-9a-f]{8}-[0-9a-f]{32}\.npy"
)
_STATE = f"{'0' * 32}.npy"
"""As long as the end of a file's name that tells the images and the weights apart."""
_log = logging.getLogger("foldrace")


class KeptPredictions:
    """(n, C) float16 natural-log probabilities of one test set, by one way of looking at images."""

    def __init__(self, store: TrialFiles, images: str, tta: str) -> None:
        """`images` is a text that differs wherever the test images do; `tta` names the views."""
        self._store, self._images = store, images
        self._view = hashlib.blake2b(tta.encode(), digest_size=4).hexdigest()

    def has(self, candidate: str, variant: str, fold: int) -> bool:
        """True where there is a file of exactly these images and weights, whatever it holds."""
        name = self._name(candidate, variant, fold)
        return name is not None and self._store.files.exists(name)

    def read(
        self, candidate: str, variant: str, fold: int, shape: tuple[int, int]
    ) -> NDArray[np.floating] | None:
        """What `write` has kept of exactly these images and weights; None where there is nothing.

        A damaged file counts as none, with a warning in the log.
        """
        name = self._name(candidate, variant, fold)
        if name is None or not self._store.files.exists(name):
            return None
        try:
            kept = array_of(self._store.files.read(name))
        except (OSError, ValueError) as error:
            warn_ignored(f"{self._store.root}/{name}", str(error))
            return None
        if kept.shape != shape or kept.dtype != np.float16:
            warn_ignored(f"{self._store.root}/{name}", f"it holds {kept.dtype} {kept.shape}")
            return None
        return kept

    def write(self, candidate: str, variant: str, fold: int, log_prob: NDArray[np.float16]) -> None:
        """Keep a prediction in place of those of other images or weights.

        Where it cannot be written, a warning in the log says so: the model predicts again then.
        """
        name = self._name(candidate, variant, fold)
        if name is None:
            return
        folder, _, file = name.rpartition("/")
        try:
            for other in self._store.files.names(folder):
                if other != file and other[: -len(_STATE)] == file[: -len(_STATE)]:
                    self._store.files.delete(f"{folder}/{other}")
            self._store.files.write(name, npy(log_prob))
        except OSError as error:
            _log.warning("%s/%s cannot be kept: %s", self._store.root, name, error)

    def _name(self, candidate: str, variant: str, fold: int) -> str | None:
        """Name of the file, which the state of the weights is part of; None without weights."""
        weights = weights_name(candidate, fold, variant)
        folder = self._store.trial_folder(candidate, fold)
        stamp = self._store.files.stamps(folder).get(weights)
        if stamp is None:
            return None
        state = hashlib.blake2b(f"{self._images} {stamp}".encode(), digest_size=16).hexdigest()
        return f"{folder}/test{suffix(variant)}-{self._view}-{state}.npy"


def remove_other_predictions(store: TrialFiles, members: Collection[tuple[str, str]]) -> None:
    """Remove the kept predictions of all but these (candidate, variant)."""
    for name in store.files.stamps("trials"):
        match = _FILE.fullmatch(name)
        if match is not None and (match["candidate"], match["variant"] or RAW) not in members:
            store.files.delete(name)
