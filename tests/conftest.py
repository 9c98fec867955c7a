"""Small models and tokenizers, made here: nothing is downloaded."""

import gc
import os
import sys
import tempfile
from pathlib import Path


# Before transformers is imported: no network, no telemetry, one thread per process (tests run side by side)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Liger's kernels on a CPU; read when Triton is imported

import pytest


def pytest_configure(config):
    """`evaluate` and transformers import modules from one folder for as long as a process lives.

    Each process of the tests has its own: two that wrote the same module at once would read half-written files.
    """
    folder = tempfile.TemporaryDirectory(prefix="modules-")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_MODULES_CACHE"] = folder.name


def pytest_collection_finish():
    """Each training collects garbage. What has been imported until now is none, and need not be looked through each time."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Tests that need a GPU skip themselves where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and '</think>' not in message.content and loop.last and enable_thinking is "
    "defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
WORDS = (
    "the a film review was is good bad great awful dull bright funny sad slow fast long short very quite story plot "
    "actor scene music end start i you we it liked hated loved saw think this that and but because so what how why"
).split()


def build_tokenizer(texts=None):
    """A byte-level BPE tokenizer with a chat template that knows `enable_thinking`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts or [" " + " ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A folder with a tiny Qwen3 model and its tokenizer, as `from_pretrained` takes it."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("tiny-qwen3")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.2,  # far from uniform, so that gradients and metrics are not all alike
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def trl_as_it_was():
    """Puts TRL's own classes back after a test that has ours in their place: the tests of other files need them."""
    import trl.experimental.online_dpo

    from trl_ext.trainers.patch import ONLINE, STABLE

    names = [*STABLE, *ONLINE]
    for package in (trl, trl.trainer):
        for name in STABLE:
            getattr(package, name)  # TRL's packages are lazy: now it is in `vars`
    modules = [module for name, module in sys.modules.items() if name == "trl" or name.startswith("trl.")]
    before = [(module, dict(vars(module))) for module in modules]
    yield
    for module, attributes in before:
        for name in names:
            if name in attributes:
                setattr(module, name, attributes[name])
            elif name in vars(module):
                delattr(module, name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scored preference data beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real preference data beside the checkout (../shared/data)")
    return path


def preference_rows(rows: int = 8, seed: int = 0) -> list[dict]:
    """Plain preference rows of differing lengths, with what each of our losses reads; scores are win rates too."""
    import random

    random_, initial, values = random.Random(seed), random.Random(seed + 1), random.Random(seed + 2)

    def text(low: int, high: int) -> str:
        return "".join(" " + random_.choice(WORDS) for _ in range(random_.randint(low, high)))

    return [
        {
            "prompt": "what" + text(2, 6),
            "chosen": text(2, 9),
            "rejected": text(2, 9),
            "chosen_empty_trace": text(1, 4),
            "rejected_empty_trace": text(1, 4),
            "score_chosen": 0.5 + 0.5 * random_.random(),
            "score_rejected": 0.5 * random_.random(),
            "preference_prob": random_.random(),
            "initial_chosen_logps": -30.0 + 10 * initial.random(),
            "initial_rejected_logps": -30.0 + 10 * initial.random(),
            "q_chosen": 2 * values.random() - 1,
            "q_rejected": 2 * values.random() - 1,
        }
        for _ in range(rows)
    ]
