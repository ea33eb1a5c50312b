// gate-mmproj.h: shared by the files that check an mmproj.
#pragma once

#include "gate-file.h"

namespace qap_gate {

// hyperparameters of a vision tower, checked one by one
struct tower {
    std::string projector;
    int64_t     n_embd     = 0;
    int64_t     n_ff       = 0; // the widest of the file's blocks
    int64_t     n_head     = 0;
    int64_t     n_head_kv  = 0;
    int64_t     d_head     = 0;
    int64_t     n_layer    = 0;
    int64_t     image_size = 0; // 0: any
    int64_t     patch_size = 0;
    int64_t     n_planes   = 1; // of a token's row, each as wide as the language model's embeddings

    int64_t n_side() const { return image_size / patch_size; }

    int64_t n_patches() const { return n_side() * n_side(); }
};

// Tensors of tower and projector, for the kinds that this project knows; returns the width of a token (of one plane),
// 0 for others.
int64_t check_projector(const file & f, tower & t);

// Bytes that the encoder takes, with one picture of the file's size, pruned as by default (gate-room.cpp). width: of a
// token, 0 if unknown. flash: with flash attention, which takes no room for each pair of patches and head
double needed_bytes(const file & f, const tower & t, int64_t width, bool flash);

// --- what towers have in common (gate-tower.cpp) ---

enum class qkv {
    three,  // attn_q, attn_k, attn_v
    either, // those, or attn_qkv
    one,    // attn_qkv; several heads may share a key
};

struct block_options {
    qkv  form           = qkv::three;
    bool biased         = false; // the graph adds the biases of q, k and v without asking
    bool may_be_swapped = true;  // clip.cpp swaps ffn_up and ffn_down of old files
};

// q, k, v, output and feed-forward of every block. The width of the feed-forward is what the tensors say.
void check_blocks(const file & f, tower & t, const block_options & opts);

// The picture becomes rows by a convolution, with a second filter where two frames are read at once.
void check_filters(const file & f, const tower & t, bool two);
// The class token and the norms in front of the blocks and after them.
void check_ends(const file & f, const tower & t);
// A row for each patch of a picture of the file's size, and one for the class token. exact: no more
void check_table(const file & f, const tower & t, bool exact);
// A square table that is resized to each picture.
void check_square_table(const file & f, const tower & t, bool required);

// How many patches of a side become one token; they must come out even.
int64_t check_merge(const file & f, const tower & t, int64_t low, int64_t fallback);
// Rotary positions turn parts of a head, each in pairs; in `own` graphs all heads together are as wide as a row.
void check_rotary(const file & f, const tower & t, bool own);
// Upstream computes in int32_t how many pixels the most tokens of a picture have.
void check_cell(const file & f, const tower & t, int64_t merge, int64_t most_tokens);

// the number of columns of a product's left side, 0 where the tensor is not there
int64_t n_out(const file & f, const std::string & name);

// --- one function a type: gate-grid.cpp has those that take pictures of any size, gate-newer.cpp the newest ---

int64_t check_qwen2vl(const file & f, tower & t);
int64_t check_qwen3vl(const file & f, tower & t);
int64_t check_glm4v(const file & f, tower & t);
int64_t check_exaone(const file & f, tower & t);
int64_t check_paddleocr(const file & f, tower & t);
int64_t check_kimi(const file & f, tower & t);
int64_t check_hunyuan(const file & f, tower & t);
int64_t check_pixtral(const file & f, tower & t);
int64_t check_lightonocr(const file & f, tower & t);
int64_t check_lfm2(const file & f, tower & t);

int64_t check_gemma4(const file & f, tower & t);
int64_t check_gemma4_unified(const file & f, tower & t);
int64_t check_minicpm(const file & f, tower & t);
int64_t check_granite4(const file & f, tower & t);

} // namespace qap_gate
