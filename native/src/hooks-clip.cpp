// hooks-clip.cpp: the hooks inside the image encoder: find the attention in the graph, append the scores,
// read them back, select, gather. Upstream facts (llama.cpp 0c1e570): clip_encode() takes the last node of the
// graph as the embeddings; build_attn() makes either flash_attn_ext(q, cast(k), ...) or soft_max(mul_mat(k, q)).
#include "clip-graph.h"
#include "clip-impl.h"
#include "clip-model.h"
#include "device.h"
#include "families/layout.h"
#include "ggml-backend.h"
#include "keep.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap-plan.h"

#include <cmath>
#include <cstring>

// tensors that one image can add, views counted: scores and cosines take about 150, attention received up to 25 for
// each block of 256 queries, of which a token may be four
static size_t max_nodes(int64_t n_tokens) {
    return 512 + 4 * 32 * (size_t) (n_tokens / 256 + 2);
}

// q and k of one self-attention, [d_head, n_pos, n_head] each
struct attention_inputs {
    ggml_tensor * q     = nullptr;
    ggml_tensor * k     = nullptr;
    float         scale = 1.0f;
};

// The last self-attention over n_pos positions: that of the layer whose output the projector gets. None if it has a mask
// (windows): its weights are not those of a plain softmax.
static attention_inputs find_last_attention(ggml_cgraph * gf, int64_t n_pos) {
    for (int i = ggml_graph_n_nodes(gf) - 1; i >= 0; i--) {
        ggml_tensor *    node = ggml_graph_node(gf, i);
        attention_inputs in;
        bool             masked = false;
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            masked = node->src[3] != nullptr;
            in.q   = node->src[0];
            in.k   = node->src[1];
            if (in.k->op == GGML_OP_CPY && in.k->src[0]->type == GGML_TYPE_F32) {
                in.k = in.k->src[0]; // before the cast to f16
            }
        } else if (node->op == GGML_OP_SOFT_MAX && node->src[0]->op == GGML_OP_MUL_MAT) {
            masked = node->src[1] != nullptr;
            in.k   = node->src[0]->src[0];
            in.q   = node->src[0]->src[1];
        } else {
            continue;
        }
        // both operations keep the scale first among their parameters
        std::memcpy(&in.scale, node->op_params, sizeof(float));
        if (in.q->ne[1] == n_pos && in.k->ne[1] == n_pos && in.q->ne[2] == in.k->ne[2] && in.q->ne[3] == 1) {
            return masked ? attention_inputs() : in;
        }
    }
    return {};
}

// Raw attention signals of the tokens, each [n_tokens] or null; means over the patches where several make a token.
static void build_attention(qap_graph & graph, ggml_cgraph * gf, const qap_layout & layout, bool cls, bool received) {
    ggml_context *         ctx   = graph.ctx.get();
    const int64_t          n_pos = layout.n_patches + (layout.cls_row >= 0 ? 1 : 0);
    const attention_inputs in    = layout.attention ? find_last_attention(gf, n_pos) : attention_inputs();
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
    const qap_layout layout = qap_layout_of(model, imgs.entries[0]);
    qap_graph        graph;
    graph.plan       = plan;
    graph.embeddings = ggml_graph_node(gf, -1);
    graph.n_tokens   = layout.n_tokens;
    graph.n_columns  = layout.n_patches_x / layout.n_merge;
    graph.ctx.reset(ggml_init({ ggml_tensor_overhead() * max_nodes(layout.n_patches), nullptr, /* no_alloc */ true }));

    ggml_context * ctx     = graph.ctx.get();
    const bool     capture = plan != nullptr && plan->capture;
    const bool     auto_   = params.semantic == QAP_SEMANTIC_AUTO;
    const bool     has_cls = layout.cls_row >= 0;

    // auto: the class token's attention where there is one, else the attention received
    build_attention(
        graph, gf, layout, capture || auto_ || params.semantic == QAP_SEMANTIC_CLS,
        capture || (auto_ && !has_cls) || params.semantic == QAP_SEMANTIC_ATTENTION);

    if (capture && plan->capture_hidden) {
        ggml_tensor * input = find_projector_input(gf, model);
        graph.hidden        = input != nullptr ? ggml_cont(ctx, input) : nullptr;
    }
    std::vector<ggml_tensor *> outputs = { graph.embeddings, graph.attention, graph.received, graph.hidden };
    if (!capture) {
        ggml_tensor * x         = qap_build_tokens(ctx, graph.embeddings, layout);
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
    read_floats(graph.attention, plan.attention);
    read_floats(graph.received, plan.received);
    read_floats(graph.hidden, plan.hidden);
    plan.n_hidden = graph.hidden != nullptr ? (int32_t) graph.hidden->ne[0] : 0;
    std::vector<float> cosines; // empty where neither the selection nor the merge needs them
    read_floats(graph.cosines, cosines);
    if (plan.capture) {
        plan.keep_all();
    } else if (read_scores(graph, plan, cosines) != 0) {
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
        if (plan.capture || plan.params.merge == QAP_MERGE_NONE) {
            gather_rows(graph.embeddings, plan.rows, out->data());
        } else {
            std::vector<float> all; // merging needs all rows on the host
            read_floats(graph.embeddings, all);
            if (qap_keep_merged(plan, all.data(), n_embd, cosines, out->data()) != 0) {
                LOG_ERR("%s: %s\n", __func__, qap_last_error());
                return false;
            }
        }
    }
    plan.bytes_read = qap_bytes_read() - before;
    return true;
}
