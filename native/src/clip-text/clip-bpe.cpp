// clip-bpe.cpp: see clip-bpe.h. Facts: transformers' tokenization_clip.py (normalizer, pattern, order of the steps),
// the byte-level alphabet of GPT-2, and the BPE of the tokenizers library (lowest rank first, then the leftmost).
#include "clip-text/clip-bpe.h"

#include "clip-text/unicode.h"

#include <algorithm>
#include <queue>
#include <stdexcept>

static const char END_OF_WORD[] = "</w>";

// The character that stands for each byte: itself where it can be printed, else the next one from U+0100.
static std::vector<std::string> byte_alphabet() {
    std::vector<std::string> alphabet(256);
    uint32_t                 next = 0x100;
    for (uint32_t byte = 0; byte < 256; byte++) {
        const bool plain = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
        qap_utf8_append(alphabet[byte], plain ? byte : next++);
    }
    return alphabet;
}

void clip_bpe::load(
    const std::vector<std::string> & tokens, const std::vector<std::string> & merges,
    const std::vector<int32_t> & special) {
    std::unordered_map<std::string, int32_t> id_of;
    for (size_t i = 0; i < tokens.size(); i++) {
        if (!tokens[i].empty()) {
            id_of.emplace(tokens[i], (int32_t) i);
        }
    }
    const auto find = [&](const std::string & token) {
        const auto found = id_of.find(token);
        return found != id_of.end() ? found->second : -1;
    };
    first_ids.clear();
    last_ids.clear();
    for (const std::string & letter : byte_alphabet()) {
        const int32_t first = find(letter);
        const int32_t last  = find(letter + END_OF_WORD);
        first_ids.push_back(first >= 0 ? first : unknown);
        last_ids.push_back(last >= 0 ? last : unknown);
    }
    merge_of.clear();
    for (size_t rank = 0; rank < merges.size(); rank++) {
        const std::string & text  = merges[rank];
        const size_t        space = text.find(' ');
        const std::string   left  = text.substr(0, space);
        const std::string   right = space != std::string::npos ? text.substr(space + 1) : "";
        const int32_t       ids[] = { find(left), find(right), find(left + right) };
        if (ids[0] < 0 || ids[1] < 0 || ids[2] < 0) {
            throw std::runtime_error("expected known tokens in merge " + std::to_string(rank) + ", got others");
        }
        const uint64_t pair = (uint64_t) (uint32_t) ids[0] << 32 | (uint32_t) ids[1];
        merge_of[pair]      = { (int32_t) rank, ids[2] }; // the last one wins, as in the tokenizers library
    }
    specials.clear();
    for (const int32_t id : special) {
        if (id < 0 || (size_t) id >= tokens.size() || tokens[(size_t) id].empty()) {
            throw std::runtime_error("expected a text for the special token " + std::to_string(id) + ", found none");
        }
        specials.emplace_back(tokens[(size_t) id], id);
    }
    std::stable_sort(specials.begin(), specials.end(), [](const auto & a, const auto & b) {
        return a.first.size() > b.first.size();
    });
}

std::vector<int32_t> clip_bpe::tokenize(const char * text, size_t n_bytes, size_t max_tokens) const {
    const std::string    whole(text, n_bytes);
    const size_t         limit = max_tokens - 1; // one is left for eos
    std::vector<int32_t> ids   = { bos };
    size_t               begin = 0; // of the text that is not looked at yet
    for (size_t i = 0; i < n_bytes && ids.size() < limit;) {
        const auto at = std::find_if(specials.begin(), specials.end(), [&](const auto & item) {
            return whole.compare(i, item.first.size(), item.first) == 0;
        });
        if (at == specials.end()) {
            i++;
            continue;
        }
        add_text(text + begin, i - begin, limit, ids);
        ids.push_back(at->second);
        i += at->first.size();
        begin = i;
    }
    add_text(text + begin, n_bytes - begin, limit, ids);
    ids.resize(std::min(ids.size(), limit));
    ids.push_back(eos);
    return ids;
}

// --- words ---

namespace {

// CLIP's pattern: a special word, a contraction, letters, one digit, or a run of anything else but white space.
struct word_splitter {
    const qap_codes & codes;

    bool has(size_t at, const char * word) const {
        for (; *word != '\0'; word++, at++) {
            if (at >= codes.size() || codes[at] != (uint32_t) *word) {
                return false;
            }
        }
        return true;
    }

    static bool is_other(uint32_t code) { return !qap_is_space(code) && !qap_is_letter(code) && !qap_is_number(code); }

    // The end of the word that starts at `at`, which is not white space.
    size_t end_of(size_t at) const {
        for (const char * word : { "'s", "'t", "'re", "'ve", "'m", "'ll", "'d" }) {
            if (has(at, word)) {
                return at + std::char_traits<char>::length(word);
            }
        }
        if (qap_is_number(codes[at])) {
            return at + 1;
        }
        const auto in_word = qap_is_letter(codes[at]) ? qap_is_letter : is_other;
        while (at < codes.size() && in_word(codes[at])) {
            at++;
        }
        return at;
    }

    // "<|endoftext|>" is kept from joining what stands around it; the byte-level step cuts it into "<|", letters, "|>"
    size_t end_of_special(size_t at) const {
        for (const char * word : { "<|startoftext|>", "<|endoftext|>" }) {
            if (has(at, word)) {
                return at + std::char_traits<char>::length(word);
            }
        }
        return at;
    }
};

} // namespace

void clip_bpe::add_text(const char * text, size_t n_bytes, size_t limit, std::vector<int32_t> & ids) const {
    const qap_codes     codes = qap_lower(qap_nfc(qap_utf8_decode(text, n_bytes)));
    const word_splitter split = { codes };
    const auto          add   = [&](size_t from, size_t to) {
        std::string bytes;
        for (size_t i = from; i < to; i++) {
            qap_utf8_append(bytes, codes[i]);
        }
        add_word(bytes, ids);
    };
    for (size_t at = 0; at < codes.size() && ids.size() < limit;) {
        if (qap_is_space(codes[at])) {
            at++;
            continue;
        }
        const size_t special = split.end_of_special(at);
        if (special > at) {
            add(at, at + 2);
            add(at + 2, special - 2);
            add(special - 2, special);
            at = special;
            continue;
        }
        const size_t end = split.end_of(at);
        add(at, end);
        at = end;
    }
}

// --- BPE ---

namespace {

struct symbol {
    int32_t id;
    int32_t before; // index of its neighbour, -1 for none
    int32_t after;
    bool    gone;
};

struct candidate {
    int32_t rank;
    int32_t left;
    int32_t id; // what the pair becomes

    bool operator<(const candidate & other) const { // the queue gives the greatest first
        return rank != other.rank ? rank > other.rank : left > other.left;
    }
};

} // namespace

void clip_bpe::add_word(const std::string & bytes, std::vector<int32_t> & ids) const {
    std::vector<symbol> symbols;
    for (size_t i = 0; i < bytes.size(); i++) {
        const auto   byte = (unsigned char) bytes[i];
        const bool   last = i + 1 == bytes.size();
        const symbol next = { last ? last_ids[byte] : first_ids[byte], (int32_t) i - 1, last ? -1 : (int32_t) i + 1,
                              false };
        symbols.push_back(next);
    }
    std::priority_queue<candidate> queue;

    const auto find = [&](int32_t left) {
        const symbol & a = symbols[(size_t) left];
        if (a.after < 0) {
            return merge_of.end();
        }
        return merge_of.find((uint64_t) (uint32_t) a.id << 32 | (uint32_t) symbols[(size_t) a.after].id);
    };
    const auto offer = [&](int32_t left) {
        const auto found = find(left);
        if (found != merge_of.end()) {
            queue.push({ found->second.rank, left, found->second.id });
        }
    };
    for (size_t i = 0; i < symbols.size(); i++) {
        offer((int32_t) i);
    }
    while (!queue.empty()) {
        const candidate best = queue.top();
        queue.pop();
        symbol &   left  = symbols[(size_t) best.left];
        const auto still = left.gone ? merge_of.end() : find(best.left);
        if (still == merge_of.end() || still->second.id != best.id) {
            continue; // one of the two was merged with another in the meantime
        }
        symbol & right = symbols[(size_t) left.after];
        left.id        = best.id;
        left.after     = right.after;
        right.gone     = true;
        if (left.after >= 0) {
            symbols[(size_t) left.after].before = best.left;
        }
        if (left.before >= 0) {
            offer(left.before);
        }
        offer(best.left);
    }
    for (const symbol & item : symbols) {
        if (!item.gone) {
            ids.push_back(item.id);
        }
    }
}
