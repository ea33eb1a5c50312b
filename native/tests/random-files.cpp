// random-files.cpp: see random-files.h. Weights are drawn from pools: quantized normal numbers of the right scale, block
// by block in random order. Rows differ, and 4 GB take seconds.
#include "random-files.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

static const size_t POOL = 1 << 16; // numbers of a pool
static const size_t PART = 1 << 20; // bytes written at once

struct file_closer {
    void operator()(FILE * file) const { std::fclose(file); }
};

class gguf_writer {
public:
    gguf_context_ptr gguf{ gguf_init_empty() };

    gguf_writer() : ctx(ggml_init({ 4096 * ggml_tensor_overhead(), nullptr, /* no_alloc */ true })) {}

    // ne in ggml's order. Matrices are of the file's type, vectors f32 and near 1 for the weights of norms.
    void add(const std::string & name, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
        ggml_tensor * tensor = ggml_new_tensor_4d(ctx.get(), type, ne0, ne1, ne2, ne3);
        ggml_set_name(tensor, name.c_str());
        gguf_add_tensor(gguf.get(), tensor);
        tensors.push_back(tensor);
    }

    void write(const std::string & path) {
        if (std::unique_ptr<FILE, file_closer>(std::fopen(path.c_str(), "rb"))) {
            return;
        }
        const std::string                  part = path + ".part";
        std::unique_ptr<FILE, file_closer> file(std::fopen(part.c_str(), "wb"));
        if (!file || !gguf_write_to_file_ptr(gguf.get(), file.get(), /* only_meta */ true)) {
            throw std::runtime_error("cannot write " + part);
        }
        for (const ggml_tensor * tensor : tensors) {
            write_tensor(file.get(), tensor);
        }
        if (std::fclose(file.release()) != 0 || std::rename(part.c_str(), path.c_str()) != 0) {
            throw std::runtime_error("cannot write " + path);
        }
    }

private:
    // Quantized numbers of this size; whole rows of one block.
    const std::vector<uint8_t> & pool(ggml_type type, float scale, float mean) {
        std::vector<uint8_t> & found = pools[{
            type, { scale, mean }
        }];
        if (found.empty()) {
            std::normal_distribution<float> normal(mean, scale);
            std::vector<float>              values(POOL);
            for (float & value : values) {
                value = normal(random);
            }
            const int64_t block = ggml_blck_size(type);
            found.resize(POOL / (size_t) block * ggml_type_size(type));
            ggml_quantize_chunk(type, values.data(), found.data(), 0, (int64_t) POOL / block, block, nullptr);
        }
        return found;
    }

    void write_tensor(FILE * file, const ggml_tensor * tensor) {
        const std::string name   = tensor->name;
        const bool        vector = ggml_n_dims(tensor) == 1;
        const bool        norm   = vector && name.size() > 6 && name.rfind("weight") == name.size() - 6;
        const float       fan_in = (float) (tensor->ne[0] * (ggml_n_dims(tensor) == 4 ? 3 * tensor->ne[1] : 1));
        const std::vector<uint8_t> & from =
            pool(tensor->type, vector ? 0.02f : 0.5f / std::sqrt(fan_in), norm ? 1.0f : 0.0f);
        const size_t         unit = ggml_type_size(tensor->type);
        const size_t         mask = from.size() / unit - 1; // a power of two, less one
        std::vector<uint8_t> out;
        out.reserve(PART + unit);
        for (size_t left = ggml_nbytes(tensor) / unit; left > 0; left--) {
            const uint8_t * block = from.data() + (random() & mask) * unit;
            out.insert(out.end(), block, block + unit);
            if (out.size() >= PART || left == 1) {
                put(file, out);
                out.clear();
            }
        }
        const size_t alignment = gguf_get_alignment(gguf.get());
        out.assign((alignment - ggml_nbytes(tensor) % alignment) % alignment, 0);
        put(file, out);
    }

    static void put(FILE * file, const std::vector<uint8_t> & bytes) {
        if (std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size()) {
            throw std::runtime_error("the disk is full");
        }
    }

    ggml_context_ptr                                                              ctx;
    std::vector<const ggml_tensor *>                                              tensors;
    std::map<std::pair<ggml_type, std::pair<float, float>>, std::vector<uint8_t>> pools;
    std::mt19937                                                                  random{ 20265 };
};

void write_random_mmproj(const std::string & path, const clip_shape & shape, int n_proj, ggml_type type) {
    gguf_writer    out;
    gguf_context * kv      = out.gguf.get();
    const float    mean[3] = { 0.48145466f, 0.4578275f, 0.40821073f };
    const float    std[3]  = { 0.26862954f, 0.26130258f, 0.27577711f };
    const int32_t  layer   = shape.n_layer;
    gguf_set_val_str(kv, "general.architecture", "clip");
    gguf_set_val_str(kv, "general.type", "mmproj");
    gguf_set_val_str(kv, "general.name", "random");
    gguf_set_val_u32(kv, "general.file_type", type == GGML_TYPE_F32 ? 0 : 1);
    gguf_set_val_bool(kv, "clip.has_vision_encoder", true);
    gguf_set_val_str(kv, "clip.projector_type", "mlp");
    gguf_set_val_bool(kv, "clip.use_gelu", false);
    gguf_set_val_bool(kv, "clip.use_silu", false);
    gguf_set_val_u32(kv, "clip.vision.image_size", (uint32_t) shape.image);
    gguf_set_val_u32(kv, "clip.vision.patch_size", (uint32_t) shape.patch);
    gguf_set_val_u32(kv, "clip.vision.embedding_length", (uint32_t) shape.n_embd);
    gguf_set_val_u32(kv, "clip.vision.feed_forward_length", (uint32_t) shape.n_ff);
    gguf_set_val_u32(kv, "clip.vision.projection_dim", (uint32_t) n_proj);
    gguf_set_val_u32(kv, "clip.vision.block_count", (uint32_t) shape.n_layer);
    gguf_set_arr_data(kv, "clip.vision.feature_layer", GGUF_TYPE_INT32, &layer, 1);
    gguf_set_val_u32(kv, "clip.vision.attention.head_count", (uint32_t) shape.n_head);
    gguf_set_val_f32(kv, "clip.vision.attention.layer_norm_epsilon", 1e-5f);
    gguf_set_arr_data(kv, "clip.vision.image_mean", GGUF_TYPE_FLOAT32, mean, 3);
    gguf_set_arr_data(kv, "clip.vision.image_std", GGUF_TYPE_FLOAT32, std, 3);

    const int64_t d = shape.n_embd;
    const int64_t n = (int64_t) (shape.image / shape.patch) * (shape.image / shape.patch) + 1;
    out.add("v.class_embd", GGML_TYPE_F32, d);
    out.add("v.patch_embd.weight", type, shape.patch, shape.patch, 3, d);
    out.add("v.position_embd.weight", GGML_TYPE_F32, d, n);
    out.add("v.pre_ln.weight", GGML_TYPE_F32, d);
    out.add("v.pre_ln.bias", GGML_TYPE_F32, d);
    for (int i = 0; i < shape.n_layer; i++) {
        const std::string block = "v.blk." + std::to_string(i) + ".";
        for (const char * part : { "attn_q", "attn_k", "attn_v", "attn_out" }) {
            out.add(block + part + ".weight", type, d, d);
            out.add(block + part + ".bias", GGML_TYPE_F32, d);
        }
        for (const char * part : { "ln1", "ln2" }) {
            out.add(block + part + ".weight", GGML_TYPE_F32, d);
            out.add(block + part + ".bias", GGML_TYPE_F32, d);
        }
        out.add(block + "ffn_up.weight", type, d, shape.n_ff);
        out.add(block + "ffn_up.bias", GGML_TYPE_F32, shape.n_ff);
        out.add(block + "ffn_down.weight", type, shape.n_ff, d);
        out.add(block + "ffn_down.bias", GGML_TYPE_F32, d);
    }
    out.add("mm.0.weight", type, d, n_proj);
    out.add("mm.0.bias", GGML_TYPE_F32, n_proj);
    out.add("mm.2.weight", type, n_proj, n_proj);
    out.add("mm.2.bias", GGML_TYPE_F32, n_proj);
    out.write(path);
}

// The tokenizer.* keys of a file; how many tokens there are.
static int64_t copy_tokenizer(gguf_context * kv, const std::string & from) {
    const gguf_context_ptr source(gguf_init_from_file(from.c_str(), { /* no_alloc */ true, /* ctx */ nullptr }));
    const int64_t          tokens = source ? gguf_find_key(source.get(), "tokenizer.ggml.tokens") : -1;
    if (tokens < 0) {
        throw std::runtime_error("expected a model with a tokenizer, got " + from);
    }
    const int64_t count = (int64_t) gguf_get_arr_n(source.get(), tokens);
    gguf_set_kv(kv, source.get());
    for (int64_t i = gguf_get_n_kv(kv) - 1; i >= 0; i--) {
        const std::string key = gguf_get_key(kv, i);
        if (key.rfind("tokenizer.", 0) != 0) {
            gguf_remove_key(kv, key.c_str());
        }
    }
    return count;
}

void write_random_language(
    const std::string & path, const language_shape & shape, const std::string & tokenizer_from, ggml_type type) {
    gguf_writer    out;
    gguf_context * kv      = out.gguf.get();
    const int64_t  n_vocab = copy_tokenizer(kv, tokenizer_from);
    gguf_set_val_str(kv, "general.architecture", "llama");
    gguf_set_val_str(kv, "general.type", "model");
    gguf_set_val_str(kv, "general.name", "random");
    gguf_set_val_u32(kv, "general.file_type", 2);
    gguf_set_val_u32(kv, "general.quantization_version", 2);
    gguf_set_val_u32(kv, "llama.vocab_size", (uint32_t) n_vocab);
    gguf_set_val_u32(kv, "llama.context_length", 4096);
    gguf_set_val_u32(kv, "llama.embedding_length", (uint32_t) shape.n_embd);
    gguf_set_val_u32(kv, "llama.block_count", (uint32_t) shape.n_layer);
    gguf_set_val_u32(kv, "llama.feed_forward_length", (uint32_t) shape.n_ff);
    gguf_set_val_u32(kv, "llama.attention.head_count", (uint32_t) shape.n_head);
    gguf_set_val_u32(kv, "llama.attention.head_count_kv", (uint32_t) shape.n_head);
    gguf_set_val_f32(kv, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_set_val_u32(kv, "llama.rope.dimension_count", (uint32_t) (shape.n_embd / shape.n_head));

    const int64_t d = shape.n_embd;
    out.add("token_embd.weight", type, d, n_vocab);
    for (int i = 0; i < shape.n_layer; i++) {
        const std::string block = "blk." + std::to_string(i) + ".";
        for (const char * part : { "attn_q", "attn_k", "attn_v", "attn_output" }) {
            out.add(block + part + ".weight", type, d, d);
        }
        out.add(block + "attn_norm.weight", GGML_TYPE_F32, d);
        out.add(block + "ffn_norm.weight", GGML_TYPE_F32, d);
        out.add(block + "ffn_gate.weight", type, d, shape.n_ff);
        out.add(block + "ffn_up.weight", type, d, shape.n_ff);
        out.add(block + "ffn_down.weight", type, shape.n_ff, d);
    }
    out.add("output_norm.weight", GGML_TYPE_F32, d);
    out.add("output.weight", GGML_TYPE_Q6_K, d, n_vocab); // as in a Q4_0 file
    out.write(path);
}
