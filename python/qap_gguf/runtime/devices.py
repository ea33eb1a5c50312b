"""The devices that ggml offers in this process, their names for people, and how a language model is bound to one.

Facts (llama.cpp 0c1e570): ggml names devices CPU, CUDA0, MTL0 (Metal), Vulkan0, ... (ggml-metal.cpp:307 and its
siblings). `llama_prepare_model_devices` (src/llama.cpp:158) orders what a model may use, and `main_gpu` counts in that
order; with `split_mode` none, a negative `main_gpu` leaves the CPU alone. llama-cpp-python has no argument for the
`devices` of llama_model_params, so these two are how one device is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qap_gguf import _core
from qap_gguf.errors import ConfigError

#: What people call a backend whose ggml name is another word.
_WORDS = {"mtl": "metal"}
ALL = "all"


@dataclass(frozen=True)
class Device:
    """One row of the device table.

    Attributes:
        name: ggml's name, such as "CPU" or "CUDA0".
        description: the maker's name of it.
        kind: "cpu", "gpu", "igpu" (shares the memory of the CPU) or "accelerator" (helps the CPU, such as BLAS).
        backend: the ggml backend that it belongs to, such as "CUDA".
        bus: where it sits ("0000:c1:00.0"), None where ggml does not know.
        memory_free: bytes that are free.
        memory_total: bytes in all.
    """

    name: str
    description: str
    kind: Literal["cpu", "gpu", "igpu", "accelerator"]
    backend: str
    bus: str | None
    memory_free: int
    memory_total: int


def list_devices() -> list[Device]:
    """The devices of this process, in ggml's order.

    Example:
        >>> from qap_gguf.runtime.devices import list_devices
        >>> "CPU" in [device.name for device in list_devices()]
        True
    """
    return [Device(**row) for row in _core.devices()]


def aliases(devices: Sequence[Device]) -> dict[str, list[str]]:
    """Lower-case words for each device beside its name: "cuda" is the first of its backend, "metal0" is MTL0.

    Example:
        >>> from qap_gguf.runtime.devices import Device, aliases
        >>> metal = Device("MTL0", "Apple M2", "gpu", "MTL", None, 0, 0)
        >>> aliases([metal])
        {'MTL0': ['metal', 'metal0']}
    """
    taken = {device.name.lower() for device in devices}
    found: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for device in devices:
        word = _WORDS.get(device.backend.lower(), device.backend.lower())
        number = counts.get(word, 0)
        counts[word] = number + 1
        words = ([word] if number == 0 else []) + ([f"{word}{number}"] if device.kind in ("gpu", "igpu") else [])
        found[device.name] = [word for word in words if word not in taken]
    return found


def _names(devices: Sequence[Device]) -> str:
    others = aliases(devices)
    return ", ".join(
        f"{device.name} (or {others[device.name][0]})" if others[device.name] else device.name for device in devices
    )


def find_device(name: object, what: str = "device", devices: Sequence[Device] | None = None) -> Device | None:
    """The device of a name or alias, whatever its case; None for None.

    Args:
        name: what a user wrote.
        what: the setting, for the message.
        devices: the table; None is this process's.

    Raises:
        ConfigError: there is no such device; the message lists those that are there.

    Example:
        >>> from qap_gguf.runtime.devices import find_device
        >>> find_device("cpu").name
        'CPU'
    """
    if name is None:
        return None
    table = list_devices() if devices is None else devices
    if isinstance(name, str):
        others = aliases(table)
        for device in table:
            if name.lower() in (device.name.lower(), *others[device.name]):
                return device
    raise ConfigError(f"{what}: expected one of {_names(table)}, got {name!r}; qap-gguf info says more of each")


def device_name(name: object, what: str = "device") -> str | None:
    """:func:`find_device`, and ggml's name for it."""
    device = find_device(name, what)
    return None if device is None else device.name


def set_device(name: str | None) -> None:
    """Load image encoders onto this device from now on, where their program names none; None takes that back.

    llama-cpp-python's own chat handlers are such programs: they take the first GPU otherwise. Where they forbid GPUs
    (``use_gpu=False``), nothing changes. An encoder that is loaded already stays where it is.

    Args:
        name: a device or an alias, in any case (``qap-gguf info`` lists them).

    Raises:
        ConfigError: there is no such device.

    Example:
        >>> import qap_gguf as qap
        >>> qap.set_device("cpu")  # handler = Llava15ChatHandler(clip_model_path="mmproj-f16.gguf")
        >>> qap.set_device(None)
    """
    _core.set_device(device_name(name))


def language_devices(devices: Sequence[Device]) -> list[Device]:
    """The devices that libllama may put a model on, in the order that its `main_gpu` counts in."""
    remote = [device for device in devices if device.kind == "gpu" and device.backend == "RPC"]
    own: list[Device] = []
    for device in devices:
        again = device.bus is not None and device.bus in [other.bus for other in own]  # seen by two backends
        if device.kind == "gpu" and device.backend != "RPC" and not again:
            own.append(device)
    shared = [device for device in devices if device.kind == "igpu"]
    shared = [device for device in shared if device.backend == shared[0].backend]
    return remote + (own or shared)


def language_settings(name: object, devices: Sequence[Device] | None = None) -> dict[str, Any]:
    """Arguments of ``llama_cpp.Llama`` that put a language model on one device.

    Args:
        name: a device or an alias; None and "all" let libllama spread the model over all GPUs.
        devices: the table; None is this process's.

    Raises:
        ConfigError: there is no such device, or libllama cannot use it.

    Example:
        >>> from qap_gguf.runtime.devices import language_settings
        >>> language_settings("cpu")
        {'n_gpu_layers': 0, 'split_mode': 0, 'main_gpu': -1}
    """
    import llama_cpp

    if name is None or (isinstance(name, str) and name.lower() == ALL):
        return {"n_gpu_layers": -1}
    table = list_devices() if devices is None else devices
    device = find_device(name, "model_device", table)
    alone = int(llama_cpp.LLAMA_SPLIT_MODE_NONE)
    if device is not None and device.kind == "cpu":
        return {"n_gpu_layers": 0, "split_mode": alone, "main_gpu": -1}
    usable = language_devices(table)
    if device not in usable:
        names = _names([*(row for row in table if row.kind == "cpu"), *usable])
        raise ConfigError(f"model_device: expected one of {names}, got {name!r}, which libllama does not use by itself")
    return {"n_gpu_layers": -1, "split_mode": alone, "main_gpu": usable.index(device)}
