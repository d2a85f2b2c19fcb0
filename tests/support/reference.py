"""Plain float64 numpy versions of the layers, written for clarity: what the models are compared with."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def f64(tree):
    return {k: f64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def layer_norm(x, p, eps):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def attention(x, p, heads, causal):
    """x [L, W] of one sequence; loops over heads and queries."""
    length, width = x.shape
    size = width // heads
    qkv = linear(x, p["qkv"])
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    out = np.zeros_like(x)
    for h in range(heads):
        cols = slice(h * size, (h + 1) * size)
        for i in range(length):
            seen = i + 1 if causal else length
            logits = np.array([q[i, cols] @ k[j, cols] for j in range(seen)]) / np.sqrt(size)
            weights = np.exp(logits - logits.max())
            out[i, cols] = (weights / weights.sum()) @ v[:seen, cols]
    return linear(out, p["out"])


def block(x, p, heads, causal, activation=gelu, eps=1e-5):
    x = x + attention(layer_norm(x, p["ln1"], eps), p["attn"], heads, causal)
    hidden = activation(linear(layer_norm(x, p["ln2"], eps), p["mlp"]["fc1"]))
    return x + linear(hidden, p["mlp"]["fc2"])


def unit(x):
    return x / np.linalg.norm(x)


def vision(image, p, arch, exit, activation=gelu):
    """image [S, S, 3] -> unit embedding at `exit`."""
    size, width = arch.patch_size, arch.width
    kernel = p["patch"]["kernel"].reshape(-1, width)
    side = arch.image_size // size
    patches = [
        image[r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(-1) @ kernel
        for r in range(side)
        for c in range(side)
    ]
    x = layer_norm(np.stack([p["cls"], *patches]) + p["pos"], p["ln_pre"], 1e-5)
    for i in range(exit):
        x = block(x, p["blocks"][str(i)], arch.heads, False, activation)
    if exit == arch.depth:
        return unit(linear(layer_norm(x[0], p["ln_post"], 1e-5), p["proj"]))
    pooled = {"cls": x[0], "first_patch": x[1], "mean": x[1:].mean(0)}[arch.pool]
    head = p["exits"][str(exit)]
    return unit(linear(layer_norm(pooled, head["ln"], 1e-5), head["proj"]))


def text(tokens, p, arch, activation=gelu):
    x = p["embed"][tokens] + p["pos"][: len(tokens)]
    for i in range(arch.depth):
        x = block(x, p["blocks"][str(i)], arch.heads, True, activation)
    end = list(tokens).index(arch.end_id)
    return unit(linear(layer_norm(x[end], p["ln_final"], 1e-5), p["proj"]))


def depthwise(x, p):
    """x [H, W, C], 7x7 kernel, zero padding."""
    h, w, _ = x.shape
    padded = np.pad(x, ((3, 3), (3, 3), (0, 0)))
    out = np.zeros_like(x)
    for r in range(h):
        for c in range(w):
            out[r, c] = (padded[r : r + 7, c : c + 7] * p["kernel"][:, :, 0]).sum((0, 1))
    return out + p["bias"]


def convnext_block(x, p):
    y = layer_norm(depthwise(x, p["conv_dw"]), p["norm"], 1e-6)
    y = gelu(linear(y, p["mlp"]["fc1"]))
    if "grn" in p["mlp"]:
        g = np.sqrt((y**2).sum((0, 1)))
        y = y + p["mlp"]["grn"]["beta"] + p["mlp"]["grn"]["gamma"] * (y * (g / (g.mean() + 1e-6)))
    y = linear(y, p["mlp"]["fc2"])
    return x + (y * p["gamma"] if "gamma" in p else y)


def patch_conv(x, p):
    size, _, channels, width = p["kernel"].shape
    h, w = x.shape[0] // size, x.shape[1] // size
    out = np.zeros((h, w, width))
    for r in range(h):
        for c in range(w):
            window = x[r * size : (r + 1) * size, c * size : (c + 1) * size]
            out[r, c] = np.einsum("ijk,ijkl->l", window, p["kernel"])
    return out + p.get("bias", 0.0)


def convnext(image, p):
    """image [H, W, 3] -> pooled, normalised features [C]."""
    x = layer_norm(patch_conv(image, p["stem"]["conv"]), p["stem"]["norm"], 1e-6)
    for i in range(4):
        stage = p["stages"][str(i)]
        if "downsample" in stage:
            x = patch_conv(layer_norm(x, stage["downsample"]["norm"], 1e-6), stage["downsample"]["conv"])
        for j in range(len(stage["blocks"])):
            x = convnext_block(x, stage["blocks"][str(j)])
    return layer_norm(x.mean((0, 1)), p["head"]["norm"], 1e-6)
