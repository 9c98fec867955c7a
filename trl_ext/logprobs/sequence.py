"""From the log-probabilities of tokens to those of completions."""

import torch


def completion_lengths(completion_mask: torch.Tensor) -> torch.Tensor:
    """Number of scored tokens of each sequence, shape `(N,)`; the first position of a row is never scored."""
    return completion_mask[:, 1:].sum(dim=1)


def sum_completions(
    token_logps: torch.Tensor,
    completion_mask: torch.Tensor,
    ld_alpha: float | None = None,
    partner: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Log-probability of each completion.

    Args:
        token_logps (`torch.Tensor` of shape `(N, T')`):
            Log-probability of each next token, in nats. Virtual tokens that prompt-learning PEFT puts in front make `T'`
            larger than `T - 1`; they are left out. What stands outside the completion is not counted; it must be finite.
        completion_mask (`torch.Tensor` of shape `(N, T)`):
            1 at the tokens of the completion.
        ld_alpha (`float`, *optional*):
            LD-DPO: weight of the tokens beyond the length that both completions of a pair have.
        partner (`torch.Tensor` of shape `(N,)`, *optional*):
            The other row of each row's pair, for `ld_alpha`.

    Returns:
        `torch.Tensor` of shape `(N,)`: sums over the completion tokens, in nats.
    """
    token_logps, mask = scored_tokens(token_logps, completion_mask)
    if ld_alpha is None:
        return token_logps.sum(dim=1)
    lengths = mask.sum(dim=1)
    shared = torch.minimum(lengths, lengths[partner])
    head = mask.cumsum(dim=1) <= shared.unsqueeze(1)
    return (token_logps * head).sum(dim=1) + ld_alpha * (token_logps * ~head).sum(dim=1)


def scored_tokens(token_logps: torch.Tensor, completion_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the next tokens without virtual ones, 0 where none is scored, and their mask; `(N, T - 1)` both."""
    mask = completion_mask[:, 1:]
    return token_logps[:, token_logps.size(1) - mask.size(1) :] * mask, mask
