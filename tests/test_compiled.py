"""A compiled model: its layers are compiled, the head in our hands is not, and a run gives what it gives without."""

import pytest
import torch

from tests.helpers import build, history
from trl_ext import DPOConfig, DPOTrainer
from trl_ext.logprobs import Head


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_a_compiled_run(backend, tiny_model_dir, tmp_path, monkeypatch):
    compiling, head = [], Head.__call__

    def seen(self, *args, **kwargs):
        compiling.append(torch.compiler.is_compiling())
        return head(self, *args, **kwargs)

    monkeypatch.setattr(Head, "__call__", seen)
    histories = []
    for compiled in (False, True):
        torch._dynamo.reset()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = build(
            DPOTrainer, DPOConfig, tiny_model_dir, tmp_path, loss_type="offset", max_steps=2, logprob_backend=backend,
            gradient_checkpointing=False, pad_to_multiple_of=32, **options,
        )  # fmt: skip
        trainer.train()
        histories.append(history(trainer))
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 100  # it was compiled
    assert len(compiling) > 6 and not any(compiling)
    for plain, compiled in zip(*histories, strict=True):
        for key, value in plain.items():
            assert compiled[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
