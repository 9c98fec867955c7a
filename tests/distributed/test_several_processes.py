"""Several processes train as one does on the same batches, with the model copied or sharded."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launch import in_processes
from tests.distributed.runs import CASES, CORE, FURTHER


RELATIVE, ABSOLUTE = 1e-4, 2e-6
IDS = torch.arange(6, 30).view(2, 12)  # what a saved model is shown


@pytest.fixture(scope="module")
def one_process(tiny_model_dir, tmp_path_factory):
    """What a case returns in one process: the same for all strategies."""
    known = {}

    def result(name):
        if name not in known:
            known[name] = CASES[name](tiny_model_dir, tmp_path_factory.mktemp("one") / name)
        return known[name]

    return result


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "count"), CORE)
def test_core(strategy, count, subtests, one_process, tiny_model_dir, tmp_path, record_property):
    compare(strategy, count, CORE[strategy, count], subtests, one_process, tiny_model_dir, tmp_path, record_property)


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "count"), FURTHER)
def test_further(strategy, count, subtests, one_process, tiny_model_dir, tmp_path, record_property):
    compare(
        strategy, count, FURTHER[strategy, count], subtests, one_process, tiny_model_dir, tmp_path, record_property
    )


def compare(strategy, count, names, subtests, one_process, model_dir, folder, record_property):
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    several, errors = in_processes(strategy, count, model_dir, folder, names)
    largest: dict[str, float] = {}
    for name in names:
        with subtests.test(name):
            assert name not in errors, f"{name!r} failed in {count} processes:\n{errors[name]}"
            first, *others = several[name]
            one = one_process(name)
            assert_close(first, one, largest, name)
            for other in others:
                assert other.get("every process") == first.get("every process")
    record_property("distributed", [strategy, count, len(several), largest])


def assert_close(several, one, largest: dict[str, float], where: str) -> None:
    """Equal structure, numbers that are equal within the tolerance, and models that say the same; notes the largest difference."""
    if isinstance(one, dict):
        assert several.keys() == one.keys(), (
            f"{where}: {sorted(several.keys() ^ one.keys())} is in one of the two only"
        )
        for key in one:
            assert_close(several[key], one[key], largest, f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(several) == len(one), f"{where}: {len(several)} entries in several processes, {len(one)} in one"
        for index, pair in enumerate(zip(several, one, strict=True)):
            assert_close(*pair, largest, f"{where}/{index}")
    elif isinstance(one, Path):
        assert_close(*(logits(path) for path in (several, one)), largest, where)
    elif isinstance(one, (float, torch.Tensor)):
        values = [torch.as_tensor(value, dtype=torch.float64) for value in (several, one)]
        kind = next((kind for kind in ("history", "loads") if f"/{kind}" in where), "weights")
        off = (values[0] - values[1]).abs() / (values[1].abs() + ABSOLUTE / RELATIVE)
        largest[kind] = max(largest.get(kind, 0.0), off.max().item())
        torch.testing.assert_close(*values, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda text: f"{where}: {text}")
    else:
        assert several == one, f"{where}: {several!r} in several processes, {one!r} in one"


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    """Of a saved model, as plain transformers loads it, in parts of the largest."""
    found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(IDS).logits
    return found / found.abs().max()


def test_a_difference_is_noticed(tmp_path):
    largest = {}
    assert_close({"history": [{"loss": 1.00005}]}, {"history": [{"loss": 1.0}]}, largest, "case")
    assert largest["history"] == pytest.approx(0.00005 / 1.02)
    for several, one in (({"a": 1.001}, {"a": 1.0}), ([1.0], [1.0, 2.0]), ({"a": 1.0}, {"b": 1.0}), ("x", "y")):
        with pytest.raises(AssertionError, match="case"):
            assert_close(several, one, {}, "case")
