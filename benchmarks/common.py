"""What the benchmarks share: models, interleaved timing, memory in a process of its own, tables, CSV, plots."""

import argparse
import csv
import functools
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch


# hidden, layers, intermediate, heads, key-value heads, head dimension, tied head
SIZES = {
    "tiny": (64, 2, 128, 2, 1, 32, False),
    "12m": (256, 4, 768, 4, 2, 64, True),
    "26m": (384, 8, 1152, 6, 3, 64, True),
    "0.6b": (1024, 28, 3072, 16, 8, 128, True),  # Qwen3-0.6B; its vocabulary is 151936
    "8b": (4096, 32, 14336, 32, 8, 128, False),  # Llama-3.1-8B; its vocabulary is 128256
}

Key = TypeVar("Key")

SOURCES = ("torch", "triton", "transformers", "trl", "liger-kernel")


def model(size: str, vocabulary: int, seed: int, dtype: torch.dtype, device: str):
    """A Qwen3-style model with random weights; policy and reference differ by their seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, intermediate, heads, kv_heads, head_dim, tied = SIZES[size]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.device(device):  # eight billion random numbers take minutes on a CPU
        return Qwen3ForCausalLM(config).to(dtype=dtype)


def tokenizer():
    """A word-level tokenizer: rows are token ids already, so it only names padding and the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def interleaved(paths: dict[Key, Callable[[], float]], steps: int, progress: str) -> dict[Key, list[float]]:
    """Seconds of each path: all of them in turn, `steps` times, beginning with another each time; one round warms up."""
    from tqdm import tqdm

    seconds: dict[Key, list[float]] = {name: [] for name in paths}
    names = list(paths)
    for step in tqdm(range(steps + 1), desc=progress, unit="round", leave=False):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            seconds[name].append(paths[name]())
    return {name: values[1:] for name, values in seconds.items()}


def in_blocks(
    paths: dict[Key, Callable[[], float]],
    warm_ups: dict[Key, Callable[[], object]],
    steps: int,
    device: str,
    progress: str,
) -> tuple[dict[Key, list[float]], dict[Key, dict[str, float]]]:
    """
    Seconds of each path, one path after the other, and its memory. So it is on a GPU, where ours keeps or drops logits by what the
    allocator's peak has been: it has to be its own.
    """
    from tqdm import tqdm

    seconds, memory = {}, {}
    for name in tqdm(paths, desc=progress, unit="path", leave=False):
        reset_peak(device)
        before = peak_mb(device)
        warm_ups[name]()
        seconds[name] = [paths[name]() for _ in range(steps)]
        memory[name] = {"before_mb": before, "peak_mb": peak_mb(device)}
    return seconds, memory


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of a call, with the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compilations() -> int:
    """Graphs that Dynamo has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported: nothing was compiled
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def host_syncs(function: Callable[[], object], device: str) -> int | None:
    """How often a call makes the host wait for a GPU; `None` on a CPU, where `host_syncs.py` counts."""
    if not device.startswith("cuda"):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in caught)


def ratio(peer: list[float], own: list[float]) -> float:
    """How many times faster than the peer: the median over rounds."""
    return statistics.median(a / b for a, b in zip(peer, own, strict=True))


def reset_peak(device: str) -> None:
    """From here on, a GPU's peak is counted anew. That of a CPU is the whole process's."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mb(device: str) -> float:
    """Peak memory of this process in MiB: allocated on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` there counts what the parent had before `exec` too
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_of(function: Callable[[], object], device: str) -> dict[str, float]:
    """Peak memory in MiB of a call, and what was there before it."""
    reset_peak(device)
    before = peak_mb(device)
    function()
    return {"before_mb": before, "peak_mb": peak_mb(device)}


def in_own_process(script: str, arguments: list[str]) -> dict:
    """The last line that the script prints, as JSON."""
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


@functools.cache
def provenance(device: str) -> dict[str, str]:
    """Device and versions, for each row; `kind` says that it was measured there."""
    from trl_ext.version import __version__

    versions = {**{package: _version(package) for package in SOURCES}, "trl-ext": __version__}
    return {"kind": "measured", "device": _device(device), "driver": _driver(device), **versions}


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"


def _driver(device: str) -> str:
    if not device.startswith("cuda") or not shutil.which("nvidia-smi"):
        return "-"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0] or "-"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def distance(value: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> float:
    """Relative distance of two lists of tensors, in the Euclidean norm; one tensor at a time is made wide."""
    difference = norm = 0.0
    for own, other in zip(value, reference, strict=True):
        difference += (own.double() - other.double()).square().sum()
        norm += other.double().square().sum()
    return (difference / norm).sqrt().item()


def table(rows: list[dict], columns: dict[str, str], title: str) -> None:
    """Print rows; columns that none has are left out."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    there = [column for column in columns if any(row.get(column) is not None for row in rows)]
    for column in there:
        shown.add_column(columns[column], justify="right" if column != "path" else "left", no_wrap=column != "notes")
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in there))
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def scaled(args: argparse.Namespace, flags: list[str]) -> Iterator[list[str]]:
    """Sets the axis of `--scale` to each of its values in turn, and gives the flags that say so; once, where there is none."""
    if not args.scale:
        yield flags
        return
    axis, *values = args.scale
    at = flags.index("--scale")
    for value in values:
        setattr(args, axis, int(value))
        yield [*flags[:at], *flags[at + 1 + len(args.scale) :], f"--{axis}", value]


def write(rows: list[dict], path: str | os.PathLike, say: bool = True) -> None:
    """Write rows as CSV, with all columns that any has; what was there stays until all of it is written."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.part", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.part", path)
    if say:
        print(f"Written to {path}")


def plot(rows: list[dict], path: str, axis: str | None, title: str, panels: dict[str, str] | None = None) -> None:
    """Time and memory of each path, or two other columns: bars, or lines along a scaled `axis`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = panels or {"seconds": "seconds", "peak_mb": "peak MiB"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(row["path"] for row in rows))
    for panel, (column, label) in zip(axes, panels.items(), strict=True):
        for name in names:
            own = [row for row in rows if row["path"] == name and row.get(column) is not None]
            if axis is None:
                panel.bar([name] * len(own), [row[column] for row in own])
            else:
                panel.plot([row[axis] for row in own], [row[column] for row in own], marker="o", label=name)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
        if axis is not None:
            panel.set_xlabel(axis)
            panel.legend()
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"Drawn in {path}")
