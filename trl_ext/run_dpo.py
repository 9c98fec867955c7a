"""
TRL's own `dpo` command with our classes: what it is given is looked at before models and data are loaded, and what cannot be
used ends in one message.
"""

import argparse
import difflib
import os
import traceback
from pathlib import Path
from typing import Any, NoReturn

from trl.scripts import dpo
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, ScriptArguments, TrlParser

from trl_ext import sources
from trl_ext.data.paths import BUILDERS, refuse_misread_files, refuse_missing_path, refuse_unwritable_folder
from trl_ext.reading import read_text, read_yaml
from trl_ext.rounds.settings import refuse_wrong_types


# Nothing above imports torch; what does is imported where the arguments have been looked at
MODEL_CONFIG = (("trl", "trainer/model_config.py"),)


def run(arguments: list[str]) -> None:
    """
    Train as `trl dpo` does.

    Args:
        arguments (`list[str]`):
            Those of the command line. A `.json`, `.jsonl`, `.csv` or `.parquet` file, or a folder that `save_to_disk` has
            written, can be the `--dataset_name`.

    Raises:
        `ValueError`: For arguments, models and data that cannot be used.
    """
    arguments = [
        part for each in arguments for part in (each.split("=", 1) if each.startswith("--config=") else [each])
    ]
    check_early(arguments)
    # From here on torch is imported
    from datasets.exceptions import DatasetsError

    from trl_ext.trainers.arguments import explained
    from trl_ext.trainers.model_card import DATASET_NAME
    from trl_ext.trainers.patch import patch_trl

    patch_trl()
    parser = dpo.make_parser(prog="trl-ext run dpo")
    parser.error = _refuse  # argparse would print two hundred options first
    _check(_given(parser, arguments))
    try:
        script, training, model, data = parser.parse_args_and_config(arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(explained(error)) from error
    name, splits = script.dataset_name, (script.dataset_train_split, script.dataset_test_split)
    _read_local_data(script, training, data)
    # The model card names a file, but not where it lies
    token = DATASET_NAME.set(Path(name).name if name and Path(name).exists() else name)
    try:
        dpo.main(script, training, model, data)
    except RuntimeError as error:  # of a dataset that is a script, which `datasets` does not run
        if "Dataset scripts" not in str(error):
            raise
        raise ValueError(f"The dataset cannot be read: {error}.") from error
    except (ValueError, ImportError, OSError, KeyError, StopIteration, DatasetsError) as error:
        if "training_step" in (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise  # not about what was given: training has begun
        if isinstance(error, KeyError) and error.args[0] not in splits:
            raise
        if isinstance(error, DatasetsError):
            raise ValueError(f"The dataset {name!r} cannot be read: {error.__cause__ or error}") from error
        raise ValueError(_said(error, name, splits, model.model_name_or_path)) from error
    finally:
        DATASET_NAME.reset(token)


def check_early(arguments: list[str]) -> None:
    """
    Raise a `ValueError` for what the arguments alone show to be wrong, before torch is imported: options, settings of the config
    file, paths, losses. Options are read from the sources of their classes; all is looked at again with the classes themselves.
    """
    options = [sources.stand_in(files) for files in (sources.DPO_CONFIG, MODEL_CONFIG)]
    if None in options or {"-h", "--help"} & set(arguments):
        return
    parser = TrlParser((ScriptArguments, *options, DatasetMixtureConfig), prog="trl-ext run dpo")
    parser.error = _refuse
    given = _given(parser, arguments)
    losses = given.loss_type if isinstance(given.loss_type, (list, tuple)) else [given.loss_type]
    sources.refuse_unknown_losses(losses, trl=True)
    sources.refuse_unknown_hyperparameters(losses, given.loss_kwargs)
    _check(given)
    _read_local_data(given, given, given)


def _said(error: Exception, dataset: str | None, splits: tuple[str, str], model: str) -> str:
    """What went wrong before the first step, in one message."""
    if "chat_template" in str(error):
        return (
            f"The dataset holds conversations, and the tokenizer of {model!r} has no chat template to render them with. Use a "
            "model that has one, or a dataset of plain text."
        )
    if isinstance(error, KeyError):
        return (
            f"The dataset {dataset!r} has no split {error.args[0]!r}; see --dataset_train_split, --dataset_test_split."
        )
    if isinstance(error, StopIteration):
        return f"The dataset {dataset!r} is empty."
    return str(error)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _given(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """All options with their values, from the command line and the config file; an unknown one is refused."""
    rest = list(arguments)
    config: dict[str, Any] = {}
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise ValueError("--config needs the path of a YAML file.")
        config = _config_file(rest[at + 1])
        del rest[at : at + 2]
    known = vars(parser.parse_args([])) if not {"-h", "--help"} & set(rest) else {}
    unknown = [name for name in config if name not in known and name != "env"] if known else []
    if unknown:
        raise ValueError(
            f"{arguments[arguments.index('--config') + 1]}: unknown settings {unknown}.{_near(unknown, known)}"
        )
    # Text is read as on the command line, which also takes 1 for true
    values = {
        name: value for name, value in config.items() if not isinstance(value, str) and value not in (None, 0, 1)
    }
    fields = sources.config_fields((*sources.DPO_CONFIG, *MODEL_CONFIG))
    refuse_wrong_types(values, {name: field.type for name, field in fields.items()}, "")
    parser.set_defaults_with_config(**{name: value for name, value in config.items() if name != "env"})
    given, extra = parser.parse_known_args(rest)
    if extra:
        flags = [each for each in extra if each.startswith("-")]
        if not flags:
            raise ValueError(f"The arguments {extra} belong to no option. A value follows its option: --name value.")
        raise ValueError(f"Unknown options {flags}.{_near(flags, known)} `trl-ext run dpo --help` lists all.")
    return given


def _config_file(name: str) -> dict[str, Any]:
    if not Path(name).is_file():
        raise ValueError(f"There is no config file {name!r}; the working folder is {os.getcwd()!r}.")
    config = read_yaml(read_text(name), f"The config file {name!r}")
    if not isinstance(config, dict):
        raise ValueError(f"The config file {name!r} holds {config!r}; expected settings, one `name: value` per line.")
    env = config.get("env", {})
    named = isinstance(env, dict) and all(
        isinstance(each, str) and each and not {"=", "\0"} & set(each) for each in env
    )
    if not named or not all(isinstance(value, (str, int, float)) and "\0" not in str(value) for value in env.values()):
        raise ValueError(
            f"The config file {name!r} has `env={env!r}`; expected environment variables, each `NAME: text`."
        )
    return config


def _near(names: list[Any], known: Any) -> str:
    """The nearest known name to each, as sentences."""
    names = [str(name) for name in names]
    dashes = {name: "--" if name.startswith("-") else "" for name in names}
    found = {name: difflib.get_close_matches(name.strip("-").split("=")[0], list(known), n=1) for name in names}
    return "".join(f" Did you mean '{dashes[name]}{near[0]}'?" for name, near in found.items() if near)


def _check(given: argparse.Namespace) -> None:
    """Refuse what would fail only after models and data are loaded, or behind another message."""
    missing = [] if given.model_name_or_path else ["--model_name_or_path"]
    if not given.dataset_name and not given.datasets:
        missing.append("--dataset_name")
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing. Give a hub name or a path, here or in a --config file.")
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        value = getattr(given, name)
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"`{name}={value!r}` is a {type(value).__name__}; expected a hub name or a path, as text."
            )
    refuse_missing_path(given.model_name_or_path, "model")
    folder = Path(given.model_name_or_path)
    if folder.is_dir() and not any((folder / f"{kind}config.json").exists() for kind in ("", "adapter_")):
        raise ValueError(f"The folder {str(folder)!r} holds no model: it has no config.json.")
    if folder.is_file():
        raise ValueError(f"The model {str(folder)!r} is a file; give the folder that `save_pretrained` wrote.")
    for name in ("teacher_model_name_or_path", "reverse_model_name_or_path"):
        refuse_missing_path(getattr(given, name, None), f"model --{name}")  # options that TRL lacks
    for name in [_path_of(each) for each in _listed(given.datasets)] or [given.dataset_name]:
        refuse_missing_path(name, "dataset")
    checkpoint = given.resume_from_checkpoint
    if isinstance(checkpoint, str) and checkpoint.lower() not in ("true", "false") and not Path(checkpoint).is_dir():
        raise ValueError(
            f"There is no checkpoint {checkpoint!r} to resume from; the working folder is {os.getcwd()!r}."
        )
    if given.output_dir is not None:
        refuse_unwritable_folder(given.output_dir, "output_dir")
    if given.max_length is not None and given.max_length < 2:
        raise ValueError(f"--max_length {given.max_length} leaves no room for a prompt and a completion.")
    if given.report_to not in (None, "none", ["none"]):
        from trl_ext.trainers.arguments import refuse_missing_trackers

        refuse_missing_trackers(given.report_to)
    if given.use_liger_kernel:
        from trl_ext.trainers.arguments import refuse_liger_without_gpu

        refuse_liger_without_gpu(given.use_cpu)


def _listed(datasets: Any) -> list:
    if not isinstance(datasets, (list, tuple, type(None))):
        raise ValueError(
            f"`datasets={datasets!r}` is a {type(datasets).__name__}; expected a list, each entry with a `path`."
        )
    return list(datasets or ())


def _path_of(dataset: Any) -> str:
    path = dataset.get("path") if isinstance(dataset, dict) else None
    if not isinstance(path, str):
        raise ValueError(
            f"`datasets` has the entry {dataset!r}; expected settings of a dataset with its `path`, a hub name or a folder."
        )
    return path


def _read_local_data(script: Any, training: Any, data: Any) -> None:
    """Have TRL read a local file or a folder of `save_to_disk` by the `datasets` option, which knows how."""
    if not script.dataset_name or data.datasets:
        return
    path = Path(script.dataset_name)
    if path.is_file():
        if script.dataset_config is not None:
            raise ValueError(
                f"{script.dataset_name!r} is a file and has no configurations: leave --dataset_config out."
            )
        if script.dataset_train_split != "train":
            raise ValueError(
                f"{script.dataset_name!r} is a file and has no split {script.dataset_train_split!r}: leave --dataset_train_split out."
            )
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(f"Cannot read {script.dataset_name!r}: expected a file that ends in {sorted(BUILDERS)}.")
        refuse_misread_files(path)
        kind, files = BUILDERS[path.suffix.lower()], path
    elif (path / "dataset_info.json").is_file():
        kind, files = "arrow", path / "*.arrow"
    elif (path / "dataset_dict.json").is_file():
        if not (path / script.dataset_train_split).is_dir():
            raise ValueError(f"{script.dataset_name!r} has no split {script.dataset_train_split!r}.")
        kind, files = "arrow", path / script.dataset_train_split / "*.arrow"
    else:
        return
    if training.eval_strategy != "no" and data.test_split_size is None:
        raise ValueError(
            f"{script.dataset_name!r} is read as one split, and --eval_strategy needs a second one. Split some off with "
            "--test_split_size 0.1, or leave --eval_strategy out."
        )
    script.dataset_name, script.dataset_train_split = None, "train"
    data.streaming = data.streaming or script.dataset_streaming
    data.datasets = [DatasetConfig(path=kind, data_files=str(files))]
