"""
Token-level distillation from a DPO model against a reverse one (AlignDistil), Zhang et al., https://huggingface.co/papers/2503.02832.

Per token, from the logits z of three models, the DPO model (dpo), one trained by DPO on pairs whose completions are swapped (rev)
and the policy:

    d      = sum_v |softmax(z_dpo)_v - softmax(z_rev)_v|
    w      = beta2 * d + 0.001
    target = softmax((z_dpo + w * (z_dpo - z_rev)) / temperature)
    l      = beta / w * KL(policy || target)

    L = mean of l over the tokens of the chosen completion; with `length_norm=False` their sum

d, in [0, 2], is twice the total variation distance: where the two models agree w is small, and the policy is drawn to the DPO
model; where they differ the target goes beyond it. No gradient flows into target and w. KL is in nats. Where d is 0, beta / w is
1000 beta, and the difference of the logits does not count. The policy begins as the model that the DPO model began as.
Formula: the authors' code, whose released mask scores each completion one token too late; here a token is scored where it is
predicted. Their `beta` is 0.1; `beta2` is 10 on given completions and 15 on those that the policy samples. Their code divides by
the length where it is told to, which their runs do.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss
from .batch import GroupBatch, PreferenceBatch
from .registry import register_loss


@register_loss("aligndistil")
@dataclass(frozen=True)
class AlignDistilLoss(Loss):
    """
    Distillation from a DPO model, pushed away from a reverse one, on chosen completions; of a group, on all of them.

    Args:
        beta2 (`float`, *optional*, defaults to `10.0`):
            Scale of the weight of the difference of the two models' logits, at least 0. Near 0 the target is the DPO model.
        temperature (`float`, *optional*, defaults to `1.0`):
            What the target's logits are divided by, positive.
        length_norm (`bool`, *optional*, defaults to `True`):
            Whether a completion counts by the mean over its tokens, else by their sum.
    """

    paper: ClassVar[str] = "2503.02832"
    title: ClassVar[str] = "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation"
    citation: ClassVar[str] = """\
@inproceedings{zhang2025aligndistil,
    title        = {{AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation}},
    author       = {Songming Zhang and Xue Zhang and Tong Zhang and Bojie Hu and Yufeng Chen and Jinan Xu},
    year         = 2025,
    booktitle    = {Proceedings of the Annual Meeting of the Association for Computational Linguistics},
}"""
    reads: ClassVar[frozenset[str]] = frozenset({"teachers"})
    takes_groups: ClassVar[bool] = True

    beta2: float = 10.0
    temperature: float = 1.0
    length_norm: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.beta2 < 0:
            raise ValueError(f"aligndistil: `beta2={self.beta2}` must be at least 0.")
        if self.temperature <= 0:
            raise ValueError(f"aligndistil: `temperature={self.temperature}` must be positive.")

    def per_token(
        self, logits: torch.Tensor, teacher_logits: torch.Tensor, reverse_logits: torch.Tensor
    ) -> torch.Tensor:
        distance = (teacher_logits.softmax(dim=1) - reverse_logits.softmax(dim=1)).abs().sum(dim=1)
        weight = self.beta2 * distance + 1e-3
        target = teacher_logits + weight.unsqueeze(1) * (teacher_logits - reverse_logits)
        log_target, log_policy = (target / self.temperature).log_softmax(dim=1), logits.log_softmax(dim=1)
        return (log_policy.exp() * (log_policy - log_target)).sum(dim=1) / weight

    def __call__(self, batch: PreferenceBatch | GroupBatch) -> torch.Tensor:
        sums, lengths = _divergences(batch)
        values = batch.beta * (sums / lengths.clamp(min=1) if self.length_norm else sums)
        if isinstance(batch, PreferenceBatch):
            return values
        return values.masked_fill(~batch.mask, 0).sum(dim=1) / batch.mask.sum(dim=1).clamp(min=1)

    def metrics(self, batch: PreferenceBatch | GroupBatch) -> dict[str, float | torch.Tensor]:
        sums, lengths = _divergences(batch)
        there = lengths > 0
        if isinstance(batch, GroupBatch):
            there &= batch.mask
            sums, lengths = (value.masked_fill(~there, 0).sum(dim=1) for value in (sums, lengths))
            there = there.any(dim=1)
        return {"divergence/per_token": (sums.detach() / lengths).masked_fill(~there, torch.nan)}


def _divergences(batch: PreferenceBatch | GroupBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the tokens of the completions that are learnt from, and how many tokens there are."""
    if isinstance(batch, GroupBatch):
        sums, lengths = batch.divergences, batch.lengths
    else:
        sums, lengths = batch.chosen_divergences, batch.chosen_lengths
    if sums is None:
        raise ValueError(
            "aligndistil: the batch has no divergences from the teachers. The trainers compute them; a batch made by hand has "
            "them as `chosen_divergences`, or `divergences` of groups: sums of `per_token` over the tokens of each completion."
        )
    return sums, lengths
