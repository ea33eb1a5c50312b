// check.h: what the native tests share: a check that says where it failed, seeded random numbers, features.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define CHECK(what)                                                                 \
    do {                                                                            \
        if (!(what)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            std::exit(1);                                                           \
        }                                                                           \
    } while (0)

using generator = std::mt19937;

inline int32_t between(generator & rng, int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(rng);
}

inline std::vector<float> features(generator & rng, size_t count, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float>              values(count);
    for (float & value : values) {
        value = normal(rng);
    }
    return values;
}
