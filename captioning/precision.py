"""The numbers that matrix products are made of: bf16 where the processor has instructions for it, else fp32."""

import torch

from captioning.config import NumberFormat, Precision

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""What x86 and ARM call theirs, see `torch.cpu.get_capabilities`."""


def has_bf16(device: str) -> bool:
    """Whether a kind of device (cpu, cuda ...) has instructions for bf16; others are many times slower with it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        known = torch.cpu.get_capabilities()
        return torch.backends.mkldnn.is_available() and any(known.get(name, False) for name in _INSTRUCTIONS)
    return False


def number_format(precision: Precision, device: str) -> NumberFormat:
    """What a precision comes to on a kind of device: `auto` is bf16 where the device has it."""
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def slow_choice(precision: Precision, device: str) -> str | None:
    """A line for who asked for what this device is slow at; None if there is nothing to say."""
    if precision == "bf16" and device == "cpu" and not has_bf16(device):
        return "precision=bf16: this processor has no instructions for it; auto takes fp32, which is many times faster"
    return None
