// bind-clip-text.cpp: CLIP's text tower of an mmproj file. The GIL is released while it loads and computes.
#include "bindings.h"
#include "qap-clip-text.h"
#include "quiet.h"

#include <memory>
#include <vector>

class clip_text {
public:
    clip_text(const std::string & path, const std::optional<std::string> & device, int32_t n_threads) {
        const py::gil_scoped_release nogil;
        const quiet_scope            quiet(false);
        clip.reset(qap_clip_text_open(path.c_str(), device ? device->c_str() : nullptr, n_threads));
        if (!clip) {
            throw std::invalid_argument(qap_last_error());
        }
        shape = qap_clip_text_get_shape(clip.get());
    }

    float_array embed(const std::vector<int32_t> & ids) {
        qap_clip_text * open = clip.get();
        float_array     result(shape.n_proj);
        float *         out    = result.mutable_data();
        int             status = 0;
        {
            const py::gil_scoped_release nogil;
            status = qap_clip_text_embed(open, ids.data(), (int32_t) ids.size(), out);
        }
        check(status);
        return result;
    }

    float_array project(const float_array & hidden) {
        qap_clip_text * open = clip.get();
        const int32_t   n    = rows_of(hidden);
        float_array     result({ (py::ssize_t) n, (py::ssize_t) shape.n_proj });
        const float *   data   = hidden.data();
        float *         out    = result.mutable_data();
        int             status = 0;
        {
            const py::gil_scoped_release nogil;
            status = qap_clip_text_project(open, data, n, out);
        }
        check(status);
        return result;
    }

    float_array relevance(const float_array & hidden, const std::vector<int32_t> & ids) {
        qap_clip_text * open = clip.get();
        const int32_t   n    = rows_of(hidden);
        float_array     result(n);
        const float *   data   = hidden.data();
        float *         out    = result.mutable_data();
        int             status = 0;
        {
            const py::gil_scoped_release nogil;
            status = qap_clip_text_relevance(open, data, n, ids.data(), (int32_t) ids.size(), out);
        }
        check(status);
        return result;
    }

    qap_clip_text_shape shape = {};

private:
    struct deleter {
        void operator()(qap_clip_text * p) const { qap_clip_text_free(p); }
    };

    int32_t rows_of(const float_array & hidden) const {
        if (hidden.ndim() != 2 || hidden.shape(0) < 1 || hidden.shape(0) > INT32_MAX ||
            hidden.shape(1) != shape.n_hidden) {
            throw py::value_error("hidden: expected shape (n_tok, " + std::to_string(shape.n_hidden) + ")");
        }
        return (int32_t) hidden.shape(0);
    }

    std::unique_ptr<qap_clip_text, deleter> clip;
};

void register_clip_text(py::module_ & m) {
    py::class_<clip_text>(m, "ClipText")
        .def(
            py::init<const std::string &, const std::optional<std::string> &, int32_t>(), py::arg("path"),
            py::arg("device").none(true), py::arg("n_threads"))
        .def_property_readonly("n_ctx", [](const clip_text & c) { return c.shape.n_ctx; })
        .def_property_readonly("n_proj", [](const clip_text & c) { return c.shape.n_proj; })
        .def_property_readonly("n_hidden", [](const clip_text & c) { return c.shape.n_hidden; })
        .def_property_readonly("n_vocab", [](const clip_text & c) { return c.shape.n_vocab; })
        .def("embed", &clip_text::embed, py::arg("ids"))
        .def("project", &clip_text::project, py::arg("hidden").noconvert())
        .def("relevance", &clip_text::relevance, py::arg("hidden").noconvert(), py::arg("ids"));
}
