"""
Decoupled reward policy optimisation (DRPO), Li et al., https://huggingface.co/papers/2510.04474.

On a group of completions, of which those with a score of at least `correct` are right and the others wrong:

    s_i = log pi(y_i) / n_i
    w_i = exp((1 - n_i / max_length) / length_temperature), normalised over the right ones, a constant
    A   = sum over the wrong ones of exp(s_j / tau), divided by its own value as a constant
    L   = - sum over the right ones of w_i * (s_i - tau * A)  +  [kl_weight * (KL - delta)]+ * KL

    KL  = mean over tokens of log pi_old - log pi;   [.]+ is at least 0, and a constant

n is the length in tokens, all else nats; pi_old is the policy that sampled. A is 1, and tau * A has the gradient of a softmax over
the wrong ones: the likelier one is, the more it is pushed down. Length is rewarded among the right ones alone, so that no right
completion is pushed down for being long. There is no reference model and no beta; `kl_weight` is the authors' beta, and
`length_temperature` their lambda. tau is a constant part of the loss, which is about tau plus the mean of -s.

A group of which all completions are right, or all wrong, gives 0. Formula and defaults: the authors' code. Different here: KL
is one of each group, so that the loss has one value for each and does not depend on how groups are cut into micro-batches; theirs
is over all tokens of a micro-batch, one-sided groups included. Where pi is pi_old it is 0 and so is its gradient, as in online
training, which learns from each batch once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss
from .batch import GroupBatch
from .registry import register_loss
from .whole_groups import behaviour_ratios, check_groups, mean_of, over_tokens, per_token, right_ones, share_of


@register_loss("drpo")
@dataclass(frozen=True)
class DRPOLoss(Loss):
    """
    Right completions up, the shorter the more; wrong ones down, the likelier the more.

    Args:
        tau (`float`, *optional*, defaults to `10.0`):
            Temperature of the wrong completions' log-probabilities per token, positive, in nats. Larger makes them more alike.
        delta (`float`, *optional*, defaults to `0.0001`):
            KL divergence to the policy that sampled, per token, below which it costs nothing; at least 0, in nats.
        kl_weight (`float`, *optional*, defaults to `1000.0`):
            How steeply it costs above, at least 0.
        length_temperature (`float`, *optional*, defaults to `0.1`):
            Temperature of the length reward, positive. Larger makes right completions count more alike.
        max_length (`int`, *optional*, defaults to `8192`):
            Length at which the length reward is 0, positive, in tokens: the most that are sampled, `max_new_tokens`.
        correct (`float`, *optional*, defaults to `1.0`):
            Score from which on a completion is right, in the unit of the scores.
    """

    paper: ClassVar[str] = "2510.04474"
    title: ClassVar[str] = "DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization"
    citation: ClassVar[str] = """\
@article{li2025drpo,
    title        = {{DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization}},
    author       = {Gang Li and Yan Chen and Ming Lin and Tianbao Yang},
    year         = 2025,
    eprint       = {arXiv:2510.04474},
}"""
    reads: ClassVar[frozenset[str]] = frozenset({"behaviour_logps"})
    takes_groups: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = False

    tau: float = 10.0
    delta: float = 1e-4
    kl_weight: float = 1e3
    length_temperature: float = 0.1
    max_length: int = 8192
    correct: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("tau", "length_temperature", "max_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"drpo: `{name}={getattr(self, name)}` must be positive.")
        for name in ("delta", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"drpo: `{name}={getattr(self, name)}` must be at least 0.")

    @property
    def reads_beta(self) -> bool:
        return False

    def sides(self, batch: GroupBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which completions are right, and which are wrong, both `(B, K)`; and which groups have both, `(B,)`."""
        right = right_ones(batch, self.correct)
        wrong = batch.mask & ~right
        return right, wrong, right.any(dim=1) & wrong.any(dim=1)

    def weights(self, batch: GroupBatch, right: torch.Tensor) -> torch.Tensor:
        """w, shape `(B, K)`, float32 or wider: of the right ones of a group that has some, 1 in sum; 0 for its others."""
        dtype = torch.promote_types(batch.logps.dtype, torch.float32)
        rewards = 1 - batch.lengths.to(dtype) / self.max_length
        # The most negative number, not -inf, which would make NaN of a group that has none
        logits = (rewards / self.length_temperature).masked_fill(~right, torch.finfo(dtype).min)
        return torch.softmax(logits, dim=1)

    def __call__(self, batch: GroupBatch) -> torch.Tensor:
        check_groups("drpo", batch)
        right, wrong, mixed = self.sides(batch)
        logps = per_token(batch, batch.logps)
        weights = self.weights(batch, right).to(logps.dtype)
        # Its value is constant, so that nothing overflows or vanishes, and its gradient that of the sum divided by its value
        log_sum = torch.logsumexp((logps / self.tau).masked_fill(~wrong, torch.finfo(logps.dtype).min), dim=1)
        one = 1 + (log_sum - log_sum.detach())
        kl = self.kl(batch)
        costs = (self.kl_weight * (kl - self.delta)).clamp(min=0).detach() * kl
        return torch.where(mixed, self.tau * one - (weights * logps).sum(dim=1) + costs, 0)

    def kl(self, batch: GroupBatch) -> torch.Tensor:
        """Estimate of the KL divergence of the policy that sampled to this one, mean over the tokens of each group, `(B,)`."""
        return -over_tokens(batch, behaviour_ratios(batch))

    def metrics(self, batch: GroupBatch) -> dict[str, float | torch.Tensor]:
        right, wrong, mixed = self.sides(batch)
        logps = per_token(batch, batch.logps)
        return {
            "right/share": share_of(right, batch.mask),
            "groups/mixed": mixed.float(),
            "length_reward/mean": mean_of(1 - batch.lengths / self.max_length, right),
            "per_token/right": mean_of(logps, right),
            "per_token/wrong": mean_of(logps, wrong),
            "behaviour/kl": self.kl(batch).detach(),
        }
