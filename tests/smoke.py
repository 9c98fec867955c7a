"""
What a fresh installation must do: answer, list the losses, train. `make smoke` runs it where the wheel alone is installed.

    python -I tests/smoke.py

Everything is made here: nothing is downloaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path


PAIR = {"prompt": "What is the film like?", "chosen": " It is good.", "rejected": " It is bad.", "score_chosen": 2.0, "score_rejected": 1.0}  # fmt: skip
FILES = ("trl_ext/py.typed", "trl_ext/losses/README.md")


def main() -> None:
    """Run all of it; an `AssertionError` or a failed command says what is broken."""
    check_installation()
    command = [str(Path(sys.executable).with_name("trl-ext"))]
    assert "losses" in said([*command, "--help"])
    assert "offset" in said([*command, "losses"])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_model("tiny")
        Path("pairs.jsonl").write_text("\n".join([json.dumps(PAIR)] * 4))
        print(said([*command, "run", "dpo", *TRAINING])[-500:])
        check_training(Path("out"))
    print(f"trl-ext {metadata.version('trl-ext')} works on Python {sys.version.split()[0]}.")


TRAINING = [
    "--model_name_or_path", "tiny", "--dataset_name", "pairs.jsonl", "--loss_type", "offset", "--loss_kwargs", '{"alpha": 0.5}',
    "--max_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3", "--per_device_train_batch_size", "2", "--use_cpu",
    "--bf16", "false", "--report_to", "none", "--output_dir", "out",
]  # fmt: skip


def check_installation() -> None:
    """The package is the installed one, has its files, and brings nothing that is not its own."""
    import trl_ext

    assert "site-packages" in trl_ext.__file__, f"{trl_ext.__file__} is a checkout, not the wheel"
    assert trl_ext.__version__ == metadata.version("trl-ext")
    names = [str(name) for name in metadata.files("trl-ext") or []]
    assert set(FILES) <= set(names), f"{FILES} are not all there"
    others = {name.split("/")[0] for name in names if not name.startswith(("trl_ext/", "trl_ext-", ".."))}
    assert not others, f"the wheel brings {others}"


def make_model(folder: str) -> None:
    """A Qwen3 model of a few thousand weights, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = ["<|pad|>", "<|eos|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<|pad|>", eos_token="<|eos|>")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=8, max_position_embeddings=256, pad_token_id=0, eos_token_id=1)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_training(folder: Path) -> None:
    """Two steps were taken, each with a finite loss and the metric of the loss."""
    (state,) = folder.glob("checkpoint-2/trainer_state.json")
    steps = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(steps) == 2, steps
    assert all(0 < entry["loss"] < 10 and entry["offset/mean"] == 0.0 for entry in steps), steps  # 0.5 * log(2 - 1)
    assert (folder / "model.safetensors").exists() and "offset" in (folder / "README.md").read_text()


def said(command: list[str]) -> str:
    """What a command prints; one that fails ends all."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
