"""Training methods, one paper a file: noise, layout and terms of an objective (training/composed.py)."""
