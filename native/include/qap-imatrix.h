/*
 * qap-imatrix.h: importance matrices of a language model (native/src/imatrix-collect.cpp). C, as qap.h.
 */
#ifndef QAP_IMATRIX_H
#define QAP_IMATRIX_H

#include "qap.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;

/* Sums of squares of what each matrix of a language model is multiplied with, as llama-imatrix takes them, apart for each
 * kind of row. A collector belongs to one llama_context, made with cb_eval = qap_imatrix_see and cb_eval_user_data = the
 * collector, which outlives it. With llama_set_embeddings(ctx, true) the last layer sees all rows, not the last one alone.
 * Logits are not computed for batches of image rows. */
enum qap_rows { QAP_ROWS_IMAGE = 0, QAP_ROWS_TEXT = 1, QAP_ROWS_ANSWER = 2, QAP_ROWS_KINDS = 3 };
struct qap_imatrix;
QAP_API struct qap_imatrix * qap_imatrix_new(void);
QAP_API void                 qap_imatrix_free(struct qap_imatrix * im);
QAP_API bool                 qap_imatrix_see(struct ggml_tensor * node, bool ask, void * im);
/* kind: of the rows of the batches that come; -1: they do not count (at first) */
QAP_API int qap_imatrix_rows(struct qap_imatrix * im, int32_t kind);
/* nonzero with an error where a product had no expected shape, or an input was not finite */
QAP_API int qap_imatrix_check(const struct qap_imatrix * im);
/* sums: [QAP_ROWS_KINDS, n_values], n_values = columns x matrices of a tensor; counts: [QAP_ROWS_KINDS, n_counts], n_counts =
 * experts, or 1 */
struct qap_imatrix_entry {
    const char *    name;
    int64_t         n_values;
    int64_t         n_counts;
    const float *   sums;
    const int64_t * counts;
};
QAP_API int64_t qap_imatrix_size(const struct qap_imatrix * im);
/* entries by name, ascending; valid until the next batch */
QAP_API int qap_imatrix_at(const struct qap_imatrix * im, int64_t index, struct qap_imatrix_entry * entry);
/* replaces an entry, or adds it: what an earlier measurement had */
QAP_API int qap_imatrix_put(struct qap_imatrix * im, const struct qap_imatrix_entry * entry);

#ifdef __cplusplus
}
#endif

#endif /* QAP_IMATRIX_H */
