"""A small language model, built from a config and fine-tuned here."""

import random
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl_ext.generation import sample_rows


MAX_NEW_TOKENS = 64


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def trained_tokenizer(texts: Iterable[str], size: int = 2000) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on texts of the user's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer)


def _fast(tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def build_model(tokenizer: PreTrainedTokenizerBase, max_length: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str]],
    steps: int,
    max_length: int,
    rng: random.Random,
    advance: Callable[[], None],
) -> float:
    """Next-token training on (prompt, completion) texts; returns the last step's loss in nats per token."""
    batch_size = 48
    encoded = [
        tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"][:max_length] for prompt, completion in texts
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = rng.choices(encoded, k=batch_size)
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance()
    model.eval()
    return loss.item()


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of each text."""
    return [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[torch.Tensor], max_new_tokens: int
) -> list[torch.Tensor]:
    """One completion of each prompt at temperature 1: token ids up to and with the end of sequence."""
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return sample_rows(model, prompts, config, 1, model.device, completions_at_once=256)


@torch.no_grad()
def kl_to_reference(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: list[torch.Tensor],
    completions: list[torch.Tensor],
    at_once: int = 64,
) -> torch.Tensor:
    """
    KL of the policy to the reference, in nats per completion: of each completion, shape `(N,)`, and in the mean the KL.

    The sum, over the tokens of the policy's own completions, of the KL between the two next-token distributions: the
    same expectation as the log-ratio, with less noise.

    Args:
        prompts (`list[torch.Tensor]`): Token ids.
        completions (`list[torch.Tensor]`): Those of one completion of each prompt.
        at_once (`int`, *optional*, defaults to `64`): Completions that the models run over together.
    """
    found = []
    for start in range(0, len(prompts), at_once):
        pairs = list(zip(prompts, completions, strict=True))[start : start + at_once]
        ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True).to(model.device)
        position = torch.arange(ids.size(1), device=model.device)
        first = torch.tensor([[len(prompt)] for prompt, _ in pairs], device=model.device)
        lengths = torch.tensor([[len(prompt) + len(own)] for prompt, own in pairs], device=model.device)
        logps = [
            F.log_softmax(lm(input_ids=ids, attention_mask=(position < lengths).long()).logits.float(), dim=-1)
            for lm in (model, reference)
        ]
        kl = F.kl_div(logps[1], logps[0], reduction="none", log_target=True).sum(-1)
        # Position t holds the distribution of token t + 1
        found.append((kl * ((position >= first - 1) & (position < lengths - 1))).sum(dim=1))
    return torch.cat(found)
