// unicode.cpp: see unicode.h. The tables are written by tools/build/make_unicode_tables.py; NFC as in Unicode Standard
// Annex 15, Hangul by the arithmetic of the Unicode Standard, section 3.12.
#include "clip-text/unicode.h"

#include <algorithm>
#include <iterator>
#include <unordered_map>

#include "clip-text/unicode-classes.inc"
#include "clip-text/unicode-forms.inc"

// --- UTF-8 ---

qap_codes qap_utf8_decode(const char * text, size_t n_bytes) {
    static const uint32_t SMALLEST[] = { 0, 0, 0x80, 0x800, 0x10000 }; // by length: a longer form is not allowed
    const auto *          bytes      = reinterpret_cast<const unsigned char *>(text);
    qap_codes             codes;
    codes.reserve(n_bytes);
    for (size_t i = 0; i < n_bytes;) {
        const unsigned char lead = bytes[i];
        const size_t length      = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
        uint32_t     code        = length == 1 ? lead : lead & (0x7Fu >> (length > 0 ? length : 1));
        size_t       read        = 1;
        while (read < length && i + read < n_bytes && bytes[i + read] >> 6 == 2) {
            code = code << 6 | (bytes[i + read] & 0x3Fu);
            read++;
        }
        const bool good = length > 0 && read == length && code >= SMALLEST[length] && code <= 0x10FFFF &&
                          (code < 0xD800 || code > 0xDFFF);
        codes.push_back(good ? code : 0xFFFD);
        i += good ? length : 1;
    }
    return codes;
}

void qap_utf8_append(std::string & text, uint32_t code) {
    if (code < 0x80) {
        text += (char) code;
        return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    text += (char) ((0xF00u >> (more + 1) & 0xFF) | code >> (6 * more));
    for (int shift = 6 * (more - 1); shift >= 0; shift -= 6) {
        text += (char) (0x80 | (code >> shift & 0x3F));
    }
}

// --- classes ---

// The row (of `width` numbers: first, last, ...) that holds the code point, or null.
template <size_t N> static const int32_t * find_row(const int32_t (&table)[N], size_t width, uint32_t code) {
    size_t low  = 0;
    size_t high = N / width;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if ((uint32_t) table[middle * width + 1] < code) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    const bool found = low < N / width && (uint32_t) table[low * width] <= code;
    return found ? table + low * width : nullptr;
}

bool qap_is_letter(uint32_t code) {
    return find_row(LETTERS, 2, code) != nullptr;
}

bool qap_is_number(uint32_t code) {
    return find_row(NUMBERS, 2, code) != nullptr;
}

bool qap_is_space(uint32_t code) {
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xA0 || code == 0x1680 ||
           (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F ||
           code == 0x3000;
}

qap_codes qap_lower(const qap_codes & codes) {
    qap_codes out;
    out.reserve(codes.size());
    for (const uint32_t code : codes) {
        if (code == 0x130) { // the only one that becomes two: i and a dot above
            out.insert(out.end(), { 'i', 0x307 });
            continue;
        }
        const int32_t * row     = find_row(LOWER, 4, code);
        const bool      changes = row != nullptr && (code - (uint32_t) row[0]) % (uint32_t) row[2] == 0;
        out.push_back(changes ? (uint32_t) ((int32_t) code + row[3]) : code);
    }
    return out;
}

// --- NFC ---

namespace {

const uint32_t S_BASE = 0xAC00, L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11A7;
const uint32_t L_COUNT = 19, V_COUNT = 21, T_COUNT = 28, S_COUNT = L_COUNT * V_COUNT * T_COUNT;

struct canonical_forms {
    std::unordered_map<uint32_t, std::pair<uint32_t, uint32_t>> parts; // second is 0 for a single equivalent
    std::unordered_map<uint64_t, uint32_t>                      composed;

    canonical_forms() {
        for (size_t i = 0; i < std::size(PAIRS); i += 3) {
            parts[(uint32_t) PAIRS[i]] = { PAIRS[i + 1], PAIRS[i + 2] };

            composed[(uint64_t) PAIRS[i + 1] << 32 | (uint32_t) PAIRS[i + 2]] = (uint32_t) PAIRS[i];
        }
        for (size_t i = 0; i < std::size(EXCLUDED); i += 3) {
            parts[(uint32_t) EXCLUDED[i]] = { EXCLUDED[i + 1], EXCLUDED[i + 2] };
        }
        for (size_t i = 0; i < std::size(SINGLE); i += 2) {
            parts[(uint32_t) SINGLE[i]] = { SINGLE[i + 1], 0 };
        }
    }

    void decompose(uint32_t code, qap_codes & out) const {
        if (code - S_BASE < S_COUNT) {
            const uint32_t s = code - S_BASE;
            out.push_back(L_BASE + s / (V_COUNT * T_COUNT));
            out.push_back(V_BASE + s % (V_COUNT * T_COUNT) / T_COUNT);
            if (s % T_COUNT != 0) {
                out.push_back(T_BASE + s % T_COUNT);
            }
            return;
        }
        const auto found = parts.find(code);
        if (found == parts.end()) {
            out.push_back(code);
            return;
        }
        decompose(found->second.first, out); // the table is Unicode's: at most a few levels deep
        if (found->second.second != 0) {
            decompose(found->second.second, out);
        }
    }

    uint32_t compose(uint32_t first, uint32_t second) const { // 0: they do not compose
        if (first - L_BASE < L_COUNT && second - V_BASE < V_COUNT) {
            return S_BASE + ((first - L_BASE) * V_COUNT + (second - V_BASE)) * T_COUNT;
        }
        if (first - S_BASE < S_COUNT && (first - S_BASE) % T_COUNT == 0 && second - T_BASE - 1 < T_COUNT - 1) {
            return first + (second - T_BASE);
        }
        const auto found = composed.find((uint64_t) first << 32 | second);
        return found != composed.end() ? found->second : 0;
    }
};

} // namespace

static int32_t combining_class(uint32_t code) {
    const int32_t * row = find_row(COMBINING, 3, code);
    return row != nullptr ? row[2] : 0;
}

qap_codes qap_nfc(const qap_codes & codes) {
    if (std::all_of(codes.begin(), codes.end(), [](uint32_t code) { return code < 0x300; })) {
        return codes; // nothing below composes with its neighbour
    }
    static const canonical_forms forms;
    qap_codes                    parts;
    parts.reserve(codes.size());
    for (const uint32_t code : codes) {
        forms.decompose(code, parts);
    }
    for (size_t i = 0; i < parts.size();) { // marks between two starters stand in the order of their classes
        size_t end = i;
        while (end < parts.size() && combining_class(parts[end]) != 0) {
            end++;
        }
        std::stable_sort(parts.begin() + (std::ptrdiff_t) i, parts.begin() + (std::ptrdiff_t) end, [](auto a, auto b) {
            return combining_class(a) < combining_class(b);
        });
        i = end + 1;
    }
    qap_codes out;
    size_t    starter    = SIZE_MAX;
    int32_t   last_class = 0; // of what stands between the starter and the next character, 0 for nothing
    for (const uint32_t code : parts) {
        const int32_t this_class = combining_class(code);
        // blocked by a mark of the same or a higher class in between
        const bool next_to = starter != SIZE_MAX && (starter + 1 == out.size() || last_class < this_class);
        if (const uint32_t whole = next_to ? forms.compose(out[starter], code) : 0; whole != 0) {
            out[starter] = whole;
            continue;
        }
        if (this_class == 0) {
            starter = out.size();
        }
        last_class = this_class;
        out.push_back(code);
    }
    return out;
}
