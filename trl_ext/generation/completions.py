"""What was sampled."""

from dataclasses import dataclass

import torch


@dataclass
class Completions:
    """
    `K` completions of each of `B` prompts, in blocks: completion `k` of prompt `b` is number `k B + b`.

    Attributes:
        prompts (`list`):
            The `B` prompts as the dataset has them.
        texts (`list`):
            The completions as reward functions see them: strings, or lists of one message.
        prompt_ids (`list[torch.Tensor]`):
            Tokens of each prompt.
        ids (`list[torch.Tensor]`):
            Tokens of each completion, the end-of-sequence token included where there is one.
        ended (`torch.Tensor` of shape `(K B,)`):
            Whether the completion ended by itself.
        vision (`dict`, *optional*):
            Image tensors, repeated for each completion.
    """

    prompts: list
    texts: list
    prompt_ids: list[torch.Tensor]
    ids: list[torch.Tensor]
    ended: torch.Tensor
    vision: dict[str, torch.Tensor] | None = None
