// divprune.cpp: greedy max-min diversity, without scores (DivPrune, arXiv 2503.02175).
//
// The distance of two tokens is 1 - cos. The first token is the one whose nearest neighbour is farthest, each next one
// that whose nearest kept token is farthest; ties go to the lower index.
#include "selectors.h"

#include <limits>

void qap_select_divprune(const qap_select_input & in, int32_t * indices) {
    const int32_t      n   = in.n_tokens;
    const float        far = std::numeric_limits<float>::max();
    std::vector<float> nearest(n, far); // distance to the nearest other token, then to the nearest kept one
    std::vector<char>  taken(n, 0);
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = 0; j < n; j++) {
            if (j != i) {
                nearest[i] = std::min(nearest[i], 1.0f - in.cosines[(size_t) i * n + j]);
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
            nearest[i] = std::min(nearest[i], 1.0f - in.cosines[(size_t) best * n + i]);
        }
    }
    std::sort(indices, indices + in.n_keep);
}
