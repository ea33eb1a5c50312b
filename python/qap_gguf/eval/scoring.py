"""What an answer is worth, 0 to 1, under the scorings of the benchmarks that people report.

- ``exact``: the same text but for case, surrounding space and trailing punctuation (our scenes).
- ``choice``: the likeliest of the given choices is the right one (ScienceQA, by likelihood).
- ``vqa``: soft accuracy of VQA v2 and TextVQA over several people's answers (Antol et al. 2015, section 3): a given
  answer counts min(1, others who gave it / 3), averaged over leaving out each person in turn. Texts are compared
  without case, articles and punctuation, numbers up to ten as digits. Apostrophes go too, which stands for the
  official table of contractions.
- ``f1``: F1 of the words in common, as SQuAD compares answers (Rajpurkar et al. 2016), the best over the answers.
- ``yesno``: the first word is yes or no, as POPE is scored; precision, recall and F1 of "yes" are in the report.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

_TRAILING: Final = ".,;:!?"
_ARTICLES: Final = frozenset(("a", "an", "the"))
_NUMBERS: Final = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}


def normalise(answer: str) -> str:
    """Return an answer as it is compared: lower case, without surrounding space and trailing punctuation.

    Example:
        >>> normalise("  Row 2, column 3. ")
        'row 2, column 3'
    """
    return answer.strip().rstrip(_TRAILING + string.whitespace).lower()


def is_right(said: str, answer: str) -> bool:
    """Whether two answers are the same once normalised.

    Example:
        >>> is_right("Yes!", "yes"), is_right("yes it is", "yes")
        (True, False)
    """
    return normalise(said) == normalise(answer)


def words(text: str) -> list[str]:
    """Words as ``vqa`` and ``f1`` compare them.

    Example:
        >>> words("The two dogs' ball, isn't it?")
        ['2', 'dogs', 'ball', 'isnt', 'it']
    """
    found = re.findall(r"\w+(?:[.,:]\d+)*", re.sub(r"['\u2019]", "", text.lower()))
    return [_NUMBERS.get(word, word) for word in found if word not in _ARTICLES]


def exact(said: str, answers: Sequence[str]) -> float:
    """1 where `said` equals one of the answers.

    Example:
        >>> exact("Dog.", ["cat", "dog"])
        1.0
    """
    return float(any(is_right(said, answer) for answer in answers))


def vqa(said: str, answers: Sequence[str]) -> float:
    """Soft accuracy; a single answer is taken as unanimous.

    Example:
        >>> round(vqa("two", ["2", "two", "three"] + ["four"] * 7), 3)
        0.6
    """
    mine, given = words(said), [words(answer) for answer in answers]
    if len(given) == 1:
        return float(mine == given[0])
    same = [one == mine for one in given]
    total = sum(same)
    return sum(min(1.0, (total - one) / 3) for one in same) / len(given)


def f1(said: str, answers: Sequence[str]) -> float:
    """F1 of the words in common, with repetitions.

    Example:
        >>> f1("a red ball", ["red ball", "ball"]), f1("cat", ["dog"])
        (1.0, 0.0)
    """
    return max(_f1(words(said), words(answer)) for answer in answers)


def _f1(mine: Sequence[str], theirs: Sequence[str]) -> float:
    if not mine or not theirs:
        return float(mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))


def yes_or_no(said: str) -> str:
    """The answer's first word where that is yes or no, else "".

    Example:
        >>> yes_or_no("Yes, there is."), yes_or_no("There is no dog")
        ('yes', '')
    """
    found = words(said)[:1]
    return found[0] if found and found[0] in ("yes", "no") else ""


def yesno(said: str, answers: Sequence[str]) -> float:
    """1 where the first word is the right one of yes and no.

    Example:
        >>> yesno("No, it is not.", ["no"])
        1.0
    """
    return float(yes_or_no(said) == yes_or_no(answers[0]))


#: Scoring -> function (said, answers) -> 0..1. A choice is compared exactly: the runner takes the likeliest.
SCORINGS: Final[Mapping[str, Callable[[str, Sequence[str]], float]]] = {
    "exact": exact,
    "choice": exact,
    "vqa": vqa,
    "f1": f1,
    "yesno": yesno,
}
