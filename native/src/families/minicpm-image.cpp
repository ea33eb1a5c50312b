// minicpm-image.cpp: which slices MiniCPM-V 4.6 cuts a picture into (016-minicpmv4-6-slices.patch): none where its area is
// at most that of one slice, whatever its sides are; else the grid whose shape is nearest to the picture's. Overview and
// slices keep the picture's shape, up to whole tokens.
//
// Facts: transformers 5.24, models/minicpmv4_6/image_processing_minicpmv4_6.py, in float64, halves rounded to the even
// number. That slices are stretched stands in resize.cpp.
#include "clip-impl.h"
#include "clip-model.h"
#include "mtmd-image.h"
#include "qap-hooks.h"
#include "qap.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

const int MOST_SLICES = 9; // max_slice_nums; upstream's converter does not store another number

int whole(double length, int cell) {
    return std::max((int) std::nearbyint(length / cell) * cell, cell);
}

struct minicpmv_preprocessor : mtmd_image_preprocessor_minicpmv {
    using mtmd_image_preprocessor_minicpmv::mtmd_image_preprocessor_minicpmv;

    slice_instructions get_slice_instructions(const clip_image_size & picture) const override {
        if (qap_stock_encoder()) {
            return mtmd_image_preprocessor_minicpmv::get_slice_instructions(picture);
        }
        const clip_image_size grid   = nearest(picture);
        const bool            sliced = grid.width * grid.height > 1;
        slice_instructions    tiles  = {};
        tiles.overview_size          = fit(picture.width, picture.height, !sliced);
        check(picture, tiles.overview_size);
        if (!sliced) {
            return tiles;
        }
        const double          width  = (double) whole(picture.width, grid.width) / grid.width;
        const double          height = (double) whole(picture.height, grid.height) / grid.height;
        const clip_image_size slice  = fit(width, height, true);
        check(picture, slice);
        tiles.grid_size    = grid;
        tiles.refined_size = { grid.width * slice.width, grid.height * slice.height };
        for (int y = 0; y < grid.height; y++) {
            for (int x = 0; x < grid.width; x++) {
                tiles.slices.push_back({ x * slice.width, y * slice.height, slice });
            }
        }
        return tiles;
    }

private:
    // the mask of its windows has patches * patches numbers
    void check(const clip_image_size & picture, const clip_image_size & size) const {
        qap_check_thin(
            picture, size, (int64_t) hparams.image_size * hparams.image_size, hparams.patch_size * hparams.n_merge);
    }

    // find_best_resize(): the area of a slice, or as it is where it is smaller and need not grow
    clip_image_size fit(double width, double height, bool grow) const {
        const double side = hparams.image_size;
        const int    cell = hparams.patch_size * hparams.n_merge;
        if (grow || width * height > side * side) {
            const double shape = width / height;
            height             = std::trunc(side / std::sqrt(shape));
            width              = std::trunc(height * shape);
        }
        return { whole(width, cell), whole(height, cell) };
    }

    // get_sliced_grid()
    clip_image_size nearest(const clip_image_size & picture) const {
        const double    side  = hparams.image_size;
        const double    shape = std::log((double) picture.width / picture.height);
        const double    ratio = (double) picture.width * picture.height / (side * side);
        const int       count = (int) std::min(std::ceil(ratio), (double) MOST_SLICES);
        clip_image_size best  = { 1, 1 };
        double          least = std::numeric_limits<double>::infinity();
        for (int n = count - 1; count > 1 && n <= std::min(count + 1, MOST_SLICES); n++) {
            for (int rows = 1; n > 1 && rows <= n; rows++) {
                if (n % rows != 0) {
                    continue;
                }
                const double difference = std::fabs(shape - std::log((double) (n / rows) / rows));
                if (difference < least || (difference == least && rows > best.height)) {
                    best = { n / rows, rows };
                }
                least = std::min(least, difference);
            }
        }
        return best;
    }
};

} // namespace

std::unique_ptr<mtmd_image_preprocessor> qap_hook_minicpmv(const clip_ctx * ctx) {
    return std::make_unique<minicpmv_preprocessor>(ctx);
}
