// baselines.cpp: selections that look at nothing. Every table of results shows them: on many tasks they are hard to beat.
#include "selectors.h"

// splitmix64's finaliser (Steele, Lea, Flood 2014): a fixed hash, so that a seed gives the same tokens everywhere.
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

// The n_keep smallest hashes: a larger n_keep only adds tokens.
void qap_select_random(const qap_select_input & in, int32_t * indices) {
    std::vector<uint64_t> key(in.n_tokens);
    for (int32_t i = 0; i < in.n_tokens; i++) {
        key[i] = mix(in.seed + (uint64_t) (i + 1) * UINT64_C(0x9E3779B97F4A7C15));
    }
    qap_take_first(
        in, indices, [&key](int32_t a, int32_t b) { return key[a] < key[b] || (key[a] == key[b] && a < b); });
}

// The middle of n_keep equal strides.
void qap_select_uniform(const qap_select_input & in, int32_t * indices) {
    for (int64_t j = 0; j < in.n_keep; j++) {
        indices[j] = (int32_t) ((2 * j + 1) * in.n_tokens / (2 * (int64_t) in.n_keep));
    }
}
