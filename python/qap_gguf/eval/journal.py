"""What an evaluation remembers on disk: answers, so that it can go on where it was stopped, and encoded pictures.

The journal is JSON lines: a header with what answers depend on, then one line for each answer, written at once. A last
line that was cut off by a crash is not an answer and is taken away; any other line that cannot be read is an error.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from qap_gguf.errors import DataError
from qap_gguf.eval.data import Question
from qap_gguf.eval.methods import Variant
from qap_gguf.eval.runner import Outcome, Setup
from qap_gguf.files.atomic import replacing
from qap_gguf.files.regular import open_regular, read_regular

VERSION: Final = 1
_SLICE: Final = 1 << 20

Key = tuple[str, str, str, int]


def fingerprint(path: Path) -> str:
    """What tells one file from another: its size and a hash of its first, middle and last megabyte.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            for at in (0, size // 2, max(0, size - _SLICE)):
                file.seek(at)
                digest.update(file.read(_SLICE))
    except OSError as err:
        raise DataError(f"expected a readable file, cannot open {path} ({err.strerror}); check the path") from err
    return f"{size}-{digest.hexdigest()[:16]}"


class Journal:
    """Answers of an evaluation, in memory and in a file.

    Args:
        path: the file; made where it is missing.
        header: what every answer depends on, plain values. A file with another header is refused.
        models: name of a setup's model -> :func:`fingerprint` of its file.
        force: start anew where the file belongs to another run.

    Attributes:
        n_known: answers that the file held.

    Raises:
        DataError: the file belongs to another run, is damaged, or cannot be written.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], models: Mapping[str, str] | None = None, force: bool = False
    ) -> None:
        self.path = path
        self._models = {} if models is None else dict(models)
        self._header = json.loads(json.dumps({"version": VERSION, **header}))
        self._known: dict[Key, dict[str, Any]] = {}
        try:
            raw = read_regular(path).split(b"\n") if path.exists() else []
            lines = [line.decode() for line in raw[:-1]]
            lines += [line.decode(errors="replace") for line in raw[-1:]]  # it may end within a letter
            whole = self._read(lines, force) if lines else []
            self.n_known = len(self._known)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not whole or lines[-1]:  # new, another run's, or with a torn line: written anew, whole or not
                with replacing(path) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in whole or [json.dumps(self._header)]), "utf-8")
            # no buffer: what could not be written on a full disk must not be tried again by close()
            self._file = path.open("ab", buffering=0)
        except (OSError, UnicodeDecodeError) as err:
            raise DataError(f"{path}: expected a journal to read and write, got {err}; choose another folder") from err

    def _read(self, lines: list[str], force: bool) -> list[str]:
        """The whole lines of this run's journal; [] for that of another run where `force` allows it."""
        try:
            found = json.loads(lines[0])
        except ValueError:
            found = None
        if found != self._header:
            if force:
                return []
            theirs = found if isinstance(found, dict) else {}
            differs = [key for key, mine in self._header.items() if theirs.get(key) != mine]
            raise DataError(
                f"{self.path} belongs to a run with another {', '.join(differs) or 'header'}; choose another folder, "
                "or say --force to begin anew"
            )
        for number, line in enumerate(lines[1:-1], start=2):
            try:
                row = json.loads(line)
                self._known[row["model"], row["kv"], row["variant"], row["number"]] = row
            except (ValueError, KeyError, TypeError) as err:
                raise DataError(f"{self.path}, line {number}: no answer; delete the line, or say --force") from err
        return lines[:-1]

    def _model(self, setup: Setup) -> str:
        return f"{setup.model} {self._models[setup.model]}" if setup.model in self._models else setup.model

    def get(self, setup: Setup, variant: Variant, number: int, question: Question) -> Outcome | None:
        """The outcome of question `number`, if it is known."""
        row = self._known.get((self._model(setup), setup.kv, variant.key, number))
        if row is None or len(row["said"]) != len(variant.configs):
            return None
        return Outcome(question, variant, tuple(row["said"]), row["n_kept"], tuple(row["prefill_s"]), setup)

    def add(self, outcome: Outcome, number: int) -> None:
        """Write an outcome down; it is in the file when this returns.

        Raises:
            DataError: the file cannot be written.
        """
        row = {
            "model": self._model(outcome.setup), "kv": outcome.setup.kv, "variant": outcome.variant.key,
            "number": number, "said": outcome.said, "n_kept": outcome.n_kept,
            "prefill_s": [float(f"{second:.4g}") for second in outcome.prefill_s],
        }  # fmt: skip
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) :]
        except OSError as err:
            raise DataError(f"{self.path}: cannot write ({err.strerror}); free some space and run again") from err

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EmbeddingFolder(MutableMapping[Any, Any]):
    """Encoded pictures by path and early drop, in a folder of this process's own (pickles: nobody else's are read)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Any, Path] = {}

    def __getitem__(self, key: Any) -> Any:
        return pickle.loads(self._files[key].read_bytes())

    def __setitem__(self, key: Any, image: Any) -> None:
        file = self._files.setdefault(key, self._folder / f"{len(self._files)}.pickle")
        file.write_bytes(pickle.dumps(image, protocol=5))

    def __delitem__(self, key: Any) -> None:
        self._files.pop(key).unlink()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
