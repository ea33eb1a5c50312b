// image-cache.cpp: see image-cache.h. The latest pictures within a number of bytes.
#include "image-cache.h"

#include "ggml-backend.h"
#include "qap-error.h"
#include "qap.h"

#include <atomic>
#include <cstdlib>

static const int64_t MEGABYTE      = 1 << 20;
static const int64_t DEFAULT_BYTES = 256 * MEGABYTE;

static std::atomic<int64_t> g_limit{ -1 }; // below 0: the environment decides

int qap_image_cache_limit(int64_t bytes) {
    if (bytes < -1) {
        return qap_fail(
            "image cache: expected a number of bytes from 0, or -1 for the default, got %lld", (long long) bytes);
    }
    g_limit = bytes;
    qap_clear_error();
    return 0;
}

size_t qap_image_cache_bytes() {
    const int64_t set = g_limit;
    if (set >= 0) {
        return (size_t) set;
    }
    const char * text = std::getenv("QAP_IMAGE_CACHE_MB");
    if (text == nullptr || text[0] == '\0') {
        return (size_t) DEFAULT_BYTES;
    }
    char *          end   = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    // what is no number keeps nothing: the safe reading of a typing error
    return *end == '\0' && value > 0 && value < INT64_MAX / MEGABYTE ? (size_t) (value * MEGABYTE) : 0;
}

size_t qap_cached_image::bytes() const {
    return ggml_backend_buffer_get_size(buffer.get()) + pixels.size() * sizeof(float);
}

const qap_cached_image * qap_image_cache::find(const std::vector<int32_t> & shape, const std::vector<float> & pixels) {
    for (auto image = images.begin(); image != images.end(); image++) {
        if ((*image)->shape == shape && (*image)->pixels == pixels) {
            images.splice(images.begin(), images, image);
            return images.front().get();
        }
    }
    return nullptr;
}

void qap_image_cache::put(std::unique_ptr<qap_cached_image> image, size_t limit) {
    const size_t size = image->bytes();
    images.remove_if([&](const std::unique_ptr<qap_cached_image> & other) {
        const bool same = other->shape == image->shape && other->pixels == image->pixels;
        n_bytes -= same ? other->bytes() : 0;
        return same;
    });
    while (!images.empty() && n_bytes + size > limit) {
        n_bytes -= images.back()->bytes();
        images.pop_back();
    }
    if (size <= limit) {
        n_bytes += size;
        images.push_front(std::move(image));
    }
}
