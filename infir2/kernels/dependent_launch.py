"""Kernels that are launched while the one before them still runs ("programmatic dependent launch").

Such a kernel prepares what it can, then waits for the end of the one before (``gdc_wait``), so the gap between two
kernels is shorter. It must wait before it reads or writes anything that kernels before it write or read. Where a kernel
says ``gdc_launch_dependents``, the next may be launched once all its programs have started. Hopper and later.
"""

import functools

import torch


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device may be launched early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(dependent: bool) -> dict[str, bool]:
    """For Triton's launch of a kernel, whether early or not."""
    return {"launch_pdl": True} if dependent else {}
