"""The blend: arrays in, arrays out.

`from ensemble import greedy, crossfit` gives the functions of the modules of that name;
`certify` is `ensemble.certificate.certificate`. The table of methods is `ensemble.methods`.
"""

from ensemble.blend import Blend
from ensemble.certificate import certificate as certify
from ensemble.crossfit import CrossFit, crossfit
from ensemble.greedy import greedy

__all__ = ["Blend", "CrossFit", "certify", "crossfit", "greedy"]
