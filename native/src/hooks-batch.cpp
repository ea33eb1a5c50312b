// hooks-batch.cpp: how many rows of a picture go into one batch of the language model.
//
// Facts (llama-context.cpp, llama_context::decode): a batch above n_batch, and rows that see each other (non-causal
// attention) above n_ubatch, end the process by GGML_ASSERT. Rows that are split over two batches do not see each other.
#include "llama.h"
#include "mtmd.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap.h"

#include <algorithm>

int32_t qap_hook_batch(
    const mtmd_context * ctx, const llama_context * lctx, const mtmd_input_chunk * chunk, int32_t n_batch) {
    if (qap_disabled()) {
        return n_batch;
    }
    qap_clear_error();
    const auto most = (int32_t) llama_n_batch(lctx);
    if (!mtmd_decode_use_non_causal(ctx, chunk)) {
        return std::min(n_batch, most);
    }
    const auto rows = (int32_t) mtmd_input_chunk_get_n_tokens(chunk);
    const auto fits = std::min(most, (int32_t) llama_n_ubatch(lctx));
    if (rows > fits) {
        return qap_fail(
            "n_batch and n_ubatch: expected at least the picture's %d rows, which this model reads in one batch, got "
            "%d; "
            "load the language model with more",
            (int) rows, (int) fits);
    }
    return std::max(n_batch, rows);
}
