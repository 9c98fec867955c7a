"""From rows to token log-probabilities: which head, and whether completions share their prompt's row."""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from accelerate.logging import get_logger
from accelerate.utils import extract_model_from_parallel, gather_object
from packaging.version import Version
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.trainer.utils import FusedCausalLMOutput

from trl_ext.logprobs import Divergence, Head, Sharing, completion_lengths, liger_head, scored_tokens, sum_completions
from trl_ext.rows import Rows, Scored
from trl_ext.trainers.self_check import is_sharded, why_differs
from trl_ext.trainers.shared_prompts import build_sharing
from trl_ext.trainers.trl_seam import fused_forward, head_in_place, map_rows


logger = get_logger(__name__)

LOGPROB_BACKENDS = ("auto", "liger", "torch", "trl")
# Before 0.8.4 the kernel counts the padding of its last block as logits where there is a soft cap
_LIGER = Version("0.8.4")


@dataclass
class Scorer:
    """
    Token log-probabilities of rows, in one call of the (wrapped) model.

    Attributes:
        head ([`Head`] or `None`):
            What projects hidden states; `None` for TRL's own.
        sharing ([`~trl_ext.logprobs.Sharing`] or `None`):
            Decides which batches are laid out in shared rows; `None` where none is. It becomes `None` when the first of them does
            not give what plain rows give.
        checked (`set[tuple[int, bool]]`):
            Models, by identity, that have been looked at in that way, and whether with gradients.
    """

    head: Head | None
    sharing: Sharing | None = None
    checked: set[tuple[int, bool]] = field(default_factory=set, init=False, repr=False, compare=False)

    def __call__(
        self,
        model: Callable,
        rows: Rows,
        statistics: tuple[str, ...] | None = None,
        router_logits: bool = False,
        divergence: Divergence | None = None,
    ) -> FusedCausalLMOutput:
        """
        Args:
            model (`Callable`):
                The model, wrapped for distributed training or not, with TRL's fused forward.
            rows ([`~trl_ext.rows.Rows`]):
                `N` rows, with a layout where prompts are shared.
            statistics (`tuple[str, ...]`, *optional*):
                Which of the statistics to compute; all that the model's head was asked for by default.
            router_logits (`bool`):
                Whether to ask a MoE model for its auxiliary loss.
            divergence ([`~trl_ext.logprobs.Divergence`], *optional*):
                What to compute of each token beside its log-probability, with numbers of shape `(N, T - 1)`. It comes back in the
                output's field [`~trl_ext.trainers.trl_seam.DIVERGENCE`].

        Returns:
            TRL's output, with fields of shape `(N, T - 1)` in either layout.

        Raises:
            `ValueError`: If prompts are always to be shared, and the model's first batch shows that this is not exact.
        """
        if self.sharing is not None:
            self._check(model, rows)
        if self.sharing is None:
            rows = dataclasses.replace(rows, layout=None)
        return self.forward(model, rows, statistics, router_logits, divergence)

    def _check(self, model: Callable, rows: Rows) -> None:
        """Compare both layouts, once per model, and once more when gradients are first wanted."""
        key = id(extract_model_from_parallel(model))
        if (key, True) in self.checked or (key, torch.is_grad_enabled()) in self.checked:
            return
        # Where each process has a part of the parameters, all of them run the model equally often, now and later
        sharded = is_sharded(model)
        if rows.layout is None and not sharded:
            return
        self.checked.add((key, torch.is_grad_enabled()))
        reason = why_differs(lambda *args: self.forward(*args, statistics=()).log_probs, model, rows, self.sharing)
        if sharded:
            reason = next((each for each in gather_object([reason]) if each is not None), None)
        if reason is None:
            return
        if self.sharing.always:
            raise ValueError(f"`share_prefix=True`, but rows that share a prompt are not exact: {reason}.")
        logger.warning(
            f"Completions do not share the row of their prompt: compared with plain rows on the first batch, {reason}. This costs "
            "speed, nothing else.",
            main_process_only=False,
        )
        self.sharing = None

    def forward(
        self,
        model: Callable,
        rows: Rows,
        statistics: tuple[str, ...] | None,
        router_logits: bool = False,
        divergence: Divergence | None = None,
    ) -> FusedCausalLMOutput:
        """One call of the model in the layout that the rows have, unchecked."""
        inputs, layout = rows.inputs, rows.layout
        if divergence is not None:
            divergence = dataclasses.replace(divergence, numbers=_as_scored(divergence.numbers, rows))
        head = contextlib.nullcontext() if self.head is None else head_in_place(self.head, statistics, divergence)
        if layout is None:
            with head:
                return fused_forward(model, {**inputs, "completion_mask": rows.completion_mask}, router_logits)
        slots = layout.slots.flatten()[layout.scored]
        labels = torch.full_like(layout.tokens, -100)
        labels.view(-1)[slots] = inputs["input_ids"][:, 1:].flatten()[layout.scored]
        with head, layout.masks():
            outputs = model(
                input_ids=inputs["input_ids"].flatten()[layout.tokens],
                attention_mask=torch.ones_like(layout.tokens),
                position_ids=layout.positions,
                shift_labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )

        def plain(field: torch.Tensor) -> torch.Tensor:
            empty = field.new_zeros(layout.slots.numel())
            return empty.scatter(0, layout.scored, field.flatten()[slots]).view(layout.slots.shape)

        return map_rows(outputs, plain)

    def scored(
        self,
        rows: Rows,
        token_logps: torch.Tensor,
        ref_token_logps: torch.Tensor | None,
        reads: Collection[str],
        ld_alpha: float | None = None,
    ) -> Scored:
        """
        The log-probabilities of completions, and what else the losses read.

        Args:
            rows ([`~trl_ext.rows.Rows`]):
                `N` rows.
            token_logps (`torch.Tensor` of shape `(N, T')`):
                Of the policy, as the model gave them.
            ref_token_logps (`torch.Tensor` of shape `(N, T')`, *optional*):
                Of the reference, where it was asked.
            reads (`Collection[str]`):
                What the losses read.
            ld_alpha (`float`, *optional*):
                Of LD-DPO.
        """
        mask = rows.completion_mask
        logps = sum_completions(token_logps, mask, ld_alpha, rows.partner)
        tokens = {}
        ref_logps = rows.ref_logps
        if ref_token_logps is not None:
            ref_logps = sum_completions(ref_token_logps, mask, ld_alpha, rows.partner)
        if "token_logps" in reads:
            tokens["token_logps"], scored = scored_tokens(token_logps, mask)
            tokens["turns"] = scored.long() - 1 if rows.turns is None else rows.turns[:, 1:]
            if ref_token_logps is not None:
                tokens["ref_token_logps"], _ = scored_tokens(ref_token_logps, mask)
        behaviour_logps = rows.behaviour_logps if "behaviour_logps" in reads else None
        return Scored(logps, completion_lengths(mask), ref_logps, behaviour_logps, **tokens)


def _as_scored(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Values `(N, T - 1)` of tokens as `(M,)` of those that are scored, in the order in which the head is given them."""
    if rows.layout is None:
        return values[rows.completion_mask[:, 1:] != 0]
    scored = rows.layout.scored
    return values.flatten()[scored[rows.layout.slots.flatten()[scored].argsort()]]


def build_scorer(
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    aux_loss: bool,
    reference: torch.nn.Module | None = None,
) -> Scorer:
    """
    The scorer that a config asks for.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        args ([`~transformers.TrainingArguments`]):
            Configuration of the trainer.
        aux_loss (`bool`):
            Whether the auxiliary loss of a mixture of experts is trained.
        reference (`torch.nn.Module`, *optional*):
            The reference model, where there is one of its own: it reads the same batches.

    Raises:
        `ValueError`: For a backend that cannot run here, or a shared prefix that would not be exact.
    """
    backend = resolve_backend(args)
    if backend == "trl":
        return Scorer(None)
    head = Head(backend, getattr(args, "logprob_memory_mb", None))
    return Scorer(head, build_sharing(model, args, aux_loss, reference))


def resolve_backend(args: TrainingArguments) -> str:
    """`"auto"` as what it stands for on this device; one that cannot run is a `ValueError`."""
    backend = getattr(args, "logprob_backend", "auto")
    device = args.device.type
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        if getattr(args, "use_weighting", False):
            return "trl"  # its Triton kernel computes the weights of WPO on the way
        if device not in ("cuda", "xpu"):
            return "torch"
        reason = _why_no_liger()
        if reason is not None:
            logger.warning(
                f"Log-probabilities are computed in torch, which is slower: {reason}. pip install -U liger-kernel"
            )
        return "torch" if reason else "liger"
    if backend != "trl" and getattr(args, "use_weighting", False):
        raise ValueError(
            f"`use_weighting=True` (WPO) needs `logprob_backend='trl'` or 'auto'; got `logprob_backend={backend!r}`."
        )
    if backend == "liger":
        reason = _why_no_liger()
        if reason is None and device == "cpu" and not interpreted:
            reason = "its Triton kernels need a GPU, and this run is on a CPU"
        if reason is not None:
            raise ValueError(f"`logprob_backend='liger'` cannot run: {reason}. Use 'auto' or 'torch'.")
    return backend


def _why_no_liger() -> str | None:
    try:
        version = Version(importlib.metadata.version("liger-kernel"))
    except importlib.metadata.PackageNotFoundError:
        return "liger-kernel is not installed"
    if version < _LIGER:
        return f"liger-kernel {version} is older than {_LIGER}, which the head needs"
    reason = liger_head.why_not()
    return f"liger-kernel {version} {reason}" if reason else None


def statistics_of_step(trainer: Trainer) -> tuple[str, ...] | None:
    """
    Which of the per-token statistics that feed TRL's metrics to compute: all of them (`None`) in evaluation and in a step that
    will be logged, else those that cost next to nothing.
    """
    args, state = trainer.args, trainer.state
    step = state.global_step + 1
    logged = {
        "no": False,
        "steps": step % state.logging_steps == 0 if state.logging_steps else True,
        "epoch": True,  # its last step is not known in advance
    }[str(getattr(args.logging_strategy, "value", args.logging_strategy))]
    if not trainer.model.training or logged or (args.logging_first_step and step == 1):
        return None
    capped = getattr(trainer.model.config.get_text_config(), "final_logit_softcapping", None) is not None
    return ("is_top1",) if capped else ("mean_logits", "is_top1")
