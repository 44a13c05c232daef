"""`python -m dllm_toolkit` is the `dllm-toolkit` command."""

from __future__ import annotations

import sys

from dllm_toolkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
