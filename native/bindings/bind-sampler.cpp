// bind-sampler.cpp: llama_sampler_sample() without its ways to end the process or to sort what is no number. A grammar can
// come to where no token of the vocabulary fits; upstream then takes one anyway, and the grammar aborts on accepting it
// (llama-grammar.cpp, llama_grammar_accept_impl). Here that is an exception before anything is accepted.
#include "bindings.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <vector>

static int32_t sample_checked(uintptr_t lctx, uintptr_t chain_, int32_t idx) {
    auto * const        ctx     = reinterpret_cast<llama_context *>(lctx);
    auto * const        chain   = reinterpret_cast<llama_sampler *>(chain_);
    const int32_t       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    const float * const logits  = llama_get_logits_ith(ctx, idx);
    if (logits == nullptr) {
        throw std::runtime_error("expected logits of the last token, got none");
    }
    if (!std::all_of(logits, logits + n_vocab, [](float logit) { return std::isfinite(logit); })) {
        throw std::runtime_error("expected finite logits, got others; check the language model's file");
    }
    std::vector<llama_token_data> rows((size_t) n_vocab);
    for (int32_t id = 0; id < n_vocab; id++) {
        rows[(size_t) id] = { id, logits[id], 0.0f };
    }
    llama_token_data_array all    = { rows.data(), rows.size(), -1, false };
    const auto             usable = [](const llama_token_data & row) { return row.logit > -INFINITY; };
    bool                   fits   = true;
    {
        const py::gil_scoped_release nogil; // a logits processor takes it back for itself
        for (int32_t i = 0; fits && i < llama_sampler_chain_n(chain); i++) {
            llama_sampler_apply(llama_sampler_chain_get(chain, i), &all);
            fits = std::any_of(all.data, all.data + all.size, usable);
        }
    }
    if (!fits || all.selected < 0 || (size_t) all.selected >= all.size || !usable(all.data[all.selected])) {
        throw py::value_error("no token fits");
    }
    const llama_token token = all.data[all.selected].id;
    llama_sampler_accept(chain, token);
    return token;
}

// Tokens that a prompt ends with, to a grammar whose rules begin with them. Upstream throws where they do not fit.
static void accept_checked(uintptr_t sampler, const std::vector<int32_t> & tokens) {
    for (const int32_t token : tokens) {
        llama_sampler_accept(reinterpret_cast<llama_sampler *>(sampler), token);
    }
}

void register_sampler(py::module_ & m) {
    m.def("accept_checked", &accept_checked, py::arg("sampler"), py::arg("tokens"));
    m.def("sample_checked", &sample_checked, py::arg("lctx"), py::arg("chain"), py::arg("idx"));
}
