// pixels.cpp: see pixels.h. Public prior work for duplicates: PixelPrune (arXiv 2604.00886).
//
// Upstream fact (llama.cpp 0c1e570): pixels are (level / 255 - mean) / std, in lines, the three colours of a pixel side by
// side (clip_image_f32::normalize() in clip-impl.h). Half a level is left for rounding.
#include "pixels.h"

#include "clip-impl.h"
#include "clip-model.h"
#include "families/layout.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

// What so many levels are in normalised pixels of a colour.
static float width_of(const clip_hparams & hparams, int colour, float levels) {
    return (levels + 0.5f) / (255.0f * hparams.image_std[colour]);
}

bool qap_is_flat(
    const clip_hparams & hparams, const float * pixels, int width, int height, const qap_area & area, int32_t level) {
    const int left   = area.padded ? std::clamp(area.x, 0, width) : 0;
    const int right  = area.padded ? std::clamp(area.x + area.width, left, width) : width;
    const int top    = area.padded ? std::clamp(area.y, 0, height) : 0;
    const int bottom = area.padded ? std::clamp(area.y + area.height, top, height) : height;
    for (int colour = 0; colour < 3; colour++) {
        float low = FLT_MAX, high = -FLT_MAX;
        for (int y = top; y < bottom; y++) {
            const float * line = pixels + (size_t) y * (size_t) width * 3 + colour;
            for (int x = left; x < right; x++) {
                low  = std::min(low, line[3 * (size_t) x]);
                high = std::max(high, line[3 * (size_t) x]);
            }
        }
        if (high - low > width_of(hparams, colour, 2.0f * (float) level)) { // up to `level` on either side of a colour
            return false;
        }
    }
    return true;
}

bool qap_is_flat(const clip_hparams & hparams, const clip_image_f32 & image, int32_t level) {
    return qap_is_flat(hparams, image.get_ro_buf().data(), image.nx(), image.ny(), image.qap_content, level);
}

namespace {

// The squares of pixels of a picture's tokens.
struct squares {
    const clip_image_f32_batch & images;
    size_t                       side;    // in pixels
    size_t                       columns; // of tokens
    float                        width[3] = {};

    const float * line(const clip_image_f32 & image, int32_t token, size_t y) const {
        const size_t top = (size_t) token / columns * side, left = (size_t) token % columns * side;
        return image.get_ro_buf().data() + ((top + y) * (size_t) image.nx() + left) * 3;
    }

    bool alike(int32_t a, int32_t b) const {
        for (const clip_image_f32 & image : images.entries) {
            for (size_t y = 0; y < side; y++) {
                const float *one = line(image, a, y), *other = line(image, b, y);
                for (size_t i = 0; i < 3 * side; i++) {
                    if (!(std::fabs(one[i] - other[i]) <= width[i % 3])) {
                        return false;
                    }
                }
            }
        }
        return true;
    }
};

} // namespace

std::vector<int32_t> qap_distinct_tokens(
    const clip_model & model, const clip_image_f32_batch & images, const std::vector<int32_t> & tokens, int32_t level) {
    const qap_layout layout  = qap_layout_of(model, images.entries[0]);
    const auto       side    = (size_t) (model.hparams.patch_size * layout.n_merge);
    const auto       columns = (size_t) (layout.n_patches_x / layout.n_merge);
    squares          all     = { images, side, columns };
    for (int colour = 0; colour < 3; colour++) {
        all.width[colour] = width_of(model.hparams, colour, (float) level);
    }
    std::vector<int32_t> distinct;
    for (const int32_t token : tokens) {
        const auto repeats = [&](int32_t earlier) { return all.alike(earlier, token); };
        if (std::none_of(distinct.begin(), distinct.end(), repeats)) {
            distinct.push_back(token);
        }
    }
    return distinct;
}
