"""
Downloads the wheels that a GPU machine without network lacks, into a folder that git ignores.

    python benchmarks/wheels.py                                        # what is usually missing beside torch and transformers
    python benchmarks/wheels.py --python 3.13 --platform manylinux_2_28_aarch64 -- trl datasets pyarrow

What such machines have already (torch, triton, transformers, accelerate, numpy, pyarrow, peft, rich, pytest and the like) is left out: `--no-deps`. Versions
are those of constraints.txt.
"""

import argparse
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
MISSING = ("trl", "liger_kernel", "datasets", "multiprocess", "dill")
# pip matches each number exactly
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT_MB = 64


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", default=list(MISSING), help=f"by default {', '.join(MISSING)}")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--platform", nargs="+", default=list(PLATFORMS), help="tags of the platform there")
    parser.add_argument("--out", type=Path, default=ROOT / ".wheels", help="folder; .wheels by default")
    parser.add_argument("--limit", type=float, default=LIMIT_MB, help="MiB that may be carried there")
    return parser.parse_args(arguments)


def pinned(packages: list[str]) -> list[str]:
    """Each with the version of constraints.txt, where that names one."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = {name(line): line for line in lines if "==" in line}
    return [versions.get(name(package), package) for package in packages]


def name(requirement: str) -> str:
    return requirement.partition("==")[0].strip().lower().replace("_", "-")


def main() -> None:
    args = parse()
    for old in args.out.glob("*.whl"):  # two versions of one package stop the whole installation there
        old.unlink()
    where = [f"--platform={platform}" for platform in args.platform]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += [
        f"--python-version={args.python}",
        "--implementation=cp",
        *where,
        f"--dest={args.out}",
        *pinned(args.packages),
    ]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            "benchmarks/wheels.py: pip found no wheel for one of them; try other --platform tags, or another --python"
        )
    found = sorted(args.out.glob("*.whl"))
    size = sum(path.stat().st_size for path in found) / 2**20
    print(*(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.name}" for path in found), sep="\n")
    print(f"{size:.1f} MiB in {args.out}")
    if size > args.limit:
        sys.exit(f"benchmarks/wheels.py: more than {args.limit:g} MiB; leave out what is there already")


if __name__ == "__main__":
    main()
