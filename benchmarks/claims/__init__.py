"""Claims of papers as experiments; `benchmarks/quality.py` runs them."""

from .offset import Offset


CLAIMS = {claim.name: claim for claim in (Offset,)}
