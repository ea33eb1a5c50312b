// settings.cpp: pruning parameters from words: the environment of a program that knows nothing of pruning (QAP_N_KEEP,
// QAP_SELECT, ...), and the fields of a request. The names are those of the GGUF keys without "qap.".
#include "qap-error.h"
#include "qap-params.h"

#include <cstdlib>
#include <cstring>
#include <locale>
#include <sstream>
#include <string>

namespace {

struct setting {
    const char * name;
    const char * env;
};

// Every setting a word can change, and its variable.
const setting SETTINGS[] = {
    { "keep_ratio",     "QAP_KEEP_RATIO"     },
    { "n_keep",         "QAP_N_KEEP"         },
    { "alpha",          "QAP_ALPHA"          },
    { "error",          "QAP_ERROR"          },
    { "group_size",     "QAP_GROUP_SIZE"     },
    { "outlier",        "QAP_OUTLIER"        },
    { "outlier_weight", "QAP_OUTLIER_WEIGHT" },
    { "semantic",       "QAP_SEMANTIC"       },
    { "select",         "QAP_SELECT"         },
    { "positions",      "QAP_POSITIONS"      },
    { "merge",          "QAP_MERGE"          },
    { "seed",           "QAP_SEED"           },
    { "encoder_keep",   "QAP_ENCODER_KEEP"   },
    { "encoder_layer",  "QAP_ENCODER_LAYER"  },
};

// The whole text as a number, in the form that C++ source has, whatever the program's locale is.
template <typename T> bool read_number(const char * text, T & out) {
    std::istringstream in(text);
    in.imbue(std::locale::classic());
    return text[0] != '-' && (in >> out) && in.peek() == std::istringstream::traits_type::eof();
}

int refuse(const char * name, const char * expected, const char * value) {
    return qap_fail("%s: expected %s, got '%.80s'", name, expected, value);
}

int set_choice(int32_t & out, const char * name, const char * value) {
    const int32_t id = qap_id_from_name(name, value);
    if (id < 0) {
        return refuse(name, "one of its names (docs/method.md)", value);
    }
    out = id;
    return 0;
}

int set_count(int32_t & out, const char * name, const char * value) {
    int32_t number = 0;
    if (!read_number(value, number) || number < 1) {
        return refuse(name, "a whole number from 1", value);
    }
    out = number;
    return 0;
}

int set_ratio(double & out, const char * name, const char * value) {
    double ratio = 0.0;
    if (!read_number(value, ratio) || !(ratio > 0.0 && ratio <= 1.0)) {
        return refuse(name, "a number in (0, 1]", value);
    }
    out = ratio;
    return 0;
}

int set_unit(float & out, const char * name, const char * value) {
    float number = 0.0f;
    if (!read_number(value, number) || !(number >= 0.0f && number <= 1.0f)) {
        return refuse(name, "a number in [0, 1]", value);
    }
    out = number;
    return 0;
}

} // namespace

int qap_params_set(struct qap_params * params, const char * name, const char * value) {
    qap_params & p  = *params;
    const auto   is = [&](const char * other) { return std::strcmp(name, other) == 0; };
    qap_clear_error();
    if (is("n_keep")) {
        return set_count(p.n_keep, name, value);
    }
    if (is("keep_ratio")) {
        if (set_ratio(p.keep_ratio, name, value) != 0) {
            return -1;
        }
        p.n_keep = 0;
        return 0;
    }
    if (is("alpha")) {
        p.alpha_dynamic = std::strcmp(value, "dynamic") == 0;
        return p.alpha_dynamic ? 0 : set_unit(p.alpha, name, value);
    }
    if (is("outlier_weight")) {
        return set_unit(p.outlier_weight, name, value);
    }
    if (is("group_size")) {
        return set_count(p.group_size, name, value);
    }
    if (is("encoder_keep")) {
        return set_ratio(p.encoder_keep, name, value);
    }
    if (is("encoder_layer")) {
        return set_count(p.encoder_layer, name, value);
    }
    if (is("seed")) {
        return read_number(value, p.seed) ? 0 : refuse(name, "a whole number from 0", value);
    }
    int32_t * const choices[] = { &p.error, &p.outlier, &p.semantic, &p.select, &p.positions, &p.merge };
    const char *    names[]   = { "error", "outlier", "semantic", "select", "positions", "merge" };
    for (size_t i = 0; i < 6; i++) {
        if (is(names[i])) {
            return set_choice(*choices[i], name, value);
        }
    }
    return qap_fail("prune: unknown setting '%.80s'; docs/method.md has the names", name);
}

int qap_params_from_env(struct qap_params * params) {
    *params   = qap_params_default();
    int found = 0;
    // keep_ratio first: beside an n_keep it says nothing
    for (const setting & row : SETTINGS) {
        const char * value = std::getenv(row.env);
        if (value == nullptr || value[0] == '\0') {
            continue;
        }
        if (qap_params_set(params, row.name, value) != 0) {
            const std::string why = qap_last_error();
            return qap_fail("%s: %s; correct it or unset it", row.env, why.c_str() + std::strlen(row.name) + 2);
        }
        found = 1;
    }
    return found;
}
