// keep.h: from the scores of a plan to the rows that are kept. Failures go to qap_last_error() and give -1.
#pragma once

#include "qap-plan.h"

#include <cstdint>
#include <vector>

// Check that the scores can be what was asked for, and select: plan.indices and plan.rows from plan.total.
// has_semantic: a relevance went into the scores; cosines: [n_total, n_total], empty where nobody needs them
int qap_keep_best(qap_plan & plan, bool has_semantic, const std::vector<float> & cosines);

// The kept rows with the dropped tokens averaged in; special rows stay as they are.
// all: [plan.n_rows(), width]; out: [plan.rows.size(), width]
int qap_keep_merged(
    const qap_plan & plan, const float * all, int64_t width, const std::vector<float> & cosines, float * out);
