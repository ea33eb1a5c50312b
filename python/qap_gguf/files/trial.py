"""Strangers' files are tried in a process of its own before this one loads them.

The gate (files/gguf.py) explains what is wrong with a file, family by family, and can never know all of them: upstream
answers what it misses with an assertion, a division by zero, or all the memory. So a child (load_trial.py) with limits
on address space, time and core dumps reads the vocabulary, then the header, then builds the graphs; small files are
run. What ends it becomes one line here. Files that passed are remembered by what is in their headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qap_gguf import _core
from qap_gguf.errors import ConfigError, ModelFileError
from qap_gguf.files.gguf import check_pair, model_parts
from qap_gguf.files.packaged import packaged_model
from qap_gguf.files.regular import open_regular
from qap_gguf.files.user_cache import user_folder

__all__ = ["CHECKS", "Job", "admit", "check_name", "check_trial", "why_not"]

#: How files are checked before they are loaded: by the gate, by the gate and a child, or not at all.
CHECKS = ("gate", "child", "none")
_SECONDS = 600.0  # that a child may take on a busy machine; its CPU time is limited in load_trial.py
_MOST = 1000  # names that are remembered
_REFUSED = "refused"
# upstream's words before it ends a process, the best first
_WORDS = (
    re.compile(r"[^/\\\s]+:\d+: (?:GGML_ASSERT|.*error|.*fail|.*not )[^\n]*"),
    re.compile(r"(?<=what\(\):)[^\n]+"),
    re.compile(r"MemoryError[^\n]*|terminate called[^\n]*"),
)
# without the working folder, which Python puts in front of sys.path for -c and -m
_START = (
    "import sys, os; sys.path[:] = sys.argv[1].split(os.pathsep); "
    "from qap_gguf.load_trial import main; main(sys.argv[2])"
)


@dataclass(frozen=True)
class Job:
    """What to try: a file of each kind, or the pair.

    Attributes:
        mmproj, model: the files; one of them may be None.
        weights: they have their tensors' data. Files without (files/far.py) are opened and not run.
    """

    mmproj: Path | None
    model: Path | None
    weights: bool = True

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that are there."""
        return tuple(path for path in (self.mmproj, self.model) if path is not None)

    def __str__(self) -> str:
        return " with ".join(map(str, self.files))


def check_name(check: object) -> str:
    """`check` if it is one of CHECKS.

    Raises:
        ConfigError: it is none.
    """
    if check not in CHECKS:
        raise ConfigError(f"check: expected one of {', '.join(CHECKS)}, got {check!r}; choose one of these")
    return str(check)


def admit(
    mmproj: str | os.PathLike[str], model: str | os.PathLike[str] | None, n_ctx: int = 0, check: str = "gate"
) -> None:
    """Check a pair of files, before they are loaded, in one of the ways of CHECKS.

    Args:
        mmproj, model: the files; `model` is None where it is loaded already.
        n_ctx: cells of the KV cache that is to fit the memory.
        check: "gate" reads the headers; "child" also loads the files in a process of its own; "none" does nothing.

    Raises:
        ModelFileError: a file cannot be used, or they do not belong together.
    """
    if check != "none":
        check_pair(mmproj, model, n_ctx)
    if check == "child":
        check_trial(mmproj, model)


def check_trial(mmproj: str | os.PathLike[str] | None, model: str | os.PathLike[str] | None) -> None:
    """Try files in a process of its own, unless they passed before.

    Args:
        mmproj, model: GGUF files, which passed the gate; None leaves one out.

    Raises:
        ModelFileError: loading them ends a process, or takes too much memory or time.

    Example:
        >>> import qap_gguf as qap
        >>> files = qap.packaged_model()
        >>> check_trial(files.mmproj, files.model)  # known; others take a second the first time
    """
    job = Job(None if mmproj is None else Path(mmproj), None if model is None else Path(model))
    (reason,) = why_not([job])
    if reason is not None:
        raise ModelFileError(f"expected files that llama.cpp loads, got {job}: {reason}; fetch or convert them again")


def why_not(jobs: Sequence[Job]) -> list[str | None]:
    """For each job None where loading it is safe, else the reason in one line, upstream's words in it.

    Safe is also what llama.cpp refuses in words: whoever loads the files gets them. It is not remembered.
    """
    names = [_name(job) for job in jobs]
    found: dict[int, str | None] = {i: None for i, name in enumerate(names) if name is None or _known(name)}
    waiting = [i for i in range(len(jobs)) if i not in found]
    while waiting:
        outcomes = _child([jobs[i] for i in waiting])
        for i, outcome in zip(waiting, outcomes, strict=False):
            name = names[i]
            if outcome is None and name is not None and jobs[i].weights:
                _remember(name)
            found[i] = None if outcome == _REFUSED else outcome
        waiting = waiting[len(outcomes) :]
    return [found[i] for i in range(len(jobs))]


def _child(jobs: Sequence[Job]) -> list[str | None]:
    """Outcomes of the first jobs, one or more: a job that ends the child is the last of them."""
    if not sys.executable:
        raise ModelFileError(f"expected a Python to try {jobs[0]} in, found none here; choose check='gate'")
    words = [[*(None if path is None else str(path) for path in (job.mmproj, job.model)), job.weights] for job in jobs]
    command = [sys.executable, "-c", _START, os.pathsep.join(filter(None, sys.path)), json.dumps(words)]
    hidden = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"), "")
    env = {**os.environ, **hidden, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, output, errors = -signal.SIGALRM, late.stdout or b"", late.stderr or b""
    except OSError as err:
        raise ModelFileError(f"cannot start a process to try {jobs[0]} in ({err}); close others") from err
    outcomes, stage = _read(output.decode(errors="replace"))
    if len(outcomes) < len(jobs):
        outcomes.append(f"{stage} {_ending(code, errors.decode(errors='replace'))}")
    return outcomes


def _read(output: str) -> tuple[list[str | None], str]:
    """What the child wrote: outcomes, and what it did last."""
    outcomes: list[str | None] = []
    stage = "starting"
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "stage" in entry:
                stage = str(entry["stage"])
            elif isinstance(entry, dict) and "outcome" in entry:
                outcomes.append(None if entry["outcome"] is None else str(entry["outcome"]))
    return outcomes, stage


def _ending(code: int, errors: str) -> str:
    """How the child ended, in words."""
    said = next((found.group(0).strip() for words in _WORDS if (found := words.search(errors))), None)
    if code == -signal.SIGALRM or code == -getattr(signal, "SIGXCPU", 0):
        return "took too long"
    try:
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    except ValueError:
        name = f"signal {-code}"
    return f"ends the process ({said})" if said else f"ends the process ({name})"


# --- what passed ---


def _name(job: Job) -> str | None:
    """The name under which a job is remembered; None for what needs no trial: the files of the package."""
    packaged = packaged_model()
    own = {packaged.mmproj, packaged.model}
    if all(path.resolve() in own for path in job.files):
        return None
    digest = hashlib.blake2b(f"1 {_core.__version__} {_core.upstream_version}".encode(), digest_size=20)
    for kind, path in (("mmproj", job.mmproj), ("model", job.model)):
        for part in model_parts(path) if path is not None else ():
            _add(digest, kind, part)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, kind: str, path: Path) -> None:
    """The file's size, time of change and header; not its name."""
    try:
        status = path.stat()
        end = _core.gguf_info(str(path))[2]
        with open_regular(path) as file:
            header = file.read(end)
    except (OSError, ValueError) as err:  # it went, or was changed, since the gate saw it
        raise ModelFileError(f"expected a whole GGUF file, cannot read {path} ({err}); fetch it again") from err
    digest.update(f"{kind} {status.st_size} {status.st_mtime_ns} {len(header)} ".encode())
    digest.update(header)


def _known(name: str) -> bool:
    return (user_folder("tried") / name).is_file()


def _remember(name: str) -> None:
    """An empty file; a folder that cannot be written to costs the trial anew."""
    folder = user_folder("tried")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for old in entries[:-_MOST]:
            old.unlink(missing_ok=True)
