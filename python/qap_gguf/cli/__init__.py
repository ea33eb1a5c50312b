"""The command `qap-gguf`: one file for each subcommand, nothing but words and options on top of the package."""

from __future__ import annotations

from qap_gguf.cli.main import main

__all__ = ["main"]
