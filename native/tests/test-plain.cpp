// test-plain.cpp: scores, selection, merging and parameters on random arguments, good and bad, for sanitizers:
// what a call reads and writes is exactly as long as it says. Values are compared in tests/native (Python).
#include "check.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "qap-params.h"
#include "qap.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

static int32_t any_id(generator & rng, const char * kind) {
    std::vector<int32_t> ids;
    for (int32_t id = 0; id < 200; id++) {
        if (qap_name_from_id(kind, id) != nullptr) {
            ids.push_back(id);
        }
    }
    return ids[(size_t) between(rng, 0, (int32_t) ids.size() - 1)];
}

static qap_params any_params(generator & rng) {
    qap_params p     = qap_params_default();
    p.error          = any_id(rng, "error");
    p.outlier        = any_id(rng, "outlier");
    p.group_size     = between(rng, 1, 300);
    p.alpha_dynamic  = between(rng, 0, 1) != 0;
    p.alpha          = (float) between(rng, 0, 4) / 4.0f;
    p.outlier_weight = (float) between(rng, 0, 4) / 4.0f;
    return p;
}

static int test_scores(generator & rng, int rounds) {
    int refused = 0;
    for (int i = 0; i < rounds; i++) {
        const int32_t      n = between(rng, 1, 40), d = between(rng, 1, 4) * (between(rng, 0, 1) != 0 ? 256 : 37);
        const float        scale  = std::pow(10.0f, (float) between(rng, -20, 20));
        const qap_params   params = any_params(rng);
        std::vector<float> x      = features(rng, (size_t) n * (size_t) d, scale);
        if (between(rng, 0, 9) == 0) {
            std::fill(x.begin(), x.end(), 0.0f);
        }
        if (between(rng, 0, 19) == 0) {
            x[(size_t) between(rng, 0, n * d - 1)] = between(rng, 0, 1) != 0 ? NAN : INFINITY;
        }
        std::vector<float> weights((size_t) d); // of the channels; now and then all zero, which "model" refuses
        const bool         zero = between(rng, 0, 9) == 0;
        for (float & weight : weights) {
            weight = zero ? 0.0f : (float) between(rng, 0, 5);
        }
        const std::vector<float> semantic = features(rng, (size_t) n, 1.0f);
        std::vector<float>       e((size_t) n), r((size_t) n), q((size_t) n), p((size_t) n), s((size_t) n);
        const bool               with = between(rng, 0, 1) != 0;
        qap_scores               out  = { e.data(), r.data(), q.data(), p.data(), s.data(), 0.0f };
        if (qap_score(x.data(), n, d, with ? semantic.data() : nullptr, weights.data(), &params, nullptr, 1, &out) !=
            0) {
            CHECK(std::strlen(qap_last_error()) > 0);
            refused++;
            continue;
        }
        CHECK(std::strlen(qap_last_error()) == 0);
        for (const float value : s) {
            CHECK(value >= -1e-6f && value <= 1.0f + 1e-6f);
        }
        // selection and merging of what was scored
        std::vector<float> cosines((size_t) n * (size_t) n);
        CHECK(qap_cosines(x.data(), n, d, nullptr, 1, cosines.data()) == 0);
        const int32_t        n_keep = between(rng, 1, n);
        std::vector<int32_t> indices((size_t) n_keep);
        CHECK(
            qap_select(s.data(), cosines.data(), n, n_keep, any_id(rng, "select"), (uint64_t) i, indices.data()) == 0);
        for (int32_t k = 0; k < n_keep; k++) {
            CHECK(indices[(size_t) k] > (k > 0 ? indices[(size_t) k - 1] : -1) && indices[(size_t) k] < n);
        }
        std::vector<int32_t> table((size_t) n_keep), rows((size_t) n_keep); // dpp in both ways
        CHECK(qap_select(s.data(), cosines.data(), n, n_keep, QAP_SELECT_DPP, 0, table.data()) == 0);
        CHECK(qap_select_by_rows(x.data(), s.data(), n, d, n_keep, 1, rows.data()) == 0);
        CHECK(table == rows);
        std::vector<float> merged((size_t) n_keep * (size_t) d);
        CHECK(qap_merge_average(x.data(), cosines.data(), n, d, indices.data(), n_keep, merged.data()) == 0);
    }
    return refused;
}

// Pieces with planes, special rows, padding and signals of any kind: what is kept is in order, and no padding.
static void test_pruning(generator & rng, int rounds) {
    for (int i = 0; i < rounds; i++) {
        const int32_t        n_rows = between(rng, 1, 60), n_planes = between(rng, 1, 3);
        const int32_t        width = n_planes * between(rng, 1, 12);
        std::vector<int32_t> special, padding;
        for (int32_t row = 0; row + 1 < n_rows; row++) {
            if (between(rng, 0, 5) == 0) {
                special.push_back(row);
            }
        }
        const int32_t n_tokens  = n_rows - (int32_t) special.size();
        const bool    none_left = between(rng, 0, 9) == 0;
        for (int32_t token = 0; token < n_tokens; token++) {
            if (none_left || between(rng, 0, 3) == 0) {
                padding.push_back(token);
            }
        }
        std::vector<float> rows((size_t) (n_rows * width)), signal((size_t) n_tokens);
        for (float & value : rows) {
            value = (float) between(rng, -100, 100) / 7.0f;
        }
        for (float & value : signal) {
            value = (float) between(rng, 0, 9);
        }
        const float * given         = between(rng, 0, 1) == 0 ? nullptr : signal.data();
        qap_piece     piece         = { rows.data(),    n_rows,
                                        width,          n_planes,
                                        special.data(), (int32_t) special.size(),
                                        padding.data(), (int32_t) padding.size(),
                                        given,          given,
                                        given,          QAP_SEMANTIC_TEXT,
                                        nullptr,        {} };
        qap_params    p             = qap_params_default();
        p.select                    = any_id(rng, "select");
        p.merge                     = between(rng, 0, 1);
        const int32_t        n_real = n_tokens - (int32_t) padding.size(), n_keep = between(rng, 0, n_real);
        const size_t         n_kept = (size_t) n_keep + special.size();
        std::vector<int32_t> indices((size_t) n_keep), kept(n_kept);
        std::vector<float>   total((size_t) n_tokens, NAN), out(n_kept * (size_t) width);
        piece.dropped.count = between(rng, 0, piece.n_padding);
        std::vector<float> dropped((size_t) piece.dropped.count), near((size_t) (n_real * piece.dropped.count) + 1);
        for (std::vector<float> * values : { &dropped, &near }) {
            for (float & value : *values) {
                value = (float) between(rng, -8, 8) / 8.0f;
            }
        }
        piece.dropped       = { piece.dropped.count, dropped.data(), near.data() };
        qap_pruned pruned   = {};
        pruned.indices      = indices.data();
        pruned.kept         = kept.data();
        pruned.rows         = out.data();
        pruned.scores.total = total.data();
        CHECK(qap_prune(&piece, &p, n_keep, nullptr, 1, &pruned) == 0);
        CHECK(std::is_sorted(indices.begin(), indices.end()) && std::is_sorted(kept.begin(), kept.end()));
        for (const int32_t token : indices) {
            CHECK(token >= 0 && token < n_tokens && !std::binary_search(padding.begin(), padding.end(), token));
        }
        for (int32_t token = 0; token < n_tokens; token++) {
            const bool left_out = std::binary_search(padding.begin(), padding.end(), token);
            CHECK(left_out ? total[(size_t) token] == 0.0f : std::isfinite(total[(size_t) token]));
        }
        CHECK(qap_prune(&piece, &p, n_real + 1, nullptr, 1, &pruned) == -1);
        piece.dropped.count = piece.n_padding + 1;
        CHECK(qap_prune(&piece, &p, n_keep, nullptr, 1, &pruned) == -1);
        CHECK(qap_kept_rows(n_tokens, special.data(), piece.n_special, indices.data(), n_keep, kept.data()) == 0);
    }
}

static void test_bad_arguments() {
    std::vector<float>   x(12, 1.0f), s(3, 0.5f), nan(3, NAN);
    std::vector<int32_t> i(3, 0);
    qap_params           good = qap_params_default(), bad = good;
    qap_scores           out = {};
    CHECK(qap_score(nullptr, 3, 4, nullptr, nullptr, &good, nullptr, 1, &out) == -1);
    CHECK(qap_score(x.data(), 0, 4, nullptr, nullptr, &good, nullptr, 1, &out) == -1);
    CHECK(qap_score(x.data(), 3, -1, nullptr, nullptr, &good, nullptr, 1, &out) == -1);
    CHECK(qap_score(x.data(), 3, 4, nan.data(), nullptr, &good, nullptr, 1, &out) == -1);
    CHECK(qap_score(x.data(), 3, 4, nullptr, nullptr, nullptr, nullptr, 1, &out) == -1);
    CHECK(qap_score(x.data(), 3, 4, nullptr, nullptr, &good, "no such device", 1, &out) == -1);
    CHECK(qap_score(x.data(), 3, 4, nullptr, nullptr, &good, nullptr, 1, &out) == 0); // outputs may all be missing
    for (const int32_t id : { -1, 1, 9, 99, 100, 101, 1000000, INT32_MIN, INT32_MAX }) {
        bad       = good;
        bad.error = id;
        CHECK(qap_score(x.data(), 3, 4, nullptr, nullptr, &bad, nullptr, 1, &out) == -1);
    }
    bad       = good;
    bad.error = QAP_ERROR_MODEL;
    std::vector<float> weights(4, 0.0f);
    CHECK(qap_score(x.data(), 3, 4, nullptr, weights.data(), &bad, nullptr, 1, &out) == -1);
    weights[2] = 1e-40f;
    CHECK(qap_score(x.data(), 3, 4, nullptr, weights.data(), &bad, nullptr, 1, &out) == 0);
    for (const float wrong : { -1.0f, NAN, INFINITY }) {
        weights[1] = wrong;
        CHECK(qap_score(x.data(), 3, 4, nullptr, weights.data(), &bad, nullptr, 1, &out) == -1);
    }
    bad            = good;
    bad.group_size = 0;
    CHECK(qap_params_check(&bad) == -1);
    bad.group_size = INT32_MAX;
    CHECK(qap_score(x.data(), 3, 4, nullptr, nullptr, &bad, nullptr, 1, &out) == 0);
    CHECK(qap_select(s.data(), nullptr, 3, 0, QAP_SELECT_TOPK, 0, i.data()) == -1);
    CHECK(qap_select(s.data(), nullptr, 3, 4, QAP_SELECT_TOPK, 0, i.data()) == -1);
    CHECK(qap_select(nullptr, nullptr, 3, 1, QAP_SELECT_TOPK, 0, i.data()) == -1);
    CHECK(qap_select(s.data(), nullptr, 3, 1, QAP_SELECT_DPP, 0, i.data()) == -1);
    CHECK(qap_select(nan.data(), nullptr, 3, 1, QAP_SELECT_TOPK, 0, i.data()) == -1);
    CHECK(qap_select(s.data(), nullptr, 3, 1, 77, 0, i.data()) == -1);
    i = { 2, 1, 0 };
    CHECK(qap_merge_average(x.data(), x.data(), 3, 4, i.data(), 3, x.data()) == -1);
    bad        = good;
    bad.n_keep = 7;
    CHECK(qap_params_count(&bad, 3) == 3 && qap_params_count(&bad, 8) == 7);
    CHECK(qap_params_count(&good, 0) == -1 && qap_params_count_early(&good, 0) == -1);
    CHECK(qap_params_count_early(&good, 9) == 9);
    bad.encoder_keep = 0.5;
    CHECK(qap_params_count_early(&bad, 9) == 5 && qap_params_count(&bad, 9) == 5 && qap_params_count(&bad, 99) == 7);
    bad.encoder_keep = 0.0;
    CHECK(qap_params_check(&bad) == -1);
    for (const int32_t level : { -2, -1, 0, 255, 256 }) {
        bad                 = good;
        bad.skip_flat_tiles = bad.duplicates = level;
        CHECK(qap_params_check(&bad) == (level >= -1 && level <= 255 ? 0 : -1));
        bad.encoder_keep = 0.5; // duplicates are left out before the first layer, or others after a later one
        CHECK(qap_params_check(&bad) == (level == -1 ? 0 : -1));
    }
}

static void test_parameters(generator & rng) {
    qap_params got = {}, params = qap_params_default();
    CHECK(!qap_default_get(&got));
    CHECK(!qap_params_active(nullptr, got));
    for (int32_t k = 1; k <= 500; k++) {
        params.n_keep = k;
        CHECK(qap_override_push(k % 7 == 0 ? nullptr : &params) == 0);
    }
    for (int32_t k = 500; k >= 1; k--) {
        CHECK(qap_params_active(nullptr, got) == (k % 7 != 0));
        CHECK(k % 7 == 0 || got.n_keep == k);
        qap_override_pop();
    }
    qap_override_pop(); // one more than was pushed
    CHECK(!qap_params_active(nullptr, got));

    // qap.* keys of any type with any value: parameters or an exception
    const char * const keys[] = { "qap.version",         "qap.keep_ratio",   "qap.n_keep",        "qap.alpha",
                                  "qap.alpha_dynamic",   "qap.error",        "qap.group_size",    "qap.outlier",
                                  "qap.outlier_weight",  "qap.semantic",     "qap.select",        "qap.positions",
                                  "qap.merge",           "qap.encoder_keep", "qap.encoder_layer", "qap.channel_weights",
                                  "qap.skip_flat_tiles", "qap.duplicates" };
    const char * const words[] = { "dpp", "model", "\xff\n%s%n" };
    const float        reals[] = { 0.0f, 0.5f, 1.0f, -1.0f, 1e30f, NAN, INFINITY };
    int                found = 0, refused = 0;
    for (int i = 0; i < 3000; i++) {
        const gguf_context_ptr gguf(gguf_init_empty());
        gguf_set_val_u32(gguf.get(), "qap.version", 1);
        for (int k = between(rng, 0, 5); k > 0; k--) {
            const char * key = keys[between(rng, 0, 17)];
            switch (between(rng, 0, 5)) {
                case 0: gguf_set_val_u32(gguf.get(), key, (uint32_t) between(rng, -2, 3)); break;
                case 1: gguf_set_val_f32(gguf.get(), key, reals[between(rng, 0, 6)]); break;
                case 2: gguf_set_val_str(gguf.get(), key, words[between(rng, 0, 2)]); break;
                case 3: gguf_set_val_bool(gguf.get(), key, true); break;
                case 4:
                    gguf_set_arr_data(gguf.get(), key, GGUF_TYPE_FLOAT32, reals, (size_t) between(rng, 0, 7));
                    break;
                default: gguf_set_val_i64(gguf.get(), key, INT64_MIN); break;
            }
        }
        try {
            const auto file = qap_params_from_gguf(gguf.get(), "a file");
            CHECK(file && qap_params_check(file.get()) == 0);
            found++;
        } catch (const std::runtime_error &) {
            refused++;
        }
    }
    CHECK(found > 100 && refused > 100);
}

// Planted, for tools/build/sanitize.py to see that reports are made: one float too few.
static void overrun() {
    const std::vector<float> x(12, 1.0f);
    std::vector<float>       s(2);
    const qap_params         params = qap_params_default();
    qap_scores               out    = {};
    out.total                       = s.data();
    qap_score(x.data(), 3, 4, nullptr, nullptr, &params, nullptr, 1, &out);
}

int main(int argc, char ** argv) {
    if (argc > 1 && std::strcmp(argv[1], "overrun") == 0) {
        overrun();
        return 0;
    }
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 400;
    generator rng(20);
    test_bad_arguments();
    test_parameters(rng);
    test_pruning(rng, rounds);
    const int refused = test_scores(rng, rounds);
    CHECK(refused < rounds);
    std::printf("%d random features (%d refused), 3000 sets of keys\n", rounds, refused);
    return 0;
}
