"""Measure how many answers a model gets right, dense and pruned in several ways, with honest intervals.

One way: ``runner`` asks -> ``methods`` (what is compared) and ``data`` (questions, what counts as right); ``stats``
summarises the outcomes and ``report`` writes tables. Nothing here imports native code: the model is passed in.
"""

from __future__ import annotations

from qap_gguf.eval.data import Question, is_right, load_questions, normalise
from qap_gguf.eval.methods import METHODS, Budget, Variant, variants
from qap_gguf.eval.report import Evaluation, markdown
from qap_gguf.eval.runner import Outcome, evaluate
from qap_gguf.eval.stats import Accuracy, Summary, summarise

__all__ = [
    "METHODS",
    "Accuracy",
    "Budget",
    "Evaluation",
    "Outcome",
    "Question",
    "Summary",
    "Variant",
    "evaluate",
    "is_right",
    "load_questions",
    "markdown",
    "normalise",
    "summarise",
    "variants",
]
