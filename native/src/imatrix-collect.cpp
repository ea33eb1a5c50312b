// imatrix-collect.cpp: importance matrices: sums of squares of what each matrix of a language model is multiplied with,
// apart for each kind of row.
//
// Facts (llama.cpp, tools/imatrix/imatrix.cpp): which products count (all of MUL_MAT_ID, of MUL_MAT those of blk.*), names
// without the prefix of a device's copy, one sum for each column of each matrix of a 3-D tensor, one count for each expert
// of a MUL_MAT_ID and one for all of a MUL_MAT. Upstream passes over products with fewer than 16 rows; here they count, as
// questions and answers are short.
// ggml-backend.cpp, ggml_backend_sched_compute_splits: where the callback returns false, the rest of the split is left out.
#include "ggml-backend.h"
#include "ggml.h"
#include "qap-error.h"
#include "qap-imatrix.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {
// sums: [QAP_ROWS_KINDS][n_values], counts: [QAP_ROWS_KINDS][n_counts]
struct entry {
    size_t               n_values = 0;
    size_t               n_counts = 0;
    std::vector<float>   sums;
    std::vector<int64_t> counts;

    void reserve(size_t values, size_t number) {
        n_values = values;
        n_counts = number;
        sums.assign(QAP_ROWS_KINDS * values, 0.0f);
        counts.assign(QAP_ROWS_KINDS * number, 0);
    }

    // one count for each expert, where there was one for all
    void spread(size_t number) {
        std::vector<int64_t> wide;
        for (const int64_t count : counts) {
            wide.insert(wide.end(), number, count);
        }
        counts   = std::move(wide);
        n_counts = number;
    }
};
} // namespace

struct qap_imatrix {
    std::map<std::string, entry> entries;
    int32_t                      kind = -1; // of the rows that come; -1: none of them count
    std::string                  error;     // the first one; nothing counts after it
    std::vector<char>            copy;      // of a product's input on a device
    std::vector<char>            ids;
};

static bool fail(qap_imatrix & im, const char * format, ...) QAP_PRINTF(2, 3);

static bool fail(qap_imatrix & im, const char * format, ...) {
    char    text[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    im.error = text;
    return false;
}

// "CUDA0#blk.0.attn_k.weight#0" -> "blk.0.attn_k.weight"
static std::string plain_name(const char * name) {
    const char * from = std::strchr(name, '#');
    if (from == nullptr) {
        return name;
    }
    const char * to = std::strchr(++from, '#');
    return to != nullptr ? std::string(from, to) : std::string(from);
}

// What the output matrix is multiplied with; where embeddings are put out, it has the second name (llama-graph.cpp,
// build_pooling).
static bool is_last_norm(const ggml_tensor * node) {
    return std::strcmp(node->name, "result_norm") == 0 || std::strcmp(node->name, "result_embd_pooled") == 0;
}

static bool counts_here(const ggml_tensor * node) {
    if (node->op == GGML_OP_MUL_MAT_ID) {
        return node->src[1]->type == GGML_TYPE_F32;
    }
    return node->op == GGML_OP_MUL_MAT && node->src[1]->type == GGML_TYPE_F32 &&
           plain_name(node->src[0]->name).compare(0, 4, "blk.") == 0;
}

static void add_squares(float * sums, const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        sums[i] += x[i] * x[i];
    }
}

// The entry of a tensor, made at its first product; null with an error where it had another size before.
static entry * entry_of(qap_imatrix & im, const std::string & name, size_t n_values, size_t n_counts) {
    entry & e = im.entries[name];
    if (e.n_values == 0) {
        e.reserve(n_values, n_counts);
    } else if (e.n_values != n_values) {
        fail(im, "expected %zu sums for %s, got %zu; begin anew", e.n_values, name.c_str(), n_values);
        return nullptr;
    }
    if (e.n_counts == 1 && n_counts > 1) {
        e.spread(n_counts);
    }
    return &e;
}

// MUL_MAT_ID: src1 [columns, n_used or 1, n_tokens], ids [n_used, n_tokens], src0 [columns, rows, n_experts]
static bool add_experts(qap_imatrix & im, const ggml_tensor * node, const std::string & name, const char * data) {
    const ggml_tensor * x         = node->src[1];
    const ggml_tensor * ids       = node->src[2];
    const int64_t       n_experts = node->src[0]->ne[2];
    const int64_t       n_columns = x->ne[0];
    if (ids->ne[1] != x->ne[2] || x->ne[3] != 1) {
        return fail(im, "expected a row of experts for each token of %s, got another shape", name.c_str());
    }
    entry * const e = entry_of(im, name, (size_t) (n_columns * n_experts), (size_t) n_experts);
    if (e == nullptr) {
        return false;
    }
    im.ids.resize(ggml_nbytes(ids));
    ggml_backend_tensor_get(ids, im.ids.data(), 0, im.ids.size());
    float * const   sums   = e->sums.data() + (size_t) im.kind * e->n_values;
    int64_t * const counts = e->counts.data() + (size_t) im.kind * e->n_counts;
    for (int64_t used = 0; used < ids->ne[0]; used++) {
        for (int64_t row = 0; row < x->ne[2]; row++) {
            int32_t expert = 0;
            std::memcpy(&expert, im.ids.data() + row * (int64_t) ids->nb[1] + used * (int64_t) ids->nb[0], 4);
            if (expert < 0 || expert >= n_experts) {
                return fail(im, "expected an expert below %d for %s, got %d", (int) n_experts, name.c_str(), expert);
            }
            const char * const at = data + (used % x->ne[1]) * (int64_t) x->nb[1] + row * (int64_t) x->nb[2];
            add_squares(sums + expert * n_columns, reinterpret_cast<const float *>(at), n_columns);
            counts[expert]++;
        }
    }
    return true;
}

static bool add_rows(qap_imatrix & im, const ggml_tensor * node, const std::string & name, const char * data) {
    const ggml_tensor * w         = node->src[0];
    const ggml_tensor * x         = node->src[1];
    const int64_t       n_mat     = w->ne[2] * w->ne[3];
    const int64_t       n_columns = x->ne[0];
    entry * const       e         = entry_of(im, name, (size_t) (n_columns * n_mat), 1);
    if (e == nullptr) {
        return false;
    }
    float * const sums = e->sums.data() + (size_t) im.kind * e->n_values;
    for (int64_t i3 = 0; i3 < x->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < x->ne[2]; i2++) {
            float * const      of_mat = sums + ((i3 % w->ne[3]) * w->ne[2] + i2 % w->ne[2]) * n_columns;
            const char * const plane  = data + i2 * (int64_t) x->nb[2] + i3 * (int64_t) x->nb[3];
            for (int64_t row = 0; row < x->ne[1]; row++) {
                add_squares(of_mat, reinterpret_cast<const float *>(plane + row * (int64_t) x->nb[1]), n_columns);
            }
        }
    }
    for (size_t i = 0; i < e->n_counts; i++) {
        e->counts[(size_t) im.kind * e->n_counts + i] += ggml_nrows(x) / n_mat;
    }
    return true;
}

static bool add_product(qap_imatrix & im, const ggml_tensor * node) {
    const ggml_tensor * x    = node->src[1];
    const std::string   name = plain_name(node->src[0]->name);
    const char *        data = static_cast<const char *>(x->data);
    if (!ggml_backend_buffer_is_host(x->view_src != nullptr ? x->view_src->buffer : x->buffer)) {
        im.copy.resize(ggml_nbytes(x));
        ggml_backend_tensor_get(x, im.copy.data(), 0, im.copy.size());
        data = im.copy.data();
    }
    if (x->nb[0] != sizeof(float)) {
        return fail(im, "expected rows without gaps for %s, got others", name.c_str());
    }
    return node->op == GGML_OP_MUL_MAT_ID ? add_experts(im, node, name, data) : add_rows(im, node, name, data);
}

qap_imatrix * qap_imatrix_new(void) {
    return new qap_imatrix();
}

void qap_imatrix_free(qap_imatrix * im) {
    delete im;
}

bool qap_imatrix_see(ggml_tensor * node, bool ask, void * imatrix) {
    auto & im = *static_cast<qap_imatrix *>(imatrix);
    if (im.kind < 0 || !im.error.empty()) {
        return !ask; // asked: no need of this node; else: go on
    }
    const bool is_image = im.kind == QAP_ROWS_IMAGE;
    if (ask) {
        return counts_here(node) || (is_image && is_last_norm(node));
    }
    if (is_last_norm(node)) {
        return !is_image; // nobody reads the logits of an image's rows
    }
    add_product(im, node);
    return true;
}

int qap_imatrix_rows(qap_imatrix * im, int32_t kind) {
    qap_clear_error();
    if (kind < -1 || kind >= QAP_ROWS_KINDS) {
        return qap_fail("kind of rows: expected -1 to %d, got %d", QAP_ROWS_KINDS - 1, (int) kind);
    }
    im->kind = kind;
    return 0;
}

int qap_imatrix_check(const qap_imatrix * im) {
    qap_clear_error();
    if (!im->error.empty()) {
        return qap_fail("%s", im->error.c_str());
    }
    for (const auto & item : im->entries) {
        const std::vector<float> & sums = item.second.sums;
        if (!std::all_of(sums.begin(), sums.end(), [](float sum) { return std::isfinite(sum); })) {
            return qap_fail(
                "expected finite inputs of %s, got others; check the language model's file", item.first.c_str());
        }
    }
    return 0;
}

int64_t qap_imatrix_size(const qap_imatrix * im) {
    return (int64_t) im->entries.size();
}

int qap_imatrix_at(const qap_imatrix * im, int64_t index, qap_imatrix_entry * out) {
    qap_clear_error();
    if (index < 0 || index >= qap_imatrix_size(im)) {
        return qap_fail("expected an entry below %zu, got %lld", im->entries.size(), (long long) index);
    }
    const auto & item = *std::next(im->entries.begin(), (std::ptrdiff_t) index);
    *out              = { item.first.c_str(), (int64_t) item.second.n_values, (int64_t) item.second.n_counts,
                          item.second.sums.data(), item.second.counts.data() };
    return 0;
}

int qap_imatrix_put(qap_imatrix * im, const qap_imatrix_entry * given) {
    qap_clear_error();
    if (given->n_values < 1 || given->n_counts < 1 || given->n_values % given->n_counts != 0) {
        return qap_fail("expected sums for each count of %s, got others", given->name);
    }
    entry & e = im->entries[given->name];
    e.reserve((size_t) given->n_values, (size_t) given->n_counts);
    std::copy_n(given->sums, e.sums.size(), e.sums.data());
    std::copy_n(given->counts, e.counts.size(), e.counts.data());
    return 0;
}
