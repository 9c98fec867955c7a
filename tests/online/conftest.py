"""What tests of sampling begin with."""

import pytest
import torch
from transformers import AutoModelForCausalLM


def saved_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def padded_prompts():
    """Six prompts and their mask, padded on the left."""
    torch.manual_seed(0)
    ids, mask = torch.randint(10, 300, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    for row, padding in enumerate((4, 2, 0, 8, 0, 1)):
        mask[row, :padding] = 0
    return ids, mask


@pytest.fixture
def model(tiny_model_dir):
    """The tiny model, to be changed at will."""
    return saved_model(tiny_model_dir)


@pytest.fixture
def batch():
    return padded_prompts()
