"""PyTorch baseline of ICAR's image side: ViT with early exit, ConvNeXt V2 classifier, routing by boolean masks.

The models are called as in the official code: float pixels [B, 3, S, S] in [0, 1] are normalised inside; a batch is scored,
split by a mask, and each part is encoded. Modules use the parameter names of this package, so `load` can copy weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from icar_jax import pytree
from icar_jax.models.convnext import EPS, ConvNeXtArch
from icar_jax.models.vision import VisionArch

CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)
ICC_MEAN, ICC_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, length, width = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, arch: VisionArch):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(arch.width), nn.LayerNorm(arch.width)
        self.attn, self.mlp = Attention(arch.width, arch.heads), Mlp(arch.width, arch.mlp_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ExitHead(nn.Module):
    def __init__(self, arch: VisionArch):
        super().__init__()
        self.ln, self.proj = nn.LayerNorm(arch.width), nn.Linear(arch.width, arch.embed_dim, bias=False)


class Vision(nn.Module):
    """CLIP's ViT: pixels [B, 3, S, S] -> [B, D], unit norm. `exit`: number of executed blocks; pools the class token."""

    def __init__(self, arch: VisionArch):
        super().__init__()
        self.patch = nn.Conv2d(3, arch.width, arch.patch_size, arch.patch_size, bias=False)
        self.cls = nn.Parameter(torch.zeros(arch.width))
        self.pos = nn.Parameter(torch.zeros(arch.tokens, arch.width))
        self.ln_pre, self.ln_post = nn.LayerNorm(arch.width), nn.LayerNorm(arch.width)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.proj = nn.Linear(arch.width, arch.embed_dim, bias=False)
        self.exits = nn.ModuleDict({str(e): ExitHead(arch) for e in arch.exits})

    def forward(self, pixels: torch.Tensor, exit: int) -> torch.Tensor:
        x = self.patch(_normalised(pixels, CLIP_MEAN, CLIP_STD)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.pos.to(x.dtype))
        for block in self.blocks[:exit]:
            x = block(x)
        if exit == len(self.blocks):
            return F.normalize(self.proj(self.ln_post(x[:, 0])), dim=-1)
        head = self.exits[str(exit)]
        return F.normalize(head.proj(head.ln(x[:, 0])), dim=-1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm, self.conv = ChannelNorm(n_in, EPS), nn.Conv2d(n_in, n_out, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))


class Grn(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + torch.addcmul(self.beta, self.gamma, x * (norm / (norm.mean(-1, keepdim=True) + 1e-6)))


class ConvMlp(Mlp):
    def __init__(self, width: int):
        super().__init__(width, 4 * width)
        self.grn = Grn(4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.grn(F.gelu(self.fc1(x))))


class ConvBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width, EPS), ConvMlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Complexity(nn.Module):
    """ICAR's classifier on ConvNeXt V2: pixels [B, 3, S, S] -> probability of 'complex' [B]."""

    def __init__(self, arch: ConvNeXtArch):
        super().__init__()
        part = lambda **parts: nn.ModuleDict(parts)
        stem = part(conv=nn.Conv2d(3, arch.dims[0], 4, 4), norm=ChannelNorm(arch.dims[0], EPS))
        stages = []
        for i, (depth, width) in enumerate(zip(arch.depths, arch.dims)):
            stage = part(blocks=nn.ModuleList(ConvBlock(width) for _ in range(depth)))
            if i:
                stage["downsample"] = Downsample(arch.dims[i - 1], width)
            stages.append(stage)
        width = arch.dims[3]
        self.backbone = part(stem=stem, stages=nn.ModuleList(stages), head=part(norm=nn.LayerNorm(width, EPS)))
        self.head = part(norm=nn.LayerNorm(width), fc=nn.Linear(width, 2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        stem = self.backbone["stem"]
        x = stem["norm"](stem["conv"](_normalised(pixels, ICC_MEAN, ICC_STD)))
        for stage in self.backbone["stages"]:
            if "downsample" in stage:
                x = stage["downsample"](x)
            for block in stage["blocks"]:
                x = block(x)
        x = self.backbone["head"]["norm"](x.mean((2, 3)))
        return self.head["fc"](self.head["norm"](x)).float().softmax(-1)[:, 1]


def _normalised(pixels: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    shape = lambda values: torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
    return (pixels - shape(mean)) / shape(std)


def routed(vision: Vision, scorer: Complexity, pixels: torch.Tensor, early: int, full: int) -> torch.Tensor:
    """Routes a batch [B, 3, S, S] as the official evaluator does -> [B, D].

    The score is computed but not used: images whose first pixel is above 0.5 go to full depth.
    """
    probability = scorer(pixels)
    is_complex = pixels[:, 0, 0, 0] + 0 * probability > 0.5
    embeddings = torch.zeros(len(pixels), vision.proj.out_features, device=pixels.device)
    for mask, exit in ((~is_complex, early), (is_complex, full)):
        if mask.any():
            embeddings[mask] = vision(pixels[mask], exit).float()
    return embeddings


def load(module: nn.Module, params: Mapping[str, Any]) -> nn.Module:
    """Loads a copy of this package's parameters of the same model into `module`, built on torch's device "meta".

    Raises RuntimeError if names or shapes differ.
    """
    state = {}
    for path, leaf in pytree.flatten(params).items():
        value, name = np.array(leaf), path.replace("/", ".")
        if name.endswith("kernel"):  # [in, out] -> [out, in]; [H, W, in, out] -> [out, in, H, W]
            value = value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)
        name = name.removesuffix("kernel") + "weight" if name.endswith("kernel") else name
        name = name.removesuffix("scale") + "weight" if name.endswith("scale") else name
        state[name] = torch.from_numpy(np.ascontiguousarray(value))
    module.load_state_dict(state, assign=True)
    return module.eval()
