// selectors.h: ways to choose n_keep of n_tokens on the host. One function, one file; the table is in select.cpp.
// The NumPy twins, which tests compare with index by index, are in python/qap_gguf/reference/selection.py.
#pragma once

#include "qap.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

struct qap_select_input {
    const float * total;   // [n_tokens], or null where the selector needs no scores
    const float * cosines; // [n_tokens, n_tokens], or null where it needs none
    int32_t       n_tokens;
    int32_t       n_keep;
    uint64_t      seed;
    qap_dropped   dropped;
};

// qap_select() for all of the input.
int qap_select_from(const qap_select_input & in, int32_t selector, int32_t * indices);

// Each writes n_keep different indices, sorted ascending.
void qap_select_topk(const qap_select_input & in, int32_t * indices);
void qap_select_random(const qap_select_input & in, int32_t * indices);
void qap_select_uniform(const qap_select_input & in, int32_t * indices);
void qap_select_dpp(const qap_select_input & in, int32_t * indices);
void qap_select_divprune(const qap_select_input & in, int32_t * indices);
void qap_select_coverage(const qap_select_input & in, int32_t * indices);

// Where dpp has the cosines from: the table of all, or rows that are made when they are asked for (select-rows.cpp).
struct qap_dpp_source {
    virtual ~qap_dpp_source() = default;

    // a token of zeros, whose cosine with every token is 0?
    virtual bool is_zero(int32_t i) const = 0;

    // cos(x_i, x_j) for all j, until the next call; null with an error. residual: [n_tokens], what each token would
    // add; those with the largest are likely to be asked for next
    virtual const float * row(int32_t i, const std::vector<double> & residual) = 0;
};

// Of rows that are made: how many at a time, for reading all features is what takes long; and how many tokens are brought
// to length 1 at a time.
static const int32_t QAP_ROWS_AHEAD = 8, QAP_ROWS_BLOCK = 256;

// false: a row could not be had. total: [n_tokens]
bool qap_dpp(const float * total, int32_t n_tokens, int32_t n_keep, qap_dpp_source & source, int32_t * indices);

// The n_keep first by `before`, which must be a strict order; ties are its business.
template <typename Before> void qap_take_first(const qap_select_input & in, int32_t * indices, Before before) {
    std::vector<int32_t> order(in.n_tokens);
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + (in.n_keep - 1), order.end(), before);
    std::sort(order.begin(), order.begin() + in.n_keep);
    std::copy_n(order.begin(), in.n_keep, indices);
}
