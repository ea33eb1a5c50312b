/*
 * qap-clip-text.h: relevance of patches to a prompt by CLIP (native/src/clip-text): the keys and tensors qap_clip_text.* of an
 * mmproj file. C, as qap.h.
 */
#ifndef QAP_CLIP_TEXT_H
#define QAP_CLIP_TEXT_H

#include "qap.h"

#ifdef __cplusplus
extern "C" {
#endif

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

/* ids: CLIP's token ids of a prompt, [n_ids], begin and end included, at most n_ctx, each below n_vocab. One call at a
 * time runs on one object. */
/* embedding: [n_proj], not normalised */
QAP_API int qap_clip_text_embed(struct qap_clip_text * clip, const int32_t * ids, int32_t n_ids, float * embedding);
/* hidden: [n_tokens, n_hidden], the input of LLaVA's projector; embeddings: [n_tokens, n_proj], not normalised */
QAP_API int qap_clip_text_project(
    struct qap_clip_text * clip, const float * hidden, int32_t n_tokens, float * embeddings);
/* relevance: [n_tokens], minus the cosine between a patch and the text (CDPruner, arXiv 2506.10967); a zero has cosine 0 */
QAP_API int qap_clip_text_relevance(
    struct qap_clip_text * clip, const float * hidden, int32_t n_tokens, const int32_t * ids, int32_t n_ids,
    float * relevance);

#ifdef __cplusplus
}
#endif

#endif /* QAP_CLIP_TEXT_H */
