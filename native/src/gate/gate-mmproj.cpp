// gate-mmproj.cpp: an mmproj file before clip.cpp reads it: the type of every key that it reads (its getters abort on
// another), numbers that divide and fit each other, and the tensors of the vision tower. What the projector needs is
// in gate-projectors.cpp. Facts: clip_model_loader in tools/mtmd/clip.cpp, tools/mtmd/models/*.cpp (llama.cpp 0c1e570).
#include "gate-mmproj.h"

#include "gate.h"

#include <algorithm>
#include <memory>

namespace qap_gate {

const int64_t MAX_WIDTH   = 1 << 20; // of an embedding, far above any model; products of two stay far from overflow
const int64_t MAX_PATCHES = 1 << 16; // of one picture

struct typed_key {
    const char * name;
    gguf_type    type; // of the elements, where it is an array
    bool         array;
};

// every key that clip.cpp reads, as its getters want it
const typed_key KEYS[] = {
    { "general.name",                                GGUF_TYPE_STRING,  false },
    { "general.description",                         GGUF_TYPE_STRING,  false },
    { "clip.projector_type",                         GGUF_TYPE_STRING,  false },
    { "clip.has_vision_encoder",                     GGUF_TYPE_BOOL,    false },
    { "clip.has_audio_encoder",                      GGUF_TYPE_BOOL,    false },
    { "clip.has_gen_audio_encoder",                  GGUF_TYPE_BOOL,    false },
    { "clip.use_gelu",                               GGUF_TYPE_BOOL,    false },
    { "clip.use_silu",                               GGUF_TYPE_BOOL,    false },
    { "clip.minicpmv_version",                       GGUF_TYPE_INT32,   false },
    { "clip.minicpmv_query_num",                     GGUF_TYPE_UINT32,  false },
    { "clip.vision.projector_type",                  GGUF_TYPE_STRING,  false },
    { "clip.vision.mm_patch_merge_type",             GGUF_TYPE_STRING,  false },
    { "clip.vision.swiglu_clamp",                    GGUF_TYPE_FLOAT32, false },
    { "clip.vision.attention.layer_norm_epsilon",    GGUF_TYPE_FLOAT32, false },
    { "clip.vision.image_mean",                      GGUF_TYPE_FLOAT32, true  },
    { "clip.vision.image_std",                       GGUF_TYPE_FLOAT32, true  },
    { "clip.vision.feature_layer",                   GGUF_TYPE_INT32,   true  },
    { "clip.vision.image_grid_pinpoints",            GGUF_TYPE_INT32,   true  },
    { "clip.vision.wa_layer_indexes",                GGUF_TYPE_INT32,   true  },
    { "clip.vision.wa_pattern_mode",                 GGUF_TYPE_INT32,   true  },
    { "clip.vision.projector.spatial_offsets",       GGUF_TYPE_INT32,   true  },
    { "clip.audio.projector_type",                   GGUF_TYPE_STRING,  false },
    { "clip.audio.attention.layer_norm_epsilon",     GGUF_TYPE_FLOAT32, false },
    { "clip.audio.feature_layer",                    GGUF_TYPE_INT32,   true  },
    { "clip.audio.rvq.codebook_size",                GGUF_TYPE_INT32,   true  },
    { "clip.audio.wa_pattern_mode",                  GGUF_TYPE_INT32,   true  },
    { "clip.gen.audio.projector_type",               GGUF_TYPE_STRING,  false },
    { "clip.gen.audio.model_variant",                GGUF_TYPE_STRING,  false },
    { "clip.gen.audio.attention.layer_norm_epsilon", GGUF_TYPE_FLOAT32, false },
    { "clip.gen.audio.feature_layer",                GGUF_TYPE_INT32,   true  },
};

// u32, each of them a count or a length
const char * const COUNTS[] = {
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "projection_dim",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.head_dim",
    "image_size",
    "image_min_pixels",
    "image_max_pixels",
    "preproc_min_tiles",
    "preproc_max_tiles",
    "preproc_image_size",
    "patch_size",
    "projector.scale_factor",
    "projector.query_side",
    "projector.window_side",
    "spatial_merge_size",
    "n_wa_pattern",
    "window_size",
    "sam.head_count",
    "sam.block_count",
    "sam.embedding_length",
    "expert_used_count",
    "num_mel_bins",
    "projector.stack_factor",
    "chunk_size",
    "conv_kernel_size",
    "max_pos_emb",
    "projector.window_size",
    "projector.downsample_rate",
    "projector.head_count",
    "rvq.num_quantizers",
    "local_block_count",
    "local_group_size",
    "subsampling_factor",
};

static void check_keys(const file & f) {
    for (const typed_key & key : KEYS) {
        if (key.array) {
            f.has_array(key.name, key.type);
        } else {
            f.has_type(key.name, key.type);
        }
    }
    for (const char * part : { "vision", "audio", "gen.audio" }) {
        for (const char * count : COUNTS) {
            f.whole(std::string("clip.") + part + "." + count, 0, INT32_MAX, 0);
        }
    }
}

// Three finite numbers, above `low`: pixels are shifted by the one and divided by the other.
static void check_colours(const file & f, const std::string & key, float low) {
    if (!f.has(key) || f.length(key) != 3) {
        f.refuse("expected 3 numbers as " + key + ", got " + (f.has(key) ? std::to_string(f.length(key)) : "none"));
    }
    const auto * values = static_cast<const float *>(f.data(key));
    for (int i = 0; i < 3; i++) {
        if (!(values[i] > low && values[i] < 1e4f)) {
            f.refuse("expected " + key + " to be finite and fit for colours, got " + std::to_string(values[i]));
        }
    }
}

static void check_list(const file & f, const std::string & key, int64_t low, int64_t high, size_t max_length) {
    if (!f.has(key)) {
        return;
    }
    const size_t n = f.length(key);
    if (n > max_length) {
        f.refuse(
            "expected at most " + std::to_string(max_length) + " numbers as " + key + ", got " + std::to_string(n));
    }
    const auto * values = static_cast<const int32_t *>(f.data(key));
    for (size_t i = 0; i < n; i++) {
        if (values[i] < low || values[i] > high) {
            f.refuse(
                "expected " + key + " in " + std::to_string(low) + ".." + std::to_string(high) + ", got " +
                std::to_string(values[i]));
        }
    }
}

// What every vision tower needs whose keys clip.cpp demands.
static tower read_tower(const file & f) {
    const std::string v = "clip.vision.";
    tower             t;
    t.projector = f.text("clip.projector_type");
    if (t.projector.empty()) {
        t.projector = f.text(v + "projector_type");
    }
    t.n_embd     = f.whole(v + "embedding_length", 1, MAX_WIDTH);
    t.n_head     = f.whole(v + "attention.head_count", 0, 4096);
    t.n_head_kv  = f.whole(v + "attention.head_count_kv", 0, 4096, t.n_head);
    t.n_layer    = f.whole(v + "block_count", 0, 1024);
    t.image_size = f.whole(v + "image_size", 0, 8192);
    t.patch_size = f.whole(v + "patch_size", 1, 1024);
    f.whole(v + "projector.scale_factor", 1, 64, 1); // a divisor wherever it is read
    f.whole(v + "spatial_merge_size", 1, 64, 1);
    f.whole(v + "feed_forward_length", 0, MAX_WIDTH);
    f.whole(v + "projection_dim", 0, MAX_WIDTH);
    f.real(v + "attention.layer_norm_epsilon", 0.0, 1.0, true);
    if (f.flag("clip.use_gelu", false) && f.flag("clip.use_silu", false)) {
        f.refuse("expected one of clip.use_gelu and clip.use_silu, got both");
    }
    t.d_head = f.whole(v + "attention.head_dim", 0, MAX_WIDTH, 0);
    if (t.d_head == 0 && t.n_head > 0) {
        if (t.n_embd % t.n_head != 0) {
            f.refuse(
                "expected an embedding length that " + std::to_string(t.n_head) + " heads share, got " +
                std::to_string(t.n_embd));
        }
        t.d_head = t.n_embd / t.n_head;
    }
    if (t.n_head_kv > 0 && t.n_head % t.n_head_kv != 0) {
        f.refuse(
            "expected key heads that divide " + std::to_string(t.n_head) + " heads, got " +
            std::to_string(t.n_head_kv));
    }
    check_colours(f, v + "image_mean", -1e4f);
    check_colours(f, v + "image_std", 0.0f);
    check_list(f, v + "feature_layer", -1, t.n_layer, 64);
    check_list(f, v + "image_grid_pinpoints", 1, 16384, 512);
    check_list(f, v + "wa_layer_indexes", 0, std::max<int64_t>(0, t.n_layer - 1), 1024);
    check_list(f, v + "wa_pattern_mode", -1, 1, 1024);
    return t;
}

// Sizes of pictures: what the file says of the least and the most must give a number of patches that can be computed.
static void check_picture_sizes(const file & f, const tower & t) {
    const std::string v     = "clip.vision.";
    const int64_t     most  = MAX_PATCHES * t.patch_size * t.patch_size;
    const int64_t     least = f.whole(v + "image_min_pixels", 0, most, 0);
    const int64_t     max   = f.whole(v + "image_max_pixels", 0, std::max(most, (int64_t) 1), 0);
    if (max > 0 && least > max) {
        f.refuse("expected image_min_pixels up to image_max_pixels, got " + std::to_string(least));
    }
    if (t.image_size > 0 && t.patch_size > t.image_size) {
        f.refuse(
            "expected patches that fit a side of " + std::to_string(t.image_size) + " pixels, got " +
            std::to_string(t.patch_size));
    }
    if (t.n_patches() > MAX_PATCHES) {
        f.refuse("expected at most " + std::to_string(MAX_PATCHES) + " patches, got " + std::to_string(t.n_patches()));
    }
    f.whole(v + "preproc_image_size", 0, 1 << 15, 0);
    const int64_t tiles = f.whole(v + "preproc_max_tiles", 0, 256, 0);
    if (f.has(v + "preproc_min_tiles")) {
        f.whole(v + "preproc_min_tiles", 0, f.has(v + "preproc_max_tiles") ? tiles : 12);
    }
}

// The header of a file that upstream will read; width: of a token, 0 if unknown. Null for what has no vision tower.
static std::unique_ptr<tower> check_header(const file & f, int64_t & width) {
    if (f.text("general.architecture") != "clip") {
        return nullptr; // upstream refuses what is no mmproj with an error of its own
    }
    check_keys(f);
    for (const ggml_tensor * t = f.first(); t != nullptr; t = f.next(t)) {
        if (t->type != GGML_TYPE_I32 && t->type != GGML_TYPE_I8) { // index tables of a few encoders, copies of flags
            f.check_type(t, use::matrix);
        }
    }
    if (!f.flag("clip.has_vision_encoder", false)) {
        return nullptr; // audio alone: this project does not load it
    }
    auto t = std::make_unique<tower>(read_tower(f));
    check_picture_sizes(f, *t);
    width = check_projector(f, *t);
    return t;
}

} // namespace qap_gate

int64_t qap_gate_mmproj(const std::string & path, bool memory, bool flash) {
    using namespace qap_gate;
    const file f(path);
    int64_t    width = 0;
    const auto t     = check_header(f, width);
    if (t && memory) {
        check_memory(f, 0.0, needed_bytes(f, *t, width, flash));
    }
    return width;
}

double qap_gate_mmproj_bytes(const std::string & path, bool flash) {
    using namespace qap_gate;
    const file f(path);
    int64_t    width = 0;
    const auto t     = check_header(f, width);
    return t ? needed_bytes(f, *t, width, flash) : 0.0;
}
