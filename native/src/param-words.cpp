// param-words.cpp: pruning parameters from words: the environment of a program that knows nothing of pruning (QAP_N_KEEP,
// QAP_SELECT, ...), and the fields of a request. The names are those of the GGUF keys without "qap.".
#include "qap-error.h"
#include "qap-params.h"

#include <cstdlib>
#include <cstring>
#include <locale>
#include <sstream>
#include <string>

namespace {

// The whole text as a number, in the form that C++ source has, whatever the program's locale is.
template <typename T> bool read_number(const char * text, T & out) {
    std::istringstream in(text);
    in.imbue(std::locale::classic());
    return text[0] != '-' && (in >> out) && in.peek() == std::istringstream::traits_type::eof();
}

bool read_choice(const char * kind, const char * name, int32_t & out) {
    out = qap_id_from_name(kind, name);
    return out >= 0;
}

bool read_value(const qap_field & field, const char * text, qap_params & params) {
    switch (field.kind) {
        case qap_kind::count:
            return read_number(text, qap_value<int32_t>(field, params)) && qap_value<int32_t>(field, params) > 0;
        case qap_kind::ratio: return read_number(text, qap_value<double>(field, params)) && qap_in_range(field, params);
        case qap_kind::unit: return read_number(text, qap_value<float>(field, params)) && qap_in_range(field, params);
        case qap_kind::seed: return read_number(text, qap_value<uint64_t>(field, params));
        case qap_kind::level:
            qap_value<int32_t>(field, params) = -1;
            return std::strcmp(text, "off") == 0 ||
                   (read_number(text, qap_value<int32_t>(field, params)) && qap_in_range(field, params));
        case qap_kind::choice: break;
    }
    return read_choice(field.name, text, qap_value<int32_t>(field, params));
}

// QAP_KEEP_RATIO for keep_ratio
std::string variable(const qap_field & field) {
    std::string name = std::string("QAP_") + field.name;
    for (char & c : name) {
        c = c >= 'a' && c <= 'z' ? (char) (c - 'a' + 'A') : c;
    }
    return name;
}

} // namespace

int qap_params_set(struct qap_params * params, const char * name, const char * value) {
    qap_clear_error();
    for (const qap_field & field : qap_fields()) {
        if (std::strcmp(field.name, name) != 0) {
            continue;
        }
        qap_params changed = *params;
        changed.alpha_dynamic =
            std::strcmp(name, "alpha") == 0 ? std::strcmp(value, "dynamic") == 0 : params->alpha_dynamic;
        const bool dynamic = std::strcmp(name, "alpha") == 0 && changed.alpha_dynamic;
        if (!dynamic && !read_value(field, value, changed)) {
            return qap_fail("%s: expected %s, got '%.80s'", name, qap_expected(field.kind), value);
        }
        if (std::strcmp(name, "keep_ratio") == 0) {
            changed.n_keep = 0;
        }
        *params = changed;
        return 0;
    }
    return qap_fail("prune: unknown setting '%.80s'; docs/method.md has the names", name);
}

int qap_params_from_env(struct qap_params * params) {
    *params   = qap_params_default();
    int found = 0;
    // keep_ratio is the first field: beside an n_keep it says nothing
    for (const qap_field & field : qap_fields()) {
        const std::string name  = variable(field);
        const char *      value = std::getenv(name.c_str());
        if (value == nullptr || value[0] == '\0') {
            continue;
        }
        if (qap_params_set(params, field.name, value) != 0) {
            const std::string why = qap_last_error();
            return qap_fail("%s: %s; correct it or unset it", name.c_str(), why.c_str() + std::strlen(field.name) + 2);
        }
        found = 1;
    }
    return found == 0 ? 0 : qap_params_check(params) == 0 ? 1 : -1;
}
