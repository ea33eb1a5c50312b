// bind-imatrix.cpp: the collector of importance matrices. Python hands its two addresses to the parameters of a
// llama_context and keeps it alive until that context is freed.
#include "bindings.h"
#include "qap-imatrix.h"

#include <memory>

using count_array = py::array_t<int64_t, py::array::c_style>;

class imatrix {
public:
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(im.get()); }

    void rows(int32_t kind) { check(qap_imatrix_rows(im.get(), kind)); }

    void verify() const {
        if (qap_imatrix_check(im.get()) != 0) {
            throw std::runtime_error(qap_last_error());
        }
    }

    py::dict entries() const {
        py::dict found;
        for (int64_t i = 0; i < qap_imatrix_size(im.get()); i++) {
            qap_imatrix_entry e = {};
            check(qap_imatrix_at(im.get(), i, &e));
            found[e.name] = py::make_tuple(table(e.sums, e.n_values), table(e.counts, e.n_counts));
        }
        return found;
    }

    void put(const std::string & name, const float_array & sums, const count_array & counts) {
        if (sums.ndim() != 2 || counts.ndim() != 2 || sums.shape(0) != QAP_ROWS_KINDS ||
            counts.shape(0) != QAP_ROWS_KINDS) {
            throw py::value_error("sums, counts: expected shape (3, n)");
        }
        const qap_imatrix_entry e = { name.c_str(), sums.shape(1), counts.shape(1), sums.data(), counts.data() };
        check(qap_imatrix_put(im.get(), &e));
    }

private:
    struct deleter {
        void operator()(qap_imatrix * p) const { qap_imatrix_free(p); }
    };

    template <typename T> static py::array_t<T> table(const T * data, int64_t n) {
        py::array_t<T> result({ (py::ssize_t) QAP_ROWS_KINDS, (py::ssize_t) n });
        std::copy_n(data, QAP_ROWS_KINDS * (size_t) n, result.mutable_data());
        return result;
    }

    std::unique_ptr<qap_imatrix, deleter> im{ qap_imatrix_new() };
};

void register_imatrix(py::module_ & m) {
    py::class_<imatrix>(m, "Imatrix")
        .def(py::init<>())
        .def_property_readonly("address", &imatrix::address)
        .def_property_readonly_static(
            "callback", [](const py::object &) { return reinterpret_cast<uintptr_t>(&qap_imatrix_see); })
        .def("rows", &imatrix::rows, py::arg("kind"))
        .def("check", &imatrix::verify)
        .def("entries", &imatrix::entries)
        .def("put", &imatrix::put, py::arg("name"), py::arg("sums").noconvert(), py::arg("counts").noconvert());
}
