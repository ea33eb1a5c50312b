// select-rows.cpp: qap_select_by_rows(), dpp from features without the table of cosines, which has n_tokens^2 numbers. dpp
// looks at the rows of the chosen tokens only: each is made when its token is chosen, some likely ones beside it.
//
// The choice is that of qap_cosines() and qap_select(), for the numbers are. Facts of ggml's CPU backend (llama.cpp 0c1e570):
// a number of a product of f32 matrices depends on its row and its column alone, as both ways to multiply go along the
// channels in one order (vec_dot in ggml-cpu.c, gemm_bloc in llamafile/sgemm.cpp). Which way it is depends on the rows of the
// first matrix, which are the same here, and on whether the second has at least 2 of them (4 on ARM): AHEAD is more.
#include "device.h"
#include "ggml-backend.h"
#include "qap-error.h"
#include "qap.h"
#include "scorers/scorers.h"
#include "selectors/selectors.h"

#include <algorithm>
#include <cmath>

static const int32_t AHEAD     = QAP_ROWS_AHEAD;
static const int32_t BLOCK     = QAP_ROWS_BLOCK;
static const size_t  MAX_NODES = 128;

namespace {

class cosine_rows : public qap_dpp_source {
public:
    cosine_rows(int32_t n_tokens, int32_t n_embd) : n(n_tokens), d(n_embd), zeros((size_t) n_tokens, 0) {}

    int open(const float * x, int32_t n_threads) {
        backend = qap_open_device(nullptr, n_threads);
        if (!backend || graph.open(backend.get(), MAX_NODES) != 0) {
            return -1;
        }
        all  = graph.input(GGML_TYPE_F32, d, n);
        some = graph.input(GGML_TYPE_F32, d, AHEAD);
        out  = qap_build_products(graph.ctx.get(), all, some);
        ggml_set_output(out);
        ggml_build_forward_expand(graph.gf, out);
        if (graph.allocate() != 0) {
            return -1;
        }
        for (int32_t first = 0; first < n; first += BLOCK) {
            if (bring_to_length_1(x, first, std::min(BLOCK, n - first)) != 0) {
                return -1;
            }
        }
        return 0;
    }

    bool is_zero(int32_t i) const override { return zeros[(size_t) i] != 0; }

    const float * row(int32_t i, const std::vector<double> & residual) override {
        auto found = std::find(made.begin(), made.end(), i);
        if (found == made.end()) {
            if (make(i, residual) != 0) {
                return nullptr;
            }
            found = made.begin();
        }
        return rows.data() + (size_t) (found - made.begin()) * (size_t) n;
    }

private:
    const int32_t        n, d;
    std::vector<char>    zeros;
    ggml_backend_ptr     backend;
    device_graph         graph;          // a single node: no other overwrites its inputs, and `all` is set once
    ggml_tensor *        all  = nullptr; // [d, n]
    ggml_tensor *        some = nullptr; // [d, AHEAD]
    ggml_tensor *        out  = nullptr; // [n, AHEAD]
    std::vector<int32_t> made;           // whose rows `rows` has
    std::vector<float>   rows;           // [AHEAD, n]

    int bring_to_length_1(const float * x, int32_t first, int32_t count) {
        device_graph block;
        if (block.open(backend.get(), MAX_NODES) != 0) {
            return -1;
        }
        ggml_tensor * from = block.input(GGML_TYPE_F32, d, count);
        ggml_tensor * unit = qap_build_unit_rows(block.ctx.get(), from);
        ggml_set_output(unit);
        ggml_build_forward_expand(block.gf, unit);
        if (block.allocate() != 0) {
            return -1;
        }
        ggml_backend_tensor_set(from, x + (size_t) first * (size_t) d, 0, ggml_nbytes(from));
        if (block.run() != 0) {
            return -1;
        }
        std::vector<float> values((size_t) count * (size_t) d);
        qap_read_floats(unit, values.data());
        ggml_backend_tensor_set(all, values.data(), (size_t) first * all->nb[1], ggml_nbytes(unit));
        for (int32_t i = 0; i < count; i++) {
            const float * begin         = values.data() + (size_t) i * (size_t) d;
            const auto    is_not        = [](float value) { return value != 0.0f; };
            zeros[(size_t) (first + i)] = std::none_of(begin, begin + d, is_not) ? 1 : 0;
        }
        return 0;
    }

    // Rows of token i and of those that stand highest besides.
    int make(int32_t i, const std::vector<double> & residual) {
        std::vector<int32_t> order((size_t) n);
        std::iota(order.begin(), order.end(), 0);
        std::swap(order.front(), order[(size_t) i]);
        const auto    higher = [&](int32_t a, int32_t b) { return residual[(size_t) a] > residual[(size_t) b]; };
        const int32_t count  = std::min(AHEAD, n);
        std::partial_sort(order.begin() + 1, order.begin() + count, order.end(), higher);
        order.resize((size_t) count);
        order.resize((size_t) AHEAD, i); // fewer tokens than columns
        std::vector<float> values((size_t) d);
        for (size_t column = 0; column < order.size(); column++) {
            const size_t n_bytes = values.size() * sizeof(float);
            qap_read_bytes(all, values.data(), (size_t) order[column] * n_bytes, n_bytes);
            ggml_backend_tensor_set(some, values.data(), column * n_bytes, n_bytes);
        }
        if (graph.run() != 0) {
            return -1;
        }
        rows.resize((size_t) AHEAD * (size_t) n);
        qap_read_floats(out, rows.data());
        made = std::move(order);
        return 0;
    }
};

} // namespace

int qap_select_by_rows(
    const float * x, const float * total, int32_t n_tokens, int32_t n_embd, int32_t n_keep, int32_t n_threads,
    int32_t * indices) {
    if (qap_check_features(x, n_tokens, n_embd) != 0) {
        return -1;
    }
    if (n_keep < 1 || n_keep > n_tokens) {
        return qap_fail("n_keep: expected a number in 1..%d, got %d", (int) n_tokens, (int) n_keep);
    }
    const float * bad = std::find_if(total, total + n_tokens, [](float score) { return !std::isfinite(score); });
    if (bad != total + n_tokens) {
        return qap_fail("expected finite scores, got %g at token %d", (double) *bad, (int) (bad - total));
    }
    cosine_rows source(n_tokens, n_embd);
    if (source.open(x, n_threads) != 0 || !qap_dpp(total, n_tokens, n_keep, source, indices)) {
        return -1;
    }
    qap_clear_error();
    return 0;
}
