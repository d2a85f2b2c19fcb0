"""Image-text data: sources, tokenizer, image decoding and the batch pipeline.

This package never imports jax: worker processes run it and must not start a backend.
"""
