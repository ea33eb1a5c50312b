// early-drop.h: prune inside of the image encoder. After some layers only the best tokens' patches go on, so that the
// later layers have fewer rows (docs/method.md, "Early drop").
//
// What was dropped is put back as zeros where the projector wants a whole picture, so that everything behind the encoder
// finds the rows that it always finds; only those of qap_plan::early mean something.
#pragma once

#include "families/layout.h"
#include "qap-hooks.h"
#include "qap-plan.h"

#include <string>

// One line that says why patches cannot be dropped early as asked, or "".
std::string qap_early_why_not(const clip_model & model, const clip_image_f32 & image, const qap_params & params);

// Write to the plan how many of its tokens go on behind which layer, where params.encoder_keep asks for it; -1 with an
// error where this tower cannot. plan.n_keep of them go on in any case.
int qap_early_plan(
    qap_plan & plan, const clip_model & model, const clip_image_f32_batch & images, const qap_params & params);

// What the hooks of the layers left in a graph; null where nothing was dropped.
struct qap_early_nodes {
    ggml_tensor * kept  = nullptr; // [n_early] I32, tokens that went on, ascending
    ggml_tensor * total = nullptr; // [n_tokens], by which they were chosen
};

qap_early_nodes qap_early_find(ggml_cgraph * gf);

// The rows that go on, as those of a picture of their own.
qap_layout qap_early_layout(const qap_layout & layout, int64_t n_early);

// Rows of the tokens that went on, at their places among all: [width, n_early] -> [width, n_tokens], zeros elsewhere.
// What has the rows of all tokens already comes back as it is.
ggml_tensor * qap_early_put(ggml_context * ctx, ggml_tensor * rows, const qap_layout & layout, ggml_tensor * kept);

// Read plan.early and plan.early_total; false with an error where the graph did not do what the plan asks for.
bool qap_early_read(const qap_early_nodes & nodes, qap_plan & plan);

// The plan of a picture that has nothing but what is left, for scores and selection; and its results put back.
qap_plan qap_early_left(const qap_plan & plan);
void     qap_early_take(qap_plan & plan, qap_plan && left);
// qap_keep_merged() over what is left. all: [plan.n_rows(), width], cosines: [n_early, n_early]
int qap_early_merged(
    const qap_plan & plan, const std::vector<float> & all, int64_t width, const std::vector<float> & cosines,
    float * out);
