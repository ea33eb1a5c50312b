// gate-grid.cpp: the tensors of projector types that take pictures of any size, one function a type; and the numbers by
// which such pictures come to their size. Facts: load_hparams() and load_tensors() in tools/mtmd/clip.cpp,
// tools/mtmd/models/*.cpp and mtmd-image.cpp (llama.cpp 0c1e570).
#include "gate-mmproj.h"

namespace qap_gate {

static const int64_t MAX_EDGE = 1 << 15; // with a token more, less than what clip_image_size::area() asserts
static const int64_t WINDOW = 112; // pixels of a side of a window; clip.cpp steps from one to the next in whole tokens

// Keys that must be there, where the picture's limits come from the file. libmtmd asserts that both are above 0.
static void check_limits(const file & f, bool required) {
    for (const char * key : { "clip.vision.image_min_pixels", "clip.vision.image_max_pixels" }) {
        f.whole(key, 1, INT32_MAX, required ? -1 : 1);
    }
}

// Towers that read a picture as two equal frames and merge 2 x 2 patches that stand one after another.
static void check_frames(const file & f, const tower & t, int64_t most_tokens) {
    f.whole("clip.vision.spatial_merge_size", 2, 2, 2);
    check_cell(f, t, 2, most_tokens);
    check_filters(f, t, true);
    check_ends(f, t);
    if (f.find("v.class_embd") != nullptr) {
        f.refuse("expected no v.class_embd, got one");
    }
}

static void check_bias(const file & f, bool there) {
    if ((f.find("v.patch_embd.bias") != nullptr) != there) {
        f.refuse(there ? "expected v.patch_embd.bias, found none" : "expected no v.patch_embd.bias, got one");
    }
}

static void check_windows(const file & f, const tower & t, int64_t low, int64_t fallback, int64_t width) {
    if (f.whole("clip.vision.n_wa_pattern", low, 1024, fallback) == 0) {
        return;
    }
    if (2 * t.patch_size > WINDOW) {
        f.refuse("expected windows of 112 pixels to hold a token, got patches of " + std::to_string(t.patch_size));
    }
    if (f.whole("clip.vision.projection_dim", 1, INT32_MAX) != width) {
        f.refuse("expected mm.2 to give clip.vision.projection_dim numbers, got " + std::to_string(width));
    }
}

// Two products, with gelu between; what goes in is the patches of a token.
static int64_t check_mlp(const file & f, int64_t n_in, const char * first, const char * second, bool biased) {
    const int64_t n_mid = n_out(f, std::string(first) + ".weight"), n = n_out(f, std::string(second) + ".weight");
    f.linear(first, n_in, n_mid, true, biased);
    f.linear(second, n_mid, n, true, biased);
    return n;
}

// Qwen2-VL and Qwen2.5-VL: rotary positions in four parts.
int64_t check_qwen2vl(const file & f, tower & t) {
    check_frames(f, t, 4096);
    check_bias(f, false);
    if (t.n_head_kv != t.n_head) {
        f.refuse("expected as many key heads as heads, got " + std::to_string(t.n_head_kv));
    }
    check_rotary(f, t, false);
    check_blocks(f, t, { qkv::three, /* biased */ true });
    const int64_t n    = check_mlp(f, 4 * t.n_embd, "mm.0", "mm.2", true);
    const bool    must = t.projector == "qwen2.5vl_merger";
    check_windows(f, t, must ? 1 : 0, must ? -1 : 0, n);
    return n;
}

// Qwen3-VL: a table of positions beside the rotary ones; after some blocks, rows for later layers (DeepStack).
int64_t check_qwen3vl(const file & f, tower & t) {
    check_frames(f, t, 4096);
    check_bias(f, true);
    check_square_table(f, t, true);
    if (t.n_head_kv != t.n_head) {
        f.refuse("expected as many key heads as heads, got " + std::to_string(t.n_head_kv));
    }
    check_rotary(f, t, true);
    check_blocks(f, t, { qkv::one, /* biased */ true, /* may_be_swapped */ false });
    const int64_t n = check_mlp(f, 4 * t.n_embd, "mm.0", "mm.2", true);
    for (int64_t i = 0; i < t.n_layer; i++) {
        const std::string stack = "v.deepstack." + std::to_string(i) + ".";
        const int64_t     n_mid = n_out(f, stack + "fc1.weight");
        if (n_mid == 0) {
            continue; // the others of its tensors are not used then
        }
        f.norm(stack + "norm", 4 * t.n_embd, false);
        f.linear(stack + "fc1", 4 * t.n_embd, n_mid, true);
        f.linear(stack + "fc2", n_mid, n, true);
        t.n_planes++;
    }
    return n;
}

// GLM-4V and GLM-OCR: norms without a mean, a convolution that merges, and a gated feed-forward after it.
int64_t check_glm4v(const file & f, tower & t) {
    check_frames(f, t, 4096);
    check_bias(f, true);
    f.norm("v.norm_embd", t.n_embd, false);
    check_square_table(f, t, false);
    check_rotary(f, t, false);
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    const ggml_tensor * merger = f.find("mm.patch_merger.weight");
    const int64_t       n_mid = merger != nullptr ? merger->ne[3] : 0, n_fc = n_out(f, "mm.model.fc.weight");
    f.tensor("mm.patch_merger.weight", { 2, 2, t.n_embd, n_mid }, use::filter);
    f.tensor("mm.patch_merger.bias", { n_mid }, use::vector);
    f.tensor("mm.model.fc.weight", { n_mid, n_fc }, use::matrix);
    f.norm("mm.post_norm", n_fc, true);
    const int64_t n_ff = n_out(f, "mm.up.weight"), n = n_out(f, "mm.down.weight");
    f.linear("mm.up", n_fc, n_ff, true);
    f.linear("mm.gate", n_fc, n_ff, true);
    f.linear("mm.down", n_ff, n, true);
    return n;
}

// EXAONE 4.5: Qwen2.5-VL with attn_qkv, in which several heads share a key.
int64_t check_exaone(const file & f, tower & t) {
    check_frames(f, t, 46 * 46); // of the picture that libmtmd lays its buffers out for
    check_bias(f, false);
    check_limits(f, true);
    f.whole("clip.vision.attention.head_count_kv", 1, 4096);
    check_rotary(f, t, true);
    check_blocks(f, t, { qkv::one });
    const int64_t n = check_mlp(f, 4 * t.n_embd, "mm.0", "mm.2", true);
    check_windows(f, t, 0, 0, n);
    return n;
}

// A tower with a table that is resized, whose patches are normed one by one, put side by side and multiplied twice.
static int64_t check_normed(const file & f, tower & t, int64_t merge) {
    check_filters(f, t, false);
    check_ends(f, t);
    check_rotary(f, t, false);
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    f.norm("mm.input_norm", t.n_embd, true, true);
    return check_mlp(f, t.n_embd * merge * merge, "mm.1", "mm.2", true);
}

int64_t check_paddleocr(const file & f, tower & t) {
    check_square_table(f, t, true);
    check_limits(f, true);
    check_cell(f, t, 2, 28 * 28); // as in check_exaone
    return check_normed(f, t, 2);
}

// Kimi-VL; Kimi-K2.5 has a table with two sides.
int64_t check_kimi(const file & f, tower & t) {
    const int64_t merge = f.whole("clip.vision.projector.scale_factor", 2, 64);
    if (t.projector == "kimivl") {
        check_square_table(f, t, true);
        check_cell(f, t, merge, 1024);
        return check_normed(f, t, merge);
    }
    const ggml_tensor * table = f.find("v.position_embd.weight");
    const int64_t       x = table != nullptr ? table->ne[1] : 1, y = table != nullptr ? table->ne[2] : 1;
    f.tensor("v.position_embd.weight", { t.n_embd, x, y }, use::vector);
    check_cell(f, t, merge, 4096);
    const std::string v   = "clip.vision.";
    const int64_t     low = f.whole(v + "image_min_pixels", 0, INT32_MAX, 0);
    const int64_t     max = f.whole(v + "image_max_pixels", 0, INT32_MAX, 0), side = t.patch_size * merge;
    if (low > 0 && max > 0 && max < side * side) { // libmtmd lays its buffers out for a picture of that many
        f.refuse("expected image_max_pixels of at least one token, got " + std::to_string(max));
    }
    return check_normed(f, t, merge);
}

// HunyuanVL: two convolutions, the first of which merges; rows before the first line, after each and after the last.
int64_t check_hunyuan(const file & f, tower & t) {
    check_filters(f, t, false);
    check_ends(f, t);
    check_square_table(f, t, true);
    check_limits(f, false);
    f.whole("clip.vision.spatial_merge_size", 2, 2, 2);
    check_cell(f, t, 2, 16384);
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    const ggml_tensor * first  = f.find("mm.0.weight");
    const ggml_tensor * second = f.find("mm.2.weight");
    const int64_t       n_mid = first != nullptr ? first->ne[3] : 0, n_row = second != nullptr ? second->ne[3] : 0;
    const int64_t       n = n_out(f, "mm.model.fc.weight");
    f.tensor("mm.pre_norm.weight", { t.n_embd }, use::vector);
    f.tensor("mm.0.weight", { 2, 2, t.n_embd, n_mid }, use::filter);
    f.tensor("mm.0.bias", { n_mid }, use::vector);
    f.tensor("mm.2.weight", { 1, 1, n_mid, n_row }, use::filter);
    f.tensor("mm.2.bias", { n_row }, use::vector);
    f.tensor("v.image_newline", { n_row }, use::vector);
    f.linear("mm.model.fc", n_row, n, true, true);
    for (const char * name : { "mm.image_begin", "mm.image_end", "mm.post_norm.weight" }) {
        f.tensor(name, { n }, use::vector);
    }
    return n;
}

// Pixtral's tower has no table; Mistral 3 and LightOnOCR (mm.patch_merger) merge. most_tokens: of upstream's limit
static int64_t check_edged(const file & f, tower & t, int64_t most_tokens) {
    const bool    merges = f.find("mm.patch_merger.weight") != nullptr;
    const int64_t merge  = f.whole("clip.vision.spatial_merge_size", 1, merges ? 64 : 1, 1);
    check_cell(f, t, merge, most_tokens);
    check_filters(f, t, false);
    check_ends(f, t);
    check_rotary(f, t, false);
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    int64_t n_in = t.n_embd;
    if (merges) {
        n_in = n_out(f, "mm.patch_merger.weight");
        f.tensor("mm.input_norm.weight", { t.n_embd }, use::vector);
        f.tensor("mm.patch_merger.weight", { t.n_embd * merge * merge, n_in }, use::matrix);
    }
    return check_mlp(f, n_in, "mm.1", "mm.2", false);
}

// Pixtral, Mistral 3: a row after each line but the last.
int64_t check_pixtral(const file & f, tower & t) {
    const int64_t n = check_edged(f, t, 1024);
    f.tensor("v.token_embd.img_break", { n }, use::vector);
    return n;
}

// LightOnOCR: libmtmd asserts that there is a longest edge.
int64_t check_lightonocr(const file & f, tower & t) {
    const int64_t edge = f.whole("clip.vision.preproc_image_size", 1, MAX_EDGE, t.image_size);
    if (edge < 1 || edge > MAX_EDGE) {
        f.refuse(
            "expected clip.vision.image_size in 1.." + std::to_string(MAX_EDGE) +
            ", the longest edge of a picture, got " + std::to_string(edge));
    }
    return check_edged(f, t, 16 * 16); // of the picture that libmtmd lays its buffers out for
}

// LFM2-VL: large pictures are cut into tiles of 512 pixels, which must come out as libmtmd counts them.
int64_t check_lfm2(const file & f, tower & t) {
    const int64_t tile  = 512;
    const int64_t merge = f.whole("clip.vision.projector.scale_factor", 2, 64);
    check_cell(f, t, merge, 256);
    const int64_t cell = t.patch_size * merge, patches = tile / t.patch_size;
    if ((tile + cell - 1) / cell != (patches + merge - 1) / merge) {
        f.refuse("expected patches that fill a tile of 512 pixels, got " + std::to_string(t.patch_size));
    }
    check_filters(f, t, false);
    check_ends(f, t);
    check_square_table(f, t, true);
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    f.norm("mm.input_norm", t.n_embd * merge * merge, false);
    return check_mlp(f, t.n_embd * merge * merge, "mm.1", "mm.2", true);
}

} // namespace qap_gate
