"""Converts weights of PyTorch CLIP, SigLIP, ConvNeXt and ICAR models to checkpoints of this library, and back."""
