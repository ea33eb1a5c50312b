// compare.h: numbers that say how far two results are from each other. Header only; used by the checks in this folder.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <vector>

// Normalised mean squared error of `got` against `want`: 0 for equal arrays, infinite where a length or a zero differs.
inline double nmse(const std::vector<float> & want, const std::vector<float> & got) {
    if (want.size() != got.size()) {
        return INFINITY;
    }
    double error = 0.0;
    double power = 0.0;
    for (size_t i = 0; i < want.size(); i++) {
        const double d = (double) got[i] - want[i];
        error += d * d;
        power += (double) want[i] * want[i];
    }
    if (error == 0.0) {
        return 0.0;
    }
    return power > 0.0 ? error / power : INFINITY; // NaN stays NaN: no comparison with a limit holds for it
}

inline double rms(const std::vector<float> & values) {
    double power = 0.0;
    for (const float value : values) {
        power += (double) value * value;
    }
    return values.empty() ? 0.0 : std::sqrt(power / (double) values.size());
}

inline double largest_difference(const std::vector<float> & a, const std::vector<float> & b) {
    double largest = 0.0;
    for (size_t i = 0; i < a.size() && i < b.size(); i++) {
        largest = std::max(largest, std::fabs((double) a[i] - b[i]));
    }
    return largest;
}

inline double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t n = values.size();
    return n == 0 ? 0.0 : 0.5 * (values[(n - 1) / 2] + values[n / 2]);
}

// The members of one ascending list that the other lacks, both ways.
inline std::vector<int32_t> symmetric_difference(const std::vector<int32_t> & a, const std::vector<int32_t> & b) {
    std::vector<int32_t> out;
    std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(out));
    return out;
}

// Top-k of noisy scores: whether every token on which two selections disagree lies as close to the border between kept
// and dropped as the noise allows. `want` are the scores that `kept` was chosen by.
inline bool differs_at_the_border_only(
    const std::vector<float> & want, const std::vector<int32_t> & kept, const std::vector<int32_t> & other,
    double noise) {
    double border = INFINITY; // the lowest score that was kept
    for (const int32_t i : kept) {
        border = std::min(border, (double) want[i]);
    }
    for (const int32_t i : symmetric_difference(kept, other)) {
        if (!(std::fabs(want[i] - border) <= 2.0 * noise)) {
            return false;
        }
    }
    return kept.size() == other.size();
}

// log det of L_ij = s_i cos_ij s_j over the kept tokens, what greedy DPP raises; directions already spanned add nothing.
inline double dpp_objective(
    const std::vector<float> & scores, const std::vector<float> & cosines, const std::vector<int32_t> & kept) {
    const size_t        n = scores.size();
    const size_t        k = kept.size();
    std::vector<double> rows(k * k, 0.0); // Cholesky factor, row after row
    double              sum = 0.0;
    for (size_t i = 0; i < k; i++) {
        for (size_t j = 0; j <= i; j++) {
            double value = (double) scores[kept[i]] * scores[kept[j]] * cosines[(size_t) kept[i] * n + kept[j]];
            for (size_t t = 0; t < j; t++) {
                value -= rows[i * k + t] * rows[j * k + t];
            }
            if (j == i) {
                rows[i * k + i] = std::sqrt(std::max(value, 1e-12));
                sum += 2.0 * std::log(rows[i * k + i]);
            } else {
                rows[i * k + j] = value / rows[j * k + j];
            }
        }
    }
    return sum;
}
