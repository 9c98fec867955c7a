"""
Step-level advantage preference optimisation (Step-APO) of critical plan step learning (CPL), Wang et al.,
https://huggingface.co/papers/2409.08642.

    L = -log sigmoid(beta * delta - alpha * (q_chosen - q_rejected))

delta (nats) is the chosen minus the rejected log-ratio of one step of a plan, whose beginning stands in the prompt. q is the
value that a tree search gave the step. alpha stands outside beta, so it turns values into the unit of the reward. It is
`offset` with `scaling="linear"`, on values of steps in place of scores. The pipeline that the formula was read in trains with
`beta` 0.3. How sure this is: `evidence` below.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, refuse_values
from .batch import PreferenceBatch
from .registry import register_loss


@register_loss("step_apo", aliases=["cpl"])
@dataclass(frozen=True)
class StepAPOLoss(Loss):
    """
    DPO on steps whose required reward gap is the difference of their values.

    Args:
        alpha (`float`, *optional*, defaults to `1.0`):
            Scale of the difference, at least 0. At 0 the loss is DPO.
    """

    paper: ClassVar[str] = "2409.08642"
    title: ClassVar[str] = "CPL: Critical Plan Step Learning Boosts LLM Generalization in Reasoning Tasks"
    citation: ClassVar[str] = """\
@article{wang2024cpl,
    title        = {{CPL: Critical Plan Step Learning Boosts LLM Generalization in Reasoning Tasks}},
    author       = {Tianlong Wang and Junzhe Chen and Xueting Han and Jing Bai},
    year         = 2024,
    eprint       = {arXiv:2409.08642},
}"""
    evidence: ClassVar[str] = (
        "The formula and its default are from code of a third party, a public pipeline that calls itself the authors', which was not "
        "confirmed."
    )
    columns: ClassVar[tuple[str, ...]] = ("q_chosen", "q_rejected")

    alpha: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"step_apo: `alpha={self.alpha}` must be at least 0 (0 is DPO).")

    def offset(self, batch: PreferenceBatch) -> torch.Tensor:
        """`alpha * (q_chosen - q_rejected)`, in units of the reward, shape `(B,)`."""
        margin = (batch.column("q_chosen") - batch.column("q_rejected")).detach()
        refuse_values(~margin.isfinite(), f"step_apo: {list(self.columns)} must be finite.")
        return self.alpha * margin

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        logits = batch.beta * batch.delta
        return -F.logsigmoid(logits - self.offset(batch).to(logits.dtype))

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        return {"offset/mean": self.offset(batch).mean()}
