"""Batches for the loss tests, and TRL's own formulas on them."""

import dataclasses
import inspect
import textwrap
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import trl

from trl_ext import GroupBatch, PreferenceBatch
from trl_ext.losses import TokenBatch


def pairs(deltas, *, lengths=None, beta=0.1, dtype=torch.float64, requires_grad=False, **columns) -> PreferenceBatch:
    """A batch whose `delta` is `deltas`: log-ratios of 0.5 more and 0.5 less than half of it."""
    delta = torch.tensor(deltas, dtype=dtype)
    ref = torch.linspace(-20, -10, len(delta), dtype=dtype)
    chosen = (ref + delta / 2 + 0.5).requires_grad_(requires_grad)
    rejected = (ref - delta / 2 + 0.5).requires_grad_(requires_grad)
    n_chosen, n_rejected = lengths or ([7] * len(delta), [7] * len(delta))
    columns = {
        name: value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in columns.items()
    }
    return PreferenceBatch(
        chosen,
        rejected,
        ref,
        ref.clone(),
        torch.tensor(n_chosen),
        torch.tensor(n_rejected),
        beta=beta,
        columns=columns,
    )


def alone(chosen, rejected, lengths, *, beta=2.0, dtype=torch.float64) -> PreferenceBatch:
    """A batch of these sums of log-probs under the policy, with gradients, and no reference."""
    sums = [torch.tensor(side, dtype=dtype, requires_grad=True) for side in (chosen, rejected)]
    return PreferenceBatch(*sums, None, None, *map(torch.tensor, lengths), beta=beta)


def token_batch(chosen, rejected, chosen_turns, rejected_turns, *, ref=None, beta=0.1, dtype=torch.float64):
    """A batch of completions with these log-ratios, or log-probs beside `ref`, of their tokens; gradients flow to the tokens."""
    sides = [torch.as_tensor(side, dtype=dtype).clone().requires_grad_() for side in (chosen, rejected)]
    turns = [torch.as_tensor(side) for side in (chosen_turns, rejected_turns)]
    ref = torch.zeros_like(sides[0]) if ref is None else ref
    refs = [ref * (side >= 0) for side in turns]
    sums = [values.sum(dim=1) for values in (*sides, *refs)]
    lengths = [(side >= 0).sum(dim=1) for side in turns]
    return PreferenceBatch(*sums, *lengths, beta=beta, tokens=TokenBatch(*sides, *refs, *turns))


def with_tokens(batch: PreferenceBatch) -> PreferenceBatch:
    """The batch with tokens that have its sums: three quarters and a quarter of each, in two turns and in one."""

    def split(sums):
        return None if sums is None else torch.stack([sums * 0.75, torch.zeros_like(sums), sums * 0.25], dim=1)

    fields = (batch.chosen_logps, batch.rejected_logps, batch.ref_chosen_logps, batch.ref_rejected_logps)
    turns = [torch.tensor(row).expand(len(batch.chosen_logps), 3) for row in ([0, -1, 1], [0, -1, 0])]
    return dataclasses.replace(batch, tokens=TokenBatch(*map(split, fields), *turns))


def group(logratios, scores, mask=None, *, beta=0.1, dtype=torch.float64) -> GroupBatch:
    """Groups of completions with the given log-ratios."""
    logratios = torch.tensor(logratios, dtype=dtype)
    ref = torch.full_like(logratios, -12.0)
    mask = torch.ones_like(logratios, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return GroupBatch(
        (ref + logratios).requires_grad_(),
        ref,
        torch.full_like(logratios, 5),
        torch.tensor(scores, dtype=dtype),
        mask,
        beta,
    )


def sampled(logps, scores, lengths, *, ref=None, old=None, mask=None, beta=0.1, dtype=torch.float64) -> GroupBatch:
    """Groups with their log-probs under the policy, with gradients, the reference and the policy that sampled, the same by default."""
    values = [torch.tensor(logps if each is None else each, dtype=dtype) for each in (logps, ref, old)]
    mask = torch.ones_like(values[0], dtype=torch.bool) if mask is None else torch.tensor(mask)
    scores = torch.tensor(scores, dtype=torch.float32)
    return GroupBatch(
        values[0].requires_grad_(), values[1], torch.tensor(lengths), scores, mask, beta, behaviour_logps=values[2]
    )


def slope(loss, batch) -> torch.Tensor:
    """dL/d delta of each pair, by autograd: the derivative in the chosen log-prob."""
    (gradient,) = torch.autograd.grad(loss(batch).sum(), batch.chosen_logps, retain_graph=True)
    (opposite,) = torch.autograd.grad(loss(batch).sum(), batch.rejected_logps)
    torch.testing.assert_close(gradient, -opposite)
    return gradient


def trl_formula(loss_type, batch) -> torch.Tensor:
    """What the lines of TRL's trainer for one of its loss types give for a batch."""
    method = inspect.getsource(trl.DPOTrainer._compute_loss)
    branch = method.split(f'if loss_type == "{loss_type}":\n')[1].split("elif loss_type")[0]
    lengths = torch.cat([batch.chosen_lengths, batch.rejected_lengths])
    names = {
        "torch": torch,
        "F": F,
        "self": SimpleNamespace(beta=batch.beta),
        "chosen_logratios": batch.chosen_logratios,
        "rejected_logratios": batch.rejected_logratios,
        "chosen_scores": batch.chosen_logratios,
        "rejected_scores": batch.rejected_logratios,
        "delta_score": batch.delta,
        "completion_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(1),
    }
    exec(textwrap.dedent(branch), names)
    return names["per_sequence_loss"]
