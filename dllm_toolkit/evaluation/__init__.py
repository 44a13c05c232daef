"""Tasks, the comparison, the ledger that counts, and what is made of it for people."""
