// bindings.h: what the bind-*.cpp files share. One register function for each bound thing.
#pragma once

#include "qap.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace py = pybind11;

// float32, C order, taken as it is: another dtype or order is a TypeError, never a silent copy
using float_array = py::array_t<float, py::array::c_style>;
using index_array = py::array_t<int32_t, py::array::c_style>;

void register_params(py::module_ & m);
void register_score(py::module_ & m);
void register_prune(py::module_ & m);
void register_encoder(py::module_ & m);
void register_gguf(py::module_ & m);
void register_inspect(py::module_ & m);
void register_abort(py::module_ & m);
void register_graph(py::module_ & m);
void register_clip_text(py::module_ & m);
void register_imatrix(py::module_ & m);
void register_interrupt(py::module_ & m);
void register_sampler(py::module_ & m);
void register_chat(py::module_ & m);

// ValueError with the message of the native call that failed
inline void check(int status) {
    if (status != 0) {
        throw py::value_error(qap_last_error());
    }
}

// Weights of n_embd channels, or null for None.
inline const float * weights_data(const std::optional<float_array> & weights, py::ssize_t n_embd) {
    if (weights && (weights->ndim() != 1 || weights->shape(0) != n_embd)) {
        throw py::value_error(
            "channel_weights: expected shape (" + std::to_string(n_embd) + ",), one for each channel of a token, got " +
            std::to_string(weights->size()) + " numbers");
    }
    return weights ? weights->data() : nullptr;
}

// a new array with a copy of data[0..size)
template <typename T> py::array_t<T> copy_array(const T * data, size_t size) {
    py::array_t<T> result((py::ssize_t) size);
    std::copy_n(data, size, result.mutable_data());
    return result;
}
