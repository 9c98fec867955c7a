"""What tests of sampling begin with."""

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def model(tiny_model_dir):
    """The tiny model as it was saved, to be changed at will."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture
def batch():
    """Six prompts and their mask, padded on the left."""
    torch.manual_seed(0)
    ids, mask = torch.randint(10, 300, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    for row, padding in enumerate((4, 2, 0, 8, 0, 1)):
        mask[row, :padding] = 0
    return ids, mask
