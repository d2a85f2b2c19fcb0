"""Encodes images and a text, and ranks the images by similarity.

    python examples/encode.py MODEL "a red circle" IMAGE IMAGE ...

MODEL is a checkpoint, bundle or workdir of this package, or weights from Hugging Face, OpenCLIP or OpenAI.
"""

import sys

import icar_jax


def main(path: str, text: str, *pictures: str) -> list[tuple[str, float]]:
    model = icar_jax.load(path)
    images = model.encode_image(pictures)  # [N, D], unit norm
    scores = images @ model.encode_text([text])[0]
    ranking = sorted(zip(pictures, scores.tolist()), key=lambda pair: -pair[1])
    for name, score in ranking:
        print(f"{score:.3f}  {name}")
    return ranking


if __name__ == "__main__":
    main(*sys.argv[1:])
