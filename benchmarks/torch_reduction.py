"""PyTorch baselines with token reduction: ToMe and CrossGET's image tower, with sorting and scattering as published."""

from __future__ import annotations

import torch
import torch_towers
from torch.nn import functional as F

from icar_jax.models.vision import VisionArch


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, N, W], index [B, M] -> [B, M, W]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Reduced(torch_towers.Vision):
    """A ViT whose blocks merge tokens between attention and MLP; `arch.schedule` says how many."""

    def __init__(self, arch: VisionArch):
        super().__init__(arch)
        self.arch = arch
        if arch.has_cross:
            self.cross = torch.nn.Parameter(torch.zeros(arch.depth, arch.width))

    def forward(self, pixels: torch.Tensor, exit: int) -> torch.Tensor:
        pixels = torch_towers._normalised(pixels, torch_towers.CLIP_MEAN, torch_towers.CLIP_STD)
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.pos.to(x.dtype)
        x = self.ln_pre(torch.cat([x, x[:, :1]], 1) if self.arch.has_cross else x)
        sizes = torch.ones_like(x[..., 0], dtype=torch.float32)
        for i, block in enumerate(self.blocks):
            if self.arch.has_cross:
                x = torch.cat([x[:, :-1], x[:, -1:] + self.cross[i].to(x.dtype)], 1)
            b, n, width = x.shape
            q, k, v = block.attn.qkv(block.ln1(x)).chunk(3, -1)
            heads = [t.view(b, n, block.attn.heads, -1).transpose(1, 2) for t in (q, k, v)]
            bias = sizes.log()[:, None, None].to(x.dtype).expand(-1, -1, n, -1) if n < self.arch.tokens else None
            y = F.scaled_dot_product_attention(*heads, attn_mask=bias)
            x = x + block.attn.out(y.transpose(1, 2).reshape(b, n, width))
            count = self.arch.schedule[i] if i < len(self.arch.schedule) else 0
            if count:
                x, sizes = crossget(x, sizes, q[:, -1], k, count) if self.arch.has_cross else tome(x, sizes, heads[1], count)
            x = x + block.mlp(block.ln2(x))
        return F.normalize(self.proj(self.ln_post(x[:, 0])), dim=-1)


def tome(x: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, N, W], sizes [B, N], keys [B, H, N, K] -> the same with N - count tokens."""
    metric = F.normalize(keys.mean(1), dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, target = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, kept = order[:, :count], order[:, count:].sort(-1)[0]
    weighted = x * sizes[..., None].to(x.dtype)
    parts = []
    for values in (weighted, sizes[..., None]):
        first, second = values[:, ::2], values[:, 1::2]
        index = target.gather(1, gone)[..., None].expand(-1, -1, values.shape[-1])
        parts.append(torch.cat([take(first, kept), second.scatter_add(1, index, take(first, gone))], 1))
    return (parts[0] / parts[1]).to(x.dtype), parts[1][..., 0]


def crossget(
    x: torch.Tensor, sizes: torch.Tensor, guide: torch.Tensor, keys: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and keys [B, N, W], sizes [B, N], guide [B, W] -> the same with N - count tokens."""
    b, n, width = x.shape
    unit = F.normalize(keys.float(), dim=-1)
    importance = (unit @ F.normalize(guide.float(), dim=-1)[..., None])[..., 0]
    similar = unit @ unit.transpose(1, 2)
    similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    similar[:, [0, -1]] = -torch.inf
    similar[:, :, [0, -1]] = -torch.inf
    order = similar.max(-1)[0].argsort(dim=-1, descending=True, stable=True)
    ranked = take(similar, order).gather(2, order[:, None].expand(-1, n, -1))
    closest = ranked.masked_fill(~torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).max(-1)[0]
    priority = importance - torch.empty_like(closest).scatter(1, order, closest)
    gone = priority.argsort(dim=-1, stable=True)[:, :count].sort(-1)[0]
    is_gone = torch.zeros(b, n, dtype=torch.bool).scatter(1, gone, True)
    kept = is_gone.int().argsort(dim=-1, stable=True)[:, : n - count]
    target = take(similar.masked_fill(is_gone[:, None], -torch.inf), gone).argmax(-1)
    take_weight, give_weight = 2 * torch.stack([importance.gather(1, gone), importance.gather(1, target)]).softmax(0)
    weighted = x.float() * sizes[..., None]
    own = torch.ones_like(sizes).scatter_add(1, target, give_weight - 1)
    spread = target[..., None].expand(-1, -1, width)
    total = (weighted * own[..., None]).scatter_add(1, spread, take_weight[..., None] * take(weighted, gone))
    sizes = sizes.scatter_add(1, target, sizes.gather(1, gone))
    return (take(total, kept) / sizes.gather(1, kept)[..., None]).to(x.dtype), sizes.gather(1, kept)
