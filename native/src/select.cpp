// select.cpp: choose exactly n_keep of n_tokens on the host. One function for each selector, one table.
// The NumPy twin, which tests compare with index by index, is python/qap_gguf/reference.py.
#include "qap-error.h"
#include "qap.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace {

struct select_input {
    const float * total; // [n_tokens] or null
    int32_t       n_tokens;
    int32_t       n_keep;
    uint64_t      seed;
};

// The n_keep best by `better`; a strict order on (value, index), so ties go to the lower index.
template <typename Better> void take_best(const select_input & in, int32_t * indices, Better better) {
    std::vector<int32_t> order(in.n_tokens);
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + (in.n_keep - 1), order.end(), better);
    std::sort(order.begin(), order.begin() + in.n_keep);
    std::copy_n(order.begin(), in.n_keep, indices);
}

void select_topk(const select_input & in, int32_t * indices) {
    const float * s = in.total;
    take_best(in, indices, [s](int32_t a, int32_t b) { return s[a] > s[b] || (s[a] == s[b] && a < b); });
}

// splitmix64's finaliser: a fixed, portable hash, so that a seed gives the same tokens everywhere.
uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

void select_random(const select_input & in, int32_t * indices) {
    std::vector<uint64_t> key(in.n_tokens);
    for (int32_t i = 0; i < in.n_tokens; i++) {
        key[i] = mix(in.seed + (uint64_t) (i + 1) * UINT64_C(0x9E3779B97F4A7C15));
    }
    take_best(in, indices, [&key](int32_t a, int32_t b) { return key[a] < key[b] || (key[a] == key[b] && a < b); });
}

// The middle of n_keep equal strides.
void select_uniform(const select_input & in, int32_t * indices) {
    for (int64_t j = 0; j < in.n_keep; j++) {
        indices[j] = (int32_t) ((2 * j + 1) * in.n_tokens / (2 * (int64_t) in.n_keep));
    }
}

struct selector_row {
    int32_t id;
    bool    needs_scores;
    void (*select)(const select_input & in, int32_t * indices);
};

const selector_row SELECTORS[] = {
    { QAP_SELECT_TOPK,    true,  select_topk    },
    { QAP_SELECT_RANDOM,  false, select_random  },
    { QAP_SELECT_UNIFORM, false, select_uniform },
};

} // namespace

int qap_select(
    const float * total, int32_t n_tokens, int32_t n_keep, int32_t selector, uint64_t seed, int32_t * indices) {
    if (n_tokens < 1 || n_keep < 1 || n_keep > n_tokens) {
        return qap_fail("n_keep: expected a number in 1..%d, got %d", (int) n_tokens, (int) n_keep);
    }
    for (const selector_row & row : SELECTORS) {
        if (row.id != selector) {
            continue;
        }
        if (row.needs_scores) {
            if (total == nullptr) {
                return qap_fail("expected scores, got NULL");
            }
            for (int32_t i = 0; i < n_tokens; i++) {
                if (!std::isfinite(total[i])) {
                    return qap_fail("expected finite scores, got %g at token %d", (double) total[i], (int) i);
                }
            }
        }
        row.select({ total, n_tokens, n_keep, seed }, indices);
        qap_clear_error();
        return 0;
    }
    return qap_fail("select: unknown id %d", (int) selector);
}
