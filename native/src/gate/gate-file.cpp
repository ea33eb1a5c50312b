// gate-file.cpp: see gate-file.h. ggml's reader (ggml/src/gguf.cpp) refuses bad magic, versions, counts, lengths,
// alignments and offsets with a null pointer; it looks neither at the length of the file nor at what tensors are for.
#include "gate-file.h"

#include "ggml.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>

namespace qap_gate {

// far above any model; upstream's loaders go through all keys for each key, and through all tensors for each tensor
const int64_t MAX_KEYS    = 10000;
const int64_t MAX_TENSORS = 32768;
const int64_t ALIGNMENT   = 32; // TENSOR_ALIGNMENT of ggml

static std::string dims(const int64_t * ne, int n) {
    std::string text;
    for (int i = 0; i < n; i++) {
        text += (i > 0 ? " x " : "") + std::to_string(ne[i]);
    }
    return text;
}

std::string describe(const ggml_tensor * t) {
    return dims(t->ne, ggml_n_dims(t)) + " " + ggml_type_name(t->type);
}

file::file(const std::string & path) {
    ggml_context *         context = nullptr;
    const gguf_init_params params  = { /* no_alloc */ true, &context };
    gguf.reset(gguf_init_from_file(path.c_str(), params));
    meta.reset(context);
    if (gguf && gguf_get_n_tensors(gguf.get()) == 0) {
        refuse("expected tensors, found none");
    }
    if (!gguf || !meta) {
        refuse("expected a whole GGUF file, got a damaged one or one cut short");
    }
    if (gguf_get_n_kv(gguf.get()) > MAX_KEYS || gguf_get_n_tensors(gguf.get()) > MAX_TENSORS) {
        refuse(
            "expected at most " + std::to_string(MAX_KEYS) + " keys and " + std::to_string(MAX_TENSORS) +
            " tensors, got " + std::to_string(gguf_get_n_kv(gguf.get())) + " and " +
            std::to_string(gguf_get_n_tensors(gguf.get())));
    }
    for (int64_t i = 0; i < gguf_get_n_kv(gguf.get()); i++) {
        keys.emplace(gguf_get_key(gguf.get(), i), i);
    }
    for (const ggml_tensor * t = first(); t != nullptr; t = next(t)) {
        tensors.emplace(t->name, t);
    }
    check_tensors(path);
    for (const ggml_tensor * t = first(); t != nullptr; t = next(t)) {
        n_bytes += ggml_nbytes(t);
    }
}

void file::refuse(const std::string & expected_and_got, const char * cure) const {
    std::string line; // names in a damaged file hold any byte
    for (const char c : expected_and_got) {
        line += c >= ' ' && c <= '~' ? c : '?';
    }
    throw std::runtime_error(line + "; " + cure);
}

void file::check_tensors(const std::string & path) const {
    const int64_t   n = gguf_get_n_tensors(gguf.get());
    std::error_code error;
    const uint64_t  size = std::filesystem::file_size(path, error);
    if (error) {
        refuse("cannot tell its size (" + error.message() + ")");
    }
    const uint64_t base = gguf_get_data_offset(gguf.get());
    for (int64_t i = 0; i < n; i++) {
        const uint64_t begin = base + gguf_get_tensor_offset(gguf.get(), i);
        const uint64_t bytes = gguf_get_tensor_size(gguf.get(), i);
        if (begin < base || begin > size || bytes > size - begin) {
            refuse("expected " + std::to_string(begin + bytes) + " bytes, got " + std::to_string(size) + ", cut short");
        }
    }
    for (const ggml_tensor * t = first(); t != nullptr; t = next(t)) {
        for (int i = 0; i < GGML_MAX_DIMS; i++) {
            if (t->ne[i] < 1 || t->ne[i] > INT32_MAX) {
                refuse("expected dimensions in 1..2147483647, got " + describe(t) + " for " + t->name);
            }
        }
    }
}

void file::check_mapped() const {
    const int64_t alignment = (int64_t) gguf_get_alignment(gguf.get());
    if (alignment % ALIGNMENT != 0) {
        refuse(
            "expected a general.alignment of " + std::to_string(ALIGNMENT) + " or a larger power of two, got " +
                std::to_string(alignment),
            "convert the model again");
    }
}

// --- keys ---

int64_t file::find_key(const std::string & key) const {
    const auto found = keys.find(key);
    return found == keys.end() ? -1 : found->second;
}

bool file::has(const std::string & key) const {
    return find_key(key) >= 0;
}

bool file::has_type(const std::string & key, gguf_type type) const {
    const int64_t id = find_key(key);
    if (id < 0) {
        return false;
    }
    const gguf_type found = gguf_get_kv_type(gguf.get(), id);
    if (found != type) {
        refuse("expected the key " + key + " of type " + gguf_type_name(type) + ", got " + gguf_type_name(found));
    }
    return true;
}

bool file::has_array(const std::string & key, gguf_type element) const {
    if (!has_type(key, GGUF_TYPE_ARRAY)) {
        return false;
    }
    const gguf_type found = gguf_get_arr_type(gguf.get(), find_key(key));
    if (found != element) {
        refuse(
            "expected the key " + key + " to list numbers or texts of type " + gguf_type_name(element) + ", got " +
            gguf_type_name(found));
    }
    return true;
}

int64_t file::whole(const std::string & key, int64_t low, int64_t high, int64_t fallback) const {
    if (!has_type(key, GGUF_TYPE_UINT32)) {
        if (fallback < 0) {
            refuse("expected the key " + key + ", found none");
        }
        return fallback;
    }
    const int64_t value = gguf_get_val_u32(gguf.get(), find_key(key));
    if (value < low || value > high) {
        refuse(
            "expected " + key + " in " + std::to_string(low) + ".." + std::to_string(high) + ", got " +
            std::to_string(value));
    }
    return value;
}

void file::real(const std::string & key, double low, double high, bool required) const {
    if (!has_type(key, GGUF_TYPE_FLOAT32)) {
        if (required) {
            refuse("expected the key " + key + ", found none");
        }
        return;
    }
    const float value = gguf_get_val_f32(gguf.get(), find_key(key));
    if (!(value >= low && value <= high)) {
        char line[128];
        std::snprintf(line, sizeof(line), " in %g..%g, got %.9g", low, high, (double) value);
        refuse("expected " + key + line);
    }
}

bool file::flag(const std::string & key, bool fallback) const {
    return has_type(key, GGUF_TYPE_BOOL) ? gguf_get_val_bool(gguf.get(), find_key(key)) : fallback;
}

std::string file::text(const std::string & key) const {
    return has_type(key, GGUF_TYPE_STRING) ? gguf_get_val_str(gguf.get(), find_key(key)) : "";
}

bool file::is_array(const std::string & key) const {
    return gguf_get_kv_type(gguf.get(), find_key(key)) == GGUF_TYPE_ARRAY;
}

int64_t file::number16(const std::string & key) const {
    return gguf_get_val_u16(gguf.get(), find_key(key));
}

int64_t file::largest(const std::string & key, int64_t low, int64_t high) const {
    const gguf_type type = gguf_get_arr_type(gguf.get(), find_key(key));
    if (type != GGUF_TYPE_UINT32 && type != GGUF_TYPE_INT32) {
        refuse("expected whole numbers as " + key + ", got " + gguf_type_name(type));
    }
    int64_t most = low;
    for (size_t i = 0; i < length(key); i++) {
        const int64_t value = type == GGUF_TYPE_UINT32 ? (int64_t) static_cast<const uint32_t *>(data(key))[i]
                                                       : (int64_t) static_cast<const int32_t *>(data(key))[i];
        if (value < low || value > high) {
            refuse(
                "expected " + key + " in " + std::to_string(low) + ".." + std::to_string(high) + ", got " +
                std::to_string(value));
        }
        most = std::max(most, value);
    }
    return most;
}

size_t file::length(const std::string & key) const {
    return gguf_get_arr_n(gguf.get(), find_key(key));
}

const void * file::data(const std::string & key) const {
    return gguf_get_arr_data(gguf.get(), find_key(key));
}

std::string file::item(const std::string & key, size_t i) const {
    return gguf_get_arr_str(gguf.get(), find_key(key), i);
}

// --- tensors ---

const ggml_tensor * file::find(const std::string & name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : found->second;
}

// Products take these on the left (vec_dot in ggml-cpu) and lookups of rows read them (to_float in ggml).
static bool is_weight_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16: return true;
        case GGML_TYPE_Q8_1: // what activations become: no product has it on the left
        case GGML_TYPE_Q8_K: return false;
        default: return ggml_is_quantized(type);
    }
}

void file::check_type(const ggml_tensor * t, use as) const {
    const bool is_f32 = t->type == GGML_TYPE_F32;
    const bool fits   = as == use::vector   ? is_f32
                        : as == use::filter ? is_f32 || t->type == GGML_TYPE_F16
                                            : is_weight_type(t->type);
    if (!fits) {
        const char * types = as == use::vector   ? "f32"
                             : as == use::filter ? "f32 or f16"
                                                 : "f32, f16, bf16 or quantized";
        refuse(std::string("expected ") + t->name + " in " + types + ", got " + ggml_type_name(t->type));
    }
}

const ggml_tensor * file::tensor(const std::string & name, shape wanted, use as, bool required) const {
    const ggml_tensor * t = find(name);
    if (t == nullptr) {
        if (required) {
            refuse("expected the tensor " + name + ", found none");
        }
        return nullptr;
    }
    int i = 0;
    for (const int64_t n : wanted) {
        if (t->ne[i++] != n) {
            refuse("expected " + name + " of " + dims(wanted.begin(), (int) wanted.size()) + ", got " + describe(t));
        }
    }
    for (; i < GGML_MAX_DIMS; i++) {
        if (t->ne[i] != 1) {
            refuse("expected " + name + " of " + dims(wanted.begin(), (int) wanted.size()) + ", got " + describe(t));
        }
    }
    check_type(t, as);
    return t;
}

void file::linear(const std::string & name, int64_t n_in, int64_t n_out, bool required, bool bias_required) const {
    tensor(name + ".weight", { n_in, n_out }, use::matrix, required);
    tensor(name + ".bias", { n_out }, use::vector, bias_required);
}

void file::norm(const std::string & name, int64_t n, bool required, bool bias_required) const {
    tensor(name + ".weight", { n }, use::vector, required);
    tensor(name + ".bias", { n }, use::vector, bias_required);
}

} // namespace qap_gate
