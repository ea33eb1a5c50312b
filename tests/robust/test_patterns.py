"""Regular expressions over strangers' text: a minute for what takes milliseconds in proportion to its length.

Found by the coverage-guided fuzzing of the grammar guard: 21 number signs took 20 seconds, and each more twice as long.
"""

import re
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qap_gguf import ImageError, SourceRules
from qap_gguf.chat.gbnf import check_ways
from qap_gguf.chat.grammars import _check_text
from qap_gguf.errors import ConfigError
from qap_gguf.generation.prompt_check import _without_reasoning

N = 250_000
OLD_REASONING = re.compile(r"<(think|thinking|seed:think)>.*?</\1>|^.*?</think>", re.DOTALL)


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError("expected time in proportion to the text")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("guard", [check_ways, _check_text])
@pytest.mark.parametrize(
    "text",
    [
        "root ::= a" + "#" * N, "root ::= a" + "# " * N + "\n::= b", "[" * N, '"' * N, "[\\" * N, "<" * N, "a " * N,
        "root ::= " + "a{" * N, "root ::= " + "." * N + "\\",
    ],
)  # fmt: skip
def test_grammars(guard: Callable[[str], None], text: str) -> None:
    """Whatever the guard says, it says it soon."""
    try:
        guard(text[: 1 << 18])
    except ConfigError as err:
        assert len(str(err)) < 400  # noqa: PT017 -- a guard may as well let it pass


@pytest.mark.parametrize("text", ["<think>" * N, "<think>a</thinking>" * N, "</think>" * N, "<" * N])
def test_reasoning(text: str) -> None:
    assert len(_without_reasoning(text)) <= len(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<thinking>", "</thinking>", "a", "\n"]), max_size=9))
def test_reasoning_is_what_a_pattern_finds(parts: list[str]) -> None:
    """The pattern that says the same, too slow for long texts."""
    assert _without_reasoning("".join(parts)) == OLD_REASONING.sub("", "".join(parts))


def test_base64_with_spaces() -> None:
    with pytest.raises(ImageError):
        SourceRules(allow_files=False).load("A" * 64 + " " * N + "!")
