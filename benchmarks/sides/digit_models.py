"""Real OOF probabilities without a GPU: 156 scikit-learn classifiers on noised handwritten digits.

Gives (M, N, C) natural-log probabilities from 5 stratified folds. The digits are scikit-learn's
(8 x 8 pixels, 0 to 16); Gaussian noise (sd 4) makes them as hard as a real image set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TypeAlias

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import (
    LinearDiscriminantAnalysis,
    QuadraticDiscriminantAnalysis,
)
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from threadpoolctl import threadpool_limits

from foldrace.core.metrics import normalise

FOLDS = 5
_NOISE = 4.0
_HALF, _THIRD = 0.5, 1 / 3

Model: TypeAlias = BaseEstimator


def noised_digits() -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Pixels (1797, 64), labels (1797,), fold of each row (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels + np.random.default_rng(0).normal(0.0, _NOISE, pixels.shape)
    folds = np.empty(len(labels), dtype=np.int64)
    split = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(pixels, labels)
    for fold, (_, held) in enumerate(split):
        folds[held] = fold
    return pixels, labels.astype(np.int64), folds


def oof_log_prob(
    models: list[tuple[str, Model]],
    pixels: NDArray[np.float64],
    labels: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> NDArray[np.float32]:
    """(M, N, C), a model at a time on each core."""
    rows = Parallel(n_jobs=-1)(delayed(_one)(model, pixels, labels, folds) for _, model in models)
    return np.stack(rows)


def _one(
    model: Model,
    pixels: NDArray[np.float64],
    labels: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> NDArray[np.float32]:
    """(N, C) of one model, whose own libraries keep to one thread."""
    prob = np.empty((len(labels), int(labels.max()) + 1))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # early stops are members on purpose
        for fold in range(int(folds.max()) + 1):
            held = folds == fold
            prob[held] = clone(model).fit(pixels[~held], labels[~held]).predict_proba(pixels[held])
    return np.log(normalise(prob)).astype(np.float32)


def digit_models() -> list[tuple[str, Model]]:
    """156 named classifiers of 13 families, each with its seed."""
    return [
        *_logistic(),
        *_support_vectors(),
        *_neighbours(),
        *_forests(),
        *_trees(),
        *_networks(),
        *_bayes(),
        *_discriminants(),
        *_boosted(),
    ]


def _reduced(components: int, *steps: Model) -> Pipeline:
    return make_pipeline(StandardScaler(), PCA(components, random_state=0), *steps)


def _logistic() -> Iterator[tuple[str, Model]]:
    make = partial(LogisticRegression, max_iter=300)
    for strength in (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0):
        yield f"logistic C={strength:g}", make_pipeline(StandardScaler(), make(C=strength))
    for components, strength in product((8, 16, 24, 32), (0.01, 1.0)):
        yield f"logistic pca={components} C={strength:g}", _reduced(components, make(C=strength))
    for gamma, strength in product((0.002, 0.005, 0.01, 0.02), (0.1, 1.0, 10.0)):
        kernel = Nystroem(gamma=gamma, n_components=200, random_state=0)
        steps = make_pipeline(StandardScaler(), kernel, make(C=strength))
        yield f"logistic rbf={gamma:g} C={strength:g}", steps


def _support_vectors() -> Iterator[tuple[str, Model]]:
    for gamma, strength in product((0.002, 0.005, 0.01, 0.02), (0.3, 1.0, 3.0)):
        yield f"svc rbf={gamma:g} C={strength:g}", _sigmoid(SVC(C=strength, gamma=gamma))
    for degree in (2, 3):
        yield f"svc poly={degree}", _sigmoid(SVC(kernel="poly", degree=degree))


def _sigmoid(machine: Model) -> Pipeline:
    return make_pipeline(StandardScaler(), CalibratedClassifierCV(machine, ensemble=False, cv=3))


def _neighbours() -> Iterator[tuple[str, Model]]:
    for count, weights in product((1, 3, 5, 10, 20, 40), ("uniform", "distance")):
        make = partial(KNeighborsClassifier, count, weights=weights)
        yield f"knn k={count} {weights}", make_pipeline(StandardScaler(), make())
        yield f"knn pca=16 k={count} {weights}", _reduced(16, make())


def _forests() -> Iterator[tuple[str, Model]]:
    kinds: tuple[tuple[str, Callable[..., Model]], ...] = (
        ("forest", RandomForestClassifier),
        ("extra trees", ExtraTreesClassifier),
    )
    for (name, kind), trees, depth in product(kinds, (30, 100), (4, 8, None)):
        model = kind(trees, max_depth=depth, random_state=trees)
        yield f"{name} n={trees} depth={depth}", model
    for (name, kind), leaf in product(kinds, (3, 10)):
        yield f"{name} leaf={leaf}", kind(100, min_samples_leaf=leaf, random_state=leaf)
    for (name, kind), features in product(kinds, (0.1, 0.3)):
        model = kind(100, max_features=features, random_state=7)
        yield f"{name} features={features:g}", model


def _trees() -> Iterator[tuple[str, Model]]:
    for depth in (5, 8, 12):
        yield f"tree depth={depth}", DecisionTreeClassifier(max_depth=depth, random_state=depth)
    for leaf in (5, 20):
        yield f"tree leaf={leaf}", DecisionTreeClassifier(min_samples_leaf=leaf, random_state=leaf)
    for count, features in product((10, 40), (_THIRD, _HALF)):
        tree = DecisionTreeClassifier(random_state=0)
        model = BaggingClassifier(tree, count, max_features=features, random_state=count)
        yield f"bagged trees n={count} features={features:.2f}", model


def _networks() -> Iterator[tuple[str, Model]]:
    for hidden, alpha, seed in product(((16,), (64,), (64, 64)), (0.001, 1.0), (0, 1, 2)):
        model = MLPClassifier(hidden, alpha=alpha, max_iter=40, random_state=seed)
        yield f"mlp {hidden} alpha={alpha:g} seed={seed}", make_pipeline(StandardScaler(), model)
    for rounds, seed in product((5, 15), (0, 1, 2)):
        model = MLPClassifier((64,), max_iter=rounds, random_state=seed)
        yield f"mlp {rounds} epochs seed={seed}", make_pipeline(StandardScaler(), model)


def _bayes() -> Iterator[tuple[str, Model]]:
    for smoothing in (1e-9, 1e-2, 1e-1, 1.0):
        yield f"gaussian nb {smoothing:g}", GaussianNB(var_smoothing=smoothing)
    for threshold in (4.0, 8.0, 12.0):
        yield f"bernoulli nb {threshold:g}", BernoulliNB(binarize=threshold)
    for alpha in (0.1, 1.0, 10.0):
        for name, kind in (("multinomial", MultinomialNB), ("complement", ComplementNB)):
            steps = make_pipeline(MinMaxScaler(clip=True), kind(alpha=alpha))
            yield f"{name} nb {alpha:g}", steps
    for components in (8, 16, 24, 32):
        yield f"gaussian nb pca={components}", _reduced(components, GaussianNB())


def _discriminants() -> Iterator[tuple[str, Model]]:
    for shrinkage in (0.0, 0.1, 0.3, 0.6, 0.9):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        yield f"lda {shrinkage:g}", model
    for regular in (0.05, 0.1, 0.3, 0.5, 0.8):
        yield f"qda {regular:g}", QuadraticDiscriminantAnalysis(reg_param=regular)
    for components in (8, 16, 24, 32):
        yield f"qda pca={components}", _reduced(components, QuadraticDiscriminantAnalysis())


def _boosted() -> Iterator[tuple[str, Model]]:
    for rate, rounds in product((0.05, 0.2), (10, 40)):
        model = HistGradientBoostingClassifier(
            learning_rate=rate, max_iter=rounds, max_leaf_nodes=8, random_state=0
        )
        yield f"boosting rate={rate:g} n={rounds}", model
    for depth, rate in product((2, 4), (0.3, 1.0)):
        tree = DecisionTreeClassifier(max_depth=depth, random_state=0)
        yield (
            f"adaboost depth={depth} rate={rate:g}",
            AdaBoostClassifier(tree, n_estimators=30, learning_rate=rate, random_state=0),
        )
