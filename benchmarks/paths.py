"""The paths of a DPO step: a trainer each, on one policy, one reference and one optimizer that they share."""

import argparse
import tempfile

import torch
import trl
from common import compilations, host_syncs, model, timed, tokenizer
from datasets import Dataset
from lengths import groups, pairs, sampled

import trl_ext


class LogitsTrainer(trl.DPOTrainer):
    """TRL's trainer with logits of all tokens, as before it had a fused head."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def log_probs(network):
            logits = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            token = trl.trainer.utils.selective_log_softmax(logits.logits[:, :-1], inputs["input_ids"][:, 1:])
            return (token * inputs["completion_mask"][:, 1:]).sum(1)

        with torch.no_grad():
            reference = self.with_reference(log_probs)
        chosen, rejected = (log_probs(model) - reference).chunk(2)
        return -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean()

    def with_reference(self, function):
        if self.ref_model is not None:
            return function(self.ref_model)
        with self.model.disable_adapter():
            return function(self.model)


class LigerTrainer(LogitsTrainer):
    """TRL's trainer with Liger's chunked DPO loss, which projects the hidden states itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        def hidden(network):
            # The decoder of the wrapped model: these are single-process runs
            base = network.get_base_model() if hasattr(network, "get_base_model") else network
            return base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        with torch.no_grad():
            reference = self.with_reference(hidden).last_hidden_state[:, :-1]
        head = model.get_output_embeddings().weight
        ref_head = head if self.ref_model is None else self.ref_model.get_output_embeddings().weight
        loss = LigerFusedLinearDPOLoss(beta=self.beta, compiled=self.args.device.type != "cpu")
        states = hidden(model).last_hidden_state[:, :-1]
        return loss(head, states, labels, ref_input=reference, ref_weight=ref_head.detach())[0]


TRAINERS = {"trl": trl.DPOTrainer, "liger": LigerTrainer, "logits": LogitsTrainer}
REFERENCE_FREE = {
    "ours-simpo": "simpo",
    "ours-cpo": "cpo",
    "ours-asft": "asft",
}  # losses whose step spares the reference
LATER = "ours-later"  # a step of a later epoch, in which what the reference says of each row is known
PATHS = (*TRAINERS, "ours", "ours-plain", LATER, *REFERENCE_FREE)
ATTEMPTS = 4  # to take a step in which nothing is compiled


class Models:
    """
    What all paths of a process share: weights, gradients and optimizer state stand in memory once, however many trainers there are.

    A LoRA is put on the policy here and not by the first trainer; its reference is the policy without it.
    """

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype | None = None):
        dtype = dtype or getattr(torch, args.dtype)
        self.policy = model(args.size, args.vocab, 0, dtype, args.device)
        self.reference = None if args.lora else model(args.size, args.vocab, 1, dtype, args.device)
        self.optimizer: torch.optim.Optimizer | None = None
        if args.lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            self.policy = get_peft_model(self.policy, adapter).to(dtype=dtype)


class Path:
    """A trainer on the shared models, its batches and its steps."""

    def __init__(self, name: str, args: argparse.Namespace, models: Models):
        self.device, self.recompilations, self.turn = args.device, 0, 0
        ours = name.startswith("ours")
        options = (
            {
                "logprob_memory_mb": args.memory_mb,
                "share_prefix": name != "ours-plain" and "auto",
                "ref_logps_memory_mb": 1024 if name == LATER else 0,  # else each step is one of a first epoch
            }
            if ours
            else {}
        )
        text = {"prompt": "a ", "chosen": "b", "rejected": "c"}
        grouped = ours and args.num_generations > 2
        if grouped:
            options["loss_type"] = "anchored"
            text = {"prompt": "a ", "completions": ["b", "c", "b"], "scores": [2.0, 1.0, 0.0]}
        if name in REFERENCE_FREE:
            options["loss_type"] = REFERENCE_FREE[name]
        config = (trl_ext if ours else trl).DPOConfig(
            output_dir=tempfile.mkdtemp(),
            report_to="none",
            bf16=False,
            use_cpu=args.device == "cpu",
            logging_steps=10**6,
            max_length=None,
            gradient_checkpointing=not args.no_checkpointing,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        self.trainer = (trl_ext.DPOTrainer if ours else TRAINERS[name])(
            model=models.policy,
            ref_model=None if name in REFERENCE_FREE else models.reference,
            args=config,
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list([text]),
        )
        policy = self.trainer.model
        if args.lora:
            policy.delete_adapter("ref")  # of the adapter as it begins; here the reference is the model without one
        # Otherwise a trainer makes one of its own, with the same settings
        models.optimizer = self.trainer.optimizer = models.optimizer or self.trainer.create_optimizer()
        if config.gradient_checkpointing:  # which transformers turns on in `train()`
            policy.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        policy.train()
        self.trainer.current_gradient_accumulation_steps = 1
        # Token ids as they are, past the tokenizer
        self.examples = [(groups if grouped else pairs)(batch) for batch in sampled(args)]
        if name == LATER:  # the first epoch, of which nothing is learnt
            for number in range(len(self.examples)):
                self.train_on(number)
                policy.zero_grad()

    def train_on(self, number: int) -> torch.Tensor:
        """The loss of a batch, whose gradients are there then. Padding and layout are part of it: without workers, a run waits for them."""
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(self.examples[number]))
        return self.trainer.training_step(self.trainer.model, inputs)

    def step(self) -> None:
        self.train_on(self.turn % len(self.examples))
        self.turn += 1
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()

    def warm_up(self) -> None:
        """Each batch once: what is compiled for a shape is there then."""
        for _ in self.examples:
            self.step()

    def seconds(self) -> float:
        """Of a step in which nothing was compiled; one with a compilation is counted and taken again."""
        for _ in range(ATTEMPTS):
            before = compilations()
            seconds = timed(self.step, self.device)
            if not (new := compilations() - before):
                return seconds
            self.recompilations += new
            self.turn -= 1
        raise RuntimeError(f"{ATTEMPTS} steps on one batch were all compiled anew, so none can be timed.")

    def host_syncs(self) -> int:
        """How often one step makes the host wait for the device."""
        return host_syncs(self.step, self.device)

    def gradients(self) -> tuple[float, list[torch.Tensor]]:
        """Loss and gradients of the first batch."""
        loss = self.train_on(0)
        gradients = [parameter.grad for parameter in self.trainer.model.parameters() if parameter.grad is not None]
        self.trainer.model.zero_grad()  # leaves the tensors to the list
        return loss.item(), gradients
