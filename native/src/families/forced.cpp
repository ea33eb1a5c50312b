// forced.cpp: families that were not compared with their originals, but whose rows have a place by llama.cpp's source: a
// token for each block of patches (Gemma 3n: of pixels), line by line. They are pruned where that is asked for at loading
// (QAP_FORCE_FAMILY, force_family), and not by their attention. Facts: tools/mtmd/models/*.cpp and clip_n_output_tokens()
// (llama.cpp 0c1e570).
#include "families/forced.h"

#include "clip-impl.h"
#include "clip-model.h"
#include "families/layout.h"
#include "qap-error.h"
#include "qap.h"

#include <algorithm>
#include <atomic>

static std::atomic<bool> forced{ false };

void qap_force_family_set(bool on) {
    forced = on;
}

struct forced_row {
    projector_type projector;
    int32_t        n_merge; // patches of a token, per side; 0: what the file says
    bool           ends;    // a row before the tokens and one after them, which are none
};

// Not here, for their rows have no such place: resampled ones, pooled ones, and those with ends of lines among them.
static const forced_row ROWS[] = {
    { PROJECTOR_TYPE_LDP,            2,  false },
    { PROJECTOR_TYPE_LDPV2,          2,  false },
    { PROJECTOR_TYPE_GLM_EDGE,       2,  true  },
    { PROJECTOR_TYPE_COGVLM,         1,  true  },
    { PROJECTOR_TYPE_PHI4,           1,  false },
    { PROJECTOR_TYPE_GEMMA3NV,       16, false }, // its "patches" are as many a side as it has tokens
    { PROJECTOR_TYPE_DOTS_OCR,       0,  false },
    { PROJECTOR_TYPE_DOTS3NOTE_V,    0,  false },
    { PROJECTOR_TYPE_NEMOTRON_V2_VL, 0,  false },
    { PROJECTOR_TYPE_STEP3VL,        0,  false },
    { PROJECTOR_TYPE_YOUTUVL,        2,  false },
    { PROJECTOR_TYPE_MIMOVL,         2,  false },
    { PROJECTOR_TYPE_LING3VL,        2,  false },
    { PROJECTOR_TYPE_MINIMAX_M3,     2,  false },
    { PROJECTOR_TYPE_GLM5V,          2,  false },
    { PROJECTOR_TYPE_MUSE_GLIMMER,   2,  false },
};

static const forced_row * find_row(int projector) {
    for (const forced_row & row : ROWS) {
        if (row.projector == projector) {
            return &row;
        }
    }
    return nullptr;
}

bool qap_projector_can_be_forced(int projector) {
    return find_row(projector) != nullptr;
}

bool qap_projector_has_ends(int projector) {
    const forced_row * row = find_row(projector);
    return row != nullptr && row->ends;
}

void qap_force_family(int projector, clip_hparams & hparams) {
    hparams.qap_forced =
        find_row(projector) != nullptr && !qap_disabled() && (forced || qap_env_is_on("QAP_FORCE_FAMILY"));
    if (hparams.qap_forced) {
        LOG_WRN(
            "qap: this family (projector %s) was not compared with its original here; pruned because force_family is "
            "set\n",
            PROJECTOR_TYPE_NAMES[(projector_type) projector].c_str());
    }
}

qap_layout qap_forced_layout(const clip_model & model, const clip_image_f32 & image) {
    const forced_row & row   = *find_row(model.proj_type);
    const int          patch = model.hparams.patch_size;
    qap_layout         layout;
    layout.attention    = false;
    layout.n_planes     = qap_planes_of(model);
    layout.n_patches_x  = image.nx() / patch;
    layout.n_patches    = layout.n_patches_x * (image.ny() / patch);
    layout.n_merge      = row.n_merge > 0 ? row.n_merge : std::max(1, model.hparams.n_merge);
    const int64_t lines = image.ny() / patch / layout.n_merge;
    layout.n_tokens     = lines * (layout.n_patches_x / layout.n_merge);
    if (row.ends) { // as one line between two special rows
        layout.first_token = 1;
        layout.line_length = layout.n_tokens;
    }
    return layout;
}

int qap_check_forced(const clip_model & model, const clip_image_f32 & image, int32_t n_tokens) {
    if (!model.hparams.qap_forced) {
        return 0;
    }
    const int64_t expected = qap_layout_of(model, image).n_tokens;
    return expected == n_tokens
               ? 0
               : qap_fail(
                     "cannot prune this image: expected a token for each of %lld places of the picture, got %d; its "
                     "family was not compared with its original here, so leave force_family out",
                     (long long) expected, (int) n_tokens);
}
