// fuse.cpp: min-max normalisation, sensitivity, alpha and the fused score (method 3 to 5).
//
// Source: QAPruner (arXiv 2604.02816) and its authors' public reference for the dynamic alpha:
//   Q = (1 - w) minmax(E) + w minmax(R),  S = alpha P + (1 - alpha) Q
//   dynamic: alpha = 0.55 - 0.10 clamp(std(Q) / (mean(Q) + 1e-8) - 0.2, 0, 1), std with n - 1
#include "scorers.h"

#include <cfloat>
#include <initializer_list>

ggml_tensor * qap_build_minmax(ggml_context * ctx, ggml_tensor * v) {
    const int64_t n    = v->ne[0];
    ggml_tensor * high = qap_build_window_max(ctx, v, n);                               // [1]
    ggml_tensor * low  = ggml_neg(ctx, qap_build_window_max(ctx, ggml_neg(ctx, v), n)); // [1]
    ggml_tensor * span = ggml_clamp(ctx, ggml_sub(ctx, high, low), FLT_MIN, FLT_MAX);   // [1], never zero
    return ggml_div(ctx, ggml_sub(ctx, v, low), span);
}

// alpha from the spread of the sensitivity, [1]
static ggml_tensor * build_dynamic_alpha(ggml_context * ctx, ggml_tensor * q) {
    const int64_t n      = q->ne[0];
    ggml_tensor * mean   = ggml_scale(ctx, ggml_sum_rows(ctx, q), 1.0f / (float) n);
    ggml_tensor * square = ggml_sum_rows(ctx, ggml_sqr(ctx, ggml_sub(ctx, q, mean)));
    // one token has no spread: n - 1 would divide by zero, and the sum of squares is zero anyway
    ggml_tensor * std    = ggml_sqrt(ctx, ggml_scale(ctx, square, n > 1 ? 1.0f / (float) (n - 1) : 0.0f));
    ggml_tensor * spread = ggml_div(ctx, std, ggml_scale_bias(ctx, mean, 1.0f, 1e-8f));
    spread               = ggml_clamp(ctx, ggml_scale_bias(ctx, spread, 1.0f, -0.2f), 0.0f, 1.0f);
    return ggml_scale_bias(ctx, spread, -0.10f, 0.55f);
}

qap_score_nodes qap_build_scores(
    ggml_context * ctx, ggml_tensor * x, ggml_tensor * relevance, ggml_tensor * roots, const qap_params & params) {
    const float w = params.outlier_weight;

    qap_score_nodes nodes;
    nodes.error       = qap_build_error(ctx, x, { params.error, params.group_size, roots });
    nodes.outlier     = qap_build_outlier(ctx, x, params.outlier);
    nodes.sensitivity = ggml_add(
        ctx, ggml_scale(ctx, qap_build_minmax(ctx, nodes.error), 1.0f - w),
        ggml_scale(ctx, qap_build_minmax(ctx, nodes.outlier), w));
    nodes.semantic = relevance != nullptr ? qap_build_minmax(ctx, relevance) : nullptr;

    ggml_tensor * q = nodes.sensitivity;
    ggml_tensor * p = nodes.semantic;
    if (params.alpha_dynamic) {
        nodes.alpha = build_dynamic_alpha(ctx, q);
        // S = Q + alpha (P - Q), where a missing P counts as zeros
        ggml_tensor * toward = p != nullptr ? ggml_sub(ctx, p, q) : ggml_neg(ctx, q);
        nodes.total          = ggml_add(ctx, q, ggml_mul(ctx, toward, nodes.alpha));
    } else {
        nodes.total = ggml_scale(ctx, q, 1.0f - params.alpha);
        if (p != nullptr) {
            nodes.total = ggml_add(ctx, nodes.total, ggml_scale(ctx, p, params.alpha));
        }
    }
    return nodes;
}

void qap_expand_scores(ggml_cgraph * gf, const qap_score_nodes & nodes) {
    for (ggml_tensor * node :
         { nodes.error, nodes.outlier, nodes.sensitivity, nodes.semantic, nodes.alpha, nodes.total }) {
        if (node != nullptr) {
            ggml_set_output(node);
            ggml_build_forward_expand(gf, node);
        }
    }
}
