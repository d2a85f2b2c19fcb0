"""Retrieval metrics, their intervals, and the ways they are shown: terminal, figure, metrics.json."""
