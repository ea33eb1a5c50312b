"""`check_files`: what GGUF files are, whether they fit together, what pruning they support, what is wrong with them.

The gate explains what it knows to be wrong. What passes it is loaded in a process of its own, which a stranger's file
may end (files/trial.py). Then facts come from the file's header by way of libllama and libmtmd themselves, which open
it without reading the weights: what they refuse to load is refused here, in their words.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qap_gguf import _core
from qap_gguf.config import PruneConfig
from qap_gguf.convert.defects import RELABELLED, Defect, find_defects
from qap_gguf.convert.mmproj_header import mmproj_facts
from qap_gguf.convert.relabel.api import ORIGIN
from qap_gguf.convert.relabel.rules import RULES
from qap_gguf.errors import ConfigError, ConvertError, ModelFileError
from qap_gguf.files.gguf import GgufInfo, check_language, check_mmproj, read_gguf
from qap_gguf.files.trial import Job, why_not
from qap_gguf.pruning.relevance import AUTO_ORDER

__all__ = ["CheckReport", "FileReport", "PairReport", "check_files"]

MMPROJ, LANGUAGE, UNREADABLE = "mmproj", "language model", "unreadable"
_FUNCTION = re.compile(r"^(?:\w+: )+(?=.*\w)")  # "llama_model_load: " in front of libllama's own words


@dataclass(frozen=True)
class FileReport:
    """One file.

    Attributes:
        path: the file.
        kind: "mmproj", "language model" or "unreadable".
        family: projector of an mmproj, architecture of a language model; "" where unreadable.
        name: general.name, None where there is none.
        width: floats of one image token, as the encoder gives it or the language model takes it.
        n_tokens: tokens of every image, None where it depends on the image; mmproj only.
        semantics: semantic scores that an mmproj can give; empty where its images cannot be pruned.
        why_not_prunable: None, or one line that says why images cannot be pruned; mmproj only.
        defaults: the pruning defaults that the file carries, None without.
        warnings: where stock llama.cpp departs from the trained model.
        error: what keeps the file from being used, None where nothing does.
    """

    path: Path
    kind: str
    family: str = ""
    name: str | None = None
    width: int | None = None
    n_tokens: int | None = None
    semantics: tuple[str, ...] = ()
    why_not_prunable: str | None = None
    defaults: PruneConfig | None = None
    warnings: tuple[Defect, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class PairReport:
    """An mmproj and a language model.

    Attributes:
        mmproj, model: the files.
        fits: libmtmd loads the first for the second.
        reason: why they do not fit, else None.
        why_not_prunable: None, or why this pair's images cannot be pruned.
        positions: what PruneConfig(positions=...) may be for this model; "keep" needs M-RoPE, or a file that was
            relabelled.
        relabel: its architecture is one of those that convert --keep-positions relabels, and that was not done yet.
    """

    mmproj: Path
    model: Path
    fits: bool
    reason: str | None = None
    why_not_prunable: str | None = None
    positions: tuple[str, ...] = ()
    relabel: bool = False


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check_files` found: one entry for each file, and one for each mmproj with each language model."""

    files: tuple[FileReport, ...]
    pairs: tuple[PairReport, ...]

    @property
    def ok(self) -> bool:
        """Every file can be used, and every pair fits."""
        return not any(file.error for file in self.files) and all(pair.fits for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; paths are strings."""
        files = []
        for file in self.files:
            entry = {field.name: getattr(file, field.name) for field in dataclasses.fields(file)}
            entry["path"] = str(file.path)
            entry["defaults"] = None if file.defaults is None else file.defaults.to_dict()
            entry["warnings"] = [{"text": d.text, "issue": d.issue, "fixed": d.fixed} for d in file.warnings]
            files.append(entry)
        pairs = [dataclasses.asdict(p) | {"mmproj": str(p.mmproj), "model": str(p.model)} for p in self.pairs]
        return {"ok": self.ok, "files": files, "pairs": pairs}


def check_files(*paths: str | Path) -> CheckReport:
    """Says what each GGUF file is and whether every mmproj among them fits every language model.

    paths: one file or more. Headers only are read: a 7B model takes well under a second.

    A file that cannot be used is part of the report, not an exception. Raises ConvertError if no path is given.

    Example:
        >>> import qap_gguf as qap
        >>> files = qap.packaged_model()
        >>> report = qap.check_files(files.mmproj, files.model)
        >>> report.ok, [file.kind for file in report.files], report.files[0].semantics
        (True, ['mmproj', 'language model'], ('cls', 'text', 'attention'))
    """
    if not paths:
        raise ConvertError("expected at least one GGUF file, got none; give an mmproj, a language model or both")
    headers: dict[Path, dict[str, Any]] = {}
    infos = [_read(Path(path)) for path in paths]
    unsafe = _tried([(file, None) if file.kind == MMPROJ else (None, file) for file, _ in infos if not file.error])
    files = tuple(_file(file, info, unsafe.get((file.path,)), headers) for file, info in infos)
    both = [(a, b) for a in files for b in files if a.kind == MMPROJ and b.kind == LANGUAGE and not b.error]
    unsafe = _tried([(a, b) for a, b in both if a.width is not None and a.width == b.width])
    return CheckReport(files, tuple(_pair(a, b, unsafe.get((a.path, b.path)), headers) for a, b in both))


def _tried(pairs: list[tuple[FileReport | None, FileReport | None]]) -> dict[tuple[Path, ...], str]:
    """Why this process must not load them, for those that it must not."""
    jobs = [Job(*(None if file is None else file.path for file in pair)) for pair in pairs]
    return {job.files: reason for job, reason in zip(jobs, why_not(jobs), strict=True) if reason is not None}


def _read(path: Path) -> tuple[FileReport, GgufInfo | None]:
    """What the header says, and what the gate says to it."""
    try:
        info = read_gguf(path)
    except ModelFileError as err:
        return FileReport(path, UNREADABLE, error=str(err)), None
    name = info.metadata.get("general.name")
    report = FileReport(path, LANGUAGE, str(info.metadata.get("general.architecture", "")), name if name else None)
    try:
        if report.family == "clip":
            facts = mmproj_facts(info)
            report = dataclasses.replace(
                report, kind=MMPROJ, family=facts.projector, n_tokens=facts.n_tokens,
                warnings=find_defects(info, facts.projector),
            )  # fmt: skip
            check_mmproj(path, memory=False)
        else:
            if ORIGIN in info.metadata:
                report = dataclasses.replace(report, warnings=(RELABELLED,))
            check_language(path, memory=False)
    except ModelFileError as err:
        return dataclasses.replace(report, error=str(err)), info
    return report, info


def _file(
    report: FileReport, info: GgufInfo | None, unsafe: str | None, headers: dict[Path, dict[str, Any]]
) -> FileReport:
    if info is None or report.error is not None:
        return report
    if unsafe is not None:
        return dataclasses.replace(report, error=f"{unsafe}; fetch or convert it again")
    if report.kind == MMPROJ:
        return _mmproj(report, info, headers)
    try:
        headers[report.path] = _core.inspect_model(str(report.path))
    except RuntimeError as err:
        return dataclasses.replace(report, error=f"llama.cpp refuses it ({_words(err)}); fetch or convert it again")
    return dataclasses.replace(report, width=headers[report.path]["n_embd"])


def _mmproj(report: FileReport, info: GgufInfo, headers: dict[Path, dict[str, Any]]) -> FileReport:
    facts = mmproj_facts(info)
    try:
        defaults = PruneConfig.from_metadata(info.metadata)
        header = _core.inspect_mmproj(str(info.path), None)
    except ConfigError as err:
        return dataclasses.replace(report, error=str(err))
    except RuntimeError as err:
        return dataclasses.replace(report, error=f"libmtmd refuses it ({_words(err)}); fetch or convert it again")
    headers[info.path] = header
    attends = facts.projector in _core.projectors("attends")
    have = {"clip_text": facts.text_tower, "cls": facts.class_token, "text": True, "attention": attends}
    report = dataclasses.replace(
        report,
        width=header["n_embd"],
        why_not_prunable=header["why_not"],
        semantics=() if header["why_not"] else tuple(name for name in AUTO_ORDER if have[name]),
        defaults=defaults,
    )
    return dataclasses.replace(report, error=_wrong_defaults(report))


def _wrong_defaults(report: FileReport) -> str | None:
    """What makes the file's own defaults an error on every image."""
    defaults, cure = report.defaults, "change them with --annotate"
    if defaults is None:
        return None
    if report.why_not_prunable:
        return f"its qap.* keys ask for pruning, but {report.why_not_prunable}; {cure} --dense"
    if defaults.semantic not in ("auto", "none", *report.semantics):
        return f"its qap.semantic is {defaults.semantic}, this file gives {', '.join(report.semantics)}; {cure}"
    return None


def _pair(mmproj: FileReport, model: FileReport, unsafe: str | None, headers: dict[Path, dict[str, Any]]) -> PairReport:
    pair = PairReport(mmproj.path, model.path, fits=False)
    if mmproj.width is None:
        return dataclasses.replace(pair, reason="the mmproj cannot be loaded")
    if mmproj.width != model.width:
        text = f"the encoder gives {mmproj.width} floats a token, the language model takes {model.width}"
        return dataclasses.replace(pair, reason=f"{text}; give the mmproj that was made with this model")
    if unsafe is not None:
        return dataclasses.replace(pair, reason=unsafe)
    try:
        header = _core.inspect_mmproj(str(mmproj.path), str(model.path))
    except RuntimeError as err:
        return dataclasses.replace(pair, reason=_words(err))
    positions = ("compact", "keep") if headers[model.path]["mrope"] else ("compact",)
    relabel = model.family in RULES
    return dataclasses.replace(
        pair, fits=True, why_not_prunable=header["why_not"], positions=positions, relabel=relabel
    )


def _words(err: RuntimeError) -> str:
    """The library's words in one line, without the name of its function."""
    text = " ".join(str(err).split())
    return _FUNCTION.sub("", text).removeprefix("error loading model: ") or "no reason given"
