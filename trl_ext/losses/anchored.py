"""
Anchored DPO (ADPO), Wang Zixian, https://huggingface.co/papers/2510.18913.

On pairs, with q the probability that the chosen completion is the better one and tau = 1 / beta unless set:

    z = delta / tau
    L = -q * log sigmoid(z) - (1 - q) * log sigmoid(-z),      minimised at z = logit(q)

On groups of K completions with scores s, the listwise form (a pair is the group of two):

    u_i = (log pi(y_i) - log ref(y_i)) / tau,   q = softmax(s / beta_r),   L = - sum_i q_i * log softmax(u)_i

delta and log-ratios are sums over tokens, in nats. The reference is the anchor: frozen, or moving with
`sync_ref_model`. A larger tau lets the optimum move further from it. q on pairs is, in this order, `preference_prob`,
sigmoid((score_chosen - score_rejected) / beta_r), or 1; `label_smoothing` e makes it (1 - e) q + e (1 - q).
Listwise form: the paper. Pairwise form: code of a third party, equal to the listwise form for K = 2.
q from scores: recalled.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, refuse_values, warn_once
from .batch import GroupBatch, PreferenceBatch, widened
from .registry import register_loss


def standardized(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Z-scores within each group of a `(B, K)` tensor, over the entries of `mask`; 0 where all scores are equal."""
    count = mask.sum(dim=1, keepdim=True)
    scores = scores.masked_fill(~mask, 0)
    centered = (scores - scores.sum(dim=1, keepdim=True) / count.clamp(min=1)).masked_fill(~mask, 0)
    std = (centered.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centered / (std + 1e-8)


@register_loss("anchored", aliases=["adpo"])
@dataclass(frozen=True)
class AnchoredLoss(Loss):
    """
    Cross-entropy to a target distribution over the completions, in log-ratio coordinates of the reference.

    Args:
        tau (`float`, *optional*):
            Temperature of the log-ratios, positive. `None` takes `1 / beta`.
        beta_r (`float`, *optional*, defaults to `1.0`):
            Temperature of the scores, positive, in their unit: smaller makes the target harder.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability that a pair's label is flipped, in `[0, 1]`. Pairs only.
        standardize (`bool`, *optional*, defaults to `False`):
            Whether scores are made z-scores within their group (standard deviation with `K - 1`) before `beta_r`.
    """

    paper: ClassVar[str] = "2510.18913"
    title: ClassVar[str] = "ADPO: Anchored Direct Preference Optimization"
    citation: ClassVar[str] = """\
@article{wang2025adpo,
    title        = {{ADPO: Anchored Direct Preference Optimization}},
    author       = {Zixian Wang},
    year         = 2025,
    eprint       = {arXiv:2510.18913},
}"""
    optional_columns: ClassVar[tuple[str, ...]] = ("preference_prob", "score_chosen", "score_rejected")
    takes_groups: ClassVar[bool] = True

    tau: float | None = None
    beta_r: float = 1.0
    label_smoothing: float = 0.0
    standardize: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.tau is not None and self.tau <= 0:
            raise ValueError(f"anchored: `tau={self.tau}` must be positive, or None for 1 / beta.")
        if self.beta_r <= 0:
            raise ValueError(f"anchored: `beta_r={self.beta_r}` must be positive.")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"anchored: `label_smoothing={self.label_smoothing}` must lie in [0, 1].")
        if self.label_smoothing == 0.5:
            warn_once(
                "anchored: `label_smoothing=0.5` makes every target 1/2: nothing is learnt of who was preferred."
            )
        elif self.label_smoothing > 0.5:
            warn_once(
                f"anchored: `label_smoothing={self.label_smoothing}` flips more labels than it keeps: the rejected completions "
                "are learnt as the better ones. Values below 0.5 smooth."
            )

    @property
    def divides_by_beta(self) -> bool:
        return self.tau is None

    @property
    def reads_beta(self) -> bool:
        return self.tau is None

    def remark(self, columns: Collection[str]) -> str:
        if self.label_smoothing or set(columns) & set(self.optional_columns):
            return ""
        return (
            "The dataset has neither `preference_prob` nor scores, and `label_smoothing` is 0: `anchored` then takes each label "
            "as certain, which is plain DPO. Add one of these columns (`trl_ext.data.score_preferences` adds scores), or set "
            "`label_smoothing`."
        )

    def scale(self, beta: float) -> float:
        """What log-ratios are multiplied by, `1 / tau`."""
        return beta if self.tau is None else 1 / self.tau

    def target(self, batch: PreferenceBatch) -> torch.Tensor:
        """q, the probability that the chosen completion is the better one, shape `(B,)`."""
        there = [name for name in ("score_chosen", "score_rejected") if name in batch.columns]
        if "preference_prob" in batch.columns:
            q = batch.column("preference_prob")
            refuse_values(~((q >= 0) & (q <= 1)), "anchored: `preference_prob` must lie in [0, 1].")
        elif len(there) == 2:
            scores = torch.stack([batch.column(name) for name in there], dim=1)
            refuse_values(~scores.isfinite().all(dim=1), f"anchored: {there} must be finite.")
            if self.standardize:
                scores = standardized(scores, torch.ones_like(scores, dtype=torch.bool))
            q = torch.sigmoid((scores[:, 0] - scores[:, 1]) / self.beta_r)
        elif there:
            raise ValueError(
                f"anchored: the batch has {there[0]!r} without the score of the other completion. Give both "
                "`score_chosen` and `score_rejected`, or neither."
            )
        else:
            q = torch.ones_like(batch.delta)
        e = self.label_smoothing
        return ((1 - e) * q + e * (1 - q)).detach()

    def __call__(self, batch: PreferenceBatch | GroupBatch) -> torch.Tensor:
        if isinstance(batch, GroupBatch):
            return self._listwise(batch)
        z = self.scale(batch.beta) * batch.delta
        q = self.target(batch).to(z.dtype)
        # Never log q, and no difference of large terms: exact at q = 0 and 1, finite for any z
        return -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)

    def _listwise(self, batch: GroupBatch) -> torch.Tensor:
        if self.label_smoothing:
            raise ValueError("anchored: `label_smoothing` has a meaning for pairs only; set it to 0 for groups.")
        # The most negative number, not -inf, which would make NaN of a group of none. Beside large log-ratios the
        # log-probability of a masked entry is -inf all the same in float16: it is not multiplied by its 0
        u = self.scale(batch.beta) * batch.logratios
        log_p = F.log_softmax(u.masked_fill(~batch.mask, torch.finfo(u.dtype).min), dim=1)
        scores = widened(batch.scores)
        refuse_values((~scores.isfinite() & batch.mask).any(dim=1), "anchored: the scores of a group must be finite.")
        if self.standardize:
            scores = standardized(scores, batch.mask)
        q = torch.softmax((scores / self.beta_r).masked_fill(~batch.mask, torch.finfo(scores.dtype).min), dim=1)
        return -(q.detach().to(log_p.dtype) * log_p.masked_fill(~batch.mask, 0)).sum(dim=1)

    def metrics(self, batch: PreferenceBatch | GroupBatch) -> dict[str, float | torch.Tensor]:
        if isinstance(batch, GroupBatch):
            return {}
        return {"target/mean": self.target(batch).mean()}
