"""The blend: arrays in, arrays out.

`greedy` and `optimal` give a `Blend` of a matrix of true-class probabilities, `certify` bounds how
far any weights are from the best ones, `crossfit` is the honest loss of a way to choose them.
"""

from foldrace.ensemble.blend import Blend
from foldrace.ensemble.crossfit import CrossFit, crossfit
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.solvers.kernels import certificate as certify
from foldrace.ensemble.solvers.optimal import optimal

__all__ = ["Blend", "CrossFit", "certify", "crossfit", "greedy", "optimal"]
