// module.cpp: the Python module qap_gguf._core. Only qap_gguf imports it; python/qap_gguf/runtime/load.py has loaded
// libllama and our libmtmd before.
#include "bindings.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"
#include "quiet.h"

#include <cstring>
#include <stdexcept>
#include <typeinfo>

// An error's words may have been read from a damaged file: what is no UTF-8 of them becomes U+FFFD. Without this, Python
// would raise a UnicodeDecodeError in place of the error.
static void raise_readable(PyObject * type, const char * what) {
    const py::object text =
        py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(what, (Py_ssize_t) std::strlen(what), "replace"));
    PyErr_SetObject(type, text.ptr());
}

static void translate(std::exception_ptr error) {
    try {
        std::rethrow_exception(error);
    } catch (const py::value_error & err) {
        raise_readable(PyExc_ValueError, err.what());
    } catch (const std::invalid_argument & err) {
        raise_readable(PyExc_ValueError, err.what());
    } catch (const std::runtime_error & err) {
        if (typeid(err) != typeid(std::runtime_error)) {
            throw; // pybind11 knows its own errors
        }
        raise_readable(PyExc_RuntimeError, err.what());
    }
}

// Devices that ggml can use in this process; the keys are the fields of python/qap_gguf/runtime/devices.py.
static py::list list_devices() {
    using namespace pybind11::literals;
    py::list devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t     dev  = ggml_backend_dev_get(i);
        ggml_backend_dev_props dp   = {};
        const char *           kind = "accelerator";
        ggml_backend_dev_get_props(dev, &dp);
        switch (dp.type) {
            case GGML_BACKEND_DEVICE_TYPE_CPU: kind = "cpu"; break;
            case GGML_BACKEND_DEVICE_TYPE_GPU: kind = "gpu"; break;
            case GGML_BACKEND_DEVICE_TYPE_IGPU: kind = "igpu"; break;
            default: break;
        }
        devices.append(
            py::dict(
                "name"_a = dp.name, "description"_a = dp.description, "kind"_a = kind,
                "backend"_a     = ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)),
                "bus"_a         = dp.device_id != nullptr ? py::object(py::str(dp.device_id)) : py::object(py::none()),
                "memory_free"_a = dp.memory_free, "memory_total"_a = dp.memory_total));
    }
    return devices;
}

PYBIND11_MODULE(_core, m) {
    py::register_local_exception_translator(&translate);
    m.doc() = "Native part of qap_gguf. Use the functions of the package qap_gguf, which check their arguments.";
    m.attr("__version__")      = QAP_PACKAGE_VERSION;
    m.attr("upstream_version") = qap_upstream_version();
    m.attr("MAX_MAGNITUDE")    = QAP_MAX_MAGNITUDE;
    m.def("ggml_version", [] { return std::string(ggml_version()); });
    m.def("ggml_commit", [] { return std::string(ggml_commit()); });
    m.def("system_info", [] { return std::string(llama_print_system_info()); });
    m.def("devices", &list_devices);
    m.def("quiet_install", &quiet_install);
    m.def(
        "set_device",
        [](const std::optional<std::string> & name) { check(qap_device_set(name ? name->c_str() : nullptr)); },
        py::arg("name").none(true));
    m.def(
        "set_resize",
        [](const std::string & name) {
            check(qap_resize_set(name == "auto" ? 0 : name == "stretch" ? 1 : name == "pad" ? 2 : -1));
        },
        py::arg("name"));
    m.def("set_force_family", &qap_force_family_set, py::arg("on"));
    m.def("avoid_amx", &qap_avoid_amx);
    register_params(m);
    register_score(m);
    register_prune(m);
    register_encoder(m);
    register_gguf(m);
    register_inspect(m);
    register_abort(m);
    register_graph(m);
    register_clip_text(m);
    register_imatrix(m);
    register_interrupt(m);
    register_sampler(m);
    register_chat(m);
}
