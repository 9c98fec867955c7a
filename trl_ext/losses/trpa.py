"""
Trust region preference approximation (TRPA), Su et al., https://huggingface.co/papers/2504.04524.

On a group of completions whose scores are levels, higher is better:

    c_i = (log pi(y_i) - log ref(y_i)) / n_i
    L   = mean over the pairs with score_i > score_j of -log sigmoid(kappa_i * beta * (c_i - c_j))  +  kl_weight * KL(pi, pi_old)

    kappa_i = kappa where y_i is right (its score is at least `correct`), else 1
    KL      = mean over tokens of min(exp(-r) + r - 1, 10),   r = log pi - log pi_old per token

n is the length in tokens, all else nats; pi_old is the policy that sampled. Formula and defaults: the authors' code, in which
level 1 is the best one and right. Different here:

- The mean over pairs is one of each group. Theirs is over all pairs of a micro-batch, so that how groups are cut into
  micro-batches counts, and groups with many pairs count more.
- r is each completion's mean over its tokens, since a batch holds one log-probability under pi_old per completion; theirs is each
  token's. Where pi is pi_old both are 0 and so are their gradients, as in online training, which learns from each batch once.
- Groups of one level are left out by the trainers. Theirs give -log sigmoid of c (or of -c, where it is wrong), in micro-batches
  that have no pair at all.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss
from .batch import GroupBatch, widened
from .registry import register_loss
from .whole_groups import behaviour_ratios, check_groups, over_tokens, per_token, right_ones, share_of


# The largest value that the estimate of the KL divergence has at a token; there it has no gradient
KL_LIMIT = 10.0


@register_loss("trpa")
@dataclass(frozen=True)
class TRPALoss(Loss):
    """
    DPO on log-ratios per token for each two levels of a group, within a trust region around the policy that sampled.

    Args:
        kappa (`float`, *optional*, defaults to `2.5`):
            How much steeper pairs are whose better completion is right, positive. At 1 all pairs are alike.
        kl_weight (`float`, *optional*, defaults to `0.001`):
            Weight of the KL divergence to the policy that sampled, at least 0.
        correct (`float`, *optional*, defaults to `1.0`):
            Score from which on a completion is right, in the unit of the scores.
    """

    paper: ClassVar[str] = "2504.04524"
    title: ClassVar[str] = (
        "Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM reasoning"
    )
    citation: ClassVar[str] = """\
@article{su2025trpa,
    title        = {{Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM reasoning}},
    author       = {Xuerui Su and Shufang Xie and Guoqing Liu and Yingce Xia and Renqian Luo and Peiran Jin and Zhiming Ma and
                    Yue Wang and Zun Wang and Yuting Liu},
    year         = 2025,
    eprint       = {arXiv:2504.04524},
}"""
    evidence: ClassVar[str] = (
        "The formula and its defaults are from the authors' code; that its two means are taken over each group, and the KL of each "
        "completion's mean over its tokens, is ours."
    )
    reads: ClassVar[frozenset[str]] = frozenset({"ref_logps", "behaviour_logps"})
    takes_groups: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = False

    kappa: float = 2.5
    kl_weight: float = 0.001
    correct: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.kappa <= 0:
            raise ValueError(f"trpa: `kappa={self.kappa}` must be positive (1 makes all pairs alike).")
        if self.kl_weight < 0:
            raise ValueError(f"trpa: `kl_weight={self.kl_weight}` must be at least 0 (0 is no trust region).")

    def ranking(self, batch: GroupBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Which completion is better than which, and by how much `kappa * c` is larger, both `(B, K, K)`."""
        scores = widened(batch.scores)
        better = (scores.unsqueeze(2) > scores.unsqueeze(1)) & batch.mask.unsqueeze(2) & batch.mask.unsqueeze(1)
        ratios = per_token(batch, batch.logratios)
        gaps = ratios.unsqueeze(2) - ratios.unsqueeze(1)
        return better, torch.where(right_ones(batch, self.correct).unsqueeze(2), self.kappa * gaps, gaps)

    def kl(self, batch: GroupBatch) -> torch.Tensor:
        """Estimate of the KL divergence to the policy that sampled, mean over the tokens of each group, shape `(B,)`."""
        # Beyond these bounds the estimate is above its limit anyway; exp would overflow
        ratios = behaviour_ratios(batch).clamp(-2 * KL_LIMIT, 2 * KL_LIMIT)
        return over_tokens(batch, (torch.expm1(-ratios) + ratios).clamp(max=KL_LIMIT))

    def __call__(self, batch: GroupBatch) -> torch.Tensor:
        check_groups("trpa", batch)
        better, gaps = self.ranking(batch)
        losses = -F.logsigmoid(batch.beta * gaps).masked_fill(~better, 0)
        return losses.sum(dim=(1, 2)) / better.sum(dim=(1, 2)).clamp(min=1) + self.kl_weight * self.kl(batch)

    def metrics(self, batch: GroupBatch) -> dict[str, float | torch.Tensor]:
        better, gaps = self.ranking(batch)
        return {
            "right/share": share_of(right_ones(batch, self.correct), batch.mask),
            "ranking/accuracies": share_of(gaps > 0, better),
            "ranking/pairs": better.sum(dim=(1, 2)).float(),
            "behaviour/kl": self.kl(batch).detach(),
        }
