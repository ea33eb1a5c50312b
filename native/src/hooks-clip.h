// hooks-clip.h: what the hooks inside the encoder share among their files.
#pragma once

#include "families/layout.h"
#include "qap-hooks.h"

// Score nodes over the graph's embeddings and signals, and cosines where choosing needs them, all as outputs of `gf`. With
// a plan its padding is left out; without one all that may be needed is added.
void qap_append_scores(qap_graph & graph, ggml_cgraph * gf, const qap_layout & layout, const qap_params & params);
