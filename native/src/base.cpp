// base.cpp: what every other file may use: the one-line error of the calling thread, the switches of the environment and
// the pinned version.
#include "qap-error.h"
#include "qap.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#ifndef QAP_UPSTREAM_VERSION
#error "QAP_UPSTREAM_VERSION must be set by CMake from native/upstream/PIN"
#endif

static thread_local std::string t_error;

int qap_fail(const char * format, ...) {
    char    buffer[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(buffer, sizeof(buffer), format, args);
    va_end(args);
    t_error = buffer;
    return -1;
}

void qap_clear_error() {
    t_error.clear();
}

const char * qap_last_error(void) {
    return t_error.c_str();
}

bool qap_env_is_on(const char * name) {
    const char * value = std::getenv(name);
    return value != nullptr && value[0] != '\0' && std::strcmp(value, "0") != 0;
}

bool qap_disabled(void) {
    return qap_env_is_on("QAP_DISABLE");
}

bool qap_stock_encoder(void) {
    return qap_env_is_on("QAP_STOCK_ENCODER");
}

const char * qap_upstream_version(void) {
    return QAP_UPSTREAM_VERSION;
}
