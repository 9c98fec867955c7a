"""From logits to the next tokens, until each completion has ended."""

import torch
from transformers import LogitsProcessor


class DrawToken(LogitsProcessor):
    """
    Draws each row's next token and leaves it as the only one.

    By inversion of the distribution function, which on a CPU costs a fraction of `torch.multinomial`: that draws a random
    number for each entry of the vocabulary.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulated = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        point = torch.rand_like(total) * total
        point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
        # The first entry above the point: never one of probability 0
        token = torch.searchsorted(cumulated, point, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def decode_on_cpu(model, input_ids, logits_processor=None, generation_config=None, **kwargs):
    """
    transformers' own loop with [`DrawToken`] in place of its draw.

    `generate` hands a loop that is not its own no `synced_gpus`, so [`sample`] does.
    """
    if generation_config.do_sample:
        generation_config.do_sample = False  # a copy of the caller's
        logits_processor.append(DrawToken())
    return type(model)._sample(
        model, input_ids, logits_processor=logits_processor, generation_config=generation_config, **kwargs
    )
