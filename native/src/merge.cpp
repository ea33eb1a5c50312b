// merge.cpp: fold each dropped token into its most similar kept one, instead of losing it. Ours, beyond the paper.
//
// kept_j' = (kept_j + sum of the tokens folded into it) / (1 + their number): the mean of all tokens that it stands for.
// Most similar: the highest cosine; ties go to the lower index.
#include "qap-error.h"
#include "qap.h"

#include <algorithm>
#include <vector>

int qap_merge_average(
    const float * x, const float * cosines, int32_t n_tokens, int32_t n_embd, const int32_t * indices, int32_t n_keep,
    float * out) {
    if (n_tokens < 1 || n_embd < 1 || n_keep < 1 || n_keep > n_tokens) {
        return qap_fail("n_keep: expected a number in 1..%d, got %d", (int) n_tokens, (int) n_keep);
    }
    std::vector<char> kept(n_tokens, 0);
    for (int32_t j = 0; j < n_keep; j++) {
        if (indices[j] < 0 || indices[j] >= n_tokens || (j > 0 && indices[j] <= indices[j - 1])) {
            return qap_fail(
                "indices: expected ascending numbers in 0..%d, got %d", (int) n_tokens - 1, (int) indices[j]);
        }
        kept[indices[j]] = 1;
    }
    // sums in double: with many tokens in one, float would lose what makes them differ
    std::vector<double>  sums((size_t) n_keep * n_embd);
    std::vector<int32_t> count(n_keep, 0);
    for (int32_t i = 0; i < n_tokens; i++) {
        int32_t best = -1;
        for (int32_t j = 0; j < n_keep; j++) {
            const bool itself = indices[j] == i;
            const bool closer = best < 0 || cosines[(size_t) i * n_tokens + indices[j]] >
                                                cosines[(size_t) i * n_tokens + indices[best]];
            if (itself || (!kept[i] && closer)) {
                best = j;
            }
        }
        count[best]++;
        for (int32_t c = 0; c < n_embd; c++) {
            sums[(size_t) best * n_embd + c] += x[(size_t) i * n_embd + c];
        }
    }
    for (int32_t j = 0; j < n_keep; j++) {
        for (int32_t c = 0; c < n_embd; c++) {
            out[(size_t) j * n_embd + c] = (float) (sums[(size_t) j * n_embd + c] / count[j]);
        }
    }
    qap_clear_error();
    return 0;
}
