"""Where things are computed: on a CUDA GPU, unless another device was asked for."""

import torch

from captioning.console import one_line


def default_device() -> str:
    """A CUDA GPU where torch finds one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: it is not; says what is allowed.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        gpu = torch.accelerator.current_accelerator(check_available=True)
        allowed = "cpu (torch finds no GPU here)" if gpu is None else f"cpu or {gpu.type}"
        raise ValueError(f"device {device}: allowed is {allowed}: {one_line(error)[:100]}") from error
    return found
