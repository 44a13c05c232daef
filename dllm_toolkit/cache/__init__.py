"""K/V reuse: policies say what to compute and what may be seen, one buffer holds the keys and values."""
