"""What accelerators can do, as their makers publish it: dense arithmetic without sparsity, one direction of links.

NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU", "HGX B200" (per GPU), "A100 Tensor Core GPU"
(SXM, 80 GB), "L40S", "L4", "Tesla V100" (SXM2, 32 GB). Figures with sparsity are halved, and so is the bandwidth of
NVLink and PCIe, which the sheets count in both directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mmcontrast.config import ConfigError, suggest


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        name: as people say it.
        bf16: FLOP/s of matrix products in bfloat16; 0 where it has none.
        fp32: FLOP/s in float32, without TF32, as torch computes by default.
        memory: bytes.
        memory_bandwidth: bytes/s of its memory.
        link: bytes/s that it can send to others of its machine.
        context: bytes that the driver and libraries take.
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    memory_bandwidth: float
    link: float
    context: float = 1e9


_KNOWN = {
    "b200": Accelerator("B200", 2250e12, 75e12, 180e9, 7.7e12, 900e9),
    "h200": Accelerator("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9),
    "h100": Accelerator("H100 SXM", 989e12, 67e12, 80e9, 3.35e12, 450e9),
    "a100": Accelerator("A100 SXM 80 GB", 312e12, 19.5e12, 80e9, 2.04e12, 300e9),
    "l40s": Accelerator("L40S", 362e12, 91.6e12, 48e9, 864e9, 32e9),
    "l4": Accelerator("L4", 121e12, 30.3e12, 24e9, 300e9, 32e9),
    "v100": Accelerator("V100 SXM2 32 GB", 0, 15.7e12, 32e9, 900e9, 150e9),
}
NAMES = (*_KNOWN, "cpu")


def accelerator(name: str) -> Accelerator:
    """The one of that name; "cpu" is this machine, whose matrix product is timed.

    Raises:
        ConfigError: it is not known.
    """
    if name.lower() == "cpu":
        return _this_machine()
    if name.lower() not in _KNOWN:
        raise ConfigError(f"gpu {name!r} is not known{suggest(name, NAMES)}")
    return _KNOWN[name.lower()]


def _this_machine() -> Accelerator:
    import psutil
    import torch

    side = 1024
    x = torch.randn(side, side)
    seconds = min(_timed(lambda: x @ x) for _ in range(5))
    copied = min(_timed(lambda: x.clone()) for _ in range(5))
    flops = 2 * side**3 / seconds
    half = x.bfloat16()
    of_half = 2 * side**3 / min(_timed(lambda: half @ half) for _ in range(3))
    memory = float(psutil.virtual_memory().total)
    return Accelerator("this CPU", of_half, flops, memory, 2 * x.nbytes / copied, 1e9, context=3e8)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()

    work()
    return time.perf_counter() - start
