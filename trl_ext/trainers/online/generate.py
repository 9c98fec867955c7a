"""The first step of online training: completions of transformers' generation, of vLLM, or of a mixture with the reference."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import GenerationConfig, PreTrainedModel
from trl.data_utils import is_conversational, maybe_apply_chat_template
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from trl_ext.data.reasoning import answer_text, empty_trace_prompt, trace_is_open
from trl_ext.data.tokens import prompt_ids, template_arguments
from trl_ext.generation import Completions, GeometricMixture, evaluating, last_logits, sample_rows, without_defaults
from trl_ext.trainers.reference import ADAPTER


class Generation:
    """How [`OnlineDPOTrainer`] generates."""

    def generate(
        self, model: torch.nn.Module, inputs: dict[str, Any], thinking: bool = True, reference: bool = False
    ) -> Completions:
        """
        First step: `K` completions of each prompt.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            inputs (`dict[str, Any]`):
                A batch of the dataset: lists by column.
            thinking (`bool`, *optional*, defaults to `True`):
                Whether reasoning is left as the template has it, or switched off.
            reference (`bool`, *optional*, defaults to `False`):
                Whether the reference generates, one completion per prompt.
        """
        count = 1 if reference else self.num_generations
        prompts, images = inputs["prompt"], inputs.get("image")
        vision = None
        if images is not None:
            texts, times = [_with_image(prompt) for prompt in prompts], -(-count // 2)  # as TRL gives two per prompt
            with without_defaults(self.accelerator.unwrap_model(model)):
                prompt_rows, prompt_mask, ids, mask, vision = self._generate(model, texts * times, images * times)
            ids = _trimmed(ids[: count * len(prompts)], mask[: count * len(prompts)])
            given = zip(prompt_rows[: len(prompts)].cpu(), prompt_mask[: len(prompts)].cpu(), strict=True)
            prompt_rows = [row[keep.bool()] for row, keep in given]
        else:
            texts = [self._render(inputs, row, thinking) for row in range(len(prompts))]
            prompt_rows = self._prompt_ids(prompts, texts)
            if self.use_vllm and not reference:
                ids = self._sample_vllm(texts, prompt_rows, count)
            else:
                ids = self._sample(model, prompt_rows, reference, count)
        # What follows is done on the host: texts, rewards, pairs, padding
        return Completions(
            prompts=prompts,
            texts=self._texts(prompts, prompt_rows, ids),
            prompt_ids=prompt_rows,
            ids=ids,
            ended=torch.tensor([self._has_ended(row) for row in ids]),
            vision=vision,
        )

    def _sampling_config(self) -> GenerationConfig:
        """How transformers samples: all that the config says, and nothing of the model's own."""
        args = self.args
        options = {
            "max_new_tokens": args.max_new_tokens,
            "do_sample": True,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
            "cache_implementation": args.cache_implementation,
            "pad_token_id": self._tokenizer.pad_token_id,
            "bos_token_id": self._tokenizer.bos_token_id,
            "eos_token_id": self.eos_token_ids,
            "use_cache": True,
            **((not self.use_vllm and args.generation_kwargs) or {}),  # with vLLM, these are arguments of its own
        }
        return GenerationConfig(**{name: value for name, value in options.items() if value is not None})

    def _render(self, inputs: dict[str, Any], row: int, thinking: bool) -> str:
        example = {name: inputs[name][row] for name in ("prompt", "tools", "chat_template_kwargs") if name in inputs}
        if not thinking:
            return empty_trace_prompt(example, self._tokenizer)
        given, prompt = template_arguments(example), {"prompt": example["prompt"]}
        options = given.get("chat_template_kwargs", {})
        return maybe_apply_chat_template(prompt, self.processing_class, given.get("tools"), **options)["prompt"]

    def _prompt_ids(self, prompts: list, texts: list[str]) -> list[torch.Tensor]:
        """Tokens of rendered prompts."""
        conversational = is_conversational({"prompt": prompts[0]})
        rows = [prompt_ids(text, self._tokenizer, conversational) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"The prompt {text!r} has no tokens.")
        return [torch.tensor(row) for row in rows]

    def _has_ended(self, ids: torch.Tensor) -> bool:
        """Whether a completion ended by itself: by a token, or by a string that the config stops at."""
        if torch.isin(ids, torch.tensor(self.eos_token_ids)).any():
            return True
        strings = self._sampling.stop_strings or []
        text = self._tokenizer.decode(ids) if strings else ""
        return any(string in text for string in ([strings] if isinstance(strings, str) else strings))

    def _sample_vllm(self, texts: list[str], rows: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        """
        Completions of vLLM, in blocks.

        TRL's method samples two completions per prompt. It is handed rendered prompts, as it knows neither `tools` nor
        `chat_template_kwargs`: token ids where vLLM runs in this process, and text for a server.
        """
        ids = [row.tolist() for row in rows]
        if self.vllm_mode == "server":
            prompts = [server_text(text, row, self._tokenizer) for text, row in zip(texts, ids, strict=True)]
        else:
            prompts = [{"prompt_token_ids": row} for row in ids]
        self.num_generations = 2  # what TRL's method asks a server for, and counts by
        try:
            _, _, output, mask = self._generate_vllm(prompts * -(-count // 2))
        finally:
            self.num_generations = self.args.num_generations
        return _trimmed(output[: count * len(rows)], mask[: count * len(rows)])

    def _sample(self, model, rows: list[torch.Tensor], reference: bool, count: int) -> list[torch.Tensor]:
        """Completions of transformers' generation, in blocks."""
        checkpointing = self.args.gradient_checkpointing_kwargs
        with contextlib.ExitStack() as stack:
            if reference:
                policy = stack.enter_context(self._reference())
                policy = self.accelerator.unwrap_model(policy)
            else:
                inner = self.accelerator.unwrap_model(model)
                stack.enter_context(evaluating(inner, checkpointing))
                policy = stack.enter_context(
                    unwrap_model_for_generation(
                        model,
                        self.accelerator,
                        gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                        generation_kwargs=self.generation_kwargs,
                        gradient_checkpointing_kwargs=checkpointing,
                    )
                )
            if self.is_fsdp_enabled:
                stack.enter_context(FullyShardedDataParallel.summon_full_params(self.model_wrapped, recurse=False))
            stack.enter_context(torch.no_grad())
            output = sample_rows(
                eager(policy),
                rows,
                self._sampling,
                count,
                self.accelerator.device,
                completions_at_once=self._completions_at_once,
                mixture=self._mixture(count) if self.args.mixture_coef and not reference else None,
                processing_class=self._tokenizer,
            )
        # One wait for the device, and not one for each completion
        return list(torch.cat(output).cpu().split([len(row) for row in output]))

    def _mixture(self, count: int) -> Callable[[torch.Tensor], GeometricMixture]:
        """What makes the mixture with the reference for a batch of prompts, each repeated `count` times in a row."""

        def reference(**kwargs):
            with self._reference() as network:
                network = eager(network)
                # Of a prompt too: its other logits would be the largest tensor of the run
                return network(**kwargs, **last_logits(self.accelerator.unwrap_model(network)))

        reference.config = self.model.config

        def make(mask: torch.Tensor) -> GeometricMixture:
            coefficient = torch.full((count,), float(self.args.mixture_coef), device=mask.device)
            if self.args.mixture_samples == "half":
                coefficient[: count // 2] = 0
            return GeometricMixture(reference, mask, coefficient.repeat(mask.size(0) // count).unsqueeze(1), count)

        return make

    @contextlib.contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        """The reference: a model of its own, or the policy with its adapter off or replaced."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        inner = self.accelerator.unwrap_model(self.model)
        adapter = ADAPTER if ADAPTER in inner.peft_config else None
        with evaluating(inner, self.args.gradient_checkpointing_kwargs), use_adapter(inner, adapter_name=adapter):
            yield self.model

    def _texts(self, prompts: list, prompt_ids: list[torch.Tensor], ids: list[torch.Tensor]) -> list:
        """Completions as reward functions see them; for two traces, the answer alone."""
        skip = len(self._thinking) == 1
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=skip)
        if not skip:
            special = [token for token in self._tokenizer.all_special_tokens if "think" not in token]
            for token in special:
                texts = [text.replace(token, "") for text in texts]
            opened = [trace_is_open(text) for text in self.processing_class.batch_decode(prompt_ids)]
            texts = [answer_text(text, opened[i % len(prompts)]) for i, text in enumerate(texts)]
        if is_conversational({"prompt": prompts[0]}):
            return [[{"role": "assistant", "content": text}] for text in texts]
        return texts


def _with_image(prompt: Any) -> Any:
    """Messages whose texts are content parts, the image's placeholder before the first of the user's."""
    if isinstance(prompt, str) or any(isinstance(message.get("content"), list) for message in prompt):
        return prompt
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in prompt]
    first = next((message for message in parts if message["role"] == "user"), parts[0])
    first["content"].insert(0, {"type": "image"})
    return parts


def eager(model: torch.nn.Module) -> torch.nn.Module:
    """The model without `torch.compile`, which would compile it anew for each length of a completion."""
    return getattr(model, "_orig_mod", model)


def server_text(text: str, ids: list[int], tokenizer: Any) -> str:
    """
    A text that becomes exactly `ids` in a vLLM server, which adds the tokenizer's special tokens itself.

    Raises:
        `ValueError`: If there is none.
    """
    for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(candidate)["input_ids"] == ids:
            return candidate
    raise ValueError(
        f"A vLLM server would read the prompt {text!r} with other special tokens than training: it adds the tokenizer's own. "
        "Set `vllm_mode='colocate'`, where token ids are handed over."
    )


def _trimmed(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The rows without their padding, on the host."""
    return [row[:length] for row, length in zip(ids.cpu(), mask.sum(dim=1).tolist(), strict=True)]
