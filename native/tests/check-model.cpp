// check-model.cpp: a pair of model files on a device against the CPU: features, scores, selections, what is copied to the
// host, logits, answers; and times of encode and prefill.
#include "checks.h"
#include "compare.h"
#include "mirror-device.h"

#include <cmath>

// What pruning is asked for; K is an eighth of the tokens.
struct prune_case {
    const char * name;
    const char * select;
    const char * semantic;
    const char * error;
    bool         dynamic;
};

static const prune_case CASES[] = {
    { "topk",                "topk",     "auto",      "int4", false },
    { "topk, attention",     "topk",     "attention", "int4", false },
    { "topk, dynamic alpha", "topk",     "none",      "int8", true  },
    { "topk, q8_0",          "topk",     "cls",       "q8_0", false },
    { "dpp",                 "dpp",      "auto",      "int4", false },
    { "divprune",            "divprune", "auto",      "int4", false },
};

static qap_params make_params(const prune_case & from, int32_t n_total) {
    qap_params params    = qap_params_default();
    params.n_keep        = std::max(1, n_total / 8);
    params.select        = qap_id_from_name("select", from.select);
    params.semantic      = qap_id_from_name("semantic", from.semantic);
    params.error         = qap_id_from_name("error", from.error);
    params.alpha_dynamic = from.dynamic;
    return params;
}

static bool is_mirror(ggml_backend_dev_t device) {
    return std::string(ggml_backend_dev_name(device)) == "Mirror0";
}

// Whether the device's selection is the CPU's, as far as the noise of the scores lets it be.
static bool same_selection(
    check_state & state, const prune_case & from, const encoded & want, const encoded & got, int n_embd,
    const std::vector<float> & features) {
    if (want.indices == got.indices) {
        return true;
    }
    const std::vector<float> & scores = want.arrays.at("total");
    const double               noise  = largest_difference(scores, got.arrays.at("total"));
    if (std::string(from.select) == "topk") {
        return differs_at_the_border_only(scores, want.indices, got.indices, noise);
    }
    // greedy choices cascade: compare what was reached. divprune is greedy over distances alone
    std::vector<float> cosines((size_t) want.n_total * want.n_total);
    if (want.indices.size() != got.indices.size() ||
        qap_cosines(features.data(), want.n_total, n_embd, nullptr, state.n_threads, cosines.data()) != 0) {
        return false;
    }
    const std::vector<float> ones((size_t) want.n_total, 1.0f);
    const auto &             weights = std::string(from.select) == "dpp" ? scores : ones;
    const double             reached = dpp_objective(weights, cosines, want.indices);
    const double             other   = dpp_objective(weights, cosines, got.indices);
    return std::fabs(reached - other) <= 1e-2 * (1.0 + std::fabs(reached));
}

static ordered_json check_prune(
    check_state & state, const model_case & model, const prune_case & from, device_model & cpu, device_model & device,
    const picture & image, const std::vector<float> & features, encoded & kept) {
    progress(model.name + ": " + from.name);
    const qap_params params = make_params(from, (int32_t) (features.size() / (size_t) cpu.n_embd));
    const encoded    want   = cpu.encode(image, how::prune, params);
    mirror_reset();
    const encoded        got     = device.encode(image, how::prune, params);
    const mirror_traffic traffic = mirror_count();
    const std::string    what    = model.name + ", " + from.name;

    double worst = 0.0;
    for (const auto & [name, values] : want.arrays) {
        const auto found = got.arrays.find(name);
        const auto error = found == got.arrays.end() ? INFINITY : nmse(values, found->second);
        worst            = std::isnan(error) ? error : std::max(worst, error);
    }
    state.expect_at_most(what + ": scores", worst, model.encoder_limit);
    const bool same = same_selection(state, from, want, got, cpu.n_embd, features);
    state.expect(what + ": selection", same);

    const int64_t n        = want.n_total;
    const bool    pairs    = qap_selector_needs_cosines(params.select);
    const int64_t expected = 4 * ((int64_t) params.n_keep * cpu.n_embd + n * (int64_t) got.arrays.size() +
                                  (pairs ? n * n : 0) + (from.dynamic ? 1 : 0));
    state.expect(what + ": bytes to the host", got.bytes_read == expected);
    ordered_json out = {
        { "name", from.name },
        { "n_keep", params.n_keep },
        { "nmse", worst },
        { "indices_that_differ", symmetric_difference(want.indices, got.indices).size() / 2 },
        { "bytes_to_host", got.bytes_read },
        { "bytes_of_all_rows", 4 * n * cpu.n_embd },
    };
    if (is_mirror(state.device)) {
        out["bytes_seen_by_the_device"] = traffic.to_host;
        state.expect(what + ": bytes seen by the device", traffic.to_host == expected);
        state.expect(what + ": no copy of all rows", traffic.largest < 4 * n * cpu.n_embd);
    }
    kept = want;
    return out;
}

static ordered_json check_logits(
    check_state & state, const model_case & model, const std::string & name, device_model & cpu, device_model & device,
    const encoded & image, const std::vector<int32_t> & indices) {
    progress(model.name + ": logits, " + name);
    cpu.prefill(image, image.rows, indices, state.n_text);
    device.prefill(image, image.rows, indices, state.n_text);
    const double error = nmse(cpu.logits, device.logits);
    state.expect_at_most(model.name + ": logits, " + name, error, model.logits_limit);
    const auto best = [](const std::vector<float> & v) { return std::max_element(v.begin(), v.end()) - v.begin(); };
    state.expect(model.name + ": logits that say something", rms(cpu.logits) > 1e-3);
    return {
        { "name",             name                                    },
        { "nmse",             error                                   },
        { "rms",              rms(cpu.logits)                         },
        { "same_first_token", best(cpu.logits) == best(device.logits) }
    };
}

ordered_json check_model(check_state & state, const model_case & model) {
    device_model::options options;
    options.n_threads  = state.n_threads;
    options.flash_attn = model.flash_attn;
    progress(model.name + ": loading");
    device_model cpu(model.files, state.cpu, options);
    options.watch_nodes = true;
    device_model  device(model.files, state.device, options);
    const picture image = noise_picture(model.side);

    const encoded want = cpu.encode(image, how::capture);
    const encoded got  = device.encode(image, how::capture);
    ordered_json  out  = {
        { "name", model.name },
        { "limit", model.encoder_limit },
        { "n_tokens", want.n_total },
        { "features_rms", rms(want.rows) },
        { "features_nmse", nmse(want.rows, got.rows) },
    };
    state.expect_at_most(model.name + ": features", nmse(want.rows, got.rows), model.encoder_limit);
    for (const auto & [name, values] : want.arrays) {
        const auto found    = got.arrays.find(name);
        const auto error    = found == got.arrays.end() ? INFINITY : nmse(values, found->second);
        out[name + "_nmse"] = error;
        state.expect_at_most(model.name + ": " + name, error, model.encoder_limit);
    }
    encoded kept, topk;
    out["prune"] = ordered_json::array();
    for (const prune_case & from : CASES) {
        out["prune"].push_back(check_prune(state, model, from, cpu, device, image, want.rows, kept));
        topk = topk.chunk == nullptr ? kept : topk;
    }
    out["encoder_nodes_that_the_device_cannot_run"] = device.unsupported;
    out["logits"] = { check_logits(state, model, "dense", cpu, device, want, {}),
                      check_logits(state, model, "pruned", cpu, device, topk, topk.indices) };
    return out;
}

ordered_json check_answers(
    check_state & state, const model_files & files, const std::string & sample,
    const std::vector<std::string> & questions) {
    progress("answers of the packaged model");
    device_model::options options;
    options.n_threads = state.n_threads;
    device_model cpu(files, state.cpu, options);
    device_model device(files, state.device, options);
    qap_params   topk = qap_params_default();
    topk.n_keep       = 18;
    topk.select       = qap_id_from_name("select", "topk");
    qap_params dpp    = topk;
    dpp.select        = qap_id_from_name("select", "dpp");
    int equal = 0, total = 0;
    for (const std::string & question : questions) {
        for (const qap_params * params :
             { (const qap_params *) nullptr, (const qap_params *) &topk, (const qap_params *) &dpp }) {
            const std::string want = cpu.answer(sample, question, params);
            const std::string got  = device.answer(sample, question, params);
            total++;
            equal += want == got ? 1 : 0;
            state.expect(
                "answer to '" + question + "': '" + want + "', got '" + got + "'", want == got && !want.empty());
        }
    }
    return {
        { "questions", questions.size() },
        { "answers",   total            },
        { "equal",     equal            }
    };
}

ordered_json check_choice(check_state & state, const model_files & files) {
    ordered_json out = ordered_json::array();
    if (!is_mirror(state.device)) {
        return out;
    }
    const picture         image = noise_picture(192);
    device_model::options options;
    options.n_threads  = state.n_threads;
    options.by_default = true;
    for (const char * name : { "Mirror0", "CPU", (const char *) nullptr }) {
        state.expect("qap_device_set", qap_device_set(name) == 0);
        device_model model(files, state.cpu, options);
        mirror_reset();
        model.encode(image, how::prune, make_params(CASES[0], 144));
        const bool        seen = mirror_count().to_host > 0;
        const std::string set  = name != nullptr ? name : "nothing";
        out.push_back(
            {
                { "set",    set                      },
                { "ran_on", seen ? "Mirror0" : "CPU" }
        });
        state.expect("with " + set + " set, the encoder's device", seen == (set != "CPU")); // upstream: the first GPU
    }
    return out;
}

ordered_json time_model(check_state & state, const model_case & model) {
    progress(model.name + ": times");
    device_model::options options;
    options.n_threads  = state.n_threads;
    options.flash_attn = model.flash_attn;
    device_model  device(model.files, state.device, options);
    const picture image = noise_picture(model.side);

    struct way {
        const char *        name;
        how                 mode;
        qap_params          params;
        std::vector<double> encode_ms, prefill_ms, first_ms, speedup;
    };
    const int32_t n_total = device.encode(image, how::plain).n_total;
    way           ways[]  = {
                  { "dense", how::plain, {}, {}, {}, {}, {} },
                  { "topk", how::prune, make_params(CASES[0], n_total), {}, {}, {}, {} },
                  { "dpp", how::prune, make_params(CASES[4], n_total), {}, {}, {}, {} }
    };
    for (int round = 0; round <= state.rounds; round++) { // the first is a warm-up
        progress(model.name + ": round " + std::to_string(round) + " of " + std::to_string(state.rounds));
        double dense = 0.0;
        for (way & w : ways) {
            const encoded found   = device.encode(image, w.mode, w.params);
            const double  encode  = 1e3 * found.seconds;
            const double  prefill = 1e3 * device.prefill(found, found.rows, found.indices, state.n_text);
            dense                 = w.mode == how::plain ? encode + prefill : dense;
            if (round > 0) {
                w.encode_ms.push_back(encode);
                w.prefill_ms.push_back(prefill);
                w.first_ms.push_back(encode + prefill);
                w.speedup.push_back(dense / (encode + prefill));
            }
        }
    }
    const int32_t n_keep    = ways[1].params.n_keep;
    const double  per_token = median(ways[0].prefill_ms) / (n_total + state.n_text);
    const double  bound     = median(ways[0].encode_ms) + (n_keep + state.n_text) * per_token;
    ordered_json  out       = {
        { "name",     model.name   },
        { "n_tokens", n_total      },
        { "n_keep",   n_keep       },
        { "n_text",   state.n_text },
        { "rounds",   state.rounds }
    };
    for (const way & w : ways) {
        out[w.name] = {
            { "encode_ms",      median(w.encode_ms)  },
            { "prefill_ms",     median(w.prefill_ms) },
            { "first_token_ms", median(w.first_ms)   },
            { "times_dense",    median(w.speedup)    }
        };
    }
    out["bound_ms"]        = bound; // no pruner gets below: the encode, and the kept share of the prefill
    out["topk_over_bound"] = median(ways[1].first_ms) / bound;
    return out;
}
