"""Reward models that are trained with Eurus' absolute terms beside Bradley-Terry."""

import math

import pytest
import torch
import trl
from datasets import Dataset

from tests.conftest import preference_rows
from trl_ext.trainers.reward import RewardConfig, RewardTrainer


def test_eurus_terms(tiny_model_dir, tmp_path):
    pairs = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(6)])
    losses = []
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 1,
        "seed": 3,
    }
    for args in (
        trl.RewardConfig(**options),
        RewardConfig(**options),
        RewardConfig(**options, absolute_weight=0.5),
    ):
        torch.manual_seed(0)
        trainer = RewardTrainer(model=str(tiny_model_dir), args=args, train_dataset=pairs)
        inputs = next(iter(trainer.get_train_dataloader()))
        loss, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        losses.append(loss.item())
        trainer.model.eval()
        assert trainer.compute_loss(trainer.model, dict(inputs)).item() == pytest.approx(loss.item(), rel=1e-5)
    rewards = outputs.logits.double().flatten().tolist()
    of_pairs = list(zip(rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :], strict=True))
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731  (-log sigmoid(-x))
    plain = sum(softplus(r - c) for c, r in of_pairs) / len(of_pairs)
    absolute = sum(softplus(-c) + softplus(r) for c, r in of_pairs) / len(of_pairs)
    assert losses == pytest.approx([plain, plain, plain + 0.5 * absolute], rel=1e-5)
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            RewardConfig(output_dir=str(tmp_path), absolute_weight=value, use_cpu=True, bf16=False)
