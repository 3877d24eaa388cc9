"""`python -m sglang_multipole` is the command `sglang-multipole`."""

from __future__ import annotations

import sys

from sglang_multipole.cli import main

if __name__ == "__main__":
    sys.exit(main())
