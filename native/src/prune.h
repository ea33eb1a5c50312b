// prune.h: what the hooks inside the encoder share with qap_prune(): there the scores come from the encoder's graph, the
// choice among the tokens and the rows that are kept are the same code. No upstream structs.
#pragma once

#include "qap-plan.h"
#include "qap.h"
#include "selectors/selectors.h"

#include <cstdint>
#include <vector>

// The bit of a signal in `available` of qap_signal().
constexpr uint32_t qap_signal_bit(int32_t semantic) {
    return UINT32_C(1) << semantic;
}

// Choose n_keep (0..n_real) of the tokens that are no padding, from scores and cosines over these alone.
// total: [n_real]; cosines: [n_real, n_real], both null where nobody needs them; dropped: what an early drop took;
// chosen: numbers among them, ascending
int qap_choose(
    const qap_params & params, const float * total, const float * cosines, int32_t n_real, int32_t n_keep,
    const qap_dropped & dropped, std::vector<int32_t> & chosen);

// Does choosing n_keep of n_real and making their rows need cosines?
bool qap_needs_cosines(const qap_params & params, int32_t n_real, int32_t n_keep);

// Error "model" needs a weight for each channel: -1 with an error where the plan has others or none.
int qap_check_weights(const qap_plan & plan, int32_t n_embd);

// The rows that are kept, from all rows in host memory; dropped tokens are merged into them if the parameters say so.
// all: [n_rows, width]; token_rows: [n_real] the row of each token that is no padding; chosen: as above;
// kept: [n_kept] rows, ascending; out: [n_kept, width]
int qap_copy_kept(
    const qap_params & params, const float * all, int32_t width, const std::vector<int32_t> & token_rows,
    const float * cosines, const std::vector<int32_t> & chosen, const std::vector<int32_t> & kept, float * out);

// Prune the rows that a plan speaks of: scores, tokens and kept rows go to the plan, the rows' content to `out`,
// [n_kept, width]. The plan has K, the special rows, the padding, and the signals that the encode noted.
// all: [plan.n_rows(), width], planes side by side; n_threads: CPU threads
int qap_prune_plan(
    qap_plan & plan, const float * all, int32_t width, int32_t n_planes, int32_t n_threads, std::vector<float> & out);
