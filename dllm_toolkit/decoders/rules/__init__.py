"""Rules that several methods share: where to decode, what to propose, what to commit, what to revise, when to stop."""
