// bind-inspect.cpp: what libllama and libmtmd make of a file's header, without reading its weights. Both check here that
// every tensor which they need is there and has the shape that the keys ask for. try_model and try_mmproj go further, and
// may end the process: files/trial.py has them called in one of their own.
#include "bindings.h"
#include "llama-cpp.h"
#include "llama.h"
#include "quiet.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
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

// By ggml's name, of those that can be read and written without an importance matrix.
static ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const auto               type   = (ggml_type) i;
        const ggml_type_traits * traits = ggml_get_type_traits(type);
        const bool               read   = type == GGML_TYPE_F32 || traits->to_float != nullptr;
        if (traits->type_name != nullptr && name == traits->type_name && read &&
            !ggml_quantize_requires_imatrix(type)) {
            return type;
        }
    }
    throw py::value_error("expected the name of a type of weights, got '" + name + "'");
}

static void read_rows(ggml_type type, const char * data, std::vector<float> & values) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(values.data(), data, values.size() * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(data, values.data(), (int64_t) values.size());
    }
}

static void require_finite(const std::vector<float> & values, const std::string & type) {
    if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
        throw std::domain_error("expected finite values in " + type + ", got others");
    }
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
        "n_embd"_a = info.n_embd, "n_channels"_a = info.n_channels, "vision"_a = info.vision, "audio"_a = info.audio,
        "batch_rows"_a = info.batch_rows,
        "why_not"_a    = info.why_not != nullptr ? py::object(py::str(info.why_not)) : py::object(py::none()));
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

static std::vector<std::string> mmproj_products(const std::string & path) {
    const quiet_scope        quiet(false);
    const quiet_llama        quiet_too;
    std::vector<std::string> names;
    const auto               add = [](const char * name, void * user) {
        static_cast<std::vector<std::string> *>(user)->emplace_back(name);
    };
    if (qap_mmproj_products(path.c_str(), add, &names) != 0) {
        refuse(qap_last_error(), quiet);
    }
    return names;
}

// Rows of one ggml type as rows of another, by way of f32. width: values of a row
static py::bytes convert_rows(
    const std::string & data, const std::string & source, const std::string & target, int64_t width) {
    const ggml_type from = type_of(source), to = type_of(target);
    const size_t    row = width > 0 && width % ggml_blck_size(from) == 0 ? ggml_row_size(from, width) : 0;
    if (row == 0 || data.empty() || data.size() % row != 0 || width % ggml_blck_size(to) != 0) {
        throw py::value_error("expected whole rows of " + source + " and " + target + ", got others");
    }
    const auto  n_rows = (int64_t) (data.size() / row);
    std::string out(ggml_row_size(to, width) * (size_t) n_rows, '\0');
    {
        const py::gil_scoped_release nogil;
        std::vector<float>           values((size_t) (n_rows * width));
        read_rows(from, data.data(), values);
        require_finite(values, source);
        ggml_quantize_chunk(to, values.data(), out.data(), 0, n_rows, width, nullptr);
        read_rows(to, out.data(), values);
        require_finite(values, target);
    }
    return out;
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
    m.def("mmproj_products", &mmproj_products, py::arg("path"));
    m.def("convert_rows", &convert_rows, py::arg("data"), py::arg("source"), py::arg("target"), py::arg("width"));
    m.def("inspect_model", &inspect_model, py::arg("path"));
    m.def("try_model", &try_model, py::arg("path"), py::arg("text"));
    m.def("try_mmproj", &try_mmproj, py::arg("path"));
    m.def("inspect_mmproj", &inspect_mmproj, py::arg("path"), py::arg("model").none(true));
}
