// clip-text.h: CLIP's text tower with the two projections, as stored in an mmproj file. Loaded by load.cpp, run by
// clip-text.cpp; the public functions are in qap.h. Prompts are tokenized in Python (pruning/clip_tokenizer.py).
#pragma once

#include "ggml-cpp.h"
#include "ggml.h"
#include "qap-clip-text.h"

#include <mutex>
#include <string>
#include <vector>

struct clip_norm {
    ggml_tensor * weight;
    ggml_tensor * bias;
};

struct clip_linear {
    ggml_tensor * weight;
    ggml_tensor * bias; // null for a projection
};

struct clip_text_layer {
    clip_norm   ln1, ln2;
    clip_linear q, k, v, out, up, down;
};

enum clip_activation { CLIP_QUICK_GELU, CLIP_GELU, CLIP_GELU_TANH };

struct qap_clip_text {
    int32_t         n_layer    = 0;
    int32_t         n_head     = 0;
    int32_t         n_embd     = 0;
    int32_t         n_ff       = 0;
    int32_t         n_ctx      = 0;
    int32_t         n_proj     = 0;
    int32_t         n_vocab    = 0;
    int32_t         n_hidden   = 0; // of the vision tower
    int32_t         pool_id    = 0; // the token whose state is the text's: the first with this id, 2 for the highest id
    float           eps        = 0;
    float           eps_vision = 0;
    clip_activation activation = CLIP_QUICK_GELU;

    ggml_tensor *                token_embd    = nullptr; // [n_vocab, n_embd]
    ggml_tensor *                position_embd = nullptr; // [n_ctx, n_embd]
    std::vector<clip_text_layer> layers;
    clip_norm                    final_ln    = {};
    clip_linear                  text_proj   = {}; // [n_proj, n_embd]
    clip_norm                    post_ln     = {}; // of the vision tower
    clip_linear                  visual_proj = {}; // [n_proj, n_hidden]

    ggml_backend_ptr        backend;
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    std::mutex              mutex; // a backend computes one graph at a time
};

// Reads keys and weights into clip, whose backend is open.
// Throws std::runtime_error with one line for a file that lacks something or contradicts itself.
void clip_text_load(qap_clip_text & clip, const std::string & path);
