"""Reward models: TRL's trainer, with Eurus' absolute terms."""

from dataclasses import dataclass, field

import torch.nn.functional as F
import trl


@dataclass
class RewardConfig(trl.RewardConfig):
    """
    Configuration of [`RewardTrainer`]: all of [`trl.RewardConfig`], and one option more.

    Parameters:
        absolute_weight (`float`, *optional*, defaults to `0.0`):
            Weight of `-log sigmoid(r_chosen) - log sigmoid(-r_rejected)` beside Bradley-Terry: rewards of chosen completions are
            pushed above 0, those of rejected ones below (Eurus, https://huggingface.co/papers/2404.02078; 1.0 there).
    """

    absolute_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of Eurus' absolute terms, which push chosen rewards above 0 and rejected ones below."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.absolute_weight < float("inf"):
            raise ValueError(f"`absolute_weight={self.absolute_weight!r}` must be finite and at least 0.")


class RewardTrainer(trl.RewardTrainer):
    """[`trl.RewardTrainer`] with the option of [`RewardConfig`]."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        weight = getattr(self.args, "absolute_weight", 0.0)
        if weight:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            loss = loss - weight * (F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()
        return (loss, outputs) if return_outputs else loss
