"""Runs `icar train` from a checkout: python train.py --config=configs/demo.py:clip --workdir=workdir/demo"""

from icar_jax.cli.program import run

if __name__ == "__main__":
    run("train")
