// share.cpp: K, how many tokens of an image are kept, and its share among slices where the image is cut into them.
#include "qap-error.h"
#include "qap.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// ceil(ratio n_tokens), at least 1. 0.07 * 100 is a little more than 7 in floating point; the 1e-9 keeps that at 7
static int32_t part_of(double ratio, int32_t n_tokens) {
    const double count = std::ceil(ratio * n_tokens - 1e-9);
    return count < 1.0 ? 1 : count > n_tokens ? n_tokens : (int32_t) count;
}

int32_t qap_params_count_early(const struct qap_params * params, int32_t n_tokens) {
    if (n_tokens < 1) {
        return qap_fail("expected an image of at least 1 token, got %d", (int) n_tokens);
    }
    return part_of(params->encoder_keep, n_tokens);
}

int32_t qap_params_count(const struct qap_params * params, int32_t n_tokens) {
    const int32_t left = qap_params_count_early(params, n_tokens);
    return std::min(left, params->n_keep > 0 ? params->n_keep : part_of(params->keep_ratio, n_tokens));
}

int qap_share(const int32_t * sizes, int32_t n_slices, int32_t n_keep, int32_t * share) {
    int64_t n_total  = 0;
    int32_t n_filled = 0; // slices that have tokens
    for (int32_t i = 0; i < n_slices; i++) {
        if (sizes[i] < 0) {
            return qap_fail("sizes: expected numbers from 0, got %d", (int) sizes[i]);
        }
        n_total += sizes[i];
        n_filled += sizes[i] > 0 ? 1 : 0;
    }
    if (n_filled < 1 || n_keep < 1 || n_keep > n_total) {
        return qap_fail("n_keep: expected a number in 1..%lld, got %d", (long long) n_total, (int) n_keep);
    }
    const int32_t        least = n_keep >= n_filled ? 1 : 0;
    std::vector<int32_t> order(n_slices);
    int32_t              given = 0;
    for (int32_t i = 0; i < n_slices; i++) {
        share[i] = std::max<int32_t>(std::min(least, sizes[i]), (int32_t) ((int64_t) n_keep * sizes[i] / n_total));
        order[i] = i;
        given += share[i];
    }
    const auto remainder = [&](int32_t i) { return (int64_t) n_keep * sizes[i] % n_total; };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return remainder(a) > remainder(b); });
    for (size_t i = 0; given < n_keep; i = (i + 1) % order.size()) {
        if (share[order[i]] < sizes[order[i]]) {
            share[order[i]]++;
            given++;
        }
    }
    for (; given > n_keep; given--) { // the minimum of 1 gave too much
        (*std::max_element(share, share + n_slices))--;
    }
    qap_clear_error();
    return 0;
}
