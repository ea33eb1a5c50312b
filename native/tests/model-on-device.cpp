// model-on-device.cpp: see model-on-device.h.
#include "model-on-device.h"

#include "mtmd-helper.h"

#include <chrono>
#include <random>
#include <stdexcept>

static const int BATCH      = 2048;
static const int MAX_ANSWER = 16; // tokens

static double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

picture noise_picture(uint32_t side) {
    std::mt19937 random(20265);
    picture      image{ side, side, std::vector<uint8_t>((size_t) side * side * 3) };
    for (size_t i = 0; i < image.rgb.size(); i++) { // patches of 28 pixels differ in brightness and noise
        const size_t cell = i / 3 % side / 28 + i / 3 / side / 28 * 31;
        image.rgb[i]      = (uint8_t) (cell * 37 % 160 + random() % (1 + cell * 13 % 90));
    }
    return image;
}

// Adds nodes that the device cannot run: the scheduler would copy their inputs to the CPU.
struct node_watch {
    ggml_backend_dev_t device;
    int *              unsupported;
};

static bool watch_node(ggml_tensor * node, bool ask, void * user) {
    const auto * watch = (const node_watch *) user;
    if (ask && !ggml_backend_dev_supports_op(watch->device, node)) {
        ++*watch->unsupported;
    }
    return !ask; // never stop for a look at the result
}

device_model::device_model(const model_files & files, ggml_backend_dev_t device, const options & opt) : device(device) {
    const bool         on_cpu    = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    ggml_backend_dev_t devices[] = { on_cpu ? nullptr : device, nullptr };
    llama_model_params mp        = llama_model_default_params();
    mp.devices                   = devices;
    mp.n_gpu_layers              = on_cpu ? 0 : 1000;
    mp.load_mode                 = LLAMA_LOAD_MODE_MMAP;
    lm.reset(llama_model_load_from_file(files.model.c_str(), mp));
    if (!lm) {
        throw std::runtime_error("expected a language model, got " + files.model);
    }
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx                = (uint32_t) opt.n_ctx;
    cp.n_batch              = BATCH;
    cp.n_threads            = opt.n_threads;
    cp.n_threads_batch      = opt.n_threads;
    lctx.reset(llama_init_from_model(lm.get(), cp));
    if (!lctx) {
        throw std::runtime_error(std::string("expected more memory for a context on ") + ggml_backend_dev_name(device));
    }
    n_embd = llama_model_n_embd(lm.get());

    static std::vector<std::unique_ptr<node_watch>> watches; // the encoder keeps the address
    mtmd_context_params                             params = mtmd_context_params_default();
    params.use_gpu                                         = !on_cpu || opt.by_default;
    params.device                                          = on_cpu || opt.by_default ? nullptr : device;
    params.print_timings                                   = false;
    params.n_threads                                       = opt.n_threads;
    params.flash_attn_type = opt.flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if (opt.watch_nodes) {
        watches.push_back(std::make_unique<node_watch>(node_watch{ device, &unsupported }));
        params.cb_eval           = watch_node;
        params.cb_eval_user_data = watches.back().get();
    }
    ctx.reset(mtmd_init_from_file(files.mmproj.c_str(), lm.get(), params));
    if (!ctx) {
        throw std::runtime_error("expected an mmproj that fits the model, got " + files.mmproj);
    }
    unsupported = 0; // the warm-up counts too
}

std::shared_ptr<mtmd_input_chunks> device_model::tokenize(
    const std::string & text, const mtmd_bitmap * bitmap, bool special) {
    std::shared_ptr<mtmd_input_chunks> list(mtmd_input_chunks_init(), mtmd_input_chunks_free);
    const mtmd_input_text              input = { text.c_str(), text.size(), special, true };
    if (mtmd_tokenize(ctx.get(), list.get(), &input, &bitmap, 1) != 0) {
        throw std::runtime_error("the prompt could not be tokenized");
    }
    return list;
}

encoded device_model::encode(const picture & image, how mode, const qap_params & params) {
    const mtmd::bitmap_ptr bitmap(mtmd_bitmap_init(image.width, image.height, image.rgb.data()));
    encoded                out;
    if (qap_override_push(mode == how::prune ? &params : nullptr) != 0) {
        throw std::runtime_error(qap_last_error());
    }
    out.list = tokenize(mtmd_default_marker(), bitmap.get(), false);
    qap_override_pop();
    for (size_t i = 0; i < mtmd_input_chunks_size(out.list.get()); i++) {
        const mtmd_input_chunk * chunk = mtmd_input_chunks_get(out.list.get(), i);
        if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) {
            out.chunk = chunk;
        }
    }
    auto * chunk = const_cast<mtmd_input_chunk *>(out.chunk);
    if (mode == how::capture && qap_chunk_plan_capture(ctx.get(), chunk, false) != 0) {
        throw std::runtime_error(qap_last_error());
    }
    const auto start = std::chrono::steady_clock::now();
    if (mtmd_encode_chunk(ctx.get(), chunk) != 0) {
        throw std::runtime_error(std::string("the encode failed: ") + qap_last_error());
    }
    out.seconds        = seconds_since(start);
    const float * data = mtmd_get_output_embd(ctx.get());
    const size_t  n    = mtmd_input_chunk_get_n_tokens(chunk);
    out.n_total        = (int32_t) n;
    out.rows.assign(data, data + n * (size_t) n_embd);
    qap_report report = {};
    if (mode == how::plain || qap_chunk_report(chunk, &report) != 0) {
        return out;
    }
    out.n_total    = report.n_total;
    out.bytes_read = report.bytes_read;
    out.indices.assign(report.indices, report.indices + report.n_keep);
    const std::pair<const char *, const float *> arrays[] = {
        { "attention",   report.attention   },
        { "received",    report.received    },
        { "error",       report.error       },
        { "outlier",     report.outlier     },
        { "semantic",    report.semantic    },
        { "total",       report.total       },
        { "sensitivity", report.sensitivity },
    };
    for (const auto & [name, values] : arrays) {
        if (values != nullptr) {
            out.arrays[name].assign(values, values + report.n_total);
        }
    }
    return out;
}

void device_model::decode(const std::vector<llama_token> & tokens, int n_past) {
    llama_batch batch = llama_batch_init((int32_t) tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = n_past + (llama_pos) i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i + 1 == tokens.size();
    }
    batch.n_tokens       = (int32_t) tokens.size();
    const int32_t status = llama_decode(lctx.get(), batch);
    llama_batch_free(batch);
    if (status != 0) {
        throw std::runtime_error("llama_decode failed with " + std::to_string(status));
    }
}

double device_model::prefill(
    const encoded & image, const std::vector<float> & rows, const std::vector<int32_t> & indices, int n_text) {
    // the plan belongs to a copy: the encode's own stays what it is
    const mtmd::input_chunk_ptr chunk(mtmd_input_chunk_copy(image.chunk));
    if (!indices.empty() &&
        qap_chunk_plan_indices(ctx.get(), chunk.get(), indices.data(), (int32_t) indices.size(), QAP_POSITIONS_AUTO) !=
            0) {
        throw std::runtime_error(qap_last_error());
    }
    std::vector<llama_token> before, after;
    for (int i = 0; i < n_text; i++) {
        (i < n_text / 2 ? before : after).push_back(1000 + 7 * i);
    }
    llama_memory_clear(llama_get_memory(lctx.get()), true);
    llama_synchronize(lctx.get());
    const auto start = std::chrono::steady_clock::now();
    llama_pos  next  = 0;
    decode(before, 0);
    if (mtmd_helper_decode_image_chunk(
            ctx.get(), lctx.get(), chunk.get(), const_cast<float *>(rows.data()), (llama_pos) before.size(), 0, BATCH,
            &next, nullptr, nullptr) != 0) {
        throw std::runtime_error("the image's rows could not be evaluated");
    }
    decode(after, next);
    llama_synchronize(lctx.get());
    const double  seconds = seconds_since(start);
    const float * last    = llama_get_logits_ith(lctx.get(), -1);
    logits.assign(last, last + llama_vocab_n_tokens(llama_model_get_vocab(lm.get())));
    return seconds;
}

std::string device_model::answer(const std::string & file, const std::string & question, const qap_params * params) {
    const mtmd::bitmap_ptr bitmap(
        mtmd_helper_bitmap_init_from_file(ctx.get(), file.c_str(), false, mtmd_helper_init_opt_default()).bitmap);
    if (!bitmap) {
        throw std::runtime_error("expected a picture, got " + file);
    }
    // the packaged model's own template
    const std::string prompt = std::string("<|im_start|>user\n") + mtmd_default_marker() + "\n" + question +
                               "<|im_end|>\n<|im_start|>assistant\n";
    if (qap_override_push(params) != 0) {
        throw std::runtime_error(qap_last_error());
    }
    const auto list = tokenize(prompt, bitmap.get(), true);
    qap_override_pop();
    llama_memory_clear(llama_get_memory(lctx.get()), true);
    llama_pos n_past = 0;
    if (mtmd_helper_eval_chunks(ctx.get(), lctx.get(), list.get(), 0, 0, BATCH, true, &n_past) != 0) {
        throw std::runtime_error(std::string("the prompt could not be evaluated: ") + qap_last_error());
    }
    const llama_vocab * vocab = llama_model_get_vocab(lm.get());
    std::string         text;
    for (int i = 0; i < MAX_ANSWER; i++) {
        const float * last = llama_get_logits_ith(lctx.get(), -1);
        llama_token   best = 0;
        for (llama_token t = 1; t < llama_vocab_n_tokens(vocab); t++) {
            best = last[t] > last[best] ? t : best;
        }
        if (llama_vocab_is_eog(vocab, best)) {
            break;
        }
        char          piece[64];
        const int32_t n = llama_token_to_piece(vocab, best, piece, sizeof(piece), 0, false);
        text.append(piece, n > 0 ? (size_t) n : 0);
        decode({ best }, n_past++);
    }
    return text;
}
