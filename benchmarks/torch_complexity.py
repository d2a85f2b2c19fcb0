"""timm baseline for the complexity models on the same machine: one ConvNeXt forward pass, float32 or bf16 autocast."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from icar_jax.convert.parity.reference import declare_torchvision_operators

MODES = ("f32", "f32 channels_last", "bf16", "bf16 channels_last")


def import_timm():
    """Returns `(torch, timm)`. Raises ImportError naming the packages to install."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("the PyTorch rows need torch: pip install torch timm") from error
    declare_torchvision_operators(torch)
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the PyTorch rows need timm and torchvision ({error}): pip install timm") from error
    return torch, timm


def make_forward(name: str, images: np.ndarray, mode: str) -> Callable[[], None]:
    """Returns a function that runs timm's model `name` (random weights, no classifier) on images float32 [B, S, S, 3].

    mode: one of MODES. It runs on an accelerator if available and returns once the result is ready. Raises ValueError for
    unknown modes.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} must be one of {MODES}")
    torch, timm = import_timm()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last if mode.endswith("channels_last") else torch.contiguous_format
    model = timm.create_model(name, pretrained=False, num_classes=0).eval().to(device, memory_format=layout)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16, enabled=mode.startswith("bf16")):
            model(pixels)
        if device == "cuda":
            torch.cuda.synchronize()

    return forward
