"""
`trl-ext demo`: the main job with nothing to download.

`world.py` is the world and its true reward, `lm.py` the small language model, `data.py` what is sampled from it and measured,
`training.py` one run, `online.py` the settings of those that sample while they train, `processes.py` several at a time,
`equal_kl.py` how their paths are read, `judging.py` what they say together, `report.py` the table, the plot and the files,
`examples.py` the table of what policies write. `demonstration.py` puts it together, after `checks.py` has refused what cannot be.
"""

import argparse


# Plain DPO is the row that the others are compared with
BASELINE = "sigmoid"
# Those that learn from what the pairs of the world hold beside two texts
COMPARED = ("anchored", "bias_variance", "length_regularized", "margin_adaptive", "offset")
# Losses of self-play: they read what only rounds write into the pairs, or win rates, and the world gives rewards
IN_ROUNDS = ("inpo", "sppo_soft")
STEPS, ONLINE_STEPS = 50, 40
SEEDS, PROCESSES = 5, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Build a small language model, sample preferences whose true reward is known, train DPO and losses of this package "
        "from the same start with several seeds, and compare them at equal KL. Takes a few minutes; nothing is downloaded."
    )
    parser.add_argument(
        "--loss_type",
        nargs="+",
        metavar="NAME",
        help=f"losses to train, by name or alias (default: {', '.join((BASELINE, *COMPARED))}; not {' and '.join(IN_ROUNDS)}, "
        "which learn in rounds: `trl-ext iterate`)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="first of the seeds, and that of the start (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=SEEDS,
        metavar="N",
        help="how many seeds each loss is trained with: other pairs, other order; one gives no intervals (default: %(default)s)",
    )
    parser.add_argument(
        "--num_processes",
        type=int,
        default=None,
        metavar="N",
        help=f"runs at a time, one thread each (default: {PROCESSES}, or 1 on a machine with one core)",
    )
    parser.add_argument(
        "--output_dir", default="trl-ext-demo", help="where models and results go (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset_name",
        metavar="PATH",
        help="preference data of your own (file, folder or hub name; prompt, chosen, rejected and what the losses need) "
        "in place of the small world; the true reward is then unknown",
    )
    parser.add_argument(
        "--online",
        action="store_true",
        help="train online: the policy writes, a reward that likes long answers scores, OnlineDPOTrainer learns",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=None,
        help=f"training steps per loss (default: {STEPS}, and {ONLINE_STEPS} with --online)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; returns the exit status."""
    from trl_ext.demo import checks

    checks.early(args)
    from trl_ext.demo.demonstration import demonstrate

    return demonstrate(args)
