// early-plan.cpp: see early-drop.h. What an early drop needs on the host: how many patches go on and why none may be
// dropped, before the encode; which ones went on, after it.
#include "clip-impl.h"
#include "clip-model.h"
#include "device.h"
#include "early-drop.h"
#include "families/pack.h"
#include "keep.h"
#include "qap-error.h"

#include <algorithm>
#include <cmath>
#include <string>

// --- before the encode ---

static bool is_llava(const clip_model & model) {
    return model.proj_type == PROJECTOR_TYPE_MLP || model.proj_type == PROJECTOR_TYPE_MLP_NORM;
}

// How many layers run in front of the projector; those of LLaVA stop at the layer that its projector reads.
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

// After how many layers patches are dropped: a quarter of them unless asked otherwise.
static int32_t drop_after(const clip_model & model, const qap_params & params) {
    return params.encoder_layer > 0 ? params.encoder_layer : std::max(1, count_layers(model) / 4);
}

std::string qap_early_why_not(const clip_model & model, const clip_image_f32 & image, const qap_params & params) {
    if (const char * why_not = qap_projector_why_not(model.proj_type)) {
        return why_not;
    }
    if (qap_stock_encoder()) {
        return "encoder_keep: QAP_STOCK_ENCODER=1 asks for upstream's encoder as it is; unset it, or use encoder_keep "
               "1";
    }
    if (qap_packs(model.proj_type, image)) {
        return "encoder_keep: LLaVA-NeXT's tiles are put together from whole ones; use encoder_keep 1 for this model";
    }
    const qap_layout layout = qap_layout_of(model, image);
    if (layout.windows) {
        return "encoder_keep: this tower (projector qwen2.5vl_merger) attends in windows, which need every patch; use "
               "encoder_keep 1 for this model";
    }
    if (!layout.attention) {
        return "encoder_keep: the last tokens of this picture have fewer patches than the others; use encoder_keep 1, "
               "or a picture whose sides are whole tokens";
    }
    if (is_llava(model) && model.hparams.feature_layers.size() > 1) {
        return "encoder_keep: the projector of this model reads several layers, and they must have the same patches; "
               "use encoder_keep 1 for this model";
    }
    const int32_t n_layers = count_layers(model), after = drop_after(model, params);
    if (after >= n_layers) {
        return "encoder_layer: expected a number in 1.." + std::to_string(n_layers - 1) + " for an encoder that runs " +
               std::to_string(n_layers) + " layers, got " + std::to_string(after) +
               "; choose one in that range, or use encoder_keep 1";
    }
    return "";
}

int qap_early_plan(
    qap_plan & plan, const clip_model & model, const clip_image_f32_batch & images, const qap_params & params) {
    plan.n_early = 0;
    if (params.encoder_keep >= 1.0 || images.entries.empty()) {
        return 0;
    }
    const std::string why_not = qap_early_why_not(model, images.entries[0], params);
    if (!why_not.empty()) {
        return qap_fail("%s", why_not.c_str());
    }
    // as qap_params_count() has it; whoever keeps K tokens at the end needs K of them here
    const auto wanted = (int32_t) std::ceil(params.encoder_keep * plan.n_total - 1e-9);
    plan.n_early      = std::min(plan.n_total, std::max({ 1, wanted, plan.n_keep }));
    plan.early_after  = drop_after(model, params);
    return 0;
}

// --- after the encode ---

bool qap_early_read(const qap_early_nodes & nodes, qap_plan & plan) {
    plan.early.clear();
    plan.early_total.clear();
    if (plan.n_early < 1 || plan.n_early >= plan.n_total) {
        return true; // all go on
    }
    if (nodes.kept == nullptr || nodes.total == nullptr || nodes.kept->ne[0] != plan.n_early) {
        qap_fail("encoder_keep: this encoder did not drop its patches after layer %d", (int) plan.early_after);
        return false;
    }
    plan.early.resize((size_t) plan.n_early);
    plan.early_total.resize((size_t) plan.n_total);
    qap_read_bytes(nodes.kept, plan.early.data(), 0, plan.early.size() * sizeof(int32_t));
    qap_read_floats(nodes.total, plan.early_total.data());
    int32_t before = -1;
    for (const int32_t token : plan.early) {
        if (token <= before || token >= plan.n_total) {
            qap_fail("encoder_keep: expected finite scores inside of the encoder, got others; check the mmproj file");
            return false;
        }
        before = token;
    }
    return true;
}

qap_plan qap_early_left(const qap_plan & plan) {
    qap_plan left    = plan;
    left.n_total     = plan.n_early;
    left.n_early     = 0;
    left.early_total = {};
    left.keep(plan.early); // rows: those of all that is left, special ones among them
    left.special.clear();
    for (size_t i = 0; i < left.rows.size(); i++) {
        if (std::binary_search(plan.special.begin(), plan.special.end(), left.rows[i])) {
            left.special.push_back((int32_t) i);
        }
    }
    left.keep_all();
    return left;
}

void qap_early_take(qap_plan & plan, qap_plan && left) {
    plan.alpha       = left.alpha;
    plan.error       = std::move(left.error);
    plan.outlier     = std::move(left.outlier);
    plan.sensitivity = std::move(left.sensitivity);
    plan.semantic    = std::move(left.semantic);
    plan.total       = std::move(left.total);
    for (int32_t & token : left.indices) {
        token = plan.early[(size_t) token];
    }
    plan.keep(std::move(left.indices));
}

int qap_early_merged(
    const qap_plan & plan, const std::vector<float> & all, int64_t width, const std::vector<float> & cosines,
    float * out) {
    qap_plan whole = plan;
    whole.keep(plan.early);
    std::vector<float> rows;
    for (const int32_t row : whole.rows) {
        rows.insert(rows.end(), all.begin() + row * width, all.begin() + (row + 1) * width);
    }
    std::vector<int32_t> chosen; // among what is left
    for (const int32_t token : plan.indices) {
        chosen.push_back(
            (int32_t) (std::lower_bound(plan.early.begin(), plan.early.end(), token) - plan.early.begin()));
    }
    qap_plan left = qap_early_left(plan);
    left.keep(std::move(chosen));
    return qap_keep_merged(left, rows.data(), width, cosines, out);
}
