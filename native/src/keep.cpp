// keep.cpp: see keep.h. Shared by the hooks inside the encoder (hooks-clip.cpp) and the packing of tiles (pack.cpp).
#include "keep.h"

#include "qap-error.h"

#include <algorithm>

int qap_keep_best(qap_plan & plan, bool has_semantic, const std::vector<float> & cosines) {
    const qap_params & params = plan.params;
    if (!has_semantic && params.semantic != QAP_SEMANTIC_AUTO && params.semantic != QAP_SEMANTIC_NONE) {
        return qap_fail(
            "semantic: this encoder cannot give %s here; use none or auto",
            qap_name_from_id("semantic", params.semantic));
    }
    if (!has_semantic && !params.alpha_dynamic && params.alpha == 1.0f && qap_selector_needs_scores(params.select)) {
        return qap_fail("alpha: 1 leaves nothing to rank by, for this encoder has no semantic signal; use alpha < 1");
    }
    std::vector<int32_t> indices(plan.n_keep);
    if (qap_select(
            plan.total.data(), cosines.data(), plan.n_total, plan.n_keep, params.select, params.seed, indices.data()) !=
        0) {
        return -1;
    }
    plan.keep(std::move(indices));
    return 0;
}

int qap_keep_merged(
    const qap_plan & plan, const float * all, int64_t width, const std::vector<float> & cosines, float * out) {
    std::vector<float> tokens;
    tokens.reserve((size_t) (plan.n_total * width));
    const auto is_special = [&](int32_t row) {
        return std::binary_search(plan.special.begin(), plan.special.end(), row);
    };
    for (int32_t row = 0; row < plan.n_rows(); row++) {
        if (!is_special(row)) {
            tokens.insert(tokens.end(), all + row * width, all + (row + 1) * width);
        }
    }
    std::vector<float> merged((size_t) (plan.n_keep * width));
    if (qap_merge_average(
            tokens.data(), cosines.data(), plan.n_total, (int32_t) width, plan.indices.data(), plan.n_keep,
            merged.data()) != 0) {
        return -1;
    }
    const float * next = merged.data(); // of the kept token whose row comes next
    for (size_t i = 0; i < plan.rows.size(); i++) {
        const bool special = is_special(plan.rows[i]);
        std::copy_n(special ? all + plan.rows[i] * width : next, width, out + (int64_t) i * width);
        next += special ? 0 : width;
    }
    return 0;
}
