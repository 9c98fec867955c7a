"""
Averages of checkpoints, weighted by what they measured.

Metrics-weighted averaging (https://huggingface.co/papers/2504.18580) merges the checkpoints of one run by their loss (lower
is better) or step (later is better), with one penalty exponent. Its exact formula is not known to us; this is `w_i ~ (1 / loss_i)^p`
or `w_i ~ step_i^p`, normalised, of which `p = 0` is the plain mean.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


logger = logging.getLogger(__name__)

WEIGHTINGS = ("loss", "step", "uniform")


def checkpoint_weights(folders: Sequence[str | Path], by: str = "loss", penalty: float = 1.0) -> list[float]:
    """
    Weights of checkpoints, which sum to 1.

    Args:
        folders (`Sequence[str | Path]`):
            Checkpoints that a trainer has written.
        by (`str`, *optional*, defaults to `"loss"`):
            `"loss"`, the last one logged before each (evaluation if there is any), `"step"`, or `"uniform"`.
        penalty (`float`, *optional*, defaults to `1.0`):
            The exponent p, at least 0.

    Raises:
        `ValueError`: For checkpoints that hold no such metric.
    """
    _check(by, penalty)
    if not folders:
        raise ValueError("Give at least one checkpoint.")
    values = []
    for folder in folders:
        path = Path(folder) / "trainer_state.json"
        if by == "uniform":
            values.append(1.0)
            continue
        if not path.exists():
            raise ValueError(f"{folder} has no trainer_state.json, so its {by} is not known. Use `by='uniform'`.")
        state = json.loads(path.read_text())
        if by == "step":
            values.append(float(state["global_step"]))
            continue
        logged = [entry for entry in state["log_history"] if "eval_loss" in entry or "loss" in entry]
        losses = [entry["eval_loss"] for entry in logged if "eval_loss" in entry] or [
            entry["loss"] for entry in logged
        ]
        if not losses or not 0 < losses[-1] < math.inf:
            raise ValueError(f"{folder} logged no positive, finite loss; use `by='step'` or 'uniform'.")
        values.append(1 / losses[-1])
    # Relative to the largest: high powers neither overflow nor vanish together
    powers = [(value / max(values)) ** penalty for value in values]
    return [power / sum(powers) for power in powers]


def _check(by: str, penalty: float) -> None:
    if by not in WEIGHTINGS:
        raise ValueError(f"`by={by!r}` is unknown; choose 'loss', 'step' or 'uniform'.")
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 <= penalty < math.inf:
        raise ValueError(f"`penalty={penalty!r}` must be a number, at least 0.")


def merge_checkpoints(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    by: str = "loss",
    penalty: float = 1.0,
    combination_type: str = "cat",
) -> list[float]:
    """
    Save the weighted average of checkpoints.

    Args:
        folders (`Sequence[str | Path]`):
            Models, or adapters of one base model.
        output (`str` or `Path`):
            Folder of the result.
        by, penalty:
            See [`checkpoint_weights`].
        combination_type (`str`, *optional*, defaults to `"cat"`):
            For adapters, PEFT's `add_weighted_adapter`: `"cat"` is exactly the average of the updates, with the sum of their
            ranks; `"linear"` keeps the rank and averages the factors.

    Returns:
        The weights.
    """
    weights = checkpoint_weights(folders, by, penalty)
    adapters = [(Path(folder) / "adapter_config.json").exists() for folder in folders]
    if all(adapters):
        _merge_adapters(folders, weights, output, combination_type)
    elif any(adapters):
        raise ValueError("Some of the checkpoints are adapters and some are models; merge either.")
    else:
        _merge_models(folders, weights, output)
    if (Path(folders[-1]) / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(folders[-1]).save_pretrained(output)
    return weights


def _merge_models(folders: Sequence[str | Path], weights: list[float], output: str | Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto")
    total = {name: weights[0] * value.float() for name, value in model.named_parameters()}
    for folder, weight in zip(folders[1:], weights[1:], strict=True):
        other = dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").named_parameters())
        if other.keys() != total.keys():
            raise ValueError(f"{folder} and {folders[0]} have different parameters.")
        for name, value in other.items():
            total[name] += weight * value.float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(total[name].to(value.dtype))
    model.save_pretrained(output)


def _merge_adapters(folders: Sequence[str | Path], weights: list[float], output: str | Path, kind: str) -> None:
    bases = {PeftConfig.from_pretrained(str(folder)).base_model_name_or_path for folder in folders}
    if len(bases) > 1:
        raise ValueError(f"The adapters belong to different models: {sorted(bases)}.")
    base = AutoModelForCausalLM.from_pretrained(bases.pop(), dtype="auto")
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="checkpoint-0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=f"checkpoint-{index}")
    names = [f"checkpoint-{index}" for index in range(len(folders))]
    model.add_weighted_adapter(names, weights, adapter_name="default", combination_type=kind)
    model.set_adapter("default")
    model.save_pretrained(str(output), selected_adapters=["default"])


class MergeCheckpointsCallback(TrainerCallback):
    """
    Merges the checkpoints of a run when it ends, into `output_dir/merged`.

    Where nothing can be merged in the end, a warning says so: what was trained is not lost.

    Args:
        by, penalty:
            See [`checkpoint_weights`].
        last (`int`, *optional*):
            How many of the latest to take, at least 2; all that `save_total_limit` has left by default.

    Raises:
        `ValueError`: For arguments out of range, and, when the trainer is built, for a run that keeps fewer than two
            checkpoints.
    """

    def __init__(self, by: str = "loss", penalty: float = 1.0, last: int | None = None):
        _check(by, penalty)
        if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 2):
            raise ValueError(f"`last={last!r}` must be a whole number, at least 2: one checkpoint is no average.")
        self.by, self.penalty, self.last = by, penalty, last

    def on_init_end(self, args, state, control, **kwargs):
        if args.save_strategy == "no":
            raise ValueError("There is nothing to merge with `save_strategy='no'`: set it to 'steps' or 'epoch'.")
        # The best one is kept beside the latest
        if args.save_total_limit is not None and args.save_total_limit < 2 and not args.load_best_model_at_end:
            raise ValueError(
                f"There is nothing to merge with `save_total_limit={args.save_total_limit}`: keep at least 2 checkpoints."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_init_end(args, state, control)  # a callback that was added to a trainer has missed it

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        steps = {
            int(found[1]): path
            for path in Path(args.output_dir).glob("checkpoint-*")
            if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
        }
        # Later ones are of an earlier run in the same folder
        folders = [steps[step] for step in sorted(steps) if step <= state.global_step]
        folders = folders[-self.last :] if self.last else folders
        try:
            if len(folders) < 2:
                raise ValueError(
                    f"{args.output_dir} has {len(folders)} of this run; save more often (`save_steps`), or keep more "
                    "(`save_total_limit`)"
                )
            merge_checkpoints(folders, Path(args.output_dir) / "merged", by=self.by, penalty=self.penalty)
        except (ValueError, OSError) as error:
            logger.warning(f"The checkpoints were not merged: {error}")
