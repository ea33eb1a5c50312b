// params.cpp: the pruning parameters: their names, kinds, ranges and defaults, each stated once (design: docs/method.md).
// Words, GGUF keys and checks go through the table of fields.
#include "qap-params.h"

#include "ggml.h"
#include "qap-error.h"

#include <cmath>
#include <cstddef>
#include <cstring>

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
    { "error",     "model",     QAP_ERROR_MODEL                   },
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

// --- fields: one row for each parameter; a value of 0 counts as not given where zero_is_unset says so ---

const std::vector<qap_field> & qap_fields() {
    static const std::vector<qap_field> FIELDS = {
        { "keep_ratio",      qap_kind::ratio,  offsetof(qap_params, keep_ratio),      false },
        { "n_keep",          qap_kind::count,  offsetof(qap_params, n_keep),          true  },
        { "alpha",           qap_kind::unit,   offsetof(qap_params, alpha),           false },
        { "error",           qap_kind::choice, offsetof(qap_params, error),           false },
        { "group_size",      qap_kind::count,  offsetof(qap_params, group_size),      false },
        { "outlier",         qap_kind::choice, offsetof(qap_params, outlier),         false },
        { "outlier_weight",  qap_kind::unit,   offsetof(qap_params, outlier_weight),  false },
        { "semantic",        qap_kind::choice, offsetof(qap_params, semantic),        false },
        { "select",          qap_kind::choice, offsetof(qap_params, select),          false },
        { "positions",       qap_kind::choice, offsetof(qap_params, positions),       false },
        { "merge",           qap_kind::choice, offsetof(qap_params, merge),           false },
        { "encoder_keep",    qap_kind::ratio,  offsetof(qap_params, encoder_keep),    false },
        { "encoder_layer",   qap_kind::count,  offsetof(qap_params, encoder_layer),   true  },
        { "skip_flat_tiles", qap_kind::level,  offsetof(qap_params, skip_flat_tiles), false },
        { "duplicates",      qap_kind::level,  offsetof(qap_params, duplicates),      false },
        { "seed",            qap_kind::seed,   offsetof(qap_params, seed),            false },
    };
    return FIELDS;
}

const char * qap_expected(qap_kind kind) {
    switch (kind) {
        case qap_kind::count: return "a whole number from 1";
        case qap_kind::ratio: return "a number in (0, 1]";
        case qap_kind::unit: return "a number in [0, 1]";
        case qap_kind::level: return "a whole number in 0..255, or off";
        case qap_kind::seed: return "a whole number from 0";
        case qap_kind::choice: break;
    }
    return "one of its names (docs/method.md)";
}

bool qap_in_range(const qap_field & field, const qap_params & params) {
    switch (field.kind) {
        case qap_kind::count: return qap_value<int32_t>(field, params) >= (field.zero_is_unset ? 0 : 1);
        case qap_kind::ratio: // false for NaN, as below
            return qap_value<double>(field, params) > 0.0 && qap_value<double>(field, params) <= 1.0;
        case qap_kind::unit: return qap_value<float>(field, params) >= 0.0f && qap_value<float>(field, params) <= 1.0f;
        case qap_kind::level:
            return qap_value<int32_t>(field, params) >= -1 && qap_value<int32_t>(field, params) <= 255;
        case qap_kind::choice: return qap_name_from_id(field.name, qap_value<int32_t>(field, params)) != nullptr;
        case qap_kind::seed: break;
    }
    return true;
}

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
    params.duplicates = params.skip_flat_tiles = -1;
    return params;
}

// What stands in the field, for a line of error.
static double number_of(const qap_field & field, const qap_params & params) {
    switch (field.kind) {
        case qap_kind::ratio: return qap_value<double>(field, params);
        case qap_kind::unit: return (double) qap_value<float>(field, params);
        default: return (double) qap_value<int32_t>(field, params);
    }
}

int qap_params_check(const struct qap_params * params) {
    if (params == nullptr) {
        return qap_fail("expected parameters, got NULL");
    }
    for (const qap_field & field : qap_fields()) {
        const bool replaced = (std::strcmp(field.name, "keep_ratio") == 0 && params->n_keep > 0) ||
                              (std::strcmp(field.name, "alpha") == 0 && params->alpha_dynamic);
        if (replaced || qap_in_range(field, *params)) {
            continue;
        }
        const double got = number_of(field, *params);
        return field.kind == qap_kind::choice
                   ? qap_fail("%s: unknown id %d", field.name, (int) got)
                   : qap_fail("%s: expected %s, got %g", field.name, qap_expected(field.kind), got);
    }
    if (params->duplicates >= 0 && params->encoder_keep < 1.0) {
        return qap_fail(
            "duplicates: expected encoder_keep 1 beside it, got %g; use one of the two", params->encoder_keep);
    }
    qap_clear_error();
    return 0;
}

int qap_weight_roots(const float * weights, int32_t n, std::vector<float> & roots) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) {
        if (!std::isfinite(weights[i]) || weights[i] < 0.0f) {
            return qap_fail(
                "channel_weights: expected finite numbers from 0, got %g for channel %d", (double) weights[i], (int) i);
        }
        sum += (double) weights[i];
    }
    if (!(sum > 0.0)) {
        return qap_fail("channel_weights: expected a weight above 0, got %d that are 0", (int) n);
    }
    const double mean = sum / n; // of equal weights it is exact
    roots.resize((size_t) n);
    for (int32_t i = 0; i < n; i++) {
        roots[(size_t) i] = (float) std::sqrt((double) weights[i] / mean);
    }
    return 0;
}
