// early-drop.h: prune inside the image encoder. After some layers only the best tokens' patches are kept, so that the
// later layers have fewer rows (docs/method.md, "Early drop"). Tokens that repeat others are seen in the pixels (pixels.h):
// their patches are left out from the first layer on. A tile of one colour is not encoded at all.
//
// What was dropped is put back as zeros, so that everything after the encoder finds the rows that it always finds. Only
// those of qap_plan::early mean something, and pruning chooses among these alone.
#pragma once

#include "families/layout.h"
#include "qap-hooks.h"
#include "qap-plan.h"

#include <string>

// One line that says why patches cannot be dropped early as asked, or "".
std::string qap_early_why_not(const clip_model & model, const clip_image_f32 & image, const qap_params & params);

// Write to the plan what of the picture the encoder need not see, as plan.params asks for it: how many of its tokens are
// kept after which layer, which ones are kept from the start, or that it is a flat tile. -1 with an error where this tower
// cannot. Tokens that are padding are dropped first: if others are dropped, all of them are.
int qap_early_plan(qap_plan & plan, const clip_model & model, const clip_image_f32_batch & images);

// What the hooks of the layers left in a graph; null where nothing was dropped.
struct qap_early_nodes {
    ggml_tensor * kept  = nullptr; // [n_early] I32, tokens that are left, ascending
    ggml_tensor * total = nullptr; // [n_real] (all tokens if none is real), by which they were chosen
    ggml_tensor * near =
        nullptr; // [n_real, n_early], cosines of those that are left with all; null where those are many
};

qap_early_nodes qap_early_find(ggml_cgraph * gf);

// The rows that are left, as those of a picture of their own.
qap_layout qap_early_layout(const qap_layout & layout, int64_t n_early);

// Rows of the tokens that are left, at their places among all: [width, n_early] -> [width, n_tokens], zeros elsewhere.
// What has the rows of all tokens already comes back as it is.
ggml_tensor * qap_early_put(ggml_context * ctx, ggml_tensor * rows, const qap_layout & layout, ggml_tensor * kept);

// Read plan.early, plan.early_total and, if it is wanted, plan.early_near; -1 with an error where the graph did not do what the plan asks for.
int qap_early_read(const qap_early_nodes & nodes, qap_plan & plan, bool near);
