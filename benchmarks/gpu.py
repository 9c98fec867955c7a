"""
Everything that a GPU is asked for, in one call: the tests marked `gpu`, the head, the DPO step and the online step, TRL's and ours.

    python benchmarks/gpu.py                                     # an H200: half an hour
    python benchmarks/gpu.py --minutes 9 --out results           # as much as fits; called again with the same folder, it goes on
    python benchmarks/gpu.py --parts tests logprobs --again      # some parts; what failed is tried again
    python benchmarks/gpu.py --model-only                        # no GPU: what a roofline model predicts of the same cases
    python benchmarks/gpu.py --device cpu --out /tmp/dry         # no GPU: the command itself, in tiny sizes

Each finished case is written at once: a CSV file for each part, one table of all, plots. One that fails becomes a row that says so, and the rest
goes on. Cases run in one process, so that libraries are loaded once, and after a failure in a new one.
"""

import argparse
import csv
import gc
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from xml.etree import ElementTree

import matrix
import report
import roofline
from common import write
from matrix import PARTS, Case
from tqdm import tqdm


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after this many")
    parser.add_argument("--case-minutes", type=float, default=8, help="give a case up after this many")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results by default")
    parser.add_argument("--again", action="store_true", help="run the cases that failed anew")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny sizes, a dry run")
    parser.add_argument("--matrix", metavar="FILE", help="cases of your own: JSON, a list of part, name and flags")
    parser.add_argument(
        "--tests", nargs="+", default=["tests"], metavar="PATH", help="where to look for tests marked gpu"
    )
    roofline.add_options(parser)
    args = parser.parse_args(arguments)
    if args.device == "cpu" and args.out is None and not args.model_only:
        parser.error("--device cpu is a dry run, whose figures say nothing: name a folder for them with --out")
    args.out = args.out or HERE / "results"
    try:
        args.cases = (
            matrix.read(args.matrix) if args.matrix else matrix.gpu() if args.device == "cuda" else matrix.dry_run()
        )
    except ValueError as error:
        parser.error(str(error))
    args.cases = [case for case in args.cases if case.part in args.parts]
    args.rates = roofline.Rates(args.tflops, args.bandwidth, args.rates_of)
    return args


class Results:
    """Rows by part, and the files that hold them."""

    def __init__(self, folder: Path, label: str):
        self.folder, self.label = folder, label
        self.rows: dict[str, list[dict]] = {part: self._read(part) for part in PARTS}

    def file(self, part: str, suffix: str = "csv") -> Path:
        return self.folder / f"{part}_{self.label}.{suffix}"

    def _read(self, part: str) -> list[dict]:
        if not self.file(part).exists():
            return []
        with open(self.file(part), newline="") as file:
            return [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]

    def all(self) -> list[dict]:
        return [row for part in PARTS for row in self.rows[part]]

    def forget_failures(self) -> None:
        failed = {(row["part"], row["case"]) for row in self.all() if "error" in row}
        self.rows = {
            part: [row for row in rows if (part, row["case"]) not in failed] for part, rows in self.rows.items()
        }

    def finished(self, case: Case) -> bool:
        return any(row["case"] == case.name for row in self.rows[case.part])

    def add(self, case: Case, rows: list[dict]) -> None:
        self.rows[case.part] += [{"part": case.part, "case": case.name, **row} for row in rows]
        write(self.rows[case.part], self.file(case.part), say=False)
        self.tabulate()

    def tabulate(self) -> None:
        report.markdown(self.all(), self.file("table", "md"), model=self.label.startswith("model"))

    def refuse_other(self, source: dict[str, str]) -> None:
        """Raises a `ValueError` where rows are from another device or other versions, which one table must not mix."""
        for row in self.all():
            other = {key: row.get(key) for key in source if row.get(key) != source[key]}
            if other:
                here = {key: source[key] for key in other}
                raise ValueError(
                    f"{self.file(row['part'])} holds rows of {other}, and this is {here}: name another folder with --out"
                )


class Worker:
    """A process that runs cases one after another; after a failure there is a new one, since a GPU's errors stay."""

    def __init__(self):
        self.process = self.connection = None

    def ask(self, script: str, flags: tuple[str, ...], seconds: float) -> list[dict]:
        """The rows of a script; a `RuntimeError` that says why there are none."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=False)
            self.process.start()
            theirs.close()
        try:
            self.connection.send((script, flags))
            if not self.connection.poll(seconds):
                self.process.kill()
                raise RuntimeError(f"given up after {seconds / 60:g} minutes")
            rows, error = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            rows, error = [], f"the process died with exit code {self.process.exitcode}"
        except RuntimeError:
            self.stop()
            raise
        if error:
            self.stop()
            raise RuntimeError(error)
        return rows

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()  # an idle one ends by itself
            self.process.join(10)
            self.process.kill()
            self.process.join()
            self.process = None


def serve(connection) -> None:
    """The worker's side: scripts and their flags come in, rows or an error go out."""
    while True:
        try:
            script, flags = connection.recv()
        except EOFError:
            return
        try:
            answer = (run(script, list(flags)), None)
        except BaseException as error:  # argparse exits
            if script != "provenance":
                traceback.print_exc()
            answer = ([], f"{type(error).__name__}: {error}".strip())
        connection.send(answer)
        free()


def run(script: str, flags: list[str]) -> list[dict]:
    if script == "provenance":
        import torch
        from common import provenance

        if flags[0] == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device. Without one: --model-only, or --device cpu for a dry run")
        return [provenance(flags[0])]
    module = importlib.import_module(script)
    return module.results(module.parse(flags), flags)


def free() -> None:
    """Memory, and what Dynamo keeps: its limit of recompilations is that of one run."""
    import torch

    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run_tests(paths: list[str], seconds: float) -> list[dict]:
    """One row that counts, and one for each test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            f"--junitxml={folder}/tests.xml",
            *paths,
        ]
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with exit code {done.returncode}: no test was run")
        cases = list(ElementTree.parse(f"{folder}/tests.xml").iter("testcase"))
    wrong = [(case, problem) for case in cases for problem in (*case.iter("failure"), *case.iter("error"))]
    skipped = sum(case.find("skipped") is not None for case in cases)
    count = {"passed": len(cases) - len(wrong) - skipped, "failed": len(wrong), "skipped": skipped}
    failures = [
        {
            "path": f"{case.get('classname')}::{case.get('name')}",
            "error": short(problem.get("message") or problem.text or ""),
        }
        for case, problem in wrong
    ]
    return [{"path": "all", **count}, *failures]


def short(text: str) -> str:
    return " ".join(text.split())[:400]


def run_cases(
    cases: list[Case], results: Results, worker: Worker, args: argparse.Namespace, began: float
) -> list[Case]:
    """Runs cases while there is time; gives those for which there was none."""
    source = None
    bar = tqdm(cases, unit="case")
    for place, case in enumerate(bar):
        if time.monotonic() - began >= 60 * args.minutes:
            bar.close()
            return cases[place:]
        if source is None:
            (source,) = worker.ask("provenance", (args.device,), 60 * args.case_minutes)
            results.refuse_other(source)
        bar.set_description(f"{case.part}: {case.name}")
        start = time.monotonic()
        try:
            if case.part == "tests":
                rows = run_tests(args.tests, 60 * args.case_minutes)
            else:
                rows = worker.ask(case.part, case.flags, 60 * args.case_minutes)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            rows = [{"path": "-", "error": short(str(error))}]
        results.add(case, [{**row, **source, "case_seconds": round(time.monotonic() - start, 1)} for row in rows])
    return []


def predict(case: Case, args: argparse.Namespace) -> list[dict]:
    module = importlib.import_module(case.part)
    rates = ("--tflops", str(args.tflops), "--bandwidth", str(args.bandwidth), "--rates-of", args.rates_of)
    return module.results(module.parse([*case.flags, "--model-only", *rates]), [])


def main(arguments: list[str] | None = None) -> None:
    began, args = time.monotonic(), parse(arguments)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    sys.path[:0] = [str(ROOT), str(HERE)]
    if args.model_only:
        results = Results(args.out, f"model_{args.rates_of.lower()}")
        results.rows = {part: [] for part in PARTS}
        left = [case for case in args.cases if case.part in ("tests", "online") or "--statistics" in case.flags]
        for case in tqdm([case for case in args.cases if case not in left], unit="case"):
            results.add(case, predict(case, args))
    else:
        results = Results(args.out, "gpu" if args.device == "cuda" else "dry_run")
        if args.again:
            results.forget_failures()
        worker = Worker()
        try:
            left = run_cases([case for case in args.cases if not results.finished(case)], results, worker, args, began)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"benchmarks/gpu.py: {error}")
        finally:
            worker.stop()
    results.tabulate()
    report.show(results.all(), roofline.title(args.rates) if args.model_only else None)
    for part in PARTS:
        report.plot_speeds(
            results.rows[part], results.file(part, "png"), roofline.title(args.rates) if args.model_only else None
        )
    if left:
        why = "no model of them" if args.model_only else "no time; the same command goes on with them"
        print(f"Left out ({why}): {'; '.join(f'{case.part}: {case.name}' for case in left)}")
    print(f"In {args.out}: {', '.join(sorted(path.name for path in args.out.glob(f'*_{results.label}.*')))}")


if __name__ == "__main__":
    main()
