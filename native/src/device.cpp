// device.cpp: see device.h.
#include "device.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "graph-ops.h"
#include "qap-error.h"
#include "qap-hooks.h"
#include "qap.h"

#include <atomic>
#include <cmath>
#include <string>

static ggml_backend_t init_backend(const char * device) {
    if (device == nullptr) {
        return ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    }
    ggml_backend_dev_t dev = ggml_backend_dev_by_name(device);
    return dev != nullptr ? ggml_backend_dev_init(dev, nullptr) : nullptr;
}

static std::string device_names() {
    std::string names;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        names += (i > 0 ? ", " : "") + std::string(ggml_backend_dev_name(ggml_backend_dev_get(i)));
    }
    return names;
}

static std::atomic<ggml_backend_dev_t> encoder_device{ nullptr };

int qap_device_set(const char * device) {
    ggml_backend_dev_t dev = device != nullptr ? ggml_backend_dev_by_name(device) : nullptr;
    if (device != nullptr && dev == nullptr) {
        return qap_fail("device: expected one of %s, got '%s'", device_names().c_str(), device);
    }
    encoder_device = dev;
    qap_clear_error();
    return 0;
}

void qap_hook_device(bool & use_gpu, ggml_backend_dev_t & device) {
    ggml_backend_dev_t dev = encoder_device;
    if (dev == nullptr || device != nullptr || !use_gpu || qap_disabled()) {
        return;
    }
    use_gpu = ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU;
    device  = use_gpu ? dev : nullptr;
}

static void set_n_threads(ggml_backend_t backend, int32_t n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set != nullptr && n_threads > 0) {
        set(backend, n_threads);
    }
}

ggml_backend_ptr qap_open_device(const char * device, int32_t n_threads) {
    ggml_backend_ptr backend(init_backend(device));
    if (!backend) {
        qap_fail("device: expected one of %s, got '%s'", device_names().c_str(), device != nullptr ? device : "CPU");
        return nullptr;
    }
    set_n_threads(backend.get(), n_threads);
    return backend;
}

static thread_local int64_t n_read = 0;

void qap_read_bytes(const ggml_tensor * tensor, void * out, size_t offset, size_t size) {
    ggml_backend_tensor_get(tensor, out, offset, size);
    n_read += (int64_t) size;
}

int64_t qap_bytes_read() {
    return n_read;
}

void qap_read_floats(const ggml_tensor * tensor, float * out) {
    if (tensor != nullptr && out != nullptr) {
        qap_read_bytes(tensor, out, 0, ggml_nbytes(tensor));
    }
}

int64_t qap_find_unusable(const float * values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (!(std::fabs(values[i]) <= QAP_MAX_MAGNITUDE)) { // false for NaN as well
            return i;
        }
    }
    return -1;
}

int qap_check_features(const float * x, int32_t n_tokens, int32_t n_embd) {
    if (x == nullptr || n_tokens < 1 || n_embd < 1) {
        return qap_fail(
            "x: expected (n_tok, n_embd) with at least one of each, got (%d, %d)", (int) n_tokens, (int) n_embd);
    }
    const int64_t at = qap_find_unusable(x, (int64_t) n_tokens * n_embd);
    if (at >= 0) {
        return qap_fail(
            "x: expected finite features of at most %g, got %g at token %d, channel %d", (double) QAP_MAX_MAGNITUDE,
            (double) x[at], (int) (at / n_embd), (int) (at % n_embd));
    }
    return 0;
}

int device_graph::open(ggml_backend_t on, size_t max_nodes) {
    backend           = on;
    const size_t meta = ggml_tensor_overhead() * max_nodes + ggml_graph_overhead_custom(max_nodes, false);
    ctx.reset(ggml_init({ meta, nullptr, /* no_alloc */ true }));
    if (!ctx) {
        return qap_fail("expected more memory for a graph");
    }
    gf = ggml_new_graph_custom(ctx.get(), max_nodes, false);
    return 0;
}

int device_graph::open_device(const char * device, int32_t n_threads, size_t max_nodes) {
    own = qap_open_device(device, n_threads);
    return own ? open(own.get(), max_nodes) : -1;
}

ggml_tensor * device_graph::input(ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * tensor = ggml_new_tensor_2d(ctx.get(), type, ne0, ne1);
    ggml_set_input(tensor);
    return tensor;
}

int device_graph::allocate() {
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            return qap_fail(
                "device: %s cannot run %s; use the CPU", ggml_backend_name(backend),
                ggml_op_desc(ggml_graph_node(gf, i)));
        }
    }
    alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    if (!alloc || !ggml_gallocr_alloc_graph(alloc.get(), gf)) {
        return qap_fail("expected more memory on %s for this many tokens", ggml_backend_name(backend));
    }
    return 0;
}

int device_graph::run() {
    qap_show_graph(gf);
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        return qap_fail("the graph could not be computed on %s", ggml_backend_name(backend));
    }
    return 0;
}
