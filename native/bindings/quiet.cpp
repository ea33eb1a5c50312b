// quiet.cpp: see quiet.h.
#include "quiet.h"

#include "ggml.h"
#include "mtmd-helper.h"
#include "mtmd.h"

#include <cstdio>

static thread_local int         t_depth = 0;
static thread_local std::string t_last;

// what received ggml's own lines before us: llama-cpp-python's logger
static ggml_log_callback g_ggml_log      = nullptr;
static void *            g_ggml_log_data = nullptr;

static void keep_error(enum ggml_log_level level, const char * text) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        t_last = text;
    }
}

static void on_mtmd_log(enum ggml_log_level level, const char * text, void * /* user_data */) {
    if (t_depth > 0) {
        keep_error(level, text);
        return;
    }
    std::fputs(text, stderr);
    std::fflush(stderr);
}

static void on_ggml_log(enum ggml_log_level level, const char * text, void * /* user_data */) {
    if (t_depth > 0) {
        keep_error(level, text);
    } else if (g_ggml_log != nullptr) {
        g_ggml_log(level, text, g_ggml_log_data);
    }
}

void quiet_install() {
    mtmd_log_set(on_mtmd_log, nullptr);
    mtmd_helper_log_set(on_mtmd_log, nullptr);
    ggml_log_get(&g_ggml_log, &g_ggml_log_data);
    ggml_log_set(on_ggml_log, nullptr);
}

quiet_scope::quiet_scope(bool verbose) : active(!verbose) {
    if (active) {
        t_depth++;
        t_last.clear();
    }
}

quiet_scope::~quiet_scope() {
    if (active) {
        t_depth--;
    }
}

std::string quiet_scope::last_error() const {
    std::string line = t_last.substr(0, t_last.find_last_not_of(" \n\r\t") + 1);
    for (char & c : line) {
        c = c == '\n' ? ' ' : c;
    }
    return line;
}
