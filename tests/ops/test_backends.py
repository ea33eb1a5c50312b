"""Every ggml operation that our graphs run is one that CPU, CUDA, Metal and Vulkan have, for the types that we use.

Both sides are derived: the operations from the graphs as they run (ops/graphs.py), what a backend has from ggml's own
tables in the pinned sources (ops/tables.py). The few differences that are known stand in KNOWN, each with its reason,
and each is checked to be needed still.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import qap_gguf as qap
from clip_text.clip_checkpoint import CASES, hidden_states, make_clip
from ops.graphs import Node, WatchedEncoder, watched
from ops.tables import BACKENDS, VIEWS, Case, Row, Tables, case_of, cases_of, read_tables, why_unsupported
from qap_gguf.config import ERRORS, GGML_ERRORS, OUTLIERS
from qap_gguf.pruning.clip_text import ClipTextTower
from qap_gguf.pruning.score import cosines
from tiny_mmproj import PROJECTORS, WINDOWS, tiny_mmproj

ROOT = Path(__file__).resolve().parents[2]

# The table is older than the code: ggml/src/ggml-cuda/ggml-cuda.cu:2337 runs GGML_OP_POOL_1D (ggml_cuda_op_pool1d,
# pool1d.cu), and line 5553, in supports_op, answers true for it.
STALE_TABLE = {("CUDA", "POOL_1D f32 -> f32")}

# No kernel: the encoder's scheduler runs these nodes on the CPU; qap.score(device=...) says that the device cannot.
CPU_ONLY = {
    *((gpu, f"CPY f32, {kind} -> {kind}") for gpu in ("CUDA", "Metal", "Vulkan") for kind in ("q4_K", "q6_K")),
    *((gpu, f"CPY {kind}, f32 -> f32") for gpu in ("CUDA", "Metal", "Vulkan") for kind in ("q4_K", "q6_K")),
    *((gpu, "CPY iq4_nl, f32 -> f32") for gpu in ("CUDA", "Metal")),
}
KNOWN = STALE_TABLE | CPU_ONLY
#: encoders that are run: all but HunyuanVL's, which must have a language model with several axes beside it
ENCODERS = tuple(name for name in PROJECTORS if name != "hunyuanvl")
CLASS_TOKEN = ("internvl", "llama4")
NO_ATTENTION = ("gemma4uv", "granite4_vision")  # _core.projectors("attends")


@pytest.fixture(scope="session")
def tables() -> Tables:
    """The tables of the pinned sources, from the cache of tools/build/fetch_upstream.py or by it."""
    command = [sys.executable, str(ROOT / "tools" / "build" / "fetch_upstream.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode != 0:
        pytest.skip(f"no upstream sources: {done.stderr.strip()[-200:]}")
    folder = Path(done.stdout.splitlines()[-1]) / "docs" / "ops"
    if not folder.is_dir():  # a tree made for the build alone, named by QAP_UPSTREAM_DIR
        pytest.skip(f"no operation tables in {folder}")
    return read_tables(folder)


@pytest.fixture(scope="session")
def score_nodes() -> list[Node]:
    """Nodes of qap.score, over every setting that changes a graph, and of cosines."""
    rng = np.random.default_rng(0)
    relevance = rng.random(5).astype(np.float32)
    with watched() as nodes:
        for n_embd in (512, 100):  # 100: blocks and groups that do not divide it, and an uneven half
            x = rng.standard_normal((5, n_embd)).astype(np.float32)
            for error in ERRORS:
                for outlier in OUTLIERS:
                    cfg = qap.PruneConfig(error=error, outlier=outlier)
                    weights = x[0] ** 2 if error == "model" else None
                    qap.score(x, cfg, relevance, channel_weights=weights, n_threads=1)
            for alpha in (0.0, "dynamic"):
                for semantic in (relevance, None):
                    qap.score(x, qap.PruneConfig(alpha=alpha, group_size=7), semantic, n_threads=1)
            cosines(x, n_threads=1)
    return nodes


def nodes_added(encoder: WatchedEncoder, image: Path, semantics: Sequence[str], keep: int) -> list[Node]:
    """Nodes that pruning adds to the encoder's graph, for these kinds of relevance."""
    whole, dense = encoder.encode(image)
    added = []
    for semantic in semantics:
        for select in ("topk", "dpp"):
            with qap.use(qap.PruneConfig(n_keep=keep, semantic=semantic, select=select)):
                rows, nodes = encoder.encode(image)
            assert 0 < len(rows) < len(whole)  # of the first tile, where there are more
            assert nodes[: len(dense)] == dense
            added += nodes[len(dense) :]
    return added


@pytest.fixture(scope="session")
def encoder_nodes() -> list[Node]:
    """For every kind of relevance that LLaVA's encoder can give."""
    encoder = WatchedEncoder()
    try:
        return nodes_added(encoder, qap.packaged_model().sample, ("cls", "attention", "none"), 18)
    finally:
        encoder.close()


@pytest.fixture(scope="session")
def family_nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Node]]:
    """The same for encoders that merge patches: by 2 x 2 in the order of windows or of the picture, by pooling."""
    folder = tmp_path_factory.mktemp("families")
    image = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image)
    found = {}
    for projector in ENCODERS:
        mmproj = folder / f"{projector}.gguf"
        mmproj.write_bytes(tiny_mmproj(projector))
        encoder = WatchedEncoder(mmproj)
        try:
            semantics = () if projector in NO_ATTENTION else ("attention",)
            semantics = ("cls", *semantics, "none") if projector in CLASS_TOKEN else (*semantics, "none")
            found[projector] = nodes_added(encoder, image, semantics, 3)
        finally:
            encoder.close()
    return found


def kind_of(node: Node) -> str:
    """A node without its sizes: the layers after an early drop have the operations of those before it, on less."""
    tensors = [{k: v for k, v in t.items() if k not in ("shape", "strides")} for t in (*node["src"], node["dst"])]
    return f"{node['name']} {tensors}"


@pytest.fixture(scope="session")
def early_nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Node]]:
    """Kinds of nodes that an early drop brings to the graph of a tower, which has none of them without it."""
    folder = tmp_path_factory.mktemp("early")
    image = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(image)
    found: dict[str, list[Node]] = {}
    for projector in ("mlp", *(name for name in ENCODERS if name not in (*WINDOWS, *NO_ATTENTION, "minicpmv4_6"))):
        mmproj = folder / f"{projector}.gguf"
        if projector != "mlp":
            mmproj.write_bytes(tiny_mmproj(projector))
        encoder = WatchedEncoder(None if projector == "mlp" else mmproj)
        try:
            _, dense = encoder.encode(image)
            own, found[projector] = {kind_of(node) for node in dense}, []
            for semantic in ("auto", "attention"):
                with qap.use(qap.PruneConfig(n_keep=8, encoder_keep=0.5, encoder_layer=1, semantic=semantic)):
                    _, nodes = encoder.encode(image)
                found[projector] += [node for node in nodes if kind_of(node) not in own]
        finally:
            encoder.close()
    return found


@pytest.fixture(scope="session")
def cases(
    score_nodes: list[Node],
    encoder_nodes: list[Node],
    family_nodes: dict[str, list[Node]],
    early_nodes: dict[str, list[Node]],
) -> list[Case]:
    families = [node for found in (family_nodes, early_nodes) for nodes in found.values() for node in nodes]
    return cases_of([*score_nodes, *encoder_nodes, *families])


@pytest.fixture(scope="session", params=list(CASES))
def tower_cases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str], plain_llava: Path
) -> list[Case]:
    """Cases of CLIP's text tower and of the projection of patches, with weights in f32 and in f16."""
    folder = make_clip(tmp_path_factory.mktemp("clip") / "ckpt", texts, CASES[request.param])
    with watched() as nodes:
        for kind in ("f32", "f16"):
            out = tmp_path_factory.mktemp("gguf")
            files = qap.convert(plain_llava, out, quantize="F32", mmproj_type=kind, clip_text=folder)
            tower = ClipTextTower.open(files.mmproj, n_threads=1)
            assert tower is not None
            with tower:
                tower.relevance(hidden_states(), "a cat")
    assert len(nodes) > 100
    return cases_of(nodes)


def missing(cases: list[Case], tables: Tables, backend: str) -> dict[str, str]:
    found = {str(case): why_unsupported(case, tables[backend]) for case in cases}
    return {name: why for name, why in found.items() if why is not None}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operation_is_supported(cases: list[Case], tables: Tables, backend: str) -> None:
    found = {name: why for name, why in missing(cases, tables, backend).items() if (backend, name) not in KNOWN}
    assert not found, f"{backend} cannot run {found}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operation_of_the_text_tower_is_supported(tower_cases: list[Case], tables: Tables, backend: str) -> None:
    found = missing(tower_cases, tables, backend)
    assert not found, f"{backend} cannot run {found}"


@pytest.mark.parametrize(("backend", "name"), sorted(KNOWN))
def test_every_exception_is_needed_still(cases: list[Case], tables: Tables, backend: str, name: str) -> None:
    assert name in {str(case) for case in cases}, "our graphs use it no more: remove the exception"
    assert name in missing(cases, tables, backend), "the table has it now: remove the exception"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_docs_name_the_backend_and_its_exceptions(backend: str) -> None:
    lines = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| {backend} |")
    ]
    ((_, devices, on_cpu, run, prepared),) = rows  # one row, five columns
    assert "`" in devices
    assert run
    assert prepared
    errors = {error for error in ERRORS if f"`{error}`" in on_cpu}
    assert errors == {error for gpu, name in CPU_ONLY if gpu == backend for error in ERRORS if error in name}


def test_the_cpu_needs_no_exception() -> None:
    assert not [name for backend, name in KNOWN if backend == "CPU"]


def test_what_was_seen_are_our_graphs(
    score_nodes: list[Node],
    encoder_nodes: list[Node],
    family_nodes: dict[str, list[Node]],
    early_nodes: dict[str, list[Node]],
) -> None:
    """Guards the guard: an empty or partial list of nodes would pass everything above."""
    scores, encoder = ({str(node["name"]) for node in nodes} - VIEWS for nodes in (score_nodes, encoder_nodes))
    assert len(scores) >= 12
    assert {"CPY", "PAD", "MUL_MAT"} <= scores
    assert {"SOFT_MAX", "CONT", "MUL_MAT"} <= encoder
    for projector, nodes in family_nodes.items():
        wanted = {"MUL_MAT"} if projector in NO_ATTENTION else {"SOFT_MAX", "SUM_ROWS", "MUL_MAT"}
        assert wanted <= {str(node["name"]) for node in nodes}, projector
    assert "GET_ROWS" in {str(node["name"]) for node in family_nodes["qwen2.5vl_merger"]}  # out of its windows
    for projector, nodes in early_nodes.items():
        assert {"ARGSORT", "GET_ROWS", "LOG"} <= {str(node["name"]) for node in nodes}, projector
    kinds = {source["type"] for node in score_nodes for source in node["src"]}
    assert {"f32", *GGML_ERRORS} == kinds


# --- the test of the test ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_invented_operation_fails(score_nodes: list[Node], tables: Tables, backend: str) -> None:
    invented = dict(score_nodes[0]) | {"name": "FROBNICATE"}
    assert missing(cases_of([invented]), tables, backend) == {"FROBNICATE f32 -> f32": "not in the table"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_type_that_the_operation_has_not_fails(score_nodes: list[Node], tables: Tables, backend: str) -> None:
    node = next(node for node in score_nodes if node["name"] == "SQR")
    other = [dict(tensor) | {"type": "i64"} for tensor in node["src"]]
    found = missing(cases_of([node | {"src": other}]), tables, backend)
    assert found == {"SQR i64 -> f32": "no row for these types"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_that_share_a_key_are_another_case(
    family_nodes: dict[str, list[Node]], tables: Tables, backend: str
) -> None:
    """EXAONE's: rows of the table without repeated matrices say nothing of them."""
    shared = [case for case in cases_of(family_nodes["exaone4_5"]) if case.expected.get("nr") == "[2,1]"]
    assert {(case.op, case.types) for case in shared} == {("MUL_MAT", ("f32", "f32", "f32"))}
    plain = [row for row in tables[backend]["MUL_MAT"] if row.parameters.get("nr") == "[1,1]"]
    found = missing(shared, tables | {backend: tables[backend] | {"MUL_MAT": plain}}, backend)
    assert found == {"MUL_MAT f32, f32 -> f32": "no row for these types"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_loses_an_operation_fails(cases: list[Case], tables: Tables, backend: str) -> None:
    without = {op: [Row(row.parameters, False) for row in rows] for op, rows in tables[backend].items()}
    found = missing(cases, tables | {backend: without}, backend)
    assert len(found) == len({str(case) for case in cases})


def test_cases_that_the_tables_cannot_tell_are_refused(score_nodes: list[Node]) -> None:
    padded = next(node for node in score_nodes if node["name"] == "PAD")
    with pytest.raises(ValueError, match="PAD on the left"):
        case_of(padded | {"params": [1, *padded["params"][1:]]})
