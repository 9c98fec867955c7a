"""The modules of `benchmarks/`: scripts, which know one another by name because their folder is on the path."""

import importlib
import sys
from pathlib import Path
from types import ModuleType


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name: str) -> ModuleType:
    """One of them; the folder stays on the path, for what they import while they run."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)
