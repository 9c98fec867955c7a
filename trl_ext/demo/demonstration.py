"""The whole demonstration, from an empty folder to a table, sentences, a plot and trained models."""

import argparse
from typing import Any

from datasets import Dataset
from rich.console import Console

from trl_ext.demo import BASELINE, checks, data, examples, report
from trl_ext.demo.data import own_dataset, own_start, own_task, world_start
from trl_ext.demo.judging import judge, sentence
from trl_ext.demo.processes import measured_start, prepare, processes, run_once, start_in
from trl_ext.demo.progress import progress
from trl_ext.demo.training import Plan, one_thread, quiet


def demonstrate(args: argparse.Namespace) -> int:
    """Check what was asked for, train, and show what came of it."""
    console = Console()
    names, steps, seeds = checks.losses(args), checks.steps(args), checks.seeds(args)
    number = checks.num_processes(args)
    checks.data(args)
    plan = Plan(checks.output_folder(args), steps, args.online, args.seed)
    with quiet(), one_thread():
        dataset = own_dataset(args.dataset_name) if args.dataset_name else None
        runs, skipped = trained(dataset, names, seeds, plan, number, console)

    for name, reason in skipped.items():
        console.print(f"{name} was skipped: {reason}", style="yellow", markup=False)
    if not runs:
        raise ValueError(f"None of {names} could be trained on {args.dataset_name!r}; the reasons stand above.")
    metric = "accuracy" if args.dataset_name else "reward"
    kinds = dict.fromkeys(run["data"] for run in runs)
    judged = [judge([run for run in runs if run["data"] == kind], metric) for kind in kinds]
    summary = {each.data: sentence(each) for each in judged}
    rows = report.rows(judged, runs)
    settings = {"seeds": seeds, "max_steps": steps, "dataset_name": args.dataset_name, "online": args.online}
    settings |= {"loss_kwargs": plan.flavour.LOSS_KWARGS, **plan.flavour.SETTINGS}
    report.save(rows, runs, summary, settings, plan.folder)
    for each in judged:
        console.print(report.table(each, [row for row in rows if row["data"] == each.data], title(args, each.data)))
        console.print(f"{summary[each.data]}\n", markup=False, highlight=False)
        console.print(examples.table(each, runs))
        console.print()
    try:
        report.plot(judged, runs, plan.folder / "reward_kl.png")
        console.print(f"Plot: {plan.folder / 'reward_kl.png'}", soft_wrap=True)
    except ModuleNotFoundError:
        console.print("No plot: matplotlib is not installed (pip install 'trl-ext[plots]').", markup=False)
    console.print(f"Models, results.json and results.csv: {plan.folder}", soft_wrap=True)
    return 0


def title(args: argparse.Namespace, kind: str) -> str:
    """Of the table of one kind of pairs."""
    if args.dataset_name:
        return f"Preferences from {args.dataset_name}"
    what = {"plain": "Reviews", "traced": "Reviews after a trace"}[kind]
    if args.online:
        return (
            f"{what}, written online under a reward that likes long answers (the true one, which is shown, does not)"
        )
    return f"{what}, from a world whose reward is known"


def trained(
    dataset: Dataset | None, names: list[str], seeds: list[int], plan: Plan, number: int, console: Console
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All runs in the order of losses and seeds, and why losses were skipped."""
    kinds = ["plain", "traced"] if "bias_variance" in names and dataset is None else ["plain"]
    wanted = [(kind, name) for kind in kinds for name in of_kind(names, kind, len(kinds) > 1)]
    with processes(min(number, len(wanted) * len(seeds))) as each, progress(console) as shown:
        bar = shown.add_task("fine-tuning the start", total=data.FINE_TUNING_STEPS)
        if dataset is not None:
            model, tokenizer = own_start(dataset, seeds[0], lambda: shown.advance(bar))
        else:
            model, tokenizer = world_start(seeds[0], lambda: shown.advance(bar))
        for part in (model, tokenizer):
            part.save_pretrained(plan.folder / "start")
        start_in.cache_clear()  # another start may have lain there

        bar = shown.add_task(
            "sampling preferences" if dataset is None else "sampling held-out answers", total=len(seeds)
        )
        tasks = {}
        if dataset is not None:
            given = each(measured_start, [(plan, own_task(dataset, tokenizer, seed)) for seed in seeds])
            given = ([task] for task in given)
        else:
            needed = list(dict.fromkeys(kind for kind, _ in wanted))
            given = each(prepare, [(plan, seed, needed) for seed in seeds])
        for found in given:
            tasks |= {(task.name, task.seed): task for task in found}
            shown.advance(bar)

        jobs = [(plan, name, tasks[kind, seed]) for seed in seeds for kind, name in wanted]
        bar = shown.add_task("training", total=len(jobs))
        runs = {}
        for run in each(run_once, jobs):
            runs[run["data"], run["loss"], run["seed"]] = run
            shown.advance(bar)
    ordered = [runs[kind, name, seed] for kind, name in wanted for seed in seeds]
    skipped = {run["loss"]: run["skipped"] for run in ordered if "skipped" in run}
    return [run for run in ordered if run["loss"] not in skipped], skipped


def of_kind(names: list[str], kind: str, traces: bool) -> list[str]:
    """The loss for traces trains on traces, beside plain DPO on the same pairs; the others train on plain pairs."""
    if not traces:
        return names
    return [name for name in names if name != "bias_variance"] if kind == "plain" else [BASELINE, "bias_variance"]
