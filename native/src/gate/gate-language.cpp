// gate-language.cpp: a language model before llama.cpp loads it. Its loader throws where a tensor's shape is not what
// the hyperparameters say; what it asserts or divides by is checked here, and the types of number, which it takes on
// trust. Facts: llama_model_base::load_hparams in src/llama-model.cpp, src/models/*.cpp (llama.cpp 0c1e570).
#include "gate-file.h"
#include "gate-tokenizer.h"
#include "gate.h"
#include "llama.h"
#include "qap.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace qap_gate {

const int64_t MAX_LAYERS  = 512;  // LLAMA_MAX_LAYERS
const int64_t MAX_EXPERTS = 1024; // LLAMA_MAX_EXPERTS
const int64_t MAX_WIDTH   = 1 << 22;
const int64_t MAX_CONTEXT = 1 << 28;

// Architectures whose blocks are those of LLaMA: attention with heads of one length, rotary positions. rotates_all:
// the graph asserts that the whole head is rotated.
struct known_arch {
    const char * name;
    bool         rotates_all;
    bool         sections; // M-RoPE: rotary positions in four parts
};

const known_arch KNOWN[] = {
    { "llama",     true,  false },
    { "qwen2",     true,  false },
    { "qwen2vl",   true,  true  },
    { "qwen3",     true,  false },
    { "qwen3vl",   true,  true  },
    { "paddleocr", true,  true  },
    { "gemma",     false, false },
    { "gemma2",    false, false },
    { "gemma3",    false, false },
    { "internlm2", true,  false },
    { "phi3",      false, false },
    { "mistral3",  false, false },
    { "smollm3",   true,  false },
};

static const known_arch * find_arch(const std::string & name) {
    for (const known_arch & arch : KNOWN) {
        if (name == arch.name) {
            return &arch;
        }
    }
    return nullptr;
}

// A number, or where the file lists one for each layer, the largest.
static int64_t largest(const file & f, const std::string & key, int64_t low, int64_t high, int64_t fallback) {
    if (!f.has(key) || !f.is_array(key)) {
        return f.whole(key, low, high, fallback);
    }
    return f.largest(key, low, high);
}

struct sizes {
    int64_t n_ctx = 0, n_embd = 0, n_layer = 0, n_head = 0, n_head_kv = 0, n_k = 0, n_v = 0, n_ff = 0;
};

// What load_hparams asserts for every architecture.
static sizes check_counts(const file & f, const std::string & arch) {
    const std::string p = arch + ".";
    sizes             s;
    s.n_ctx   = f.whole(p + "context_length", 1, MAX_CONTEXT);
    s.n_embd  = f.whole(p + "embedding_length", 1, MAX_WIDTH);
    s.n_layer = f.whole(p + "block_count", 1, MAX_LAYERS);
    f.whole(p + "nextn_predict_layers", 0, s.n_layer, 0);
    s.n_ff      = largest(f, p + "feed_forward_length", 0, MAX_WIDTH, 0);
    s.n_head    = largest(f, p + "attention.head_count", 0, MAX_WIDTH, 0);
    s.n_head_kv = largest(f, p + "attention.head_count_kv", 0, MAX_WIDTH, s.n_head);

    const int64_t n_expert = f.whole(p + "expert_count", 0, MAX_EXPERTS, 0);
    const int64_t n_used   = largest(f, p + "expert_used_count", 0, n_expert, 0);
    const int64_t n_groups = f.whole(p + "expert_group_count", 0, std::max<int64_t>(0, n_expert - 1), 0);
    const int64_t n_chosen = f.whole(p + "expert_group_used_count", 0, MAX_EXPERTS, 0);
    if (n_expert > 0 && n_used == 0) {
        f.refuse("expected " + p + "expert_used_count from 1, got 0");
    }
    if (n_groups > 1 && (n_expert % n_groups != 0 || n_chosen < 1 || n_chosen >= n_groups)) {
        f.refuse("expected groups that experts share evenly, got " + std::to_string(n_groups));
    }
    const std::string scaling = f.text(p + "rope.scaling.type");
    if (!scaling.empty() && scaling != "none" && scaling != "linear" && scaling != "yarn" && scaling != "longrope") {
        f.refuse("expected rope.scaling.type none, linear, yarn or longrope, got another");
    }
    for (const char * factor : { "rope.scaling.factor", "rope.scale_linear" }) {
        f.real(p + factor, 0.0, 1e9);
    }
    f.real(p + "rope.freq_base", 1e-3, 1e12);
    for (const char * number : { "rope.scaling.attn_factor", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier",
                                 "attention.scale", "attention.clamp_kqv", "logit_scale", "residual_scale",
                                 "embedding_scale", "attn_logit_softcapping", "final_logit_softcapping" }) {
        f.real(p + number, -1e9, 1e9);
    }
    for (const char * eps : { "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon" }) {
        f.real(p + eps, 0.0, 1.0);
    }
    f.whole(p + "attention.sliding_window", 0, MAX_CONTEXT, 0);
    return s;
}

static void check_sections(const file & f, const std::string & key, int64_t d_head) {
    if (!f.has_array(key, GGUF_TYPE_INT32) || f.length(key) < 3 || f.length(key) > 4) {
        f.refuse("expected 3 or 4 numbers as " + key + ", got another");
    }
    const auto * part = static_cast<const int32_t *>(f.data(key));
    int64_t      sum = 0, first = 0;
    for (size_t i = 0; i < f.length(key); i++) {
        if (part[i] < 0 || part[i] > d_head) {
            f.refuse("expected " + key + " in 0.." + std::to_string(d_head) + ", got " + std::to_string(part[i]));
        }
        sum += part[i];
        first += i < 3 ? part[i] : 0;
    }
    if (first < 1 || 2 * sum > d_head) {
        f.refuse("expected " + key + " to share half of a head, got " + std::to_string(sum));
    }
}

static void check_heads(const file & f, const known_arch & arch, sizes & s) {
    const std::string p = std::string(arch.name) + ".";
    for (const char * count : { "attention.head_count", "attention.head_count_kv", "feed_forward_length" }) {
        if (f.has(p + count) && f.is_array(p + count)) {
            f.refuse("expected one number as " + p + count + ", got a list");
        }
    }
    f.whole(p + "attention.head_count", 1, MAX_WIDTH);
    f.whole(p + "attention.head_count_kv", 1, s.n_head, s.n_head);
    f.whole(p + "feed_forward_length", 1, MAX_WIDTH);
    if (s.n_head % s.n_head_kv != 0) {
        f.refuse(
            "expected key heads that divide " + std::to_string(s.n_head) + " heads, got " +
            std::to_string(s.n_head_kv));
    }
    if (s.n_embd % s.n_head != 0 && !(f.has(p + "attention.key_length") && f.has(p + "attention.value_length"))) {
        f.refuse(
            "expected an embedding length that " + std::to_string(s.n_head) + " heads share, got " +
            std::to_string(s.n_embd));
    }
    s.n_k = f.whole(p + "attention.key_length", 2, MAX_WIDTH, s.n_embd / s.n_head);
    s.n_v = f.whole(p + "attention.value_length", 2, MAX_WIDTH, s.n_embd / s.n_head);
    if (s.n_k != s.n_v || s.n_k < 2 || s.n_k % 2 != 0) {
        f.refuse(
            "expected keys and values of one even length, got " + std::to_string(s.n_k) + " and " +
            std::to_string(s.n_v));
    }
    const int64_t n_rot = f.whole(p + "rope.dimension_count", arch.rotates_all ? s.n_k : 2, s.n_k, s.n_k);
    if (n_rot % 2 != 0) {
        f.refuse("expected an even rope.dimension_count, got " + std::to_string(n_rot));
    }
    if (arch.sections) {
        check_sections(f, p + "rope.dimension_sections", s.n_k);
    }
    const std::string eps = p + "attention.layer_norm_rms_epsilon";
    f.real(eps, 0.0, 1.0, true);
}

// Vectors are added or multiplied in f32; all else is the left side of a product or a table of rows.
static void check_types(const file & f, bool known) {
    for (const ggml_tensor * t = f.first(); t != nullptr; t = f.next(t)) {
        if (!known && t->type == GGML_TYPE_I32) {
            continue; // tables of indices of some architectures
        }
        f.check_type(t, ggml_n_dims(t) == 1 ? use::vector : use::matrix);
    }
}

// KV cache in f16, scores of one batch for all heads, activations and logits.
static double working_memory(const sizes & s, int64_t n_ctx, int64_t n_vocab) {
    const double cells = (double) (n_ctx > 0 ? n_ctx : s.n_ctx), batch = std::min(512.0, cells);
    const double kv     = cells * (double) s.n_layer * (double) (s.n_head_kv * (s.n_k + s.n_v)) * 2.0;
    const double scores = cells * batch * 4.0 * (double) s.n_head;
    return kv + scores + batch * 4.0 * (double) (8 * s.n_embd + 3 * s.n_ff) + (double) n_vocab * 8.0;
}

// The other parts of a model in several files: whole files with tensors of allowed types.
static uint64_t check_parts(const file & f, const std::string & path, bool known) {
    if (!f.has_type("split.count", GGUF_TYPE_UINT16)) {
        return 0;
    }
    const int64_t n = f.number16("split.count");
    if (n <= 1) {
        return 0;
    }
    if (n > 512 || !f.has_type("split.no", GGUF_TYPE_UINT16) || f.number16("split.no") != 0) {
        f.refuse("expected the first of at most 512 parts, got another", "pass the file that ends in -00001-of-...");
    }
    std::vector<char> prefix(path.size() + 1), name(path.size() + 32);
    if (llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, (int) n) <= 0) {
        f.refuse("expected a name that ends in -00001-of-" + std::to_string(n) + ".gguf, got another", "rename it");
    }
    uint64_t bytes = 0;
    for (int i = 1; i < n; i++) {
        llama_split_path(name.data(), name.size(), prefix.data(), i, (int) n);
        const file part(name.data());
        part.check_mapped();
        if (!part.has_type("split.no", GGUF_TYPE_UINT16)) {
            part.refuse("expected the key split.no, found none");
        }
        check_types(part, known);
        bytes += part.n_bytes;
    }
    return bytes;
}

} // namespace qap_gate

int64_t qap_gate_language(const std::string & path, bool memory, int64_t n_ctx) {
    using namespace qap_gate;
    const file        f(path);
    const std::string arch = f.text("general.architecture");
    if (arch == "clip") {
        f.refuse("expected a language model, got an mmproj", "pass the model's .gguf file");
    }
    if (arch.empty()) {
        f.refuse("expected the key general.architecture, found none");
    }
    f.check_mapped();
    const known_arch * known   = find_arch(arch);
    sizes              s       = check_counts(f, arch);
    const int64_t      n_vocab = check_tokenizer(f);
    if (known != nullptr) {
        check_heads(f, *known, s);
        f.tensor("token_embd.weight", { s.n_embd, n_vocab }, use::matrix);
    }
    if (!f.text(QAP_KEY_ORIGIN).empty() && (known == nullptr || !known->sections)) {
        f.refuse("expected an architecture with M-RoPE in a relabelled file, got " + arch, "relabel it anew");
    }
    check_types(f, known != nullptr);
    const double mapped = (double) f.n_bytes + (double) check_parts(f, path, known != nullptr);
    if (memory) {
        check_memory(f, mapped, working_memory(s, n_ctx, n_vocab));
    }
    return s.n_embd;
}
