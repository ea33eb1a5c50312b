#!/usr/bin/env python3
"""The guards of grammars and schemas under Atheris; tools/fuzz/coverage_guided.py starts it.

    python tools/fuzz/guards.py grammar -max_total_time=60 FOLDER

A guard answers with nothing or with one line of ours, soon. Any other error is a find, and so is time: libFuzzer's
-timeout ends what takes longer.
"""

from __future__ import annotations

import json
import sys

import atheris

with atheris.instrument_imports(include=["qap_gguf.chat"]):
    from qap_gguf.chat.gbnf import check_ways
    from qap_gguf.chat.schemas import check_schema

from qap_gguf.errors import QapError


def judge(guard: str, data: bytes) -> None:
    """Give it to the guard; raises for what is no answer of ours."""
    try:
        text = data.decode()
        value = json.loads(text) if guard == "schema" else text
    except (ValueError, RecursionError):
        return  # no JSON: refused before
    try:
        check_schema(value) if guard == "schema" else check_ways(value)
    except QapError as err:
        if "\n" in str(err):
            raise AssertionError(f"expected one line, got {str(err)!r}") from err


def main() -> None:
    """Run until the time given to libFuzzer is over."""
    guard = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda data: judge(guard, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
