"""What the benchmarks share: models, lengths, interleaved timing, memory in a process of its own, tables, CSV, plots."""

import csv
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


# hidden, layers, intermediate, heads, key-value heads, head dimension, tied head
SIZES = {
    "tiny": (64, 2, 128, 2, 1, 32, False),
    "12m": (256, 4, 768, 4, 2, 64, True),
    "26m": (384, 8, 1152, 6, 3, 64, True),
    "0.6b": (1024, 28, 3072, 16, 8, 128, True),  # Qwen3-0.6B; its vocabulary is 151936
}

# Medians of tokens (prompt, completion); lengths are log-normal around them. Prompt over completion follows the table
# of Wang and Hegde (2024), https://arxiv.org/abs/2410.20305; the medians themselves are rounded.
PROFILES = {"ultrafeedback": (130, 310), "hh": (120, 60), "tldr": (350, 32)}

SOURCES = ("torch", "transformers", "trl", "liger-kernel", "trl-ext")


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
    return Qwen3ForCausalLM(config).to(device=device, dtype=dtype)


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


class Lengths:
    """Draws prompt and completion lengths: uniform within `completion` and 20% of `prompt`, or by a profile."""

    def __init__(self, prompt: int, completion: tuple[int, int], profile: str | None, seed: int = 0):
        self.random = random.Random(seed)
        self.range, self.profile = (prompt, completion), profile

    def prompt(self) -> int:
        if self.profile:
            return self._log_normal(PROFILES[self.profile][0])
        return max(1, int(self.range[0] * self.random.uniform(0.8, 1.2)))

    def completion(self) -> int:
        return self._log_normal(PROFILES[self.profile][1]) if self.profile else self.random.randint(*self.range[1])

    def _log_normal(self, median: int) -> int:
        return min(4096, max(4, round(median * self.random.lognormvariate(0, 0.6))))


def interleaved(paths: dict[str, Callable[[], float]], steps: int, progress: str) -> dict[str, list[float]]:
    """Seconds of each path: all of them in turn, `steps` times, beginning with another each time; one round warms up."""
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in paths}
    names = list(paths)
    for step in tqdm(range(steps + 1), desc=progress, unit="round", leave=False):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            seconds[name].append(paths[name]())
    return {name: values[1:] for name, values in seconds.items()}


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


def ratio(peer: list[float], own: list[float]) -> float:
    """How many times faster than the peer: the median over rounds."""
    return statistics.median(a / b for a, b in zip(peer, own, strict=True))


def peak_mb(device: str) -> float:
    """Peak memory of this process in MiB: allocated on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` there counts what the parent had before `exec` too
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def in_own_process(script: str, arguments: list[str]) -> dict:
    """The last line that the script prints, as JSON."""
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def provenance(device: str) -> dict[str, str]:
    """Device and versions, for each row."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    return {"device": name, **{package: _version(package) for package in SOURCES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def distance(value: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> float:
    """Relative distance of two lists of tensors, in the Euclidean norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(value, reference, strict=True)]
    norm = sum(b.square().sum() for _, b in pairs).sqrt()
    return (sum((a - b).square().sum() for a, b in pairs).sqrt() / norm).item()


def table(rows: list[dict], columns: dict[str, str], title: str) -> None:
    """Print rows; columns that none has are left out."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    there = [column for column in columns if any(row.get(column) is not None for row in rows)]
    for column in there:
        shown.add_column(columns[column], justify="right" if column != "path" else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in there))
    Console(width=None if sys.stdout.isatty() else 150).print(shown)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def write(rows: list[dict], path: str | os.PathLike) -> None:
    """Write rows as CSV, with all columns that any has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"Written to {path}")


def plot(rows: list[dict], path: str, axis: str | None, title: str) -> None:
    """Time and memory of each path: bars, or lines along a scaled `axis`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(row["path"] for row in rows))
    for panel, (column, label) in zip(panels, {"seconds": "seconds", "peak_mb": "peak MiB"}.items(), strict=True):
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
