// early-drop.cpp: see early-drop.h. The hooks that 012-early-drop.patch calls while upstream builds a tower, and what the
// encoder's other hooks (hooks-clip.cpp) need of them afterwards.
//
// A token's patches are kept or dropped together. After the drop they stand token by token in lines of the picture, whatever
// the family's order was before (Qwen2.5-VL's is that of its windows): the order is nothing to self-attention, learned
// positions were added before the layers; rotary ones are gathered too, and so is the mask of windows. Numbers of tokens
// pass through f32, which is exact up to 2^24; the sides that qap_hook_picture() allows give fewer.
#include "early-drop.h"

#include "clip-graph.h"
#include "clip-impl.h"
#include "clip-model.h"
#include "find-attention.h"
#include "ggml-backend.h"

#include <cfloat>

static const char * KEPT_NAME  = "qap_early_kept";
static const char * TOTAL_NAME = "qap_early_total";
static const char * NEAR_NAME  = "qap_early_near";

// Above, cosines would take tens of megabytes for each picture that is kept: coverage does without.
static const int64_t MOST_NEAR = 4096;

// A token's patches side by side. x: [width, n_patches] contiguous -> [width * n_merge^2, n_tokens]
static ggml_tensor * to_tokens(ggml_context * ctx, ggml_tensor * x, const qap_layout & layout) {
    const int64_t width = x->ne[0], n = layout.n_merge;
    if (layout.merging == qap_merging::block && n > 1) {
        const int64_t length = layout.n_patches_x / n;
        x                    = ggml_reshape_4d(ctx, x, width * n, length, n, layout.n_tokens / length);
        x                    = ggml_cont(ctx, ggml_permute(ctx, x, 0, 2, 1, 3)); // [width n, n, length, lines]
    }
    return ggml_reshape_2d(ctx, x, width * n * n, layout.n_tokens);
}

// The way back. x: [width * n_merge^2, n_tokens] contiguous -> [width, n_patches]
static ggml_tensor * to_patches(ggml_context * ctx, ggml_tensor * x, const qap_layout & layout) {
    const int64_t n = layout.n_merge, width = x->ne[0] / (n * n);
    if (layout.merging == qap_merging::block && n > 1) {
        const int64_t length = layout.n_patches_x / n;
        x                    = ggml_reshape_4d(ctx, x, width * n, n, length, layout.n_tokens / length);
        x                    = ggml_cont(ctx, ggml_permute(ctx, x, 0, 2, 1, 3)); // [width n, length, n, lines]
    }
    return ggml_reshape_2d(ctx, x, width, layout.n_patches);
}

// The rows of patches, without the class token's. x: [width, n_pos] contiguous -> [width, n_patches]
static ggml_tensor * patches_of(ggml_context * ctx, ggml_tensor * x, const qap_layout & layout) {
    return ggml_view_2d(ctx, x, x->ne[0], layout.n_patches, x->nb[1], (size_t) layout.first_row * x->nb[1]);
}

// Put the class token of `from` to its place beside rows of patches.
static ggml_tensor * with_class(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * from, const qap_layout & layout) {
    if (layout.cls_row < 0) {
        return rows;
    }
    // in `from` it stands first or last
    const int64_t row = layout.cls_row == 0 ? 0 : from->ne[1] - 1;
    ggml_tensor * cls = ggml_view_2d(ctx, from, from->ne[0], 1, from->nb[1], (size_t) row * from->nb[1]);
    return layout.cls_row == 0 ? ggml_concat(ctx, cls, rows, 1) : ggml_concat(ctx, rows, cls, 1);
}

// The rows of the class token and of the kept tokens' patches. x: [width, n_pos] contiguous -> [width, fewer]
static ggml_tensor * gather(ggml_context * ctx, ggml_tensor * x, const qap_layout & layout, ggml_tensor * kept) {
    const int64_t width = x->ne[0], n = layout.n_merge;
    ggml_tensor * rows = ggml_get_rows(ctx, to_tokens(ctx, patches_of(ctx, x, layout), layout), kept);
    return with_class(ctx, ggml_reshape_2d(ctx, rows, width, n * n * kept->ne[0]), x, layout);
}

// Where the tokens of a tower with windows stand in it, [n_tokens] I32, or null for the lines of the picture. Facts:
// qwen2vl.cpp and exaone4_5.cpp with 012-early-drop.patch, which make it before the layers.
static ggml_tensor * window_order(clip_graph & graph, const qap_layout & layout) {
    ggml_tensor * order = layout.windows ? ggml_get_tensor(graph.ctx0, "window_idx") : nullptr;
    if (order != nullptr) {
        ggml_build_forward_expand(graph.gf, order); // qap_build_pooled() finds it there
    }
    return order;
}

// Note what is kept, and give what is left of hidden. kept: [n] I32, numbers in lines of the picture
static ggml_tensor * keep(clip_graph & graph, ggml_tensor * hidden, const qap_layout & layout, ggml_tensor * kept) {
    ggml_context * ctx   = graph.ctx0;
    ggml_tensor *  order = window_order(graph, layout);
    graph.early.kept     = kept;
    graph.early.inside   = kept;
    if (order != nullptr) {
        ggml_tensor * inside = ggml_get_rows(ctx, ggml_reshape_2d(ctx, order, 1, layout.n_tokens), kept);
        graph.early.inside   = ggml_reshape_1d(ctx, inside, kept->ne[0]);
    }
    return gather(ctx, hidden, layout, graph.early.inside);
}

// log of an attention: a few patches hold most of it, and between the others the plain weights see no difference
static ggml_tensor * log_attention(ggml_context * ctx, ggml_tensor * weights, int64_t n_pos) {
    return ggml_log(ctx, ggml_clamp(ctx, weights, 1e-6f / (float) n_pos, FLT_MAX)); // 0 has no logarithm
}

// Numbers of the n largest, ascending. total: [n_candidates] -> [n] I32
static ggml_tensor * best_in_order(ggml_context * ctx, ggml_tensor * total, int64_t n) {
    ggml_tensor * best  = ggml_view_1d(ctx, ggml_argsort(ctx, total, GGML_SORT_ORDER_DESC), n, 0);
    ggml_tensor * order = ggml_argsort(ctx, ggml_cast(ctx, best, GGML_TYPE_F32), GGML_SORT_ORDER_ASC);
    return ggml_reshape_1d(ctx, ggml_get_rows(ctx, ggml_reshape_2d(ctx, best, 1, n), order), n);
}

// Cosines of some tokens with all, of what tells them apart: rows minus their mean.
// tokens: [width, n]; some: [n_some] I32 -> [n, n_some]
static ggml_tensor * build_near(ggml_context * ctx, ggml_tensor * tokens, ggml_tensor * some) {
    const float   part = 1.0f / (float) tokens->ne[1];
    ggml_tensor * mean = ggml_scale(ctx, qap_build_column_sums(ctx, tokens), part);
    ggml_tensor * unit = qap_build_unit_rows(ctx, ggml_sub(ctx, tokens, mean));
    return qap_build_products(ctx, unit, ggml_get_rows(ctx, unit, some));
}

// Numbers of tokens in a window, as numbers of the whole grid. places: [n] I32 -> [n] I32
static ggml_tensor * whole_numbers(
    ggml_context * ctx, ggml_tensor * places, const qap_window & window, int64_t n_tokens) {
    if (window.lines == 0) {
        return places;
    }
    ggml_tensor * all   = ggml_reshape_2d(ctx, ggml_arange(ctx, 0.0f, (float) n_tokens, 1.0f), 1, n_tokens);
    ggml_tensor * found = ggml_get_rows(ctx, qap_build_window(ctx, all, window), places);
    return ggml_cast(ctx, ggml_reshape_1d(ctx, found, places->ne[0]), GGML_TYPE_I32);
}

// Keep tokens that are known before the encode: their numbers are an input of the graph.
static ggml_tensor * keep_given(clip_graph & graph, ggml_tensor * hidden, const qap_layout & layout, int64_t n) {
    ggml_tensor * kept = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, n);
    ggml_set_name(kept, KEPT_NAME);
    ggml_set_input(kept);
    ggml_set_output(kept); // read again after the graph ran
    return keep(graph, hidden, layout, kept);
}

static qap_plan * plan_of(const clip_graph & graph) {
    qap_plan * plan = graph.img_batch != nullptr ? graph.img_batch->qap.get() : nullptr;
    return plan != nullptr && plan->n_early > 0 ? plan : nullptr;
}

ggml_tensor * qap_hook_early_drop(clip_graph & graph, ggml_tensor * hidden, int il) {
    const qap_plan * plan = plan_of(graph);
    if (plan == nullptr || il + 1 != plan->early_after) {
        return hidden;
    }
    ggml_context *   ctx    = graph.ctx0;
    const qap_layout layout = qap_layout_of(graph.model, graph.img);
    const bool       whole  = layout.n_tokens == plan->n_total && layout.n_patches <= hidden->ne[1];
    // a plan that was saved by another model can ask for anything
    if (!whole || !qap_early_why_not(graph.model, graph.img, plan->params).empty()) {
        return hidden; // qap_early_read() will miss the drop and say so
    }
    if (plan->given) {
        return keep_given(graph, hidden, layout, plan->n_early);
    }
    ggml_build_forward_expand(graph.gf, hidden); // so that the layer's attention can be found
    const qap_attention in = qap_find_last_attention(graph.gf, hidden->ne[1]);
    if (in.q == nullptr) {
        return hidden; // as above
    }
    ggml_tensor * order    = window_order(graph, layout);
    const bool    of_class = layout.cls_row >= 0 && plan->params.semantic != QAP_SEMANTIC_ATTENTION;
    ggml_tensor * weights  = of_class ? qap_build_attention_row(ctx, in.q, in.k, layout.cls_row, in.scale)
                                      : qap_build_attention_received(ctx, in.q, in.k, in.scale);
    weights                = qap_build_pooled(ctx, graph.gf, weights, layout);

    ggml_tensor * tokens    = to_tokens(ctx, patches_of(ctx, hidden, layout), layout);
    tokens                  = ggml_is_contiguous(tokens) ? tokens : ggml_cont(ctx, tokens);
    tokens                  = order != nullptr ? ggml_get_rows(ctx, tokens, order) : tokens;
    const qap_window window = qap_window_of(*plan, layout); // what is no padding
    tokens                  = qap_build_window(ctx, tokens, window);
    weights                 = qap_build_window(ctx, ggml_reshape_2d(ctx, weights, 1, layout.n_tokens), window);
    weights                 = log_attention(ctx, ggml_reshape_1d(ctx, weights, weights->ne[1]), hidden->ne[1]);
    ggml_tensor * total     = qap_build_scores(ctx, tokens, weights, /* roots */ nullptr, plan->params).total;
    ggml_tensor * best      = best_in_order(ctx, total, plan->n_early);
    ggml_tensor * kept      = whole_numbers(ctx, best, window, layout.n_tokens);
    ggml_tensor * near      = tokens->ne[1] <= MOST_NEAR ? build_near(ctx, tokens, best) : nullptr;
    ggml_set_name(total, TOTAL_NAME);
    ggml_set_name(kept, KEPT_NAME);
    for (ggml_tensor * node : { total, kept, near }) {
        if (node != nullptr) {
            ggml_set_output(node);
            ggml_build_forward_expand(graph.gf, node);
        }
    }
    if (near != nullptr) {
        ggml_set_name(near, NEAR_NAME);
    }
    return keep(graph, hidden, layout, kept);
}

void qap_hook_early_inputs(const clip_image_f32_batch & imgs, ggml_cgraph * gf) {
    const qap_plan * plan = imgs.qap.get();
    ggml_tensor *    kept = plan != nullptr && plan->given ? ggml_graph_get_tensor(gf, KEPT_NAME) : nullptr;
    if (kept != nullptr && ggml_nelements(kept) == (int64_t) plan->early.size()) {
        ggml_backend_tensor_set(kept, plan->early.data(), 0, ggml_nbytes(kept));
    }
}

ggml_tensor * qap_hook_early_spread(clip_graph & graph, ggml_tensor * hidden) {
    if (graph.early.kept == nullptr) {
        return hidden;
    }
    ggml_context *   ctx    = graph.ctx0;
    const qap_layout layout = qap_layout_of(graph.model, graph.img);
    const int64_t    n      = layout.n_merge;
    const qap_layout left   = qap_early_layout(layout, graph.early.kept->ne[0]);
    ggml_tensor *    rows   = patches_of(ctx, hidden, left);
    rows = qap_early_put(ctx, ggml_reshape_2d(ctx, rows, rows->ne[0] * n * n, left.n_tokens), layout, graph.early.kept);
    return with_class(ctx, to_patches(ctx, rows, layout), hidden, layout);
}

// What `gather_all` makes of a tensor about all patches, once for each; asked for that again, it is about what is left already.
template <typename Gather>
static ggml_tensor * about_what_is_left(clip_graph & graph, ggml_tensor * whole, Gather gather_all) {
    if (graph.early.kept == nullptr || whole == nullptr) {
        return whole;
    }
    const auto found = graph.early.places.find(whole);
    if (found != graph.early.places.end()) {
        return found->second;
    }
    ggml_tensor * left        = gather_all(graph.ctx0, qap_layout_of(graph.model, graph.img));
    graph.early.places[whole] = left;
    graph.early.places[left]  = left;
    return left;
}

ggml_tensor * qap_hook_early_places(clip_graph & graph, ggml_tensor * places, int n_sections) {
    return about_what_is_left(graph, places, [&](ggml_context * ctx, const qap_layout & layout) {
        const int64_t n_pos = places->ne[0] / n_sections;
        ggml_tensor * all   = ggml_cast(ctx, places, GGML_TYPE_F32);
        ggml_tensor * left  = nullptr;
        for (int i = 0; i < n_sections; i++) {
            ggml_tensor * section = ggml_view_2d(ctx, all, 1, n_pos, all->nb[0], (size_t) (i * n_pos) * all->nb[0]);
            section               = gather(ctx, section, layout, graph.early.inside);
            left                  = left == nullptr ? section : ggml_concat(ctx, left, section, 1);
        }
        return ggml_cast(ctx, ggml_reshape_1d(ctx, left, ggml_nelements(left)), GGML_TYPE_I32);
    });
}

ggml_tensor * qap_hook_early_mask(clip_graph & graph, ggml_tensor * mask) {
    return about_what_is_left(graph, mask, [&](ggml_context * ctx, const qap_layout & layout) {
        ggml_tensor * left = gather(ctx, mask, layout, graph.early.inside); // as wide as before
        left               = gather(ctx, ggml_cont(ctx, ggml_transpose(ctx, left)), layout, graph.early.inside);
        return left->type == mask->type ? left : ggml_cast(ctx, left, mask->type);
    });
}

ggml_tensor * qap_hook_early_tokens(clip_graph & graph, ggml_tensor * rows) {
    const bool all = rows != nullptr && graph.early.kept != nullptr && rows->ne[1] > graph.early.kept->ne[0];
    return all ? ggml_get_rows(
                     graph.ctx0, ggml_reshape_2d(graph.ctx0, rows, rows->ne[0], rows->ne[1]), graph.early.kept)
               : rows;
}

ggml_tensor * qap_hook_early_first(clip_graph & graph, ggml_tensor * rows) {
    return graph.early.kept != nullptr ? ggml_view_1d(graph.ctx0, rows, graph.early.kept->ne[0], 0) : rows;
}

// --- after the tower ---

qap_early_nodes qap_early_find(ggml_cgraph * gf) {
    return { ggml_graph_get_tensor(gf, KEPT_NAME), ggml_graph_get_tensor(gf, TOTAL_NAME),
             ggml_graph_get_tensor(gf, NEAR_NAME) };
}

qap_layout qap_early_layout(const qap_layout & layout, int64_t n_early) {
    qap_layout left  = layout;
    left.n_tokens    = n_early;
    left.n_patches   = n_early * layout.n_merge * layout.n_merge;
    left.line_length = 0;
    left.windows     = false; // see the top
    left.cls_row     = layout.cls_row > 0 ? left.n_patches : layout.cls_row;
    left.merging     = layout.merging == qap_merging::none ? qap_merging::none : qap_merging::consecutive;
    return left;
}

ggml_tensor * qap_early_put(ggml_context * ctx, ggml_tensor * rows, const qap_layout & layout, ggml_tensor * kept) {
    const int64_t width = rows->ne[0], n_rows = ggml_nelements(rows) / width;
    if (kept == nullptr || n_rows != kept->ne[0]) {
        return rows;
    }
    ggml_tensor * zero  = ggml_arange(ctx, 0.0f, 1.0f, 1.0f);
    ggml_tensor * zeros = ggml_repeat_4d(ctx, zero, width, layout.n_tokens, 1, 1);
    return ggml_set_rows(ctx, zeros, ggml_reshape_2d(ctx, rows, width, n_rows), kept);
}
