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

#define QAP_VERSION 1                            /* value of the GGUF key qap.version */
#define QAP_KEY_ORIGIN "qap.origin.architecture" /* in a relabelled language model: what it was */
#define QAP_MAX_MAGNITUDE 1e30f /* larger features are refused: squares and ranges stay finite below it */

#ifdef __cplusplus
extern "C" {
#endif

struct llama_model;
struct mtmd_context;
struct mtmd_input_chunk;

/* ids; the names are in the tables of src/params.cpp and equal those of Python and the CLI */
enum qap_error {
    QAP_ERROR_MODEL = 1, /* that of int4, each channel as important as it is to the language model */
    QAP_ERROR_INT2  = 2, /* int<b>: the id is b, 2..8 */
    QAP_ERROR_INT4  = 4,
    QAP_ERROR_INT8  = 8,
    QAP_ERROR_GGML  = 100 /* a ggml type: 100 + enum ggml_type */
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
    QAP_SELECT_DIVPRUNE = 4,
    QAP_SELECT_COVERAGE = 5
};
enum qap_positions { QAP_POSITIONS_AUTO = 0, QAP_POSITIONS_COMPACT = 1, QAP_POSITIONS_KEEP = 2 };
enum qap_merge { QAP_MERGE_NONE = 0, QAP_MERGE_AVERAGE = 1 };

struct qap_params {
    double   keep_ratio;      /* (0, 1]; used when n_keep is 0 */
    int32_t  n_keep;          /* tokens to keep, or 0 */
    float    alpha;           /* [0, 1]: weight of the semantic relevance */
    bool     alpha_dynamic;   /* alpha follows the spread of the sensitivity */
    int32_t  error;           /* enum qap_error */
    int32_t  group_size;      /* channels that share a scale, >= 1 */
    int32_t  outlier;         /* enum qap_outlier */
    float    outlier_weight;  /* [0, 1] */
    int32_t  semantic;        /* enum qap_semantic */
    int32_t  select;          /* enum qap_selector */
    int32_t  positions;       /* enum qap_positions */
    int32_t  merge;           /* enum qap_merge: what becomes of dropped tokens */
    int32_t  encoder_layer;   /* layers of the image encoder that see all patches, or 0: a quarter of them */
    double   encoder_keep;    /* (0, 1]: part of the patches that the other layers see */
    int32_t  skip_flat_tiles; /* 0..255: tiles whose pixels are that near to one colour are not encoded; -1: all are */
    int32_t  duplicates;      /* 0..255: patches that are that near to an earlier one are not encoded; -1: all are */
    uint64_t seed;            /* of the random selector */
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
    int32_t n_total;   /* tokens that the projector gave, or would have given without an early drop */
    int32_t n_padding; /* of them, those that lie wholly in the padding of a letterboxed picture */
    int32_t n_early;   /* of them, those that an early drop left; 0: there was none */
    bool    flat;      /* a tile whose pixels say nothing: it is not encoded, and no token of it can be kept */
    int32_t n_keep;    /* K, none of them padding */
    int32_t n_special; /* rows that are no tokens and are always kept */
    int32_t n_columns; /* tokens of a line of the picture; 0 before the encode, and where it is several views */
    bool    done;      /* false before the chunk was encoded */
    float   alpha;
    int64_t bytes_read;      /* copied from the device to the host: rows, scores, and cosines where they are needed */
    const int32_t * indices; /* [n_keep], sorted ascending */
    const int32_t * special; /* [n_special]: their numbers among all rows, ascending */
    const int32_t * padding; /* [n_padding]: their numbers among the tokens, ascending */
    const int32_t * early;   /* [n_early]: likewise */
    float   content[4]; /* where the picture lies on the grid: left, top, width, height, in tokens; zeros: not known */
    int32_t signal;     /* enum qap_semantic: what the relevance was made of */
    const float * early_total; /* [n_total] or NULL: what an early drop chose by; 0 for padding */
    const float * early_near;  /* [n_early, n_total - n_padding - n_early]: see qap_dropped; NULL above 4096 tokens */
    const float * error; /* [n_total] or NULL; so are all that follow. 0 for padding and for what was dropped early */
    const float * outlier;
    const float * sensitivity;
    const float * semantic;
    const float * attention; /* class-token attention, mean over heads, not normalised */
    const float * received;  /* attention received, mean over heads and queries, not normalised */
    const float * hidden;    /* [n_total, n_hidden]: input of the projector, only when it was asked for */
    int32_t       n_hidden;
    const float * total;
};

/* --- general --- */

QAP_API const char * qap_last_error(void);    /* "" when the last call of this thread succeeded */
QAP_API bool         qap_disabled(void);      /* QAP_DISABLE=1: every hook does nothing */
QAP_API bool         qap_stock_encoder(void); /* QAP_STOCK_ENCODER=1: upstream's encoder defects are left in place */
/* Makes ggml's CPU backend decide against AMX kernels, which GCC before 14 miscompiles; false when it had decided for them
 * before, or they are on by force. Harmless where there is no AMX. */
QAP_API bool         qap_avoid_amx(void);
QAP_API const char * qap_upstream_version(void); /* the llama-cpp-python version that this library was built from */

/* --- checks of files that may be damaged or hostile: an error here, where upstream's loaders would abort --- */

/* Each returns 0 when the file can be handed to upstream. memory: must it fit this machine's memory? n_ctx: cells of
 * the KV cache to come, 0: the model's own. n_embd: width of a token, 0 where the kind of model is not known here; may
 * be NULL. mtmd_init_from_file() asks the first by itself. */
QAP_API int qap_check_mmproj(const char * path, bool memory, int64_t * n_embd);
/* The memory that it asks for (with flash attention): encoder and a picture of its size, pruned as by default. -1: refused */
QAP_API double qap_mmproj_bytes(const char * path, bool flash);
QAP_API int    qap_check_language(const char * path, bool memory, int64_t n_ctx, int64_t * n_embd);
/* Bytes that the control groups around this process allow, and that are left of it; infinite without a limit.
 * groups: /proc/self/cgroup; mount: /sys/fs/cgroup. */
QAP_API void qap_container_room(const char * groups, const char * mount, double * total, double * free);

/* --- parameters --- */

QAP_API struct qap_params qap_params_default(void);
QAP_API int               qap_params_check(const struct qap_params * params);
/* K for n_tokens of a picture, padding not counted: n_keep or ceil(keep_ratio n_tokens), at least 1, and no more than there
 * are or an early drop leaves. -1 for n_tokens below 1. */
QAP_API int32_t qap_params_count(const struct qap_params * params, int32_t n_tokens);
/* How many of n_tokens of a picture or of a slice of it an early drop leaves, padding not counted: ceil(encoder_keep
 * n_tokens), all without one. -1 for n_tokens below 1. */
QAP_API int32_t qap_params_count_early(const struct qap_params * params, int32_t n_tokens);

/* Change one parameter by name; the names are those of the GGUF keys without "qap.", values are text ("18", "0.5",
 * "dpp"; alpha may be "dynamic"). n_keep and keep_ratio replace each other. */
QAP_API int qap_params_set(struct qap_params * params, const char * name, const char * value);
/* The defaults, changed by the variables QAP_N_KEEP, QAP_KEEP_RATIO, QAP_ALPHA, ... that are set: 1 where any is, 0
 * where none is, -1 with an error for a value that cannot be. */
QAP_API int qap_params_from_env(struct qap_params * params);

/* name <-> id; -1 or NULL for an unknown one. kind: "error", "outlier", "semantic", "select", "positions", "merge" */
QAP_API int32_t      qap_id_from_name(const char * kind, const char * name);
QAP_API const char * qap_name_from_id(const char * kind, int32_t id);
QAP_API const char * qap_name_at(const char * kind, int32_t place); /* from place 0 on, NULL after the last */

/* What tokenization uses: the innermost override of the calling thread, else the process default, else the
 * environment (qap_params_from_env), else the qap.* keys of the mmproj file, else nothing (dense). NULL clears the
 * default; a NULL override means dense. */
QAP_API int  qap_default_set(const struct qap_params * params);
QAP_API bool qap_default_get(struct qap_params * params);
QAP_API int  qap_override_push(const struct qap_params * params);
QAP_API void qap_override_pop(void);

/* The device of encoders whose program names none: a ggml device name, NULL for upstream's choice (the first GPU). */
QAP_API int qap_device_set(const char * device);

/* How pictures come to the size that an encoder takes: as its model was trained, stretched, or letterboxed with the
 * model's colour. For every mmproj that is loaded from now on, in all threads. */
enum qap_resize { QAP_RESIZE_AUTO = 0, QAP_RESIZE_STRETCH = 1, QAP_RESIZE_PAD = 2 };
QAP_API int qap_resize_set(int32_t mode);
/* Likewise: may pictures be pruned whose family was not compared with its original, if their rows have a place? */
QAP_API void qap_force_family_set(bool on);

/* --- scores and selection over features --- */

/* x: [n_tokens, n_embd]; semantic: [n_tokens] raw relevance or NULL; channel_weights: [n_embd], from 0 in any unit, not all
 * 0; needed by error "model" and not looked at by others; device: a ggml device name or NULL (CPU); n_threads: at most, int
 * errors take one */
QAP_API int qap_score(
    const float * x, int32_t n_tokens, int32_t n_embd, const float * semantic, const float * channel_weights,
    const struct qap_params * params, const char * device, int32_t n_threads, struct qap_scores * out);

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

/* The same choice as by qap_cosines() and qap_select() for the dpp, without the n_tokens^2 cosines: on the CPU, in memory for
 * n_tokens (n_embd + 2 n_keep) floats. x: [n_tokens, n_embd], else as above. */
QAP_API int qap_select_by_rows(
    const float * x, const float * total, int32_t n_tokens, int32_t n_embd, int32_t n_keep, int32_t n_threads,
    int32_t * indices);
/* whether qap_prune() chooses that way on the CPU: dpp above 4,096 tokens, where the cosines would take over 128 MiB */
QAP_API bool qap_selects_by_rows(int32_t selector, int32_t n_tokens);

/* Bytes of host memory that qap_prune() takes at most at a time to choose n_keep of n_tokens and to merge the others into
 * them, beside the rows and their scores. 0 for choices without cosines. */
QAP_API double qap_choice_bytes(const struct qap_params * params, int32_t n_tokens, int32_t n_embd, int32_t n_keep);

/* K of an image that is cut into slices, in proportion to their tokens (largest remainder). At least 1 each where K is
 * enough for that, else some get none; so do slices without tokens. sizes, share: [n_slices] */
QAP_API int qap_share(const int32_t * sizes, int32_t n_slices, int32_t n_keep, int32_t * share);

/* Ours, beyond the paper: each dropped token is averaged into its most similar kept one, weighted by how many tokens
 * that one stands for. x: [n_tokens, n_embd]; indices: [n_keep] ascending; out: [n_keep, n_embd]. */
QAP_API int qap_merge_average(
    const float * x, const float * cosines, int32_t n_tokens, int32_t n_embd, const int32_t * indices, int32_t n_keep,
    float * out);

/* --- pruning of one piece of a picture (the whole of it, or a tile): signal, scores, selection, rows --- */

/* Tokens that an early drop took. They cannot be kept, and coverage keeps what stands for them. */
struct qap_dropped {
    int32_t       count;
    const float * total; /* [count]: the scores that they were dropped by */
    const float * near;  /* [tokens that are left, count]: cosines with them of what the layer gave, minus its mean */
};

/* What an encode left, in host memory. Rows are tokens in their order, and special rows among them, which are no tokens and
 * are always kept. Tokens that are padding are neither scored nor kept: statistics are over the others. What an early drop took
 * is padding here. */
struct qap_piece {
    const float *      rows; /* [n_rows, n_width] */
    int32_t            n_rows;
    int32_t            n_width;
    int32_t            n_planes; /* scores and cosines look at the first n_width / n_planes numbers of a row */
    const int32_t *    special;  /* [n_special]: numbers among the rows, ascending */
    int32_t            n_special;
    const int32_t *    padding; /* [n_padding]: numbers among the tokens, ascending */
    int32_t            n_padding;
    const float *      attention;       /* class-token attention, [n_tokens] or NULL */
    const float *      received;        /* attention received, likewise */
    const float *      prompt;          /* relevance to a prompt, likewise */
    int32_t            prompt_semantic; /* which one: QAP_SEMANTIC_TEXT or QAP_SEMANTIC_CLIP_TEXT */
    const float *      channel_weights; /* as for qap_score(), [n_width / n_planes] or NULL */
    struct qap_dropped dropped;         /* for coverage; its rows are the tokens that can be kept */
};

/* Caller-owned arrays, each may be NULL. */
struct qap_pruned {
    int32_t *         indices;   /* [n_keep]: numbers of the kept tokens, ascending */
    int32_t *         kept;      /* [n_keep + n_special]: the rows that are kept, ascending */
    float *           rows;      /* [n_keep + n_special, n_width]: their content, dropped ones merged in if asked for */
    struct qap_scores scores;    /* [n_tokens] each; 0 for padding */
    int32_t           semantic;  /* enum qap_semantic: the signal that was used */
    int64_t           score_us;  /* microseconds of the scores */
    int64_t           select_us; /* of cosines, selection and rows */
};

/* n_keep: of this piece, 0 (scores only) to the number of its tokens that are no padding; qap_params_count() and qap_share()
 * say how many. device, n_threads: as for qap_score */
QAP_API int qap_prune(
    const struct qap_piece * piece, const struct qap_params * params, int32_t n_keep, const char * device,
    int32_t n_threads, struct qap_pruned * out);

/* The signal that these parameters take (enum qap_semantic) of those that are there, 1 << enum qap_semantic each;
 * QAP_SEMANTIC_NONE where `auto` finds none. -1 when the one that was asked for is not there, or nothing is left to rank by. */
QAP_API int32_t qap_signal(const struct qap_params * params, uint32_t available);
/* what `auto` takes, the best first: [count] */
QAP_API const int32_t * qap_signal_order(int32_t * count);

/* Rows that are kept with these tokens of a piece, the special ones among them. kept: [n_keep + n_special], ascending */
QAP_API int qap_kept_rows(
    int32_t n_tokens, const int32_t * special, int32_t n_special, const int32_t * indices, int32_t n_keep,
    int32_t * kept);

/* --- what our graphs are made of --- */

/* For tests. From now on the callback gets each node of every graph that this thread runs through the functions above,
 * just before it runs (the encoder's own graphs are upstream's to show, see cb_eval in mtmd.h). NULL ends it. */
struct ggml_tensor;
typedef void (*qap_node_callback)(const struct ggml_tensor * node, void * user);
QAP_API void qap_watch_graphs(qap_node_callback callback, void * user);

/* --- encoded pictures --- */

/* Each context keeps the rows of the pictures that it encoded last, so that a picture is encoded once and pruned anew for
 * each prompt. Not kept: sound, several pictures in one encode, LLaVA-NeXT's tiles, and with QAP_DISABLE=1 nothing. bytes: the
 * most for each context; 0 keeps nothing; -1 is QAP_IMAGE_CACHE_MB of the environment, or 256 MB. */
QAP_API int qap_image_cache_limit(int64_t bytes);

struct qap_image_cache_state {
    int64_t bytes;      /* in use */
    int64_t n_images;   /* pictures that are kept */
    int64_t n_encoded;  /* pictures that were encoded, of those that can be kept */
    int64_t n_recalled; /* encodes that were saved */
};
QAP_API void qap_context_image_cache(const struct mtmd_context * ctx, struct qap_image_cache_state * state);

/* Bytes of the encoder's weights that lie in buffer types of ggml's faster kernels, where the language model's do: on a CPU,
 * matrices of the types that this CPU has such kernels for. QAP_ENCODER_REPACK=0, when the encoder is loaded: none. */
QAP_API int64_t qap_context_repacked(const struct mtmd_context * ctx);

/* --- chunks of libmtmd --- */

/* 1: what the calling thread's next tokenization uses; 0: the defaults, it prunes nothing; -1: an error of the environment */
QAP_API int qap_context_params(const struct mtmd_context * ctx, struct qap_params * params);
/* the qap.* keys of the file that the context was made from; false when it has none */
QAP_API bool qap_context_file_params(const struct mtmd_context * ctx, struct qap_params * params);
/* qap.channel_weights of that file, [count], as they stand there: importance of the language model's input channels, for
 * error "model". NULL when it has none. */
QAP_API const float * qap_context_channel_weights(const struct mtmd_context * ctx, int32_t * count);
/* What a kept token's own place is in the language model's sequence: nothing that can be kept (one position, and gaps are
 * refused), a row and a column of the picture (M-RoPE), or its index among the picture's rows (one position, in a file
 * relabelled as M-RoPE). */
enum qap_places { QAP_PLACES_NONE = 0, QAP_PLACES_GRID = 1, QAP_PLACES_INDEX = 2 };
QAP_API int32_t qap_context_places(const struct mtmd_context * ctx);
/* was this language model relabelled? NULL: no */
QAP_API bool qap_model_relabelled(const struct llama_model * model);
/* NULL when images of this model can be pruned, else one line that says why not; and is it because that was forced? */
QAP_API const char * qap_context_why_not(const struct mtmd_context * ctx);
QAP_API bool         qap_context_forced(const struct mtmd_context * ctx);
/* NULL where a picture's tiles, if any, are packed as in training, or QAP_STOCK_ENCODER=1 (docs/upstream.md) */
QAP_API const char * qap_context_tiles_why_not(const struct mtmd_context * ctx);

/* What libmtmd makes of an mmproj file's header; the weights are not read. */
struct qap_mmproj_info {
    int32_t      n_embd;     /* width of the embeddings that the language model gets */
    int32_t      n_channels; /* of them, numbers of a token's main plane: all but DeepStack's */
    bool         vision;
    bool         audio;
    const char * why_not;    /* as above */
    int32_t      batch_rows; /* most rows of a picture whose rows see each other and stand in one batch; else 0 */
};
/* The index-th projector type of a table: "layout" (pruned), "forced" (pruned if asked for), "resize" (trained on stretched
 * pictures), "gate" (tensors are checked), "attends" (attention tells of each token). NULL past the end and for another. */
QAP_API const char * qap_projector_name(const char * table, int32_t index);
/* model: the language model that the file shall fit, NULL: any. reserve: build the graph of a picture too. Fails where
 * libmtmd would refuse to load the file. */
QAP_API int qap_mmproj_inspect(
    const char * path, const struct llama_model * model, bool reserve, struct qap_mmproj_info * info);
/* Do two image chunks of one context hold the same pixels, so that one encode serves both? */
QAP_API bool qap_chunk_same_picture(const struct mtmd_input_chunk * a, const struct mtmd_input_chunk * b);
/* The names of the weights that the encoder's graph uses for nothing but products with activations; their values may be
 * stored in any type that ggml multiplies with. None for a projector of which nothing is known here. Fails as above. */
QAP_API int qap_mmproj_products(const char * path, void (*name)(const char * weight, void * user), void * user);

/* rows of an image chunk without a plan that are no tokens: ends of lines */
QAP_API int32_t qap_chunk_n_special(const struct mtmd_context * ctx, const struct mtmd_input_chunk * chunk);
/* was it cut out of a picture that has an overview beside it? */
QAP_API bool qap_chunk_is_tile(const struct mtmd_input_chunk * chunk);
/* tokens of such a chunk that lie wholly in the padding of a letterboxed picture */
QAP_API int32_t qap_chunk_n_padding(const struct mtmd_context * ctx, const struct mtmd_input_chunk * chunk);

/* Replace the plan of an image chunk. plan_capture: keep all tokens, note the attention and, if asked, the input of the
 * projector. plan_early: the same after the early drop of these parameters, zeros in the rows of what it drops. plan_indices:
 * the given tokens are kept (for embeddings that the caller selected itself), and every special row, at positions of enum
 * qap_positions. */
QAP_API int qap_chunk_plan_capture(const struct mtmd_context * ctx, struct mtmd_input_chunk * chunk, bool hidden);
QAP_API int qap_chunk_plan_early(
    const struct mtmd_context * ctx, struct mtmd_input_chunk * chunk, bool hidden, const struct qap_params * params);
QAP_API int qap_chunk_plan_indices(
    const struct mtmd_context * ctx, struct mtmd_input_chunk * chunk, const int32_t * indices, int32_t n_keep,
    int32_t positions);
QAP_API int qap_chunk_report(const struct mtmd_input_chunk * chunk, struct qap_report * report);

#ifdef __cplusplus
}
#endif

#endif /* QAP_H */
