"""Measure how many answers a model gets right, dense and pruned in several ways, with honest intervals.

One way: ``grid`` opens models -> ``runner`` asks -> ``methods`` (what is compared) and ``data`` (questions, with
``scoring``: what an answer is worth); ``journal`` remembers. ``stats`` summarises the outcomes, ``interaction``
compares gains under several setups, ``report`` makes tables, ``curve`` draws. The model is passed in.
``imatrix`` measures importance matrices on the same questions.
"""

from __future__ import annotations

from qap_gguf.eval.data import Question, load_questions
from qap_gguf.eval.grid import evaluate_grid
from qap_gguf.eval.imatrix import ImatrixReport, measure_imatrix
from qap_gguf.eval.interaction import Interaction, interactions
from qap_gguf.eval.journal import Journal
from qap_gguf.eval.methods import METHODS, Budget, Variant, variants
from qap_gguf.eval.report import Evaluation, markdown
from qap_gguf.eval.runner import Outcome, Setup, evaluate
from qap_gguf.eval.scoring import SCORINGS, is_right, normalise
from qap_gguf.eval.stats import Accuracy, Summary, YesNo, summarise
from qap_gguf.files.journal import fingerprint

__all__ = [
    "METHODS",
    "SCORINGS",
    "Accuracy",
    "Budget",
    "Evaluation",
    "ImatrixReport",
    "Interaction",
    "Journal",
    "Outcome",
    "Question",
    "Setup",
    "Summary",
    "Variant",
    "YesNo",
    "evaluate",
    "evaluate_grid",
    "fingerprint",
    "interactions",
    "is_right",
    "load_questions",
    "markdown",
    "measure_imatrix",
    "normalise",
    "summarise",
    "variants",
]
