// topk.cpp: the tokens with the highest scores; among equals the lower index wins.
#include "selectors.h"

void qap_select_topk(const qap_select_input & in, int32_t * indices) {
    const float * s = in.total;
    qap_take_first(in, indices, [s](int32_t a, int32_t b) { return s[a] > s[b] || (s[a] == s[b] && a < b); });
}
