"""The command for a day with a GPU, as far as a CPU can say: it runs, goes on, survives what fails, and says what it did."""

import csv
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.benchmark_modules import BENCHMARKS, module


ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("device", "driver", "torch", "triton", "transformers", "trl", "liger-kernel", "trl-ext")


def call(out, *flags):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--out", out, *flags]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)


def rows(out, part):
    with open(out / f"{part}_dry_run.csv") as file:
        return list(csv.DictReader(file))


TINY = ["--tokens", "8", "--hidden", "8", "--vocab", "50", "--rounds", "1", "--memory", "none", "--blocks"]
STEP = ["--size", "tiny", "--pairs", "2", "--prompt", "9", "--completion", "4", "6", "--steps", "1", "--memory", "none",
        "--paths", "trl", "ours", "--blocks"]  # fmt: skip


@pytest.mark.slow  # three calls, two of which load the libraries
def test_a_dry_run(tmp_path):
    cases = tmp_path / "cases.json"
    cases.write_text(
        json.dumps(
            [
                {"part": "tests", "name": "marked"},
                {"part": "throughput", "name": "no tokens to draw", "flags": [*STEP, "--vocab", "5"]},
                {"part": "throughput", "name": "tiny", "flags": [*STEP, "--vocab", "50"]},
                {"part": "logprobs", "name": "head", "flags": TINY},
            ]
        )
    )
    of_gpu = tmp_path / "test_of_gpu.py"
    of_gpu.write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n"
        "def test_marked(): pytest.skip('no GPU')\n"
        "def test_other(): raise AssertionError('not marked')\n"
    )
    out = tmp_path / "out"
    flags = ["--matrix", cases, "--tests", of_gpu]

    nothing = call(out, *flags, "--minutes", "0")
    assert nothing.returncode == 0, nothing.stderr[-2000:]
    assert (
        "Left out (no time; the same command goes on with them): tests: marked; throughput: no tokens"
        in nothing.stdout
    )
    assert not (out / "throughput_dry_run.csv").exists()

    first = call(out, *flags, "--parts", "throughput", "logprobs")
    assert first.returncode == 0, first.stderr[-2000:]
    assert {row["case"] for row in rows(out, "logprobs")} == {"head"}
    failed, *tiny = rows(out, "throughput")
    assert failed["case"] == "no tokens to draw" and failed["error"].startswith("ValueError: empty range")
    assert [(row["case"], row["path"]) for row in tiny] == [("tiny", "trl"), ("tiny", "ours")]
    assert all(float(row["gradient_difference"]) < 1e-4 and not row["error"] for row in tiny)
    before = (out / "throughput_dry_run.csv").read_bytes()

    second = call(out, *flags)
    assert second.returncode == 0, second.stderr[-2000:]
    assert (out / "throughput_dry_run.csv").read_bytes() == before  # not run again
    (tests,) = rows(out, "tests")
    assert (tests["passed"], tests["failed"], tests["skipped"]) == ("0", "0", "1")
    files = "logprobs_dry_run.csv, logprobs_dry_run.png, table_dry_run.md, tests_dry_run.csv, throughput_dry_run.csv"
    assert second.stdout.strip().splitlines()[-1].startswith(f"In {out}: {files}")

    table = (out / "table_dry_run.md").read_text().splitlines()
    assert "FAILED: ValueError: empty range" in " ".join(line for line in table if "no tokens to draw" in line)
    heading = [cell.strip() for cell in table[0].split("|")]
    assert len(table) == 2 + sum(len(rows(out, part)) for part in ("tests", "throughput", "logprobs"))
    for line in table[2:]:
        cells = dict(zip(heading, [cell.strip() for cell in line.split("|")], strict=True))
        assert cells["torch"] == torch.__version__ and all(cells[name] for name in SOURCE)
    for part in ("tests", "throughput", "logprobs"):
        assert all(row["torch"] == torch.__version__ and row["case_seconds"] for row in rows(out, part))


def test_rows_of_another_machine_are_not_mixed_in(tmp_path):
    gpu, matrix = module("gpu"), module("matrix")
    results = gpu.Results(tmp_path, "gpu")
    results.add(
        matrix.Case("logprobs", "head"), [{"path": "trl", "device": "A", "torch": "2.11", "error": "no memory"}]
    )
    again = gpu.Results(tmp_path, "gpu")
    assert again.finished(matrix.Case("logprobs", "head"))
    again.refuse_other({"device": "A", "torch": "2.11"})
    with pytest.raises(ValueError, match=r"rows of \{'device': 'A'\}, and this is \{'device': 'B'\}.*--out"):
        again.refuse_other({"device": "B", "torch": "2.11"})
    again.forget_failures()
    assert not again.finished(matrix.Case("logprobs", "head"))


def test_a_worker_that_dies_or_hangs_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "some_script.py").write_text(
        "import os, time\n"
        "def parse(flags): return flags[0]\n"
        "def results(args, flags):\n"
        "    if args == 'dies': os._exit(7)\n"
        "    if args == 'hangs': time.sleep(60)\n"
        "    if args == 'raises': raise MemoryError('none left')\n"
        "    return [{'pid': os.getpid()}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = module("gpu").Worker()
    try:
        first = worker.ask("some_script", ("runs",), 60)
        assert worker.ask("some_script", ("runs",), 60) == first  # in the same process
        with pytest.raises(RuntimeError, match=r"given up after 0\.01 minutes"):
            worker.ask("some_script", ("hangs",), 0.6)
        with pytest.raises(RuntimeError, match="the process died with exit code 7"):
            worker.ask("some_script", ("dies",), 60)
        with pytest.raises(RuntimeError, match="MemoryError: none left"):
            worker.ask("some_script", ("raises",), 60)
        assert worker.ask("some_script", ("runs",), 60) != first
    finally:
        worker.stop()


def test_every_case_of_the_matrix_is_understood():
    """Flags that a script does not know would be found on the day the GPU is there."""
    cases = module("matrix").gpu()
    for case in cases:
        if case.part != "tests":
            args = module(case.part).parse(list(case.flags))
            assert (args.device, args.dtype) == ("cuda", "bfloat16")
    steps = [module("throughput").parse(list(case.flags)) for case in cases if case.part == "throughput"]
    settings = {(each.size, each.lora, each.profile or each.prompt, each.num_generations) for each in steps}
    lengths = ("ultrafeedback", "hh", "tldr", 1024, 4096)
    assert settings == {
        (s, lora, at, k) for s in ("0.6b", "8b") for lora in (True, False) for at in lengths for k in (2, 8)
    }
    assert len({(case.part, case.name) for case in cases}) == len(cases) == 1 + 8 + 40 + 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"part": "online"}', "holds no cases"),
        ('[{"part": "onlin", "name": "a"}]', r"has parts \['onlin'\]; expected"),
        ('[{"part": "online", "name": "a"}, {"part": "online", "name": "a"}]', "cases of one name"),
    ],
)
def test_cases_of_ones_own_are_checked(text, match, tmp_path):
    (tmp_path / "cases.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        module("matrix").read(str(tmp_path / "cases.json"))


def test_a_step_that_compiled_is_not_timed(monkeypatch):
    paths = module("paths")
    path = paths.Path.__new__(paths.Path)
    path.device, path.recompilations, path.peak_mb, path.turn = "cpu", 0, 0.0, 4
    compiled, taken = iter([0, 2, 2, 2]), []
    monkeypatch.setattr(paths, "compilations", lambda: next(compiled))  # before and after each of two steps

    def step():
        taken.append(path.turn)
        path.turn += 1

    path.step = step
    monkeypatch.setattr(paths, "timed", lambda function, device: (function(), len(taken))[1])
    assert path.seconds() == 2  # of the second
    assert (taken, path.turn, path.recompilations) == ([4, 4], 5, 2)  # on the same batch


def test_waits_of_the_host_are_counted(monkeypatch):
    common, modes = module("common"), []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for text in ("called a synchronizing CUDA operation", "another", "called a synchronizing CUDA operation"):
            warnings.warn(text, stacklevel=1)

    assert common.host_syncs(step, "cuda") == 2
    assert modes == ["warn", "default"]
    assert common.host_syncs(step, "cpu") is None


def test_make_calls_them():
    for target, script in (("bench-gpu", "gpu.py"), ("wheels", "wheels.py")):
        command = ["make", "-n", target, "ARGS=--minutes 9"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"python benchmarks/{script} --minutes 9" in done.stdout
    assert ".wheels/" in (ROOT / ".gitignore").read_text().splitlines()


def test_wheels_are_those_of_the_constraints(tmp_path, monkeypatch, capsys):
    wheels = module("wheels")
    (tmp_path / "old-1.whl").write_bytes(b"0")

    def download(command, **_):
        asked.extend(command)
        (tmp_path / "new-2.whl").write_bytes(bytes(2**20))
        return subprocess.CompletedProcess(command, 0)

    asked = []
    monkeypatch.setattr(wheels.subprocess, "run", download)
    flags = ["wheels.py", "--python", "3.13", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", flags)
    wheels.main()
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("trl", "liger_kernel", "datasets", "multiprocess", "dill"):
        assert [each for each in asked if each in pinned and each.startswith(f"{name}==")]
    assert "--python-version=3.13" in asked and "--no-deps" in asked
    assert [path.name for path in tmp_path.iterdir()] == ["new-2.whl"]
    assert "1.0 MiB in" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*flags, "--limit", "0.5"])
    with pytest.raises(SystemExit, match=r"more than 0.5 MiB"):
        wheels.main()


@pytest.mark.parametrize("more", [[], ["--lora", "--num_generations", "4"]])
def test_a_case_leaves_no_model_behind(more):
    """The next one runs in the same process, and two models of 8 billion do not fit."""
    throughput = module("throughput")
    flags = [*STEP, "--vocab", "50", *more]
    rows = throughput.results(throughput.parse(flags), flags)
    assert [row["path"] for row in rows] == ["trl", "ours"] and all(row["seconds"] > 0 for row in rows)
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, Qwen3ForCausalLM)]


def test_blocks_have_their_own_peak(monkeypatch):
    """Ours asks the allocator what a run has needed before: what another path has needed is not to count."""
    common = module("common")
    peak, log = [0.0], []
    monkeypatch.setattr(common, "reset_peak", lambda device: peak.__setitem__(0, 5.0))
    monkeypatch.setattr(common, "peak_mb", lambda device: peak[0])

    def needs(name, amount, seconds):
        log.append((name, seconds, peak[0]))
        peak[0] = max(peak[0], amount)
        return seconds

    seconds, memory = common.in_blocks(
        {"trl": lambda: needs("trl", 90.0, 3.0), "ours": lambda: needs("ours", 40.0, 1.0)},
        {"trl": lambda: needs("trl", 100.0, 9.0), "ours": lambda: needs("ours", 50.0, 9.0)},
        2,
        "cuda",
        "paths",
    )
    assert seconds == {"trl": [3.0, 3.0], "ours": [1.0, 1.0]}  # warm-ups are not counted
    assert log[3] == ("ours", 9.0, 5.0)
    assert memory == {"trl": {"before_mb": 5.0, "peak_mb": 100.0}, "ours": {"before_mb": 5.0, "peak_mb": 50.0}}
