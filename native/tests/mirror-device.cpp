// mirror-device.cpp: see mirror-device.h. The interfaces are those of ggml-backend-impl.h (llama.cpp 0c1e570). A buffer
// wraps one of the CPU's and says that the host cannot see it; a backend hands its graphs to the CPU's.
#include "mirror-device.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>

static mirror_traffic counted;
static float          distortion = 0.0f;

mirror_traffic mirror_count() {
    return counted;
}

void mirror_reset() {
    counted = {};
}

void mirror_distort(float by) {
    distortion = by;
}

static ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// --- buffers ---

static ggml_backend_buffer_t inner(ggml_backend_buffer_t buffer) {
    return (ggml_backend_buffer_t) buffer->context;
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    ggml_backend_buffer_free(inner(buffer));
}

static void * buffer_base(ggml_backend_buffer_t buffer) {
    return ggml_backend_buffer_get_base(inner(buffer));
}

static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    std::memset((char *) tensor->data + offset, value, size);
}

static void buffer_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    std::memcpy((char *) tensor->data + offset, data, size);
    counted.to_device += (int64_t) size;
}

static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    std::memcpy(data, (const char *) tensor->data + offset, size);
    if (distortion != 0.0f && tensor->type == GGML_TYPE_F32) {
        for (size_t i = 0; i < size / sizeof(float); i += 3) {
            ((float *) data)[i] *= 1.0f + distortion;
        }
    }
    counted.to_host += (int64_t) size;
    counted.largest = std::max(counted.largest, (int64_t) size);
}

static bool buffer_copy(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    if (src->buffer->buft != buffer->buft) {
        return false; // from elsewhere: ggml calls buffer_set
    }
    std::memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    ggml_backend_buffer_clear(inner(buffer), value);
}

static const char * buft_name(ggml_backend_buffer_type_t) {
    return "Mirror";
}

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t memory = ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(cpu()), size);
    if (memory == nullptr) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer           = buffer_free;
    iface.get_base              = buffer_base;
    iface.memset_tensor         = buffer_memset;
    iface.set_tensor            = buffer_set;
    iface.get_tensor            = buffer_get;
    iface.cpy_tensor            = buffer_copy;
    iface.clear                 = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, memory, size);
}

static size_t buft_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(cpu()));
}

// --- backend ---

static const char * backend_name(ggml_backend_t) {
    return "Mirror0";
}

static void backend_free(ggml_backend_t backend) {
    ggml_backend_free((ggml_backend_t) backend->context);
    delete backend;
}

static ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    return ggml_backend_graph_compute((ggml_backend_t) backend->context, graph);
}

static void backend_set_n_threads(ggml_backend_t backend, int n_threads) {
    void * set = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), "ggml_backend_set_n_threads");
    if (set != nullptr) {
        ((ggml_backend_set_n_threads_t) set)((ggml_backend_t) backend->context, n_threads);
    }
}

static ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static uint8_t guid[16] = { 'q', 'a', 'p', '-', 'm', 'i', 'r', 'r', 'o', 'r' };
    ggml_backend_i iface    = {};
    iface.get_name          = backend_name;
    iface.free              = backend_free;
    iface.graph_compute     = backend_compute;
    return new ggml_backend{ &guid, iface, dev, ggml_backend_dev_init(cpu(), nullptr) };
}

// --- device and registry ---

static const char * device_name(ggml_backend_dev_t) {
    return "Mirror0";
}

static const char * device_description(ggml_backend_dev_t) {
    return "the CPU behind memory of its own";
}

static void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    ggml_backend_dev_memory(cpu(), free, total);
}

static enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = device_name(dev);
    props->description = device_description(dev);
    props->type        = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type type = {};
    type.iface.get_name                  = buft_name;
    type.iface.alloc_buffer              = buft_alloc;
    type.iface.get_alignment             = buft_alignment;
    type.device                          = dev;
    return &type;
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return ggml_backend_dev_supports_op(cpu(), op);
}

static bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == device_buft(dev);
}

static const char * reg_name(ggml_backend_reg_t) {
    return "Mirror";
}

static size_t reg_count(ggml_backend_reg_t) {
    return 1;
}

static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t) {
    static ggml_backend_device device = {};
    device.iface.get_name             = device_name;
    device.iface.get_description      = device_description;
    device.iface.get_memory           = device_memory;
    device.iface.get_type             = device_type;
    device.iface.get_props            = device_props;
    device.iface.init_backend         = device_init;
    device.iface.get_buffer_type      = device_buft;
    device.iface.supports_op          = device_supports_op;
    device.iface.supports_buft        = device_supports_buft;
    device.reg                        = reg;
    return &device;
}

static void * reg_address(ggml_backend_reg_t, const char * name) {
    return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? (void *) backend_set_n_threads : nullptr;
}

void mirror_register() {
    static ggml_backend_reg reg = {};
    if (reg.api_version == 0) {
        reg.api_version            = GGML_BACKEND_API_VERSION;
        reg.iface.get_name         = reg_name;
        reg.iface.get_device_count = reg_count;
        reg.iface.get_device       = reg_device;
        reg.iface.get_proc_address = reg_address;
        ggml_backend_register(&reg);
    }
}
