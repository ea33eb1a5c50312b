// clip-text.cpp: the relevance of patches to a prompt by CLIP (CDPruner on LLaVA, arXiv 2506.10967). Facts:
// transformers' modeling_clip.py (CLIPTextModelWithProjection; post_layernorm and visual_projection of CLIPModel).
#include "clip-text/clip-text.h"

#include "device.h"
#include "ggml-backend.h"
#include "qap-error.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>

// --- graphs ---

static ggml_tensor * build_norm(ggml_context * ctx, ggml_tensor * x, const clip_norm & norm, float eps) {
    return ggml_add(ctx, ggml_mul(ctx, ggml_norm(ctx, x, eps), norm.weight), norm.bias);
}

static ggml_tensor * build_linear(ggml_context * ctx, ggml_tensor * x, const clip_linear & linear) {
    ggml_tensor * y = ggml_mul_mat(ctx, linear.weight, x);
    ggml_prec_set_acc(y, GGML_PREC_F32);
    return linear.bias != nullptr ? ggml_add(ctx, y, linear.bias) : y;
}

static ggml_tensor * build_activation(ggml_context * ctx, ggml_tensor * x, clip_activation activation) {
    switch (activation) {
        case CLIP_GELU: return ggml_gelu_erf(ctx, x);
        case CLIP_GELU_TANH: return ggml_gelu(ctx, x);
        default: return ggml_gelu_quick(ctx, x);
    }
}

// x: [n_embd, n]; mask: [n, n], -inf above the diagonal
static ggml_tensor * build_attention(
    ggml_context * ctx, ggml_tensor * x, ggml_tensor * mask, const clip_text_layer & layer, int64_t n_head) {
    const int64_t n_embd   = x->ne[0];
    const int64_t n        = x->ne[1];
    const int64_t head_dim = n_embd / n_head;

    const auto heads = [&](const clip_linear & linear) {
        return ggml_reshape_3d(ctx, build_linear(ctx, x, linear), head_dim, n_head, n);
    };
    ggml_tensor * q = ggml_permute(ctx, heads(layer.q), 0, 2, 1, 3);                 // [head_dim, n, n_head]
    ggml_tensor * k = ggml_permute(ctx, heads(layer.k), 0, 2, 1, 3);                 // [head_dim, n, n_head]
    ggml_tensor * v = ggml_cont(ctx, ggml_permute(ctx, heads(layer.v), 1, 2, 0, 3)); // [n, head_dim, n_head]

    ggml_tensor * weights = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(weights, GGML_PREC_F32);
    weights             = ggml_soft_max_ext(ctx, weights, mask, 1.0f / std::sqrt((float) head_dim), 0.0f);
    ggml_tensor * mixed = ggml_permute(ctx, ggml_mul_mat(ctx, v, weights), 0, 2, 1, 3);
    return build_linear(ctx, ggml_cont_2d(ctx, mixed, n_embd, n), layer.out);
}

// --- calls; the caller holds the mutex ---

static int check_result(const float * values, int64_t count, const char * what) {
    if (qap_find_unusable(values, count) >= 0) {
        return qap_fail("expected finite numbers from CLIP's %s, got others; the file's weights are damaged", what);
    }
    return 0;
}

static int compute_text(const qap_clip_text & clip, const int32_t * ids, int64_t n, float * embedding) {
    // transformers: the first token with the config's id; 2 is what old configs say, and means the highest id
    const int32_t * at = clip.pool_id == 2 ? std::max_element(ids, ids + n) : std::find(ids, ids + n, clip.pool_id);
    at                 = at == ids + n ? ids : at;

    device_graph graph;
    if (graph.open(clip.backend.get(), 64 + 48 * clip.layers.size()) != 0) {
        return -1;
    }
    ggml_context * ctx       = graph.ctx.get();
    ggml_tensor *  inp_ids   = graph.input(GGML_TYPE_I32, n, 1);
    ggml_tensor *  inp_place = graph.input(GGML_TYPE_I32, n, 1);
    ggml_tensor *  inp_mask  = graph.input(GGML_TYPE_F32, n, n);

    ggml_tensor * x =
        ggml_add(ctx, ggml_get_rows(ctx, clip.token_embd, inp_ids), ggml_get_rows(ctx, clip.position_embd, inp_place));
    for (const clip_text_layer & layer : clip.layers) {
        ggml_tensor * normed = build_norm(ctx, x, layer.ln1, clip.eps);
        x                    = ggml_add(ctx, x, build_attention(ctx, normed, inp_mask, layer, clip.n_head));
        ggml_tensor * hidden = build_linear(ctx, build_norm(ctx, x, layer.ln2, clip.eps), layer.up);
        x = ggml_add(ctx, x, build_linear(ctx, build_activation(ctx, hidden, clip.activation), layer.down));
    }
    // the last norm looks at one row at a time, so only the pooled one is needed
    x = ggml_view_2d(ctx, x, clip.n_embd, 1, x->nb[1], (size_t) (at - ids) * x->nb[1]);
    x = build_linear(ctx, build_norm(ctx, x, clip.final_ln, clip.eps), clip.text_proj);
    ggml_set_output(x);
    ggml_build_forward_expand(graph.gf, x);
    if (graph.allocate() != 0) {
        return -1;
    }
    std::vector<int32_t> places((size_t) n);
    std::vector<float>   mask((size_t) (n * n), 0.0f);
    for (int64_t i = 0; i < n; i++) {
        places[(size_t) i] = (int32_t) i;
        std::fill(mask.begin() + i * n + i + 1, mask.begin() + (i + 1) * n, -INFINITY);
    }
    ggml_backend_tensor_set(inp_ids, ids, 0, ggml_nbytes(inp_ids));
    ggml_backend_tensor_set(inp_place, places.data(), 0, ggml_nbytes(inp_place));
    ggml_backend_tensor_set(inp_mask, mask.data(), 0, ggml_nbytes(inp_mask));
    if (graph.run() != 0) {
        return -1;
    }
    qap_read_floats(x, embedding);
    return check_result(embedding, clip.n_proj, "text tower");
}

static int compute_patches(const qap_clip_text & clip, const float * hidden, int32_t n_tokens, float * embeddings) {
    if (hidden == nullptr || n_tokens < 1) {
        return qap_fail("hidden: expected (n_tok, %d) with at least one token, got none", (int) clip.n_hidden);
    }
    const int64_t bad = qap_find_unusable(hidden, (int64_t) n_tokens * clip.n_hidden);
    if (bad >= 0) {
        return qap_fail(
            "hidden: expected finite numbers of at most %g, got %g at token %d", (double) QAP_MAX_MAGNITUDE,
            (double) hidden[bad], (int) (bad / clip.n_hidden));
    }
    device_graph graph;
    if (graph.open(clip.backend.get(), 64) != 0) {
        return -1;
    }
    ggml_context * ctx = graph.ctx.get();
    ggml_tensor *  inp = graph.input(GGML_TYPE_F32, clip.n_hidden, n_tokens);
    ggml_tensor *  x   = build_linear(ctx, build_norm(ctx, inp, clip.post_ln, clip.eps_vision), clip.visual_proj);
    ggml_set_output(x);
    ggml_build_forward_expand(graph.gf, x);
    if (graph.allocate() != 0) {
        return -1;
    }
    ggml_backend_tensor_set(inp, hidden, 0, ggml_nbytes(inp));
    if (graph.run() != 0) {
        return -1;
    }
    qap_read_floats(x, embeddings);
    return check_result(embeddings, (int64_t) n_tokens * clip.n_proj, "visual projection");
}

static float minus_cosine(const float * a, const float * b, int32_t n) {
    double dot = 0.0, aa = 0.0, bb = 0.0;
    for (int32_t i = 0; i < n; i++) {
        dot += (double) a[i] * b[i];
        aa += (double) a[i] * a[i];
        bb += (double) b[i] * b[i];
    }
    return aa > 0.0 && bb > 0.0 ? (float) (-dot / std::sqrt(aa * bb)) : 0.0f;
}

static int check_ids(const qap_clip_text & clip, const int32_t * ids, int32_t n_ids) {
    if (ids == nullptr || n_ids < 1 || n_ids > clip.n_ctx) {
        return qap_fail("ids: expected 1..%d token ids, got %d", (int) clip.n_ctx, (int) n_ids);
    }
    for (int32_t i = 0; i < n_ids; i++) {
        if (ids[i] < 0 || ids[i] >= clip.n_vocab) {
            return qap_fail("ids: expected 0..%d, got %d at %d", (int) clip.n_vocab - 1, (int) ids[i], (int) i);
        }
    }
    return 0;
}

// --- public ---

// C callers must see no exception: memory that runs out, or a file that is refused, is the thread's error.
template <typename F> static int guarded(F && body) {
    try {
        const int status = body();
        if (status == 0) {
            qap_clear_error();
        }
        return status;
    } catch (const std::exception & err) {
        return qap_fail("%s", err.what());
    }
}

struct qap_clip_text * qap_clip_text_open(const char * path, const char * device, int32_t n_threads) {
    std::unique_ptr<qap_clip_text> clip;
    const int                      status = guarded([&] {
        clip          = std::make_unique<qap_clip_text>();
        clip->backend = qap_open_device(device, n_threads);
        if (!clip->backend) {
            return -1;
        }
        clip_text_load(*clip, path != nullptr ? path : "");
        return 0;
    });
    return status == 0 ? clip.release() : nullptr;
}

void qap_clip_text_free(struct qap_clip_text * clip) {
    delete clip;
}

struct qap_clip_text_shape qap_clip_text_get_shape(const struct qap_clip_text * clip) {
    return { clip->n_ctx, clip->n_proj, clip->n_hidden, clip->n_vocab };
}

int qap_clip_text_embed(struct qap_clip_text * clip, const int32_t * ids, int32_t n_ids, float * embedding) {
    return guarded([&] {
        if (check_ids(*clip, ids, n_ids) != 0) {
            return -1;
        }
        const std::lock_guard<std::mutex> lock(clip->mutex);
        return compute_text(*clip, ids, n_ids, embedding);
    });
}

int qap_clip_text_project(struct qap_clip_text * clip, const float * hidden, int32_t n_tokens, float * embeddings) {
    return guarded([&] {
        const std::lock_guard<std::mutex> lock(clip->mutex);
        return compute_patches(*clip, hidden, n_tokens, embeddings);
    });
}

int qap_clip_text_relevance(
    struct qap_clip_text * clip, const float * hidden, int32_t n_tokens, const int32_t * ids, int32_t n_ids,
    float * relevance) {
    return guarded([&] {
        const auto         n_proj = (size_t) clip->n_proj;
        std::vector<float> words(n_proj);
        if (qap_clip_text_embed(clip, ids, n_ids, words.data()) != 0) {
            return -1;
        }
        std::vector<float> patches((size_t) std::max(n_tokens, 0) * n_proj);
        if (qap_clip_text_project(clip, hidden, n_tokens, patches.data()) != 0) {
            return -1;
        }
        for (int32_t i = 0; i < n_tokens; i++) {
            relevance[i] = minus_cosine(patches.data() + (size_t) i * n_proj, words.data(), clip->n_proj);
        }
        return 0;
    });
}
