"""The reference that follows the policy: its adapter, its file in a checkpoint, and its weights under ZeRO-3."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from trl_ext.trainers import reference
from trl_ext.trainers.reference import add_reference_adapter, load_reference, save_reference


class Tied(torch.nn.Module):
    """Two names for one tensor, as embeddings and head often are, and a bias."""

    def __init__(self, value):
        super().__init__()
        self.embed = torch.nn.Parameter(torch.full((3, 2), value))
        self.head = torch.nn.Linear(2, 3)
        self.head.weight = self.embed
        self.head.bias.data.fill_(value + 1)


def test_what_is_saved_is_read_back(tmp_path):
    save_reference(Tied(2.0), str(tmp_path))
    assert load_file(tmp_path / "ref_model.safetensors")["head.bias"].tolist() == [3.0] * 3
    other = Tied(0.0)
    load_reference(other, str(tmp_path))
    assert other.embed.tolist() == [[2.0, 2.0]] * 3 and other.head.bias.tolist() == [3.0] * 3
    with pytest.raises(ValueError, match=r"has no ref_model\.safetensors"):
        load_reference(other, str(tmp_path / "elsewhere"))


@pytest.fixture
def zero(monkeypatch):
    """ZeRO-3 with a stand-in of DeepSpeed: a parameter is empty but for where it is gathered."""
    gathered = []

    class Gathered:
        def __init__(self, parameters, modifier_rank):
            self.parameters = parameters
            gathered.append(([parameter.ds_id for parameter in parameters], modifier_rank))

        def __enter__(self):
            for parameter in self.parameters:
                parameter.data = parameter.whole

        def __exit__(self, *error):
            for parameter in self.parameters:
                parameter.whole, parameter.data = parameter.data, torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered)))
    monkeypatch.setattr(reference, "is_deepspeed_zero3_enabled", lambda: True)
    return gathered


def partitioned(value):
    model = torch.nn.Linear(2, 1)
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id = index
        parameter.whole = torch.full_like(parameter.data, value + index)
        parameter.data = torch.empty(0)
    return model


def test_partitioned_weights_are_gathered_and_written_by_the_first_process(zero, tmp_path):
    save_reference(partitioned(4.0), str(tmp_path))
    saved = load_file(tmp_path / "ref_model.safetensors")
    assert {name: value.tolist() for name, value in saved.items()} == {"weight": [[4.0, 4.0]], "bias": [5.0]}
    assert zero == [([0], None), ([1], None)]  # to be read alone
    zero.clear()
    other = partitioned(0.0)
    load_reference(other, str(tmp_path))
    assert other.weight.whole.tolist() == [[4.0, 4.0]] and other.bias.whole.tolist() == [5.0]
    assert zero == [([0], 0), ([1], 0)]  # what the first process writes, all get


def test_other_processes_write_nothing(zero, monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    save_reference(partitioned(4.0), str(tmp_path))
    assert len(zero) == 2 and not list(tmp_path.iterdir())


def test_whole_parameters_are_not_gathered(zero):
    parameter = torch.nn.Parameter(torch.ones(1))
    with reference._gathered(parameter, parameter):
        assert parameter.tolist() == [1.0]
    assert not zero
    some = partitioned(1.0)
    with reference._gathered(parameter, some.bias):
        assert some.bias.tolist() == [2.0]
    assert zero == [([1], None)]


def adapted():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(3, 3))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


def test_a_reference_adapter_is_added_once():
    model = adapted()
    add_reference_adapter(model)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data += 1.0
            assert parameter.requires_grad
    assert model.active_adapter == "default"
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name.replace(".default.", ".ref.")), value)
    add_reference_adapter(model)  # of a second trainer: the copy is made anew
    for name, value in values.items():
        copied = model.get_parameter(name.replace(".default.", ".ref."))
        torch.testing.assert_close(copied, value + 1.0)
        assert not copied.requires_grad


def test_an_adapter_moves_where_it_is_partitioned(zero, monkeypatch):
    seen = []

    @contextmanager
    def gathered(*values, written=False):
        seen.append((len(values), written))
        yield

    monkeypatch.setattr(reference, "_gathered", gathered)
    model = adapted()
    add_reference_adapter(model)
    args = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
    # Under a wrapper, such as that of DistributedDataParallel
    wrapped = SimpleNamespace(module=model)
    reference.SyncReferenceAdapter().on_step_end(args, SimpleNamespace(global_step=1), None, model=wrapped)
    assert seen == [(2, True)] * 2
