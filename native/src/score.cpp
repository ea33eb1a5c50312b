// score.cpp: qap_score(), the scores of features that lie in host memory. It builds the same graph as the hooks
// inside the encoder (scorers/) and runs it on the named device.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "qap-error.h"
#include "qap.h"
#include "scorers/scorers.h"

#include <algorithm>
#include <cmath>
#include <string>

static const size_t MAX_NODES = 256;

// The first value that is not finite or too large, or -1.
static int64_t find_unusable(const float * values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (!(std::fabs(values[i]) <= QAP_MAX_MAGNITUDE)) { // false for NaN as well
            return i;
        }
    }
    return -1;
}

static ggml_backend_t init_backend(const char * device) {
    if (device == nullptr) {
        return ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    }
    ggml_backend_dev_t dev = ggml_backend_dev_by_name(device);
    return dev != nullptr ? ggml_backend_dev_init(dev, nullptr) : nullptr;
}

static std::string device_names() {
    std::string names;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        names += (i > 0 ? ", " : "") + std::string(ggml_backend_dev_name(ggml_backend_dev_get(i)));
    }
    return names;
}

static void set_n_threads(ggml_backend_t backend, int32_t n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set != nullptr && n_threads > 0) {
        set(backend, n_threads);
    }
}

static void read_floats(ggml_tensor * tensor, float * out) {
    if (tensor != nullptr && out != nullptr) {
        ggml_backend_tensor_get(tensor, out, 0, ggml_nbytes(tensor));
    }
}

static int check_features(const float * x, int32_t n_tokens, int32_t n_embd) {
    if (x == nullptr || n_tokens < 1 || n_embd < 1) {
        return qap_fail(
            "x: expected (n_tok, n_embd) with at least one of each, got (%d, %d)", (int) n_tokens, (int) n_embd);
    }
    const int64_t at = find_unusable(x, (int64_t) n_tokens * n_embd);
    if (at >= 0) {
        return qap_fail(
            "x: expected finite features of at most %g, got %g at token %d, channel %d", (double) QAP_MAX_MAGNITUDE,
            (double) x[at], (int) (at / n_embd), (int) (at % n_embd));
    }
    return 0;
}

// A small graph over features on one device: inputs are made, nodes are built on them, run() computes.
struct feature_graph {
    ggml_backend_ptr backend;
    ggml_context_ptr ctx;
    ggml_gallocr_ptr alloc;
    ggml_cgraph *    gf = nullptr;

    // 0, or -1 with an error when the device is unknown
    int open(const char * device, int32_t n_threads) {
        backend.reset(init_backend(device));
        if (!backend) {
            return qap_fail(
                "device: expected one of %s, got '%s'", device_names().c_str(), device != nullptr ? device : "CPU");
        }
        set_n_threads(backend.get(), n_threads);
        const size_t meta = ggml_tensor_overhead() * MAX_NODES + ggml_graph_overhead_custom(MAX_NODES, false);
        ctx.reset(ggml_init({ meta, nullptr, /* no_alloc */ true }));
        gf = ggml_new_graph_custom(ctx.get(), MAX_NODES, false);
        return 0;
    }

    ggml_tensor * input(int64_t ne0, int64_t ne1) {
        ggml_tensor * tensor = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, ne1);
        ggml_set_input(tensor);
        return tensor;
    }

    // room for everything that was expanded; inputs can be set afterwards
    int allocate() {
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            if (!ggml_backend_supports_op(backend.get(), ggml_graph_node(gf, i))) {
                return qap_fail(
                    "device: %s cannot run %s; use the CPU", ggml_backend_name(backend.get()),
                    ggml_op_desc(ggml_graph_node(gf, i)));
            }
        }
        alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
        if (!alloc || !ggml_gallocr_alloc_graph(alloc.get(), gf)) {
            return qap_fail("expected more memory on %s for this many tokens", ggml_backend_name(backend.get()));
        }
        return 0;
    }

    int run() {
        if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            return qap_fail("the scores could not be computed on %s", ggml_backend_name(backend.get()));
        }
        return 0;
    }
};

int qap_score(
    const float * x, int32_t n_tokens, int32_t n_embd, const float * semantic, const struct qap_params * params,
    const char * device, int32_t n_threads, struct qap_scores * out) {
    if (check_features(x, n_tokens, n_embd) != 0 || qap_params_check(params) != 0) {
        return -1;
    }
    if (semantic != nullptr) {
        const int64_t bad = find_unusable(semantic, n_tokens);
        if (bad >= 0) {
            return qap_fail("semantic: expected finite numbers, got %g at token %d", (double) semantic[bad], (int) bad);
        }
    }
    feature_graph graph;
    if (graph.open(device, n_threads) != 0) {
        return -1;
    }
    ggml_tensor *         inp_x = graph.input(n_embd, n_tokens);
    ggml_tensor *         inp_p = semantic != nullptr ? graph.input(n_tokens, 1) : nullptr;
    const qap_score_nodes nodes = qap_build_scores(graph.ctx.get(), inp_x, inp_p, *params);
    qap_expand_scores(graph.gf, nodes);
    if (graph.allocate() != 0) {
        return -1;
    }
    ggml_backend_tensor_set(inp_x, x, 0, ggml_nbytes(inp_x));
    if (inp_p != nullptr) {
        ggml_backend_tensor_set(inp_p, semantic, 0, ggml_nbytes(inp_p));
    }
    if (graph.run() != 0) {
        return -1;
    }
    read_floats(nodes.error, out->error);
    read_floats(nodes.outlier, out->outlier);
    read_floats(nodes.sensitivity, out->sensitivity);
    read_floats(nodes.semantic, out->semantic);
    read_floats(nodes.total, out->total);
    if (nodes.semantic == nullptr && out->semantic != nullptr) {
        std::fill_n(out->semantic, n_tokens, 0.0f);
    }
    out->alpha = params->alpha;
    if (nodes.alpha != nullptr) {
        ggml_backend_tensor_get(nodes.alpha, &out->alpha, 0, sizeof(float));
    }
    if (out->error != nullptr && find_unusable(out->error, n_tokens) >= 0) {
        return qap_fail(
            "error: %s keeps f16 scales, which cannot hold these features (largest magnitude allowed: about 4e5); use "
            "int4",
            qap_name_from_id("error", params->error));
    }
    qap_clear_error();
    return 0;
}

int qap_cosines(
    const float * x, int32_t n_tokens, int32_t n_embd, const char * device, int32_t n_threads, float * cosines) {
    feature_graph graph;
    if (check_features(x, n_tokens, n_embd) != 0 || graph.open(device, n_threads) != 0) {
        return -1;
    }
    ggml_tensor * inp_x  = graph.input(n_embd, n_tokens);
    ggml_tensor * result = qap_build_cosines(graph.ctx.get(), inp_x);
    ggml_set_output(result);
    ggml_build_forward_expand(graph.gf, result);
    if (graph.allocate() != 0) {
        return -1;
    }
    ggml_backend_tensor_set(inp_x, x, 0, ggml_nbytes(inp_x));
    if (graph.run() != 0) {
        return -1;
    }
    read_floats(result, cosines);
    qap_clear_error();
    return 0;
}
