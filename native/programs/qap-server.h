// qap-server.h: how a request to llama-server says which of its image tokens are kept. 010-server-prune.patch includes it
// in server-common.h and makes a qap_request around the tokenization of each request.
//
// The request's field "prune" is absent (the server's own settings hold), false (all tokens), or an object with the names
// of the qap.* keys: {"n_keep": 64}, {"keep_ratio": 0.25, "select": "dpp"}. What it leaves out is as the server has it.
#pragma once

#include "json.h"
#include "mtmd.h"
#include "qap.h"

#include <stdexcept>
#include <string>

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
            const std::string   text  = value.is_string() ? value.get<std::string>() : value.dump();
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
