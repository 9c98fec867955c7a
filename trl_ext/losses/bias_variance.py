"""
Bias-variance optimised preference optimisation (BVPO), Zhu et al., https://huggingface.co/papers/2510.05095.

    L = alpha * L_t + (1 - alpha) * L_e

L_t is the base loss on the pair sampled with its reasoning traces, L_e the same loss on the pair that the same prompt
gave with reasoning switched off (an empty trace). The trace of one sample makes the gradient noisy; the empty trace is
biased but quiet. A row that lacks one of the two pairs contributes the other term alone, with its factor: the objective
is the sum over both data sets, divided by the number of rows. How sure this is: `evidence` below.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from .base import PLAIN_LOSSES, Loss
from .batch import PreferenceBatch
from .registry import get_loss, register_loss, resolve_name


@register_loss("bias_variance", aliases=["bvpo"])
@dataclass(frozen=True)
class BiasVarianceLoss(Loss):
    """
    Mixture of a base loss on the traced pair and on the pair with an empty trace.

    Args:
        alpha (`float` or `str`, *optional*, defaults to `0.5`):
            Share of the traced pair, in `[0, 1]`. At 1 the loss is the base loss on the traced pairs, at 0 that on the
            empty-trace pairs. `"auto"`: [`DPOTrainer`] measures gradients of some rows when `train()` begins and takes the
            share whose expected error is smallest; the loss itself cannot be called before.
        base (`str`, *optional*, defaults to `"sigmoid"`):
            The base loss: `"sigmoid"`, `"ipo"`, `"hinge"` or the name of a registered pair loss, which reads its columns
            for both pairs.
        base_kwargs (`dict[str, Any]`, *optional*, defaults to `{}`):
            Hyper-parameters of the base, by their names; those left out have its defaults.
    """

    paper: ClassVar[str] = "2510.05095"
    title: ClassVar[str] = (
        "From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for Aligning Large Reasoning Models"
    )
    citation: ClassVar[str] = """\
@article{zhu2025noisy,
    title        = {{From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for Aligning Large Reasoning Models}},
    author       = {Zhu and Chen and Yu and Zhao and Jia},
    year         = 2025,
    eprint       = {arXiv:2510.05095},
}"""
    evidence: ClassVar[str] = (
        "The formula and `alpha` of 0.5 are those of reviews of the paper (third party); no code of the authors is public."
    )
    columns: ClassVar[tuple[str, ...]] = ("chosen_empty_trace", "rejected_empty_trace")

    alpha: float | str = 0.5
    base: str = "sigmoid"
    base_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.alpha, str):
            if self.alpha != "auto":
                raise ValueError(
                    f"bias_variance: `alpha={self.alpha!r}` is a str; expected float in [0, 1], or 'auto'."
                )
        elif not 0 <= self.alpha <= 1:
            raise ValueError(f"bias_variance: `alpha={self.alpha}` must lie in [0, 1].")
        _ = self.base_loss  # what is wrong with it is an error now, not at the first step

    @cached_property
    def base_loss(self) -> Any:
        """The loss on one pair: a callable from [`PreferenceBatch`] to shape `(B,)`."""
        if self.base in PLAIN_LOSSES:
            if self.base_kwargs:
                raise ValueError(
                    f"bias_variance: `base_kwargs={self.base_kwargs}` would be ignored: `base={self.base!r}` is TRL's own and has "
                    "no hyper-parameters."
                )
            return PLAIN_LOSSES[self.base]
        name = resolve_name(self.base, also=PLAIN_LOSSES)
        if name == "bias_variance":
            raise ValueError("bias_variance: `base` cannot be 'bias_variance' itself.")
        try:
            loss = get_loss(name, **self.base_kwargs)
        except ValueError as error:
            raise ValueError(
                f"bias_variance: `base={self.base!r}` with `base_kwargs={self.base_kwargs}`: {error}"
            ) from error
        beyond = [f"reads {what!r}" for what in sorted(set(loss.reads) - {"ref_logps"})]
        if loss.init_state():
            beyond.append("keeps state")
        if beyond:
            raise ValueError(
                f"bias_variance: `base={self.base!r}` {' and '.join(beyond)}, but the mixture gives its base one log-probability "
                "per completion and no state. Choose another base."
            )
        return loss

    @property
    def required_columns(self) -> tuple[str, ...]:
        return self.columns + self.base_loss.required_columns

    @property
    def optional_columns(self) -> tuple[str, ...]:
        return self.base_loss.optional_columns

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(self.base_loss.reads)

    @property
    def takes_lists(self) -> bool:
        return self.base_loss.takes_lists

    @property
    def divides_by_beta(self) -> bool:
        return self.base_loss.divides_by_beta

    @property
    def reads_beta(self) -> bool:
        return self.base_loss.reads_beta

    def remark(self, columns):
        return self.base_loss.remark(columns)

    def check_columns(self, columns):
        return self.base_loss.check_columns(columns)

    @property
    def column_help(self) -> str:
        return self.base_loss.column_help

    def __call__(self, batch: PreferenceBatch) -> torch.Tensor:
        empty = batch.empty_trace
        if empty is None:
            raise ValueError(
                "bias_variance needs the empty-trace pair: set `PreferenceBatch.empty_trace`, or give the dataset the "
                f"columns {list(self.columns)}."
            )
        if self.alpha == "auto":
            raise ValueError(
                "bias_variance: `alpha='auto'` is measured by the trainer before training (`trl_ext.trainers.mixing."
                "estimate_alpha`); here it has no value yet."
            )
        traced = torch.where(present(batch), self.base_loss(batch), 0)
        return self.alpha * traced + (1 - self.alpha) * torch.where(present(empty), self.base_loss(empty), 0)

    def metrics(self, batch: PreferenceBatch) -> dict[str, float | torch.Tensor]:
        empty = batch.empty_trace
        there = present(empty)
        share = {"empty_trace/share": there.float()}
        if "ref_logps" not in self.reads:
            return share
        delta = torch.where(there, empty.delta.detach(), torch.nan)
        return {
            "empty_trace/margins": empty.beta * delta,
            "empty_trace/accuracies": torch.where(there, (delta > 0).float(), torch.nan),
            **share,
        }


def present(batch: PreferenceBatch) -> torch.Tensor:
    """Rows whose two completions have tokens left after truncation, shape `(B,)`."""
    return (batch.chosen_lengths > 0) & (batch.rejected_lengths > 0)
