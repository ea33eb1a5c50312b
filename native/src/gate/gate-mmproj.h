// gate-mmproj.h: shared by the two files that check an mmproj.
#pragma once

#include "gate-file.h"

namespace qap_gate {

// hyperparameters of a vision tower, checked one by one
struct tower {
    std::string projector;
    int64_t     n_embd     = 0;
    int64_t     n_ff       = 0; // the widest of the file's blocks
    int64_t     n_head     = 0;
    int64_t     n_head_kv  = 0;
    int64_t     d_head     = 0;
    int64_t     n_layer    = 0;
    int64_t     image_size = 0; // 0: any
    int64_t     patch_size = 0;

    int64_t n_side() const { return image_size / patch_size; }

    int64_t n_patches() const { return n_side() * n_side(); }
};

// Tensors of tower and projector, for the kinds that this project knows; returns the width of a token, 0 for others.
int64_t check_projector(const file & f, tower & t);

// Bytes that the encoder takes, with one picture of the file's size, pruned as by default (gate-room.cpp). width: of a
// token, 0 if unknown
double needed_bytes(const file & f, const tower & t, int64_t width);

} // namespace qap_gate
