// qap-error.h: the one-line error of the calling thread, read back by qap_last_error(); switches of the environment.
#pragma once

#if defined(__GNUC__)
#define QAP_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define QAP_PRINTF(a, b)
#endif

// Store the message and return -1, so that a check can end with `return qap_fail(...)`.
int qap_fail(const char * format, ...) QAP_PRINTF(1, 2);

void qap_clear_error();

// Set, and neither empty nor "0".
bool qap_env_is_on(const char * name);
