// resize.cpp: how pictures come to the size that an encoder takes (006-resize.patch).
//
// Facts: the image processors of transformers 5.24. Qwen-VL, GLM-4V, PaddleOCR-VL, EXAONE 4.5, Gemma 3 and 4, Pixtral and
// LightOnOCR resize without regard to the aspect ratio; tiles of InternVL and MiniCPM-V 4.6 are cut out of a stretched
// picture; Pixtral's and LightOnOCR's pictures come down to a longest edge, the tower's image_size in all published checkpoints,
// and their sides go up to whole tokens. HunyuanVL's processor has LANCZOS in its settings and resizes with BICUBIC, as its
// authors' code did.
#include "families/forced.h"
#include "families/layout.h"

#include "clip-impl.h"
#include "clip-model.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

static std::atomic<int32_t> resize_mode{ QAP_RESIZE_AUTO };

int qap_resize_set(int32_t mode) {
    if (mode != QAP_RESIZE_AUTO && mode != QAP_RESIZE_STRETCH && mode != QAP_RESIZE_PAD) {
        return qap_fail("resize: unknown id %d", (int) mode);
    }
    resize_mode = mode;
    qap_clear_error();
    return 0;
}

bool qap_projector_stretched(int projector) {
    switch (projector) {
        case PROJECTOR_TYPE_QWEN2VL:
        case PROJECTOR_TYPE_QWEN25VL:
        case PROJECTOR_TYPE_QWEN3VL:
        case PROJECTOR_TYPE_GLM4V:
        case PROJECTOR_TYPE_PADDLEOCR:
        case PROJECTOR_TYPE_EXAONE4_5:
        case PROJECTOR_TYPE_GEMMA3:
        case PROJECTOR_TYPE_GEMMA4V:
        case PROJECTOR_TYPE_GEMMA4UV:
        case PROJECTOR_TYPE_PIXTRAL:
        case PROJECTOR_TYPE_LIGHTONOCR:
        case PROJECTOR_TYPE_MINICPMV4_6:
        case PROJECTOR_TYPE_INTERNVL: return true;
        default: return false;
    }
}

// What the program has set, or for one that knows nothing of it, QAP_RESIZE.
static int32_t mode_now() {
    const char * text = std::getenv("QAP_RESIZE");
    if (resize_mode != QAP_RESIZE_AUTO || text == nullptr || *text == '\0' || std::strcmp(text, "auto") == 0) {
        return resize_mode;
    }
    if (std::strcmp(text, "stretch") == 0) {
        return QAP_RESIZE_STRETCH;
    }
    if (std::strcmp(text, "pad") == 0) {
        return QAP_RESIZE_PAD;
    }
    throw std::runtime_error(
        string_format("qap: QAP_RESIZE: expected auto, stretch or pad, got '%.40s'; correct it or unset it", text));
}

bool qap_hook_size(
    clip_image_size & size, const clip_image_size & picture, int align, int min_pixels, int max_pixels, int edge) {
    if (qap_stock_encoder() || align < 1 || picture.width < 1 || picture.height < 1) {
        return false;
    }
    double width = picture.width, height = picture.height;
    if (const double ratio = edge > 0 ? std::max(height / edge, width / edge) : 1.0; ratio > 1.0) {
        width  = std::max(1.0, std::floor(width / ratio));
        height = std::max(1.0, std::floor(height / ratio));
    }
    const auto up   = [align](double x) { return (int) std::ceil(x / align) * align; };
    const auto down = [align](double x) { return std::max((int) std::floor(x / align) * align, align); };
    const auto near = [align, edge, up](double x) {
        return edge > 0 ? up(x) : std::max((int) std::nearbyint(x / align) * align, align); // halves to the even number
    };
    size                 = { near(width), near(height) };
    const int64_t pixels = (int64_t) size.width * size.height;
    if (max_pixels > 0 && pixels > max_pixels) {
        const double scale = std::sqrt(height * width / max_pixels);
        size               = { down(width / scale), down(height / scale) };
    } else if (min_pixels > 0 && pixels < min_pixels) {
        const double scale = std::sqrt(min_pixels / (height * width));
        size               = { up(width * scale), up(height * scale) };
    }
    qap_check_thin(picture, size, max_pixels, align);
    return true;
}

// Pixtral, Mistral 3, LightOnOCR: no limit on tokens but the longest edge. A file without one (0) keeps upstream's limits.
static void limit_edge(clip_hparams & hparams, int64_t edge) {
    const int64_t cell      = (int64_t) hparams.patch_size * hparams.n_merge;
    const int64_t most      = std::numeric_limits<int32_t>::max();
    hparams.image_ceil_edge = (int32_t) (edge > 0 ? edge : most);
    if (edge < 1 || cell < 1) {
        return;
    }
    const int64_t side       = (edge + cell - 1) / cell * cell;
    hparams.image_max_pixels = (int32_t) std::min(side * side, most);
    if (hparams.custom_image_min_tokens < 1) {
        hparams.image_min_pixels = (int32_t) (cell * cell); // one token: libmtmd asserts that there is a limit
    }
}

void qap_hook_resize(int projector, clip_hparams & hparams) {
    const auto type = (projector_type) projector;
    if ((type == PROJECTOR_TYPE_PIXTRAL || type == PROJECTOR_TYPE_LIGHTONOCR) && !qap_stock_encoder()) {
        limit_edge(hparams, type == PROJECTOR_TYPE_PIXTRAL ? hparams.image_size : hparams.image_longest_edge);
    }
    if (type == PROJECTOR_TYPE_LLAMA4) {
        hparams.preproc_max_tiles = hparams.preproc_max_tiles > 0 ? hparams.preproc_max_tiles : QAP_LLAMA4_TILES;
    }
    qap_limit_tokens(projector, hparams);
    qap_force_family(projector, hparams);
    if (type == PROJECTOR_TYPE_GRANITE4_VISION && hparams.image_res_candidates.empty()) {
        throw std::runtime_error(
            "qap: expected clip.vision.image_grid_pinpoints, by which Granite 4's pictures are cut, got none; "
            "convert the checkpoint anew"); // upstream asserts on it at the first picture
    }
    if (qap_stock_encoder()) {
        return;
    }
    const int32_t mode = mode_now();
    if (type == PROJECTOR_TYPE_HUNYUANVL) {
        hparams.image_resize_algo = RESIZE_ALGO_BICUBIC;
    }
    if (mode == QAP_RESIZE_STRETCH || (mode == QAP_RESIZE_AUTO && qap_projector_stretched(projector))) {
        hparams.image_resize_pad = PAD_NONE;
        hparams.image_pad_rf     = PAD_NONE;
    } else if (mode == QAP_RESIZE_PAD) {
        hparams.image_resize_pad = PAD_CEIL;
        hparams.image_pad_rf     = PAD_CEIL;
        hparams.image_pad_ov     = PAD_CEIL;
    }
}
