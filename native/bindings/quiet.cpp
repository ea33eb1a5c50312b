// quiet.cpp: see quiet.h.
#include "quiet.h"

#include "ggml.h"
#include "mtmd-helper.h"
#include "mtmd.h"

#include <cstdio>

static thread_local int         t_depth = 0;
static thread_local std::string t_last;

static void on_log(enum ggml_log_level level, const char * text, void * /* user_data */) {
    if (t_depth == 0) {
        std::fputs(text, stderr);
        std::fflush(stderr);
    } else if (level == GGML_LOG_LEVEL_ERROR) {
        t_last = text;
    }
}

void quiet_install() {
    mtmd_log_set(on_log, nullptr);
    mtmd_helper_log_set(on_log, nullptr);
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
