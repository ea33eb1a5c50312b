// bind-inspect.cpp: what libllama and libmtmd make of a file's header, without reading its weights. Both check here that
// every tensor which they need is there and has the shape that the keys ask for. try_model and try_mmproj go further, and
// may end the process: files/trial.py has them called in one of their own.
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

static llama_model_ptr open_header(const std::string & path, const quiet_scope & quiet, bool vocab_only = false) {
    static ggml_backend_dev_t no_device = nullptr; // the CPU alone
    llama_model_params        params    = llama_model_default_params();
    params.devices                      = &no_device;
    params.vocab_only                   = vocab_only;
    params.no_alloc                     = !vocab_only;
    params.load_mode                    = LLAMA_LOAD_MODE_NONE;
    params.n_gpu_layers                 = 0;
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
    if (qap_mmproj_inspect(path.c_str(), language.get(), false, &info) != 0) {
        refuse(qap_last_error(), quiet);
    }
    return py::dict(
        "n_embd"_a = info.n_embd, "vision"_a = info.vision, "audio"_a = info.audio, "batch_rows"_a = info.batch_rows,
        "why_not"_a = info.why_not != nullptr ? py::object(py::str(info.why_not)) : py::object(py::none()));
}

// Let libllama read a vocabulary, all that a loader reads of the header, and build the graphs of a small context.
static void try_model(const std::string & path, const std::string & text) {
    const quiet_scope quiet(false);
    const quiet_llama quiet_too;
    {
        const llama_model_ptr    vocabulary = open_header(path, quiet, true);
        std::vector<llama_token> tokens(4 * text.size() + 16);
        llama_tokenize(
            llama_model_get_vocab(vocabulary.get()), text.c_str(), (int32_t) text.size(), tokens.data(),
            (int32_t) tokens.size(), true, true);
    }
    const llama_model_ptr model  = open_header(path, quiet);
    llama_context_params  params = llama_context_default_params();
    params.n_ctx                 = 256;
    params.n_batch               = 64;
    params.n_ubatch              = 64;
    const llama_context_ptr context(llama_init_from_model(model.get(), params));
    if (!context) {
        refuse("", quiet);
    }
}

// The same for libmtmd: the header, and the graph of a picture.
static void try_mmproj(const std::string & path) {
    const quiet_scope quiet(false);
    const quiet_llama quiet_too;
    qap_mmproj_info   info = {};
    if (qap_mmproj_inspect(path.c_str(), nullptr, true, &info) != 0) {
        refuse(qap_last_error(), quiet);
    }
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
    m.def("try_model", &try_model, py::arg("path"), py::arg("text"));
    m.def("try_mmproj", &try_mmproj, py::arg("path"));
    m.def("inspect_mmproj", &inspect_mmproj, py::arg("path"), py::arg("model").none(true));
}
