"""Weights of PyTorch CLIP, ConvNeXt and ICAR models: in, checked, and back out."""
