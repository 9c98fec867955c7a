"""Datasets as TRL prepares them: the tokens of pairs, and the file that reference log-probs are kept in."""

import os
import types

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOTrainer


def with_cache_key(dataset: Dataset, *parts: object) -> Dataset:
    """
    The same dataset with a fingerprint that `parts` go into.

    TRL caches reference log-probs by the dataset's fingerprint and the model's weights alone, though they depend on
    truncation, precision and `ld_alpha` too: a second run with another `max_length` would read stale values.
    """
    keyed = dataset.select(range(len(dataset)))  # a new object over the same table
    keyed._fingerprint = Hasher.hash((dataset._fingerprint, parts))
    if PartialState().num_processes > 1:
        keyed._get_cache_file_path = types.MethodType(_shared_cache_path, keyed)
    return keyed


def _shared_cache_path(dataset: Dataset, fingerprint: str) -> str:
    """
    One file for all processes, called in each: data in memory (or with caching disabled) has a folder in each process, where
    TRL's first process would write what the others never find.
    """
    path = broadcast_object_list([Dataset._get_cache_file_path(dataset, fingerprint)])[0]
    if not all(gather_object([os.path.isdir(os.path.dirname(path))])):
        raise ValueError(
            f"`precompute_ref_log_probs=True` keeps the reference log-probs in {os.path.dirname(path)}, which not every process "
            "can read. Save the dataset with `save_to_disk` where all machines see it and load it from there, or set "
            "`precompute_ref_log_probs=False`."
        )
    return path


def tokenize_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> Dataset:
    """Pairs as the token ids that TRL's trainer makes of them; no row is left out, however long its prompt."""
    whole = types.SimpleNamespace(dataset_num_proc=args.dataset_num_proc, max_length=None)
    return DPOTrainer._prepare_dataset(
        types.SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, whole, "log-probs"
    )
