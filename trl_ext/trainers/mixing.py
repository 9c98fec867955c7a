"""
The mixing weight of `bias_variance` from measured gradients.

With g_t and g_e the gradients on pairs with traces and with empty traces, and alpha g_t + (1 - alpha) g_e their mix, the mean
squared error to the true gradient is smallest at

    alpha* = clip((B - C) / (A + B - 2 C), 0, 1),    A = |b_t|^2 + tr S_t,  B = |b_e|^2 + tr S_e,  C = <b_t, b_e> + tr S_te

(https://huggingface.co/papers/2510.05095; symbols from a review, formula derived). The true gradient cannot be had, so the
paper never computes it. **Assumed here: the traced gradient is unbiased**, b_t = 0: it is the gradient of the loss on traces
that the policy could have drawn. Then b_e is the difference of the two mean gradients, measured, with what noise alone adds to
its square taken off. Variances are those of a training step's mean over its rows.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from trl_ext.data.further import FURTHER
from trl_ext.trainers.metrics import Means
from trl_ext.trainers.terms import Terms


logger = get_logger(__name__)

# In a checkpoint: the measured `alpha`
FILE = "bias_variance_mixing.json"

# Parameters that all count by default; with more, those of the last layer do
MANY = 20_000_000


@dataclasses.dataclass(frozen=True)
class MixingEstimate:
    """
    Attributes:
        alpha (`float`): The estimate of alpha*, in `[0, 1]`.
        traced_variance (`float`): tr S_t of a training step.
        empty_variance (`float`): tr S_e.
        covariance (`float`): tr S_te.
        empty_bias (`float`): |b_e|^2, at least 0.
        rows (`int`): Rows that were measured.
        within_prompts (`bool`): Whether variances are those among several traces of a prompt; else they hold the variance
            between prompts too.
        parameters (`int`): Parameters whose gradients were measured.
    """

    alpha: float
    traced_variance: float
    empty_variance: float
    covariance: float
    empty_bias: float
    rows: int
    within_prompts: bool
    parameters: int

    def variance(self, alpha: float) -> float:
        """Variance of the mix with a given weight."""
        return (
            alpha**2 * self.traced_variance
            + 2 * alpha * (1 - alpha) * self.covariance
            + (1 - alpha) ** 2 * self.empty_variance
        )

    def error(self, alpha: float) -> float:
        """Mean squared error of the mix with a given weight, under the assumption above."""
        return self.variance(alpha) + (1 - alpha) ** 2 * self.empty_bias

    @property
    def variance_ratio(self) -> float:
        """Variance of the mix at `alpha` over that of the traced gradient alone."""
        return self.variance(self.alpha) / self.traced_variance if self.traced_variance > 0 else 1.0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def estimate_alpha(trainer: Any, rows: int = 64, parameters: Callable[[str], bool] | None = None) -> MixingEstimate:
    """
    Measure gradients of single rows and compute `alpha`.

    Args:
        trainer ([`DPOTrainer`]):
            With the loss `bias_variance`. Its weights are not changed.
        rows (`int`, *optional*, defaults to `64`):
            Rows of the training data that are measured, those with both pairs; several traces of a prompt are taken together.
        parameters (`Callable`, *optional*):
            Says by name which parameters count; all trainable ones by default, or those of the last layer where there are more
            than 20 million.

    Returns:
        [`MixingEstimate`].

    Called in every process. Each measures the rows of the first one, whose estimate all of them get.

    Raises:
        `ValueError`: If the trainer has no such loss, its model is sharded, or fewer than two rows have both pairs.
    """
    loss = trainer._terms.losses.get("bias_variance")
    if loss is None:
        raise ValueError("`estimate_alpha` needs a trainer with `loss_type='bias_variance'`.")
    check_measurable(trainer)
    examples = _examples(trainer, rows)
    counted = _counted(trainer.model, parameters)
    groups: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(tuple(example["prompt_ids"]), []).append(index)
    within = sum(len(members) > 1 for members in groups.values()) >= 2
    total, spread = _Moments(), []
    bar = tqdm(
        total=len(examples), desc="measuring gradients", unit="row", disable=not trainer.is_world_process_zero()
    )
    with bar, _measuring(trainer):
        for members in groups.values():
            local = _Moments()
            for index in members:
                pair = [_gradient(trainer, loss, examples[index], side, counted) for side in (1.0, 0.0)]
                for moments in (total, local):
                    moments.add(*pair)
                bar.update()
            if len(members) > 1:
                spread.append(local.covariances())
    if within:
        traced, empty, both = (sum(values) / len(spread) for values in zip(*spread, strict=True))
    else:
        traced, empty, both = total.covariances()
    step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    bias = total.squared_difference()
    a, b, c = traced / step, bias + empty / step, both / step
    denominator = a + b - 2 * c
    alpha = 0.5 if denominator <= 0 else min(max((b - c) / denominator, 0.0), 1.0)
    estimate = MixingEstimate(
        alpha=alpha,
        traced_variance=a,
        empty_variance=empty / step,
        covariance=c,
        empty_bias=bias,
        rows=len(examples),
        within_prompts=within,
        parameters=sum(parameter.numel() for parameter in counted),
    )
    return broadcast_object_list([estimate])[0]


def check_measurable(trainer: Any) -> None:
    """Raise a `ValueError` where gradients of single rows cannot be had: before DeepSpeed or FSDP has placed the model."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        kind = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
        raise ValueError(
            f"bias_variance: `alpha='auto'` measures gradients of single rows before training, when {kind} has not placed the "
            "model yet. Measure without it, `trl_ext.trainers.mixing.estimate_alpha(trainer).alpha`, on a smaller model where "
            "this one does not fit, and give that number as `alpha`."
        )


class MeasuredMixing:
    """
    `alpha="auto"` in a run: measured before the first step or evaluation, logged, and kept in checkpoints.

    Args:
        trainer ([`DPOTrainer`]):
            Whose loss `bias_variance` is given the weight.

    Raises:
        `ValueError`: If it is to be measured where gradients of single rows cannot be had.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.estimate = trainer, None
        self.measures = getattr(trainer._terms.losses.get("bias_variance"), "alpha", None) == "auto"
        if self.measures:
            check_measurable(trainer)

    def before_training(self, resume_from_checkpoint: str | None) -> None:
        if not self.measures:
            return
        path = Path(resume_from_checkpoint or "") / FILE
        if resume_from_checkpoint and path.exists():  # what the run began with
            self._take(MixingEstimate(**json.loads(path.read_text())))
        else:
            self._take(self.estimate or estimate_alpha(self.trainer))

    def before_evaluation(self) -> None:
        if self.measures and self.estimate is None:
            self._take(estimate_alpha(self.trainer))

    def _take(self, estimate: MixingEstimate) -> None:
        self.estimate = estimate
        losses = self.trainer._terms.losses
        losses["bias_variance"] = dataclasses.replace(losses["bias_variance"], alpha=estimate.alpha)
        logger.info(f"bias_variance: alpha={estimate.alpha:.3f}, measured on {estimate.rows} rows.")

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged of it."""
        if self.estimate is None:
            return {}
        return {"mixing/alpha": self.estimate.alpha, "mixing/variance_ratio": self.estimate.variance_ratio}

    def save(self, folder: str) -> None:
        """Write the estimate into a checkpoint."""
        if self.estimate is not None and self.trainer.is_world_process_zero():
            (Path(folder) / FILE).write_text(self.estimate.to_json())


class _Moments:
    """First and second moments of pairs of gradients."""

    def __init__(self):
        self.count, self.squares = 0, [0.0, 0.0, 0.0]
        self.sums: list[torch.Tensor] | None = None

    def add(self, traced: torch.Tensor, empty: torch.Tensor) -> None:
        self.count += 1
        products = (traced.dot(traced), empty.dot(empty), traced.dot(empty))
        self.squares = [total + value.item() for total, value in zip(self.squares, products, strict=True)]
        if self.sums is None:
            self.sums = [torch.zeros_like(traced, dtype=torch.float64) for _ in range(2)]
        self.sums[0] += traced
        self.sums[1] += empty

    def _of_sums(self) -> list[float]:
        traced, empty = self.sums
        return [value.item() for value in (traced.dot(traced), empty.dot(empty), traced.dot(empty))]

    def covariances(self) -> list[float]:
        """tr S_t, tr S_e, tr S_te, unbiased."""
        return [
            (square - of_sum / self.count) / (self.count - 1)
            for square, of_sum in zip(self.squares, self._of_sums(), strict=True)
        ]

    def squared_difference(self) -> float:
        """|mean g_e - mean g_t|^2, without what noise alone adds."""
        traced, empty, both = self._of_sums()
        noise_traced, noise_empty, noise_both = self.covariances()
        square = (traced + empty - 2 * both) / self.count**2
        return max(square - (noise_traced + noise_empty - 2 * noise_both) / self.count, 0.0)


def _examples(trainer: Any, rows: int) -> list[dict]:
    """Rows with both pairs, those of a prompt one after the other."""
    found = []
    for example in trainer.train_dataset:
        if example["chosen_ids"] and example[FURTHER]:
            found.append(example)
        if len(found) >= rows:
            break
    # A stream may give each process other rows
    found = broadcast_object_list([found])[0]
    if len(found) < 2:
        raise ValueError(
            f"`alpha` needs at least two rows with both a traced and an empty-trace pair; the training data has {len(found)}."
        )
    return found


def _counted(model: torch.nn.Module, parameters: Callable[[str], bool] | None) -> list[torch.nn.Parameter]:
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if parameters is None and sum(value.numel() for _, value in named) > MANY:
        last = model.config.get_text_config().num_hidden_layers - 1
        parameters = lambda name: f".{last}." in name  # noqa: E731
    counted = [value for name, value in named if parameters is None or parameters(name)]
    if not counted:
        raise ValueError("`parameters` picked none of the trainable parameters.")
    return counted


@contextlib.contextmanager
def _measuring(trainer: Any):
    """The loss alone, and nothing of it in metrics, counters or gradients."""
    names = ("_terms", "_means", "loss_types", "loss_weights", "_metrics", "_total_train_tokens")
    before = {name: getattr(trainer, name) for name in names}
    trainer._means = {mode: Means() for mode in trainer._means}
    trainer.loss_types, trainer.loss_weights = [], []
    trainer._metrics = {mode: type(values)(list) for mode, values in before["_metrics"].items()}
    training = trainer.model.training
    trainer.model.train()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
        trainer.model.train(training)
        trainer.model.zero_grad(set_to_none=True)


def _gradient(trainer: Any, loss: Any, example: dict, alpha: float, counted: list) -> torch.Tensor:
    trainer._terms = Terms({"bias_variance": dataclasses.replace(loss, alpha=alpha)}, {"bias_variance": 1.0})
    trainer.model.zero_grad(set_to_none=True)
    inputs = trainer._prepare_inputs(trainer.data_collator([example]))
    value = trainer.compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(value, counted, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(parameter.numel(), device=parameter.device) if gradient is None else gradient.float().flatten()
            for parameter, gradient in zip(counted, gradients, strict=True)
        ]
    )
