"""Metrics of how a policy ranks given pairs: of its implicit rewards, `beta` times the log-ratios to the reference."""

from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import Trainer

from trl_ext.data.checks import TOKENIZED
from trl_ext.data.scores import check_texts
from trl_ext.trainers.trl_seam import tokenize_pairs

from .held_out import score_pairs, shared_out
from .length import length_bias
from .preferences import calibration_error, preference_accuracy


OF_PAIRS = ("preference_accuracy", "calibration_error", "length_bias")


class OnPairs:
    """Pairs, cut as those of the training, and what is measured of them. For the arguments see [`MetricsCallback`]."""

    def __init__(self, trainer: Trainer, metrics: Sequence[str], pairs: Dataset, batch_size: int):
        self.trainer, self.metrics, self.batch_size = trainer, metrics, batch_size
        check_texts(pairs, grouped=False)
        self.pairs = list(tokenize_pairs(pairs, trainer._tokenizer, trainer.args).select_columns(list(TOKENIZED)))
        limit = trainer.args.max_length
        full = [row for row, pair in enumerate(self.pairs) if limit and len(pair["prompt_ids"]) >= limit]
        if full:
            raise ValueError(
                f"In {len(full)} of {len(self.pairs)} `pairs` (the first in row {full[0]}) the prompt alone fills "
                f"`max_length={limit}`. Leave them out, or train with a larger one."
            )

    def measure(self) -> dict[str, float]:
        """All metrics by name. Called in every process."""
        rows = torch.tensor(
            shared_out(self.trainer, len(self.pairs), self.batch_size, self._measure), dtype=torch.float64
        )
        chosen, rejected, *lengths = rows.unbind(dim=1)
        found: dict[str, float] = {}
        if "preference_accuracy" in self.metrics:
            found |= preference_accuracy(chosen, rejected)
        if "calibration_error" in self.metrics:
            found |= calibration_error(chosen - rejected)
        if "length_bias" in self.metrics:
            found |= length_bias(*lengths, chosen - rejected)
        return found

    def _measure(self, part: list[int]) -> list[list[float]]:
        """Rewards of the chosen and the rejected completion of each pair, and their lengths in tokens."""
        scored, beta = score_pairs(self.trainer, [self.pairs[index] for index in part]), self.trainer.beta
        rewards = beta * (scored.logps - scored.ref_logps)
        return torch.stack([*rewards.double().chunk(2), *scored.lengths.double().chunk(2)], dim=1).tolist()
