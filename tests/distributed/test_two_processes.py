"""Two processes train as one does on the same batches, with the model copied or sharded."""

import importlib.util

import pytest
import torch

from tests.distributed.cases import CASES
from tests.distributed.launch import in_two_processes


TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero"])
def test_two_processes_equal_one(strategy, subtests, tiny_model_dir, tmp_path):
    if strategy == "zero" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    two, error = in_two_processes(strategy, tiny_model_dir, tmp_path / "two", list(CASES[strategy]))
    for name, case in CASES[strategy].items():
        with subtests.test(name):
            assert name in two, f"no result of {name!r} in two processes:\n{error}"
            first, second = two[name]
            assert_close(first, case(tiny_model_dir, tmp_path / "one" / name))
            assert second.get("every process") == first.get("every process")


def assert_close(two, one, where: str = "") -> None:
    """Equal structure, and numbers that are equal within the tolerance."""
    if isinstance(one, dict):
        assert two.keys() == one.keys(), f"{where}: {sorted(two.keys() ^ one.keys())} is in one of the two only"
        for key in one:
            assert_close(two[key], one[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(two) == len(one), f"{where}: {len(two)} entries in two processes, {len(one)} in one"
        for index, pair in enumerate(zip(two, one, strict=True)):
            assert_close(*pair, f"{where}/{index}")
    elif isinstance(one, (float, torch.Tensor)):
        values = [torch.as_tensor(value, dtype=torch.float64) for value in (two, one)]
        torch.testing.assert_close(*values, **TOLERANCE, msg=lambda text: f"{where}: {text}")
    else:
        assert two == one, f"{where}: {two!r} in two processes, {one!r} in one"
