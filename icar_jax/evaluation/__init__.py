"""Retrieval and complexity evaluation: metrics with bootstrap intervals, routing calibration, and reports."""
