// semantic-attention.cpp: attention weights computed beside flash attention, which never stores them.
//
// VisionZip and FasterVLM rank patches by the class token's attention: one row of weights, d_head * n_pos * n_head
// multiplications. Encoders without a class token have the attention that a patch receives from all others: a whole
// matrix for each head, taken in blocks of queries so that it is never held as one.
#include "scorers.h"

#include <algorithm>

ggml_tensor * qap_build_attention_row(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, int64_t row, float scale) {
    const int64_t n_pos  = k->ne[1];
    const int64_t n_head = q->ne[2];

    ggml_tensor * q_row = ggml_view_3d(ctx, q, q->ne[0], 1, n_head, q->nb[1], q->nb[2], row * q->nb[1]);
    ggml_tensor * kq    = ggml_mul_mat(ctx, k, q_row); // [n_pos, 1, n_head]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    kq = ggml_soft_max_ext(ctx, kq, nullptr, scale, 0.0f);

    ggml_tensor * sum = qap_build_column_sums(ctx, ggml_reshape_2d(ctx, kq, n_pos, n_head));
    return ggml_scale(ctx, sum, 1.0f / (float) n_head);
}

static const int64_t QUERIES_PER_BLOCK = 256;

ggml_tensor * qap_build_attention_received(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, float scale) {
    const int64_t n_pos  = k->ne[1];
    const int64_t n_head = q->ne[2];
    ggml_tensor * sum    = nullptr; // [n_pos]
    for (int64_t first = 0; first < n_pos; first += QUERIES_PER_BLOCK) {
        const int64_t n_query = std::min(QUERIES_PER_BLOCK, n_pos - first);
        ggml_tensor * block   = ggml_view_3d(ctx, q, q->ne[0], n_query, n_head, q->nb[1], q->nb[2], first * q->nb[1]);
        ggml_tensor * kq      = ggml_mul_mat(ctx, k, block); // [n_pos, n_query, n_head]
        ggml_prec_set_acc(kq, GGML_PREC_F32);
        kq  = ggml_soft_max_ext(ctx, kq, nullptr, scale, 0.0f);
        kq  = qap_build_column_sums(ctx, ggml_reshape_2d(ctx, kq, n_pos, n_query * n_head));
        sum = sum != nullptr ? ggml_add(ctx, sum, kq) : kq;
    }
    return ggml_scale(ctx, sum, 1.0f / (float) (n_pos * n_head));
}
