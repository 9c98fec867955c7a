"""The data of an offline run: which columns the losses read, groups made into rows, and what is tokenized beside TRL's pair."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import trl
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from trl.data_utils import extract_prompt, is_conversational

from trl_ext.data.checks import REFERENCES, TOKENIZED, check_tokenized, say_what_was_dropped
from trl_ext.data.columns import (
    TEXT_COLUMNS,
    WEIGHT,
    checked,
    columns_of,
    list_lengths,
    over_splits,
    require_same_columns,
    require_same_lists,
    used_columns,
)
from trl_ext.data.further import FURTHER, map_further
from trl_ext.data.groups import (
    BEHAVIOUR_LOGPS,
    GROUP_SCORES,
    OTHERS,
    from_groups,
    is_grouped,
    refuse_cut_completions,
)
from trl_ext.data.reasoning import HAS_TRACES, check_pairs, tokenize_empty_trace
from trl_ext.data.texts import checked_texts
from trl_ext.data.tokens import require_chat_template
from trl_ext.data.turns import TURNS, checked_turns, one_message_beside_images, range_of_turns, with_turns
from trl_ext.losses.base import SigmoidLoss
from trl_ext.trainers.loss_types import check_combination
from trl_ext.trainers.terms import check_reads


logger = get_logger(__name__)

# Of a dataset that is handed to `evaluate` and was prepared here before
PREPARED = {FURTHER, GROUP_SCORES, *REFERENCES}


class PreferenceData:
    """
    What an offline run reads from its datasets.

    Args:
        names (`list[str]`):
            Loss types, TRL's among them.
        losses (`dict[str, Loss]`):
            Those of ours. Where the training data has a column `weight`, TRL's `sigmoid` joins them.
        args ([`trl.DPOConfig`], *optional*):
            Configuration.
    """

    def __init__(self, names: list[str], losses: dict[str, Any], args: trl.DPOConfig | None):
        self.names, self.losses, self.args = names, losses, args
        self.columns: list[str] = []
        self.lists: dict[str, int] = {}
        self.pairing: str | None = None
        self.groups = False

    @property
    def empty_trace(self) -> bool:
        """Whether rows have a pair with an empty trace."""
        return TEXT_COLUMNS[0] in self.columns

    @property
    def numeric_columns(self) -> list[str]:
        return [column for column in self.columns if column not in TEXT_COLUMNS]

    @property
    def turns(self) -> bool:
        """Whether a loss reads tokens, so that of conversations the assistant's turns alone are scored."""
        return any("token_logps" in loss.reads for loss in self.losses.values())

    @property
    def signature(self) -> list[str]:
        """Columns of a prepared dataset that the collator reads, beside TRL's."""
        return [*self.numeric_columns, FURTHER, GROUP_SCORES, BEHAVIOUR_LOGPS, *(TURNS if self.turns else ())]

    # Before the model is loaded

    def training(self, dataset: Any) -> Any:
        """The training data, checked; what it holds decides what is read from it."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        available, losses = columns_of(dataset, "train"), self.losses
        if is_grouped(available):
            takes = any(loss.takes_groups for loss in losses.values())
            self.pairing = getattr(self.args, "pairing", None) or ("group" if takes else "best_worst")
            self.groups = self.pairing == "group"
            dataset = from_groups(dataset, self.pairing, "train")
            available = columns_of(dataset, "train")
        if WEIGHT in available:
            self.losses = losses = self._weighted()
        self.columns = used_columns(available, losses, "train")
        if self.groups:
            self.columns = list(dict.fromkeys([*self.columns, "score_chosen", "score_rejected"]))
            if self.empty_trace or getattr(self.args, "ld_alpha", None) is not None:
                raise ValueError(
                    "Whole groups cannot be combined with `bias_variance` or `ld_alpha`, which are defined on pairs. "
                    'Set `pairing="best_worst"`.'
                )
        self._check_reads(available)
        self._refuse_vision(available)
        dataset = _checked_references(dataset, available, "train")
        dataset = checked_texts(dataset, "train", self.empty_trace)
        dataset = one_message_beside_images(dataset, "train") if self.turns else dataset
        dataset = checked(dataset, self.columns, losses, "train")
        self.lists = self._list_lengths(dataset)
        for remark in filter(None, (loss.remark(self.columns) for loss in losses.values())):
            logger.warning(remark)
        return dataset

    def evaluation(self, dataset: Any) -> Any:
        """Evaluation data, one dataset or a dict of them, with the same columns as the training data, checked."""
        return over_splits(dataset, self._split)

    def _split(self, dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
        available = columns_of(dataset, split)
        if is_grouped(available):
            # Where training is on pairs, whole groups cannot be collated: the best against the worst
            dataset = from_groups(dataset, self.pairing or "best_worst", split)
            available = columns_of(dataset, split)
        dataset = checked_texts(_checked_references(dataset, available, split), split, self.empty_trace)
        if not self.losses:
            return dataset
        if self.groups and GROUP_SCORES not in available:
            raise ValueError(
                f"The {split} dataset holds no groups, the train dataset does. Its columns are {available}."
            )
        read = self.columns
        if self.empty_trace and FURTHER in available:
            read = self.numeric_columns
        else:
            used_columns(available, self.losses, split)
        require_same_columns(read, available, split)
        self._check_reads(available)
        dataset = one_message_beside_images(dataset, split) if self.turns else dataset
        dataset = checked(dataset, self.columns, self.losses, split)
        require_same_lists(self._list_lengths(dataset), self.lists, split)
        return dataset

    def _list_lengths(self, dataset: Dataset | IterableDataset) -> dict[str, int]:
        """How long the lists of scores are, where a loss takes them."""
        takes = any(loss.takes_lists for loss in self.losses.values())
        return list_lengths(dataset, self.numeric_columns) if takes else {}

    def _weighted(self) -> dict[str, Any]:
        """The losses that a `weight` column scales: ours, and TRL's `sigmoid`, which then is computed here."""
        unweighted = [name for name in self.names if name not in self.losses and name != "sigmoid"]
        if unweighted:
            raise ValueError(
                f"The train dataset has a column 'weight', which scales each pair's loss, but TRL's {unweighted} cannot "
                "be weighted per pair. Use `sigmoid` or a loss of this package, or drop the column: "
                "dataset.remove_columns('weight')."
            )
        weighted = {name: self.losses[name] if name in self.losses else SigmoidLoss() for name in self.names}
        if self.args is not None:
            check_combination(self.args, self.names, weighted)
        return weighted

    def _check_reads(self, available: Sequence[str]) -> None:
        """Refuse losses that read what this data, or this config, cannot give them."""
        check_reads(self.losses, self.groups)
        for name, loss in self.losses.items():
            if "behaviour_logps" in loss.reads and BEHAVIOUR_LOGPS not in available:
                raise ValueError(
                    f"The loss {name!r} reads log-probs under the policy that sampled the completions: the column "
                    f"{BEHAVIOUR_LOGPS!r}, with a list of one number (nats) per completion of a group. The columns are "
                    f"{sorted(available)}."
                )
            if {"token_logps", "ref_logps"} <= set(loss.reads) and getattr(
                self.args, "precompute_ref_log_probs", False
            ):
                raise ValueError(
                    f"The loss {name!r} reads the reference's log-probs of tokens, and `precompute_ref_log_probs=True` keeps one "
                    "number per completion. Set `precompute_ref_log_probs=False`."
                )
            if "token_logps" in loss.reads and getattr(self.args, "ld_alpha", None) is not None:
                raise ValueError(
                    f"The loss {name!r} reads log-probs of tokens, which `ld_alpha={self.args.ld_alpha}` (LD-DPO) does not weigh: it "
                    "weighs sums. Leave one of the two out."
                )

    def _refuse_vision(self, available: Sequence[str]) -> None:
        vision = {"image", "images"} & set(available)
        needy = [name for name, loss in self.losses.items() if TEXT_COLUMNS[0] in loss.required_columns]
        if needy and vision:
            raise ValueError(
                f"{needy} cannot be used on a vision dataset: its completions are tokenized while training, the "
                "empty-trace pair when the dataset is prepared. Remove the images, or choose another loss."
            )
        if self.groups and vision:
            raise ValueError(
                "Whole groups cannot be used with images: completions are tokenized while training, and the collator of a vision "
                'model takes pairs. Set `pairing="best_worst"`.'
            )
        if needy and "prompt" not in available:
            raise ValueError(
                f"{needy} needs an explicit column 'prompt': the empty-trace pair is rendered after it. The train "
                f"dataset has {sorted(available)}; `trl.extract_prompt` splits it off."
            )

    # Tokens

    def tokenized(
        self, dataset: Any, processing_class: Any, tokenizer: Any, args: trl.DPOConfig, name: str, tokenize: Callable
    ) -> Any:
        """
        The dataset as token ids.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Checked.
            processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
                Of the trainer.
            tokenizer (`PreTrainedTokenizerBase`):
                Its tokenizer.
            args ([`trl.DPOConfig`]):
                Configuration.
            name (`str`):
                What the dataset is called in errors.
            tokenize (`Callable`):
                TRL's own preparation, called with dataset, processing class, config and name.
        """
        available = set(columns_of(dataset, name))
        if set(TOKENIZED) <= available:
            if available & PREPARED:
                return dataset  # prepared here before, such as `trainer.eval_dataset` handed to `evaluate`
            # Tokenized by the user, such as steps that no end of sequence follows
            if self.turns and available & set(TURNS):
                dataset = checked_turns(dataset, name)
            self._remark_on_turns(dataset, name)
            return check_tokenized(dataset, name, args.max_length, args.truncation_mode == "keep_start")
        conversational = is_conversational(next(iter(dataset)))
        if conversational:
            require_chat_template(processing_class)
        if conversational and self.turns:
            if "prompt" not in available:  # else earlier turns would count as the completion's
                dataset = dataset.map(extract_prompt)
            tokenize = functools.partial(with_turns, tokenize)
        if self.empty_trace:
            dataset = dataset.map(check_pairs, with_indices=True, fn_kwargs={"split": name})
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        try:
            dataset = tokenize(dataset, processing_class, args, name)
        except TemplateError as error:
            raise ValueError(f"The chat template cannot render a row of the {name} dataset: {error}") from error
        if rows is not None:
            say_what_was_dropped(rows, len(dataset), name, args.max_length)
        self._remark_on_turns(dataset, name)
        if self.groups:
            return self._with_others(dataset, processing_class, args, name, tokenize)
        if not self.empty_trace:
            return dataset
        options = {}
        if isinstance(dataset, Dataset):
            pair = {column: dataset.features[column] for column in TOKENIZED}
            features = {column: kind for column, kind in dataset.features.items() if column != HAS_TRACES}
            options = {
                "num_proc": args.dataset_num_proc,
                "features": type(dataset.features)({**features, FURTHER: [pair]}),
            }
        return dataset.map(
            tokenize_empty_trace, fn_kwargs={"tokenizer": tokenizer}, remove_columns=[HAS_TRACES], **options
        )

    def _remark_on_turns(self, dataset: Dataset | IterableDataset, name: str) -> None:
        """Say what follows where no completion has a second turn, and refuse what does not go with several. Streams are not read."""
        if not self.turns or not isinstance(dataset, Dataset):
            return
        lowest, highest = range_of_turns(dataset) if TURNS[0] in dataset.column_names else (0, 0)
        if lowest < 0 and self.args.precompute_ref_log_probs:
            raise ValueError(
                f"`precompute_ref_log_probs=True` scores whole completions, and of the {name} dataset the assistant's turns alone are "
                "scored, since a loss in use reads them. Set `precompute_ref_log_probs=False`."
            )
        if name == "train" and highest < 1:
            for remark in filter(None, (loss.one_turn for loss in self.losses.values())):
                logger.warning(remark)

    def _with_others(
        self, dataset: Dataset, processing_class: Any, args: Any, name: str, tokenize: Callable
    ) -> Dataset:
        """Whole groups: best and worst are TRL's pair, and the others are tokenized by TRL as pairs of their own."""
        # A plain copy: `dataclasses.replace` would run `__post_init__` and reset the state of accelerate
        whole = copy.copy(args)
        whole.max_length = None  # rows were dropped above, where their prompts leave no room

        def others(flat: Dataset) -> Dataset:
            return tokenize(flat, processing_class, whole, f"{name} (other completions)")

        beside = [column for column in ("prompt", "tools", "chat_template_kwargs") if column in dataset.column_names]
        made = [*TOKENIZED, *(name for name in TURNS if name in dataset.column_names)]
        dataset = map_further(dataset, OTHERS, others, made, beside)
        dataset = dataset.map(_single_last)
        if any("behaviour_logps" in loss.reads for loss in self.losses.values()):
            refuse_cut_completions(dataset, args.max_length, name)
        return dataset


def _checked_references(
    dataset: Dataset | IterableDataset, available: Sequence[str], split: str
) -> Dataset | IterableDataset:
    """The dataset, once log-probs of a reference that it brings have been found to be such."""
    given = [name for name in REFERENCES if name in available]
    if len(given) == 1:
        raise ValueError(
            f"The {split} dataset has the column {given[0]!r} alone; the reference's log-probs are {list(REFERENCES)}. Give both, or neither."
        )
    return checked(dataset, given, {}, split)


def _single_last(example: dict) -> dict:
    """The last of an odd number of others stands alone; to be tokenized it stood twice."""
    if len(example[GROUP_SCORES]) % 2:
        example[FURTHER][-1]["rejected_ids"] = []
    return example
