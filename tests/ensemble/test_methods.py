"""The contract that every blend method keeps; a new row of the table joins by itself."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.methods import METHODS, blend, check_method
from experiment.errors import ConfigError
from experiment.metrics import log_loss_of_true

RNG = np.random.default_rng(0)
BASE = RNG.uniform(0.02, 1.0, size=(7, 120))
CASES = {
    "usual": BASE,
    "float32": BASE.astype(np.float32),
    "one member": BASE[:1],
    "one row": BASE[:, :1],
    "one number": BASE[:1, :1],
    "more members than rows": RNG.uniform(0.02, 1.0, size=(60, 9)),
    "duplicates": np.concatenate([BASE, BASE[::-1]]),
    "zeros": np.where(RNG.random(BASE.shape) < 0.1, 0.0, BASE),
    "all zeros": np.zeros((3, 5)),
    "all ones": np.ones((3, 5)),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_case = pytest.mark.parametrize("true", CASES.values(), ids=CASES.keys())


def clip(true: np.ndarray) -> np.ndarray:
    return np.clip(true.astype(np.float64), 1e-15, 1.0)


@every_method
@every_case
def test_contract(name: str, true: np.ndarray) -> None:
    got = blend(name, true)
    clipped = clip(true)
    assert got.weights.shape == (len(true),)
    assert got.weights.dtype == np.float64
    assert (got.weights >= 0.0).all()
    assert got.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert got.loss == pytest.approx(log_loss_of_true(got.weights @ clipped), abs=1e-12)
    assert got.loss <= min(map(log_loss_of_true, clipped)) + 1e-12
    assert got.certificate >= 0.0
    for other in RNG.dirichlet(np.full(len(true), 0.5), size=50):
        rival = log_loss_of_true(np.minimum(other @ clipped, 1.0))
        assert got.loss - rival <= got.certificate + 1e-9


@every_method
@pytest.mark.parametrize("case", ["usual", "more members than rows", "zeros"])
def test_the_order_of_members_and_rows_is_free(name: str, case: str) -> None:
    true, rng = CASES[case], np.random.default_rng(1)
    members, rows = rng.permutation(true.shape[0]), rng.permutation(true.shape[1])
    plain, shuffled = blend(name, true), blend(name, true[members][:, rows])
    np.testing.assert_allclose(shuffled.weights, plain.weights[members], atol=1e-6)
    assert shuffled.loss == pytest.approx(plain.loss, abs=1e-9)


@every_method
def test_duplicates_leave_the_weight_to_the_lowest(name: str) -> None:
    weights = blend(name, CASES["duplicates"]).weights
    assert not weights[len(BASE) :].any()


@every_method
def test_max_members_is_kept(name: str) -> None:
    assert np.count_nonzero(blend(name, BASE, max_members=2).weights) <= 2


@every_method
def test_the_record_is_complete(name: str) -> None:
    assert METHODS[name].name == name
    assert METHODS[name].doc
    assert check_method(name) is None


def test_an_unknown_method_names_the_close_ones() -> None:
    problem = check_method("gredy")
    assert problem is not None
    assert problem.where == "ensemble.method"
    assert problem.message.startswith("got 'gredy'; did you mean 'greedy'? allowed: ")
    with pytest.raises(ConfigError) as error:
        blend("gredy", BASE)
    assert error.value.problems == (problem,)


def test_a_far_off_name_gets_the_list_alone() -> None:
    problem = check_method("xyz")
    assert problem is not None
    assert problem.message == f"got 'xyz'; allowed: {', '.join(METHODS)}"
