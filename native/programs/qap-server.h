// qap-server.h: how a request to llama-server says which of its image tokens are kept, and how the answer says which were.
// 010-server-prune.patch includes it in server-common.h and makes a qap_request around the tokenization of each request.
//
// The request's field "prune" is absent (the server's own settings hold), false (all tokens), or an object with the names
// of the qap.* keys: {"n_keep": 64}, {"keep_ratio": 0.25, "select": "dpp"}. What it leaves out is as the server has it.
// "indices": true asks for the numbers of the kept tokens, "scores": true for what they were chosen by.
//
// The answer to a chat with pictures has "prune": {"encode_ms": time of the encoder, 0 where the prompt was in the KV cache,
// "n_cached": how many encodes the cache of pictures saved, "images": [a row for each picture, or each tile of one:
// {"n_tokens", "n_kept", "grid": [columns, lines] where it is known and with it "content": [where the picture lies on it:
// left, top, width, height, in tokens], and where asked for and encoded "indices": [numbers of the kept tokens, line by
// line], "padding": [of the tokens in a letterboxed picture's padding, if there are any], "alpha" and "scores": {"error",
// "outlier", "semantic", "total": [a number for each token, 0 for padding]}}]}.
#pragma once

#include "ggml.h"
#include "json.h"
#include "mtmd.h"
#include "qap.h"
#include "sampling.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

// Scores go out with four digits: 4 x 9 bytes for a token. Beyond this many tokens an answer has none.
constexpr int32_t QAP_MAX_SCORED = 16384;

// What the encodes of an answer took.
struct qap_spent {
    std::atomic<int64_t> encode_us{ 0 };
    std::atomic<int64_t> n_cached{ 0 };
};

// What an answer tells of its pictures; a part of task_params, whose copies share what was spent.
struct qap_answer {
    bool                       with_indices = false;
    bool                       with_scores  = false;
    std::shared_ptr<qap_spent> spent        = std::make_shared<qap_spent>();
    common_json                images       = common_json::array();

    // Note the pictures of a prompt, a server_tokens, that was answered.
    template <class tokens> void look(const tokens & prompt) {
        images   = common_json::array();
        n_scored = 0;
        for (size_t i = 0; i < prompt.size(); i++) {
            if (prompt[i] == LLAMA_TOKEN_NULL) {
                const mtmd_input_chunk * chunk = prompt.find_chunk(i).get();
                i += mtmd_input_chunk_get_n_tokens(chunk) - 1;
                if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) {
                    images.push_back(row_of(chunk));
                }
            }
        }
    }

    void add_to(common_json & result) const {
        if (!images.empty()) {
            result["prune"] = {
                { "encode_ms", (double) spent->encode_us / 1000.0 },
                { "n_cached",  (int64_t) spent->n_cached          },
                { "images",    images                             }
            };
        }
    }

private:
    int32_t n_scored = 0;

    static common_json numbers(const int32_t * from, int32_t n) {
        common_json out = common_json::array();
        for (int32_t i = 0; i < n; i++) {
            out.push_back(from[i]);
        }
        return out;
    }

    static double four_digits(float value) {
        char text[32];
        std::snprintf(text, sizeof(text), "%.4g", (double) value);
        return std::strtod(text, nullptr);
    }

    static common_json numbers(const float * from, int32_t n) {
        common_json out = common_json::array();
        for (int32_t i = 0; from != nullptr && i < n; i++) {
            out.push_back(four_digits(from[i]));
        }
        return out;
    }

    common_json row_of(const mtmd_input_chunk * chunk) {
        common_json row    = common_json::object();
        qap_report  report = {};
        if (qap_chunk_report(chunk, &report) != 0) { // not pruned
            const mtmd_image_tokens * image   = mtmd_input_chunk_get_tokens_image(chunk);
            const size_t              columns = mtmd_image_tokens_get_nx(image);
            const size_t              lines   = mtmd_image_tokens_get_ny(image);
            const size_t              n       = mtmd_input_chunk_get_n_tokens(chunk);
            row["n_tokens"]                   = n;
            row["n_kept"]                     = n;
            if (lines > 1 && columns * lines == n) {
                row["grid"] = common_json::array({ columns, lines });
            }
            return row;
        }
        row["n_tokens"] = report.n_total;
        row["n_kept"]   = report.n_keep;
        if (report.n_columns > 0) {
            row["grid"] = common_json::array({ report.n_columns, report.n_total / report.n_columns });
            if (report.content[2] > 0.0f) {
                row["content"] = numbers(report.content, 4);
            }
        }
        if (with_indices && report.done) {
            row["indices"] = numbers(report.indices, report.n_keep);
        }
        if ((with_indices || with_scores) && report.done && report.n_padding > 0) {
            row["padding"] = numbers(report.padding, report.n_padding);
        }
        if (with_scores && report.total != nullptr && report.n_total <= QAP_MAX_SCORED - n_scored) {
            n_scored += report.n_total;
            row["alpha"]  = four_digits(report.alpha);
            row["scores"] = {
                { "error",    numbers(report.error,    report.n_total) },
                { "outlier",  numbers(report.outlier,  report.n_total) },
                { "semantic", numbers(report.semantic, report.n_total) },
                { "total",    numbers(report.total,    report.n_total) },
            };
        }
        return row;
    }
};

// Adds the time that it lives to an answer's, and the encodes that are saved meanwhile.
class qap_encoding {
public:
    qap_encoding(const qap_answer & answer, const mtmd_context * ctx)
        : spent(answer.spent), ctx(ctx), n_before(n_recalled()), begun(ggml_time_us()) {}

    ~qap_encoding() {
        spent->encode_us += ggml_time_us() - begun;
        spent->n_cached += n_recalled() - n_before;
    }

    qap_encoding(const qap_encoding &)             = delete;
    qap_encoding & operator=(const qap_encoding &) = delete;

private:
    std::shared_ptr<qap_spent> spent;
    const mtmd_context *       ctx;
    int64_t                    n_before;
    int64_t                    begun;

    int64_t n_recalled() const {
        qap_image_cache_state state = {};
        qap_context_image_cache(ctx, &state);
        return state.n_recalled;
    }
};

// Where no token fits a grammar, upstream takes one anyway; accepting an end of the answer then ends the process
// (llama-grammar.cpp, llama_grammar_accept_impl).
inline void qap_check_sample(common_sampler * sampler) {
    const llama_token_data_array * found = common_sampler_get_candidates(sampler, false);
    if (found->selected < 0 || found->data[found->selected].logit == -INFINITY) {
        throw std::runtime_error("no token fits the grammar");
    }
}

// While it lives, pictures that this thread tokenizes are pruned as the request says.
class qap_request {
public:
    qap_request(const mtmd_context * ctx, const common_json & body) {
        if (ctx == nullptr || !body.contains("prune") || body.at("prune").is_null()) {
            return;
        }
        const common_json & asked = body.at("prune");
        if (asked.is_boolean() && !asked.get<bool>()) {
            push(nullptr);
            return;
        }
        if (!asked.is_object()) {
            throw std::invalid_argument("prune: expected an object such as {\"n_keep\": 64}, or false for all tokens");
        }
        qap_params params = {};
        if (qap_context_params(ctx, &params) < 0) {
            throw std::invalid_argument(qap_last_error());
        }
        for (const auto & item : asked.items()) {
            const common_json & value = item.value();
            if (item.key() == "indices" || item.key() == "scores") {
                bool & asked_for = item.key() == "indices" ? answer.with_indices : answer.with_scores;
                asked_for        = value.is_boolean() && value.get<bool>();
                continue;
            }
            const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
            if (qap_params_set(&params, item.key().c_str(), text.c_str()) != 0) {
                throw std::invalid_argument(qap_last_error());
            }
        }
        push(&params);
    }

    ~qap_request() {
        if (pushed) {
            qap_override_pop();
        }
    }

    qap_request(const qap_request &)             = delete;
    qap_request & operator=(const qap_request &) = delete;

    qap_answer answer; // what the request asks to be told

private:
    bool pushed = false;

    void push(const qap_params * params) {
        if (qap_override_push(params) != 0) {
            throw std::invalid_argument(qap_last_error());
        }
        pushed = true;
    }
};

// Why a prompt could not be tokenized, as far as we know it.
inline std::string qap_tokenize_error() {
    const std::string why = qap_last_error();
    return why.empty() ? "Failed to tokenize prompt" : why;
}
