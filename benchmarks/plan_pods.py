"""Plans large pretraining runs on TPU slices with the TPU compiler, without a TPU.

    pip install libtpu
    python benchmarks/plan_pods.py [--only l14_fsdp] [--json docs/results/plan.json]

Each plan compiles the training step of ViT-L/14 or ViT-H/14 with one early exit for a full slice and prints its report: memory
per chip, collectives, roofline. Other plans in the JSON file are kept. A plan takes minutes of CPU time and prints how many.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import jax

from icar_jax.config import ClipConfig, ExperimentConfig, LossConfig, MeshConfig, TrainConfig
from icar_jax.planner.chips import target
from icar_jax.planner.plan import plan
from icar_jax.planner.report import format_plan

PAIRS_PER_CHIP = 128
CHUNK = 1024  # texts per chunk of the loss
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "plan.json"


@dataclasses.dataclass(frozen=True)
class Pod:
    """One plan: the model, the slice, the mesh, and whether the blocks are scanned."""

    variant: str
    exit: int
    topology: str
    chips: int
    mesh: tuple[int, int, int]
    scan: bool = True
    limit_gib: float | None = None  # upper limit in addition to the chip's memory

    def config(self) -> ExperimentConfig:
        return ExperimentConfig(
            clip=ClipConfig(variant=self.variant, exits=(self.exit,)),
            loss=LossConfig(chunk=CHUNK),
            train=TrainConfig(batch_size=PAIRS_PER_CHIP * self.chips, remat="full", scan_blocks=self.scan),
            mesh=MeshConfig(*self.mesh),
        )


PODS = {
    "l14_scan": Pod("vit_l14", 12, "v5e:16x16", 256, (-1, 1, 1)),
    "l14_fsdp": Pod("vit_l14", 12, "v5e:16x16", 256, (16, 16, 1), limit_gib=8.0),
    "l14_unrolled": Pod("vit_l14", 12, "v5e:16x16", 256, (-1, 1, 1), scan=False),
    "h14_fsdp": Pod("vit_h14", 16, "v5e:16x16", 256, (16, 16, 1)),
    "h14_v5p": Pod("vit_h14", 16, "v5p:4x4x4", 64, (-1, 1, 1)),
}


def plan_pod(name: str) -> tuple[dict, bool]:
    """Prints the report of one pod; returns its figures, and whether it is within its limits."""
    pod = PODS[name]
    chip, devices, compiler = target(pod.topology, 0)
    made = plan(pod.config(), devices, chip, compiler)
    print(f"== {name}: {pod.topology}\n{format_plan(made, pod.config(), pod.topology)}\n", flush=True)
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    within = made.fits and (pod.limit_gib is None or made.memory.total < pod.limit_gib * 2**30)
    figures = {"variant": pod.variant, "exit": pod.exit, "topology": pod.topology, "chunk": CHUNK, "limit_gib": pod.limit_gib}
    return figures | made.to_dict() | versions, within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PODS, default=list(PODS), help="only these plans")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file to write the figures to")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    failed = []
    for name in args.only:
        results[name], within = plan_pod(name)
        failed += [] if within else [name]
        args.json.write_text(json.dumps(results, indent=1) + "\n")  # after every plan, since plans take long
    if failed:
        print(f"over the memory limit: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
