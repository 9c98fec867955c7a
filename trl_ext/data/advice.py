"""
Which losses a dataset suggests, why, and what to begin with: rules, each with where it comes from.

A rule looks at columns, margins and lengths alone. What was measured is quoted from `benchmarks/results/quality_toy.md`, a small
world; what a paper or its authors' code begins with is named by its arXiv id.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from trl_ext.data.calibration import fit_temperature
from trl_ext.data.columns import SCORES, checked, list_lengths, used_columns
from trl_ext.data.groups import BEHAVIOUR_LOGPS, is_grouped
from trl_ext.losses import get_loss


REPORT = "benchmarks/results/quality_toy.md"
# Rows of the report: what was measured, its effect and the ends of its 95 % interval
MEASURED = {
    "groups": ("true reward, anchored, groups less anchored (no noise)", 0.107, 0.016, 0.198),
    "empty traces": (
        "share by which the gradient's variance is smaller at alpha 0.5 than with traces alone", 0.450, 0.226, 0.674,
    ),
    "annotators": ("rank correlation of estimated and true reliability, mean over settings", 0.771, 0.595, 0.947),
    "annotators' policy": ("true reward, robust_em less DPO", -0.091, -0.201, 0.019),
    "offset, few": ("true reward, offset less DPO (96 pairs)", 0.089, 0.042, 0.137),
    "offset, many": ("true reward, offset less DPO (640 pairs)", -0.050, -0.090, -0.009),
    "anchored, flipped": ("true reward, anchored less DPO (20 % flipped)", 0.160, -0.069, 0.389),
    "length": ("tokens saved by length_regularized beside plain DPO, at equal KL", 12.19, 9.17, 15.22),
    "margin_adaptive": ("true reward, margin_adaptive less DPO (bad data)", 0.091, 0.010, 0.173),
}  # fmt: skip
# Between the 96 pairs with which `offset` was ahead of DPO and the 640 with which it was behind: their geometric mean
FEW_PAIRS = 248
# More different scores are no levels
MOST_LEVELS = 10
# The longer answer wins too often from here on, if chance alone would not do it
LONGER_WINS = 0.55


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """
    Attributes:
        loss (`str`): The `loss_type`; `"any"` for what goes with all of them.
        why (`str`): What in the data suggests it.
        settings (`dict[str, Any]`): Fields of `DPOConfig` to begin with.
        sources (`list[str]`): Where the rule and the settings come from.
    """

    loss: str
    why: str
    settings: dict[str, Any]
    sources: list[str]

    def flags(self) -> str:
        """The suggestion as options of the command line."""
        loss = {} if self.loss == "any" else {"loss_type": self.loss}
        return " ".join(
            f"--{name} " + (f"'{json.dumps(value)}'" if isinstance(value, dict) else str(value))
            for name, value in {**loss, **self.settings}.items()
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """
    What the rules look at.

    Attributes:
        pairs ([`~datasets.Dataset`]): Pairs; of groups the best against the worst.
        columns (`Sequence[str]`): Of the data as it was given.
        losses (`Mapping[str, str]`): For each loss, `""` if the data can train it, else why not.
        margins (`Sequence[float]`): Score of the chosen minus that of the rejected completion.
        lengths (`Mapping[str, Sequence[int]]`): Of prompts, chosen and rejected completions.
        unit (`str`): Of lengths, `"tokens"` or `"words"`.
        levels (`int`): How many different scores there are in groups; 0 for pairs.
    """

    pairs: Dataset
    columns: Sequence[str]
    losses: Mapping[str, str]
    margins: Sequence[float]
    lengths: Mapping[str, Sequence[int]]
    unit: str
    levels: int = 0


def advise(data: Data) -> list[Suggestion]:
    """What to try, the most specific first, plain DPO to compare with and what goes with any loss at the end."""
    rules = (
        _groups, _levels, _empty_traces, _steps, _probabilities, _several_rewards, _annotators, _contradicted, _few_scored,
        _length_bias, _many_scored,
    )  # fmt: skip
    found = [suggestion for rule in rules if (suggestion := rule(data)) is not None]
    return [each for each in found if _can(data, each)] + [_plain(data), _any(data)]


def _can(data: Data, suggestion: Suggestion) -> bool:
    return not why_not(suggestion.loss, data.pairs, data.columns, suggestion.settings.get("loss_kwargs"))


def _measured(name: str) -> str:
    what, effect, low, high = MEASURED[name]
    return f"{REPORT}: {what}: {effect:+.2f} [{low:.2f}, {high:.2f}]"


def _groups(data: Data) -> Suggestion | None:
    if not is_grouped(data.columns):
        return None
    return Suggestion(
        "anchored",
        "Groups of scored completions: it learns from all of a group, where other losses see the best and the worst.",
        {"loss_kwargs": {"standardize": True, "beta_r": 0.5}},
        ["2510.18913 and its authors' code: softmax of z-scores over 0.5", _measured("groups")],
    )


def _levels(data: Data) -> Suggestion | None:
    """Groups whose log-probs under the policy that sampled them are there."""
    if BEHAVIOUR_LOGPS not in data.columns or not 2 <= data.levels <= MOST_LEVELS:
        return None
    if data.levels == 2:
        why = f"Groups with `{BEHAVIOUR_LOGPS}` and two scores: answers are right or wrong, and short right ones count more."
        return Suggestion("drpo", why, {}, ["2510.04474 and its authors' code: the defaults"])
    why = f"Groups with `{BEHAVIOUR_LOGPS}` and {data.levels} levels of scores: each two are told apart, near the policy that sampled."
    return Suggestion("trpa", why, {"beta": 0.1}, ["2504.04524 and its authors' code: the defaults, beta 0.1"])


def _empty_traces(data: Data) -> Suggestion | None:
    if "chosen_empty_trace" not in data.columns:
        return None
    return Suggestion(
        "bias_variance",
        "Beside pairs with reasoning traces stand pairs without: a mix of both has gradients with less noise.",
        {"loss_kwargs": {"alpha": 0.5}},
        ["2510.05095: 0.5 in all experiments", _measured("empty traces")],
    )


def _steps(data: Data) -> Suggestion | None:
    if "q_chosen" not in data.columns or data.losses["step_apo"]:
        return None
    gap = statistics.median(a - b for a, b in zip(data.pairs["q_chosen"], data.pairs["q_rejected"], strict=True))
    return Suggestion(
        "step_apo",
        f"Values of a search for each step: the gap asked for is their difference, {gap:.3g} in the median.",
        {"beta": 0.3, "loss_kwargs": {"alpha": 1.0}},
        ["2409.08642 as its code has it: beta 0.3, alpha 1"],
    )


def _probabilities(data: Data) -> Suggestion | None:
    if "preference_prob" not in data.columns or data.losses["anchored"]:
        return None
    unsure = statistics.fmean(0.1 < value < 0.9 for value in data.pairs["preference_prob"])
    return Suggestion(
        "anchored",
        f"`preference_prob` says how sure each label is, {unsure:.0%} of them between 0.1 and 0.9: it is the target, and hard "
        "labels would be too sure.",
        {"beta": 0.1},
        ["2510.18913: a soft target in place of a label"],
    )


def _several_rewards(data: Data) -> Suggestion | None:
    several = list_lengths(data.pairs, SCORES) if set(SCORES) <= set(data.pairs.column_names) else {}
    if not several:
        return None
    return Suggestion(
        "reward_distillation",
        f"Scores of {several[SCORES[0]]} reward models: it draws the policy's reward gap to theirs, to their mean or to the nearest.",
        {"loss_kwargs": {"combine": "mean"}},
        ["2405.19316"],
    )


def _annotators(data: Data) -> Suggestion | None:
    ids = data.pairs["annotator_id"] if "annotator_id" in data.columns else []
    number = len(set(ids))
    if number < 2 or not all(isinstance(each, int) for each in ids):
        return None
    return Suggestion(
        "robust_em",
        f"{number} annotators, {len(ids) / number:.3g} pairs each in the mean: it says how reliable each is, and trusts their labels as "
        "far. It ranked annotators well, and its policy was no better than DPO's in short runs.",
        {"loss_kwargs": {"annotators": max(ids) + 1, "eta": 0.9, "rate": 0.1}},
        ["2509.24159: eta 0.9, rate 0.1", _measured("annotators"), _measured("annotators' policy")],
    )


def _contradicted(data: Data) -> Suggestion | None:
    """Scores that contradict labels now and then: how sure a label is, is then known from them."""
    against = sum(margin < 0 for margin in data.margins)
    if not against or "preference_prob" in data.columns or list_lengths(data.pairs, SCORES):
        return None
    try:
        temperature = fit_temperature(data.margins)
    except ValueError:  # they explain the labels no better than a coin
        return None
    return Suggestion(
        "anchored",
        f"Scores contradict {against:,} of {len(data.margins):,} labels: as targets they say which labels to trust. `margin_adaptive`, "
        f"on scores divided by {_short(temperature):g}, damps such pairs too.",
        {"loss_kwargs": {"beta_r": _short(temperature)}},
        [
            "beta_r: the temperature at which the scores fit the labels best (1706.04599; trl_ext.data.calibrate)",
            _measured("anchored, flipped"),
            _measured("margin_adaptive"),
        ],
    )


def _few_scored(data: Data) -> Suggestion | None:
    if not data.margins or is_grouped(data.columns) or len(data.margins) > FEW_PAIRS:
        return None
    return _offset(
        data, f"{len(data.margins):,} scored pairs, which is few: with few pairs it was ahead of DPO", "offset, few"
    )


def _many_scored(data: Data) -> Suggestion | None:
    if not data.margins or is_grouped(data.columns) or len(data.margins) <= FEW_PAIRS:
        return None
    return _offset(
        data,
        f"{len(data.margins):,} scored pairs: compare it with DPO, which was ahead of it with many pairs",
        "offset, many",
    )


def _offset(data: Data, why: str, measured: str) -> Suggestion:
    small = statistics.fmean(margin < 1 for margin in data.margins) > 0.5
    scaling = "linear" if small else "log"
    margin = statistics.median(data.margins)
    gap = margin if small else math.log(margin) if margin > 0 else math.nan
    shape = "Most margins are below 1, where a logarithm would ask for less than DPO: linear" if small else "Logarithm"
    return Suggestion(
        "offset",
        f"{why}. {shape}; the median margin of {margin:.3g} asks for a gap of {gap:.2g}.",
        {"loss_kwargs": {"alpha": 1.0, "scaling": scaling}},
        ["2402.10571 and its authors' code: alpha 1, log; linear in an ablation", _measured(measured)],
    )


def _length_bias(data: Data) -> Suggestion | None:
    differences = [a - b for a, b in zip(data.lengths["chosen"], data.lengths["rejected"], strict=True) if a != b]
    longer = statistics.fmean(difference > 0 for difference in differences) if differences else 0.0
    chance = 0.5 + 1.96 * 0.5 / math.sqrt(max(1, len(differences)))
    if longer < max(LONGER_WINS, chance):
        return None
    alpha, source = 0.02, "alpha 0.02: the default, weakly recalled from 2406.11817"
    if data.unit != "tokens":
        source += "; with --processing_class it comes from the data"
    else:
        try:
            alpha = _short(1 / fit_temperature(differences))
            source = "alpha: what a token more adds to the logit of winning, fitted to the lengths alone (Bradley-Terry; the loss: 2403.19159)"
        except ValueError:  # no longer answer ever loses, or all that win are short
            pass
    return Suggestion(
        "length_regularized",
        f"The longer answer wins in {longer:.0%} of {len(differences):,} pairs of unequal length: a price per token keeps answers from growing.",
        {"loss_kwargs": {"alpha": alpha}},
        [source, _measured("length")],
    )


def _plain(data: Data) -> Suggestion:
    return Suggestion(
        "sigmoid", "DPO, to compare all others with.", {"beta": 0.1}, ["2305.18290 and TRL's default: beta 0.1"]
    )


def _any(data: Data) -> Suggestion:
    settings: dict[str, Any] = {"learning_rate": 5e-7, "num_train_epochs": 1}
    why = "Full training; with LoRA 5e-6."
    sources = ["trl/scripts/dpo.py: 5e-7, with LoRA 5e-6, one epoch"]
    if data.unit == "tokens":
        sides = zip(*(data.lengths[side] for side in ("prompt", "chosen", "rejected")), strict=True)
        whole = sorted(prompt + max(chosen, rejected) for prompt, chosen, rejected in sides)
        settings["max_length"] = 64 * math.ceil((whole[math.ceil(0.99 * len(whole)) - 1] + 1) / 64)
        sources.append("max_length: 99 % of the pairs whole, rounded up to 64")
    return Suggestion("any", why, settings, sources)


def _short(value: float) -> float:
    """Two digits: more would say more than a start can."""
    return float(f"{value:.2g}")


def why_not(
    name: str, dataset: Dataset, given: Sequence[str], hyperparameters: Mapping[str, Any] | None = None
) -> str:
    """
    Why a loss cannot train on some data; `""` if it can.

    Args:
        name (`str`):
            Of the loss.
        dataset ([`~datasets.Dataset`]):
            Pairs; of groups the best against the worst.
        given (`Sequence[str]`):
            Columns that the data came with.
        hyperparameters (`Mapping[str, Any]`, *optional*):
            Of the loss, its defaults elsewhere.
    """
    try:
        losses = {name: get_loss(name, **(hyperparameters or {}))}
        needed = [] if losses[name].takes_pairs else ["prompt", "completions", "scores"]
        needed += [BEHAVIOUR_LOGPS] if "behaviour_logps" in losses[name].reads else []
        missing = [column for column in needed if column not in given]
        if missing:
            return (
                f"The loss {name!r} learns from whole groups with the columns {needed}, and {missing} are absent. Online training "
                "samples such groups."
            )
        checked(dataset, used_columns(dataset.column_names, losses, "inspected"), losses, "inspected")
    except (ValueError, TypeError) as error:
        return str(error)
    return ""
