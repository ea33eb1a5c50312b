// find-attention.h: a layer's self-attention, found in the graph that upstream built.
#pragma once

#include "ggml.h"

#include <cstdint>

// q and k of one self-attention, [d_head, n_pos, n_head] each; null where none was found
struct qap_attention {
    ggml_tensor * q     = nullptr;
    ggml_tensor * k     = nullptr;
    float         scale = 1.0f;
};

// The last self-attention over n_pos positions: that of the layer that was built last. None if it has a mask (windows):
// its weights are not those of a plain softmax.
qap_attention qap_find_last_attention(ggml_cgraph * gf, int64_t n_pos);
