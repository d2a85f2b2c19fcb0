"""Memory of the contrastive loss and its gradient: all logits at once compared with a ring of text chunks, on 8 fake devices.

    python benchmarks/loss_memory.py [--quick] [--json docs/results/loss_memory.json]

Compiles value and gradient of the summed loss of 2 exits (float32 embeddings of width 768, mesh data 2 x fsdp 4) and prints
the temporary memory per device from XLA's memory analysis of the compiled program. Nothing is executed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from icar_jax.config import MeshConfig
from icar_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh, replicated
from icar_jax.training.losses import contrastive, ring

EXITS, WIDTH, MESH = (12, 24), 768, (2, 4, 1)
BATCHES, CHUNKS, KINDS = (4096, 8192, 32768), (128, 512, 1024, 4096), ("softmax", "sigmoid")


def mesh() -> Mesh:
    return make_mesh(MeshConfig(*MESH), jax.devices()[:8])


def compile_loss(mesh: Mesh, batch: int, kind: str, chunk: int) -> jax.stages.Compiled:
    """Compiles value and gradient for images, text, scales and biases, sharded like the arguments; chunk 0: plain form."""

    def loss(images, text, scales, biases):
        names = {"kind": kind, "direction": "symmetric"}
        if chunk:
            values = ring.per_exit(images, text, scales, biases, **names, mesh=mesh, chunk=chunk)
        else:
            values = contrastive.per_exit(images, text, scales, biases, **names)
        return sum(values.values())

    rows = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=batch_sharding(mesh))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    each = lambda leaf: dict.fromkeys(EXITS, leaf)
    arguments = (each(rows), rows, each(number), each(number))
    places = (replicated(mesh), jax.tree.map(lambda leaf: leaf.sharding, arguments))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), out_shardings=places).lower(*arguments).compile()


def measure_memory(batches=BATCHES, chunks=CHUNKS, kinds=KINDS) -> list[dict]:
    """Returns one row per batch, kind and chunk (0: plain; chunks larger than a device's shard are skipped).

    `temp_bytes`: temporary memory per device. `unit_bytes` = 4 E B/devices (chunk + D); the ring needs a small multiple of it.
    """
    devices, rows = mesh(), []
    for batch in batches:
        local = batch // batch_shards(devices)
        for kind in kinds:
            for chunk in (0, *(c for c in chunks if c <= local)):
                temporary = compile_loss(devices, batch, kind, chunk).memory_analysis().temp_size_in_bytes
                row = {"batch": batch, "kind": kind, "chunk": chunk, "temp_bytes": temporary}
                row["unit_bytes"] = 4 * len(EXITS) * local * (chunk + WIDTH) if chunk else None
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small batch")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = measure_memory((4096,), (512,)) if args.quick else measure_memory()
    print(f"8 fake CPU devices, mesh data 2 x fsdp 4, {len(EXITS)} exits, width {WIDTH}, jax {jax.__version__}")
    print(f"{'batch':>6} {'loss':>8} {'form':>11} {'temp MiB/device':>16} {'of plain':>9} {'of 4 E b (chunk + D)':>21}")
    for row in rows:
        plain = next(r for r in rows if (r["batch"], r["kind"], r["chunk"]) == (row["batch"], row["kind"], 0))
        form = f"ring {row['chunk']}" if row["chunk"] else "plain"
        law = f"{row['temp_bytes'] / row['unit_bytes']:.2f}" if row["chunk"] else ""
        print(
            f"{row['batch']:6d} {row['kind']:>8} {form:>11} {row['temp_bytes'] / 2**20:16.1f} "
            f"{row['temp_bytes'] / plain['temp_bytes']:9.3f} {law:>21}"
        )
    if args.json:
        record = {"benchmark": "loss_memory", "mesh": dict(zip(("data", "fsdp", "tensor"), MESH)), "exits": len(EXITS)}
        record |= {"width": WIDTH, "platform": "cpu", "jax": jax.__version__, "rows": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
