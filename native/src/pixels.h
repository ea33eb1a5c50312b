// pixels.h: what the pixels of a picture say before it is encoded: whether a tile shows anything, and which tokens repeat
// others. Differences are in levels of 0..255 for each of red, green and blue, whatever the encoder's normalisation is.
#pragma once

#include "qap-hooks.h"

#include <cstdint>
#include <vector>

// Do all pixels of the picture on it differ from one colour by at most `level`? Those of the padding are none of them;
// what is padding alone is flat.
bool qap_is_flat(const clip_hparams & hparams, const clip_image_f32 & image, int32_t level);
// The same for width * height pixels in lines, red, green and blue in turn; area: the part of them that is the picture.
bool qap_is_flat(
    const clip_hparams & hparams, const float * pixels, int width, int height, const qap_area & area, int32_t level);

// Those of `tokens` (ascending) whose pixels differ somewhere by more than `level` from each earlier one that is in the
// result; the pixels of a token are those of all its patches, in every frame of a batch.
std::vector<int32_t> qap_distinct_tokens(
    const clip_model & model, const clip_image_f32_batch & images, const std::vector<int32_t> & tokens, int32_t level);
