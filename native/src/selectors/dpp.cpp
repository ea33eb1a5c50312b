// dpp.cpp: greedy MAP of a determinantal point process with L_ij = S_i cos(x_i, x_j) S_j.
//
// CDPruner's selection (arXiv 2506.10967) with the fused score as relevance, as the reference of QAPruner's authors
// does it. Greedy MAP by incremental Cholesky (Chen, Zhang, Zhou 2018): O(n_tokens n_keep^2), no determinant is computed.
//
// residual_i is what token i would add: det(L of the kept ones and i) / det(L of the kept ones). A token whose
// residual is below SPANNED of its own L_ii lies in the span of the kept ones, as far as float32 cosines can tell,
// and counts as zero. When nothing is left (fewer directions than n_keep, or scores of zero), the rest is filled
// by the highest scores. Ties go to the lower index. The diagonal is taken as what it is, 1, or 0 for a token of zeros:
// the last bit of a float32 cosine must not choose among equal scores.
#include "selectors.h"

#include <cmath>

static const double SPANNED = 1e-5;

bool qap_dpp(const float * total, int32_t n, int32_t n_keep, qap_dpp_source & source, int32_t * indices) {
    std::vector<double> own(n), residual(n);
    std::vector<char>   taken(n, 0);
    std::vector<double> rows; // [kept, n]: row t of the Cholesky factor, one for each kept token
    rows.reserve((size_t) n_keep * n);
    for (int32_t i = 0; i < n; i++) {
        own[i] = residual[i] = source.is_zero(i) ? 0.0 : (double) total[i] * total[i];
    }

    int32_t kept = 0;
    for (; kept < n_keep; kept++) {
        int32_t best = -1;
        for (int32_t i = 0; i < n; i++) {
            if (!taken[i] && residual[i] > SPANNED * own[i] && (best < 0 || residual[i] > residual[best])) {
                best = i;
            }
        }
        if (best < 0) {
            break;
        }
        const float * cosines = source.row(best, residual);
        if (cosines == nullptr) {
            return false;
        }
        taken[best]        = 1;
        indices[kept]      = best;
        const double pivot = std::sqrt(residual[best]);
        double *     row   = rows.data() + rows.size();
        rows.resize(rows.size() + n); // within what was reserved: `row` and the rows before it stay where they are
        for (int32_t i = 0; i < n; i++) {
            row[i] = (double) total[best] * total[i] * cosines[i];
        }
        for (int32_t t = 0; t < kept; t++) { // row by row: memory in order, several tokens in a vector
            const double * before = rows.data() + (size_t) t * n;
            const double   shared = before[best];
            for (int32_t i = 0; i < n; i++) {
                row[i] -= shared * before[i];
            }
        }
        for (int32_t i = 0; i < n; i++) {
            row[i] /= pivot;
            residual[i] -= row[i] * row[i];
        }
    }
    for (; kept < n_keep; kept++) {
        int32_t best = 0;
        while (taken[best]) {
            best++;
        }
        for (int32_t i = best + 1; i < n; i++) {
            if (!taken[i] && total[i] > total[best]) {
                best = i;
            }
        }
        taken[best]   = 1;
        indices[kept] = best;
    }
    std::sort(indices, indices + n_keep);
    return true;
}

namespace {

// All rows are at hand.
struct dpp_table : qap_dpp_source {
    const float * cosines;
    size_t        n;

    dpp_table(const float * cosines, int32_t n) : cosines(cosines), n((size_t) n) {}

    bool is_zero(int32_t i) const override { return cosines[(size_t) i * n + (size_t) i] < 0.5f; }

    const float * row(int32_t i, const std::vector<double> & /*residual*/) override { return cosines + (size_t) i * n; }
};

} // namespace

void qap_select_dpp(const qap_select_input & in, int32_t * indices) {
    dpp_table source(in.cosines, in.n_tokens);
    qap_dpp(in.total, in.n_tokens, in.n_keep, source, indices);
}
