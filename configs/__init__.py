"""Experiments that come with the package: `--config=demo:clip` names get_config("clip") of demo.py."""
