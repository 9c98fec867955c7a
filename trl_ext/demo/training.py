"""The runs: fine-tune a start, sample preferences from it, train each loss, measure."""

import argparse
import contextlib
import copy
import logging
import os
import random
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from trl_ext import DPOConfig, DPOTrainer, OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.data import load_preferences
from trl_ext.data.checks import require_columns
from trl_ext.demo import BASELINE, checks, lm, online, report, world


# The same for all losses: a large learning rate, since the model is tiny and the runs are short
SETTINGS = {"learning_rate": 3e-4, "beta": 0.1, "per_device_train_batch_size": 16}
# Where a default would not do in this world
LOSS_KWARGS = {
    # Bradley-Terry labels contradict the scores now and then: "log" has no offset for a margin that is not positive
    "offset": {"scaling": "linear"},
}
FINE_TUNING_STEPS = 240
PAIRS, HELD_OUT_PAIRS, SAMPLES = 1200, 256, 384


@dataclass
class Task:
    """What a loss is trained and measured on."""

    name: str
    train: Dataset
    test: Dataset
    prompts: list[str]
    max_length: int


class Steps(TrainerCallback):
    """Moves a progress bar."""

    def __init__(self, progress: Progress, bar: Any):
        self.progress, self.bar = progress, bar

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(self.bar)


def demonstrate(args: argparse.Namespace) -> int:
    """The whole demonstration, from an empty folder to a table, a plot and trained models."""
    console = Console()
    names, steps = checks.losses(args), checks.steps(args)
    checks.data(args)
    flavour = online if args.online else sys.modules[__name__]
    folder = checks.output_folder(args)
    set_seed(args.seed)
    rng = random.Random(args.seed)

    with quiet(), one_thread(), progress_bars(console) as progress:
        if args.dataset_name:
            model, tokenizer, tasks = own_data(load_preferences(args.dataset_name), rng, progress)
        else:
            model, tokenizer, tasks = small_world(rng, progress)
        save(model, tokenizer, folder / "start")
        rows = [
            {"loss": "start", "data": name, **measure(model, model, tokenizer, task)} for name, task in tasks.items()
        ]
        skipped = {}
        for name, data in runs(names, tasks):
            set_seed(args.seed)
            label = name if data == "plain" else f"{name} ({data})"
            bar = progress.add_task(f"training {label}", total=steps)
            try:
                given = (model, tokenizer, folder, steps, args.seed, Steps(progress, bar), flavour)
                rows.append(train(name, tasks[data], *given))
            except ValueError as error:
                if not args.dataset_name:
                    raise
                skipped[label] = str(error)
                progress.remove_task(bar)

    title = f"Preferences from {args.dataset_name or 'a world whose reward is known'}"
    if args.online:
        title = "Online, under a reward that likes long answers (the true one, which is shown, does not)"
    console.print(report.table(rows, title))
    for name, reason in skipped.items():
        console.print(f"{name} was skipped: {reason}", style="yellow", markup=False)
    if len(skipped) == len(names):
        raise ValueError(f"None of {names} could be trained on {args.dataset_name!r}; the reasons stand above.")
    settings = {"seed": args.seed, "max_steps": steps, "dataset_name": args.dataset_name, "online": args.online}
    settings |= {"loss_kwargs": flavour.LOSS_KWARGS, **flavour.SETTINGS}
    report.save(rows, settings, folder)
    try:
        report.plot(rows, folder / "reward_kl.png")
        console.print(f"Plot: {folder / 'reward_kl.png'}", soft_wrap=True)
    except ModuleNotFoundError:
        console.print("No plot: matplotlib is not installed (pip install 'trl-ext[plots]').", markup=False)
    console.print(f"Models, results.json and results.csv: {folder}", soft_wrap=True)
    return 0


def runs(names: list[str], tasks: dict[str, Task]) -> list[tuple[str, str]]:
    """(loss, data) of each run: the loss for traces trains on traces, beside plain DPO on the same pairs."""
    if "traced" not in tasks:
        return [(name, "plain") for name in names]
    plain = [(name, "plain") for name in names if name != "bias_variance"]
    traced = [(name, "traced") for name in (BASELINE, "bias_variance")] if "bias_variance" in names else []
    return plain + traced


def train(
    name: str,
    task: Task,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    steps: int,
    seed: int,
    callback: TrainerCallback,
    flavour: Any,
) -> dict[str, Any]:
    """Train one loss from the start; returns its row of the table and saves the model."""
    output = folder / (name if task.name == "plain" else f"{name}-{task.name}")
    config_class, trainer_class, warmup = DPOConfig, DPOTrainer, 10
    data = {"train_dataset": task.train, "eval_dataset": task.test}
    if flavour is online:
        config_class, trainer_class, warmup = OnlineDPOConfig, OnlineDPOTrainer, 5
        data = {"train_dataset": task.train.select_columns(["prompt"]), "reward_funcs": online.reward}
    args = config_class(
        output_dir=str(output),
        loss_type=name,
        loss_kwargs=flavour.LOSS_KWARGS.get(name),
        max_steps=steps,
        max_length=task.max_length,
        warmup_steps=min(warmup, steps - 1),
        seed=seed,
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
    policy = copy.deepcopy(start)
    trainer = trainer_class(
        model=policy,
        ref_model=copy.deepcopy(start),
        args=args,
        processing_class=tokenizer,
        callbacks=[callback],
        **data,
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    accuracy = None if flavour is online else trainer.evaluate()["eval_rewards/accuracies"]
    policy.eval()
    trainer.save_model()
    if flavour is not online:
        trainer.create_model_card(model_name=output.name)
    measured = measure(policy, start, tokenizer, task)
    return {"loss": name, "data": task.name, **measured, "accuracy": accuracy, "seconds": seconds}


def measure(
    policy: PreTrainedModel, start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> dict[str, float | None]:
    """True reward, KL to the start and length of fresh completions of held-out prompts."""
    set_seed(0)  # the same draws for every loss: differences come from the models
    completions = lm.sample(policy, tokenizer, task.prompts)
    texts = [tokenizer.decode(completion, skip_special_tokens=False) for completion in completions]
    known = task.name == "traced" or task.max_length == WORLD_LENGTH
    return {
        "reward": sum(map(world.reward, texts)) / len(texts) if known else None,
        "kl": lm.kl_to_reference(policy, start, tokenizer, task.prompts, completions),
        "length": sum(map(len, completions)) / len(completions),
    }


# Positions that a prompt, a trace and a review of the world need at most
WORLD_LENGTH = 128


def small_world(
    rng: random.Random, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Task]]:
    """Fine-tune on the grammar, then sample pairs, plain and with traces, labelled by Bradley-Terry."""
    tokenizer = lm.word_tokenizer(world.vocabulary())
    model = lm.build_model(tokenizer, WORLD_LENGTH)
    bar = progress.add_task("fine-tuning the start", total=FINE_TUNING_STEPS)
    texts = world.corpus(rng, 6000)
    lm.fine_tune(model, tokenizer, texts, FINE_TUNING_STEPS, WORLD_LENGTH, rng, lambda: progress.advance(bar))

    prompts = [rng.choice(world.PROMPTS) for _ in range(PAIRS + HELD_OUT_PAIRS + SAMPLES)]
    pairs, fresh = prompts[: PAIRS + HELD_OUT_PAIRS], prompts[PAIRS + HELD_OUT_PAIRS :]
    bar = progress.add_task("sampling preferences", total=6)

    def sampled(prompts: list[str]) -> list[str]:
        completions = [
            world.clean(tokenizer.decode(ids, skip_special_tokens=True))
            for ids in lm.sample(model, tokenizer, prompts)
        ]
        progress.advance(bar)
        return completions

    def labelled(prompts: list[str]) -> list[tuple[str, str]]:
        return [world.prefer(rng, *pair) for pair in zip(sampled(prompts), sampled(prompts), strict=True)]

    thinking = [f"{world.REASONING} {prompt}" for prompt in pairs]
    plain, traced = labelled(pairs), labelled(thinking)
    empty = labelled([f"{prompt} {world.EMPTY}" for prompt in thinking])
    datasets_ = {
        "plain": [scored(prompt, pair) for prompt, pair in zip(pairs, plain, strict=True)],
        "traced": [
            {**scored(prompt, pair), "chosen_empty_trace": answers[0], "rejected_empty_trace": answers[1]}
            for prompt, pair, answers in zip(thinking, traced, empty, strict=True)
        ],
    }
    tasks = {}
    for name, rows in datasets_.items():
        new = fresh if name == "plain" else [f"{world.REASONING} {prompt}" for prompt in fresh]
        train, test = Dataset.from_list(rows[:PAIRS]), Dataset.from_list(rows[PAIRS:])
        tasks[name] = Task(name, train, test, new, WORLD_LENGTH)
    return model, tokenizer, tasks


def scored(prompt: str, pair: tuple[str, str]) -> dict[str, Any]:
    """A row of preference data, with the true rewards as scores."""
    chosen, rejected = pair
    scores = {"score_chosen": world.reward(chosen), "score_rejected": world.reward(rejected)}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **scores}


def own_data(
    dataset: Dataset, rng: random.Random, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Task]]:
    """A tokenizer and a small model made from the chosen texts of a dataset of the user's."""
    require_columns(dataset, ["prompt", "chosen", "rejected"])
    if len(dataset) < 20:
        raise ValueError(
            f"The dataset has {len(dataset)} rows; the demonstration holds some out and needs at least 20."
        )
    if not isinstance(dataset[0]["prompt"], str):
        raise ValueError("The demonstration's model has no chat template: give prompt, chosen and rejected as text.")
    texts = list(zip(dataset["prompt"], dataset["chosen"], strict=True))
    tokenizer = lm.trained_tokenizer(prompt + chosen for prompt, chosen in texts)
    max_length = 256
    model = lm.build_model(tokenizer, max_length + lm.MAX_NEW_TOKENS)
    bar = progress.add_task("fine-tuning the start", total=FINE_TUNING_STEPS)
    lm.fine_tune(model, tokenizer, texts, FINE_TUNING_STEPS, max_length, rng, lambda: progress.advance(bar))
    split = dataset.train_test_split(test_size=max(10, len(dataset) // 10), seed=rng.randrange(2**31))
    # What does not fit before a completion cannot be sampled from
    short = [prompt for prompt in split["test"]["prompt"] if len(tokenizer(prompt)["input_ids"]) <= max_length]
    if not short:
        raise ValueError(f"No held-out prompt has {max_length} tokens or fewer; the demonstration's model ends there.")
    return model, tokenizer, {"plain": Task("plain", split["train"], split["test"], short[:128], max_length)}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def progress_bars(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
