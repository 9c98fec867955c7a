"""How often a model or a judge prefers what it should: accuracy on pairs, win rates, calibration."""

import math
from typing import Any

import torch

from .intervals import bootstrap, columns_of, mean_interval, values_of, wilson


def preference_accuracy(chosen_rewards: Any, rejected_rewards: Any, confidence: float = 0.95) -> dict[str, float]:
    """
    How often the chosen completion has the higher reward, and by how much.

    Rewards may be a reward model's, or implicit ones of a policy: `beta` times its log-ratios to the reference.

    Args:
        chosen_rewards (`Sequence[float]` of length `N`):
            Reward of each chosen completion.
        rejected_rewards (`Sequence[float]` of length `N`):
            Reward of each rejected one.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the intervals.

    Returns:
        `dict[str, float]`:

        - `preference_accuracy`: share of pairs in the right order, in [0, 1]; a tie counts half. With `_low` and `_high`,
          Wilson's interval;
        - `margin`: mean of chosen less rejected reward. With `_low` and `_high`, a normal interval;
        - `ties`: share of pairs with equal rewards.

    Raises:
        `ValueError`: For values that are missing or not finite, and for arguments of different lengths.

    Example:

    ```python
    >>> from trl_ext.metrics import preference_accuracy

    >>> preference_accuracy([1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0])["preference_accuracy"]
    0.625
    ```
    """
    chosen, rejected = columns_of(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    margins = chosen - rejected
    accuracy = ((margins > 0).double() + 0.5 * (margins == 0)).mean().item()
    low, high = wilson(accuracy, len(margins), confidence)
    _, margin_low, margin_high = mean_interval(margins, confidence)
    return {
        "preference_accuracy": accuracy,
        "preference_accuracy_low": low,
        "preference_accuracy_high": high,
        "margin": margins.mean().item(),
        "margin_low": margin_low,
        "margin_high": margin_high,
        "ties": (margins == 0).double().mean().item(),
    }


def win_rate(preferences: Any, swapped_preferences: Any = None, confidence: float = 0.95) -> dict[str, float]:
    """
    How often a model's answers are preferred to a baseline's.

    Judges often prefer what stands first. With `swapped_preferences` each comparison is made in both orders and counts its mean.

    Args:
        preferences (`Sequence[float]` of length `N`):
            For each comparison the probability, in [0, 1], that the model's answer is preferred; 0.5 is a tie.
        swapped_preferences (`Sequence[float]` of length `N`, *optional*):
            The same comparisons with the answers in the other order, again the probability that the *model's* answer is preferred.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the interval.

    Returns:
        `dict[str, float]`:

        - `win_rate`: mean probability of winning, in [0, 1]. With `_low` and `_high`: Wilson's interval where each comparison was
          won, tied or lost, else a normal one, cut at 0 and 1;
        - `ties`: share of comparisons at 0.5;
        - `position_bias` and `consistency`, with `swapped_preferences`: how much higher the probability is in the first order,
          and the share of comparisons with the same winner in both.

    Raises:
        `ValueError`: For values that are no probabilities, and for arguments of different lengths.
    """
    first = values_of("preferences", preferences, 0, 1)
    found, values = {}, first
    if swapped_preferences is not None:
        columns_of(preferences=preferences, swapped_preferences=swapped_preferences)
        second = values_of("swapped_preferences", swapped_preferences, 0, 1)
        values = (first + second) / 2
        same = (first - 0.5).sign() == (second - 0.5).sign()
        found = {"position_bias": (first - second).mean().item(), "consistency": same.double().mean().item()}
    rate = values.mean().item()
    if bool(((values == 0) | (values == 1) | (values == 0.5)).all()) or len(values) < 2:
        low, high = wilson(rate, len(values), confidence)
    else:
        _, low, high = mean_interval(values, confidence)
    return {
        "win_rate": rate,
        "win_rate_low": max(low, 0.0),
        "win_rate_high": min(high, 1.0),
        "ties": (values == 0.5).double().mean().item(),
        **found,
    }


def calibration_error(margins: Any, bins: int = 10, confidence: float = 0.95) -> dict[str, float]:
    """
    Whether a model is as often right as it is sure: expected calibration error of implicit rewards.

    A margin `m` of rewards says that the chosen completion is the better one with probability `sigmoid(m)` (Bradley-Terry). A
    pair's confidence is `sigmoid(|m|)`, in [0.5, 1], and the model is right where `m > 0`; a tie is half right.

    Args:
        margins (`Sequence[float]` of length `N`):
            Chosen less rejected reward of each pair, in logits: of a policy `beta` times the difference of its log-ratios.
        bins (`int`, *optional*, defaults to `10`):
            Of equal width, over [0.5, 1].
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the interval of `calibration_error`.

    Returns:
        `dict[str, float]`:

        - `calibration_error`: mean over pairs of the gap between confidence and accuracy of their bin, in [0, 1] (Naeini et al. 2015).
          With `_low` and `_high`, a bootstrap interval. It is biased upwards where bins hold few pairs;
        - `overconfidence`: mean confidence less accuracy; negative for a model that is too careful;
        - `log_loss`: mean of `-log sigmoid(m)`, nats; `brier`: mean of `(1 - sigmoid(m))^2`.

    Raises:
        `ValueError`: For margins that are not finite, or no whole number of bins.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"`bins={bins!r}` must be a whole number, at least 1.")
    margins = values_of("margins", margins)
    sure = margins.abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0)
    place = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)

    def error(sure: torch.Tensor, right: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        gaps = torch.zeros(*sure.shape[:-1], bins, dtype=sure.dtype).scatter_add_(-1, place, sure - right)
        return gaps.abs().sum(dim=-1) / sure.shape[-1]

    low, high = bootstrap(error, [sure, right, place], confidence)
    return {
        "calibration_error": error(sure, right, place).item(),
        "calibration_error_low": low,
        "calibration_error_high": high,
        "overconfidence": (sure - right).mean().item(),
        "log_loss": torch.nn.functional.softplus(-margins).mean().item(),
        "brier": ((1 - margins.sigmoid()) ** 2).mean().item(),
    }


def kl_to_reference(logps: Any, ref_logps: Any, lengths: Any = None, confidence: float = 0.95) -> dict[str, float]:
    """
    How far a policy is from its reference, estimated from completions that the policy has sampled.

    Args:
        logps (`Sequence[float]` of length `N`):
            Log-probability of each sampled completion under the policy: the sum over its tokens, nats. Completions must be drawn
            from the policy itself, at temperature 1 and without cut-offs; those of a dataset give no KL.
        ref_logps (`Sequence[float]` of length `N`):
            The same under the reference.
        lengths (`Sequence[float]` of length `N`, *optional*):
            Tokens of each completion.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of the interval.

    Returns:
        `dict[str, float]`:

        - `kl_to_reference`: mean of the log-ratios, nats per completion: unbiased, and with few samples perhaps negative. With
          `_low` and `_high`, a normal interval;
        - `standard_error`: of that mean, NaN of a single completion;
        - `kl_per_token`, with `lengths`: nats per token, the sum of log-ratios over that of lengths.

    Raises:
        `ValueError`: For values that are missing or not finite, and for arguments of different lengths.
    """
    policy, reference = columns_of(logps=logps, ref_logps=ref_logps)
    ratios = policy - reference
    error, low, high = mean_interval(ratios, confidence)
    found = {
        "kl_to_reference": ratios.mean().item(),
        "kl_to_reference_low": low,
        "kl_to_reference_high": high,
        "standard_error": error,
    }
    if lengths is not None:
        tokens = values_of("lengths", lengths, 0)
        columns_of(logps=logps, lengths=lengths)
        found["kl_per_token"] = (ratios.sum() / tokens.sum()).item() if tokens.sum() else math.nan
    return found
