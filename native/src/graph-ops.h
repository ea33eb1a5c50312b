// graph-ops.h: who watches our graphs (qap_watch_graphs) is told here.
#pragma once

#include "ggml.h"

// Hand every node of a graph to the watcher of this thread, if there is one.
void qap_show_graph(ggml_cgraph * gf);
