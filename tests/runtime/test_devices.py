"""Names of devices, and what a language model is bound to, over tables of machines that are not at hand.

What libllama makes of the arguments is upstream's; that they are the right ones is checked against its own rules, which
stand beside each table. The real table of this process has the CPU at least.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("qap_gguf._core", reason="needs the installed package", exc_type=ImportError)

import llama_cpp

import qap_gguf as qap
from qap_gguf import _core
from qap_gguf import model as model_module
from qap_gguf.errors import ConfigError, QapError
from qap_gguf.language import opener
from qap_gguf.language.turn_lock import Turns
from qap_gguf.runtime import devices as module
from qap_gguf.runtime.devices import Device, aliases, device_name, find_device, language_devices, language_settings

GIB = 1 << 30
ALONE = int(llama_cpp.LLAMA_SPLIT_MODE_NONE)


def device(name: str, kind: Any, backend: str, bus: str | None = None) -> Device:
    return Device(name, f"a {name}", kind, backend, bus, 3 * GIB, 8 * GIB)


CPU = device("CPU", "cpu", "CPU")
CUDA = [device(f"CUDA{i}", "gpu", "CUDA", f"0000:0{i}:00.0") for i in range(2)]
VULKAN = [device(f"Vulkan{i}", "gpu", "Vulkan", f"0000:0{i}:00.0") for i in range(2)]
SHARED = device("Vulkan2", "igpu", "Vulkan", "0000:0e:00.0")
RPC = device("RPC0", "gpu", "RPC")
METAL, BLAS = device("MTL0", "gpu", "MTL"), device("BLAS", "accelerator", "BLAS")

WORKSTATION = [*CUDA, *VULKAN, SHARED, RPC, CPU]
MAC = [METAL, BLAS, CPU]
LAPTOP = [device("Vulkan0", "igpu", "Vulkan"), device("SYCL0", "igpu", "SYCL"), CPU]


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        (WORKSTATION, "cpu", "CPU"),
        (WORKSTATION, "CUDA1", "CUDA1"),
        (WORKSTATION, "cuda1", "CUDA1"),
        (WORKSTATION, "Cuda", "CUDA0"),
        (WORKSTATION, "vulkan", "Vulkan0"),
        (WORKSTATION, "VULKAN2", "Vulkan2"),
        (WORKSTATION, "rpc", "RPC0"),
        (MAC, "metal", "MTL0"),
        (MAC, "Metal0", "MTL0"),
        (MAC, "mtl0", "MTL0"),
        (MAC, "blas", "BLAS"),
        (LAPTOP, "sycl", "SYCL0"),
    ],
)
def test_names_in_any_case_and_aliases(table: list[Device], name: str, expected: str) -> None:
    found = find_device(name, devices=table)
    assert found is not None
    assert found.name == expected


def test_an_alias_never_takes_the_name_of_another_device() -> None:
    odd = [device("gpu", "gpu", "CUDA"), device("CUDA", "gpu", "Other")]
    assert aliases(odd) == {"gpu": ["cuda0"], "CUDA": ["other", "other0"]}
    found = find_device("cuda", devices=odd)
    assert found is not None
    assert found.name == "CUDA"


@pytest.mark.parametrize("name", ["cuda2", "metal", "", "cpu0", "blas0", 3, b"CPU", ["CPU"], True])
def test_an_absent_device_is_one_line_that_lists_what_is_there(name: Any) -> None:
    with pytest.raises(ConfigError) as error:
        find_device(name, devices=WORKSTATION)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("device: expected one of CUDA0 (or cuda), CUDA1, Vulkan0 (or vulkan), Vulkan1, Vulkan2, ")
    assert "RPC0 (or rpc), CPU, got " + repr(name) in text


# --- llama_prepare_model_devices of src/llama.cpp: RPC servers first, then GPUs, each card once, then, where there is
# no GPU, the integrated ones of one backend; helpers of the CPU are never in the list ---


def test_the_order_that_main_gpu_counts_in() -> None:
    assert [row.name for row in language_devices(WORKSTATION)] == ["RPC0", "CUDA0", "CUDA1"]
    assert [row.name for row in language_devices(MAC)] == ["MTL0"]
    assert [row.name for row in language_devices(LAPTOP)] == ["Vulkan0"]
    assert [row.name for row in language_devices([RPC, *LAPTOP])] == ["RPC0", "Vulkan0"]
    assert language_devices([CPU]) == []


def test_settings_of_a_language_model() -> None:
    assert language_settings(None, WORKSTATION) == language_settings("ALL", WORKSTATION) == {"n_gpu_layers": -1}
    assert language_settings("cpu", WORKSTATION) == {"n_gpu_layers": 0, "split_mode": ALONE, "main_gpu": -1}
    for name, number in {"rpc": 0, "cuda": 1, "cuda1": 2}.items():
        found = language_settings(name, WORKSTATION)
        assert found == {"n_gpu_layers": -1, "split_mode": ALONE, "main_gpu": number}


@pytest.mark.parametrize(("table", "name"), [(WORKSTATION, "vulkan1"), (WORKSTATION, "vulkan2"), (MAC, "BLAS")])
def test_a_device_that_libllama_skips(table: list[Device], name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model_device: expected one of CPU, ") as error:
        language_settings(name, table)
    text = str(error.value)
    assert "\n" not in text
    assert [name for name in ("RPC0", "CUDA0", "CUDA1", "MTL0") if name in text] == [
        row.name for row in language_devices(table)
    ]


# --- what VisionModel hands on ---


class StopError(QapError):
    """Ends the construction once everything is known."""


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the language model and of the encoder, on a machine with two CUDA cards."""
    seen: dict[str, Any] = {}

    class Encoder:
        def __init__(self, mmproj: object, language: object, **settings: object) -> None:
            seen["encoder"] = settings["device"]
            raise StopError("enough")

    class Llama:
        n_batch = 1
        turns = Turns()

        def close(self) -> None:
            seen["closed"] = True

    def open_llama(path: object, **settings: Any) -> Llama:
        seen["language"] = {name: settings.get(name) for name in ("n_gpu_layers", "split_mode", "main_gpu")}
        return Llama()

    monkeypatch.setattr(module, "list_devices", lambda: [*CUDA, CPU])
    monkeypatch.setattr(opener, "open_llama", open_llama)
    monkeypatch.setattr(opener, "batch_rows", lambda mmproj: 0)
    monkeypatch.setattr(model_module, "ImageEncoder", Encoder)
    monkeypatch.setattr(model_module, "LanguageModel", lambda llama: llama)
    return seen


@pytest.mark.parametrize(
    ("given", "encoder", "language"),
    [
        ({}, None, (-1, None, None)),
        ({"device": "cpu"}, "CPU", (0, ALONE, -1)),
        ({"device": "cuda1"}, "CUDA1", (-1, ALONE, 1)),
        ({"device": "cuda1", "model_device": "cuda0"}, "CUDA1", (-1, ALONE, 0)),
        ({"device": "cuda1", "model_device": "cpu"}, "CUDA1", (0, ALONE, -1)),
        ({"device": "cpu", "model_device": "cuda"}, "CPU", (-1, ALONE, 0)),
        ({"device": "cuda", "model_device": "all"}, "CUDA0", (-1, None, None)),
        ({"model_device": "cpu"}, None, (0, ALONE, -1)),
    ],
)
def test_encoder_and_language_model_on_their_devices(
    opened: dict[str, Any], given: dict[str, str], encoder: str | None, language: tuple[int, int | None, int | None]
) -> None:
    with pytest.raises(StopError):
        qap.VisionModel(**given)  # type: ignore[arg-type]
    assert opened["encoder"] == encoder
    assert tuple(opened["language"].values()) == language
    assert opened["closed"]


@pytest.mark.parametrize("given", [{"device": "metal"}, {"model_device": "cuda7"}, {"device": "all"}])
def test_nothing_is_loaded_for_a_device_that_is_not_there(opened: dict[str, Any], given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"device: expected one of"):
        qap.VisionModel(**given)  # type: ignore[arg-type]
    assert opened == {}


# --- the real table ---


def test_the_cpu_by_any_name_gives_the_same_numbers() -> None:
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    usual = qap.score(x)
    for name in ("cpu", "CPU", "Cpu"):
        assert qap.score(x, device=name).total.tobytes() == usual.total.tobytes()


def test_a_real_model_bound_to_the_cpu() -> None:
    with qap.VisionModel(device="Cpu", model_device="cpu", n_ctx=512) as vlm:
        assert vlm.language_model.model_params.main_gpu == -1
        answer = vlm.generate([qap.packaged_model().sample, "How many objects are there?"], prune=None, max_tokens=8)
        assert answer == "four"
        with pytest.raises(ConfigError, match=r"^model_device: expected None for a Llama that is loaded"):
            qap.VisionModel(qap.packaged_model().mmproj, vlm.language_model, model_device="cpu")


def test_info_lists_devices_and_their_memory() -> None:
    rows = qap.info()["devices"]
    (cpu,) = [row for row in rows if row["type"] == "cpu"]
    assert set(cpu) == {
        "name", "aliases", "description", "type", "backend", "memory_free_bytes", "memory_total_bytes",
    }  # fmt: skip
    assert cpu["memory_total_bytes"] > 0
    for row in rows:
        assert device_name(row["name"].lower()) == row["name"]
        assert all(device_name(alias.upper()) == row["name"] for alias in row["aliases"])


def test_the_device_of_encoders_that_name_none() -> None:
    """That it decides is shown by gpu-check, which has a second device; here is one."""
    try:
        for name in ("CPU", "cpu"):
            qap.set_device(name)
            with qap.VisionModel(n_ctx=512) as vlm:
                assert vlm.encode(qap.packaged_model().sample).n_tokens == 144
        with pytest.raises(ConfigError, match=r"^device: expected one of CPU"):
            qap.set_device("quantum0")
    finally:
        qap.set_device(None)
    with pytest.raises(ValueError, match="expected one of CPU"):
        _core.set_device("quantum0")
