// qap-hooks.h: everything that the patches call. Included by the patched clip-impl.h, so that clip.cpp and
// mtmd.cpp see it. Each hook says who calls it and when; with QAP_DISABLE=1 no plan is ever made, and
// every hook does nothing.
#pragma once

#include "ggml-cpp.h"
#include "ggml.h"
#include "qap-params.h"
#include "scorers/scorers.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

struct ggml_backend;
struct ggml_backend_device;
struct ggml_backend_sched;
class qap_image_cache;
struct llama_context;
struct clip_context_params;
struct clip_ctx;
struct clip_graph;
struct clip_encode_params;
struct clip_hparams;
struct clip_image_f32;
struct clip_image_size;
struct clip_model;
struct clip_image_f32_batch;
struct llama_model;
struct mtmd_context;
struct mtmd_image_preprocessor;
struct mtmd_input_chunk;
struct mtmd_input_chunks;
struct mtmd_internal_part;
struct mtmd_serialization;
struct qap_plan;

// Where the picture lies on its canvas, in pixels from the top left. Carried by clip_image_u8 and clip_image_f32
// (009-padding.patch).
struct qap_area {
    bool padded = false; // false: the picture fills its canvas, whatever the numbers are
    int  x = 0, y = 0, width = 0, height = 0;
    int  tile =
        0; // of a tokenized picture: 1 the whole of it, 2 a part that has an overview beside it; 0: not looked at
};

// mtmd-image.cpp, img_tool::resize(): the area of what comes out. from: that of the source; pad: enum pad_style
qap_area qap_hook_resized(
    const qap_area & from, const clip_image_size & source, const clip_image_size & target, int pad);
// mtmd-image.cpp, img_tool::crop(): the area of the part that is cut out
qap_area qap_hook_cropped(const qap_area & from, int x, int y, int width, int height);

// Our nodes after an encoder graph. Owns the memory of their headers: it must live until the results are read.
struct qap_graph {
    qap_plan *       plan = nullptr; // null: nothing was added
    ggml_context_ptr ctx;
    ggml_tensor *    embeddings  = nullptr; // [n_embd, n_tokens], what upstream would return
    ggml_tensor *    attention   = nullptr; // [n_left], raw, of the class token
    ggml_tensor *    received    = nullptr; // [n_left], raw, from all positions
    ggml_tensor *    cosines     = nullptr; // [n_scored, n_scored], where the selection needs them
    ggml_tensor *    hidden      = nullptr; // [n_hidden, n_left], the projector's input
    ggml_tensor *    early       = nullptr; // [n_left] I32, tokens that an early drop left; null: n_left = n_tokens
    ggml_tensor *    early_total = nullptr; // [n_real], what they were chosen by
    ggml_tensor *    early_near  = nullptr; // [n_real, n_left], their cosines with all; null where those are too many
    qap_score_nodes  scores;                // [n_scored]: tokens that are left and no padding
    uint32_t         signals   = 0;         // what relevance can be made of here, see qap_signal()
    int64_t          n_tokens  = 0;         // rows of `embeddings` that are no special ones
    int64_t          n_embd    = 0;         // numbers of a token that the scores look at
    int64_t          n_columns = 0;         // tokens of a line of the picture

    ggml_backend_buffer_ptr weights; // of the channels, for error "model"; null for others, and where they do not fit
};

// A member of clip_graph, upstream's builder of towers: what was dropped while it built. 012-early-drop.patch
struct qap_early {
    ggml_tensor *                          kept   = nullptr; // [n_early] I32, tokens that are left; null: all are
    ggml_tensor *                          inside = nullptr; // the same as numbers in the tower's own order (windows)
    std::map<ggml_tensor *, ggml_tensor *> places;           // positions, masks of all patches -> of what is left
};

// Each gives back what it got where nothing is dropped. early-drop.cpp
// build_vit(), llava.cpp, qwen2vl.cpp, qwen3vl.cpp, exaone4_5.cpp: after layer `il`, and with -1 before the first. hidden: [n_embd, n_pos] ->
// the rows that are left
ggml_tensor * qap_hook_early_drop(clip_graph & graph, ggml_tensor * hidden, int il);
// clip_encode(), where inputs are set: which tokens are left, where that is known before
void qap_hook_early_inputs(const clip_image_f32_batch & imgs, ggml_cgraph * gf);
// build_vit(), at its end: as many rows as without a drop, zeros for what was dropped
ggml_tensor * qap_hook_early_spread(clip_graph & graph, ggml_tensor * hidden);
// where positions are read or made. places: [n_pos * n_sections] I32, section by section
ggml_tensor * qap_hook_early_places(clip_graph & graph, ggml_tensor * places, int n_sections = 1);
// qwen2vl.cpp, exaone4_5.cpp: who is in the same window; null where there are none. mask: [n_pos, n_pos]
ggml_tensor * qap_hook_early_mask(clip_graph & graph, ggml_tensor * mask);
// qwen3vl.cpp: DeepStack's planes of the layers before. rows: [n, n_tokens]
ggml_tensor * qap_hook_early_tokens(clip_graph & graph, ggml_tensor * rows);
// llava.cpp: the numbers of the patches' rows, [n_patches]; those that are left stand first
ggml_tensor * qap_hook_early_first(clip_graph & graph, ggml_tensor * rows);

// clip.cpp, clip_model_loader::reserve_compute_meta(): after build(), so that the buffers fit our nodes too.
// There is no plan yet; nodes for the default parameters are added where images can be pruned.
qap_graph qap_hook_reserve(const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf);

// clip.cpp, clip_encode(): after build(), before allocation. Adds nodes when the batch has a plan.
qap_graph qap_hook_build(const clip_model & model, const clip_image_f32_batch & imgs, ggml_cgraph * gf);

// clip.cpp, clip_encode(): after the graph ran, when qap_hook_build() added nodes; its result is clip_encode()'s. Without a
// plan all rows are written.
// Reads the scores, selects, and writes the kept rows to `out`, [n_keep, n_embd].
bool qap_hook_collect(const qap_graph & graph, std::vector<float> * out);

// hooks-cache.cpp and 011-encode-once.patch, which also gives access to these parts of the context:
struct qap_clip_parts {
    ggml_backend *       backend;
    ggml_backend_sched * sched;
    qap_image_cache *    cache;
};
qap_clip_parts                   qap_clip_parts_of(const clip_ctx * ctx);
std::shared_ptr<qap_image_cache> qap_hook_new_cache(); // for the context that owns it

// clip.cpp, clip_encode(), at its start: the rows of a picture that was encoded before, pruned by its plan or all of them.
enum qap_recalled { QAP_RECALLED_NOTHING, QAP_RECALLED_ROWS, QAP_RECALLED_ERROR };
qap_recalled qap_hook_recall(clip_ctx * ctx, const clip_image_f32_batch & imgs, std::vector<float> * out);

// clip.cpp, clip_encode(), after the graph ran: keep what it made for the next time.
void qap_hook_remember(clip_ctx * ctx, const clip_image_f32_batch & imgs, const qap_graph & graph, ggml_cgraph * gf);

// mtmd.cpp, mtmd_context's constructor, before the encoder is loaded. Where the program names no device and does not
// forbid GPUs, the one of qap_device_set() is taken.
void qap_hook_device(bool & use_gpu, ggml_backend_device *& device);

// mtmd.cpp, mtmd_context's constructor, at its end. QAP_MAX_IMAGE_TOKENS where the program sets no limit; throws for no number.
void qap_hook_limits(clip_context_params & params);

// mtmd-helper.cpp, mtmd_helper_decode_image_chunk(), before rows are split into batches: rows of a batch, -1 with an error
// where a picture that must stay whole does not fit the context's batches.
int32_t qap_hook_batch(
    const mtmd_context * ctx, const llama_context * lctx, const mtmd_input_chunk * chunk, int32_t n_batch);

// mtmd.cpp, in front of all in mtmd_context's constructor. The qap.* keys of the file or null; throws for invalid ones, and
// where there is no room for the file. flash: false where flash attention is turned off
std::unique_ptr<qap_file_params> qap_hook_load(const char * mmproj, bool flash);

// mtmd.cpp, mtmd_tokenizer::tokenize(): the blank lines around Gemma 3's pictures, in the texts beside them.
// 020-gemma3-breaks.patch
void qap_hook_breaks(const clip_ctx * ctx, std::vector<mtmd_internal_part> & parts);

// mtmd.cpp, mtmd_context::init_vision(): the words before and after each picture. 021-words.patch
void qap_hook_words(int projector, std::string & before, std::string & after);

// mtmd.cpp, mtmd_tokenizer::add_media(): before a picture is preprocessed. Throws for sides that clip.h asserts on.
void qap_hook_picture(uint32_t width, uint32_t height);

// mtmd.cpp, mtmd_context::init_vision(): a token of lookup_token(), where the vocabulary has it. 004-llama4-encoder.patch
inline std::vector<int32_t> qap_hook_token(int32_t token) {
    return token < 0 ? std::vector<int32_t>{} : std::vector<int32_t>{ token };
}

// mtmd.cpp, mtmd_tokenizer::add_media(): after the chunks of one image were added. Plans them.
// Throws std::runtime_error with one line when the image cannot be pruned as asked.
void qap_hook_plan(const mtmd_context * ctx, mtmd_input_chunks & chunks);

// clip.cpp, at loading, after the parameters of each projector (enum projector_type): 006-resize.patch
void qap_hook_resize(int projector, clip_hparams & hparams);
// mtmd-image.cpp, img_tool::calc_size_preserved_ratio(), where no longest edge is set: the size that a picture is resized
// to, in whole multiples of `align`; false: as upstream says. Limits of 0 are none. edge: see image_ceil_edge, 006-resize.patch
bool qap_hook_size(
    clip_image_size & size, const clip_image_size & picture, int align, int min_pixels, int max_pixels, int edge);
// limits.cpp, called there: as many tiles or pixels as the limit on a picture's tokens leaves
void qap_limit_tokens(int projector, clip_hparams & hparams);
// limits.cpp, called where a picture's size is found: throws for one that is more than 200 times as long as wide and
// becomes more pixels than allowed, for the encoder's masks grow with the square of that. cell: pixels of a token's side
void qap_check_thin(const clip_image_size & picture, const clip_image_size & size, int64_t most_pixels, int32_t cell);
// limits.cpp, called by qap_hook_plan(): throws for a picture with more patches a side than the model has positions, for
// ggml asserts on such a look-up
void qap_check_places(const clip_model & model, const clip_image_f32 & image);

// clip.cpp, in 007-llava-next.patch: what the context has loaded
const clip_model & qap_clip_model(const clip_ctx * ctx);

// 007-llava-next.patch, pack.cpp and next-image.cpp: QAP_STOCK_ENCODER=1 turns them off, QAP_DISABLE=1 does not.
// mtmd.cpp, mtmd_context::init_vision(), for a file with grid pinpoints: what cuts a picture into tiles that will be
// packed; null where upstream's shall stay. mrope: the language model has M-RoPE positions
std::unique_ptr<mtmd_image_preprocessor> qap_hook_tiles(const clip_ctx * ctx, bool mrope);
// mtmd.cpp, mtmd_context::init_vision(): what cuts InternVL's pictures into tiles, 008-internvl-tiles.patch
std::unique_ptr<mtmd_image_preprocessor> qap_hook_internvl(const clip_ctx * ctx);
// mtmd.cpp, mtmd_context::init_vision(): what brings the pictures of Kimi-VL and Kimi-K2.5 to their size, 018-kimi-canvas.patch
std::unique_ptr<mtmd_image_preprocessor> qap_hook_kimi(const clip_ctx * ctx);
// mtmd.cpp, mtmd_context::init_vision(): what cuts Llama 4's pictures into tiles, 004-llama4-encoder.patch
std::unique_ptr<mtmd_image_preprocessor> qap_hook_llama4(const clip_ctx * ctx);
// mtmd.cpp, mtmd_context::init_vision(): what cuts MiniCPM-V 4.6's pictures into slices, 016-minicpmv4-6-slices.patch
std::unique_ptr<mtmd_image_preprocessor> qap_hook_minicpmv(const clip_ctx * ctx);
// clip.cpp, clip_n_output_tokens(), for a stack of tiles after LLaVA's projector
int qap_hook_packed_rows(const clip_hparams & hparams, const clip_image_f32 & image);
// clip.cpp, clip_encode(), at its start. Encodes a stack of tiles; false where it is none.
bool qap_hook_packs(const clip_ctx * ctx, const clip_image_f32_batch & imgs);
// Its result is clip_encode()'s.
bool qap_hook_encode_packed(clip_ctx * ctx, const clip_encode_params & params);

// mtmd.cpp, mtmd_image_tokens::n_tokens()
uint32_t qap_hook_n_tokens(const qap_plan & plan);

// mtmd.cpp, mtmd_context::init_vision(), for HunyuanVL: throws where the language model has no positions with several axes,
// for upstream asserts that it has, 015-hunyuan-positions.patch
void qap_hook_hunyuan(bool has_axes);

// mtmd.cpp, mtmd_context's constructor: was this language model relabelled, so that image tokens count like text?
bool qap_hook_index(const llama_model * model);

// mtmd.cpp, mtmd_image_tokens_get_decoder_pos(): with places in a picture (M-RoPE) a kept token has that of its own patch,
// and where gaps are left, of its own row
size_t qap_hook_source_index(const qap_plan * plan, bool places, size_t i);

// mtmd.cpp, mtmd_image_tokens_get_n_pos(), for an image that counts like text: by how much the text after it is moved on
int32_t qap_hook_n_pos(const qap_plan & plan);

// mtmd.cpp, mtmd_input_chunk::serialize() and deserialize(), at their ends. A dense chunk's bytes are upstream's.
void qap_hook_save(const mtmd_input_chunk & chunk, mtmd_serialization & ser);
void qap_hook_load_plan(mtmd_input_chunk & chunk, mtmd_serialization & ser);
