// gate-tower.cpp: what the checks of projector types share (gate-projectors.cpp, gate-grid.cpp, gate-newer.cpp). Shapes are written as
// ggml's: the row length first. Facts: load_tensors() and build_vit() in tools/mtmd/clip.cpp (llama.cpp 0c1e570).
#include "gate-mmproj.h"

#include <algorithm>
#include <cmath>

namespace qap_gate {

static std::string block(int64_t i, const char * name) {
    return "v.blk." + std::to_string(i) + "." + name;
}

static void check_attention(const file & f, const tower & t, const block_options & opts, int64_t i) {
    const int64_t n = t.n_embd, n_q = t.n_head * t.d_head, n_kv = t.n_head_kv * t.d_head;
    const bool    found = f.find(block(i, "attn_qkv.weight")) != nullptr;
    const bool    fused = opts.form == qkv::one || (opts.form == qkv::either && found);
    if (fused) {
        if (opts.form == qkv::either && n_kv != n_q) {
            f.refuse("expected as many key heads as heads beside attn_qkv, got " + std::to_string(t.n_head_kv));
        }
        f.linear(block(i, "attn_qkv"), n, n_q + 2 * n_kv, true, opts.biased);
    } else if (found) {
        f.refuse("expected attn_q, attn_k and attn_v in block " + std::to_string(i) + ", got attn_qkv");
    } else {
        f.linear(block(i, "attn_q"), n, n_q, true, opts.biased);
        f.linear(block(i, "attn_k"), n, n_kv, true, opts.biased);
        f.linear(block(i, "attn_v"), n, n_kv, true, opts.biased);
    }
    f.linear(block(i, "attn_out"), n_q, n, true);
    const ggml_tensor * q_norm = f.find(block(i, "attn_q_norm.weight"));
    const int64_t       n_norm = fused || (q_norm != nullptr && q_norm->ne[0] == t.d_head) ? t.d_head : n_q;
    f.tensor(block(i, "attn_q_norm.weight"), { n_norm }, use::vector, false);
    f.tensor(block(i, "attn_k_norm.weight"), { n_norm == n_q ? n_kv : n_norm }, use::vector, q_norm != nullptr);
}

void check_blocks(const file & f, tower & t, const block_options & opts) {
    if (t.n_head < 1 || t.n_head_kv < 1 || t.n_layer < 1) {
        f.refuse("expected at least one block with one head, got none");
    }
    const int64_t n = t.n_embd;
    for (int64_t i = 0; i < t.n_layer; i++) {
        for (const char * name : { "ffn_gate_exps.weight", "attn_sinks" }) {
            if (f.find(block(i, name)) != nullptr) { // graphs of other types, which need more tensors
                f.refuse("expected no " + std::string(name) + " in block " + std::to_string(i) + ", got one");
            }
        }
        const std::string stacked = "v.deepstack." + std::to_string(i) + ".fc1.weight";
        if (t.projector != "qwen3vl_merger" && f.find(stacked) != nullptr) {
            f.refuse("expected no " + stacked + " beside the projector " + t.projector + ", got one");
        }
        check_attention(f, t, opts, i);
        f.norm(block(i, "ln1"), n, false);
        f.norm(block(i, "ln2"), n, false);
        for (const char * name : { "ls1.weight", "ls2.weight", "out_scale.weight", "attn_post_norm.weight",
                                   "attn_post_norm.bias", "ffn_post_norm.weight" }) {
            f.tensor(block(i, name), { n }, use::vector, false);
        }

        const ggml_tensor * up   = f.find(block(i, "ffn_up.weight"));
        const ggml_tensor * down = f.find(block(i, "ffn_down.weight"));
        if (up == nullptr || down == nullptr) {
            f.refuse("expected ffn_up and ffn_down in block " + std::to_string(i) + ", found none");
        }
        const bool    swapped = opts.may_be_swapped && down->ne[0] == n;
        const int64_t n_ff    = swapped ? down->ne[1] : up->ne[1];
        f.linear(block(i, swapped ? "ffn_down" : "ffn_up"), n, n_ff, true);
        f.linear(block(i, swapped ? "ffn_up" : "ffn_down"), n_ff, n, true);
        f.linear(block(i, "ffn_gate"), n, n_ff, false);
        t.n_ff = std::max(t.n_ff, n_ff);
    }
}

void check_filters(const file & f, const tower & t, bool two) {
    const int64_t p = t.patch_size;
    f.tensor("v.patch_embd.weight", { p, p, 3, t.n_embd }, use::filter);
    if (two) {
        f.tensor("v.patch_embd.weight.1", { p, p, 3, t.n_embd }, use::filter);
    }
    f.tensor("v.patch_embd.bias", { t.n_embd }, use::vector, false);
}

void check_ends(const file & f, const tower & t) {
    f.tensor("v.class_embd", { t.n_embd }, use::vector, false);
    f.norm("v.pre_ln", t.n_embd, false);
    f.norm("v.post_ln", t.n_embd, false);
}

void check_table(const file & f, const tower & t, bool exact) {
    if (t.n_patches() < 1) {
        f.refuse("expected an image size of at least one patch, got " + std::to_string(t.image_size));
    }
    const int64_t       n_rows = t.n_patches() + (f.find("v.class_embd") != nullptr ? 1 : 0);
    const ggml_tensor * table  = f.find("v.position_embd.weight");
    const int64_t       found  = table != nullptr ? table->ne[1] : 0;
    if (table != nullptr && (exact ? found != n_rows : found < n_rows)) {
        f.refuse(
            "expected " + std::to_string(n_rows) + " positions for a picture of " + std::to_string(t.image_size) +
            " pixels, got " + std::to_string(found));
    }
    f.tensor("v.position_embd.weight", { t.n_embd, found }, exact ? use::vector : use::matrix);
}

void check_square_table(const file & f, const tower & t, bool required) {
    const ggml_tensor * table = f.find("v.position_embd.weight");
    const int64_t       found = table != nullptr ? table->ne[1] : 0;
    f.tensor("v.position_embd.weight", { t.n_embd, found }, use::vector, required);
    const auto side = (int64_t) std::lround(std::sqrt((double) found));
    if (side * side != found) {
        f.refuse("expected a square number of positions, got " + std::to_string(found));
    }
}

int64_t check_merge(const file & f, const tower & t, int64_t low, int64_t fallback) {
    const int64_t merge = f.whole("clip.vision.projector.scale_factor", low, 64, fallback);
    if (t.n_side() % merge != 0) {
        f.refuse(
            "expected " + std::to_string(t.n_side()) + " patches of a side to be merged evenly, got groups of " +
            std::to_string(merge));
    }
    return merge;
}

void check_rotary(const file & f, const tower & t, bool own) {
    if (t.d_head < 4 || t.d_head % 4 != 0) {
        f.refuse("expected heads of a multiple of 4 numbers, got a length of " + std::to_string(t.d_head));
    }
    if (own && t.n_head * t.d_head != t.n_embd) {
        f.refuse(
            "expected heads of " + std::to_string(t.n_embd) + " numbers together, got " +
            std::to_string(t.n_head * t.d_head));
    }
}

void check_cell(const file & f, const tower & t, int64_t merge, int64_t most_tokens) {
    const int64_t side = t.patch_size * merge;
    if (most_tokens * side * side > INT32_MAX) {
        f.refuse(
            "expected tokens of which " + std::to_string(most_tokens) +
            " have at most 2147483647 pixels, got a side of " + std::to_string(side));
    }
}

int64_t n_out(const file & f, const std::string & name) {
    const ggml_tensor * t = f.find(name);
    return t != nullptr ? t->ne[1] : 0;
}

} // namespace qap_gate
