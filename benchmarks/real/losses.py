"""Which losses are compared, with which settings, and what each of them reads."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl_ext import list_losses


# Of rewards that are summed over tokens, and of those per token: the same number of settings for each loss
SUMS, PER_TOKEN = (0.1, 0.5), (2.5, 10.0)
LEARNING_RATES = (5e-4, 2e-3)

LOGITS = {"score_chosen": "logit_chosen", "score_rejected": "logit_rejected"}


@dataclass(frozen=True)
class Side:
    """
    A loss and its settings.

    Attributes:
        name (`str`): Its `loss_type`.
        betas (`tuple[float, ...]`): `beta` of the settings; of a loss that reads none, what stands in its place.
        columns (`dict[str, str]`): Columns that it reads, and the column of the prepared data that each is.
        per_token (`bool`): Whether its rewards are per token, and not sums.
        instead (`str` or `None`): The hyper-parameter that takes the place of `beta`.
        unit (`float` or `None`): What log-ratios are multiplied by where that is not `beta`.
        options (`dict`): Of the config, in each setting.
        reference (`bool`): Whether it reads the reference.
    """

    name: str
    betas: tuple[float, ...] = SUMS
    columns: dict[str, str] = field(default_factory=dict)
    per_token: bool = False
    instead: str | None = None
    unit: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    reference: bool = True

    def settings(self, learning_rates: tuple[float, ...] = LEARNING_RATES) -> list[dict[str, Any]]:
        """Arguments of the config, one dict per setting."""
        found = []
        for beta in self.betas:
            given = {"loss_kwargs": {self.instead: beta}} if self.instead else {"beta": beta}
            found += [{**self.options, **given, "learning_rate": rate} for rate in learning_rates]
        return found

    def scale(self, setting: dict[str, Any]) -> float:
        """What a log-ratio of policy to start is multiplied by to be a reward."""
        if self.unit is not None:
            return self.unit
        return setting["loss_kwargs"][self.instead] if self.instead else setting["beta"]


INITIAL = {"initial_chosen_logps": "ref_chosen_logps", "initial_rejected_logps": "ref_rejected_logps"}

SIDES = {
    side.name: side
    for side in (
        Side("sigmoid"),
        Side("ipo", betas=(0.5, 2.5), per_token=True),
        Side("hinge"),
        Side("robust", options={"label_smoothing": 0.1}),
        Side("sigmoid_norm", betas=PER_TOKEN, per_token=True),
        Side("offset", columns={"score_chosen": "score_chosen", "score_rejected": "score_rejected"}),
        Side("alpha_dpo", betas=PER_TOKEN, per_token=True),
        Side("anchored", columns={"preference_prob": "preference_prob"}),
        Side("margin_adaptive", columns=LOGITS),
        Side("beta_dpo"),
        Side("length_regularized"),
        Side("inpo", betas=(0.1, 0.5), columns=INITIAL, instead="eta"),
        Side("reward_distillation", columns=LOGITS),
        Side("robust_em"),
        Side("sppo_soft", columns={"score_chosen": "win_chosen", "score_rejected": "win_rejected"}),
        Side("asft", betas=(0.1, 1.0), per_token=True, instead="weight", unit=1.0, reference=False),
        Side("cpo", reference=False),
        Side("eurus"),
        Side("simpo", betas=PER_TOKEN, per_token=True, reference=False),
        Side("step_apo", columns={"q_chosen": "q_chosen", "q_rejected": "q_rejected"}),
    )
}

DERIVED = {
    "logit_*": "the given scores as Bradley-Terry logits: divided by a temperature at which a usual pair of the training data has a gap of 2. "
    "No temperature can be fitted, because no label contradicts its scores. Read by `margin_adaptive` and `reward_distillation` as "
    "`score_*`.",
    "preference_prob": "sigmoid of the gap of logits. Read by `anchored`.",
    "win_*": "win rates of the two: `preference_prob`, and 1 less it. Read by `sppo_soft` as `score_*`.",
    "q_*": "the given scores, moved from their range to [-1, 1], in place of the values of a search. Read by `step_apo`.",
    "initial_*_logps": "log-probs under the start, which is the policy before the first round and the reference. Read by `inpo`, which with "
    "both the same is IPO on sums.",
}

LEFT_OUT = {
    "aligndistil": "it distils two further models, which each cost a whole run of their own: no equal budget",
    "bias_variance": "it reads completions that were written with reasoning switched off, and these texts have no traces",
    "dmpo": "these completions are one turn each, of which it is `sigmoid`",
    "drpo": "it learns from whole groups",
    "trpa": "it learns from whole groups",
}


def check_all_named() -> None:
    """Raise a `ValueError` for a loss of ours that is neither compared nor left out with a reason."""
    if missing := sorted(set(list_losses()) - set(SIDES) - set(LEFT_OUT)):
        raise ValueError(
            f"{', '.join(missing)}: neither in SIDES nor in LEFT_OUT of {__file__}. Name them in one of the two."
        )


def described(setting: dict[str, Any]) -> str:
    """A setting as the report shows it."""
    kwargs = setting.get("loss_kwargs", {})
    shown = {**{key: setting[key] for key in ("beta",) if key in setting}, **kwargs, "lr": setting["learning_rate"]}
    return ", ".join(f"{key} {value:g}" for key, value in shown.items())


def usual_temperature(gaps: list[float]) -> float:
    """The temperature at which the mean gap of scores is 2 logits, of which the sigmoid is 0.88."""
    mean = math.fsum(gaps) / len(gaps)
    if mean <= 0:
        raise ValueError(f"The mean gap of scores is {mean:g}; chosen texts should score more than rejected ones.")
    return mean / 2
