// clip-bpe.h: CLIP's tokenizer: composed and lower-cased text, words by CLIP's pattern, byte-level BPE with </w> at the
// end of a word. Gives the token ids that transformers' CLIPTokenizer gives with truncation.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

struct clip_bpe {
    int32_t bos     = 0;
    int32_t eos     = 0;
    int32_t unknown = 0;

    // tokens[id] is a text in the byte-level alphabet, "" for an id that is not used; merges are "left right", best
    // first; special ids are found in a text verbatim. Throws std::runtime_error with what is wrong.
    void load(
        const std::vector<std::string> & tokens, const std::vector<std::string> & merges,
        const std::vector<int32_t> & special);

    // bos, at most max_tokens - 2 tokens of the text, eos. max_tokens >= 2.
    std::vector<int32_t> tokenize(const char * text, size_t n_bytes, size_t max_tokens) const;

private:
    struct merge {
        int32_t rank;
        int32_t id;
    };

    void add_text(const char * text, size_t n_bytes, size_t limit, std::vector<int32_t> & ids) const;
    void add_word(const std::string & bytes, std::vector<int32_t> & ids) const;

    std::vector<int32_t>                         first_ids; // of a byte inside a word
    std::vector<int32_t>                         last_ids;  // of a byte at its end
    std::unordered_map<uint64_t, merge>          merge_of;  // left id << 32 | right id
    std::vector<std::pair<std::string, int32_t>> specials;  // longest first
};
