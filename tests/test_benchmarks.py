"""The benchmarks run, and their figures of agreement are what they should be. Nothing is timed here."""

import csv
from pathlib import Path

import pytest

from tests import children


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script, tmp_path, *flags):
    """In a fork of this process, which has imported what the scripts import."""
    log = tmp_path / "log"
    flags = ["--csv", tmp_path / "rows.csv", "--plot", tmp_path / "plot.png", *flags]
    assert children.script(BENCHMARKS / f"{script}.py", flags, log) == 0, log.read_text()
    assert (tmp_path / "plot.png").stat().st_size > 0
    with open(tmp_path / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(row["device"] and row["torch"] and row["trl"] for row in rows)
    return rows


TINY = [
    "--size",
    "tiny",
    "--vocab",
    "500",
    "--pairs",
    "2",
    "--prompt",
    "20",
    "--completion",
    "4",
    "12",
    "--steps",
    "2",
]


def test_decoding(tmp_path):
    flags = "--size tiny --vocab 500 --prompts 2 --generations 3 --completion 8 --mean 4 --steps 2 --shares 0.01 0.5"
    rows = run("decoding", tmp_path, *flags.split())
    assert [row["path"] for row in rows] == ["transformers", "0.01 leave", "0.5 leave"]
    assert all(row["same"] == "True" and float(row["seconds"]) > 0 for row in rows)


def test_throughput(tmp_path):
    paths = ["trl", "liger", "logits", "ours", "ours-later"]
    rows = run("throughput", tmp_path, *TINY, "--exact", "--lora", "--memory", "none", "--paths", *paths)
    assert [row["path"] for row in rows] == paths
    assert float(rows[0]["speed"]) == 1.0
    assert [bool(row["speed_over_first"]) for row in rows] == [False] * 4 + [True]
    for row in rows:
        assert float(row["gradient_difference"]) < 1e-4 and float(row["gradient_error"]) < 1e-4
        assert float(row["seconds"]) > 0


def test_the_memory_of_a_step(tmp_path):
    """Of each path in a process of its own, against TRL's."""
    rows = run("throughput", tmp_path, *TINY, "--lora", "--paths", "trl", "ours")
    peaks = [float(row["peak_mb"]) for row in rows]
    assert all(peak > 100 for peak in peaks)  # with what was imported
    assert [float(row["memory"]) for row in rows] == pytest.approx([peak / peaks[0] for peak in peaks], abs=0.01)


@pytest.mark.parametrize("axis", [["pairs", "2", "4"], ["num_generations", "2", "4"]])
def test_throughput_scaled(axis, tmp_path):
    rows = run("throughput", tmp_path, *TINY, "--memory", "none", "--paths", "trl", "ours", "--scale", *axis)
    assert [row[axis[0]] for row in rows] == [axis[1], axis[1], axis[2], axis[2]]
    # On one model in turn: each path's own forward and reference, whoever was built last
    assert all(float(row["gradient_difference"]) < 1e-4 for row in rows if row["num_generations"] == "2")


def test_logprobs(tmp_path):
    size = ["--tokens", "16", "--hidden", "8", "--vocab", "300", "--rounds", "2"]
    rows = run("logprobs", tmp_path, *size, "--memory", "none")
    assert {(row["path"], row["mode"]) for row in rows} >= {("torch", "full"), ("torch", "frozen"), ("trl", "full")}
    for row in rows:
        if row["path"] != "products":
            assert float(row["value_error"]) < 1e-5 and float(row["gradient_error"]) < 1e-5
    rows = run("logprobs", tmp_path, *size, "--reference", "--paths", "trl", "products")
    assert [row["path"] for row in rows] == ["trl", "products"]
    assert all(float(row["peak_mb"]) > 0 and float(row["added_mb"]) >= 0 for row in rows)


def test_a_wrong_flag_says_what_is_right(tmp_path):
    log = tmp_path / "log"
    assert children.script(BENCHMARKS / "throughput.py", ["--paths", "ours"], log) == 2
    assert "--paths begins with trl" in log.read_text()


def test_host_syncs(tmp_path):
    """Ours are none, but for what `offset` looks at where nobody waits: on a CPU, by itself."""
    log = tmp_path / "log"
    flags = ["--lines", "--csv", tmp_path / "rows.csv"]
    assert children.script(BENCHMARKS / "host_syncs.py", flags, log) == 0, log.read_text()
    with open(tmp_path / "rows.csv") as file:
        rows = {row["loss"]: row for row in csv.DictReader(file)}
    assert {name: int(row["of_ours"]) for name, row in rows.items()} == {
        "sigmoid": 0, "offset": 1, "length_regularized": 0, "bias_variance": 0,
    }  # fmt: skip
    shown = log.read_text()
    assert "offset: base.py:" in shown or "offset: offset.py:" in shown
    assert all(int(row["of_trl"]) > 10 for row in rows.values())  # which are counted all the same
