"""
The first batch that shares prompts, scored both ways: a model that attends in a way of its own is noticed before it is trained.

What rounding alone may change is measured on the model itself: plain rows again, with a rounding error more in each layer.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_ext.logprobs import Sharing
from trl_ext.rows import Rows


# Rows of a prompt, and prompts, that are compared: enough for a third completion and for a second prompt beside the first
ROWS, PROMPTS = 3, 2

# How many times the noise two ways of computing the same may differ. Measured on fifteen families with random weights, of 2 and of
# 6 layers: at most 2.1 times in half precision and 2.5 times in float32. With a wrong window it was 7 to 107 times in half
# precision; one wrong key of one sequence, 0.5 to 28 times, can there not always be told from rounding, and in float32 makes thousands.
HALF_TOLERANCE, FULL_TOLERANCE = 3.0, 20.0


class Measured(NamedTuple):
    """
    What is compared.

    Attributes:
        log_probs (`torch.Tensor` of shape `(M,)`):
            Of the scored tokens, in nats.
        gradient (`torch.Tensor` or `None`):
            Of their sum under random weights, in the first layer that is trained; `None` where it is not compared.
    """

    log_probs: torch.Tensor
    gradient: torch.Tensor | None


def why_differs(
    forward: Callable[[nn.Module, Rows], torch.Tensor], model: nn.Module, rows: Rows, sharing: Sharing
) -> str | None:
    """
    What differs between shared and plain rows; `None` if nothing but rounding does.

    Costs three forwards of at most six rows, and where gradients are on three backwards. Parameters that are sharded are
    gathered by the model's wrapper, and gradients are not compared there, nor under re-entrant checkpointing.

    Args:
        forward (`Callable`):
            Log-probabilities of the next tokens, `(N, T - 1)`, from a model and rows, in the layout that the rows have.
        model (`torch.nn.Module`):
            The model, wrapped for distributed training or not.
        rows ([`~trl_ext.rows.Rows`]):
            The batch.
        sharing ([`~trl_ext.logprobs.Sharing`]):
            How it is laid out.
    """
    few = _few(rows)
    try:
        layout = dataclasses.replace(sharing, always=True).layout(few.inputs, few.completion_mask, few.prompt)
    except ValueError:
        layout = None  # this batch is not shared; a sharded model still runs as often as in the other processes
    parameters: list[nn.Parameter] = []
    if not is_sharded(model):
        model = extract_model_from_parallel(model)
        parameters = _of_first_trained_layer(model) if torch.is_grad_enabled() else []
    try:
        plain = _measure(forward, model, few, parameters)
    except RuntimeError as error:
        # Parameters in front of re-entrant checkpointing, of which no gradient alone can be had
        if "use_reentrant" not in str(error):
            raise
        parameters = []
        plain = _measure(forward, model, few, parameters)
    try:
        shared = _measure(forward, model, dataclasses.replace(few, layout=layout), parameters)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with what it is given in place of a mask
        return f"the model fails on them ({type(error).__name__}: {error})"
    with one_more_rounding(model) as precision:
        noisy = _measure(forward, model, few, parameters)
    return _difference(plain, shared, noisy, FULL_TOLERANCE if precision() < 1e-4 else HALF_TOLERANCE)


def _few(rows: Rows) -> Rows:
    """Some rows of some prompts, without the width that only others need."""
    prompts = rows.prompt.tolist()
    kept: list[int] = []
    for prompt in list(dict.fromkeys(prompts))[:PROMPTS]:
        kept += [row for row, number in enumerate(prompts) if number == prompt][:ROWS]
    width = int((rows.inputs["attention_mask"][kept] != 0).any(dim=0).nonzero().max()) + 1
    shape = rows.completion_mask.shape
    inputs = {
        name: value[kept, :width] if value.shape[:2] == shape else value[kept] for name, value in rows.inputs.items()
    }
    partner = torch.arange(len(kept), device=rows.partner.device)
    return Rows(inputs, rows.completion_mask[kept, :width], rows.prompt[kept], partner)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds parts of the parameters only (FSDP, ZeRO-3)."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return layers or [extract_model_from_parallel(model).get_input_embeddings()]


def _of_first_trained_layer(model: nn.Module) -> list[nn.Parameter]:
    """Everything behind it takes part in their gradients."""
    for layer in (*_layers(model), model):
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        if trained:
            return trained
    return []


def _measure(forward: Callable, model: nn.Module, rows: Rows, parameters: list[nn.Parameter]) -> Measured:
    with torch.set_grad_enabled(bool(parameters)):
        log_probs = forward(model, rows)
    # Virtual tokens of a prompt that is learnt stand in front
    log_probs = log_probs[:, log_probs.size(1) - rows.completion_mask.size(1) + 1 :][rows.completion_mask[:, 1:] != 0]
    gradient = None
    if parameters:
        weights = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(0)).to(log_probs)
        gradients = torch.autograd.grad((log_probs * weights).sum(), parameters, allow_unused=True)
        # An expert that no token is sent to has none; behind re-entrant checkpointing no parameter has
        if any(each is not None for each in gradients):
            pairs = zip(parameters, gradients, strict=True)
            filled = [torch.zeros_like(parameter) if each is None else each for parameter, each in pairs]
            gradient = torch.cat([each.flatten() for each in filled]).float()
    return Measured(log_probs.detach().float(), gradient)


@contextlib.contextmanager
def one_more_rounding(model: nn.Module) -> Iterator[Callable[[], float]]:
    """
    While open, what each layer gives is off by up to the precision of what it computes in, at random.

    Yields:
        `Callable`: The coarsest precision that was met.
    """
    met = [0.0]
    generators: dict[torch.device, torch.Generator] = {}

    def perturb(module: nn.Module, args: tuple, output):
        hidden = output[0] if isinstance(output, tuple) else output
        device = hidden.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
        step = _precision(hidden)
        met[0] = max(met[0], step)
        noise = torch.rand(hidden.shape, generator=generator, device=device, dtype=torch.float32)
        changed = (hidden * (1 + (2 * noise - 1) * step)).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hooks = [layer.register_forward_hook(perturb) for layer in _layers(model)]
    try:
        yield lambda: met[0]
    finally:
        for hook in hooks:
            hook.remove()


def _precision(hidden: torch.Tensor) -> float:
    """Relative step of the numbers that products are computed in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps
    if hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-10  # TF32
    return torch.finfo(hidden.dtype).eps


def _difference(plain: Measured, shared: Measured, noisy: Measured, tolerance: float) -> str | None:
    reasons = []
    if not len(plain.log_probs):
        return None
    scale = plain.log_probs.square().mean().sqrt().item()
    noise = (noisy.log_probs - plain.log_probs).square().mean().sqrt().item()
    noise += torch.finfo(torch.float32).eps * scale  # where they are the same to the last bit
    difference = (shared.log_probs - plain.log_probs).square().mean().sqrt().item()
    if not difference <= tolerance * noise:  # NaN too
        reasons.append(f"their log-probabilities differ by {difference:.2g} nats, and by rounding alone {noise:.2g}")
    if plain.gradient is not None:
        size = plain.gradient.norm().item()
        noise = (noisy.gradient - plain.gradient).norm().item() + torch.finfo(torch.float32).eps * size
        difference = (plain.gradient if shared.gradient is None else shared.gradient - plain.gradient).norm().item()
        if not difference <= tolerance * noise:
            reasons.append(
                f"gradients of a length of {size:.2g} differ by {difference:.2g}, and by rounding alone {noise:.2g}"
            )
    return "; ".join(reasons) or None
