// error-ggml.cpp: the error that GGUF really makes: quantize with ggml's own quantizer of a type, and back.
//
// The block size is the type's (32, or 256 for the K types); group_size does not apply. A row that the block does not
// divide is filled with zeros, as one would have to store it; what the quantizer makes of those is no error of the
// token. ggml keeps scales (and minima) in f16: features up to 65504 always fit; beyond a limit of the type there is no
// finite error, and the caller reports that.
#include "scorers.h"

#include <cfloat>

ggml_tensor * qap_build_error_ggml(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how) {
    const ggml_type type     = (ggml_type) (how.error - QAP_ERROR_GGML);
    const int64_t   n_tokens = x->ne[1];
    const int64_t   n_embd   = x->ne[0];
    const int64_t   block    = ggml_blck_size(type);
    const int64_t   padding  = (block - n_embd % block) % block;

    ggml_tensor * unit   = ggml_clamp(ctx, qap_build_absmax(ctx, x), FLT_MIN, FLT_MAX); // [1, n_tokens]
    ggml_tensor * stored = padding != 0 ? ggml_pad(ctx, x, (int) padding, 0, 0, 0) : x;
    ggml_tensor * back   = ggml_cast(ctx, ggml_cast(ctx, stored, type), GGML_TYPE_F32);
    if (padding != 0) {
        back = ggml_cont(ctx, ggml_view_2d(ctx, back, n_embd, n_tokens, back->nb[1], 0));
    }
    ggml_tensor * norm = qap_build_scaled_norm(ctx, ggml_sub(ctx, x, back), unit);
    return ggml_reshape_1d(ctx, ggml_mul(ctx, norm, unit), n_tokens);
}
