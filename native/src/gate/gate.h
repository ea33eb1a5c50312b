// gate.h: what runs before upstream's loaders. They answer a file that contradicts itself with GGML_ASSERT, which
// ends the process; these checks answer it with an exception of one line. Upstream facts: llama.cpp 0c1e570.
#pragma once

#include <cstdint>
#include <string>

// An mmproj file, before clip_init() (tools/mtmd/clip.cpp) reads it. Returns the width of its tokens, 0 if unknown.
// memory: refuse what this machine has no room for; flash: the encoder will use flash attention.
int64_t qap_gate_mmproj(const std::string & path, bool memory, bool flash);

// The bytes that are compared with the memory there.
double qap_gate_mmproj_bytes(const std::string & path, bool flash);

// Whether there are rules for the tensors of this projector type (clip.projector_type); others get the general checks.
bool qap_gate_has_rules(const std::string & projector);

// A language model, before llama_model_load() reads it; n_ctx: of the context that will be made, 0 for the model's
// own. Returns the width of its tokens, 0 if unknown.
int64_t qap_gate_language(const std::string & path, bool memory, int64_t n_ctx);

// Bytes of memory that are free on the host; infinite where nobody says, or with QAP_MEMORY_CHECK=0.
double qap_free_memory();
