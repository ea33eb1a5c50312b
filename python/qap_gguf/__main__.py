"""`python -m qap_gguf`: the same command as `qap-gguf`."""

from __future__ import annotations

import sys

from qap_gguf.cli import main

if __name__ == "__main__":
    sys.exit(main())
