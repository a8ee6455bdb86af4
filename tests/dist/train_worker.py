"""What both ranks of test_train_torchrun.py run: a training run in which one rank meets a number that is not finite.

train_worker.py RECIPE OUT: rank 1 has a NaN activation in step 3, rank 0 a NaN gradient (and a finite loss) in step 5.
Each rank writes OUT/rank-N.pt: what every step did, how often weights were quantised, the last FP8 codes, and what it
holds of weights and moments.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infir2.checkpoint.state import flatten
from infir2.config import CptConfig, load
from infir2.fp8.linear import Fp8Linear
from infir2.fp8.tensor import Operand
from infir2.launch import training
from infir2.parallel.runtime import world
from infir2.stages.cpt import train_cpt
from infir2.train import loop

steps: list[dict[str, Any]] = []
quantised = 0
trainees: list[training.Trainee] = []


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local_weights(model: nn.Module) -> list[Tensor]:
    return [local(parameter) for parameter in model.state_dict(keep_vars=True).values()]


def noting_train_step(model: nn.Module, *args: Any, **options: Any) -> Any:
    before = local_weights(model)
    result = true_train_step(model, *args, **options)
    changed = any(not torch.equal(old, new) for old, new in zip(before, local_weights(model), strict=True))
    steps.append({"loss": result.loss, "grad_norm": result.grad_norm, "skipped": result.skipped, "changed": changed})
    return result


def counting_quantize(x: Tensor, granularity: str, *rest: Any) -> Operand:
    global quantised
    quantised += granularity == "block"
    return true_quantize(x, granularity, *rest)


def poison(rank: int) -> Any:
    def nan(grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("nan"))

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        step = len(steps) + 1
        if not torch.is_grad_enabled():
            return out
        if rank == 1 and step == 3:
            return out * float("nan")
        if rank == 0 and step == 5:
            out.register_hook(nan)
        return out

    return hook


def poisoned_trainee(config: Any, architecture: Any, here: Any) -> Any:
    trainee = true_build_trainee(config, architecture, here)
    trainee.model.model.layers[1].mlp.register_forward_hook(poison(here.rank))
    trainees.append(trainee)
    return trainee


true_train_step, true_quantize, true_build_trainee = loop.train_step, Operand.quantize, training.build_trainee

if __name__ == "__main__":
    loop.train_step, training.build_trainee = noting_train_step, poisoned_trainee
    Operand.quantize = counting_quantize  # type: ignore[method-assign]
    config = load(CptConfig, Path(sys.argv[1]))
    with world(config.parallel.replicate) as here:
        assert train_cpt(config, here) is None
    layers = {name: m for name, m in trainees[0].model.named_modules() if isinstance(m, Fp8Linear)}
    codes = {name: layer._operand.codes.view(torch.uint8) for name, layer in layers.items()}
    note = {"steps": steps, "quantised": quantised, "codes": codes, "stale": [m.stale for m in layers.values()]}
    held = flatten(trainees[0].tensors())
    note["sharded"] = any(isinstance(tensor, DTensor) for tensor in held.values())
    note["tensors"] = {name: local(tensor) for name, tensor in held.items()}
    torch.save(note, Path(sys.argv[2]) / f"rank-{here.rank}.pt")
