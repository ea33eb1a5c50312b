// fuzz-input.h: the bytes of a fuzzer as the values that a harness needs, in order; zeros when they are used up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

// Unlike assert() it is there in every build; libFuzzer takes the abort for a find.
#define MUST(what)                                                                  \
    do {                                                                            \
        if (!(what)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            std::abort();                                                           \
        }                                                                           \
    } while (0)

struct fuzz_input {
    const uint8_t * data;
    size_t          size;

    template <typename T> T take() {
        T            value = {};
        const size_t n     = std::min(sizeof(T), size);
        std::memcpy(&value, data, n);
        data += n;
        size -= n;
        return value;
    }

    int32_t between(int32_t low, int32_t high) {
        return low + (int32_t) (take<uint32_t>() % (uint32_t) (high - low + 1));
    }

    // Up to the next byte of zero, which is taken too.
    std::string word() {
        const size_t      n = (size_t) (std::find(data, data + size, (uint8_t) 0) - data);
        const std::string text((const char *) data, n);
        const size_t      used = std::min(n + 1, size);
        data += used;
        size -= used;
        return text;
    }
};
