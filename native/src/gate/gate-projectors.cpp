// gate-projectors.cpp: the tensors that the graph of each projector type builds on, one function a type. Shapes are
// written as ggml's: the row length first. Facts: load_tensors() in tools/mtmd/clip.cpp and tools/mtmd/models/*.cpp
// (llama.cpp 0c1e570). Types that are not in the table at the end get the general checks only.
#include "gate-mmproj.h"
#include "gate.h"

#include <algorithm>
#include <set>

namespace qap_gate {

static std::string block(int64_t i, const char * name) {
    return "v.blk." + std::to_string(i) + "." + name;
}

struct block_options {
    bool fused          = false; // attn_qkv instead of three
    bool biased         = false; // the graph adds the biases of q, k and v without asking
    bool may_be_swapped = true;  // clip.cpp swaps ffn_up and ffn_down of old files
};

// q, k, v, output and feed-forward of every block. The width of the feed-forward is what the tensors say.
static void check_blocks(const file & f, tower & t, const block_options & opts) {
    if (t.n_head < 1 || t.n_head_kv < 1 || t.n_layer < 1) {
        f.refuse("expected at least one block with one head, got none");
    }
    const int64_t n = t.n_embd, n_q = t.n_head * t.d_head, n_kv = t.n_head_kv * t.d_head;
    for (int64_t i = 0; i < t.n_layer; i++) {
        if (opts.fused && f.find(block(i, "attn_qkv.weight")) != nullptr) {
            if (n_kv != n_q) {
                f.refuse("expected as many key heads as heads beside attn_qkv, got " + std::to_string(t.n_head_kv));
            }
            f.linear(block(i, "attn_qkv"), n, 3 * n_q, true);
        } else if (f.find(block(i, "attn_qkv.weight")) != nullptr) {
            f.refuse("expected attn_q, attn_k and attn_v in block " + std::to_string(i) + ", got attn_qkv");
        } else {
            f.linear(block(i, "attn_q"), n, n_q, true, opts.biased);
            f.linear(block(i, "attn_k"), n, n_kv, true, opts.biased);
            f.linear(block(i, "attn_v"), n, n_kv, true, opts.biased);
        }
        f.linear(block(i, "attn_out"), n_q, n, true);
        f.norm(block(i, "ln1"), n, false);
        f.norm(block(i, "ln2"), n, false);
        const ggml_tensor * q_norm = f.find(block(i, "attn_q_norm.weight"));
        const int64_t       n_norm = q_norm != nullptr && q_norm->ne[0] == t.d_head ? t.d_head : n_q;
        f.tensor(block(i, "attn_q_norm.weight"), { n_norm }, use::vector, false);
        f.tensor(block(i, "attn_k_norm.weight"), { n_norm == n_q ? n_kv : n_norm }, use::vector, q_norm != nullptr);
        for (const char * name :
             { "ls1.weight", "ls2.weight", "out_scale.weight", "attn_post_norm.weight", "ffn_post_norm.weight" }) {
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

// The picture becomes rows: patches, a class token, positions. n_rows: of the table of positions; exact: as many.
static void check_input(const file & f, const tower & t, bool positions, bool exact) {
    const int64_t p = t.patch_size;
    f.tensor("v.patch_embd.weight", { p, p, 3, t.n_embd }, use::filter);
    f.tensor("v.patch_embd.bias", { t.n_embd }, use::vector, false);
    const ggml_tensor * cls = f.tensor("v.class_embd", { t.n_embd }, use::vector, false);
    f.norm("v.pre_ln", t.n_embd, false);
    f.norm("v.post_ln", t.n_embd, false);
    if (!positions) {
        return;
    }
    if (t.n_patches() < 1) {
        f.refuse("expected an image size of at least one patch, got " + std::to_string(t.image_size));
    }
    const int64_t       n_rows = t.n_patches() + (cls != nullptr ? 1 : 0);
    const ggml_tensor * table  = f.find("v.position_embd.weight");
    const int64_t       found  = table != nullptr ? table->ne[1] : 0;
    if (table != nullptr && (exact ? found != n_rows : found < n_rows)) {
        f.refuse(
            "expected " + std::to_string(n_rows) + " positions for a picture of " + std::to_string(t.image_size) +
            " pixels, got " + std::to_string(found));
    }
    f.tensor("v.position_embd.weight", { t.n_embd, found }, exact ? use::vector : use::matrix);
}

// How many patches of a side become one token; they must come out even.
static int64_t check_merge(const file & f, const tower & t, int64_t low, int64_t fallback) {
    const int64_t merge = f.whole("clip.vision.projector.scale_factor", low, 64, fallback);
    if (t.n_side() % merge != 0) {
        f.refuse(
            "expected " + std::to_string(t.n_side()) + " patches of a side to be merged evenly, got groups of " +
            std::to_string(merge));
    }
    return merge;
}

// the number of columns of a product's left side, 0 where the tensor is not there
static int64_t n_out(const file & f, const std::string & name) {
    const ggml_tensor * t = f.find(name);
    return t != nullptr ? t->ne[1] : 0;
}

// LLaVA: two products with gelu between, or (mm.3: Yi) two with a norm after each.
static int64_t check_llava(const file & f, tower & t) {
    check_input(f, t, true, false);
    check_blocks(f, t, {});
    int64_t n_in = t.n_embd; // granite stacks the outputs of several layers
    if (f.has("clip.vision.feature_layer")) {
        const auto *      layers = static_cast<const int32_t *>(f.data("clip.vision.feature_layer"));
        std::set<int32_t> distinct(layers, layers + f.length("clip.vision.feature_layer"));
        distinct.erase(-1);
        n_in *= std::max<int64_t>(1, (int64_t) distinct.size());
    }
    const int64_t n_mid = n_out(f, "mm.0.weight");
    f.linear("mm.0", n_in, n_mid, true, true);
    const bool norms = f.find("mm.3.weight") != nullptr;
    for (const char * newline : { "v.image_newline", "model.image_newline" }) { // the second: of legacy converters
        f.tensor(newline, { n_out(f, norms ? "mm.3.weight" : "mm.2.weight") }, use::vector, false);
    }
    if (norms) {
        const int64_t n = n_out(f, "mm.3.weight");
        f.norm("mm.1", n_mid, true, true);
        f.linear("mm.3", n_mid, n, true, true);
        f.norm("mm.4", n, true, true);
        return n;
    }
    const int64_t n = n_out(f, "mm.2.weight");
    f.linear("mm.2", n_mid, n, true, true);
    return n;
}

// Idefics3, SmolVLM: groups of patches side by side, one product.
static int64_t check_idefics3(const file & f, tower & t) {
    check_input(f, t, true, true);
    const int64_t merge = check_merge(f, t, 2, -1);
    f.whole("clip.vision.preproc_image_size", t.image_size, 16 * t.image_size, t.image_size); // tiles of image_size
    check_blocks(f, t, { /* fused */ true });
    const int64_t n = n_out(f, "mm.model.fc.weight");
    f.tensor("mm.model.fc.weight", { t.n_embd * merge * merge, n }, use::matrix);
    return n;
}

// Gemma 3: groups are averaged, normed, and multiplied from the other side.
static int64_t check_gemma3(const file & f, tower & t) {
    check_input(f, t, true, true);
    check_merge(f, t, 1, 4);
    check_blocks(f, t, { /* fused */ true });
    const ggml_tensor * projection = f.find("mm.input_projection.weight");
    const int64_t       n          = projection != nullptr ? projection->ne[0] : 0;
    projection                     = f.tensor("mm.input_projection.weight", { n, t.n_embd }, use::matrix);
    f.check_type(projection, use::filter); // it is transposed, which quantized rows cannot be
    f.tensor("mm.soft_emb_norm.weight", { t.n_embd }, use::vector);
    return n;
}

// InternVL: a class token that is dropped, groups side by side, a norm and two products.
static int64_t check_internvl(const file & f, tower & t) {
    check_input(f, t, true, true);
    const int64_t merge = check_merge(f, t, 1, 1);
    const int64_t tiles = f.whole("clip.vision.preproc_max_tiles", 1, 256, 12);
    f.whole("clip.vision.preproc_min_tiles", 1, tiles, 1);
    if (f.find("v.class_embd") == nullptr) {
        f.refuse("expected the tensor v.class_embd, found none");
    }
    check_blocks(f, t, { /* fused */ true, /* biased */ false, /* may_be_swapped */ false });
    const int64_t n_in = t.n_embd * merge * merge, n_mid = n_out(f, "mm.model.mlp.1.weight");
    const int64_t n = n_out(f, "mm.model.mlp.3.weight");
    f.norm("mm.model.mlp.0", n_in, true, true);
    f.linear("mm.model.mlp.1", n_in, n_mid, true, true);
    f.linear("mm.model.mlp.3", n_mid, n, true, true);
    return n;
}

// Qwen2-VL and Qwen2.5-VL: two filters (frames of a video), rotary positions in four parts, groups of 2 x 2.
static int64_t check_qwen2vl(const file & f, tower & t) {
    const int64_t p = t.patch_size;
    check_input(f, t, false, false);
    f.tensor("v.patch_embd.weight.1", { p, p, 3, t.n_embd }, use::filter);
    if (f.find("v.patch_embd.bias") != nullptr || f.find("v.class_embd") != nullptr) {
        f.refuse("expected neither v.patch_embd.bias nor v.class_embd, got one");
    }
    if (t.n_head_kv != t.n_head || t.d_head % 4 != 0) {
        f.refuse("expected heads of a multiple of 4 with a key each, got a length of " + std::to_string(t.d_head));
    }
    f.whole("clip.vision.spatial_merge_size", 2, 2, 2);
    const bool windows = t.projector == "qwen2.5vl_merger";
    f.whole("clip.vision.n_wa_pattern", windows ? 1 : 0, 1024, windows ? -1 : 0);
    check_blocks(f, t, { /* fused */ false, /* biased */ true });
    const int64_t n_mid = n_out(f, "mm.0.weight"), n = n_out(f, "mm.2.weight");
    f.linear("mm.0", 4 * t.n_embd, n_mid, true, true);
    f.linear("mm.2", n_mid, n, true, true);
    if (windows && f.whole("clip.vision.projection_dim", 1, INT32_MAX) != n) {
        f.refuse("expected mm.2 to give clip.vision.projection_dim numbers, got " + std::to_string(n));
    }
    return n;
}

static const struct projector_rule {
    const char * name;
    int64_t (*check)(const file &, tower &);
} RULES[] = {
    { "mlp",              check_llava    },
    { "idefics3",         check_idefics3 },
    { "gemma3",           check_gemma3   },
    { "internvl",         check_internvl },
    { "qwen2vl_merger",   check_qwen2vl  },
    { "qwen2.5vl_merger", check_qwen2vl  },
};

static const projector_rule * find_rule(const std::string & projector) {
    for (const projector_rule & rule : RULES) {
        if (projector == rule.name) {
            return &rule;
        }
    }
    return nullptr;
}

int64_t check_projector(const file & f, tower & t) {
    const projector_rule * rule = find_rule(t.projector);
    return rule != nullptr ? rule->check(f, t) : 0;
}

} // namespace qap_gate

bool qap_gate_has_rules(const std::string & projector) {
    return qap_gate::find_rule(projector) != nullptr;
}
