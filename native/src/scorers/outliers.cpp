// outliers.cpp: how far a token's outliers reach (method 2). range is the paper's (QAPruner, arXiv 2604.02816); absmax is
// what sets a quantization scale; crest is absmax in units of the token's root mean square, the peak factor of signals.
#include "scorers.h"

#include <cfloat>
#include <cmath>

// max_j x_ij - min_j x_ij; the minimum is taken as -max(-x), for ggml pools maxima only
ggml_tensor * qap_build_outlier_range(ggml_context * ctx, ggml_tensor * x) {
    const int64_t n_embd = x->ne[0];
    ggml_tensor * high   = qap_build_window_max(ctx, x, n_embd);                // [1, n_tokens]
    ggml_tensor * low    = qap_build_window_max(ctx, ggml_neg(ctx, x), n_embd); // minus the minimum
    return ggml_reshape_1d(ctx, ggml_add(ctx, high, low), x->ne[1]);
}

// max_j |x_ij|
ggml_tensor * qap_build_outlier_absmax(ggml_context * ctx, ggml_tensor * x) {
    return ggml_reshape_1d(ctx, qap_build_absmax(ctx, x), x->ne[1]);
}

// max_j |x_ij| / sqrt(mean_j x_ij^2), in [1, sqrt(n_embd)]; 0 for a token of zeros
ggml_tensor * qap_build_outlier_crest(ggml_context * ctx, ggml_tensor * x) {
    ggml_tensor * absmax = qap_build_absmax(ctx, x);
    ggml_tensor * unit   = ggml_clamp(ctx, absmax, FLT_MIN, FLT_MAX);
    ggml_tensor * rms    = ggml_scale(ctx, qap_build_scaled_norm(ctx, x, unit), 1.0f / std::sqrt((float) x->ne[0]));
    ggml_tensor * peak   = ggml_div(ctx, absmax, unit); // 1, or 0 for zeros
    return ggml_reshape_1d(ctx, ggml_div(ctx, peak, ggml_clamp(ctx, rms, FLT_MIN, FLT_MAX)), x->ne[1]);
}
