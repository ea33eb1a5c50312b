// bind-graph.cpp: nodes of ggml graphs as dictionaries, for tests that compare them with ggml's operation tables.
#include "bindings.h"
#include "ggml.h"

#include <cctype>

static py::dict describe_tensor(const ggml_tensor * t) {
    using namespace pybind11::literals;
    return py::dict(
        "type"_a = ggml_type_name(t->type), "shape"_a = std::vector<int64_t>(t->ne, t->ne + GGML_MAX_DIMS),
        "contiguous"_a = ggml_is_contiguous(t), "rows_contiguous"_a = ggml_is_contiguous_rows(t),
        "permuted"_a = ggml_is_permuted(t));
}

// name: as the operation tables spell it: the function's, upper case, for unary and gated operations
static py::dict describe_node(const ggml_tensor * node) {
    using namespace pybind11::literals;
    std::string name = ggml_op_desc(node);
    for (char & c : name) {
        c = (char) std::toupper((unsigned char) c);
    }
    py::list src;
    for (const ggml_tensor * s : node->src) {
        if (s != nullptr) {
            src.append(describe_tensor(s));
        }
    }
    const std::vector<int32_t> params(
        node->op_params, node->op_params + sizeof(node->op_params) / sizeof(node->op_params[0]));
    return py::dict("name"_a = name, "dst"_a = describe_tensor(node), "src"_a = src, "params"_a = params);
}

// The watcher of this thread; calls into the library release the GIL and come back on the same thread.
static thread_local py::object * watcher = nullptr;

static void watch_graphs(const py::object & callback) {
    qap_watch_graphs(nullptr, nullptr);
    delete watcher;
    watcher = nullptr;
    if (callback.is_none()) {
        return;
    }
    watcher = new py::object(callback);
    qap_watch_graphs(
        [](const ggml_tensor * node, void *) {
            const py::gil_scoped_acquire gil;
            (*watcher)(describe_node(node));
        },
        nullptr);
}

void register_graph(py::module_ & m) {
    m.def("watch_graphs", &watch_graphs, py::arg("callback").none(true));
    // a node that upstream's evaluation callback hands over as an address
    m.def("node_at", [](uintptr_t address) { return describe_node(reinterpret_cast<const ggml_tensor *>(address)); });
}
