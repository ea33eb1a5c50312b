// bind-gguf.cpp: metadata and tensor table of a GGUF file by ggml's own reader, without its data, and the gate in front
// of upstream's loaders. Python's files/gguf.py looks at every file with them before upstream does. Headers of files that
// lie elsewhere are for files/far.py.
#include "bindings.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "quiet.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string_view>

static gguf_context_ptr open_header(const std::string & path) {
    const quiet_scope      quiet(false);
    const gguf_init_params params = { /* no_alloc */ true, /* ctx */ nullptr };
    gguf_context_ptr       gguf(gguf_init_from_file(path.c_str(), params));
    if (!gguf) {
        throw py::value_error("not a readable GGUF file");
    }
    return gguf;
}

static py::str text_of(const char * text) {
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(text, (Py_ssize_t) strlen(text), "replace"));
}

static py::object value_of(const gguf_context * gguf, int64_t id) {
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_UINT8: return py::int_(gguf_get_val_u8(gguf, id));
        case GGUF_TYPE_INT8: return py::int_(gguf_get_val_i8(gguf, id));
        case GGUF_TYPE_UINT16: return py::int_(gguf_get_val_u16(gguf, id));
        case GGUF_TYPE_INT16: return py::int_(gguf_get_val_i16(gguf, id));
        case GGUF_TYPE_UINT32: return py::int_(gguf_get_val_u32(gguf, id));
        case GGUF_TYPE_INT32: return py::int_(gguf_get_val_i32(gguf, id));
        case GGUF_TYPE_UINT64: return py::int_(gguf_get_val_u64(gguf, id));
        case GGUF_TYPE_INT64: return py::int_(gguf_get_val_i64(gguf, id));
        case GGUF_TYPE_FLOAT32: return py::float_(gguf_get_val_f32(gguf, id));
        case GGUF_TYPE_FLOAT64: return py::float_(gguf_get_val_f64(gguf, id));
        case GGUF_TYPE_BOOL: return py::bool_(gguf_get_val_bool(gguf, id));
        case GGUF_TYPE_STRING: return text_of(gguf_get_val_str(gguf, id));
        default: return py::none(); // arrays (vocabularies, mostly) are not needed to check a file
    }
}

// The arrays of strings and of 32-bit integers whose keys begin with a prefix, as lists.
static py::dict gguf_arrays(const std::string & path, const std::string & prefix) {
    const gguf_context_ptr gguf = open_header(path);
    py::dict               arrays;
    for (int64_t i = 0; i < gguf_get_n_kv(gguf.get()); i++) {
        const char * key = gguf_get_key(gguf.get(), i);
        if (gguf_get_kv_type(gguf.get(), i) != GGUF_TYPE_ARRAY || strncmp(key, prefix.c_str(), prefix.size()) != 0) {
            continue;
        }
        const size_t n = gguf_get_arr_n(gguf.get(), i);
        py::list     items;
        if (gguf_get_arr_type(gguf.get(), i) == GGUF_TYPE_STRING) {
            for (size_t k = 0; k < n; k++) {
                items.append(text_of(gguf_get_arr_str(gguf.get(), i, k)));
            }
        } else if (gguf_get_arr_type(gguf.get(), i) == GGUF_TYPE_INT32) {
            const auto * data = static_cast<const int32_t *>(gguf_get_arr_data(gguf.get(), i));
            for (size_t k = 0; k < n; k++) {
                items.append(data[k]);
            }
        } else {
            continue;
        }
        arrays[text_of(key)] = items;
    }
    return arrays;
}

// (metadata, arrays as None, [(name, type, offset, bytes), ...], offset of the data)
static py::tuple gguf_info(const std::string & path) {
    const gguf_context_ptr gguf = open_header(path);
    py::dict               metadata;
    for (int64_t i = 0; i < gguf_get_n_kv(gguf.get()); i++) {
        metadata[text_of(gguf_get_key(gguf.get(), i))] = value_of(gguf.get(), i);
    }
    py::list tensors;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); i++) {
        tensors.append(
            py::make_tuple(
                py::bytes(gguf_get_tensor_name(gguf.get(), i)), ggml_type_name(gguf_get_tensor_type(gguf.get(), i)),
                gguf_get_tensor_offset(gguf.get(), i), gguf_get_tensor_size(gguf.get(), i)));
    }
    return py::make_tuple(metadata, tensors, gguf_get_data_offset(gguf.get()));
}

// A file that lies elsewhere. more(n): its first n bytes or more, fewer where it ends, or an exception.
struct far_file {
    py::function       more;
    py::bytes          bytes;
    std::exception_ptr failure;

    size_t read(void * output, uint64_t offset, size_t len) {
        std::string_view view = bytes;
        if (offset + len > view.size()) {
            bytes = more(offset + len).cast<py::bytes>();
            view  = bytes;
        }
        const size_t n = offset < view.size() ? std::min(len, view.size() - (size_t) offset) : 0;
        memcpy(output, view.data() + (n > 0 ? offset : 0), n);
        return n;
    }
};

static size_t read_far(void * user, void * output, uint64_t offset, size_t len) {
    auto * const far = static_cast<far_file *>(user);
    try {
        return far->failure ? 0 : far->read(output, offset, len);
    } catch (...) {
        far->failure = std::current_exception(); // it must not pass through ggml's reader
        return 0;
    }
}

// (bytes up to the tensors' data, bytes of the data) of a header that ggml's reader asks for piece by piece, within its
// first `most` bytes.
static py::tuple gguf_header(const py::function & more, uint64_t most) {
    const quiet_scope      quiet(false);
    far_file               far{ more, py::bytes(), nullptr };
    const gguf_init_params params = { /* no_alloc */ true, /* ctx */ nullptr };
    const gguf_context_ptr gguf(gguf_init_from_callback(read_far, &far, 0, most, params));
    if (far.failure) {
        std::rethrow_exception(far.failure);
    }
    if (!gguf) {
        throw py::value_error("not a readable GGUF header");
    }
    size_t n_data = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); i++) {
        n_data = std::max(n_data, gguf_get_tensor_offset(gguf.get(), i) + gguf_get_tensor_size(gguf.get(), i));
    }
    return py::make_tuple(gguf_get_data_offset(gguf.get()), n_data);
}

// The width of a token, None where this kind of file is not known; ValueError where upstream must not see it.
static std::optional<int64_t> checked(int status, int64_t n_embd) {
    check(status);
    return n_embd > 0 ? std::optional<int64_t>(n_embd) : std::nullopt;
}

static std::optional<int64_t> check_mmproj(const std::string & path, bool memory) {
    const quiet_scope quiet(false);
    int64_t           n_embd = 0;
    const int         status = qap_check_mmproj(path.c_str(), memory, &n_embd);
    return checked(status, n_embd);
}

static std::optional<int64_t> check_language(const std::string & path, bool memory, int64_t n_ctx) {
    const quiet_scope quiet(false);
    int64_t           n_embd = 0;
    const int         status = qap_check_language(path.c_str(), memory, n_ctx, &n_embd);
    return checked(status, n_embd);
}

static py::tuple container_room(const std::string & groups, const std::string & mount) {
    double total = 0.0, free = 0.0;
    qap_container_room(groups.c_str(), mount.c_str(), &total, &free);
    return py::make_tuple(total, free);
}

void register_gguf(py::module_ & m) {
    m.def("container_room", &container_room, py::arg("groups"), py::arg("mount"));
    const auto mmproj_bytes = [](const std::string & path, bool flash_attn) {
        const double bytes = qap_mmproj_bytes(path.c_str(), flash_attn);
        check(bytes < 0.0 ? -1 : 0);
        return bytes;
    };
    m.def("mmproj_bytes", mmproj_bytes, py::arg("path"), py::arg("flash_attn") = true);
    m.def("check_mmproj", &check_mmproj, py::arg("path"), py::arg("memory"));
    m.def("check_language", &check_language, py::arg("path"), py::arg("memory"), py::arg("n_ctx"));
    m.def("gguf_info", &gguf_info, py::arg("path"));
    m.def("gguf_header", &gguf_header, py::arg("more"), py::arg("most"));
    m.def("gguf_arrays", &gguf_arrays, py::arg("path"), py::arg("prefix"));
}
