"""python -m icar_jax.cli"""

from icar_jax.cli import main

main()
