// gate-file.h: a GGUF file under suspicion. Reads keys and tensor shapes with ggml's own reader (no data) and answers
// questions about them; whatever is not as asked ends in an exception of one line: expected, got, cure.
#pragma once

#include "ggml-cpp.h"
#include "gguf.h"

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace qap_gate {

// What a graph does with a tensor decides which types of number it may hold; ggml aborts on others.
enum class use {
    vector, // added to or multiplied with rows: f32
    matrix, // left side of a product, or a table of rows: f32, f16, bf16 or quantized
    filter, // of a convolution: f32 or f16
};

using shape = std::initializer_list<int64_t>;

class file {
public:
    // Opens it and checks what holds for every GGUF file: tensors inside the file, no empty dimension, known types.
    explicit file(const std::string & path);

    [[noreturn]] void refuse(const std::string & expected_and_got, const char * cure = "fetch the file again") const;

    // --- keys ---

    bool has(const std::string & key) const;
    // refuses a key that is there with another type; false when it is not there
    bool has_type(const std::string & key, gguf_type type) const;
    bool has_array(const std::string & key, gguf_type element) const;

    // u32, or the fallback where the file has no such key; a negative fallback means that the key must be there
    int64_t whole(const std::string & key, int64_t low, int64_t high, int64_t fallback = -1) const;
    // f32 in low..high, finite; without a fallback the key must be there
    void real(const std::string & key, double low, double high, bool required = false) const;
    bool flag(const std::string & key, bool fallback) const;
    // "" where the file has no such key
    std::string  text(const std::string & key) const;
    bool         is_array(const std::string & key) const;
    int64_t      number16(const std::string & key) const;                           // u16, which must be there
    int64_t      largest(const std::string & key, int64_t low, int64_t high) const; // of an array of u32 or i32
    size_t       length(const std::string & key) const;                             // of an array
    const void * data(const std::string & key) const; // of an array that is not of strings
    std::string  item(const std::string & key, size_t i) const;

    // --- tensors ---

    const ggml_tensor * find(const std::string & name) const; // null where there is none
    // libllama maps the file and hands tensors to ggml where they lie, which asserts that they are aligned
    void                check_mapped() const;
    const ggml_tensor * first() const { return ggml_get_first_tensor(meta.get()); }
    const ggml_tensor * next(const ggml_tensor * t) const {
        return ggml_get_next_tensor(meta.get(), const_cast<ggml_tensor *>(t));
    }

    // The tensor, of this shape and a type for that use; null where it is not there and need not be.
    const ggml_tensor * tensor(const std::string & name, shape wanted, use as, bool required = true) const;
    void                check_type(const ggml_tensor * t, use as) const;
    // weight (n_in, n_out) and bias (n_out)
    void linear(const std::string & name, int64_t n_in, int64_t n_out, bool required, bool bias_required = false) const;
    // weight (n) and bias (n)
    void norm(const std::string & name, int64_t n, bool required, bool bias_required = false) const;

    uint64_t n_bytes = 0; // of all tensors

private:
    int64_t find_key(const std::string & key) const;
    void    check_tensors(const std::string & path) const;

    gguf_context_ptr gguf;
    ggml_context_ptr meta;
    // ggml's own look-ups go through all names
    std::unordered_map<std::string, int64_t>             keys;
    std::unordered_map<std::string, const ggml_tensor *> tensors;
};

std::string describe(const ggml_tensor * t);

// --- memory (memory.cpp) ---

// Refuses when `bytes` more will not fit: `mapped` may lie in the file until they are used, `allocated` may not.
// QAP_MEMORY_CHECK=0 turns it off.
void check_memory(const file & f, double mapped, double allocated);

// What the control groups around this process leave it, in bytes; infinite without a limit.
struct container_room {
    double total = std::numeric_limits<double>::infinity();
    double free  = std::numeric_limits<double>::infinity();
};

// groups: the process's /proc/self/cgroup; mount: /sys/fs/cgroup. Versions 1 and 2, every level.
container_room find_container_room(const std::string & groups, const std::string & mount);

} // namespace qap_gate
