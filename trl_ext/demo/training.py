"""One run: a loss is trained from the start on the pairs of a seed, and measured on the way."""

import contextlib
import copy
import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from trl_ext import DPOConfig, DPOTrainer, OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.demo import online
from trl_ext.demo.data import Task, measure


# The same for all losses: a large learning rate, since the model is tiny and the runs are short
SETTINGS = {
    "learning_rate": 3e-4, "beta": 0.1, "per_device_train_batch_size": 16, "lr_scheduler_type": "cosine",
}  # fmt: skip
# Where a default would not do in this world
LOSS_KWARGS = {
    # Bradley-Terry labels contradict the scores now and then: "log" has no offset for a margin that is not positive
    "offset": {"scaling": "linear"},
}
# Shares of the steps after which a policy is measured
MARKS = (0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Plan:
    """
    What all runs have in common.

    Args:
        folder (`Path`): Of models and results.
        steps (`int`): Of training.
        online (`bool`): Whether policies are trained on what they write.
        kept_seed (`int`): The seed whose models are saved.
    """

    folder: Path
    steps: int
    online: bool
    kept_seed: int

    @property
    def flavour(self) -> Any:
        """The module with `SETTINGS` and `LOSS_KWARGS`."""
        return online if self.online else sys.modules[__name__]


class Measured(TrainerCallback):
    """Adds a point to a run's path after some of its steps."""

    def __init__(self, steps: set[int], task: Task, start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.steps, self.task, self.start, self.tokenizer = steps, task, start, tokenizer
        self.points = [{"step": 0, **task.start}]
        self.texts = task.before
        self.trainer: Any = None
        self.seconds = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step not in self.steps:
            return
        began = time.perf_counter()
        model.eval()
        values, self.texts = measure(model, self.start, self.tokenizer, self.task)
        point = {"step": state.global_step, **values}
        if not self.task.reward_known:
            point["accuracy"] = accuracy(self.trainer)
        self.points.append(point)
        model.train()
        self.seconds += time.perf_counter() - began


def accuracy(trainer: DPOTrainer) -> float:
    """Share of the held-out pairs whose implicit rewards are in the order of the labels."""
    return trainer.evaluate()["eval_rewards/accuracies"]


def train(
    name: str, task: Task, start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan
) -> dict[str, Any]:
    """Train one loss from the start; returns its path, `points`, and saves the model of the first seed."""
    set_seed(task.seed)
    flavour, steps = plan.flavour, plan.steps
    output = plan.folder / (name if task.name == "plain" else f"{name}-{task.name}")
    config_class, trainer_class, warmup = DPOConfig, DPOTrainer, 5
    data = {"train_dataset": task.train, "eval_dataset": task.test}
    if plan.online:
        config_class, trainer_class = OnlineDPOConfig, OnlineDPOTrainer
        data = {"train_dataset": task.train, "reward_funcs": online.reward}
    args = config_class(
        output_dir=str(output),
        loss_type=name,
        loss_kwargs=flavour.LOSS_KWARGS.get(name),
        max_steps=steps,
        max_length=task.max_length,
        warmup_steps=min(warmup, steps - 1),
        seed=task.seed,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        per_device_eval_batch_size=64,
        **flavour.SETTINGS,
    )
    marks = {max(1, round(share * steps)) for share in MARKS}
    measured = Measured(marks, task, start, tokenizer)
    trainer = trainer_class(
        model=copy.deepcopy(start),
        ref_model=copy.deepcopy(start),
        args=args,
        processing_class=tokenizer,
        callbacks=[measured],
        **data,
    )
    measured.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began - measured.seconds
    found = {"loss": name, "data": task.name, "seed": task.seed, "points": measured.points, "seconds": seconds}
    told = zip(task.prompts[: len(task.before)], task.before, measured.texts, strict=True)
    found["examples"] = [{"prompt": prompt, "before": before, "after": after} for prompt, before, after in told]
    if not plan.online:
        found["accuracy"] = accuracy(trainer) if task.reward_known else measured.points[-1]["accuracy"]
    if task.seed == plan.kept_seed:
        trainer.save_model()
        if not plan.online:
            trainer.create_model_card(model_name=output.name)
    return found


@contextlib.contextmanager
def one_thread():
    """
    One thread for torch, unless the environment sets a number.

    With matrices this small, threads wait for each other longer than they compute.
    """
    before = torch.get_num_threads()
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet():
    """The libraries' own bars and notes would tear the display apart; errors still come through."""
    verbosity, bars = transformers.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("accelerate", "trl_ext")]
    levels = [logger.level for logger in loggers]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
