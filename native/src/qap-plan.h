// qap-plan.h: what is to be kept of one image chunk, and what its encode found.
//
// A plan is made while the prompt is tokenized, so K is known before anything is encoded. It rides with the
// preprocessed image (clip_image_f32_batch::qap) and is shared by copies of a chunk: libmtmd encodes a copy
// and asks the original for positions afterwards.
#pragma once

#include "qap.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

struct qap_plan {
    qap_params params         = {};
    int32_t    n_total        = 0;     // N: tokens that the projector gives for this chunk
    int32_t    n_keep         = 0;     // K
    int32_t    pos_type       = -1;    // enum mtmd_pos_type of the chunk before it was planned, or -1: unchanged
    bool       capture        = false; // keep everything, note the attention, compute no scores
    bool       capture_hidden = false; // note the projector's input as well
    int32_t    early_after    = 0;     // layers of the tower that see all patches
    int32_t    n_early        = 0;     // tokens whose patches the other layers see, or 0: all

    // filled by the encode
    bool                 done  = false;
    float                alpha = 0.0f;
    std::vector<int32_t> indices;        // [n_keep], tokens, ascending
    std::vector<int32_t> rows;           // the encoder's rows that are kept: those of the tokens and the special ones
    int64_t              bytes_read = 0; // from the device to the host
    std::vector<float>   error, outlier, sensitivity, semantic, attention, received, total; // [n_scored()]
    std::vector<float>   hidden;                                                            // [n_scored(), n_hidden]
    std::vector<int32_t> early;       // [n_early], tokens, ascending; empty where all went on
    std::vector<float>   early_total; // [n_total] or empty: what they were chosen by
    int32_t              n_hidden  = 0;
    int32_t              n_columns = 0; // tokens of a line of the picture, or 0 where it is several views

    // Rows of the encoder that are no tokens, ascending: [IMG_BREAK], the ends of LLaVA-NeXT's lines. Always kept.
    std::vector<int32_t> special;

    // Tokens that scores are about, where there are any: those that left the tower.
    int32_t n_scored() const { return early.empty() ? n_total : (int32_t) early.size(); }

    int32_t n_rows() const { return n_total + (int32_t) special.size(); }

    // Keep these tokens, and every special row.
    void keep(std::vector<int32_t> tokens) {
        indices = std::move(tokens);
        rows.clear();
        size_t next = 0; // how many special rows stand in front of the token
        for (const int32_t token : indices) {
            for (; next < special.size() && special[next] <= token + (int32_t) next; next++) {
                rows.push_back(special[next]);
            }
            rows.push_back(token + (int32_t) next);
        }
        rows.insert(rows.end(), special.begin() + (std::ptrdiff_t) next, special.end());
    }

    void keep_all() {
        std::vector<int32_t> all((size_t) n_total);
        std::iota(all.begin(), all.end(), 0);
        keep(std::move(all));
    }
};

using qap_plan_ptr = std::shared_ptr<qap_plan>;
