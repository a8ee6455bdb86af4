"""Spread a single-device model over the world, from outside and in one order: compile, checkpointing, FSDP2.

Where every process holds the whole model, FSDP2 has nothing to do: replicas only add up their gradients.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from infir2.model.transformer import DecoderLayer
from infir2.parallel.runtime import World

Checkpointing = Literal["none", "attention", "full"]

_BUCKET = 2**23  # elements, 32 MiB: an all-reduce of so many takes much longer than to start it


def parallelize(
    model: nn.Module,
    layers: nn.ModuleList,
    world: World,
    *,
    gather_dtype: torch.dtype = torch.float32,
    activation_checkpointing: Checkpointing = "none",
    compile_layers: bool = False,
    reshard_after_forward: bool = True,
    when_gathered: Callable[[nn.Module], object] | None = None,
) -> None:
    """Apply compilation and activation checkpointing to every decoder layer, then shard over the world's mesh, if it
    has one (in place).

    Checkpointing keeps a layer's input alone and computes the layer again in the backward pass; ``attention`` does so
    with what comes before and after attention, whose inputs and output are kept: of long sequences it is the part that
    takes longest to compute.

    FSDP2 keeps parameters, gradients and optimiser state as float32 shards, gathers parameters in ``gather_dtype``
    and sums gradients in float32 without dividing: the loss is already normalised by the global token count. Gathered
    in float32 a layer computes what it computes in a single process; in bfloat16, which moves half the bytes, every
    process also rounds its part of the gradient to bfloat16.

    when_gathered: called with a sharded layer before its forward pass, when its parameters are whole, outside of what
    is compiled.
    """
    for layer in layers:
        # The compiled code goes inside the checkpoint: around it, torch.compile finds nothing it can compile and runs
        # the layer eagerly without a word.
        if compile_layers:
            compile_layer(layer)
        if activation_checkpointing != "none":
            for name in ("before", "after") if activation_checkpointing == "attention" else ("forward",):
                # Nothing in a layer is random; to keep the generator's state would stop a CUDA graph's recording.
                run = partial(checkpoint, getattr(layer, name), use_reentrant=False, preserve_rng_state=False)
                setattr(layer, name, run)
    if world.mesh is None:
        return
    # A fused MLP's output is a view; nothing here adds to it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        if when_gathered is not None:
            layer.register_forward_pre_hook(partial(_call, when_gathered))  # after FSDP2's own hook, which gathers
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A plain sum: else FSDP2 asks for a premultiplied one, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def compile_layer(layer: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a decoder layer's ``before`` and ``after``, where they are not fused FP8; in place, the names stay.

    Not attention: it is one kernel as it is, of a kind (one document a row, or packed ones) that may change with every
    micro-batch, differently on every rank, where all would wait for one's compiler. Nor fused FP8: its kernels leave
    nothing to fuse, and a step takes as long without.
    """
    assert isinstance(layer, DecoderLayer)
    # One process may compile many variants of a layer: recipes, shapes, training and evaluation, several runs.
    torch._dynamo.config.recompile_limit = 64
    for name, fused in (("before", layer.self_attn.fused_heads), ("after", layer.mlp.fused_mlp)):
        if fused is None:
            setattr(layer, name, torch.compile(getattr(layer, name), backend=backend))


def _call(function: Callable[[nn.Module], object], layer: nn.Module, inputs: object) -> None:
    function(layer)


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Have FSDP2 reduce gradients after the next backward pass, or keep accumulating them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


@torch.no_grad()
def sum_gradients(model: nn.Module, world: World) -> None:
    """Add up the gradients of replicas, in place: afterwards all of them hold the same bits. Collective.

    Nothing is done in a single process, nor where FSDP2 has reduced them. A gradient that one process lacks counts as
    zeros. Large ones are sent as they lie in memory, small ones together, so no second copy of all of them is made.
    """
    if world.size == 1 or world.mesh is not None:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(p.grad for p in parameters if p.grad is not None):
        if len(bucket) == 1:
            world.all_sum(bucket[0])
            continue
        parts = world.all_sum(torch.cat([gradient.flatten() for gradient in bucket])).split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those of at least a bucket's elements alone, the others in order, until they fill one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() >= _BUCKET:
            yield [tensor]
            continue
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Write a whole tensor, which every rank has, into a parameter, sharded or not, in the parameter's dtype."""
    if parameter.is_meta:
        raise RuntimeError("the parameters have no memory yet: call model.to_empty(device=...) first")
    if isinstance(parameter, DTensor):
        # No communication is needed to take this rank's part.
        whole = value.to(parameter.device)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(value)
