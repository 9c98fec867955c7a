"""A dataset by hub name or local path."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_preferences(name_or_path: str, split: str = "train") -> Dataset:
    """
    Load one split of a dataset.

    Args:
        name_or_path (`str`):
            A name on the Hugging Face Hub; a JSON, JSON Lines, CSV or Parquet file; a folder of such files; or a folder
            written by [`~datasets.Dataset.save_to_disk`].
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. A single file is one split, whatever it is called.

    Raises:
        `ValueError`: For a file of another kind, and where there is no such dataset or split.
    """
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix not in _BUILDERS:
            raise ValueError(f"Cannot read {name_or_path!r}: expected a file that ends in {sorted(_BUILDERS)}.")
        return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = load_from_disk(str(path))
    else:
        try:
            dataset = load_dataset(name_or_path)
        except FileNotFoundError as error:
            raise ValueError(
                f"There is no dataset {name_or_path!r}: no file or folder of that name here, and none on the hub ({error})."
            ) from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{name_or_path!r} has no split {split!r}; it has {sorted(dataset)}.")
        return dataset[split]
    return dataset
