// scorers.h: the scores as ggml graph nodes. Every scorer is one file that knows ggml and nothing else;
// it runs on whatever backend holds its input. Comments give shapes in ggml order, ne[0] first.
#pragma once

#include "ggml.h"
#include "qap.h"

// E: group-wise quantization error of each token (method 1).
// x: [n_embd, n_tokens] f32 contiguous -> [n_tokens]
ggml_tensor * qap_build_error(ggml_context * ctx, ggml_tensor * x, int32_t error, int32_t group_size);

// R: outlier magnitude of each token (method 2). x: [n_embd, n_tokens] -> [n_tokens]
ggml_tensor * qap_build_outlier(ggml_context * ctx, ggml_tensor * x, int32_t outlier);

// Attention of one query to all others, mean over heads: softmax(q_row K^T scale).
// q, k: [d_head, n_pos, n_head] (views allowed), mask-free -> [n_pos]
ggml_tensor * qap_build_attention_row(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int64_t row, float scale);

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

// x: [n_embd, n_tokens] f32 contiguous; relevance: raw P, [n_tokens], or null
qap_score_nodes qap_build_scores(
    ggml_context * ctx, ggml_tensor * x, ggml_tensor * relevance, const qap_params & params);

// Add the nodes to the graph, as outputs: their memory is not used again.
void qap_expand_scores(ggml_cgraph * gf, const qap_score_nodes & nodes);
