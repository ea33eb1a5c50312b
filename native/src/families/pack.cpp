// pack.cpp: see pack.h. Each tile runs through the encoder by itself, as in training; what comes out is put together on the
// host. Scores are over the whole picture, base and grid, by the function that Python calls too (qap_prune).
#include "families/pack.h"

#include "clip-impl.h"
#include "clip-model.h"
#include "device.h"
#include "pixels.h"
#include "prune.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap-plan.h"

#include <algorithm>
#include <cmath>

static const int32_t MAX_TILES = 256;

std::vector<int32_t> qap_packing::special() const {
    std::vector<int32_t> found((size_t) height);
    for (int32_t line = 0; line < height; line++) {
        found[line] = n_base() + (line + 1) * (width + 1) - 1;
    }
    return found;
}

static bool is_llava(int projector) {
    return projector == PROJECTOR_TYPE_MLP || projector == PROJECTOR_TYPE_MLP_NORM;
}

bool qap_packs(int projector, const clip_image_f32 & image) {
    return is_llava(projector) && image.anyres.is_tiled();
}

// Half of what a grid of `current` tokens has too many, for `wanted` of them: round(x, 7), then towards zero, as Python.
static int32_t padding(int32_t current, double wanted) {
    return (current - (int32_t) (wanted + 5e-8)) / 2;
}

qap_packing qap_packing_of(const clip_hparams & hparams, const clip_image_f32 & image) {
    const clip_image_f32::anyres_info & tiles = image.anyres;
    qap_packing                         packing;
    packing.side   = image.nx() / hparams.patch_size;
    packing.grid_x = tiles.grid_x;
    packing.grid_y = tiles.grid_y;
    packing.width  = packing.side * packing.grid_x;
    packing.height = packing.side * packing.grid_y;
    if (hparams.image_pad_rf == PAD_NONE) {
        return packing; // stretched: there is no padding
    }
    const double x = tiles.orig_nx, y = tiles.orig_ny;
    if (x / y > (double) packing.width / packing.height) {
        packing.top = padding(packing.height, y * (packing.width / x));
        packing.height -= 2 * packing.top;
    } else {
        packing.left = padding(packing.width, x * (packing.height / y));
        packing.width -= 2 * packing.left;
    }
    return packing;
}

clip_image_size qap_fitted(const clip_image_size & picture, const clip_image_size & grid) {
    const double x = (double) grid.width / picture.width, y = (double) grid.height / picture.height;
    if (x < y) {
        return { grid.width, std::min((int) std::ceil(picture.height * x), grid.height) };
    }
    return { std::min((int) std::ceil(picture.width * y), grid.width), grid.height };
}

const char * qap_tiles_why_not(const clip_ctx * ctx, bool mrope) {
    const clip_model &   model   = qap_clip_model(ctx);
    const clip_hparams & hparams = model.hparams;
    if (!is_llava(model.proj_type) || hparams.image_res_candidates.empty()) {
        return nullptr;
    }
    if (model.image_newline == nullptr) {
        return "this mmproj has image_grid_pinpoints but no image_newline, the row that ends each line of tiles in "
               "LLaVA-NeXT; convert the checkpoint anew";
    }
    for (const clip_image_size & size : hparams.image_res_candidates) {
        const int32_t side = hparams.image_size;
        const bool    fits = size.width % side == 0 && size.height % side == 0;
        if (!fits || (int64_t) (size.width / side) * (size.height / side) > MAX_TILES) {
            return "this mmproj has image_grid_pinpoints that are not whole tiles, or more than 256; convert the "
                   "checkpoint anew";
        }
    }
    return mrope ? "LLaVA-NeXT's tiles are not known with a language model that has M-RoPE positions" : nullptr;
}

bool qap_lost_packing(const clip_ctx * ctx, const clip_image_f32_batch & batch) {
    const int  projector = qap_clip_model(ctx).proj_type;
    const bool stacks    = is_llava(projector) || projector == PROJECTOR_TYPE_GRANITE4_VISION;
    const bool one       = stacks && batch.entries.size() == 1;
    return one && !batch.entries[0].anyres.is_tiled() && batch.entries[0].ny() > batch.entries[0].nx();
}

int qap_hook_packed_rows(const clip_hparams & hparams, const clip_image_f32 & image) {
    return qap_packing_of(hparams, image).n_rows();
}

bool qap_hook_packs(const clip_ctx * ctx, const clip_image_f32_batch & imgs) {
    return imgs.entries.size() == 1 && qap_packs(qap_clip_model(ctx).proj_type, imgs.entries[0]);
}

// --- encoding ---

namespace {

// Numbers of each token of a picture, `n` of them; `gap` places are left free after each line of the grid.
struct canvas {
    const qap_packing & packing;
    int32_t             n;
    int32_t             gap;
    std::vector<float>  values;

    canvas(const qap_packing & packing, int32_t n, int32_t gap)
        : packing(packing), n(n), gap(gap),
          values((size_t) n * (packing.n_base() + (size_t) (packing.width + gap) * packing.height)) {}

    // tile: 0 is the base. from: [side * side, n]
    void put(int32_t tile, const std::vector<float> & from) {
        if (tile == 0) {
            std::copy(from.begin(), from.end(), values.begin());
            return;
        }
        const int32_t side  = packing.side;
        const int32_t x     = (tile - 1) % packing.grid_x * side - packing.left; // of the tile, in the picture's tokens
        const int32_t y     = (tile - 1) / packing.grid_x * side - packing.top;
        const int32_t first = std::max(0, -x), last = std::min(side, packing.width - x);
        for (int32_t line = std::max(0, -y); line < std::min(side, packing.height - y) && first < last; line++) {
            const float * begin = from.data() + ((size_t) line * side + first) * n;
            const size_t  place = packing.n_base() + (size_t) (y + line) * (packing.width + gap) + (x + first);
            std::copy(begin, begin + (size_t) (last - first) * n, values.begin() + (ptrdiff_t) (place * n));
        }
    }
};

} // namespace

// Are all of this tile's tokens padding?
static bool is_padding(const qap_packing & packing, int32_t tile) {
    const int32_t x = (tile - 1) % packing.grid_x * packing.side - packing.left;
    const int32_t y = (tile - 1) / packing.grid_x * packing.side - packing.top;
    return tile > 0 && (x + packing.side <= 0 || x >= packing.width || y + packing.side <= 0 || y >= packing.height);
}

// The part of this tile that is picture; next-image.cpp centres it on the grid.
static qap_area area_of(const clip_hparams & hparams, const clip_image_f32 & stack, int32_t tile) {
    if (hparams.image_pad_rf == PAD_NONE) {
        return {};
    }
    const clip_image_f32::anyres_info & tiles = stack.anyres;
    const int                           side  = stack.nx();
    const clip_image_size               grid  = { tiles.grid_x * side, tiles.grid_y * side };
    const clip_image_size               size  = qap_fitted({ tiles.orig_nx, tiles.orig_ny }, grid);
    const qap_area picture = { true, (grid.width - size.width) / 2, (grid.height - size.height) / 2, size.width,
                               size.height };
    return qap_hook_cropped(picture, (tile - 1) % tiles.grid_x * side, (tile - 1) / tiles.grid_x * side, side, side);
}

// Do the pixels of this tile say nothing? The base is no tile.
static bool is_flat(const clip_hparams & hparams, const clip_image_f32 & stack, int32_t tile, int32_t level) {
    if (tile == 0 || level < 0) {
        return false;
    }
    const int     side   = stack.nx();
    const float * pixels = stack.get_ro_buf().data() + (size_t) tile * (size_t) side * (size_t) side * 3;
    return qap_is_flat(hparams, pixels, side, side, area_of(hparams, stack, tile), level);
}

std::vector<int32_t> qap_packed_left(const clip_hparams & hparams, const clip_image_f32 & stack, int32_t level) {
    const qap_packing        packing = qap_packing_of(hparams, stack);
    const std::vector<float> ones((size_t) packing.n_base(), 1.0f);
    canvas                   shown(packing, 1, 0);
    for (int32_t tile = 0; tile <= packing.n_tiles(); tile++) {
        if (!is_flat(hparams, stack, tile, level)) {
            shown.put(tile, ones);
        }
    }
    std::vector<int32_t> left;
    for (int32_t token = 0; token < packing.n_tokens(); token++) {
        if (shown.values[(size_t) token] > 0.0f) {
            left.push_back(token);
        }
    }
    return left;
}

static clip_image_f32_batch cut(const clip_image_f32 & stack, int32_t tile) {
    const size_t               side = (size_t) stack.nx(), size = side * side * 3;
    const std::vector<float> & all = stack.get_ro_buf();
    clip_image_f32_batch       one;
    one.entries.resize(1);
    one.entries[0].set_size({ stack.nx(), stack.nx() }, false, false);
    one.entries[0].cpy_buf(
        std::vector<float>(all.begin() + (ptrdiff_t) (tile * size), all.begin() + (ptrdiff_t) ((tile + 1) * size)));
    return one;
}

// A plan that notes the attention of one tile.
static qap_plan_ptr tile_plan(const qap_packing & packing, const qap_plan & whole) {
    auto plan            = std::make_shared<qap_plan>();
    plan->params         = qap_params_default();
    plan->n_total        = packing.n_base();
    plan->n_keep         = plan->n_total;
    plan->capture        = true;
    plan->capture_hidden = whole.capture_hidden;
    return plan;
}

// The noted signals of all tiles, as far as every tile has them.
struct noted_signals {
    std::vector<canvas> attention, received, hidden; // one each, or none

    void put(const qap_packing & packing, int32_t tile, const qap_plan & plan) {
        put(attention, packing, 1, tile, plan.attention);
        put(received, packing, 1, tile, plan.received);
        put(hidden, packing, plan.n_hidden, tile, plan.hidden);
    }

    static void put(
        std::vector<canvas> & signal, const qap_packing & packing, int32_t n, int32_t tile,
        const std::vector<float> & values) {
        if (values.empty()) {
            return;
        }
        if (signal.empty()) {
            signal.emplace_back(packing, n, 0);
        }
        signal[0].put(tile, values);
    }

    static std::vector<float> take(std::vector<canvas> & signal) {
        return signal.empty() ? std::vector<float>() : std::move(signal[0].values);
    }
};

static int encode_packed(clip_ctx * ctx, const clip_encode_params & params) {
    const clip_model &     model   = qap_clip_model(ctx);
    const clip_image_f32 & stack   = params.imgs->entries[0];
    const qap_packing      packing = qap_packing_of(model.hparams, stack);
    const int32_t          width   = clip_n_mmproj_embd(ctx);
    const int64_t          before  = qap_bytes_read();
    qap_plan *             plan    = params.imgs->qap.get();

    canvas             rows(packing, width, 1);
    noted_signals      signals;
    std::vector<float> out((size_t) packing.n_base() * width);
    for (int32_t tile = 0; tile <= packing.n_tiles(); tile++) {
        const int32_t level = plan != nullptr && plan->given ? plan->params.skip_flat_tiles : -1;
        if (is_padding(packing, tile) || is_flat(model.hparams, stack, tile, level)) {
            continue;
        }
        clip_image_f32_batch one = cut(stack, tile);
        if (plan != nullptr) {
            one.qap = tile_plan(packing, *plan);
        }
        if (!clip_image_batch_encode(ctx, params.n_threads, &one, out)) {
            return -1; // it has said why
        }
        rows.put(tile, out);
        if (plan != nullptr) {
            signals.put(packing, tile, *one.qap);
            plan->n_hidden = one.qap->n_hidden;
        }
    }
    std::vector<float> newline((size_t) width); // f32 (gate-projectors.cpp)
    qap_read_floats(model.image_newline, newline.data());
    for (const int32_t row : packing.special()) {
        std::copy(newline.begin(), newline.end(), rows.values.begin() + (ptrdiff_t) row * width);
    }
    if (plan == nullptr) {
        *params.out_embd = std::move(rows.values);
        return 0;
    }

    plan->done = false;
    if (plan->n_total != packing.n_tokens() || plan->n_rows() != packing.n_rows()) {
        return qap_fail("expected %d tokens from the encoder, got %d", (int) plan->n_total, (int) packing.n_tokens());
    }
    plan->attention = noted_signals::take(signals.attention);
    plan->received  = noted_signals::take(signals.received);
    plan->hidden    = noted_signals::take(signals.hidden);
    if (plan->capture) {
        plan->keep_all();
        *params.out_embd = std::move(rows.values);
    } else if (qap_prune_plan(*plan, rows.values.data(), width, 1, params.n_threads, *params.out_embd) != 0) {
        return -1;
    }
    plan->done       = true;
    plan->bytes_read = qap_bytes_read() - before;
    return 0;
}

bool qap_hook_encode_packed(clip_ctx * ctx, const clip_encode_params & params) {
    qap_clear_error();
    if (encode_packed(ctx, params) == 0) {
        return true;
    }
    LOG_ERR("%s: the tiles could not be encoded %s\n", __func__, qap_last_error());
    return false;
}
