/*
 * qap.h: quantization-aware pruning of image tokens, the only public header of the native part.
 *
 * Plain C, opaque upstream types. Implements QAPruner (arXiv 2604.02816) as ggml graphs:
 * group-wise quantization error, outlier magnitude, semantic relevance, fusion, selection.
 *
 * Array shapes are written [rows, columns], rows being tokens, C order, float32.
 * A function that can fail returns 0 on success and -1 on failure; qap_last_error() then holds
 * one line for the calling thread. No function aborts the process for bad arguments.
 */
#ifndef QAP_H
#define QAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QAP_API __attribute__((visibility("default")))

#define QAP_VERSION 1           /* value of the GGUF key qap.version */
#define QAP_MAX_MAGNITUDE 1e30f /* larger features are refused: squares and ranges stay finite below it */

#ifdef __cplusplus
extern "C" {
#endif

struct llama_model;
struct mtmd_context;
struct mtmd_input_chunk;

/* ids; the names are in the tables of src/params.cpp and equal those of Python and the CLI */
enum qap_error {
    QAP_ERROR_INT2 = 2, /* int<b>: the id is b, 2..8 */
    QAP_ERROR_INT4 = 4,
    QAP_ERROR_INT8 = 8,
    QAP_ERROR_GGML = 100 /* a ggml type: 100 + enum ggml_type */
};
enum qap_outlier { QAP_OUTLIER_RANGE = 0, QAP_OUTLIER_ABSMAX = 1, QAP_OUTLIER_CREST = 2 };
enum qap_semantic {
    QAP_SEMANTIC_AUTO      = 0,
    QAP_SEMANTIC_CLS       = 1,
    QAP_SEMANTIC_NONE      = 2,
    QAP_SEMANTIC_ATTENTION = 3,
    QAP_SEMANTIC_TEXT      = 4, /* of the prompt: the caller brings the relevance */
    QAP_SEMANTIC_CLIP_TEXT = 5  /* likewise */
};
enum qap_selector {
    QAP_SELECT_TOPK     = 0,
    QAP_SELECT_RANDOM   = 1,
    QAP_SELECT_UNIFORM  = 2,
    QAP_SELECT_DPP      = 3,
    QAP_SELECT_DIVPRUNE = 4
};
enum qap_positions { QAP_POSITIONS_AUTO = 0, QAP_POSITIONS_COMPACT = 1, QAP_POSITIONS_KEEP = 2 };
enum qap_merge { QAP_MERGE_NONE = 0, QAP_MERGE_AVERAGE = 1 };

struct qap_params {
    double   keep_ratio;     /* (0, 1]; used when n_keep is 0 */
    int32_t  n_keep;         /* tokens to keep, or 0 */
    float    alpha;          /* [0, 1]: weight of the semantic relevance */
    bool     alpha_dynamic;  /* alpha follows the spread of the sensitivity */
    int32_t  error;          /* enum qap_error */
    int32_t  group_size;     /* channels that share a scale, >= 1 */
    int32_t  outlier;        /* enum qap_outlier */
    float    outlier_weight; /* [0, 1] */
    int32_t  semantic;       /* enum qap_semantic */
    int32_t  select;         /* enum qap_selector */
    int32_t  positions;      /* enum qap_positions */
    int32_t  merge;          /* enum qap_merge: what becomes of dropped tokens */
    int32_t  encoder_layer;  /* layers of the image encoder that see all patches, or 0: a quarter of them */
    double   encoder_keep;   /* (0, 1]: part of the patches that the other layers see */
    uint64_t seed;           /* of the random selector */
};

/* Caller-owned outputs of qap_score, each [n_tokens] or NULL. */
struct qap_scores {
    float * error;       /* E: || x - Q(x) ||_2 */
    float * outlier;     /* R */
    float * sensitivity; /* Q: (1 - w) minmax(E) + w minmax(R) */
    float * semantic;    /* P: min-max normalised, zeros without a signal */
    float * total;       /* S: alpha P + (1 - alpha) Q */
    float   alpha;       /* the alpha that was used */
};

/* What one encode found; arrays belong to the chunk and live until its next encode. */
struct qap_report {
    int32_t n_total;   /* N: tokens of the image */
    int32_t n_scored;  /* tokens that left the encoder: fewer than n_total after an early drop */
    int32_t n_keep;    /* K */
    int32_t n_special; /* rows that are no tokens and are always kept */
    int32_t n_columns; /* tokens of a line of the picture; 0 before the encode, and where it is several views */
    bool    done;      /* false before the chunk was encoded */
    float   alpha;
    int64_t bytes_read;      /* copied from the device to the host: rows, scores, and cosines where they are needed */
    const int32_t * indices; /* [n_keep], sorted ascending */
    const int32_t * special; /* [n_special]: their numbers among all rows, ascending */
    const int32_t * early;   /* [n_scored]: which tokens left the encoder, ascending; NULL where all did */
    const float *   early_total; /* [n_total]: what they were chosen by; NULL likewise */
    const float *   error;       /* [n_scored] or NULL; so are all that follow */
    const float *   outlier;
    const float *   sensitivity;
    const float *   semantic;
    const float *   attention; /* class-token attention, mean over heads, not normalised */
    const float *   received;  /* attention received, mean over heads and queries, not normalised */
    const float *   hidden;    /* [n_scored, n_hidden]: input of the projector, only when it was asked for */
    int32_t         n_hidden;
    const float *   total;
};

/* --- general --- */

QAP_API const char * qap_last_error(void);    /* "" when the last call of this thread succeeded */
QAP_API bool         qap_disabled(void);      /* QAP_DISABLE=1: every hook does nothing */
QAP_API bool         qap_stock_encoder(void); /* QAP_STOCK_ENCODER=1: upstream's encoder defects are left in place */
/* Makes ggml's CPU backend decide against AMX kernels, which GCC before 14 miscompiles; false when it had decided for them
 * before, or they are on by force. Harmless where there is no AMX. */
QAP_API bool         qap_avoid_amx(void);
QAP_API const char * qap_upstream_version(void); /* the llama-cpp-python version that this library was built from */

/* --- files of strangers: what upstream's loaders would end the process for is an error here --- */

/* Each returns 0 when the file can be handed to upstream. memory: must it fit this machine's memory? n_ctx: cells of
 * the KV cache to come, 0: the model's own. n_embd: width of a token, 0 where the kind of model is not known here; may
 * be NULL. mtmd_init_from_file() asks the first by itself. */
QAP_API int qap_check_mmproj(const char * path, bool memory, int64_t * n_embd);
QAP_API int qap_check_language(const char * path, bool memory, int64_t n_ctx, int64_t * n_embd);

/* --- parameters --- */

QAP_API struct qap_params qap_params_default(void);
QAP_API int               qap_params_check(const struct qap_params * params);
/* K for n_tokens, or -1 (n_keep larger than n_tokens) */
QAP_API int32_t qap_params_count(const struct qap_params * params, int32_t n_tokens);

/* name <-> id; -1 or NULL for an unknown one. kind: "error", "outlier", "semantic", "select", "positions" */
QAP_API int32_t      qap_id_from_name(const char * kind, const char * name);
QAP_API const char * qap_name_from_id(const char * kind, int32_t id);

/* What tokenization uses: the innermost override of the calling thread, else the process default, else the
 * qap.* keys of the mmproj file, else nothing (dense). NULL clears the default; a NULL override means dense. */
QAP_API int  qap_default_set(const struct qap_params * params);
QAP_API bool qap_default_get(struct qap_params * params);
QAP_API int  qap_override_push(const struct qap_params * params);
QAP_API void qap_override_pop(void);

/* The device of encoders whose program names none: a ggml device name, NULL for upstream's choice (the first GPU). */
QAP_API int qap_device_set(const char * device);

/* How pictures come to the size that an encoder takes: as its model was trained, stretched, or letterboxed with the
 * model's colour. For every mmproj that is loaded from now on, in all threads. */
enum qap_resize { QAP_RESIZE_AUTO = 0, QAP_RESIZE_STRETCH = 1, QAP_RESIZE_PAD = 2 };
QAP_API int     qap_resize_set(int32_t mode);
QAP_API int32_t qap_resize_get(void);

/* --- scores and selection over features --- */

/* x: [n_tokens, n_embd]; semantic: [n_tokens] raw relevance or NULL; device: a ggml device name or NULL (CPU);
 * n_threads: at most, int errors take one */
QAP_API int qap_score(
    const float * x, int32_t n_tokens, int32_t n_embd, const float * semantic, const struct qap_params * params,
    const char * device, int32_t n_threads, struct qap_scores * out);

/* cos(x_i, x_j), [n_tokens, n_tokens]; a token of zeros has cosine 0 with every token, itself included */
QAP_API int qap_cosines(
    const float * x, int32_t n_tokens, int32_t n_embd, const char * device, int32_t n_threads, float * cosines);

/* what a selector looks at */
QAP_API bool qap_selector_needs_scores(int32_t selector);
QAP_API bool qap_selector_needs_cosines(int32_t selector);

/* total: [n_tokens] and cosines: [n_tokens, n_tokens], each NULL where the selector does not need it.
 * indices: [n_keep], sorted ascending. */
QAP_API int qap_select(
    const float * total, const float * cosines, int32_t n_tokens, int32_t n_keep, int32_t selector, uint64_t seed,
    int32_t * indices);

/* K of an image that is cut into slices, in proportion to their tokens (largest remainder), at least 1 each.
 * sizes, share: [n_slices] */
QAP_API int qap_share(const int32_t * sizes, int32_t n_slices, int32_t n_keep, int32_t * share);

/* Ours, beyond the paper: each dropped token is averaged into its most similar kept one, weighted by how many tokens
 * that one stands for. x: [n_tokens, n_embd]; indices: [n_keep] ascending; out: [n_keep, n_embd]. */
QAP_API int qap_merge_average(
    const float * x, const float * cosines, int32_t n_tokens, int32_t n_embd, const int32_t * indices, int32_t n_keep,
    float * out);

/* --- relevance of patches to a prompt by CLIP: the keys and tensors qap_clip_text.* of an mmproj file --- */

struct qap_clip_text;

struct qap_clip_text_shape {
    int32_t n_ctx;    /* longest prompt in tokens, begin and end included */
    int32_t n_proj;   /* length of an embedding that patches and text share */
    int32_t n_hidden; /* length of a patch before the projector */
    int32_t n_vocab;
};

/* Loads the text tower onto a ggml device, or the CPU for NULL. NULL with an error for a file without one. */
QAP_API struct qap_clip_text *     qap_clip_text_open(const char * path, const char * device, int32_t n_threads);
QAP_API void                       qap_clip_text_free(struct qap_clip_text * clip);
QAP_API struct qap_clip_text_shape qap_clip_text_get_shape(const struct qap_clip_text * clip);

/* text: UTF-8, n_bytes. A text that is too long is cut, the end token stays. One call at a time runs on one object. */
/* ids: [n_ctx]; returns how many, or -1 */
QAP_API int32_t
qap_clip_text_tokenize(const struct qap_clip_text * clip, const char * text, size_t n_bytes, int32_t * ids);
/* embedding: [n_proj], not normalised */
QAP_API int qap_clip_text_embed(struct qap_clip_text * clip, const char * text, size_t n_bytes, float * embedding);
/* hidden: [n_tokens, n_hidden], the input of LLaVA's projector; embeddings: [n_tokens, n_proj], not normalised */
QAP_API int qap_clip_text_project(
    struct qap_clip_text * clip, const float * hidden, int32_t n_tokens, float * embeddings);
/* relevance: [n_tokens], minus the cosine between a patch and the text (CDPruner, arXiv 2506.10967); a zero has cosine 0 */
QAP_API int qap_clip_text_relevance(
    struct qap_clip_text * clip, const float * hidden, int32_t n_tokens, const char * text, size_t n_bytes,
    float * relevance);

/* --- what our graphs are made of --- */

/* For tests. From now on the callback gets each node of every graph that this thread runs through the functions above,
 * just before it runs (the encoder's own graphs are upstream's to show, see cb_eval in mtmd.h). NULL ends it. */
struct ggml_tensor;
typedef void (*qap_node_callback)(const struct ggml_tensor * node, void * user);
QAP_API void qap_watch_graphs(qap_node_callback callback, void * user);

/* --- chunks of libmtmd --- */

/* the qap.* keys of the file that the context was made from; false when it has none */
QAP_API bool qap_context_file_params(const struct mtmd_context * ctx, struct qap_params * params);
/* NULL when images of this model can be pruned, else one line that says why not */
QAP_API const char * qap_context_why_not(const struct mtmd_context * ctx);
/* NULL when the tiles of a picture are packed as the model was trained, or there are none, or QAP_STOCK_ENCODER=1; else one
 * line that says why they are not: a LLaVA-NeXT whose file lacks what is needed (docs/upstream.md) */
QAP_API const char * qap_context_tiles_why_not(const struct mtmd_context * ctx);

/* What libmtmd makes of an mmproj file's header; the weights are not read. */
struct qap_mmproj_info {
    int32_t      n_embd; /* width of the embeddings that the language model gets */
    bool         vision;
    bool         audio;
    const char * why_not; /* as above */
};
/* model: the language model that the file shall fit, NULL: any. Fails where libmtmd would refuse to load the file. */
QAP_API int qap_mmproj_inspect(const char * path, const struct llama_model * model, struct qap_mmproj_info * info);

/* Replace the plan of an image chunk. plan_capture: keep all tokens, note the attention and, if asked, the input of the
 * projector. plan_early: the same for the tokens that an early drop leaves, n_keep of them at least (params.encoder_keep).
 * plan_indices: the given tokens are kept (for embeddings that the caller selected itself), and every special row, at
 * positions of enum qap_positions. */
QAP_API int qap_chunk_plan_capture(const struct mtmd_context * ctx, struct mtmd_input_chunk * chunk, bool hidden);
QAP_API int qap_chunk_plan_early(
    const struct mtmd_context * ctx, struct mtmd_input_chunk * chunk, bool hidden, const struct qap_params * params,
    int32_t n_keep);
QAP_API int qap_chunk_plan_indices(
    const struct mtmd_context * ctx, struct mtmd_input_chunk * chunk, const int32_t * indices, int32_t n_keep,
    int32_t positions);
QAP_API int qap_chunk_report(const struct mtmd_input_chunk * chunk, struct qap_report * report);

#ifdef __cplusplus
}
#endif

#endif /* QAP_H */
