// quiet.cpp: see quiet.h.
#include "quiet.h"

#include "ggml.h"
#include "llama.h"
#include "mtmd-helper.h"
#include "mtmd.h"

#include <cstdio>
#include <mutex>

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

// what receives libllama's lines, and how many quiet_llama are in place of it
static std::mutex        g_llama_mutex;
static int               g_llama_scopes   = 0;
static ggml_log_callback g_llama_log      = nullptr;
static void *            g_llama_log_data = nullptr;

// the first error says why, those that follow only that
static void on_llama_log(enum ggml_log_level level, const char * text, void * /* user_data */) {
    if (t_depth > 0) {
        if (t_last.empty()) {
            keep_error(level, text);
        }
    } else if (g_llama_log != nullptr) {
        g_llama_log(level, text, g_llama_log_data);
    }
}

// llama_log_set() sets ggml's callback as well: keep that one
static void set_llama_log(ggml_log_callback callback, void * data) {
    ggml_log_callback ggml_callback = nullptr;
    void *            ggml_data     = nullptr;
    ggml_log_get(&ggml_callback, &ggml_data);
    llama_log_set(callback, data);
    ggml_log_set(ggml_callback, ggml_data);
}

quiet_llama::quiet_llama() {
    const std::lock_guard<std::mutex> lock(g_llama_mutex);
    if (g_llama_scopes++ == 0) {
        llama_log_get(&g_llama_log, &g_llama_log_data);
        set_llama_log(on_llama_log, nullptr);
    }
}

quiet_llama::~quiet_llama() {
    const std::lock_guard<std::mutex> lock(g_llama_mutex);
    if (--g_llama_scopes == 0) {
        set_llama_log(g_llama_log, g_llama_log_data);
    }
}

void quiet_install() {
    mtmd_log_set(on_mtmd_log, nullptr);
    mtmd_helper_log_set(on_mtmd_log, nullptr);
    ggml_log_callback callback = nullptr;
    void *            data     = nullptr;
    ggml_log_get(&callback, &data);
    if (callback != on_ggml_log) {
        g_ggml_log      = callback;
        g_ggml_log_data = data;
        ggml_log_set(on_ggml_log, nullptr);
    }
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
