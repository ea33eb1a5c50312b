// error-int.cpp: error of symmetric b-bit integer quantization in groups of channels, b = 2..8, plain and weighted.
//
// Source: QAPruner (arXiv 2604.02816), G = 128, scale = absmax / 7 for 4 bits:
//   s = max|x_g| / L,  L = 2^(b-1) - 1,  q = round(x / (s + 1e-8)),  Q(x) = s q,  E = || x - Q(x) ||_2
// Two deviations that change no result beyond rounding: the last, shorter group is filled with zeros (they
// move neither the maximum nor the error), and the error is divided by the token's largest |x| before it is
// squared and multiplied back after the root, so that neither 1e-30 nor 1e30 leaves the range of float.
// The weighted norm multiplies each channel's error by the root of its weight; ours, see docs/method.md.
#include "scorers.h"

#include <algorithm>
#include <cfloat>

static const float EPS = 1e-8f; // of the paper's division

// Zeros up to n numbers in a row.
static ggml_tensor * fill(ggml_context * ctx, ggml_tensor * x, int64_t n) {
    return x->ne[0] < n ? ggml_pad(ctx, x, (int) (n - x->ne[0]), 0, 0, 0) : x;
}

static ggml_tensor * build(ggml_context * ctx, ggml_tensor * x, int32_t bits, int32_t group_size, ggml_tensor * roots) {
    const int64_t n_tokens = x->ne[1];
    const int64_t group    = std::min<int64_t>(group_size, x->ne[0]);
    const int64_t n_groups = (x->ne[0] + group - 1) / group;
    const float   levels   = (float) ((1 << (bits - 1)) - 1);

    ggml_tensor * xg     = ggml_reshape_2d(ctx, fill(ctx, x, n_groups * group), group, n_groups * n_tokens);
    ggml_tensor * absmax = qap_build_window_max(ctx, ggml_abs(ctx, xg), group); // [1, n_groups * n_tokens]
    ggml_tensor * scale  = ggml_scale(ctx, absmax, 1.0f / levels);

    // round(v) is taken as floor(v + 1/2), which the CPU runs in vectors; halves lie equally far from both neighbours
    ggml_tensor * runs = qap_build_runs(ctx, scale, group);
    ggml_tensor * q    = ggml_div(ctx, xg, ggml_scale_bias(ctx, runs, 1.0f, EPS));
    q                  = ggml_floor(ctx, ggml_scale_bias(ctx, q, 1.0f, 0.5f));
    ggml_tensor * err  = ggml_sub(ctx, xg, ggml_mul(ctx, q, runs)); // [group, n_groups * n_tokens]

    // unit: the token's largest |x|, never zero
    ggml_tensor * unit = qap_build_window_max(ctx, ggml_reshape_2d(ctx, absmax, n_groups, n_tokens), n_groups);
    unit               = ggml_clamp(ctx, unit, FLT_MIN, FLT_MAX); // [1, n_tokens]

    err = ggml_reshape_2d(ctx, err, n_groups * group, n_tokens);
    if (roots != nullptr) {
        err = ggml_mul(ctx, err, fill(ctx, roots, n_groups * group)); // bit-equal for ones
    }
    ggml_tensor * norm = qap_build_scaled_norm(ctx, err, unit); // [1, n_tokens]
    return ggml_reshape_1d(ctx, ggml_mul(ctx, norm, unit), n_tokens);
}

ggml_tensor * qap_build_error_int(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how) {
    return build(ctx, x, how.error, how.group_size, nullptr);
}

ggml_tensor * qap_build_error_model(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how) {
    return build(ctx, x, QAP_ERROR_INT4, how.group_size, how.roots);
}
