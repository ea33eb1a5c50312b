// gate-tokenizer.h: the vocabulary of a language model.
#pragma once

#include "gate-file.h"

namespace qap_gate {

// Refuses a vocabulary that llama.cpp would assert on, when it loads it or later when it is used. Returns its length.
int64_t check_tokenizer(const file & f);

} // namespace qap_gate
