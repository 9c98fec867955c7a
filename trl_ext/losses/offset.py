"""
DPO with an offset (ODPO), Amini, Vieira, Cotterell, https://huggingface.co/papers/2402.10571.

    L = -log sigmoid(beta * delta - alpha * f(h)),   h = score_chosen - score_rejected

delta (nats) is the chosen minus the rejected log-ratio. The offset `alpha * f(h)` is in units of the reward
`beta * log-ratio`, so `alpha` stands outside `beta`. `f` is

    "log"         log h                                  the paper's main experiments; 0 < h < 1 relaxes DPO
    "log_ratio"   log(score_chosen / score_rejected)     an ablation; scores must be positive
    "linear"      h                                      an ablation; takes margins of any sign

With noise of a Gumbel distribution on both rewards, P(noisy gap > offset) is the sigmoid above.
Formula and defaults: the authors' code; "linear" from a third party.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss
from .batch import PreferenceBatch
from .registry import register_loss


SCALINGS = ("log", "log_ratio", "linear")


@register_loss("offset", aliases=["odpo"])
@dataclass(frozen=True)
class OffsetLoss(Loss):
    """
    DPO whose required reward gap grows with how much better the chosen completion is.

    Args:
        alpha (`float`, *optional*, defaults to `1.0`):
            Scale of the offset, at least 0. At 0 the loss is DPO.
        scaling (`str`, *optional*, defaults to `"log"`):
            How the score margin becomes an offset: `"log"`, `"log_ratio"` or `"linear"`.
        margin_floor (`float`, *optional*):
            Smallest margin, positive, in units of the scores: smaller ones, ties and margins that contradict the label
            are raised to it. `None` leaves margins as they are; the log scalings then refuse those that are not
            positive.
    """

    paper: ClassVar[str] = "2402.10571"
    title: ClassVar[str] = "Direct Preference Optimization with an Offset"
    citation: ClassVar[str] = """\
@inproceedings{amini2024direct,
    title        = {{Direct Preference Optimization with an Offset}},
    author       = {Afra Amini and Tim Vieira and Ryan Cotterell},
    year         = 2024,
    booktitle    = {Findings of the Association for Computational Linguistics: ACL 2024},
}"""
    columns: ClassVar[tuple[str, ...]] = ("score_chosen", "score_rejected")

    alpha: float = 1.0
    scaling: str = "log"
    margin_floor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"offset: `alpha={self.alpha}` must be at least 0 (0 is DPO).")
        if self.scaling not in SCALINGS:
            raise ValueError(f"offset: `scaling={self.scaling!r}` is unknown; choose one of {list(SCALINGS)}.")
        if self.margin_floor is not None and self.margin_floor <= 0:
            raise ValueError(f"offset: `margin_floor={self.margin_floor}` must be positive, or None for no floor.")

    def offset(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`alpha * f(h)`, in units of the reward, shape `(B,)`; NaN or infinite where `f` is not defined."""
        rejected = columns["score_rejected"]
        margin = columns["score_chosen"] - rejected
        if self.margin_floor is not None:
            margin = margin.clamp(min=self.margin_floor)
        if self.scaling == "log":
            margin = margin.log()
        elif self.scaling == "log_ratio":
            # log(s_w / s_l) = log1p(h / s_l): exact for scores that are close, and a floor on h applies to it as well
            margin = torch.where(rejected > 0, torch.log1p(margin / rejected), torch.nan)
        return self.alpha * margin

    def check_columns(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if self.scaling == "linear" or self.alpha == 0:
            return None
        bad = torch.zeros_like(columns["score_chosen"], dtype=torch.bool)
        if self.margin_floor is None:
            bad |= columns["score_chosen"] <= columns["score_rejected"]
        if self.scaling == "log_ratio":
            bad |= columns["score_rejected"] <= 0
        return bad

    @property
    def column_help(self) -> str:
        scores = " and both scores" if self.scaling == "log_ratio" else ""
        return (
            f"`offset` with `scaling={self.scaling!r}` needs `score_chosen - score_rejected`{scores} to be positive. "
            "Orient the pairs so that the chosen completion has the higher score, drop the ties, set `margin_floor` "
            'to raise small margins, or use `scaling="linear"`.'
        )

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        logits = batch.beta * batch.delta
        if self.alpha != 0:
            offset = self.offset({name: batch.column(name) for name in self.columns}).detach()
            if not offset.isfinite().all():
                raise ValueError(f"{(~offset.isfinite()).sum()} of {len(offset)} pairs. {self.column_help}")
            logits = logits - offset.to(logits.dtype)
        return -F.logsigmoid(logits)

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        if self.alpha == 0:
            return {"offset/mean": torch.zeros((), device=batch.delta.device)}
        return {"offset/mean": self.offset({name: batch.column(name) for name in self.columns}).mean()}
