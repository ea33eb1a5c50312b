// pixels.h: what the pixels of a picture say before it is encoded: whether a tile shows anything, and which tokens repeat
// others. Differences are in levels of 0..255 for each of red, green and blue, whatever the encoder's normalisation is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct clip_hparams;
struct clip_image_f32;
struct clip_image_f32_batch;
struct clip_model;

// Do all pixels differ from one colour by at most `level`?
bool qap_is_flat(const clip_hparams & hparams, const clip_image_f32 & image, int32_t level);
// The same for n_pixels of them, red, green and blue in turn.
bool qap_is_flat(const clip_hparams & hparams, const float * pixels, size_t n_pixels, int32_t level);

// Those of `tokens` (ascending) whose pixels differ somewhere by more than `level` from each earlier one that is in the
// result; the pixels of a token are those of all its patches, in every frame of a batch.
std::vector<int32_t> qap_distinct_tokens(
    const clip_model & model, const clip_image_f32_batch & images, const std::vector<int32_t> & tokens, int32_t level);
