"""The slow, plain way to what a loss is given: each completion alone after its prompt, from full logits in float64."""

import dataclasses

import pytest
import torch

from trl_ext import PreferenceBatch
from trl_ext.losses import TokenBatch


def token_logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probability of each token of a completion, in nats, without padding, masks or a batch."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def pair_logps(model, example: dict, ld_alpha: float | None = None) -> list[torch.Tensor]:
    """Of the chosen and of the rejected completion; with LD-DPO what goes beyond the shorter one counts `ld_alpha` times."""
    sides = [token_logps(model, example["prompt_ids"], example[f"{side}_ids"]) for side in ("chosen", "rejected")]
    shorter = min(map(len, sides))
    rest = 1.0 if ld_alpha is None else ld_alpha
    return [side[:shorter].sum() + rest * side[shorter:].sum() for side in sides]


def pair_batch(policy, reference, examples, beta=0.1, columns=None, ld_alpha=None, **fields) -> PreferenceBatch:
    """What a loss on pairs should see of tokenized examples; the policy keeps its gradient."""
    logps = torch.stack([torch.stack(pair_logps(policy, example, ld_alpha)) for example in examples])
    with torch.no_grad():
        ref = torch.stack([torch.stack(pair_logps(reference, example, ld_alpha)) for example in examples])
    lengths = torch.tensor([[len(example[f"{side}_ids"]) for side in ("chosen", "rejected")] for example in examples])
    sides = (*logps.unbind(1), *ref.unbind(1), *lengths.unbind(1))
    return PreferenceBatch(*sides, beta=beta, columns=columns or {}, **fields)


def one_turn(batch: PreferenceBatch) -> PreferenceBatch:
    """The batch with each completion as one token of one turn."""
    fields = (batch.chosen_logps, batch.rejected_logps, batch.ref_chosen_logps, batch.ref_rejected_logps)
    turns = torch.zeros(len(batch.chosen_logps), 1, dtype=torch.long)
    return dataclasses.replace(batch, tokens=TokenBatch(*(field[:, None] for field in fields), turns, turns))


def assert_equals_plain(
    loss: torch.Tensor, gradients: dict[str, torch.Tensor], expected: torch.Tensor, policy
) -> None:
    """A loss and its gradients are those of `expected`, which was computed with `policy` in float64."""
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(parameter.grad.abs().max().item() for parameter in policy.parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(
            gradients[name].double(), parameter.grad, rtol=1e-4, atol=3e-6 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
