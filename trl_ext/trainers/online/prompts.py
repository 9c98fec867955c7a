"""The prompts of an online run: which of their columns are read, and whether all can be used. Checked before a model is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from trl_ext.data.columns import WEIGHT, checked, columns_of, over_splits, require_same_columns
from trl_ext.data.texts import problem_of_text
from trl_ext.data.tokens import require_chat_template
from trl_ext.trainers.online.checks import (
    OWN_COLUMNS,
    SCORE_COLUMNS,
    check_reward_columns,
    of_completions,
    reads_win_rates,
)


class PromptData:
    """
    What an online run reads from its datasets.

    Args:
        losses (`dict[str, Loss]`):
            The losses, by name.
        judged (`bool`):
            Whether a judge compares completions, which gives probabilities and win rates, but no rewards.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Of the trainer.
        args ([`OnlineDPOConfig`]):
            Configuration.
        reward_funcs (`Sequence`, *optional*):
            Reward functions and models of the run, which may read columns too.
    """

    def __init__(
        self,
        losses: Mapping[str, Any],
        judged: bool,
        processing_class: Any,
        args: Any,
        reward_funcs: Sequence[Any] = (),
    ):
        self.losses, self.judged, self.processing_class, self.args = losses, judged, processing_class, args
        self.reward_funcs = reward_funcs
        self.columns: list[str] = []

    def training(self, dataset: Any) -> Any:
        """The training data, checked; it decides which columns are read."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        available = columns_of(dataset, "train")
        check_images(available, self.args, self.losses)
        check_reward_columns(self.reward_funcs, available, "train")
        check_repetition(dataset, self.args)
        self.columns = read_columns(available, "train", self.losses, self.judged)
        return check_prompts(dataset, self.columns, "train", self.processing_class)

    def evaluation(self, dataset: Any) -> Any:
        """Evaluation data, one dataset or a dict of them, with the columns that are read from the training data, checked."""
        return over_splits(dataset, self._split)

    def _split(self, dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
        available = columns_of(dataset, split)
        read_columns(available, split, self.losses, self.judged)
        check_reward_columns(self.reward_funcs, available, split)
        require_same_columns(self.columns, available, split)
        return check_prompts(dataset, self.columns, split, self.processing_class)


def check_repetition(dataset: Any, args: Any) -> None:
    """Raise a `ValueError` for data that `num_iterations` cannot repeat."""
    if args.num_iterations == 1:
        return
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`num_iterations={args.num_iterations}` takes prompts several times, and a stream gives each once. Load the dataset "
            "without `streaming=True`."
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` has an order of its own, and `num_iterations="
            f"{args.num_iterations}` one in blocks. Use 'random' or 'sequential'."
        )


def check_images(columns: list[str], args: Any, losses: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for what images exclude."""
    if "image" not in columns:
        return
    if args.num_generations % 2 or "bias_variance" in losses:
        raise ValueError("Prompts with images need an even `num_generations` and a loss other than bias_variance.")
    if getattr(args, "mixture_coef", 0):
        raise ValueError("Prompts with images are not sampled from a mixture; set `mixture_coef=0`.")
    for name, given in (
        ("generation_batch_size", args.generation_batch_size),
        ("num_iterations", args.num_iterations > 1),
        ("steps_per_generation", (args.steps_per_generation or 0) > args.gradient_accumulation_steps),
    ):
        if given:
            raise ValueError(
                f"Prompts with images are generated for one micro-batch at a time and learnt from at once; leave `{name}` out."
            )
    if args.use_vllm:
        raise ValueError(
            "Prompts with images cannot be sampled with vLLM: TRL's method gives back no image tensors, so log-probabilities "
            "would be those of the text alone. Set `use_vllm=False`."
        )


def read_columns(available: list[str], split: str, losses: Mapping[str, Any], judged: bool) -> list[str]:
    """
    The numeric columns of the prompts' dataset that a run reads: those of the losses, and `weight`.

    Args:
        available (`list[str]`):
            The dataset's columns.
        split (`str`):
            What the dataset is called in errors.
        losses (`dict[str, Loss]`):
            The losses, by name.
        judged (`bool`):
            Whether a judge compares completions.

    Raises:
        `ValueError`: If there is no column `prompt`, or a loss requires a column that is not there.
    """
    if "prompt" not in available:
        raise ValueError(
            f"The {split} dataset has no column 'prompt'; its columns are {sorted(available)}. Online training reads "
            "prompts and generates completions itself."
        )
    read = []
    for name, loss in losses.items():
        for column in loss.required_columns:
            if column in SCORE_COLUMNS and judged and not reads_win_rates(loss):
                raise ValueError(f"The loss {name!r} needs {column!r}: rewards, which a `judge` has not.")
            if column == "preference_prob" and not judged:
                raise ValueError(f"The loss {name!r} needs {column!r}: give a `judge` in place of `reward_funcs`.")
            if column not in OWN_COLUMNS and column not in available:
                raise ValueError(
                    f"The loss {name!r} needs the column {column!r}, which the {split} dataset does not have. Its "
                    f"columns are {sorted(available)}."
                )
        read += [column for column in (*loss.required_columns, *loss.optional_columns) if column in available]
    read = [column for column in dict.fromkeys(read) if column not in OWN_COLUMNS and not of_completions(column)]
    return [*read, *([WEIGHT] if WEIGHT in available else [])]


def check_prompts(
    dataset: Dataset | IterableDataset, columns: list[str], split: str, tokenizer: Any
) -> Dataset | IterableDataset:
    """
    The dataset, once its prompts and the numeric `columns` have been read and found usable.

    A stream is checked as it is read: its first row now, each other row when it comes, with the row's number.

    Raises:
        `ValueError`: For a prompt that is missing, empty, neither text nor messages, or of another kind than the first, for
            conversations without a chat template, and for numbers that cannot be used. Names the row.
    """
    dataset = checked(dataset, columns, {}, split)
    first = next(iter(dataset))["prompt"]
    _check_prompt(first, 0, split, first)
    if isinstance(first, list):
        require_chat_template(tokenizer if tokenizer.chat_template else getattr(tokenizer, "tokenizer", tokenizer))
    if isinstance(dataset, Dataset):
        prompts = dataset.select_columns(["prompt"]).with_format("arrow")[:]["prompt"]
        for row, prompt in enumerate(prompts):
            _check_prompt(prompt.as_py(), row, split, first)
        return dataset

    def check_row(example: dict, index: int) -> dict:
        _check_prompt(example["prompt"], index, split, first)
        return example

    return dataset.map(check_row, with_indices=True)


def _check_prompt(prompt: Any, row: int, split: str, first: Any) -> None:
    where = f"The prompt in row {row} of the {split} dataset"
    if not prompt and (prompt is None or isinstance(prompt, (str, list))):
        raise ValueError(f"{where} is empty: {prompt!r}. Remove the row.")
    problem = problem_of_text(prompt)
    if problem is not None:
        raise ValueError(f"{where} {problem}.")
    if type(prompt) is not type(first):
        raise ValueError(
            f"{where} is a {type(prompt).__name__}, the first one a {type(first).__name__}. Give all as text, or all as messages."
        )
