"""Where tensors are computed: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

from pipeline.ground.errors import Refused


def check_device(device: str) -> None:
    """Refused for a device that does not exist or is not here; imports torch only if one is named."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise Refused(f"device: {device!r} is none of auto, cpu, cuda, cuda:1, mps, xpu")
    if device not in ("auto", "cpu"):
        import torch

        kind, _, number = device.partition(":")
        found = getattr(torch, kind).device_count() if hasattr(torch, kind) else 0
        if int(number or 0) >= found:
            raise Refused(f"device: {device} is not there ({found} {kind} devices found); use cpu or auto")


def resolve_device(device: str) -> str:
    """The device that `auto` means: the first accelerator, else cpu."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "cpu"  # half of the dtypes here are unknown to mps; it must be asked for
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"


def hardware(device: str) -> str:
    """What of the hardware may decide a bit: the kind of processor, not which of several."""
    import torch

    kind = device.partition(":")[0]
    if kind == "cpu":
        has = "with" if multiplies_bfloat16(device) else "without"
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {has} bfloat16"
    found = getattr(torch, kind)
    return f"{kind} {found.get_device_name(device) if hasattr(found, 'get_device_name') else ''}"


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a CPU has instructions for products of bfloat16; a GPU needs no such help."""
    import torch

    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def memory_free(device: str) -> int:
    """Bytes that this process can still take on the device; on the CPU, by machine and control group."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
