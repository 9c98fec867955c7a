"""
Robust preference optimisation by expectation-maximisation (RE-PO, also LCPO), Cao et al.,
https://huggingface.co/papers/2509.24159.

    w   = sigmoid(z + logit(eta_k))                              how sure the label is, without gradient
    L   = -w * log sigmoid(z) - (1 - w) * log sigmoid(-z)
    eta_k <- (1 - rate) * eta_k + rate * (mean of w over the pairs of annotator k)      after the micro-batch

z is by how much the base loss prefers the label: that of the flipped pair less that of the pair. With d = beta * delta:

    sigmoid   z = d
    ipo       z = 2 / beta * (delta per token)
    simpo     z = log sigmoid(d - g) - log sigmoid(-d - g),   d = beta * (log-prob per token of w - of l),  g = beta * gamma_beta_ratio
    cpo       z = d + (log-prob per token of w - of l),       d = beta * (log-prob of w - of l)

eta_k, in (0, 1), is the reliability of annotator k: the chance that a label is right. As eta goes to 1 the loss is
-log sigmoid(z), which for "sigmoid" is DPO; at 1/2 the model alone judges the label, w = sigmoid(z). `ipo` takes log-ratios per
token, and the likelihood term of `cpo` is per token, as in TRL. eta is kept in [1e-6, 1 - 1e-6]: at 0 or 1 no pair could move it.
The paper moves eta once per step and sums over samples; here it moves with every micro-batch, and the loss is a mean.
Equations 2 to 7 and Algorithm 1: paper. z of each base: derived from it. The authors' code was not read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, averages, refuse_values
from .batch import GroupBatch, PreferenceBatch, widened
from .registry import register_loss


BASES = ("sigmoid", "ipo", "simpo", "cpo")
ANNOTATOR = "annotator_id"
CLOSEST = 1e-6


@register_loss("robust_em", aliases=["re_po", "lcpo"])
@dataclass(frozen=True)
class RobustEMLoss(Loss):
    """
    A base loss whose labels count as much as they are believed, with the reliability of each annotator estimated on the way.

    Args:
        base (`str`, *optional*, defaults to `"sigmoid"`):
            The base: `"sigmoid"`, `"ipo"`, `"simpo"` or `"cpo"`. The last two read no reference.
        eta (`float`, *optional*, defaults to `0.9`):
            Reliability of each annotator to begin with, in `(0, 1)`.
        rate (`float`, *optional*, defaults to `0.1`):
            How far the reliability moves with each micro-batch, in `[0, 1]`. At 0 it stays.
        gamma_beta_ratio (`float`, *optional*, defaults to `0.5`):
            For `"simpo"`: the margin, at least 0, in nats per token.
        annotators (`int`, *optional*, defaults to `1`):
            Number of annotators. With more than one the column `annotator_id` is required: whole numbers from 0 to
            `annotators - 1`.
    """

    paper: ClassVar[str] = "2509.24159"
    title: ClassVar[str] = "RE-PO: Robust Enhanced Policy Optimization as a General Framework for LLM Alignment"
    citation: ClassVar[str] = """\
@inproceedings{cao2026repo,
    title        = {{RE-PO: Robust Enhanced Policy Optimization as a General Framework for LLM Alignment}},
    author       = {Xiaoyang Cao and Zelai Xu and Mo Guang and Kaiwen Long and Michiel A. Bakker and Yu Wang and Chao Yu},
    booktitle    = {International Conference on Learning Representations},
    year         = 2026,
    eprint       = {arXiv:2509.24159},
}"""
    evidence: ClassVar[str] = (
        "The weight, the loss and the update are the paper's; z of each base is ours, derived from its equations: the authors' code was "
        "not read."
    )
    optional_columns: ClassVar[tuple[str, ...]] = (ANNOTATOR,)
    update_first: ClassVar[bool] = False

    base: str = "sigmoid"
    eta: float = 0.9
    rate: float = 0.1
    gamma_beta_ratio: float = 0.5
    annotators: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.base not in BASES:
            raise ValueError(f"robust_em: `base={self.base!r}` is unknown; choose one of {list(BASES)}.")
        if not 0 < self.eta < 1:
            raise ValueError(f"robust_em: `eta={self.eta}` must lie in (0, 1): at its ends no pair could move it.")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"robust_em: `rate={self.rate}` must lie in [0, 1].")
        if self.gamma_beta_ratio < 0:
            raise ValueError(f"robust_em: `gamma_beta_ratio={self.gamma_beta_ratio}` must be at least 0.")
        if self.annotators < 1:
            raise ValueError(f"robust_em: `annotators={self.annotators}` must be at least 1.")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"ref_logps"} if self.base in ("sigmoid", "ipo") else ())

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (ANNOTATOR,) if self.annotators > 1 else ()

    @property
    def divides_by_beta(self) -> bool:
        return self.base == "ipo"

    @property
    def reads_beta(self) -> bool:
        return self.base != "cpo"

    def check_columns(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if ANNOTATOR not in columns:
            return None
        annotator = columns[ANNOTATOR]
        # NaN is in no range
        return ~((annotator >= 0) & (annotator < self.annotators) & (annotator == annotator.round()))

    @property
    def column_help(self) -> str:
        return (
            f"robust_em keeps one reliability per annotator and was told of `annotators={self.annotators}`, so `{ANNOTATOR}` must be a "
            f"whole number from 0 to {self.annotators - 1}. Number the annotators from 0 and set "
            'loss_kwargs={"annotators": N}, N the largest number plus 1; or drop the column to treat all labels alike.'
        )

    def preference(self, batch: PreferenceBatch) -> torch.Tensor:
        """z, shape `(B,)`: by how much the base loss is smaller for the pair than for the flipped pair."""
        if self.base == "sigmoid":
            return batch.beta * batch.delta
        chosen, rejected = averages(batch, "logratios" if self.base == "ipo" else "logps")
        per_token = chosen - rejected
        if self.base == "ipo":
            return 2 / batch.beta * per_token
        if self.base == "cpo":
            return batch.beta * (batch.chosen_logps - batch.rejected_logps) + per_token
        d, g = batch.beta * per_token, batch.beta * self.gamma_beta_ratio
        return F.logsigmoid(d - g) - F.logsigmoid(-d - g)

    def _annotators(self, batch: PreferenceBatch) -> torch.Tensor:
        """Who labelled each pair, shape `(B,)`, whole numbers."""
        if ANNOTATOR not in batch.columns and self.annotators == 1:
            return torch.zeros_like(batch.chosen_lengths, dtype=torch.long)
        annotator = {ANNOTATOR: batch.column(ANNOTATOR).detach()}
        refuse_values(self.check_columns(annotator), self.column_help)
        return annotator[ANNOTATOR].long()

    def confidence(self, batch: PreferenceBatch, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """w, shape `(B,)`: the probability that each label is right, in float32 or wider, without gradient."""
        z = widened(self.preference(batch).detach())
        eta = state["reliability"].to(z)[self._annotators(batch)]
        return torch.sigmoid(z + torch.logit(eta))

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        z = self.preference(batch)
        w = self.confidence(batch, batch.state or self.init_state()).to(z.dtype)
        return -w * F.logsigmoid(z) - (1 - w) * F.logsigmoid(-z)

    def init_state(self) -> dict[str, torch.Tensor]:
        reliability = torch.full((self.annotators,), self.eta).clamp(CLOSEST, 1 - CLOSEST)
        return {"reliability": reliability, "pairs": torch.zeros(self.annotators, dtype=torch.long)}

    def update(
        self,
        state: Mapping[str, torch.Tensor],
        batch: PreferenceBatch | GroupBatch,
        reduce: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda sums: sums,
    ) -> dict[str, torch.Tensor]:
        w = self.confidence(batch, state)
        there = (batch.chosen_lengths > 0) | (batch.rejected_lengths > 0)
        numbers = torch.arange(self.annotators, device=w.device)
        # Row k: the pairs of annotator k
        own = ((numbers.unsqueeze(1) == self._annotators(batch)) & there).to(w.dtype)
        sums = reduce({"w": own @ w, "pairs": own.sum(dim=1)})
        old, pairs = state["reliability"], sums["pairs"]
        moved = (1 - self.rate) * old + self.rate * (sums["w"] / pairs.clamp(min=1)).to(old.dtype)
        moved = torch.where(pairs > 0, moved.clamp(CLOSEST, 1 - CLOSEST), old)
        return {"reliability": moved, "pairs": state["pairs"] + pairs.long()}

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        state = batch.state or self.init_state()
        reliability = state["reliability"]
        return {
            "confidence/mean": self.confidence(batch, state).mean(),
            "reliability/mean": reliability.mean(),
            "reliability/min": reliability.min(),
            "reliability/max": reliability.max(),
        }

    def summary(self, state: Mapping[str, torch.Tensor]) -> str:
        reliability, pairs = state["reliability"].tolist(), state["pairs"].tolist()
        seen = sorted((index for index, count in enumerate(pairs) if count), key=reliability.__getitem__)
        rows = [f"{index:>9}  {reliability[index]:>11.4f}  {pairs[index]:>5}" for index in seen]
        unseen = len(pairs) - len(seen)
        rest = [f"{unseen} of {len(pairs)} annotators had no pair and stay at {self.eta}."] if unseen else []
        head = "Reliability of each annotator (the chance that a label is right), the lowest first:"
        return "\n".join([head, "annotator  reliability  pairs", *rows, *rest])
