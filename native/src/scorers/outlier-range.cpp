// outlier-range.cpp: max_j x_ij - min_j x_ij, the paper's measure of how far a token's outliers reach
// (QAPruner, arXiv 2604.02816). The minimum is taken as -max(-x): ggml pools maxima only.
#include "scorers.h"

ggml_tensor * qap_build_outlier(ggml_context * ctx, ggml_tensor * x, int32_t outlier) {
    GGML_ASSERT(outlier == QAP_OUTLIER_RANGE); // qap_params_check() lets nothing else through
    const int64_t n_embd = x->ne[0];
    ggml_tensor * high   = qap_build_window_max(ctx, x, n_embd);                // [1, n_tokens]
    ggml_tensor * low    = qap_build_window_max(ctx, ggml_neg(ctx, x), n_embd); // minus the minimum
    return ggml_reshape_1d(ctx, ggml_add(ctx, high, low), x->ne[1]);
}
