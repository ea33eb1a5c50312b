// active-params.cpp: which parameters apply to the calling thread: the order is stated in qap.h.
#include "qap-error.h"
#include "qap-params.h"

#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

static std::mutex                                          g_mutex;
static std::optional<qap_params>                           g_default;
static thread_local std::vector<std::optional<qap_params>> t_overrides;

int qap_default_set(const struct qap_params * params) {
    if (params != nullptr && qap_params_check(params) != 0) {
        return -1;
    }
    const std::lock_guard<std::mutex> lock(g_mutex);
    g_default = params != nullptr ? std::optional<qap_params>(*params) : std::nullopt;
    return 0;
}

bool qap_default_get(struct qap_params * params) {
    const std::lock_guard<std::mutex> lock(g_mutex);
    if (g_default && params != nullptr) {
        *params = *g_default;
    }
    return g_default.has_value();
}

int qap_override_push(const struct qap_params * params) {
    if (params != nullptr && qap_params_check(params) != 0) {
        return -1;
    }
    t_overrides.push_back(params != nullptr ? std::optional<qap_params>(*params) : std::nullopt);
    return 0;
}

void qap_override_pop(void) {
    if (!t_overrides.empty()) {
        t_overrides.pop_back();
    }
}

bool qap_params_active(const qap_params * file, qap_params & out) {
    if (qap_disabled()) {
        return false;
    }
    if (!t_overrides.empty()) {
        if (t_overrides.back()) {
            out = *t_overrides.back();
        }
        return t_overrides.back().has_value();
    }
    if (qap_default_get(&out)) {
        return true;
    }
    const int from_env = qap_params_from_env(&out);
    if (from_env != 0) {
        if (from_env < 0) {
            throw std::runtime_error(std::string("qap: ") + qap_last_error());
        }
        return true;
    }
    if (file != nullptr) {
        out = *file;
        return true;
    }
    return false;
}
