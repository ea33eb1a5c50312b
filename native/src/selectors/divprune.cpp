// divprune.cpp: greedy max-min diversity, without scores (DivPrune, arXiv 2503.02175).
//
// The distance of two tokens is 1 - cos. The first token is the one whose nearest neighbour is farthest, each next one
// that whose nearest kept token is farthest; ties go to the lower index. Distances up to SAME count as zero: that is
// the noise of float32 cosines, and it must not choose among equal tokens.
#include "selectors.h"

#include <limits>

static const float SAME = 1e-6f;

static float distance(const qap_select_input & in, int32_t i, int32_t j) {
    const float d = 1.0f - in.cosines[(size_t) i * in.n_tokens + j];
    return d > SAME ? d : 0.0f;
}

void qap_select_divprune(const qap_select_input & in, int32_t * indices) {
    const int32_t      n   = in.n_tokens;
    const float        far = std::numeric_limits<float>::max();
    std::vector<float> nearest(n, far); // distance to the nearest other token, then to the nearest kept one
    std::vector<char>  taken(n, 0);
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = 0; j < n; j++) {
            if (j != i) {
                nearest[i] = std::min(nearest[i], distance(in, i, j));
            }
        }
    }
    for (int32_t kept = 0; kept < in.n_keep; kept++) {
        int32_t best = 0; // the first that is not taken; there is one, for n_keep <= n
        while (taken[best]) {
            best++;
        }
        for (int32_t i = best + 1; i < n; i++) {
            if (!taken[i] && nearest[i] > nearest[best]) {
                best = i;
            }
        }
        taken[best]   = 1;
        indices[kept] = best;
        if (kept == 0) {
            std::fill(nearest.begin(), nearest.end(), far);
        }
        for (int32_t i = 0; i < n; i++) {
            nearest[i] = std::min(nearest[i], distance(in, best, i));
        }
    }
    std::sort(indices, indices + in.n_keep);
}
