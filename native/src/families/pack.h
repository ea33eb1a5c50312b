// pack.h: LLaVA-NeXT's picture as one sequence of rows: the whole picture first (the base), then its tiles put together
// to one grid, line by line, without the padding, each line ended by the row `image_newline`.
//
// The pixels of base and tiles stand one below another in one image (clip_image_f32::anyres says how many): so a picture is
// one chunk, and upstream's counting and saving of chunks holds. Facts: transformers 5.24, models/llava_next.
#pragma once

#include <cstdint>
#include <vector>

struct clip_ctx;
struct clip_hparams;
struct clip_image_f32;
struct clip_image_f32_batch;
struct clip_image_size;

struct qap_packing {
    int32_t side   = 0; // of a tile, in tokens
    int32_t grid_x = 0; // tiles
    int32_t grid_y = 0;
    int32_t left   = 0; // tokens of padding beside and above the picture in the grid
    int32_t top    = 0;
    int32_t width  = 0; // tokens of a line of the grid that stand for the picture
    int32_t height = 0; // such lines

    int32_t n_base() const { return side * side; }
    int32_t n_tiles() const { return grid_x * grid_y; } // without the base
    int32_t n_tokens() const { return n_base() + width * height; }
    int32_t n_rows() const { return n_base() + (width + 1) * height; }

    std::vector<int32_t> special() const; // the rows of image_newline, ascending
};

// Is this image (one entry of a batch) a stack of tiles after LLaVA's projector (enum projector_type)?
bool qap_packs(int projector, const clip_image_f32 & image);

qap_packing qap_packing_of(const clip_hparams & hparams, const clip_image_f32 & image);

// The picture's size within a grid of tiles, its shape kept, in pixels.
clip_image_size qap_fitted(const clip_image_size & picture, const clip_image_size & grid);

// Numbers of the tokens of a stack of tiles that the base shows, or a tile that is not within `level` of one colour
// (pixels.h), ascending.
std::vector<int32_t> qap_packed_left(const clip_hparams & hparams, const clip_image_f32 & stack, int32_t level);

// One line that says why the tiles of this model are not packed as it was trained, or null: they are, or there are none.
const char * qap_tiles_why_not(const clip_ctx * ctx, bool mrope);

// A stack of tiles that was saved and loaded: upstream does not save how many tiles it had.
bool qap_lost_packing(const clip_ctx * ctx, const clip_image_f32_batch & batch);
