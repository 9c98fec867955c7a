"""
Scores for preference data: from a reward model, a function, or a model of pairs.

Each text is scored once, whatever dataset it stands in and however often: results lie on disk by what they depend on (text,
weights, template, truncation), are written batch by batch, and a run that was killed goes on where it was.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template
from trl.trainer.utils import hash_module

from trl_ext.data.cache import Ledger, content_key, default_folder, processes
from trl_ext.data.calibration import fit_temperature


Text = Any  # a string, or a list of messages


@dataclass
class RewardModel:
    """
    A sequence classifier whose first logit is the reward.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub name, folder or object.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its own tokenizer, whose chat template renders conversations; loaded from the model's name by default.
        max_length (`int`, *optional*):
            Tokens that are kept, from the left, so that the end of the completion stays; the model's own limit by default.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the weights, for a model that is loaded here.
    """

    model: str | nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    dtype: Any = "auto"

    def load(self) -> None:
        name = self.model if isinstance(self.model, str) else self.model.config._name_or_path
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        if isinstance(self.model, str):
            self.model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=1, dtype=self.dtype)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        if self.max_length is None:
            limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            known = self.tokenizer.model_max_length
            self.max_length = min(limit or 10**9, known if known < 10**9 else 10**9)

    def key(self) -> str:
        """What a score depends on beside the text."""
        self.load()
        return content_key(
            hash_module(self.model), self.tokenizer.chat_template, self.tokenizer.get_vocab(), self.max_length
        )

    def render(self, prompt: Text, completion: Text) -> str:
        if isinstance(completion, str):
            return prompt + completion
        return apply_chat_template({"messages": [*prompt, *completion]}, self.tokenizer)["text"]

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        self.model.eval()
        texts = [self.render(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"][-self.max_length :] for text in texts]
        width = max(map(len, ids))
        pad_id, device = self.tokenizer.pad_token_id, next(self.model.parameters()).device
        rows = torch.tensor([row + [pad_id] * (width - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        return self.model(input_ids=rows, attention_mask=mask).logits[:, 0].float().tolist()


@dataclass
class RewardFunction:
    """
    A function of completions, as the reward functions of online training: `function(prompts=, completions=)` gives a number
    for each.
    """

    function: Callable[..., Sequence[float]]

    def load(self) -> None:
        pass

    def key(self) -> str:
        return f"function-{Hasher.hash(self.function)}"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        return list(self.function(prompts=list(prompts), completions=list(completions)))


@dataclass
class PairFunction:
    """
    A judge of two completions: `function(prompts, completions_a, completions_b)` gives for each the probability, in
    [0, 1], that the first is preferred. Gives pairs the column `preference_prob`, and groups the mean probability of winning.
    """

    function: Callable[[list, list, list], Sequence[float]]

    def key(self) -> str:
        return f"pair-{Hasher.hash(self.function)}"


@dataclass
class Ensemble:
    """
    Several rewards as one.

    Args:
        rewards (`list`):
            What [`score_preferences`] takes as `reward`, each.
        combine (`str`, *optional*, defaults to `"mean"`):
            `"mean"`, or `"min"`: the most cautious.
    """

    rewards: list[Any]
    combine: str = "mean"

    def __post_init__(self):
        if self.combine not in ("mean", "min") or not self.rewards:
            raise ValueError(f"An ensemble combines at least one reward by 'mean' or 'min'; got {self!r}.")


def as_reward(reward: Any) -> Any:
    """A path, a model or a function as one of the classes of this module."""
    if isinstance(reward, (RewardModel, RewardFunction, PairFunction, Ensemble)):
        return reward
    if isinstance(reward, (list, tuple)):
        return Ensemble(list(reward))
    if isinstance(reward, (str, nn.Module)):
        return RewardModel(reward)
    if callable(reward):
        return RewardFunction(reward)
    raise ValueError(
        f"`reward={reward!r}` is none of: a model's name, folder or object, a function, a PairFunction, an Ensemble."
    )


def score_preferences(
    dataset: Dataset,
    reward: Any,
    *,
    batch_size: int = 16,
    temperature: float | str = 1.0,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """
    Add scores to preference data.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs (`prompt`, `chosen`, `rejected`) or groups (`prompt`, `completions`), plain or conversational.
        reward:
            A sequence classifier by name, folder or object ([`RewardModel`] for its own tokenizer or length), a function
            ([`RewardFunction`]), a judge of two ([`PairFunction`]), or several ([`Ensemble`]).
        batch_size (`int`, *optional*, defaults to `16`):
            Texts at a time.
        temperature (`float` or `str`, *optional*, defaults to `1.0`):
            What pointwise scores are divided by. `"fit"` takes the temperature at which they explain the labels of the pairs
            best under Bradley-Terry, so that differences are logits: the unit of `margin_adaptive` and `anchored`.
        cache_dir (`str` or `Path`, *optional*):
            Where results are kept; `$TRL_EXT_CACHE` or `~/.cache/trl_ext` by default.

    Returns:
        The dataset with `score_chosen` and `score_rejected` (`preference_prob` from a judge of two), or with `scores`.

    Raises:
        `ValueError`: For rows that cannot be scored, before the work starts, and for scores that are not finite. What was
            scored by then stays on disk.
    """
    reward = as_reward(reward)
    grouped = "completions" in dataset.column_names
    check_texts(dataset, grouped)
    folder = Path(cache_dir) if cache_dir is not None else default_folder() / "scores"
    if isinstance(reward, PairFunction):
        if temperature != 1.0:
            raise ValueError("`temperature` has no meaning for a judge of two, whose answers are probabilities.")
        return _add_preferences(dataset, reward, grouped, batch_size, folder)
    pairs = [
        (row["prompt"], completion)
        for row in dataset
        for completion in (row["completions"] if grouped else (row["chosen"], row["rejected"]))
    ]
    scores = iter(_scores(pairs, reward, batch_size, folder))
    if grouped:
        columns = {"scores": [[next(scores) for _ in row] for row in dataset["completions"]]}
    else:
        values = [(next(scores), next(scores)) for _ in range(len(dataset))]
        columns = {"score_chosen": [a for a, _ in values], "score_rejected": [b for _, b in values]}
    if temperature == "fit":
        if grouped:
            raise ValueError(
                '`temperature="fit"` needs labelled pairs, and groups have none. Fit it on pairs, give the number.'
            )
        temperature = fit_temperature(
            [a - b for a, b in zip(columns["score_chosen"], columns["score_rejected"], strict=True)]
        )
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise ValueError(f'`temperature={temperature!r}` must be a positive number or "fit".')

    def scaled(value: Any) -> Any:
        return [scaled(each) for each in value] if isinstance(value, list) else value / temperature

    return _with_columns(dataset, {name: scaled(values) for name, values in columns.items()})


def check_texts(dataset: Dataset, grouped: bool) -> None:
    """Raise a `ValueError` for the first row that has no prompt, or a completion that is missing, empty or of another kind."""
    wanted = ["prompt", "completions"] if grouped else ["prompt", "chosen", "rejected"]
    missing = [name for name in wanted if name not in dataset.column_names]
    if missing:
        hint = " `trl.extract_prompt` splits it off." if missing == ["prompt"] else ""
        raise ValueError(f"The dataset lacks {missing}; its columns are {sorted(dataset.column_names)}.{hint}")
    for index, row in enumerate(dataset):
        prompt = row["prompt"]
        if not isinstance(prompt, (str, list)) or (isinstance(prompt, list) and not prompt):
            raise ValueError(f"Row {index}: the prompt is {prompt!r}; expected text or messages.")
        completions = row["completions"] if grouped else [row["chosen"], row["rejected"]]
        if not isinstance(completions, list) or not completions:
            raise ValueError(f"Row {index}: `completions` is {completions!r}; expected a list of at least one.")
        for completion in completions:
            empty = completion is None or not completion
            if isinstance(completion, list) and completion:
                empty = not str(completion[-1].get("content") or "").strip()
            if empty or type(completion) is not type(prompt):
                raise ValueError(
                    f"Row {index}: the completion {completion!r} is {'empty' if empty else 'of another kind than its prompt'}. "
                    "Remove the row, or give text for a text prompt and messages for messages."
                )


def _scores(pairs: list[tuple[Text, Text]], reward: Any, batch_size: int, folder: Path) -> list[float]:
    """Score of each (prompt, completion), in their order."""
    if isinstance(reward, Ensemble):
        members = [_scores(pairs, as_reward(each), batch_size, folder) for each in reward.rewards]
        combine = min if reward.combine == "min" else lambda values: sum(values) / len(values)
        return [combine(values) for values in zip(*members, strict=True)]
    state = processes()
    name = reward.key()
    if isinstance(reward, RewardModel):
        reward.model.to(state.device)
    keys = [content_key(*pair) for pair in pairs]
    known = _computed(
        name,
        dict(zip(keys, pairs, strict=True)),
        lambda batch: reward([prompt for prompt, _ in batch], [completion for _, completion in batch]),
        size=lambda pair: len(str(pair[0])) + len(str(pair[1])),
        batch_size=batch_size,
        folder=folder,
    )
    return [known[key] for key in keys]


def _computed(
    name: str, work: dict[str, Any], function: Callable, size: Callable, batch_size: int, folder: Path
) -> dict[str, float]:
    """`function` of each item that is not on disk yet, shared among processes, longest first."""
    state = processes()
    ledger = Ledger(folder, name, str(state.process_index))
    known = ledger.read()
    todo = sorted((key for key in work if key not in known), key=lambda key: -size(work[key]))
    state.wait_for_everyone()
    mine = todo[state.process_index :: state.num_processes]
    done: dict[str, float] = {}
    bar = tqdm(total=len(mine), desc="scoring", unit="text", disable=not state.is_main_process or not mine)
    with bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            values = function([work[key] for key in batch])
            if len(values) != len(batch):
                raise ValueError(f"The reward returned {len(values)} scores for {len(batch)} texts.")
            for key, value in zip(batch, values, strict=True):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ValueError(f"The reward returned {value!r} for {work[key]!r}; expected a finite number.")
            fresh = {key: float(value) for key, value in zip(batch, values, strict=True)}
            ledger.append(fresh)
            done |= fresh
            bar.update(len(batch))
    for part in gather_object([done]):
        known |= part
    return known


def _add_preferences(dataset: Dataset, reward: PairFunction, grouped: bool, batch_size: int, folder: Path) -> Dataset:
    """Each two completions of a row compared once."""

    def twos(row: dict) -> list[tuple[int, int]]:
        count = len(row["completions"]) if grouped else 2
        return [(i, j) for i in range(count) for j in range(i + 1, count)]

    def texts(row: dict) -> list[Text]:
        return row["completions"] if grouped else [row["chosen"], row["rejected"]]

    triples = [(row["prompt"], texts(row)[i], texts(row)[j]) for row in dataset for i, j in twos(row)]
    keys = [content_key(*triple) for triple in triples]

    def compare(batch: list[tuple[Text, Text, Text]]) -> list[float]:
        prompts, first, second = (list(column) for column in zip(*batch, strict=True))
        values = [float(value) for value in reward.function(prompts, first, second)]
        bad = [value for value in values if not 0 <= value <= 1]
        if bad:
            raise ValueError(f"The judge returned {bad[0]!r}; expected probabilities in [0, 1].")
        return values

    known = _computed(
        reward.key(),
        dict(zip(keys, triples, strict=True)),
        compare,
        lambda triple: len(str(triple)),
        batch_size,
        folder,
    )
    answers = iter(known[key] for key in keys)
    if not grouped:
        return _with_columns(dataset, {"preference_prob": list(answers)})
    scores = []
    for row in dataset:
        wins = [0.0] * len(row["completions"])
        for i, j in twos(row):
            p = next(answers)
            wins[i] += p
            wins[j] += 1 - p
        scores.append([value / max(len(wins) - 1, 1) for value in wins])
    return _with_columns(dataset, {"scores": scores})


def _with_columns(dataset: Dataset, columns: dict[str, list]) -> Dataset:
    there = [name for name in columns if name in dataset.column_names]
    return concatenate_datasets([dataset.remove_columns(there), Dataset.from_dict(columns)], axis=1)
