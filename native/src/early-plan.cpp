// early-plan.cpp: see early-drop.h. What an early drop needs on the host: how many patches are kept and why none may be
// dropped, before the encode; which ones were kept, after it.
#include "clip-impl.h"
#include "clip-model.h"
#include "device.h"
#include "early-drop.h"
#include "families/pack.h"
#include "pixels.h"
#include "qap-error.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

// --- before the encode ---

// Attention received adds up to 25 tensors for each 256 patches, and upstream's graph has room for 8192 (clip.cpp).
static const int64_t MAX_PATCHES = 1 << 15;

static bool is_llava(const clip_model & model) {
    return model.proj_type == PROJECTOR_TYPE_MLP || model.proj_type == PROJECTOR_TYPE_MLP_NORM;
}

// How many layers run before the projector; those of LLaVA stop at the layer that its projector reads.
static int32_t count_layers(const clip_model & model) {
    const int32_t stored = model.hparams.n_layer;
    if (!is_llava(model)) {
        return stored;
    }
    // clip_graph_llava::build() with 002-llava-encoder.patch
    int32_t deepest = -1;
    for (const int32_t layer : model.hparams.feature_layers) {
        deepest = std::max(deepest, layer);
    }
    return deepest >= 0 ? deepest : model.class_embedding != nullptr ? stored : stored - 1;
}

// Of a tower with windows each n-th layer attends to the whole picture, and only these can say what is worth keeping.
static int32_t whole_every(const clip_model & model) {
    return qap_tower_windows(model.proj_type) && model.hparams.n_wa_pattern > 0 ? model.hparams.n_wa_pattern : 1;
}

// After how many layers patches are dropped: a quarter of them unless asked otherwise, or the next one that can say.
static int32_t drop_after(const clip_model & model, const qap_params & params) {
    if (params.encoder_layer > 0) {
        return params.encoder_layer;
    }
    const int32_t quarter = std::max(1, count_layers(model) / 4), every = whole_every(model);
    return (quarter + every - 1) / every * every;
}

// The reasons are those of duplicates, which are left out before the first layer, or else of an early drop.
std::string qap_early_why_not(const clip_model & model, const clip_image_f32 & image, const qap_params & params) {
    if (const char * why_not = qap_why_not_prunable(model)) {
        return why_not;
    }
    const bool        before = params.duplicates >= 0;
    const std::string name   = before ? "duplicates: " : "encoder_keep: ";
    const std::string off    = before ? "leave it out" : "use encoder_keep 1";
    if (qap_stock_encoder()) {
        return name + "QAP_STOCK_ENCODER=1 asks for upstream's encoder as it is; unset it, or " + off;
    }
    if (qap_packs(model.proj_type, image)) {
        return name + "LLaVA-NeXT's tiles are put together from whole ones; " + off + " for this model";
    }
    if (!qap_projector_compared(model.proj_type)) {
        return name + "this family was not compared with its original here, and its tower is left as it is; " + off +
               " for this model";
    }
    const qap_layout layout = qap_layout_of(model, image);
    if (model.hparams.n_layer < 1) {
        return "encoder_keep: this encoder has no layers; use encoder_keep 1 for this model";
    }
    if (model.proj_type == PROJECTOR_TYPE_MINICPMV4_6) {
        return "encoder_keep: this tower (projector minicpmv4_6) merges patches between its layers; "
               "use encoder_keep 1 for this model";
    }
    if (model.proj_type == PROJECTOR_TYPE_GRANITE4_VISION) {
        return "encoder_keep: the projector of this model (granite4_vision) reads windows of several layers, "
               "which need every patch; use encoder_keep 1 for this model";
    }
    if (!layout.attention) {
        return name + "the last tokens of this picture have fewer patches than the others; " + off +
               ", or a picture whose sides are whole tokens";
    }
    if (layout.n_patches > MAX_PATCHES) {
        return name + "expected a picture of up to " + std::to_string(MAX_PATCHES) + " patches, got " +
               std::to_string(layout.n_patches) + "; scale it down, or " + off;
    }
    if (is_llava(model) && model.hparams.feature_layers.size() > 1) {
        return name + "the projector of this model reads several layers, and they must have the same patches; " + off +
               " for this model";
    }
    const int32_t n_layers = count_layers(model), after = drop_after(model, params);
    if (!before && after >= n_layers) {
        return "encoder_layer: expected a number in 1.." + std::to_string(n_layers - 1) + " for an encoder that runs " +
               std::to_string(n_layers) + " layers, got " + std::to_string(after) +
               "; choose one in that range, or use encoder_keep 1";
    }
    if (const int32_t every = whole_every(model); !before && after % every != 0) {
        return "encoder_layer: expected a multiple of " + std::to_string(every) +
               ", after whose layers this tower attends to the whole picture and not in windows, got " +
               std::to_string(after) + "; leave it out, or use encoder_keep 1";
    }
    return "";
}

// What the pixels say of a picture that is no placeholder; of one that is, the plan stays at the most that there can be.
static void look_at_pixels(qap_plan & plan, const clip_model & model, const clip_image_f32_batch & images) {
    const qap_params &         params = plan.params;
    const clip_image_f32 &     first  = images.entries[0];
    const std::vector<int32_t> real   = plan.real_tokens();
    if (params.skip_flat_tiles >= 0 && qap_packs(model.proj_type, first)) {
        const std::vector<int32_t> shown = qap_packed_left(model.hparams, first, params.skip_flat_tiles);
        std::vector<int32_t>       left;
        std::set_intersection(real.begin(), real.end(), shown.begin(), shown.end(), std::back_inserter(left));
        plan.give(std::move(left));
        return;
    }
    plan.flat = params.skip_flat_tiles >= 0 && first.qap_content.tile == 2 &&
                qap_is_flat(model.hparams, first, params.skip_flat_tiles);
    if (!plan.flat && params.duplicates >= 0) {
        plan.give(qap_distinct_tokens(model, images, real, params.duplicates));
    }
}

int qap_early_plan(qap_plan & plan, const clip_model & model, const clip_image_f32_batch & images) {
    plan.n_early = plan.early_after = 0;
    plan.given = plan.flat = false;
    plan.early.clear();
    if (images.entries.empty()) {
        return 0;
    }
    const clip_image_f32 & first = images.entries[0];
    if (plan.params.encoder_keep < 1.0 || plan.params.duplicates >= 0) {
        const std::string why_not = qap_early_why_not(model, first, plan.params);
        if (!why_not.empty()) {
            return qap_fail("%s", why_not.c_str());
        }
    }
    if (!first.is_placeholder()) {
        look_at_pixels(plan, model, images);
    }
    if (plan.flat || plan.params.encoder_keep >= 1.0) {
        return 0;
    }
    // a slice that is padding alone still needs a row
    const int32_t n_early = plan.n_real() > 0 ? qap_params_count_early(&plan.params, plan.n_real()) : 1;
    if (n_early < plan.n_total) {
        plan.n_early     = n_early;
        plan.early_after = drop_after(model, plan.params);
    }
    return 0;
}

// --- after the encode ---

// plan.early_near from the cosines of what is left with all candidates: those with what was dropped.
static int read_near(ggml_tensor * near, const std::vector<int32_t> & candidates, qap_plan & plan) {
    const std::vector<int32_t> dropped = plan.dropped_early();
    const size_t               n       = candidates.size();
    if (near == nullptr || dropped.empty()) {
        return 0;
    }
    if (near->ne[0] != (int64_t) n || near->ne[1] != plan.n_early) {
        return qap_fail("encoder_keep: expected cosines of %d tokens from the encoder", (int) plan.n_early);
    }
    std::vector<float>   all(n * (size_t) plan.n_early);
    std::vector<int32_t> places; // of what was dropped among the candidates
    qap_read_floats(near, all.data());
    for (size_t i = 0; i < n; i++) {
        if (std::binary_search(dropped.begin(), dropped.end(), candidates[i])) {
            places.push_back((int32_t) i);
        }
    }
    plan.early_near.reserve(places.size() * (size_t) plan.n_early);
    for (size_t row = 0; row < (size_t) plan.n_early; row++) {
        for (const int32_t place : places) {
            plan.early_near.push_back(all[row * n + (size_t) place]);
        }
    }
    return 0;
}

int qap_early_read(const qap_early_nodes & nodes, qap_plan & plan, bool near) {
    plan.early_total.clear();
    plan.early_near.clear();
    if (plan.given) { // it is in the plan already
        const bool done = nodes.kept != nullptr && nodes.kept->ne[0] == plan.n_early;
        return done ? 0 : qap_fail("duplicates: this encoder did not leave them out");
    }
    plan.early.clear();
    if (plan.n_early == 0) {
        return 0;
    }
    std::vector<int32_t> candidates = plan.real_tokens();
    if (candidates.empty()) {
        candidates.resize((size_t) plan.n_total);
        std::iota(candidates.begin(), candidates.end(), 0);
    }
    const bool done = nodes.kept != nullptr && nodes.total != nullptr && nodes.kept->ne[0] == plan.n_early &&
                      nodes.total->ne[0] == (int64_t) candidates.size();
    if (!done) {
        return qap_fail("encoder_keep: this encoder did not drop its patches after layer %d", (int) plan.early_after);
    }
    std::vector<int32_t> kept((size_t) plan.n_early);
    std::vector<float>   total(candidates.size());
    qap_read_bytes(nodes.kept, kept.data(), 0, kept.size() * sizeof(int32_t));
    qap_read_floats(nodes.total, total.data());
    const bool finite = std::all_of(total.begin(), total.end(), [](float score) { return std::isfinite(score); });
    if (!finite || !std::includes(candidates.begin(), candidates.end(), kept.begin(), kept.end())) {
        return qap_fail("encoder_keep: expected finite scores inside the encoder, got others; check the mmproj file");
    }
    plan.early = std::move(kept);
    plan.early_total.resize((size_t) plan.n_total);
    plan.spread(candidates, total.data(), plan.early_total.data());
    return near ? read_near(nodes.near, candidates, plan) : 0;
}
