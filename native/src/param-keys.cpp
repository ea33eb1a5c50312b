// param-keys.cpp: pruning parameters from the qap.* keys of an mmproj file.
#include "gguf.h"
#include "qap-error.h"
#include "qap-params.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

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

    void unit(const std::string & key, float & out) const {
        const int64_t id = find(key, GGUF_TYPE_FLOAT32);
        if (id >= 0) {
            out = gguf_get_val_f32(gguf, id);
        }
    }

    // 0.1 is stored as the float 0.100000001490116: the shortest decimal that rounds to it is the ratio that was meant
    void ratio(const std::string & key, double & out) const {
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

    void count(const std::string & key, int32_t & out) const {
        const int64_t id = find(key, GGUF_TYPE_UINT32);
        if (id >= 0) {
            const uint32_t value = gguf_get_val_u32(gguf, id);
            if (value < 1 || value > INT32_MAX) {
                refuse(key, "expected a number from 1, got " + std::to_string(value));
            }
            out = (int32_t) value;
        }
    }

    void level(const std::string & key, int32_t & out) const {
        const int64_t id = find(key, GGUF_TYPE_UINT32);
        if (id >= 0) {
            const uint32_t value = gguf_get_val_u32(gguf, id);
            if (value > 255) {
                refuse(key, "expected a number in 0..255, got " + std::to_string(value));
            }
            out = (int32_t) value;
        }
    }

    void choice(const std::string & key, const char * kind, int32_t & out) const {
        const int64_t id = find(key, GGUF_TYPE_STRING);
        if (id >= 0) {
            out = qap_id_from_name(kind, gguf_get_val_str(gguf, id));
            if (out < 0) {
                refuse(key, std::string("unknown value '") + gguf_get_val_str(gguf, id) + "'");
            }
        }
    }

    void read(const qap_field & field, qap_params & params) const {
        const std::string key = std::string("qap.") + field.name;
        switch (field.kind) {
            case qap_kind::ratio: ratio(key, qap_value<double>(field, params)); break;
            case qap_kind::unit: unit(key, qap_value<float>(field, params)); break;
            case qap_kind::level: level(key, qap_value<int32_t>(field, params)); break;
            case qap_kind::count: count(key, qap_value<int32_t>(field, params)); break;
            case qap_kind::choice: choice(key, field.name, qap_value<int32_t>(field, params)); break;
            case qap_kind::seed: // chance belongs to a call, not to a file
                break;
        }
    }

    // null where the file has none
    qap_weights_ptr weights(const std::string & key) const {
        const int64_t id = find(key, GGUF_TYPE_ARRAY);
        if (id < 0) {
            return nullptr;
        }
        if (gguf_get_arr_type(gguf, id) != GGUF_TYPE_FLOAT32) {
            refuse(
                key,
                "expected an array of f32, got one of " + std::string(gguf_type_name(gguf_get_arr_type(gguf, id))));
        }
        const auto *       data = static_cast<const float *>(gguf_get_arr_data(gguf, id));
        const size_t       n    = gguf_get_arr_n(gguf, id);
        std::vector<float> roots;
        if (n > INT32_MAX || qap_weight_roots(data, (int32_t) n, roots) != 0) {
            refuse(key, n > INT32_MAX ? "too long" : qap_last_error());
        }
        return std::make_shared<const std::vector<float>>(data, data + n);
    }
};

} // namespace

std::unique_ptr<qap_file_params> qap_params_from_gguf(const gguf_context * gguf, const std::string & file) {
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
    auto params                        = std::make_unique<qap_file_params>();
    static_cast<qap_params &>(*params) = qap_params_default();
    for (const qap_field & field : qap_fields()) {
        keys.read(field, *params);
    }
    const int64_t dynamic = keys.find("qap.alpha_dynamic", GGUF_TYPE_BOOL);
    params->alpha_dynamic = dynamic >= 0 && gguf_get_val_bool(gguf, dynamic);
    if (qap_params_check(params.get()) != 0) {
        throw std::runtime_error("qap: " + file + ": " + qap_last_error());
    }
    params->channel_weights = keys.weights("qap.channel_weights");
    if (params->error == QAP_ERROR_MODEL && params->channel_weights == nullptr) {
        keys.refuse("qap.error", "model needs the key qap.channel_weights, found none");
    }
    return params;
}
