"""Configurations installed with the package: `--config=demo:clip` is get_config("clip") of demo.py."""
