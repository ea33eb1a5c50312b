// qap-plan.h: what is to be kept of one image chunk, and what its encode found.
//
// A plan is made while the prompt is tokenized, so K is known before anything is encoded. It rides with the
// preprocessed image (clip_image_f32_batch::qap) and is shared by copies of a chunk: libmtmd encodes a copy
// and asks the original for positions afterwards.
#pragma once

#include "qap.h"

#include <memory>
#include <vector>

struct qap_plan {
    qap_params params         = {};
    int32_t    n_total        = 0;     // N: tokens that the projector gives for this chunk
    int32_t    n_keep         = 0;     // K
    bool       capture        = false; // keep everything, note the attention, compute no scores
    bool       capture_hidden = false; // note the projector's input as well

    // filled by the encode
    bool                 done       = false;
    float                alpha      = 0.0f;
    int64_t              bytes_read = 0; // from the device to the host
    std::vector<int32_t> indices;        // [n_keep], ascending
    std::vector<float>   error, outlier, sensitivity, semantic, attention, received, total; // [n_total] or empty
    std::vector<float>   hidden; // [n_total, n_hidden] or empty
    int32_t              n_hidden = 0;
};

using qap_plan_ptr = std::shared_ptr<qap_plan>;
