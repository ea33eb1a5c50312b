// bind-inspect.cpp: what libllama and libmtmd make of a file's header, without reading its weights. Both check here that
// every tensor which they need is there and has the shape that the keys ask for.
#include "bindings.h"
#include "llama-cpp.h"
#include "llama.h"
#include "quiet.h"

#include <vector>

// "what: the library's words"; RuntimeError
[[noreturn]] static void refuse(const std::string & own, const quiet_scope & quiet) {
    const std::string other = quiet.last_error();
    throw std::runtime_error(own.empty() || other.empty() ? own + other : own + ": " + other);
}

static llama_model_ptr open_header(const std::string & path, const quiet_scope & quiet) {
    llama_model_params params = llama_model_default_params();
    params.no_alloc           = true;
    params.load_mode          = LLAMA_LOAD_MODE_NONE;
    params.n_gpu_layers       = 0;
    llama_model_ptr model(llama_model_load_from_file(path.c_str(), params));
    if (!model) {
        refuse("", quiet);
    }
    return model;
}

static py::dict inspect_model(const std::string & path) {
    using namespace pybind11::literals;
    const quiet_scope     quiet(false);
    const quiet_llama     quiet_too;
    const llama_model_ptr model = open_header(path, quiet);
    const llama_rope_type rope  = llama_model_rope_type(model.get());
    return py::dict(
        "n_embd"_a     = llama_model_n_embd_inp(model.get()),
        "mrope"_a      = rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE,
        "relabelled"_a = qap_model_relabelled(model.get()));
}

static py::dict inspect_mmproj(const std::string & path, const std::optional<std::string> & model) {
    using namespace pybind11::literals;
    const quiet_scope quiet(false);
    const quiet_llama quiet_too;
    llama_model_ptr   language;
    if (model) {
        language = open_header(*model, quiet);
    }
    qap_mmproj_info info = {};
    if (qap_mmproj_inspect(path.c_str(), language.get(), &info) != 0) {
        refuse(qap_last_error(), quiet);
    }
    return py::dict(
        "n_embd"_a = info.n_embd, "vision"_a = info.vision, "audio"_a = info.audio, "batch_rows"_a = info.batch_rows,
        "why_not"_a = info.why_not != nullptr ? py::object(py::str(info.why_not)) : py::object(py::none()));
}

static std::vector<std::string> projectors(const std::string & table) {
    std::vector<std::string> names;
    while (const char * name = qap_projector_name(table.c_str(), (int32_t) names.size())) {
        names.emplace_back(name);
    }
    return names;
}

void register_inspect(py::module_ & m) {
    m.def("projectors", &projectors, py::arg("table"));
    m.def("inspect_model", &inspect_model, py::arg("path"));
    m.def("inspect_mmproj", &inspect_mmproj, py::arg("path"), py::arg("model").none(true));
}
