"""Routes images by complexity: simple images leave the tower early.

python examples/route.py BUNDLE [--budget 0.8] IMAGE IMAGE ...
"""

import argparse

import icar_jax


def main(args: argparse.Namespace):
    model = icar_jax.load(args.bundle)
    routed = model.route(args.pictures, budget=args.budget)
    for name, score, exit in zip(args.pictures, routed.scores, routed.exits):
        print(f"complexity {score:.2f}, {exit} of {model.exits[-1]} blocks: {name}")
    return routed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--budget", type=float, help="mean cost as a fraction of full depth; default: the bundle's thresholds")
    main(parser.parse_args())
