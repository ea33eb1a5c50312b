// limits.cpp: the most tokens that a picture may become, where a family can make fewer of it; and pictures so thin that no
// limit holds them: their short side is one token, and the long one grows with the root of its length.
//
// Facts (llama.cpp 0c1e570, clip.cpp): image_max_pixels bounds families of any size, preproc_max_tiles InternVL's grid, and
// here Llama 4's (an overview comes on top where there are two tiles or more), image_longest_edge that of Idefics3 and
// SmolVLM (an overview always), image_res_candidates LLaVA-NeXT's, Granite 4's and stock Llama 4's. Families of one size have
// no such number.
#include "clip-impl.h"
#include "clip-model.h"
#include "clip.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>

static const int32_t MOST = 65536; // its pixels are an int32_t for every patch size
static const int32_t THIN = 200;   // the processors of Qwen-VL and GLM take nothing that is longer for its width

// One line for the log, which upstream writes, and for a caller who asks qap_last_error().
[[noreturn]] static void refuse(const std::string & why) {
    qap_fail("%s", why.c_str());
    throw std::runtime_error("qap: " + why);
}

void qap_hook_picture(uint32_t width, uint32_t height) {
    qap_clear_error();
    const uint32_t max_side = 46000; // clip_image_size::area() in clip.h asserts on more
    if (!qap_disabled() && (width > max_side || height > max_side)) {
        refuse(string_format(
            "picture: expected sides up to %u pixels, got %u x %u; scale it down", max_side, width, height));
    }
}

void qap_check_thin(const clip_image_size & picture, const clip_image_size & size, int64_t most_pixels, int32_t cell) {
    const int64_t pixels = (int64_t) size.width * size.height;
    const int64_t longer = std::max(size.width, size.height), shorter = std::min(size.width, size.height);
    if (qap_disabled() || most_pixels < 1 || pixels <= most_pixels || longer <= THIN * shorter) {
        return;
    }
    const int64_t area = (int64_t) cell * cell;
    refuse(string_format(
        "picture: expected one that becomes at most %lld tokens, got %d x %d pixels, which is so thin that it becomes "
        "%lld; cut it into shorter parts",
        (long long) std::max<int64_t>(1, most_pixels / area), picture.width, picture.height,
        (long long) (pixels / area)));
}

void qap_check_places(const clip_model & model, const clip_image_f32 & image) {
    const bool table = model.proj_type == PROJECTOR_TYPE_GEMMA4V || model.proj_type == PROJECTOR_TYPE_GEMMA4UV;
    const int  patch = model.hparams.patch_size;
    if (qap_disabled() || !table || model.position_embeddings == nullptr || patch < 1) {
        return; // other tables fit every picture: they are interpolated, or read at fractions of a side
    }
    const int64_t found = std::max(image.nx(), image.ny()) / patch, most = model.position_embeddings->ne[1];
    if (found > most) {
        refuse(string_format(
            "picture: expected at most %lld patches a side, for which the model has positions, got %d x %d; lower the "
            "limit on a picture's tokens (max_image_tokens), or cut the picture into shorter parts",
            (long long) most, image.nx() / patch, image.ny() / patch));
    }
}

void qap_hook_limits(clip_context_params & params) {
    const char * text = std::getenv("QAP_MAX_IMAGE_TOKENS");
    if (params.image_max_tokens > 0 || text == nullptr || *text == '\0' || qap_disabled()) {
        return;
    }
    char *     end   = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end != '\0' || value < 1 || value > MOST) {
        throw std::runtime_error(string_format(
            "qap: QAP_MAX_IMAGE_TOKENS: expected a number in 1..%d, got '%s'; unset it", (int) MOST, text));
    }
    params.image_max_tokens = (int) value;
}

// Grids of pinpoints that give at most `most` tokens: base, tiles and, if the lines of the grid have `ends`, those.
static void drop_large(
    std::vector<clip_image_size> & grids, int32_t tile, int32_t side, int32_t most, bool ends = true) {
    const auto tokens = [&](const clip_image_size & grid) {
        const int32_t x = grid.width / tile, y = grid.height / tile;
        return (1 + x * y) * side * side + (ends ? y * side : 0);
    };
    const auto smallest =
        *std::min_element(grids.begin(), grids.end(), [&](const clip_image_size & a, const clip_image_size & b) {
            return tokens(a) < tokens(b);
        });
    grids.erase(
        std::remove_if(grids.begin(), grids.end(), [&](const clip_image_size & grid) { return tokens(grid) > most; }),
        grids.end());
    if (grids.empty()) {
        grids.push_back(smallest);
    }
}

static int32_t pixels(int32_t count, int32_t side) {
    return (int32_t) std::min<int64_t>((int64_t) count * side * side, std::numeric_limits<int32_t>::max());
}

void qap_limit_tokens(int projector, clip_hparams & hparams) {
    const int32_t most = hparams.custom_image_max_tokens;
    if (most < 1 || hparams.patch_size < 1 || hparams.n_merge < 1) {
        return;
    }
    const auto    type  = (projector_type) projector;
    const int32_t patch = hparams.patch_size * hparams.n_merge;
    const int32_t side  = hparams.image_size / patch;
    const int32_t tiles = side > 0 ? most / (side * side) : 0;
    if (type == PROJECTOR_TYPE_IDEFICS3) {
        const bool    edge  = hparams.image_longest_edge > 0;
        const int32_t grid  = std::max(1, tiles - 1); // beside the overview
        const auto    lines = (int32_t) std::sqrt((double) grid);
        if (edge) {
            hparams.image_longest_edge = std::min(hparams.image_longest_edge, lines * hparams.image_size);
        }
        // old files have no longest edge; where there is one, any limit on pixels would take its place
        hparams.image_max_pixels = edge ? -1 : pixels(grid, hparams.image_size);
        hparams.image_min_pixels = std::min(hparams.image_min_pixels, hparams.image_max_pixels);
    } else if (type == PROJECTOR_TYPE_INTERNVL || type == PROJECTOR_TYPE_LLAMA4) {
        hparams.preproc_max_tiles = std::min(hparams.preproc_max_tiles, std::max(1, tiles - 1));
        hparams.preproc_min_tiles = std::min(hparams.preproc_min_tiles, hparams.preproc_max_tiles);
        if (type == PROJECTOR_TYPE_LLAMA4 && !hparams.image_res_candidates.empty() && side > 0) {
            drop_large(hparams.image_res_candidates, hparams.image_size, side, most, /* ends */ false);
        }
    } else if (
        (type == PROJECTOR_TYPE_MLP || type == PROJECTOR_TYPE_MLP_NORM) && !hparams.image_res_candidates.empty() &&
        side > 0) {
        drop_large(hparams.image_res_candidates, hparams.image_size, side, most);
    } else if (type == PROJECTOR_TYPE_GRANITE4_VISION) {
        const int32_t windows = hparams.image_size / hparams.patch_size / std::max(1, hparams.downsample_window_side);
        if (windows > 0 && !hparams.image_res_candidates.empty()) {
            drop_large(hparams.image_res_candidates, hparams.image_size, windows * hparams.downsample_query_side, most);
        }
    } else if (hparams.image_max_pixels > 0) {
        hparams.image_max_pixels = std::min(hparams.image_max_pixels, pixels(most, patch));
        hparams.image_min_pixels = std::min(hparams.image_min_pixels, hparams.image_max_pixels);
    }
}
