// select.cpp: choose exactly n_keep of n_tokens on the host: checks, and the table of selectors/.
#include "qap-error.h"
#include "qap.h"
#include "selectors/selectors.h"

#include <algorithm>
#include <cmath>

struct selector_row {
    int32_t id;
    bool    needs_scores;
    bool    needs_cosines;
    void (*select)(const qap_select_input & in, int32_t * indices);
};

static const selector_row SELECTORS[] = {
    { QAP_SELECT_TOPK,     true,  false, qap_select_topk     },
    { QAP_SELECT_DPP,      true,  true,  qap_select_dpp      },
    { QAP_SELECT_DIVPRUNE, false, true,  qap_select_divprune },
    { QAP_SELECT_COVERAGE, true,  true,  qap_select_coverage },
    { QAP_SELECT_RANDOM,   false, false, qap_select_random   },
    { QAP_SELECT_UNIFORM,  false, false, qap_select_uniform  },
};

static const selector_row * find_selector(int32_t id) {
    for (const selector_row & row : SELECTORS) {
        if (row.id == id) {
            return &row;
        }
    }
    return nullptr;
}

bool qap_selector_needs_scores(int32_t selector) {
    const selector_row * row = find_selector(selector);
    return row != nullptr && row->needs_scores;
}

bool qap_selector_needs_cosines(int32_t selector) {
    const selector_row * row = find_selector(selector);
    return row != nullptr && row->needs_cosines;
}

// Above, the cosines in ggml's buffer and in ours would take over 128 MiB.
static const int32_t ROWS_ABOVE = 4096;

bool qap_selects_by_rows(int32_t selector, int32_t n_tokens) {
    return selector == QAP_SELECT_DPP && n_tokens > ROWS_ABOVE;
}

double qap_choice_bytes(const struct qap_params * params, int32_t n_tokens, int32_t n_embd, int32_t n_keep) {
    const double n = n_tokens, x = n * n_embd, merged = (double) n_keep * n_embd;
    const double factor = 8.0 * n * std::min(n_keep, n_embd); // of dpp: more than n_embd directions there are not
    const bool   merges = params->merge != QAP_MERGE_NONE;
    if (!merges && qap_selects_by_rows(params->select, n_tokens)) {
        return 4.0 * x + 8.0 * QAP_ROWS_AHEAD * n + 14.0 * QAP_ROWS_BLOCK * n_embd + factor;
    }
    if (!merges && !qap_selector_needs_cosines(params->select)) {
        return 0.0;
    }
    // features and cosines in ggml's buffer; then what the selector and the merge keep; our copy of the cosines always
    const double graph  = 4.0 * std::max(2.5 * x, x + n * n);
    const double chosen = params->select == QAP_SELECT_DPP ? factor : 0.0;
    const double merge  = merges ? 4.0 * x + 12.0 * merged : 0.0;
    return 4.0 * n * n + std::max({ graph, chosen, merge });
}

// The first value that is not finite, or -1.
static int64_t find_non_finite(const float * values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (!std::isfinite(values[i])) {
            return i;
        }
    }
    return -1;
}

int qap_select_from(const qap_select_input & in, int32_t selector, int32_t * indices) {
    if (in.n_tokens < 1 || in.n_keep < 1 || in.n_keep > in.n_tokens) {
        return qap_fail("n_keep: expected a number in 1..%d, got %d", (int) in.n_tokens, (int) in.n_keep);
    }
    const selector_row * row = find_selector(selector);
    if (row == nullptr) {
        return qap_fail("select: unknown id %d", (int) selector);
    }
    if ((row->needs_scores && in.total == nullptr) || (row->needs_cosines && in.cosines == nullptr)) {
        return qap_fail(
            "select: %s needs %s", qap_name_from_id("select", selector), in.total == nullptr ? "scores" : "features");
    }
    if (row->needs_scores) {
        const int64_t at = find_non_finite(in.total, in.n_tokens);
        if (at >= 0) {
            return qap_fail("expected finite scores, got %g at token %d", (double) in.total[at], (int) at);
        }
    }
    const int64_t n = in.n_tokens, n_dropped = in.dropped.count;
    if (row->needs_cosines &&
        (find_non_finite(in.cosines, n * n) >= 0 || find_non_finite(in.dropped.near, n * n_dropped) >= 0)) {
        return qap_fail("expected finite cosines; check the features");
    }
    if (find_non_finite(in.dropped.total, n_dropped) >= 0) {
        return qap_fail("expected finite scores of the tokens that were dropped early; check the mmproj file");
    }
    row->select(in, indices);
    qap_clear_error();
    return 0;
}

int qap_select(
    const float * total, const float * cosines, int32_t n_tokens, int32_t n_keep, int32_t selector, uint64_t seed,
    int32_t * indices) {
    return qap_select_from({ total, cosines, n_tokens, n_keep, seed, {} }, selector, indices);
}
