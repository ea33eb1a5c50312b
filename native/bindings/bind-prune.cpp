// bind-prune.cpp: one piece of a picture, from its rows to those that are kept. The GIL is released while it is pruned.
#include "bindings.h"

#include <algorithm>

using optional_floats = std::optional<float_array>;

static int32_t signal_id(const std::string & name) {
    const int32_t id = qap_id_from_name("semantic", name.c_str());
    if (id < 0) {
        throw py::value_error("semantic: unknown name '" + name + "'");
    }
    return id;
}

// Each of these names, as bits.
static uint32_t signal_bits(const std::vector<std::string> & names) {
    uint32_t bits = 0;
    for (const std::string & name : names) {
        bits |= UINT32_C(1) << signal_id(name);
    }
    return bits;
}

static std::string signal_of(const qap_params & params, const std::vector<std::string> & available) {
    const int32_t id = qap_signal(&params, signal_bits(available));
    check(id < 0 ? -1 : 0);
    return qap_name_from_id("semantic", id);
}

static std::vector<std::string> signal_order() {
    int32_t                  count = 0;
    const int32_t *          order = qap_signal_order(&count);
    std::vector<std::string> names;
    for (int32_t i = 0; i < count; i++) {
        names.emplace_back(qap_name_from_id("semantic", order[i]));
    }
    return names;
}

static const float * signal_data(const char * name, const optional_floats & values, int32_t n_tokens) {
    if (values && (values->ndim() != 1 || values->shape(0) != n_tokens)) {
        throw py::value_error(std::string(name) + ": expected shape (" + std::to_string(n_tokens) + ",)");
    }
    return values ? values->data() : nullptr;
}

static py::dict prune(
    const float_array & rows, int32_t n_planes, const std::vector<int32_t> & special,
    const std::vector<int32_t> & padding, const optional_floats & attention, const optional_floats & received,
    const optional_floats & prompt, const std::string & prompt_semantic, const qap_params & params, int32_t n_keep,
    const std::optional<std::string> & device, int32_t n_threads, const optional_floats & channel_weights,
    const optional_floats & dropped_total, const optional_floats & dropped_near) {
    const auto n_special = (py::ssize_t) special.size(), n_padding = (py::ssize_t) padding.size();
    if (rows.ndim() != 2 || rows.shape(0) > INT32_MAX || rows.shape(1) > INT32_MAX || rows.shape(0) < n_special) {
        throw py::value_error("rows: expected shape (n_rows, n_embd)");
    }
    const auto n_tokens = (int32_t) (rows.shape(0) - n_special);
    if (n_keep < 0 || n_keep > n_tokens - n_padding) {
        throw py::value_error(
            "n_keep: expected a number in 0.." + std::to_string(n_tokens - n_padding) + ", got " +
            std::to_string(n_keep));
    }
    qap_piece piece       = {};
    piece.rows            = rows.data();
    piece.n_rows          = (int32_t) rows.shape(0);
    piece.n_width         = (int32_t) rows.shape(1);
    piece.n_planes        = n_planes;
    piece.special         = special.data();
    piece.n_special       = (int32_t) n_special;
    piece.padding         = padding.data();
    piece.n_padding       = (int32_t) n_padding;
    piece.attention       = signal_data("attention", attention, n_tokens);
    piece.received        = signal_data("received", received, n_tokens);
    piece.prompt          = signal_data("prompt", prompt, n_tokens);
    piece.prompt_semantic = signal_id(prompt_semantic);
    piece.channel_weights = weights_data(channel_weights, rows.shape(1) / std::max(n_planes, 1));
    if (dropped_total) {
        const py::ssize_t n = dropped_total->size(), n_left = n_tokens - n_padding;
        if (dropped_total->ndim() != 1 || !dropped_near || dropped_near->ndim() != 2 || dropped_near->shape(1) != n ||
            dropped_near->shape(0) != n_left) {
            throw py::value_error(
                "dropped_total and dropped_near: expected shapes (n_dropped,) and (" + std::to_string(n_left) +
                ", n_dropped)");
        }
        piece.dropped = { (int32_t) n, dropped_total->data(), dropped_near->data() };
    }

    const py::ssize_t n_kept = n_keep + n_special;
    index_array       indices(n_keep), kept(n_kept);
    float_array       error(n_tokens), outlier(n_tokens), sensitivity(n_tokens), semantic(n_tokens), total(n_tokens);
    const bool        all = n_kept == rows.shape(0); // the very same rows, not a copy of them
    float_array       out = all ? rows : float_array({ n_kept, rows.shape(1) });
    qap_pruned        pruned;
    pruned.indices = indices.mutable_data();
    pruned.kept    = kept.mutable_data();
    pruned.rows    = all ? nullptr : out.mutable_data();
    pruned.scores  = { error.mutable_data(),    outlier.mutable_data(), sensitivity.mutable_data(),
                       semantic.mutable_data(), total.mutable_data(),   0.0f };
    int status     = 0;
    {
        const py::gil_scoped_release nogil;
        status = qap_prune(&piece, &params, n_keep, device ? device->c_str() : nullptr, n_threads, &pruned);
    }
    check(status);

    using namespace pybind11::literals;
    return py::dict(
        "indices"_a = indices, "kept"_a = kept, "rows"_a = out, "error"_a = error, "outlier"_a = outlier,
        "sensitivity"_a = sensitivity, "semantic"_a = semantic, "total"_a = total, "alpha"_a = pruned.scores.alpha,
        "signal"_a = qap_name_from_id("semantic", pruned.semantic), "score_s"_a = (double) pruned.score_us * 1e-6,
        "select_s"_a = (double) pruned.select_us * 1e-6);
}

static index_array kept_rows(
    int32_t n_tokens, const std::vector<int32_t> & special, const std::vector<int32_t> & indices) {
    index_array kept((py::ssize_t) (special.size() + indices.size()));
    check(qap_kept_rows(
        n_tokens, special.data(), (int32_t) special.size(), indices.data(), (int32_t) indices.size(),
        kept.mutable_data()));
    return kept;
}

void register_prune(py::module_ & m) {
    m.def("signal", &signal_of, py::arg("params"), py::arg("available"));
    m.def("signal_order", &signal_order);
    m.def(
        "share",
        [](const std::vector<int32_t> & sizes, int32_t n_keep) {
            std::vector<int32_t> out(sizes.size());
            check(qap_share(sizes.data(), (int32_t) sizes.size(), n_keep, out.data()));
            return out;
        },
        py::arg("sizes"), py::arg("n_keep"));
    m.def("kept_rows", &kept_rows, py::arg("n_tokens"), py::arg("special"), py::arg("indices"));
    m.def(
        "prune", &prune, py::kw_only(), py::arg("rows").noconvert(), py::arg("n_planes"), py::arg("special"),
        py::arg("padding"), py::arg("attention").noconvert().none(true), py::arg("received").noconvert().none(true),
        py::arg("prompt").noconvert().none(true), py::arg("prompt_semantic"), py::arg("params"), py::arg("n_keep"),
        py::arg("device").none(true), py::arg("n_threads"),
        py::arg("channel_weights").noconvert().none(true) = py::none(),
        py::arg("dropped_total").noconvert().none(true)   = py::none(),
        py::arg("dropped_near").noconvert().none(true)    = py::none());
}
