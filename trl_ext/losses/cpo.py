"""
Contrastive preference optimisation (CPO), Xu et al., https://huggingface.co/papers/2401.08417.

    L = -log sigmoid(beta * (lp_w - lp_l)) - nll_weight * avg_w

lp is a completion's log-probability under the policy, summed over tokens, in nats; avg_w that of the chosen completion per
token (its length is clamped to 1). DPO whose reference gives both completions the same, and the likelihood of the chosen
completion, which keeps the policy close to the data. There is no reference model.
Formula: the authors' code. It averages the likelihood over all chosen tokens of a micro-batch, so that long completions count
more; here each pair has its own average, so that a batch gives what its pairs give one by one.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .base import Loss, averages
from .batch import PreferenceBatch
from .bias_variance import present
from .registry import register_loss


@register_loss("cpo")
@dataclass(frozen=True)
class CPOLoss(Loss):
    """
    DPO without a reference, and the negative log-likelihood of the chosen completion.

    Args:
        nll_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the negative log-likelihood per token, at least 0.
    """

    paper: ClassVar[str] = "2401.08417"
    title: ClassVar[str] = (
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation"
    )
    citation: ClassVar[str] = """\
@inproceedings{xu2024contrastive,
    title        = {{Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation}},
    author       = {Haoran Xu and Amr Sharaf and Yunmo Chen and Weiting Tan and Lingfeng Shen and Benjamin Van Durme and Kenton Murray and Young Jin Kim},
    year         = 2024,
    booktitle    = {International Conference on Machine Learning},
}"""
    reads: ClassVar[frozenset[str]] = frozenset()

    nll_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.nll_weight < 0:
            raise ValueError(f"cpo: `nll_weight={self.nll_weight}` must be at least 0 (0 leaves the likelihood out).")

    @property
    def reads_beta(self) -> bool:
        return self.nll_weight == 0  # else the likelihood is learnt at any `beta`

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        preference = -F.logsigmoid(batch.beta * (batch.chosen_logps - batch.rejected_logps))
        return preference - self.nll_weight * averages(batch)[0]

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        return {"nll/mean": -averages(batch)[0].detach().masked_fill(~present(batch), torch.nan)}
