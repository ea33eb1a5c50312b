// image-cache.h: encoded pictures of one encoder, kept where they were made, so that a picture is encoded once and pruned
// anew for each request. hooks-cache.cpp fills it and reads from it; clip_ctx owns it (011-encode-once.patch).
#pragma once

#include "ggml-cpp.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <vector>

// What an encode left. The tensors lie in a buffer of the encoder's own backend: with a device that has memory of its own,
// only what is kept of a picture crosses to the host.
struct qap_cached_image {
    std::vector<int32_t> shape;  // what the encode depends on, beside the pixels; an early drop among it
    std::vector<float>   pixels; // as the encoder got them; compared one by one, so that no other picture can be found

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           embeddings  = nullptr; // the encoder's last node, all its rows
    ggml_tensor *           attention   = nullptr; // [n_left], raw, or null
    ggml_tensor *           received    = nullptr; // [n_left], raw, or null
    ggml_tensor *           early       = nullptr; // [n_left] I32, tokens that an early drop left, or null
    ggml_tensor *           early_total = nullptr; // what they were chosen by
    ggml_tensor *           early_near  = nullptr; // their cosines with all tokens, or null
    uint32_t                signals     = 0;       // those that the encoder can give, as bits of qap_signal()

    size_t bytes() const;
};

class qap_image_cache {
public:
    // The picture with these pixels, moved to the front; null where there is none.
    const qap_cached_image * find(const std::vector<int32_t> & shape, const std::vector<float> & pixels);

    // Put a picture in front; the last ones go until all fit. One that does not fit by itself is not kept.
    void put(std::unique_ptr<qap_cached_image> image, size_t limit);

    size_t  bytes() const { return n_bytes; }
    int64_t n_images() const { return (int64_t) images.size(); }

    int64_t n_encoded  = 0; // pictures that were asked for and not there
    int64_t n_recalled = 0; // pictures that were there

private:
    std::list<std::unique_ptr<qap_cached_image>> images; // the latest in front
    size_t                                       n_bytes = 0;
};

struct clip_image_f32;

// Do two pictures give the same rows? Their pixels, what else an encode depends on, and where their padding lies are equal.
bool qap_same_picture(const clip_image_f32 & a, const clip_image_f32 & b);

// Bytes that an encoder may keep: qap_image_cache_limit(), else QAP_IMAGE_CACHE_MB, else 256 MB.
size_t qap_image_cache_bytes();
