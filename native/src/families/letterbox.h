// letterbox.h: which part of what the encoder sees is the picture, and which tokens are padding (009-padding.patch).
#pragma once

#include "qap-hooks.h"

#include <cstdint>
#include <vector>

// Tokens of a grid, line by line, whose square of `cell` pixels lies wholly outside of the picture, ascending.
std::vector<int32_t> qap_padding_tokens(const qap_area & area, int32_t cell, int32_t columns, int32_t lines);
