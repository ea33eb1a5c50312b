// internvl-image.cpp: which tiles InternVL cuts a picture into (008-internvl-tiles.patch): the grid whose shape is nearest to
// the picture's, whatever its size; of equal ones the largest that the picture fills by half. One tile has no overview.
//
// Facts: transformers 5.24, get_optimal_tiled_canvas() in models/got_ocr2/image_processing_got_ocr2.py; OpenGVLab's own
// dynamic_preprocess() does the same. That tiles are stretched stands in resize.cpp.
#include "clip-impl.h"
#include "clip-model.h"
#include "mtmd-image.h"
#include "qap-hooks.h"
#include "qap.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

struct internvl_preprocessor : mtmd_image_preprocessor_internvl {
    explicit internvl_preprocessor(const clip_ctx * ctx) : mtmd_image_preprocessor_internvl(ctx) {
        const int most = hparams.preproc_max_tiles, least = std::max(1, hparams.preproc_min_tiles);
        for (int x = 1; x <= most; x++) {
            for (int y = (least + x - 1) / x; y <= most / x; y++) {
                grids.push_back({ x, y });
            }
        }
        std::stable_sort(grids.begin(), grids.end(), [](const clip_image_size & a, const clip_image_size & b) {
            return a.width * a.height < b.width * b.height;
        });
    }

    slice_instructions get_slice_instructions(const clip_image_size & picture) const override {
        if (qap_stock_encoder()) {
            return mtmd_image_preprocessor_internvl::get_slice_instructions(picture);
        }
        const int             side  = hparams.image_size;
        const clip_image_size grid  = nearest(picture);
        slice_instructions    tiles = {};
        tiles.overview_size         = { side, side };
        if (grid.width * grid.height == 1) {
            return tiles;
        }
        tiles.grid_size    = grid;
        tiles.refined_size = { grid.width * side, grid.height * side };
        for (int y = 0; y < grid.height; y++) {
            for (int x = 0; x < grid.width; x++) {
                tiles.slices.push_back(
                    {
                        x * side, y * side, { side, side }
                });
            }
        }
        return tiles;
    }

private:
    std::vector<clip_image_size> grids; // by their number of tiles

    clip_image_size nearest(const clip_image_size & picture) const {
        const double    shape = (double) picture.width / picture.height;
        const double    area  = (double) picture.width * picture.height;
        const double    tile  = (double) hparams.image_size * hparams.image_size;
        clip_image_size best  = { 1, 1 };
        double          least = std::numeric_limits<double>::infinity();
        for (const clip_image_size & grid : grids) {
            const double difference = std::fabs(shape - (double) grid.width / grid.height);
            if (difference < least || (difference == least && area > 0.5 * tile * grid.width * grid.height)) {
                best = grid;
            }
            least = std::min(least, difference);
        }
        return best;
    }
};

} // namespace

std::unique_ptr<mtmd_image_preprocessor> qap_hook_internvl(const clip_ctx * ctx) {
    return std::make_unique<internvl_preprocessor>(ctx);
}
