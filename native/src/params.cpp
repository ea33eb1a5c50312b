// params.cpp: names, checks, defaults and GGUF keys of the pruning parameters (design: docs/method.md).
#include "qap-params.h"

#include "ggml.h"
#include "gguf.h"
#include "qap-error.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

#ifndef QAP_UPSTREAM_VERSION
#error "QAP_UPSTREAM_VERSION must be set by CMake from native/upstream/PIN"
#endif

// --- errors and switches ---

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

static bool env_is_on(const char * name) {
    const char * value = std::getenv(name);
    return value != nullptr && value[0] != '\0' && std::strcmp(value, "0") != 0;
}

bool qap_disabled(void) {
    return env_is_on("QAP_DISABLE");
}

bool qap_stock_encoder(void) {
    return env_is_on("QAP_STOCK_ENCODER");
}

const char * qap_upstream_version(void) {
    return QAP_UPSTREAM_VERSION;
}

// --- names: one row for each choice, in the order in which they are listed; Python reads them from here ---

struct name_row {
    const char * kind;
    const char * name;
    int32_t      id;
};

static const name_row NAMES[] = {
    { "error",     "int2",      2                                 },
    { "error",     "int3",      3                                 },
    { "error",     "int4",      QAP_ERROR_INT4                    },
    { "error",     "int5",      5                                 },
    { "error",     "int6",      6                                 },
    { "error",     "int7",      7                                 },
    { "error",     "int8",      QAP_ERROR_INT8                    },
    { "error",     "q4_0",      QAP_ERROR_GGML + GGML_TYPE_Q4_0   },
    { "error",     "q4_1",      QAP_ERROR_GGML + GGML_TYPE_Q4_1   },
    { "error",     "q5_0",      QAP_ERROR_GGML + GGML_TYPE_Q5_0   },
    { "error",     "q5_1",      QAP_ERROR_GGML + GGML_TYPE_Q5_1   },
    { "error",     "q8_0",      QAP_ERROR_GGML + GGML_TYPE_Q8_0   },
    { "error",     "iq4_nl",    QAP_ERROR_GGML + GGML_TYPE_IQ4_NL },
    { "error",     "q4_K",      QAP_ERROR_GGML + GGML_TYPE_Q4_K   },
    { "error",     "q6_K",      QAP_ERROR_GGML + GGML_TYPE_Q6_K   },
    { "outlier",   "range",     QAP_OUTLIER_RANGE                 },
    { "outlier",   "absmax",    QAP_OUTLIER_ABSMAX                },
    { "outlier",   "crest",     QAP_OUTLIER_CREST                 },
    { "semantic",  "auto",      QAP_SEMANTIC_AUTO                 },
    { "semantic",  "clip_text", QAP_SEMANTIC_CLIP_TEXT            },
    { "semantic",  "cls",       QAP_SEMANTIC_CLS                  },
    { "semantic",  "text",      QAP_SEMANTIC_TEXT                 },
    { "semantic",  "attention", QAP_SEMANTIC_ATTENTION            },
    { "semantic",  "none",      QAP_SEMANTIC_NONE                 },
    { "select",    "topk",      QAP_SELECT_TOPK                   },
    { "select",    "dpp",       QAP_SELECT_DPP                    },
    { "select",    "divprune",  QAP_SELECT_DIVPRUNE               },
    { "select",    "coverage",  QAP_SELECT_COVERAGE               },
    { "select",    "random",    QAP_SELECT_RANDOM                 },
    { "select",    "uniform",   QAP_SELECT_UNIFORM                },
    { "positions", "auto",      QAP_POSITIONS_AUTO                },
    { "positions", "compact",   QAP_POSITIONS_COMPACT             },
    { "positions", "keep",      QAP_POSITIONS_KEEP                },
    { "merge",     "none",      QAP_MERGE_NONE                    },
    { "merge",     "average",   QAP_MERGE_AVERAGE                 },
};

int32_t qap_id_from_name(const char * kind, const char * name) {
    for (const name_row & row : NAMES) {
        if (std::strcmp(row.kind, kind) == 0 && std::strcmp(row.name, name) == 0) {
            return row.id;
        }
    }
    return -1;
}

const char * qap_name_from_id(const char * kind, int32_t id) {
    for (const name_row & row : NAMES) {
        if (std::strcmp(row.kind, kind) == 0 && row.id == id) {
            return row.name;
        }
    }
    return nullptr;
}

const char * qap_name_at(const char * kind, int32_t place) {
    for (const name_row & row : NAMES) {
        if (std::strcmp(row.kind, kind) == 0 && place-- == 0) {
            return row.name;
        }
    }
    return nullptr;
}

// --- values ---

struct qap_params qap_params_default(void) {
    qap_params params     = {};
    params.keep_ratio     = 0.25;
    params.alpha          = 0.7f;
    params.error          = QAP_ERROR_INT4;
    params.group_size     = 128;
    params.outlier        = QAP_OUTLIER_RANGE;
    params.outlier_weight = 0.5f;
    params.semantic       = QAP_SEMANTIC_AUTO;
    params.select         = QAP_SELECT_COVERAGE;
    params.positions      = QAP_POSITIONS_AUTO;
    params.encoder_keep   = 1.0;
    return params;
}

static bool in_unit(float value) {
    return value >= 0.0f && value <= 1.0f; // false for NaN
}

int qap_params_check(const struct qap_params * params) {
    if (params == nullptr) {
        return qap_fail("expected parameters, got NULL");
    }
    const qap_params & p = *params;
    if (p.n_keep < 0) {
        return qap_fail("n_keep: expected a number from 1, got %d", (int) p.n_keep);
    }
    if (p.n_keep == 0 && !(p.keep_ratio > 0.0 && p.keep_ratio <= 1.0)) {
        return qap_fail("keep_ratio: expected a number in (0, 1], got %g", p.keep_ratio);
    }
    if (!p.alpha_dynamic && !in_unit(p.alpha)) {
        return qap_fail("alpha: expected a number in [0, 1], got %g", (double) p.alpha);
    }
    if (!in_unit(p.outlier_weight)) {
        return qap_fail("outlier_weight: expected a number in [0, 1], got %g", (double) p.outlier_weight);
    }
    if (p.group_size < 1) {
        return qap_fail("group_size: expected a number from 1, got %d", (int) p.group_size);
    }
    if (!(p.encoder_keep > 0.0 && p.encoder_keep <= 1.0)) {
        return qap_fail("encoder_keep: expected a number in (0, 1], got %g", p.encoder_keep);
    }
    if (p.encoder_layer < 0) {
        return qap_fail("encoder_layer: expected a number from 1, or 0 for a quarter, got %d", (int) p.encoder_layer);
    }
    const struct {
        const char * kind;
        int32_t      id;
    } choices[] = {
        { "error",     p.error     },
        { "outlier",   p.outlier   },
        { "semantic",  p.semantic  },
        { "select",    p.select    },
        { "positions", p.positions },
        { "merge",     p.merge     },
    };
    for (const auto & choice : choices) {
        if (qap_name_from_id(choice.kind, choice.id) == nullptr) {
            return qap_fail("%s: unknown id %d", choice.kind, (int) choice.id);
        }
    }
    qap_clear_error();
    return 0;
}

// --- which parameters apply ---

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

// --- GGUF keys ---

namespace {

// Reads one key at a time and refuses what has another type than the key's.
struct key_reader {
    const gguf_context * gguf;
    const std::string &  file;

    [[noreturn]] void refuse(const std::string & key, const std::string & why) const {
        throw std::runtime_error(
            "qap: " + file + ": key " + key + ": " + why + "; write it again with qap-gguf convert");
    }

    int64_t find(const std::string & key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf, key.c_str());
        if (id >= 0 && gguf_get_kv_type(gguf, id) != type) {
            refuse(
                key, std::string("expected type ") + gguf_type_name(type) + ", got " +
                         gguf_type_name(gguf_get_kv_type(gguf, id)));
        }
        return id;
    }

    void f32(const char * key, float & out) const {
        const int64_t id = find(key, GGUF_TYPE_FLOAT32);
        if (id >= 0) {
            out = gguf_get_val_f32(gguf, id);
        }
    }

    // 0.1 is stored as the float 0.100000001490116: the shortest decimal that rounds to it is the ratio that was meant
    void ratio(const char * key, double & out) const {
        const int64_t id = find(key, GGUF_TYPE_FLOAT32);
        if (id >= 0) {
            const float stored = gguf_get_val_f32(gguf, id);
            out                = stored;
            for (int digits = 9; digits > 0; digits--) {
                char text[32];
                std::snprintf(text, sizeof(text), "%.*g", digits, (double) stored);
                const double shorter = std::strtod(text, nullptr);
                if ((float) shorter != stored) {
                    break;
                }
                out = shorter;
            }
        }
    }

    void u32(const char * key, int32_t & out) const {
        const int64_t id = find(key, GGUF_TYPE_UINT32);
        if (id >= 0) {
            const uint32_t value = gguf_get_val_u32(gguf, id);
            if (value < 1 || value > INT32_MAX) {
                refuse(key, "expected a number from 1, got " + std::to_string(value));
            }
            out = (int32_t) value;
        }
    }

    void name(const char * key, const char * kind, int32_t & out) const {
        const int64_t id = find(key, GGUF_TYPE_STRING);
        if (id >= 0) {
            out = qap_id_from_name(kind, gguf_get_val_str(gguf, id));
            if (out < 0) {
                refuse(key, std::string("unknown value '") + gguf_get_val_str(gguf, id) + "'");
            }
        }
    }
};

} // namespace

std::unique_ptr<qap_params> qap_params_from_gguf(const gguf_context * gguf, const std::string & file) {
    const key_reader keys    = { gguf, file };
    const int64_t    version = keys.find("qap.version", GGUF_TYPE_UINT32);
    if (version < 0) {
        return nullptr;
    }
    if (gguf_get_val_u32(gguf, version) != QAP_VERSION) {
        keys.refuse(
            "qap.version",
            "expected " + std::to_string(QAP_VERSION) + ", got " + std::to_string(gguf_get_val_u32(gguf, version)));
    }
    auto params = std::make_unique<qap_params>(qap_params_default());
    keys.ratio("qap.keep_ratio", params->keep_ratio);
    keys.u32("qap.n_keep", params->n_keep);
    keys.f32("qap.alpha", params->alpha);
    keys.name("qap.error", "error", params->error);
    keys.u32("qap.group_size", params->group_size);
    keys.name("qap.outlier", "outlier", params->outlier);
    keys.f32("qap.outlier_weight", params->outlier_weight);
    keys.name("qap.semantic", "semantic", params->semantic);
    keys.name("qap.select", "select", params->select);
    keys.name("qap.positions", "positions", params->positions);
    keys.name("qap.merge", "merge", params->merge);
    keys.ratio("qap.encoder_keep", params->encoder_keep);
    keys.u32("qap.encoder_layer", params->encoder_layer);
    const int64_t dynamic = keys.find("qap.alpha_dynamic", GGUF_TYPE_BOOL);
    params->alpha_dynamic = dynamic >= 0 && gguf_get_val_bool(gguf, dynamic);
    if (qap_params_check(params.get()) != 0) {
        throw std::runtime_error("qap: " + file + ": " + qap_last_error());
    }
    return params;
}
