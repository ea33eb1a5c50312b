// forced.h: families that were not compared with their originals and are pruned only where that is asked for.
#pragma once

#include "families/layout.h"

#include <cstdint>

// Is the order of this projector's rows known, though it was compared with nothing?
bool qap_projector_can_be_forced(int projector);

// Does it put a row before the tokens and one after them?
bool qap_projector_has_ends(int projector);

// At loading: may pictures of this model be pruned nevertheless? Noted in its parameters, with a line in the log.
void qap_force_family(int projector, clip_hparams & hparams);

// For a model of which it was noted.
qap_layout qap_forced_layout(const clip_model & model, const clip_image_f32 & image);

// -1 with an error where libmtmd gives another number of tokens, special rows not among them, than the places say.
int qap_check_forced(const clip_model & model, const clip_image_f32 & image, int32_t n_tokens);
