"""
Long runs in the demonstration's world: do memory, threads, open files and the time of a step stay where they are?

    python benchmarks/long_runs.py                                  # 2,000 steps offline, 200 online, 5 rounds
    python benchmarks/long_runs.py --parts online --online-steps 50

Each part runs in a process of its own, with evaluation, checkpoints and logs on the way as a user has them. A line is fitted to what
is measured after the first fifth, in which caches fill, and its slope stands beside a 95 % interval, as the change over the
whole run in per cent of the level. The line runs through blocks of steps: through their medians, of seconds through their
fastest tenths. "flat" says that the whole interval lies within `--tolerance` of 0 (of seconds, which the machine's other work
moves, within `--tolerance-seconds`); "undecided", that it holds 0 and reaches further.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import psutil
from transformers import PrinterCallback, TrainerCallback, set_seed

from trl_ext import DPOConfig, DPOTrainer, OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.demo import data, online, world
from trl_ext.demo.training import LOSS_KWARGS, SETTINGS, one_thread, quiet
from trl_ext.metrics.intervals import student_quantile
from trl_ext.rounds import IterativeDPO, RoundsConfig


QUANTITIES = {"memory": "MiB resident", "threads": "threads", "files": "open files", "seconds": "seconds"}
# In which caches fill and the allocator finds its size
WARM_UP = 0.2
# Neighbours are alike, and a line through so many blocks knows it
BLOCKS = 16
COLUMNS = {"part": "part", "quantity": "quantity", "steps": "steps", "level": "level", "change": "change, %", "low": "from", "high": "to", "verdict": ""}  # fmt: skip


class Watch(TrainerCallback):
    """What the process has after each step, and how long the step took, evaluation and checkpoints left out."""

    def __init__(self):
        self.points: list[dict[str, float]] = []
        self.process = psutil.Process()
        self.began = 0.0

    def point(self, seconds: float) -> None:
        memory = self.process.memory_info().rss / 2**20
        self.points.append({"memory": memory, "threads": self.process.num_threads(), "files": self.process.num_fds(), "seconds": seconds})  # fmt: skip

    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.point(time.perf_counter() - self.began)


def offline(steps: int, folder: Path) -> list[dict[str, float]]:
    """A loss of ours beside one that remembers, a reference whose log-probs are kept, evaluation and checkpoints."""
    model, tokenizer = data.world_start(0, lambda: None)
    (task,) = data.world_tasks(model, tokenizer, 0, ["plain"], pairs=True)
    args = DPOConfig(
        output_dir=str(folder), loss_type=["offset", "beta_dpo"], loss_kwargs={"offset": LOSS_KWARGS["offset"]}, max_steps=steps,
        max_length=task.max_length, eval_strategy="steps", eval_steps=max(1, steps // 10), save_steps=max(1, steps // 10),
        save_total_limit=1, **common_options(), **SETTINGS,
    )  # fmt: skip
    return watched(
        DPOTrainer(model, args=args, train_dataset=task.train, eval_dataset=task.test, processing_class=tokenizer)
    )


def on_the_policy(steps: int, folder: Path) -> list[dict[str, float]]:
    """Four completions of each prompt, generated for two micro-batches at once, which are learnt from as whole groups."""
    model, tokenizer = data.world_start(0, lambda: None)
    (task,) = data.world_tasks(model, tokenizer, 0, ["plain"], pairs=False)
    settings = {**online.SETTINGS, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    args = OnlineDPOConfig(
        output_dir=str(folder), loss_type="anchored", pairing="group", max_steps=steps, max_length=task.max_length,
        save_steps=max(1, steps // 5), save_total_limit=1, **common_options(), **settings,
    )  # fmt: skip
    return watched(
        OnlineDPOTrainer(
            model, args=args, train_dataset=task.train, processing_class=tokenizer, reward_funcs=online.reward
        )
    )


def in_rounds(rounds: int, folder: Path) -> list[dict[str, float]]:
    """One round after the other in the same process; what it has is measured at the end of each."""
    model, tokenizer = data.world_start(0, lambda: None)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "start")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in world.PROMPTS[:64]))
    watch = Watch()
    for number in range(1, rounds + 1):
        config = RoundsConfig(
            model=str(folder / "start"), prompts=str(folder / "prompts.jsonl"), output_dir=str(folder / "out"), rounds=number,
            reward_funcs=online.reward, num_generations=4, sampling={"max_new_tokens": 48, "batch_size": 64},
            training={"loss_type": "length_regularized", "max_steps": 20, "max_length": data.WORLD_LENGTH, **common_options(), **SETTINGS},
        )  # fmt: skip
        began = time.perf_counter()
        IterativeDPO(config).run()
        watch.point(time.perf_counter() - began)
    return watch.points


PARTS = {"offline": offline, "online": on_the_policy, "rounds": in_rounds}


def common_options() -> dict[str, Any]:
    return {
        "use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 10,
    }  # fmt: skip


def watched(trainer: Any) -> list[dict[str, float]]:
    """What was measured at each step of a training."""
    watch = Watch()
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch.points


def fastest_tenth(seconds: list[float]) -> float:
    """The time of a step where the machine did nothing else: other work makes steps slower, and whatever grows makes all of them slower."""
    return sorted(seconds)[len(seconds) // 10]


def slope(values: list[float], of_block: Callable[[list[float]], float] = statistics.median) -> dict[str, float | str]:
    """
    The level of a quantity, and how much of it a fitted line changes over as many steps as were measured, in per cent, with an
    interval of Student's t over blocks.

    Args:
        values (`list[float]`): One for each step, in their order.
        of_block (`Callable`): What stands for a block of them.
    """
    kept = values[int(WARM_UP * len(values)) :]
    blocks = min(BLOCKS, len(kept))
    edges = [round(number * len(kept) / blocks) for number in range(blocks + 1)]
    ys = [of_block(kept[first:last]) for first, last in itertools.pairwise(edges)]
    xs = [(first + last - 1) / 2 for first, last in itertools.pairwise(edges)]
    level = of_block(kept)
    if blocks < 3:
        raise ValueError(f"{len(values)} steps are too few for a line; give at least 4.")
    each, start = statistics.linear_regression(xs, ys)
    left = sum((y - start - each * x) ** 2 for x, y in zip(xs, ys, strict=True))
    error = (left / (blocks - 2) / sum((x - statistics.fmean(xs)) ** 2 for x in xs)) ** 0.5
    reach = student_quantile(0.95, blocks - 2) * error
    scale = 100 * len(values) / level
    return {"level": level, "change": each * scale, "low": (each - reach) * scale, "high": (each + reach) * scale}


def verdict(found: dict[str, float], tolerance: float) -> str:
    """`"flat"`, `"rises"`, `"falls"` or `"undecided"`."""
    if -tolerance <= found["low"] and found["high"] <= tolerance:
        return "flat"
    if found["low"] <= 0 <= found["high"]:
        return "undecided"
    return "rises" if found["change"] > 0 else "falls"


def run_part(args: argparse.Namespace) -> None:
    """One part, whose points are the last line that is printed."""
    length = {"offline": args.steps, "online": args.online_steps, "rounds": args.rounds}[args.part]
    with tempfile.TemporaryDirectory() as folder, one_thread(), contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        set_seed(0)
        points = PARTS[args.part](length, Path(folder))
    print(json.dumps({"points": points}))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="default: all")
    parser.add_argument("--steps", type=int, default=2000, help="offline (default: %(default)s)")
    parser.add_argument("--online-steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--tolerance", type=float, default=2.0, help="per cent of the level that count as flat (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance-seconds", type=float, default=10.0, help="the same for the time of a step (default: %(default)s)"
    )
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="draw every part here")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    short = {name: value for name in ("steps", "online_steps", "rounds") if (value := getattr(args, name)) < 4}
    if short:
        parser.error(f"{short} are too few for a line; give at least 4.")
    return args


def main() -> None:
    args = arguments()
    if args.part:
        return run_part(args)
    rows, measured = [], {}
    for part in args.parts:
        print(f"{part} ...", flush=True)
        flags = [
            "--part",
            part,
            "--steps",
            str(args.steps),
            "--online-steps",
            str(args.online_steps),
            "--rounds",
            str(args.rounds),
        ]
        measured[part] = common.in_own_process(__file__, flags)["points"]
        for quantity in QUANTITIES:
            of_block = fastest_tenth if quantity == "seconds" else statistics.median
            found = slope([point[quantity] for point in measured[part]], of_block)
            shown = {"part": part, "quantity": QUANTITIES[quantity], "steps": len(measured[part]), **found}
            tolerance = args.tolerance_seconds if quantity == "seconds" else args.tolerance
            rows.append({**shown, "verdict": verdict(found, tolerance), **common.provenance("cpu")})
    common.table(rows, COLUMNS, "Change over the whole run")
    if args.csv:
        common.write(rows, args.csv)
    if args.plot:
        draw(measured, args.plot)


def draw(measured: dict[str, list[dict[str, float]]], path: str) -> None:
    """A panel for each part and quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = {"figsize": (4 * len(QUANTITIES), 2.5 * len(measured)), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(measured), len(QUANTITIES), **size)
    for line, (part, points) in zip(axes, measured.items(), strict=True):
        for panel, (quantity, label) in zip(line, QUANTITIES.items(), strict=True):
            values = [point[quantity] for point in points]
            panel.plot(values, linewidth=1)
            panel.set(
                title=f"{part}: {label}", xlabel="round" if part == "rounds" else "step", ylim=(0, 1.1 * max(values))
            )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"Drawn in {path}")


if __name__ == "__main__":
    main()
