"""Claims of papers as experiments; `benchmarks/quality.py` runs them."""

from .anchored import Anchored
from .bias_variance import BiasVariance
from .cyclic import Cyclic
from .frame import Claim
from .length_regularized import LengthRegularized
from .margin_adaptive import MarginAdaptive
from .offset import Offset
from .robust_em import RobustEM


CLAIMS: dict[str, type[Claim]] = {
    claim.name: claim
    for claim in (RobustEM, Offset, Anchored, LengthRegularized, BiasVariance, Cyclic, MarginAdaptive)
}
