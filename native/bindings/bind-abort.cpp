// bind-abort.cpp: what a command says when an assertion of ggml or llama.cpp ends it: one line, exit status 1. Only the
// command asks for it; in another program the assertion stays what it is.
#include "bindings.h"
#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <string>

static std::string g_before, g_after;

// "/where/it/was/built/ggml.c:12: GGML_ASSERT(n > 0) failed": without the folders, in one line
static void say_and_leave(const char * message) {
    std::string line(message);
    line = line.substr(0, line.find('\n'));
    line = line.substr(line.find_last_of("/\\", line.find(':', 3)) + 1);
    std::fprintf(stderr, "%s%s%s\n", g_before.c_str(), line.c_str(), g_after.c_str());
    std::fflush(stderr);
    std::_Exit(1);
}

static void on_abort(const std::string & before, const std::string & after) {
    g_before = before;
    g_after  = after;
    ggml_set_abort_callback(say_and_leave);
}

void register_abort(py::module_ & m) {
    m.def("on_abort", &on_abort, py::arg("before"), py::arg("after"));
}
