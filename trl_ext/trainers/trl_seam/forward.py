"""TRL's fused forward: one call of the model, with a head of ours in place, and bound so that copies run their own weights."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import Partial
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput

from trl_ext.logprobs import Divergence, Head, Projection, TokenLogProbs, Transform, projection
from trl_ext.logprobs.substitute import Substitute


# Keys of a batch that are not arguments of the model (`_non_model_keys` in `DPOTrainer._compute_loss`)
NON_MODEL_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

# Fields of the fused head's output that have one row per sequence
ROW_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")

# The field that a divergence comes out in: that of WPO, which none of our losses goes with. TRL's forward knows no others
DIVERGENCE = "log_sum_sq_probs"


def model_inputs(inputs: dict) -> dict:
    """What of a batch the model is called with."""
    return {name: value for name, value in inputs.items() if name not in NON_MODEL_KEYS}


def fused_forward(model: Callable, inputs: dict, router_logits: bool) -> FusedCausalLMOutput:
    """One call of the (wrapped) model that gives per-token log-probs, with the arguments that TRL would pass."""
    kwargs = model_inputs(inputs)
    if router_logits:
        kwargs["output_router_logits"] = True
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return model(**kwargs, use_cache=False, labels=labels, fused_lm_head=True)


def map_rows(outputs: FusedCausalLMOutput, function: Callable[[torch.Tensor], torch.Tensor]) -> FusedCausalLMOutput:
    """The same output with `function` applied to each per-token field; the auxiliary loss stays, the loss goes."""
    fields = {name: function(outputs[name]) for name in ROW_FIELDS if outputs.get(name) is not None}
    return FusedCausalLMOutput(aux_loss=outputs.aux_loss, **fields)


@contextlib.contextmanager
def head_in_place(
    head: Head, statistics: tuple[str, ...] | None, divergence: Divergence | None = None
) -> Iterator[None]:
    """
    While open, TRL's fused forward projects hidden states through `head`, at scored positions only.

    All else in that forward stays TRL's: shifting, soft caps and scales of model families, sharded heads, the auxiliary
    loss of MoE models. Of the statistics that TRL wants, those not in `statistics` come back as zeros; `None` is all. A
    `divergence` comes back in the field [`DIVERGENCE`]: out of the wrapped model's forward, with its gradient.
    """

    def apply(hidden, weight, bias, targets, temperature, _chunk_size, softcap, scale, outputs):
        _average_gradients(weight, bias)
        wanted = tuple(name for name in outputs if name != "log_probs" and (statistics is None or name in statistics))
        transform, gather = Transform(scale, softcap, temperature), utils.maybe_gather_lm_head_ctx
        result = head(hidden, weight, bias, targets, transform, wanted, gather=gather)
        if divergence is not None:
            result = result._replace(**{DIVERGENCE: divergence(head, hidden, weight, bias, transform, gather)})
        zeros = {name: torch.zeros_like(result.log_probs) for name in outputs if getattr(result, name) is None}
        if "is_top1" in zeros:
            zeros["is_top1"] = zeros["is_top1"].bool()
        return result._replace(**zeros)

    with _HEAD.acting(apply):
        yield


@contextlib.contextmanager
def projections_in_place(copied: bool) -> Iterator[list[Projection]]:
    """
    While open, TRL's fused forward projects nothing: what each call would have projected is put into the list.

    Args:
        copied (`bool`):
            Whether heads are copied: those of a sharded model are whole in its forward alone.
    """
    found: list[Projection] = []

    def apply(hidden, weight, bias, targets, temperature, _chunk_size, softcap, scale, outputs):
        found.append(projection(hidden, weight, bias, Transform(scale, softcap, temperature), copied))
        return TokenLogProbs(hidden.new_zeros(len(hidden)))

    with _HEAD.acting(apply):
        yield found


def _install_head(current: ContextVar) -> Callable[[], None]:
    """Have TRL's fused forward ask the thread that runs it for its head."""
    function, use_triton = utils._ChunkedLogProbFunction, utils._use_triton

    # In a compiled model the head runs as it is: its tiles follow from the number of tokens and from the memory that is free
    @torch.compiler.disable
    def apply(*arguments):
        own = current.get()
        return function.apply(*arguments) if own is None else own(*arguments)

    @torch.compiler.disable
    def scored_alone(device):
        """On every device the head is given the scored positions alone."""
        return current.get() is not None or use_triton(device)

    utils._ChunkedLogProbFunction = types.SimpleNamespace(apply=apply, forward=function.forward)
    utils._use_triton = scored_alone

    def remove() -> None:
        utils._ChunkedLogProbFunction, utils._use_triton = function, use_triton

    return remove


_HEAD = Substitute(_install_head)


def _average_gradients(*parameters: torch.Tensor | None) -> None:
    """
    Have the gradients of a sharded head averaged over processes.

    A head that is an FSDP2 unit of its own (an adapter's `modules_to_save`) comes from TRL made whole with `full_tensor()`,
    whose backward would give each process's shard the gradient of that process alone.
    """
    for parameter in parameters:
        made_whole = getattr(parameter, "grad_fn", None)
        if hasattr(made_whole, "dtensor_spec"):
            made_whole.grad_placements = [Partial("avg")] * made_whole.dtensor_spec.mesh.ndim


def base_model(model: nn.Module) -> nn.Module:
    """The model inside an adapter's wrapper: where TRL puts its fused forward."""
    return model.get_base_model() if is_peft_model(model) else model


_OWN_FORWARD = "_trl_ext_forward"  # marks our function; on a model, the forward that was there before


def bind_forward(model: nn.Module) -> None:
    """
    Have TRL's fused forward, just added to `model`, look up everything on the model that it is called on.

    TRL's keeps the bound forward of the model that it was made for: a deep copy would run the original's weights.
    """
    fused = vars(model)["forward"].__func__
    before = inspect.getclosurevars(fused).nonlocals["original_forward"]
    if getattr(before, "__func__", None) is not type(model).forward:
        vars(model)[_OWN_FORWARD] = before  # hooks of accelerate, copied with the model they belong to

    @functools.wraps(fused)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if fused_lm_head:
            return fused(self, *args, fused_lm_head=True, **kwargs)
        unfused = vars(self).get(_OWN_FORWARD)
        return unfused(*args, **kwargs) if unfused is not None else type(self).forward(self, *args, **kwargs)

    setattr(forward, _OWN_FORWARD, True)
    model.forward = types.MethodType(forward, model)


def unbind_forward(model: nn.Module) -> None:
    """Undo [`bind_forward`] and TRL's own fused forward, of the model itself or of the one it was copied from."""
    while (forward := vars(model).get("forward")) is not None:
        function = getattr(forward, "__func__", None)
        if getattr(function, _OWN_FORWARD, False):
            before = vars(model).pop(_OWN_FORWARD, None)
        elif getattr(getattr(function, "__code__", None), "co_name", "") == "_fused_forward":
            before = inspect.getclosurevars(function).nonlocals["original_forward"]
            if isinstance(before, types.MethodType):
                own = before.__func__ is type(model).forward
                before = None if own else types.MethodType(before.__func__, model)
        else:
            return
        del model.forward
        if before is not None:
            model.forward = before


class Replay:
    """
    Stands in for the model in a call of TRL's: answers the fused forward with outputs that are already there.

    What else TRL asks the model for, it asks of all rows of `inputs`, which may be more than those that TRL's loss was given.
    """

    def __init__(self, model: Callable, outputs: FusedCausalLMOutput, inputs: Mapping[str, torch.Tensor]):
        self.model, self.outputs, self.inputs = model, outputs, inputs

    def __call__(self, *args, fused_lm_head: bool = False, **kwargs):
        return self.outputs if fused_lm_head else self.model(*args, **{**kwargs, **self.inputs})
