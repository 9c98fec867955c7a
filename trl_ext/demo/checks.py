"""What the demonstration refuses before it builds anything."""

import argparse
import os
from pathlib import Path

from trl_ext.data.paths import refuse_missing_path, refuse_unwritable_folder
from trl_ext.demo import BASELINE, COMPARED, IN_ROUNDS, ONLINE_STEPS, PROCESSES, STEPS
from trl_ext.sources import refuse_unknown_losses


# Columns that the world's pairs have, beside prompt, chosen and rejected
WORLD_COLUMNS = {"score_chosen", "score_rejected", "chosen_empty_trace", "rejected_empty_trace"}


def early(args: argparse.Namespace) -> None:
    """Raise a `ValueError` for what the arguments alone show to be wrong; imports no torch."""
    refuse_unknown_losses(args.loss_type or (), trl=True)
    for check in (steps, seeds, num_processes, data):
        check(args)
    refuse_unwritable_folder(args.output_dir, "output_dir")


def losses(args: argparse.Namespace) -> list[str]:
    """Canonical names of the losses to train; one that cannot be trained on what the arguments say is a `ValueError`."""
    from trl_ext.losses import TRL_LOSS_TYPES, loss_class, resolve_name
    from trl_ext.trainers.online.config import ONLINE_TRL_LOSSES

    if args.loss_type is None:
        return [BASELINE, *COMPARED]
    names = list(dict.fromkeys(resolve_name(name, also=TRL_LOSS_TYPES) for name in args.loss_type))
    for name in names:
        if args.online and name in TRL_LOSS_TYPES and name not in ONLINE_TRL_LOSSES:
            raise ValueError(
                f"`--loss_type {name}` with `--online`: TRL's loss is not defined online; of TRL's, {sorted(ONLINE_TRL_LOSSES)} are."
            )
        if args.dataset_name or name in TRL_LOSS_TYPES:
            continue
        if name in IN_ROUNDS:
            raise ValueError(
                f"`--loss_type {name}`: a loss for rounds of self-play, which the small world does not play. See "
                "`trl-ext iterate` and examples/rounds, or give pairs of such a round with `--dataset_name`."
            )
        if not args.online and not loss_class(name).takes_pairs:
            raise ValueError(
                f"`--loss_type {name}` learns from whole groups of completions, and the small world has pairs. Add `--online`, which "
                "samples groups, or give groups with `--dataset_name`."
            )
        missing = [column for column in loss_class(name).columns if column not in WORLD_COLUMNS]
        if missing:
            raise ValueError(
                f"`--loss_type {name}` needs the columns {missing}, which the small world has not; it has "
                f"{sorted(WORLD_COLUMNS)}. Give data that has them with `--dataset_name`."
            )
    return names


def steps(args: argparse.Namespace) -> int:
    """Training steps per loss, at least one."""
    number = (ONLINE_STEPS if args.online else STEPS) if args.max_steps is None else args.max_steps
    if number < 1:
        raise ValueError(f"`--max_steps {number}`: at least 1 step is needed.")
    return number


def seeds(args: argparse.Namespace) -> list[int]:
    """The seeds, one after the other from the first."""
    if args.seeds < 1:
        raise ValueError(f"`--seeds {args.seeds}`: the number of seeds, at least 1; from 2 on there are intervals.")
    last = args.seed + args.seeds - 1
    if not 0 <= args.seed <= last < 2**32:
        more = f" with `--seeds {args.seeds}`, which makes {last} the last one" if 0 <= args.seed < 2**32 else ""
        raise ValueError(f"`--seed {args.seed}`{more}: a seed is a whole number from 0 to {2**32 - 1}.")
    return list(range(args.seed, last + 1))


def num_processes(args: argparse.Namespace) -> int:
    """How many runs at a time."""
    if args.num_processes is None:
        return min(PROCESSES, os.cpu_count() or 1)
    if args.num_processes < 1:
        raise ValueError(f"`--num_processes {args.num_processes}`: at least 1 process is needed.")
    return args.num_processes


def data(args: argparse.Namespace) -> None:
    """Raise a `ValueError` for a dataset that is not there, and for one beside `--online`."""
    if args.online and args.dataset_name:
        raise ValueError("`--online` needs a reward, which only the small world has; leave out `--dataset_name`.")
    refuse_missing_path(args.dataset_name, "dataset")


def output_folder(args: argparse.Namespace) -> Path:
    """The output folder, made where it is not there."""
    refuse_unwritable_folder(args.output_dir, "output_dir")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
