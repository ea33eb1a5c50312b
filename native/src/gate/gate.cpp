// gate.cpp: the checks of gate.h behind the plain C functions of qap.h.
#include "gate.h"

#include "gate-file.h"
#include "qap-error.h"
#include "qap.h"

#include <exception>

template <typename check> static int guarded(const check & run, int64_t * n_embd) {
    try {
        const int64_t width = run();
        if (n_embd != nullptr) {
            *n_embd = width;
        }
        qap_clear_error();
        return 0;
    } catch (const std::exception & err) {
        return qap_fail("%s", err.what());
    }
}

int qap_check_mmproj(const char * path, bool memory, int64_t * n_embd) {
    return guarded([&] { return qap_gate_mmproj(path, memory, /* flash */ true); }, n_embd);
}

double qap_mmproj_bytes(const char * path, bool flash) {
    double     bytes  = -1.0;
    const auto needed = [&] {
        bytes = qap_gate_mmproj_bytes(path, flash);
        return int64_t{ 0 };
    };
    return guarded(needed, nullptr) == 0 ? bytes : -1.0;
}

void qap_container_room(const char * groups, const char * mount, double * total, double * free) {
    const qap_gate::container_room room = qap_gate::find_container_room(groups, mount);
    *total                              = room.total;
    *free                               = room.free;
}

int qap_check_language(const char * path, bool memory, int64_t n_ctx, int64_t * n_embd) {
    return guarded([&] { return qap_gate_language(path, memory, n_ctx); }, n_embd);
}
