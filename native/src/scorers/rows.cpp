// rows.cpp: what the scorers share: maxima, sums and norms of rows, scaling of rows, cosines.
//
// Written so that ggml's CPU backend runs it fast; other backends do not mind. Facts of llama.cpp 0c1e570:
// - binary-ops.cpp takes its second operand in runs of ne[0]. A [1, rows] operand is a call for each element, 20 times
//   slower than one with runs of 16. So such operands are first repeated to short runs (qap_build_runs).
// - SUM_ROWS runs on one thread, at 2 ns an element; ADD runs on all threads, in vectors. So long rows are first
//   halved a few times, and columns are added up the same way. This also sums in pairs, which rounds less.
#include "scorers.h"

#include <algorithm>
#include <cfloat>

static const int64_t RUN       = 16; // floats, one AVX-512 register; 8 and 32 were slower
static const int64_t SHORT_ROW = 64; // elements that SUM_ROWS may add

ggml_tensor * qap_build_window_max(ggml_context * ctx, ggml_tensor * x, int64_t width) {
    return ggml_pool_1d(ctx, x, GGML_OP_POOL_MAX, (int) width, (int) width, 0);
}

ggml_tensor * qap_build_absmax(ggml_context * ctx, ggml_tensor * x) {
    return qap_build_window_max(ctx, ggml_abs(ctx, x), x->ne[0]);
}

ggml_tensor * qap_build_runs(ggml_context * ctx, ggml_tensor * v, int64_t width) {
    int64_t run = std::min(RUN, width);
    while (width % run != 0) {
        run--;
    }
    return run > 1 ? ggml_repeat_4d(ctx, v, run, v->ne[1], 1, 1) : v;
}

// sum_j x_ij. x: [n, rows] -> [1, rows]
static ggml_tensor * build_row_sums(ggml_context * ctx, ggml_tensor * x) {
    while (x->ne[0] > SHORT_ROW && x->ne[0] % 2 == 0) {
        const int64_t half  = x->ne[0] / 2;
        ggml_tensor * left  = ggml_view_2d(ctx, x, half, x->ne[1], x->nb[1], 0);
        ggml_tensor * right = ggml_view_2d(ctx, x, half, x->ne[1], x->nb[1], half * x->nb[0]);
        x                   = ggml_add(ctx, left, right);
    }
    return ggml_sum_rows(ctx, x);
}

ggml_tensor * qap_build_column_sums(ggml_context * ctx, ggml_tensor * x) {
    const int64_t n    = x->ne[0];
    const int64_t goal = x->ne[1] / 32; // five times: few nodes, and a 32nd is left for SUM_ROWS
    while (x->ne[1] % 2 == 0 && x->ne[1] > goal) {
        const int64_t half = x->ne[1] / 2;
        ggml_tensor * low  = ggml_view_2d(ctx, x, n, half, x->nb[1], 0);
        ggml_tensor * high = ggml_view_2d(ctx, x, n, half, x->nb[1], half * x->nb[1]);
        x                  = ggml_add(ctx, low, high);
    }
    if (x->ne[1] > 1) { // turn columns into rows
        x = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, x)));
    }
    return ggml_reshape_1d(ctx, x, n);
}

// || x_i ||_2, without care for the range of float. x: [n, rows] -> [1, rows]
static ggml_tensor * build_norm(ggml_context * ctx, ggml_tensor * x) {
    return ggml_sqrt(ctx, build_row_sums(ctx, ggml_sqr(ctx, x)));
}

ggml_tensor * qap_build_scaled_norm(ggml_context * ctx, ggml_tensor * x, ggml_tensor * unit) {
    return build_norm(ctx, ggml_div(ctx, x, qap_build_runs(ctx, unit, x->ne[0])));
}

ggml_tensor * qap_build_unit_rows(ggml_context * ctx, ggml_tensor * x) {
    const int64_t n_embd = x->ne[0];
    ggml_tensor * unit   = ggml_clamp(ctx, qap_build_absmax(ctx, x), FLT_MIN, FLT_MAX);
    ggml_tensor * scaled = ggml_div(ctx, x, qap_build_runs(ctx, unit, n_embd));
    ggml_tensor * norm   = ggml_clamp(ctx, build_norm(ctx, scaled), FLT_MIN, FLT_MAX);
    return ggml_div(ctx, scaled, qap_build_runs(ctx, norm, n_embd));
}

ggml_tensor * qap_build_products(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * some) {
    ggml_tensor * cosines = ggml_mul_mat(ctx, rows, some);
    ggml_prec_set_acc(cosines, GGML_PREC_F32);
    return cosines;
}

ggml_tensor * qap_build_cosines(ggml_context * ctx, ggml_tensor * x) {
    ggml_tensor * rows = qap_build_unit_rows(ctx, x);
    return qap_build_products(ctx, rows, rows);
}
