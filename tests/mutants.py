"""
Mutation tests (`make mutants`): faults are put into the code, one at a time, and the tests that run it must fail.

mutmut makes the faults ("mutants"), finds for each function the tests that run it, and tries them in forked processes. Here
are the rooms of the house, the tests of each, and what is made of the results. Each room has its own folder in
`build/mutants`, so that a run that was stopped goes on where it was.

A mutant that was caught counts as caught until its function changes. One that was missed is tried again once a test has
changed. A sample is drawn by the hash of a mutant's name: it is the same each time, and a larger one holds the smaller.

mutmut leaves out, and so does this: class bodies and module level (defaults of dataclasses, constants), and functions with a
decorator other than `staticmethod` and `classmethod` (properties, cached ones among them), for they run when they are
defined. We leave out what is said to the user (`MESSAGES`): tests look for the words that matter, and each of the others would
count as missed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TRAINER_TESTS = [
    "tests/test_arguments.py",
    "tests/test_checks.py",
    "tests/test_columns.py",
    "tests/test_dpo_config.py",
    "tests/test_dpo_trainer.py",
    "tests/test_dpo_values.py",
    "tests/test_evaluation.py",
    "tests/test_groups.py",
    "tests/test_logging.py",
    "tests/test_loss_state.py",
    "tests/test_metrics.py",
    "tests/test_mixing.py",
    "tests/test_model_card.py",
    "tests/test_parity.py",
    "tests/test_patch.py",
    "tests/test_preference_model.py",
    "tests/test_reads.py",
    "tests/test_reasoning.py",
    "tests/test_reference.py",
    "tests/test_reference_free.py",
    "tests/test_reference_runs.py",
    "tests/test_reward_trainer.py",
    "tests/test_scoring.py",
    "tests/test_second_stage.py",
    "tests/test_sft_trainer.py",
    "tests/test_shared_models.py",
    "tests/test_shared_prompts.py",
    "tests/test_statistics.py",
    "tests/test_terms.py",
    "tests/test_trl_seam.py",
    "tests/test_trl_seam_parts.py",
    "tests/test_vision.py",
    "tests/test_whole_groups.py",
    "tests/test_workers.py",
    "tests/online",
]
DATA_TESTS = [
    "tests/test_adapters.py",
    "tests/test_advice.py",
    "tests/test_cache.py",
    "tests/test_calibration.py",
    "tests/test_checks.py",
    "tests/test_collator.py",
    "tests/test_columns.py",
    "tests/test_fingerprint.py",
    "tests/test_further.py",
    "tests/test_groups.py",
    "tests/test_inspection.py",
    "tests/test_overlap.py",
    "tests/test_pairing.py",
    "tests/test_paths.py",
    "tests/test_preference_judge.py",
    "tests/test_reasoning.py",
    "tests/test_recipes.py",
    "tests/test_rewards.py",
    "tests/test_sampling.py",
    "tests/test_scores.py",
    "tests/test_sft_trainer.py",
    "tests/test_tokens.py",
]
# Whole rounds (test_rounds.py) are left out: three quarters of the room's time, and nothing that its stages do not show
ROUNDS_TESTS = [
    "tests/test_rounds_log_probs.py",
    "tests/test_rounds_pairs.py",
    "tests/test_rounds_settings.py",
    "tests/test_rounds_stages.py",
]
# Room: (files, tests). Tests that start other processes or take long are left out: a mutant may run all of them.
ROOMS = {
    "losses": ("trl_ext/losses/*", ["tests/losses"]),
    "logprobs": ("trl_ext/logprobs/*", ["tests/logprobs", "tests/test_scoring.py", "tests/test_shared_prompts.py"]),
    "data": ("trl_ext/data/*", DATA_TESTS),
    "trainers": ("trl_ext/trainers/*", TRAINER_TESTS),
    "rounds": ("trl_ext/rounds/*", ROUNDS_TESTS),
    "rows": ("trl_ext/rows.py", ["tests/test_rows.py", "tests/test_collator.py", "tests/test_dpo_values.py"]),
    "merging": ("trl_ext/merging.py", ["tests/test_merging.py"]),
}
MESSAGES = [r"\braise \w+\(", r"\blogger\.\w+\(", r"\bwarnings\.warn\("]
# A process collects the tests twice, and pytest would escape backslashes in the names of tests once more the second time
SAME_NAMES = "disable_test_id_escaping_and_forfeit_all_rights_to_community_support=true"
# Reads the package's source, which is another where mutants have been written into it
READS_SOURCE = "tests/test_trl_seam.py::test_every_private_name_stands_in_the_seam"
# A third of the seconds of the trainers' tests, for what others run too: TRL's own code on TRL's log-probabilities, compilers and
# interpreted kernels, and the same paths once more for each of the losses
REPEATED = [
    "tests/test_parity.py::test_loss_type",
    "tests/test_parity.py::test_option[",
    "tests/test_parity.py::test_backend[full-logprob_backend=liger]",
    "tests/test_parity.py::test_backend[lora-logprob_backend=liger]",
    "tests/test_evaluation.py::test_a_compiled_model",
    "tests/test_dpo_trainer.py::test_half_precision_is_close_to_full",
    *(
        f"tests/test_dpo_trainer.py::{test}{loss}]"
        for loss in (
            "anchored",
            "margin_adaptive",
            "length_regularized",
            "inpo",
            "sppo_soft",
            "asft",
            "cpo",
            "dmpo",
            "eurus",
            "reward_distillation",
            "simpo",
            "step_apo",
        )
        for test in (
            "test_option_that_changes_no_number[precompute_ref_log_probs-",
            "test_option_that_changes_no_number[gradient_checkpointing-",
            "test_option_that_changes_no_number[remove_unused_columns-",
            "test_resumed_run_equals_the_uninterrupted_one[",
            "test_stream_equals_dataset[",
        )
    ),
]
LEFT_OUT = [f"--deselect={test}" for test in (READS_SOURCE, *REPEATED)]
# What a run needs beside the package and its tests
ALSO_COPIED = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "constraints.txt",
    "Makefile",
    "mkdocs.yml",
    "docs",
    "examples",
    "benchmarks",
]
# mutmut's command, but with the quickest tests of a mutant first: its fork server runs them in no order, and one that fails ends
# the run
QUICKEST_FIRST = """
from mutmut.__main__ import cli
from mutmut.state import state
from mutmut.workers.isolation import ForkServerRunner

submit = ForkServerRunner.submit
ForkServerRunner.submit = lambda self, mutant, tests, *limits: submit(
    self, mutant, sorted(tests, key=lambda test: state().duration_by_test[test]), *limits
)
cli()
"""
# mutmut's exit codes of the tests; it shares pytest's, and the negative ones are signals
CAUGHT, MISSED, UNTESTED = (1, 3), (0, 5, 33), (None, 2)


def settings(room: str) -> str:
    """The room's `[tool.mutmut]`."""
    files, tests = ROOMS[room]
    values = {
        "source_paths": ["trl_ext"],
        "only_mutate": [files],
        "also_copy": ALSO_COPIED,
        "do_not_mutate_patterns": MESSAGES,
        "pytest_add_cli_args": ["-m", "not slow and not gpu", "-o", SAME_NAMES, *LEFT_OUT],
        "pytest_add_cli_args_test_selection": tests,
        # Processes are forked from one that has imported everything and run nothing: torch's threads do not survive a fork
        "process_isolation": "forkserver",
        # A mutant may take (seconds of its tests + constant) * multiplier: much, for other work may slow the machine
        "timeout_constant": 30.0,
        "timeout_multiplier": 4.0,
        "on_dependency_change": "ignore",
        "use_git_change_detection": False,
    }
    return "\n[tool.mutmut]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def folder_of(room: str) -> Path:
    return ROOT / "build" / "mutants" / room


def prepare(room: str) -> Path:
    """The room's folder: the checkout by links, and mutmut's settings; forgets what older tests said of missed mutants."""
    folder = folder_of(room)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["trl_ext", "tests", *ALSO_COPIED]:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings(room))
    digest, seen = digest_of_tests(room), folder / "tests.sha256"
    if not seen.exists() or seen.read_text() != digest:
        (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # which tests run which function
        for path, meta in metadata(folder).items():
            codes = meta["exit_code_by_key"]
            meta["exit_code_by_key"] = {name: code if code in CAUGHT else None for name, code in codes.items()}
            path.write_text(json.dumps(meta))
        seen.write_text(digest)
    return folder


def digest_of_tests(room: str) -> str:
    """Changes when the room's tests do, or what they import of the others."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        of_room = any(path.is_relative_to(ROOT / tests) for tests in ROOMS[room][1])
        if of_room or not path.name.startswith(("test_", "mutants")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def generate(folder: Path) -> None:
    """Write the mutants of a room; those that are there and whose function is unchanged keep their result."""
    code = (
        "import os; from mutmut import __main__ as mutmut; os.makedirs('mutants', exist_ok=True); mutmut.copy_src_dir(); "
        "mutmut.copy_also_copy_files(); mutmut.create_mutants(1)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def metadata(folder: Path) -> dict[Path, dict]:
    return {path: json.loads(path.read_text()) for path in sorted((folder / "mutants").rglob("*.meta"))}


def results(folder: Path, sample: int | None) -> dict[str, int | None]:
    """Exit code by mutant, None where it was not tried; of a sample, or all."""
    codes = {name: code for meta in metadata(folder).values() for name, code in meta["exit_code_by_key"].items()}
    names = sorted(codes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return {name: codes[name] for name in sorted(names[:sample])}


def try_mutants(folder: Path, names: list[str], workers: int, sample: int | None) -> None:
    """Run the tests on mutants; what mutmut prints goes to a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", QUICKEST_FIRST, "run", "--max-children", str(workers), *names]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                with contextlib.suppress(json.JSONDecodeError):  # mutmut is just writing them
                    left = sum(code in UNTESTED for code in results(folder, sample).values())
                    end = "" if sys.stdout.isatty() else "\n"
                    print(f"\r{folder.name}: {left} mutants left    ", end=end, flush=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2 if sys.stdout.isatty() else 60)
        except KeyboardInterrupt:
            process.wait()
            raise SystemExit("\nStopped; the same command goes on from here.") from None
    print()
    if process.returncode:
        tail = (folder / "log.txt").read_text()[-3000:]
        raise SystemExit(f"{tail}\nmutmut ended with {process.returncode}; its log is {folder / 'log.txt'}")


def shown(folder: Path, missed: dict[str, int]) -> list[str]:
    """The name of each missed mutant, and the lines that it changes."""
    code = (
        "import json, sys; from mutmut.mutation.diff_apply import find_mutant, get_diff_for_mutant; "
        "print(json.dumps([get_diff_for_mutant(name, path=find_mutant(name).path) for name in sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *missed], cwd=folder, capture_output=True, text=True, check=True
    )
    texts = []
    for (name, exit_code), diff in zip(missed.items(), json.loads(done.stdout), strict=True):
        changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        texts.append("\n    ".join([name if exit_code == 0 else f"{name} (no test runs it)", *changed]))
    return texts


def report(counts: dict[str, dict[str, int | None]]) -> None:
    """The table; all that is neither caught nor missed ended in another way: out of time, or the process died."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Mutants")
    for heading in ("room", "mutants", "tried", "caught", "missed", "timeout or died", "caught, %"):
        table.add_column(heading, justify="left" if heading == "room" else "right")
    for room, (every, codes) in counts.items():
        tried = [code for code in codes.values() if code not in UNTESTED]
        caught, missed = (sum(code in kind for code in tried) for kind in (CAUGHT, MISSED))
        share = f"{100 * caught / (caught + missed):.1f}" if caught + missed else ""
        table.add_row(room, *map(str, (every, len(tried), caught, missed, len(tried) - caught - missed)), share)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {list(ROOMS)}; all of them by default")
    parser.add_argument("--sample", type=int, help="mutants of each room to try; all of them by default")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    args = parser.parse_args()
    unknown = [room for room in args.rooms if room not in ROOMS]
    if unknown:
        parser.error(f"there is no room {unknown[0]!r}; choose from {list(ROOMS)}")
    counts = {}
    for room in args.rooms or ROOMS:
        folder = folder_of(room) if args.report else prepare(room)
        if not args.report:  # a report reads, and changes nothing: a run may be going on
            generate(folder)
        codes = results(folder, args.sample)
        names = [name for name, code in codes.items() if code in UNTESTED]
        if names and not args.report:
            try_mutants(folder, names, args.workers, args.sample)
            codes = results(folder, args.sample)
        counts[room] = (len(results(folder, None)), codes)
        missed = {name: code for name, code in codes.items() if code in MISSED}
        missed = shown(folder, missed) if missed else []
        if not args.report:
            (folder / "missed.txt").write_text("\n".join(missed) + "\n")
        print(f"{room}: {len(missed)} missed", *missed, sep="\n", end="\n\n")
    report(counts)


if __name__ == "__main__":
    main()
