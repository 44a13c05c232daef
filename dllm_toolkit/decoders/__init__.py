"""Decoding methods, one file each; the rules that several share are in `rules/`."""
