"""Length: how much it decides in data and in a model, and the win rate with its share taken out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .intervals import bootstrap, columns_of, mean_interval, normal_quantile, values_of, wilson


def length_bias(
    chosen_lengths: Any, rejected_lengths: Any, margins: Any = None, confidence: float = 0.95
) -> dict[str, float]:
    """
    Whether longer answers win: in data, and with `margins` for a model.

    Args:
        chosen_lengths (`Sequence[float]` of length `N`):
            Length of each chosen completion, in any unit (tokens, characters).
        rejected_lengths (`Sequence[float]` of length `N`):
            Length of each rejected one.
        margins (`Sequence[float]` of length `N`, *optional*):
            Of a model: its reward of the chosen less that of the rejected completion (implicit rewards of a policy, a reward model's).
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the intervals.

    Returns:
        `dict[str, float]`:

        - `longer_chosen`: share of pairs whose chosen completion is the longer one; equal lengths count half. 0.5 is no bias. With
          `_low` and `_high`, Wilson's interval;
        - `length_gap`: mean of chosen less rejected length;
        - `length_correlation`, with `margins`: Pearson's correlation of gap and margin, in [-1, 1], NaN where one of the two never
          changes. With `_low` and `_high`, a bootstrap interval;
        - `longer_preferred`, with `margins`: share of pairs, as above, in which the model prefers the longer one.

    Raises:
        `ValueError`: For values that are missing or not finite, and for arguments of different lengths.
    """
    chosen, rejected = columns_of(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    gaps = chosen - rejected
    longer = ((gaps > 0).double() + 0.5 * (gaps == 0)).mean().item()
    low, high = wilson(longer, len(gaps), confidence)
    found = {
        "longer_chosen": longer,
        "longer_chosen_low": low,
        "longer_chosen_high": high,
        "length_gap": gaps.mean().item(),
    }
    if margins is None:
        return found
    _, margins = columns_of(chosen_lengths=chosen_lengths, margins=margins)
    low, high = bootstrap(_correlation, [gaps, margins], confidence)
    agree = (gaps * margins).sign()
    return found | {
        "length_correlation": _correlation(gaps, margins).item(),
        "length_correlation_low": low,
        "length_correlation_high": high,
        "longer_preferred": ((agree > 0).double() + 0.5 * (agree == 0)).mean().item(),
    }


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson's, over the last dimension."""
    # Equal values may differ from their mean by rounding, which would correlate with anything
    same = (a == a[..., :1]).all(dim=-1) | (b == b[..., :1]).all(dim=-1)
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    correlation = (a * b).sum(dim=-1) / (a.square().sum(dim=-1) * b.square().sum(dim=-1)).sqrt()
    return correlation.masked_fill(same, math.nan)


def length_controlled_win_rate(
    preferences: Any,
    len_output: Any,
    len_baseline: Any,
    instruction_difficulty: Any = None,
    steered_baselines: Sequence[Mapping[str, Any]] = (),
    confidence: float = 0.95,
) -> dict[str, float]:
    r"""
    The win rate that a model would have if its answers were as long as the baseline's: AlpacaEval 2's
    (https://huggingface.co/papers/2404.04475).

    A logistic regression explains each preference by the difference in length, how hard the instruction is, and the model; the
    term of the length is then left out, and the fitted probabilities are averaged:

        P(the model's answer is preferred) = sigmoid(w_len * tanh(d / s) + w_diff * difficulty + w_model)

    `d` is the baseline's length less the model's, and `s` the standard deviation of `d` over the model's rows.

    Args:
        preferences (`Sequence[float]` of length `N`):
            Probability, in [0, 1], that the model's answer is preferred to the baseline's; NaN where the judge gave none: such a row
            is left out of the fit, not of the average.
        len_output (`Sequence[float]` of length `N`):
            Length of the model's answer; AlpacaEval counts characters.
        len_baseline (`Sequence[float]` of length `N`):
            Length of the baseline's.
        instruction_difficulty (`Sequence[float]` of length `N`, *optional*):
            Of each instruction, as AlpacaEval estimates it: higher where models do better against the baseline. Without it that term
            is missing, and the result is not comparable with AlpacaEval's.
        steered_baselines (`Sequence[dict]`, *optional*):
            Regularisers: judgements of the baseline itself, asked to be verbose or concise, each with `preferences`, `len_output`,
            `len_baseline` and `instruction_difficulty`. They join the fit with a weight of 0.2 among them, and without `w_model`, so
            that quality cannot pass for length. AlpacaEval has two.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the interval.

    Returns:
        `dict[str, float]`:

        - `length_controlled_win_rate`: in [0, 1]. With `_low` and `_high`, a normal interval, cut at 0 and 1;
        - `standard_error`: of the mean of the fitted probabilities, as AlpacaEval reports it. That the weights are fitted is not in it;
        - `win_rate`: the mean preference;
        - `length_weight`: `w_len`. Negative where longer answers win;
        - `average_length`: of the model's answers.

    Raises:
        `ValueError`: For values that are missing, not finite or no probabilities, and for arguments of different lengths.

    AlpacaEval adds an L1 penalty of a strength that it cross-validates; the one chosen is weak, and leaving it out changes its published
    results by less than 0.2 points of 100.
    """
    rows = _Judged(preferences, len_output, len_baseline, instruction_difficulty, "")
    steered = [
        _Judged(
            each["preferences"],
            each["len_output"],
            each["len_baseline"],
            each.get("instruction_difficulty"),
            f"steered_baselines[{number}].",
        )
        for number, each in enumerate(steered_baselines)
    ]
    if any((each.difficulty is None) != (rows.difficulty is None) for each in steered):
        raise ValueError(
            "`instruction_difficulty` must be given for the model and for all steered baselines, or for none."
        )
    if rows.there.sum() == 0:
        raise ValueError("`preferences` holds no preference: all rows are NaN.")
    fitted = [rows, *steered]
    features = torch.cat([each.features(own=each is rows)[each.there] for each in fitted])
    targets = torch.cat([each.preferences[each.there] for each in fitted])
    weights = torch.cat(
        [torch.full((int(each.there.sum()),), 1.0 if each is rows else 0.2 / len(steered)) for each in fitted]
    ).double()
    coefficients = _logistic(features, targets, weights)
    controlled = rows.features(own=True)
    controlled[:, 0] = 0
    probabilities = (controlled @ coefficients).sigmoid()
    rate = probabilities.mean().item()
    error, _, _ = mean_interval(probabilities, confidence)
    reach = normal_quantile(confidence) * error
    return {
        "length_controlled_win_rate": rate,
        "length_controlled_win_rate_low": max(rate - reach, 0.0),
        "length_controlled_win_rate_high": min(rate + reach, 1.0),
        "standard_error": error,
        "win_rate": rows.preferences[rows.there].mean().item(),
        "length_weight": coefficients[0].item(),
        "average_length": rows.len_output.mean().item(),
    }


class _Judged:
    """Judgements of one model's answers, checked."""

    def __init__(self, preferences: Any, len_output: Any, len_baseline: Any, difficulty: Any, name: str):
        self.preferences = values_of(f"{name}preferences", preferences, 0, 1, missing=True)
        given = {f"{name}len_output": len_output, f"{name}len_baseline": len_baseline}
        if difficulty is not None:
            given[f"{name}instruction_difficulty"] = difficulty
        columns = [torch.nan_to_num(self.preferences), *columns_of(**given)]
        if len({len(column) for column in columns}) > 1:
            raise ValueError(
                f"`{name}preferences` has {len(columns[0])} rows, and {list(given)} have {len(columns[1])}."
            )
        self.len_output, len_baseline = columns[1:3]
        self.difficulty = columns[3] if difficulty is not None else None
        self.there = ~self.preferences.isnan()
        gaps = len_baseline - self.len_output
        deviation = gaps.std() if len(gaps) > 1 else gaps.new_zeros(())
        # Where all differences are alike, length can explain nothing
        self.length = torch.tanh(gaps / deviation) if deviation > 0 else torch.zeros_like(gaps)

    def features(self, own: bool) -> torch.Tensor:
        """Length, whether the model is the one that is asked about, and difficulty; shape `(N, 2)` or `(N, 3)`."""
        columns = [self.length, torch.full_like(self.length, float(own))]
        return torch.stack([*columns, *([] if self.difficulty is None else [self.difficulty])], dim=1)


def _logistic(features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Weights of a logistic regression on probabilities as targets, by Newton's method; shape `(F,)`.

    Where the data separates perfectly the weights grow without end; they stop where they change nothing any more.
    """
    coefficients = features.new_zeros(features.shape[1])
    # A feature that is constantly 0 has no curvature
    least = 1e-12 * weights.sum() * torch.eye(len(coefficients), dtype=features.dtype)
    for _ in range(100):
        fitted = (features @ coefficients).sigmoid()
        gradient = features.T @ (weights * (fitted - targets))
        if gradient.abs().max() < 1e-9 * weights.sum() * features.abs().max():
            return coefficients
        curvature = features.T @ (features * (weights * fitted * (1 - fitted)).unsqueeze(1))
        coefficients = coefficients - torch.linalg.solve(curvature + least, gradient)
    raise ValueError(
        "The logistic regression of preferences on lengths found no optimum: do a few rows have extreme values?"
    )
