"""`check_files`: what GGUF files are, whether they fit together, what pruning they support, what is wrong with them.

The gate explains what it knows to be wrong. What passes it is loaded in a process of its own, which a stranger's file
may end (files/trial.py). Then facts come from the file's header by way of libllama and libmtmd themselves, which open
it without reading the weights: what they refuse to load is refused here, in their words. Of files that lie elsewhere
only the header is fetched (named_files.py); all that needs no weights is the same for them.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qap_gguf import _core
from qap_gguf.config import PruneConfig
from qap_gguf.convert.defects import RELABELLED, Defect, find_defects
from qap_gguf.convert.mmproj_header import mmproj_facts
from qap_gguf.convert.named_files import NamedFile, find_files
from qap_gguf.convert.relabel.api import ORIGIN
from qap_gguf.convert.relabel.rules import RULES
from qap_gguf.errors import ConfigError, ConvertError, ModelFileError
from qap_gguf.files.gguf import GgufInfo, check_language, check_mmproj, model_parts, read_gguf
from qap_gguf.files.trial import Job, why_not
from qap_gguf.pruning.relevance import AUTO_ORDER

__all__ = ["CheckReport", "FileReport", "PairReport", "check_files"]

MMPROJ, LANGUAGE, UNREADABLE = "mmproj", "language model", "unreadable"
_FUNCTION = re.compile(r"^(?:\w+: )+(?=.*\w)")  # "llama_model_load: " in front of libllama's own words


@dataclass(frozen=True)
class FileReport:
    """One file.

    Attributes:
        path: the file; of one that lies elsewhere its address, or ``owner/name/file`` on the hub.
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
        weights: bytes of the tensors of each of ggml's types, of all parts of a model in several.
        memory: bytes that an encoder takes with one picture, as `VisionModel` estimates them; mmproj only.
        image: the keys of an mmproj about the size of a picture, such as ``image_size`` (pixels).
        n_read: bytes that were transferred of a file that lies elsewhere, whose weights were not tried; else None.
        size: bytes of that file, None where its server does not tell.
    """

    path: Path | str
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
    weights: Mapping[str, int] = field(default_factory=dict)
    memory: float | None = None
    image: Mapping[str, int] = field(default_factory=dict)
    n_read: int | None = None
    size: int | None = None


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

    mmproj: Path | str
    model: Path | str
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
            entry = {one.name: getattr(file, one.name) for one in dataclasses.fields(file)}
            entry["path"] = str(file.path)
            entry["defaults"] = None if file.defaults is None else file.defaults.to_dict()
            entry["warnings"] = [{"text": d.text, "issue": d.issue, "fixed": d.fixed} for d in file.warnings]
            files.append(entry)
        pairs = [dataclasses.asdict(p) | {"mmproj": str(p.mmproj), "model": str(p.model)} for p in self.pairs]
        return {"ok": self.ok, "files": files, "pairs": pairs}


def check_files(*paths: str | Path, allow_http: bool = False) -> CheckReport:
    """Says what each GGUF file is and whether every mmproj among them fits every language model.

    paths: one or more: files; as str also https addresses of files, and ids of the Hugging Face hub, ``owner/name`` or
        ``owner/name:QUANT``, which stand for the language model and the mmproj that ``--hf`` would fetch (extra hub).
        A file that exists is preferred to an id. Headers only are read: a 7B model takes well under a second. Of files
        elsewhere the header only is fetched, by ranges: some MB.
    allow_http: addresses may be plain http; without it only those of this machine.

    A file that cannot be used is part of the report, not an exception. Raises ConvertError if no path is given, and
    ConfigError for an id without huggingface_hub.

    Example:
        >>> import qap_gguf as qap
        >>> files = qap.packaged_model()
        >>> report = qap.check_files(files.mmproj, files.model)
        >>> report.ok, [file.kind for file in report.files], report.files[0].semantics
        (True, ['mmproj', 'language model'], ('cls', 'text', 'attention'))
    """
    if not paths:
        raise ConvertError("expected at least one GGUF file, got none; give an mmproj, a language model or both")
    with ExitStack() as folders:

        def new_folder() -> Path:
            return Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="qap-check-")))

        named = [file for path in paths for file in find_files(path, new_folder, allow_http=allow_http)]
        return _check([_read(file) for file in named])


@dataclass
class _File:
    """A file, what is known of it so far, and what libllama or libmtmd said to its header."""

    named: NamedFile
    report: FileReport
    info: GgufInfo | None
    header: dict[str, Any] = field(default_factory=dict)

    def fail(self, words: str) -> None:
        self.report = dataclasses.replace(self.report, error=self.named.own_words(words))


def _check(files: list[_File]) -> CheckReport:
    usable = [file for file in files if not file.report.error]
    unsafe = _tried([(file, None) if file.report.kind == MMPROJ else (None, file) for file in usable])
    for file in usable:
        _inspect(file, unsafe.get((file.named.path,)))
    both = [(a, b) for a in files for b in files if a.report.kind == MMPROJ and b.report.kind == LANGUAGE]
    both = [(a, b) for a, b in both if not b.report.error]
    unsafe = _tried([(a, b) for a, b in both if a.report.width is not None and a.report.width == b.report.width])
    pairs = tuple(_pair(a, b, unsafe.get((a.named.path, b.named.path))) for a, b in both)
    return CheckReport(tuple(file.report for file in files), pairs)


def _tried(pairs: list[tuple[_File | None, _File | None]]) -> dict[tuple[Path | None, ...], str]:
    """Why this process must not load them, for those that it must not."""
    jobs = [
        Job(a.named.path if a else None, b.named.path if b else None, not any(one and one.named.far for one in (a, b)))
        for a, b in pairs
    ]
    return {job.files: reason for job, reason in zip(jobs, why_not(jobs), strict=True) if reason is not None}


def _read(named: NamedFile) -> _File:
    """What the header says, and what the gate says to it."""
    report = FileReport(named.name, UNREADABLE, error=named.error, n_read=named.n_read, size=named.size)
    file, path = _File(named, report, None), named.path
    if path is None:
        return file
    try:
        file.info = info = read_gguf(path)
        name = info.metadata.get("general.name")
        file.report = dataclasses.replace(
            file.report, kind=LANGUAGE, family=str(info.metadata.get("general.architecture", "")), name=name or None
        )
        if file.report.family == "clip":
            facts = mmproj_facts(info)
            file.report = dataclasses.replace(
                file.report, kind=MMPROJ, family=facts.projector, n_tokens=facts.n_tokens, image=facts.image,
                warnings=find_defects(info, facts.projector),
            )  # fmt: skip
            check_mmproj(path, memory=False)
        else:
            if ORIGIN in info.metadata:
                file.report = dataclasses.replace(file.report, warnings=(RELABELLED,))
            check_language(path, memory=False)
        parts = [info, *(read_gguf(part) for part in model_parts(path)[1:])]
        file.report = dataclasses.replace(file.report, weights=_weights(parts))
    except ModelFileError as err:
        file.fail(str(err))
    return file


def _weights(parts: list[GgufInfo]) -> dict[str, int]:
    """Bytes of the tensors of each type, the most first."""
    sums: dict[str, int] = {}
    for info in parts:
        for kind, n_bytes in info.tensors.values():
            sums[kind] = sums.get(kind, 0) + n_bytes
    return dict(sorted(sums.items(), key=lambda row: -row[1]))


def _inspect(file: _File, unsafe: str | None) -> None:
    """What libllama or libmtmd make of the header."""
    if unsafe is not None:
        file.fail(f"{unsafe}; fetch or convert it again")
    elif file.report.kind == MMPROJ:
        _inspect_mmproj(file)
    else:
        try:
            file.header = _core.inspect_model(str(file.named.path))
        except RuntimeError as err:
            file.fail(f"llama.cpp refuses it ({_words(err)}); fetch or convert it again")
        else:
            file.report = dataclasses.replace(file.report, width=file.header["n_embd"])


def _inspect_mmproj(file: _File) -> None:
    assert file.info is not None
    path = str(file.named.path)
    facts = mmproj_facts(file.info)
    try:
        defaults = PruneConfig.from_metadata(file.info.metadata)
        file.header = _core.inspect_mmproj(path, None)
    except ConfigError as err:
        file.fail(str(err))
        return
    except RuntimeError as err:
        file.fail(f"libmtmd refuses it ({_words(err)}); fetch or convert it again")
        return
    attends = facts.projector in _core.projectors("attends")
    have = {"clip_text": facts.text_tower, "cls": facts.class_token, "text": True, "attention": attends}
    file.report = dataclasses.replace(
        file.report,
        width=file.header["n_embd"],
        why_not_prunable=file.header["why_not"],
        semantics=() if file.header["why_not"] else tuple(name for name in AUTO_ORDER if have[name]),
        defaults=defaults,
        memory=_core.mmproj_bytes(path),
    )
    wrong = _wrong_defaults(file.report)
    if wrong is not None:
        file.fail(wrong)


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


def _pair(mmproj: _File, model: _File, unsafe: str | None) -> PairReport:
    a, b = mmproj.report, model.report
    pair = PairReport(a.path, b.path, fits=False)
    if a.width is None:
        return dataclasses.replace(pair, reason="the mmproj cannot be loaded")
    if a.width != b.width:
        text = f"the encoder gives {a.width} floats a token, the language model takes {b.width}"
        return dataclasses.replace(pair, reason=f"{text}; give the mmproj that was made with this model")
    try:
        if unsafe is not None:
            raise RuntimeError(unsafe)
        header = _core.inspect_mmproj(str(mmproj.named.path), str(model.named.path))
    except RuntimeError as err:
        words = unsafe or _words(err)
        return dataclasses.replace(pair, reason=mmproj.named.own_words(model.named.own_words(words)))
    positions = ("compact", "keep") if model.header["mrope"] else ("compact",)
    relabel = b.family in RULES
    return dataclasses.replace(
        pair, fits=True, why_not_prunable=header["why_not"], positions=positions, relabel=relabel
    )


def _words(err: RuntimeError) -> str:
    """The library's words in one line, without the name of its function."""
    text = " ".join(str(err).split())
    return _FUNCTION.sub("", text).removeprefix("error loading model: ") or "no reason given"
