// random-files.h: GGUF files with random weights: the shape of a model that people run, for speed and for comparing
// devices. Keys and tensor names are those that python/qap_gguf/convert writes; a tokenizer is copied from a real file.
#pragma once

#include "ggml.h"

#include <string>

struct clip_shape { // CLIP-L/336, of whose 24 layers LLaVA runs 23
    int n_embd  = 1024;
    int n_layer = 23;
    int n_ff    = 4096;
    int n_head  = 16;
    int image   = 336;
    int patch   = 14;
};

struct language_shape { // Llama 2 7B
    int n_embd  = 4096;
    int n_layer = 32;
    int n_ff    = 11008;
    int n_head  = 32;
};

// Each writes beside `path` and renames, so that a file under this name is whole; one that is there is kept.
// They throw std::runtime_error with one line.
void write_random_mmproj(const std::string & path, const clip_shape & shape, int n_proj, ggml_type type);
void write_random_language(
    const std::string & path, const language_shape & shape, const std::string & tokenizer_from, ggml_type type);
