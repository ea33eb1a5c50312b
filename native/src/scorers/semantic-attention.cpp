// semantic-attention.cpp: the attention row of one query, computed beside flash attention.
//
// VisionZip and FasterVLM rank patches by the class token's attention. Flash attention never stores the
// weights, but one row of them is d_head * n_pos * n_head multiplications: far below a thousandth of a layer.
#include "scorers.h"

ggml_tensor * qap_build_attention_row(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int64_t row, float scale) {
    const int64_t n_pos  = k->ne[1];
    const int64_t n_head = q->ne[2];

    ggml_tensor * q_row = ggml_view_3d(ctx, q, q->ne[0], 1, n_head, q->nb[1], q->nb[2], row * q->nb[1]);
    ggml_tensor * kq    = ggml_mul_mat(ctx, k, q_row); // [n_pos, 1, n_head]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    kq = ggml_soft_max_ext(ctx, kq, nullptr, scale, 0.0f);

    // mean over heads: turn [n_pos, n_head] so that heads lie in rows, then sum them
    ggml_tensor * heads = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, kq, n_pos, n_head)));
    ggml_tensor * mean  = ggml_scale(ctx, ggml_sum_rows(ctx, heads), 1.0f / (float) n_head); // [1, n_pos]
    return ggml_reshape_1d(ctx, mean, n_pos);
}
