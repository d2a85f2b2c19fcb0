"""PyTorch baseline of the dual-path training step, for comparison with the JAX step on the same machine.

ViT-B/32 from open_clip, as in the reference PyTorch recipe: the image is encoded twice, once through the full tower and once
up to the exit block, the text once; symmetric InfoNCE on both paths, gradient clipping, AdamW.

    python benchmarks/torch_step.py --batch 16 --steps 5 --dtype bf16
"""

from __future__ import annotations

import argparse
import json
import time

from icar_jax.convert.parity.reference import declare_torchvision_operators

BLOCKS_RUN = 6  # blocks of the exit path, of 12
WIDTH, EMBED_DIM = 768, 512
CONTEXT, VOCAB = 77, 49408


def import_open_clip():
    """Returns `(torch, open_clip)`.

    Raises:
      ImportError: torch or open_clip_torch is missing; the message names the packages to install.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("the PyTorch benchmark needs torch: pip install torch open_clip_torch") from error
    declare_torchvision_operators(torch)
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"the PyTorch benchmark needs open_clip and torchvision ({error}): pip install open_clip_torch"
        ) from error
    return torch, open_clip


def build(torch, open_clip):
    """Returns `(model, exit_head, temperature)` with random weights, on the CPU in float32."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained=None)
    head = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, EMBED_DIM, bias=False))
    temperature = torch.nn.Parameter(torch.tensor(2.6592))
    return model.train(), head.train(), temperature


def symmetric_loss(torch, images, texts, log_scale):
    """Returns symmetric InfoNCE of unit vectors [B, D] and [B, D], with logit scale exp(log_scale) capped at 100."""
    logits = log_scale.exp().clamp(max=100.0) * images @ texts.T
    target = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def make_step(batch: int = 16, dtype: str = "bf16"):
    """Returns a function without arguments that runs one training step on fixed synthetic pairs and returns its loss.

    dtype: "f32" or "bf16" (autocast over float32 weights).

    Raises:
      ImportError: torch or open_clip_torch is missing.
      ValueError: unknown dtype, or batch below one.
    """
    if dtype not in ("f32", "bf16"):
        raise ValueError(f"dtype must be 'f32' or 'bf16', got {dtype!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    torch, open_clip = import_open_clip()
    model, head, temperature = build(torch, open_clip)
    normalize = torch.nn.functional.normalize
    params = [*model.parameters(), *head.parameters(), temperature]
    optimizer = torch.optim.AdamW(params, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    tokens = torch.zeros(batch, CONTEXT, dtype=torch.long)
    tokens[:, :20] = torch.randint(1, VOCAB - 2, (batch, 20), generator=generator)
    tokens[:, 20] = VOCAB - 1  # end of text: the highest id marks the pooled position

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            full = model.encode_image(images, normalize=True)
            taps = model.visual.forward_intermediates(
                images,
                indices=[BLOCKS_RUN - 1],
                stop_early=True,
                intermediates_only=True,
                output_fmt="NLC",
                output_extra_tokens=True,
            )
            early = normalize(head(taps["image_intermediates_prefix"][-1][:, 0]), dim=-1)
            texts = model.encode_text(tokens, normalize=True)
            loss = 0.5 * symmetric_loss(torch, full.float(), texts.float(), model.logit_scale)
            loss = loss + 0.5 * symmetric_loss(torch, early.float(), texts.float(), temperature)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def time_step(batch: int = 16, steps: int = 5, dtype: str = "bf16") -> dict:
    """Times the step after one warm-up step.

    Returns a dict: `pairs_per_s` from the fastest of `steps` steps, `step_s` (every step, seconds), `loss` of the last step,
    `threads`, and package versions.

    Raises:
      ImportError: torch or open_clip_torch is missing.
      ValueError: unknown dtype, or batch or steps below one.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    step = make_step(batch, dtype)
    torch, open_clip = import_open_clip()
    step()
    times, loss = [], float("nan")
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    return {
        "framework": "torch",
        "dtype": dtype,
        "batch": batch,
        "pairs_per_s": batch / min(times),
        "step_s": times,
        "loss": loss,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="bf16")
    args = parser.parse_args()
    print(json.dumps(time_step(args.batch, args.steps, args.dtype)))


if __name__ == "__main__":
    main()
