// scorers.h: the scores as ggml graph nodes. Every scorer is one file that knows ggml and nothing else;
// it runs on whatever backend holds its input. Comments give shapes in ggml order, ne[0] first.
#pragma once

#include "ggml.h"
#include "qap.h"

// How E is measured. roots: [n_embd], those of qap_weight_roots(), for error "model"; null counts like ones
struct qap_error_how {
    int32_t       error;
    int32_t       group_size;
    ggml_tensor * roots;
};

// E: quantization error of each token (method 1), by the builder that the table of scorers.cpp names.
// x: [n_embd, n_tokens] f32 contiguous -> [n_tokens]
ggml_tensor * qap_build_error(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how);
ggml_tensor * qap_build_error_int(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how);
ggml_tensor * qap_build_error_model(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how);
ggml_tensor * qap_build_error_ggml(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how);

// R: outlier magnitude of each token (method 2). x: [n_embd, n_tokens] -> [n_tokens]
ggml_tensor * qap_build_outlier(ggml_context * ctx, ggml_tensor * x, int32_t outlier);
ggml_tensor * qap_build_outlier_range(ggml_context * ctx, ggml_tensor * x);
ggml_tensor * qap_build_outlier_absmax(ggml_context * ctx, ggml_tensor * x);
ggml_tensor * qap_build_outlier_crest(ggml_context * ctx, ggml_tensor * x);

// Attention of one query to all positions, mean over heads: softmax(q_row K^T scale).
// q, k: [d_head, n_pos, n_head] (views allowed), no mask -> [n_pos]
ggml_tensor * qap_build_attention_row(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int64_t row, float scale);

// Attention that each position receives, mean over heads and queries. q, k: as above -> [n_pos]
ggml_tensor * qap_build_attention_received(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, float scale);

// cos(x_i, x_j); zeros for a token of zeros. x: [n_embd, n_tokens] -> [n_tokens, n_tokens]
ggml_tensor * qap_build_cosines(ggml_context * ctx, ggml_tensor * x);

// The same in two steps. Rows of length 1, or 0 for a token of zeros: [n_embd, n_tokens] -> [n_embd, n_tokens]; and the
// cosines of some of these rows with all, [n_embd, n_tokens] and [n_embd, n_some] -> [n_tokens, n_some]
ggml_tensor * qap_build_unit_rows(ggml_context * ctx, ggml_tensor * x);
ggml_tensor * qap_build_products(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * some);

// max_j |x_ij|. x: [n_embd, n_tokens] -> [1, n_tokens]
ggml_tensor * qap_build_absmax(ggml_context * ctx, ggml_tensor * x);

// || x_i ||_2 / unit_i with unit: [1, n_tokens] never zero, so that squares stay in the range of float -> [1, n_tokens]
ggml_tensor * qap_build_scaled_norm(ggml_context * ctx, ggml_tensor * x, ggml_tensor * unit);

// sum_i x_ij. x: [n, rows] contiguous -> [n]
ggml_tensor * qap_build_column_sums(ggml_context * ctx, ggml_tensor * x);

// A number for each row, repeated so that binary operations with rows of `width` take it in vectors.
// v: [1, rows] -> [n, rows], n a divisor of width
ggml_tensor * qap_build_runs(ggml_context * ctx, ggml_tensor * v, int64_t width);

// (v - min) / max(max - min, FLT_MIN): in [0, 1], zeros for a constant v. v: [n] -> [n]
ggml_tensor * qap_build_minmax(ggml_context * ctx, ggml_tensor * v);

// max over each row's windows of `width` that divide ne[0]. x: [width * n, rows] -> [n, rows]
ggml_tensor * qap_build_window_max(ggml_context * ctx, ggml_tensor * x, int64_t width);

// All scores of an image; every tensor is [n_tokens].
struct qap_score_nodes {
    ggml_tensor * error       = nullptr;
    ggml_tensor * outlier     = nullptr;
    ggml_tensor * sensitivity = nullptr;
    ggml_tensor * semantic    = nullptr; // null without a signal
    ggml_tensor * alpha       = nullptr; // [1], only for dynamic alpha
    ggml_tensor * total       = nullptr;
};

// x: [n_embd, n_tokens] f32 contiguous; relevance: raw P, [n_tokens], or null; roots: see qap_error_how
qap_score_nodes qap_build_scores(
    ggml_context * ctx, ggml_tensor * x, ggml_tensor * relevance, ggml_tensor * roots, const qap_params & params);

// Add the nodes to the graph, as outputs: their memory is not used again.
void qap_expand_scores(ggml_cgraph * gf, const qap_score_nodes & nodes);
