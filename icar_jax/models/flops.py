"""FLOPs per image or caption, counted from the architecture (2 x multiply-accumulates).

Matrix products and convolutions are counted, as is usual; norms, activations and softmax are not.
"""

from __future__ import annotations

from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.exit_heads import adapter_width
from icar_jax.models.projection import projection_macs
from icar_jax.models.text import TextArch
from icar_jax.models.token_router import BlocksArch
from icar_jax.models.vision import VisionArch


def _block_macs(tokens: int, width: int, mlp_width: int, ffn: str = "mlp", left: int | None = None) -> int:
    """Multiply-accumulates of a block; `left` is the number of tokens in the feed-forward part, None: `tokens`."""
    left = tokens if left is None else left
    projections = 4 * tokens * width * width  # q, k, v, out
    mixing = 2 * tokens * tokens * width  # q k^T and p v
    return projections + mixing + (_first_columns(ffn) + 1) * left * width * mlp_width


def _reduction_macs(method: str, tokens: int, removed: int, width: int, heads: int) -> int:
    """Multiply-accumulates of one reduction: similarities or scores, and the weighted sum of sources."""
    if not removed or method == "none":
        return 0
    if method == "drop":
        return tokens * width
    half = tokens // 2
    similar = {
        "crossget": tokens * tokens * width + tokens * width,
        "tome": (tokens - half) * half * (width // heads),
        "pitome": tokens * tokens * (width // heads),
    }[method]
    return similar + (tokens - removed) * removed * width


def _first_columns(ffn: str) -> int:
    """Columns of the first matrix of a feed-forward part, as a multiple of its hidden channels."""
    return 2 if ffn == "swiglu" else 1


def _merging_macs(arch: VisionArch, blocks_run: int) -> int:
    """Multiply-accumulates of the pairwise similarities and of the weighted sums of one merging step."""
    patches = arch.tokens_after(blocks_run) - arch.prefix
    seekers, others = patches - patches // 2, patches // 2
    return seekers * (others + patches - arch.merge[blocks_run - 1]) * arch.width


def vision_flops(arch: VisionArch, blocks_run: int | None = None) -> int:
    """Returns the FLOPs of one image through patch embedding, `blocks_run` blocks (None: all) and the head or heads there.

    Raises ModelError if there is no exit after `blocks_run` blocks.
    """
    own, blocks = arch.at_route(arch.check_exit(blocks_run))
    return trunk_flops(own, blocks) + sum(head_flops(own, e) for e in own.heads_of(blocks))


def head_flops(arch: VisionArch, blocks_run: int | None = None) -> int:
    """Returns the FLOPs of one image in the head after `blocks_run` blocks (None: full depth). Raises ModelError."""
    arch, blocks = arch.at_route(arch.check_exit(blocks_run))
    early, tokens = blocks != arch.depth, arch.tokens_after(blocks) - arch.has_cross
    probe = 2 * (tokens + 1) * arch.width**2 + 2 * tokens * arch.width  # k and v of all tokens, q and output of one, mixing
    if arch.head == "map":
        return 2 * (probe + 2 * arch.width * arch.mlp_width)
    added = {"linear": 0, "adapter": 2 * arch.width * adapter_width(arch.width), "attention": probe}[arch.exit_head]
    projection = projection_macs(arch.projection, arch.projection_width, arch.pooled_width, arch.embed_dim)
    return 2 * (projection + (added if early else 0))


def trunk_flops(arch: VisionArch, blocks: int) -> int:
    """Returns the FLOPs of one image through the patch embedding and the first `blocks` blocks, without a head."""
    patches = arch.tokens - arch.prefix
    macs = patches * 3 * arch.patch_size**2 * arch.width
    macs += sum(_image_block_macs(arch, n) for n in range(1, blocks + 1))
    macs += sum(_merging_macs(arch, n) for n, count in enumerate(arch.merge, 1) if count and n < blocks)
    return 2 * macs


def _image_block_macs(arch: VisionArch, block: int) -> int:
    """Multiply-accumulates of a block, counted from 1, with its reduction."""
    removed = sum(arch.schedule[block - 1 : block])
    left = arch.tokens_after(block)
    tokens = left + removed if arch.merges_within else left
    own = _block_macs(tokens, arch.width, arch.mlp_width, arch.ffn, left)
    return own + _reduction_macs(arch.reduce, tokens, removed, arch.width, arch.heads)


def image_flops(arch: VisionArch) -> int:
    """Returns the forward FLOPs of one image, with the heads of all exits; with several schedules, their mean."""
    each = [arch.with_schedule(number) for number in range(len(arch.schedules) + 1)]
    return sum(trunk_flops(a, a.depth) + sum(head_flops(a, blocks) for blocks in a.depths) for a in each) // len(each)


def text_flops(arch: TextArch) -> int:
    """Returns the FLOPs of one caption, padded to the context length."""
    macs = 0
    for block in range(1, arch.depth + 1):
        tokens, left = arch.tokens_after(block - 1), arch.tokens_after(block)
        macs += _block_macs(tokens, arch.width, arch.mlp_width, left=left)
        macs += _reduction_macs(arch.reduce, tokens, tokens - left, arch.width, arch.heads)
    macs += arch.pooler * arch.width**2
    return 2 * (macs + projection_macs(arch.projection, arch.projection_width, arch.width * arch.head_blocks, arch.embed_dim))


def recomputed_flops(tower: VisionArch | TextArch, remat: str) -> int:
    """Returns the FLOPs per image or caption that the backward pass recomputes in the blocks of its tower."""
    if remat == "none":
        return 0
    macs = 0
    for block in range(1, tower.depth + 1):
        left = tower.tokens_after(block)
        within = isinstance(tower, TextArch) or tower.merges_within
        removed = sum(tower.schedule[block - 1 : block])
        tokens = left + removed if within else left
        columns = _first_columns(tower.ffn) if isinstance(tower, VisionArch) else 1
        macs += 2 * tokens * tokens * tower.width  # q k^T and p v
        macs += _reduction_macs(tower.reduce, tokens, removed, tower.width, tower.heads)
        if remat == "full":
            # q, k, v, out, and the first layer of the feed-forward part
            macs += 4 * tokens * tower.width**2 + columns * left * tower.width * tower.mlp_width
    return 2 * macs


def convnext_flops(arch: ConvNeXtArch, image_size: int) -> int:
    """Returns the FLOPs of one square image of `image_size` pixels."""
    side = image_size // 4
    macs = side * side * 4 * 4 * 3 * arch.dims[0]
    for i, (depth, width) in enumerate(zip(arch.depths, arch.dims)):
        if i:
            side //= 2
            macs += side * side * 2 * 2 * arch.dims[i - 1] * width
        macs += depth * side * side * (7 * 7 * width + 2 * 4 * width * width)
    return 2 * (macs + arch.dims[3] * arch.num_classes)


def complexity_flops(arch: ComplexityArch | BlocksArch) -> int:
    """Returns the FLOPs of one score computed alone: backbone or tower blocks, and head."""
    if isinstance(arch, BlocksArch):
        return trunk_flops(arch.vision, arch.blocks) + router_flops(arch)
    return convnext_flops(arch.backbone, arch.image_size) + _head_flops(arch)


def router_flops(arch: ComplexityArch | BlocksArch) -> int:
    """Returns the additional FLOPs of one score when routing: a head on the CLIP's blocks shares them and costs only itself."""
    return _head_flops(arch) if isinstance(arch, BlocksArch) else complexity_flops(arch)


def _head_flops(arch: ComplexityArch | BlocksArch) -> int:
    width = arch.features
    if arch.readout == "linear":
        return 2 * width
    return 2 * (width * 2 if arch.head == "classification" else width * 512 + 512 * 256 + 256)
