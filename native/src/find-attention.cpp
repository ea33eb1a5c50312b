// find-attention.cpp: see find-attention.h. Upstream facts (llama.cpp 0c1e570): build_attn() makes either
// flash_attn_ext(q, cast(k), ...) or soft_max(mul_mat(k, q)).
#include "find-attention.h"

#include <cstring>

qap_attention qap_find_last_attention(ggml_cgraph * gf, int64_t n_pos) {
    for (int i = ggml_graph_n_nodes(gf) - 1; i >= 0; i--) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        qap_attention in;
        bool          masked = false;
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            masked = node->src[3] != nullptr;
            in.q   = node->src[0];
            in.k   = node->src[1];
            if (in.k->op == GGML_OP_CPY && in.k->src[0]->type == GGML_TYPE_F32) {
                in.k = in.k->src[0]; // before the cast to f16
            }
        } else if (node->op == GGML_OP_SOFT_MAX && node->src[0]->op == GGML_OP_MUL_MAT) {
            masked = node->src[1] != nullptr;
            in.k   = node->src[0]->src[0];
            in.q   = node->src[0]->src[1];
        } else {
            continue;
        }
        // both operations keep the scale first among their parameters
        std::memcpy(&in.scale, node->op_params, sizeof(float));
        const bool heads = in.q->ne[2] % in.k->ne[2] == 0; // several of them may share a key
        if (in.q->ne[1] == n_pos && in.k->ne[1] == n_pos && heads && in.q->ne[3] == 1) {
            return masked ? qap_attention() : in;
        }
    }
    return {};
}
