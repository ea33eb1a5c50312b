// quiet.h: upstream writes its log to stderr. Inside a quiet scope we keep the last error line instead, for the
// exception that follows; outside of one (llama-cpp-python's own handlers) everything is printed as before.
#pragma once

#include <string>

void quiet_install(); // at import, and after llama_log_set(), which sets ggml's callback too

class quiet_scope {
public:
    explicit quiet_scope(bool verbose);
    ~quiet_scope();
    quiet_scope(const quiet_scope &)             = delete;
    quiet_scope & operator=(const quiet_scope &) = delete;

    std::string last_error() const; // "" when nothing went wrong

private:
    bool active;
};

// libllama's lines too, inside a quiet scope. Its callback is one for the process: lines of other threads pass through.
class quiet_llama {
public:
    quiet_llama();
    ~quiet_llama();
    quiet_llama(const quiet_llama &)             = delete;
    quiet_llama & operator=(const quiet_llama &) = delete;
};
