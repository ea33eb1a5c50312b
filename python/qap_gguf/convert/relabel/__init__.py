"""A language model with one position for each token, in a file that lets its image tokens keep their places.

``rules`` says which models can be relabelled and how, ``rows`` puts rows of q and k in order, ``api`` copies the file,
``cache`` keeps copies that were made in passing. Why: docs/method.md. What the encoder makes of it:
native/src/positions.cpp.
"""

from __future__ import annotations

from qap_gguf.convert.relabel.api import STOCK, relabel

__all__ = ["STOCK", "relabel"]
