// test-hooks.cpp: libmtmd with the hooks in it, under sanitizers: the packaged model encodes pictures of many sizes with
// plans of every kind, chunks are saved, damaged and loaded again, and rows are prefilled. tools/build/sanitize.py --hooks.
#include "check.h"
#include "llama.h"
#include "mtmd-helper.h"
#include "mtmd.h"
#include "qap.h"

#include <algorithm>
#include <cstring>
#include <string>

static int32_t any(generator & rng, const char * kind, int32_t below) {
    int32_t id = between(rng, 0, below - 1);
    while (qap_name_from_id(kind, id) == nullptr) {
        id = between(rng, 0, below - 1);
    }
    return id;
}

static mtmd::input_chunks_ptr tokenize(mtmd_context * ctx, mtmd_bitmap * picture) {
    mtmd::input_chunks_ptr chunks(mtmd_input_chunks_init());
    const std::string      text = std::string("a ") + mtmd_default_marker() + " b";
    const mtmd_input_text  in   = { text.c_str(), text.size(), true, true };
    const mtmd_bitmap *    all  = picture;
    if (mtmd_tokenize(ctx, chunks.get(), &in, &all, 1) != 0) {
        return nullptr;
    }
    return chunks;
}

static std::vector<char> save(const mtmd_input_chunk * chunk) {
    size_t n = 0;
    mtmd_input_chunk_save(chunk, nullptr, 0, &n);
    std::vector<char> bytes(n);
    CHECK(n > 0 && mtmd_input_chunk_save(chunk, bytes.data(), bytes.size(), &n) == 0);
    return bytes;
}

// Loading gives a chunk that can be encoded, or nothing. The bytes after upstream's are ours; those are damaged.
static int damage(generator & rng, const mtmd_input_chunk * chunk, size_t n_dense) {
    const std::vector<char> saved  = save(chunk);
    int                     loaded = 0;
    CHECK(saved.size() > n_dense);
    for (int i = 0; i < 200; i++) {
        std::vector<char> bytes = saved;
        if (between(rng, 0, 3) == 0) {
            bytes.resize((size_t) between(rng, (int32_t) n_dense, (int32_t) bytes.size()));
        }
        for (int n = between(rng, 1, 4); n > 0 && bytes.size() > n_dense; n--) {
            bytes[(size_t) between(rng, (int32_t) n_dense, (int32_t) bytes.size() - 1)] = (char) between(rng, 0, 255);
        }
        mtmd_input_chunk * again = mtmd_input_chunk_load(bytes.data(), bytes.size());
        if (again != nullptr) {
            loaded++;
            CHECK(mtmd_input_chunk_get_n_tokens(again) <= 144);
            mtmd_input_chunk_free(again);
        }
    }
    return loaded;
}

int main(int argc, char ** argv) {
    CHECK(argc == 4); // mmproj, language model, rounds
    qap_avoid_amx();  // as the package does when it is imported
    generator rng(3);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    mtmd_helper_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = 0;
    llama_model * model             = llama_model_load_from_file(argv[2], model_params);
    CHECK(model != nullptr);
    llama_context_params context_params = llama_context_default_params();
    context_params.n_ctx                = 512;
    context_params.n_threads            = 1;
    llama_context *     context         = llama_init_from_model(model, context_params);
    mtmd_context_params params          = mtmd_context_params_default();
    params.use_gpu                      = false;
    params.n_threads                    = 1;
    params.print_timings                = false;
    mtmd_context * ctx                  = mtmd_init_from_file(argv[1], model, params);
    CHECK(context != nullptr && ctx != nullptr && qap_context_why_not(ctx) == nullptr);

    int encoded = 0, refused = 0, loaded = 0;
    for (int i = 0; i < std::atoi(argv[3]); i++) {
        const uint32_t             width = (uint32_t) between(rng, 1, 300), height = (uint32_t) between(rng, 1, 300);
        const std::vector<uint8_t> pixels((size_t) width * height * 3, (uint8_t) between(rng, 0, 255));
        const mtmd::bitmap         picture(mtmd_bitmap_init(width, height, pixels.data()));

        qap_params p = qap_params_default();
        p.n_keep     = between(rng, 1, 144);
        p.error      = any(rng, "error", 200);
        p.outlier    = any(rng, "outlier", 3);
        p.select     = any(rng, "select", 5);
        p.semantic   = any(rng, "semantic", 6);
        p.merge      = any(rng, "merge", 2);
        p.positions  = i % 3; // auto, which is keep with a relabelled language model, compact, keep
        if (between(rng, 0, 1) != 0) {
            p.encoder_keep  = (double) between(rng, 1, 144) / 144.0;
            p.encoder_layer = between(rng, 0, 3);
        } else if (between(rng, 0, 1) != 0) {
            p.duplicates = between(rng, 0, 255);
        }
        p.skip_flat_tiles = between(rng, -1, 255); // no picture is a tile here
        CHECK(qap_override_push(nullptr) == 0);
        mtmd::input_chunks_ptr dense = tokenize(ctx, picture.ptr.get());
        qap_override_pop();
        CHECK(dense && mtmd_input_chunks_size(dense.get()) == 3);
        const size_t n_dense = save(mtmd_input_chunks_get(dense.get(), 1)).size();

        CHECK(qap_override_push(&p) == 0);
        mtmd::input_chunks_ptr chunks = tokenize(ctx, picture.ptr.get());
        qap_override_pop();
        if (!chunks) { // a signal that needs the prompt, or weights of channels that this file has not
            const bool of_prompt = p.semantic == QAP_SEMANTIC_TEXT || p.semantic == QAP_SEMANTIC_CLIP_TEXT;
            CHECK(of_prompt || p.error == QAP_ERROR_MODEL);
            refused++;
            continue;
        }
        auto *       chunk  = const_cast<mtmd_input_chunk *>(mtmd_input_chunks_get(chunks.get(), 1));
        const size_t n_keep = mtmd_input_chunk_get_n_tokens(chunk); // padding is no token
        CHECK(n_keep >= 1 && n_keep <= (size_t) p.n_keep);
        if (mtmd_encode_chunk(ctx, chunk) != 0) {
            refused++;
            continue;
        }
        qap_report report = {};
        CHECK(qap_chunk_report(chunk, &report) == 0 && report.done && report.n_keep == (int32_t) n_keep);
        const int32_t n_real = report.n_total - report.n_padding;
        const int32_t n_left = report.n_early > 0 ? report.n_early : n_real;
        CHECK(report.n_keep == std::min(qap_params_count(&p, n_real), n_left));
        CHECK(p.duplicates < 0 || n_left <= 3); // one colour, and where it meets the padding on two sides
        llama_memory_clear(llama_get_memory(context), true);
        llama_pos past = 0;
        CHECK(
            mtmd_helper_decode_image_chunk(
                ctx, context, chunk, mtmd_get_output_embd(ctx), 0, 0, 64, &past, nullptr, nullptr) == 0);
        CHECK(past == (p.positions == QAP_POSITIONS_COMPACT ? (llama_pos) n_keep : 144));
        loaded += damage(rng, chunk, n_dense);
        encoded++;

        auto * capture = const_cast<mtmd_input_chunk *>(mtmd_input_chunks_get(dense.get(), 1));
        CHECK(
            qap_chunk_plan_capture(ctx, capture, between(rng, 0, 1) != 0) == 0 && mtmd_encode_chunk(ctx, capture) == 0);
        CHECK(qap_chunk_plan_early(ctx, capture, false, &p) == 0 && mtmd_encode_chunk(ctx, capture) == 0);
        CHECK(qap_chunk_report(capture, &report) == 0 && report.n_total == 144);
    }
    const mtmd::bitmap too_wide(mtmd_bitmap_init(46001, 1, std::vector<uint8_t>(46001 * 3).data()));
    CHECK(!tokenize(ctx, too_wide.ptr.get()));
    CHECK(encoded > 0 && loaded > 0);
    std::printf(
        "%d pruned encodes, %d refused, %d damaged chunks of %d loaded\n", encoded, refused, loaded, 200 * encoded);
    mtmd_free(ctx);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
