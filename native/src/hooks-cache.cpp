// hooks-cache.cpp: a picture is encoded once. Before an encode its rows are looked for; after it they are kept, with the
// attention that pruning may want; a later prompt prunes them anew, on the device where they lie.
#include "clip-graph.h"
#include "clip-impl.h"
#include "clip-model.h"
#include "device.h"
#include "families/layout.h"
#include "families/pack.h"
#include "ggml-backend.h"
#include "hooks-clip.h"
#include "image-cache.h"
#include "prune.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap-plan.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

static const int MAX_NODES = 512; // of scores and cosines

// The one picture of a batch whose rows may be kept; null for sound, several pictures, tiles that are packed on the host,
// and plans that note signals (their maker keeps what they found).
static const clip_image_f32 * cacheable(const clip_ctx * ctx, const clip_image_f32_batch & imgs) {
    if (qap_disabled() || imgs.is_audio || imgs.entries.size() != 1 || (imgs.qap && imgs.qap->capture)) {
        return nullptr;
    }
    const clip_image_f32 & image = imgs.entries[0];
    return image.is_placeholder() || qap_packs(qap_clip_model(ctx).proj_type, image) ? nullptr : &image;
}

static int32_t bits_of(float value) {
    int32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// What an encode depends on, beside the pixels and the context: rows that saw other patches are other rows.
static std::vector<int32_t> shape_of(const clip_image_f32 & image, const qap_plan * plan) {
    std::vector<int32_t> shape = {
        image.nx(),          image.ny(),          image.add_viewsep,    image.add_newline,    image.lead_pad,
        image.anyres.grid_x, image.anyres.grid_y, image.anyres.orig_nx, image.anyres.orig_ny,
    };
    if (plan != nullptr && plan->given) {
        shape.push_back(-1); // no number of tokens
        shape.insert(shape.end(), plan->early.begin(), plan->early.end());
    } else if (plan != nullptr && plan->n_early > 0) {
        const qap_params & p      = plan->params;
        const int32_t      drop[] = {
            plan->n_early,
            plan->early_after,
            p.alpha_dynamic,
            p.alpha_dynamic ? 0 : bits_of(p.alpha),
            p.error,
            p.group_size,
            p.outlier,
            bits_of(p.outlier_weight),
            p.semantic == QAP_SEMANTIC_ATTENTION,
        };
        shape.insert(shape.end(), std::begin(drop), std::end(drop));
        shape.insert(shape.end(), plan->padding.begin(), plan->padding.end());
    }
    return shape;
}

bool qap_same_picture(const clip_image_f32 & a, const clip_image_f32 & b) {
    const auto area = [](const clip_image_f32 & image) {
        const qap_area & q = image.qap_content;
        return std::vector<int>{ q.padded, q.x, q.y, q.width, q.height };
    };
    return !a.is_placeholder() && !b.is_placeholder() && shape_of(a, nullptr) == shape_of(b, nullptr) &&
           area(a) == area(b) && a.get_ro_buf() == b.get_ro_buf();
}

// --- keeping ---

std::shared_ptr<qap_image_cache> qap_hook_new_cache() {
    return std::make_shared<qap_image_cache>();
}

static ggml_tensor * keep_tensor(ggml_context * ctx, const ggml_tensor * from) {
    return from != nullptr ? ggml_new_tensor(ctx, from->type, GGML_MAX_DIMS, from->ne) : nullptr;
}

void qap_hook_remember(clip_ctx * ctx, const clip_image_f32_batch & imgs, const qap_graph & graph, ggml_cgraph * gf) {
    const size_t           limit = qap_image_cache_bytes();
    const clip_image_f32 * image = limit > 0 ? cacheable(ctx, imgs) : nullptr;
    ggml_tensor *          rows  = graph.embeddings != nullptr ? graph.embeddings : ggml_graph_node(gf, -1);
    if (image == nullptr || rows->type != GGML_TYPE_F32 || !ggml_is_contiguous(rows)) {
        return;
    }
    auto kept    = std::make_unique<qap_cached_image>();
    kept->shape  = shape_of(*image, imgs.qap.get());
    kept->pixels = image->get_ro_buf();
    kept->ctx.reset(ggml_init({ 6 * ggml_tensor_overhead(), nullptr, /* no_alloc */ true }));
    kept->embeddings  = keep_tensor(kept->ctx.get(), rows);
    kept->attention   = keep_tensor(kept->ctx.get(), graph.attention);
    kept->received    = keep_tensor(kept->ctx.get(), graph.received);
    kept->early       = keep_tensor(kept->ctx.get(), graph.early);
    kept->early_total = keep_tensor(kept->ctx.get(), graph.early_total);
    kept->early_near  = keep_tensor(kept->ctx.get(), graph.early_near);
    kept->signals     = graph.signals;
    kept->buffer.reset(ggml_backend_alloc_ctx_tensors(kept->ctx.get(), qap_clip_parts_of(ctx).backend));
    if (!kept->buffer) {
        return; // no memory to spare: the picture is encoded again when it comes again
    }
    const std::pair<ggml_tensor *, ggml_tensor *> copies[] = {
        { rows,              kept->embeddings  },
        { graph.attention,   kept->attention   },
        { graph.received,    kept->received    },
        { graph.early,       kept->early       },
        { graph.early_total, kept->early_total },
        { graph.early_near,  kept->early_near  },
    };
    for (const auto & [from, to] : copies) {
        if (to != nullptr) {
            ggml_backend_tensor_copy(from, to);
        }
    }
    qap_clip_parts_of(ctx).cache->put(std::move(kept), limit);
}

// --- recalling ---

// The graph that prunes kept rows: as that of the encoder, with the rows in place of the encoder.
static int prune(
    clip_ctx * ctx, const clip_image_f32 & image, const qap_cached_image & kept, qap_plan & plan,
    std::vector<float> * out) {
    const qap_layout layout = qap_layout_of(qap_clip_model(ctx), image);
    qap_graph        graph;
    graph.plan        = &plan;
    graph.embeddings  = kept.embeddings;
    graph.attention   = kept.attention;
    graph.received    = kept.received;
    graph.early       = kept.early;
    graph.early_total = kept.early_total;
    graph.early_near  = kept.early_near;
    graph.n_tokens    = layout.n_tokens;
    graph.n_columns   = layout.n_patches_x / layout.n_merge;
    graph.signals     = kept.signals;
    const size_t meta = ggml_tensor_overhead() * MAX_NODES + ggml_graph_overhead_custom(MAX_NODES, false);
    graph.ctx.reset(ggml_init({ meta, nullptr, /* no_alloc */ true }));
    ggml_cgraph * gf = ggml_new_graph_custom(graph.ctx.get(), MAX_NODES, false);
    qap_append_scores(graph, gf, layout, plan.params);
    ggml_backend_sched_t sched = qap_clip_parts_of(ctx).sched;
    ggml_backend_sched_reset(sched);
    if (!ggml_backend_sched_alloc_graph(sched, gf) ||
        ggml_backend_sched_graph_compute(sched, gf) != GGML_STATUS_SUCCESS) {
        return qap_fail("expected more memory for the scores of this picture");
    }
    return qap_hook_collect(graph, out) ? 0 : -1;
}

// Was the signal noted that these parameters look at? An encode without a plan notes none, and does not know what there is.
// none: this encoder has no signals at all
static bool has_signal(const qap_cached_image & kept, const qap_params & params, bool none) {
    const int32_t signal =
        qap_signal(&params, kept.signals); // -1 where they ask for what cannot be: the encode says so
    return (signal == QAP_SEMANTIC_NONE && (none || params.semantic == QAP_SEMANTIC_NONE)) ||
           (signal == QAP_SEMANTIC_CLS && kept.attention != nullptr) ||
           (signal == QAP_SEMANTIC_ATTENTION && kept.received != nullptr);
}

// A tile whose pixels say nothing: no row is kept of it, or where all are asked for, zeros.
static void leave_flat(const clip_ctx * ctx, const clip_image_f32 & image, qap_plan & plan, std::vector<float> * out) {
    const qap_layout layout = qap_layout_of(qap_clip_model(ctx), image);
    plan.n_columns          = (int32_t) (layout.n_patches_x / layout.n_merge);
    plan.finish_flat();
    if (plan.capture) {
        plan.keep_all();
    }
    if (out != nullptr) {
        std::fill(out->begin(), out->end(), 0.0f);
    }
    qap_clear_error();
}

qap_recalled qap_hook_recall(clip_ctx * ctx, const clip_image_f32_batch & imgs, std::vector<float> * out) {
    if (imgs.qap && imgs.qap->flat && !imgs.entries.empty()) {
        leave_flat(ctx, imgs.entries[0], *imgs.qap, out);
        return QAP_RECALLED_ROWS;
    }
    const clip_image_f32 * image = qap_image_cache_bytes() > 0 && out != nullptr ? cacheable(ctx, imgs) : nullptr;
    if (image == nullptr) {
        return QAP_RECALLED_NOTHING;
    }
    qap_image_cache &        cache = *qap_clip_parts_of(ctx).cache;
    const qap_cached_image * kept  = cache.find(shape_of(*image, imgs.qap.get()), image->get_ro_buf());
    const bool               none  = !qap_layout_of(qap_clip_model(ctx), *image).attention;
    if (kept == nullptr || (imgs.qap && !has_signal(*kept, imgs.qap->params, none))) {
        if (kept != nullptr) {
            imgs.qap->all_signals = true; // who asks for two of them may ask for both again
        }
        cache.n_encoded++;
        return QAP_RECALLED_NOTHING;
    }
    cache.n_recalled++;
    if (imgs.qap) {
        return prune(ctx, *image, *kept, *imgs.qap, out) == 0 ? QAP_RECALLED_ROWS : QAP_RECALLED_ERROR;
    }
    qap_graph graph;
    graph.embeddings = kept->embeddings;
    return qap_hook_collect(graph, out) ? QAP_RECALLED_ROWS : QAP_RECALLED_ERROR;
}
