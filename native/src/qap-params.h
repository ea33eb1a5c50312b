// qap-params.h: helpers around qap_params that other native files share. The public part is in qap.h.
#pragma once

#include "qap.h"

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

struct gguf_context;

// What a parameter is: its C type, its range and the words for it follow from this.
enum class qap_kind {
    count,  // int32_t from 1
    ratio,  // double in (0, 1]
    unit,   // float in [0, 1]
    level,  // int32_t in 0..255, a difference of pixels; -1: off
    choice, // int32_t, an id that has a name of the field's own kind
    seed,   // uint64_t
};

struct qap_field {
    const char * name; // as in qap.h, the GGUF keys and the environment
    qap_kind     kind;
    size_t       offset;        // of the value in qap_params
    bool         zero_is_unset; // a count that may be left open
};

// Every parameter that a word or a key can change, keep_ratio first.
const std::vector<qap_field> & qap_fields();

template <typename T> T & qap_value(const qap_field & field, qap_params & params) {
    return *reinterpret_cast<T *>(reinterpret_cast<char *>(&params) + field.offset);
}

template <typename T> const T & qap_value(const qap_field & field, const qap_params & params) {
    return *reinterpret_cast<const T *>(reinterpret_cast<const char *>(&params) + field.offset);
}

bool         qap_in_range(const qap_field & field, const qap_params & params);
const char * qap_expected(qap_kind kind); // "a number in [0, 1]"

// The parameters that apply to the calling thread now; file holds those of the mmproj or is null.
// Returns false for dense.
bool qap_params_active(const qap_params * file, qap_params & out);

// Importance of the language model's input channels, for error "model": [n_embd], in any unit. Null: none are known.
using qap_weights_ptr = std::shared_ptr<const std::vector<float>>;

// sqrt(weights / their mean) to `roots`, [n]: an error of which each channel is multiplied by these has the weighted norm,
// and equal weights give ones. -1 with an error for weights that are not finite, negative or all zero.
int qap_weight_roots(const float * weights, int32_t n, std::vector<float> & roots);

// What an mmproj file says of pruning.
struct qap_file_params : qap_params {
    qap_weights_ptr channel_weights;
};

// From the qap.* keys, null when the file has no qap.version key.
// Throws std::runtime_error with one line for a key of the wrong type or a value out of range.
std::unique_ptr<qap_file_params> qap_params_from_gguf(const gguf_context * gguf, const std::string & file);
