"""The blend: arrays in, arrays out.

`from ensemble import greedy, optimal, crossfit` gives the functions of those modules;
`certify` is `ensemble.certificate.certificate`. The table of methods is `ensemble.methods`.
"""

from ensemble.blend import Blend
from ensemble.certificate import certificate as certify
from ensemble.crossfit import CrossFit, crossfit
from ensemble.greedy import greedy
from ensemble.optimal import optimal

__all__ = ["Blend", "CrossFit", "certify", "crossfit", "greedy", "optimal"]
