// graph-ops.cpp: qap_watch_graphs(), the nodes of the graphs that we run, for tests that compare them with ggml's
// operation tables (docs/ops of llama.cpp). What is seen is what runs: no list of operations is kept anywhere.
#include "graph-ops.h"

#include "qap.h"

struct graph_watcher {
    qap_node_callback callback = nullptr;
    void *            user     = nullptr;
};

static thread_local graph_watcher watcher;

void qap_watch_graphs(qap_node_callback callback, void * user) {
    watcher = { callback, user };
}

void qap_show_graph(ggml_cgraph * gf) {
    for (int i = 0; watcher.callback != nullptr && i < ggml_graph_n_nodes(gf); i++) {
        watcher.callback(ggml_graph_node(gf, i), watcher.user);
    }
}
