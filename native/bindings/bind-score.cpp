// bind-score.cpp: scores and selection over NumPy arrays. The GIL is released while ggml computes.
#include "bindings.h"

static py::dict score_tokens(
    const float_array & x, const std::optional<float_array> & semantic, const qap_params & params,
    const std::optional<std::string> & device, int32_t n_threads, const std::optional<float_array> & channel_weights) {
    if (x.ndim() != 2) {
        throw py::value_error("x: expected shape (n_tok, n_embd), got " + std::to_string(x.ndim()) + " dimensions");
    }
    const py::ssize_t n = x.shape(0);
    if (n > INT32_MAX || x.shape(1) > INT32_MAX) {
        throw py::value_error("x: too large");
    }
    if (semantic && (semantic->ndim() != 1 || semantic->shape(0) != n)) {
        throw py::value_error("semantic: expected shape (" + std::to_string(n) + ",)");
    }
    const float * w_data = weights_data(channel_weights, x.shape(1));
    float_array   error(n), outlier(n), sensitivity(n), relevance(n), total(n);
    qap_scores    out = { error.mutable_data(),     outlier.mutable_data(), sensitivity.mutable_data(),
                          relevance.mutable_data(), total.mutable_data(),   0.0f };

    const float * x_data = x.data();
    const float * p_data = semantic ? semantic->data() : nullptr;
    const char *  name   = device ? device->c_str() : nullptr;
    int           status = 0;
    {
        const py::gil_scoped_release nogil;
        status = qap_score(x_data, (int32_t) n, (int32_t) x.shape(1), p_data, w_data, &params, name, n_threads, &out);
    }
    check(status);

    using namespace pybind11::literals;
    return py::dict(
        "error"_a = error, "outlier"_a = outlier, "sensitivity"_a = sensitivity, "semantic"_a = relevance,
        "alpha"_a = out.alpha, "total"_a = total);
}

static int32_t selector_id(const std::string & method) {
    const int32_t id = qap_id_from_name("select", method.c_str());
    if (id < 0) {
        throw py::value_error("method: unknown name '" + method + "'");
    }
    return id;
}

static void check_square(const float_array & cosines, py::ssize_t n_tokens) {
    if (cosines.ndim() != 2 || cosines.shape(0) != n_tokens || cosines.shape(1) != n_tokens) {
        throw py::value_error(
            "cosines: expected shape (" + std::to_string(n_tokens) + ", " + std::to_string(n_tokens) + ")");
    }
}

static float_array cosines_of(const float_array & x, const std::optional<std::string> & device, int32_t n_threads) {
    if (x.ndim() != 2 || x.shape(0) > INT32_MAX || x.shape(1) > INT32_MAX) {
        throw py::value_error("x: expected shape (n_tok, n_embd)");
    }
    const py::ssize_t n = x.shape(0);
    float_array       result({ n, n });
    const float *     x_data = x.data();
    float *           out    = result.mutable_data();
    int               status = 0;
    {
        const py::gil_scoped_release nogil;
        status =
            qap_cosines(x_data, (int32_t) n, (int32_t) x.shape(1), device ? device->c_str() : nullptr, n_threads, out);
    }
    check(status);
    return result;
}

static index_array select_tokens(
    const std::optional<float_array> & total, const std::optional<float_array> & cosines, int32_t n_tokens,
    int32_t n_keep, const std::string & method, uint64_t seed) {
    const int32_t id = selector_id(method);
    if (total && (total->ndim() != 1 || total->shape(0) != n_tokens)) {
        throw py::value_error("total: expected shape (" + std::to_string(n_tokens) + ",)");
    }
    if (cosines) {
        check_square(*cosines, n_tokens);
    }
    if (n_tokens < 1 || n_keep < 1 || n_keep > n_tokens) {
        throw py::value_error(
            "n_keep: expected a number in 1.." + std::to_string(n_tokens) + ", got " + std::to_string(n_keep));
    }
    index_array   indices(n_keep);
    const float * t_data = total ? total->data() : nullptr;
    const float * c_data = cosines ? cosines->data() : nullptr;
    int32_t *     out    = indices.mutable_data();
    int           status = 0;
    {
        const py::gil_scoped_release nogil;
        status = qap_select(t_data, c_data, n_tokens, n_keep, id, seed, out);
    }
    check(status);
    return indices;
}

static index_array select_by_rows(const float_array & x, const float_array & total, int32_t n_keep, int32_t n_threads) {
    if (x.ndim() != 2 || x.shape(0) > INT32_MAX || x.shape(1) > INT32_MAX || total.ndim() != 1 ||
        total.shape(0) != x.shape(0) || n_keep < 1 || n_keep > x.shape(0)) {
        throw py::value_error("expected x of shape (n_tok, n_embd), total of shape (n_tok,) and n_keep in 1..n_tok");
    }
    index_array   indices(n_keep);
    const float * x_data = x.data();
    const float * t_data = total.data();
    int32_t *     out    = indices.mutable_data();
    const int32_t n      = (int32_t) x.shape(0);
    const int32_t d      = (int32_t) x.shape(1);
    int           status = 0;
    {
        const py::gil_scoped_release nogil;
        status = qap_select_by_rows(x_data, t_data, n, d, n_keep, n_threads, out);
    }
    check(status);
    return indices;
}

static float_array merge_average(const float_array & x, const float_array & cosines, const index_array & indices) {
    if (x.ndim() != 2 || x.shape(0) > INT32_MAX || x.shape(1) > INT32_MAX || indices.ndim() != 1 ||
        indices.shape(0) < 1 || indices.shape(0) > x.shape(0)) {
        throw py::value_error("expected x of shape (n_tok, n_embd) and indices of shape (k,), k in 1..n_tok");
    }
    check_square(cosines, x.shape(0));
    float_array     merged({ indices.shape(0), x.shape(1) });
    const float *   x_data = x.data();
    const float *   c_data = cosines.data();
    const int32_t * i_data = indices.data();
    float *         out    = merged.mutable_data();
    const int32_t   n      = (int32_t) x.shape(0);
    const int32_t   d      = (int32_t) x.shape(1);
    const int32_t   k      = (int32_t) indices.shape(0);
    int             status = 0;
    {
        const py::gil_scoped_release nogil;
        status = qap_merge_average(x_data, c_data, n, d, i_data, k, out);
    }
    check(status);
    return merged;
}

void register_score(py::module_ & m) {
    m.def(
        "score", &score_tokens, py::arg("x").noconvert(), py::arg("semantic").noconvert().none(true), py::arg("params"),
        py::arg("device").none(true), py::arg("n_threads"),
        py::arg("channel_weights").noconvert().none(true) = py::none());
    m.def("cosines", &cosines_of, py::arg("x").noconvert(), py::arg("device").none(true), py::arg("n_threads"));
    m.def("selects_by_rows", [](const std::string & method, int32_t n_tokens) {
        return qap_selects_by_rows(selector_id(method), n_tokens);
    });
    m.def(
        "select_by_rows", &select_by_rows, py::arg("x").noconvert(), py::arg("total").noconvert(), py::arg("n_keep"),
        py::arg("n_threads"));
    m.def("choice_bytes", [](const qap_params & params, int32_t n_tokens, int32_t n_embd, int32_t n_keep) {
        return qap_choice_bytes(&params, n_tokens, n_embd, n_keep);
    });
    m.def("needs_scores", [](const std::string & method) { return qap_selector_needs_scores(selector_id(method)); });
    m.def("needs_cosines", [](const std::string & method) { return qap_selector_needs_cosines(selector_id(method)); });
    m.def(
        "select", &select_tokens, py::arg("total").noconvert().none(true), py::arg("cosines").noconvert().none(true),
        py::arg("n_tokens"), py::arg("n_keep"), py::arg("method"), py::arg("seed"));
    m.def(
        "merge_average", &merge_average, py::arg("x").noconvert(), py::arg("cosines").noconvert(),
        py::arg("indices").noconvert());
}
