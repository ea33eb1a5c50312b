// letterbox.cpp: see letterbox.h. The geometry is that of img_tool::resize in tools/mtmd/mtmd-image.cpp (llama.cpp 0c1e570),
// which notes nothing itself, and resizes no pixels where only tokens are counted.
#include "families/letterbox.h"

#include "clip-impl.h"
#include "clip-model.h"

#include <algorithm>
#include <cmath>

// The area after a resize without padding; what is cut by an edge grows to whole pixels.
static qap_area stretched(const qap_area & from, const clip_image_size & source, const clip_image_size & target) {
    if (!from.padded) {
        return {};
    }
    const double  x = (double) target.width / source.width, y = (double) target.height / source.height;
    const int32_t left = (int32_t) std::floor(from.x * x), right = (int32_t) std::ceil((from.x + from.width) * x);
    const int32_t top = (int32_t) std::floor(from.y * y), bottom = (int32_t) std::ceil((from.y + from.height) * y);
    return { true, left, top, right - left, bottom - top };
}

qap_area qap_hook_resized(
    const qap_area & from, const clip_image_size & source, const clip_image_size & target, int pad) {
    if (source == target || pad == PAD_NONE || source.width < 1 || source.height < 1) {
        return stretched(from, source, target);
    }
    const float scale_x = (float) target.width / source.width, scale_y = (float) target.height / source.height;
    const float scale  = std::min(scale_x, scale_y);
    const auto  whole  = [pad](float size) { return (int) (pad == PAD_NEAREST ? std::round(size) : std::ceil(size)); };
    const int   width  = std::min(whole(source.width * scale), target.width);
    const int   height = std::min(whole(source.height * scale), target.height);
    const auto  middle = [pad](int room) { return pad == PAD_NEAREST ? (int) std::round(room / 2.0f) : room / 2; };

    qap_area area = stretched(from, source, { width, height });
    if (!area.padded) {
        area = { true, 0, 0, width, height };
    }
    area.x += middle(target.width - width);
    area.y += middle(target.height - height);
    return area;
}

qap_area qap_hook_cropped(const qap_area & from, int x, int y, int width, int height) {
    if (!from.padded) {
        return {};
    }
    const int left = std::max(from.x, x), right = std::min(from.x + from.width, x + width);
    const int top = std::max(from.y, y), bottom = std::min(from.y + from.height, y + height);
    return { true, left - x, top - y, std::max(0, right - left), std::max(0, bottom - top) };
}

std::vector<int32_t> qap_padding_tokens(const qap_area & area, int32_t cell, int32_t columns, int32_t lines) {
    std::vector<int32_t> padding;
    for (int32_t token = 0; area.padded && token < columns * lines; token++) {
        const int32_t x = token % columns * cell, y = token / columns * cell;
        const bool    meets_x = x < area.x + area.width && x + cell > area.x;
        const bool    meets_y = y < area.y + area.height && y + cell > area.y;
        if (!meets_x || !meets_y) {
            padding.push_back(token);
        }
    }
    return padding;
}
