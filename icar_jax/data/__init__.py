"""Image-text data: sources, tokenizer, image decoding and the batch pipeline.

Nothing here imports jax: worker processes run this package and must not start a backend.
"""
