// layout.h: how the rows that an encoder gives relate to the patches of the picture.
//
// A token is a row that stands for a place in the picture and may be dropped. A special row (the [IMG_BREAK] after each line
// of Pixtral, the image_newline after each line of Granite 4's grid; of HunyuanVL the first row, the last, and the end of each
// line) is kept always and is no token. LLaVA-NeXT's rows are put together after the encoder (pack.h). Facts:
// tools/mtmd/models/*.cpp and clip_n_output_tokens().
#pragma once

#include "ggml.h"

#include <array>
#include <cstdint>
#include <vector>

struct clip_hparams;
struct clip_model;
struct clip_image_f32;
struct qap_plan;

// Which patches were merged into token i, as positions of the encoder's attention.
enum class qap_merging {
    none,        // patch i
    block,       // the n_merge x n_merge patches of its place, patches in lines from the left above
    consecutive, // patches n i ... n i + n - 1, n = n_merge^2: the encoder has put them in this order
};

struct qap_layout {
    int64_t     n_tokens    = 0;
    int64_t     n_patches   = 0;
    int64_t     n_patches_x = 0;
    int64_t     n_merge     = 1;  // patches of a token, per side
    int64_t     line_length = 0;  // tokens of a line, after which there is a special row; 0 where there is none
    int64_t     n_base      = 0;  // tokens in front of the lines
    int64_t     first_token = 0;  // row of the first token of a line: special rows, or tokens, stand in front of it
    int64_t     cls_row     = -1; // position of the class token in the attention, or -1
    int64_t     first_row   = 0;  // position of patch 0
    int64_t     n_planes    = 1;  // n_embd numbers each; DeepStack adds planes that later layers get
    qap_merging merging     = qap_merging::none;
    bool        windows     = false; // attention in the order of windows; the input "window_idx" puts tokens back
    bool        attention   = true;  // false: which patches made a token is not known
};

// Planes of a row: the main one, and those that DeepStack, or each further projector of Granite 4, adds.
int64_t qap_planes_of(const clip_model & model);

// Granite 4's tokens: those of the whole picture, then lines of a grid of tiles, each followed by a special row.
struct qap_grid {
    int64_t n_base = 0;
    int64_t width  = 0; // tokens of a line
    int64_t lines  = 0;
};

qap_grid qap_granite_grid(const clip_hparams & hparams, const clip_image_f32 & image);

// Whether this projector (enum projector_type) is of a family that was compared with its original.
bool qap_projector_compared(int projector);

// One line that says why images of this model cannot be pruned, or null.
const char * qap_why_not_prunable(const clip_model & model);

// Whether the towers of this projector have layers that attend in windows.
bool qap_tower_windows(int projector);

// Tiles that Llama 4 cuts a picture into, at most, where the file does not say: max_patches of the published processor.
inline constexpr int32_t QAP_LLAMA4_TILES = 16;

// Whether models with this projector were trained on stretched pictures, not on letterboxed ones (resize.cpp).
bool qap_projector_stretched(int projector);

qap_layout qap_layout_of(const clip_model & model, const clip_image_f32 & image);

// The tokens' main planes. rows: [n_embd * n_planes, n_rows ...] contiguous -> [n_embd, n_tokens] contiguous
ggml_tensor * qap_build_tokens(ggml_context * ctx, ggml_tensor * rows, const qap_layout & layout);

// Means over the patches of each token. signal: [n_pos] of the attention -> [n_tokens]
ggml_tensor * qap_build_pooled(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * signal, const qap_layout & layout);

// A rectangle of tokens in a picture's grid; no lines: all of them.
struct qap_window {
    int64_t columns = 0; // of the grid
    int64_t left = 0, top = 0, width = 0, lines = 0;
};

// Where the tokens of a plan that are no padding lie: nothing where there is no padding.
qap_window qap_window_of(const qap_plan & plan, const qap_layout & layout);

// The tokens in the window, line by line. x: [n, n_tokens] contiguous -> [n, width * lines] contiguous
ggml_tensor * qap_build_window(ggml_context * ctx, ggml_tensor * x, const qap_window & window);

// Where the picture lies on the grid of its tokens: left, top, width, height, in tokens; all of the grid, and what no
// token sees beside it, where it fills its canvas. Zeros where tokens stand in no grid.
std::array<float, 4> qap_find_content(const clip_model & model, const clip_image_f32 & image);

// Tokens of this image that lie wholly in its padding, ascending; none where the order of tokens is not known.
std::vector<int32_t> qap_find_padding(const clip_model & model, const clip_image_f32 & image);
