// hooks-clip.cpp: the hooks inside the image encoder: find the attention in the graph, append the scores,
// read them back, select, gather. Upstream fact (llama.cpp 0c1e570): clip_encode() takes the last node of the
// graph as the embeddings.
#include "hooks-clip.h"
#include "clip-graph.h"
#include "clip-impl.h"
#include "clip-model.h"
#include "device.h"
#include "early-drop.h"
#include "families/layout.h"
#include "find-attention.h"
#include "ggml-backend.h"
#include "prune.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap-plan.h"

#include <cmath>

// tensors that one image can add, views counted: scores and cosines take about 150, attention received up to 25 for
// each block of 256 queries, of which a token may be four
static size_t max_nodes(int64_t n_tokens) {
    return 512 + 4 * 32 * (size_t) (n_tokens / 256 + 2);
}

// The signals that this graph can give, as bits of qap_signal().
static uint32_t find_signals(ggml_cgraph * gf, const qap_layout & layout, const qap_attention & in) {
    const bool     ordered = !layout.windows || ggml_graph_get_tensor(gf, "window_idx") != nullptr;
    const uint32_t cls     = layout.cls_row >= 0 ? qap_signal_bit(QAP_SEMANTIC_CLS) : 0;
    return in.q != nullptr && ordered ? cls | qap_signal_bit(QAP_SEMANTIC_ATTENTION) : 0;
}

// Raw attention signals of the tokens, each [n_tokens] or null; means over the patches where several make a token.
static void build_attention(
    qap_graph & graph, ggml_cgraph * gf, const qap_layout & layout, const qap_attention & in, bool cls, bool received) {
    ggml_context * ctx = graph.ctx.get();
    if (cls) {
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

static void make_output(ggml_cgraph * gf, ggml_tensor * node) {
    if (node != nullptr) {
        ggml_set_output(node);
        ggml_build_forward_expand(gf, node);
    }
}

// What error "model" multiplies the channels with, [n_embd], or null where the plan has no weights of this many channels
// (choose() says so). In host memory: the scheduler brings it to where it is needed.
static ggml_tensor * build_roots(qap_graph & graph, const qap_params & params) {
    const std::vector<float> * weights = graph.plan != nullptr ? graph.plan->channel_weights.get() : nullptr;
    std::vector<float>         roots;
    if (params.error != QAP_ERROR_MODEL || weights == nullptr || (int64_t) weights->size() != graph.n_embd ||
        qap_weight_roots(weights->data(), (int32_t) graph.n_embd, roots) != 0) {
        return nullptr;
    }
    ggml_tensor * tensor = ggml_new_tensor_1d(graph.ctx.get(), GGML_TYPE_F32, graph.n_embd);
    graph.weights.reset(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), ggml_nbytes(tensor)));
    ggml_backend_buffer_t buffer = graph.weights.get();
    if (buffer == nullptr ||
        ggml_backend_tensor_alloc(buffer, tensor, ggml_backend_buffer_get_base(buffer)) != GGML_STATUS_SUCCESS) {
        graph.weights.reset();
        return nullptr;
    }
    ggml_backend_tensor_set(tensor, roots.data(), 0, ggml_nbytes(tensor));
    return tensor;
}

void qap_append_scores(qap_graph & graph, ggml_cgraph * gf, const qap_layout & layout, const qap_params & params) {
    ggml_context * ctx            = graph.ctx.get();
    const int32_t  signal         = qap_signal(&params, graph.signals); // -1 is an error after the graph ran
    const bool     window_is_left = graph.plan != nullptr && graph.early == nullptr; // an early drop leaves no padding
    const qap_window window       = window_is_left ? qap_window_of(*graph.plan, layout) : qap_window();
    ggml_tensor *    x            = qap_build_window(ctx, qap_build_tokens(ctx, graph.embeddings, layout), window);
    x                             = graph.early != nullptr ? ggml_get_rows(ctx, x, graph.early) : x;
    ggml_tensor * raw             = signal == QAP_SEMANTIC_ATTENTION ? graph.received
                                    : signal == QAP_SEMANTIC_CLS     ? graph.attention
                                                                     : nullptr;
    if (raw != nullptr && window.lines > 0) {
        raw = qap_build_window(ctx, ggml_reshape_2d(ctx, raw, 1, layout.n_tokens), window);
        raw = ggml_reshape_1d(ctx, raw, ggml_nelements(raw));
    }
    graph.n_embd        = x->ne[0];
    graph.scores        = qap_build_scores(ctx, x, raw, build_roots(graph, params), params);
    const auto n_scored = (int32_t) x->ne[1];
    const auto n_chosen =
        graph.plan != nullptr ? graph.plan->n_keep : n_scored - 1; // without a plan: what may be needed
    if (qap_needs_cosines(params, n_scored, n_chosen)) {
        graph.cosines = qap_build_cosines(ctx, x);
        make_output(gf, graph.cosines);
    }
    qap_expand_scores(gf, graph.scores);
}

// scores: false where only the signals are noted
static qap_graph build_nodes(
    const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf, qap_plan * plan,
    const qap_params & params, bool scores) {
    const qap_layout      whole  = qap_layout_of(model, imgs.entries[0]);
    const qap_early_nodes early  = qap_early_find(gf);
    const qap_layout      layout = early.kept != nullptr ? qap_early_layout(whole, early.kept->ne[0]) : whole;
    qap_graph             graph;
    graph.plan        = plan;
    graph.n_tokens    = whole.n_tokens;
    graph.n_columns   = whole.n_patches_x / whole.n_merge;
    graph.early       = early.kept;
    graph.early_total = early.total;
    graph.early_near  = early.near;
    graph.ctx.reset(ggml_init({ ggml_tensor_overhead() * max_nodes(whole.n_patches), nullptr, /* no_alloc */ true }));

    ggml_context * ctx          = graph.ctx.get();
    graph.embeddings            = qap_early_put(ctx, ggml_graph_node(gf, -1), whole, early.kept);
    const bool          capture = plan != nullptr && plan->capture;
    const int64_t       n_pos   = layout.n_patches + (layout.cls_row >= 0 ? 1 : 0);
    const qap_attention in      = layout.attention ? qap_find_last_attention(gf, n_pos) : qap_attention();
    graph.signals               = find_signals(gf, layout, in);
    const int32_t  signal       = qap_signal(&params, graph.signals); // -1 is an error after the graph ran
    const bool     all          = capture || (plan != nullptr && plan->all_signals);
    const uint32_t wanted       = all ? graph.signals : signal > 0 ? qap_signal_bit(signal) : 0;
    build_attention(
        graph, gf, layout, in, (wanted & qap_signal_bit(QAP_SEMANTIC_CLS)) != 0,
        (wanted & qap_signal_bit(QAP_SEMANTIC_ATTENTION)) != 0);

    if (capture && plan->capture_hidden) {
        ggml_tensor * input = find_projector_input(gf, model);
        graph.hidden        = input != nullptr ? ggml_cont(ctx, input) : nullptr;
    }
    for (ggml_tensor * node : { graph.embeddings, graph.attention, graph.received, graph.hidden }) {
        make_output(gf, node);
    }
    if (scores) {
        qap_append_scores(graph, gf, whole, params);
    }
    return graph;
}

static bool can_append(const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf) {
    return imgs.entries.size() == 1 && !qap_disabled() && qap_why_not_prunable(model) == nullptr &&
           ggml_is_contiguous(ggml_graph_node(gf, -1)) && ggml_graph_node(gf, -1)->type == GGML_TYPE_F32;
}

qap_graph qap_hook_reserve(const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf) {
    return can_append(model, imgs, gf) ? build_nodes(model, imgs, gf, nullptr, qap_params_default(), true)
                                       : qap_graph();
}

qap_graph qap_hook_build(const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf) {
    return imgs.qap ? build_nodes(model, imgs, gf, imgs.qap.get(), imgs.qap->params, !imgs.qap->capture) : qap_graph();
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

// Scores into the plan: those of the tokens that can be kept come out of the graph.
static int read_scores(
    const qap_graph & graph, qap_plan & plan, const std::vector<int32_t> & left, std::vector<float> & total) {
    std::vector<float> found;
    const auto         read = [&](ggml_tensor * from, std::vector<float> & to) {
        read_floats(from, found);
        to.assign(found.empty() ? 0 : (size_t) plan.n_total, 0.0f);
        if (!found.empty()) {
            plan.spread(left, found.data(), to.data());
        }
    };
    read(graph.scores.error, plan.error);
    read(graph.scores.outlier, plan.outlier);
    read(graph.scores.sensitivity, plan.sensitivity);
    read(graph.scores.semantic, plan.semantic);
    read(graph.scores.total, plan.total);
    total      = std::move(found);
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
    return 0;
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

static int check_weights(const qap_graph & graph, const qap_plan & plan) {
    if (qap_check_weights(plan, (int32_t) graph.n_embd) != 0) {
        return -1;
    }
    const bool done = plan.params.error != QAP_ERROR_MODEL || graph.weights;
    return done ? 0 : qap_fail("channel_weights: expected more memory for %d numbers", (int) graph.n_embd);
}

// The choice, by what the graph found, into the plan. cosines: empty where neither the selection nor the merge needs them
static int choose(
    const qap_graph & graph, qap_plan & plan, const std::vector<int32_t> & left, std::vector<int32_t> & chosen,
    std::vector<float> & cosines) {
    std::vector<float> total;
    read_floats(graph.cosines, cosines);
    plan.semantic_id = qap_signal(&plan.params, graph.signals);
    if (plan.semantic_id < 0 || check_weights(graph, plan) != 0 || read_scores(graph, plan, left, total) != 0) {
        return -1;
    }
    const auto         n = (int32_t) left.size();
    std::vector<float> dropped_total;
    if (!plan.early_near.empty()) {
        for (const int32_t token : plan.dropped_early()) {
            dropped_total.push_back(plan.early_total[(size_t) token]);
        }
    }
    const qap_dropped dropped = { (int32_t) dropped_total.size(), dropped_total.data(), plan.early_near.data() };
    if (qap_choose(plan.params, total.data(), cosines.data(), n, plan.n_keep, dropped, chosen) != 0) {
        return -1;
    }
    plan.keep_left(left, chosen);
    return 0;
}

// What the encode noted of tokens: [n, n_left] in the graph, [n_total, n] in the plan, zeros for what was dropped early.
static int32_t read_noted(ggml_tensor * from, const qap_plan & plan, int64_t n, std::vector<float> & to) {
    read_floats(from, to);
    if (!to.empty() && !plan.early.empty()) {
        const std::vector<float> left = std::move(to);
        to.resize((size_t) (plan.n_total * n));
        plan.spread(plan.early, left.data(), to.data(), (int32_t) n);
    }
    return from != nullptr ? (int32_t) n : 0;
}

static int collect(const qap_graph & graph, qap_plan & plan, std::vector<float> & out) {
    const int64_t width  = graph.embeddings->ne[0];
    const int64_t n_rows = ggml_nelements(graph.embeddings) / width;
    if (graph.n_tokens != plan.n_total || n_rows != plan.n_rows()) {
        return qap_fail("expected %d tokens from the encoder, got %d", (int) plan.n_total, (int) graph.n_tokens);
    }
    plan.n_columns  = (int32_t) graph.n_columns;
    const bool near = plan.capture || plan.params.select == QAP_SELECT_COVERAGE; // nobody else looks at them
    if (qap_early_read({ graph.early, graph.early_total, graph.early_near }, plan, near) != 0) {
        return -1;
    }
    read_noted(graph.attention, plan, 1, plan.attention);
    read_noted(graph.received, plan, 1, plan.received);
    plan.n_hidden = read_noted(graph.hidden, plan, graph.hidden != nullptr ? graph.hidden->ne[0] : 0, plan.hidden);

    const std::vector<int32_t> left = plan.left_tokens();
    std::vector<int32_t>       chosen;
    std::vector<float>         cosines;
    if (plan.capture) {
        plan.keep_all();
    } else if (choose(graph, plan, left, chosen, cosines) != 0) {
        return -1;
    }
    if (out.empty()) {
        return 0; // no rows are wanted
    }
    if (out.size() != plan.rows.size() * (size_t) width) {
        return qap_fail("expected room for %zu rows of %d, got %zu floats", plan.rows.size(), (int) width, out.size());
    }
    if (plan.capture || plan.params.merge == QAP_MERGE_NONE) {
        gather_rows(graph.embeddings, plan.rows, out.data());
        return 0;
    }
    std::vector<float> all; // merging needs all rows on the host
    read_floats(graph.embeddings, all);
    return qap_copy_kept(
        plan.params, all.data(), (int32_t) width, qap_token_rows(plan.n_total, plan.special, left), cosines.data(),
        chosen, plan.rows, out.data());
}

// All rows of a picture without a plan.
static bool read_all(const qap_graph & graph, std::vector<float> & out) {
    if (!out.empty() && (int64_t) out.size() != ggml_nelements(graph.embeddings)) {
        qap_fail("expected room for %lld numbers, got %zu", (long long) ggml_nelements(graph.embeddings), out.size());
        LOG_ERR("%s: %s\n", __func__, qap_last_error());
        return false;
    }
    if (!out.empty()) {
        qap_read_floats(graph.embeddings, out.data());
    }
    return true;
}

bool qap_hook_collect(const qap_graph & graph, std::vector<float> * out) {
    const int64_t      before = qap_bytes_read();
    std::vector<float> nowhere;
    qap_clear_error();
    if (graph.plan == nullptr) {
        return read_all(graph, out != nullptr ? *out : nowhere);
    }
    graph.plan->done = false;
    if (collect(graph, *graph.plan, out != nullptr ? *out : nowhere) != 0) {
        LOG_ERR("%s: %s\n", __func__, qap_last_error());
        return false;
    }
    graph.plan->done       = true;
    graph.plan->bytes_read = qap_bytes_read() - before;
    return true;
}
