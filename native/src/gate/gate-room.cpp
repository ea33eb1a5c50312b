// gate-room.cpp: the memory that an encoder and one picture take. docs/robustness.md has it beside what was measured
// (benchmarks/memory_estimates.py).
#include "families/layout.h"
#include "gate-mmproj.h"
#include "qap.h"

#include <algorithm>

namespace qap_gate {

// Graphs of int errors and of ggml's quantizers: rows of features that they have at a time.
static const double SCORED_ROWS = 3.0;

static const double MAX_TILES = 256.0; // families/pack.cpp

// Numbers for each pixel of a convolutional encoder's widest rows: 512 channels a quarter as wide and high, three times.
static const double CONVOLVED = 3.0 * 512.0 / 16.0;

// What a picture of LLaVA-NeXT is cut into: the whole, and the largest grid of the file.
struct tiling {
    double tokens = 0.0, tiles = 0.0;
};

static tiling largest_tiling(const file & f, const tower & t) {
    const char * const key = "clip.vision.image_grid_pinpoints"; // i32 (gate-mmproj.cpp): width, height, width, ...
    const bool         known =
        f.find("v.image_newline") != nullptr || f.find("model.image_newline") != nullptr; // else one tile is encoded
    tiling found;
    if (!known || !f.has(key) || t.image_size < 1) {
        return found;
    }
    const auto * sides = static_cast<const int32_t *>(f.data(key));
    for (size_t i = 0; i + 1 < f.length(key); i += 2) {
        const double x = (double) (sides[i] / t.image_size), y = (double) (sides[i + 1] / t.image_size);
        if (sides[i] % t.image_size != 0 || sides[i + 1] % t.image_size != 0 || x * y > MAX_TILES) {
            return {}; // then no picture is cut (qap_tiles_why_not)
        }
        const double side   = (double) t.n_side();
        const double tokens = side * side + y * side * x * side; // the ends of lines are no tokens
        found.tokens        = std::max(found.tokens, tokens);
        found.tiles         = std::max(found.tiles, 1.0 + x * y);
    }
    return found;
}

// The most tiles that a picture becomes, its overview among them, where each is encoded and scored by itself; 0: it is not
// cut. Facts: families/llama4-image.inc, families/internvl-image.cpp; mtmd-image.cpp for Idefics3 (llama.cpp 0c1e570).
static double most_tiles(const file & f, const tower & t) {
    const std::string v     = "clip.vision.";
    int64_t           tiles = 0;
    if (t.projector == "llama4") {
        tiles = f.whole(v + "preproc_max_tiles", 0, 256, 0);
        tiles = tiles > 0 ? tiles : QAP_LLAMA4_TILES;
    } else if (t.projector == "internvl") {
        tiles = f.whole(v + "preproc_max_tiles", 1, 256, 12);
    } else if (t.projector == "idefics3" && t.image_size > 0) {
        const int64_t edge = f.whole(v + "preproc_image_size", 0, 1 << 15, 0);
        const int64_t side = (edge + t.image_size - 1) / t.image_size;
        tiles              = side * side;
    }
    return tiles > 1 ? 1.0 + (double) tiles : 0.0;
}

// Encoder weights are read into memory; activations of one picture, or of one tile, come on top: a few rows of every width,
// and the patches laid out for the convolution. Attention is computed in blocks (flash attention; its mask counts) or n x n
// for each head. Then the tokens' rows on the host, the graph that scores them, and the choice.
double needed_bytes(const file & f, const tower & t, int64_t width, bool flash) {
    const bool   convolves = t.projector == "gemma3nv"; // then a side has as many "patches" as the picture has tokens
    const double n         = (double) (convolves ? t.n_side() : t.n_patches()) + 1.0;
    const double row       = 8.0 * (double) t.n_embd + 3.0 * (double) t.n_ff;
    const double unfolded  = 6.0 * (double) (t.patch_size * t.patch_size);
    const double scale     = (double) f.whole("clip.vision.projector.scale_factor", 1, 64, 1);
    const double merge     = std::max(scale, (double) f.whole("clip.vision.spatial_merge_size", 1, 64, 1));
    const tiling packed    = largest_tiling(f, t);
    const double cut       = most_tiles(f, t);
    const double together  = std::max(n / (merge * merge), packed.tokens); // tokens that are scored together
    const double tokens    = std::max(cut * n / (merge * merge), together);
    const double tile      = 3.0 * (double) (t.image_size * t.image_size);
    const double pixels    = tile * std::max(4.0 * cut, 6.0 * packed.tiles); // in f32; a stack of tiles as bytes too
    const double one       = 4.0 * (double) ((width > 0 ? width : t.n_embd) * t.n_planes);
    const double rows      = one * tokens;
    const auto   params    = qap_params_default();
    const auto   n_tokens  = (int32_t) std::min(together, 1e9);
    const double choice = qap_choice_bytes(&params, n_tokens, (int32_t) (width > 0 ? width : t.n_embd), n_tokens / 4);
    const double pruned = (packed.tiles > 0.0 ? 3.0 : 2.0) * rows + std::max(SCORED_ROWS * one * together, choice);
    const double attention = (flash ? 2.0 : 4.0 * (double) t.n_head) * n * n;
    const double wide      = convolves ? 4.0 * CONVOLVED * (double) (t.image_size * t.image_size) : 0.0;
    return (double) f.n_bytes + wide + 4.0 * n * row + 2.0 * n * unfolded + pixels + std::max(attention, pruned);
}

} // namespace qap_gate
