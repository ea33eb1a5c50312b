// gate-newer.cpp: the tensors of Gemma 4, MiniCPM-V 4.6 and Granite 4 vision, one function a projector type. Facts:
// load_hparams() and load_tensors() in tools/mtmd/clip.cpp, tools/mtmd/models/*.cpp and mtmd-image.cpp (llama.cpp
// 0c1e570).
#include "gate-mmproj.h"

namespace qap_gate {

static const int64_t GEMMA_TOKENS = 1120;  // the most of a picture, which may all lie in one line
static const int64_t PLACES       = 70;    // of a side of MiniCPM's table, whatever the picture's size
static const int64_t HEAD         = 64;    // numbers of a head of Granite's projectors
static const int64_t MAX_SIDE     = 46000; // clip_image_size::area() asserts it

static void check_equal_heads(const file & f, const tower & t) {
    if (t.n_head_kv != t.n_head) {
        f.refuse("expected as many key heads as heads, got " + std::to_string(t.n_head_kv));
    }
}

// Two tables, one of columns and one of lines, from which rows are looked up.
static void check_two_tables(const file & f, const tower & t, int64_t least) {
    const ggml_tensor * table = f.find("v.position_embd.weight");
    const int64_t       found = table != nullptr ? table->ne[1] : 0;
    f.tensor("v.position_embd.weight", { t.n_embd, found, 2 }, use::matrix);
    if (found < least) {
        f.refuse("expected at least " + std::to_string(least) + " positions of a side, got " + std::to_string(found));
    }
}

static int64_t check_projection(const file & f, const tower & t) {
    const int64_t n = n_out(f, "mm.input_projection.weight");
    f.tensor("mm.input_projection.weight", { t.n_embd, n }, use::matrix);
    return n;
}

// Gemma 4: a tower with tables and rotary positions, then groups are averaged.
int64_t check_gemma4(const file & f, tower & t) {
    const int64_t merge = f.whole("clip.vision.projector.scale_factor", 1, 64, 3);
    check_cell(f, t, merge, GEMMA_TOKENS);
    check_filters(f, t, false);
    check_ends(f, t);
    check_two_tables(f, t, merge * GEMMA_TOKENS);
    check_rotary(f, t, false);
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    const bool standard = f.find("v.std_bias") != nullptr && f.find("v.std_scale") != nullptr;
    for (const char * name : { "v.std_bias", "v.std_scale" }) {
        f.tensor(name, { t.n_embd }, use::vector, standard);
    }
    return check_projection(f, t);
}

// Gemma 4 12B: no blocks; the pixels of a token are one row, which is multiplied.
int64_t check_gemma4_unified(const file & f, tower & t) {
    const int64_t merge = f.whole("clip.vision.projector.scale_factor", 1, 64, 3);
    const int64_t side = t.patch_size * merge, n_pixels = 3 * side * side;
    check_cell(f, t, merge, GEMMA_TOKENS);
    f.linear("v.patch_embd", n_pixels, t.n_embd, true, true);
    f.norm("v.patch_norm.1", n_pixels, true, true);
    f.norm("v.patch_norm.2", t.n_embd, true, true);
    f.norm("v.patch_norm.3", t.n_embd, true, true);
    check_two_tables(f, t, GEMMA_TOKENS);
    return check_projection(f, t);
}

// What merges MiniCPM's patches two by two between two blocks: attention in windows, then two products.
static void check_vit_merger(const file & f, const tower & t) {
    const std::string part = "v.vit_merger.";
    const int64_t     n = t.n_embd, n_q = t.n_head * t.d_head, n_mid = n_out(f, part + "ds_ffn_up.weight");
    f.norm(part + "ln1", n, true, true);
    for (const char * name : { "attn_q", "attn_k", "attn_v" }) {
        f.linear(part + name, n, n_q, true);
    }
    f.linear(part + "attn_out", n_q, n, true);
    f.norm(part + "ds_ln", 4 * n, true, true);
    f.linear(part + "ds_ffn_up", 4 * n, n_mid, true);
    f.linear(part + "ds_ffn_down", n_mid, n, true);
}

// MiniCPM-V 4.6: a table of 70 x 70 places; the mode "4x" (a scale factor of 2) has no merger between the blocks.
int64_t check_minicpm(const file & f, tower & t) {
    const int64_t merge = f.whole("clip.vision.projector.scale_factor", 2, 4, 4);
    if (merge == 3) {
        f.refuse("expected clip.vision.projector.scale_factor 2 or 4, got 3");
    }
    if (t.n_side() < merge || t.n_side() > PLACES) { // of a slice; positions of larger ones would repeat
        f.refuse(
            "expected slices of " + std::to_string(merge) + ".." + std::to_string(PLACES) + " patches a side, got " +
            std::to_string(t.n_side()));
    }
    check_filters(f, t, false);
    check_ends(f, t);
    const ggml_tensor * table = f.find("v.position_embd.weight");
    const int64_t       found = table != nullptr ? table->ne[1] : 0;
    f.tensor("v.position_embd.weight", { t.n_embd, found }, use::matrix);
    if (found < PLACES * PLACES) {
        f.refuse("expected " + std::to_string(PLACES * PLACES) + " positions, got " + std::to_string(found));
    }
    check_equal_heads(f, t);
    check_blocks(f, t, { qkv::three });
    if (merge == 4) {
        check_vit_merger(f, t);
    }
    const int64_t n_mid = n_out(f, "mm.up.weight"), n = n_out(f, "mm.down.weight");
    f.norm("mm.input_norm", 4 * t.n_embd, true);
    f.linear("mm.up", 4 * t.n_embd, n_mid, true);
    f.linear("mm.down", n_mid, n, true);
    return n;
}

// One of Granite's projectors: queries of a window read its patches.
static void check_window_projector(const file & f, const tower & t, size_t i, int64_t window, int64_t query) {
    const std::string part = "v.proj_blk." + std::to_string(i) + ".";
    const int64_t     n = t.n_embd, n_mid = n_out(f, part + "ffn_up.weight");
    f.tensor(part + "img_pos", { n, window * window }, use::vector);
    f.tensor(part + "query", { n, query * query }, use::vector);
    for (const char * name : { "norm", "post_norm", "self_attn_norm", "cross_attn_norm", "ffn_norm" }) {
        f.norm(part + name, n, true, true);
    }
    for (const char * attention : { "self_attn_", "cross_attn_" }) {
        for (const char * name : { "q", "k", "v", "out" }) {
            f.linear(part + attention + name, n, n, true, true);
        }
    }
    f.linear(part + "ffn_up", n, n_mid, true, true);
    f.linear(part + "ffn_down", n_mid, n, true, true);
    f.linear(part + "linear", n, f.whole("clip.vision.projection_dim", 1, INT32_MAX), true, true);
}

// Overview and tiles are stacked on one side, which libmtmd bounds.
static void check_grid_points(const file & f, const tower & t) {
    const std::string key = "clip.vision.image_grid_pinpoints"; // i32 above 0 (gate-mmproj.cpp)
    const size_t      n   = f.has(key) ? f.length(key) : 0;
    if (n == 0 || n % 2 != 0) {
        f.refuse("expected pairs of numbers as " + key + ", got " + std::to_string(n) + " numbers");
    }
    const auto * sides = static_cast<const int32_t *>(f.data(key));
    for (size_t i = 0; i < n; i += 2) {
        const int64_t x = sides[i] / t.image_size, y = sides[i + 1] / t.image_size;
        if (sides[i] % t.image_size != 0 || sides[i + 1] % t.image_size != 0) {
            f.refuse(
                "expected " + key + " of whole tiles of " + std::to_string(t.image_size) + " pixels, got " +
                std::to_string(sides[i]) + " x " + std::to_string(sides[i + 1]));
        }
        if ((1 + x * y) * t.image_size > MAX_SIDE) {
            f.refuse(
                "expected tiles of " + std::to_string(MAX_SIDE) + " pixels one after another, got " +
                std::to_string((1 + x * y) * t.image_size));
        }
    }
}

// Granite 4 vision: several projectors, each on the output of one block; their results stand side by side in a row.
int64_t check_granite4(const file & f, tower & t) {
    const std::string v = "clip.vision.";
    check_filters(f, t, false);
    check_ends(f, t);
    if (f.find("v.class_embd") != nullptr) {
        f.refuse("expected no v.class_embd, got one");
    }
    f.tensor("v.position_embd.weight", { t.n_embd, t.n_patches() }, use::vector);
    check_equal_heads(f, t);
    check_blocks(f, t, { qkv::three, /* biased */ false, /* may_be_swapped */ false });
    if (t.n_embd % HEAD != 0) {
        f.refuse("expected an embedding length of whole heads of 64 numbers, got " + std::to_string(t.n_embd));
    }

    const std::string layer_key = v + "feature_layer", offset_key = v + "projector.spatial_offsets";
    const size_t      n_projectors = f.has(layer_key) ? f.length(layer_key) : 0;
    const size_t      n_offsets    = f.has(offset_key) ? f.length(offset_key) : 0;
    if (n_projectors == 0 || n_projectors != n_offsets) {
        f.refuse(
            "expected as many numbers as " + layer_key + " and as " + offset_key + ", got " +
            std::to_string(n_projectors) + " and " + std::to_string(n_offsets));
    }
    const int64_t window = f.whole(v + "projector.window_side", 1, 1024);
    const int64_t query  = f.whole(v + "projector.query_side", 1, 1024);
    if (t.n_side() < 1 || t.n_side() % window != 0 || window % query != 0) {
        f.refuse(
            "expected windows that divide " + std::to_string(t.n_side()) + " patches of a side, and queries that " +
            "divide windows, got " + std::to_string(window) + " and " + std::to_string(query));
    }
    const auto * layers  = static_cast<const int32_t *>(f.data(layer_key));
    const auto * offsets = static_cast<const int32_t *>(f.data(offset_key));
    for (size_t i = 0; i < n_projectors; i++) {
        if (layers[i] < 0 || layers[i] >= t.n_layer) {
            f.refuse(
                "expected " + layer_key + " in 0.." + std::to_string(t.n_layer - 1) + ", got " +
                std::to_string(layers[i]));
        }
        if (offsets[i] >= 0 && window != 2 * query) { // it takes every second patch
            f.refuse("expected windows of two queries a side beside " + offset_key + ", got " + std::to_string(window));
        }
        check_window_projector(f, t, i, window, query);
    }
    const int64_t width = f.whole(v + "projection_dim", 1, INT32_MAX);
    f.tensor("v.image_newline", { width }, use::vector);
    check_grid_points(f, t);
    t.n_planes = (int64_t) n_projectors;
    return width;
}

} // namespace qap_gate
