// bind-params.cpp: qap_params and the defaults that tokenization reads.
#include "bindings.h"

static int32_t id_of(const char * kind, const std::string & name) {
    const int32_t id = qap_id_from_name(kind, name.c_str());
    if (id < 0) {
        throw py::value_error(std::string(kind) + ": unknown name '" + name + "'");
    }
    return id;
}

static qap_params make_params(
    double keep_ratio, int32_t n_keep, double alpha, bool alpha_dynamic, const std::string & error, int32_t group_size,
    const std::string & outlier, double outlier_weight, const std::string & semantic, const std::string & select,
    const std::string & positions, const std::string & merge, uint64_t seed, int32_t encoder_layer, double encoder_keep,
    int32_t skip_flat_tiles, int32_t duplicates) {
    qap_params params      = qap_params_default();
    params.keep_ratio      = keep_ratio;
    params.n_keep          = n_keep;
    params.alpha           = (float) alpha;
    params.alpha_dynamic   = alpha_dynamic;
    params.error           = id_of("error", error);
    params.group_size      = group_size;
    params.outlier         = id_of("outlier", outlier);
    params.outlier_weight  = (float) outlier_weight;
    params.semantic        = id_of("semantic", semantic);
    params.select          = id_of("select", select);
    params.positions       = id_of("positions", positions);
    params.merge           = id_of("merge", merge);
    params.seed            = seed;
    params.encoder_layer   = encoder_layer;
    params.encoder_keep    = encoder_keep;
    params.skip_flat_tiles = skip_flat_tiles;
    params.duplicates      = duplicates;
    check(qap_params_check(&params));
    return params;
}

static py::dict to_dict(const qap_params & p) {
    using namespace pybind11::literals;
    return py::dict(
        "keep_ratio"_a = p.keep_ratio, "n_keep"_a = p.n_keep, "alpha"_a = p.alpha, "alpha_dynamic"_a = p.alpha_dynamic,
        "error"_a = qap_name_from_id("error", p.error), "group_size"_a = p.group_size,
        "outlier"_a = qap_name_from_id("outlier", p.outlier), "outlier_weight"_a = p.outlier_weight,
        "semantic"_a = qap_name_from_id("semantic", p.semantic), "select"_a = qap_name_from_id("select", p.select),
        "positions"_a = qap_name_from_id("positions", p.positions), "merge"_a = qap_name_from_id("merge", p.merge),
        "seed"_a = p.seed, "encoder_layer"_a = p.encoder_layer, "encoder_keep"_a = p.encoder_keep,
        "skip_flat_tiles"_a = p.skip_flat_tiles, "duplicates"_a = p.duplicates);
}

void register_params(py::module_ & m) {
    py::class_<qap_params>(m, "Params")
        .def(
            py::init(&make_params), py::kw_only(), py::arg("keep_ratio"), py::arg("n_keep"), py::arg("alpha"),
            py::arg("alpha_dynamic"), py::arg("error"), py::arg("group_size"), py::arg("outlier"),
            py::arg("outlier_weight"), py::arg("semantic"), py::arg("select"), py::arg("positions"), py::arg("merge"),
            py::arg("seed"), py::arg("encoder_layer"), py::arg("encoder_keep"), py::arg("skip_flat_tiles"),
            py::arg("duplicates"))
        .def(
            "count",
            [](const qap_params & params, int32_t n_tokens) {
                const int32_t count = qap_params_count(&params, n_tokens);
                check(count < 0 ? -1 : 0);
                return count;
            })
        .def(
            "count_early",
            [](const qap_params & params, int32_t n_tokens) {
                const int32_t count = qap_params_count_early(&params, n_tokens);
                check(count < 0 ? -1 : 0);
                return count;
            })
        .def("to_dict", &to_dict);

    m.def("default_params", &qap_params_default);
    m.def(
        "names",
        [](const std::string & kind) {
            std::vector<std::string> names;
            while (const char * name = qap_name_at(kind.c_str(), (int32_t) names.size())) {
                names.emplace_back(name);
            }
            return py::tuple(py::cast(names));
        },
        py::arg("kind"));
    m.def("disabled", &qap_disabled);
    m.def("stock_encoder", &qap_stock_encoder);
    m.def(
        "set_default", [](const qap_params * params) { check(qap_default_set(params)); }, py::arg("params").none(true));
    m.def("get_default", []() -> std::optional<qap_params> {
        qap_params params = {};
        return qap_default_get(&params) ? std::optional<qap_params>(params) : std::nullopt;
    });
    m.def("image_cache_limit", [](int64_t bytes) { check(qap_image_cache_limit(bytes)); }, py::arg("n_bytes"));
    m.def(
        "image_cache_state",
        [](uintptr_t context) {
            using namespace pybind11::literals;
            qap_image_cache_state state = {};
            qap_context_image_cache((const mtmd_context *) context, &state);
            return py::dict(
                "bytes"_a = state.bytes, "n_images"_a = state.n_images, "n_encoded"_a = state.n_encoded,
                "n_recalled"_a = state.n_recalled);
        },
        py::arg("context"), "of an mtmd_context, by its address");
    m.def("environment", []() -> std::optional<qap_params> {
        qap_params params = {};
        const int  found  = qap_params_from_env(&params);
        check(found < 0 ? -1 : 0);
        return found == 1 ? std::optional<qap_params>(params) : std::nullopt;
    });
    m.def(
        "push_override", [](const qap_params * params) { check(qap_override_push(params)); },
        py::arg("params").none(true));
    m.def("pop_override", &qap_override_pop);
}
