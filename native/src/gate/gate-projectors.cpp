// gate-projectors.cpp: the tensors that the graph of each projector type builds on, one function a type: here those for
// pictures of one size, the others in gate-grid.cpp and gate-newer.cpp. Shapes are written as ggml's: the row length
// first. Facts: load_tensors() in tools/mtmd/clip.cpp and tools/mtmd/models/*.cpp (llama.cpp 0c1e570). Types that are
// not in the table at the end get the general checks only.
#include "gate-mmproj.h"
#include "gate.h"

#include <algorithm>
#include <set>

namespace qap_gate {

static void check_input(const file & f, const tower & t, bool exact) {
    check_filters(f, t, false);
    check_ends(f, t);
    check_table(f, t, exact);
}

// LLaVA: two products with gelu between, or (mm.3: Yi) two with a norm after each.
static int64_t check_llava(const file & f, tower & t) {
    check_input(f, t, false);
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
    check_input(f, t, true);
    const int64_t merge = check_merge(f, t, 2, -1);
    f.whole("clip.vision.preproc_image_size", t.image_size, 16 * t.image_size, t.image_size); // tiles of image_size
    check_blocks(f, t, { qkv::either });
    const int64_t n = n_out(f, "mm.model.fc.weight");
    f.tensor("mm.model.fc.weight", { t.n_embd * merge * merge, n }, use::matrix);
    return n;
}

// Gemma 3: groups are averaged, normed, and multiplied from the other side.
static int64_t check_gemma3(const file & f, tower & t) {
    check_input(f, t, true);
    check_merge(f, t, 1, 4);
    check_blocks(f, t, { qkv::either });
    const ggml_tensor * projection = f.find("mm.input_projection.weight");
    const int64_t       n          = projection != nullptr ? projection->ne[0] : 0;
    projection                     = f.tensor("mm.input_projection.weight", { n, t.n_embd }, use::matrix);
    f.check_type(projection, use::filter); // it is transposed, which quantized rows cannot be
    f.tensor("mm.soft_emb_norm.weight", { t.n_embd }, use::vector);
    return n;
}

// InternVL: a class token that is dropped, groups side by side, a norm and two products.
static int64_t check_internvl(const file & f, tower & t) {
    check_input(f, t, true);
    const int64_t merge = check_merge(f, t, 1, 1);
    const int64_t tiles = f.whole("clip.vision.preproc_max_tiles", 1, 256, 12);
    f.whole("clip.vision.preproc_min_tiles", 1, tiles, 1);
    if (f.find("v.class_embd") == nullptr) {
        f.refuse("expected the tensor v.class_embd, found none");
    }
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    const int64_t n_in = t.n_embd * merge * merge, n_mid = n_out(f, "mm.model.mlp.1.weight");
    const int64_t n = n_out(f, "mm.model.mlp.3.weight");
    f.norm("mm.model.mlp.0", n_in, true, true);
    f.linear("mm.model.mlp.1", n_in, n_mid, true, true);
    f.linear("mm.model.mlp.3", n_mid, n, true, true);
    return n;
}

// Llama 4: the convolution is a product, rows and class token have rotary positions too, three products.
static int64_t check_llama4(const file & f, tower & t) {
    f.tensor("v.patch_embd.weight", { 3 * t.patch_size * t.patch_size, t.n_embd }, use::matrix);
    check_ends(f, t);
    if (f.find("v.class_embd") == nullptr) {
        f.refuse("expected the tensor v.class_embd, found none");
    }
    check_table(f, t, true);
    const int64_t merge = check_merge(f, t, 1, 1);
    check_rotary(f, t, false);
    check_blocks(f, t, { qkv::either, /* biased */ false, /* may_be_swapped */ false });
    const int64_t n_first = n_out(f, "mm.model.mlp.1.weight"), n_second = n_out(f, "mm.model.mlp.2.weight");
    const int64_t n = n_out(f, "mm.model.fc.weight");
    f.tensor("mm.model.mlp.1.weight", { t.n_embd * merge * merge, n_first }, use::matrix);
    f.tensor("mm.model.mlp.2.weight", { n_first, n_second }, use::matrix);
    f.tensor("mm.model.fc.weight", { n_second, n }, use::matrix);
    return n;
}

// Janus Pro: SigLIP's tower, two products.
static int64_t check_janus(const file & f, tower & t) {
    check_input(f, t, true);
    check_blocks(f, t, { qkv::either });
    const int64_t n_mid = n_out(f, "mm.0.weight"), n = n_out(f, "mm.1.weight");
    f.linear("mm.0", t.n_embd, n_mid, true, true);
    f.linear("mm.1", n_mid, n, true, true);
    return n;
}

static const struct projector_rule {
    const char * name;
    int64_t (*check)(const file &, tower &);
} RULES[] = {
    { "mlp",              check_llava          },
    { "idefics3",         check_idefics3       },
    { "gemma3",           check_gemma3         },
    { "internvl",         check_internvl       },
    { "llama4",           check_llama4         },
    { "qwen2vl_merger",   check_qwen2vl        },
    { "qwen2.5vl_merger", check_qwen2vl        },
    { "qwen3vl_merger",   check_qwen3vl        },
    { "glm4v",            check_glm4v          },
    { "exaone4_5",        check_exaone         },
    { "paddleocr",        check_paddleocr      },
    { "kimivl",           check_kimi           },
    { "kimik25",          check_kimi           },
    { "hunyuanvl",        check_hunyuan        },
    { "pixtral",          check_pixtral        },
    { "lightonocr",       check_lightonocr     },
    { "janus_pro",        check_janus          },
    { "lfm2",             check_lfm2           },
    { "gemma4v",          check_gemma4         },
    { "gemma4uv",         check_gemma4_unified },
    { "minicpmv4_6",      check_minicpm        },
    { "granite4_vision",  check_granite4       },
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
