// bind-encoder.cpp: an owned mtmd_context and its chunks. Python hands over addresses of the language model and its
// context, which llama-cpp-python owns; vision model code in python/qap_gguf/model.py keeps them alive.
#include "bindings.h"
#include "ggml-backend.h"
#include "llama.h"
#include "mtmd-helper.h"
#include "mtmd.h"
#include "quiet.h"

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

using bytes_array = py::array_t<uint8_t, py::array::c_style>;

[[noreturn]] static void fail(const std::string & what, const quiet_scope & quiet) {
    const std::string own   = qap_last_error();
    const std::string other = quiet.last_error();
    const std::string why   = !own.empty() ? own : other;
    throw std::runtime_error(why.empty() ? what : what + ": " + why);
}

// One piece of a tokenized prompt. Holds the whole list, which owns the upstream chunk.
struct chunk_ref {
    std::shared_ptr<mtmd_input_chunks> list;
    size_t                             index;
    int32_t                            n_special;
    int32_t                            n_padding;

    mtmd_input_chunk * get() const { return const_cast<mtmd_input_chunk *>(mtmd_input_chunks_get(list.get(), index)); }

    bool is_image() const { return mtmd_input_chunk_get_type(get()) == MTMD_INPUT_CHUNK_TYPE_IMAGE; }

    std::vector<llama_token> tokens() const {
        size_t              n    = 0;
        const llama_token * data = mtmd_input_chunk_get_tokens_text(get(), &n);
        return data != nullptr ? std::vector<llama_token>(data, data + n) : std::vector<llama_token>();
    }
};

// What one encode found, as arrays; None before the encode and for images that cannot be pruned.
static py::object report_of(const chunk_ref & chunk) {
    qap_report r = {};
    if (qap_chunk_report(chunk.get(), &r) != 0 || !r.done) {
        return py::none();
    }
    py::dict   out;
    const auto put = [&](const char * name, const float * data) {
        out[name] = data != nullptr ? py::object(copy_array(data, (size_t) r.n_total)) : py::object(py::none());
    };
    const auto put_table = [&](const char * name, const float * data, int32_t n_rows, int32_t n_columns) {
        out[name] = py::none();
        if (data != nullptr) {
            py::array_t<float> table({ (py::ssize_t) n_rows, (py::ssize_t) n_columns });
            std::copy_n(data, (size_t) n_rows * (size_t) n_columns, table.mutable_data());
            out[name] = table;
        }
    };
    out["n_total"]   = r.n_total;
    out["n_keep"]    = r.n_keep;
    out["special"]   = copy_array(r.special, (size_t) r.n_special);
    out["padding"]   = copy_array(r.padding, (size_t) r.n_padding);
    out["n_columns"] = r.n_columns;
    out["content"]   = py::none();
    if (r.content[2] > 0.0f) {
        out["content"] = py::make_tuple(r.content[0], r.content[1], r.content[2], r.content[3]);
    }
    out["alpha"]      = r.alpha;
    out["indices"]    = copy_array(r.indices, (size_t) r.n_keep);
    out["bytes_read"] = r.bytes_read;
    out["early"]      = py::none();
    if (r.n_early > 0 || r.flat) {
        out["early"] = copy_array(r.early, (size_t) r.n_early);
    }
    put("early_total", r.early_total);
    put_table("early_near", r.early_near, r.n_early, r.n_total - r.n_padding - r.n_early);
    put("error", r.error);
    put("outlier", r.outlier);
    put("sensitivity", r.sensitivity);
    put("semantic", r.semantic);
    put("attention", r.attention);
    put("received", r.received);
    put("total", r.total);
    put_table("hidden", r.hidden, r.n_total, r.n_hidden);
    return out;
}

class encoder {
public:
    encoder(
        const std::string & mmproj, uintptr_t model, const std::optional<std::string> & device, int n_threads,
        const std::optional<bool> & flash_attn, const std::optional<int> & max_tokens, bool verbose)
        : verbose(verbose) {
        const quiet_scope   quiet(verbose);
        mtmd_context_params params = mtmd_context_params_default();
        params.n_threads           = n_threads;
        params.print_timings       = false;
        if (flash_attn) {
            params.flash_attn_type = *flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        }
        params.image_max_tokens = max_tokens.value_or(params.image_max_tokens);
        if (device) {
            params.device = ggml_backend_dev_by_name(device->c_str());
            params.use_gpu =
                params.device != nullptr && ggml_backend_dev_type(params.device) != GGML_BACKEND_DEVICE_TYPE_CPU;
            if (params.device == nullptr) {
                throw py::value_error("device: unknown name '" + *device + "'");
            }
        }
        const auto * lm = reinterpret_cast<const llama_model *>(model);
        n_embd          = llama_model_n_embd_inp(lm);
        {
            const py::gil_scoped_release nogil;
            ctx.reset(mtmd_init_from_file(mmproj.c_str(), lm, params));
        }
        if (!ctx) {
            fail("the mmproj could not be loaded", quiet);
        }
    }

    std::vector<chunk_ref> tokenize(
        const std::string & text, const py::list & images, bool add_special, bool parse_special) {
        std::vector<mtmd::bitmap_ptr>    owned;
        std::vector<const mtmd_bitmap *> bitmaps;
        for (const py::handle item : images) {
            owned.push_back(make_bitmap(item));
            bitmaps.push_back(owned.back().get());
        }
        std::shared_ptr<mtmd_input_chunks> list(mtmd_input_chunks_init(), mtmd_input_chunks_free);
        const mtmd_input_text              input = { text.c_str(), text.size(), add_special, parse_special };
        {
            const py::gil_scoped_release      nogil;
            const std::lock_guard<std::mutex> lock(mutex);
            const quiet_scope                 quiet(verbose);
            if (mtmd_tokenize(open(), list.get(), &input, bitmaps.data(), bitmaps.size()) != 0) {
                const std::string why = quiet.last_error();
                throw py::value_error(why.empty() ? "the prompt could not be tokenized" : why);
            }
        }
        std::vector<chunk_ref> chunks;
        for (size_t i = 0; i < mtmd_input_chunks_size(list.get()); i++) {
            const mtmd_input_chunk * chunk = mtmd_input_chunks_get(list.get(), i);
            chunks.push_back({ list, i, qap_chunk_n_special(ctx.get(), chunk), qap_chunk_n_padding(ctx.get(), chunk) });
        }
        return chunks;
    }

    // Features of an image chunk, (kept tokens, n_embd). capture: all tokens, with the attention in the report; after the
    // early drop of `early`, if there is one, with zeros for what it dropped.
    py::array_t<float> encode(
        const chunk_ref & chunk, bool capture, bool hidden, const std::optional<qap_params> & early) {
        if (!chunk.is_image()) {
            throw py::value_error("expected an image chunk");
        }
        std::vector<float> rows;
        {
            const py::gil_scoped_release      nogil;
            const std::lock_guard<std::mutex> lock(mutex);
            const quiet_scope                 quiet(verbose);
            if (early && qap_chunk_plan_early(open(), chunk.get(), hidden, &*early) != 0) {
                throw py::value_error(qap_last_error());
            }
            if (!early && capture && qap_chunk_plan_capture(open(), chunk.get(), hidden) != 0) {
                fail("the image could not be encoded", quiet);
            }
            if (mtmd_encode_chunk(open(), chunk.get()) != 0) {
                fail("the image could not be encoded", quiet);
            }
            const float * data = mtmd_get_output_embd(open());
            rows.assign(data, data + mtmd_input_chunk_get_n_tokens(chunk.get()) * (size_t) n_embd);
        }
        py::array_t<float> result({ (py::ssize_t) (rows.size() / (size_t) n_embd), (py::ssize_t) n_embd });
        std::copy(rows.begin(), rows.end(), result.mutable_data());
        return result;
    }

    // Prefill the rows into the context of the language model at position n_past; returns the next position.
    int32_t decode(
        uintptr_t lctx, const chunk_ref & chunk, const float_array & features,
        const std::optional<index_array> & indices, const std::string & positions, int32_t n_past, int32_t n_batch) {
        if (!chunk.is_image()) {
            throw py::value_error("expected an image chunk");
        }
        if (indices) {
            if (indices->ndim() != 1 || indices->shape(0) > INT32_MAX) {
                throw py::value_error("indices: expected shape (k,)");
            }
            const int32_t id = qap_id_from_name("positions", positions.c_str());
            if (id < 0) {
                throw py::value_error("positions: unknown name '" + positions + "'");
            }
            check(qap_chunk_plan_indices(open(), chunk.get(), indices->data(), (int32_t) indices->shape(0), id));
        }
        const auto n_rows = (py::ssize_t) mtmd_input_chunk_get_n_tokens(chunk.get());
        if (features.ndim() != 2 || features.shape(0) != n_rows || features.shape(1) != n_embd) {
            throw py::value_error(
                "features: expected shape (" + std::to_string(n_rows) + ", " + std::to_string(n_embd) + ")");
        }
        if (n_batch < 1 || n_past < 0) {
            throw py::value_error("n_batch: expected a number from 1, n_past: from 0");
        }
        float *   data   = const_cast<float *>(features.data()); // upstream reads only
        llama_pos next   = n_past;
        int32_t   status = 0;
        {
            const py::gil_scoped_release      nogil;
            const std::lock_guard<std::mutex> lock(mutex);
            const quiet_scope                 quiet(verbose);
            status = mtmd_helper_decode_image_chunk(
                open(), reinterpret_cast<llama_context *>(lctx), chunk.get(), data, n_past, 0, n_batch, &next, nullptr,
                nullptr);
        }
        if (status != 0) {
            const std::string own = qap_last_error();
            throw std::runtime_error(
                !own.empty() ? own : "prefill of the image failed with status " + std::to_string(status));
        }
        return next;
    }

    std::optional<std::string> why_not() {
        const char * text = qap_context_why_not(open());
        return text != nullptr ? std::optional<std::string>(text) : std::nullopt;
    }

    bool forced() { return qap_context_forced(open()); }

    std::optional<std::string> tiles_why_not() {
        const char * text = qap_context_tiles_why_not(open());
        return text != nullptr ? std::optional<std::string>(text) : std::nullopt;
    }

    // "none", "grid" or "index", see enum qap_places
    const char * places() {
        switch (qap_context_places(open())) {
            case QAP_PLACES_GRID: return "grid";
            case QAP_PLACES_INDEX: return "index";
            default: return "none";
        }
    }

    int64_t repacked() { return qap_context_repacked(open()); }

    bool non_causal() { return mtmd_decode_use_non_causal(open(), nullptr); }

    std::optional<qap_params> file_params() {
        qap_params params = {};
        return qap_context_file_params(open(), &params) ? std::optional<qap_params>(params) : std::nullopt;
    }

    py::object channel_weights() {
        int32_t       n    = 0;
        const float * data = qap_context_channel_weights(open(), &n);
        return data != nullptr ? py::object(copy_array(data, (size_t) n)) : py::object(py::none());
    }

    void close() {
        const py::gil_scoped_release      nogil; // who holds the mutex may want the GIL (bind-interrupt.cpp)
        const std::lock_guard<std::mutex> lock(mutex);
        ctx.reset();
    }

    int32_t n_embd = 0;

private:
    mtmd_context * open() const {
        if (!ctx) {
            throw std::runtime_error("the vision model is closed");
        }
        return ctx.get();
    }

    // an array (height, width, 3) of uint8, or (width, height) for a placeholder that is only counted
    static mtmd::bitmap_ptr make_bitmap(const py::handle & item) {
        if (py::isinstance<py::tuple>(item)) {
            const auto size = item.cast<std::pair<uint32_t, uint32_t>>();
            return mtmd::bitmap_ptr(mtmd_bitmap_init(size.first, size.second, nullptr));
        }
        if (!py::isinstance<bytes_array>(item)) {
            throw py::type_error("image: expected a uint8 array in C order");
        }
        const auto pixels = py::reinterpret_borrow<bytes_array>(item);
        if (pixels.ndim() != 3 || pixels.shape(2) != 3 || pixels.shape(0) < 1 || pixels.shape(1) < 1) {
            throw py::value_error("image: expected shape (height, width, 3)");
        }
        return mtmd::bitmap_ptr(
            mtmd_bitmap_init((uint32_t) pixels.shape(1), (uint32_t) pixels.shape(0), pixels.data()));
    }

    bool              verbose;
    std::mutex        mutex; // libmtmd encodes one image of a context at a time
    mtmd::context_ptr ctx;
};

void register_encoder(py::module_ & m) {
    quiet_install();
    m.def("media_marker", [] { return std::string(mtmd_default_marker()); });

    py::class_<chunk_ref>(m, "Chunk")
        .def_property_readonly("is_image", &chunk_ref::is_image)
        .def_property_readonly("tokens", &chunk_ref::tokens)
        .def_property_readonly("n_tokens", [](const chunk_ref & c) { return mtmd_input_chunk_get_n_tokens(c.get()); })
        .def_readonly("n_special", &chunk_ref::n_special)
        .def_readonly("n_padding", &chunk_ref::n_padding)
        .def_property_readonly("is_tile", [](const chunk_ref & c) { return qap_chunk_is_tile(c.get()); })
        .def_property_readonly("n_pos", [](const chunk_ref & c) { return mtmd_input_chunk_get_n_pos(c.get()); })
        .def(
            "same_picture",
            [](const chunk_ref & c, const chunk_ref & other) { return qap_chunk_same_picture(c.get(), other.get()); })
        .def("report", &report_of);

    py::class_<encoder>(m, "Encoder")
        .def(
            py::init<
                const std::string &, uintptr_t, const std::optional<std::string> &, int, const std::optional<bool> &,
                const std::optional<int> &, bool>(),
            py::kw_only(), py::arg("mmproj"), py::arg("model"), py::arg("device").none(true), py::arg("n_threads"),
            py::arg("flash_attn").none(true), py::arg("max_tokens").none(true), py::arg("verbose"))
        .def_readonly("n_embd", &encoder::n_embd)
        .def(
            "tokenize", &encoder::tokenize, py::arg("text"), py::arg("images"), py::arg("add_special"),
            py::arg("parse_special"))
        .def(
            "encode", &encoder::encode, py::arg("chunk"), py::arg("capture"), py::arg("hidden") = false,
            py::arg("early") = py::none())
        .def(
            "decode", &encoder::decode, py::arg("lctx"), py::arg("chunk"), py::arg("features").noconvert(),
            py::arg("indices").noconvert().none(true), py::arg("positions"), py::arg("n_past"), py::arg("n_batch"))
        .def("why_not", &encoder::why_not)
        .def("forced", &encoder::forced)
        .def("places", &encoder::places)
        .def("repacked", &encoder::repacked)
        .def("non_causal", &encoder::non_causal)
        .def("tiles_why_not", &encoder::tiles_why_not)
        .def("file_params", &encoder::file_params)
        .def("channel_weights", &encoder::channel_weights)
        .def("close", &encoder::close);
}
