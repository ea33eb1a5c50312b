// scorers.cpp: the tables that name the builders of errors and outliers. A new one is a file, a row here, a name in
// params.cpp, and its formula in docs/method.md.
#include "scorers.h"

struct error_row {
    int32_t first; // ids first..last
    int32_t last;
    ggml_tensor * (*build)(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how);
};

static const error_row ERRORS[] = {
    { QAP_ERROR_MODEL, QAP_ERROR_MODEL,                  qap_build_error_model },
    { QAP_ERROR_INT2,  QAP_ERROR_INT8,                   qap_build_error_int   },
    { QAP_ERROR_GGML,  QAP_ERROR_GGML + GGML_TYPE_COUNT, qap_build_error_ggml  },
};

struct outlier_row {
    int32_t id;
    ggml_tensor * (*build)(ggml_context * ctx, ggml_tensor * x);
};

static const outlier_row OUTLIERS[] = {
    { QAP_OUTLIER_RANGE,  qap_build_outlier_range  },
    { QAP_OUTLIER_ABSMAX, qap_build_outlier_absmax },
    { QAP_OUTLIER_CREST,  qap_build_outlier_crest  },
};

// qap_params_check() lets only ids through that have a name, and every name has a row: the aborts are unreachable.

ggml_tensor * qap_build_error(ggml_context * ctx, ggml_tensor * x, const qap_error_how & how) {
    for (const error_row & row : ERRORS) {
        if (how.error >= row.first && how.error <= row.last) {
            return row.build(ctx, x, how);
        }
    }
    GGML_ABORT("unknown error id %d", (int) how.error);
}

ggml_tensor * qap_build_outlier(ggml_context * ctx, ggml_tensor * x, int32_t outlier) {
    for (const outlier_row & row : OUTLIERS) {
        if (row.id == outlier) {
            return row.build(ctx, x);
        }
    }
    GGML_ABORT("unknown outlier id %d", (int) outlier);
}
