// qap-plan.h: what is to be kept of one image chunk, and what its encode found.
//
// A plan is made while the prompt is tokenized, so K is known before anything is encoded. It rides with the
// preprocessed image (clip_image_f32_batch::qap) and is shared by copies of a chunk: libmtmd encodes a copy
// and asks the original for positions afterwards.
#pragma once

#include "qap-params.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

// The rows of the tokens with these numbers, both ascending; special: rows that are no tokens.
inline std::vector<int32_t> qap_token_rows(
    int32_t n_total, const std::vector<int32_t> & special, const std::vector<int32_t> & tokens) {
    std::vector<int32_t> all((size_t) n_total + special.size()), of_tokens, found;
    std::iota(all.begin(), all.end(), 0);
    std::set_difference(all.begin(), all.end(), special.begin(), special.end(), std::back_inserter(of_tokens));
    for (const int32_t token : tokens) {
        found.push_back(of_tokens[(size_t) token]);
    }
    return found;
}

struct qap_plan {
    qap_params params         = {};
    int32_t    n_total        = 0;  // tokens that the projector gives for this chunk, those of the padding among them
    int32_t    n_keep         = 0;  // K, of those that are no padding; 0 for a tile that gets none
    int32_t    pos_type       = -1; // enum mtmd_pos_type of the chunk before it was planned, or -1: unchanged
    bool       gaps           = false; // kept rows stay at their own index, and the text resumes where it would
    bool       capture        = false; // keep everything, note the attention, compute no scores
    bool       all_signals    = false; // note every signal there is, for later prunings of the same rows
    bool       capture_hidden = false; // note the projector's input as well
    int32_t    early_after    = 0;     // layers of the encoder that see all patches
    int32_t    n_early        = 0;     // tokens whose patches the other layers see, or 0: all
    bool       given          = false; // `early` is known before the encode, from the pixels; early_after is 0
    bool       flat = false; // the pixels of this tile say nothing: no encode, and none of its tokens can be kept

    qap_weights_ptr channel_weights; // for error "model"

    // filled by the encode
    bool                 done        = false;
    float                alpha       = 0.0f;
    int32_t              semantic_id = QAP_SEMANTIC_NONE; // enum qap_semantic: the signal in the scores
    std::vector<int32_t> indices;                         // [n_keep], tokens, ascending
    std::vector<int32_t> rows;           // the encoder's rows that are kept: those of the tokens and the special ones
    int64_t              bytes_read = 0; // from the device to the host
    std::vector<float>   error, outlier, sensitivity, semantic, total; // [n_total] or empty; zeros where not scored
    std::vector<float>   attention, received;                          // [n_total] or empty; zeros if dropped early
    std::vector<float>   hidden;                                       // [n_total, n_hidden] or empty; likewise
    std::vector<int32_t> early;       // [n_early], tokens that an early drop left, ascending; empty without one
    std::vector<float>   early_total; // [n_total] or empty: what they were chosen by; zeros for padding
    std::vector<float>   early_near;  // [n_early, dropped_early()] or empty: cosines inside the encoder
    int32_t              n_hidden  = 0;
    int32_t              n_columns = 0; // tokens of a line of the picture, or 0 where it is several views

    // Rows of the encoder that are no tokens, ascending: [IMG_BREAK], the ends of LLaVA-NeXT's lines. Always kept.
    std::vector<int32_t> special;

    // Tokens that lie wholly in the padding of a letterboxed picture, ascending. Pruning drops them all.
    std::vector<int32_t> padding;

    // Where the picture lies on the grid of tokens: left, top, width, height, in tokens; zeros where that is not known.
    std::array<float, 4> content = {};

    int32_t n_rows() const { return n_total + (int32_t) special.size(); }
    int32_t n_real() const { return n_total - (int32_t) padding.size(); }
    // those that can be kept
    int32_t n_left() const { return flat ? 0 : n_early > 0 ? std::min(n_early, n_real()) : n_real(); }

    // Numbers of the tokens that are no padding, ascending.
    std::vector<int32_t> real_tokens() const {
        std::vector<int32_t> all((size_t) n_total), real;
        std::iota(all.begin(), all.end(), 0);
        std::set_difference(all.begin(), all.end(), padding.begin(), padding.end(), std::back_inserter(real));
        return real;
    }

    // Numbers of the tokens that can be kept, ascending: no padding, and nothing that was dropped early.
    std::vector<int32_t> left_tokens() const {
        return flat ? std::vector<int32_t>() : early.empty() ? real_tokens() : early;
    }

    // Numbers of the tokens that cannot be kept, ascending.
    std::vector<int32_t> left_out() const {
        const std::vector<int32_t> left = left_tokens();
        std::vector<int32_t>       all((size_t) n_total), out;
        std::iota(all.begin(), all.end(), 0);
        std::set_difference(all.begin(), all.end(), left.begin(), left.end(), std::back_inserter(out));
        return out;
    }

    // Numbers of the tokens that the encoder dropped, ascending; padding is not among them.
    std::vector<int32_t> dropped_early() const {
        const std::vector<int32_t> real = real_tokens();
        std::vector<int32_t>       dropped;
        if (!early.empty() && !given) {
            std::set_difference(real.begin(), real.end(), early.begin(), early.end(), std::back_inserter(dropped));
        }
        return dropped;
    }

    // From the pixels: of the tokens that are no padding these alone go through the encoder, ascending.
    void give(std::vector<int32_t> tokens) {
        given = !tokens.empty() && (int32_t) tokens.size() < n_real();
        if (given) {
            n_early = (int32_t) tokens.size();
            early   = std::move(tokens);
        }
    }

    // What the encode of a flat tile leaves: nothing is scored.
    void finish_flat() {
        for (std::vector<float> * scores : { &error, &outlier, &sensitivity, &semantic, &total }) {
            scores->assign((size_t) n_total, 0.0f);
        }
        alpha = params.alpha;
        done  = true;
    }

    // Values of these tokens to all tokens, zeros for the others. from: [tokens.size(), n]; to: [n_total, n]
    void spread(const std::vector<int32_t> & tokens, const float * from, float * to, int32_t n = 1) const {
        std::fill_n(to, (size_t) n_total * n, 0.0f);
        for (const int32_t token : tokens) {
            std::copy_n(from, n, to + (size_t) token * n);
            from += n;
        }
    }

    // Keep these tokens, and every special row.
    void keep(std::vector<int32_t> tokens) {
        indices                           = std::move(tokens);
        const std::vector<int32_t> chosen = qap_token_rows(n_total, special, indices);
        rows.clear();
        std::merge(chosen.begin(), chosen.end(), special.begin(), special.end(), std::back_inserter(rows));
    }

    // Keep those of `left` = left_tokens() with these places in it.
    void keep_left(const std::vector<int32_t> & left, const std::vector<int32_t> & places) {
        std::vector<int32_t> tokens;
        for (const int32_t place : places) {
            tokens.push_back(left[(size_t) place]);
        }
        keep(std::move(tokens));
    }

    void keep_all() {
        std::vector<int32_t> all((size_t) n_total);
        std::iota(all.begin(), all.end(), 0);
        keep(std::move(all));
    }
};

using qap_plan_ptr = std::shared_ptr<qap_plan>;
