"""Metrics on held-out prompts and pairs while a trainer runs."""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from trl_ext.data.checks import check_count
from trl_ext.data.rewards import as_scorer
from trl_ext.generation import evaluating
from trl_ext.trainers.dpo import DPOTrainer
from trl_ext.trainers.online.trainer import OnlineDPOTrainer

from .held_out import has_reference
from .on_pairs import OF_PAIRS, OnPairs
from .on_prompts import COMPARED, OF_PROMPTS, REFERENCE, OnPrompts


logger = get_logger(__name__)


class MetricsCallback(TrainerCallback):
    """
    Measures a policy on held-out data while it is trained, and logs what it finds as any metric: in `trainer.state.log_history`,
    on the progress bar and in every reporter. `metric_for_best_model` and early stopping may name what is measured with each
    evaluation.

    Of prompts the policy writes one completion each, at temperature 1 and without cut-offs, with transformers (also where training
    samples with vLLM) and from the same seed each time: two evaluations differ by the policy alone, and training is not disturbed.
    `eval_samples/` stands before these metrics, `eval_pairs/` before those of pairs. Each has an interval, `NAME_low` and
    `NAME_high`. What has no value, as a standard error of one completion, is left out.

    | metric | of | needs |
    |---|---|---|
    | `kl_to_reference` | prompts | a reference; also `kl_to_reference_standard_error`, `kl_per_token` |
    | `mean_reward` | prompts | `reward_funcs` |
    | `mean_length`, in tokens; `ended_share` | prompts | |
    | `win_rate`, `length_controlled_win_rate`; lengths in characters | prompts | a `baseline`, and `judge` or `reward_funcs` |
    | `preference_accuracy`, `calibration_error`, `length_bias` | pairs | a reference; of implicit rewards, `beta` times log-ratios |

    Where the processes are several, they share the rows; each has all results.

    Example:

    ```python
    >>> from trl_ext.metrics import MetricsCallback

    >>> callback = MetricsCallback(
    ...     trainer,
    ...     ["kl_to_reference", "win_rate", "preference_accuracy"],
    ...     prompts=held_out_prompts,
    ...     pairs=held_out_pairs,
    ...     judge=judge,
    ... )
    >>> trainer.add_callback(callback)
    ```

    Args:
        trainer ([`DPOTrainer`] or [`OnlineDPOTrainer`]):
            The trainer that it is going to be added to.
        metrics (`Sequence[str]`):
            Which of the above.
        prompts ([`~datasets.Dataset`], *optional*):
            With a column `prompt`, plain or conversational; `tools` and `chat_template_kwargs` reach the chat template.
        pairs ([`~datasets.Dataset`], *optional*):
            `prompt`, `chosen` and `rejected`, plain or conversational.
        reward_funcs (*optional*):
            As in [`~trl_ext.data.score_preferences`]; functions that say so are handed columns of `prompts`. An [`OnlineDPOTrainer`] has its own, which are taken by default, weights and
            penalties included: its `score`.
        reward_weights (`Sequence[float]`, *optional*):
            What each of `reward_funcs` is multiplied by; 1 by default.
        judge (`Callable`, *optional*):
            `judge(prompts, completions_a, completions_b)`: for each the probability that the first is preferred; or a
            [`~trl_ext.data.PreferenceModel`]. Asked in both orders. Without it the higher reward wins. Where an [`OnlineDPOTrainer`] has a judge and nothing is given here, it is taken.
        baseline (`str`, *optional*, defaults to `"reference"`):
            What win rates compare with: the reference's own completions, sampled in the same way, or a column of `prompts` with
            answers.
        num_prompts (`int`, *optional*):
            The first so many prompts; all by default.
        max_new_tokens (`int`, *optional*):
            Tokens that a completion has at most. That of online training by default, else 256.
        batch_size (`int`, *optional*):
            Prompts or pairs at a time in each process; `per_device_eval_batch_size` by default.
        eval_steps (`int`, *optional*):
            Measures every so many steps; with every evaluation by default.
        eval_on_start (`bool`, *optional*, defaults to `False`):
            Whether to measure before the first step too.
        seed (`int`, *optional*, defaults to `0`):
            Of the sampling.

    Raises:
        `ValueError`: For a metric that is unknown or lacks what it needs, for what no metric reads, and for data that cannot be used.
    """

    def __init__(
        self,
        trainer: Trainer,
        metrics: Sequence[str],
        prompts: Dataset | None = None,
        pairs: Dataset | None = None,
        *,
        reward_funcs: Any = None,
        reward_weights: Sequence[float] | None = None,
        judge: Callable[[list, list, list], Sequence[float]] | None = None,
        baseline: str = REFERENCE,
        num_prompts: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        eval_steps: int | None = None,
        eval_on_start: bool = False,
        seed: int = 0,
    ):
        if not isinstance(trainer, (DPOTrainer, OnlineDPOTrainer)):
            raise ValueError(
                f"`trainer` is a {type(trainer).__name__}; expected a DPOTrainer or OnlineDPOTrainer of trl_ext."
            )
        args = trainer.args
        max_new_tokens = getattr(args, "max_new_tokens", 256) if max_new_tokens is None else max_new_tokens
        batch_size = args.per_device_eval_batch_size if batch_size is None else batch_size
        counts = {"num_prompts": num_prompts, "eval_steps": eval_steps}
        counts = {name: value for name, value in counts.items() if value is not None}
        for name, value in (counts | {"max_new_tokens": max_new_tokens, "batch_size": batch_size}).items():
            check_count(name, value)
        self.trainer, self.metrics = trainer, _checked_names(metrics)
        self.eval_steps, self.eval_on_start = eval_steps, eval_on_start
        if isinstance(trainer, OnlineDPOTrainer) and reward_funcs is None and judge is None:
            judge = trainer.judge if self._read(COMPARED) else None
        self._check_data(prompts, pairs, num_prompts)
        self._check_scorers(reward_funcs, reward_weights, judge, baseline)
        self._check_reference(baseline)
        self._parts: dict[str, OnPrompts | OnPairs] = {}
        if prompts is not None:
            reward = None if reward_funcs is None else as_scorer(reward_funcs, reward_weights, None)
            judge = None if judge is None else as_scorer(None, None, judge)
            prompts = prompts if num_prompts is None else prompts.select(range(num_prompts))
            self._parts["samples"] = OnPrompts(
                trainer, self.metrics, prompts, reward, judge, baseline, max_new_tokens, batch_size, seed
            )
        if pairs is not None:
            self._parts["pairs"] = OnPairs(trainer, self.metrics, pairs, batch_size)
        if eval_steps is None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            logger.warning(
                "With `eval_strategy='no'` and without `eval_steps`, held-out metrics are measured only where `evaluate` is called."
            )

    # What is refused

    def _read(self, names: Sequence[str]) -> list[str]:
        """Those of the names that are to be measured."""
        return [name for name in self.metrics if name in names]

    def _check_data(self, prompts: Dataset | None, pairs: Dataset | None, num_prompts: int | None) -> None:
        for name, data, known in (("prompts", prompts, OF_PROMPTS), ("pairs", pairs, OF_PAIRS)):
            read = self._read(known)
            if read and not isinstance(data, Dataset):
                raise ValueError(
                    f"{read} are measured on held-out {name}: give `{name}=`, a dataset; got {type(data).__name__}."
                )
            if data is not None and not read:
                raise ValueError(
                    f"None of the metrics {self.metrics} reads `{name}`. Leave it out, or add some of {list(known)}."
                )
        there = 0 if prompts is None else len(prompts)
        if num_prompts is not None and num_prompts > there:
            raise ValueError(f"`num_prompts={num_prompts}`, and `prompts` has {there}.")

    def _check_scorers(self, reward_funcs: Any, reward_weights: Any, judge: Any, baseline: str) -> None:
        compared, mean = self._read(COMPARED), "mean_reward" in self.metrics
        own = isinstance(self.trainer, OnlineDPOTrainer) and bool(self.trainer.reward_funcs)
        rewards = reward_funcs is not None or own
        if mean and not rewards:
            raise ValueError("`mean_reward` needs `reward_funcs`: a reward model, a function, or a list of them.")
        if compared and judge is None and not rewards:
            raise ValueError(f"{compared} need something that compares two answers. Give `judge`, or `reward_funcs`.")
        unused = {
            "reward_funcs": reward_funcs is not None and not mean and not (compared and judge is None),
            "reward_weights": reward_weights is not None and reward_funcs is None,
            "judge": judge is not None and not compared,
            "baseline": baseline != REFERENCE and not compared,
        }
        if any(unused.values()):
            names = [name for name, is_unused in unused.items() if is_unused]
            raise ValueError(
                f"The metrics {self.metrics} do not read {names} with what else is given. Leave {names} out."
            )

    def _check_reference(self, baseline: str) -> None:
        need = self._read(("kl_to_reference", *OF_PAIRS, *(COMPARED if baseline == REFERENCE else ())))
        if not need or has_reference(self.trainer):
            return
        reason = "none of its losses reads one"
        if self.trainer._needs_reference:
            reason = "`precompute_ref_log_probs=True` keeps its log-probabilities of the training data alone"
        raise ValueError(
            f"{need} need a reference model, and this run has none: {reason}. Leave them out. (Win rates can compare with answers "
            "in a column of `prompts`: `baseline=`.)"
        )

    # When

    def on_train_begin(self, args, state, control, **kwargs):
        evaluated = self.eval_steps is None and args.eval_on_start  # transformers is about to
        if self.eval_on_start and state.global_step == 0 and not evaluated:
            self._log()

    def on_step_end(self, args, state, control, **kwargs):
        if self.eval_steps is not None and state.global_step % self.eval_steps == 0:
            self._log()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        datasets = self.trainer.eval_dataset
        # One evaluation of several datasets comes here once for each
        others = list(datasets)[:-1] if isinstance(datasets, dict) else []
        if self.eval_steps is None and not any(f"eval_{name}_runtime" in metrics for name in others):
            metrics.update(self._log())  # what `metric_for_best_model` is looked up in

    def _log(self) -> dict[str, float]:
        found = {f"eval_{name}": value for name, value in self.measure().items()}
        trainer = self.trainer
        due = trainer.control.should_log
        # In training mode the trainer would add its metrics of training to these
        with evaluating(trainer.model, trainer.args.gradient_checkpointing_kwargs):
            trainer.log(dict(found))
        trainer.control.should_log = due  # the step's own log, which any other would take the place of
        return found

    def measure(self) -> dict[str, float]:
        """All metrics of the policy as it is, by name without `eval_`. Called in every process."""
        with evaluating(self.trainer.model, self.trainer.args.gradient_checkpointing_kwargs):
            measured = {part: data.measure() for part, data in self._parts.items()}
        found = {f"{part}/{name}": value for part, values in measured.items() for name, value in values.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}


def _checked_names(metrics: Sequence[str]) -> list[str]:
    known = [*OF_PROMPTS, *OF_PAIRS]
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"`metrics={metrics!r}` must be a list of names, at least one of {known}.")
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`metrics` names {name!r}, which is unknown.{hint} There are {known}.")
    return list(metrics)
