"""What is put in a library's place acts for the threads that asked for it, and is gone when the last one is done."""

import threading
import types

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from trl.trainer import utils

from trl_ext.logprobs import Head, shared_prefix_layout
from trl_ext.logprobs.substitute import Substitute
from trl_ext.trainers.trl_seam import head_in_place


def in_a_thread(function):
    """Run `function`; its error, if any, is raised here."""
    errors = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_each_thread_has_its_own_value():
    library = types.SimpleNamespace(name=lambda: "original")

    def install(current):
        original = library.name
        library.name = lambda: current.get() or original()
        return lambda: setattr(library, "name", original)

    original, substitute = library.name, Substitute(install)
    with substitute.acting("first"):
        assert library.name() == "first"

        def other():
            assert library.name() == "original"
            with substitute.acting("second"):
                assert library.name() == "second"
            assert library.name() == "original"

        in_a_thread(other)
        assert library.name() == "first"
        with substitute.acting("inner"):
            assert library.name() == "inner"
        assert library.name() == "first"
    assert library.name is original


def test_threads_that_overlap_leave_nothing_behind(tiny_model_dir):
    """The first thread enters first and leaves first: what the second then leaves must be the original."""
    before = utils._ChunkedLogProbFunction, utils._use_triton, dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    entered, left = threading.Event(), threading.Event()
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    layout = shared_prefix_layout(ids[:1].repeat(2, 1), torch.ones_like(ids), mask, torch.zeros(2))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    failures = []

    def second():
        with head_in_place(Head("torch"), ()), layout.masks():
            model.model(input_ids=ids[:1])  # builds a mask, which is asked for
            entered.set()
            left.wait(10)

    def run():
        try:
            second()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    with head_in_place(Head("torch"), ()), layout.masks():
        model.model(input_ids=ids[:1])
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert not failures
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before[:2]
    assert ALL_MASK_ATTENTION_FUNCTIONS._local_mapping == before[2]


def test_another_thread_keeps_the_library_as_it_is(tiny_model_dir):
    """While one thread shares prompts, a model that another thread runs attends as it always does."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.arange(8).view(1, 8) + 10
    expected = model(input_ids=ids).logits
    layout = shared_prefix_layout(
        ids.repeat(2, 1), torch.ones(2, 8, dtype=torch.long), torch.tensor([[0] * 4 + [1] * 4] * 2), torch.zeros(2)
    )
    seen = []
    with head_in_place(Head("torch"), ()), layout.masks():
        in_a_thread(lambda: seen.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits))
        model.model(input_ids=ids)
    torch.testing.assert_close(seen[0], expected)


def test_a_model_that_builds_no_mask_is_refused():
    ids = torch.arange(8).view(2, 4)
    layout = shared_prefix_layout(ids, torch.ones_like(ids), torch.tensor([[0, 0, 1, 1]] * 2), torch.zeros(2))
    with pytest.raises(RuntimeError, match="built no attention mask"), layout.masks():
        pass
