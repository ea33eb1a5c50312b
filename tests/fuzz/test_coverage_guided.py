"""Seeds of the coverage-guided fuzzing: without right ones it never gets past the first check."""

from pathlib import Path

import pytest

import coverage_guided
from qap_gguf import _core


def test_whole_files_pass_the_gate_and_damaged_ones_do_not_all(tmp_path: Path) -> None:
    """The first byte says which gate; files are as a fuzzer's harness has them."""
    passed = []
    for number, seed in enumerate(coverage_guided.seeds_of("gate")):
        file = tmp_path / str(number)
        file.write_bytes(seed[1:])
        try:
            _core.check_language(str(file), False, 64) if seed[0] % 2 else _core.check_mmproj(str(file), False)
            passed.append(number)
        except ValueError:
            assert number > 1
    assert {0, 1} < set(passed)
    assert len(passed) <= number


@pytest.mark.parametrize("name", [*coverage_guided.NATIVE, *coverage_guided.PYTHON])
def test_every_harness_has_seeds_and_a_limit(name: str, tmp_path: Path) -> None:
    """And its source is where the runner looks for it."""
    coverage_guided.write_seeds(name, tmp_path)
    assert 3 <= len(list(tmp_path.iterdir())) < 100
    assert all(file.stat().st_size <= coverage_guided.MAX_BYTES[name] for file in tmp_path.iterdir())
    source = "native/tests/fuzz/fuzz-{}.cpp" if name in coverage_guided.NATIVE else "tools/fuzz/guards.py"
    assert (coverage_guided.ROOT / source.format(name)).is_file()
