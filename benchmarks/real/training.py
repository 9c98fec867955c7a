"""One run: a loss with one setting and one seed from the common start, measured on pairs that it has not seen."""

import copy
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from trl_ext import DPOConfig, DPOTrainer
from trl_ext.data.checks import REFERENCES, TOKENIZED
from trl_ext.metrics import calibration_error, length_bias, preference_accuracy

from .data import ABOUT, Size, load, log_probs, quiet
from .losses import Side


_loaded: dict[tuple[Path, float], Any] = {}


def start_of(folder: Path) -> Any:
    """What is prepared in a folder; read once in each process."""
    key = (folder, (folder / ABOUT).stat().st_mtime)
    if key not in _loaded:
        _loaded[key] = load(folder)
    return _loaded[key]


def columns_for(side: Side, pairs: Dataset) -> Dataset:
    """Token ids and the reference's log-probs, and of the other columns those that the loss reads, by the names it has for them."""
    # A column may be read under two names, so columns are made anew
    read = {name: pairs[stored][:] for name, stored in side.columns.items()}
    chosen = pairs.select_columns([*TOKENIZED, *(REFERENCES if side.reference else ())])
    for name, values in read.items():
        chosen = chosen.add_column(name, values)
    return chosen


def execute(folder: Path, side: Side, setting: dict[str, Any], seed: int, size: Size, split: str) -> dict[str, Any]:
    """Train, and measure on `split`."""
    start, tokenizer, pairs = start_of(folder)
    output = Path(tempfile.mkdtemp(prefix="real-data-"))
    try:
        trainer = DPOTrainer(
            model=copy.deepcopy(start),
            args=DPOConfig(
                **quiet(output), **setting, loss_type=side.name, max_steps=size.steps, per_device_train_batch_size=size.batch, seed=seed,
                max_length=None, precompute_ref_log_probs=side.reference, logging_steps=size.steps,
            ),
            train_dataset=columns_for(side, pairs["train"]),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
    finally:
        shutil.rmtree(output, ignore_errors=True)
    sums, lengths = log_probs(trainer.model, pairs[split])
    return measure(sums, lengths, pairs[split], side.scale(setting), side.per_token)


def measure(
    sums: torch.Tensor, lengths: torch.Tensor, pairs: Dataset, scale: float, per_token: bool
) -> dict[str, float]:
    """
    What is reported of a policy.

    Args:
        sums (`torch.Tensor` of shape `(N, 2)`): Log-probs of the chosen and the rejected completion, nats.
        lengths (`torch.Tensor` of shape `(N, 2)`): Their tokens.
        pairs ([`~datasets.Dataset`]): Given scores, and log-probs under the start.
        scale (`float`): What log-ratios are multiplied by.
        per_token (`bool`): Whether rewards are log-ratios per token.
    """
    started = torch.tensor([pairs[name][:] for name in REFERENCES], dtype=torch.float64).T
    ratios = sums - started
    rewards = scale * (ratios / lengths.clamp(min=1) if per_token else ratios)
    margins = rewards[:, 0] - rewards[:, 1]
    gaps = torch.tensor(pairs["score_chosen"][:], dtype=torch.float64) - torch.tensor(pairs["score_rejected"][:])
    ranked = preference_accuracy(rewards[:, 0], rewards[:, 1])
    length = length_bias(lengths[:, 0], lengths[:, 1], margins)
    sure = calibration_error(margins)
    found = {
        "accuracy": ranked["preference_accuracy"],
        "accuracy_pairs_low": ranked["preference_accuracy_low"],
        "accuracy_pairs_high": ranked["preference_accuracy_high"],
        "accuracy_sums": preference_accuracy(ratios[:, 0], ratios[:, 1])["preference_accuracy"],
        "margin": ranked["margin"],
        "score_correlation": torch.corrcoef(torch.stack([margins, gaps]))[0, 1].item(),
        "length_correlation": length["length_correlation"],
        "longer_preferred": length["longer_preferred"],
        "calibration_error": sure["calibration_error"],
        "overconfidence": sure["overconfidence"],
        "chosen_logratio": ratios[:, 0].mean().item(),
    }
    return {name: None if math.isnan(value) else value for name, value in found.items()}
