// check-scores.cpp: qap_score() and qap_cosines() on a device against the CPU, and what they cost on the device when the
// features lie there already, as after the encoder.
#include "checks.h"
#include "compare.h"
#include "device.h"
#include "scorers/scorers.h"

#include <chrono>
#include <random>
#include <stdexcept>

static const double LIMIT = 1e-6; // NMSE in f32

struct features {
    std::vector<float> x;         // [n_tokens, n_embd], rows of different sizes
    std::vector<float> relevance; // [n_tokens]
    std::vector<float> weights;   // [n_embd], of the channels
};

static features make_features(int n_tokens, int n_embd) {
    std::mt19937                     random(20265);
    std::normal_distribution<float>  normal;
    std::uniform_real_distribution<> size(0.2, 1.0);
    std::gamma_distribution<float>   gamma(0.5f);
    features                         out;
    for (int i = 0; i < n_tokens; i++) {
        const float scale = (float) size(random);
        for (int j = 0; j < n_embd; j++) {
            out.x.push_back(scale * normal(random));
        }
        out.relevance.push_back(gamma(random));
    }
    for (int j = 0; j < n_embd; j++) {
        out.weights.push_back(gamma(random));
    }
    return out;
}

struct score_arrays {
    std::vector<float> error, outlier, sensitivity, semantic, total;
};

// False when the device has no kernel for one of the nodes: qap_last_error() says which.
static bool run_scores(
    const features & in, int n_tokens, int n_embd, const qap_params & params, ggml_backend_dev_t device, int n_threads,
    score_arrays & out) {
    for (auto * array : { &out.error, &out.outlier, &out.sensitivity, &out.semantic, &out.total }) {
        array->assign((size_t) n_tokens, 0.0f);
    }
    qap_scores to = { out.error.data(),    out.outlier.data(), out.sensitivity.data(),
                      out.semantic.data(), out.total.data(),   0.0f };
    return qap_score(
               in.x.data(), n_tokens, n_embd, in.relevance.data(), in.weights.data(), &params,
               ggml_backend_dev_name(device), n_threads, &to) == 0;
}

ordered_json check_scorers(check_state & state, int n_tokens, int n_embd) {
    const features                                  in = make_features(n_tokens, n_embd);
    std::vector<std::pair<std::string, qap_params>> cases;
    for (int32_t id = 0; id < QAP_ERROR_GGML + GGML_TYPE_COUNT; id++) {
        const char * name = qap_name_from_id("error", id);
        if (name != nullptr) {
            cases.emplace_back(name, qap_params_default());
            cases.back().second.error = id;
        }
    }
    for (const char * name : { "absmax", "crest" }) {
        cases.emplace_back(name, qap_params_default());
        cases.back().second.outlier = qap_id_from_name("outlier", name);
    }
    cases.emplace_back("dynamic alpha", qap_params_default());
    cases.back().second.alpha_dynamic = true;

    ordered_json out = ordered_json::array();
    for (const auto & [name, params] : cases) {
        progress("score: " + name);
        score_arrays want, got;
        if (!run_scores(in, n_tokens, n_embd, params, state.cpu, state.n_threads, want)) {
            throw std::runtime_error(std::string("scores on the CPU: ") + qap_last_error());
        }
        if (!run_scores(in, n_tokens, n_embd, params, state.device, state.n_threads, got)) {
            out.push_back(
                {
                    { "name",     name             },
                    { "cpu_only", qap_last_error() }
            });
            continue;
        }
        const double worst = std::max(
            { nmse(want.error, got.error), nmse(want.outlier, got.outlier), nmse(want.sensitivity, got.sensitivity),
              nmse(want.semantic, got.semantic), nmse(want.total, got.total) });
        out.push_back(
            {
                { "name", name  },
                { "nmse", worst }
        });
        state.expect_at_most("scores with " + name, worst, LIMIT);
    }
    progress("cosines");
    std::vector<float> want((size_t) n_tokens * n_tokens), got(want.size());
    for (auto & [device, to] : { std::pair(state.cpu, &want), std::pair(state.device, &got) }) {
        if (qap_cosines(in.x.data(), n_tokens, n_embd, ggml_backend_dev_name(device), state.n_threads, to->data()) !=
            0) {
            throw std::runtime_error(std::string("cosines: ") + qap_last_error());
        }
    }
    out.push_back(
        {
            { "name", "cosines" },
            { "nmse", nmse(want, got) }
    });
    state.expect_at_most("cosines", nmse(want, got), LIMIT);
    return out;
}

using clock_type = std::chrono::steady_clock;

static double ms_between(clock_type::time_point a, clock_type::time_point b) {
    return std::chrono::duration<double, std::milli>(b - a).count();
}

// One method over resident features: the graph with its arrays, then the selection with its rows.
static ordered_json time_method(
    check_state & state, const features & in, int n_tokens, int n_embd, int n_keep, int32_t selector) {
    const bool   cosines = qap_selector_needs_cosines(selector);
    qap_params   params  = qap_params_default();
    device_graph graph;
    if (graph.open_device(ggml_backend_dev_name(state.device), state.n_threads, 512) != 0) {
        throw std::runtime_error(qap_last_error());
    }
    ggml_tensor *         x     = graph.input(GGML_TYPE_F32, n_embd, n_tokens);
    ggml_tensor *         p     = graph.input(GGML_TYPE_F32, n_tokens, 1);
    const qap_score_nodes nodes = qap_build_scores(graph.ctx.get(), x, p, nullptr, params);
    ggml_tensor *         table = cosines ? qap_build_cosines(graph.ctx.get(), x) : nullptr;
    ggml_set_output(x); // an input that is an output too is not written over: it serves every round
    ggml_set_output(p);
    qap_expand_scores(graph.gf, nodes);
    if (cosines) {
        ggml_set_output(table);
        ggml_build_forward_expand(graph.gf, table);
    }
    if (graph.allocate() != 0) {
        throw std::runtime_error(qap_last_error());
    }
    ggml_backend_tensor_set(x, in.x.data(), 0, ggml_nbytes(x));
    ggml_backend_tensor_set(p, in.relevance.data(), 0, ggml_nbytes(p));

    std::vector<double>  score_ms, select_ms;
    std::vector<float>   total((size_t) n_tokens), others((size_t) n_tokens);
    std::vector<float>   pairs(cosines ? (size_t) n_tokens * n_tokens : 0);
    std::vector<float>   rows((size_t) n_keep * n_embd);
    std::vector<int32_t> indices((size_t) n_keep);
    int64_t              bytes = 0;
    for (int round = 0; round <= state.rounds * 4; round++) { // the first is a warm-up
        const int64_t before = qap_bytes_read();
        const auto    start  = clock_type::now();
        if (graph.run() != 0) {
            throw std::runtime_error(qap_last_error());
        }
        for (ggml_tensor * node : { nodes.error, nodes.outlier, nodes.sensitivity, nodes.semantic }) {
            qap_read_floats(node, others.data());
        }
        qap_read_floats(nodes.total, total.data());
        qap_read_floats(table, pairs.data());
        const auto scored = clock_type::now();
        if (qap_select(total.data(), pairs.data(), n_tokens, n_keep, selector, 0, indices.data()) != 0) {
            throw std::runtime_error(qap_last_error());
        }
        for (int i = 0; i < n_keep; i++) {
            qap_read_bytes(x, rows.data() + (size_t) i * n_embd, (size_t) indices[i] * x->nb[1], x->nb[1]);
        }
        const auto done = clock_type::now();
        bytes           = qap_bytes_read() - before;
        if (round > 0) {
            score_ms.push_back(ms_between(start, scored));
            select_ms.push_back(ms_between(scored, done));
        }
    }
    return {
        { "score_ms",      median(score_ms)  },
        { "select_ms",     median(select_ms) },
        { "bytes_to_host", bytes             }
    };
}

ordered_json time_scores(check_state & state, int n_tokens, int n_embd, int n_keep) {
    progress("time of score and selection");
    const features in  = make_features(n_tokens, n_embd);
    ordered_json   out = {
        { "n_tokens", n_tokens },
        { "n_embd",   n_embd   },
        { "n_keep",   n_keep   }
    };
    for (const char * name : { "topk", "dpp" }) {
        out[name] = time_method(state, in, n_tokens, n_embd, n_keep, qap_id_from_name("select", name));
    }
    return out;
}
