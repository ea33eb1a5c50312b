// load.cpp: reads the keys and tensors qap_clip_text.* that convert/llava/clip_text.py writes. Every key's type,
// every tensor's type, shape and place in the file are checked before anything is built on them.
#include "clip-text/clip-text.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "gguf.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace {

const char    PREFIX[]   = "qap_clip_text.";
const int32_t MAX_LENGTH = 1 << 17; // of any dimension but the vocabulary: products stay far from overflow

struct file_closer {
    void operator()(FILE * file) const { std::fclose(file); }
};

struct reader {
    std::string      path;
    gguf_context_ptr gguf;
    ggml_context_ptr meta; // the file's tensors without data
    ggml_context *   target = nullptr;

    [[noreturn]] void refuse(const std::string & what) const {
        throw std::runtime_error(path + ": " + what + "; write the file again with qap-gguf convert --clip-text");
    }

    int64_t find(const std::string & name, gguf_type type) const {
        const std::string key = PREFIX + name;
        const int64_t     id  = gguf_find_key(gguf.get(), key.c_str());
        if (id < 0) {
            refuse("expected the key " + key + ", found none");
        }
        if (gguf_get_kv_type(gguf.get(), id) != type) {
            refuse(
                "expected the key " + key + " of type " + gguf_type_name(type) + ", got " +
                gguf_type_name(gguf_get_kv_type(gguf.get(), id)));
        }
        return id;
    }

    int32_t number(const std::string & name, int64_t low, int64_t high) const {
        const uint32_t value = gguf_get_val_u32(gguf.get(), find(name, GGUF_TYPE_UINT32));
        if (value < low || value > high) {
            refuse(
                "expected " + (PREFIX + name) + " in " + std::to_string(low) + ".." + std::to_string(high) + ", got " +
                std::to_string(value));
        }
        return (int32_t) value;
    }

    float epsilon(const std::string & name) const {
        const float value = gguf_get_val_f32(gguf.get(), find(name, GGUF_TYPE_FLOAT32));
        if (!(value >= 0.0f && value <= 1.0f)) {
            refuse("expected " + (PREFIX + name) + " in 0..1, got " + std::to_string(value));
        }
        return value;
    }

    // A tensor of the wanted shape (ne0, ne1; 0 for a vector) in the target context, to be filled later.
    ggml_tensor * take(const std::string & name, int64_t ne0, int64_t ne1) const {
        const std::string   full   = PREFIX + name;
        const ggml_tensor * source = ggml_get_tensor(meta.get(), full.c_str());
        if (source == nullptr) {
            refuse("expected the tensor " + full + ", found none");
        }
        const int64_t wanted[] = { ne0, ne1 > 0 ? ne1 : 1, 1, 1 };
        if (std::memcmp(source->ne, wanted, sizeof(wanted)) != 0) {
            refuse(
                "expected " + full + " of shape (" + std::to_string(wanted[1]) + ", " + std::to_string(ne0) +
                "), got another");
        }
        const ggml_type type   = source->type;
        const bool      packed = type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0;
        if (type != GGML_TYPE_F32 && (!packed || ne1 == 0)) {
            refuse(
                "expected " + full + " in " + (ne1 == 0 ? "f32" : "f32, f16, bf16 or q8_0") + ", got " +
                ggml_type_name(type));
        }
        ggml_tensor * tensor = ggml_new_tensor_2d(target, type, ne0, wanted[1]);
        ggml_set_name(tensor, full.c_str());
        return tensor;
    }

    clip_norm norm(const std::string & name, int64_t n) const {
        return { take(name + ".weight", n, 0), take(name + ".bias", n, 0) };
    }

    clip_linear linear(const std::string & name, int64_t n_in, int64_t n_out) const {
        return { take(name + ".weight", n_in, n_out), take(name + ".bias", n_out, 0) };
    }

    // Copy the values of every tensor of the target from the file to its buffer.
    void fill() const {
        const std::unique_ptr<FILE, file_closer> file(std::fopen(path.c_str(), "rb"));
        if (!file) {
            throw std::runtime_error(path + ": cannot be opened; check the path");
        }
        std::vector<char> bytes;
        const size_t      base = gguf_get_data_offset(gguf.get());
        for (ggml_tensor * t = ggml_get_first_tensor(target); t != nullptr; t = ggml_get_next_tensor(target, t)) {
            const int64_t id = gguf_find_tensor(gguf.get(), ggml_get_name(t));
            bytes.resize(ggml_nbytes(t));
            const auto offset = (off_t) (base + gguf_get_tensor_offset(gguf.get(), id));
            if (fseeko(file.get(), offset, SEEK_SET) != 0 ||
                std::fread(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) {
                throw std::runtime_error(path + ": is cut short at " + ggml_get_name(t) + "; fetch it again");
            }
            ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
        }
    }
};

reader open_file(const std::string & path) {
    reader                 file;
    ggml_context *         meta   = nullptr;
    const gguf_init_params params = { /* no_alloc */ true, &meta };
    file.path                     = path;
    file.gguf.reset(gguf_init_from_file(path.c_str(), params));
    file.meta.reset(meta);
    if (!file.gguf || !file.meta) {
        throw std::runtime_error(path + ": expected a whole GGUF file with tensors, got another; fetch it again");
    }
    if (gguf_find_key(file.gguf.get(), "qap_clip_text.version") < 0) {
        file.refuse("expected CLIP's text tower, found none");
    }
    file.number("version", 1, 1);
    return file;
}

void load_shape(qap_clip_text & clip, const reader & file) {
    clip.n_layer    = file.number("block_count", 1, 1024);
    clip.n_head     = file.number("attention.head_count", 1, 1024);
    clip.n_embd     = file.number("embedding_length", 1, MAX_LENGTH);
    clip.n_ff       = file.number("feed_forward_length", 1, MAX_LENGTH);
    clip.n_ctx      = file.number("context_length", 3, 1 << 13);
    clip.n_proj     = file.number("projection_length", 1, MAX_LENGTH);
    clip.n_vocab    = file.number("vocab_size", 3, 1 << 24);
    clip.n_hidden   = file.number("vision.embedding_length", 1, MAX_LENGTH);
    clip.pool_id    = file.number("eos_token_id", 0, clip.n_vocab - 1);
    clip.eps        = file.epsilon("attention.layer_norm_epsilon");
    clip.eps_vision = file.epsilon("vision.layer_norm_epsilon");
    if (clip.n_embd % clip.n_head != 0) {
        file.refuse(
            "expected an embedding length that " + std::to_string(clip.n_head) + " heads share, got " +
            std::to_string(clip.n_embd));
    }
    const std::string name = gguf_get_val_str(file.gguf.get(), file.find("activation", GGUF_TYPE_STRING));
    if (name == "quick_gelu") {
        clip.activation = CLIP_QUICK_GELU;
    } else if (name == "gelu") {
        clip.activation = CLIP_GELU;
    } else if (name == "gelu_tanh") {
        clip.activation = CLIP_GELU_TANH;
    } else {
        file.refuse("expected the activation quick_gelu, gelu or gelu_tanh, got another");
    }
}

void take_tensors(qap_clip_text & clip, const reader & file) {
    clip.token_embd    = file.take("token_embd.weight", clip.n_embd, clip.n_vocab);
    clip.position_embd = file.take("position_embd.weight", clip.n_embd, clip.n_ctx);
    for (int32_t i = 0; i < clip.n_layer; i++) {
        const std::string at = "blk." + std::to_string(i) + ".";
        clip_text_layer   layer;
        layer.ln1  = file.norm(at + "ln1", clip.n_embd);
        layer.ln2  = file.norm(at + "ln2", clip.n_embd);
        layer.q    = file.linear(at + "attn_q", clip.n_embd, clip.n_embd);
        layer.k    = file.linear(at + "attn_k", clip.n_embd, clip.n_embd);
        layer.v    = file.linear(at + "attn_v", clip.n_embd, clip.n_embd);
        layer.out  = file.linear(at + "attn_out", clip.n_embd, clip.n_embd);
        layer.up   = file.linear(at + "ffn_up", clip.n_embd, clip.n_ff);
        layer.down = file.linear(at + "ffn_down", clip.n_ff, clip.n_embd);
        clip.layers.push_back(layer);
    }
    clip.final_ln    = file.norm("final_ln", clip.n_embd);
    clip.text_proj   = { file.take("text_proj.weight", clip.n_embd, clip.n_proj), nullptr };
    clip.post_ln     = file.norm("post_ln", clip.n_hidden);
    clip.visual_proj = { file.take("visual_proj.weight", clip.n_hidden, clip.n_proj), nullptr };
}

} // namespace

void clip_text_load(qap_clip_text & clip, const std::string & path) {
    reader file = open_file(path);
    load_shape(clip, file);

    const size_t n_tensors = 8 + 16 * (size_t) clip.n_layer;
    clip.ctx.reset(ggml_init({ ggml_tensor_overhead() * n_tensors, nullptr, /* no_alloc */ true }));
    if (!clip.ctx) {
        throw std::runtime_error("expected more memory for the text tower");
    }
    file.target = clip.ctx.get();
    take_tensors(clip, file);
    clip.buffer.reset(ggml_backend_alloc_ctx_tensors(clip.ctx.get(), clip.backend.get()));
    if (!clip.buffer) {
        throw std::runtime_error(
            std::string("expected more memory on ") + ggml_backend_name(clip.backend.get()) + " for the text tower");
    }
    ggml_backend_buffer_set_usage(clip.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    file.fill();
}
