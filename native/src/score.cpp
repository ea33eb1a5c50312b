// score.cpp: qap_score(), the scores of features that lie in host memory. It builds the same graph as the hooks
// inside the encoder (scorers/) and runs it on the named device.
#include "device.h"
#include "ggml-backend.h"
#include "qap-error.h"
#include "qap-params.h"
#include "scorers/scorers.h"

#include <algorithm>
#include <cmath>

static const size_t MAX_NODES = 256;

int qap_score(
    const float * x, int32_t n_tokens, int32_t n_embd, const float * semantic, const float * channel_weights,
    const struct qap_params * params, const char * device, int32_t n_threads, struct qap_scores * out) {
    if (qap_check_features(x, n_tokens, n_embd) != 0 || qap_params_check(params) != 0) {
        return -1;
    }
    if (semantic != nullptr) {
        const int64_t bad = qap_find_unusable(semantic, n_tokens);
        if (bad >= 0) {
            return qap_fail("semantic: expected finite numbers, got %g at token %d", (double) semantic[bad], (int) bad);
        }
    }
    std::vector<float> roots; // for error "model"
    if (params->error == QAP_ERROR_MODEL) {
        if (channel_weights == nullptr) {
            return qap_fail("channel_weights: expected %d numbers for error model, got none", (int) n_embd);
        }
        if (qap_weight_roots(channel_weights, n_embd, roots) != 0) {
            return -1;
        }
    }
    device_graph graph;
    // Most operations of int errors run on one thread in ggml, whatever it is told, and all threads meet after every node.
    // A second thread saves a sixth of the time on an idle machine and costs several times that on a busy one. ggml's own
    // quantizers are worth their threads.
    if (graph.open_device(device, params->error < QAP_ERROR_GGML ? 1 : n_threads, MAX_NODES) != 0) {
        return -1;
    }
    ggml_tensor *         inp_x = graph.input(GGML_TYPE_F32, n_embd, n_tokens);
    ggml_tensor *         inp_p = semantic != nullptr ? graph.input(GGML_TYPE_F32, n_tokens, 1) : nullptr;
    ggml_tensor *         inp_w = roots.empty() ? nullptr : graph.input(GGML_TYPE_F32, n_embd, 1);
    const qap_score_nodes nodes = qap_build_scores(graph.ctx.get(), inp_x, inp_p, inp_w, *params);
    qap_expand_scores(graph.gf, nodes);
    if (graph.allocate() != 0) {
        return -1;
    }
    ggml_backend_tensor_set(inp_x, x, 0, ggml_nbytes(inp_x));
    if (inp_p != nullptr) {
        ggml_backend_tensor_set(inp_p, semantic, 0, ggml_nbytes(inp_p));
    }
    if (inp_w != nullptr) {
        ggml_backend_tensor_set(inp_w, roots.data(), 0, ggml_nbytes(inp_w));
    }
    if (graph.run() != 0) {
        return -1;
    }
    qap_read_floats(nodes.error, out->error);
    qap_read_floats(nodes.outlier, out->outlier);
    qap_read_floats(nodes.sensitivity, out->sensitivity);
    qap_read_floats(nodes.semantic, out->semantic);
    qap_read_floats(nodes.total, out->total);
    if (nodes.semantic == nullptr && out->semantic != nullptr) {
        std::fill_n(out->semantic, n_tokens, 0.0f);
    }
    out->alpha = params->alpha;
    if (nodes.alpha != nullptr) {
        qap_read_bytes(nodes.alpha, &out->alpha, 0, sizeof(float));
    }
    const auto is_finite = [](float value) { return std::isfinite(value); };
    if (out->error != nullptr && !std::all_of(out->error, out->error + n_tokens, is_finite)) {
        return qap_fail(
            "error: %s keeps scales in f16, which cannot hold features this large (65504 always fits); use int4",
            qap_name_from_id("error", params->error));
    }
    qap_clear_error();
    return 0;
}

int qap_cosines(
    const float * x, int32_t n_tokens, int32_t n_embd, const char * device, int32_t n_threads, float * cosines) {
    device_graph graph;
    if (qap_check_features(x, n_tokens, n_embd) != 0 || graph.open_device(device, n_threads, MAX_NODES) != 0) {
        return -1;
    }
    ggml_tensor * inp_x  = graph.input(GGML_TYPE_F32, n_embd, n_tokens);
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
    qap_read_floats(result, cosines);
    qap_clear_error();
    return 0;
}
