// hooks-clip.cpp: the hooks inside the image encoder: find the attention in the graph, append the scores,
// read them back, select, gather. Upstream fact (llama.cpp 0c1e570): clip_encode() takes the last node of the
// graph as the embeddings.
#include "clip-graph.h"
#include "clip-impl.h"
#include "clip-model.h"
#include "device.h"
#include "early-drop.h"
#include "families/layout.h"
#include "find-attention.h"
#include "ggml-backend.h"
#include "keep.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap-plan.h"

#include <cmath>

// tensors that one image can add, views counted: scores and cosines take about 150, attention received up to 25 for
// each block of 256 queries, of which a token may be four
static size_t max_nodes(int64_t n_tokens) {
    return 512 + 4 * 32 * (size_t) (n_tokens / 256 + 2);
}

// Raw attention signals of the tokens, each [n_tokens] or null; means over the patches where several make a token.
static void build_attention(qap_graph & graph, ggml_cgraph * gf, const qap_layout & layout, bool cls, bool received) {
    ggml_context *      ctx   = graph.ctx.get();
    const int64_t       n_pos = layout.n_patches + (layout.cls_row >= 0 ? 1 : 0);
    const qap_attention in    = layout.attention ? qap_find_last_attention(gf, n_pos) : qap_attention();
    if (in.q == nullptr) {
        return;
    }
    if (cls && layout.cls_row >= 0) {
        ggml_tensor * row = qap_build_attention_row(ctx, in.q, in.k, layout.cls_row, in.scale);
        graph.attention   = qap_build_pooled(ctx, gf, row, layout);
    }
    if (received) {
        ggml_tensor * all = qap_build_attention_received(ctx, in.q, in.k, in.scale);
        graph.received    = qap_build_pooled(ctx, gf, all, layout);
    }
}

// What the LLaVA projector gets, [n_hidden, n_tokens]: CLIP's patches at the layer that is used, before projection.
static ggml_tensor * find_projector_input(ggml_cgraph * gf, const clip_model & model) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_MUL_MAT && model.mm_0_w != nullptr && node->src[0] == model.mm_0_w) {
            return node->src[1];
        }
    }
    return nullptr;
}

static qap_graph build_nodes(
    const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf, qap_plan * plan,
    const qap_params & params) {
    const qap_layout      all    = qap_layout_of(model, imgs.entries[0]);
    const qap_early_nodes early  = qap_early_find(gf);
    const qap_layout      layout = early.kept != nullptr ? qap_early_layout(all, early.kept->ne[0]) : all;
    qap_graph             graph;
    graph.plan      = plan;
    graph.n_tokens  = all.n_tokens;
    graph.n_columns = all.n_patches_x / all.n_merge;
    graph.ctx.reset(ggml_init({ ggml_tensor_overhead() * max_nodes(all.n_patches), nullptr, /* no_alloc */ true }));

    ggml_context * ctx = graph.ctx.get();
    graph.embeddings   = qap_early_put(ctx, ggml_graph_node(gf, -1), all, early.kept);
    graph.kept_early   = early.kept;
    graph.early_total  = early.total;
    const bool capture = plan != nullptr && plan->capture;
    const bool auto_   = params.semantic == QAP_SEMANTIC_AUTO;
    const bool has_cls = layout.cls_row >= 0;

    // auto: the class token's attention where there is one, else the attention received
    build_attention(
        graph, gf, layout, capture || auto_ || params.semantic == QAP_SEMANTIC_CLS,
        capture || (auto_ && !has_cls) || params.semantic == QAP_SEMANTIC_ATTENTION);

    if (capture && plan->capture_hidden) {
        ggml_tensor * input = find_projector_input(gf, model);
        graph.hidden        = input != nullptr ? ggml_cont(ctx, input) : nullptr;
    }
    std::vector<ggml_tensor *> outputs = { graph.embeddings, graph.attention, graph.received, graph.hidden };
    // who keeps all that an early drop has left chooses no more
    const bool choose = !capture && (early.kept == nullptr || plan->n_keep < early.kept->ne[0]);
    if (choose) {
        ggml_tensor * x         = qap_build_tokens(ctx, graph.embeddings, all);
        x                       = early.kept != nullptr ? ggml_get_rows(ctx, x, early.kept) : x;
        ggml_tensor * relevance = params.semantic == QAP_SEMANTIC_ATTENTION ? graph.received : graph.attention;
        relevance               = relevance == nullptr && auto_ ? graph.received : relevance;
        graph.scores            = qap_build_scores(ctx, x, relevance, params);
        if (qap_selector_needs_cosines(params.select) || params.merge != QAP_MERGE_NONE) {
            graph.cosines = qap_build_cosines(ctx, x);
            outputs.push_back(graph.cosines);
        }
    }
    for (ggml_tensor * node : outputs) {
        if (node != nullptr) {
            ggml_set_output(node);
            ggml_build_forward_expand(gf, node);
        }
    }
    qap_expand_scores(gf, graph.scores);
    return graph;
}

qap_graph qap_hook_reserve(const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf) {
    const bool plain = imgs.entries.size() == 1 && ggml_is_contiguous(ggml_graph_node(gf, -1)) &&
                       ggml_graph_node(gf, -1)->type == GGML_TYPE_F32;
    if (qap_disabled() || qap_projector_why_not(model.proj_type) != nullptr || !plain) {
        return {};
    }
    return build_nodes(model, imgs, gf, nullptr, qap_params_default());
}

qap_graph qap_hook_build(const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf) {
    return imgs.qap ? build_nodes(model, imgs, gf, imgs.qap.get(), imgs.qap->params) : qap_graph();
}

// --- results ---

static void read_floats(ggml_tensor * tensor, std::vector<float> & out) {
    out.clear();
    if (tensor != nullptr) {
        out.resize(ggml_nelements(tensor));
        qap_read_floats(tensor, out.data());
    }
}

static bool is_finite(const std::vector<float> & values) {
    for (const float value : values) {
        if (!std::isfinite(value)) {
            return false;
        }
    }
    return true;
}

// Scores and indices into the plan.
static int read_scores(const qap_graph & graph, qap_plan & plan, const std::vector<float> & cosines) {
    read_floats(graph.scores.error, plan.error);
    read_floats(graph.scores.outlier, plan.outlier);
    read_floats(graph.scores.sensitivity, plan.sensitivity);
    read_floats(graph.scores.semantic, plan.semantic);
    read_floats(graph.scores.total, plan.total);
    plan.alpha = plan.params.alpha;
    if (graph.scores.alpha != nullptr) {
        qap_read_bytes(graph.scores.alpha, &plan.alpha, 0, sizeof(float));
    }
    if (!is_finite(plan.outlier) || !is_finite(plan.attention) || !is_finite(plan.received)) {
        return qap_fail(
            "expected finite image features, got others from the encoder; check the mmproj file, or an f16 overflow on "
            "this device");
    }
    if (!is_finite(plan.error)) {
        const char * name = qap_name_from_id("error", plan.params.error);
        return plan.params.error >= QAP_ERROR_GGML
                   ? qap_fail("error: %s keeps scales in f16, which cannot hold features this large; use int4", name)
                   : qap_fail("expected finite image features, got others from the encoder; check the mmproj file");
    }
    return qap_keep_best(plan, graph.scores.semantic != nullptr, cosines);
}

// Copy the kept rows, runs of neighbours in one piece.
static void gather_rows(ggml_tensor * embeddings, const std::vector<int32_t> & rows, float * out) {
    const size_t row_size = ggml_row_size(embeddings->type, embeddings->ne[0]);
    for (size_t first = 0; first < rows.size();) {
        size_t last = first + 1;
        while (last < rows.size() && rows[last] == rows[last - 1] + 1) {
            last++;
        }
        qap_read_bytes(embeddings, (char *) out + first * row_size, rows[first] * row_size, (last - first) * row_size);
        first = last;
    }
}

// Which tokens are kept: all that left the tower, or the best of them.
static bool choose(const qap_graph & graph, qap_plan & plan, const std::vector<float> & cosines) {
    const bool early = !plan.early.empty();
    if (graph.scores.total == nullptr) {
        early ? plan.keep(plan.early) : plan.keep_all();
        return true;
    }
    if (!early) {
        return read_scores(graph, plan, cosines) == 0;
    }
    qap_plan left = qap_early_left(plan);
    if (read_scores(graph, left, cosines) != 0) {
        return false;
    }
    qap_early_take(plan, std::move(left));
    return true;
}

bool qap_hook_collect(const qap_graph & graph, std::vector<float> * out) {
    qap_plan &    plan   = *graph.plan;
    const int64_t n_embd = graph.embeddings->ne[0];
    const int64_t n_rows = ggml_nelements(graph.embeddings) / n_embd;
    const int64_t before = qap_bytes_read();
    plan.done            = false;

    if (graph.n_tokens != plan.n_total || n_rows != plan.n_rows()) {
        qap_fail("expected %d tokens from the encoder, got %d", (int) plan.n_total, (int) graph.n_tokens);
        LOG_ERR("%s: %s\n", __func__, qap_last_error());
        return false;
    }
    plan.n_columns = (int32_t) graph.n_columns;
    if (!qap_early_read({ graph.kept_early, graph.early_total }, plan)) {
        LOG_ERR("%s: %s\n", __func__, qap_last_error());
        return false;
    }
    read_floats(graph.attention, plan.attention);
    read_floats(graph.received, plan.received);
    read_floats(graph.hidden, plan.hidden);
    plan.n_hidden = graph.hidden != nullptr ? (int32_t) graph.hidden->ne[0] : 0;
    std::vector<float> cosines; // empty where neither the selection nor the merge needs them
    read_floats(graph.cosines, cosines);
    if (!choose(graph, plan, cosines)) {
        LOG_ERR("%s: %s\n", __func__, qap_last_error());
        return false;
    }
    plan.done = true;
    if (out != nullptr && !out->empty()) {
        if (out->size() != plan.rows.size() * (size_t) n_embd) {
            qap_fail("expected room for %zu rows of %d, got %zu floats", plan.rows.size(), (int) n_embd, out->size());
            LOG_ERR("%s: %s\n", __func__, qap_last_error());
            return false;
        }
        if (plan.capture || plan.params.merge == QAP_MERGE_NONE || graph.scores.total == nullptr) {
            gather_rows(graph.embeddings, plan.rows, out->data());
        } else {
            std::vector<float> all; // merging needs all rows on the host
            read_floats(graph.embeddings, all);
            const int failed = plan.early.empty() ? qap_keep_merged(plan, all.data(), n_embd, cosines, out->data())
                                                  : qap_early_merged(plan, all, n_embd, cosines, out->data());
            if (failed != 0) {
                LOG_ERR("%s: %s\n", __func__, qap_last_error());
                return false;
            }
        }
    }
    plan.bytes_read = qap_bytes_read() - before;
    return true;
}
