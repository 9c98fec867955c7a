"""
Self-play preference optimisation with soft win rates (SPPO, Wu et al., https://huggingface.co/papers/2405.00675), and with the
scores of a general preference model (GPO, Zhang et al., https://huggingface.co/papers/2410.02197).

    L = (c_w - s_w / beta)^2 + (c_l - s_l / beta)^2

c is a completion's own log-ratio, summed over tokens, in nats; s its win rate against the policy's other completions minus
1/2 (SPPO: `score_chosen` and `score_rejected` are win rates, in [0, 1]), or its score under the preference model (GPO). The
reference is the policy that the round began with. The authors train with a small `beta` (0.001), so targets are large. With
win rates 1 and 0 this is TRL's `sppo_hard`, loss and gradient. The authors' code, and GPO, take the mean of the two squares,
half of this: `loss_weights=[0.5]` gives that. How sure this is: `evidence` below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, refuse_values
from .batch import PreferenceBatch
from .registry import register_loss


@register_loss("sppo_soft", aliases=["gpo"])
@dataclass(frozen=True)
class SoftSPPOLoss(Loss):
    """
    Squared distance of each completion's log-ratio to its win rate, in units of `beta`.

    Args:
        target (`str`, *optional*, defaults to `"win_rate"`):
            What the scores are: `"win_rate"`, probabilities of which 1/2 is taken off, or `"score"`, taken as they are.
    """

    paper: ClassVar[str] = "2405.00675, 2410.02197"
    title: ClassVar[str] = "Self-Play Preference Optimization for Language Model Alignment"
    citation: ClassVar[str] = """\
@article{wu2024sppo,
    title        = {{Self-Play Preference Optimization for Language Model Alignment}},
    author       = {Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and Quanquan Gu},
    year         = 2024,
    eprint       = {arXiv:2405.00675},
}"""
    evidence: ClassVar[str] = (
        "SPPO, with win rates, is the authors' code; GPO, with the scores of a preference model, is recalled."
    )
    columns: ClassVar[tuple[str, ...]] = ("score_chosen", "score_rejected")

    target: str = "win_rate"

    def __post_init__(self):
        super().__post_init__()
        if self.target not in ("win_rate", "score"):
            raise ValueError(f"sppo_soft: `target={self.target!r}` is unknown; choose one of ['win_rate', 'score'].")

    @property
    def divides_by_beta(self) -> bool:
        return True

    def check_columns(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if self.target == "score":
            return None
        chosen, rejected = columns["score_chosen"], columns["score_rejected"]
        # NaN is in no range
        return ~((chosen >= 0) & (chosen <= 1) & (rejected >= 0) & (rejected <= 1))

    @property
    def column_help(self) -> str:
        return (
            "sppo_soft reads scores as win rates, in [0, 1]. For scores of a preference model set "
            'loss_kwargs={"target": "score"}.'
        )

    def targets(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the two log-ratios are drawn to, shape `(B,)`, nats."""
        scores = {name: batch.column(name).detach() for name in self.columns}
        bad = self.check_columns(scores)
        if bad is not None:
            refuse_values(bad, self.column_help)
        shift = 0.5 if self.target == "win_rate" else 0.0
        chosen, rejected = (((score - shift) / batch.beta).to(batch.delta.dtype) for score in scores.values())
        return chosen, rejected

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        chosen, rejected = self.targets(batch)
        return (batch.chosen_logratios - chosen) ** 2 + (batch.rejected_logratios - rejected) ** 2

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        chosen, rejected = self.targets(batch)
        return {"target/chosen": chosen.mean(), "target/rejected": rejected.mean()}
