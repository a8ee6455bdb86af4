"""Dense bfloat16 peak of a device, by its name: what model FLOPs utilisation (MFU) is measured against, in FP8 too."""

import re

# TFLOP/s without sparsity at the vendor's boost clock (NVIDIA data sheets). The form factor decides: a PCIe or NVL
# board has fewer multiprocessors or a lower clock than the SXM module of the same name.
_PEAKS = (
    (r"H[18]00 (SXM\S*|\d+GB HBM3)|H800|H200( SXM\S*)?|GH200 .*", 989.4),
    (r"H100 NVL|H200 NVL", 835.5),
    (r"H[18]00 PCIe", 756.0),
    (r"H20|H20-.*", 148.0),
    (r"A[18]00[- ].*", 312.0),
    (r"B200", 2250.0),
)


def peak_tflops(name: str) -> float | None:
    """TFLOP/s of the device that CUDA calls ``name``; None for one that is not in the table, or for a MIG slice."""
    model = name.removeprefix("NVIDIA ")
    if "MIG" in model:
        return None
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, model)), None)
