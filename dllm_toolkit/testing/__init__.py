"""Toy models, the catalogue of cases, and the contract that every decoder, rule and cache must pass.

Shipped with the package because a researcher's own decoder deserves the same tests: `dllm-toolkit check my_rule.LookTwice`.
"""
