// gate-tokenizer.cpp: see gate-tokenizer.h. Exceptions that llama.cpp throws while it tokenizes reach Python through a
// plain C function and end the process, so that what they depend on is checked here. Facts: llama_vocab::impl::load
// and byte_to_token in src/llama-vocab.cpp (llama.cpp 0c1e570).
#include "gate-tokenizer.h"

#include <cstdio>
#include <unordered_set>

namespace qap_gate {

const std::string T = "tokenizer.ggml.";

// every key that load() reads one value from; its loader throws on another type, which is an error and no abort
const char * const IDS[] = { "bos_token_id",     "eos_token_id",       "eot_token_id",     "eom_token_id",
                             "unknown_token_id", "seperator_token_id", "padding_token_id", "mask_token_id" };

// A special token: the file's id where it lies in the vocabulary, else the kind's own, else none (-1).
static int64_t special(const file & f, const char * key, int64_t own, int64_t n) {
    const int64_t id = f.whole(T + key, 0, UINT32_MAX, own < n ? (own < 0 ? UINT32_MAX : own) : UINT32_MAX);
    return id < n ? id : own < n ? own : -1;
}

static void check_ids(const file & f, int64_t own_bos, int64_t own_eos, bool adds_bos, int64_t n) {
    for (const char * key : IDS) {
        f.whole(T + key, 0, UINT32_MAX, 0);
    }
    const int64_t bos = special(f, "bos_token_id", own_bos, n), eos = special(f, "eos_token_id", own_eos, n);
    if (f.flag(T + "add_bos_token", adds_bos) && bos < 0) {
        f.refuse("expected a bos_token_id in the vocabulary to put in front of a prompt, found none");
    }
    if (f.flag(T + "add_eos_token", false) && eos < 0) {
        f.refuse("expected an eos_token_id in the vocabulary to put after a prompt, found none");
    }
}

int64_t check_tokenizer(const file & f) {
    const std::string kind = f.text(T + "model");
    const bool        spm = kind == "llama", bpe = kind == "gpt2" || kind == "gemma4";
    if (!spm && !bpe) {
        f.refuse("expected a tokenizer.ggml.model of llama, gpt2 or gemma4, got another", "take another model");
    }
    f.text(T + "pre");
    f.text("tokenizer.chat_template");
    const std::string tokens = T + "tokens";
    if (!f.has_array(tokens, GGUF_TYPE_STRING) || f.length(tokens) < 1 || f.length(tokens) > (1 << 24)) {
        f.refuse("expected a list of tokens as " + tokens + ", found none");
    }
    const size_t n = f.length(tokens);
    for (const char * list : { "token_type", "suppress_tokens" }) {
        f.has_array(T + list, GGUF_TYPE_INT32);
    }
    if (f.has(T + "token_type") && f.length(T + "token_type") < n) {
        f.refuse("expected a type for each of " + std::to_string(n) + " tokens, got fewer");
    }
    if (f.has(T + "scores") && (!f.is_array(T + "scores") || f.length(T + "scores") < n)) {
        f.refuse("expected a score for each of " + std::to_string(n) + " tokens, got fewer");
    }
    if (bpe && !f.has_array(T + "merges", GGUF_TYPE_STRING) && f.text(T + "pre") != "kimi-k2") {
        f.refuse("expected a list of merges as tokenizer.ggml.merges, found none");
    }

    std::unordered_set<std::string> seen; // llama.cpp asserts that no two tokens are spelled alike
    seen.reserve(n);
    for (size_t i = 0; i < n; i++) {
        std::string text = f.item(tokens, i);
        if (text.empty()) {
            text = "[EMPTY_" + std::to_string(i) + "]"; // as it is renamed there
        }
        if (!seen.insert(text).second) {
            f.refuse("expected tokens that differ, got one twice (the second is number " + std::to_string(i) + ")");
        }
    }
    if (spm) {
        for (int byte = 0; byte < 256; byte++) { // what no token spells is written as bytes
            char name[8];
            std::snprintf(name, sizeof(name), "<0x%02X>", byte);
            if (seen.count(name) == 0 && seen.count(std::string(1, (char) byte)) == 0) {
                f.refuse(std::string("expected a token for each byte, found none for ") + name);
            }
        }
    }
    // the kind's own ids, as load() sets them before it reads the file's
    const int64_t own_bos = spm ? 1 : kind == "gpt2" ? 11 : -1, own_eos = spm ? 2 : kind == "gpt2" ? 11 : -1;
    check_ids(f, own_bos, own_eos, spm || kind == "gemma4", (int64_t) n);
    return (int64_t) n;
}

} // namespace qap_gate
