// coverage.cpp: greedy facility location: the kept tokens that best stand for all of them.
//
// maximise sum_i w_i max_{j kept} max(0, cos(x_i, x_j)), w_i the rank of token i's score, 1 for the lowest; equal scores
// share the mean of their ranks. Greedy (Nemhauser, Wolsey, Fisher 1978), within 1 - 1/e of the best for this function;
// lazy (Minoux 1978): what a token adds only shrinks while others are kept, so an old gain is a bound, and only tokens
// whose bound reaches the best gain are computed again.
//
// After an early drop the tokens that it took have to be stood for as well: they rank below the others, by the scores that
// they were dropped by, and in place of their cosines stand those inside the encoder. These say less, so the rank counts
// only as much as the part of the tokens that is left: where few are, the others would outweigh them.
//
// Gains are sums of float32 cosines. Two that differ by less than SAME of all weights count as equal, and the lower
// index wins; when no token adds more than that, the rest is filled by the highest scores.
#include "selectors.h"

#include <utility>

static const double SAME  = 1e-6;
static const size_t LANES = 8;

// The mean of the places that each score has in ascending order, counted from 1.
static std::vector<double> rank(const float * score, int32_t n) {
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [score](int32_t a, int32_t b) { return score[a] < score[b]; });
    std::vector<double> places(n);
    for (int32_t first = 0, last; first < n; first = last) {
        for (last = first + 1; last < n && score[order[last]] == score[order[first]];) {
            last++;
        }
        for (int32_t i = first; i < last; i++) {
            places[order[i]] = 0.5 * (first + 1 + last);
        }
    }
    return places;
}

namespace {

// Tokens that are to be stood for.
struct group {
    std::vector<double> weight;
    std::vector<float>  covered; // the highest cosine to a kept token, at least 0

    explicit group(std::vector<double> weights) : weight(std::move(weights)), covered(weight.size(), 0.0f) {}

    // what a token with these cosines would add
    double gain(const float * row) const {
        const size_t n           = weight.size();
        double       sums[LANES] = {};
        size_t       i           = 0;
        for (; i + LANES <= n; i += LANES) { // several sums: the compiler may then use vectors
            for (size_t lane = 0; lane < LANES; lane++) {
                sums[lane] += weight[i + lane] * std::max(row[i + lane] - covered[i + lane], 0.0f);
            }
        }
        for (; i < n; i++) {
            sums[0] += weight[i] * std::max(row[i] - covered[i], 0.0f);
        }
        return std::accumulate(sums, sums + LANES, 0.0);
    }

    void keep(const float * row) {
        for (size_t i = 0; i < covered.size(); i++) {
            covered[i] = std::max(covered[i], row[i]);
        }
    }
};

struct coverage_state {
    const qap_select_input & in;
    group                    left, dropped;
    std::vector<double>      bound; // [n]: what the token would have added when that was last computed; -1: kept

    const float * cosines(int32_t j) const { return in.cosines + (size_t) j * in.n_tokens; }
    const float * near(int32_t j) const { return in.dropped.near + (size_t) j * in.dropped.count; }

    double gain(int32_t j) const { return left.gain(cosines(j)) + dropped.gain(near(j)); }

    // The lowest index whose gain is the largest but for `margin`, or -1 when none is above `margin`.
    int32_t find(double margin) {
        const auto top  = std::max_element(bound.begin(), bound.end());
        double     best = *top = gain((int32_t) (top - bound.begin()));
        for (int32_t j = 0; j < in.n_tokens; j++) {
            if (bound[j] >= 0.0 && bound[j] >= best - margin) { // else its gain cannot be that large either
                bound[j] = gain(j);
                best     = std::max(best, bound[j]);
            }
        }
        if (best <= margin) {
            return -1;
        }
        // bounds that were not computed again are below: `best` only rose since
        const auto first =
            std::find_if(bound.begin(), bound.end(), [best, margin](double value) { return value >= best - margin; });
        return (int32_t) (first - bound.begin());
    }

    void keep(int32_t j) {
        left.keep(cosines(j));
        dropped.keep(near(j));
        bound[j] = -1.0;
    }
};

} // namespace

void qap_select_coverage(const qap_select_input & in, int32_t * indices) {
    const int32_t       n    = in.n_tokens;
    std::vector<double> left = rank(in.total, n), dropped = rank(in.dropped.total, in.dropped.count);
    for (double & weight : left) {
        weight += in.dropped.count;
    }
    const double part = (double) n / (n + in.dropped.count);
    for (double & weight : dropped) {
        weight *= part;
    }
    // the sum of all weights, and so a bound of any gain
    const double all = std::accumulate(dropped.begin(), dropped.end(), std::accumulate(left.begin(), left.end(), 0.0));
    coverage_state state = { in, group(std::move(left)), group(std::move(dropped)), std::vector<double>(n, all) };

    int32_t kept = 0;
    for (int32_t best; kept < in.n_keep && (best = state.find(SAME * all)) >= 0; kept++) {
        state.keep(best);
        indices[kept] = best;
    }
    std::vector<int32_t> rest;
    for (int32_t i = 0; i < n; i++) {
        if (state.bound[i] >= 0.0) {
            rest.push_back(i);
        }
    }
    const float * s = in.total;
    std::stable_sort(rest.begin(), rest.end(), [s](int32_t a, int32_t b) { return s[a] > s[b]; });
    std::copy_n(rest.begin(), in.n_keep - kept, indices + kept);
    std::sort(indices, indices + in.n_keep);
}
