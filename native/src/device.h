// device.h: a backend by its device's name, and small graphs that run on it. Failures go to qap_last_error().
#pragma once

#include "ggml-cpp.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>

// The named ggml device, or the CPU for null; null with an error for an unknown name. n_threads matters to the CPU.
ggml_backend_ptr qap_open_device(const char * device, int32_t n_threads);

// Every copy from a device to the host goes through here and is counted; qap_bytes_read() is this thread's sum.
void    qap_read_bytes(const ggml_tensor * tensor, void * out, size_t offset, size_t size);
int64_t qap_bytes_read();

// Copy all values of a float tensor to the host; nothing happens for null.
void qap_read_floats(const ggml_tensor * tensor, float * out);

// The first value that is not finite or above QAP_MAX_MAGNITUDE, or -1.
int64_t qap_find_unusable(const float * values, int64_t count);

// Are these usable features? x: [n_tokens, n_embd]; 0, or -1 with an error
int qap_check_features(const float * x, int32_t n_tokens, int32_t n_embd);

// Did qap_avoid_amx() come too late? Then AMX is offered, and nothing of ours may use it.
bool qap_amx_is_broken();

// A small graph on one device: inputs are made, nodes are built on them and expanded into gf, allocate() finds room,
// inputs are set, run() computes.
struct device_graph {
    ggml_backend_ptr own; // only of open_device()
    ggml_backend_t   backend = nullptr;
    ggml_context_ptr ctx;
    ggml_gallocr_ptr alloc;
    ggml_cgraph *    gf = nullptr;

    // on a backend that the caller keeps, or on a device of its own
    int open(ggml_backend_t on, size_t max_nodes);
    int open_device(const char * device, int32_t n_threads, size_t max_nodes);

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1);
    int           allocate();
    int           run();
};
