// next-image.cpp: a picture as LLaVA-NeXT's encoder gets it (007-llava-next.patch): the whole of it stretched to one tile,
// and the tiles of the grid that fits it best, the picture centred on black. Small pictures are tiled too.
//
// Facts: transformers 5.24, select_best_resolution and get_patch_output_size in image_processing_utils.py,
// models/llava_next/image_processing_llava_next.py. Numbers are Python's: doubles, cut towards zero.
#include "clip-impl.h"
#include "clip-model.h"
#include "families/pack.h"
#include "mtmd-image.h"
#include "qap-hooks.h"
#include "qap.h"

#include <algorithm>
#include <cstdint>
#include <limits>

// The size of the list that keeps most of the picture's pixels, and wastes least.
static clip_image_size best_size(const clip_image_size & picture, const std::vector<clip_image_size> & sizes) {
    const int64_t   n_pixels = (int64_t) picture.width * picture.height;
    clip_image_size best     = sizes[0];
    int64_t         most = 0, least_waste = std::numeric_limits<int64_t>::max();
    for (const clip_image_size & size : sizes) {
        const double  scale  = std::min((double) size.width / picture.width, (double) size.height / picture.height);
        const int64_t width  = (int64_t) (picture.width * scale);
        const int64_t height = (int64_t) (picture.height * scale);
        const int64_t kept   = std::min(width * height, n_pixels);
        const int64_t waste  = (int64_t) size.width * size.height - kept;
        if (kept > most || (kept == most && waste < least_waste)) {
            best        = size;
            most        = kept;
            least_waste = waste;
        }
    }
    return best;
}

namespace {

struct next_preprocessor : mtmd_image_preprocessor_llava_uhd {
    using mtmd_image_preprocessor_llava_uhd::mtmd_image_preprocessor_llava_uhd;

    mtmd_image_preproc_out preprocess(const clip_image_u8 & img) const override {
        if (qap_stock_encoder()) {
            return mtmd_image_preprocessor_llava_uhd::preprocess(img);
        }
        const clip_image_size picture = img.get_size();
        const clip_image_size grid    = best_size(picture, hparams.image_res_candidates);
        const int             side    = hparams.image_size;
        const int             grid_x = grid.width / side, grid_y = grid.height / side;

        const clip_image_u8 base = resized(img, { side, side });
        clip_image_u8       stack;
        stack.set_size({ side, side * (1 + grid_x * grid_y) }, img.is_placeholder());
        if (!img.is_placeholder()) {
            const bool           stretched = hparams.image_pad_rf == PAD_NONE;
            const clip_image_u8  refined   = resized(img, stretched ? grid : qap_fitted(picture, grid));
            const int            left      = (grid.width - refined.get_size().width) / 2;
            const int            top       = (grid.height - refined.get_size().height) / 2;
            std::vector<uint8_t> pixels;
            pixels.reserve(stack.n_elements());
            pixels = base.get_ro_buf();
            for (int tile = 0; tile < grid_x * grid_y; tile++) {
                append_tile(pixels, refined, tile % grid_x * side - left, tile / grid_x * side - top);
            }
            stack.cpy_buf(pixels);
        }
        mtmd_image_preproc_out output;
        output.append(hparams, stack, true);
        output.entries.back().qap_content   = base.qap_content; // of the grid, pack.cpp cuts the padding off
        clip_image_f32::anyres_info & tiles = output.entries.back().anyres;
        tiles.grid_x                        = grid_x;
        tiles.grid_y                        = grid_y;
        tiles.orig_nx                       = picture.width;
        tiles.orig_ny                       = picture.height;
        return output;
    }

private:
    // upstream's resize by way of its overview
    clip_image_u8 resized(const clip_image_u8 & img, const clip_image_size & size) const {
        slice_instructions whole = {};
        whole.overview_size      = size;
        return slice_image(img, whole).overview;
    }

    // The tile whose corner lies at x, y of `refined`, or beside it.
    void append_tile(std::vector<uint8_t> & pixels, const clip_image_u8 & refined, int x, int y) const {
        const clip_image_size          size = refined.get_size();
        const std::array<uint8_t, 3> & pad  = hparams.image_pad_color_rf;
        for (int row = y; row < y + hparams.image_size; row++) {
            for (int column = x; column < x + hparams.image_size; column++) {
                const bool inside = row >= 0 && row < size.height && column >= 0 && column < size.width;
                const auto colour = inside ? refined.get_pixel(column, row) : pad;
                pixels.insert(pixels.end(), colour.begin(), colour.end());
            }
        }
    }
};

} // namespace

std::unique_ptr<mtmd_image_preprocessor> qap_hook_tiles(const clip_ctx * ctx, bool mrope) {
    const int projector = qap_clip_model(ctx).proj_type;
    if (projector != PROJECTOR_TYPE_MLP && projector != PROJECTOR_TYPE_MLP_NORM) {
        return nullptr;
    }
    if (const char * why_not = qap_tiles_why_not(ctx, mrope)) {
        if (!qap_stock_encoder()) {
            LOG_WRN("qap: tiles are not packed as trained: %s\n", why_not);
        }
        return nullptr;
    }
    return std::make_unique<next_preprocessor>(ctx);
}
