// qap-params.h: helpers around qap_params that other native files share. The public part is in qap.h.
#pragma once

#include "qap.h"

#include <memory>
#include <string>

struct gguf_context;

// The parameters that apply to the calling thread now; file holds those of the mmproj or is null.
// Returns false for dense.
bool qap_params_active(const qap_params * file, qap_params & out);

// Parameters from the qap.* keys, null when the file has no qap.version key.
// Throws std::runtime_error with one line for a key of the wrong type or a value out of range.
std::unique_ptr<qap_params> qap_params_from_gguf(const gguf_context * gguf, const std::string & file);
